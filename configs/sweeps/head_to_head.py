"""Plain, GP-init, guided and adaptive on the same frames: what the start, the guidance and the noise weight bring.

    python -m jax_repaint.sweep --config=configs/sweeps/head_to_head.py --workdir=sweeps/head_to_head

The notes, eight frames, one sample of each, average of MSE over that of the GP:

    plain .928    gp_init .909    guided (scale .001) .911    adaptive .878, which wins on all eight

All start from the notes' GP but plain, which starts from noise; `uniform` is adaptive with one noise weight everywhere,
to tell less noise from noise in the right places. `:smoke` tries it in a minute on two cores.
"""

from jax_repaint.points import default_config, smoke


def sweep(add):
    """Five methods."""
    for method in ("plain", "gp_init", "guided", "adaptive", "uniform"):
        add(method=method)


def get_config(arg: str = ""):
    """`arg`: empty, or `smoke`."""
    config = default_config(sweep)
    config.title = "four methods and a control"
    config.patterns = "line:22"
    config.prior = "seed_gp"
    return smoke(config, arg)
