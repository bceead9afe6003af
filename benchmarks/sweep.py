"""What a sweep costs beside its sampling, and what its programs cost to compile, with and without a cache.

    python -m benchmarks.sweep --frames=4 --members=8 --out=sweep.json

The sweep is method "adaptive" at several values of gamma on the model that comes with the package. `bare` calls the
sampler on the same batches, whose cases are made beforehand; `sweep` makes the cases, scores members and baselines and
writes the parts, all in one process, in turn. The table and the pictures at the end are timed apart: they cost the same
after an hour as after a minute.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from benchmarks import measure
from jax_repaint import command, results, sweep
from jax_repaint.batches import Sampler, left_of, make_batches, make_groups
from jax_repaint.points import calls_by_stage, default_config
from jax_repaint.study import Cases, Study, open_study


def make_config(frames: int, members: int, points: int, t_start: int) -> ConfigDict:
    """A sweep over gamma, one group."""

    def gammas(add):
        for gamma in np.linspace(1, 3, points).tolist():
            add(method="adaptive", gamma=gamma, t_start=t_start)

    config = default_config(gammas)
    config.frames, config.members = frames, members
    return config


def compile_seconds(study: Study) -> dict[str, float]:
    """Seconds to compile the group's program: cold, into an empty cache, and from the cache."""
    (group,) = make_groups(study)
    left = left_of(study, group)
    example = Cases(study, next(iter(study.models.values())), "linear").make([next(iter(left))])[0]
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, cache in (("no cache", None), ("empty cache", folder), ("from the cache", folder)):
            jax.config.update("jax_compilation_cache_dir", cache)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            compilation_cache.reset_cache()
            jax.clear_caches()
            seconds[name] = Sampler.plan(study, group, left, example).seconds
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    compilation_cache.reset_cache()
    return seconds


def measure_overhead(study: Study, rounds: int) -> dict[str, np.ndarray]:
    """Seconds (rounds,) of the bare sampler, of the sweep without its end, and of its end."""
    (group,) = make_groups(study)
    left = left_of(study, group)
    cases = Cases(study, next(iter(study.models.values())), "linear")
    sampler = Sampler.plan(study, group, left, cases.make([next(iter(left))])[0])
    batches = make_batches(left, sampler.shape)
    estimates = [cases.make(batch.cases) for batch in batches]
    evidence = [sampler.evidence_of(batch.points, one) for batch, one in zip(batches, estimates, strict=True)]
    seconds: dict[str, list[float]] = {"bare": [], "sweep": [], "end": []}

    def bare() -> None:
        for arguments in zip(batches, estimates, evidence, strict=True):
            sampler.run(*arguments)

    def whole(workdir: Path) -> None:
        for rows in sweep.run_group(study, group, set(), 0, 1):
            results.write_part(workdir, rows)

    for number in range(rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            workdir = Path(folder)
            for name, call in (
                ("bare", bare),
                ("sweep", lambda workdir=workdir: whole(workdir)),
                ("end", lambda workdir=workdir: sweep.conclude(study, workdir, [group])),
            ):
                began = time.perf_counter()
                call()
                # The first round only warms up.
                if number:
                    seconds[name].append(time.perf_counter() - began)
    return {name: np.asarray(values) for name, values in seconds.items()}


def measure_sweep(config: ConfigDict, rounds: int) -> dict:
    """Both measurements of one sweep."""
    study = open_study(config)
    compiled = compile_seconds(study)
    seconds = measure_overhead(study, rounds)
    tasks = len(study.points) * len(study.cases[False])
    return {
        "machine": measure.machine(),
        "dtype": "float32",
        "tasks": tasks,
        "network_calls": tasks * config.members * calls_by_stage(study.programs[0])[-1],
        "rounds": rounds,
        "compile_s": compiled,
        "seconds": {name: measure.spread(values) for name, values in seconds.items()},
        "overhead": measure.spread(seconds["sweep"] / seconds["bare"] - 1),
    }


def report(results: dict) -> str:
    """The results as a table."""
    rows = [[name, measure.text(spread)] for name, spread in results["seconds"].items()]
    rows.append(["overhead (share)", measure.text(results["overhead"])])
    rows += [[f"compile, {name}", f"{seconds:.2f}"] for name, seconds in results["compile_s"].items()]
    head = f"{results['tasks']} tasks, {results['network_calls']} network calls, {results['rounds']} rounds"
    return "\n".join([measure.banner(results), head, measure.table(["what", "seconds"], rows)])


def main(argv: Sequence[str]) -> None:
    """The command; `--help` lists its options."""
    f = flags.FLAGS
    frames, members, points, t_start, rounds = f.frames, f.members, f.points, f.t_start, f.rounds
    if f.smoke:
        frames, members, points, t_start, rounds = 1, 2, 2, 2, 1
    config = make_config(frames, members, points, t_start)
    config.model, config.fields, config.patterns = f.model, f.fields, f.patterns
    results = measure_sweep(config, rounds)
    print(report(results))
    if f.out:
        measure.write(f.out, results)


if __name__ == "__main__":
    flags.DEFINE_string("model", "", "Folder of a model; by default the one that comes with the package.")
    flags.DEFINE_string("fields", "", "File of fields; by default those of its training.")
    flags.DEFINE_string("patterns", "", "Observation patterns; by default a line, a walk and 2 % of the cells.")
    flags.DEFINE_integer("frames", 4, "Frames a pattern.", lower_bound=1)
    flags.DEFINE_integer("members", 8, "Members of an ensemble.", lower_bound=1)
    flags.DEFINE_integer("points", 4, "Values of gamma.", lower_bound=2)
    flags.DEFINE_integer("t_start", 75, "First step.", lower_bound=1)
    flags.DEFINE_integer("rounds", 3, "Rounds, after one that only warms up.", lower_bound=1)
    flags.DEFINE_string("out", None, "JSON file to write.")
    flags.DEFINE_boolean("smoke", False, "A frame, two members, two points, t_start 2, whatever else is asked.")
    command.run(main)
