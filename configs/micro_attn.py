"""The attention UNet of the experiments on a CPU, on the Ram Head twin.

    python -m jax_repaint.train --config=configs/micro_attn.py --workdir=runs/micro_attn

A quarter of the width of configs/attn.py, from half the grid on: 0.6 million parameters and 0.14 GFLOP a call, for
experiments of many thousand calls a field. It starts from the best linear estimate: with `--config.model.form=eps`, as
the large ones, it is worse than that estimate after four epochs (docs/results_training.md, Recipes). Six take a quarter
of an hour on two quiet cores.
`configs/micro_attn.py:smoke` takes less than a minute.
"""

from jax_repaint.settings import default_config, smoke


def get_config(arg: str = ""):
    """`arg`: empty, or `smoke`."""
    config = default_config()
    config.model.network = "micro_attn"
    config.model.form = "anchored"
    config.train.epochs = 6
    config.train.warmup_epochs = 0.5
    config.train.batch = 16
    config.train.learning_rate = 5e-4
    config.train.ema = 0.999
    config.train.dispatch = 10
    config.train.held_out = 256
    return smoke(config, arg)
