"""A network for fields with gaps, of which most is observed: the rest that clouds or a radar's outages leave.

    python -m jax_repaint.train --config=configs/gaps.py --workdir=runs/gaps

It starts from the model that comes with the package, and stands on a linear estimate of as few of 1,024 EOFs as do
where 30 % of the cells are hidden and the others known to `observed.error`, here 512; from a few observed cells nothing
would tell so many apart. Half an hour on two cores that had other work. docs/results.md, Other platforms, has what came
of it. For fields of your own add `--config.data.fields=FILE --config.init_from=`.
`configs/gaps.py:smoke` takes less than a minute on two cores.
"""

from jax_repaint.settings import default_config, smoke


def get_config(arg: str = ""):
    """`arg`: empty, or `smoke`."""
    config = default_config()
    config.model.network = "tiny"
    config.model.form = "anchored"
    config.model.rank = 1024
    config.model.patterns = "gaps:0.3"
    config.init_from = "ram_head"
    config.train.epochs = 4
    config.train.warmup_epochs = 0.25
    config.train.batch = 16
    config.train.learning_rate = 5e-4
    config.train.ema = 0.999
    config.train.dispatch = 10
    config.train.held_out = 256
    return smoke(config, arg)
