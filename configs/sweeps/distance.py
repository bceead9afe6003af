"""Error against the distance to the nearest observation, on a vehicle's walk.

    python -m jax_repaint.sweep --config=configs/sweeps/distance.py --workdir=sweeps/distance

Errors of ensemble means in bins of 1 to 20 cells and beyond, beside those of the best linear estimate in the same
cells. Every sweep has these columns in rows.parquet; this one draws them. `:smoke` tries it in a minute on two cores.
"""

from jax_repaint.points import default_config, smoke


def sweep(add):
    """The linear prior, the notes' method with one and six stages, and Kalman guidance."""
    for method in ("linear_samples", "adaptive", "multistage", "kalman"):
        add(method=method)


def get_config(arg: str = ""):
    """`arg`: empty, or `smoke`."""
    config = default_config(sweep)
    config.title = "error against distance"
    config.patterns = "walk:90"
    config.x = "distance"
    return smoke(config, arg)
