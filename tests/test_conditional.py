"""A denoiser that is given the observations, against the exact Gaussian estimate and the network it grew from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_repaint import gains, guide, model, observe, train
from jax_repaint.conditional import ConditionalDenoiser, share_observed
from jax_repaint.data.fields import Standardiser, prepare
from jax_repaint.denoise import AnchoredDenoiser
from jax_repaint.ensemble import posterior_ensemble
from jax_repaint.errors import InputError
from jax_repaint.nets import unet
from jax_repaint.optimise import make_loss
from jax_repaint.posterior import Posterior, evidence_for
from jax_repaint.prior import linear
from tests import tiny

FOUR = dataclasses.replace(tiny.NETWORK, inputs=4, dropout=0.0)
FIVE = dataclasses.replace(FOUR, inputs=5)
CALL = jax.jit(lambda denoiser, x, sigma: denoiser(x, sigma))
GIVEN = jax.jit(lambda denoiser, x, sigma, evidence: denoiser.given(x, sigma, evidence))


@pytest.fixture(scope="module")
def prior():
    data = tiny.fields()
    x, ocean = prepare(data, Standardiser.from_fields(data), tiny.NETWORK.multiple)
    return linear.fit(x, ocean, 8)


@pytest.fixture(scope="module")
def truth(prior):
    return jax.jit(guide.prior_draw)(prior, jax.random.key(3))


@pytest.fixture(scope="module")
def observation(prior, truth):
    wet = np.asarray(prior.ocean)[..., 0] > 0
    return observe.from_cells(observe.cells(wet, 0.15, np.random.default_rng(1)), np.asarray(truth), 0.1, wet)


def denoiser(prior, network, params):
    return ConditionalDenoiser(params, prior, unet.structure(network)[0])


@pytest.fixture(scope="module")
def silent(prior):
    """A network whose output is zero."""
    network = dataclasses.replace(FIVE, zero_output=True)
    return denoiser(prior, network, unet.create(network, 0)[1])


@pytest.fixture(scope="module")
def grown(prior):
    """An anchored denoiser and the conditional one that starts from it."""
    params = unet.create(FOUR, 0)[1]
    anchored = AnchoredDenoiser(params, prior, unet.structure(FOUR)[0])
    return anchored, denoiser(prior, FIVE, train._with_inputs_of(FIVE, params))


def test_a_silent_network_gives_the_exact_gaussian_estimate(silent, prior, truth, observation):
    """x and y stacked as observations of x0, in dense algebra."""
    sigma = 0.7
    wet = np.flatnonzero(np.repeat(np.asarray(prior.ocean)[..., 0].reshape(-1) > 0, 2))
    e = np.asarray(prior.direction, float).reshape(8, -1)[:, wet]
    rest = float(prior.rest)
    covariance = (e.T * (np.asarray(prior.variance, float) - rest)) @ e + rest * np.eye(wet.size)
    unit = jnp.eye(prior.mean.size).reshape(-1, *prior.mean.shape)
    valid = np.asarray(observation.valid)
    a = np.asarray(jax.jit(jax.vmap(observation.apply))(unit), float)[wet][:, valid].reshape(wet.size, -1).T
    stacked = np.concatenate([np.eye(wet.size), a])
    errors = np.diag(np.r_[np.full(wet.size, sigma**2), np.full(len(a), 0.1**2)])
    x = truth + sigma * jax.random.normal(jax.random.key(4), truth.shape)
    y = np.asarray(observation.values, float)[valid].reshape(-1)
    mean = np.asarray(prior.mean, float).reshape(-1)[wet]
    seen = np.r_[np.asarray(x, float).reshape(-1)[wet], y]
    gain = np.linalg.solve(stacked @ covariance @ stacked.T + errors, stacked @ covariance).T
    exact = mean + gain @ (seen - stacked @ mean)

    noise = gains.noise_covariance(observation)
    evidence = guide.Evidence(prior.ocean, observation, noise, prior)
    evidence = evidence.replace(gain=jax.jit(gains.kalman_gain)(prior, observation, noise, jnp.float32(sigma)))
    found = np.asarray(GIVEN(silent, x, jnp.float32(sigma), evidence)).reshape(-1)[wet]
    np.testing.assert_allclose(found, exact, atol=2e-5)


def test_a_pair_of_a_silent_network_has_the_linear_mean(silent, prior, observation):
    hyper = Posterior.create(20.0, count=6, correction="given")
    evidence = evidence_for(hyper, prior.ocean, observation, prior)
    found = linear.analysis(prior, observation)
    pair = posterior_ensemble(silent, [evidence], prior, [found], hyper, frames=[0], members=2)[0]
    assert np.abs(pair[0] - pair[1]).max() > 0.05
    np.testing.assert_allclose(pair.mean(0), found.mean(observation.values) * prior.ocean, atol=1e-3)


def test_without_observations_it_is_the_network_it_grew_from(grown, prior, truth):
    anchored, conditional = grown
    for sigma in (0.05, 2.0, 50.0):
        x = truth + sigma * jax.random.normal(jax.random.key(0), truth.shape)
        before, after = (np.asarray(CALL(d, x, jnp.float32(sigma))) for d in (anchored, conditional))
        assert np.abs(before - np.asarray(prior(x, jnp.float32(sigma)))).max() > 1e-3
        np.testing.assert_allclose(after, before, atol=1e-5)


def at_level(prior, observation, sigma):
    """The evidence of an observation at one level."""
    noise = gains.noise_covariance(observation)
    gain = jax.jit(gains.kalman_gain)(prior, observation, noise, jnp.float32(sigma))
    return guide.Evidence(prior.ocean, observation, noise, prior, gain)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 20.0])
def test_the_network_is_scaled_by_the_error_of_the_estimate(silent, prior, truth, observation, monkeypatch, sigma):
    """A network that says one everywhere adds the root of the mean posterior variance, given x, and given x and y."""
    monkeypatch.setattr(unet, "apply", lambda graphdef, params, x, *_: jnp.ones((*x.shape[:-1], 2)))
    wet = np.flatnonzero(np.repeat(np.asarray(prior.ocean)[..., 0].reshape(-1) > 0, 2))
    e = np.asarray(prior.direction, float).reshape(8, -1)[:, wet]
    variance, rest = np.asarray(prior.variance, float), float(prior.rest)
    precision = (e.T * (1 / variance - 1 / rest)) @ e + (1 / rest + 1 / sigma**2) * np.eye(wet.size)
    cells = np.asarray(observation.cells)[np.asarray(observation.valid), 0]
    seen = np.isin(wet // 2, cells) / 0.1**2
    evidence = at_level(prior, observation, sigma)
    estimate = guide.kalman(lambda x: prior(x, jnp.float32(sigma)), truth, sigma, sigma, evidence)
    for found, without, known in (
        (silent(truth, jnp.float32(sigma)), prior(truth, jnp.float32(sigma)), 0 * seen),
        (silent.given(truth, jnp.float32(sigma), evidence), estimate, seen),
    ):
        added = np.asarray(found - without).reshape(-1)
        error = np.mean(np.diag(np.linalg.inv(precision + np.diag(known))))
        np.testing.assert_allclose(added[wet], np.sqrt(error), rtol=5e-3)
        assert not np.delete(added, wet).any()


def test_what_lies_on_land_is_not_seen(grown, prior, truth, observation):
    land = jnp.where(prior.ocean > 0, 0.0, 7.0)
    evidence = at_level(prior, observation, 1.0)
    for denoiser in grown:
        np.testing.assert_array_equal(*(CALL(denoiser, x, jnp.float32(1)) for x in (truth, truth + land)))
    np.testing.assert_array_equal(*(GIVEN(grown[1], x, jnp.float32(1), evidence) for x in (truth, truth + land)))


def test_the_network_sees_what_is_observed(grown, prior, truth, observation):
    conditional = grown[1]
    evidence = evidence_for(Posterior.create(1.0, count=2, correction="given"), prior.ocean, observation, prior)
    evidence = evidence.replace(gain=jax.tree.map(lambda g: g[0], evidence.gain))
    seen = np.asarray(share_observed(evidence))[..., 0]
    assert seen.sum() == np.asarray(observation.valid).sum()
    first = np.asarray(GIVEN(conditional, truth, jnp.float32(1.0), evidence))
    shifted = observation.replace(values=observation.values + jnp.where(observation.valid, 0.5, 0.0)[:, None])
    second = np.asarray(GIVEN(conditional, truth, jnp.float32(1.0), evidence.replace(observation=shifted)))
    assert np.abs(second - first).max() > 0.05


def test_a_cell_that_is_seen_twice_is_no_more_than_seen(prior, observation):
    twice = jax.tree.map(lambda a: jnp.concatenate([a, a]), observation)
    shares = [share_observed(guide.Evidence(prior.ocean, one)) for one in (observation, twice)]
    np.testing.assert_array_equal(*shares)


@pytest.mark.parametrize("error", [0.05, 1.0])
def test_the_loss_without_a_network_is_one_on_its_own_gaussian(prior, error):
    settings = tiny.config("conditional")
    settings.observed.error = error
    settings.observed.patterns, settings.observed.rows = 64, 16
    loss = make_loss(settings, prior, None)
    draws = jax.vmap(lambda key: guide.prior_draw(prior, key) * prior.ocean)(jax.random.split(jax.random.key(0), 1500))
    keys = jax.random.split(jax.random.key(1), len(draws))
    places = (jnp.arange(len(draws), dtype=jnp.float32) + 0.5) / len(draws)
    found = jax.jit(jax.vmap(loss, (None, 0, 0, 0, None)), static_argnums=4)({}, draws, keys, places, False)
    assert float(found.mean()) == pytest.approx(1, abs=0.03)


def test_patterns_are_of_all_kinds_on_the_ocean():
    ocean = np.ones((9, 14), bool)
    ocean[:3, :5] = False
    table, counts = observe.pattern_table(ocean, 600, 12, seed=1)
    assert table.shape == (600, 12)
    assert np.mean(counts == 0) == pytest.approx(1 / 6, abs=0.05)
    lines, walks = np.zeros(2, int), 0
    for cells, count in zip(table, counts, strict=True):
        cells = cells[:count]
        assert ocean.reshape(-1)[cells].all()
        assert len(set(cells)) == count
        assert count == 0 or 4 <= count <= 12
        y, x = np.divmod(cells, 14)
        straight = count > 0 and (len(set(y)) == 1 or len(set(x)) == 1)
        lines += straight * np.array([len(set(y)) == 1, len(set(x)) == 1])
        steps = np.abs(y[:, None] - y) + np.abs(x[:, None] - x)
        walks += count > 0 and not straight and bool(((steps == 1).sum(1) > 0).all())
    assert lines.sum() > 120
    # Nine rows and fourteen columns.
    assert lines.min() > 40
    assert walks > 90
    again = observe.pattern_table(ocean, 600, 12, seed=1)
    np.testing.assert_array_equal(table, again[0])
    assert (table != observe.pattern_table(ocean, 600, 12, seed=2)[0]).any(1).mean() > 0.5
    with pytest.raises(InputError, match="4 rows"):
        observe.pattern_table(ocean, 3, 2)
    # No pattern has more cells than the ocean.
    assert observe.pattern_table(ocean, 3, 10**9)[0].shape == (3, ocean.sum())


def test_few_cells_are_as_frequent_as_many():
    """As many patterns from 4 to 20 cells as from 20 to 100; lines have 40."""
    counts = observe.pattern_table(np.ones((40, 40), bool), 600, 100, seed=1)[1]
    sizes = counts[(counts > 0) & (counts != 40)]
    assert np.mean(sizes < 20) == pytest.approx(0.5, abs=0.1)
    assert sizes.min() == 4
    assert sizes.max() > 90


def test_lines_begin_anywhere():
    table, counts = observe.pattern_table(np.ones((40, 40), bool), 400, 8, seed=1)
    along_x = [cells for cells, count in zip(table, counts, strict=True) if count == 8 and (np.diff(cells) == 1).all()]
    assert len(along_x) > 30
    # Of 33 places in a row of 40 cells.
    first = np.array([cells[0] % 40 for cells in along_x])
    assert np.mean(first == 0) < 0.3
    assert first.max() > 25


def test_a_row_of_the_table_is_an_observation_of_cells(truth, prior):
    wet = np.asarray(prior.ocean)[..., 0] > 0
    table, counts = observe.pattern_table(wet, 20, 16)
    row = int(np.argmax((counts > 3) & (counts < 16)))
    chosen = np.zeros(wet.size, bool)
    chosen[table[row, : counts[row]]] = True
    expected = observe.from_cells(chosen.reshape(wet.shape), np.asarray(truth), 0.05, wet, size=16)
    found = observe.from_table(jnp.asarray(table[row]), jnp.asarray(counts[row]), truth, 0.05)
    order = np.argsort(table[row, : counts[row]])
    np.testing.assert_allclose(
        np.asarray(found.values)[: counts[row]][order], expected.values[: counts[row]], atol=1e-6
    )
    spread = jnp.broadcast_to(found.valid.astype(jnp.float32)[:, None], (16, 2))
    np.testing.assert_array_equal(found.adjoint(spread, wet.shape), expected.adjoint(spread, wet.shape))
    np.testing.assert_array_equal(found.valid, expected.valid)
    np.testing.assert_array_equal(found.sigma, expected.sigma)


def test_a_denoiser_without_observations_is_refused(prior, observation):
    hyper = Posterior.create(20.0, count=4, correction="given")
    evidence = evidence_for(hyper, prior.ocean, observation, prior)
    with pytest.raises(InputError, match="form conditional"):
        posterior_ensemble(
            prior, [evidence], prior, [linear.analysis(prior, observation)], hyper, frames=[0], members=2
        )
    assert model.INPUTS["conditional"] == 5
