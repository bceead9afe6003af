"""Members do not depend on how they are computed, and pairs of an exact denoiser have the linear mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from jax_repaint import guide, observe
from jax_repaint.denoise import PrincipalGaussian
from jax_repaint.ensemble import in_chunks, member_keys, posterior_ensemble, repaint_ensemble
from jax_repaint.errors import InputError
from jax_repaint.posterior import Posterior, evidence_for
from jax_repaint.prior import linear
from jax_repaint.sample import Known, Repaint
from jax_repaint.schedule import Schedule

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
    return repaint_ensemble(gaussian, known, SCHEDULE, STAGES, frames=[5, 6, 9], members=4, seed=1)


@pytest.fixture(scope="module")
def observation(frames):
    return observe.from_cells(observe.cells(OCEAN, 0.15, np.random.default_rng(7)), frames[0], 0.1, OCEAN)


@pytest.fixture(scope="module")
def analysis(gaussian, observation):
    return linear.analysis(gaussian, observation)


def pairs(denoiser, gaussian, observation, analysis, hyper=HYPER, **options):
    evidence = evidence_for(hyper, gaussian.ocean, observation, gaussian)
    return posterior_ensemble(denoiser, evidence, gaussian, analysis, hyper, **({"frame": 3, "members": 6} | options))


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
    np.testing.assert_allclose(again, members, atol=1e-5)


def test_members_do_not_depend_on_other_frames_and_members(gaussian, known, members):
    last = jax.tree.map(lambda leaf: leaf[2:], known)
    again = repaint_ensemble(gaussian, last, SCHEDULE, STAGES, frames=[9], members=2, seed=1)
    np.testing.assert_allclose(again[0], members[2, :2], atol=1e-5)


def test_members_frames_and_seeds_differ(gaussian, known, members):
    missing = np.asarray(known.missing)[0, ..., 0]
    same = jax.tree.map(lambda leaf: jnp.stack([leaf[0]] * 3), known)
    other = repaint_ensemble(gaussian, same, SCHEDULE, STAGES, frames=[5, 6, 9], members=4, seed=2)
    numbered = np.concatenate([members[0], *other])[:, -1][:, missing].reshape(16, -1)
    distance = np.abs(numbered[:, None] - numbered[None]).mean(-1)
    assert distance[~np.eye(16, dtype=bool)].min() > 0.05


def test_other_numbers_do_not_trace_again(gaussian, known):
    def run(floor, gamma, seed, decay=0.1):
        before = len(traces)
        stages = tuple(Repaint.create(6, noise_floor=floor, gamma=gamma, resample_steps=2) for _ in range(2))
        x = repaint_ensemble(
            Counted(gaussian), known, SCHEDULE, stages, frames=[1, 2, 3], members=2, seed=seed, var_decay=decay
        )
        return x, len(traces) - before

    first, traced = run(0.2, 3.0, 0)
    assert traced
    second, more = run(0.6, 1.5, 0)
    assert more == 0
    assert np.abs(first - second).max() > 1e-3
    assert run(0.2, 3.0, 4, 0.5)[1] == 0


def test_mistakes_are_refused(gaussian, known):
    with pytest.raises(InputError, match="at least one member of each frame, got 0"):
        repaint_ensemble(gaussian, known, SCHEDULE, STAGES, frames=[5, 6, 9], members=0)
    with pytest.raises(InputError, match="2 frames are numbered, 3 are given"):
        repaint_ensemble(gaussian, known, SCHEDULE, STAGES, frames=[5, 6], members=1)
    late = (Repaint.create(20),)
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
    for other in ({"seed": 1}, {"frame": 4}):
        assert np.abs(pairs(gaussian, gaussian, observation, analysis, **other) - x)[:, OCEAN].mean() > 0.05


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
    pairs(denoiser, gaussian, second, linear.analysis(gaussian, second), hyper, members=2, frame=8, seed=2)
    assert len(traces) == after
