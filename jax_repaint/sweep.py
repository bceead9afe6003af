"""Runs every point of a sweep on the same held-out frames, and compares them with each other and with baselines.

    python -m jax_repaint.sweep --config=configs/sweeps/gamma.py --workdir=sweeps/gamma
    python -m jax_repaint.sweep --config=configs/sweeps/gamma.py --workdir=sweeps/gamma --dry_run

Points that differ in numbers only are one compiled program. Its batch is points x frames x members, in chunks that fit
into the memory of the device, spread over all local devices. Random keys depend on seed, frame, member and stage
alone, so that the table is the same whatever the chunks, the devices, the processes and the order.

Rows are written batch by batch (results.py). Started again on the same workdir, the sweep goes on where it was; the
last process to finish writes rows.parquet, table.csv, table.txt and pictures. --so_far prints the table of what is
finished, beside a running sweep too.

Several processes, on one machine or many, share a sweep with --process_index and --process_count; each takes every
P-th case. With --distributed they learn their numbers from Slurm or the TPU pod (distributed.py).
"""

import concurrent.futures
import itertools
import json
import math
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from absl import flags, logging
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import config_flags

from jax_repaint import command, comparison, distributed, ensemble, guide, locks, metrics, provenance, results, scoring
from jax_repaint.batches import Batch, Group, Sampler, Samples, left_of, make_batches, make_groups
from jax_repaint.cases import note_on
from jax_repaint.errors import InputError
from jax_repaint.methods import FROM_RIDGE, ridge_offset
from jax_repaint.points import Point, calls_by_stage
from jax_repaint.study import Estimates, Study, Where, open_study

EDGES = (1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0, math.inf)  # cells, of errors by distance


# --- rows -----------------------------------------------------------------------------------------------------


def make_rows(
    study: Study, point: Point, where: Where, estimates: Estimates, samples: Samples, compile_seconds: float
) -> list[dict[str, Any]]:
    """Rows of results.SCHEMA of one task: every stage, every size of the ensemble."""
    case, scored, ocean = estimates.case, estimates.scored, study.fields.ocean
    calls = calls_by_stage(study.programs[point.number])
    common = {
        "task": study.task(point, where),
        "point": point.number,
        "label": point.label,
        "method": point.method,
        "settings": settings_text(point),
        "pattern": where.pattern,
        "seed": where.seed,
        "frame": where.frame,
        "time": case.time,
        "block": study.blocks[point.consecutive],
        "observed": int(case.observed.sum()),
        "ocean": int(ocean.sum()),
        "antithetic": point.paired,
        "cells": int(scored.sum()),
        "compile_seconds": compile_seconds,
    } | {f"mse_{name}": metrics.mse(field, case.truth, scored) for name, field in estimates.baselines.items()}
    rows = []
    for stage, size in itertools.product(range(len(calls)), point.sizes(study.config)):
        share = size / point.members * (calls[stage] / calls[-1] if calls[-1] else 1)
        row = common | {
            "stage": stage + 1,
            "members": size,
            "calls": size * calls[stage],
            "device_seconds": share * samples.seconds,
        }
        failed = [text for text in samples.failed_at[:size, stage] if text]
        row |= {"failed_members": len(failed), "failed_at": failed[0] if failed else ""}
        if not failed:
            members = samples.x[:size, stage]
            row |= vars(scoring.score(case.truth, members, scored, ocean, antithetic=point.paired))
            row |= _by_distance(estimates, members.mean(0))
        rows.append(row)
    return rows


def _by_distance(estimates: Estimates, mean: np.ndarray) -> dict[str, list[float]]:
    case = estimates.case
    errors = metrics.error_by_distance(
        mean, estimates.baselines["linear"], case.truth, estimates.scored, case.observed, EDGES
    )
    return {
        "distance_edges": list(EDGES),
        "distance_cells": errors.counts.tolist(),
        "distance_mean": errors.mean.tolist(),
        "distance_linear": errors.baseline.tolist(),
    }


# --- the sweep ------------------------------------------------------------------------------------------------


