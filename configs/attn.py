"""The attention UNet of 23 million parameters on the Ram Head twin: eps prediction, 250 linear steps.

    python -m jax_repaint.train --config=configs/attn.py --workdir=runs/attn

Made for a GPU or TPU: with `--config.model.dtype=bfloat16` there. docs/results_training.md, Large networks, has a
shorter recipe and what came of it.
`configs/attn.py:smoke` shrinks data and run to less than a minute on two cores, to see that everything works.
"""

from jax_repaint.settings import default_config, smoke


def get_config(arg: str = ""):
    """`arg`: empty, or `smoke`."""
    config = default_config()
    config.model.network = "standard_attn"
    config.model.form = "eps"
    config.train.epochs = 200
    config.train.batch = 16
    config.train.learning_rate = 3e-4
    return smoke(config, arg)
