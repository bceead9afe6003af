"""Members do not depend on how they are computed, and pairs of an exact denoiser have the linear mean."""

import itertools
import json
import logging
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import launching
import numpy as np
import pytest
from flax import struct

from jax_repaint import ensemble, gains, guide, observe
from jax_repaint.denoise import PrincipalGaussian, Regimes
from jax_repaint.ensemble import (
    batch_shape,
    finite_members,
    frame_batches,
    in_chunks,
    member_keys,
    own_bytes,
    posterior_ensemble,
    repaint_ensemble,
    repaint_sweep,
    same_program,
    stack_evidence,
    survivors,
)
from jax_repaint.errors import InputError
from jax_repaint.posterior import Posterior, evidence_for
from jax_repaint.prior import linear
from jax_repaint.sample import Known, Outcome, Repaint, first_failure, method, repaint_stages
from jax_repaint.schedule import Schedule

REPOSITORY = Path(__file__).resolve().parent.parent
SHAPE = (6, 8)
OCEAN = ~((np.indices(SHAPE)[0] < 2) & (np.indices(SHAPE)[1] > 5))
SCHEDULE = Schedule.linear(20, 1e-3, 0.2)
STAGES = (
    Repaint.create(8, noise_floor=0.2, gamma=3.0, resample_steps=2),
    Repaint.create(5, noise_floor=0.3, gamma=3.0, resample_steps=2),
)
HYPER = Posterior.create(10.0, 0.02, 6)
traces = []


@struct.dataclass
class Counted:
    """A denoiser that records its traces."""

    gaussian: PrincipalGaussian

    def __call__(self, x, sigma):
        traces.append(x.shape)
        return self.gaussian(x, sigma)


@pytest.fixture(scope="module")
def gaussian():
    rng = np.random.default_rng(0)
    y, x = np.indices(SHAPE)
    phase = rng.normal(size=(40, 2, 1, 1)) * 0.5
    waves = np.cos(phase[:, 0] * y + phase[:, 1] * x + rng.uniform(0, 6, (40, 1, 1)))
    fields = 1.5 * waves[..., None] * rng.normal(size=(40, 1, 1, 2)) + 0.1 * rng.normal(size=(40, *SHAPE, 2))
    return linear.fit((fields * OCEAN[..., None]).astype(np.float32), OCEAN, 6)


@pytest.fixture(scope="module")
def frames(gaussian):
    """Three truths."""
    return np.asarray(jax.vmap(guide.prior_draw, (None, 0))(gaussian, jax.random.split(jax.random.key(9), 3)))


@pytest.fixture(scope="module")
def known(gaussian, frames):
    def one(number):
        seen = observe.from_cells(observe.cells(OCEAN, 0.2, np.random.default_rng(number)), frames[number], 0.05, OCEAN)
        observed, value = seen.on_grid(SHAPE)
        found = linear.analysis(gaussian, seen)
        missing = jnp.asarray(OCEAN) & ~observed
        return Known(value, missing[..., None], found.mean(seen.values), found.variance)

    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(one, range(3)))


@pytest.fixture(scope="module")
def members(gaussian, known):
    """Four members of three frames in one chunk, (3, 4, 2, y, x, 2)."""
    outcome = repaint_ensemble(gaussian, known, SCHEDULE, STAGES, frames=[5, 6, 9], members=4, seed=1)
    np.testing.assert_array_equal(outcome.failed, np.full((3, 4, 2), -1))
    return outcome.x


@pytest.fixture(scope="module")
def observation(frames):
    return observe.from_cells(observe.cells(OCEAN, 0.15, np.random.default_rng(7)), frames[0], 0.1, OCEAN)


@pytest.fixture(scope="module")
def analysis(gaussian, observation):
    return linear.analysis(gaussian, observation)


def pairs(denoiser, gaussian, observation, analysis, hyper=HYPER, **options):
    evidence = evidence_for(hyper, gaussian.ocean, observation, gaussian)
    options = {"frames": [3], "members": 6} | options
    return posterior_ensemble(denoiser, [evidence], gaussian, [analysis], hyper, **options)[0]


# --- keys and chunks ----------------------------------------------------------------------------------------


def test_keys_are_unique():
    data = np.concatenate(
        [jax.random.key_data(member_keys(seed, range(20), range(10))).reshape(-1, 2) for seed in (0, 1)]
    )
    assert len(np.unique(data, axis=0)) == 400


