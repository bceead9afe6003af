"""Fields with gaps: priors from what is present against dense algebra, losses that count it alone, whole runs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
import tiny

from jax_repaint import calibrate, calibration, evaluate, guide, levels, model, observe, report, train
from jax_repaint.cases import make_cases, prior_of, with_directions
from jax_repaint.data import fields as fields_lib
from jax_repaint.data import readers
from jax_repaint.data.fields import Fields, Standardiser
from jax_repaint.errors import InputError
from jax_repaint.methods import linear_samples
from jax_repaint.nets import unet
from jax_repaint.optimise import State, make_held_out, make_loss, make_steps, plan
from jax_repaint.prepare import missing, prepare, split_fields
from jax_repaint.prior import linear
from jax_repaint.settings import network_config
from tests.test_linear import OCEAN, SEA, SHAPE, covariance_of, draw, on_grid, on_sea, truth

RANK = 4
TRUE = truth(RANK, 0.05, seed=5)
SIGMA = TRUE[0] @ TRUE[0].T + TRUE[1] * np.eye(SEA.size)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    tiny.compile_once(tmp_path_factory.mktemp("compiled"))
    with pytest.MonkeyPatch.context() as patch:
        tiny.register(patch)
        yield
    tiny.compile_as_usual()


def holes(count, shape, ocean, seed=0, share=0.2):
    """(count, y, x) bool: a fifth of the cells at random and a block are missing in each frame; land is."""
    rng = np.random.default_rng(seed)
    present = rng.random((count, *shape)) > share
    for frame in present:
        y, x = rng.integers(0, shape[0] - 2), rng.integers(0, shape[1] - 3)
        frame[y : y + 3, x : x + 4] = False
    return present & ocean


# --- the linear prior ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def frames():
    return draw(TRUE, 300, 1)


@pytest.fixture(scope="module")
def present():
    return holes(300, SHAPE, OCEAN)


@pytest.fixture(scope="module")
def plain():
    """The prior without its frame at zero, converged: maximum likelihood."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "PRIOR_FRAMES", 1e-9)
        patch.setattr(linear, "CONVERGED", 1e-7)
        yield patch


@pytest.fixture(scope="module")
def likeliest(plain, frames, present):
    return linear.fit_with_gaps(frames, present, OCEAN, RANK, 400)


def on_values(present):
    """(n, values) bool on the ocean, component fastest."""
    return np.repeat(present[:, OCEAN], 2, axis=1)


def conditional(mean, covariance, values, known):
    """Mean and covariance of all values given the known ones, dense float64."""
    gain = np.linalg.solve(covariance[np.ix_(known, known)], covariance[known]).T
    full = mean + gain @ (values[known] - mean[known])
    return full, covariance - gain @ covariance[known]


def test_a_third_of_the_values_missing_costs_little(frames, present):
    assert 0.3 < 1 - present[:, OCEAN].mean() < 0.4
    found = linear.fit_with_gaps(frames, present, OCEAN, RANK)
    zeros = linear.fit(np.where(present[..., None], frames, 0), OCEAN, RANK)
    complete = linear.fit(frames, OCEAN, RANK)
    # What EM expects is also the covariance of its draws.
    filled = linear.fit(linear.fill(found, frames, present), OCEAN, RANK)
    errors = [
        np.linalg.norm(covariance_of(g) - SIGMA) / np.linalg.norm(SIGMA) for g in (complete, found, filled, zeros)
    ]
    assert errors[0] < 0.2
    assert max(errors[1:3]) < 1.1 * errors[0]
    assert errors[3] > 3 * errors[0]
    np.testing.assert_allclose(found.rest, TRUE[1], rtol=0.05)
    np.testing.assert_allclose(filled.rest, TRUE[1], rtol=0.05)


