"""Fields a second of whole samplers against the size of the batch, beside one sample at a time in a Python loop.

    python -m benchmarks.ensemble --network=standard_attn --batch=1,4,16,64,256 --out=ensemble.json --figure=fields.png

S1 is method "adaptive" (376 network calls), S6 "multistage" (1,631), kalman-16 Kalman guidance with 16 levels (16), all
with random weights on the grid 48 x 96. The other way is how such samplers are usually run: one sample, one compiled
step a dispatch, on the grid padded to 64 x 128. All of them run in turn in every round, batches on all local devices. A
batch of kalman-16 above 16 is of ensembles of 16 members, each of a frame with gains of its own.

A run is a loop over equal network calls, so a shortened one (--shorten) tells the time of a call, which is multiplied
by their number. `speed-up a call` is the time of a call in the loop over that of a call here, which for S1 and S6 is
the ratio of their fields a second too. `over S6 in the loop` compares ensembles: the time of S6 in the loop over that
of this sampler, whose 16 calls give a lower CRPS than the 1,631 of S6, with the gains of a new pattern. `over network`
is the time of a call over that of the bare network in the same batch. The share of the matrix rate counts the network's
own GFLOP, not the compiler's.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import measure, repaint
from benchmarks import unet as unet_benchmark
from jax_repaint import command, device, ensemble, gains, observe, plots
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
LOOP, NETWORK = "loop", "network"


@dataclasses.dataclass(frozen=True)
class Timed:
    """A sampler to time.

    Attributes:
      call: returns when its result is there.
      calls: of the network, by each member.
      compiled: None for the loop.
    """

    call: Callable[[], object]
    calls: int
    compiled: device.Compiled | None = None


def shortened(stages: Sequence[Repaint], by: int) -> tuple[Repaint, ...]:
    """The same stages with a start `by` times nearer."""
    return tuple(stage.replace(t_start=max(stage.t_start // by, 1)) for stage in stages)


def _chunk(batch: int) -> tuple[np.ndarray, jax.ShapeDtypeStruct, np.ndarray]:
    """Rows, keys and numbers of a call with `batch` members, as many on each device that they need."""
    rows = math.prod(ensemble.share(batch, jax.local_device_count()))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    return np.zeros(rows, np.int32), keys, np.zeros(rows, np.float32)


def _family(denoiser: EpsDenoiser, schedule: Schedule, stages: Sequence[Repaint], batch: int) -> Timed:
    """Members of one frame by stages of the RePaint family."""
    known = jax.tree.map(lambda leaf: leaf[None], repaint.frame())
    rows, keys, numbers = _chunk(batch)
    per_row = keys, jax.tree.map(lambda leaf: numbers, tuple(stages)), numbers
    compiled = device.compile_ahead(ensemble.repaint_rows, rows, per_row, (denoiser, known, schedule))

    def call() -> object:
        return ensemble.repaint_ensemble(denoiser, known, schedule, stages, frames=[0], members=batch, chunk=batch)

    return Timed(call, sum(stage.calls for stage in stages), compiled)


@dataclasses.dataclass(frozen=True)
class Line:
    """What Kalman guidance is given: a prior, a line of observations, 16 levels."""

    prior: PrincipalGaussian
    seen: observe.Observation
    hyper: Posterior

    @classmethod
    def create(cls) -> "Line":
        """A line through the middle."""
        ocean = np.ones(GRID, bool)
        seen = observe.from_cells(observe.line(ocean, GRID[0] // 2), np.zeros((*GRID, 2)), 0.05, ocean)
        return cls(measure.gaussian(GRID), seen, Posterior.create(3.4, 0.01, CALLS["kalman-16"]))

    def gains(self) -> object:
        """What is made once for a pattern: the linear analysis, and the gains of the levels."""
        made = linear.analysis(self.prior, self.seen), gains.kalman_gains(self.prior, self.seen, self.hyper.sigma)
        return jax.block_until_ready(made)


def _kalman(denoiser: EpsDenoiser, line: Line, batch: int) -> Timed:
    """Ensembles of MEMBERS members by Kalman guidance, of as many frames as the batch holds."""
    prior, seen, hyper = line.prior, line.seen, line.hyper
    frames, members = max(batch // MEMBERS, 1), min(batch, MEMBERS)
    analyses = [linear.analysis(prior, seen)] * frames
    evidence = [evidence_for(hyper, prior.ocean, seen, prior)] * frames
    rows, _, numbers = _chunk(members)
    keys = jax.eval_shape(lambda: ensemble.member_keys(0, range(frames), range(len(rows))).T)
    shared = denoiser, ensemble.stack_evidence(evidence), prior, ensemble.stack_analyses(analyses), hyper
    compiled = device.compile_ahead(ensemble.posterior_frames, rows, (keys, numbers), shared)

    def call() -> object:
        return ensemble.posterior_ensemble(
            denoiser, evidence, prior, analyses, hyper,
            frames=range(frames), members=members, chunk=batch, antithetic=members % 2 == 0,
        )  # fmt: skip

    return Timed(call, hyper.calls, compiled)


def _network(denoiser: EpsDenoiser, batch: int) -> Timed:
    """The network alone on as many fields, called from Python, which the device does not wait for."""
    rows, _, _ = _chunk(batch)
    x = jax.random.normal(jax.random.key(2), (len(rows), *GRID, 2))
    if jax.local_device_count() > 1:
        x = jax.device_put(x, NamedSharding(ensemble.over_devices(len(rows)), PartitionSpec("members")))
    denoise = jax.jit(jax.vmap(lambda denoiser, x: denoiser(x, jnp.float32(1.0)), (None, 0)))

    def call() -> object:
        return jax.block_until_ready([denoise(denoiser, x) for _ in range(CALLS["kalman-16"])])

    return Timed(call, CALLS["kalman-16"])


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

    return Timed(call, sum(stage.calls for stage in stages))


def _rows(timed: dict[tuple[str, int], Timed], seconds: dict, least: np.ndarray) -> list[dict]:
    """What follows from the times of each sampler and batch; `least` is that of a call at the matrix rate."""
    each_of = {key: seconds[key] / one.calls / key[1] for key, one in timed.items()}
    loop, rows = each_of[LOOP, 1], []
    for (name, batch), one in timed.items():
        if name == NETWORK:
            continue
        each = each_of[name, batch]
        gains = seconds["gains"] if name == "kalman-16" else 0.0
        # The loop is timed on S1, whose steps are those of S6 too.
        for asked in ("S1", "S6") if name == LOOP else (name,):
            ensemble_s = MEMBERS * CALLS[asked] * each + gains
            rows.append(
                {
                    "sampler": f"{asked}, {LOOP}" if name == LOOP else name,
                    "batch": batch,
                    "ms_a_call": measure.spread(1e3 * each),
                    "fields_per_s": measure.spread(1 / (each * CALLS[asked])),
                    "call_over_loop": measure.spread(loop / each),
                    "over_network": None if name == LOOP else measure.spread(each / each_of[NETWORK, batch]),
                    "share": None if name == LOOP else measure.spread(least / each),
                    "ensemble_s": measure.spread(ensemble_s),
                    "ensemble_over_loop": measure.spread(MEMBERS * CALLS["S6"] * loop / ensemble_s),
                    "gb": one.compiled and one.compiled.memory / 1e9,
                    "compile_s": one.compiled and one.compiled.seconds,
                }
            )
    return rows


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
    line = Line.create()
    for batch in batches:
        timed |= {(name, batch): _family(denoiser, schedule, stages, batch) for name, stages in family.items()}
        timed["kalman-16", batch] = _kalman(denoiser, line, batch)
        timed[NETWORK, batch] = _network(denoiser, batch)
    calls = {key: one.call for key, one in timed.items()} | {"product": product, "gains": line.gains}
    for call in calls.values():
        call()
    seconds = measure.interleaved(calls, rounds)
    rate = measure.matrix_rate(product_gflop, seconds["product"])
    work = unet_benchmark.gflop(config)["forward"]
    return {
        "machine": measure.machine(),
        "network": network,
        "dtype": dtype,
        "grid": GRID,
        "loop_grid": LOOP_GRID,
        "gflop_a_call": work,
        "gflop_per_s": measure.spread(rate),
        "gains_s": measure.spread(seconds["gains"]),
        "shorten": shorten,
        "rounds": rounds,
        "rows": _rows(timed, seconds, work / rate),
    }


def report(results: dict) -> str:
    """The results as a table."""
    head = ["sampler", "batch", "fields/s", "ms a call", "speed-up a call", "over network", "share of rate",
            f"s for {MEMBERS} members", "over S6 in the loop", "GB", "compile s"]  # fmt: skip
    rows = [
        [
            r["sampler"], str(r["batch"]), measure.text(r["fields_per_s"]), measure.text(r["ms_a_call"]),
            measure.text(r["call_over_loop"]), measure.text(r["over_network"]), measure.text(r["share"], 2),
            measure.text(r["ensemble_s"]), measure.text(r["ensemble_over_loop"]),
            f"{r['gb']:.2g}" if r["gb"] is not None else "-",
            f"{r['compile_s']:.1f}" if r["compile_s"] is not None else "-",
        ]
        for r in results["rows"]
    ]  # fmt: skip
    return "\n".join(
        [
            measure.banner(results),
            f"{results['network']}, {results['gflop_a_call']:.3g} GFLOP a call, grid {GRID[0]} x {GRID[1]}, the loop "
            f"on {LOOP_GRID[0]} x {LOOP_GRID[1]}; matrix product {measure.text(results['gflop_per_s'])} GFLOP/s; "
            f"gains of a pattern in {measure.text(results['gains_s'])} s; "
            f"RePaint started {results['shorten']} times nearer; median (min..max) of {results['rounds']} rounds",
            measure.table(head, rows),
        ]
    )


def draw(results: dict, path: str) -> None:
    """Fields a second of each sampler against the batch, with the range of the rounds; S6 in the loop dashed."""
    curves = []
    for name in CALLS:
        mine = [row for row in results["rows"] if row["sampler"] == name]
        rates = [[row["fields_per_s"][key] for row in mine] for key in ("median", "min", "max")]
        curves.append(plots.Curve(name, np.array([row["batch"] for row in mine]), *map(np.array, rates)))
    (other,) = (row for row in results["rows"] if row["sampler"] == f"S6, {LOOP}")
    title = f"{results['network']}, {results['machine']['device']}, {results['dtype']}"
    reference = f"S6, one at a time in a {LOOP}", other["fields_per_s"]["median"]
    plots.sweep(path, curves, "members a call", "fields a second", title, reference)


def main(argv: Sequence[str]) -> None:
    """The command; `--help` lists its options."""
    f = flags.FLAGS
    if f.network not in NETWORKS:
        raise InputError(f"network {f.network!r} is not one of {', '.join(NETWORKS)}")
    batches, rounds, shorten = measure.whole_numbers("batch", f.batch), f.rounds, f.shorten
    if uneven := [batch for batch in batches if batch > MEMBERS and batch % MEMBERS]:
        raise InputError(f"batches above {MEMBERS} hold whole ensembles of {MEMBERS} members, got {uneven[0]}")
    size, shorten = measure.matrix_size(), shorten or (25 if jax.default_backend() == "cpu" else 1)
    if f.smoke:
        batches, rounds, shorten, size = [1, 2], 2, 75, 256
    results = measure_ensembles(f.network, batches, f.dtype or measure.compute_dtype(), rounds, shorten, size)
    print(report(results))
    if f.out:
        measure.write(f.out, results)
    if f.figure:
        draw(results, f.figure)


if __name__ == "__main__":
    flags.DEFINE_string("network", "standard_attn", "Network to sample with.")
    flags.DEFINE_list("batch", ["1", "4", "16", "64", "256"], "Members a call.")
    flags.DEFINE_integer("shorten", None, "How many times nearer RePaint starts; 25 on a CPU, else 1.", lower_bound=1)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the network; bfloat16 by default, float32 on a CPU.")
    flags.DEFINE_integer("rounds", 3, "Interleaved rounds.", lower_bound=1)
    flags.DEFINE_string("out", None, "JSON file to write.")
    flags.DEFINE_string("figure", None, "Picture to write: fields a second against the batch.")
    flags.DEFINE_boolean("smoke", False, "Batch 1 and 2, a few calls, two rounds, whatever else is asked.")
    command.run(main)
