"""The comparison of methods, where the fields come from the linear prior and its exact denoiser is the model."""

import csv
import dataclasses
import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matplotlib import image

from jax_repaint import device, evaluate, guide, methods, metrics, model, provenance, sample, unfinished
from jax_repaint.calibration import Calibration, Gate
from jax_repaint.cases import (
    OBSERVATION_ERROR,
    block_length,
    files_of,
    hold_out,
    known_of,
    make_cases,
    pick,
    prior_of,
    with_directions,
)
from jax_repaint.data import readers
from jax_repaint.data.fields import Fields, Split, Standardiser
from jax_repaint.denoise import PrincipalGaussian
from jax_repaint.errors import InputError
from jax_repaint.methods import Result, levels_of, run_method
from jax_repaint.model import Model
from jax_repaint.nets import unet
from jax_repaint.prior import gp

pytestmark = pytest.mark.usefixtures("optimised")

SHAPE, PADDED = (8, 14), (8, 16)
OCEAN = ~((np.indices(SHAPE)[0] < 3) & (np.indices(SHAPE)[1] > 10))
NUMBERS = np.array([3, 20, 21, 40, 41, 57])
PATTERNS = ("line:4", "cells:0.1")
LAT, LON = 18.3 + 0.01 * np.arange(SHAPE[0]), -64.8 + 0.01 * np.arange(SHAPE[1])
SPREAD, OFFSET = np.array([0.2, 0.1]), np.array([0.05, -0.02])


@pytest.fixture(scope="module")
def gaussian():
    """Six smooth directions and a little noise, on the padded grid, variance about 1."""
    rng = np.random.default_rng(0)
    y, x = np.indices(PADDED)
    ocean = np.pad(OCEAN, ((0, 0), (0, 2)))
    phase = rng.normal(size=(6, 2, 1, 1)) * 0.4
    waves = np.cos(phase[:, 0] * y + phase[:, 1] * x + rng.uniform(0, 6, (6, 1, 1)))
    fields = (waves[..., None] * rng.normal(size=(6, 1, 1, 2)) * ocean[..., None]).reshape(6, -1)
    direction = np.linalg.svd(fields, full_matrices=False)[2].reshape(6, *PADDED, 2)
    mean = 0.5 * np.sin(0.3 * x + 0.2 * y)[..., None] * ocean[..., None] * [1, -1]
    values = 2 * OCEAN.sum()
    arrays = mean, direction, values * np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.03]), 0.01, ocean[..., None]
    return PrincipalGaussian(*(jnp.asarray(a, jnp.float32) for a in arrays))


@pytest.fixture(scope="module")
def trained(gaussian):
    network = unet.UNetConfig((8, 16), attention=(1,), blocks=1, heads=2, embedding=16, inputs=4, zero_output=True)
    return Model(
        network=network,
        form="anchored",
        params=unet.create(network, 0)[1],
        standardiser=Standardiser.create(OFFSET, SPREAD),
        ocean=OCEAN,
        lat=LAT,
        lon=LON,
        gaussian=gaussian,
        kernel=gp.Kernel.create("matern32", 4.0, 0.02),
        schedule={"steps": 76, "min_beta": 1e-3, "max_beta": 0.06},
        sigma=(0.01, 20.0),
        training={},
    )


@pytest.fixture(scope="module")
def fields(gaussian):
    keys = jax.random.split(jax.random.key(3), len(NUMBERS))
    x = np.asarray(jax.jit(jax.vmap(guide.prior_draw, (None, 0)))(gaussian, keys))[:, :, : SHAPE[1]]
    velocity = np.where(OCEAN[..., None], x * SPREAD + OFFSET, np.nan)
    time = np.datetime64("2021-05-01T00:00", "ns") + NUMBERS * np.timedelta64(1, "h")
    return Fields.create(velocity, LAT, LON, time, name="drawn")


@pytest.fixture(scope="module")
def cases(trained, fields):
    return make_cases(trained, fields, NUMBERS, PATTERNS)


@pytest.fixture(scope="module")
def results(trained, fields, cases):
    counts = {"kalman": 4, "linear_samples": 200, "linear": 7}
    return {
        name: run_method(name, trained, fields, cases, counts.get(name, 1), count=5)
        for name in ("climatology", "seed_gp", "gp", "linear", "linear_samples", "kalman")
    }


def error(case, members):
    scored = metrics.scored_cells(case.truth, OCEAN, case.observed)
    return metrics.mse(members.mean(0), case.truth, scored)


def errors(cases, result):
    return np.mean([error(case, members) for case, members in zip(cases, result.members, strict=True)])


# --- cases --------------------------------------------------------------------------------------------------


def test_cases_hold_the_observed_velocities(trained, fields, cases):
    assert [case.pattern for case in cases] == ["line:4"] * 6 + ["cells:0.1"] * 6
    assert [case.frame for case in cases] == [*NUMBERS, *NUMBERS]
    for number, case in enumerate(cases):
        np.testing.assert_array_equal(case.truth, fields.velocity[number % 6])
        assert case.time == fields.time[number % 6]
        observed, value = map(np.asarray, case.observation.on_grid(PADDED))
        np.testing.assert_array_equal(observed[:, : SHAPE[1]], case.observed)
        assert not observed[:, SHAPE[1] :].any()
        velocity = (value[:, : SHAPE[1]] * SPREAD + OFFSET)[case.observed]
        np.testing.assert_allclose(velocity, case.truth[case.observed], atol=1e-6)
        sigma = np.asarray(case.observation.sigma)[np.asarray(case.observation.valid)]
        np.testing.assert_allclose(sigma * SPREAD, OBSERVATION_ERROR, rtol=1e-5)


