"""Half the cost of `small`, on the whole Ram Head twin: the first part of the training of the package's model.

    python -m jax_repaint.train --config=configs/tiny.py --workdir=runs/tiny

2.4 million parameters on top of the linear estimate of 256 EOFs. Four epochs of 10,880 frames take half an hour on
two CPU cores; configs/conditional.py goes on from there, and the model's card says how further.
`configs/tiny.py:smoke` takes less than a minute.
"""

from jax_repaint.settings import default_config, smoke


def get_config(arg: str = ""):
    """`arg`: empty, or `smoke`."""
    config = default_config()
    config.model.network = "tiny"
    config.model.form = "anchored"
    config.train.epochs = 4
    config.train.warmup_epochs = 0.5
    config.train.batch = 16
    config.train.learning_rate = 5e-4
    config.train.ema = 0.999
    config.train.dispatch = 10
    config.train.held_out = 256
    return smoke(config, arg)