def test_a_step_of_dense_em_leaves_the_result_where_it_is(likeliest, frames, present):
    values, known = on_sea(frames), on_values(present)
    mean, covariance = on_sea(likeliest.mean), covariance_of(likeliest)
    full, left = zip(*(conditional(mean, covariance, v, k) for v, k in zip(values, known, strict=True)), strict=True)
    new = np.mean(full, 0)
    expected = np.cov(np.transpose(full), bias=True) + np.mean(left, 0)
    variance, direction = np.linalg.eigh(expected)
    rest = variance[:-RANK].mean()
    low = (direction[:, -RANK:] * (variance[-RANK:] - rest)) @ direction[:, -RANK:].T + rest * np.eye(SEA.size)
    np.testing.assert_allclose(new, mean, atol=2e-4)
    np.testing.assert_allclose(low, covariance, atol=2e-3 * np.abs(covariance).max())
    np.testing.assert_allclose(rest, likeliest.rest, rtol=1e-3)


def test_the_result_is_likelier_than_the_truth(likeliest, frames, present):
    def log_likelihood(mean, covariance):
        total = 0.0
        for values, known in zip(on_sea(frames), on_values(present), strict=True):
            part, error = covariance[np.ix_(known, known)], (values - mean)[known]
            total -= 0.5 * (np.linalg.slogdet(part)[1] + error @ np.linalg.solve(part, error))
        return total

    complete = linear.fit(frames, OCEAN, RANK)
    found = log_likelihood(on_sea(likeliest.mean), covariance_of(likeliest))
    assert found > log_likelihood(TRUE[2], SIGMA) + 100
    assert found > log_likelihood(on_sea(complete.mean), covariance_of(complete)) + 10


def test_without_gaps_it_is_the_plain_fit(plain, frames):
    complete = linear.fit(frames, OCEAN, RANK)
    found = linear.fit_with_gaps(frames, np.broadcast_to(OCEAN, (300, *SHAPE)), OCEAN, RANK, 400)
    np.testing.assert_allclose(covariance_of(found), covariance_of(complete), atol=2e-3)
    np.testing.assert_allclose(found.mean, complete.mean, atol=1e-4)
    np.testing.assert_allclose(found.rest, complete.rest, rtol=1e-3)


def test_a_step_of_few_frames_is_the_formulas(frames, present, monkeypatch):
    """One of EM, frame by frame and value by value, with its frame at zero, which counts among few."""
    monkeypatch.setattr(linear, "PRIOR_FRAMES", 1.0)
    found = linear.fit_with_gaps(frames[:20], present[:20], OCEAN, RANK, 1)
    values, known = on_sea(frames[:20]), on_values(present[:20])
    mean = np.where(known, values, 0).sum(0) / (known.sum(0) + 1)
    first = linear.fit(on_grid(np.where(known, values, mean)), OCEAN, RANK)
    rest = float(first.rest)
    w = np.sqrt(np.asarray(first.variance, float) - rest)[:, None] * on_sea(first.direction)
    z, spread = np.zeros((20, RANK + 1)), np.zeros((20, RANK + 1, RANK + 1))
    for n, here in enumerate(known):
        inverse = np.linalg.inv(w[:, here] @ w[:, here].T + rest * np.eye(RANK))
        z[n] = *(inverse @ w[:, here] @ (values[n] - mean)[here]), 1
        spread[n, :-1, :-1] = rest * inverse
    second = z[:, :, None] * z[:, None] + spread
    loading = np.stack(
        [
            np.linalg.solve(second[here].sum(0) + np.eye(RANK + 1), z[here].T @ values[here, v])
            for v, here in enumerate(known.T)
        ]
    )
    error = (values - z @ loading.T) ** 2 + np.einsum("vk,nkl,vl->nv", loading, spread, loading)
    average = z.mean(0)
    w, covariance = loading[:, :-1], (second.mean(0) - np.outer(average, average))[:-1, :-1]
    assert float(found.rest) == pytest.approx(error[known].mean(), rel=1e-4)
    np.testing.assert_allclose(on_sea(found.mean), loading @ average, atol=1e-5)
    expected = w @ covariance @ w.T + error[known].mean() * np.eye(SEA.size)
    np.testing.assert_allclose(covariance_of(found), expected, atol=1e-4 * np.abs(expected).max())