def test_observations_with_errors(trained, fields, cases):
    """The truth and errors of that size, the same in a cell under every pattern; every method is told the size."""
    size = 0.03
    noisy = make_cases(trained, fields, NUMBERS, PATTERNS, error=size)
    errors = {}
    for exact, case in zip(cases, noisy, strict=True):
        np.testing.assert_array_equal(case.observed, exact.observed)
        np.testing.assert_array_equal(case.truth, exact.truth)
        _, value = case.observation.on_grid(PADDED)
        velocity = (np.asarray(value)[:, : SHAPE[1]] * SPREAD + OFFSET)[case.observed]
        np.testing.assert_allclose(velocity, case.seen[case.observed], atol=1e-6)
        sigma = np.asarray(case.observation.sigma)[np.asarray(case.observation.valid)]
        np.testing.assert_allclose(sigma * SPREAD, size, rtol=1e-5)
        errors.setdefault(case.frame, []).append((case.seen - case.truth)[OCEAN])
    np.testing.assert_array_equal(*np.stack(list(errors.values())).swapaxes(0, 1))
    drawn = np.stack([first for first, _ in errors.values()])
    assert drawn.std() == pytest.approx(size, rel=0.05)
    assert abs(np.corrcoef(drawn[0].ravel(), drawn[1].ravel())[0, 1]) < 0.2
    (alone,) = make_cases(trained, fields.select([2]), NUMBERS[2:3], PATTERNS[:1], error=size)
    np.testing.assert_array_equal(alone.seen, noisy[2].seen)
    (other,) = make_cases(trained, fields.select([2]), NUMBERS[2:3], PATTERNS[:1], seed=1, error=size)
    assert (other.seen != noisy[2].seen)[OCEAN].all()
    # The linear estimate and the GP that was fitted, by dense algebra.
    case, kernel, wet = noisy[0], trained.kernel, OCEAN
    seen = case.observed[wet]
    places = fields.places()[wet]
    far = np.linalg.norm(places[:, None] - places[None], axis=-1) * np.sqrt(3) / kernel.lengthscale
    covariance = kernel.variance * (1 + far) * np.exp(-far)
    mean = trained.to_velocity(trained.gaussian.mean)[wet]
    inner = covariance[np.ix_(seen, seen)] + (size**2 + kernel.noise) * np.eye(seen.sum())
    exact = mean + covariance[:, seen] @ np.linalg.solve(inner, (case.seen[wet] - mean)[seen])
    (found,) = run_method("gp", trained, fields, [case], 1).members[0]
    np.testing.assert_allclose(found[wet], exact, atol=1e-4)
    less, held = hold_out(trained, case)
    _, value = less.observation.on_grid(PADDED)
    velocity = (np.asarray(value)[:, : SHAPE[1]] * SPREAD + OFFSET)[case.observed & ~held]
    np.testing.assert_allclose(velocity, case.seen[case.observed & ~held], atol=1e-6)
    assert (less.error, less.noisy) == (size, case.noisy)
    for wrong in (0.0, -0.1, np.inf, np.nan, 1e-7, 1e20):
        with pytest.raises(InputError, match=r"standard error of observations is .* to 1e\+06 m/s, got"):
            make_cases(trained, fields, NUMBERS, PATTERNS, error=wrong)


def test_another_prior_serves_analyses_and_the_network_keeps_its_own(trained, gaussian, tmp_path, caplog):
    """The estimate is that of five eigenvectors of the training frames' covariance, in dense algebra."""
    keys = jax.random.split(jax.random.key(8), 90)
    x = np.asarray(jax.jit(jax.vmap(guide.prior_draw, (None, 0)))(gaussian, keys))[:, :, : SHAPE[1]]
    velocity = np.where(OCEAN[..., None], x * SPREAD + OFFSET, np.nan)
    time = np.datetime64("2021-05-01T00:00", "ns") + np.arange(90) * np.timedelta64(1, "h")
    series = Fields.create(velocity, LAT, LON, time, name="drawn")
    split = Split(np.arange(60), np.arange(60, 70), np.arange(70, 90))
    other = with_directions(trained, series, split, 5)
    assert other.gaussian.variance.shape == (5,)
    assert other.anchor is gaussian
    land = dataclasses.replace(trained.standardiser, land_value=np.array([-0.8, 0.5], np.float32))
    mean = np.asarray(with_directions(dataclasses.replace(trained, standardiser=land), series, split, 5).gaussian.mean)
    wet = np.asarray(gaussian.ocean)[..., 0] > 0
    np.testing.assert_array_equal(mean[~wet], np.broadcast_to(land.land_value, mean[~wet].shape))
    np.testing.assert_array_equal(mean[wet], np.asarray(other.gaussian.mean)[wet])
    field = jnp.asarray(np.pad(x[0], ((0, 0), (0, 2), (0, 0))))
    np.testing.assert_array_equal(other.denoiser(field, jnp.float32(0.5)), trained.denoiser(field, jnp.float32(0.5)))
    (case,) = make_cases(other, series.select([75]), [75], ["gaps:0.3"])
    anomaly = (velocity[:60, OCEAN] - OFFSET) / SPREAD
    mean = anomaly.mean(0).reshape(-1)
    vector, value = np.linalg.svd((anomaly.reshape(60, -1) - mean) / np.sqrt(60), full_matrices=False)[2:0:-1]
    rest = np.sum(value[5:] ** 2) / (mean.size - 5)
    covariance = (vector[:5].T * (value[:5] ** 2 - rest)) @ vector[:5] + rest * np.eye(mean.size)
    seen = np.repeat(case.observed[OCEAN], 2)
    noise = np.tile((OBSERVATION_ERROR / SPREAD) ** 2, int(case.observed.sum()))
    values = ((velocity[75, OCEAN] - OFFSET) / SPREAD).reshape(-1)
    gain = np.linalg.solve(covariance[np.ix_(seen, seen)] + np.diag(noise), covariance[seen]).T
    exact = (mean + gain @ (values - mean)[seen]).reshape(-1, 2) * SPREAD + OFFSET
    (found,) = run_method("linear", other, series, [case], 1).members[0]
    np.testing.assert_allclose(found[OCEAN], exact, atol=2e-5)
    with pytest.raises(InputError, match="cannot be stored"):
        model.save(other, tmp_path / "other")
    with pytest.raises(InputError, match="the linear prior that its network was trained on"):
        levels_of(dataclasses.replace(other, form="conditional"), "given")
    with pytest.raises(InputError, match="at least one direction"):
        with_directions(trained, series, split, 0)
    assert "directions are many" not in caplog.text
    with_directions(trained, series, split, 16)
    assert "16 directions are many for 60 training frames" in caplog.text
    with pytest.raises(InputError, match=r"60 training frames of .* tell no 512 directions apart; take fewer than 59"):
        with_directions(trained, series, split, 512)
    assert model.fingerprint(other) != model.fingerprint(trained)


