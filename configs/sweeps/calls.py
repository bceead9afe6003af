"""Error against the number of network calls, for every sampler.

    python -m jax_repaint.sweep --config=configs/sweeps/calls.py --workdir=sweeps/calls

All start from the best linear estimate (a sample of it, where the sampler wants one) but plain. Calls through which a
gradient is taken (guided, cov_pigdm, pigdm, mmps, dps) count as one and cost more; for `kalman_cg` and `kalman_jvp` see
cg_steps.py. `:smoke` runs a few of the points.
"""

from jax_repaint.points import default_config, smoke


def sweep(add):
    """Every sampler at three to five lengths."""
    add(method="linear_samples")
    for resample_steps in (1, 2, 5):
        add(method="plain", resample_steps=resample_steps)
    for method in ("gp_init", "adaptive", "guided", "x0_blend", "blend_adaptive", "uniform"):
        for t_start, resample_steps in ((25, 1), (75, 1), (75, 2), (75, 5)):
            add(method=method, t_start=t_start, resample_steps=resample_steps)
    for stages in (2, 4, 6):
        add(method="multistage", stages=stages)
    for method in ("kalman", "paste", "cov_pigdm", "pigdm", "mmps", "dps"):
        for levels in (4, 8, 16, 32, 64):
            add(method=method, levels=levels)


def get_config(arg: str = ""):
    """`arg`: empty, or `smoke`."""
    config = default_config(sweep)
    config.title = "error against network calls"
    config.patterns = "walk:90"
    config.x, config.curve = "calls", "method"
    config = smoke(config, arg)
    if arg:
        config.frames = 1
        kept = ("linear_samples", "gp_init", "kalman", "mmps")
        config.points = {
            name: point
            for name, point in config.points.items()
            if point.method in kept and point.get("t_start", 25) == 25 and point.get("levels", 4) <= 8
        }
    return config