def test_a_wide_ocean_may_be_turned_upside_down():
    """Of more cells than are solved for at once; the last come first."""
    shape = (30, 40)
    ocean = np.ones(shape, bool)
    y, x = np.indices(shape)
    rng = np.random.default_rng(1)
    waves = np.cos(0.1 * (np.arange(1, 4)[:, None, None] * y + x))[..., None] * [1.0, 0.5]
    frames = (rng.normal(size=(16, 3)) @ waves.reshape(3, -1)).reshape(16, *shape, 2) + 0.1 * rng.normal(size=2)
    frames = frames.astype(np.float32) + 0.1 * rng.normal(size=frames.shape).astype(np.float32)
    present = holes(16, shape, ocean)
    found, turned = (
        linear.fit_with_gaps(frames[:, way], present[:, way], ocean, 3, 6)
        for way in (slice(None), slice(None, None, -1))
    )
    np.testing.assert_allclose(turned.mean[::-1], found.mean, atol=1e-4)
    np.testing.assert_allclose(linear.prior_variance(turned)[::-1], linear.prior_variance(found), rtol=1e-3)


@pytest.mark.parametrize("number", [1e6, np.nan])
def test_what_gaps_hold_does_not_matter(frames, present, number):
    other = np.where((present | ~OCEAN)[..., None], frames, np.float32(number))
    found, expected = (linear.fit_with_gaps(x[:40], present[:40], OCEAN, RANK) for x in (other, frames))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    filled = linear.fill(found, other[:40], present[:40])
    np.testing.assert_array_equal(filled, linear.fill(expected, frames[:40], present[:40]))
    np.testing.assert_array_equal(filled[present[:40]], frames[:40][present[:40]])
    assert np.isfinite(filled[:, OCEAN]).all()
    assert (filled[:, OCEAN] != frames[:40, OCEAN]).any()


def test_cells_that_are_hardly_seen_keep_to_the_mean(frames, present):
    present = present[:24].copy()
    present[:, 5, 5] = present[:, 4, 4] = False
    present[2, 5, 5] = True
    found = linear.fit_with_gaps(frames[:24], present, OCEAN, 64)
    assert found.variance.size == 6
    assert not np.asarray(found.mean)[4, 4].any()
    assert (np.abs(np.asarray(found.mean)[5, 5]) <= np.abs(frames[2, 5, 5])).all()
    np.testing.assert_allclose(np.asarray(found.direction)[:, 4, 4], 0, atol=1e-6)
    with pytest.raises(InputError, match="frame 3 has no value"):
        linear.fit_with_gaps(frames[:24], present & (np.arange(24) != 3)[:, None, None], OCEAN, 4)


def test_a_small_ocean_has_no_more_directions_than_values():
    rng, ocean = np.random.default_rng(5), np.ones((4, 5), bool)
    x, present = rng.standard_normal((300, 4, 5, 2)).astype(np.float32), rng.random((300, 4, 5)) > 0.2
    found, expected = (linear.fit_with_gaps(x, present, ocean, rank, 20) for rank in (64, 39))
    assert found.variance.size == 39
    np.testing.assert_array_equal(found.variance, expected.variance)
    # All the variance there is: 1 in each of 40 values.
    assert float(found.rest + found.variance.sum()) == pytest.approx(40, rel=0.15)


@pytest.mark.parametrize("kept", [None, 3])
def test_draws_have_the_conditional_mean_and_covariance(likeliest, frames, present, kept):
    """Of a frame with gaps, and of one with next to nothing, whose directions the gaps mix."""
    count = 3000
    if kept:
        present = present & (np.cumsum(present[0]).reshape(SHAPE) <= kept)
    same, known = (np.broadcast_to(a[:1], (count, *a.shape[1:])) for a in (frames, present))
    filled = on_sea(linear.fill(likeliest, same, known))
    mean, covariance = conditional(
        on_sea(likeliest.mean), covariance_of(likeliest), on_sea(frames)[0], on_values(present)[0]
    )
    gap = ~on_values(present)[0]
    scale = np.sqrt(np.diag(covariance)[gap])
    assert np.abs((filled.mean(0) - mean)[gap] / scale).max() < 5 / np.sqrt(count)
    correlation = np.cov(filled[:, gap].T) / scale[:, None] / scale
    assert np.abs(correlation - covariance[np.ix_(gap, gap)] / scale[:, None] / scale).max() < 7 * np.sqrt(2 / count)
    other = on_sea(linear.fill(likeliest, same[:2], known[:2], seed=1))
    assert not np.array_equal(other, filled[:2])


