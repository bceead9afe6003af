"""The notes' best configuration on a hundred frames, random and consecutive.

    python -m jax_repaint.sweep --config=configs/sweeps/bulk.py --workdir=sweeps/bulk

The notes, six stages, gamma 3, one sample a frame, MSE over that of the GP:

                  average   median    min     max    wins
    consecutive      .802     .809   .449   2.075    94 %
    random          1.001     .825   .479   5.350    80 %

The consecutive ones are in ten rows here, since a row is about one independent frame. 1,631 network calls a member.
`:smoke` tries it in a minute on two cores.
"""

from jax_repaint.points import default_config, smoke


def sweep(add):
    """The same method on both kinds of frames."""
    add(method="multistage", label="random")
    add(method="multistage", consecutive=True, label="consecutive")


def get_config(arg: str = ""):
    """`arg`: empty, or `smoke`."""
    config = default_config(sweep)
    config.title = "a hundred frames"
    config.frames = 100
    config.patterns = "line:22"
    config.prior = "seed_gp"
    config.stretches = 10
    return smoke(config, arg)
