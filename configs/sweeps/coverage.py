"""Error against the share of cells that are observed, scattered at random.

    python -m jax_repaint.sweep --config=configs/sweeps/coverage.py --workdir=sweeps/coverage

From a quarter of a per cent (9 of 3,787 cells of the twin) to 16 %. `:smoke` takes two shares.
"""

from jax_repaint.points import default_config, smoke


def sweep(add):
    """The linear prior, the notes' method with one and six stages, and Kalman guidance."""
    for method in ("linear_samples", "adaptive", "multistage", "kalman"):
        add(method=method)


def get_config(arg: str = ""):
    """`arg`: empty, or `smoke`."""
    config = default_config(sweep)
    config.title = "error against coverage"
    config.patterns = "cells:0.0025,cells:0.005,cells:0.01,cells:0.02,cells:0.04,cells:0.08,cells:0.16"
    config.x, config.curve = "coverage", "method"
    config = smoke(config, arg)
    if arg:
        config.frames = 1
        config.patterns = "cells:0.005,cells:0.02"
    return config