def test_a_frame_of_which_little_is_seen_is_filled_by_what_is_seen():
    """Of a prior whose rest is far below the rounding of its largest variance."""
    factor, _, mean = truth(30, 0.0, seed=7)
    smooth = 30 * factor * 0.8 ** np.arange(30), 1e-9, mean
    prior, frame = linear.fit(draw(smooth, 200, 2), OCEAN, 80), draw(smooth, 1, 3)
    assert float(prior.rest) < 3e-8 * float(prior.variance[0])
    seen, count = np.zeros((1, *SHAPE), bool), 2000
    seen[0, 5, 3:5] = True
    same, known = (np.broadcast_to(one, (count, *one.shape[1:])) for one in (frame, seen))
    filled = on_sea(linear.fill(prior, same, known))
    given = on_values(seen)[0]
    expected, covariance = conditional(on_sea(prior.mean), covariance_of(prior), on_sea(frame)[0], given)
    scale = np.sqrt(np.diag(covariance)[~given])
    assert np.abs((filled.mean(0) - expected)[~given] / scale).max() < 6 / np.sqrt(count)


def test_a_frame_has_its_fill_whatever_frames_are_beside_it(likeliest, frames, present):
    among = linear.fill(likeliest, frames[:6], present[:6])
    alone = linear.fill(likeliest, frames[4:5], present[4:5], numbers=[4])
    np.testing.assert_array_equal(alone[0], among[4])


def test_select_scores_present_cells_from_present_observations(likeliest, frames, present):
    seen = [observe.cells(OCEAN, 0.2, np.random.default_rng(i)) for i in range(2)]
    patterns = [observe.from_cells(cells, np.zeros((*SHAPE, 2)), 0.02, OCEAN) for cells in seen]
    x, known = frames[:6], present[:6]
    choice = linear.select(likeliest, np.where(known[..., None], x, 1e6), patterns, (RANK,), (1.0,), known)[1]
    squares = np.zeros((2, 2))
    mean, covariance = on_sea(likeliest.mean), covariance_of(likeliest)
    for i, field in enumerate(on_sea(x)):
        where = on_values(known[i : i + 1])[0]
        rows = on_values((seen[i % 2] & known[i])[None])[0]
        error = covariance[np.ix_(rows, rows)] + 0.02**2 * np.eye(rows.sum())
        guess = mean + covariance[:, rows] @ np.linalg.solve(error, field[rows] - mean[rows])
        squares[i % 2] += [np.sum((one - field)[where] ** 2) for one in (guess, mean)]
    np.testing.assert_allclose(choice.error, np.mean(squares[:, 0] / squares[:, 1]), rtol=1e-4)


# --- fields -------------------------------------------------------------------------------------------------


def gappy(frames=60, sparse=()):
    """`tiny.fields` with a third of its values missing; next to all in the frames `sparse`."""
    whole = tiny.fields(frames)
    present = holes(frames, whole.shape, whole.ocean, seed=3)
    present[list(sparse), :, :-1] = False
    present[list(sparse), 5, -1] = True
    velocity = np.where(present[..., None], whole.velocity, np.nan)
    return Fields.create(velocity, whole.lat, whole.lon, whole.time, whole.ocean, "gappy")


def test_prepared_fields_say_what_is_present():
    data, whole = gappy(), tiny.fields()
    z = Standardiser.from_fields(data)
    listed = np.array([v for v in data.velocity.reshape(-1, 2) if np.isfinite(v).all()], float)
    np.testing.assert_allclose(z.mean, listed.mean(0), rtol=1e-5)
    np.testing.assert_allclose(z.std, listed.std(0), rtol=1e-5)
    x, ocean, present = fields_lib.prepare_with_gaps(data, z, 4)
    assert x.shape == (60, 8, 12, 2)
    np.testing.assert_array_equal(present[:, :7], np.isfinite(data.u))
    assert not present[:, ~ocean].any()
    assert not x[~present].any()
    np.testing.assert_allclose(z.restore(x)[present], whole.velocity[np.isfinite(data.u)], atol=1e-6)
    assert data.gaps == pytest.approx(1 - present[:, ocean].mean())
    for got, expected in zip(fields_lib.prepare_with_gaps(whole, z, 4), fields_lib.prepare(whole, z, 4), strict=False):
        np.testing.assert_array_equal(got, expected)


