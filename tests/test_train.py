"""Losses, steps and schedules of training against formulas; whole tiny runs that are killed, stopped and refused."""

import dataclasses
import functools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pandas as pd
import pytest
import tiny
from scipy import stats

from jax_repaint import demo, model, observe, prepare, train
from jax_repaint.checkpoint import Checkpoints, claim, holds_run
from jax_repaint.data import fields as fields_lib
from jax_repaint.errors import InputError
from jax_repaint.nets import unet
from jax_repaint.optimise import (
    Plan,
    State,
    level_at,
    make_held_out,
    make_loss,
    make_optimiser,
    make_places,
    make_steps,
    plan,
)
from jax_repaint.prepare import fit_priors
from jax_repaint.prior import gp, linear
from jax_repaint.schedule import Schedule
from jax_repaint.settings import check_config, network_config, sigma_range


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    tiny.compile_once(folder)
    with pytest.MonkeyPatch.context() as patch:
        tiny.register(patch)
        yield folder
    tiny.compile_as_usual()


@pytest.fixture(scope="module")
def standardised():
    """Frames as the network sees them, and their ocean."""
    data = tiny.fields()
    return fields_lib.prepare(data, fields_lib.Standardiser.from_fields(data), tiny.NETWORK.multiple)


@pytest.fixture(scope="module")
def gaussian(standardised):
    return linear.fit(*standardised, rank=8)


# Losses


def make_network(config):
    return unet.create(network_config(config), 0)


def make_predict(graphdef, params):
    return jax.jit(lambda x, position: unet.apply(graphdef, params, x[None], position[None], None)[0])


def noisy(x0, key, sigma):
    return x0 + sigma * jax.random.normal(jax.random.split(key)[0], x0.shape)


@pytest.mark.parametrize("ocean_only", [True, False])
def test_eps_loss_is_the_error_of_the_predicted_noise(standardised, gaussian, ocean_only):
    config = tiny.config("eps", ocean_only=ocean_only)
    graphdef, params = make_network(config)
    x0, key = jnp.asarray(standardised[0][3]), jax.random.key(5)
    cells = standardised[1] if ocean_only else np.ones_like(standardised[1])
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 250))
    loss = jax.jit(make_loss(config, gaussian, graphdef), static_argnums=4)
    predict = make_predict(graphdef, params)
    for place, t in ((0.0, 0), (0.5001, 125), (1.0, 249)):
        eps = np.asarray(noisy(jnp.zeros_like(x0), key, 1.0))
        x_t = np.sqrt(alpha_bar[t]) * x0 + np.sqrt(1 - alpha_bar[t]) * eps
        error = np.asarray(predict(jnp.asarray(x_t, jnp.float32), jnp.float32(t))) - eps
        got = loss(params, x0, key, jnp.float32(place), False)
        np.testing.assert_allclose(got, np.mean(error[cells] ** 2), rtol=2e-3)


def test_edm_loss_is_that_of_a_network_of_unit_target(standardised, gaussian):
    # lambda c_out^2 = 1: the loss is |F - (x0 - c_skip x) / c_out|^2 (Karras et al. 2022, eq. 8).
    config = tiny.config("edm")
    graphdef, params = make_network(config)
    x0, key, ocean = jnp.asarray(standardised[0][3]), jax.random.key(5), standardised[1]
    loss = jax.jit(make_loss(config, gaussian, graphdef), static_argnums=4)
    predict = make_predict(graphdef, params)
    for place in (0.1, 0.5, 0.9):
        sigma = 0.01 * (130 / 0.01) ** place
        x = np.asarray(noisy(x0, key, sigma)) * ocean[..., None]
        position = 1000 * (np.log(sigma) - np.log(1e-3)) / np.log(1e6)
        f = predict(jnp.asarray(x / np.sqrt(1 + sigma**2), jnp.float32), jnp.float32(position))
        target = (np.asarray(x0) - x / (1 + sigma**2)) / (sigma / np.sqrt(1 + sigma**2))
        expected = np.mean((np.asarray(f) - target)[ocean] ** 2)
        np.testing.assert_allclose(loss(params, x0, key, jnp.float32(place), False), expected, rtol=2e-3)


def test_anchored_loss_of_an_untrained_network_is_one_on_its_own_gaussian(standardised, gaussian):
    config = tiny.config("anchored")
    graphdef, params = make_network(config)
    n, ocean = 400, standardised[1]
    rng = np.random.default_rng(0)
    z = rng.standard_normal((n, *ocean.shape, 2)) * ocean[..., None]
    gaussian = gaussian.replace(mean=gaussian.mean + 1.0 * gaussian.ocean)
    along = np.einsum("ryxc,nyxc->nr", gaussian.direction, z)
    excess = np.sqrt(gaussian.variance) - np.sqrt(gaussian.rest)
    x0 = float(jnp.sqrt(gaussian.rest)) * z + np.einsum("nr,r,ryxc->nyxc", along, excess, gaussian.direction)
    x0 = jnp.asarray(x0 + np.asarray(gaussian.mean), jnp.float32)
    keys = jax.random.split(jax.random.key(0), n)
    places = make_places(jax.random.key(1), n, True)

    def losses(graphdef):
        loss = make_loss(config, gaussian, graphdef)
        # A loop instead of a batch keeps the convolutions of 400 frames small.
        return jax.jit(lambda: jax.lax.map(lambda a: loss(params, *a, False), (x0, keys, places), batch_size=100))()

    got = losses(graphdef)
    np.testing.assert_allclose(got.mean(), 1, atol=4 * float(got.std()) / np.sqrt(n))
    assert got.std() / np.sqrt(n) < 0.02
    np.testing.assert_allclose(losses(None), got, rtol=1e-4)


@pytest.mark.parametrize("form", ["eps", "edm", "anchored", "conditional"])
def test_a_loss_uses_no_key_twice(standardised, gaussian, monkeypatch, form):
    used = []

    def watched(function):
        def run(key, *arguments, **options):
            used.append(tuple(jax.random.key_data(key).tolist()))
            return function(key, *arguments, **options)

        return run

    config = tiny.config(form)
    config.observed.patterns, config.observed.rows = 8, 4
    loss = make_loss(config, gaussian, None)
    for name in ("normal", "uniform", "randint", "split"):
        monkeypatch.setattr(jax.random, name, watched(getattr(jax.random, name)))
    loss({}, jnp.asarray(standardised[0][0]), jax.random.key(0), jnp.float32(0.5), True)
    assert len(used) == len(set(used)) == (5 if form == "conditional" else 2)


