"""The attention UNet of 23 million parameters on the best linear estimate, with the lowest error of
all networks that docs/results_training.md compares at noise levels up to 3.4.

    python -m jax_repaint.train --config=configs/attn_anchored.py --workdir=runs/attn_anchored

For a GPU, in bfloat16. An H100 that three or four trainings shared took six minutes (docs/results_training.md, Large
networks).
`configs/attn_anchored.py:smoke` takes less than a minute on two cores.
"""

from jax_repaint.settings import default_config, smoke


def get_config(arg: str = ""):
    """`arg`: empty, or `smoke`."""
    config = default_config()
    config.model.network = "standard_attn"
    config.model.form = "anchored"
    config.model.dtype = "bfloat16"
    config.train.epochs = 23
    config.train.warmup_epochs = 1.0
    config.train.batch = 64
    config.train.learning_rate = 6e-4
    config.train.ema = 0.999
    config.train.held_out = 512
    return smoke(config, arg)