def test_random_patterns_depend_on_the_frame_alone(trained, fields, cases):
    drawn = [case.observed for case in cases[6:]]
    assert not any((drawn[0] == other).all() for other in drawn[1:])
    some = make_cases(trained, fields.select([4, 1]), NUMBERS[[4, 1]], PATTERNS[1:])
    for case, number in zip(some, (4, 1), strict=True):
        np.testing.assert_array_equal(case.observed, drawn[number])
        jax.tree.map(np.testing.assert_array_equal, case.analysis, cases[6 + number].analysis)
    other = make_cases(trained, fields.select([4]), NUMBERS[[4]], PATTERNS[1:], seed=1)
    assert (other[0].observed != drawn[4]).any()


def test_what_repaint_knows(cases, trained):
    for case in cases[::6]:
        known = known_of(trained, case)
        missing = np.asarray(known.missing)[:, : SHAPE[1], 0]
        np.testing.assert_array_equal(missing, OCEAN & ~case.observed)
        assert not np.asarray(known.missing)[:, SHAPE[1] :].any()
        assert not np.asarray(known.prior_mean)[:, SHAPE[1] :].any()
        np.testing.assert_array_equal(known.prior_variance, case.analysis.variance)


def test_the_linear_estimate_and_its_error_are_in_metres_a_second(cases, trained):
    for case in cases[::6]:
        mean, variance = prior_of(trained, case)
        standardised = np.asarray(case.analysis.mean(case.observation.values))[:, : SHAPE[1]]
        np.testing.assert_allclose(mean[OCEAN], (standardised * SPREAD + OFFSET)[OCEAN], rtol=1e-5)
        exact = np.asarray(case.analysis.variance)[:, : SHAPE[1]] * SPREAD**2
        np.testing.assert_allclose(variance[OCEAN], exact[OCEAN], rtol=1e-5)


def test_other_grids_are_refused_and_gaps_are_not_observed(trained, fields):
    shifted = dataclasses.replace(fields, lon=LON + 0.1)
    land = dataclasses.replace(fields, ocean=OCEAN & (np.indices(SHAPE)[0] > 0))
    for other in (shifted, land):
        with pytest.raises(InputError, match="trained on another grid"):
            make_cases(trained, other, NUMBERS, PATTERNS)
    velocity = fields.velocity.copy()
    velocity[0, 5, 5] = np.nan
    whole, cases = (
        make_cases(trained, data, NUMBERS, ["line:5"])
        for data in (fields, dataclasses.replace(fields, velocity=velocity))
    )
    assert np.argwhere(whole[0].observed & ~cases[0].observed).tolist() == [[5, 5]]
    np.testing.assert_array_equal(cases[1].observed, whole[1].observed)


# --- methods ------------------------------------------------------------------------------------------------


def test_members_are_velocities_on_the_ocean(cases, results):
    for name, result in results.items():
        assert len(result.members) == len(cases)
        count = {"kalman": 4, "linear_samples": 200}.get(name, 1)
        for members in result.members:
            assert members.shape == (count, *SHAPE, 2)
            np.testing.assert_array_equal(np.isfinite(members), np.broadcast_to(OCEAN[..., None], members.shape))
        assert result.calls == (20 if name == "kalman" else 0)
        assert result.seconds > 0


def test_climatology_is_the_mean_of_the_prior(results, gaussian):
    expected = np.asarray(gaussian.mean)[:, : SHAPE[1]] * SPREAD + OFFSET
    for members in results["climatology"].members:
        np.testing.assert_allclose(members[0][OCEAN], expected[OCEAN], atol=1e-6)


def test_the_gp_of_the_notes_takes_cells_as_exact(cases, results):
    """Its mean by the whole covariance of pixels, with the error variance of 1e-6 (m/s)^2 that it had itself."""
    places = np.stack(np.indices(SHAPE), -1).reshape(-1, 2).astype(float)
    distance = np.linalg.norm(places[:, None] - places, axis=-1)
    covariance = 0.0103420345**2 * np.exp(-distance / (2 * 14.1**2))
    for case, members in zip(cases, results["seed_gp"].members, strict=True):
        seen = case.observed.ravel()
        inverse = np.linalg.inv(covariance[np.ix_(seen, seen)] + 1e-6 * np.eye(seen.sum()))
        mean = covariance[:, seen] @ inverse @ case.truth.reshape(-1, 2)[seen]
        np.testing.assert_allclose(members[0][OCEAN], mean.reshape(*SHAPE, 2)[OCEAN], atol=1e-6)


def test_linear_is_best_and_kalman_of_the_exact_denoiser_equals_it(cases, results):
    found = {name: errors(cases, result) for name, result in results.items()}
    best = found["linear"]
    assert all(best < found[name] for name in ("climatology", "seed_gp", "gp"))
    assert best < 0.5 * found["climatology"]
    np.testing.assert_allclose(found["kalman"], best, rtol=0.02)
    np.testing.assert_allclose(found["linear_samples"], best, rtol=0.1)


def test_the_spread_of_linear_samples_is_that_of_the_analysis(cases, results):
    for case, members in zip(cases, results["linear_samples"].members, strict=True):
        expected = np.asarray(case.analysis.variance)[:, : SHAPE[1]][OCEAN] * SPREAD**2
        # A chi-squared variable of 199 degrees of freedom for each value.
        ratio = members.var(0, ddof=1)[OCEAN] / expected
        assert ratio.min() > 0.6
        assert ratio.max() < 1.6
        assert 0.85 < ratio.mean() < 1.15


def test_the_gp_starts_from_climatology(trained, fields, cases, results):
    observed = np.concatenate([m[0][c.observed] for c, m in zip(cases, results["gp"].members, strict=True)])
    truth = np.concatenate([c.truth[c.observed] for c in cases])
    assert np.abs(observed - truth).max() < 0.05
    with pytest.raises(InputError, match="without a fitted GP"):
        run_method("gp", dataclasses.replace(trained, kernel=None), fields, cases, 1)


