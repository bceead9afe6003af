"""Whether gamma is more than how much noise it leaves out: each exponent, and even noise of the same mean weight.

    python -m jax_repaint.sweep --config=configs/sweeps/even_gamma.py --workdir=sweeps/even_gamma

One stage from the notes' Gaussian process; the weights are the means of `adaptive` over missing cells under line:22 on
the twin. `:smoke` tries it in a minute on two cores.
"""

from jax_repaint.points import default_config, smoke

MEAN_WEIGHT = {0.3: 0.771, 1.0: 0.539, 3.0: 0.335, 5.0: 0.274}


def sweep(add):
    """Pairs of one exponent and its mean weight."""
    for gamma, weight in MEAN_WEIGHT.items():
        add(method="adaptive", gamma=gamma)
        add(method="uniform", noise_floor=weight)


def get_config(arg: str = ""):
    """`arg`: empty, or `smoke`."""
    config = default_config(sweep)
    config.title = "exponents and even noise of the same mean weight"
    config.patterns = "line:22"
    config.prior = "seed_gp"
    config.frames = 128
    config.members = 1
    return smoke(config, arg)