def run(
    study: Study, workdir: Path, index: int = 0, count: int = 1, progress: bool = True, others: Sequence[Path] = ()
) -> str | None:
    """Runs what is left of process `index` of `count`; the table if nothing is left of any, else None.

    Args:
      others: workdirs of other sweeps; tasks that one of them has finished are taken from there.

    Raises:
      InputError: the workdir is another's, is in use, or cannot be written.
    """
    _check_process(index, count)
    workdir, alone = Path(workdir), count == 1
    if workdir.is_dir():
        # A folder of something else is not given a lock, and may have a file of that name.
        results.is_claimed(workdir, study.identity, alone)
    with locks.locked(workdir, index, count):
        results.claim(workdir, study.identity, alone)
        provenance.note_start(workdir, index)
        if alone:
            results.remove_unfinished(workdir)
        done = set(results.read_parts(workdir, remove_damaged=True)["task"])
        done |= adopt(study, workdir, done, others)
        groups = make_groups(study)
        mine = [(point, where) for group in groups for point in group.points for where in group.cases[index::count]]
        before = sum(_weight(study, point) for point, where in mine if study.task(study.points[point], where) in done)
        total = sum(_weight(study, point) for point, _ in mine)
        with command.bar(total, "sweep", "call", progress, initial=before, unit_scale=True) as bar:
            for number, group in enumerate(groups, start=1):
                bar.set_postfix_str(f"group {number} of {len(groups)}")
                for rows in run_group(study, group, done, index, count):
                    results.write_part(workdir, rows)
                    finished = {(row["task"], row["point"]) for row in rows}
                    done |= {task for task, _ in finished}
                    bar.update(sum(_weight(study, point) for _, point in finished))
        return conclude(study, workdir, groups)


def _check_process(index: int, count: int) -> None:
    if not 0 <= index < count:
        raise InputError(f"process {index} is not one of {count}, which are numbered from 0")


def adopt(study: Study, workdir: Path, done: Collection[str], others: Sequence[Path]) -> set[str]:
    """Writes the rows of tasks that another sweep has finished and this one has not; names of the tasks.

    The name of a task says all that its rows depend on, but for what a sweep calls its points.
    """
    wanted = {study.task(point, where): point for point in study.points for where in study.cases[point.consecutive]}
    taken: set[str] = set()
    for other in others:
        rows = results.read_parts(other)
        rows = rows[rows["task"].isin(wanted.keys() - taken - set(done))]
        if rows.empty:
            continue
        points = rows["task"].map(wanted)
        names = {
            "point": [point.number for point in points],
            "label": [point.label for point in points],
            "settings": [settings_text(point) for point in points],
            "block": [study.blocks[point.consecutive] for point in points],
        }
        results.write_part(workdir, rows.assign(**names).to_dict("records"))
        taken |= set(rows["task"])
        logging.info("%d tasks taken from %s", rows["task"].nunique(), other)
    return taken


def settings_text(point: Point) -> str:
    """Settings of a point as they are in its rows."""
    return json.dumps(point.settings, sort_keys=True)


def _weight(study: Study, number: int) -> int:
    """Network calls of a task, by which the time left is estimated."""
    return study.points[number].members * max(calls_by_stage(study.programs[number])[-1], 1)


def run_group(study: Study, group: Group, done: set[str], index: int, count: int) -> Iterator[list[dict[str, Any]]]:
    """Rows of each batch that is left of a group; the cases of the next one are made while the device works."""
    left = left_of(study, group, done, index, count)
    if not left:
        return
    point = study.points[group.points[0]]
    cases = study.maker(point)
    sampler = Sampler.plan(study, group, left, cases.make([next(iter(left))])[0])
    batches = make_batches(left, sampler.shape)

    def prepare(batch: Batch) -> tuple[list[Estimates], dict[int, list[guide.Evidence]]]:
        estimates = cases.make(batch.cases)
        return estimates, sampler.evidence_of(batch.points, estimates)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        coming = pool.submit(prepare, batches[0])
        for batch, following in itertools.zip_longest(batches, batches[1:]):
            estimates, evidence = coming.result()
            if following is not None:
                coming = pool.submit(prepare, following)
            made = sampler.run(batch, estimates, evidence)
            rows = []
            for (number, case), samples in made.items():
                task = study.points[number], batch.cases[case]
                if study.task(*task) not in done:
                    rows += make_rows(study, *task, estimates[case], samples, sampler.seconds or 0.0)
            yield rows