def test_frames_with_next_to_nothing_are_left_out(caplog):
    data = gappy(sparse=(3, 50))
    config = tiny.config()
    split, whole = split_fields(data, config.data), fields_lib.split(data)
    np.testing.assert_array_equal(split.train, np.setdiff1d(whole.train, [3]))
    np.testing.assert_array_equal(split.validation, np.setdiff1d(whole.validation, [50]))
    assert "1 train frames have values in less than 10 % of the ocean cells" in caplog.text
    with pytest.raises(InputError, match=r"all .* test frames have values in less than 10 %"):
        split_fields(gappy(sparse=whole.test), config.data)


def test_another_number_of_directions_is_of_gaps_that_are_filled():
    """Gaps at the mean would take their share off the variance of the flow."""
    trained = tiny.model("anchored")
    parts = fields_lib.Split(np.arange(41), np.arange(42, 50), np.arange(51, 60))
    few, whole = (with_directions(trained, data, parts, 3).gaussian.variance.sum() for data in (gappy(), tiny.fields()))
    assert float(few / whole) == pytest.approx(1, abs=0.1)


def test_positions_without_a_value_only_pad():
    field = np.random.default_rng(0).normal(size=(7, 12, 2))
    ocean = np.ones((7, 12), bool)
    lat, lon = np.array([1.5, 3.2, 5.0]), np.array([2.5, 6.0, 8.0])
    points = observe.from_points(lat, lon, field[0, :3], 0.3, np.arange(7), np.arange(12), ocean)
    present = ocean.copy()
    # A corner of the first and of the second point; a neighbour of the third, which lies on a cell of its own.
    present[2, 2] = present[4, 6] = present[5, 9] = False
    kept = points.within(jnp.asarray(present))
    np.testing.assert_array_equal(np.flatnonzero(kept.valid), [2])
    assert not np.asarray(kept.values)[~np.asarray(kept.valid)].any()
    expected = observe.from_points(lat[2:], lon[2:], field[0, 2:3], 0.3, np.arange(7), np.arange(12), ocean)
    ones = jnp.ones_like(kept.values)
    np.testing.assert_allclose(kept.adjoint(ones, (7, 12)), expected.adjoint(ones, (7, 12)), atol=1e-6)


# --- loss ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prior():
    return tiny.model("anchored").gaussian


@pytest.fixture(scope="module")
def one(prior):
    """A frame, and which of its cells are present (Y, X, 1)."""
    ocean = np.asarray(prior.ocean)[..., 0] > 0
    x0 = jax.jit(guide.prior_draw)(prior, jax.random.key(3))
    return x0, jnp.asarray(holes(1, ocean.shape, ocean)[0][..., None])


def settings(form, **kind):
    config = tiny.config(form, **kind)
    config.observed.patterns, config.observed.rows = 8, 16
    return config


@pytest.mark.parametrize(("form", "ocean_only"), [("eps", True), ("eps", False), ("edm", True), ("anchored", True)])
def test_the_loss_is_the_mean_over_present_cells(prior, one, form, ocean_only):
    config = settings(form, ocean_only=ocean_only)
    graphdef, params = unet.create(network_config(config), 0)
    loss = jax.jit(make_loss(config, prior, graphdef), static_argnums=4)
    (x0, present), key, place = one, jax.random.key(5), jnp.float32(0.5)
    schedule = model.make_schedule(dict(config.noise))
    sigma = float(schedule.sigma[125]) if form == "eps" else 0.01 * (130 / 0.01) ** 0.5
    weight = {"eps": 1 / sigma**2, "edm": (1 + sigma**2) / sigma**2}.get(form)
    if form == "anchored":
        weight = 1 / float(prior.residual_variance(jnp.float32(sigma)))
    x = x0 + sigma * jax.random.normal(jax.random.split(key)[0], x0.shape)
    denoiser = model.make_denoiser(form, graphdef, params, prior, schedule)
    error = np.asarray(jax.jit(lambda x: denoiser(x, jnp.float32(sigma)))(x) - x0, float)
    counted = np.asarray(present)[..., 0]
    if not ocean_only:
        counted = counted | (np.asarray(prior.ocean)[..., 0] == 0)
    got = loss(params, x0, key, place, False, present)
    np.testing.assert_allclose(got, weight * np.mean(error[counted] ** 2), rtol=2e-3)
    everywhere = loss(params, x0, key, place, False, prior.ocean > 0)
    np.testing.assert_allclose(everywhere, loss(params, x0, key, place, False), rtol=1e-6)
    assert abs(float(everywhere) / float(got) - 1) > 1e-3