def test_keys_do_not_depend_on_the_others():
    every = jax.random.key_data(member_keys(3, range(6), range(8)))
    some = jax.random.key_data(member_keys(3, [4, 1], [7, 2, 0]))
    np.testing.assert_array_equal(some, np.asarray(every)[[4, 1]][:, [7, 2, 0]])
    alone = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 4), 2)
    np.testing.assert_array_equal(some[0, 1], jax.random.key_data(alone))


@pytest.mark.parametrize(("chunk", "calls"), [(1, 7), (3, 3), (7, 1), (64, 1)])
def test_chunks_are_of_one_size_and_in_order(chunk, calls):
    seen = []

    def run(rows, extra):
        seen.append(rows.shape)
        return rows[:, None].astype(jnp.float32) + extra["a"]

    rows, extra = np.arange(7)[::-1] * 10, {"a": np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)}
    result = in_chunks(run, rows, extra, chunk)
    np.testing.assert_array_equal(result, rows[:, None].astype(np.float32) + extra["a"])
    assert seen == [(min(chunk, 7),)] * calls


def test_chunks_hold_a_member():
    with pytest.raises(InputError, match="at least one member, got 0"):
        in_chunks(lambda rows, extra: rows, np.arange(3), np.arange(3), 0)


# --- RePaint family -----------------------------------------------------------------------------------------


def test_shapes_and_observed_cells(known, members):
    assert members.shape == (3, 4, 2, *SHAPE, 2)
    assert members.dtype == np.float32
    assert np.isfinite(members).all()
    seen = ~np.asarray(known.missing)[:, None, None]
    expected = np.broadcast_to(np.asarray(known.value)[:, None, None], members.shape)
    np.testing.assert_array_equal(np.where(seen, members, 0), np.where(seen, expected, 0))


@pytest.mark.parametrize("chunk", [1, 3])
def test_members_do_not_depend_on_chunks(gaussian, known, members, chunk):
    again = repaint_ensemble(gaussian, known, SCHEDULE, STAGES, frames=[5, 6, 9], members=4, seed=1, chunk=chunk)
    np.testing.assert_allclose(again.x, members, atol=1e-5)


def test_members_do_not_depend_on_other_frames_and_members(gaussian, known, members):
    last = jax.tree.map(lambda leaf: leaf[2:], known)
    again = repaint_ensemble(gaussian, last, SCHEDULE, STAGES, frames=[9], members=2, seed=1)
    np.testing.assert_allclose(again.x[0], members[2, :2], atol=1e-5)


def test_the_last_stage_alone_is_that_of_all(gaussian, known, members):
    last = repaint_ensemble(gaussian, known, SCHEDULE, STAGES, frames=[5, 6, 9], members=4, seed=1, last=True)
    np.testing.assert_array_equal(last.x, members[:, :, 1:])
    assert last.failed.shape == (3, 4, 2)


@pytest.mark.parametrize("seed", [-1, 2**32, np.int64(2**33), 1.5, np.nan])
def test_seeds_that_would_be_others_are_refused(seed):
    """Keys are of 32 bits: -1 would be the last of them, 2^32 the first."""
    with pytest.raises(InputError, match=rf"a seed is a whole number from 0 to 4294967295, got {seed}"):
        member_keys(seed, [0], [0])
    assert not (member_keys(2**32 - 1, [0], [0]) == member_keys(0, [0], [0])).all()
    assert (member_keys(3.0, [0], [0]) == member_keys(3, [0], [0])).all()
    with pytest.raises(InputError, match="a seed must be a number, got 'first'"):
        member_keys("first", [0], [0])


def test_members_frames_and_seeds_differ(gaussian, known, members):
    missing = np.asarray(known.missing)[0, ..., 0]
    same = jax.tree.map(lambda leaf: jnp.stack([leaf[0]] * 3), known)
    other = repaint_ensemble(gaussian, same, SCHEDULE, STAGES, frames=[5, 6, 9], members=4, seed=2).x
    numbered = np.concatenate([members[0], *other])[:, -1][:, missing].reshape(16, -1)
    distance = np.abs(numbered[:, None] - numbered[None]).mean(-1)
    assert distance[~np.eye(16, dtype=bool)].min() > 0.05


