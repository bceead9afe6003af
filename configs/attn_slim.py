"""The network `standard_attn_slim` on the Ram Head twin: 6 million parameters, attention at one level, dropout 0.1.

    python -m jax_repaint.train --config=configs/attn_slim.py --workdir=runs/attn_slim

Everything else is the default, as in configs/attn.py, so that the networks can be compared. Made for a GPU or TPU.
"""

from jax_repaint.settings import default_config, smoke


def get_config(arg: str = ""):
    """`arg`: empty, or `smoke`."""
    config = default_config()
    config.model.network = "standard_attn_slim"
    return smoke(config, arg)
