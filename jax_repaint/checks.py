"""Numbers that a user sets, checked where they come in, before a formula meets what is none."""

import math
from typing import Any

import numpy as np

from jax_repaint.errors import InputError


def check_number(name: str, value: Any) -> None:
    """Raises InputError unless `value` is one real number; its range is for the caller, whose bounds NaN is outside."""
    if not _is_number(value):
        raise InputError(f"{name} must be a number, got {value!r}")


def whole_number(name: str, value: Any, least: int) -> int:
    """The same as an int; 5.0 is a whole number too.

    Raises:
      InputError: no whole number, or one below `least`.
    """
    countable = _is_number(value) and not isinstance(value, bool) and math.isfinite(value)
    if not countable or int(value) != value or value < least:
        raise InputError(f"{name} must be a whole number, at least {least}, got {value!r}")
    return int(value)


def _is_number(value: Any) -> bool:
    # Arrays without axes are numbers too, text like "75" is not, though float() would take it.
    return np.ndim(value) == 0 and np.asarray(value).dtype.kind in "biuf"
