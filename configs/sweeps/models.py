"""Several models in one sampler: `kalman` of each, on the same validation frames.

    python -m jax_repaint.sweep --config=configs/sweeps/models.py:runs/a/model,runs/b/model --workdir=sweeps/models

The argument names their folders; without one it is `--config.model`, or the model of the package. `levels` compares the
denoising errors of models, this what comes of them. `:smoke` tries it in a minute on two cores.
"""

from jax_repaint.points import default_config, smoke


def get_config(arg: str = ""):
    """`arg`: folders of models, separated by commas, `smoke`, or empty."""

    def sweep(add):
        if arg in ("", "smoke"):
            add(method="kalman")
        else:
            for folder in filter(None, map(str.strip, arg.split(","))):
                add(method="kalman", model=folder, label=folder.removesuffix("/model"))

    config = default_config(sweep)
    config.title = "models"
    config.part = "validation"
    config.frames = 48
    return smoke(config, arg if arg == "smoke" else "")
