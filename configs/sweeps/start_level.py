"""Where the posterior samplers start: `kalman` from noise level 3.4 and from 8, on validation frames.

    python -m jax_repaint.sweep --config=configs/sweeps/start_level.py --workdir=sweeps/start_level

A higher start gives means that are better by one per cent and members that spread less (docs/results.md).
`:smoke` tries it in a minute on two cores.
"""

from jax_repaint.points import default_config, smoke


def sweep(add):
    """Two starting levels, the same number of calls."""
    for sigma in (3.4, 8.0):
        add(method="kalman", sigma_max=sigma)


def get_config(arg: str = ""):
    """`arg`: empty, or `smoke`."""
    config = default_config(sweep)
    config.title = "starting level"
    config.part = "validation"
    config.frames = 48
    config.x = "sigma_max"
    return smoke(config, arg)
