"""Fields a second of whole samplers against the size of the batch, beside one sample at a time in a Python loop.

    python -m benchmarks.ensemble --network=standard_attn --batch=1,4,16,64,256 --out=ensemble.json

S1 is method "adaptive" (376 network calls), S6 "multistage" (1,631), kalman-16 Kalman guidance with 16 levels (16), all
with random weights on the grid 48 x 96. The other way is how such samplers are usually run: one sample, one compiled
step a dispatch, on the grid padded to 64 x 128. All of them run in turn in every round, on one device.

A run is a loop over equal network calls, so a shortened one (--shorten) tells the time of a call, which is multiplied
by their number. The share of the matrix rate counts the network's own GFLOP, not the compiler's.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import measure, repaint
from benchmarks import unet as unet_benchmark
from jax_repaint import command, device, ensemble, observe
from jax_repaint.array_types import Array
from jax_repaint.denoise import EpsDenoiser, PrincipalGaussian
from jax_repaint.errors import InputError
from jax_repaint.nets.unet import NETWORKS
from jax_repaint.posterior import Posterior, evidence_for
from jax_repaint.prior import linear
from jax_repaint.sample import Repaint, method
from jax_repaint.schedule import Schedule

GRID, LOOP_GRID = (48, 96), (64, 128)
CALLS = {"S1": 376, "S6": 1631, "kalman-16": 16}
MEMBERS = 16  # of an ensemble
LOOP = "loop"


@dataclasses.dataclass(frozen=True)
class Timed:
    """A sampler to time: a call that waits for its result, and how many network calls a member it makes."""

    call: Callable[[], object]
    calls: int
    compiled: device.Compiled | None


def shortened(stages: Sequence[Repaint], by: int) -> tuple[Repaint, ...]:
    """The same stages with a start `by` times nearer."""
    return tuple(stage.replace(t_start=max(stage.t_start // by, 1)) for stage in stages)


def gaussian(rank: int = 256) -> PrincipalGaussian:
    """A made-up linear prior of the usual rank."""
    values = np.random.default_rng(0).standard_normal((2 * GRID[0] * GRID[1], rank))
    direction = np.linalg.qr(values)[0].T.reshape(rank, *GRID, 2)
    arrays = np.zeros((*GRID, 2)), direction, np.geomspace(1000, 0.1, rank), 0.01, np.ones((*GRID, 1))
    return PrincipalGaussian(*(jnp.asarray(a, jnp.float32) for a in arrays))


def _family(denoiser: EpsDenoiser, schedule: Schedule, stages: Sequence[Repaint], batch: int) -> Timed:
    """Members of one frame by stages of the RePaint family."""
    known = jax.tree.map(lambda leaf: leaf[None], repaint.frame())
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    numbers = np.zeros(batch, np.float32)
    per_row = keys, jax.tree.map(lambda leaf: numbers, tuple(stages)), numbers
    shared = denoiser, known, schedule
    compiled = device.compile_ahead(ensemble._repaint_rows, np.zeros(batch, np.int32), per_row, shared)

    def call() -> object:
        return ensemble.repaint_ensemble(denoiser, known, schedule, stages, frames=[0], members=batch, chunk=batch)

    return Timed(call, sum(stage.calls for stage in stages), compiled)


def _kalman(denoiser: EpsDenoiser, batch: int) -> Timed:
    """Members of one frame by Kalman guidance from a line of observations."""
    prior = gaussian()
    ocean = np.ones(GRID, bool)
    seen = observe.from_cells(observe.line(ocean, GRID[0] // 2), np.zeros((*GRID, 2)), 0.05, ocean)
    analysis = linear.analysis(prior, seen)
    hyper = Posterior.create(3.4, 0.01, CALLS["kalman-16"])
    evidence = evidence_for(hyper, prior.ocean, seen, prior)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    per_row = keys, np.zeros(batch, np.float32)
    shared = denoiser, evidence, prior, analysis, hyper
    compiled = device.compile_ahead(ensemble._posterior_rows, np.zeros(batch, np.int32), per_row, shared)

    def call() -> object:
        return ensemble.posterior_ensemble(
            denoiser, evidence, prior, analysis, hyper, frame=0, members=batch, chunk=batch, antithetic=batch % 2 == 0
        )

    return Timed(call, hyper.calls, compiled)


def _loop(denoiser: EpsDenoiser, schedule: Schedule, stages: Sequence[Repaint]) -> Timed:
    """One sample on the larger grid, one compiled step a dispatch, its inputs made on the host."""
    known, key = repaint.frame(grid=LOOP_GRID), jax.random.key(1)

    @jax.jit
    def advance(x: Array, t: Array, number: Array, again: Array, denoiser: EpsDenoiser, stage: Repaint) -> Array:
        return repaint.step(x, key, t, number, again, denoiser, known, schedule, stage)

    start = jax.jit(repaint.first)

    def call() -> object:
        for stage in stages:
            x = start(key, known, schedule, stage)
            number = 0
            for t in range(stage.t_start, -1, -1):
                for again in range(stage.resample_steps - 1 if t else 0, -1, -1):
                    x = advance(x, jnp.int32(t), jnp.int32(number), jnp.bool_(again > 0), denoiser, stage)
                    number += 1
        return x.block_until_ready()

    return Timed(call, sum(stage.calls for stage in stages), None)


def measure_ensembles(network: str, batches: Sequence[int], dtype: str, rounds: int, shorten: int, size: int) -> dict:
    """Times of all samplers and batches, and what follows from them.

    Args:
      network: name in NETWORKS.
      batches: members a call.
      shorten: the RePaint family starts so many times nearer.
      size: of the matrix product that tells the device's rate.
    """
    config = dataclasses.replace(NETWORKS[network], dtype=dtype)
    graphdef, params = measure.random_network(config)
    schedule = Schedule.linear()
    denoiser = EpsDenoiser(params, schedule, graphdef)
    product, product_gflop = measure.matrix_product(size, dtype)
    family = {"S1": shortened(method("adaptive"), shorten), "S6": shortened(method("multistage"), shorten)}
    timed: dict[tuple[str, int], Timed] = {(LOOP, 1): _loop(denoiser, schedule, family["S1"])}
    for batch in batches:
        timed |= {(name, batch): _family(denoiser, schedule, stages, batch) for name, stages in family.items()}
        timed["kalman-16", batch] = _kalman(denoiser, batch)
    calls = {key: one.call for key, one in timed.items()} | {"product": product}
    for call in calls.values():
        call()
    seconds = measure.interleaved(calls, rounds)
    rate = product_gflop / seconds["product"]
    work = unet_benchmark.gflop(config)["forward"]
    loop = seconds[LOOP, 1] / timed[LOOP, 1].calls  # one call of one member
    rows = []
    for (name, batch), one in timed.items():
        each = seconds[name, batch] / one.calls / batch
        # The loop is timed on S1, whose steps are those of S6 too.
        for asked in ("S1", "S6") if name == LOOP else (name,):
            rows.append(
                {
                    "sampler": f"{asked}, {LOOP}" if name == LOOP else name,
                    "batch": batch,
                    "ms_a_call": measure.spread(1e3 * each),
                    "fields_per_s": measure.spread(1 / (each * CALLS[asked])),
                    "call_over_loop": measure.spread(loop / each),
                    "share": None if name == LOOP else measure.spread(work / each / rate),
                    "ensemble_s": measure.spread(MEMBERS * CALLS[asked] * each),
                    "ensemble_over_loop": measure.spread(loop * CALLS["S6"] / (each * CALLS[asked])),
                    "gb": one.compiled and one.compiled.memory / 1e9,
                    "compile_s": one.compiled and one.compiled.seconds,
                }
            )
    return {
        "machine": measure.machine(),
        "network": network,
        "dtype": dtype,
        "grid": GRID,
        "loop_grid": LOOP_GRID,
        "gflop_a_call": work,
        "gflop_per_s": measure.spread(rate),
        "shorten": shorten,
        "rounds": rounds,
        "rows": rows,
    }


def report(results: dict) -> str:
    """The results as a table."""
    head = ["sampler", "batch", "fields/s", "ms a call", "speed-up a call", "share of rate", f"s for {MEMBERS} members",
            "over S6 in the loop", "GB", "compile s"]  # fmt: skip
    rows = [
        [
            r["sampler"], str(r["batch"]), measure.text(r["fields_per_s"]), measure.text(r["ms_a_call"]),
            measure.text(r["call_over_loop"]), measure.text(r["share"]), measure.text(r["ensemble_s"]),
            measure.text(r["ensemble_over_loop"]), f"{r['gb']:.2g}" if r["gb"] is not None else "-",
            f"{r['compile_s']:.1f}" if r["compile_s"] is not None else "-",
        ]
        for r in results["rows"]
    ]  # fmt: skip
    return "\n".join(
        [
            measure.banner(results),
            f"{results['network']}, {results['gflop_a_call']:.3g} GFLOP a call, grid {GRID[0]} x {GRID[1]}, the loop "
            f"on {LOOP_GRID[0]} x {LOOP_GRID[1]}; matrix product {measure.text(results['gflop_per_s'])} GFLOP/s; "
            f"RePaint started {results['shorten']} times nearer; median (min..max) of {results['rounds']} rounds",
            measure.table(head, rows),
        ]
    )


def main(argv: Sequence[str]) -> None:
    """The command; `--help` lists its options."""
    f = flags.FLAGS
    if f.network not in NETWORKS:
        raise InputError(f"network {f.network!r} is not one of {', '.join(NETWORKS)}")
    batches, rounds, shorten = measure.whole_numbers("batch", f.batch), f.rounds, f.shorten
    on_cpu = jax.default_backend() == "cpu"
    size, shorten = (2048, shorten or 25) if on_cpu else (8192, shorten or 1)
    if f.smoke:
        batches, rounds, shorten, size = [1, 2], 2, 75, 256
    results = measure_ensembles(f.network, batches, f.dtype or measure.compute_dtype(), rounds, shorten, size)
    print(report(results))
    if f.out:
        measure.write(f.out, results)


if __name__ == "__main__":
    flags.DEFINE_string("network", "standard_attn", "Network to sample with.")
    flags.DEFINE_list("batch", ["1", "4", "16", "64", "256"], "Members a call.")
    flags.DEFINE_integer("shorten", None, "How many times nearer RePaint starts; 25 on a CPU, else 1.", lower_bound=1)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the network; bfloat16 by default, float32 on a CPU.")
    flags.DEFINE_integer("rounds", 3, "Interleaved rounds.", lower_bound=1)
    flags.DEFINE_string("out", None, "JSON file to write.")
    flags.DEFINE_boolean("smoke", False, "Batch 1 and 2, a few calls, two rounds, whatever else is asked.")
    command.run(main)
