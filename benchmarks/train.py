"""Frames a second of training, and its share of the device's matrix rate.

    python -m benchmarks.train --configs=configs/attn.py --batch=64,256 --out=train.json

A step is what `jax_repaint.train` does in one: frames drawn from a series that lies on the device, noise, loss,
gradient, AdamW and the moving average of the weights; on all devices of this process, which share the batch. Frames and
prior are made up, 9,180 of 48 x 96 cells. `share` is the rate of the network, forward and backward in its own GFLOP,
over that of a matrix product of the same dtype in the same round. Memory is that of one device with the series.
"""

import dataclasses
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from benchmarks import measure
from benchmarks import unet as unet_benchmark
from jax_repaint import command, distributed, sweep
from jax_repaint.errors import InputError
from jax_repaint.nets import unet
from jax_repaint.optimise import State, make_loss, make_optimiser, make_steps, plan
from jax_repaint.settings import check_config, network_config

GRID = unet_benchmark.GRID
EPOCHS, FRAMES = 300, 9180  # of the run whose time is told


@dataclasses.dataclass(frozen=True)
class Timed:
    """A training run to time.

    Attributes:
      call: one dispatch; returns when it is done.
      frames: of a dispatch.
      gflop: of a frame.
      parameters: of the network.
      memory, seconds: bytes on each device, and what compiling took.
    """

    call: Callable[[], object]
    frames: int
    gflop: float
    parameters: int
    memory: int
    seconds: float


def read_config(path: str, batch: int, dtype: str) -> ConfigDict:
    """The configuration of a file, with another batch and dtype.

    Raises:
      InputError: it cannot be read, or a value in it cannot work.
    """
    if not Path(path).is_file():
        raise InputError(f"no configuration {path!r}; those of the project are configs/attn.py and its neighbours")
    config = runpy.run_path(path)["get_config"]()
    config.train.batch, config.model.dtype = batch, dtype
    # A dispatch on a CPU is one step after the other.
    config.train.dispatch = 1 if jax.default_backend() == "cpu" else config.train.dispatch
    check_config(config)
    return config


def prepare(config: ConfigDict, frames: int) -> Timed:
    """Compiles a dispatch of a run on made-up frames.

    Args:
      frames: of the series.
    """
    mesh = distributed.over_all_devices(config.train.batch)
    gaussian = measure.gaussian(GRID, config.model.rank)
    network = network_config(config)
    graphdef, params = measure.random_network(network)
    steps = plan(frames, config)
    optimiser, _ = make_optimiser(config, steps)
    loss = make_loss(config, gaussian, graphdef)
    dispatch = make_steps(config, loss, optimiser, steps, gaussian.ocean, GRID, mesh)
    # A copy: the state is donated, and two names must not share one buffer.
    ema = jax.tree.map(jnp.copy, params)
    state = State(params, ema, optimiser.init(params), jnp.int32(0), jnp.zeros(2), jnp.float32(jnp.inf))
    state = distributed.replicate(state, mesh)
    data = np.random.default_rng(0).standard_normal((frames, *GRID, 2), np.float32)
    data = distributed.replicate(data, mesh)
    program, seconds = measure.compiled(dispatch, state, data, donate=(0,))

    def call() -> None:
        nonlocal state
        state, losses = program(state, data)
        losses.block_until_ready()

    return Timed(
        call,
        steps.dispatch * config.train.batch * config.train.accumulate,
        unet_benchmark.gflop(network)["train"],
        unet.count(params),
        measure.memory(program),
        seconds,
    )


