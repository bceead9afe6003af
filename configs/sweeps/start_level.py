"""Where the posterior samplers start: `kalman` from noise level 3.4 and from 8, on validation frames.

    python -m jax_repaint.sweep --config=configs/sweeps/start_level.py --workdir=sweeps/start_level

The argument names other levels, as in `configs/sweeps/start_level.py:0.3,1,3.4`. A higher start gives means that are
better by one per cent and members that spread less (docs/results_training.md, Levels that matter).
`:smoke` tries it in a minute on two cores.
"""

from jax_repaint.errors import InputError
from jax_repaint.points import default_config, smoke


def get_config(arg: str = ""):
    """`arg`: levels, separated by commas, `smoke`, or empty."""
    try:
        starts = [float(sigma) for sigma in arg.split(",")] if arg not in ("", "smoke") else [3.4, 8.0]
    except ValueError as error:
        raise InputError(f"the argument is noise levels, such as 0.3,1,3.4, smoke or nothing, got {arg!r}") from error

    def sweep(add):
        for sigma in starts:
            add(method="kalman", sigma_max=sigma)

    config = default_config(sweep)
    config.title = "starting level"
    config.part = "validation"
    config.frames = 48
    config.x = "sigma_max"
    return smoke(config, arg if arg == "smoke" else "")
