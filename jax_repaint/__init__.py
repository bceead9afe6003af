"""Ocean current fields from a few observations, as ensembles: jax_repaint.load().inpaint("track.csv", step="1h")."""

import os
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from jax_repaint.errors import InputError

if TYPE_CHECKING:
    from jax_repaint.model import Model

__all__ = ["InputError", "__version__", "load"]

try:
    __version__ = version("jax-repaint")
except PackageNotFoundError:
    # Imported from a checkout that was not installed.
    __version__ = ""

SHIPPED = "ram_head"


def load(folder: str | os.PathLike = SHIPPED) -> "Model":
    """The model of a folder that training or an import wrote, or the one of the Ram Head twin in the package.

    `help(jax_repaint.load().inpaint)` says what its method `inpaint` takes.

    Args:
      folder: path; the text "ram_head" names the model in the package, and a folder called so here is "./ram_head".

    Raises:
      InputError: no model there, or one that cannot be read.
    """
    # JAX takes seconds to import; the name of the package alone should not.
    from jax_repaint import model

    return model.load(folder)
