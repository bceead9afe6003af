"""What a user sets, checked where it comes in, before a formula meets numbers that are none."""

import math
from collections.abc import Mapping
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


def check_complete(given: Mapping[str, Any], usual: Mapping[str, Any], what: str) -> None:
    """Whether a configuration is one of `what`, with all settings of `usual`; another command has others.

    Raises:
      InputError: a setting is missing.
    """

    def names(settings: Mapping[str, Any], within: str = "") -> list[str]:
        return [
            full
            for name, value in settings.items()
            for full in (names(value, f"{within}{name}.") if isinstance(value, Mapping) else [f"{within}{name}"])
        ]

    found = names(given)
    missing = [name for name in names(usual) if name not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"the configuration is not one of a {what}: it has no {missing[0]}{more}; those of trainings are in "
            "configs/, of sweeps in configs/sweeps/"
        )


def _is_number(value: Any) -> bool:
    # Arrays without axes are numbers too, text like "75" is not, though float() would take it.
    return np.ndim(value) == 0 and np.asarray(value).dtype.kind in "biuf"
