"""The network `standard` on the Ram Head twin: the vanilla baseline, without attention and without residual paths.

    python -m jax_repaint.train --config=configs/standard.py --workdir=runs/standard

Everything else is the default, as in configs/attn.py, so that the networks can be compared. Made for a GPU or TPU.
"""

from jax_repaint.settings import default_config, smoke


def get_config(arg: str = ""):
    """`arg`: empty, or `smoke`."""
    config = default_config()
    config.model.network = "standard"
    return smoke(config, arg)
