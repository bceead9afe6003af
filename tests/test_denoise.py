"""Denoisers around a network that is replaced by a formula: what it is given, and what is made of it."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_repaint import guide
from jax_repaint.conditional import ConditionalDenoiser
from jax_repaint.denoise import AnchoredDenoiser, EdmDenoiser, EpsDenoiser, precondition
from jax_repaint.nets import unet
from jax_repaint.schedule import Schedule

SHAPE = (3, 4, 2)
SIGMAS = [0.001, 0.02, 1.0, 50.0, 1000.0]


@pytest.fixture
def network(monkeypatch):
    """Sets the network, a function of what it sees (1, y, x, c) and of the position (1,)."""

    def use(formula):
        monkeypatch.setattr(unet, "apply", lambda graphdef, params, x, position, dropout=None: formula(x, position))

    return use


@pytest.mark.parametrize("sigma", SIGMAS)
def test_a_preconditioned_network_sees_and_predicts_unit_variance(sigma):
    """For x0 of variance 1, x = x0 + sigma n: moments of what goes in and of the target (x0 - skip x) / out."""
    scale = precondition(jnp.float32(sigma))
    assert float(scale.into) ** 2 * (1 + sigma**2) == pytest.approx(1, rel=1e-5)
    target = ((1 - float(scale.skip)) ** 2 + (float(scale.skip) * sigma) ** 2) / float(scale.out) ** 2
    # 1 - skip has the rounding of 1 where there is little noise.
    assert target == pytest.approx(1, rel=1e-5 if sigma > 0.01 else 0.1)
    # Skip is the linear regression of x0 on x, which leaves the least to predict.
    assert float(scale.skip) == pytest.approx(1 / (1 + sigma**2), rel=1e-5)


def test_positions_are_even_in_the_logarithm_of_the_noise():
    """Trained networks depend on them: 0 at 0.001, 1000 at 1000."""
    positions = [float(precondition(jnp.float32(10.0**k)).position) for k in range(-3, 4)]
    np.testing.assert_allclose(positions, np.linspace(0, 1000, 7), atol=0.01)


@pytest.mark.parametrize("sigma", [0.02, 1.0, 50.0])
def test_an_edm_network_neither_sees_land_nor_writes_on_it(network, sigma):
    ocean = jnp.asarray(np.indices(SHAPE[:2])[1][..., None] > 0, jnp.float32)
    seen = []
    network(lambda x, position: seen.append(x) or jnp.cos(x) + 1)
    x = jnp.asarray(np.random.default_rng(0).normal(size=SHAPE), jnp.float32)
    found = EdmDenoiser({}, ocean, None)(x, jnp.float32(sigma))
    wet = np.broadcast_to(np.asarray(ocean) > 0, SHAPE)
    total = np.sqrt(1 + sigma**2)
    expected = x / total**2 + sigma / total * (np.cos(np.asarray(x) / total) + 1)
    np.testing.assert_allclose(np.asarray(found)[wet], np.asarray(expected)[wet], rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(found)[~wet], 0)
    np.testing.assert_array_equal(np.asarray(seen[0][0])[~wet], 0)


@pytest.mark.parametrize("form", ["edm", "eps", "anchored", "gaussian", "conditional"])
def test_a_noise_level_may_be_a_whole_number(network, form):
    network(lambda x, position: jnp.cos(x[..., :2]) + position[:, None, None, None] / 1000)
    ocean = jnp.ones((*SHAPE[:2], 1))
    white = guide.white(ocean)
    denoise = {
        "edm": EdmDenoiser({}, ocean, None),
        "eps": EpsDenoiser({}, Schedule.linear(12, 1e-3, 0.3), None),
        "anchored": AnchoredDenoiser({}, white, None),
        "gaussian": white,
        "conditional": ConditionalDenoiser({}, white, None),
    }[form]
    x = jnp.asarray(np.random.default_rng(0).normal(size=SHAPE), jnp.float32)
    np.testing.assert_array_equal(denoise(x, 2), denoise(x, jnp.float32(2)))
    np.testing.assert_array_equal(denoise(x, jnp.int32(2)), denoise(x, jnp.float32(2)))


def test_an_eps_network_is_told_its_step_and_between_steps_the_place_between(network):
    """It says its position, so that x - D is sigma times that."""
    schedule = Schedule.linear(12, 1e-3, 0.3)
    network(lambda x, position: position[:, None, None, None] * jnp.ones_like(x))
    denoiser, x = EpsDenoiser({}, schedule, None), jnp.zeros(SHAPE)
    for t in range(12):
        np.testing.assert_array_equal(denoiser(x, schedule.sigma[t]), -schedule.sigma[t] * t * jnp.ones(SHAPE))
    for t, share in ((0, 0.5), (4, 0.3), (10, 0.75)):
        sigma = schedule.sigma[t] ** (1 - share) * schedule.sigma[t + 1] ** share
        np.testing.assert_allclose(denoiser(x, sigma), -sigma * (t + share) * jnp.ones(SHAPE), rtol=1e-4)


def test_an_eps_network_sees_unit_variance_and_finds_the_noise(network):
    """One that knows the noise gives back the field."""
    rng = np.random.default_rng(1)
    x0, n = (jnp.asarray(rng.normal(size=SHAPE), jnp.float32) for _ in range(2))
    schedule, seen = Schedule.linear(12, 1e-3, 0.3), []
    network(lambda x, position: seen.append(x) or n[None])
    sigma = schedule.sigma[7]
    found = EpsDenoiser({}, schedule, None)(x0 + sigma * n, sigma)
    np.testing.assert_allclose(found, x0, atol=1e-5)
    bar = schedule.alpha_bar[7]
    np.testing.assert_allclose(seen[0][0], jnp.sqrt(bar) * x0 + jnp.sqrt(1 - bar) * n, atol=1e-5)
