"""Timing that the benchmarks share: everything that is compared runs in turn, round after round, in one process.

Times of a shared machine drift by tens of per cent; ratios taken within a round do not. A spread is median, min, max
over the rounds.
"""

import json
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from jax_repaint.array_types import Array
from jax_repaint.denoise import PrincipalGaussian
from jax_repaint.errors import InputError
from jax_repaint.files import whole_file
from jax_repaint.nets import unet


def machine() -> dict:
    """What the numbers were measured on: device, versions, cores."""
    installed = {d.name.lower(): d.version for d in metadata.distributions() if d.name}
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": device.device_kind if device.platform != "cpu" else f"cpu {platform.machine()}",
        "platform": device.platform,
        "devices": jax.device_count(),
        "cores": cores,
        "python": platform.python_version(),
        **{name: installed.get(name) for name in ("jax", "flax", "torch")},
    }


def compute_dtype() -> str:
    """The dtype networks run in here: bfloat16 on a GPU or TPU, float32 on a CPU, where bfloat16 is slower."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def random_network(config: unet.UNetConfig) -> tuple[nnx.GraphDef, dict]:
    """The network with kernels of variance 1 / fan-in; made without compiling an initialiser for every shape."""
    random = np.random.default_rng(0)

    def weights(leaf: jax.ShapeDtypeStruct) -> Array:
        scale = 1 / math.sqrt(math.prod(leaf.shape[:-1]))  # 1 for norms and biases, which are vectors
        return jnp.asarray(scale * random.standard_normal(leaf.shape, np.float32))

    graphdef, shapes = unet.structure(config)
    return graphdef, jax.tree.map(weights, shapes)


def gaussian(grid: tuple[int, int], rank: int = 256) -> PrincipalGaussian:
    """A made-up linear prior of the usual rank, ocean everywhere."""
    values = np.random.default_rng(0).standard_normal((2 * grid[0] * grid[1], rank))
    direction = np.linalg.qr(values)[0].T.reshape(rank, *grid, 2)
    arrays = np.zeros((*grid, 2)), direction, np.geomspace(1000, 0.1, rank), 0.01, np.ones((*grid, 1))
    return PrincipalGaussian(*(jnp.asarray(a, jnp.float32) for a in arrays))


def compiled(function: Callable, *args: object, donate: tuple[int, ...] = ()) -> tuple[Callable, float]:
    """`function` compiled for these arguments, and the seconds that tracing and compiling took."""
    start = time.perf_counter()
    executable = jax.jit(function, donate_argnums=donate).lower(*args).compile()
    return executable, time.perf_counter() - start


def memory(executable: Callable) -> int:
    """Bytes that a compiled program takes on each device, what it works in place on counted once."""
    stats = executable.memory_analysis()
    kinds = {"temp": 1, "argument": 1, "output": 1, "alias": -1}
    return sum(sign * getattr(stats, f"{kind}_size_in_bytes") for kind, sign in kinds.items()) if stats else 0


def matrix_size() -> int:
    """Size of matrices whose product runs at the full rate of the device and takes a fraction of a second."""
    return 2048 if jax.default_backend() == "cpu" else 8192


def matrix_product(size: int, dtype: str) -> tuple[Callable[[], Array], float]:
    """A product of two size x size matrices and its GFLOP: the rate that a network is measured against."""
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product, _ = compiled(jnp.matmul, a, a)
    return lambda: product(a, a).block_until_ready(), 2 * size**3 / 1e9


def matrix_rate(gflop: float, seconds: np.ndarray) -> np.ndarray:
    """GFLOP/s of all local devices from the seconds that a product takes on one; those of a CPU share its cores."""
    return gflop / seconds * (1 if jax.default_backend() == "cpu" else jax.local_device_count())


def _seconds(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def interleaved(calls: dict[str, Callable[[], object]], rounds: int, at_least: float = 0.0) -> dict[str, np.ndarray]:
    """Seconds a call, (rounds,) for each name; a call must return only when its work is done.

    Args:
      calls: what to time, already warm; each round runs all of them once, in this order.
      rounds: number of rounds.
      at_least: seconds that one timing lasts; a call that is shorter is repeated.
    """
    repeats = {name: math.ceil(at_least / _seconds(call, 1)) if at_least else 1 for name, call in calls.items()}
    times = [[_seconds(call, repeats[name]) for name, call in calls.items()] for _ in range(rounds)]
    return dict(zip(calls, np.asarray(times).T, strict=True))


def spread(values: np.ndarray) -> dict[str, float]:
    """Median, min and max over the rounds."""
    return {"median": float(np.median(values)), "min": float(np.min(values)), "max": float(np.max(values))}


def text(spread: dict[str, float] | None, digits: int = 3) -> str:
    """A spread as `median (min..max)`."""
    if spread is None:
        return "-"
    return "{median:.{n}g} ({min:.{n}g}..{max:.{n}g})".format(**spread, n=digits)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under a head, columns as wide as they need."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in (head, *rows))


def banner(results: dict) -> str:
    """The machine in one line."""
    m = results["machine"]
    return (
        f"{m['device']} ({m['platform']} x {m['devices']}), {m['cores']} cores, Python {m['python']}, jax {m['jax']}, "
        f"flax {m['flax']}, torch {m['torch'] or 'not installed'}; {results['dtype']}"
    )


def write(path: str, results: dict) -> None:
    """Results as JSON, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def whole_numbers(name: str, values: Sequence[str]) -> list[int]:
    """Positive whole numbers of a comma-separated flag.

    Raises:
      InputError: one is not.
    """
    if not values or not all(v.isdecimal() and int(v) > 0 for v in values):
        raise InputError(f"--{name} must be positive whole numbers separated by commas, got {','.join(values)!r}")
    return [int(v) for v in values]


def define_loop_flags(network: str, batch: int) -> None:
    """Flags of a benchmark of loops over noise levels, with these defaults."""
    flags.DEFINE_list("networks", [network], "Networks to measure.")
    flags.DEFINE_integer("batch", batch, "Samples a call.", lower_bound=1)
    flags.DEFINE_integer("levels", 8, "Of a loop.", lower_bound=1)
    flags.DEFINE_integer("rounds", 5, "Interleaved rounds.", lower_bound=1)
    flags.DEFINE_string("out", None, "JSON file to write.")
    flags.DEFINE_boolean("smoke", False, "One sample, two levels, one round, whatever else is asked.")


def run_loops(measured: Callable[[Sequence[str], int, int, int], dict], report: Callable[[dict], str]) -> None:
    """Prints and writes what `measured` finds for the networks, batch, levels and rounds of `define_loop_flags`.

    Raises:
      InputError: a network that does not exist.
    """
    f = flags.FLAGS
    unknown = [name for name in f.networks if name not in unet.NETWORKS]
    if unknown:
        raise InputError(f"network {unknown[0]!r} is not one of {', '.join(unet.NETWORKS)}")
    batch, levels, rounds = (1, 2, 1) if f.smoke else (f.batch, f.levels, f.rounds)
    results = measured(f.networks, batch, levels, rounds)
    print(report(results))
    if f.out:
        write(f.out, results)
