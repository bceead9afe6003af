"""Denoising errors by level: the Gaussian's are those of theory, a silent network has the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_repaint import guide, levels
from jax_repaint.data.fields import Fields, crop
from jax_repaint.errors import InputError
from jax_repaint.nets import unet
from tests import tiny

SIGMAS = np.array([0.1, 1.0, 10.0])


@pytest.fixture(scope="module")
def trained():
    """An anchored model whose network is silent."""
    made = tiny.model("anchored")
    network = dataclasses.replace(made.network, zero_output=True)
    params = jax.tree.map(np.asarray, unet.create(network, 0)[1])
    return dataclasses.replace(made, network=network, params=params)


@pytest.fixture(scope="module")
def drawn(trained):
    """120 frames of the model's own linear prior, in m/s."""
    keys = jax.random.split(jax.random.key(0), 120)
    x = jax.jit(jax.vmap(lambda key: guide.prior_draw(trained.gaussian, key)))(keys)
    velocity = trained.standardiser.restore(np.asarray(crop(x, trained.ocean.shape)))
    velocity = np.where(trained.ocean[..., None], velocity, np.nan)
    time = np.datetime64("2020-01-01", "ns") + np.arange(120) * np.timedelta64(1, "h")
    return Fields.create(velocity, trained.lat, trained.lon, time, ocean=trained.ocean, name="drawn")


@pytest.mark.parametrize("pattern", ["", "cells:0.1"])
def test_errors_are_those_of_theory(trained, drawn, pattern):
    errors = levels.denoising_errors(trained, drawn, np.arange(120), SIGMAS, pattern)
    assert errors.shape == (120, 3, 2)
    np.testing.assert_allclose(errors[..., 0], errors[..., 1], rtol=1e-4)
    expected = [float(trained.gaussian.residual_variance(jnp.float32(sigma))) for sigma in SIGMAS]
    found = errors[..., 1].mean(0)
    if not pattern:
        np.testing.assert_allclose(found, expected, rtol=0.1)
    else:
        # The more noise, the more the observations say.
        gain = found / expected
        assert gain[0] > gain[1] > gain[2]
        assert gain[2] < 0.8
    rows = levels.table(errors, SIGMAS)
    np.testing.assert_allclose(rows["ratio"], 1, rtol=1e-4)
    np.testing.assert_allclose(rows["gaussian"], found, rtol=1e-5)


def test_levels_beyond_training_are_refused(trained, drawn):
    with pytest.raises(InputError, match=r"trained for noise from 0.01 to 130, not for 200"):
        levels.denoising_errors(trained, drawn, np.arange(120), np.array([1.0, 200.0]))
