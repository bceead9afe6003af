"""A sweep gives the same rows however it is cut up, spread out, stopped and started again, and they are right."""

import dataclasses
import errno
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import launching
import numpy as np
import pandas as pd
import pytest
import tiny
from ml_collections import ConfigDict

import jax_repaint
from jax_repaint import (
    batches,
    comparison,
    ensemble,
    methods,
    metrics,
    model,
    observe,
    reproduce,
    results,
    sample,
    scoring,
    sweep,
)
from jax_repaint import study as study_module
from jax_repaint.batches import chunk_of, make_groups
from jax_repaint.cases import OBSERVATION_ERROR, data_of, known_of, make_cases, observation_of
from jax_repaint.data import readers
from jax_repaint.data.fields import Split
from jax_repaint.errors import InputError
from jax_repaint.methods import run_method
from jax_repaint.points import default_config, make_program, read_points, smoke
from jax_repaint.posterior import Posterior, evidence_for
from jax_repaint.prior import gp, linear
from jax_repaint.study import Cases, open_study

CONFIG = """
from jax_repaint.points import default_config, smoke

def sweep(add):
    for floor in (0.2, 0.7):
        add(method="two_stage", t_start=3, t_refine=2, noise_floor=floor)
    add(method="kalman", levels=3)
    add(method="gp_init", t_start=3, prior="seed_gp", label="seed's start")
    add(method="guided", t_start=3, guidance_scale=1e30)

def get_config(arg=""):
    config = default_config(sweep)
    config.frames, config.members, config.sizes, config.resample_steps = 2, 4, (2,), 2
    config.patterns = "line:3,cells:0.1"
    config.x = "method"
    return smoke(config, arg)
"""
CASES = 2 * 2  # patterns, frames
TASKS = 5 * CASES
GENTLER = sample.METHODS | {"two_stage": sample.METHODS["two_stage"] | {"gamma": 2.0}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    readers.write(tiny.fields(), folder / "tiny.nc")
    model.save(tiny.model(data=readers.read(folder / "tiny.nc")), folder / "model")
    (folder / "config.py").write_text(CONFIG)
    tiny.compile_once(folder / "cache")
    yield folder
    tiny.compile_as_usual()


def make_config(folder, points=5, **changes):
    """The sweep of CONFIG with its first `points` points."""
    scope = {}
    exec(CONFIG, scope)
    config = scope["get_config"]()
    config.model, config.fields = str(folder / "model"), str(folder / "tiny.nc")
    config.points = ConfigDict({name: config.points[name] for name in sorted(config.points)[:points]})
    config.update(changes)
    return config


def go(config, workdir, **options):
    text = sweep.run(open_study(config), workdir, progress=False, **options)
    return text, results.read_parts(workdir)


@pytest.fixture(scope="module")
def study(folder):
    return open_study(make_config(folder))


@pytest.fixture(scope="module")
def first(folder, study):
    """Workdir and rows of a whole sweep."""
    workdir = folder / "first"
    text = sweep.run(study, workdir, progress=False)
    assert text == (workdir / "table.txt").read_text().rstrip("\n")
    return workdir, results.read_parts(workdir)


def check_same(rows, expected, points=5, exact=False):
    """Equal but for times; network outputs differ in the last digits between batches of different size."""
    rows, expected = (r.drop(columns=results.TIMES) for r in (rows, expected[expected["point"] < points]))
    pd.testing.assert_frame_equal(rows, expected, check_exact=exact, **({} if exact else {"rtol": 1e-4, "atol": 1e-9}))


# --- rows ---------------------------------------------------------------------------------------------------


def test_every_task_has_its_rows(first):
    rows = first[1]
    assert rows["task"].nunique() == TASKS
    assert not rows.duplicated(results.KEY).any()
    stages = rows.groupby("method")["stage"].max()
    assert stages.to_dict() == dict.fromkeys(stages.index, 1) | {"two_stage": 2}
    assert len(rows) == 2 * (TASKS + 2 * CASES)
    assert set(rows["members"]) == {2, 4}
    calls = rows[rows["members"] == 4].groupby(["method", "stage"])["calls"].first()
    assert calls["two_stage"].tolist() == [4 * 7, 4 * (7 + 5)]
    assert (calls["gp_init"].tolist(), calls["kalman"].tolist()) == ([28], [12])


def test_members_are_those_of_the_samplers(folder, study, first):
    """Rows of one frame against the ensembles sampled one by one, with scores of their first members."""
    rows, trained = first[1], model.load(folder / "model")
    fields = readers.read(folder / "tiny.nc")
    where = study.cases[False][3]
    (case,) = make_cases(trained, fields.select([where.frame]), [where.frame], [where.pattern], where.seed)
    known = jax.tree.map(lambda leaf: leaf[None], known_of(trained, case))
    stages = sample.method("two_stage", 250, t_start=3, t_refine=2, noise_floor=0.7, resample_steps=2)
    x = ensemble.repaint_ensemble(
        trained.denoiser, known, trained.steps, stages, frames=[where.frame], members=4, seed=where.seed
    ).x[0]
    hyper = Posterior.create(min(methods.START, trained.sigma[1]), max(trained.sigma[0], 0.01), 3)
    evidence = evidence_for(hyper, trained.gaussian.ocean, case.observation, trained.gaussian)
    pairs = ensemble.posterior_ensemble(
        trained.denoiser, [evidence], trained.gaussian, [case.analysis], hyper,
        frames=[where.frame], members=4, seed=where.seed,
    )[0]  # fmt: skip
    scored = metrics.scored_cells(case.truth, fields.ocean, case.observed)
    for point, stage, members in ((1, 1, x[:, 0]), (1, 2, x[:, 1]), (2, 1, pairs)):
        velocity = trained.to_velocity(members)
        for size in (2, 4):
            expected = scoring.score(case.truth, velocity[:size], scored, fields.ocean, antithetic=point == 2)
            keys = {"point": point, "seed": where.seed, "pattern": where.pattern, "frame": where.frame}
            keys |= {"stage": stage, "members": size}
            (row,) = rows[(rows[list(keys)] == list(keys.values())).all(axis=1)].to_dict("records")
            for name, value in vars(expected).items():
                assert row[name] == pytest.approx(value, rel=1e-4, nan_ok=True), name


def test_baselines_are_those_of_evaluate(folder, study, first):
    trained, fields = model.load(folder / "model"), readers.read(folder / "tiny.nc")
    rows = first[1]
    for where in study.cases[False][1:3]:
        (case,) = make_cases(trained, fields.select([where.frame]), [where.frame], [where.pattern], where.seed)
        scored = metrics.scored_cells(case.truth, fields.ocean, case.observed)
        mine = rows[(rows["frame"] == where.frame) & (rows["seed"] == where.seed) & (rows["pattern"] == where.pattern)]
        for name in methods.DETERMINISTIC:
            made = run_method(name, trained, fields, [case], 1).members[0][0]
            np.testing.assert_allclose(mine[f"mse_{name}"], metrics.mse(made, case.truth, scored), rtol=1e-5)


def test_observations_of_a_sweep_have_the_errors_of_those_of_evaluate(folder, study):
    noisy = open_study(make_config(folder, error=0.03))
    trained, where = model.load(folder / "model"), study.cases[False][1]
    fields = readers.read(folder / "tiny.nc").select([where.frame])
    (case,) = make_cases(trained, fields, [where.frame], [where.pattern], where.seed, 0.03)
    (one,) = noisy.maker(noisy.points[0]).make([where])
    jax.tree.map(np.testing.assert_array_equal, one.case.observation, case.observation)
    for name in methods.DETERMINISTIC:
        made = run_method(name, trained, fields, [case], 1).members[0][0]
        np.testing.assert_allclose(one.baselines[name], made, atol=1e-6)
    # Neither the tasks nor the workdir of one without errors, even of the size that is told of those.
    told = open_study(make_config(folder, error=OBSERVATION_ERROR))
    names = {other.task(other.points[0], where) for other in (study, noisy, told)}
    assert len(names) == 3
    assert "error" not in study.identity["config"]
    assert told.identity["config"]["error"] == OBSERVATION_ERROR


def test_the_prior_is_what_the_point_says(study):
    # The second frame of a pattern, whose values are its own.
    where = study.cases[False][:2]
    linear, seed_gp = (Cases(study, study.models[p.model], p.prior).make(where)[1] for p in study.points[2:4])
    ocean = study.fields.ocean
    trained = study.models[study.points[0].model]
    start = trained.to_velocity(seed_gp.known.prior_mean)
    for one in (linear, seed_gp):
        np.testing.assert_allclose(start[ocean], one.baselines["seed_gp"][ocean], atol=1e-6)
    start = trained.to_velocity(linear.known.prior_mean)
    np.testing.assert_allclose(start[ocean], linear.baselines["linear"][ocean], atol=1e-6)
    variance = np.asarray(seed_gp.known.prior_variance)
    np.testing.assert_allclose(variance[..., 0], variance[..., 1], rtol=1e-6)
    assert np.asarray(seed_gp.known.missing).sum() == linear.scored.sum()


def test_a_prior_is_padded_to_the_grid_of_the_model(study):
    """Which may be larger than what its network needs."""
    where, trained = study.cases[False][:1], study.models[study.points[0].model]
    y, x = trained.padded

    def larger(field):
        return jnp.pad(field, [(0, 0)] * (field.ndim - 3) + [(0, y), (0, x), (0, 0)])

    parts = {name: larger(getattr(trained.gaussian, name)) for name in ("mean", "direction", "ocean")}
    on_more = dataclasses.replace(trained, grid=(2 * y, 2 * x), gaussian=trained.gaussian.replace(**parts))
    (one,), (other,) = (Cases(study, of, "seed_gp").make(where) for of in (trained, on_more))
    for name in ("prior_mean", "prior_variance"):
        found, expected = (np.asarray(getattr(case.known, name)) for case in (other, one))
        assert found.shape[:2] == (2 * y, 2 * x)
        np.testing.assert_allclose(found[:y, :x], expected, atol=1e-6)


def test_baselines_are_found_once_for_all_groups(folder, study, monkeypatch):
    """Those of a fixed pattern by one factorisation; what is kept is what is made anew, and has a limit."""
    cases, calls, estimator = study.cases[False], [], gp.estimator
    point = study.points[0]
    fresh = Cases(study, study.models[point.model], point.prior).make(cases)
    monkeypatch.setattr(gp, "estimator", lambda *args: calls.append(args) or estimator(*args))
    again = open_study(make_config(folder))
    assert again.maker(again.points[0]) is again.maker(again.points[1]) is not again.maker(again.points[3])
    first = again.maker(again.points[0]).make(cases)
    processes = 2 if study.models[point.model].kernel is not None else 1
    assert [one.pattern for one in cases] == ["line:3", "line:3", "cells:0.1", "cells:0.1"]
    assert len(calls) == 3 * processes
    second = again.maker(again.points[1]).make(cases[::-1])[::-1]
    assert len(calls) == 3 * processes
    for one, two, three in zip(fresh, first, second, strict=True):
        parts = [(x.case.truth, x.scored, x.baselines, x.known) for x in (one, two, three)]
        jax.tree.map(np.testing.assert_array_equal, parts[0], parts[1])
        jax.tree.map(np.testing.assert_array_equal, parts[0], parts[2])
    monkeypatch.setattr("jax_repaint.study.KEPT_BYTES", 0)
    bounded = Cases(study, study.models[point.model], point.prior)
    bounded.make(cases[:1])
    bounded.make(cases[:1])
    assert not bounded._made


def test_a_point_that_diverges_is_marked_and_the_others_go_on(first):
    workdir, rows = first
    failed = rows[rows["method"] == "guided"]
    assert (failed["failed_members"] == failed["members"]).all()
    assert failed["failed_at"].str.match(r"stage 1, iteration \d, t 3").all()
    assert failed[["mse_member", "mse_mean", "crps"]].isna().all(axis=None)
    assert np.isfinite(rows[rows["method"] != "guided"]["mse_mean"]).all()
    assert "2/2" in (workdir / "table.txt").read_text()


def test_files(first):
    workdir = first[0]
    assert set(comparison.FILES) <= {path.name for path in workdir.iterdir()}
    table = pd.read_csv(workdir / "table.csv")
    assert len(table) == 2 * 2 * (5 + 2)
    rows = pd.read_parquet(workdir / "rows.parquet")
    check_same(rows, results.in_order(first[1], ["line:3", "cells:0.1"]), exact=True)


# --- batches, devices, processes ----------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 6])
def test_rows_do_not_depend_on_the_batch(folder, first, tmp_path, batch):
    check_same(go(make_config(folder, 3, batch=batch), tmp_path)[1], first[1], 3)


def test_batches_keep_to_the_memory(folder, first, tmp_path, caplog):
    check_same(go(make_config(folder, 2, batch=16, memory_gb=2e-4), tmp_path)[1], first[1], 2)
    assert "members a call need" in caplog.text


@pytest.mark.parametrize("number", [0, 2])
def test_seconds_are_those_of_one_ensemble(study, monkeypatch, number):
    """Of two points and three cases for the RePaint family, where one point of two cases fills the batch up."""
    point, clock = study.points[number], itertools.count(0, 12)
    where = study.cases[False][:2]
    sampler = batches.Sampler(study, batches.Group([number], where), study.models[point.model], shape=(2, 3))
    shape = sampler.trained.gaussian.mean.shape
    outcome = sample.Outcome(np.zeros((2, 3, point.members, 1, *shape)), np.full((2, 3, point.members, 1), -1))
    monkeypatch.setattr(batches, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(ensemble, "repaint_sweep", lambda *_, **__: outcome)
    monkeypatch.setattr(ensemble, "posterior_ensemble", lambda *_, **__: outcome.x[0, :, :, 0])
    estimates = study.maker(point).make(where)
    made = sampler.run(batches.Batch([number], where), estimates, {number: [None] * 2})
    assert {key: one.seconds for key, one in made.items()} == dict.fromkeys(
        [(number, 0), (number, 1)], 12 / (6 if point.repaint else 3)
    )


def test_a_batch_is_what_its_points_and_cases_say(study, monkeypatch):
    """Programs and decays in the order of the points, fields and frames in that of the cases; the last fill it up."""
    where = [dataclasses.replace(one, seed=7) for one in study.cases[False][1:3]]
    estimates = study.maker(study.points[0]).make(study.cases[False][1:3])
    points = [
        dataclasses.replace(one, hyper=one.hyper | {"var_decay": decay})
        for one, decay in zip(study.points[:2], (0.2, 0.6), strict=True)
    ]
    sampler = batches.Sampler(
        dataclasses.replace(study, points=points), batches.Group([0, 1], where), study.models[points[0].model], (3, 3)
    )
    x = np.random.default_rng(0).normal(size=(3, 3, 4, 2, *sampler.trained.gaussian.mean.shape)).astype(np.float32)
    failed = np.full(x.shape[:4], -1)
    failed[1, 0, 3, 1] = 2
    given = {}

    def sampled(denoiser, known, schedule, programs, **options):
        given.update(options, known=known, programs=programs)
        return sample.Outcome(x, failed)

    monkeypatch.setattr(ensemble, "repaint_sweep", sampled)
    made = sampler.run(batches.Batch([0, 1], where), estimates, {})
    assert given["var_decay"] == [0.2, 0.6, 0.6]
    assert given["programs"] == [study.programs[number] for number in (0, 1, 1)]
    assert (given["frames"], given["seed"]) == ([where[0].frame, where[1].frame, where[1].frame], 7)
    for one, case in zip(given["known"].value, (0, 1, 1), strict=True):
        np.testing.assert_array_equal(one, estimates[case].known.value)
    for (point, case), samples in made.items():
        np.testing.assert_array_equal(samples.x, sampler.trained.to_velocity(x[point, case]))
        fails = {"stage 2, iteration 2, t 1"} if (point, case) == (1, 0) else set()
        assert set(samples.failed_at[3:, 1:].ravel()) - {""} == fails
    assert made.keys() == set(itertools.product((0, 1), (0, 1)))


def test_frames_of_one_pattern_share_its_gains_and_not_their_values(study):
    where, trained = study.cases[False][:2], study.models[study.points[2].model]
    sampler = batches.Sampler(study, batches.Group([2], where), trained)
    estimates = study.maker(study.points[2]).make(where)
    first, second = sampler.evidence_of([2], estimates)[2]
    assert first.gain is second.gain
    for made, one in zip((first, second), estimates, strict=True):
        np.testing.assert_array_equal(made.observation.values, one.case.observation.values)
    assert (first.observation.values != second.observation.values).any()


def test_a_batch_is_of_one_seed(study):
    """Members are drawn with the seed of the first case of their batch."""
    cases = [dataclasses.replace(where, seed=seed) for seed in (3, 4) for where in study.cases[False][:3]]
    made = batches.make_batches({where: [0, 1] for where in cases}, (2, 2))
    assert [[where.seed for where in batch.cases] for batch in made] == [[3, 3], [3], [4, 4], [4]]


def test_one_program_a_group(folder, tmp_path, caplog):
    with jax.log_compiles():
        # No other test has chunks of this size.
        go(make_config(folder, 3, members=10), tmp_path)
    compiled = [m.split(" with ")[0] for m in caplog.messages if m.startswith("Compiling")]
    assert sum("repaint_rows" in m for m in compiled) == 1
    assert sum("posterior_frames" in m for m in compiled) == 1


def test_two_processes_share_a_sweep(folder, first, tmp_path):
    config = make_config(folder, 3)
    text, rows = go(config, tmp_path, index=1, count=2)
    assert text is None
    assert rows["task"].nunique() == 3 * CASES / 2
    assert not (tmp_path / "table.txt").exists()
    text, rows = go(config, tmp_path, index=0, count=2)
    check_same(rows, first[1], 3)
    assert text == (tmp_path / "table.txt").read_text().rstrip("\n")
    with pytest.raises(InputError, match="process 2 is not one of 2"):
        go(config, tmp_path, index=2, count=2)


def test_the_table_so_far_is_of_finished_cases(folder, study, first, tmp_path):
    """Half of the cases, and one case that one point has not finished."""
    with pytest.raises(InputError, match="holds no sweep"):
        sweep.so_far(study, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    half = tmp_path / "half"
    assert sweep.run(study, half, 0, 2, progress=False) is None
    rows = results.read_parts(half)
    assert rows["task"].nunique() == TASKS // 2
    files = sorted(half.rglob("*"))
    text = sweep.so_far(study, half)
    assert text.startswith(comparison.format_lines(comparison.compare(results.in_order(rows, study.patterns))))
    assert text.endswith(f"{TASKS // 2} of {TASKS} tasks, of cases that all points have finished")
    assert sorted(half.rglob("*")) == files
    # Of every fourth frame a fourth as many lie within a decorrelation time; of the first ones as many as ever.
    numbers, blocks = np.arange(0, 128, 2), np.array([16, 16])
    assert sweep._thinned(blocks, numbers, numbers[::4]).tolist() == [4, 4]
    assert sweep._thinned(blocks, numbers, numbers[:9]).tolist() == [16, 16]
    assert sweep._thinned(np.array([1]), numbers, numbers[::4]).tolist() == [1]
    everything = sweep.so_far(study, first[0])
    assert everything.startswith((first[0] / "table.txt").read_text().rstrip("\n"))
    changed = open_study(make_config(folder, members=2, sizes=()))
    with pytest.raises(InputError, match="another sweep"):
        sweep.so_far(changed, half)


def test_points_have_ensembles_of_their_own_size(folder, first, tmp_path):
    """Points of one program with 2 and 4 members: each row is that of a sweep in which all have as many."""
    config = make_config(folder, 3)
    config.points.p000.members = 2
    config.points.p002.members = 2
    study = open_study(config)
    assert [len(group.points) for group in make_groups(study)[:2]] == [1, 1]
    text = sweep.run(study, tmp_path, progress=False)
    rows, whole = results.read_parts(tmp_path), first[1]
    assert "mean of 4, as expected, over the best baseline" in text
    few = rows["point"] != 1
    assert set(rows["members"][few]) == {2}
    assert set(rows["members"][~few]) == {2, 4}
    key = ["point", "pattern", "frame", "stage", "members"]
    both = rows.merge(whole, on=key, suffixes=("", "_whole"))
    assert len(both) == len(rows)
    np.testing.assert_allclose(both["mse_mean"], both["mse_mean_whole"], rtol=1e-4)
    np.testing.assert_array_equal(both["calls"], both["calls_whole"])


def test_what_a_lost_process_left_is_taken_up(folder, first, tmp_path):
    config = make_config(folder, 2)
    go(config, tmp_path, index=1, count=3)
    parts = sorted((tmp_path / "parts").iterdir())
    text, rows = go(config, tmp_path)
    assert text is not None
    check_same(rows, first[1], 2)
    assert set(parts) <= set((tmp_path / "parts").iterdir())


def command(folder, workdir, *options):
    """The command as a user types it."""
    return [
        sys.executable, "-m", "jax_repaint.sweep", f"--config={folder / 'config.py'}", f"--workdir={workdir}",
        f"--config.model={folder / 'model'}", f"--config.fields={folder / 'tiny.nc'}", f"--cache={folder / 'cache'}",
        *options,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 8])
def test_rows_do_not_depend_on_the_devices(folder, first, tmp_path, devices):
    environment = launching.environment(XLA_FLAGS=launching.xla_flags(devices))
    done = subprocess.run(command(folder, tmp_path), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check_same(results.read_parts(tmp_path), first[1])
    assert f"wrote {', '.join(comparison.FILES)} in {tmp_path}" in done.stdout


@pytest.mark.slow
def test_two_processes_at_once(folder, first, tmp_path):
    """They find each other, part, and leave the table of one process."""
    flags = ["--process_count=2", f"--coordinator=localhost:{launching.free_port()}"]
    runs = [
        subprocess.Popen(
            command(folder, tmp_path, f"--process_index={index}", *flags), env=launching.environment(),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    outputs = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    check_same(results.read_parts(tmp_path), first[1])
    assert all(f"process {index} of 2, with 1 of 2 devices" in err for index, (_, err) in enumerate(outputs))
    assert any("wrote rows.parquet" in out for out, _ in outputs)
    tables = [pd.read_csv(workdir / "table.csv") for workdir in (tmp_path, first[0])]
    pd.testing.assert_frame_equal(*(t.drop(columns=t.filter(like="seconds")) for t in tables), rtol=1e-4)


# --- faults -------------------------------------------------------------------------------------------------

# Everything is imported once, before JAX has threads; each attempt is a fork of its own, as a started command would be.
KILLS = """
import os, pathlib, random, signal, sys, time
import tiny
from ml_collections import ConfigDict
from jax_repaint import files, results, sweep
from jax_repaint.points import default_config
from jax_repaint.study import open_study
folder, workdir = map(pathlib.Path, sys.argv[1:])
scope = {}
exec((folder / "config.py").read_text(), scope)
config = scope["get_config"]()
config.model, config.fields, config.batch, config.frames = str(folder / "model"), str(folder / "tiny.nc"), 4, 8
for name in ("p002", "p003", "p004"):
    del config.points[name]
rename = os.replace

def slowly(source, target):
    time.sleep(0.1)
    rename(source, target)

random.seed(0)
for attempt in range(6):
    before = len(list(workdir.glob("parts/[!.]*")))
    child = os.fork()
    if not child:
        os.replace = slowly
        tiny.compile_once(folder / "cache")
        sweep.run(open_study(config), workdir, progress=False)
        os._exit(0)
    # Two of them early: before the first part, while the sweep compiles or holds its lock for the first time.
    early, deadline = attempt in (0, 3), time.monotonic() + 200
    while not early and time.monotonic() < deadline and len(list(workdir.glob("parts/[!.]*"))) <= before + attempt % 2:
        time.sleep(0.005)
    time.sleep(random.uniform(0, 2 if early else 0.1))
    os.kill(child, signal.SIGKILL)
    print(before, os.waitpid(child, 0)[1])
"""


@pytest.mark.slow
def test_killed_at_six_moments_no_row_is_lost(folder, tmp_path):
    workdir = tmp_path / "killed"
    done = subprocess.run(
        [sys.executable, "-c", KILLS, folder, workdir], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    parts, codes = zip(*(map(int, line.split()) for line in done.stdout.splitlines()), strict=True)
    assert codes.count(9) == 6, done.stdout
    assert sorted(parts) == list(parts)
    before = set((workdir / "parts").glob("[!.]*"))
    assert 0 < len(before) < 2 * 2 * 8
    config = make_config(folder, 2, batch=4, frames=8)
    _, rows = go(config, workdir)
    check_same(rows, go(config, tmp_path / "whole")[1], 2)
    # Nothing that was there was done again.
    assert before <= set((workdir / "parts").iterdir())
    parts = [pd.read_parquet(path) for path in (workdir / "parts").iterdir()]
    assert not pd.concat(parts).duplicated(results.KEY).any()


def test_started_again_nothing_is_sampled(folder, first, monkeypatch):
    workdir, rows = first
    monkeypatch.setattr(ensemble, "repaint_sweep", None)
    monkeypatch.setattr(ensemble, "posterior_ensemble", None)
    text, again = go(make_config(folder), workdir)
    check_same(again, rows, exact=True)
    assert text == (workdir / "table.txt").read_text().rstrip("\n")


def test_batches_of_pairs_are_filled_up_and_points_have_their_own_gains(folder, tmp_path, monkeypatch):
    """Five frames in batches of three, two points of one program: rows are those of frame by frame."""
    config = make_config(folder, frames=5, sizes=(), patterns="line:3")
    config.points = ConfigDict(
        {"p000": {"method": "kalman", "levels": 3}, "p001": {"method": "kalman", "sigma_max": 2.0}}
    )
    config.points.p001.levels = 3
    assert len(make_groups(open_study(config))) == 1
    alone = go(config.copy_and_resolve_references(), tmp_path / "alone")[1]
    calls, run = [], ensemble.posterior_ensemble

    def counted(*arguments, frames, **options):
        calls.append(len(frames))
        return run(*arguments, frames=frames, **options)

    monkeypatch.setattr(ensemble, "posterior_ensemble", counted)
    config.batch = 12
    together = go(config, tmp_path / "together")[1]
    assert calls == [3] * 4
    assert len(together) == 10
    keys = ["point", "frame"]
    for name in ("mse_mean", "crps"):
        pairs = zip(alone.sort_values(keys)[name], together.sort_values(keys)[name], strict=True)
        assert all(a == pytest.approx(b, rel=1e-4) for a, b in pairs)
    means = together.groupby("point")["mse_mean"].mean()
    assert means[0] != pytest.approx(means[1], rel=1e-4)


def test_groups_are_of_what_is_observed(folder, tmp_path):
    """Cells that fall into gaps are not observed, and may make another program of a case."""
    fields = tiny.fields()
    velocity = fields.velocity.copy()
    velocity[1::2, :4] = np.nan
    readers.write(dataclasses.replace(fields, velocity=velocity), tmp_path / "gaps.nc")
    study = open_study(make_config(folder, frames=9, fields=str(tmp_path / "gaps.nc"), patterns="cells:0.28"))
    where = study.cases[False]
    assert len({one.size for one in where}) > 1
    made = Cases(study, next(iter(study.models.values())), "linear").make(where)
    assert [one.size for one in where] == [one.case.observation.size for one in made]


@pytest.mark.parametrize(
    ("place", "name", "value", "changed"),
    [
        (methods, "START", 1.0, {"kalman"}),
        (sample, "METHODS", GENTLER, {"two_stage"}),
        (sample, "VAR_DECAY", 0.2, {"gp_init", "two_stage", "guided"}),
        (study_module, "OBSERVATION_ERROR", 0.01, {"gp_init", "two_stage", "kalman", "guided"}),
        (results, "VERSION", results.VERSION + 1, {"gp_init", "two_stage", "kalman", "guided"}),
    ],
)
def test_tasks_are_named_by_usual_values_too(folder, study, first, monkeypatch, place, name, value, changed):
    """A workdir of rows that were made with other usual values is refused."""
    monkeypatch.setattr(place, name, value)
    after = open_study(make_config(folder))
    where = study.cases[False][0]
    other = {p.method for p in study.points if study.task(p, where) != after.task(p, where)}
    assert other == changed
    if changed:
        with pytest.raises(InputError, match="holds another sweep"):
            results.claim(first[0], after.identity)


def test_tasks_of_another_sweep_are_taken_over(folder, first, tmp_path, monkeypatch):
    """What two sweeps have in common is sampled once, under the number and the name that it has in each."""
    points = {
        "p000": {"method": "gp_init", "t_start": 2},
        "p001": {"method": "kalman", "levels": 3, "label": "shared"},
        "p002": {"method": "kalman", "levels": 2},
    }
    config = make_config(folder)
    config.points = ConfigDict({name: points[name] for name in ("p000", "p001")})
    with monkeypatch.context() as patched:
        patched.setattr(ensemble, "posterior_ensemble", None)
        text, rows = go(config, tmp_path / "taken", others=[tmp_path / "none", first[0]])
    assert "shared" in text
    alone = go(config, tmp_path / "alone")[1]
    check_same(rows, alone)
    theirs = first[1][first[1]["method"] == "kalman"]
    assert rows.loc[rows["label"] == "shared", "device_seconds"].tolist() == theirs["device_seconds"].tolist()
    # Another setting, or other sizes of the ensemble, is another task.
    config.points = ConfigDict({"p000": points["p002"]})
    assert sweep.adopt(open_study(config), tmp_path / "other", (), [first[0]]) == set()
    config = make_config(folder, 3, sizes=())
    assert sweep.adopt(open_study(config), tmp_path / "other", (), [first[0]]) == set()


def test_a_folder_of_something_else_stays_as_it_is(study, tmp_path):
    for name in ("lock", "notes.txt"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match="not empty and holds no sweep"):
        sweep.run(study, tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"lock": "mine", "notes.txt": "mine"}


def test_damaged_parts_are_computed_again(folder, first, tmp_path, caplog):
    shutil.copytree(first[0], tmp_path / "copy")
    parts = sorted((tmp_path / "copy" / "parts").iterdir())
    for path, content in ((parts[0], parts[0].read_bytes()[:100]), (parts[1], b"")):
        path.write_bytes(content)
    _, rows = go(make_config(folder), tmp_path / "copy")
    check_same(rows, first[1])
    assert caplog.text.count("is damaged") == 2


def test_a_full_disk_stops_the_sweep_and_loses_nothing(folder, first, tmp_path, monkeypatch):
    write, count = Path.write_bytes, iter(range(100))

    def full(path, content):
        if next(count) >= 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    config = make_config(folder, 2, batch=4)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match="No space left on device"):
        go(config, tmp_path)
    monkeypatch.undo()
    assert len(list((tmp_path / "parts").iterdir())) == 3
    check_same(go(config, tmp_path)[1], first[1], 2)


@pytest.mark.parametrize(("name", "points"), [("repaint_sweep", 2), ("posterior_ensemble", 3)])
def test_out_of_memory_halves_the_chunk(folder, first, tmp_path, monkeypatch, caplog, name, points):
    sampled, sizes = getattr(ensemble, name), []

    def small(*arguments, chunk, **options):
        sizes.append(chunk)
        if chunk > 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
        return sampled(*arguments, chunk=chunk, **options)

    monkeypatch.setattr(ensemble, name, small)
    check_same(go(make_config(folder, points, batch=4), tmp_path)[1], first[1], points)
    assert sizes[:4] == [4, 2, 1, 1]
    assert "out of memory with 4 members a call; going on with 2" in caplog.text

    def none(*arguments, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

    monkeypatch.setattr(ensemble, name, none)
    with pytest.raises(InputError, match="not enough memory for one member"):
        go(make_config(folder, points, batch=4), tmp_path / "none")


def test_other_errors_of_the_device_are_not_hidden(folder, tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(ensemble, "repaint_sweep", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        go(make_config(folder, 2), tmp_path)


def test_a_changed_sweep_is_refused(folder, first, tmp_path):
    with pytest.raises(
        InputError, match=r"holds another sweep \(config.members: 4 there, 6 here\); choose another \w+$"
    ):
        go(make_config(folder, members=6), first[0])
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(first[0], elsewhere)
    (path,) = (p for p in elsewhere.glob("*.json") if "frames" in json.loads(p.read_text()))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"frames": "rounded"}))
    with pytest.raises(
        InputError, match=r"frames: 'rounded' there, .* or bring the cache of the machine that began it"
    ):
        go(make_config(folder), elsewhere)


# --- what is asked for --------------------------------------------------------------------------------------


def test_dry_run_counts_and_writes_nothing(folder, study, tmp_path):
    text = sweep.describe(study)
    assert text.count("group") == len(make_groups(study)) + 1
    assert f"{TASKS} tasks" in text.splitlines()[-1]
    assert "4 compilations" in text
    assert "2 points x 4 cases x 4 members, 384 network calls" in text
    assert not any(tmp_path.iterdir())


def test_dry_run_leaves_out_what_is_done_and_what_others_do(folder, study, first, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(first[0], half)
    rows = results.read_parts(half)
    for part in (half / "parts").iterdir():
        part.unlink()
    kept = sorted(rows["task"].unique())[: TASKS // 4]
    results.write_part(half, rows[rows["task"].isin(kept)].to_dict("records"))
    before = {path: path.read_bytes() for path in half.rglob("*") if path.is_file()}

    def tasks(*arguments):
        last = sweep.describe(study, *arguments).splitlines()[-1]
        return int(re.search(r"(\d+)(?: of \d+)? tasks", last)[1]), f" of {TASKS} tasks" in last

    assert tasks(tmp_path / "none") == (TASKS, False)
    assert tasks(half) == (TASKS - len(kept), True)
    assert tasks(first[0]) == (0, True)
    assert "nothing is left" in sweep.describe(study, first[0])
    shares = [tasks(half, index, 2) for index in range(2)]
    assert [of for _, of in shares] == [True, True]
    assert sum(count for count, _ in shares) == TASKS - len(kept)
    assert {path: path.read_bytes() for path in half.rglob("*") if path.is_file()} == before
    with pytest.raises(InputError, match="holds another sweep"):
        sweep.describe(open_study(make_config(folder, members=6)), half)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("")
    with pytest.raises(InputError, match="is not empty and holds no sweep"):
        sweep.describe(study, tmp_path / "other")


def test_what_will_be_done_and_what_was_are_not_said_at_once(monkeypatch):
    monkeypatch.setattr(sweep, "FLAGS", SimpleNamespace(cache=None, dry_run=True, so_far=True))
    with pytest.raises(InputError, match="give one of them"):
        sweep.main([])


def test_frames_of_a_part_random_and_consecutive(folder):
    parts = {name: tiny.model().training["parts"][name] for name in ("validation", "test")}

    def one(add):
        add(method="linear_samples", consecutive=True)
        add(method="linear_samples", label="random")

    for part in parts:
        config = make_config(folder, frames=4, part=part)
        config.points = default_config(one).points
        made = open_study(config)
        split = data_of(model.load(folder / "model"), str(folder / "tiny.nc"))[1]
        assert np.isin(made.numbers, getattr(split, part)).all()
        assert (np.diff(made.frames[True]) == 1).all()
        assert (np.diff(made.frames[False]) >= 1).all()
        np.testing.assert_array_equal(made.fields.velocity, readers.read(folder / "tiny.nc").velocity[made.numbers])


@pytest.mark.parametrize(
    ("frames", "stretches", "lengths", "block"),
    [
        (20, 1, [20], 5), (20, 4, [5, 5, 5, 5], 5), (11, 3, [4, 4, 3], 2), (60, 10, [6] * 10, 6), (3, 5, [1, 1, 1], 1),
        (120, 10, [12] * 10, 12), (120, 60, [2] * 60, 6),
    ],
)  # fmt: skip
def test_stretches_of_frames_lie_all_over_the_part(folder, monkeypatch, frames, stretches, lengths, block):
    """Of a decorrelation time of twenty in 500 frames: a stretch in each share, and whole ones in a block."""
    split = Split(np.arange(100), np.arange(150, 200), np.arange(250, 750), decorrelation=20)

    def held_out(trained, path, part):
        return lambda numbers: tiny.fields(len(numbers)), split

    def one(add):
        add(method="linear_samples", consecutive=True)

    monkeypatch.setattr(study_module, "held_out", held_out)
    config = make_config(folder, 1, frames=frames, stretches=stretches)
    config.points = default_config(one).points
    made = open_study(config)
    found = np.split(made.frames[True], np.flatnonzero(np.diff(made.frames[True]) > 1) + 1)
    # Neighbours can touch where the end of one share is the beginning of the next.
    together = np.cumsum(lengths)
    assert set(np.cumsum([len(stretch) for stretch in found])) <= set(together)
    assert sum(map(len, found)) == sum(lengths)
    shares = np.array_split(split.test, len(lengths))
    for share, first, length in zip(shares, made.frames[True][together - lengths], lengths, strict=True):
        assert share[0] <= first
        assert first + length - 1 <= share[-1]
    assert made.blocks == {True: block}


def test_all_frames_of_a_file_are_held_out_for_models_that_did_not_see_it(folder, tmp_path):
    season = tiny.fields(20, seed=4)
    readers.write(season, tmp_path / "season.nc")
    config = make_config(folder, frames=20, part="all", fields=str(tmp_path / "season.nc"))
    made = open_study(config)
    np.testing.assert_array_equal(made.numbers, np.arange(20))
    np.testing.assert_array_equal(made.fields.velocity, season.velocity)
    config.fields = str(folder / "tiny.nc")
    with pytest.raises(InputError, match=r"tiny\.nc is what a model was trained on"):
        open_study(config)
    one = model.load(folder / "model")
    readers.write(tiny.fields(20, seed=5), tmp_path / "third.nc")
    other = one.training | {"fingerprint": readers.read(tmp_path / "season.nc").hash()}
    model.save(dataclasses.replace(one, training=other), tmp_path / "other")
    (_, second, *_) = config.points.values()
    second.model = str(tmp_path / "other")
    config.fields = str(tmp_path / "third.nc")
    assert len(open_study(config).models) == 2
    config.fields = str(tmp_path / "season.nc")
    with pytest.raises(InputError, match=r"season\.nc is what a model was trained on"):
        open_study(config)


def test_blocks_are_of_the_part_that_frames_come_from(folder, monkeypatch):
    """A decorrelation time of a fifth of the validation part, and of a fiftieth of the test part."""
    parts = {"train": np.arange(100), "validation": np.arange(150, 200), "test": np.arange(250, 750)}
    split = Split(**parts, decorrelation=10)

    def held_out(trained, path, part):
        return lambda _: tiny.fields(), dataclasses.replace(split, test=getattr(split, part))

    monkeypatch.setattr(study_module, "held_out", held_out)
    blocks = [open_study(make_config(folder, 1, frames=20, part=part)).blocks for part in ("validation", "test")]
    assert blocks == [{False: 4}, {False: 1}]


@pytest.mark.parametrize(
    ("points", "changes", "message"),
    [
        ([], {}, "no points"),
        ([{"method": "magic"}], {}, "p000: method 'magic' is not one of"),
        ([{"method": "adaptive", "stages": 3}], {}, "method adaptive has no setting 'stages'"),
        ([{"method": "kalman", "gamma": 3.0}], {}, "method kalman has no setting 'gamma'"),
        ([{"gamma": 0.0}], {}, "adaptive gamma=0: gamma must be positive"),
        (
            [{"method": "kalman", "sigma_max": 5000.0}],
            {},
            r"kalman sigma_max=5000: .* from 0.010\d* to 3.398\d*, not for 5000; sigma_max and sigma_min",
        ),
        ([{"method": "dps", "sigma_min": 1e-4}], {}, "dps sigma_min=0.0001: .*, not for 0.0001; sigma_max and"),
        ([{"prior": "oracle"}], {}, "prior 'oracle' is not one of"),
        ([{}, {}], {}, "two points of the sweep are called 'adaptive'"),
        ([{"method": "kalman", "dps_step": 0.1}], {}, "method kalman has no setting 'dps_step'; it has eta, levels"),
        ([{"method": "dps", "cg_steps": 2}], {}, "method dps has no setting 'cg_steps'"),
        ([{"method": "gp_init", "gamma": 3.0}], {}, "gp_init gamma=3: gamma has no effect without noise_floor below 1"),
        ([{"method": "uniform", "gamma": 3.0}], {}, "gamma has no effect without .* normalise other than flat"),
        ([{"method": "guided", "anneal": True}], {}, "anneal has no effect without noise_floor below 1"),
        ([{"method": "gp_init", "normalise": "prior"}], {}, "normalise has no effect without noise_floor"),
        ([{"confidence_floor": 0.5}], {}, "adaptive confidence_floor=0.5: .* no effect without blend or guidance"),
        ([{"var_decay": 0.5}], {}, "var_decay has no effect without more than one stage"),
        (
            [{"method": "multistage", "normalise": "flat", "var_decay": 0.5}],
            {},
            "var_decay has no effect without more than one stage, and a normalise other than flat",
        ),
        ([{"method": "multistage", "stages": 1, "t_refine": 20}], {}, "t_refine has no effect without more than one"),
        ([{"method": "multistage", "stages": 1, "refine_floor": 0.9}], {}, "refine_floor has no effect without more"),
        ([{"method": "multistage", "var_decay": 5.0}], {}, r"var_decay=5: var_decay must be in \[0, 1\], got 5.0"),
        ([{"method": "multistage", "var_decay": "a"}], {}, "var_decay must be a number, got 'a'"),
        ([{"method": "kalman", "prior": "seed_gp"}], {}, "p000: prior has no effect on method kalman"),
        ([{"method": "linear_samples", "prior": "gp"}], {}, "p000: prior has no effect on method linear_samples"),
        ([{}], {"seeds": (0, 0)}, r"seeds must differ from each other, got \(0, 0\)"),
        ([{}, {"label": "again"}], {}, "again and adaptive are the same point"),
        ([{"method": "kalman"}], {"members": 3}, "antithetic pairs: 3 is odd"),
        ([{"method": "kalman", "members": 3}], {}, "antithetic pairs: 3 is odd"),
        ([{}], {"stretches": 0}, "stretches must be at least 1, got 0"),
        ([{"members": 0}], {}, "p000: members must be a whole number, at least 1, got 0"),
        ([{"members": 2.5}], {}, "p000: members must be a whole number, at least 1, got 2.5"),
        ([{"method": "kalman", "levels": 2.5}], {}, "kalman .*: the number of levels must be a whole number"),
        ([{}], {"sizes": (8,)}, "sizes must be"),
        ([{}], {"frames": 0}, "frames must be at least 1"),
        ([{}], {"part": "train"}, "part must be test, validation or all"),
        ([{}], {"seeds": ()}, "seeds must be"),
        ([{}], {"seeds": (1.5,)}, "seeds must be whole numbers"),
        ([{}], {"sizes": (2.5,)}, "sizes must be whole numbers"),
        ([{}], {"error": -0.1}, "error must be a number that is not negative"),
        ([{}], {"batch": -1}, "batch must be a number that is not negative"),
        ([{}], {"memory_gb": float("nan")}, "memory_gb must be a number that is not negative"),
        ([{}], {"x": "foo"}, "x is 'foo', but the points have calls, consecutive, coverage"),
        ([{}], {"curve": "foo"}, "curve is 'foo'"),
        ([{}], {"patterns": "circle:3"}, "'circle:3' is not one of"),
        ([{}], {"patterns": "line:3,cells:1"}, "no cell to score: every ocean cell is observed"),
        ([{"model": "nowhere"}], {}, "no model in nowhere"),
    ],
)
def test_mistakes_are_named(folder, points, changes, message):
    config = make_config(folder, **changes)
    config.points = default_config(lambda add: [add(**point) for point in points]).points
    with pytest.raises(InputError, match=message):
        open_study(config)


def test_settings_and_labels_may_be_numbers_of_numpy(folder, tmp_path):
    """A study over `np.arange` is that over Python's numbers, and a number that labels a point is its text."""
    configs = []
    for seeds, steps in (([0], (2, 3)), (np.arange(1), np.arange(2, 4))):
        config = make_config(folder, seeds=tuple(seeds), sizes=(), frames=1, members=2, patterns="cells:0.1")
        settings = [{"method": "gp_init", "t_start": step, "label": step} for step in steps]
        config.points = default_config(lambda add, settings=settings: [add(**one) for one in settings]).points
        configs.append(config)
    ours, theirs = configs
    assert open_study(theirs).identity == open_study(ours).identity
    _, rows = go(theirs, tmp_path)
    assert set(rows["label"]) == {"2", "3"}
    _, again = go(ours, tmp_path)
    pd.testing.assert_frame_equal(rows, again)


def test_points_keep_to_the_noise_of_the_training(folder):
    """Of a network that knows the first 101 steps, whose noise is what the betas of the notes make."""
    beta = np.linspace(1e-4, 0.02, 250)
    sigma = np.sqrt(1 / np.cumprod(1 - beta) - 1)
    trained = dataclasses.replace(tiny.model("anchored"), sigma=(0.01, sigma[100]))
    settings = (
        [{"method": "multistage", "t_start": 100, "t_refine": 100}, {"method": "multistage", "t_refine": 101},
         {"method": "kalman"}, {"method": "kalman", "sigma_max": 2.0}, {"method": "linear_samples"}]
    )  # fmt: skip
    points = default_config(lambda add: [add(**one, label=f"{n}") for n, one in enumerate(settings)])
    first, beyond, usual, above, linear_samples = read_points(points)
    assert [stage.t_start for stage in make_program(first, trained)] == [100] * 6
    with pytest.raises(InputError, match=r"1: .* not for 0.725\d*; t_start must be a step up to 100, not 101"):
        make_program(beyond, trained)
    np.testing.assert_allclose(make_program(usual, trained).sigma[0], sigma[100], rtol=1e-5)
    with pytest.raises(InputError, match=r"3: .* not for 2; sigma_max and sigma_min must lie in that range"):
        make_program(above, trained)
    assert make_program(linear_samples, trained) is None


def test_models_of_other_frames_are_not_compared(folder, tmp_path):
    """What is held out for one of them would be training data of the other."""
    trained = model.load(folder / "model")
    moved = trained.training | {"parts": trained.training["parts"] | {"train": [20, 60], "test": [0, 10]}}
    model.save(dataclasses.replace(trained, training=moved), tmp_path / "moved")
    config = make_config(folder)
    config.points = default_config(lambda add: [add(), add(model=str(tmp_path / "moved"), label="moved")]).points
    with pytest.raises(InputError, match="moved was trained on other frames than"):
        open_study(config)


def test_points_say_what_differs(folder):
    points = read_points(make_config(folder))
    assert points[1].label == "two_stage noise_floor=0.7"
    assert points[1].settings["resample_steps"] == 2
    assert points[2].settings["levels"] == 3
    assert [points[i].sizes(make_config(folder, sizes=(1, 2, 3))) for i in (0, 2)] == [(1, 2, 3, 4), (2, 4)]
    assert json.loads(json.dumps(points[3].settings))["prior"] == "seed_gp"
    assert smoke(make_config(folder), "smoke").resample_steps == 1
    with pytest.raises(InputError, match="smoke or nothing"):
        smoke(make_config(folder), "fast")


SWEEPS = sorted((Path(__file__).parent.parent / "configs" / "sweeps").glob("*.py"))


def loaded(path):
    """The module of a configuration."""
    file = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(file)
    file.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_configurations_are_sweeps(folder, path):
    """Each one opens on the tiny model, whole and as a trial, and draws a setting that its points have."""
    module = loaded(path)
    for arg in ("", "smoke"):
        config = module.get_config(arg)
        config.model, config.fields, config.patterns = str(folder / "model"), str(folder / "tiny.nc"), "line:3"
        for name in config.points if path.stem == "attention" else ():
            if "standard" not in config.points[name].label:
                config.points[name].model = str(folder / "model")
            else:
                del config.points[name]
        if path.stem == "start_level":
            # It starts above the last step of a schedule, which is all that a network of steps knows.
            model.save(tiny.model("anchored", readers.read(folder / "tiny.nc")), folder / "anchored")
            config.model = str(folder / "anchored")
        made = open_study(config)
        assert make_groups(made)
        names = {name for point in made.points for name in point.settings}
        assert {config.x, config.curve} <= names | {"", "stage", "calls", "members", "coverage", "pattern", "distance"}
        assert f"--config=configs/sweeps/{path.name}" in module.__doc__
    if path.stem != "models":  # whose argument may be any folder
        with pytest.raises(InputError, match="smoke or nothing"):
            module.get_config("fast")
    else:
        named = read_points(module.get_config("runs/a/model, runs/b/model,"))
        assert [(point.label, point.model) for point in named] == [(f"runs/{a}", f"runs/{a}/model") for a in "ab"]
    if path.stem == "start_level":
        assert [point.settings["sigma_max"] for point in read_points(module.get_config("0.3, 1,8"))] == [0.3, 1.0, 8.0]


def test_every_method_is_in_the_table_of_all():
    """But those of a network that is given the observations; few of the RePaint family are drawn unless asked for."""
    path = next(path for path in SWEEPS if path.stem == "methods")
    module = loaded(path)
    usual, full = (read_points(module.get_config(arg)) for arg in ("", "full"))
    assert {point.method for point in usual} == {
        *methods.REPAINT, *methods.CORRECTIONS, "linear_samples"
    } - {"given", *module.STAGES}  # fmt: skip
    every = sample.method("multistage")
    for name in module.STAGES:
        stages = sample.method(name)
        assert jax.tree.structure(stages) == jax.tree.structure(every[: len(stages)])
        assert jax.tree.leaves(stages) == jax.tree.leaves(every[: len(stages)])
    assert {point.members for point in usual if point.repaint} == {module.DRAWN}
    assert {point.members for point in full} == {point.members for point in usual if not point.repaint} == {16}
    assert [point.label for point in full] == [point.label for point in usual]


def test_uniform_has_as_much_noise_as_adaptive_in_the_table_of_all():
    path = next(path for path in SWEEPS if path.stem == "methods")
    weight = reproduce.read_config(path).points.p007
    assert weight.method == "uniform"
    trained = jax_repaint.load()
    (stage,) = sample.method("adaptive")
    for pattern in observe.usual(trained.ocean):
        seen = observe.parse(pattern, trained.ocean, observe.pattern_rng(0, 0))
        observation = observation_of(trained, np.zeros((*trained.ocean.shape, 2), np.float32), seen)
        missing = (
            np.asarray(trained.gaussian.ocean > 0) & ~np.asarray(observation.on_grid(trained.padded)[0])[..., None]
        )
        variance = linear.analysis(trained.gaussian, observation).variance
        doubt = sample.doubt(variance, missing)
        found = np.asarray(sample.noise_weight(doubt, missing, stage.noise_floor, stage.gamma))
        assert found[np.broadcast_to(missing, found.shape)].mean() == pytest.approx(weight.noise_floor, abs=0.01)


def test_configurations_ask_what_the_notes_asked():
    found = {path.stem for path in SWEEPS}
    assert found == {
        "anneal_floor", "attention", "bulk", "calls", "cg_steps", "consecutive", "coverage", "ddpm_vs_gp", "distance",
        "ensemble_size", "even_gamma", "gamma", "guidance_scale", "head_to_head", "methods", "models", "patterns",
        "stages", "start_level", "two_stage", "var_decay", "x0_blend",
    }  # fmt: skip


def test_a_configuration_of_the_models_that_are_named():
    """What a model is comes from the command, so that one file serves any number of them."""
    (path,) = [path for path in SWEEPS if path.stem == "models"]
    named = read_points(loaded(path).get_config("runs/a/model,b"))
    assert {point.label: point.model for point in named} == {"runs/a": "runs/a/model", "b": "b"}
    (usual,) = read_points(loaded(path).get_config())
    assert usual.model == ""
    for point in named:
        assert (point.method, point.hyper) == ("kalman", usual.hyper)


@pytest.mark.slow
def test_the_command(folder, tmp_path):
    options = ["--config.points.p000.noise_floor=0.3", "--config.frames=2"]
    dry, done = (
        subprocess.run(command(folder, tmp_path / "new", *more), capture_output=True, text=True)
        for more in ((*options, "--dry_run"), options)
    )
    assert (dry.returncode, done.returncode) == (0, 0), done.stderr
    assert "compilations" in dry.stdout
    assert "noise_floor=0.3" in done.stdout


def test_fewer_rows_come_to_fewer_members_a_call_on_any_number_of_devices():
    for devices, members in itertools.product((1, 3, 8), (1, 2, 12, 16, 100)):
        for rows in range(1, 130):
            chunk = chunk_of(members, rows, devices)
            # What in_chunks makes of that many rows is a call of that many.
            assert math.prod(ensemble.share(chunk, devices)) == chunk
            assert chunk <= max(rows, devices)
            # As few calls as `rows` allows, up to the devices that a call leaves idle.
            assert math.ceil(members / chunk) <= math.ceil(members / max(rows // devices * devices, devices))