@pytest.mark.parametrize("form", ["eps", "edm", "anchored", "conditional"])
def test_a_network_drops_units_in_training_alone_by_a_key_of_its_own(standardised, gaussian, monkeypatch, form):
    given, drawn, normal = [], [], jax.random.normal

    def network(graphdef, params, x, position, dropout):
        given.append(dropout)
        return jnp.zeros((*x.shape[:-1], 2))

    config = tiny.config(form)
    config.observed.patterns, config.observed.rows = 8, 4
    loss = make_loss(config, gaussian, object())
    monkeypatch.setattr(unet, "apply", network)
    monkeypatch.setattr(jax.random, "normal", lambda key, *rest: drawn.append(key) or normal(key, *rest))
    for training in (True, False):
        loss({}, jnp.asarray(standardised[0][0]), jax.random.key(0), jnp.float32(0.5), training)
    dropped, scored = given
    assert scored is None
    assert drawn
    assert not any((jax.random.key_data(dropped) == jax.random.key_data(key)).all() for key in drawn)


def test_a_prior_says_how_much_of_it_is_from_training_frames():
    """Where six frames are all there is, a blend with the fitted kernel is best."""
    data = tiny.fields(40)
    standardiser = fields_lib.Standardiser.from_fields(data)
    x, ocean = fields_lib.prepare(data, standardiser, tiny.NETWORK.multiple)
    few = data.select(np.arange(6))
    config = tiny.config("anchored")
    config.model.update({"rank": 8, "gp_steps": 100})
    gaussian, kernel, choice = fit_priors(few, x[:6], x[10:], ocean, config, standardiser)
    assert choice.share < 1
    root = gp.prior_root(kernel, data.ocean, data.places()).rows(standardiser.std)
    expected = linear.truncate(
        linear.fit(x[:6], ocean, 8, share=choice.share, kernel_root=root), choice.rank, choice.rest
    )
    for ours, theirs in zip(jax.tree.leaves(gaussian), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_a_prior_is_chosen_for_the_patterns_of_the_setting():
    """Few directions can be told apart from few cells, many from nearly all; of frames that had no part in it too."""
    data, errors = tiny.fields(160), []
    found = {patterns: prepared(patterns) for patterns in ("", "gaps:0.3")}
    few, many = (one.gaussian for one in found.values())
    assert few.variance.size < 32 < many.variance.size
    split, standardiser = found[""].split, found[""].standardiser
    x, ocean = fields_lib.prepare(data.select(split.test), standardiser, tiny.NETWORK.multiple)
    wet = np.flatnonzero(np.repeat(ocean.reshape(-1), 2))
    flat = x.reshape(len(x), -1)[:, wet].astype(float)
    seen = np.repeat(np.random.default_rng(0).random(wet.size // 2) < 0.7, 2)
    for prior in (few, many):
        e = np.asarray(prior.direction, float).reshape(len(prior.direction), -1)[:, wet]
        rest, mean = float(prior.rest), np.asarray(prior.mean, float).reshape(-1)[wet]
        covariance = (e.T * (np.asarray(prior.variance, float) - rest)) @ e + rest * np.eye(wet.size)
        gain = np.linalg.solve(covariance[seen][:, seen] + 1e-4 * np.eye(seen.sum()), covariance[seen]).T
        errors.append(np.mean((mean + (flat[:, seen] - mean[seen]) @ gain.T - flat)[:, ~seen] ** 2))
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize(
    ("error", "fewest", "patterns"), [(1.0, 0.01, "gaps:0.3"), (0.01, 30.0, "gaps:0.3"), (1.0, 30.0, "")]
)
def test_a_prior_has_no_more_directions_than_observations_tell_apart(monkeypatch, error, fewest, patterns):
    """Fewer where errors hide small scales, or where more gain little; the usual patterns know nothing of either."""
    usual, config = prepared(patterns).choice, with_patterns(patterns)
    config.observed.error = error
    monkeypatch.setattr(prepare, "FEWEST", fewest)
    found = prepare.prepare(tiny.fields(160), config).choice
    assert found == usual if not patterns else found.rank < usual.rank


@functools.cache
def prepared(patterns):
    return prepare.prepare(tiny.fields(160), with_patterns(patterns))


def with_patterns(patterns):
    config = tiny.config("anchored")
    config.model.update({"rank": 64, "patterns": patterns})
    config.observed.error = 0.01
    return config


def test_patterns_that_cannot_be_drawn_are_refused_before_the_work():
    with pytest.raises(InputError, match=r"'gap:0\.3' is not one of line:ROW"):
        prepare.prepare(tiny.fields(), with_patterns("line:4,gap:0.3"))


def test_places_are_stratified_or_uniform():
    places = np.sort(make_places(jax.random.key(0), 64, True))
    assert (np.floor(places * 64) == np.arange(64)).all()
    assert make_places(jax.random.key(0), 64, False).min() >= 0


def test_focus_draws_its_share_of_levels_from_its_range_and_the_others_evenly():
    config = tiny.config("anchored", focus=0.6, focus_min=0.5, focus_max=8.0)
    places = make_places(jax.random.key(0), 100_000, True)
    sigma = np.asarray(jax.vmap(lambda place: level_at(place, config))(places))
    assert sigma.min() >= 0.01 * (1 - 1e-5)
    assert sigma.max() <= 130 * (1 + 1e-5)
    even = stats.loguniform(0.01, 130)
    focussed = stats.loguniform(0.5, 8.0)
    for level in (0.02, 0.3, 0.5, 1.0, 3.0, 8.0, 20.0, 100.0):
        expected = 0.4 * even.cdf(level) + 0.6 * focussed.cdf(level)
        np.testing.assert_allclose((sigma <= level).mean(), expected, atol=1e-3)
    without = tiny.config("anchored")
    sigma = np.asarray(jax.vmap(lambda place: level_at(place, without))(places))
    np.testing.assert_allclose(np.quantile(sigma, [0.1, 0.5, 0.9]), even.ppf([0.1, 0.5, 0.9]), rtol=1e-3)


@pytest.mark.parametrize("form", ["anchored", "conditional", "edm"])
def test_focus_moves_the_level_of_a_place_and_nothing_else(form, standardised, gaussian):
    x0, key = jnp.asarray(standardised[0][3]), jax.random.key(5)
    focussed, even = tiny.config(form, focus=0.6, focus_min=0.5, focus_max=8.0), tiny.config(form)
    for config in (focussed, even):
        config.observed.patterns, config.observed.rows = 8, 4
    losses = [jax.jit(make_loss(config, gaussian, None), static_argnums=4) for config in (focussed, even)]
    for place in (0.1, 0.5, 0.95):
        same = np.log(float(level_at(jnp.float32(place), focussed)) / 0.01) / np.log(130 / 0.01)
        assert abs(same - place) > 0.01
        got, expected = (
            float(loss({}, x0, key, jnp.float32(at), False)) for loss, at in zip(losses, (place, same), strict=True)
        )
        np.testing.assert_allclose(got, expected, rtol=1e-3)


# Steps, with a loss simple enough to follow by hand


def run_steps(config, loss, params, data, optimiser, dispatches, ocean=None, standardiser=None):
    """States after every dispatch."""
    steps = plan(len(data), config)
    state = State(
        params, params, optimiser.init(params), jnp.int32(0), jnp.zeros(2), jnp.float32(jnp.inf)
    )  # fmt: skip
    state = jax.tree.map(jnp.array, state)
    ocean = jnp.ones((*data.shape[1:3], 1)) if ocean is None else ocean
    dispatch = make_steps(config, loss, optimiser, steps, ocean, standardiser=standardiser)
    states = []
    for _ in range(dispatches):
        state, losses = dispatch(state, jnp.asarray(data))
        states.append(jax.tree.map(np.array, (state, losses)))
    return states


def count_frames(params, x0, key, place, training):
    assert training
    return params[x0[0, 0, 0].astype(jnp.int32)]


def test_an_epoch_sees_every_frame_once_in_an_order_of_its_own():
    config = tiny.config(batch=4, accumulate=1, dispatch=3)
    data = np.zeros((41, 1, 1, 2), np.float32) + np.arange(41, dtype=np.float32)[:, None, None, None]
    assert plan(41, config) == (9, 3, 27)
    states = run_steps(config, count_frames, jnp.zeros(41), data, optax.sgd(1.0), 6)
    first, both = (-4 * states[i][0].params for i in (2, 5))
    assert sorted(first) == [0] * 5 + [1] * 36
    assert sorted(both - first) == [0] * 5 + [1] * 36
    assert not np.array_equal(first, both - first)


def noisy_loss(params, x0, key, place, training):
    target = x0 + place * jax.random.normal(key, x0.shape)
    return jnp.mean((params["w"] - target) ** 2) + jnp.sum(params["b"] ** 4)


WEIGHTS = {"w": np.ones((2, 3, 2), np.float32), "b": np.ones(2, np.float32)}


@pytest.fixture(scope="module")
def noise_frames():
    return np.random.default_rng(0).standard_normal((41, 2, 3, 2)).astype(np.float32)


def test_accumulated_batches_step_as_one_large_batch(noise_frames):
    def still(params, x0, key, place, training):
        return jnp.mean((params["w"] - x0) ** 2)

    large, parts = tiny.config(batch=8, dispatch=2), tiny.config(batch=4, accumulate=2, dispatch=2)
    optimiser, _ = make_optimiser(large, plan(41, large))
    one = run_steps(large, still, WEIGHTS, noise_frames, optimiser, 3)[-1]
    two = run_steps(parts, still, WEIGHTS, noise_frames, optimiser, 3)[-1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), one, two)
    assert not np.allclose(one[0].params["w"], WEIGHTS["w"], atol=1e-4)


def test_one_loop_on_the_device_equals_steps_from_python(noise_frames, monkeypatch):
    config = tiny.config("edm", batch=4, accumulate=2, dispatch=4)
    optimiser, _ = make_optimiser(config, plan(41, config))
    loop = run_steps(config, noisy_loss, WEIGHTS, noise_frames, optimiser, 3)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    scan = run_steps(config, noisy_loss, WEIGHTS, noise_frames, optimiser, 3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), loop, scan)


def test_ema_follows_with_a_growing_memory(noise_frames):
    config = tiny.config(dispatch=1, ema=0.3)
    states = [s for s, _ in run_steps(config, noisy_loss, WEIGHTS, noise_frames, optax.sgd(0.1), 6)]
    expected = WEIGHTS["w"]
    for n, state in enumerate(states):
        decay = min(0.3, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * state.params["w"]
        np.testing.assert_allclose(state.ema["w"], expected, rtol=1e-6)
    # 0.1, 2/11, 3/12, then the limit of 0.3 from the fourth step on.
    assert (1 + 3) / (10 + 3) > 0.3 > (1 + 2) / (10 + 2)


@pytest.mark.parametrize(
    ("frames", "batch", "seen"), [(11928, 256, 46), (11928, 128, 92), (11928, 64, 175), (10884, 32, 325), (41, 4, 10)]
)
def test_an_epoch_sees_nearly_every_frame_however_large_the_batch(frames, batch, seen):
    config = tiny.config(batch=batch, dispatch=25, epochs=3)
    steps = plan(frames, config)
    assert steps.dispatch <= 25
    assert steps.epoch % steps.dispatch == 0
    assert (steps.epoch, steps.total) == (seen, 3 * seen)
    assert steps.epoch * batch > 0.85 * frames


@pytest.mark.parametrize(("epochs", "warmup"), [(1, 0.95), (2, 1.95), (1, 0.0)])
def test_any_warm_up_leaves_a_step_to_the_cosine(epochs, warmup):
    config = tiny.config(epochs=epochs, warmup_epochs=warmup)
    check_config(config)
    _, rate = make_optimiser(config, Plan(9, 3, 9 * epochs))
    assert float(rate(9.0 * epochs)) == pytest.approx(0, abs=1e-9)


def test_learning_rate_warms_up_and_falls_to_zero():
    config = tiny.config(epochs=10, warmup_epochs=2.5, learning_rate=4e-4)
    _, rate = make_optimiser(config, Plan(100, 10, 1000))
    at = [float(rate(float(n))) for n in (0, 125, 250, 625, 1000)]
    np.testing.assert_allclose(at, [4e-7, (4e-7 + 4e-4) / 2, 4e-4, 2e-4, 0], rtol=1e-5, atol=1e-12)


def test_first_step_is_clipped_adam_with_decoupled_decay():
    config = tiny.config(epochs=10, learning_rate=1.0, weight_decay=0.5, clip=1e-3)
    optimiser, _ = make_optimiser(config, Plan(100, 10, 1000))
    params, gradient = jnp.array([2.0, -3.0]), jnp.array([3.0, -4.0])
    with jax.numpy_dtype_promotion("standard"):
        update, _ = optimiser.update(gradient, optimiser.init(params), params)
    clipped = np.array([3e-3, -4e-3]) / 5
    np.testing.assert_allclose(update, -1e-3 * (clipped / (abs(clipped) + 1e-8) + 0.5 * params), rtol=1e-4)


@pytest.mark.parametrize("mean", [(0.0, 0.0), (-0.06, 0.03)])
def test_flips_mirror_the_component_across_and_keep_land(standardised, mean):
    x0, ocean = standardised[0][:1], standardised[1][..., None]
    scale = fields_lib.Standardiser.create(mean, (0.14, 0.09))
    # Land of an imported model is at rest, of others 0; neither moves.
    x0 = np.where(ocean, x0, np.float32(0.7) if mean[0] else np.float32(0))

    def show(params, x0, key, place, training):
        return jnp.sum(params * x0)

    config = tiny.config(batch=1, dispatch=1, flips=True)
    zero = jnp.zeros(x0.shape[1:])
    states = [
        zero,
        *(s.params for s, _ in run_steps(config, show, zero, x0, optax.sgd(1.0), 24, jnp.asarray(ocean * 1.0), scale)),
    ]
    shown = -np.diff(np.stack(states), axis=0)
    # Currents in m/s turn round, not their anomalies.
    current = scale.restore(x0[0])
    signs = np.array([-1, 1], np.float32), np.array([1, -1], np.float32)
    turned = [current, current[:, ::-1] * signs[0], current[::-1] * signs[1], -current[::-1, ::-1]]
    variants = np.where(ocean, (np.stack(turned) - scale.mean) / scale.std, x0[0])
    near = np.abs(shown[:, None] - variants).max((2, 3, 4)) < 1e-4
    assert (near.sum(1) == 1).all()
    assert near.any(0).all()
    np.testing.assert_allclose(shown[:, ~ocean[..., 0]], x0[0, 0, 0, 0], atol=1e-6)


def test_mirrors_need_rows_that_run_east():
    flow = tiny.fields()
    lat, lon = np.meshgrid(flow.lat, flow.lon, indexing="ij")
    slanted = fields_lib.Fields.create(flow.velocity, lat + 0.002 * np.arange(12), lon, flow.time, name="slanted.nc")
    with pytest.raises(InputError, match=r"slanted\.nc: mirrored frames .* needs a grid whose rows run east"):
        prepare.prepare(slanted, tiny.config(flips=True))


@pytest.mark.parametrize("frames", [0, 5])
def test_held_out_loss_is_fixed_and_knows_no_batches(noise_frames, frames):
    def loss(params, x0, key, place, training):
        assert not training
        return noisy_loss(params, x0, key, place, training)

    by_batch = []
    for batch in (1, 4, 7, 100):
        held_out = make_held_out(tiny.config(batch=batch, held_out=frames), loss, noise_frames[:11])
        by_batch.append(float(held_out(WEIGHTS)))
        assert by_batch[-1] == float(held_out(WEIGHTS))
    np.testing.assert_allclose(by_batch, by_batch[0], rtol=1e-6)
    other = make_held_out(tiny.config(seed=1, held_out=frames), loss, noise_frames[:11])
    assert float(other(WEIGHTS)) != by_batch[0]


def test_no_two_frames_parts_or_steps_share_a_draw(noise_frames):
    def loss(params, x0, key, place, training):
        # Of a frame that carries its number, under gradient descent of rate 1: the weight takes the draw.
        return -params[x0[0, 0, 0].astype(jnp.int32)] * jax.random.normal(key, ())

    frames = jnp.broadcast_to(jnp.arange(12.0)[:, None, None, None], noise_frames[:12].shape)
    config = tiny.config(batch=3, accumulate=2, dispatch=2)
    steps = plan(12, config)
    dispatch = make_steps(config, loss, optax.sgd(1.0), steps, jnp.ones((*noise_frames.shape[1:3], 1)))
    state = State(
        jnp.zeros(12), jnp.zeros(12), optax.sgd(1.0).init(jnp.zeros(12)), jnp.int32(0), jnp.zeros(2), jnp.float32(0)
    )
    drawn = []
    for _ in range(2):
        before = np.array(state.params)
        state, _ = dispatch(state, frames)
        drawn += (np.asarray(state.params) - before).tolist()
    assert len(set(np.round(drawn, 6))) == 24
    assert np.std(drawn) * 6 == pytest.approx(1, abs=0.5)


@pytest.mark.parametrize(("form", "even"), [("edm", True), ("eps", False)])
def test_a_batch_has_a_level_in_each_part_of_the_range_unless_levels_are_steps(noise_frames, form, even):
    def loss(params, x0, key, place, training):
        return -params[(4 * place).astype(jnp.int32)]

    config = tiny.config(form, batch=4, dispatch=9)
    (state, _), *_ = run_steps(config, loss, jnp.zeros(4), noise_frames, optax.sgd(1.0), 1)
    assert (state.params == 9 / 4).all() == even


def test_another_seed_is_another_order_and_other_noise(noise_frames):
    def order(params, x0, key, place, training):
        return jnp.sum(params * x0)

    for loss in (order, lambda params, x0, key, place, training: jnp.sum(params * jax.random.normal(key, x0.shape))):
        made = [
            run_steps(tiny.config(seed=seed, dispatch=1), loss, 0 * noise_frames[0], noise_frames, optax.sgd(1.0), 1)
            for seed in (0, 1)
        ]
        assert np.abs(made[0][0][0].params - made[1][0][0].params).max() > 0.1


def test_an_epoch_adds_up_losses_and_lengths_of_gradients(noise_frames):
    def slope(params, x0, key, place, training):
        return 3 * params[0] + 4 * params[1]

    states = run_steps(tiny.config(dispatch=3), slope, jnp.ones(2), noise_frames, optax.sgd(0.0), 3)
    np.testing.assert_allclose(states[-1][0].sums, (9 * 7, 9 * 5), rtol=1e-6)


def test_a_few_held_out_frames_are_from_all_of_them(noise_frames):
    frames = jnp.broadcast_to(jnp.arange(11.0)[:, None, None, None], noise_frames[:11].shape)
    held_out = make_held_out(tiny.config(held_out=3), lambda params, x0, *_: params + x0[0, 0, 0], frames)
    assert float(held_out(jnp.float32(0))) == (0 + 5 + 10) / 3


def test_a_gradient_that_is_not_finite_shows_in_the_loss_of_its_own_step(noise_frames):
    """The root of zero is a number, its slope is none."""
    config = tiny.config(batch=3, dispatch=2)
    steps, ocean = plan(12, config), jnp.ones((*noise_frames.shape[1:3], 1))
    dispatch = make_steps(config, lambda params, *_: jnp.sqrt(0 * params.sum()), optax.sgd(1.0), steps, ocean)
    one = jnp.ones(2)
    state = State(one, one + 0, optax.sgd(1.0).init(one), jnp.int32(0), jnp.zeros(2), jnp.float32(0))
    _, losses = dispatch(state, noise_frames[:12])
    assert not np.isfinite(losses).any()


def test_held_out_noise_and_levels_have_nothing_to_do_with_each_other(noise_frames):
    heard = []

    def loss(params, x0, key, place, training):
        jax.debug.callback(
            lambda *numbers: heard.append([float(n) for n in numbers]), place, jax.random.normal(key, ())
        )
        return place

    frames = jnp.broadcast_to(noise_frames[:1], (200, *noise_frames.shape[1:]))
    mean = float(make_held_out(tiny.config(batch=10), loss, frames)({}))
    jax.effects_barrier()
    place, noise = np.transpose(heard)
    assert mean == pytest.approx(0.5)
    np.testing.assert_allclose(np.sort(place), (np.arange(200) + 0.5) / 200, rtol=1e-5)
    assert len(set(noise)) == 200
    for other in (noise, np.arange(200)):
        assert abs(np.corrcoef(place, other)[0, 1]) < 0.2


# Configurations


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model.network", "unet", "not one of"),
        ("model.form", "v", "not one of"),
        ("model.dtype", "float64", "float32 or bfloat16"),
        ("model.rank", 0, "rank"),
        ("model.gp_steps", 0, "gp_steps"),
        ("model.patterns", "line:4,gap:0.3", r"'gap:0\.3' is not one of line:ROW"),
        ("train.batch", 0, "at least 1"),
        ("train.score_every", 0, "at least 1"),
        ("train.learning_rate", 0.0, "positive"),
        ("train.learning_rate", float("nan"), "positive"),
        ("train.weight_decay", -1.0, "negative"),
        ("train.ema", 1.0, "ema"),
        ("train.warmup_epochs", 3.0, "less than train.epochs"),
        ("noise.sigma_min", 200.0, "sigma_min < sigma_max"),
        ("noise.sigma_min", 1e-30, "sigma_min < sigma_max"),
        ("train.focus", 1.0, "train.focus must be in"),
        ("train.focus", 0.5, "must be 0 for model.form eps"),
        ("noise.max_beta", 1.5, "beta"),
        ("noise.max_beta", 0.9, "float32 loses the"),
        ("noise.min_beta", 1e-9, "float32 loses the"),
        ("noise.sigma_max", 1e20, "<= 1e\\+06"),
        ("train.seed", -1, "seed must be in"),
        ("train.seed", 2**33, "seed must be in"),
        ("train.learning_rate", float("inf"), "finite"),
        ("train.weight_decay", float("inf"), "infinite"),
        ("observed.rows", 2, "observed.rows must be at least 4"),
        ("observed.error", float("inf"), "finite"),
        ("noise.steps", 0, "2 to 1,000,000 steps, got 0"),
    ],
)
def test_values_that_cannot_work_are_refused(name, value, words):
    config = tiny.config()
    config.update_from_flattened_dict({name: value})
    with pytest.raises(InputError, match=words):
        check_config(config)