def test_what_gaps_hold_does_not_change_the_loss(prior, one):
    # A silent network's estimate of a cell rests on that cell alone.
    config = settings("edm")
    network = network_config(config)
    graphdef, params = unet.create(type(network)(**vars(network) | {"zero_output": True}), 0)
    loss = jax.jit(make_loss(config, prior, graphdef), static_argnums=4)
    x0, present = one
    key, place = jax.random.key(5), jnp.float32(0.4)
    expected = loss(params, x0, key, place, False, present)
    assert expected > 0
    assert loss(params, jnp.where(present, x0, 1e6), key, place, False, present) == expected


def test_a_conditional_denoiser_is_given_present_cells_only(prior, one):
    config = settings("conditional")
    ocean = np.asarray(prior.ocean)[..., 0] > 0
    table, counts = observe.pattern_table(ocean, 8, 16, config.train.seed)
    loss = jax.jit(make_loss(config, prior, None), static_argnums=4)
    x0, key, place = one[0], jax.random.key(1), jnp.float32(0.5)
    noise, pattern, _ = jax.random.split(key, 3)
    number = int(jax.random.randint(jax.random.split(pattern)[0], (), 0, 8))
    assert counts[number] > 0
    # Where nothing of the pattern is present the estimate is that of no observation.
    present = ocean.copy()
    present.reshape(-1)[table[number, : counts[number]]] = False
    sigma = jnp.float32(0.01 * (130 / 0.01) ** 0.5)
    x = x0 + sigma * jax.random.normal(noise, x0.shape)
    error = np.asarray(prior(x, sigma) - x0)[present]
    expected = np.mean(error**2) / float(prior.residual_variance(sigma))
    got = loss({}, x0, key, place, False, jnp.asarray(present)[..., None])
    np.testing.assert_allclose(got, expected, rtol=1e-3)
    assert abs(float(loss({}, x0, key, place, False)) / expected - 1) > 0.01


def test_mirrors_take_the_gaps_along():
    data = gappy()
    x0, ocean, present = fields_lib.prepare_with_gaps(data, Standardiser.from_fields(data), 2)
    config = tiny.config(batch=4, dispatch=3, flips=True)
    coast = jnp.asarray(ocean[..., None], jnp.float32)

    def differ(params, x0, key, place, training, present):
        return jnp.sum(jnp.where((x0[..., :1] != 0) != present, coast, 0.0)) + 0 * jnp.sum(params)

    steps, weights = plan(len(x0), config), jnp.zeros(2)
    optimiser = optax.sgd(0.1)
    state = State(weights, weights + 0, optimiser.init(weights), jnp.int32(0), jnp.zeros(2), jnp.float32(jnp.inf))
    dispatch = make_steps(config, differ, optimiser, steps, coast, data.shape)
    assert not np.asarray(dispatch(state, (jnp.asarray(x0), jnp.asarray(present[..., None])))[1]).any()


def test_held_out_loss_counts_each_frame_with_its_gaps():
    x0 = np.random.default_rng(0).normal(size=(11, 4, 4, 2)).astype(np.float32)
    present = np.random.default_rng(1).random((11, 4, 4, 1)) > 0.4

    def loss(params, x0, key, place, training, present):
        return jnp.sum(jnp.where(present, x0**2, 0.0)) / present.sum().astype(jnp.float32) / 2

    expected = np.mean([np.mean(x[p[..., 0]] ** 2) for x, p in zip(x0, present, strict=True)])
    for batch in (1, 4, 100):
        got = make_held_out(tiny.config(batch=batch), loss, (x0, present))({})
        np.testing.assert_allclose(got, expected, rtol=1e-6)