def measure_training(
    configs: Sequence[str], batches: Sequence[int], dtype: str, rounds: int, at_least: float, size: int, frames: int
) -> dict:
    """Times of all configurations and batches, and what follows from them.

    Args:
      configs: files.
      batches: frames a step, of all devices together.
      rounds, at_least: see `measure.interleaved`.
      size: of the matrix product that tells the device's rate.
      frames: of the series.
    """
    asked = {(path, batch): read_config(path, batch, dtype) for path in configs for batch in batches}
    if max(batches) * max(config.train.accumulate for config in asked.values()) > frames:
        raise InputError(f"a batch of {max(batches)} is more than the {frames} frames of the series")
    product, product_gflop = measure.matrix_product(size, dtype)
    timed = {key: prepare(config, frames) for key, config in asked.items()}
    calls = {key: one.call for key, one in timed.items()} | {"product": product}
    for call in calls.values():
        call()
    seconds = measure.interleaved(calls, rounds, at_least)
    rate = measure.matrix_rate(product_gflop, seconds["product"])
    rows = []
    for (path, batch), one in timed.items():
        each = seconds[path, batch] / one.frames
        config = asked[path, batch]
        rows.append(
            {
                "config": path,
                "network": config.model.network,
                "form": config.model.form,
                "batch": batch,
                "parameters": one.parameters,
                "gflop_a_frame": one.gflop,
                "frames_per_s": measure.spread(1 / each),
                "ms_a_step": measure.spread(1e3 * each * batch * config.train.accumulate),
                "share": measure.spread(one.gflop / each / rate),
                "run_s": measure.spread(EPOCHS * FRAMES * each),
                "gb": one.memory / 1e9,
                "compile_s": one.seconds,
            }
        )
    return {
        "machine": measure.machine(),
        "dtype": dtype,
        "grid": GRID,
        "frames": frames,
        "gflop_per_s": measure.spread(rate),
        "rounds": rounds,
        "rows": rows,
    }


def report(results: dict) -> str:
    """The results as a table."""
    head = ["network", "form", "parameters", "batch", "frames/s", "ms a step", "GFLOP a frame", "share of rate",
            f"{EPOCHS} x {FRAMES:,} frames", "GB", "compile s"]  # fmt: skip
    rows = [
        [
            r["network"], r["form"], f"{r['parameters']:,}", str(r["batch"]), measure.text(r["frames_per_s"]),
            measure.text(r["ms_a_step"]), f"{r['gflop_a_frame']:.3g}", measure.text(r["share"], 2),
            sweep.duration(r["run_s"]["median"]), f"{r['gb']:.2g}", f"{r['compile_s']:.1f}",
        ]
        for r in results["rows"]
    ]  # fmt: skip
    return "\n".join(
        [
            measure.banner(results),
            f"grid {GRID[0]} x {GRID[1]}, {results['frames']:,} frames; matrix product "
            f"{measure.text(results['gflop_per_s'])} GFLOP/s; median (min..max) of {results['rounds']} rounds",
            measure.table(head, rows),
        ]
    )


def main(argv: Sequence[str]) -> None:
    """The command; `--help` lists its options."""
    f = flags.FLAGS
    on_cpu = jax.default_backend() == "cpu"
    configs = f.configs or (["configs/tiny.py"] if on_cpu else ["configs/attn.py"])
    batches = measure.whole_numbers("batch", f.batch or (["16"] if on_cpu else ["64", "256"]))
    rounds, at_least, size, frames = f.rounds, 0.5, measure.matrix_size(), FRAMES
    if f.smoke:
        smallest = 2 * jax.device_count()
        configs, batches, rounds, at_least, size, frames = configs[:1], [smallest], 2, 0.0, 256, 2 * smallest
    dtype = f.dtype or measure.compute_dtype()
    results = measure_training(configs, batches, dtype, rounds, at_least, size, frames)
    print(report(results))
    if f.out:
        measure.write(f.out, results)


if __name__ == "__main__":
    flags.DEFINE_list(
        "configs", [], "Files of configurations; configs/tiny.py by default on a CPU, else configs/attn.py."
    )
    flags.DEFINE_list("batch", [], "Frames a step; 16 by default on a CPU, else 64 and 256.")
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the network; bfloat16 by default, float32 on a CPU.")
    flags.DEFINE_integer("rounds", 5, "Interleaved rounds.", lower_bound=1)
    flags.DEFINE_string("out", None, "JSON file to write.")
    flags.DEFINE_boolean("smoke", False, "The first configuration, a small batch, two rounds, whatever else is asked.")
    command.run(main)
