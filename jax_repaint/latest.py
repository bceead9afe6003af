"""What was made of the latest patterns of observations, so that frames of one pattern share it."""

import hashlib
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jax_repaint.observe import Observation

T = TypeVar("T")


class Latest(Generic[T]):
    """Keeps what was used last, as long as the weights of all of it are at most `limit`, and always one."""

    def __init__(self, limit: float, weight: Callable[[T], float]) -> None:
        self.limit, self.weight = limit, weight
        self._kept: dict[bytes, T] = {}

    def of_pattern(self, observation: Observation, others: Any, make: Callable[[], T]) -> T:
        """`make()`, or what it gave for an observation with other values and the same `others`, a pytree of arrays."""
        blank = observation.replace(values=jnp.zeros_like(observation.values))
        digest = hashlib.blake2b(digest_size=16)
        for leaf in jax.tree.leaves((blank, others)):
            digest.update(np.ascontiguousarray(leaf).tobytes())
        name = digest.digest()
        # What is used goes to the end, and the first one is forgotten first.
        found = self._kept.pop(name) if name in self._kept else make()
        self._kept[name] = found
        while len(self._kept) > 1 and sum(map(self.weight, self._kept.values())) > self.limit:
            self._kept.pop(next(iter(self._kept)))
        return found