def test_other_numbers_do_not_trace_again(gaussian, known):
    def run(floor, gamma, seed, decay=0.1):
        before = len(traces)
        stages = tuple(Repaint.create(6, noise_floor=floor, gamma=gamma, resample_steps=2) for _ in range(2))
        outcome = repaint_ensemble(
            Counted(gaussian), known, SCHEDULE, stages, frames=[1, 2, 3], members=2, seed=seed, var_decay=decay
        )
        return outcome.x, len(traces) - before

    first, traced = run(0.2, 3.0, 0)
    assert traced
    second, more = run(0.6, 1.5, 0)
    assert more == 0
    assert np.abs(first - second).max() > 1e-3
    assert run(0.2, 3.0, 4, 0.5)[1] == 0


# --- many points of the hyperparameters ---------------------------------------------------------------------


def sweep(denoiser, known, points, **options):
    return repaint_sweep(denoiser, known, SCHEDULE, points, frames=[5, 6, 9], members=2, seed=1, **options)


@pytest.mark.parametrize(
    ("name", "setting", "values"),
    [
        ("guided", "guidance_scale", np.geomspace(1e-5, 0.05, 16)),
        ("adaptive", "gamma", np.geomspace(0.3, 5, 16)),
        ("multistage", "refine_floor", np.linspace(0, 1, 16)),
        ("uniform", "noise_floor", np.linspace(0, 1, 16)),
    ],
)
def test_sixteen_points_are_one_program(gaussian, known, name, setting, values):
    settings = {"t_start": 3, "resample_steps": 2} | ({"t_refine": 2, "stages": 2} if name == "multistage" else {})
    points = [method(name, 20, **settings, **{setting: value}) for value in values]
    counted, one = Counted(gaussian), jax.tree.map(lambda leaf: leaf[0], known)
    before = len(traces)
    jax.eval_shape(lambda key: repaint_stages(key, counted, one, SCHEDULE, points[0]), jax.random.key(0))
    single = len(traces) - before
    first = sweep(counted, known, points, chunk=24)
    assert len(traces) - before == 2 * single > 0
    again = sweep(counted, known, points[::-1], chunk=24)
    assert len(traces) - before == 2 * single
    np.testing.assert_allclose(again.x[::-1], first.x, atol=1e-5)
    assert first.x.shape[:3] == (16, 3, 2)
    assert np.abs(np.diff(first.x[:, :, :, -1], axis=0)).max(axis=(1, 2, 3, 4, 5)).min() > 1e-6


@pytest.mark.parametrize("chunk", [5, 64])
def test_points_are_those_of_their_own_runs(gaussian, known, chunk):
    points = [(stage.replace(gamma=jnp.float32(gamma)), later) for gamma in (0.5, 3) for stage, later in [STAGES]]
    together = sweep(gaussian, known, points, var_decay=[0.1, 0.5], chunk=chunk)
    for number, (point, decay) in enumerate(zip(points, (0.1, 0.5), strict=True)):
        alone = repaint_ensemble(gaussian, known, SCHEDULE, point, frames=[5, 6, 9], members=2, seed=1, var_decay=decay)
        np.testing.assert_allclose(together.x[number], alone.x, atol=1e-5)
    assert np.abs(together.x[0] - together.x[1]).max() > 0.01


def test_points_have_their_own_decay_of_the_variance(gaussian, known):
    stages = [stage.replace(normalise="prior") for stage in STAGES]
    options = {"frames": [5, 6, 9], "members": 1}
    decays = [0.01, 0.1, 1.0]
    together = repaint_sweep(gaussian, known, SCHEDULE, [stages] * 3, var_decay=decays, **options).x
    for x, decay in zip(together, decays, strict=True):
        alone = repaint_ensemble(gaussian, known, SCHEDULE, stages, var_decay=decay, **options).x
        np.testing.assert_allclose(x, alone, atol=1e-5)
    assert np.abs(together[0] - together[2])[:, :, 1].max() > 0.01
    usual = repaint_ensemble(gaussian, known, SCHEDULE, stages, **options).x
    np.testing.assert_allclose(usual, together[1], atol=1e-5)


def test_points_share_their_noise(gaussian, known):
    """A point that is repeated is not another sample."""
    together = sweep(gaussian, known, [STAGES, STAGES])
    np.testing.assert_allclose(together.x[0], together.x[1], atol=1e-6)