def test_of_many_stages_the_last_is_kept_to_the_digit(trained, fields, cases, monkeypatch):
    gentle = {"resample_steps": 1, "t_start": 6, "t_refine": 4, "stages": 3}
    monkeypatch.setattr(methods, "method", lambda name, steps: sample.method(name, steps, **gentle))
    some, kept, run = [cases[0], cases[7], cases[4]], [], methods.repaint_ensemble

    def watched(*arguments, **options):
        kept.append(run(*arguments, **options))
        return kept[-1]

    monkeypatch.setattr(methods, "repaint_ensemble", watched)
    made = run_method("multistage", trained, fields, some, 3, seed=2, chunk=4).members
    (outcome,) = kept
    assert outcome.x.shape == (3, 3, 1, *PADDED, 2)
    # Nor is it a view of all stages; the last chunk is filled up, to twelve members.
    assert np.size(outcome.x.base) * 9 == outcome.x.size * 12
    known = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[known_of(trained, case) for case in some])
    frames = [case.frame for case in some]
    stages = sample.method("multistage", 76, **gentle)
    every = run(trained.denoiser, known, trained.steps, stages, frames=frames, members=3, seed=2, chunk=4)
    assert every.x.shape[2] == 3
    np.testing.assert_array_equal(outcome.failed, every.failed)
    np.testing.assert_array_equal(made, trained.to_velocity(every.x[:, :, -1]))
    (alone,) = run_method("multistage", trained, fields, some[1:2], 3, seed=2, chunk=4).members
    np.testing.assert_allclose(made[1], alone, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "sampler", "calls"),
    [
        ("adaptive", "repaint_ensemble", [8, 4, 2, 1]),
        ("linear_samples", "linear_samples", [4, 2, 1, 1]),
        ("kalman", "posterior_ensemble", [256, 128, 64, 32, 16, 8, 4, 2, 1]),
    ],
)
def test_out_of_memory_halves_the_chunk(trained, fields, cases, monkeypatch, caplog, method, sampler, calls):
    whole = run_method(method, trained, fields, cases[:2], 4, 1)
    sampled, sizes = getattr(methods, sampler), []

    # Linear samples take their arguments by place.
    def small(*arguments, **options):
        sizes.append(options.get("chunk") or arguments[-1])
        if sizes[-1] > 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
        return sampled(*arguments, **options)

    monkeypatch.setattr(methods, sampler, small)
    halved = run_method(method, trained, fields, cases[:2], 4, 1, chunk=256)
    assert sizes == calls
    assert f"out of memory with {calls[0]} members a call; going on with {calls[0] // 2}" in caplog.text
    np.testing.assert_allclose(halved.members, whole.members, atol=1e-5)

    def none(*arguments, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

    monkeypatch.setattr(methods, sampler, none)
    with pytest.raises(InputError, match="not enough memory for one member"):
        run_method(method, trained, fields, cases, 4)


@pytest.mark.parametrize("sampler", ["repaint_ensemble", "linear_samples"])
def test_other_errors_of_the_device_are_not_hidden(trained, fields, cases, monkeypatch, sampler):
    def broken(*arguments, **options):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(methods, sampler, broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        run_method("adaptive" if sampler == "repaint_ensemble" else sampler, trained, fields, cases[:1], 2)


def test_no_network_is_asked_about_noise_beyond_its_training(trained, fields, cases, monkeypatch, tmp_path):
    sigma = np.sqrt(1 / np.cumprod(1 - np.linspace(1e-3, 0.06, 76)) - 1)

    def never(*_, **__):
        raise AssertionError("a method was run")

    monkeypatch.setattr(methods, "repaint_ensemble", never)
    narrow = dataclasses.replace(trained, sigma=(0.01, 1.1))
    last = np.flatnonzero(sigma <= 1.1)[-1]
    for name in ("plain", "gp_init"):
        asked = rf"from 0.01 to 1.1, not for {sigma[-1]:.2g}\d*; t_start must be a step up to {last}, not 75"
        with pytest.raises(InputError, match=asked):
            run_method(name, narrow, fields, cases, 1)
        with pytest.raises(InputError, match=asked):
            evaluate.run(narrow, fields, NUMBERS, PATTERNS, ["linear", name], tmp_path)
    coarse = dataclasses.replace(trained, sigma=(0.5, 20.0))
    with pytest.raises(InputError, match=r"from 0.5 to 20, not for 0.0316\d*; .*noise.sigma_min of at most"):
        run_method("gp_init", coarse, fields, cases, 1)
    # Posterior samplers keep to what the network knows, and the linear prior asks none.
    for one in (narrow, coarse):
        assert one.knows(np.asarray(levels_of(one, "kalman").sigma)).all()
        run_method("kalman", one, fields, cases[:1], 2, count=3)
        run_method("linear_samples", one, fields, cases[:1], 2)


def test_mistakes_of_methods(trained, fields, cases):
    with pytest.raises(InputError, match="method 'magic' is not one of climatology"):
        run_method("magic", trained, fields, cases, 4)
    broken = dataclasses.replace(trained, params=jax.tree.map(lambda leaf: leaf * np.nan, trained.params))
    with pytest.raises(InputError, match=rf"kalman: 4 of 4 members of frame {cases[0].frame} are not finite; another"):
        run_method("kalman", broken, fields, cases[:1], 4, count=3)
    with pytest.raises(InputError, match="come in pairs, got 3 members"):
        run_method("kalman", trained, fields, cases, 3)


@pytest.mark.parametrize(
    ("trained_on", "levels"), [((0.01, 130.0), (0.01, 3.4)), ((0.05, 2.0), (0.05, 2.0)), ((1e-4, 20.0), (0.01, 3.4))]
)
def test_samplers_keep_to_the_levels_of_training(trained, trained_on, levels):
    hyper = levels_of(dataclasses.replace(trained, sigma=trained_on), "kalman", 5)
    np.testing.assert_allclose(np.asarray(hyper.sigma)[[-1, 0]], levels, rtol=1e-5)
    assert hyper.calls == 5


@pytest.mark.parametrize(
    ("members", "antithetic", "known"), [(1, False, False), (2, False, True), (2, True, False), (4, True, True)]
)
def test_a_spread_takes_two_independent_members(members, antithetic, known):
    made = np.random.default_rng(0).normal(size=(members, 3, 4, 2))
    if antithetic:
        made[1::2] = 1 - made[::2]
    spread = Result([made], 0.0, 0, antithetic).spread(0)
    assert spread.shape == (3, 4, 2)
    assert np.isfinite(spread).all() == known
    if known:
        # Of pairs, one number each about the mean that is known: sum over pairs of what lies between strangers.
        pairs = [(i, j) for i in range(members) for j in range(i) if not antithetic or i // 2 != j // 2]
        np.testing.assert_allclose(spread**2, np.mean([(made[i] - made[j]) ** 2 / 2 for i, j in pairs], axis=0))


def test_samples_are_no_baseline(cases, results):
    """However good their mean is."""
    best = dataclasses.replace(results["linear"], antithetic=False)
    two = {"climatology": results["climatology"], "linear_samples": best}
    table = evaluate.compare(evaluate.score(cases, two, OCEAN), two, 1)
    assert {row["baseline"] for row in table} == {"climatology"}
    assert all(row["ratio"] < 0.9 for row in table if row["method"] == "linear_samples")


def test_frames_with_failed_members_are_scored_by_as_many_as_all_have(cases, results, caplog):
    """The table of ensembles of 7, 5 and 6 members is that of the first five of each."""
    whole = results["linear_samples"]
    sizes = [(7, 5, 6)[i % 3] for i in range(len(cases))]
    ragged = dataclasses.replace(whole, members=[m[:n] for m, n in zip(whole.members, sizes, strict=True)])
    five = dataclasses.replace(whole, members=[m[:5] for m in whole.members])
    pairs = [{"linear": results["linear"], "adaptive": one} for one in (ragged, five)]
    found, expected = (evaluate.compare(evaluate.score(cases, two, OCEAN), two, 1) for two in pairs)
    pd.testing.assert_frame_equal(pd.DataFrame(found), pd.DataFrame(expected))
    assert found[1]["members"] == 5
    assert f"{PATTERNS[0]}, adaptive: scores are of 5 members" in caplog.text


# --- the command --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(trained, fields, tmp_path_factory):
    """A run on three frames, of one pattern twice; its folder and its text."""
    out = tmp_path_factory.mktemp("run") / "new"
    text = evaluate.run(
        trained, fields.select([0, 1, 2]), NUMBERS[:3], [*PATTERNS, PATTERNS[0]], ["climatology", "linear", "adaptive"],
        out, members=3, seed=4, kept=["linear", "adaptive"],
    )  # fmt: skip
    return out, text


def test_the_table_has_every_row(written):
    out, text = written
    with open(out / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["pattern"], row["method"]) for row in rows] == [
        (pattern, name) for pattern in PATTERNS for name in ("climatology", "linear", "adaptive")
    ]
    for row in rows:
        assert row["frames"] == "3"
        assert row["baseline"] == "linear"
        assert (float(row["ratio"]) == 1) == (row["method"] == "linear")
        assert row["members"] == ("3" if row["method"] == "adaptive" else "1")
        assert row["calls"] == ("1128" if row["method"] == "adaptive" else "0")
        assert row["method"] in text
        assert row["pattern"] in text
    # A sampler that starts from the linear estimate stays near it.
    assert all(0.7 < float(row["ratio"]) < 2 for row in rows if row["method"] == "adaptive")


def test_the_frames_are_those_that_the_table_is_of(written, trained, fields):
    out, _ = written
    frames, table = (pd.read_csv(out / name) for name in ("frames.csv", "table.csv"))
    assert len(frames) == 3 * len(table)
    assert (frames.error == 0).all()
    assert list(frames.frame.unique()) == list(NUMBERS[:3])
    assert (pd.to_datetime(frames.time[frames.frame == NUMBERS[2]]) == fields.time[2]).all()
    means = frames.groupby(["pattern", "method"])[["mse_member", "mse_mean", "crps", "coverage90"]].mean()
    expected = table.set_index(["pattern", "method"])[means.columns].sort_index()
    pd.testing.assert_frame_equal(means, expected)
    (case,) = make_cases(trained, fields.select([1]), NUMBERS[1:2], PATTERNS[:1], seed=4)
    mean = trained.to_velocity(case.analysis.mean(case.observation.values))
    row = frames.set_index(["pattern", "frame", "method"]).loc[(PATTERNS[0], NUMBERS[1], "linear")]
    assert row.mse_mean == pytest.approx(np.mean((mean - case.truth)[OCEAN & ~case.observed] ** 2), rel=1e-5)


def test_methods_without_a_baseline_are_compared_with_the_linear_estimate(trained, fields, tmp_path):
    evaluate.run(
        trained, fields.select([0, 1]), NUMBERS[:2], PATTERNS[:1], ["linear_samples", "paste"], tmp_path, members=2
    )
    table = pd.read_csv(tmp_path / "table.csv")
    assert list(table.method) == ["linear", "linear_samples", "paste"]
    assert set(table.baseline) == {"linear"}
    with xr.open_dataset(tmp_path / "fields.nc") as data:
        assert data.attrs["method"] == "paste"
    with pytest.raises(InputError, match="needs a baseline, one of climatology"):
        evaluate.compare({"line:1": {"paste": []}}, {}, 1)


def test_an_evaluation_says_what_errors_observations_had(trained, fields, cases, results, tmp_path):
    text = evaluate.run(trained, fields, NUMBERS, PATTERNS[:1], ["linear", "gp"], tmp_path, error=0.03)
    assert (pd.read_csv(tmp_path / "frames.csv").error == 0.03).all()
    assert text.endswith("observed with errors of 0.03 m/s")
    with xr.open_dataset(tmp_path / "fields.nc") as data:
        assert data.attrs["history"].endswith("method gp, seed 0, observations with errors of 0.03 m/s")
    # Of exact values more is known.
    exact = errors(cases[:6], Result(results["linear"].members[:6], 0.0, 0))
    table = pd.read_csv(tmp_path / "table.csv").set_index("method")
    assert table.loc["linear", "mse_mean"] > 1.05 * exact


@pytest.mark.parametrize(("given", "expected"), [([], ("gaps:0.3", "line:4")), (["walk:9"], ["walk:9"])])
def test_patterns_are_those_of_the_model_unless_others_are_given(trained, fields, monkeypatch, given, expected):
    own = dataclasses.replace(trained, training={"config": {"model": {"patterns": "gaps:0.3, line:4"}}})
    split = Split(np.arange(2), np.arange(2, 4), np.arange(4, 6), decorrelation=1.0)
    flags = {"methods": ["linear"], "members": 1, "model": "model", "fields": None, "part": "test", "frames": 1,
             "directions": None, "error": None, "seed": 0, "patterns": given, "out": "out",
             "chunk": None, "keep": [], "raw": False}  # fmt: skip
    asked = []
    monkeypatch.setattr(evaluate, "FLAGS", SimpleNamespace(**flags))
    monkeypatch.setattr(model, "load", lambda path: own)
    monkeypatch.setattr(evaluate, "data_of", lambda *_: (fields, split))
    monkeypatch.setattr(evaluate, "files_of", lambda *_: ())
    monkeypatch.setattr(evaluate, "run", lambda trained, fields, numbers, patterns, *_, **__: asked.append(patterns))
    evaluate.main([])
    assert asked == [expected]


class Asked:
    """`evaluate.run` of three frames into a folder, and (method, frames) of what it had to make; stops when told."""

    def __init__(self, trained, fields, out, monkeypatch):
        self.run = functools.partial(
            evaluate.run, trained, fields.select([0, 1, 2]), NUMBERS[:3], PATTERNS[:1],
            ["linear", "linear_samples", "kalman"], out,
        )  # fmt: skip
        monkeypatch.setattr(evaluate, "PART", 2)
        monkeypatch.setattr(device, "usual_batch", lambda: 4)
        monkeypatch.setattr(unfinished, "WORTH", 0)
        monkeypatch.setattr(evaluate, "run_method", self.made)

    def __call__(self, stop_at=99, seed=4, members=2):
        self.parts, self.stop_at = [], stop_at
        return self.run(members=members, seed=seed)

    def made(self, name, trained, fields, cases, *rest):
        self.parts.append((name, [case.frame for case in cases]))
        if len(self.parts) == self.stop_at:
            raise KeyboardInterrupt
        return run_method(name, trained, fields, cases, *rest)


WHOLE = [("linear", [3, 20, 21]), ("linear_samples", [3, 20, 21]), ("kalman", [3, 20]), ("kalman", [21])]


def test_a_stopped_evaluation_goes_on_where_it_was(trained, fields, tmp_path, monkeypatch, caplog):
    asked = Asked(trained, fields, tmp_path / "out", monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        asked(stop_at=4)
    with pytest.raises(KeyboardInterrupt):
        # Another seed has other members.
        asked(stop_at=3, seed=5)
    assert asked.parts == WHOLE[:3]
    left = sorted(path.name for path in (tmp_path / "out").glob("unfinished_*/*"))
    assert left == sorted(["linear_0_3.npz", "linear_samples_0_3.npz"] * 2 + ["kalman_0_2.npz"])
    (damaged,) = (path for path in tmp_path.glob("out/unfinished_*/linear_samples_0_3.npz")
                  if path.with_name("kalman_0_2.npz").exists())  # fmt: skip
    damaged.write_bytes(damaged.read_bytes()[:100])
    asked()
    assert asked.parts == [WHOLE[1], WHOLE[3]]
    assert "linear_samples_0_3.npz cannot be read and is made again" in caplog.text
    # What the stopped one with another seed holds is still there.
    assert len(list((tmp_path / "out").glob("unfinished_*"))) == 1
    again = Asked(trained, fields, tmp_path / "other", monkeypatch)
    again()
    assert again.parts == WHOLE
    assert not list((tmp_path / "other").glob("unfinished_*"))
    for name in ("table.csv", "frames.csv"):
        found, expected = (pd.read_csv(tmp_path / folder / name) for folder in ("out", "other"))
        pd.testing.assert_frame_equal(*(one.drop(columns="seconds", errors="ignore") for one in (found, expected)))
    with (
        xr.open_dataset(tmp_path / "out" / "fields.nc") as found,
        xr.open_dataset(tmp_path / "other" / "fields.nc") as e,
    ):
        xr.testing.assert_identical(found, e)


def test_a_second_run_for_a_gate_goes_on_where_it_was(trained, fields, tmp_path, monkeypatch):
    """It lacks a tenth of the observations, and takes as long as the first."""
    learnt = Calibration.create(
        method="kalman", members=4, antithetic=True, centres=(-10.0, -5.0), weight=(0.5, 0.5), spread=(1.0, 1.0),
        scale=(1.0, 1.0), promised=False, frames=10, patterns=("line:3",), blocks=20, seed=0, gate=Gate(0.3, 0.7, -0.4),
        held_out=dict.fromkeys(("mse_prior", "mse_raw", "mse_fused", "spread_skill_raw", "spread_skill"), 1.0),
    )  # fmt: skip
    trained = dataclasses.replace(trained, calibrations=(learnt,))
    second = []

    def made(name, trained, fields, cases, *rest):
        if len(second) == stop_at:
            raise KeyboardInterrupt
        second.append([case.frame for case in cases])
        return run_method(name, trained, fields, cases, *rest)

    monkeypatch.setattr(methods, "run_method", made)
    asked, stop_at = Asked(trained, fields, tmp_path / "out", monkeypatch), 1
    with pytest.raises(KeyboardInterrupt):
        asked(members=4)
    assert second == [[3, 20]]
    stop_at = 99
    asked(members=4)
    assert (second, asked.parts) == ([[3, 20], [21]], [])
    second.clear()
    Asked(trained, fields, tmp_path / "other", monkeypatch)(members=4)
    assert second == [[3, 20], [21]]
    found, expected = (pd.read_csv(tmp_path / folder / "frames.csv") for folder in ("out", "other"))
    pd.testing.assert_frame_equal(found, expected)
    assert "kalman_calibrated" in set(found["method"])


def test_a_full_disk_does_not_stop_an_evaluation(trained, fields, tmp_path, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    asked = Asked(trained, fields, tmp_path / "out", monkeypatch)
    monkeypatch.setattr(unfinished.np, "savez", full)
    asked()
    assert "No space left on device: after a stop it would be made again" in caplog.text
    assert not list(tmp_path.glob("out/unfinished_*"))


def test_parts_of_other_code_are_not_taken(trained, fields, tmp_path, monkeypatch):
    asked = Asked(trained, fields, tmp_path / "out", monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        asked(stop_at=4)
    monkeypatch.setattr(provenance, "source", lambda: "0123456789abcdef")
    asked()
    assert asked.parts == WHOLE


def test_the_file_holds_members_truth_and_observed_cells(written, trained, fields):
    with xr.open_dataset(written[0] / "fields.nc") as data:
        data.load()
    assert data.attrs["Conventions"].startswith("CF-")
    assert "method adaptive, seed 4" in data.attrs["history"]
    assert dict(data.sizes) == {"pattern": 2, "time": 3, "realization": 3, "lat": 8, "lon": 14}
    assert data["pattern"].values.tolist() == list(PATTERNS)
    np.testing.assert_array_equal(data["time"], fields.time[:3])
    np.testing.assert_allclose(data["lat"], LAT)
    names = {"lat": "latitude", "lon": "longitude", "time": "time", "realization": "realization"}
    assert {name: data[name].attrs["standard_name"] for name in names} == names
    cases = make_cases(trained, fields.select([0, 1, 2]), NUMBERS[:3], PATTERNS, seed=4)
    observed = np.stack([case.observed for case in cases]).reshape(2, 3, *SHAPE)
    np.testing.assert_array_equal(data["observed"], observed)
    np.testing.assert_array_equal(data["ocean"], OCEAN)
    result = run_method("adaptive", trained, fields.select([0, 1, 2]), cases, 3, seed=4)
    members = np.stack(result.members).reshape(2, 3, 3, *SHAPE, 2)
    for c, name in enumerate(("eastward_sea_water_velocity", "northward_sea_water_velocity")):
        for kind in ("", "_mean", "_spread", "_truth"):
            assert data[name + kind].attrs["units"] == "m s-1"
            # Programs that drift particles choose by standard names: only the members carry them.
            assert data[name + kind].attrs.get("standard_name") == (None if kind else name)
        np.testing.assert_allclose(data[name], members[..., c], atol=1e-5)
        np.testing.assert_allclose(data[f"{name}_mean"], members[..., c].mean(2), atol=1e-5)
        np.testing.assert_allclose(data[f"{name}_spread"], members[..., c].std(2, ddof=1), atol=1e-5)
        truth = data[f"{name}_truth"].values
        np.testing.assert_array_equal(truth, np.stack([fields.velocity[:3, ..., c]] * 2))
        given = np.where(observed[:, :, None], data[name], 0)
        np.testing.assert_allclose(given, np.where(observed, truth, 0)[:, :, None].repeat(3, 2), atol=1e-6)
        assert data[f"{name}_mean"].attrs["cell_methods"] == "realization: mean"
        assert data[f"{name}_spread"].attrs["cell_methods"] == "realization: standard_deviation"


def test_other_methods_are_kept_beside_it(written, trained, fields):
    out, _ = written
    assert {path.name for path in out.glob("*.nc")} == {"fields.nc", "fields_linear.nc"}
    with xr.open_dataset(out / "fields.nc") as data, xr.open_dataset(out / "fields_linear.nc") as linear:
        assert [one.attrs["method"] for one in (data, linear)] == ["adaptive", "linear"]
        assert data.attrs["antithetic"] == 0
        assert linear.sizes["realization"] == 1
        for one in (data, linear):
            np.testing.assert_array_equal(one["frame"], NUMBERS[:3])
        cases = make_cases(trained, fields.select([0, 1, 2]), NUMBERS[:3], PATTERNS, seed=4)
        estimates = run_method("linear", trained, fields.select([0, 1, 2]), cases, 1).members
        eastward = linear["eastward_sea_water_velocity"].values.reshape(6, *SHAPE)
        np.testing.assert_allclose(eastward, np.stack(estimates)[:, 0, ..., 0], atol=1e-6)
        np.testing.assert_array_equal(linear["observed"], data["observed"])


def test_the_figure_is_a_picture(written):
    picture = image.imread(written[0] / "figure.png")
    assert min(picture.shape[:2]) > 200
    assert picture[..., :3].std() > 0.05


@pytest.mark.parametrize(
    ("form", "calibrated", "other_prior", "last"),
    [
        ("anchored", None, False, "kalman"),
        ("anchored", "kalman_cg", False, "kalman_cg"),
        ("anchored", "adaptive", False, "kalman"),
        ("conditional", None, False, "given"),
        ("conditional", None, True, "kalman"),
        ("conditional", "mmps", True, "mmps"),
        ("conditional", "kalman_ridge", False, "kalman_ridge"),
        ("conditional", "kalman_ridge", True, "kalman_jvp"),
    ],
)
def test_the_usual_table_has_what_inpaint_does(form, calibrated, other_prior, last):
    learnt = (SimpleNamespace(method=calibrated),) if calibrated else ()
    trained = SimpleNamespace(form=form, calibrations=learnt)
    names = evaluate.usual_methods(trained, other_prior)
    assert names[:7] == [*methods.BASELINES, "adaptive", "kalman"][:7]
    assert len(names) == len(set(names))
    assert names[-1] == last


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["linear", "magic"]}, "method 'magic' is not one of"),
        ({"methods": []}, "at least one method"),
        ({"methods": ["linear", "kalman"], "members": 3}, "pairs: 3 is odd"),
        ({"patterns": ["line:4", "spiral:2"]}, "pattern 'spiral:2' is not one of"),
        ({"patterns": []}, "at least one pattern"),
        ({"patterns": ["cells:1"]}, "no cell to score"),
        ({"shown": "kalman"}, "kalman is not among the methods"),
        ({"kept": ["gp"]}, "gp is not among the methods"),
    ],
)
def test_mistakes_are_found_before_the_work(trained, fields, tmp_path, monkeypatch, change, message):
    def never(*_, **__):
        raise AssertionError("a method was run")

    monkeypatch.setattr(evaluate, "run_method", never)
    asked = {"patterns": PATTERNS, "methods": ["linear"], "members": 2} | change
    patterns, methods = asked.pop("patterns"), asked.pop("methods")
    with pytest.raises(InputError, match=message):
        evaluate.run(trained, fields, NUMBERS, patterns, methods, tmp_path, **asked)


def test_results_do_not_replace_what_is_read(trained, fields, tmp_path):
    path = tmp_path / "fields.nc"
    readers.write(fields, path)
    content = path.read_bytes()
    made = dataclasses.replace(trained, training={"config": {"data": {"fields": str(tmp_path / "*.nc")}}})
    for given in (str(path), None):
        with pytest.raises(InputError, match="is a file that this command reads, and would be lost"):
            evaluate.run(
                made, fields, NUMBERS, PATTERNS, ["linear"], tmp_path, inputs=files_of(made, given)
            )  # fmt: skip
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "name", ["table.csv", "frames.csv", "details.csv", "fields.nc", "fields_linear.nc", "figure.png"]
)
def test_results_replace_nothing_but_earlier_results(trained, fields, tmp_path, monkeypatch, name):
    """A file of the user's is refused with its name before anything is made, and stays byte for byte."""
    out = tmp_path / "mine"
    out.mkdir()
    content = b"x,y\n1,2\n"
    if name == "fields.nc":
        # As `inpaint` names it in its own commands.
        xr.Dataset({"eastward_sea_water_velocity": ("x", np.zeros(3))}).to_netcdf(out / name, engine="h5netcdf")
        content = (out / name).read_bytes()
    (out / name).write_bytes(content)
    monkeypatch.setattr(evaluate, "make_cases", None)
    with pytest.raises(InputError, match=rf"mine: {name} is there, and is not of an earlier one; give --out another"):
        evaluate.run(
            trained, fields, NUMBERS, PATTERNS, ["linear", "linear_samples"], out, members=2, kept=["linear"]
        )  # fmt: skip
    assert [(path.name, path.read_bytes()) for path in out.iterdir()] == [(name, content)]


