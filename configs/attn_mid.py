"""The network `standard_attn_mid` on the Ram Head twin: 13 million parameters, attention at two levels, dropout 0.1.

    python -m jax_repaint.train --config=configs/attn_mid.py --workdir=runs/attn_mid

Everything else is the default, as in configs/attn.py, so that the networks can be compared. Made for a GPU or TPU.
"""

from jax_repaint.settings import default_config, smoke


def get_config(arg: str = ""):
    """`arg`: empty, or `smoke`."""
    config = default_config()
    config.model.network = "standard_attn_mid"
    return smoke(config, arg)
