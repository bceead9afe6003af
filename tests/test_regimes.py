"""A mixture of regimes against dense algebra, and its clusters against those that made the data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jax_repaint import guide, observe
from jax_repaint.denoise import Regimes
from jax_repaint.errors import InputError
from jax_repaint.posterior import Posterior, evidence_for
from jax_repaint.prior import linear, regimes

SHAPE, RANK = (5, 6), 4
OCEAN = ~((np.indices(SHAPE)[0] < 2) & (np.indices(SHAPE)[1] > 3))
SEA = np.flatnonzero(np.repeat(OCEAN.reshape(-1), 2))
NOISE = 0.3


def frames(rng, shift, scale):
    """Smooth fields about a mean of their own."""
    y, x = np.indices(SHAPE)
    phase = rng.normal(size=(300, 2, 1, 1)) * 0.6
    waves = np.cos(phase[:, 0] * y + phase[:, 1] * x + rng.uniform(0, 6, (300, 1, 1)))
    fields = scale * waves[..., None] * rng.normal(size=(300, 1, 1, 2)) + 0.2 * rng.normal(size=(300, *SHAPE, 2))
    return ((fields + shift) * OCEAN[..., None]).astype(np.float32)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    return [frames(rng, 0.8, 1.0), frames(rng, -0.8, 0.5)[:150]]


@pytest.fixture(scope="module")
def mixture(data):
    each = [linear.fit(x, OCEAN, RANK) for x in data]
    return Regimes(jnp.array([0.7, 0.3]), jax.tree.map(lambda *leaves: jnp.stack(leaves), *each))


@pytest.fixture(scope="module")
def observation():
    cells = observe.cells(OCEAN, 0.2, np.random.default_rng(3))
    return observe.from_cells(cells, np.full((*SHAPE, 2), 0.1), NOISE, OCEAN)


def dense(gaussian):
    """Mean and covariance on the ocean, float64."""
    e = np.asarray(gaussian.direction, float).reshape(RANK, -1)[:, SEA]
    rest = float(gaussian.rest)
    covariance = (e.T * (np.asarray(gaussian.variance, float) - rest)) @ e + rest * np.eye(SEA.size)
    return np.asarray(gaussian.mean, float).reshape(-1)[SEA], covariance


def on_sea(field):
    return np.asarray(field, float).reshape(-1)[SEA]


def exact(mixture, x, sigma, observation=None):
    """p(k | x, y) and E[x0 | x, y, k] by stacking x and y."""
    log_weight, means = [], []
    for gaussian, weight in zip(mixture.each(), np.asarray(mixture.weight, float), strict=True):
        mean, covariance = dense(gaussian)
        a, seen, errors = np.eye(SEA.size), on_sea(x), np.full(SEA.size, sigma**2)
        if observation is not None:
            unit = jnp.eye(2 * OCEAN.size).reshape(-1, *SHAPE, 2)
            valid = np.asarray(observation.valid)
            rows = np.asarray(jax.jit(jax.vmap(observation.apply))(unit), float)[SEA][:, valid]
            a = np.concatenate([a, rows.reshape(SEA.size, -1).T])
            seen = np.r_[seen, np.asarray(observation.values, float)[valid].reshape(-1)]
            errors = np.r_[errors, np.full(len(a) - SEA.size, NOISE**2)]
        s = a @ covariance @ a.T + np.diag(errors)
        log_weight.append(np.log(weight) + stats.multivariate_normal(a @ mean, s).logpdf(seen))
        means.append(mean + covariance @ a.T @ np.linalg.solve(s, seen - a @ mean))
    weight = np.exp(log_weight - np.max(log_weight))
    return weight / weight.sum(), np.array(means)


def noisy(mixture, sigma, seed=0):
    start = mixture.each()[0].mean * 0.2
    return start + sigma * jax.random.normal(jax.random.key(seed), (*SHAPE, 2))


@pytest.mark.parametrize("sigma", [0.3, 2.0, 9.0])
def test_the_denoiser_of_a_mixture_is_exact(mixture, sigma):
    x = noisy(mixture, sigma)
    weight, means = exact(mixture, x, sigma)
    found = jax.jit(lambda m, x: m(x, jnp.float32(sigma)))(mixture, x)
    np.testing.assert_allclose(on_sea(found), weight @ means, atol=1e-4)


@pytest.mark.parametrize("sigma", [1.0, 4.0])
def test_analyses_are_weighted_by_what_x_and_y_say(mixture, observation, sigma):
    """With x0 = 0 before the analysis, what is added is sum_k p(k | x, y) G_k y."""
    # As likely under both regimes by itself, so that the observations decide.
    x = noisy(mixture, sigma, 1)
    likely = jax.jit(jax.vmap(lambda g: g.log_density(x, jnp.float32(sigma))))(mixture.gaussian)
    mixture = mixture.replace(weight=jax.nn.softmax(-likely))
    weight, _ = exact(mixture, x, sigma, observation)
    hyper = Posterior.create(sigma, correction="regimes", count=2)
    evidence = evidence_for(hyper, OCEAN[..., None], observation, mixture)
    evidence = evidence.replace(gain=jax.tree.map(lambda g: g[0], evidence.gain))
    level = jnp.float32(sigma)
    found = jax.jit(lambda x, e: guide.regimes(jnp.zeros_like, x, level, level, e))(x, evidence)
    added = []
    for gaussian in mixture.each():
        one = evidence_for(hyper.replace(correction="kalman"), OCEAN[..., None], observation, gaussian)
        one = one.replace(gain=jax.tree.map(lambda g: g[0], one.gain))
        added.append(on_sea(jax.jit(lambda x, e: guide.kalman(jnp.zeros_like, x, level, level, e))(x, one)))
    assert 0.02 < weight[0] < 0.98
    assert np.abs(added[0] - added[1]).max() > 0.03
    np.testing.assert_allclose(on_sea(found), weight @ np.array(added), atol=2e-4)


def test_clusters_are_those_that_made_the_data(data):
    x = np.concatenate(data)
    found = regimes.fit(x, OCEAN, 2, RANK)
    order = np.argsort(-np.asarray(found.weight))
    np.testing.assert_allclose(np.asarray(found.weight)[order], [2 / 3, 1 / 3], atol=0.05)
    for k, fields in zip(order, data, strict=True):
        np.testing.assert_allclose(found.gaussian.mean[k], fields.mean(0), atol=0.2)


def test_mistakes_are_named(data):
    with pytest.raises(InputError, match="at least two regimes, got 1"):
        regimes.fit(data[0], OCEAN, 1, RANK)
    with pytest.raises(InputError, match="too few for 40 directions"):
        regimes.fit(data[0][:50], OCEAN, 2, 40)