def test_two_ways_to_split_are_refused():
    config = tiny.config()
    config.data.block_split = True
    check_config(config)
    config.data.validation = "50:55"
    with pytest.raises(InputError, match=r"data\.block_split makes parts of its own; leave data\.validation out"):
        check_config(config)


@pytest.mark.parametrize("focus_range", [(8.0, 0.5), (0.001, 8.0), (0.5, 200.0), (float("nan"), 8.0)])
def test_a_focus_outside_of_the_noise_is_refused(focus_range):
    low, high = focus_range
    with pytest.raises(InputError, match=r"must lie in 0.01 to 130.0, .* got"):
        check_config(tiny.config("anchored", focus=0.5, focus_min=low, focus_max=high))
    check_config(tiny.config("anchored", focus_min=low, focus_max=high))


def test_sigma_range_is_that_of_the_steps_or_of_the_settings():
    schedule = Schedule.linear(250, 1e-4, 0.02)
    np.testing.assert_allclose(sigma_range(tiny.config("eps")), (schedule.sigma[0], schedule.sigma[-1]))
    assert sigma_range(tiny.config("edm")) == (0.01, 130.0)


# Whole runs


class Halt(Exception):
    """Ends a run from within."""


def hook(patch, before):
    """Calls before(number, state, data) in front of every dispatch; what it returns takes the place of the data."""
    usual = train.make_steps

    def hooked(*args):
        dispatch, number = usual(*args), iter(range(10**6))

        def run(state, data):
            given = before(next(number), state, data)
            return dispatch(state, data if given is None else given)

        return run

    patch.setattr(train, "make_steps", hooked)


