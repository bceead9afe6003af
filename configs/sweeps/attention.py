"""The network with attention and residual paths against the plain one.

    python -m jax_repaint.train --config=configs/attn.py --workdir=runs/attn
    python -m jax_repaint.train --config=configs/standard.py --workdir=runs/standard
    python -m jax_repaint.sweep --config=configs/sweeps/attention.py --workdir=sweeps/attention

The notes leave it open: similar losses, "modest benefit", no comparison on the same frames. Other models are named by
`--config.points.p000.model=` and p001 to p003. `:smoke` runs the model of the package alone, in a minute on two cores.
"""

from jax_repaint.points import default_config, smoke

MODELS = {"attention": "runs/attn/model", "standard": "runs/standard/model"}


def get_config(arg: str = ""):
    """`arg`: empty, or `smoke`."""
    models = {"package": ""} if arg else MODELS

    def sweep(add):
        for name, folder in models.items():
            for method in ("plain", "adaptive"):
                add(method=method, model=folder, label=f"{name}, {method}")

    config = default_config(sweep)
    config.title = "attention"
    config.patterns = "line:22"
    config.prior = "seed_gp"
    return smoke(config, arg)