def test_points_of_one_program():
    stage = method("adaptive")
    points = [stage, method("gp_init"), method("plain"), method("guided"), method("adaptive", gamma=1.0)]
    points += [method("guided", guidance_scale=1.0), method("multistage"), method("multistage", t_refine=40)]
    assert same_program(points) == [[0, 1, 4], [2], [3, 5], [6], [7]]


def test_mistaken_sweeps_are_refused(gaussian, known):
    with pytest.raises(InputError, match="at least one point"):
        sweep(gaussian, known, [])
    with pytest.raises(InputError, match="at least one stage"):
        sweep(gaussian, known, [()])
    with pytest.raises(InputError, match="differ in numbers only"):
        sweep(gaussian, known, [STAGES, STAGES[:1]])
    with pytest.raises(InputError, match="2 points are given, 1 values of var_decay"):
        sweep(gaussian, known, [STAGES] * 2, var_decay=[0.1])
    with pytest.raises(InputError, match=r"var_decay must be in \[0, 1\], got 10"):
        sweep(gaussian, known, [STAGES], var_decay=[10])
    with pytest.raises(InputError, match=r"var_decay must be a number, got '0\.1'"):
        sweep(gaussian, known, [STAGES], var_decay=["0.1"])
    with pytest.raises(InputError, match="at least one device"):
        sweep(gaussian, known, [STAGES], devices=[])


# --- failures -----------------------------------------------------------------------------------------------


@struct.dataclass
class Fragile:
    """A denoiser that overflows at one level where the field is above a limit in one cell."""

    gaussian: PrincipalGaussian
    sigma: jax.Array
    limit: jax.Array

    def __call__(self, x, sigma):
        breaks = (jnp.abs(sigma / self.sigma - 1) < 1e-3) & (x[3, 4, 0] > self.limit)
        return jnp.where(breaks, jnp.inf, self.gaussian(x, sigma))


@pytest.fixture(scope="module")
def same(known):
    """One field three times."""
    return jax.tree.map(lambda leaf: jnp.stack([leaf[2]] * 3), known)


@pytest.fixture(scope="module")
def broken(gaussian, same):
    """Eight members of the three of a denoiser that breaks at t = 5, which both stages pass."""
    assert same.missing[0, 3, 4, 0]
    fragile = Fragile(gaussian, SCHEDULE.sigma[5], same.prior_mean[0, 3, 4, 0] + 0.1)
    return repaint_ensemble(fragile, same, SCHEDULE, STAGES, frames=[5, 6, 9], members=8, seed=1)


def test_failures_are_reported_with_their_step(gaussian, same, broken):
    first, second = broken.failed[..., 0], broken.failed[..., 1]
    # Two passes each of t = 8, 7, 6 and 5: t = 5 is passed as numbers 6 and 7 of stage 1, 0 and 1 of stage 2.
    assert set(first.reshape(-1)) == {-1, 6, 7}
    assert (second[first >= 0] == 0).all()
    fine = (broken.failed < 0).all(-1)
    assert 3 < fine.sum() < 21
    whole = repaint_ensemble(gaussian, same, SCHEDULE, STAGES, frames=[5, 6, 9], members=8, seed=1)
    np.testing.assert_allclose(broken.x[fine], whole.x[fine], atol=1e-5)
    missing = np.broadcast_to(np.asarray(same.missing)[:, None, None], broken.x.shape)
    lost = np.broadcast_to((broken.failed >= 0)[..., None, None, None], broken.x.shape)
    np.testing.assert_array_equal(np.isnan(broken.x), missing & lost)


def test_survivors(broken, caplog):
    fine = (broken.failed < 0).all(-1)
    assert ((fine.sum(1) >= 2) & (fine.sum(1) < 8)).all()
    with caplog.at_level(logging.WARNING, logger="absl"):
        kept = survivors("adaptive", STAGES, [5, 6, 9], broken)
    assert [len(x) for x in kept] == list(fine.sum(1))
    for x, every, good in zip(kept, broken.x, fine, strict=True):
        np.testing.assert_array_equal(x, every[good])
    assert [r.message for r in caplog.records if "frame 6" in r.message] == [
        f"adaptive: {8 - fine[1].sum()} of 8 members of frame 6 are left out, not finite from "
        + "; ".join(str(first_failure(STAGES, failed)) for failed in broken.failed[1][~fine[1]])
    ]
    failed = np.where(np.arange(8)[:, None] > 0, np.array([6, 0]), broken.failed[:, :1] * 0 - 1)
    message = r"guided: 7 of 8 members of frame 5 are not finite, .* stage 1, iteration 6, t 5"
    with pytest.raises(InputError, match=message):
        survivors("guided", STAGES, [5, 6, 9], Outcome(broken.x, failed))


