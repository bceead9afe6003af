"""Line, walk, scattered cells and swath: which method for which platform.

    python -m jax_repaint.sweep --config=configs/sweeps/patterns.py --workdir=sweeps/patterns

The notes know the line alone. Ninety to a hundred cells of each but the swath, which has some two hundred. `:smoke`
tries it in a minute on two cores.
"""

from jax_repaint.points import default_config, smoke


def sweep(add):
    """The linear prior, the notes' method with one and six stages, and Kalman guidance."""
    for method in ("linear_samples", "adaptive", "multistage", "kalman"):
        add(method=method)


def get_config(arg: str = ""):
    """`arg`: empty, or `smoke`."""
    config = default_config(sweep)
    config.title = "observation patterns"
    config.patterns = "line:22,walk:90,cells:0.027,swath:3"
    config.x, config.curve = "pattern", "method"
    config = smoke(config, arg)
    if arg:
        config.frames = 1
    return config
