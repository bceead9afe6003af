"""A larger network than that of tiny.py for a CPU: 5 million parameters on the best linear estimate (form `anchored`).

    python -m jax_repaint.train --config=configs/small.py --workdir=runs/small
    python -m jax_repaint.train --config=configs/small.py --workdir=runs/agulhas --config.data.fields=currents.nc

It sees noise up to sigma 130, twice the standard deviation of the leading EOF, so that it serves every sampler.
`configs/small.py:smoke` takes less than a minute on two cores.
"""

from jax_repaint.settings import default_config, smoke


def get_config(arg: str = ""):
    """`arg`: empty, or `smoke`."""
    config = default_config()
    config.model.network = "small"
    config.model.form = "anchored"
    config.noise.sigma_max = 130.0
    config.train.epochs = 20
    config.train.warmup_epochs = 0.5
    config.train.batch = 32
    config.train.learning_rate = 3e-4
    config.train.ema = 0.999
    config.train.held_out = 256
    return smoke(config, arg)