def test_members_that_are_not_finite_are_left_out_with_their_partners(caplog):
    ocean = np.array([[True, False], [True, True]])
    made = np.random.default_rng(0).standard_normal((3, 6, 2, 2, 2))
    made[:, :, ~ocean] = np.nan
    made[1, 3, 1, 0, 1] = np.inf
    alone, pairs = (finite_members("kalman", [5, 6, 9], made, ocean, antithetic=both) for both in (False, True))
    for kept, left in ((alone, [0, 1, 2, 4, 5]), (pairs, [0, 1, 4, 5])):
        np.testing.assert_array_equal(kept[1], made[1, left])
        np.testing.assert_array_equal(kept[0], made[0])
        np.testing.assert_array_equal(kept[2], made[2])
    assert [record.message for record in caplog.records] == [
        f"kalman: {lost} of 6 members of frame 6 are left out, not finite" for lost in (1, 2)
    ]
    made[2, :5, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match=r"kalman: 5 of 6 members of frame 9 are not finite; another method"):
        finite_members("kalman", [5, 6, 9], made, ocean)
    (one,) = finite_members("kalman", [5], made[:1, :1], ocean)
    np.testing.assert_array_equal(one, made[0, :1])


def test_guidance_explodes_and_says_so(gaussian, known):
    points = [method("guided", 20, t_start=8, guidance_scale=scale) for scale in (1e-5, 500)]
    outcome = sweep(gaussian, known, points)
    assert (outcome.failed[0] == -1).all()
    assert (outcome.failed[1] > 0).all()


