"""Scale of the gradient guidance towards the GP, 1e-5 to 500.

    python -m jax_repaint.sweep --config=configs/sweeps/guidance_scale.py --workdir=sweeps/guidance_scale

The notes, average of MSE over that of the GP:

    scale     <= 1e-4   .001    .01    .05     .5      1    >= 5
    ratio        .895   .896   .917   .959   .992   .995    NaN

One program serves all scales. Points that fail are marked with the step at which they do. A call takes the gradient
through the network too, and costs more for it. `:smoke` tries it in a minute on two cores.
"""

from jax_repaint.points import default_config, smoke

SCALES = (1e-5, 1e-4, 1e-3, 0.01, 0.05, 0.5, 1.0, 5.0, 50.0, 500.0)


def sweep(add):
    """Ten scales."""
    for scale in SCALES:
        add(method="guided", guidance_scale=scale)


def get_config(arg: str = ""):
    """`arg`: empty, or `smoke`."""
    config = default_config(sweep)
    config.title = "scale of the guidance"
    config.patterns = "line:22"
    config.prior = "seed_gp"
    config.x = "guidance_scale"
    config = smoke(config, arg)
    if arg:
        config.frames = 1
    return config