def conclude(study: Study, workdir: Path, groups: Sequence[Group]) -> str | None:
    """Writes rows, table and pictures if every task is done, and returns the table as text."""
    rows = results.read_parts(workdir)
    wanted = {study.task(study.points[p], where) for group in groups for p in group.points for where in group.cases}
    rows = results.in_order(rows[rows["task"].isin(wanted)], study.patterns)
    left = len(wanted) - rows["task"].nunique()
    if left:
        logging.info("%d of %d tasks are left to other processes", left, len(wanted))
        return None
    config = study.config
    note = note_on(config.error)
    return comparison.write(rows, workdir, config.x, config.curve, config.title, config.every_stage, note)


def so_far(study: Study, workdir: Path) -> str:
    """The table of the cases that every point has finished, and how many they are; writes nothing.

    Raises:
      InputError: the workdir holds no such sweep, or no case is finished.
    """
    workdir = Path(workdir)
    if not (workdir / results.CONFIG).exists():
        raise InputError(f"{workdir} holds no sweep")
    results.claim(workdir, study.identity)
    rows, parts, total = results.read_parts(workdir), [], 0
    done = set(rows["task"])
    for kind, cases in study.cases.items():
        points, kept = [point for point in study.points if point.consecutive == kind], set()
        for where in cases:
            tasks = {study.task(point, where) for point in points}
            kept |= tasks if tasks <= done else set()
        total += len(points) * len(cases)
        mine = rows[rows["task"].isin(kept)]
        parts.append(mine.assign(block=_thinned(mine["block"].to_numpy(), study.frames[kind], mine["frame"].unique())))
    rows = results.in_order(pd.concat(parts), study.patterns)
    if rows.empty:
        raise InputError(f"no case in {workdir} has been finished by all points; {len(done)} of {total} tasks are done")
    table = comparison.compare(rows)
    text = comparison.format_lines(table, study.config.every_stage or study.config.x == "stage")
    note = note_on(study.config.error)
    return f"{text}{note}\n\n{rows['task'].nunique()} of {total} tasks, of cases that all points have finished"


