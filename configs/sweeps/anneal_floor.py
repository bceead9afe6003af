"""A noise floor that rises to 1 as t goes to 0, against a constant one.

    python -m jax_repaint.sweep --config=configs/sweeps/anneal_floor.py --workdir=sweeps/anneal_floor

The notes, ten frames, average of MSE over that of the GP, gamma 1:

                constant    annealed
    stage 1         .894        .906
    stage 6         .759        .789

`:smoke` tries it in a minute on two cores.
"""

from jax_repaint.points import default_config, smoke


def sweep(add):
    """Six stages of each."""
    add(method="multistage", gamma=1.0, label="constant")
    add(method="multistage", gamma=1.0, anneal=True, label="annealed")


def get_config(arg: str = ""):
    """`arg`: empty, or `smoke`."""
    config = default_config(sweep)
    config.title = "annealed noise floor"
    config.patterns = "line:22"
    config.prior = "seed_gp"
    config.x, config.curve = "stage", "label"
    return smoke(config, arg)