# --- devices and mistakes -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_members_do_not_depend_on_devices():
    """In a process of its own: a process has the devices it started with."""
    found = subprocess.run(
        [sys.executable, Path(__file__).with_name("virtual_devices.py")],
        capture_output=True, text=True, timeout=900, cwd=REPOSITORY,
        env=launching.environment(XLA_FLAGS=launching.xla_flags(8)),
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    results = json.loads(found.stdout.splitlines()[-1])
    for count in ("2", "8"):
        # A chunk of 5 is filled up for two devices, and leaves three of eight alone.
        assert results[count]["devices"] == {"2": 2, "8": 5}[count]
        assert results[count]["rows"] == {"2": 6, "8": 5}[count]
        for kind in ("repaint", "posterior"):
            np.testing.assert_allclose(results[count][kind], results["1"][kind], atol=1e-5)
    assert np.std(results["1"]["repaint"]) > 0.1


def test_mistakes_are_refused(gaussian, known):
    with pytest.raises(InputError, match="at least one member of each frame, got 0"):
        repaint_ensemble(gaussian, known, SCHEDULE, STAGES, frames=[5, 6, 9], members=0)
    with pytest.raises(InputError, match="2 frames are numbered, 3 are given"):
        repaint_ensemble(gaussian, known, SCHEDULE, STAGES, frames=[5, 6], members=1)
    late = (Repaint.create(20),)
    narrow = known._replace(prior_mean=known.prior_mean[:, :, :4])
    with pytest.raises(InputError, match=r"prior_mean must be on the grid of the field, \(\.\.\., 6, 8, 2\), got"):
        repaint_ensemble(gaussian, narrow, SCHEDULE, STAGES, frames=[5, 6, 9], members=1)
    unknown = known._replace(prior_variance=known.prior_variance * jnp.nan)
    with pytest.raises(InputError, match="prior_variance of the fields to inpaint has values that are not finite"):
        repaint_ensemble(gaussian, unknown, SCHEDULE, STAGES, frames=[5, 6, 9], members=1)
    with pytest.raises(InputError, match="t_start 20 is not a step"):
        repaint_ensemble(gaussian, known, SCHEDULE, late, frames=[5, 6, 9], members=1)


# --- posterior samplers -------------------------------------------------------------------------------------


def test_pairs_of_an_exact_denoiser_have_the_linear_mean(gaussian, observation, analysis):
    x = pairs(gaussian, gaussian, observation, analysis)
    assert x.shape == (6, *SHAPE, 2)
    mean = np.asarray(analysis.mean(observation.values))
    for j in range(3):
        np.testing.assert_allclose(x[2 * j : 2 * j + 2].mean(0), mean, atol=1e-3)
    assert np.abs(x[0] - x[2])[OCEAN].mean() > 0.05
    assert not x[:, ~OCEAN].any()


def test_start_errors_and_steps_of_a_member_have_keys_of_their_own(gaussian, observation, analysis, monkeypatch):
    seen = []

    def watched(function, place):
        def run(*arguments):
            seen.append(tuple(jax.random.key_data(arguments[place]).tolist()))
            return function(*arguments)

        return run

    monkeypatch.setattr(guide, "prior_draw", watched(guide.prior_draw, 1))
    monkeypatch.setattr(ensemble, "linear_sample", watched(ensemble.linear_sample, 0))
    monkeypatch.setattr(ensemble, "posterior", watched(ensemble.posterior, 0))
    evidence = evidence_for(HYPER, gaussian.ocean, observation, gaussian)
    for seed in range(2):
        ensemble._member(jax.random.key(seed), jnp.float32(1), gaussian, evidence, gaussian, analysis, HYPER)
    assert len(set(seen)) == len(seen) == 6


def test_pairs_spread_like_the_posterior(gaussian, observation, analysis):
    # Steps of finite length lose variance: with 16 levels a third of it.
    x = pairs(gaussian, gaussian, observation, analysis, Posterior.create(10.0, 0.02, 160), members=600, chunk=600)
    # One of each pair; the other one is its mirror image.
    spread = np.mean((x[::2] - np.asarray(analysis.mean(observation.values))) ** 2, axis=0)
    ratio = spread[OCEAN] / np.asarray(analysis.variance)[OCEAN]
    assert 0.9 < ratio.mean() < 1.05
    assert ratio.min() > 0.6
    assert ratio.max() < 1.4


def test_pairs_do_not_depend_on_chunks_or_number(gaussian, observation, analysis):
    x = pairs(gaussian, gaussian, observation, analysis)
    for options in ({"chunk": 4}, {"members": 4}):
        again = pairs(gaussian, gaussian, observation, analysis, **options)
        np.testing.assert_allclose(again, x[: len(again)], atol=1e-5)
    for other in ({"seed": 1}, {"frames": [4]}):
        assert np.abs(pairs(gaussian, gaussian, observation, analysis, **other) - x)[:, OCEAN].mean() > 0.05


def test_a_start_that_is_moved_moves_members_as_the_gaussian_says(gaussian, observation, analysis, frames):
    """By a level of a linear denoiser, and by the Kalman analysis of its estimate, in dense algebra."""
    sigma, offset = 0.7, 0.2 * frames[1] - 0.1 * frames[2]
    hyper = Posterior.create(sigma, 0.01, 2, stop_sigma=0.5)
    evidence = evidence_for(hyper, gaussian.ocean, observation, gaussian)
    options = {"frames": [3, 3], "members": 2}
    one, other = posterior_ensemble(
        gaussian, [evidence.replace(offset=jnp.asarray(part)) for part in (0 * offset, offset)], gaussian,
        [analysis] * 2, hyper, **options,
    )  # fmt: skip
    plain = posterior_ensemble(gaussian, [evidence] * 2, gaussian, [analysis] * 2, hyper, **options)
    np.testing.assert_array_equal(one, plain[0])
    sea = np.flatnonzero(np.repeat(OCEAN.reshape(-1), 2))
    direction = np.asarray(gaussian.direction, np.float64).reshape(-1, 2 * OCEAN.size)[:, sea]
    rest = float(gaussian.rest)
    prior = (direction.T * (np.asarray(gaussian.variance, np.float64) - rest)) @ direction + rest * np.eye(sea.size)
    shrink = prior @ np.linalg.inv(prior + sigma**2 * np.eye(sea.size))
    seen = np.repeat(np.asarray(observation.on_grid(SHAPE)[0]).reshape(-1), 2)[sea]
    left = sigma**2 * shrink
    gain = left[:, seen] @ np.linalg.inv(left[np.ix_(seen, seen)] + 0.1**2 * np.eye(seen.sum()))
    moved = shrink @ offset.reshape(-1)[sea]
    expected = moved - gain @ moved[seen]
    for member in other - one:
        np.testing.assert_allclose(member.reshape(-1)[sea], expected, atol=2e-5)
    with pytest.raises(InputError, match="start from an offset all, or none does"):
        stack_evidence([evidence, evidence.replace(offset=jnp.asarray(offset))])


def test_members_without_partners_have_noise_of_their_own(gaussian, observation, analysis):
    x = pairs(gaussian, gaussian, observation, analysis, antithetic=False)
    # Pairs are numbered too.
    np.testing.assert_allclose(x[:3], pairs(gaussian, gaussian, observation, analysis)[::2], atol=1e-5)
    for one, other in itertools.combinations(x - np.asarray(analysis.mean(observation.values)), 2):
        assert min(np.abs(one - other)[OCEAN].mean(), np.abs(one + other)[OCEAN].mean()) > 0.05


@struct.dataclass
class Informed:
    """The exact Gaussian denoiser, and the exact one given observations."""

    gaussian: PrincipalGaussian

    def __call__(self, x, sigma):
        return self.gaussian(x, sigma)

    def given(self, x, sigma, evidence):
        return guide.kalman(lambda x: self.gaussian(x, sigma), x, sigma, sigma, evidence)


@pytest.fixture(scope="module")
def three(frames):
    """Observations of three frames: two patterns of as many rows, and one of more."""
    shares, rows = (0.1, 0.15, 0.5), []
    for number, share in enumerate(shares):
        seen = observe.cells(OCEAN, share, np.random.default_rng(number))
        rows.append(observe.from_cells(seen, frames[number], 0.1 + 0.1 * number, OCEAN))
    assert rows[0].size == rows[1].size < rows[2].size
    return rows


@pytest.mark.parametrize(
    "correction",
    ["paste", "kalman", "cov_pigdm", "pigdm", "mmps", "kalman_cg", "kalman_jvp", "dps", "given", "regimes"],
)
def test_frames_do_not_depend_on_each_other(gaussian, three, correction):
    """Sampled together, whatever the chunk, each frame has the members that it has alone."""
    hyper = Posterior.create(10.0, 0.02, 4, correction=correction)
    shifted = gaussian.replace(mean=gaussian.mean + 0.5 * gaussian.ocean)
    mixture = Regimes(jnp.array([0.6, 0.4]), jax.tree.map(lambda *leaves: jnp.stack(leaves), gaussian, shifted))
    prior = mixture if correction == "regimes" else gaussian
    evidence = [evidence_for(hyper, gaussian.ocean, one, prior) for one in three]
    analyses = [linear.analysis(gaussian, one) for one in three]

    def sampled(numbers, chunk):
        return posterior_ensemble(
            Informed(gaussian), [evidence[i] for i in numbers], gaussian, [analyses[i] for i in numbers], hyper,
            frames=[5 + i for i in numbers], members=4, seed=1, chunk=chunk,
        )  # fmt: skip

    alone = np.concatenate([sampled([i], 4) for i in range(3)])
    assert np.abs(alone[0] - alone[1]).max() > 0.1
    for numbers, chunk in (([0, 1, 2], 8), ([2, 1, 0, 1], 64), ([1, 0], 3)):
        np.testing.assert_allclose(sampled(numbers, chunk), alone[numbers], atol=2e-5)


@pytest.mark.parametrize("correction", ["kalman", "pigdm"])
def test_frames_of_a_batch_are_one_call(gaussian, three, correction, monkeypatch):
    """Seven frames of four members in batches of three are three calls, and one program."""
    calls, run = [], ensemble.posterior_frames

    def counted(rows, per_row, *shared):
        calls.append(per_row[0].shape)
        return run(rows, per_row, *shared)

    monkeypatch.setattr(ensemble, "posterior_frames", counted)
    hyper = Posterior.create(10.0, 0.02, 2, correction=correction)
    evidence = [evidence_for(hyper, gaussian.ocean, three[0], gaussian) for _ in range(7)]
    options = {"frames": range(7), "members": 4, "chunk": 13}
    x = posterior_ensemble(gaussian, evidence, gaussian, [linear.analysis(gaussian, three[0])] * 7, hyper, **options)
    assert calls == [(4, 3)] * 3
    assert len(np.unique(np.abs(x[:, :, OCEAN]).sum((2, 3)).round(3))) == 7 * 4


@pytest.mark.parametrize(
    ("sizes", "chunk", "expected"),
    [
        ([8] * 4, 36, [[0, 1, 2, 3]]),
        ([8] * 5, 8, [[0, 1], [2, 3], [4, 4]]),
        ([8] * 5, 16, [[0, 1, 2], [3, 4, 4]]),
        ([8, 16, 8, 16, 16], 8, [[0, 2], [1, 3], [4, 4]]),
        # Of 4,096 rows the gains of one frame are all that there is room for.
        ([4096] * 2, 64, [[0], [1]]),
    ],
)
def test_batches_of_frames_are_full(gaussian, sizes, chunk, expected):
    rows = [gains.Rows(size, False) for size in sizes]
    assert frame_batches(rows, 4, chunk, gaussian, 16, 1) == expected


def test_own_bytes_are_those_of_gains_and_analysis(gaussian):
    """Of points with corners in common, whose gains are whole matrices."""
    at = np.linspace(2, 5, 30)
    seen = observe.from_points(at, at, np.zeros((30, 2)), 0.1, *map(np.arange, OCEAN.shape), OCEAN)
    hyper = Posterior.create(10.0, 0.02, 5)
    evidence, analysis = evidence_for(hyper, gaussian.ocean, seen, gaussian), linear.analysis(gaussian, seen)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((evidence.gain, analysis.gain)))
    assert own_bytes(gains.rows_of(gaussian, seen), gaussian, 5) == held