def _thinned(block: np.ndarray, frames: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """How many of the frames that are kept lie within a decorrelation time, of which `block` of all frames do."""
    places = np.flatnonzero(np.isin(np.unique(frames), kept))
    if not places.size:
        return block
    step = (places[-1] - places[0]) / max(len(places) - 1, 1)
    return np.maximum(np.rint(block / max(step, 1.0)), 1).astype(int)


def describe(study: Study, workdir: Path | None = None, index: int = 0, count: int = 1) -> str:
    """What process `index` of `count` would do: groups, programs, batches, memory, time; compiles, and samples nothing.

    Args:
      workdir: of which what is finished is not counted; it need not exist.

    Raises:
      InputError: the workdir is another's.
    """
    _check_process(index, count)
    done: set[str] = set()
    if workdir is not None and Path(workdir).is_dir() and results.is_claimed(workdir, study.identity, count == 1):
        done = set(results.read_parts(workdir)["task"])
    groups, lines, seconds, compiled, tasks, whole = make_groups(study), [], 0.0, 0, 0, 0
    for number, group in enumerate(groups, start=1):
        whole += len(group.points) * len(group.cases)
        left = left_of(study, group, done, index, count)
        if not left:
            lines.append(f"group {number}: nothing is left")
            continue
        text, sampler, spent = _describe_group(study, group, left)
        lines.append(f"group {number}: {text}")
        seconds += spent
        compiled += sampler.seconds is not None
        tasks += sum(map(len, left.values()))
    of = f" of {whole}" if tasks < whole else ""
    devices = f"{jax.local_device_count()} {jax.default_backend()} device{'s' * (jax.local_device_count() > 1)}"
    lines.append(
        f"{len(groups)} groups, {compiled} compilations, {tasks}{of} tasks, about {duration(seconds)} on {devices}"
    )
    return "\n".join(lines)


def _describe_group(study: Study, group: Group, left: dict[Where, list[int]]) -> tuple[str, Sampler, float]:
    """Text, compiled sampler and estimated seconds of what is left of a group."""
    places, points = list(left), sorted({number for numbers in left.values() for number in numbers})
    point = study.points[group.points[0]]
    cases = study.maker(point)
    (example,) = cases.make(places[:1])
    began = time.perf_counter()
    cases.make(places[-1:])
    host = (time.perf_counter() - began) * len(places)
    sampler = Sampler.plan(study, group, left, example)
    if point.method in FROM_RIDGE:
        began = time.perf_counter()
        ridge_offset(sampler.trained, example.case.observation)
        # Lines alone are the same in every frame.
        fixed = {(one.pattern, "" if one.pattern.startswith("line:") else (one.seed, one.frame)) for one in places}
        host += (time.perf_counter() - began) * len(fixed)
    batches = make_batches(left, sampler.shape)
    calls = sum(map(len, left.values())) * point.members * calls_by_stage(study.programs[point.number])[-1]
    on_device = calls * _seconds_a_call(study, sampler)
    names = ", ".join(study.points[p].label for p in points[:4]) + ", ..." * (len(points) > 4)
    program = "no program of its own"
    if sampler.seconds is not None:
        program = f"one program, compiled in {sampler.seconds:.1f} s, {sampler.memory / 1e9:.2g} GB"
    text = "\n  ".join(
        [
            names,
            f"{len(points)} points x {len(places)} cases x {point.members} members, {calls} network calls",
            f"{len(batches)} batches of up to {sampler.shape[0]} points x {sampler.shape[1]} cases, "
            f"{sampler.chunk} members a call",
            f"{program}; about {duration(on_device)} on the device",
        ]
    )
    # The host makes cases while the device samples.
    return text, sampler, (sampler.seconds or 0) + max(on_device, host)


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def _seconds_a_call(study: Study, sampler: Sampler) -> float:
    """Time of one network call of one member, measured at the group's batch."""
    program = study.programs[sampler.group.points[0]]
    if program is None:
        return 0.0
    guided = program[0].guided if sampler.repaint else program.correction in guide.WITH_GRADIENTS
    denoiser = sampler.trained.denoiser
    mesh = ensemble.over_devices(sampler.chunk)
    x = jnp.zeros((sampler.chunk, *sampler.trained.padded, 2))
    x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("members")))
    denoiser = jax.device_put(denoiser, NamedSharding(mesh, PartitionSpec()))

    def estimate(x: jax.Array, denoiser: Any) -> jax.Array:
        return jax.vmap(lambda one: denoiser(one, jnp.float32(1.0)))(x)

    def gradient(x: jax.Array, denoiser: Any) -> jax.Array:
        return jax.grad(lambda x: jnp.sum(estimate(x, denoiser) ** 2))(x)

    call = jax.jit(gradient if guided else estimate)
    call(x, denoiser).block_until_ready()
    began = time.perf_counter()
    call(x, denoiser).block_until_ready()
    return (time.perf_counter() - began) / sampler.chunk


FLAGS = flags.FLAGS


def _define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "Sweep, such as configs/sweeps/gamma.py, with :smoke for a trial.")
    flags.DEFINE_string("workdir", None, "Folder of the sweep; what is finished in it is not run again.")
    flags.DEFINE_boolean("dry_run", False, "Say what is left to be done, with memory and time, and write nothing.")
    flags.DEFINE_boolean("so_far", False, "Print the table of the cases that are finished, and run and write nothing.")
    flags.DEFINE_string("cache", None, "Private folder where compiled programs are kept for other runs.")
    flags.mark_flags_as_required(["config", "workdir"])
    distributed.define_flags()


def main(_) -> None:
    """Runs or continues a sweep, and prints its table."""
    if FLAGS.cache:
        command.keep_programs(FLAGS.cache)
    if FLAGS.dry_run and FLAGS.so_far:
        raise InputError("--dry_run says what would be done and --so_far what was; give one of them")
    study = open_study(FLAGS.config)
    if FLAGS.so_far:
        print(so_far(study, Path(FLAGS.workdir)))
        return
    index, count = FLAGS.process_index, FLAGS.process_count
    if count is None:
        index, count = jax.process_index(), jax.process_count()
    if FLAGS.dry_run:
        print(describe(study, Path(FLAGS.workdir), index, count))
        return
    text = run(study, Path(FLAGS.workdir), index, count)
    if text is None:
        print(f"process {index} of {count} is done; the last one writes the table")
    else:
        print(f"{text}\n\nwrote {', '.join(comparison.FILES)} in {FLAGS.workdir}")


if __name__ == "__main__":
    _define_flags()
    command.run(distributed.connected(main, together=False))
