"""Plain RePaint from noise against a Gaussian process: the first test of the notes.

    python -m jax_repaint.sweep --config=configs/sweeps/ddpm_vs_gp.py --workdir=sweeps/ddpm_vs_gp

The notes, one sample on each of ten frames, 250 steps with 5 resamples, line of row 22:

    mean MSE of the sample .003125, of the GP .002419: ratio of means 1.29, 3 wins of 10

1,246 network calls a member. `:smoke` tries it in a minute on two cores.
"""

from jax_repaint.points import default_config, smoke


def sweep(add):
    """One point."""
    add(method="plain")


def get_config(arg: str = ""):
    """`arg`: empty, or `smoke`."""
    config = default_config(sweep)
    config.title = "plain RePaint against the Gaussian process"
    config.frames = 10
    config.patterns = "line:22"
    config.prior = "seed_gp"
    return smoke(config, arg)