@pytest.mark.parametrize(
    ("members", "chunk", "devices", "expected"),
    [
        (16, 64, 1, (4, 16)),
        (16, 16, 1, (1, 16)),
        (16, 5, 1, (1, 5)),
        (6, 5, 8, (1, 5)),
        (2, 32, 4, (16, 2)),
        (16, 64, 8, (4, 16)),
        (12, 64, 8, (5, 12)),
        (9, 64, 8, (6, 10)),
    ],
)
def test_batches_fill_the_chunk(members, chunk, devices, expected):
    assert batch_shape(members, chunk, devices) == expected


def test_frames_that_do_not_go_together_are_refused(gaussian, three):
    hyper = Posterior.create(10.0, 0.02, 2)
    evidence = [evidence_for(hyper, gaussian.ocean, one, gaussian) for one in three]
    with pytest.raises(InputError, match="as many rows each"):
        stack_evidence(evidence)
    other = gaussian.replace(rest=2 * gaussian.rest)
    with pytest.raises(InputError, match="the same prior"):
        stack_evidence([evidence[0], evidence_for(hyper, gaussian.ocean, three[1], other)])
    nothing = [evidence_for(hyper.replace(correction="none"), gaussian.ocean)]
    with pytest.raises(InputError, match="no observation"):
        posterior_ensemble(
            gaussian, nothing, gaussian, [linear.analysis(gaussian, three[0])], hyper, frames=[0], members=2
        )
    with pytest.raises(InputError, match="1 frames are numbered, 3 with 3 analyses are given"):
        posterior_ensemble(
            gaussian, evidence, gaussian, [linear.analysis(gaussian, one) for one in three], hyper,
            frames=[0], members=2,
        )  # fmt: skip


@pytest.mark.parametrize("count", [0, 1, 5])
def test_odd_members_are_refused(gaussian, observation, analysis, count):
    with pytest.raises(InputError, match=f"come in pairs, got {count} members"):
        pairs(gaussian, gaussian, observation, analysis, members=count)


def test_other_values_and_levels_do_not_trace_again(gaussian, frames, observation, analysis):
    before = len(traces)
    denoiser = Counted(gaussian)
    pairs(denoiser, gaussian, observation, analysis, members=2)
    after = len(traces)
    assert after > before
    second = observe.from_cells(observe.cells(OCEAN, 0.3, np.random.default_rng(8)), frames[1], 0.2, OCEAN)
    assert second.size == observation.size
    hyper = Posterior.create(5.0, 0.05, 6, eta=0.5)
    pairs(denoiser, gaussian, second, linear.analysis(gaussian, second), hyper, members=2, frames=[8], seed=2)
    assert len(traces) == after
