"""Several devices and several processes that train together, and processes that share a sweep.

Under Slurm, Open MPI, on TPU pods and on Kubernetes JAX finds out by itself which processes there are; elsewhere each
one is told:

    srun python -m jax_repaint.train --distributed --config=configs/attn.py --workdir=runs/attn
    python -m jax_repaint.train --coordinator=10.0.0.1:1234 --process_index=0 --process_count=2 ...

In training, every device has the parameters and the data, and its share of each batch. Process 0 alone reads and writes
the folder of the run; what the others need of it they are sent, so it may lie where only that process sees it. The data
is read by each.
"""

import contextlib
import hashlib
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_repaint.errors import InputError

CORES = 8  # that are devices of their own, at most: the more there are, the fewer fields each has at a time
FLAGS = flags.FLAGS
Result = TypeVar("Result")


def use_cores() -> None:
    """Makes devices of the cores of a CPU, before JAX starts, where nothing else says how many there are.

    Several small networks side by side keep cores busier than one whose layers they share (docs/performance.md).
    """
    if any(name in FLAGS and FLAGS[name].value for name in ("distributed", "coordinator")):
        # Processes that compute together may be as many as the cores.
        return
    if _cpu_devices_asked():
        return
    # What taskset, Slurm or a container leaves of them; macOS does not tell.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # In a program that has used JAX already it is too late.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", min(cores, CORES))


def _cpu_devices_asked() -> bool:
    """Whether the environment says how many devices a CPU has."""
    flags = os.environ.get("XLA_FLAGS", "")
    return "JAX_NUM_CPU_DEVICES" in os.environ or "xla_force_host_platform_device_count" in flags


def define_flags() -> None:
    """Those that say which processes there are."""
    flags.DEFINE_boolean("distributed", False, "Find the other processes of Slurm, Open MPI, a TPU pod or Kubernetes.")
    flags.DEFINE_string("coordinator", None, "Elsewhere: host:port on which process 0 listens for the others.")
    flags.DEFINE_integer("process_index", None, "Number of this process, from 0.")
    flags.DEFINE_integer("process_count", None, "How many processes there are.", lower_bound=1)


def connected(main: Callable[[Sequence[str]], None], together: bool = True) -> Callable[[Sequence[str]], None]:
    """A `main` before which the processes that the flags ask for find each other.

    Args:
      together: whether they compute together; without, numbers alone (no coordinator) are enough.
    """

    def run(argv: Sequence[str]) -> None:
        start(together)
        main(argv)

    return run


def start(together: bool = True) -> None:
    """Connects this process with the others, if the flags ask for it; before any computation.

    Args:
      together: whether they compute together. If not, they learn how many they are and part again, so that none waits
        for another or ends with it.

    Raises:
      InputError: half of the flags are missing, or nothing says who the others are.
    """
    coordinator, index, count = FLAGS.coordinator, FLAGS.process_index, FLAGS.process_count
    if (index is None) != (count is None):
        raise InputError("--process_index and --process_count go together")
    if count is not None and not 0 <= index < count:
        raise InputError(f"process {index} is not one of {count}, which are numbered from 0")
    if coordinator and count is None:
        raise InputError("--coordinator needs --process_index and --process_count")
    if coordinator and not re.fullmatch(r"\S+:\d+", coordinator):
        raise InputError(f"--coordinator must be host:port, such as 10.0.0.1:1234, got {coordinator!r}")
    if count is not None and not coordinator and (together or FLAGS.distributed):
        raise InputError("--process_index and --process_count need --coordinator=host:port of process 0")
    if coordinator or FLAGS.distributed:
        _initialize(coordinator, index, count)
        if not together:
            jax.distributed.shutdown()


def _initialize(coordinator: str | None, index: int | None, count: int | None) -> None:
    # CPUs have no other way to add up what several processes computed.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(coordinator, count, index)
        # JAX only notes the first SIGTERM, which then would not end the process.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        logging.info(
            "process %d of %d, with %d of %d devices",
            jax.process_index(), jax.process_count(), jax.local_device_count(), jax.device_count(),
        )  # fmt: skip
    except (ImportError, KeyError, RuntimeError, ValueError) as e:
        reason = str(e).strip().split("\n")[0]
        if coordinator:
            raise InputError(f"the {count} processes at {coordinator} do not find each other ({reason})") from e
        raise InputError(
            f"nothing says which processes there are ({reason}): neither Slurm, Open MPI, a TPU pod nor Kubernetes; "
            "give --coordinator, --process_index and --process_count, or leave --distributed out"
        ) from e