def test_results_are_not_put_into_a_model(trained, fields, tmp_path):
    model.save(trained, tmp_path / "model")
    with pytest.raises(InputError, match="model: it is the folder of a model"):
        evaluate.run(trained, fields, NUMBERS, PATTERNS, ["linear"], tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [model.DESCRIPTION, model.WEIGHTS]


def test_an_evaluation_replaces_an_earlier_one_and_goes_into_what_a_stopped_one_left(trained, fields, tmp_path):
    def run(frames, **settings):
        evaluate.run(
            trained, fields.select(range(frames)), NUMBERS[:frames], PATTERNS[:1], ["linear", "linear_samples"],
            tmp_path, members=2, **settings,
        )  # fmt: skip
        return pd.read_csv(tmp_path / "table.csv").frames.unique()

    # Names of the user's own are no hindrance, nor is what is unfinished.
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "unfinished_0123456789abcdef").mkdir()
    assert run(1, kept=["linear"]) == 1
    assert run(2, kept=["linear"]) == 2
    # One that was killed between its files.
    for name in ("fields.nc", "details.csv"):
        (tmp_path / name).unlink()
    assert run(3) == 3
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_files_say_which_evaluation_they_are_of(trained, fields, tmp_path):
    """Those of one are alike; another size, another seed and another calibration are others."""

    def run(number, model=trained, **settings):
        out = tmp_path / str(number)
        evaluate.run(
            model, fields.select(range(1)), NUMBERS[:1], PATTERNS[:1], ["linear", "linear_samples"], out,
            **({"members": 2, "kept": ["linear"]} | settings),
        )  # fmt: skip
        told = {}
        for path in sorted(out.glob("fields*.nc")):
            with xr.open_dataset(path) as data:
                told[path.name] = data.attrs["evaluation"]
        return told

    first = run(0)
    assert set(first) == {"fields.nc", "fields_linear.nc"}
    assert len(set(first.values())) == 1
    assert run(1) == first
    learnt = SimpleNamespace(method="adaptive", members=4, to_json=lambda: {"method": "adaptive"})
    others = [
        run(2, members=3), run(3, seed=1), run(4, dataclasses.replace(trained, calibrations=(learnt,)))
    ]  # fmt: skip
    assert len({first["fields.nc"], *(one["fields.nc"] for one in others)}) == 4


