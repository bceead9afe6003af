"""A network that is given the observations: the network `tiny`, trained on lines, walks and scattered cells.

    python -m jax_repaint.train --config=configs/conditional.py --workdir=runs/conditional --config.init_from=runs/tiny

It starts from a run of configs/tiny.py, or without `init_from` from the model that comes with the package, and from the
best linear estimate given x and the observations together. The held-out loss is in units of that estimate's expected
error.
`configs/conditional.py:smoke` takes less than a minute on two cores.
"""

from jax_repaint.settings import default_config, smoke


def get_config(arg: str = ""):
    """`arg`: empty, or `smoke`."""
    config = default_config()
    config.model.network = "tiny"
    config.model.form = "conditional"
    config.init_from = "ram_head"
    config.train.epochs = 4
    config.train.warmup_epochs = 0.25
    config.train.batch = 16
    config.train.learning_rate = 5e-4
    config.train.ema = 0.999
    config.train.dispatch = 10
    config.train.held_out = 256
    return smoke(config, arg)