# Arrays on several devices. A mesh of None stands for one device, on which nothing is placed.


def host() -> jax.Device | None:
    """A CPU of this process, also beside accelerators; None where JAX was told to have none."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def training_devices(form: str = "") -> np.ndarray:
    """All devices of all processes.

    Cores that are devices because nobody said otherwise (`use_cores`) are one: each would have a copy of the data, and
    a run that goes on where there are more or fewer of them would sum in another order.

    Args:
      form: of the denoiser. Of `conditional` a step factorises matrices, and devices of one CPU that do so wait for
        each other forever: it takes one of each process.
    """
    devices = np.asarray(jax.devices(), object)
    of_cpu = jax.default_backend() == "cpu"
    if jax.process_count() == 1 and of_cpu and not _cpu_devices_asked():
        return devices[:1]
    if form == "conditional" and of_cpu and jax.local_device_count() > 1:
        logging.warning("a training of form conditional takes one device of a CPU, not %d", jax.local_device_count())
        _, first = np.unique([device.process_index for device in devices], return_index=True)
        return devices[first]
    return devices


def over_all_devices(batch: int, form: str = "") -> Mesh | None:
    """A mesh with the one axis "data", over `training_devices`; None for one device.

    Raises:
      InputError: a batch cannot be divided evenly among them.
    """
    devices = training_devices(form)
    if batch % devices.size:
        raise InputError(f"train.batch must be a multiple of the number of devices, {devices.size}, got {batch}")
    return Mesh(devices, ("data",), axis_types=(AxisType.Auto,)) if devices.size > 1 else None


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays, alike in all processes, whole on every device."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    whole = NamedSharding(mesh, PartitionSpec())

    def one(x: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, whole, x.__getitem__)

    return jax.tree.map(one, tree)


def split(tree: Any, mesh: Mesh | None) -> Any:
    """Within a program: every device computes its share of the rows of these arrays."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec("data")))


def jit(function: Callable[..., Any], mesh: Mesh | None, **options: Any) -> Callable[..., Any]:
    """jax.jit with results that are whole on every device."""
    if mesh is not None:
        options["out_shardings"] = NamedSharding(mesh, PartitionSpec())
    return jax.jit(function, **options)


# Agreement of processes. All of them call each of these, in the same order; with one process none does anything.


def at_first(call: Callable[[], Result]) -> Result | None:
    """call() at process 0, and there its result; None elsewhere.

    Raises:
      InputError: that of process 0, at all of them.
    """
    if jax.process_count() == 1:
        return call()
    result, error = None, ""
    if jax.process_index() == 0:
        try:
            result = call()
        except InputError as e:
            error = str(e)
    error = same_text(error)
    if error:
        raise InputError(error)
    return result


def at_all(call: Callable[[], Result]) -> Result:
    """call() in every process, with its own result.

    Raises:
      InputError: at all of them if any had one.
    """
    result, error = None, None
    try:
        result = call()
    except InputError as e:
        error = e
    if any_of(error is not None)[0]:
        raise error or InputError("another process cannot go on; it says why")
    return result


def same(tree: Any) -> Any:
    """Process 0's arrays at all processes, which have arrays of the same shapes."""
    return tree if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(tree)


def same_text(text: str) -> str:
    """Process 0's text at all processes."""
    content = np.frombuffer(text.encode(), np.uint8)
    length = int(same(np.int32(len(content))))
    return same(np.resize(content, length) if len(content) else np.zeros(length, np.uint8)).tobytes().decode()


def any_of(*values: bool) -> tuple[bool, ...]:
    """Which of the values are true in any process."""
    if jax.process_count() == 1:
        return values
    return tuple(multihost_utils.process_allgather(np.array(values, np.int32)).any(axis=0).tolist())


def end_if_alone(e: Exception) -> None:
    """Ends this process with code 1 and one line if `e` says that another one, with which it computes, is gone."""
    if jax.process_count() == 1 or not re.search("Gloo|NCCL", str(e)):
        return
    print(
        f"error: another process of the {jax.process_count()} is gone ({str(e).splitlines()[0]}); the same commands "
        "continue from the last state that was saved",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    # The usual end would wait for that process first.
    os._exit(1)


def check_same(text: str, what: str) -> None:
    """Raises InputError at all processes unless they have the same text."""
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), np.int32)
    if np.ptp(multihost_utils.process_allgather(digest), axis=0).any():
        raise InputError(f"{what} must be the same in all {jax.process_count()} processes")
