"""Consecutive frames against random ones: how far a row of neighbours is from the season.

    python -m jax_repaint.sweep --config=configs/sweeps/consecutive.py --workdir=sweeps/consecutive

The notes tuned and tested on frames that follow each other: gamma, stages and the hundred frames of their best result.
On random frames its average went from .802 to 1.001 (bulk.py). Here one stage and six on both. A row of frames shorter
than the decorrelation time is about one independent frame, so that there are ten rows, all over the part: what rows are
on the whole is one question, how far one of them is from the others is another.

`:smoke` tries it in a minute on two cores.
"""

from jax_repaint.points import default_config, smoke


def sweep(add):
    """One and six stages on both kinds of frames."""
    for consecutive in (False, True):
        for method in ("adaptive", "multistage"):
            add(method=method, consecutive=consecutive, label=f"{method}, {'row' if consecutive else 'random'}")


def get_config(arg: str = ""):
    """`arg`: empty, or `smoke`."""
    config = default_config(sweep)
    config.title = "frames in a row and at random"
    config.patterns = "line:22"
    config.prior = "seed_gp"
    config.x, config.curve = "consecutive", "method"
    config.stretches = 10
    return smoke(config, arg)
