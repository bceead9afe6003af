"""What fits on the devices of this process, measured before it runs."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec

from jax_repaint import memory
from jax_repaint.ensemble import over_devices
from jax_repaint.errors import InputError

# More members a call of a device than these make no network faster; of a CPU a call has LEAST at least.
USUAL_BATCH = {"cpu": 8, "gpu": 256, "tpu": 256}
LEAST = 16
KEPT_FREE = 0.1
Result = TypeVar("Result")


def usual_batch() -> int:
    """Members a call, over all local devices, from which on larger batches do not pay."""
    return max(USUAL_BATCH.get(jax.default_backend(), 256) * jax.local_device_count(), LEAST)


def free_memory() -> int:
    """Bytes that a program may use on each local device; of a CPU half of what is free, shared by its devices."""
    free = []
    for device in jax.local_devices():
        stats = device.memory_stats()
        if stats and "bytes_limit" in stats:
            free.append(int((1 - KEPT_FREE) * stats["bytes_limit"]) - stats.get("bytes_in_use", 0))
    if free:
        return max(min(free), 0)
    return memory.available() // (2 * jax.local_device_count())


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What compiling a program told: bytes on each device while it runs, and the seconds that it took."""

    memory: int
    seconds: float


def compile_ahead(function: Any, rows: Any, per_row: Any, shared: Any) -> Compiled:
    """Compiles a jitted function of ensemble.in_chunks for one chunk; the calls that follow find it compiled.

    Args:
      function: called as function(rows, per_row, *shared).
      rows, per_row: of one chunk, arrays or shapes; spread over the local devices as by in_chunks.
      shared: arrays or shapes that every device has.
    """
    mesh = over_devices(len(rows))
    split, whole = NamedSharding(mesh, PartitionSpec("members")), NamedSharding(mesh, PartitionSpec())

    def placed(tree: Any, sharding: NamedSharding) -> Any:
        # On one device in_chunks places nothing.
        where = sharding if mesh.size > 1 else None
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)

    began = time.perf_counter()
    program = function.lower(*placed((rows, per_row), split), *placed(tuple(shared), whole)).compile()
    seconds = time.perf_counter() - began
    stats = program.memory_analysis()
    kinds = ("temp", "argument", "output")
    return Compiled(sum(getattr(stats, f"{kind}_size_in_bytes") for kind in kinds) if stats else 0, seconds)


def is_full(error: Exception) -> bool:
    """Whether a device says that it has no memory left."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def with_less_memory(call: Callable[[int], Result], chunk: int) -> tuple[Result, int]:
    """call(chunk), with chunks halved for as long as the device runs out of memory, and the chunk that it ended with.

    Raises:
      InputError: not even one member a device fits.
    """
    least = jax.local_device_count()
    while True:
        try:
            return call(chunk), chunk
        except jax.errors.JaxRuntimeError as e:
            if not is_full(e):
                raise
            if chunk <= least:
                raise InputError("the device has not enough memory for one member; a smaller network may fit") from e
            logging.warning("the device ran out of memory with %d members a call; going on with %d", chunk, chunk // 2)
            chunk //= 2
