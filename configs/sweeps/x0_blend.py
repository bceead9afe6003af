"""Blending the estimate of x0 with the GP, alone and with adaptive noise.

    python -m jax_repaint.sweep --config=configs/sweeps/x0_blend.py --workdir=sweeps/x0_blend

The notes: blending alone improves on gp_init by .2 % (.998 of it), "the noise washes it out"; together with adaptive
noise it was an idea that nobody had tried. `:smoke` tries it in a minute on two cores.
"""

from jax_repaint.points import default_config, smoke


def sweep(add):
    """Without and with blending, without and with adaptive noise, and half of it."""
    for method in ("gp_init", "x0_blend", "adaptive", "blend_adaptive"):
        add(method=method)
    for method in ("x0_blend", "blend_adaptive"):
        add(method=method, blend=0.5)


def get_config(arg: str = ""):
    """`arg`: empty, or `smoke`."""
    config = default_config(sweep)
    config.title = "blending x0"
    config.patterns = "line:22"
    config.prior = "seed_gp"
    return smoke(config, arg)