# --- whole runs ---------------------------------------------------------------------------------------------


class Halt(Exception):
    """Ends a run from within."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder and model of a run that is broken off and continued."""
    workdir, config, data = tmp_path_factory.mktemp("gappy") / "run", tiny.config("anchored"), gappy(sparse=(3,))
    usual = train.make_steps

    def broken(*args):
        dispatch, left = usual(*args), iter([True] * 4)

        def run(state, frames):
            if not next(left, False):
                raise Halt
            return dispatch(state, frames)

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_steps", broken)
        with pytest.raises(Halt):
            train.train(config, workdir, data, progress=False)
    return workdir, train.train(config, workdir, data, progress=False), data


def test_a_run_on_gappy_fields_is_scored_and_says_what_is_missing(trained, tmp_path):
    workdir, made, data = trained
    log = pd.read_csv(workdir / "log.csv")
    assert log.step.tolist() == [9, 18, 27]
    assert np.isfinite(log.to_numpy()).all()
    assert 0.3 < made.training["held_out_loss"] < 1.5 * made.training["held_out_loss_of_linear"]
    split = split_fields(data, tiny.config().data)
    missing = made.training["missing"]
    assert missing["train"] == pytest.approx(data.select(split.train).gaps)
    assert missing["frames_left_out"] == 1
    assert model.load(workdir / "model").training["missing"] == missing
    assert f"{100 * missing['train']:.2g} % of train" in "".join(report.training_body(workdir))
    undisturbed = train.train(tiny.config("anchored"), tmp_path / "run", data, progress=False)
    jax.tree.map(np.testing.assert_array_equal, made.params, undisturbed.params)


def test_complete_fields_know_nothing_of_gaps():
    config = tiny.config()
    prepared = prepare(tiny.fields(), config)
    assert isinstance(prepared.train, np.ndarray)
    assert missing(tiny.fields(), prepared.split) == {}


def test_a_gappy_field_is_inpainted(trained):
    _, made, data = trained
    frame = data.select([55])
    grid = np.where(np.isfinite(frame.velocity[0]), frame.velocity[0], np.nan)
    out = made.inpaint(grid, members=4)
    mean = out.eastward_sea_water_velocity_mean.to_numpy().squeeze()
    np.testing.assert_array_equal(np.isfinite(mean), data.ocean)
    seen = frame.present[0]
    assert np.abs(mean - frame.u[0])[seen].max() < 0.1


def test_gappy_frames_are_observed_and_scored_where_there_is_a_value(trained, tmp_path):
    _, made, data = trained
    split = split_fields(data, tiny.config().data)
    frames = data.select(split.test[:3])
    cases = make_cases(made, frames, split.test[:3], ["line:5", "cells:0.3"])
    whole = tiny.fields().select(split.test[:3])
    for case, velocity in zip(cases, [*whole.velocity] * 2, strict=True):
        assert np.isfinite(case.truth[case.observed]).all()
        drawn = observe.parse(case.pattern, data.ocean, observe.pattern_rng(0, case.frame))
        np.testing.assert_array_equal(case.observed, drawn & np.isfinite(case.truth[..., 0]))
        np.testing.assert_array_equal(case.truth[case.observed], velocity[case.observed])
    methods = ["climatology", "gp", "linear", "linear_samples"]
    evaluate.run(made, frames, split.test[:3], ["line:5"], methods, tmp_path, members=4, shown="linear_samples")
    table = pd.read_csv(tmp_path / "table.csv").set_index("method")
    mean = made.to_velocity(made.gaussian.mean)
    squares = [np.mean((mean - c.truth)[np.isfinite(c.truth[..., 0]) & ~c.observed] ** 2) for c in cases[:3]]
    np.testing.assert_allclose(table.loc["climatology", "mse_mean"], np.mean(squares), rtol=1e-4)
    nothing = np.where(np.indices(data.shape)[0][None, ..., None] == 5, np.nan, frames.velocity)
    empty = Fields.create(nothing, data.lat, data.lon, frames.time, data.ocean, "gappy")
    with pytest.raises(InputError, match="line:5 meets no cell with a value in frame"):
        make_cases(made, empty, split.test[:3], ["line:5"])