def run(workdir, fields=None, **settings):
    return train.train(tiny.config(**settings), workdir, fields or tiny.fields(), progress=False)


def states(workdir, step=None):
    """Every array of a checkpoint, by default the latest."""
    with ocp.CheckpointManager(Path(workdir) / "checkpoints" / "last") as manager:
        step = manager.latest_step() if step is None else step
        tree = ocp.StandardCheckpointer().restore(Path(workdir) / "checkpoints" / "last" / str(step) / "default")
    return step, jax.tree.map(np.asarray, tree)


def assert_same_run(workdir, other):
    (step, mine), (other_step, theirs) = states(workdir), states(other)
    assert step == other_step
    assert mine.keys() == theirs.keys()
    assert len(mine) > 100
    for name in mine:
        assert np.array_equal(mine[name], theirs[name]), name
    first, second = (
        pd.read_csv(Path(w) / "log.csv").drop(columns=["seconds", "frames_per_second"]) for w in (workdir, other)
    )
    pd.testing.assert_frame_equal(first, second)
    pairs = zip(*(jax.tree.leaves(model.load(Path(w) / "model").params) for w in (workdir, other)), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


@pytest.fixture(scope="module")
def finished(cache, tmp_path_factory):
    """A run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    run(workdir)
    return workdir


def test_a_run_writes_its_log_and_its_best_model(finished):
    log = pd.read_csv(finished / "log.csv")
    assert log.step.tolist() == [9, 18, 27]
    assert (finished / "loss.png").stat().st_size > 1000
    trained = model.load(finished / "model")
    np.testing.assert_allclose(trained.training["held_out_loss"], log.ema_held_out_loss.min(), rtol=1e-5)
    assert trained.training["step"] == log.step[log.ema_held_out_loss.idxmin()]
    assert trained.training["fingerprint"] == tiny.fields().hash()
    ends = tiny.fields().time[[0, trained.training["parts"]["validation"][1] - 1]]
    np.testing.assert_array_equal(np.array(trained.training["time"], "datetime64[ns]"), ends)
    assert run(finished).training == trained.training


def test_without_a_terminal_every_epoch_is_a_line(finished, tmp_path, caplog):
    log = pd.read_csv(finished / "log.csv").to_dict("records")
    caplog.set_level("INFO")
    for words in (False, True):
        writer = train.Log(tmp_path, 0, False, 1.0, words)
        for row in log:
            writer.add(row)
        assert caplog.text.count("training loss") == 3 * words
    assert f"epoch 3: training loss {log[2]['train_loss']:.4g}, held out {log[2]['held_out_loss']:.4g}" in caplog.text


def test_a_run_is_the_same_however_seldom_it_is_scored(finished, tmp_path):
    run(tmp_path / "run", score_every=2)
    often, seldom = (pd.read_csv(workdir / "log.csv").set_index("step") for workdir in (finished, tmp_path / "run"))
    assert seldom.index.tolist() == [18, 27]
    same = ["epoch", "held_out_loss", "ema_held_out_loss", "learning_rate"]
    pd.testing.assert_frame_equal(seldom[same], often.loc[seldom.index, same])
    for mean in ("train_loss", "gradient_norm"):
        np.testing.assert_allclose(seldom[mean], [often[mean][:2].mean(), often[mean][27]], rtol=1e-5)


KILLED = """
import os, pathlib, signal, sys
sys.path.insert(0, sys.argv[1])
import pytest, jax, conftest, test_train, tiny
from jax_repaint import train
tiny.compile_once(pathlib.Path(sys.argv[2]))
patch = pytest.MonkeyPatch()
tiny.register(patch)
steps = train.make_steps
def make_steps(*args):
    dispatch, calls = steps(*args), []
    def run(state, data):
        state = dispatch(state, data)
        calls.append(0)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return state
    return run
train.make_steps = make_steps
test_train.run(sys.argv[3], save_minutes=0.0)
"""


def test_a_killed_run_continues_bit_for_bit(finished, cache, tmp_path):
    workdir = tmp_path / "run"
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(cache), str(workdir)]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    # Four of five dispatches were saved, the last of them in the middle of the second epoch.
    assert states(workdir)[0] == 12
    run(workdir)
    assert_same_run(workdir, finished)


def test_sigterm_saves_and_says_so(finished, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    monkeypatch.setattr(train, "FLAGS", SimpleNamespace(config=tiny.config(), workdir=str(workdir)))
    monkeypatch.setattr(train, "load_fields", lambda *_: tiny.fields())
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        hook(patch, lambda number, *_: signal.raise_signal(signal.SIGTERM) if number == 4 else None)
        with pytest.raises(SystemExit) as stopped:
            train.main(None)
    assert stopped.value.code == 143
    assert "the same command continues" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before
    assert states(workdir)[0] == 15
    train.main(None)
    assert "lowest held-out loss" in capsys.readouterr().out
    assert_same_run(workdir, finished)


def test_an_interrupted_run_saves_its_state_and_a_second_time_ends_at_once(finished, tmp_path, monkeypatch):
    workdir, before = tmp_path / "run", signal.default_int_handler
    outside = signal.signal(signal.SIGINT, before)
    with monkeypatch.context() as patch:
        hook(patch, lambda number, *_: signal.raise_signal(signal.SIGINT) if number == 4 else None)
        with pytest.raises(KeyboardInterrupt):
            run(workdir)
    assert states(workdir)[0] == 15

    def twice(number, *_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        hook(patch, twice)
        with pytest.raises(KeyboardInterrupt):
            run(workdir)
    assert signal.getsignal(signal.SIGINT) is before
    # Nothing was saved of what the second time cut short.
    assert states(workdir)[0] == 15
    # As in the background of a shell.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with train.Stop() as stop:
        signal.raise_signal(signal.SIGINT)
    assert not stop.asked
    signal.signal(signal.SIGINT, outside)
    run(workdir)
    assert_same_run(workdir, finished)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_state_before(finished, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        hook(patch, lambda number, state, data: data * np.nan if number == 4 else None)
        with pytest.raises(train.Diverged, match="at step 12; the state of step 9 is in"):
            run(workdir)
    assert states(workdir)[0] == 9
    run(workdir)
    assert_same_run(workdir, finished)


def test_a_huge_learning_rate_ends_with_one_line(tmp_path, monkeypatch, capsys):
    flags = SimpleNamespace(config=tiny.config(learning_rate=1e20), workdir=str(tmp_path / "run"))
    monkeypatch.setattr(train, "FLAGS", flags)
    monkeypatch.setattr(train, "load_fields", lambda *_: tiny.fields())
    with pytest.raises(SystemExit) as ended:
        train.main(None)
    assert ended.value.code == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1
    assert "no state was saved before" in error[0]
    # The advice can be followed in the same place.
    flags.config.train.learning_rate = 1e-3
    flags.config.train.epochs = 1
    flags.config.train.warmup_epochs = 0.5
    train.main(None)
    assert "lowest held-out loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "name", "values"),
    [
        ({"learning_rate": 2e-3}, "config.train.learning_rate", "0.001 there, 0.002 here"),
        ({"form": "edm"}, "config.model.form", "'eps' there, 'edm' here"),
        ({"fields": tiny.fields(seed=1)}, "data.fields", "there"),
    ],
)
def test_another_run_in_the_same_workdir_is_refused(finished, settings, name, values):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    with pytest.raises(InputError, match=f"{name}: .*{values}"):
        run(finished, **settings)
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_two_trainings_in_one_workdir_exclude_each_other(finished, tmp_path, monkeypatch):
    """The second one is refused whether it knows of the first or began before it; the first one goes on untouched."""

    def another(number, state, data):
        if number == 1:
            with pytest.raises(InputError, match=r"another training is running in .*run \(process \d+ on "):
                run(tmp_path / "run")
            with monkeypatch.context() as patch:
                patch.setattr(train, "holds_run", lambda *_: False)
                with pytest.raises(InputError, match="another training is running"):
                    run(tmp_path / "run", learning_rate=2e-3)

    hook(monkeypatch, another)
    run(tmp_path / "run")
    assert_same_run(tmp_path / "run", finished)


def test_what_is_kept_may_change(finished, caplog):
    assert run(finished, keep=5, save_minutes=1.0) is not None


def test_a_run_that_goes_on_says_that_its_start_is_not_used(finished, caplog):
    caplog.set_level("INFO")
    assert train.train(init_from(tiny.config(), "elsewhere"), finished, tiny.fields(), progress=False) is not None
    assert f"{finished} goes on from its own state; init_from is for the start of a run" in caplog.messages


def test_a_model_says_from_which_weights_its_run_began(finished, tmp_path, monkeypatch):
    """Whatever a later start names, which is not used."""

    def halt(number, state, data):
        if number > 4:
            raise Halt

    with monkeypatch.context() as patch:
        hook(patch, halt)
        with pytest.raises(Halt):
            train.train(init_from(tiny.config(), finished), tmp_path / "run", tiny.fields(), progress=False)
    made = train.train(tiny.config(), tmp_path / "run", tiny.fields(), progress=False)
    assert made.training["step"] > 9
    assert made.training["config"]["init_from"] == str(finished)


def test_a_run_from_before_a_setting_goes_on_with_its_usual_value(finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    text = json.loads((workdir / "config.json").read_text())
    del text["config"]["train"]["score_every"], text["config"]["model"]["patterns"]
    text["config"] |= {"reset_best": True, "init_from": "elsewhere"}
    text["config"]["data"]["fields"] = "moved.nc"
    (workdir / "config.json").write_text(json.dumps(text))
    assert run(workdir) is not None
    with pytest.raises(InputError, match="score_every: 1 there, 2 here"):
        run(workdir, score_every=2)


def test_a_workdir_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty and holds no run"):
        run(tmp_path)
    # Before the data, whose simulation may take minutes.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_fields", None)
        for name in ("notes.txt", "notes.txt/run"):
            with pytest.raises(InputError, match=rf"workdir .*{name}: .*notes.txt is a file, not a folder"):
                train.train(tiny.config(), tmp_path / name)
    for text, message in (
        ("[]", "cannot be read"),
        ('{"config": {}, "rows_version": 3}', "such as a sweep, and no run"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match=message):
            run(tmp_path)


def test_a_refused_run_leaves_its_workdir_to_the_corrected_one(tmp_path):
    with pytest.raises(InputError, match="fewer than a batch"):
        run(tmp_path / "run", batch=64)
    with pytest.raises(InputError, match="no model in"):
        train.train(init_from(tiny.config(), tmp_path / "nowhere"), tmp_path / "run", tiny.fields())
    config = tiny.config("conditional")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(observe, "pattern_table", lambda *_: (_ for _ in ()).throw(InputError("no such pattern")))
        with pytest.raises(InputError, match="no such pattern"):
            train.train(config, tmp_path / "run", tiny.fields(), progress=False)
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_state_gives_way_to_the_corrected_one(finished, tmp_path):
    """Killed while it made its configuration, or before its first checkpoint."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / ".config.12ab.json").write_text("{")
    with pytest.MonkeyPatch.context() as patch:
        first_state(tiny.config(learning_rate=1.0), workdir, patch)
    assert json.loads((workdir / "config.json").read_text())["config"]["train"]["learning_rate"] == 1
    run(workdir)
    assert_same_run(workdir, finished)
    # What it may have been trained to is nothing to give away.
    shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(InputError, match=r"learning_rate: 0\.001 there, 0\.002 here"):
        run(workdir, learning_rate=2e-3)


def init_from(config, folder):
    config.init_from = str(folder)
    return config


def first_state(config, workdir, monkeypatch):
    """The state in front of the first dispatch."""
    seen = []

    def halt(number, state, data):
        seen.append(jax.tree.map(np.array, state))
        raise Halt

    with monkeypatch.context() as patch:
        hook(patch, halt)
        with pytest.raises(Halt):
            train.train(config, workdir, tiny.fields(), progress=False)
    return seen[0]


def test_init_from_takes_the_weights_alone(finished, tmp_path, monkeypatch):
    config = init_from(tiny.config(learning_rate=5e-4), finished)
    weights = model.load(finished / "model").params
    # Twice: a run that ended before its first checkpoint starts from the same weights again.
    for _ in range(2):
        state = first_state(config, tmp_path / "run", monkeypatch)
        for part in (state.params, state.ema):
            assert all(jax.tree.leaves(jax.tree.map(np.array_equal, part, weights)))
        assert state.step == 0
        assert np.isinf(state.best)
        assert not any(leaf.any() for leaf in jax.tree.leaves(state.optimiser))


def test_a_network_without_observations_starts_from_one_with_them_and_back():
    """Its function of the first inputs is that of the other one where no cell is observed."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 8, 12, 5)), jnp.float32).at[..., 4].set(0)
    four, five = (dataclasses.replace(tiny.NETWORK, inputs=count) for count in (4, 5))
    graphdef, params = unet.create(five, 0)
    apply = jax.jit(unet.apply, static_argnums=0)
    whole = apply(graphdef, params, x, jnp.zeros(1))
    fewer = train._with_inputs_of(four, params)
    found = apply(unet.structure(four)[0], fewer, x[..., :4], jnp.zeros(1))
    np.testing.assert_allclose(found, whole, atol=1e-6)
    back = apply(graphdef, train._with_inputs_of(five, fewer), x.at[..., 4].set(1), jnp.zeros(1))
    np.testing.assert_allclose(back, whole, atol=1e-6)


@pytest.mark.parametrize("residual", [False, True])
def test_what_a_network_did_not_see_before_it_learns(residual):
    """Of a network whose first block normalises its inputs, too: gradients reach the new channel."""
    four = unet.UNetConfig((8, 8), residual=residual, embedding=16, inputs=4, heads=1)
    five = dataclasses.replace(four, inputs=5)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 8, 8, 5)), jnp.float32)
    x = x.at[..., 4].set((x[..., 4] > 0).astype(jnp.float32))
    graphdef, params = unet.create(four, 0)
    more = train._with_inputs_of(five, params)
    network = unet.structure(five)[0]
    apply = jax.jit(unet.apply, static_argnums=0)
    whole = apply(graphdef, params, x[..., :4], jnp.zeros(2))
    np.testing.assert_allclose(apply(network, more, x, jnp.zeros(2)), whole, atol=1e-5)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(unet.apply(network, p, x, jnp.zeros(2)) ** 2)))(more)
    sizes = np.abs(gradient["encode0_0"]["conv1"]["kernel"]).mean((0, 1, 3))
    assert sizes[4] > 0.1 * sizes[:4].mean()


def test_the_model_of_the_package_can_be_started_from_by_its_name(tmp_path, monkeypatch):
    """From any folder; of a small network it is another one."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="the network of ram_head is another one"):
        train.train(init_from(tiny.config("anchored"), "ram_head"), tmp_path / "run", tiny.fields())


def test_a_demo_of_another_training_is_told_to_write_elsewhere(tmp_path, monkeypatch):
    """It has no options for what a training advises."""
    claim(tmp_path / "run", {"epochs": 7}, {})
    (tmp_path / "run" / "model").mkdir()
    monkeypatch.setattr(train, "train", lambda config, workdir, fields: holds_run(workdir, {"epochs": 14}, {}))
    with pytest.raises(InputError) as caught:
        demo.fit("tiny.nc", tiny.fields(365), "0:250", "275:365", 2, tmp_path / "run")
    assert str(caught.value).endswith("(config.epochs: 7 there, 14 here); give another folder by --out")


def test_init_from_refuses_another_network(finished, tmp_path, monkeypatch):
    wide = dataclasses.replace(tiny.NETWORK, channels=(16,))
    monkeypatch.setitem(unet.NETWORKS, "test", wide)
    with pytest.raises(InputError, match=r"the network of .* is another one"):
        train.train(init_from(tiny.config(), finished), tmp_path / "run", tiny.fields())
    assert not (tmp_path / "run").exists()


def test_init_from_refuses_what_has_learnt_something_else(finished, tmp_path):
    other = tiny.config("edm")
    with pytest.raises(InputError, match="is of form eps, not edm"):
        train.train(init_from(other, finished), tmp_path / "run", tiny.fields())
    other = tiny.config()
    other.noise.max_beta = 0.01
    with pytest.raises(InputError, match="knows the steps"):
        train.train(init_from(other, finished), tmp_path / "run", tiny.fields())
    assert not (tmp_path / "run").exists()


def test_best_is_kept(finished, tmp_path, monkeypatch):
    workdir, config = tmp_path / "run", tiny.config()
    with monkeypatch.context() as patch:

        def halt(number, state, data):
            if number == 4:
                raise Halt

        hook(patch, halt)
        with pytest.raises(Halt):
            run(workdir)
    lowest = pd.read_csv(workdir / "log.csv").ema_held_out_loss[0]
    np.testing.assert_allclose(first_state(config, workdir, monkeypatch).best, lowest, rtol=1e-5)


def test_a_checkpoint_without_room_is_refused_before_it_is_written(tmp_path, monkeypatch):
    state, usage = {"x": np.zeros(10**6, np.float32)}, shutil.disk_usage
    checkpoints = Checkpoints.open(tmp_path, keep=2)
    checkpoints.save(1, state)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(folder)._replace(free=4 * 10**6))
    with pytest.raises(InputError, match=r"checkpoint of step 2: .*last has room for 4\.0 MB, and it takes 5\.0 MB"):
        checkpoints.save(2, state)
    assert [path.name for path in (tmp_path / "checkpoints" / "last").iterdir()] == ["1"]
    np.testing.assert_array_equal(checkpoints.restore(state)["x"], state["x"])


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (PermissionError(13, "Permission denied", "/a: b/state"), "Permission denied"),
        (
            ValueError("RESOURCE_EXHAUSTED: Error writing x: No space left on device [source='a: b']"),
            "No space left on device",
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_written_says_why(tmp_path, monkeypatch, failure, words):
    def save(*_, **__):
        raise failure

    checkpoints = Checkpoints.open(tmp_path, keep=2)
    monkeypatch.setattr(checkpoints.last, "save", save)
    with pytest.raises(InputError, match=rf"checkpoint of step 2 to .*last: {words}$"):
        checkpoints.save(2, {"x": np.zeros(3, np.float32)})


def test_a_damaged_checkpoint_is_named(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    for path in (workdir / "checkpoints" / "last" / "27").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(
        InputError, match=r"step 27 .* cannot be read .*; remove that folder to continue from the one before"
    ):
        run(workdir)
    shutil.rmtree(workdir / "checkpoints" / "last" / "27")
    run(workdir)
    assert_same_run(workdir, finished)
    assert json.loads((workdir / "config.json").read_text())["data"]["name"] == "tiny"


def test_a_damaged_checkpoint_is_named_without_pages_before(tmp_path, monkeypatch):
    """One reply of the storage layer that comes too late for each of its arrays."""
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    checkpoints, state = Checkpoints.open(tmp_path, keep=1), [np.ones((64, 64), np.float32)] * 100
    checkpoints.save(1, state)
    checkpoints.close()
    for path in tmp_path.rglob("manifest.ocdbt"):
        path.write_bytes(b"")
    for _ in range(3):
        with pytest.raises(InputError, match=r"step 1 .* cannot be read"):
            Checkpoints.open(tmp_path, keep=1).restore(state)
    time.sleep(0.5)
    assert not shown
    sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError("another")))
    assert [str(problem.exc_value) for problem in shown] == ["another"]


def test_a_trained_model_without_a_state_is_not_trained_over(finished, tmp_path):
    """As where somebody has made room: its model would be replaced by that of a first epoch."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    for path in (workdir / "checkpoints" / "last").iterdir():
        if path.name != "27":
            shutil.rmtree(path)
    damaged = next(
        path for path in (workdir / "checkpoints" / "last" / "27").rglob("*") if path.name == "manifest.ocdbt"
    )
    damaged.write_bytes(b"")
    with pytest.raises(InputError, match=r"step 27 .* cannot be read .*; there is none before it"):
        run(workdir)
    shutil.rmtree(workdir / "checkpoints")
    kept = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    with pytest.raises(
        InputError, match=r"run holds a trained model but no state .* --config.init_from=.*run, or remove"
    ):
        run(workdir)
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == kept
    # Killed between its first model and its first state.
    lines = (workdir / "log.csv").read_text().splitlines(keepends=True)
    (workdir / "log.csv").write_text("".join(lines[:2]))
    run(workdir)
    assert_same_run(workdir, finished)


@pytest.mark.parametrize(
    ("text", "words"),
    [(b"\xff\xfe\x00", "is no table"), (b"step\n27\n", "has no column 'epoch'"), (b"epoch\nfirst\n", "holds 'first'")],
    ids=["bytes", "another table", "words"],
)
def test_a_damaged_log_is_named(tmp_path, text, words):
    (tmp_path / "log.csv").write_bytes(text)
    with pytest.raises(InputError, match=rf"log.csv.* {words}"):
        train.Log(tmp_path, 1, False, 1.0)
