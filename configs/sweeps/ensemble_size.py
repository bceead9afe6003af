"""Means of 1 to 32 members.

    python -m jax_repaint.sweep --config=configs/sweeps/ensemble_size.py --workdir=sweeps/ensemble_size

The notes only guess: "variance goes down by 1/N, even N = 3-5 could reduce the error". The mean of M members has the
error of the mean of all plus 1/M of the variance that they have around it; how much that is, is in the table.

32 members are sampled once; smaller ensembles are the first of them. Pairs have even sizes only. `:smoke` tries it in a
minute on two cores.
"""

from jax_repaint.points import default_config, smoke


def sweep(add):
    """One stage, six stages, pairs."""
    for method in ("gp_init", "adaptive", "multistage", "kalman"):
        add(method=method)


def get_config(arg: str = ""):
    """`arg`: empty, or `smoke`."""
    config = default_config(sweep)
    config.title = "members of the mean"
    config.patterns = "line:22"
    config.members = 32
    config.sizes = (1, 2, 4, 8, 16)
    config.x, config.curve = "members", "method"
    return smoke(config, arg)