def test_a_calibration_is_learnt_from_present_cells(trained, monkeypatch):
    _, made, data = trained
    numbers = split_fields(data, tiny.config().data).validation
    frames = data.select(numbers)
    block = calibrate.block_length(made, frames, "line:5")
    assert 1 <= block < len(frames)
    # A frame whose gap takes the whole pattern says nothing of the errors, and stops nothing.
    hidden = frames.velocity.copy()
    drawn = observe.parse("line:5", data.ocean, observe.pattern_rng(0, 0))
    hidden[[0, 3]] = np.where(drawn[..., None], np.nan, hidden[[0, 3]])
    fewer = Fields.create(hidden, data.lat, data.lon, frames.time, data.ocean, "gappy")
    logarithms = []
    with monkeypatch.context() as m:
        m.setattr(calibration, "independent_length", logarithms.append)
        for some in (frames, fewer):
            calibrate.block_length(made, some, "line:5")
    expected = np.where(np.isin(np.arange(len(frames)), (0, 3)), np.nan, logarithms[0])
    np.testing.assert_array_equal(logarithms[1], expected)
    nothing = Fields.create(np.where(drawn[..., None], np.nan, frames.velocity), data.lat, data.lon, frames.time,
                            data.ocean, "gappy")  # fmt: skip
    with pytest.raises(InputError, match="line:5 meets cells with values in 0 frames; two are needed"):
        calibrate.block_length(made, nothing, "line:5")
    learnt = calibrate.learn(made, frames, numbers, ["line:5"], "linear_samples", block=block, members=4)
    (case,) = make_cases(made, frames.select([0]), numbers[:1], ["line:5"])
    mean, variance = prior_of(made, case)
    members = made.to_velocity(linear_samples(made, case, 4))
    assert np.isfinite(learnt.apply(mean, variance, members)[:, data.ocean]).all()


def test_denoising_errors_are_those_of_present_cells(trained):
    _, made, data = trained
    split = split_fields(data, tiny.config().data)
    frames = data.select(split.test)
    sigma = np.array([0.01, 0.3])
    errors = levels.denoising_errors(made, frames, split.test, sigma)
    assert np.isfinite(errors).all()
    # At the least noise an estimate is hardly better than the noise itself.
    np.testing.assert_allclose(errors[:, 0, 1].mean(), 0.01**2, rtol=0.2)
    last = levels.denoising_errors(made, frames.select([-1]), split.test[-1:], sigma)
    np.testing.assert_allclose(last, errors[-1:], rtol=1e-5)


@pytest.mark.slow
def test_a_radar_trains_and_fills(shared, tmp_path):
    radar = readers.read(shared / "data" / "real" / "hfradar_maracoos_20190101.nc")
    every = slice(None, None, 6)
    data = Fields.create(radar.velocity[:, every, every], radar.lat[every], radar.lon[every], radar.time, name="radar")
    data = data.covered(0.3)
    assert data.gaps > 0.05
    config = tiny.config("anchored", epochs=2, batch=2, dispatch=2)
    config.data.train, config.data.validation, config.data.test = "0:14", "16:19", "21:24"
    config.data.allow_short_gap = True
    made = train.train(config, tmp_path / "run", data, progress=False)
    assert made.training["missing"]["train"] == pytest.approx(data.select(slice(14)).gaps)
    assert np.isfinite(made.training["held_out_loss"])
    numbers = split_fields(data, config.data).test
    errors = []
    for frame in (data.select([number]) for number in numbers):
        truth, known = frame.velocity[0], holes(1, data.shape, frame.present[0], seed=2)[0]
        out = made.inpaint(np.where(known[..., None], truth, np.nan), members=4)
        names = (f"{direction}_sea_water_velocity_mean" for direction in ("eastward", "northward"))
        mean = np.stack([out[name].to_numpy().squeeze() for name in names], -1)
        np.testing.assert_array_equal(np.isfinite(mean[..., 0]), data.ocean)
        scored = frame.present[0] & ~known
        errors.append([np.mean(part[scored] ** 2) for part in (mean - truth, truth)])
    error, still = np.mean(errors, 0)
    # Fourteen hours say little of the next ones; still water is the least to ask.
    assert error < 0.8 * still
