"""Ocean current fields from a few observations, as ensembles: jax_repaint.load().inpaint("track.csv")."""

import os
from typing import TYPE_CHECKING

from jax_repaint.errors import InputError

if TYPE_CHECKING:
    from jax_repaint.model import Model

__all__ = ["InputError", "load"]

SHIPPED = "ram_head"


def load(folder: str | os.PathLike = SHIPPED) -> "Model":
    """The model of a folder that training or an import wrote, or the one of the Ram Head twin in the package.

    Args:
      folder: path; the text "ram_head" names the model in the package, and a folder called so here is "./ram_head".

    Raises:
      InputError: no model there, or one that cannot be read.
    """
    # JAX takes seconds to import; the name of the package alone should not.
    from jax_repaint import model

    return model.load(folder)