def test_results_need_a_folder(trained, fields, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        evaluate.run(trained, fields, NUMBERS, PATTERNS, ["linear"], tmp_path / "file" / "out")


# --- choice of frames ---------------------------------------------------------------------------------------


def test_frames_are_picked_from_the_test_part():
    split = Split(np.arange(50), np.arange(60, 70), np.arange(80, 120), 10, 3.0)
    for seed in range(5):
        numbers = pick(split, 30, seed)
        assert len(set(numbers.tolist())) == 30
        assert set(numbers.tolist()) <= set(range(80, 120))
        assert (np.diff(numbers) > 0).all()
        np.testing.assert_array_equal(numbers, pick(split, 30, seed))
    assert (pick(split, 30, 0) != pick(split, 30, 1)).any()
    np.testing.assert_array_equal(pick(split, 1000), split.test)
    with pytest.raises(InputError, match="at least one frame"):
        pick(split, 0)


@pytest.mark.parametrize(
    ("frames", "decorrelation", "block"),
    [(64, 25.0, 4), (64, 1.0, 1), (64, 4000.0, 16), (1, 25.0, 1), (3, 400.0, 1), (8, 150.0, 2), (400, 25.0, 25)],
)
def test_blocks_span_the_decorrelation_time(frames, decorrelation, block):
    split = Split(np.arange(10), np.arange(10), np.arange(400), 0, decorrelation)
    assert block_length(split, frames) == block
    assert math.isfinite(block)
