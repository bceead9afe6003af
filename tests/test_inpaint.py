"""Inpainting as a user does it: against dense algebra, in every form of observation, and with every mistake."""

import dataclasses
import datetime
import inspect
import itertools
import json
import logging
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cftime
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import tiny
import xarray as xr
from scipy import stats
from scipy.interpolate import RegularGridInterpolator

import jax_repaint
from jax_repaint import export, gains, guide, inpaint, memory, methods, metrics, model, observe, unfinished
from jax_repaint.calibration import Calibration, Gate
from jax_repaint.cases import make_cases
from jax_repaint.data import readers
from jax_repaint.data.fields import Fields
from jax_repaint.data.observations import Grid, collect
from jax_repaint.errors import InputError
from jax_repaint.methods import gate_evidence, run_method
from jax_repaint.nets import unet
from jax_repaint.prior import linear
from jax_repaint.unfinished import Unfinished

U, V = "eastward_sea_water_velocity", "northward_sea_water_velocity"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    tiny.compile_once(tmp_path_factory.mktemp("compiled"))
    yield
    tiny.compile_as_usual()


@pytest.fixture(scope="module")
def trained():
    return tiny.model("anchored")


@pytest.fixture(scope="module")
def gaussian_model(trained):
    """A network that adds nothing to the exact denoiser of its linear prior."""
    return dataclasses.replace(trained, params=jax.tree.map(np.zeros_like, trained.params))


GRID = Grid(tiny.fields().ocean, tiny.fields().lat, tiny.fields().lon)


def table(count=6, seed=0, **columns):
    """Points between ocean cells, with velocities and errors of their own."""
    rng = np.random.default_rng(seed)
    content = {
        "lat": rng.uniform(18.011, 18.059, count),
        "lon": rng.uniform(295.051, 295.109, count),
        "u": rng.normal(0, 0.1, count),
        "v": rng.normal(0, 0.1, count),
    }
    return pd.DataFrame(content | columns)


def quietly(trained, observations, **options):
    return inpaint.inpaint(trained, observations, **({"progress": False, "members": 4} | options))


def dense(trained, points, sigma):
    """Posterior mean and standard deviation (y, x, 2) in m/s of points, by matrices of the whole field."""
    gaussian, standardiser = trained.gaussian, trained.standardiser
    y, x = trained.ocean.shape
    direction = np.asarray(gaussian.direction, np.float64)[:, :y, :x]
    flat = direction.reshape(len(direction), -1)
    wet = np.repeat(trained.ocean.ravel(), 2)
    rest = float(gaussian.rest)
    covariance = (flat.T * (np.asarray(gaussian.variance, np.float64) - rest)) @ flat + rest * np.diag(wet)
    std = np.tile(standardiser.std.astype(np.float64), y * x)
    covariance *= std[:, None] * std
    mean = standardiser.restore(np.asarray(gaussian.mean)[:y, :x]).reshape(-1).astype(np.float64)
    # Interpolation is linear in the field: its matrix is found from unit fields.
    unit = np.eye(y * x).reshape(y, x, -1)
    weights = RegularGridInterpolator((trained.lat, trained.lon), unit)(points[["lat", "lon"]].to_numpy())
    a = np.einsum("mk,cd->mckd", weights, np.eye(2)).reshape(2 * len(points), -1)
    errors = np.diag(np.broadcast_to(np.asarray(sigma, float).reshape(len(points), -1), (len(points), 2)).ravel() ** 2)
    gain = covariance @ a.T @ np.linalg.inv(a @ covariance @ a.T + errors)
    mean = mean + gain @ (points[["u", "v"]].to_numpy().reshape(-1) - a @ mean)
    variance = np.diag(covariance - gain @ a @ covariance)
    shape = (y, x, 2)
    return mean.reshape(shape), np.sqrt(np.maximum(variance, 0)).reshape(shape)


def both(fields, kind=""):
    """(..., y, x, 2) of a result."""
    return np.stack([fields[f"{name}{kind}"].values for name in (U, V)], -1)


def test_points_give_the_posterior_of_dense_algebra(gaussian_model):
    points = table(6)
    # Two in one cell, of which one is hardly to be believed.
    points.loc[5, ["lat", "lon"]] = points.loc[4, ["lat", "lon"]] + 0.001
    sigma = np.array([0.01, 0.02, 0.05, 0.01, 0.01, 0.5])
    fields = quietly(gaussian_model, points.assign(sigma=sigma), members=8)
    mean, std = dense(gaussian_model, points, sigma)
    ocean = GRID.ocean
    np.testing.assert_allclose(both(fields, "_prior_mean")[0][ocean], mean[ocean], atol=1e-5)
    # Antithetic members have the exact mean where everything is linear.
    np.testing.assert_allclose(both(fields, "_mean")[0][ocean], mean[ocean], atol=1e-5)
    samples = quietly(gaussian_model, points.assign(sigma=sigma), members=512, method="linear_samples", chunk=512)
    spread = both(samples, "_standard_deviation")[0]
    np.testing.assert_allclose(spread[ocean], std[ocean], rtol=0.2)
    np.testing.assert_allclose(np.mean(spread[ocean] ** 2), np.mean(std[ocean] ** 2), rtol=0.05)


# Seeds of their own, as gains of a pattern are kept.
@pytest.mark.parametrize(("method", "seed"), [("kalman", 2), ("kalman_cg", 4), ("kalman_jvp", 5)])
def test_a_track_of_many_points_gives_the_posterior_of_dense_algebra(gaussian_model, monkeypatch, method, seed):
    """Three hundred points in a few squares of the grid, sampled with the gains of fewer rows."""
    points, made = table(300, seed=seed), []
    sigma = np.random.default_rng(3).uniform(0.05, 0.4, 300)
    kalman_gains = gains.kalman_gains

    def counted(gaussian, observation, *rest):
        made.append(int(observation.valid.sum()))
        return kalman_gains(gaussian, observation, *rest)

    monkeypatch.setattr(gains, "kalman_gains", counted)
    fields = quietly(gaussian_model, points.assign(sigma=sigma), members=8, method=method)
    assert made
    assert max(made) < 150
    mean, _ = dense(gaussian_model, points, sigma)
    np.testing.assert_allclose(both(fields, "_mean")[0][GRID.ocean], mean[GRID.ocean], atol=2e-5)
    observed, values = (np.asarray(part) for part in collect(points, GRID)[0].observation.on_grid(GRID.ocean.shape))
    np.testing.assert_array_equal(fields.observed.values[0] == 1, observed)
    np.testing.assert_allclose(both(fields, "_observed")[0][observed], values[observed], atol=1e-6)
    apart = points[["u", "v"]].to_numpy() - RegularGridInterpolator((GRID.lat, GRID.lon), np.nan_to_num(mean))(
        points[["lat", "lon"]].to_numpy()
    )
    expected = np.sqrt(np.mean((apart / sigma[:, None]) ** 2))
    assert float(fields.misfit[0]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("method", ["kalman", "kalman_jvp", "kalman_cg", "cov_pigdm"])
def test_nearly_exact_points_that_share_cells_are_no_better_than_single_precision(gaussian_model, method):
    """Two hundred readings of one field in nine cells, each with an error of a ten-thousandth of its variability."""
    frame = np.nan_to_num(tiny.fields().velocity[50])
    points = table(200, seed=9)
    points = points.assign(lat=18.0301 + 0.4 * (points.lat - 18.011), lon=295.0601 + 0.4 * (points.lon - 295.051))
    points[["u", "v"]] = RegularGridInterpolator((GRID.lat, GRID.lon), frame)(points[["lat", "lon"]].to_numpy())
    std = gaussian_model.standardiser.std.max()
    fields = quietly(gaussian_model, points, members=32, method=method, sigma=1.01e-4 * std)
    mean, _ = dense(gaussian_model, points, np.full(200, 1e-3 * std))
    error = np.abs(both(fields, "_mean")[0] - mean)[GRID.ocean]
    assert error.max() < 0.005 * std


@pytest.mark.parametrize("method", ["paste", "mmps", "dps", "adaptive"])
def test_points_are_not_merged_for_methods_that_see_more_than_their_likelihood(trained, monkeypatch, method):
    points, made = table(60, seed=2), []

    def caught(name, trained, fields, cases, *rest):
        made.extend(cases)
        raise InputError("seen")

    monkeypatch.setattr(methods, "run_method", caught)
    with pytest.raises(InputError, match="seen"):
        quietly(trained, points, method=method)
    (case,) = made
    assert case.observation.share is None
    assert int(case.observation.valid.sum()) == 60


def test_the_spread_of_the_currents_is_that_of_the_prior_without_observations(trained):
    fields = quietly(trained, table(3), method="linear_samples")
    std = both(fields, "_climatological_standard_deviation")
    assert fields[f"{U}_climatological_standard_deviation"].dims == ("lat", "lon")
    # An observation with a very large error says nothing.
    _, expected = dense(trained, table(1), [1e3])
    np.testing.assert_allclose(std[GRID.ocean], expected[GRID.ocean], rtol=1e-4)
    assert np.isnan(std[~GRID.ocean]).all()
    training = tiny.fields().velocity[:, GRID.ocean].std(0)
    np.testing.assert_allclose(std[GRID.ocean].mean(), training.mean(), rtol=0.1)


def test_errors_of_u_and_v_may_differ(gaussian_model):
    points = table(3)
    sigma = np.array([[0.01, 0.5], [0.02, 0.3], [0.5, 0.01]])
    fields = quietly(gaussian_model, points.assign(sigma_u=sigma[:, 0], v_std=sigma[:, 1]))
    mean, _ = dense(gaussian_model, points, sigma)
    np.testing.assert_allclose(both(fields, "_mean")[0][GRID.ocean], mean[GRID.ocean], atol=1e-5)


def test_another_pattern_of_the_same_bucket_compiles_nothing(trained, caplog):
    quietly(trained, table(6))
    with jax.log_compiles(), caplog.at_level(logging.DEBUG):
        quietly(trained, table(9, seed=1))
        again = [record.getMessage() for record in caplog.records if "ompiling" in record.getMessage()]
        assert not again
        quietly(trained, table(20, seed=1))
    assert any("ompiling" in record.getMessage() for record in caplog.records)


def test_the_first_call_says_that_it_is_compiling(trained, capsys, monkeypatch):
    monkeypatch.setattr(inpaint, "_compiled", set())
    for _ in range(2):
        inpaint.inpaint(trained, table(6), 4)
    assert capsys.readouterr().err.count("compiling for up to 16 observations and 4 members") == 1


@pytest.mark.parametrize(
    ("folder", "command", "said"),
    [
        (None, False, "; later calls do not wait for it\n"),
        (None, True, "; --cache=FOLDER keeps it for the next run\n"),
        ("kept", True, "; kept keeps it for the next run\n"),
    ],
)
def test_who_does_not_wait_again_is_said_as_it_is(trained, capsys, monkeypatch, folder, command, said):
    monkeypatch.setattr(inpaint, "_compiled", set())
    monkeypatch.setattr(inpaint, "FLAGS", {"cache"} if command else set())
    monkeypatch.setattr(inpaint.jax, "config", SimpleNamespace(jax_compilation_cache_dir=folder))
    inpaint._announce(trained, gains.Rows(6, False), 1, 4, "kalman")
    assert capsys.readouterr().err.endswith(said)


def test_the_linear_estimate_announces_no_network(trained, capsys, monkeypatch):
    monkeypatch.setattr(inpaint, "_compiled", set())
    inpaint.inpaint(trained, table(6), 4, method="linear_samples")
    assert "compiling" not in capsys.readouterr().err


def test_the_times_of_a_file_are_sampled_in_batches(trained, monkeypatch):
    """In order of time, though those with more observations are of another program."""
    calls, run = [], methods.posterior_ensemble

    def counted(*arguments, frames, **options):
        calls.append(len(frames))
        return run(*arguments, frames=frames, **options)

    times = [f"2020-01-0{day}" for day in range(1, 7)]
    parts = [table(20 if day == 2 else 5, seed=day, time=time) for day, time in enumerate(times)]
    alone = [both(quietly(trained, part))[:, 0] for part in parts]
    monkeypatch.setattr(methods, "posterior_ensemble", counted)
    fields = inpaint.inpaint(trained, pd.concat(parts), 4, chunk=8, progress=False)
    assert list(fields.time.values) == list(np.array(times, "M8[ns]"))
    np.testing.assert_allclose(both(fields), np.stack(alone, 1), atol=1e-5)
    assert calls == [2, 2, 2, 1]


def test_a_field_depends_on_its_own_time_seed_and_observations_alone(trained):
    points = table(8, time=["2020-01-01T00:10"] * 5 + ["2020-01-01T02:00Z"] * 3)
    fields = quietly(trained, points)
    assert list(fields.time.values) == [np.datetime64("2020-01-01T00:10"), np.datetime64("2020-01-01T02:00")]
    alone = quietly(trained, points[5:])
    # Fields of a batch may differ by rounding from those that are sampled alone.
    np.testing.assert_allclose(both(fields)[:, 1], both(alone)[:, 0], atol=1e-5)
    assert np.nanmax(np.abs(both(quietly(trained, points[5:], seed=1)) - both(alone))) > 1e-3
    together = quietly(trained, points, step="1D")
    assert list(together.time.values) == [np.datetime64("2020-01-01")]
    assert int(together.observed.sum()) == int((fields.observed.sum("time") > 0).sum())
    other = quietly(trained, points, time="2021-05-05")
    assert list(other.time.values) == [np.datetime64("2021-05-05")]
    np.testing.assert_array_equal(other.observed.values[0], together.observed.values[0])


def test_statistics_are_those_of_the_members(trained):
    fields = quietly(trained, table(6), members=8)
    members, ocean = both(fields), GRID.ocean
    assert members.shape == (8, 1, 7, 12, 2)
    std = np.sqrt(metrics.ensemble_variance(members, antithetic=True))
    np.testing.assert_allclose(both(fields, "_mean"), members.mean(0), atol=1e-6)
    np.testing.assert_allclose(both(fields, "_standard_deviation"), std, rtol=1e-4, atol=1e-6)
    half = stats.t(df=4).ppf(0.95) * std  # one degree of freedom a pair
    np.testing.assert_allclose(both(fields, "_low"), members.mean(0) - half, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(both(fields, "_high"), members.mean(0) + half, rtol=1e-4, atol=1e-5)
    assert "not calibrated" in fields.attrs["interval"]
    for name in fields.data_vars:
        if name.startswith((U, V)) and not name.endswith("_observed"):
            assert np.isnan(fields[name].values[..., ~ocean]).all(), name
            assert np.isfinite(fields[name].values[..., ocean]).all(), name


def test_statistics_of_members_without_partners(trained):
    """Five draws of the linear posterior: Student's t of four degrees of freedom, for one more draw."""
    fields = quietly(trained, table(6), members=5, method="linear_samples")
    members = both(fields)
    mean, std = members.mean(0, dtype=float), members.std(0, ddof=1, dtype=float)
    np.testing.assert_allclose(both(fields, "_standard_deviation"), std, rtol=1e-4, atol=1e-6)
    half = stats.t(df=4).ppf(0.95) * np.sqrt(1 + 1 / 5) * std
    np.testing.assert_allclose(both(fields, "_low"), mean - half, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(both(fields, "_high"), mean + half, rtol=1e-4, atol=1e-5)


def calibrated_with(trained, **changes):
    content = {
        "method": "kalman", "members": 8, "antithetic": True, "centres": (-10.0, -5.0), "weight": (0.5, 0.5),
        "spread": (2.0, 2.0), "scale": (3.0, 3.0), "promised": True, "frames": 10, "patterns": ("line:3",),
        "blocks": 20, "seed": 0,
        "held_out": dict.fromkeys(("mse_prior", "mse_raw", "mse_fused", "spread_skill_raw", "spread_skill"), 1.0),
    }  # fmt: skip
    return dataclasses.replace(trained, calibrations=(Calibration.create(**(content | changes)),))


def test_observations_stand_in_their_cells(trained):
    # Two share a cell; positions are nearer to its centre than to any other.
    points = pd.DataFrame({"lat": [18.041, 18.0405, 18.05], "lon": [295.071, 295.0695, 295.1]})
    points = points.assign(u=[0.1, 0.3, -0.2], v=[0.0, -0.1, 0.05])
    fields = quietly(trained, points, method="linear_samples")
    values, observed = both(fields, "_observed")[0], fields["observed"].values[0] == 1
    assert np.argwhere(observed).tolist() == [[4, 7], [5, 10]]
    np.testing.assert_allclose(values[observed], [[0.2, -0.05], [-0.2, 0.05]], atol=1e-6)
    assert np.isnan(values[~observed]).all()


def test_a_figure_shows_what_the_file_holds(trained, monkeypatch, tmp_path):
    hours = [f"2020-01-01T{hour:02d}:00" for hour in range(5)]
    fields = quietly(trained, table(5, time=hours), method="linear_samples")
    drawn, draw = [], inpaint.plots.currents
    monkeypatch.setattr(inpaint.plots, "currents", lambda *args, **by: drawn.append((args, by)) or draw(*args, **by))
    inpaint.figure(fields, tmp_path / "fields.png")
    (((_, examples, ocean, metres), named),) = drawn
    assert [one.name for one in examples] == [f"2020-01-01 {hour:02d}:00" for hour in (0, 2, 4)]
    for one, i in zip(examples, (0, 2, 4), strict=True):
        np.testing.assert_array_equal(one.mean, both(fields, "_mean")[i])
        np.testing.assert_array_equal(one.prior_mean, both(fields, "_prior_mean")[i])
        np.testing.assert_array_equal(one.member, both(fields)[0, i])
        np.testing.assert_array_equal(one.spread, both(fields, "_standard_deviation")[i])
        np.testing.assert_array_equal(one.values[one.observed], both(fields, "_observed")[i][one.observed])
    np.testing.assert_array_equal(ocean, trained.ocean)
    np.testing.assert_allclose(metres, tiny.fields().metres())
    np.testing.assert_allclose(named["convergence"], tiny.fields().convergence(), atol=1e-12)


def test_the_calibration_of_the_model_is_applied(trained, caplog):
    calibrated = calibrated_with(trained)
    raw = quietly(calibrated, table(6), members=8, raw=True)
    fields = quietly(calibrated, table(6), members=8)
    np.testing.assert_array_equal(both(raw), both(quietly(trained, table(6), members=8)))
    middle = (both(raw, "_mean") + both(raw, "_prior_mean")) / 2
    np.testing.assert_allclose(both(fields, "_mean"), middle, atol=1e-6)
    np.testing.assert_allclose(both(fields) - middle, 2 * (both(raw) - both(raw, "_mean")), atol=1e-5)
    std = both(fields, "_standard_deviation")
    np.testing.assert_allclose(std, 2 * both(raw, "_standard_deviation"), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(both(fields, "_high") - middle, 3 * std, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(middle - both(fields, "_low"), 3 * std, rtol=1e-3, atol=1e-5)
    assert fields.attrs["interval"] == "5 to 95 %, calibrated on held-out frames"
    assert fields.attrs["calibration"].endswith("10 held-out fields in 20 blocks of time")
    assert fields[f"{U}_low"].attrs["long_name"].endswith("of the calibrated 5 to 95 % interval")
    assert raw.attrs["calibration"].startswith("none")
    days = np.repeat(np.array(["2020-01-01", "2020-01-02"], "datetime64[ns]"), 3)
    other = quietly(calibrated, table(6, time=days), members=4, chunk=4)
    said = "the calibration of this model is for 8 members of kalman, not for 4 of kalman, and is not used"
    assert caplog.messages.count(said) == 1
    assert "not calibrated" in other.attrs["interval"]


def test_a_model_without_a_calibration_is_warned_of(trained, caplog):
    """But where that is asked for, or members need none."""
    for options, warned in (({}, True), ({"raw": True}, False), ({"method": "linear_samples"}, False)):
        caplog.clear()
        quietly(trained, table(6), members=4, **({"method": "kalman"} | options))
        assert ("the model has no calibration" in caplog.text) is warned


def test_a_gate_weighs_each_field_as_it_was_learnt(trained):
    """Whole cells of a held-out field, as a user gives them: the weight is that of an evaluation of the same field."""
    fields = tiny.fields().select([3])
    (case,) = make_cases(trained, fields, [7], ["cells:0.3"])
    gate = Gate(0.3, 0.7, -0.4)
    (evidence,) = gate_evidence("kalman", trained, fields, [case], 8)
    weight = gate.of(evidence)
    assert 0.05 < weight < 0.95
    given = np.where(case.observed[..., None], case.truth, np.nan)
    options = {"members": 8, "time": "1970-01-01T00:00:07"}
    with_gate = quietly(calibrated_with(trained, gate=gate), given, **options)
    raw = quietly(trained, given, **options)
    prior, mean = both(raw, "_prior_mean"), both(raw, "_mean")
    moved, whole = (both(with_gate, "_mean") - prior)[..., GRID.ocean, :], (mean - prior)[..., GRID.ocean, :]
    found = np.sum(moved * whole) / np.sum(whole**2)
    np.testing.assert_allclose(moved, found * whole, atol=1e-6)
    # Its rows are in other places of the bucket, and the draws that they perturb are others.
    assert found == pytest.approx(0.5 * weight, rel=5e-3)
    told = with_gate.attrs
    assert told["calibration"].endswith(
        "and the weight of each field by a second run without a tenth of its observations"
    )
    assert "is not calibrated with them" in told["interval"]
    # Of a single observation nothing can be held out; beside other fields it has the weight of a field without a gate.
    points = table(7, time=["2020-01-01"] * 6 + ["2020-01-02"])
    options = {"members": 8, "method": "kalman"}
    both_days, ungated = (quietly(calibrated_with(trained, gate=one), points, **options) for one in (gate, None))
    means = [both(fields, "_mean")[:, GRID.ocean] for fields in (both_days, ungated)]
    np.testing.assert_allclose(means[0][1], means[1][1], atol=1e-6)
    assert np.abs(means[0][0] - means[1][0]).max() > 1e-3
    with pytest.raises(InputError, match="which a program of one run cannot do"):
        export.export(calibrated_with(trained, gate=gate), None, members=8, method="kalman")


def test_what_keeps_parts_takes_a_path_as_text(trained, tmp_path):
    given = table(3)
    keeping = quietly(trained, given, members=4, method="linear_samples", unfinished=Unfinished(str(tmp_path / "some")))
    np.testing.assert_array_equal(both(keeping), both(quietly(trained, given, members=4, method="linear_samples")))
    with pytest.raises(InputError, match=r"unfinished must be an Unfinished\(path\), got str"):
        quietly(trained, given, members=4, method="linear_samples", unfinished=str(tmp_path / "some"))


@pytest.mark.parametrize("value", [2.5, math.nan, math.inf, "8", 0, -4])
@pytest.mark.parametrize("name", ["members", "chunk"])
def test_members_and_chunks_are_whole_numbers(trained, name, value):
    with pytest.raises(InputError, match=rf"^{name} must be a whole number, at least 1, got {value!r}$"):
        inpaint.inpaint(trained, table(3), **{name: value}, method="linear_samples")


def test_a_gate_holds_out_whole_cells_of_a_dense_track(trained, monkeypatch):
    """A reading beside others of its cell is told by them, whatever the field is like."""
    sampled, method = [], "kalman"

    def seen(name, model_, fields, cases, *rest, **options):
        sampled.append(cases)
        return run_method(name, model_, fields, cases, *rest, **options)

    monkeypatch.setattr(methods, "run_method", seen)
    points = table(200, seed=6)
    quietly(calibrated_with(trained, gate=Gate(0.3, 0.7, -0.4)), points, members=8, method=method)
    ((case,), (less,)) = sorted(sampled, key=lambda cases: -cases[0].observed.sum())
    cells = np.argwhere(case.observed).shape[0]
    out = case.observed & ~less.observed
    assert out.sum() == round(0.1 * cells)
    assert not (less.observed & ~case.observed).any()
    y, x = (np.rint((points[n] - axis[0]) / 0.01).astype(int) for n, axis in (("lat", GRID.lat), ("lon", GRID.lon)))
    assert (out[y, x]).sum() > out.sum()


def test_two_paired_members_have_no_spread_and_are_refused(trained):
    with pytest.raises(InputError, match="for a spread kalman needs 4 members at least, got 2"):
        quietly(trained, table(3), members=2, method="kalman")


def test_a_fill_value_for_an_error_is_refused(trained):
    with pytest.raises(InputError, match=r"1e.20 m/s, more than 1e.06; is a fill value undeclared"):
        quietly(trained, table(3, sigma=1e20))


def test_an_export_leaves_files_of_others_alone(trained, tmp_path):
    (tmp_path / export.GRID).write_text("mine")
    with pytest.raises(InputError, match=r"grid.npz is there, and is not of an earlier one"):
        export.export(trained, tmp_path, members=4, method="kalman")
    (tmp_path / export.GRID).unlink()
    (tmp_path / export.DESCRIPTION).mkdir()
    with pytest.raises(InputError, match=r"program.json: it is a folder"):
        export.export(trained, tmp_path, members=4, method="kalman")
    assert [path.name for path in tmp_path.iterdir()] == [export.DESCRIPTION]


def test_members_that_are_not_finite_are_never_written(trained, monkeypatch):
    def broken(*arguments, **options):
        made = run(*arguments, **options)
        made.members[0][1, 3] = np.nan
        return made

    run = run_method
    monkeypatch.setattr(methods, "run_method", broken)
    for method in ("kalman", "linear_samples", "adaptive"):
        with pytest.raises(InputError, match=f"1 of 4 members by {method} are not finite"):
            quietly(trained, table(6), method=method)


@pytest.mark.parametrize("error", [1e-20, 1e-9])
def test_errors_that_single_precision_cannot_tell_from_none_are_refused(trained, error):
    points = pd.concat([table(1), table(1)])
    with pytest.raises(InputError, match=r"the standard error of an observation is 1e-.* m/s; samplers in single"):
        quietly(trained, points, sigma=error)
    least = 1.01 * inpaint.LEAST_SIGMA * trained.standardiser.std.max()
    assert np.isfinite(both(quietly(trained, points, sigma=least))[..., GRID.ocean, :]).all()


def test_observations_of_one_cell_may_be_as_good_as_single_precision_allows(trained):
    y, x = np.argwhere(GRID.ocean)[20]
    points = pd.DataFrame({"lat": GRID.lat[y], "lon": GRID.lon[x], "u": [0.21] * 4, "v": -0.12})
    least = 1.01 * inpaint.LEAST_SIGMA * trained.standardiser.std.max()
    found = both(quietly(trained, points, sigma=least, method="kalman"))[..., y, x, :]
    counted = least * inpaint.LEAST_POINT_SIGMA / inpaint.LEAST_SIGMA
    np.testing.assert_allclose(found, np.broadcast_to([0.21, -0.12], found.shape), atol=5 * counted)


def test_very_many_points_of_few_cells_are_no_better_than_single_precision(gaussian_model):
    """Merged, 900 of them have a thirtieth of their error: where that is too small, members would be far off."""
    points = table(900).assign(u=0.2, v=-0.1)
    points = points.assign(lat=18.0401 + 0.005 * (points.lat - points.lat.min()), lon=295.0701)
    least = 1.01 * inpaint.LEAST_SIGMA * gaussian_model.standardiser.std.max()
    (frame,) = collect(points, GRID, sigma=least)
    assert np.asarray(inpaint._observation(gaussian_model, frame, "kalman").sigma).min() == np.float32(
        inpaint.LEAST_POINT_SIGMA
    )
    found = both(quietly(gaussian_model, points, sigma=least, method="kalman"))
    seen = np.asarray(frame.observation.apply(jnp.asarray(np.nan_to_num(found[0, 0]))))[: frame.count]
    np.testing.assert_allclose(seen, np.broadcast_to([0.2, -0.1], seen.shape), atol=1e-3)


def test_an_interval_without_a_promise_is_not_called_calibrated(trained):
    fields = quietly(calibrated_with(trained, promised=False, blocks=7), table(6), members=8)
    assert "its width is not calibrated, as 7 blocks of time are too few" in fields.attrs["interval"]
    assert fields.attrs["calibration"].endswith("in 7 blocks of time")
    assert fields[f"{U}_low"].attrs["long_name"].endswith("lower end of the 5 to 95 % interval")


@pytest.mark.parametrize(
    ("form", "calibrated", "expected"),
    [("anchored", None, "kalman"), ("conditional", None, "given"), ("conditional", "kalman", "kalman")],
)
def test_the_method_is_that_of_the_calibration_or_of_the_network(trained, form, calibrated, expected):
    calibrations = (SimpleNamespace(method=calibrated),) if calibrated else ()
    assert inpaint.default_method(dataclasses.replace(trained, form=form, calibrations=calibrations)) == expected


def test_a_default_method_without_a_network_is_said(trained, caplog):
    ready = calibrated_with(trained, method="linear_samples", antithetic=False)
    fields = quietly(ready, table(6), members=8)
    said = "calibrated for linear_samples, which is taken and uses no network"
    assert said in caplog.text
    caplog.clear()
    asked = quietly(ready, table(6), members=8, method="linear_samples")
    quietly(calibrated_with(trained), table(6), members=8)
    assert said not in caplog.text
    np.testing.assert_array_equal(both(fields), both(asked))


def test_the_file_is_cf_and_its_members_alone_have_the_names_of_currents(trained, tmp_path):
    pytest.importorskip("cf_xarray")
    points = table(8, time=["2020-01-01T00:00"] * 5 + ["2020-01-01T01:00"] * 3)
    fields = trained.inpaint(points, members=4, progress=False)
    readers.write_netcdf(fields, tmp_path / "fields.nc")
    with xr.open_dataset(tmp_path / "fields.nc") as read:
        xr.testing.assert_allclose(read.load(), fields)
    with xr.open_dataset(tmp_path / "fields.nc", decode_cf=False) as stored:
        land = stored[U].values[..., ~GRID.ocean]
        assert (land == stored[U].attrs["_FillValue"]).all()
        assert stored[U].attrs["_FillValue"] == readers.FILL
        assert stored[U].dims == ("realization", "time", "lat", "lon")
    readers.write_dataset(fields, tmp_path / "fields.zarr")
    with xr.open_zarr(tmp_path / "fields.zarr") as store:
        xr.testing.assert_identical(store.load(), read)
    names = read.cf.standard_names
    assert (names[U], names[V], names["realization"]) == ([U], [V], ["realization"])
    assert {key: read.cf.axes[key] for key in "XYT"} == {"X": ["lon"], "Y": ["lat"], "T": ["time"]}
    assert (read.cf.coordinates["latitude"], read.cf.coordinates["longitude"]) == (["lat"], ["lon"])
    for axis in ("lat", "lon", "time"):
        assert read.indexes[axis].is_monotonic_increasing
    assert {read[name].attrs["units"] for name in read.data_vars if name.startswith((U, V))} == {"m s-1"}
    assert read[f"{U}_mean"].attrs["cell_methods"] == "realization: mean"
    assert read[f"{V}_standard_deviation"].attrs["cell_methods"] == "realization: standard_deviation"
    assert set(read[U].attrs["ancillary_variables"].split()) <= set(read.data_vars)
    assert read.attrs["Conventions"] == "CF-1.11"
    assert read.attrs["model_fingerprint"] == model.fingerprint(trained)
    assert (int(read.attrs["seed"]), int(read.attrs["observations"]), read.attrs["sampler"]) == (0, 8, "kalman")
    assert f"jax {jax.__version__}" in read.attrs["versions"]
    np.testing.assert_array_equal(read.observed.sum(("lat", "lon")) > 0, [True, True])


@pytest.mark.parametrize("method", ["paste", "dps", "gp_init", "kalman"])
def test_methods_that_do_not_use_standard_errors_say_so(trained, caplog, method):
    """Not where they are the usual ones, which nobody gave."""
    frames = {sigma: collect(table(3), GRID, sigma=sigma) for sigma in (0.005, 0.2)}
    written = {sigma: inpaint._attributes(trained, some, 4, 0, method, None) for sigma, some in frames.items()}
    told = [attributes["observation_standard_error"] for attributes in written.values()]
    said = "" if method == "kalman" else ", not used by the sampler"
    assert told == [f"{sigma:g} m s-1{said}" for sigma in frames]
    if method not in ("paste", "kalman"):
        return  # one is run
    for sigma in frames:
        caplog.clear()
        quietly(trained, table(3), method=method, sigma=sigma, raw=True)
        warned = f"{method} takes observations as exact" in caplog.text
        assert warned == (method == "paste" and sigma == 0.2)


def test_cells_of_an_array_with_one_component_are_counted(caplog):
    field = np.full((7, 12, 2), np.nan)
    field[4, 6], field[5, 8, 0], field[5, 9, 1] = 0.1, 0.2, 0.2
    (frame,) = collect(field, GRID)
    assert frame.count == 1
    assert "the observations: 2 values have one component only; they count as missing" in caplog.text


def test_a_result_says_when_it_was_made_and_from_what(trained, tmp_path):
    path = tmp_path / "track.csv"
    table(3).to_csv(path, index=False)
    before = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    attributes = quietly(trained, path, method="linear_samples", sigma=0.025).attrs
    made, words = attributes["history"].split(" ", 1)
    assert before <= datetime.datetime.strptime(made, "%Y-%m-%dT%H:%M:%S%z") <= datetime.datetime.now(datetime.UTC)
    assert words == f"jax_repaint.inpaint, model {model.fingerprint(trained)}, method linear_samples, seed 0"
    assert attributes["observations_file"] == "track.csv"
    assert attributes["observation_standard_error"] == "0.025 m s-1"
    assert str(tmp_path) not in str(attributes)
    varied = quietly(trained, table(3, sigma=[0.5, 0.01, 0.02]), method="linear_samples").attrs
    assert varied["observation_standard_error"] == "0.01 to 0.5 m s-1"
    assert "observations_file" not in varied


def test_opendrift_drifts_particles_with_the_members(trained, tmp_path):
    oceandrift = pytest.importorskip("opendrift.models.oceandrift")
    from opendrift.readers.reader_netCDF_CF_generic import Reader

    points = table(8, time=["2020-01-01T00:00"] * 5 + ["2020-01-01T01:00"] * 3)
    readers.write_netcdf(quietly(trained, points), tmp_path / "fields.nc")
    reader = Reader(str(tmp_path / "fields.nc"))
    assert len(reader.realizations) == 4
    drift = oceandrift.OceanDrift(loglevel=50)
    drift.add_reader(reader)
    drift.set_config("environment:constant:land_binary_mask", 0)
    drift.seed_elements(lon=295.08, lat=18.03, number=8, time=reader.start_time)
    drift.run(steps=3, time_step=600)
    assert np.ptp(drift.result.lon.values[:, -1]) > 0


def test_a_member_has_what_parcels_asks_of_copernicus_marine_data(trained, tmp_path):
    """The steps of `parcels.convert.copernicusmarine_to_sgrid` of Parcels 4, which names axes by `cf.axes`."""
    pytest.importorskip("cf_xarray")
    points = table(8, time=["2020-01-01T00:00"] * 5 + ["2020-01-01T01:00"] * 3)
    readers.write_netcdf(quietly(trained, points, method="linear_samples"), tmp_path / "fields.nc")
    with xr.open_dataset(tmp_path / "fields.nc") as read:
        member = read.isel(realization=0)
        data = xr.merge([member[U].rename("U"), member[V].rename("V")])
    names = {axis: name for axis, (name,) in data.cf.axes.items()}
    assert names == {"X": "lon", "Y": "lat", "T": "time"}
    assert not [name for name, variable in data.variables.items() if "cf_role" in variable.attrs or name == "grid"]
    for name, standard in (("U", U), ("V", V)):
        assert data[name].dims == ("time", "lat", "lon")
        assert data.cf.standard_names[standard] == [name]
        assert data[name].attrs["units"] == "m s-1"
        np.testing.assert_array_equal(np.isfinite(data[name].values).all(0), GRID.ocean)
    assert data.time.dtype.kind == "M"
    for axis in names.values():
        assert data.indexes[axis].is_monotonic_increasing


def test_a_curvilinear_grid_keeps_its_places(trained, tmp_path):
    lat, lon = np.meshgrid(GRID.lat, GRID.lon, indexing="ij")
    turned = dataclasses.replace(trained, lat=lat + 0.001 * np.arange(12), lon=lon + 0.001 * np.arange(7)[:, None])
    velocity = np.full((7, 12, 2), np.nan)
    velocity[4, 6] = 0.1, -0.2
    readers.write_netcdf(quietly(turned, velocity, method="linear_samples"), tmp_path / "fields.nc")
    with xr.open_dataset(tmp_path / "fields.nc") as read:
        assert read[U].dims == ("realization", "time", "y", "x")
        for axis, place in (("lat", turned.lat), ("lon", turned.lon)):
            assert axis in read[U].coords
            np.testing.assert_array_equal(read[axis], place)
        np.testing.assert_allclose(read[f"{V}_prior_mean"][0, 4, 6], -0.2, atol=0.01)
        assert "1970-01-01 stands for it" in read.attrs["comment"]
    # The same as a point; the number of rows is the same too.
    point = pd.DataFrame({"lat": turned.lat[4, 6], "lon": turned.lon[4, 6], "u": 0.1, "v": -0.2}, index=[0])
    cell, same = (quietly(turned, given, method="linear_samples") for given in (velocity, point))
    np.testing.assert_allclose(both(same, "_prior_mean"), both(cell, "_prior_mean"), atol=1e-4)


@pytest.fixture(scope="module")
def observed_field():
    """A field with three observed cells, and the same as a table."""
    velocity = np.full((7, 12, 2), np.nan)
    cells = [(3, 6), (3, 7), (5, 2)]
    for number, (y, x) in enumerate(cells):
        velocity[y, x] = 0.1 * number, -0.05
    rows = [(GRID.lat[y], GRID.lon[x], *velocity[y, x]) for y, x in cells]
    return velocity, pd.DataFrame(rows, columns=["lat", "lon", "u", "v"])


def forms(velocity, points, folder):
    when = np.array(["2020-01-01"], "datetime64[ns]")
    points.to_csv(folder / "plain.csv", index=False)
    points.rename(columns={"lat": " Latitude", "u": "Vx"}).to_csv(folder / "named.csv", index=False, sep=";")
    rows = points.to_string(index=False).splitlines()
    (folder / "blanks.txt").write_text("\n".join(["# a vehicle", rows[0], "# on its way", *rows[1:]]) + "\n")
    (folder / "commented.tsv").write_text("# a vehicle\n" + points.to_csv(index=False, sep="\t"))
    fields = Fields.create(velocity[None], GRID.lat, GRID.lon, when, name="gappy")
    for suffix in ("nc", "npz"):
        readers.write(fields, folder / f"gappy.{suffix}")
    dims = {"dims": ("lat", "lon"), "coords": {"lat": GRID.lat, "lon": GRID.lon}}
    pair = tuple(xr.DataArray(velocity[..., c], **dims) for c in range(2))
    upside_down = xr.Dataset({"uo": pair[0], "vo": pair[1]}).isel(lat=slice(None, None, -1))
    return {
        "csv": (folder / "plain.csv", {}),
        "csv with other names": (str(folder / "named.csv"), {"columns": {"u": "vx"}}),
        "tsv with a comment": (folder / "commented.tsv", {}),
        "blanks between columns": (folder / "blanks.txt", {}),
        "frame": (points.assign(depth=3.0), {}),
        "frame to the west": (points.assign(lon=points.lon - 360), {}),
        "netcdf": (folder / "gappy.nc", {}),
        "npz": (folder / "gappy.npz", {}),
        "pair": (pair, {}),
        "dataset": (upside_down, {}),
        "dataset in cm/s": (
            xr.Dataset({n: (100 * a).assign_attrs(units="cm/s") for n, a in zip("uv", pair, strict=True)}), {}
        ),
        "dataset in cm/s of another spelling": (
            xr.Dataset({n: (100 * a).assign_attrs(Unit="cm/s") for n, a in zip("uv", pair, strict=True)}), {}
        ),
        "fields": (fields, {}),
        "array": (velocity, {}),
        "array of float32": (velocity.astype(np.float32), {}),
        "array of JAX": (jnp.asarray(velocity, jnp.float32), {}),
        "masked array": (np.ma.masked_array(np.nan_to_num(velocity, nan=1e20), np.isnan(velocity)), {}),
    }  # fmt: skip


def test_every_form_of_the_same_observations_is_the_same(observed_field, tmp_path):
    velocity, points = observed_field
    given = forms(velocity, points, tmp_path)
    (reference,) = collect(velocity, GRID)
    for name, (source, options) in given.items():
        (frame,) = collect(source, GRID, **options)
        assert frame.count == 3, name
        assert np.isnat(frame.time) == (name not in ("netcdf", "npz", "fields")), name
        ours, theirs = (
            o.adjoint(np.float32(o.valid)[:, None], (7, 12)) for o in (frame.observation, reference.observation)
        )
        np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg=name)
        for leaf in ("values", "sigma", "valid"):
            ours, theirs = getattr(frame.observation, leaf), getattr(reference.observation, leaf)
            np.testing.assert_allclose(ours, theirs, atol=1e-6, err_msg=name)
    (when,) = {frame.time for frame in collect(tmp_path / "gappy.nc", GRID, time="2021-02-03T04:05")}
    assert when == np.datetime64("2021-02-03T04:05")


def at(**changes):
    """One good point with something changed."""
    return pd.DataFrame([{"lat": 18.03, "lon": 295.08, "u": 0.1, "v": 0.2} | changes] * 2)


def wrong_row(**changes):
    frame = table(9).astype(object)
    for name, value in changes.items():
        frame.loc[[3, 7], name] = value
    return frame


def gappy(**changes):
    velocity = np.full((7, 12, 2), np.nan)
    velocity[5, 3] = 0.1
    return changes.get("velocity", velocity)


def test_a_cell_with_one_component_is_not_observed():
    velocity = gappy()
    velocity[5, 4, 0] = velocity[4, 3, 1] = 0.2
    (frame,) = collect(velocity, GRID)
    (alone,) = collect(gappy(), GRID)
    assert frame.count == 1
    jax.tree.map(np.testing.assert_array_equal, frame.observation, alone.observation)


BAD = {
    "no row": (at()[:0], "no observation"),
    "no cell": (np.full((7, 12, 2), np.nan), "no observation"),
    "a missing value": (wrong_row(u=np.nan), "u is missing or not finite in rows 3, 7"),
    "a missing place": (wrong_row(lat=None), "lat is missing or not finite in rows 3, 7"),
    "an infinite value": (wrong_row(v=np.inf), "v is missing or not finite"),
    "words": (wrong_row(v="fast"), "v is not a number in rows 3, 7, such as 'fast'"),
    "on land": (
        at(lat=18.0),
        r"observations 0 at lat 18\.0000 lon 295\.0800, 1 at lat 18\.0000 lon 295\.0800 lie on land; --leave_out",
    ),
    "outside": (
        at().assign(lon=[290.0, -64.92]),
        r"0 at lat 18\.0300 lon 290\.0000 lies outside the domain \(lat 18\.0000\.\.18\.0600, lon 295\.0000\.\.295",
    ),
    "missing in several columns": (
        wrong_row(u=np.nan).assign(sigma=[0.1, np.inf, None, *[0.1] * 6]),
        r"u is missing or not finite in rows 3, 7; sigma is missing or not finite in rows 1, 2 .*; --leave_out",
    ),
    "words in several columns": (
        wrong_row(u="slow", v="fast"),
        "u is not a number in rows 3, 7, .* 'slow'; v is not a",
    ),
    "error of zero": (at(sigma=0.0), "sigma must be positive, but is not in rows 0, 1"),
    "negative error": (at(sigma=-0.1), "must be positive"),
    "one error of two": (at(sigma_u=0.1), "error of one component only"),
    "cm/s": (at(u=80.0), "velocities reach 80 m/s"),
    "no column": (
        at().drop(columns="u"),
        r"no column for u that .*; it has lat, lon, v; name it by --u_name=\.\.\. \(columns={'u': \.\.\.}\)",
    ),
    "two columns": (at(uo=1.0), "several columns for u, u, uo"),
    "two of one name": (at(U=1.0), "several columns of one name"),
    "two of one name in a file": (
        b"lat,lon,u,v,u\n18.03,295.08,0.1,0.2,0.3\n",
        "several columns of one name: .* u, v, u",
    ),
    "seconds as times in a file": (b"lat,lon,u,v,time\n18.03,295.08,0.1,0.2,1700\n", "time holds numbers"),
    "times that are numbers": (at(time=3), "time holds numbers"),
    "times that are none": (
        at(time="noon"),
        "time is no date such as 2020-01-04T12:00 in rows 0, 1: 'noon'; .* ISO 8601",
    ),
    "the time of reading": (at(time="today"), "time is no date such as 2020-01-04T12:00 in rows 0, 1"),
    "another grid": (np.zeros((6, 12, 2)), "not on the model's grid"),
    "another array": (np.zeros((7, 12)), "not on the model's grid"),
    "an array of text": (np.full((7, 12, 2), "a"), "holds numbers"),
    "an array on land": (
        np.ones((7, 12, 2)),
        r"has values in 20 cells that are land of the model, the first one \(y=0, x=0\); --leave_out .* leaves",
    ),
    "an infinite cell": (np.where(np.isnan(gappy()), np.nan, np.inf), "infinite"),
    "a list": ([1, 2], "got list"),
    "no file": ("nowhere.csv", "cannot read nowhere.csv: No such file"),
    "no field file": ("nowhere.nc", "nowhere.nc"),
}


def untidy():
    """Nine points: two on land, one outside, one each without u, with an infinite v, without a time; three good."""
    points = table(9, time="2020-01-01").astype({"time": object})
    points.loc[[1, 4], "lat"] = 18.0
    points.loc[2, "lon"] = 290.0
    points.loc[5, "u"], points.loc[6, "v"], points.loc[8, "time"] = np.nan, np.inf, None
    return points


def test_rows_that_cannot_be_used_are_left_out_when_asked(trained, caplog, tmp_path):
    (frame,) = collect(untidy(), GRID, leave_out=True)
    said = (
        "left out 2 observations on land, 1 outside the grid, 3 without values (rows 1, 2, 4, 5, 6 and 1 more, counted"
    )
    assert said in caplog.text
    (expected,) = collect(untidy().loc[[0, 3, 7]], GRID)
    assert frame.count == 3
    jax.tree.map(np.testing.assert_array_equal, frame.observation, expected.observation)
    assert quietly(trained, untidy(), method="linear_samples", leave_out=True).attrs["observations"] == 3
    untidy().to_csv(tmp_path / "track.csv", index=False)
    (read,) = collect(tmp_path / "track.csv", GRID, leave_out=True)
    np.testing.assert_allclose(read.observation.values, expected.observation.values, rtol=1e-6)
    assert "track.csv: left out 2 observations on land" in caplog.text
    caplog.clear()
    collect(table(3), GRID, leave_out=True)
    assert not caplog.records
    with pytest.raises(InputError, match="no observation is left: the observations has 2 observations on land"):
        collect(at(lat=18.0), GRID, leave_out=True)
    # Rows are counted as they stand in the table.
    with pytest.raises(InputError, match=r"time is no date such as .* in rows 7, 8"):
        collect(untidy().assign(time=[*["2020-01-01"] * 7, "noon", "noon"]), GRID, leave_out=True)
    with pytest.raises(InputError, match="must be positive, but is not in row 3"):
        collect(untidy().assign(sigma=[0.1, 0, 0, 0, *[0.1] * 5]), GRID, leave_out=True)


def test_cells_on_land_are_left_out_when_asked(tmp_path, caplog):
    """Of an array, and of a file of three fields with errors of their own, one of which has values on land."""
    ashore, path = gappy(), tmp_path / "radar.nc"
    ashore[0, :2] = 0.1, 0.2
    right = three_times((gappy(), None), time=np.array(["2020-01-01", "2020-01-02", "2020-01-03"], "datetime64[ns]"))
    for name, standard in (("u", "eastward_sea_water_velocity"), ("v", "northward_sea_water_velocity")):
        right[name].attrs = {"standard_name": standard, "units": "m s-1"}
        right[f"{name}_error"] = xr.full_like(right[name], 0.02)
        right[f"{name}_error"].attrs = {"standard_name": f"{standard} standard_error", "units": "m s-1"}
    series = right.copy(deep=True)
    for name in "uv":
        series[name][1, 0, :2] = 0.3
    series.to_netcdf(path)
    for source, other in ((ashore, gappy()), (path, right)):
        with pytest.raises(
            InputError, match=r"values in 2 cells that are land of the model, the first one \(y=0, x=0\)"
        ):
            collect(source, GRID)
        caplog.clear()
        found, expected = collect(source, GRID, leave_out=True), collect(other, GRID, leave_out=True)
        assert (
            caplog.text.count("in 2 cells that are land of the model, the first one (y=0, x=0); they are left out") == 1
        )
        for one, two in zip(found, expected, strict=True):
            assert one.count == two.count
            np.testing.assert_array_equal(one.observation.cells, two.observation.cells)
            np.testing.assert_array_equal(one.observation.values, two.observation.values)


def test_many_bad_points_are_counted_and_a_few_named():
    points = table(20)
    points.loc[3:17, "lat"] = 18.0
    with pytest.raises(InputError, match=r"3 at lat 18\.0000 lon .* 7 at lat 18.* and 10 more lie on land") as caught:
        collect(points, GRID)
    assert " 8 at lat" not in str(caught.value)


def three_times(observed_field, **coordinates):
    velocity, _ = observed_field
    coordinates = {"lat": GRID.lat, "lon": GRID.lon} | coordinates
    dims = ("time", "lat", "lon")
    data = {n: (dims, np.stack([velocity[..., c] * k for k in (1, 2, 3)])) for c, n in enumerate("uv")}
    return xr.Dataset(data, coordinates)


@pytest.mark.parametrize("surface", [("", ""), ("surface_", ""), ("", "surface_"), ("surface_", "surface_")])
def test_errors_at_the_surface_are_those_of_velocities_there(observed_field, tmp_path, caplog, surface):
    given = three_times(observed_field, time=np.arange("2020-01-01", "2020-01-04", dtype="M8[D]").astype("M8[ns]"))
    for name, standard in zip("uv", (U, V), strict=True):
        given[name].attrs = {"units": "m s-1", "standard_name": surface[0] + standard}
        error = {"units": "m s-1", "standard_name": f"{surface[1]}{standard} standard_error"}
        given[f"{name}_err"] = xr.full_like(given[name], 0.1).assign_attrs(error)
    given.to_netcdf(tmp_path / "radar.nc", engine="h5netcdf")
    for source in (given, tmp_path / "radar.nc"):
        assert {float(frame.observation.sigma[0, 0]) for frame in collect(source, GRID)} == {np.float32(0.1)}
    assert not caplog.messages
    for name in "uv":
        given[f"{name}_err"].attrs["standard_name"] = "sea_water_speed standard_error"
    assert {float(frame.observation.sigma[0, 0]) for frame in collect(given, GRID)} == {np.float32(0.005)}
    assert caplog.messages == [
        "the data set: u_err and v_err are not known as errors of these velocities and are not used; their "
        "standard_name would be that of the velocity with standard_error behind it, as "
        "'eastward_sea_water_velocity standard_error'"
    ]


def with_errors(given, dims, called=True, told=True):
    """A data set whose velocities are called what they are, with errors along `dims` that may say what they are of."""
    shape = [given.sizes[d] for d in dims]
    errors = np.random.default_rng(3).uniform(0.01, 0.1, (2, *shape))
    for name, standard, error in zip("uv", (U, V), errors, strict=True):
        given[name].attrs = {"units": "m s-1"} | ({"standard_name": standard} if called else {})
        own = {"standard_name": f"{standard} standard_error"} if told else {}
        given[f"{name}_err"] = (dims, error, {"units": "m s-1"} | own)
    return given, errors


def both_ways(given, folder):
    """A data set, and the file that it is saved as."""
    given.to_netcdf(folder / "radar.nc", engine="h5netcdf")
    return given, folder / "radar.nc"


DAYS = np.arange("2020-01-01", "2020-01-04", dtype="M8[D]").astype("M8[ns]")


@pytest.mark.parametrize("called", [True, False])
@pytest.mark.parametrize("dims", [("lat", "lon"), ("time",), (), ("depth", "lat", "lon"), ("lon", "time", "lat")])
def test_errors_may_lack_dimensions_of_their_velocities(observed_field, tmp_path, caplog, dims, called):
    given = three_times(observed_field, time=DAYS).expand_dims(depth=[0.0], axis=1)
    given, errors = with_errors(given, dims, called)
    whole = xr.DataArray(errors, dims=("component", *dims)).isel(depth=0, missing_dims="ignore")
    whole = whole.broadcast_like(given["u"].isel(depth=0, drop=True)).transpose("time", "lat", "lon", "component")
    cells = np.isfinite(observed_field[0]).all(-1)
    for source in both_ways(given, tmp_path):
        frames = collect(source, GRID, sigma=0.3)
        assert len(frames) == 3
        for frame, expected in zip(frames, whole.values, strict=True):
            got = np.asarray(frame.observation.sigma)[np.asarray(frame.observation.valid)]
            np.testing.assert_allclose(got, expected[cells], rtol=1e-5)
    assert not caplog.messages


@pytest.mark.parametrize("dims", [("time", "lat", "lon"), ("lat", "lon"), ("time",), ()])
def test_errors_without_a_standard_name_are_named_by_a_warning(observed_field, tmp_path, caplog, dims):
    given, _ = with_errors(three_times(observed_field, time=DAYS), dims, told=False)
    for source in both_ways(given, tmp_path):
        caplog.clear()
        frames = collect(source, GRID, sigma=0.3)
        assert {float(frame.observation.sigma[0, 0]) for frame in frames} == {np.float32(0.3)}
        (message,) = caplog.messages
        assert "u_err and v_err are not known as errors of these velocities and are not used" in message
    # Only what may be an error is: a depth of the water or a temperature is none.
    others = {"h": given["u"][0].assign_attrs(standard_name="sea_floor_depth_below_geoid", units="m")}
    others["temp"] = given["u"].assign_attrs(standard_name="sea_water_temperature", units="degree_Celsius")
    given = given.drop_vars(["u_err", "v_err"]).assign(others | {"sigma": ("level", [0.0, 1.0])})
    caplog.clear()
    collect(given, GRID)
    assert not caplog.messages


def test_cells_whose_errors_are_missing_can_be_left_out(observed_field, tmp_path, caplog):
    given, errors = with_errors(three_times(observed_field, time=DAYS), ("time", "lat", "lon"))
    (y, x), (y1, x1), *_ = np.argwhere(np.isfinite(observed_field[0]).all(-1))
    given["u_err"][1, y, x], given["v_err"][1, y1, x1] = np.nan, 0.0
    for source in both_ways(given, tmp_path):
        said = rf"in 2 of 9 observed cells, the first one \(y={y}, x={x}\) at 2020-01-02T00:00:00"
        with pytest.raises(InputError, match=rf"positive, .* {said}; --leave_out"):
            collect(source, GRID)
        caplog.clear()
        frames = collect(source, GRID, leave_out=True)
        assert [frame.count for frame in frames] == [3, 1, 3]
        assert re.search(rf"{said}; they are left out", caplog.text)
        (left,) = np.asarray(frames[1].observation.sigma)[np.asarray(frames[1].observation.valid)]
        rest = np.isfinite(observed_field[0]).all(-1)
        rest[[y, y1], [x, x1]] = False
        np.testing.assert_allclose(left, errors[:, 1][:, rest][:, 0], rtol=1e-5)


@pytest.mark.parametrize("listed", [False, True])
def test_errors_of_cells_are_those_of_their_file(observed_field, tmp_path, listed):
    days = np.datetime64("2020-01-01", "ns") + np.arange(3) * np.timedelta64(1, "D")
    given = three_times(observed_field, time=days)
    sigma = np.random.default_rng(0).uniform(0.01, 0.1, (2, 3, 7, 12))
    for name, standard, error in zip("uv", (U, V), sigma, strict=True):
        given[name].attrs = {"units": "m s-1", "standard_name": standard}
        of = "sea_water_speed standard_error" if listed else f"{standard} standard_error"
        given[f"{name}_err"] = (given[name].dims, 100 * error, {"units": "cm/s", "standard_name": of})
        if listed:
            given[name].attrs["ancillary_variables"] = f"{name}_err"
    given.isel(lat=slice(None, None, -1)).to_netcdf(tmp_path / "errors.nc", engine="h5netcdf")
    cells = np.isfinite(observed_field[0]).all(-1)
    for source in (given, tmp_path / "errors.nc"):
        frames = collect(source, GRID, sigma=0.3)
        assert [frame.time for frame in frames] == list(days)
        for number, frame in enumerate(frames):
            got = np.asarray(frame.observation.sigma)[np.asarray(frame.observation.valid)]
            np.testing.assert_allclose(got, np.moveaxis(sigma[:, number], 0, -1)[cells], rtol=1e-5)
    given["v_err"][1] = np.where(cells, 0.0, 1.0)
    with pytest.raises(
        InputError, match=r"errors u_err and v_err: the errors must be positive, .* 3 of 9 .* 2020-01-02"
    ):
        collect(given, GRID)


def test_attributes_lost_in_an_assignment_do_not_change_units(observed_field):
    """Errors without units are in those of their velocities; of velocities both have units, or m/s."""
    given = three_times(
        observed_field, time=np.arange("2020-01-01", "2020-01-04", dtype="datetime64[D]").astype("M8[ns]")
    )
    for name, standard in zip("uv", (U, V), strict=True):
        given[name] = (100 * given[name]).assign_attrs(units="cm/s", standard_name=standard)
        error = {"standard_name": f"{standard} standard_error"}
        given[f"{name}_err"] = xr.full_like(given[name], 7.0).assign_attrs(error, units="cm/s")
    expected = collect(given, GRID)
    assert float(expected[0].observation.sigma[0, 0]) == pytest.approx(0.07)
    for name in ("u_err", "v_err"):
        del given[name].attrs["units"]
    assert_same_frames(collect(given, GRID), expected)
    points = track()[1]
    for dataset, name, other in ((given, "v", "u"), (points, "nsct", "ewct")):
        units = dataset[other].attrs["units"]
        del dataset[name].attrs["units"]
        with pytest.raises(InputError, match=f"{other} is in {units} and {name} has no units; give it"):
            collect(dataset, GRID)
        dataset[other] = (dataset[other] / 100).assign_attrs(dataset[other].attrs, units="m s-1")
        dataset[name] = (dataset[name] / 100).assign_attrs(dataset[name].attrs)
        for error in (n for n in dataset.data_vars if n.endswith("_err")):
            dataset[error] = (dataset[error] / 100).assign_attrs(dataset[error].attrs, units="m s-1")
    assert_same_frames(collect(given, GRID), expected)
    assert_same_frames(collect(points, GRID), collect(track()[1], GRID))


def test_errors_along_a_turned_grid_are_not_used(observed_field, caplog):
    lat, lon = np.meshgrid(GRID.lat, GRID.lon, indexing="ij")
    lat, lon = lat + 0.002 * np.arange(12), lon - 0.002 * np.arange(7)[:, None]
    given = three_times(
        observed_field, time=np.arange("2020-01-01", "2020-01-04", dtype="datetime64[D]").astype("M8[ns]")
    )
    given = given.drop_vars(["lat", "lon"]).rename(lat="y", lon="x")
    given = given.assign_coords(lat=(("y", "x"), lat), lon=(("y", "x"), lon))
    for name, axis in (("u", "x"), ("v", "y")):
        given[name].attrs["standard_name"] = standard = f"sea_water_{axis}_velocity"
        given[f"{name}_err"] = (
            given[name].dims,
            np.full((3, 7, 12), 0.1),
            {"standard_name": f"{standard} standard_error"},
        )
    frames = collect(given, Grid(GRID.ocean, lat, lon), sigma=0.3)
    assert [float(frame.observation.sigma[0, 0]) for frame in frames] == [np.float32(0.3)] * 3
    assert "the data set: its errors u_err v_err are of other directions or points and are not used" in caplog.messages


def track():
    """A table of points, and the same as a data set in cm/s whose variables lie along one dimension."""
    points = table(9, sigma_u=0.02, sigma_v=0.03, time=pd.date_range("2020-01-01", periods=3, freq="D").repeat(3))
    names = {"u": "ewct", "v": "nsct", "sigma_u": "ewct_err", "sigma_v": "nsct_err"}
    standard = {"ewct": U, "nsct": V, "ewct_err": f"{U} standard_error", "nsct_err": f"{V} standard_error"}
    data = {
        name: ("obs", 100 * points[key].to_numpy(), {"units": "cm s-1", "standard_name": standard[name]})
        for key, name in names.items()
    }
    places = {n: ("obs", points[n].to_numpy()) for n in ("lat", "lon", "time")}
    return points, xr.Dataset(data | places)


def assert_same_frames(ours, theirs):
    assert [(frame.time, frame.count) for frame in ours] == [(frame.time, frame.count) for frame in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for leaf in ("cells", "weights", "values", "sigma", "valid"):
            a, b = getattr(one.observation, leaf), getattr(other.observation, leaf)
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("suffix", ["nc", "zarr"])
def test_a_track_of_a_netcdf_file_is_a_table(tmp_path, suffix):
    points, dataset = track()
    path = tmp_path / f"track.{suffix}"
    dataset.to_netcdf(path, engine="h5netcdf") if suffix == "nc" else dataset.to_zarr(path, consolidated=False)
    for source in (dataset, dataset.set_coords(["lat", "lon", "time"]), path, str(path)):
        assert_same_frames(collect(source, GRID), collect(points, GRID))
        assert_same_frames(collect(source, GRID, step="2D"), collect(points, GRID, step="2D"))
        assert_same_frames(collect(source, GRID, time="2020-05-05"), collect(points, GRID, time="2020-05-05"))
    with pytest.raises(InputError, match="lies on scattered points or a track, not on a grid"):
        readers.read(path)


def test_a_series_of_files_is_one_of_fields(tmp_path):
    frames = tiny.fields().select([0, 1])
    gappy = np.where(np.arange(12)[:, None] < 6, frames.velocity, np.nan)
    for number, velocity in enumerate(gappy):
        readers.write(
            dataclasses.replace(frames.select([number]), velocity=velocity[None]), tmp_path / f"hour_{number}.nc"
        )
    series = collect(str(tmp_path / "hour_*.nc"), GRID)
    assert [frame.time for frame in series] == list(frames.time)
    assert_same_frames(series, [collect(tmp_path / f"hour_{number}.nc", GRID)[0] for number in (0, 1)])
    with pytest.raises(InputError, match=r"none_\*\.nc"):
        collect(str(tmp_path / "none_*.nc"), GRID)


def test_dates_of_a_track_may_have_any_name(tmp_path):
    points, dataset = track()
    dataset = dataset.rename(time="sampled")
    dataset.to_netcdf(tmp_path / "track.nc", engine="h5netcdf")
    for source in (dataset, tmp_path / "track.nc"):
        assert_same_frames(collect(source, GRID), collect(points, GRID))


@pytest.mark.parametrize("name", ["time", "sampled"])
def test_dates_of_a_track_may_be_of_cftime(name):
    points, dataset = track()
    dates = [cftime.DatetimeGregorian(*when.timetuple()[:6]) for when in points.time]
    dataset = dataset.drop_vars("time").assign({name: ("obs", dates)})
    assert_same_frames(collect(dataset, GRID), collect(points, GRID))
    for missing in (None, np.nan):
        dates[0] = missing
        late = dataset.assign({name: ("obs", np.array(dates, object))})
        assert_same_frames(collect(late, GRID, leave_out=True), collect(points[1:], GRID))


def test_velocities_of_a_track_are_those_that_are_named_or_at_the_surface(tmp_path):
    points, dataset = track()
    other = dataset[["ewct", "nsct"]].drop_attrs() / 200
    for name in ("ewct", "nsct"):
        other[name].attrs["units"] = "m s-1"
    beside = dataset.assign(detided_u=other.ewct, detided_v=other.nsct)
    columns = {"u": "detided_u", "v": "detided_v"}
    halved = points.assign(u=points.u / 2, v=points.v / 2)
    for velocities, expected, named in ((beside, points, {}), (beside, halved, columns)):
        velocities.to_netcdf(tmp_path / "track.nc", engine="h5netcdf")
        for source in (velocities, tmp_path / "track.nc"):
            assert_same_frames(collect(source, GRID, columns=named), collect(expected, GRID))
    surface = dataset.rename(ewct="a", nsct="b", ewct_err="c", nsct_err="d")
    for variable in surface.data_vars.values():
        if "standard_name" in variable.attrs:
            variable.attrs["standard_name"] = f"surface_{variable.attrs['standard_name']}"
    assert_same_frames(collect(surface, GRID), collect(points, GRID))


@pytest.mark.parametrize("named", [False, True])
def test_a_velocity_at_a_bad_place_or_time_is_bad(tmp_path, named):
    """Also where latitude and time name the flags that are theirs."""
    points, dataset = track()
    flags = {"flag_values": np.array([1, 4], np.int8), "flag_meanings": "good_data bad_data"}
    for number, of in ((2, "lat"), (5, "time")):
        codes = np.ones(9, np.int8)
        codes[number] = 4
        dataset[f"{of}_qc"] = ("obs", codes, flags)
        if named:
            dataset[of].attrs["ancillary_variables"] = f"{of}_qc"
    dataset.to_netcdf(tmp_path / "track.nc", engine="h5netcdf")
    assert_same_frames(collect(tmp_path / "track.nc", GRID), collect(points.drop(index=[2, 5]), GRID))


def test_the_output_of_opendrift_is_a_track(tmp_path):
    points, _ = track()
    points = points.drop(columns=["sigma_u", "sigma_v"])
    grid = {n: (("trajectory", "time"), points[n].to_numpy().reshape(3, 3).T) for n in ("lat", "lon")}
    for axis, n in (("x", "u"), ("y", "v")):
        name, values = f"{axis}_sea_water_velocity", points[n].to_numpy().reshape(3, 3).T
        grid[name] = (("trajectory", "time"), values, {"units": "m/s", "standard_name": name})
    dataset = xr.Dataset(grid, {"time": points.time.to_numpy()[::3]}, {"featureType": "trajectory"})
    dataset.to_netcdf(tmp_path / "drift.nc", engine="h5netcdf")
    for source in (dataset, tmp_path / "drift.nc"):
        assert_same_frames(collect(source, GRID), collect(points, GRID))


def test_observations_of_several_files_may_be_the_same_at_another_time(observed_field, tmp_path):
    days = np.datetime64("2020-01-01", "ns") + np.arange(3) * np.timedelta64(1, "D")
    given = three_times(observed_field, time=days)
    given["u"][2], given["v"][2] = given["u"][1], given["v"][1]
    for name, standard in zip("uv", (U, V), strict=True):
        given[name].attrs = {"units": "m s-1", "standard_name": standard}
        error = {"units": "m s-1", "standard_name": f"{standard} standard_error"}
        given[f"{name}_err"] = xr.full_like(given[name], 0.05).assign_attrs(error)
    given.to_netcdf(tmp_path / "all.nc", engine="h5netcdf")
    for number in range(3):
        given.isel(time=[number]).to_netcdf(tmp_path / f"day_{number}.nc", engine="h5netcdf")
    assert_same_frames(collect(str(tmp_path / "day_*.nc"), GRID), collect(tmp_path / "all.nc", GRID))


@pytest.mark.parametrize("dims", [(), ("station",), ("time",), ("time", "station")])
def test_an_error_may_be_that_of_an_instrument_or_of_a_time(dims):
    """Stations in a row; an error that goes for all of their points is spread over them."""
    places = table(3)
    shape = {"time": 2, "station": 3}
    sigma = np.random.default_rng(1).uniform(0.02, 0.1, [shape[d] for d in dims])
    data = {n: (("time", "station"), np.stack([places[n], -places[n]]), {"units": "m s-1"}) for n in "uv"}
    data |= {n: ("station", places[n]) for n in ("lat", "lon")} | {"sigma": (dims, sigma, {"units": "m s-1"})}
    dataset = xr.Dataset(data, {"time": pd.date_range("2020-01-01", periods=2)})
    whole = np.broadcast_to(np.expand_dims(sigma, [i for i, d in enumerate(shape) if d not in dims]), (2, 3))
    for frame, expected in zip(collect(dataset, GRID), whole, strict=True):
        np.testing.assert_allclose(frame.observation.sigma[:3], np.stack([expected] * 2, -1), rtol=1e-6)
    if not dims:
        # Levels are called so as well.
        dataset["sigma"].attrs = {"standard_name": "ocean_sigma_coordinate"}
        assert {float(frame.observation.sigma[0, 0]) for frame in collect(dataset, GRID)} == {np.float32(0.005)}


def test_names_and_units_of_a_track(tmp_path):
    points, dataset = track()
    mine = dataset.drop_attrs().rename(ewct="east", nsct="north", ewct_err="mine").drop_vars(["nsct_err"])
    columns = {"u": "east", "v": "north", "sigma": "mine"}
    expected = points.drop(columns=["sigma_u", "sigma_v"]).assign(sigma=0.02)
    metres = mine.map(lambda x: x / 100 if x.name in columns.values() else x)
    assert_same_frames(collect(metres, GRID, columns=columns), collect(expected, GRID))
    for name in ("east", "north"):
        mine[name].attrs["Unit"] = "cm/s"
    assert_same_frames(collect(mine, GRID, columns=columns), collect(expected, GRID))
    metres.to_netcdf(tmp_path / "bare.nc", engine="h5netcdf")
    with pytest.raises(InputError, match=r"bare\.nc: east has no units; expected m s-1"):
        collect(tmp_path / "bare.nc", GRID, columns=columns)


def test_points_of_a_track_without_a_good_value_are_left_out(tmp_path, caplog):
    points, dataset = track()
    dataset["ewct"][1] = np.nan
    dataset["nsct"].attrs["valid_max"] = 500.0
    dataset["nsct"][4] = 900.0
    flags = {"flag_values": np.array([1, 4], np.int8), "flag_meanings": "good bad_data"}
    dataset["velocity_qc"] = ("obs", np.array([1] * 8 + [4], np.int8), flags)
    # In cm/s a fill value may be as fast as a current.
    dataset.to_netcdf(tmp_path / "track.nc", engine="h5netcdf", encoding={"ewct": {"_FillValue": -99.0}})
    assert_same_frames(collect(tmp_path / "track.nc", GRID), collect(points.drop(index=[1, 4, 8]), GRID))
    assert "track.nc: 3 of 9 points have no velocity and are left out" in caplog.messages


def layouts():
    """The points of `track` as trajectories, and its currents as those of moorings: a data set, the same as a table."""
    points, along = track()
    points, along = points.drop(columns=["sigma_u", "sigma_v"]), along.drop_vars(["ewct_err", "nsct_err"])
    lat, lon, when = points.lat.to_numpy(), points.lon.to_numpy(), points.time.to_numpy()

    def moored(dims, shape, time, places, names=("u", "v")):
        current = [100 * points[key].to_numpy().reshape(shape) for key in "uv"]
        data = {n: (dims, x, {"units": "cm s-1"}) for n, x in zip(names, current, strict=True)}
        return xr.Dataset(data | places | time)

    dated, fixed = {"time": ("obs", when)}, points.assign(lat=lat[0], lon=lon[0])
    here = moored(("obs",), 9, dated, {"lat": lat[0], "lon": lon[0]})
    places = {
        "LATITUDE": ("TIME", fixed.lat),
        "LONGITUDE": ("TIME", fixed.lon),
        "DEPH": (("TIME", "DEPTH"), [[3.0]] * 9),
    }
    insitu = moored(("TIME", "DEPTH"), (9, 1), {"TIME": ("TIME", when)}, places, ("EWCT", "NSCT"))
    station = moored(("station", "obs"), (1, 9), dated, {"lat": ("station", lat[:1]), "lon": lon[0]})
    cell = moored(("time", "lat", "lon"), (9, 1, 1), {"time": when}, {"lat": lat[:1], "lon": lon[:1]})
    places = {"lat": ("station", lat[:3]), "lon": ("station", lon[:3])}
    stations = moored(("time", "station"), (3, 3), {"time": when[::3]}, places)
    return {
        "a trajectory": (along.expand_dims(trajectory=1), points),
        "two trajectories": (
            xr.concat([along.isel(obs=slice(6)), along.isel(obs=slice(3, 9))], "trajectory"),
            points.iloc[[*range(6), *range(3, 9)]],
        ),
        "a mooring": (here, fixed),
        "a mooring at coordinates": (here.set_coords(["lat", "lon", "time"]), fixed),
        "a mooring of in-situ data": (insitu, fixed),
        "one station": (station, fixed),
        "one cell": (cell, fixed),
        "several stations": (stations, points.assign(lat=np.tile(lat[:3], 3), lon=np.tile(lon[:3], 3))),
    }


@pytest.mark.parametrize("layout", layouts())
def test_trajectories_and_moorings_are_tables(tmp_path, layout):
    dataset, points = layouts()[layout]
    dataset.to_netcdf(tmp_path / "layout.nc", engine="h5netcdf")
    for source in (dataset, tmp_path / "layout.nc"):
        assert_same_frames(collect(source, GRID), collect(points, GRID))
        assert_same_frames(collect(source, GRID, step="2D"), collect(points, GRID, step="2D"))


@pytest.mark.parametrize("said", ["a dimension", "the feature type"])
def test_trajectories_without_times_are_points(tmp_path, said):
    """Their latitudes and longitudes share two dimensions, as those of a curvilinear grid do."""
    dataset, points = layouts()["two trajectories"]
    dataset, points = dataset.drop_vars("time"), points.drop(columns="time")
    if said == "the feature type":
        dataset = dataset.rename(trajectory="a", obs="b").assign_attrs(featureType="trajectory")
    dataset.to_netcdf(tmp_path / "trajectories.nc", engine="h5netcdf")
    for source in (dataset, tmp_path / "trajectories.nc"):
        assert_same_frames(collect(source, GRID, time="2003-01-01"), collect(points, GRID, time="2003-01-01"))
        assert [np.isnat(frame.time) for frame in collect(source, GRID)] == [True]


def test_packed_limits_of_a_mooring_count(tmp_path):
    dataset, points = layouts()["a mooring"]
    dataset["u"].attrs |= {"valid_min": np.int16(-3000), "valid_max": np.int16(3000)}
    dataset["u"][4] = 31.0
    packing = {"dtype": "int16", "scale_factor": 0.01, "_FillValue": np.int16(-32768)}
    dataset.to_netcdf(tmp_path / "packed.nc", engine="h5netcdf", encoding={"u": packing})
    found, expected = (collect(source, GRID) for source in (tmp_path / "packed.nc", points.drop(index=4)))
    for one, other in zip(found, expected, strict=True):
        assert (one.time, one.count) == (other.time, other.count)
        np.testing.assert_allclose(one.observation.values, other.observation.values, atol=6e-5)


def test_one_of_several_depths_is_to_be_chosen():
    dataset, points = layouts()["a mooring"]
    profile = dataset[["u", "v"]].expand_dims(depth=[1.0, 5.0], axis=1).assign(dataset[["lat", "lon", "time"]])
    with pytest.raises(InputError, match=r"u lies on \(obs=9, depth=2\); choose one depth before, .* isel\(depth=0\)"):
        collect(profile, GRID)
    assert_same_frames(collect(profile.isel(depth=0), GRID), collect(points, GRID))


def test_rows_of_a_track_are_counted_as_they_stand_in_it(tmp_path, caplog):
    """Also where rows without a velocity come first, whose places and times do not matter."""
    points, dataset = track()
    dataset = dataset.copy(deep=True)
    dataset["ewct"][[0, 3]] = np.nan
    dataset["lat"][0], dataset["time"][3] = np.nan, np.datetime64("NaT", "ns")
    dataset.to_netcdf(tmp_path / "track.nc", engine="h5netcdf")
    for source in (dataset, tmp_path / "track.nc"):
        frames = collect(source, GRID)
        expected = [[1, 2], [4, 5], [6, 7, 8]]
        assert [frame.rows.tolist() for frame in frames] == expected
        for frame, rows in zip(frames, expected, strict=True):
            np.testing.assert_allclose(frame.places, points[["lat", "lon"]].to_numpy()[rows])
    changes = {
        "lat": (18.0, r"observation 5 at lat 18\.0000 .* lies on land; --leave_out"),
        "lon": (290.0, r"observation 5 at .* lon 290\.0000 lies outside the domain"),
        "time": (np.datetime64("NaT", "ns"), "time is missing or not finite in row 5"),
        "ewct_err": (0.0, "sigma must be positive, but is not in row 5"),
    }
    for name, (value, message) in changes.items():
        wrong = dataset.copy(deep=True)
        wrong[name][5] = value
        with pytest.raises(InputError, match=message):
            collect(wrong, GRID)
        if name != "ewct_err":
            assert [frame.rows.tolist() for frame in collect(wrong, GRID, leave_out=True)] == [[1, 2], [4], [6, 7, 8]]
            assert "(row 5, counted from 0)" in caplog.messages[-1]
    dataset["nsct"][:] = np.nan
    with pytest.raises(InputError, match="no observation: the observations has no row with a velocity"):
        collect(dataset, GRID)


DEPTHS = ["depth", "Depth (m)", "depth_m", "z", "level", "bin", "PRES", "pressure [dbar]", "DEPH", "depth, m", "depSM"]
DEPTHS += ["Depth water [m]", "DEPTH, water [m]", "Pressure, water [dbar]", "PRES_ADJUSTED", "depth below surface (m)"]
DEPTHS += [
    "mean depth",
    "depth_mean",
    "instr_depth",
    "observation_depth",
    "Depth of observation [m]",
    "deptht",
    "depth1",
]


@pytest.mark.parametrize("title", DEPTHS)
def test_rows_of_several_depths_are_refused(tmp_path, title):
    plain = table(9, time="2020-01-01")
    points = plain.assign(**{title: [1.0] * 8 + [30.0]})
    points.to_csv(tmp_path / "rows.csv", index=False)
    message = rf"rows are of {re.escape(title)} from 1 to 30, a field is of one depth: keep the rows of one, or leave"
    for source in (points, tmp_path / "rows.csv"):
        with pytest.raises(InputError, match=message):
            collect(source, GRID)
    assert_same_frames(collect(points[:8], GRID), collect(plain[:8], GRID))
    # A row that does not count may be of any depth.
    points.loc[8, "u"] = np.nan
    assert collect(points, GRID, leave_out=True)[0].count == 8


def test_a_vehicle_keeps_its_depth_within_two_metres():
    sway = 3.0 + np.linspace(-1, 1, 9)
    assert collect(table(9).assign(depth=sway), GRID)[0].count == 9
    assert collect(table(9).assign(depth=np.nan), GRID)[0].count == 9
    for title, depths in (("depth", 1.1 * sway), ("bin", sway), ("depth_level", [1] * 8 + [2])):
        with pytest.raises(InputError, match=rf"rows are of {title} from "):
            collect(table(9).assign(**{title: depths}), GRID)


def test_words_of_depth_and_other_columns(caplog):
    with pytest.raises(InputError, match="rows are of layer from deep to upper, a field is of one"):
        collect(table(2).assign(layer=["upper", "deep"]), GRID)
    other = {"water_depth": [10.0, 20.0], "bottom_depth": [10.0, 20.0], "zone": [1, 2], "bin_count": [3, 4]}
    other |= {
        "air_pressure": [990, 1010],
        "wave height": [1, 9],
        "cell": [1.0, 2.0],
        "bins_used": [3, 90],
        "press_qc": [1, 9],
    }
    assert collect(table(2).assign(**other), GRID)[0].count == 2
    assert not [message for message in caplog.messages if "if it is a depth" in message]
    for title in ("height above bed", "Depth at cast", "dep", "sensorDepth corrected", "altitude"):
        collect(table(2).assign(**{title: [1.0, 9.0]}), GRID)
        said = f"the observations: {title}, from 1 to 9, does not count; if it is a depth, keep the rows of one"
        assert (said in caplog.text) == (title != "height above bed")


def test_a_track_through_several_depths_is_refused(tmp_path):
    dataset = track()[1].assign(DEPH=("obs", [1.0] * 8 + [30.0], {"units": "m", "standard_name": "depth"}))
    dataset.to_netcdf(tmp_path / "glider.nc", engine="h5netcdf")
    for source in (dataset, tmp_path / "glider.nc"):
        with pytest.raises(InputError, match=r"rows are of DEPH \(m\) from 1 to 30, a field is of one depth"):
            collect(source, GRID)
    assert_same_frames(collect(dataset.assign(DEPH=3.0), GRID), collect(track()[0], GRID))
    floor = dataset.assign(depth=dataset.DEPH.assign_attrs(standard_name="sea_floor_depth_below_sea_surface"))
    assert_same_frames(collect(floor.drop_vars("DEPH"), GRID), collect(track()[0], GRID))
    for attributes in ({"positive": "down"}, {"axis": "Z"}, {"standard_name": "depth"}):
        named = dataset.drop_vars("DEPH").assign(ZLOC=dataset.DEPH.assign_attrs(attributes))
        if "standard_name" not in attributes:
            del named.ZLOC.attrs["standard_name"]
        with pytest.raises(InputError, match=r"rows are of ZLOC \(m\) from 1 to 30, a field is of one depth"):
            collect(named, GRID)
    profile = xr.Dataset({n: ("depth", np.full(4, 0.1)) for n in "uv"}, {"depth": range(4)})
    with pytest.raises(InputError, match=r"rows are of depth from 0 to 3, a field is of one depth"):
        collect(profile.assign(lat=18.03, lon=295.08), GRID)


@pytest.mark.parametrize("title", ["qc", "QC", "flag", "u_qc", "u_flag", "quality", "QC flag", "EWCT_QC"])
def test_quality_columns_are_said_not_to_count(caplog, title):
    plain = table(4, time="2020-01-01")
    assert_same_frames(collect(plain.assign(**{title: [1, 1, 4, 1]}), GRID), collect(plain, GRID))
    assert f"the observations: the quality flags {title} do not count; leave bad rows out" in caplog.messages
    caplog.clear()
    collect(table(4).assign(flagship="Polarstern", qcode="a"), GRID)
    assert not caplog.records


def test_flags_of_a_mooring_hide_its_rows(tmp_path, caplog):
    """By their meanings, or by those of their station; without meanings they are named."""
    dataset, points = layouts()["several stations"]
    meanings = {"flag_values": np.array([1, 4], np.int8), "flag_meanings": "good bad"}
    dataset["state"] = (("station",), np.array([1, 4, 1], np.int8), meanings)
    dataset["flag"] = (("time", "station"), np.ones((3, 3), np.int8))
    dataset.to_netcdf(tmp_path / "moorings.nc", engine="h5netcdf")
    for source in (dataset, tmp_path / "moorings.nc"):
        caplog.clear()
        assert_same_frames(collect(source, GRID), collect(points.drop(index=[1, 4, 7]), GRID))
        assert any("3 values that state calls bad count as missing" in message for message in caplog.messages)
        assert any("flag looks like a quality flag but cannot be read" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("days", "clocks"),
    [
        (["2021-09-17", "2021-09-17", "2021-09-18"], ["00:10", "13:00", "06:10"]),
        (["20210917", "20210917", "20210918"], ["0:10:00", "13:00:00.0", "6:10"]),
        ([20210917, 20210917, 20210918], ["00:10Z", "15:00+02:00", "00:10-06:00"]),
        (
            pd.to_datetime(["2021-09-17", "2021-09-17", "2021-09-18"]),
            [datetime.time(0, 10), datetime.time(13), datetime.time(6, 10)],
        ),
        (
            [datetime.date(2021, 9, 17), datetime.date(2021, 9, 17), datetime.date(2021, 9, 18)],
            pd.to_timedelta([10, 780, 370], "min"),
        ),
    ],
)
def test_days_and_clock_times_are_joined(tmp_path, caplog, days, clocks):
    expected = collect(table(3, time=["2021-09-17T00:10", "2021-09-17T13:00", "2021-09-18T06:10"]), GRID)
    points = table(3).assign(Date=days, time=clocks)
    points.to_csv(tmp_path / "logger.csv", index=False)
    for source in (points, tmp_path / "logger.csv"):
        assert_same_frames(collect(source, GRID), expected)
        assert not caplog.records
        for named in ("Date", "time"):
            assert_same_frames(collect(source, GRID, columns={"time": named}), expected)
            assert "Date and time are joined into one time" in caplog.messages[-1]
            caplog.clear()


def test_velocities_of_drifter_files_are_known_by_their_names():
    points = table(4, time="2021-09-17T06:10")
    assert_same_frames(collect(points.rename(columns={"u": "ve", "v": "vn"}), GRID), collect(points, GRID))
    with pytest.raises(InputError, match="several columns for u, u, ve; say which"):
        collect(points.assign(ve=0.01), GRID)


@pytest.mark.parametrize(
    "others", [{"time": ["6 am", "noon", "3 pm", "6 am"]}, {"time": ["06:10"] * 4, "timestamp": ["07:10"] * 4}]
)
def test_days_without_one_clock_are_said_to_be_one_field(caplog, others):
    points = table(4, Date=["2021-09-17"] * 3 + ["2021-09-18"]).assign(**others)
    found = collect(points, GRID, columns={"time": "Date"})
    assert [one.count for one in found] == [3, 1]
    assert caplog.messages == [
        "the observations: all rows of a day in Date count for one field, as no other column, or several, hold times "
        "of day such as 06:10"
    ]


HOURS = pd.date_range("2020-01-04", periods=4, freq="6h")


@pytest.mark.parametrize("title", ["Date/Time", "time (UTC)", "Time [UTC]", "time_utc", "DateTimeUTC", "Date GMT"])
def test_a_column_of_times_may_say_that_it_is_of_utc(title):
    expected = collect(table(4, time=HOURS), GRID)
    assert len(expected) == 4
    assert_same_frames(collect(table(4, **{title: HOURS.strftime("%Y-%m-%dT%H:%M:%SZ")}), GRID), expected)
    assert_same_frames(collect(table(4, **{title: HOURS}), GRID, columns={"time": title.upper()}), expected)
    clocks = table(4, **{"Date": "2020-01-04", "time (utc)": HOURS.strftime("%H:%M")})
    assert_same_frames(collect(clocks, GRID), expected)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"when": HOURS}, "when"),
        ({"when": HOURS.strftime("%Y/%m/%d %H:%M")}, "when"),
        ({"fecha": HOURS.strftime("%d.%m.%Y %H:%M")}, "fecha"),
        ({"unixtime": 1593864000 + 21600 * np.arange(4)}, "unixtime"),
        ({"elapsed_s": [0.0, 10, 20, 30]}, "elapsed_s"),
        ({"seen": HOURS.strftime("%Y-%m-%d %H:%M")}, "seen"),
        ({"LocalTime": HOURS.strftime("%H:%M")}, "LocalTime"),
        ({"year": 2020, "month": [1, 1, 1, 2], "hour": [0, 6, 12, 18]}, "month, hour"),
    ],
)
def test_times_that_are_not_known_do_not_become_one(columns, said):
    points = table(4, **columns)
    with pytest.raises(InputError, match=f"the observations: {said} may hold times, of which none is known; say which"):
        collect(points, GRID)
    assert [frame.count for frame in collect(points, GRID, time="2020-01-04")] == [4]
    same = points.assign(**{name: points[name].iloc[0] for name in columns}, number=range(4), time_qc=range(4))
    assert [frame.count for frame in collect(same, GRID)] == [4]


def test_hours_that_do_not_join_their_day_are_said(caplog):
    assert [frame.count for frame in collect(table(4, date="2020-01-04", hour=[0, 6, 12, 18]), GRID)] == [4]
    assert caplog.messages == ["the observations: all rows of a day in date count for one field, whatever their hour"]


def test_a_named_day_takes_the_clock_beside_another_day():
    points = table(3, Date=["2021-09-17"] * 3).assign(time=["06:10", "07:10", "08:10"], obs_time="2021-10-01")
    expected = collect(table(3, time=[f"2021-09-17T0{hour}:10" for hour in (6, 7, 8)]), GRID)
    assert_same_frames(collect(points, GRID, columns={"time": "Date"}), expected)


def test_a_missing_clock_time_is_a_missing_time():
    points = table(3, date="2021-09-17").assign(time=["00:10", None, "00:20"])
    with pytest.raises(InputError, match="date and time is missing or not finite in row 1"):
        collect(points, GRID)
    with pytest.raises(InputError, match=r"date and time is no date such as .* in row 1: '2021-09-17T25:10'"):
        collect(points.assign(time=["00:10", "25:10", "00:20"]), GRID)


@pytest.mark.parametrize(
    "columns",
    [
        {"date": "17/09/2021", "time": "00:10"},
        {"date": "2021-09-17", "time": "6:10 PM"},
        {"date": "2021-09-17", "time": "2021-09-17T00:10"},
        {"date": "2021-09-17", "time": "00:10", "datetime": "2021-09-17T00:10"},
    ],
)
def test_times_in_several_columns_that_do_not_join_are_refused(columns):
    with pytest.raises(InputError, match=r"several columns for time, time, .*say which; .* such as 2021-09-17T00:10"):
        collect(table(3, **columns), GRID)
    if "datetime" in columns:
        (frame,) = collect(table(3, **columns), GRID, columns={"time": "datetime"})
        assert frame.time == np.datetime64("2021-09-17T00:10")


@pytest.mark.parametrize(
    ("title", "unit"),
    [
        ("u (cm/s)", "cm/s"),
        ("u_cm_s", "cm_s"),
        ("U [cm s^-1]", "cm s^-1"),
        ("u_cms", "cms"),
        ("u_mm_s", "mm_s"),
        ("u (km/h)", "km/h"),
        ("u_knots", "knots"),
        ("u [kn]", "kn"),
        ("speed [kn]", "kn"),
        ("Vx cm per s", "cm per s"),
    ],
)
def test_a_column_that_says_another_unit_is_refused(tmp_path, title, unit):
    points = table(3).rename(columns={"u": title})
    points.to_csv(tmp_path / "points.csv", index=False)
    message = rf"{re.escape(title)} is in {re.escape(unit)} by its name; give velocities and their errors in m/s"
    for source in (points, tmp_path / "points.csv"):
        with pytest.raises(InputError, match=message):
            collect(source, GRID, columns={"u": title})
        if title.lower().startswith("u"):
            with pytest.raises(InputError, match=message):
                collect(source, GRID)
    with pytest.raises(InputError, match=rf"{re.escape(title)} is in"):
        collect(table(3, **{title: 0.1}), GRID, columns={"sigma": title})
    data = {title if n == "u" else n: ("obs", table(3)[n]) for n in ("u", "v", "lat", "lon")}
    if "/" not in title:
        with pytest.raises(InputError, match=message):
            collect(xr.Dataset(data), GRID, columns={"u": title})
        data[title] = ("obs", 100 * table(3).u, {"units": "cm/s"})
        data["v"] = ("obs", table(3).v, {"units": "m/s"})
        (one,) = collect(xr.Dataset(data), GRID, columns={"u": title})
        np.testing.assert_allclose(one.observation.values[:3, 0], table(3).u, rtol=1e-6)


@pytest.mark.parametrize("title", ["u (m/s)", "u_m_s", "u_ms", "u [m s-1]", "u_mps", "u_metres_per_second", "u_mean"])
def test_a_column_that_says_metres_per_second_can_be_named(title):
    (one,) = collect(table(3).rename(columns={"u": title}), GRID, columns={"u": title})
    np.testing.assert_allclose(one.observation.values[:3, 0], table(3).u, rtol=1e-6)


@pytest.mark.parametrize("titles", [("sigma (m/s)",) * 2, ("u_err", "v_err"), ("SD_U [m s-1]", "SD_V [m s-1]")])
def test_a_column_of_errors_that_is_known_counts(titles, caplog):
    points = table(3, **dict.fromkeys(titles, 0.1))
    (one,) = collect(points, GRID)
    np.testing.assert_allclose(one.observation.sigma[:3], 0.1, rtol=1e-6)
    (one,) = collect(points.assign(sigma=0.2), GRID, columns={"sigma": "sigma"})
    np.testing.assert_allclose(one.observation.sigma[:3], 0.2, rtol=1e-6)
    assert not caplog.messages


@pytest.mark.parametrize("title", ["Std. error", "speed_rms", "uncert"])
def test_a_column_of_errors_that_is_not_known_is_said(title, caplog, tmp_path):
    points = table(3, **{title: 0.1})
    (one,) = collect(points, GRID)
    np.testing.assert_allclose(one.observation.sigma[:3], 0.005, rtol=1e-6)
    said = f"the observations: {title} may hold errors of the velocities, which are not used: name one by --sigma_name"
    assert [message[: len(said)] for message in caplog.messages] == [said]
    (one,) = collect(points, GRID, columns={"sigma": title})
    np.testing.assert_allclose(one.observation.sigma[:3], 0.1, rtol=1e-6)
    assert len(caplog.messages) == 1


def test_an_error_in_another_unit_is_not_passed_over():
    with pytest.raises(InputError, match=r"sigma \(cm/s\) is in cm/s by its name"):
        collect(table(3, **{"sigma (cm/s)": 2.0}), GRID)
    (one,) = collect(table(3, **{"sigma (cm/s)": 2.0, "sigma": 0.02, "u_cm_s": 3.0}), GRID)
    np.testing.assert_allclose(one.observation.sigma[:3], 0.02, rtol=1e-6)


def test_one_time_for_all_and_no_point_at_all():
    points, dataset = track()
    for time in (points.time[0], [points.time[0]]):
        one_time = dataset.drop_vars("time").assign_coords(time=time)
        assert_same_frames(collect(one_time, GRID), collect(points.assign(time=points.time[0]), GRID))
    with pytest.raises(InputError, match="no observation: the observations has no row"):
        collect(dataset.isel(obs=slice(0)), GRID)


def test_times_of_a_data_set_count_however_they_are_written(observed_field):
    days = np.datetime64("2020-01-01", "ns") + np.arange(3) * np.timedelta64(1, "D")
    numbers = ("time", [0, 1, 2], {"units": "days since 2020-01-01"})
    for time in (("time", days), numbers):
        frames = collect(three_times(observed_field, time=time), GRID)
        assert [frame.time for frame in frames] == list(days)
        np.testing.assert_allclose([float(f.observation.values[0, 1]) for f in frames], [-0.05, -0.1, -0.15], rtol=1e-6)
    with pytest.raises(InputError, match="has 3 times without dates"):
        collect(three_times(observed_field), GRID)
    with pytest.raises(InputError, match="3 times; one time can be given to one field only"):
        collect(three_times(observed_field, time=numbers), GRID, time="2020-01-01")


def test_times_of_cftime_count(observed_field):
    days = [cftime.datetime(2020, 1, day, calendar="standard") for day in (1, 2, 3)]
    frames = collect(three_times(observed_field, time=("time", days)), GRID)
    assert [str(frame.time)[:10] for frame in frames] == ["2020-01-01", "2020-01-02", "2020-01-03"]


def test_the_index_of_a_table_may_be_its_times():
    rows, when = table(9), pd.date_range("2020-01-01", periods=3, freq="D").repeat(3)
    assert len(rows) == 9
    expected = [frame.time for frame in collect(rows.assign(time=when), GRID)]
    assert len(expected) == 3
    for name in (None, "time"):
        frames = collect(rows.set_index(pd.DatetimeIndex(when, name=name)), GRID)
        assert [frame.time for frame in frames] == expected


def test_limits_and_flags_of_a_data_set_are_those_of_its_file(tmp_path):
    u = np.full((2, 7, 12), np.nan)
    u[:, 5, 3], u[:, 3, 6:9] = 0.2, -0.3
    when = np.datetime64("2020-01-01", "ns") + np.arange(2) * np.timedelta64(1, "h")
    flag = ("time", np.array([0, 1], np.int8), {"flag_values": np.array([0, 1], np.int8), "flag_meanings": "good bad"})
    data = {n: (("time", "lat", "lon"), u, {"units": "m s-1", "standard_name": f"{to}ward_sea_water_velocity"})
            for n, to in (("uo", "east"), ("vo", "north"))}  # fmt: skip
    dataset = xr.Dataset(data | {"qc_flag": flag}, {"time": when, "lat": GRID.lat, "lon": GRID.lon})
    packing = {"dtype": "uint16", "scale_factor": 0.001, "add_offset": -32.0, "_FillValue": np.uint16(65535)}
    for name in ("uo", "vo"):
        # The values themselves, which are inside.
        dataset[name].attrs |= {"valid_min": np.uint16(31700), "valid_max": np.uint16(32200)}
    path = tmp_path / "packed.nc"
    dataset.to_netcdf(path, engine="h5netcdf", encoding={"uo": packing, "vo": packing})
    by_path = collect(path, GRID)
    with xr.open_dataset(path, engine="h5netcdf") as opened:
        by_dataset = collect(opened, GRID)
    assert [frame.count for frame in by_path] == [frame.count for frame in by_dataset] == [4]
    np.testing.assert_array_equal(by_path[0].observation.values, by_dataset[0].observation.values)


def test_a_field_without_time_takes_the_one_that_is_given(observed_field, tmp_path):
    path = tmp_path / "still.nc"
    still = three_times(observed_field).isel(time=0)
    for variable in still.data_vars.values():
        variable.attrs["units"] = "m s-1"
    still.to_netcdf(path, engine="h5netcdf")
    (frame,) = collect(path, GRID, time="2021-02-03T04:05")
    assert frame.time == np.datetime64("2021-02-03T04:05")
    with pytest.raises(InputError, match="give it by time"):
        collect(path, GRID)


def test_a_time_that_is_given_stands_for_one_that_cannot_be_read(observed_field, tmp_path):
    still = three_times(observed_field, time=[0.0, 1.0, 2.0])
    still["time"].attrs["units"] = "furlongs"
    for variable in still.data_vars.values():
        variable.attrs["units"] = "m s-1"
    still.isel(time=[0]).to_netcdf(tmp_path / "still.nc", engine="h5netcdf")
    (frame,) = collect(tmp_path / "still.nc", GRID, time="2021-02-03T04:05")
    assert frame.time == np.datetime64("2021-02-03T04:05")
    with pytest.raises(InputError, match="furlongs"):
        collect(tmp_path / "still.nc", GRID)
    still.to_netcdf(tmp_path / "three.nc", engine="h5netcdf")
    with pytest.raises(InputError, match="furlongs"):
        collect(tmp_path / "three.nc", GRID, time="2021-02-03T04:05")
    # Files with dates of their own are of several times, as one file is.
    for number, day in enumerate(DAYS[:2]):
        dated = still.isel(time=[number]).assign_coords(time=[day])
        dated.to_netcdf(tmp_path / f"day{number}.nc", engine="h5netcdf")
    with pytest.raises(InputError, match="has 2 times; one time can be given to one field only"):
        collect(tmp_path / "day*.nc", GRID, time="2021-02-03T04:05")
    # Of a track it is that of all rows.
    content = track()[1].assign(time=("obs", np.arange(9.0), {"standard_name": "time", "units": "furlongs"}))
    content.to_netcdf(tmp_path / "track.nc", engine="h5netcdf")
    (frame,) = collect(tmp_path / "track.nc", GRID, time="2021-02-03T04:05")
    assert (frame.time, frame.count) == (np.datetime64("2021-02-03T04:05"), 9)


def test_a_data_set_is_read_as_its_file_is(observed_field, tmp_path, caplog):
    lat, lon = np.meshgrid(GRID.lat, GRID.lon, indexing="ij")
    velocity, _ = observed_field
    places = {"lat_rho": (("y", "x"), lat), "lon_rho": (("y", "x"), lon)}
    one = xr.Dataset({n: (("y", "x"), velocity[..., c], {"units": "m s-1"}) for c, n in enumerate("uv")})
    # Where it lies, when it is from and when it was forecast are variables and no coordinates.
    others = {"ocean_time": np.datetime64("2020-01-02T03:00", "ns"), "reftime": np.datetime64("2020-01-01", "ns")}
    given = one.assign(places).assign(others)
    (by_data_set,), (by_file,) = (collect(source, GRID) for source in both_ways(given, tmp_path))
    assert by_data_set.time == by_file.time == np.datetime64("2020-01-02T03:00")
    assert by_data_set.count == by_file.count == 3
    np.testing.assert_array_equal(by_data_set.observation.values, by_file.observation.values)
    assert not caplog.messages
    # A forecast's beginning is no time of its field.
    (frame,) = collect(given.drop_vars("ocean_time"), GRID)
    assert np.isnat(frame.time)
    (frame,) = collect(given.drop_vars("ocean_time").assign_coords(time="noon"), GRID)
    assert np.isnat(frame.time)
    assert caplog.messages == ["the data set: its time is noon, no date, and does not count"]
    (frame,) = collect(given.drop_vars("ocean_time").assign_coords(time="noon"), GRID, time="2020-01-02")
    assert frame.time == np.datetime64("2020-01-02")
    assert len(caplog.messages) == 1


def test_components_whose_places_differ_by_rounding_are_a_pair(observed_field):
    given = three_times(observed_field, time=DAYS)
    expected = collect((given["u"], given["v"]), GRID)
    rounded = given["v"].assign_coords(lat=given["lat"].astype(np.float32), lon=given["lon"] + 1e-6)
    for v in (rounded, given["v"].drop_vars("time").assign_coords(time=DAYS), given["v"].rename("anything")):
        assert_same_frames(collect((given["u"], v), GRID), expected)
    for v in (given["v"].assign_coords(lat=given["lat"] + 0.01), given["v"][:2], given["v"].isel(lon=slice(1, None))):
        with pytest.raises(InputError, match="u and v do not lie on the same points and times"):
            collect((given["u"], v), GRID)


def test_only_whole_lines_of_a_table_are_comments(tmp_path, caplog):
    points = table(4, station=["a", "buoy #2", "c", "#4"])
    rows = points.to_csv(index=False).splitlines()
    path = tmp_path / "stations.csv"
    path.write_text("\n".join(["# of 2020, 4 stations", "", *rows[:2], "  # moved since", *rows[2:]]) + "\n")
    (ours,), (theirs,) = collect(path, GRID), collect(points, GRID)
    assert ours.count == theirs.count == 4
    np.testing.assert_allclose(ours.observation.values, theirs.observation.values, rtol=1e-6)
    assert not caplog.messages
    # A row that somebody has taken out, or whose first column begins so.
    path.write_text("\n".join([*rows[:2], "#" + rows[2], *rows[3:]]) + "\n")
    assert collect(path, GRID)[0].count == 3
    assert caplog.messages == ["stations.csv: line 3 looks like a row but begins with #, and does not count"]
    path.write_text("\n".join([rows[0], *(f"#{row}" for row in rows[1:4]), rows[4]]) + "\n")
    assert collect(path, GRID)[0].count == 1
    assert "line 2 looks like a row (as 2 more) but begins with #" in caplog.messages[-1]


def test_observations_may_have_a_component_that_never_changes(observed_field, tmp_path):
    days = np.datetime64("2020-01-01", "ns") + np.arange(3) * np.timedelta64(1, "D")
    given = three_times(observed_field, time=days)
    given["v"] = abs(0 * given["v"])
    for variable in given.data_vars.values():
        variable.attrs["units"] = "m s-1"
    given.to_netcdf(tmp_path / "still.nc", engine="h5netcdf")
    for source in (given, tmp_path / "still.nc"):
        frames = collect(source, GRID)
        assert [frame.count for frame in frames] == [3, 3, 3]
        assert not any(np.asarray(frame.observation.values)[:, 1].any() for frame in frames)
    with pytest.raises(InputError, match=r"v is 0\.0 m/s everywhere and always"):
        readers.read(tmp_path / "still.nc")


def test_names_of_columns_go_with_tables(observed_field, tmp_path):
    path = tmp_path / "field.nc"
    readers.write(forms(*observed_field, tmp_path)["fields"][0], path)
    with pytest.raises(InputError, match=r"field\.nc is no table of points: of fields u and v can be named, not sigma"):
        collect(path, GRID, columns={"sigma": "err"})


@pytest.mark.parametrize("mistake", BAD)
def test_a_mistake_is_a_sentence(mistake, tmp_path):
    source, message = BAD[mistake]
    if isinstance(source, bytes):
        (tmp_path / "points.csv").write_bytes(source)
        source = tmp_path / "points.csv"
    with pytest.raises(InputError, match=message) as caught:
        collect(source, GRID)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": {"u": "speed"}}, "no column 'speed'; it has lat, lon, u, v"),
        ({"columns": {"w": "w"}}, "not to 'w'"),
        ({"time": "noon"}, "'noon' is not a date"),
        ({"time": "now"}, "'now' is not a date"),
        ({"time": "1600-01-01"}, "'1600-01-01' is not a date .* in the years 1678"),
        ({"time": "2500-01-01"}, "'2500-01-01' is not a date"),
        ({"columns": {"u": "v"}}, "u and v are one column, v; it has lat, lon"),
        ({"time": "12:00"}, "'12:00' is not a date"),
        ({"time": "04/01/2020"}, "'04/01/2020' is not a date"),
        ({"time": 20200104}, "20200104 is not a date"),
        ({"step": "1h"}, "goes with a column of times"),
        ({"sigma": 0.0}, "must be positive"),
    ],
)
def test_a_wrong_option_is_a_sentence(options, message):
    with pytest.raises(InputError, match=message):
        collect(at(), GRID, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 1}, "step must be a duration with its unit, such as '1h' or a timedelta, got 1$"),
        ({"step": 3.5}, "a duration with its unit"),
        ({"step": np.timedelta64(1)}, "a duration with its unit"),
        ({"step": ["1h"]}, "a duration with its unit"),
        ({"step": np.timedelta64(1, "M")}, "is not a fixed duration"),
        ({"step": np.timedelta64("NaT", "h")}, "is not a fixed duration"),
        ({"step": "1"}, "is not a fixed duration"),
        ({"sigma": None}, "sigma must be a number, got None"),
        ({"sigma": [0.1, 0.1]}, r"sigma must be a number, got \[0.1, 0.1\]"),
        ({"columns": "u"}, "columns must be a dictionary such as {'u': 'vx'}, got 'u'"),
        ({"columns": ["u"]}, r"columns must be a dictionary .*, got \['u'\]"),
        ({"columns": {"u": 3}}, "has no column '3'; it has lat, lon, u, v, time"),
        ({"columns": {1: "u"}}, "not to 1$"),
        ({"leave_out": "no"}, "leave_out must be True or False, got 'no'"),
        ({"raw": "x"}, "raw must be True or False, got 'x'"),
        ({"progress": None}, "progress must be True or False, got None"),
    ],
)
def test_options_of_another_kind_are_a_sentence(trained, options, message):
    with pytest.raises(InputError, match=message):
        quietly(trained, table(2, time="2020-01-01T00:10"), method="linear_samples", **options)


def test_a_step_may_be_any_duration(trained):
    points = table(4, time=pd.to_datetime(["2020-01-01T00:10", "2020-01-01T00:20"] * 2))
    expected = quietly(trained, points, method="linear_samples", step="1h")
    assert expected.time.values == np.datetime64("2020-01-01")
    steps = np.timedelta64(60, "m"), pd.Timedelta("1h"), datetime.timedelta(hours=1), pd.offsets.Hour()
    for step in steps:
        found = quietly(trained, points, method="linear_samples", step=step)
        np.testing.assert_array_equal(both(found), both(expected))
        assert found.time.values == expected.time.values


def test_columns_without_a_header_are_named_by_number(trained):
    points = table(4, speed=9.0)
    bare = points.set_axis(range(5), axis=1)
    expected = quietly(trained, points, method="linear_samples")
    names = {"lat": 0, "lon": np.int64(1), "u": 2, "v": 3, "sigma": None, "time": ""}
    np.testing.assert_array_equal(both(quietly(trained, bare, method="linear_samples", columns=names)), both(expected))


@pytest.mark.parametrize("folder", [None, 3, b"ram_head"])
def test_what_is_no_path_of_a_model_is_a_sentence(folder):
    with pytest.raises(InputError, match="a model is loaded from the path of its folder, or as 'ram_head'; got "):
        jax_repaint.load(folder)


def test_an_error_that_is_named_goes_before_those_that_are_found():
    points = at(sigma_u=0.5, sigma_v=0.5, mine=0.01)
    for columns, expected in ((None, 0.5), ({"sigma": "mine"}, 0.01)):
        (observed,) = collect(points, GRID, columns=columns)
        valid = np.asarray(observed.observation.valid)
        np.testing.assert_allclose(np.asarray(observed.observation.sigma)[valid], expected)
    rows, dataset = track()
    dataset["mine"] = ("obs", np.full(9, 1.0), {"units": "cm s-1"})
    named = rows.drop(columns=["sigma_u", "sigma_v"]).assign(sigma=0.01)
    assert_same_frames(collect(dataset, GRID, columns={"sigma": "mine"}), collect(named, GRID))


def test_values_unlike_any_current_of_the_training_are_warned_of(trained, caplog):
    quietly(trained, at())
    assert "standard deviations" not in caplog.text
    points = table(9, time=["2020-01-01"] * 4 + ["2020-01-02"] * 5)
    points.loc[7, ["lat", "lon", "u", "v"]] = 18.03, -64.92, 12.0, 0.5
    quietly(trained, points, method="linear_samples")
    assert (
        "is it in m/s, and no fill value? row 7 (counted from 0) at lat 18.0300 lon -64.9200 of 2020-01-02"
        in caplog.text
    )
    assert "(u, v) = (12, 0.5)" in caplog.text
    away = (12 - trained.standardiser.mean[0]) / trained.standardiser.std[0]
    assert f"an observation is {away:.0f} standard deviations" in caplog.text
    velocity = gappy()
    velocity[4, 6] = 0.1, -12.0
    quietly(trained, velocity, method="linear_samples")
    assert "cell (y=4, x=6) at lat 18.0400 lon 295.0600, (u, v) = (0.1, -12)" in caplog.text


def test_a_table_in_cm_s_is_refused(trained, caplog):
    points = pd.concat([table(5), at(u=0.3)])
    quietly(trained, points, method="linear_samples")
    assert not caplog.records
    other = points.assign(u=100 * points.u, v=100 * points.v)
    for wrong in (other, 100 * gappy()):
        with pytest.raises(
            InputError, match=r"typically \d\d\d? standard deviations of the training currents .* in m/s"
        ):
            quietly(trained, wrong, method="linear_samples")


def test_fill_values_and_spikes_that_are_no_current_are_refused(trained):
    for points in (table(9), table(9).assign(time=[f"2020-01-0{1 + n % 3}" for n in range(9)])):
        points.loc[[2, 6], "v"] = -9.99
        message = r"2 of 9 observations have v = -9\.99 m/s exactly, .* is a fill value undeclared\? leave them out"
        with pytest.raises(InputError, match=message):
            quietly(trained, points, method="linear_samples")
    points = table(9)
    points.loc[7, "u"] = 49.0
    away = (49 - trained.standardiser.mean[0]) / trained.standardiser.std[0]
    assert away > 100
    with pytest.raises(
        InputError, match=rf"row 7 .*: \(u, v\) = \(49, .*\) is {away:.0f} standard deviations .* leave it"
    ):
        quietly(trained, points, method="linear_samples")
    velocity = gappy()
    velocity[4, 6] = 0.1, -49.0
    with pytest.raises(InputError, match=r"cell \(y=4, x=6\) .* leave it out"):
        quietly(trained, velocity, method="linear_samples")


@pytest.mark.parametrize(
    ("minutes", "said"),
    [
        (
            [0, 1, 2],
            "3 times, most with one observation; each gets a field of its own; --step=1h or --time=... (step=,",
        ),
        ([0, 1, 2, 2, 3, 3], ""),
        ([0, 1], ""),
        (list(range(25)) * 2, "25 times; each gets a field of its own; --step=1h"),
        ([0] * 30, ""),
    ],
)
def test_a_track_with_a_time_in_every_row_is_warned_of(trained, caplog, minutes, said):
    time = np.datetime64("2020-01-01T00:00", "ns") + np.array(minutes) * np.timedelta64(1, "m")
    quietly(trained, table(len(minutes), time=time), method="linear_samples")
    assert (said in caplog.text) if said else "times" not in caplog.text


def test_fields_are_not_told_to_join_their_times(trained, caplog):
    fields = tiny.fields(3)
    fields.velocity[:, np.arange(84).reshape(7, 12) != 80] = np.nan
    quietly(trained, Fields.create(fields.velocity, GRID.lat, GRID.lon, fields.time), method="linear_samples")
    assert "3 times, most with one observation; each gets a field of its own" in caplog.text
    assert "--step" not in caplog.text


def test_the_misfit_is_that_of_the_interpolated_mean(trained, caplog):
    points = table(6, sigma=[0.01, 0.02, 0.05, 0.01, 0.01, 0.5], time=["2020-01-01"] * 4 + ["2020-01-02"] * 2)
    fields = quietly(trained, points)
    expected = []
    for field, rows in zip(both(fields, "_mean"), (points[:4], points[4:]), strict=True):
        seen = RegularGridInterpolator((GRID.lat, GRID.lon), np.nan_to_num(field))(rows[["lat", "lon"]].to_numpy())
        expected.append(np.sqrt(np.mean(((rows[["u", "v"]].to_numpy() - seen) / rows[["sigma"]].to_numpy()) ** 2)))
    np.testing.assert_allclose(fields.misfit, expected, rtol=1e-3)
    assert fields.misfit.dims == ("time",)
    assert fields.misfit.attrs["units"] == "1"


def test_observations_that_the_mean_overrules_are_warned_of(trained, caplog):
    truth = tiny.fields().velocity[51]
    cells = np.argwhere(GRID.ocean)[::9]
    good = pd.DataFrame({"lat": GRID.lat[cells[:, 0]], "lon": GRID.lon[cells[:, 1]]}).assign(time="2020-01-02T03:00")
    good[["u", "v"]] = truth[tuple(cells.T)]
    assert quietly(trained, good, method="linear_samples", sigma=0.1).misfit < inpaint.UNLIKELY
    assert "misses" not in caplog.text
    # Two that contradict each other in one cell.
    bad = pd.concat([good[:1], good[:1].assign(u=good.u[0] + 1)])
    fields = quietly(trained, bad, method="linear_samples", sigma=0.01)
    # Half a metre a second from each in one of the components.
    assert float(fields.misfit[0]) == pytest.approx(0.5 / 0.01 / np.sqrt(2), rel=0.02)
    assert "by 35 standard errors at 2020-01-02T03:00; they are unlikely for the model, or sigma is too" in caplog.text
    days = pd.concat([bad.assign(time=f"2020-01-0{day}") for day in (1, 2, 3)])
    quietly(trained, days, method="linear_samples", sigma=0.01)
    assert "(and at 2 other times by more than 3)" in caplog.text


@pytest.mark.parametrize(
    ("method", "pattern", "said"),
    [
        ("kalman_cg", "patch", 1), ("kalman_cg", "scattered", 0), ("kalman_cg", "row", 0), ("kalman_jvp", "patch", 0),
        ("cov_pigdm", "patch", 1),
    ],
)  # fmt: skip
def test_methods_of_few_observations_are_warned_of_where_observations_are_dense(trained, caplog, method, pattern, said):
    y, x = np.indices(GRID.ocean.shape)
    observed = {"patch": x < 6, "scattered": (x + y) % 2 == 0, "row": y == 3}[pattern] & GRID.ocean
    velocity = np.full((*GRID.ocean.shape, 2), np.nan)
    velocity[observed] = 0.05 + 0.01 * np.random.default_rng(0).normal(size=(observed.sum(), 2))
    inpaint.inpaint(trained, velocity, 4, method=method, progress=False)
    assert caplog.text.count(f"{method} is for few or scattered observations") == said
    # 28 of 64 cells, but for the six of the last column.
    assert caplog.text.count("34 % of the ocean cells") == said


def test_times_with_values_on_land_alone_are_left_out(caplog):
    """The others are as without them; a field that is infinite is none without values."""
    fields = tiny.fields().select(np.arange(4))
    observed = ~np.isnan(gappy()).any(-1)
    velocity = np.where(observed[..., None], fields.velocity, np.nan)
    y, x = np.argwhere(~GRID.ocean)[0]
    velocity[2], velocity[2, y, x] = np.nan, 0.1
    series = Fields.create(velocity, GRID.lat, GRID.lon, fields.time, name="series.nc")
    found = collect(series, GRID, leave_out=True)
    assert [frame.time for frame in found] == [*fields.time[:2], fields.time[3]]
    assert {frame.count for frame in found} == {int(observed.sum())}
    assert "series.nc: 1 of 4 times have no value in the ocean of the model, and are left out" in caplog.text
    velocity[[0, 1, 3]] = np.nan
    velocity[:, y, x] = np.arange(1, 9).reshape(4, 2) / 10
    ashore = Fields.create(velocity, GRID.lat, GRID.lon, fields.time, name="series.nc")
    with pytest.raises(InputError, match=r"series\.nc has no value in the ocean of the model"):
        collect(ashore, GRID, leave_out=True)


def test_observations_of_another_place_are_told_both_extents():
    model_at = r"the model at lat 18\.0000\.\.18\.0600, lon 295\.0000\.\.295\.1100"
    theirs = r"lat 58\.0300\.\.58\.0300, lon 295\.0800\.\.295\.0800"
    blank = pd.concat([at(lat=58.03), at(u=np.nan)])
    for points, leave_out in ((at(lat=58.03), False), (at(lat=58.03), True), (blank, True)):
        message = rf"all 2 observations lie outside .* the model is of another place: they are at {theirs}, {model_at}$"
        with pytest.raises(InputError, match=message):
            collect(points, GRID, leave_out=leave_out)
    for lat, lon in ((40.0, 0.0), (0.0, 180.0)):
        far = Fields.create(tiny.fields().velocity, GRID.lat + lat, GRID.lon + lon, tiny.fields().time, name="far.nc")
        message = rf"far.nc does not touch the model's grid, the model is of another place: it is at .*, {model_at}"
        with pytest.raises(InputError, match=message):
            collect(far, GRID)


def test_a_step_has_as_many_observations_as_the_one_before():
    """Halves are not sent to the even hour now and to the odd one then."""
    times = pd.date_range("2024-01-01", periods=9, freq="30min")
    frames = collect(table(9, time=times), GRID, step="1h")
    assert [frame.count for frame in frames] == [1, 2, 2, 2, 2]
    assert frames[1].time == np.datetime64("2024-01-01T01:00")
    assert [frame.count for frame in collect(table(9, time=times), GRID, step="90min")] == [2, 3, 3, 1]


@pytest.mark.parametrize(("seed", "kept"), [(np.int64(3), 3), (3.0, 3)])
def test_a_seed_of_another_kind_is_that_number(trained, tmp_path, seed, kept):
    unfinished = Unfinished(tmp_path / "some")
    fields = quietly(trained, table(3), method="linear_samples", seed=seed, unfinished=unfinished)
    assert fields.attrs["seed"] == kept
    assert isinstance(fields.attrs["seed"], int)
    with pytest.raises(InputError, match="seed must be a whole number, at least 0, got True"):
        quietly(trained, table(3), seed=True)


def test_a_folder_of_that_name_is_not_the_model_of_the_package(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ram_head").mkdir()
    assert jax_repaint.load().ocean.shape == (44, 94)
    model.save(trained, tmp_path / "ram_head")
    assert jax_repaint.load("ram_head").ocean.shape == jax_repaint.load().ocean.shape == (44, 94)
    assert jax_repaint.load("./ram_head").ocean.shape == jax_repaint.load(Path("ram_head")).ocean.shape == (7, 12)


def test_more_mistakes_of_options(trained, tmp_path, monkeypatch):
    times = table(4, time="2020-01-01")
    with pytest.raises(InputError, match="not a fixed duration"):
        collect(times, GRID, step="often")
    for step in ("0h", "-1h", "1MS"):
        with pytest.raises(InputError, match="not a fixed duration"):
            collect(times, GRID, step=step)
    with pytest.raises(InputError, match="goes with tables"):
        collect(gappy(), GRID, step="1h")
    shifted = Fields.create(tiny.fields().velocity, GRID.lat + 0.01, GRID.lon, tiny.fields().time)
    with pytest.raises(InputError, match="another grid than the model"):
        collect(shifted, GRID)
    westward = Fields.create(tiny.fields().velocity, GRID.lat + 0.01, GRID.lon - 360, tiny.fields().time)
    with pytest.raises(InputError, match="another grid than the model"):
        collect(westward, GRID)
    with pytest.raises(InputError, match="has 60 times"):
        collect(tiny.fields(), GRID, time="2020-01-01")
    with pytest.raises(InputError, match="'magic' is not one of"):
        quietly(trained, at(), method="magic")
    with pytest.raises(InputError, match="antithetic pairs: 3 is odd"):
        quietly(trained, at(), members=3)
    monkeypatch.setattr(memory, "available", lambda: 2**20)
    with pytest.raises(InputError, match="fit"):
        quietly(trained, table(500))


@pytest.mark.slow
def test_the_command_writes_a_file(trained, tmp_path, monkeypatch):
    model.save(trained, tmp_path / "model")
    table(6, speed=0.3).rename(columns={"u": "easting"}).to_csv(tmp_path / "track.csv", index=False)
    command = [sys.executable, "-m", "jax_repaint.inpaint", "--model=model", "--observations=track.csv", "--members=4"]
    command += [
        "--out=out/fields.nc",
        "--figure=out/fields.png",
        "--u_name=easting",
        "--seed=3",
        "--time=2020-01-04T12:00",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "compiling" in done.stderr
    assert "wrote out/fields.nc: 1 field of 4 members from 6 observations" in done.stdout
    assert (tmp_path / "out" / "fields.png").read_bytes().startswith(b"\x89PNG")
    with xr.open_dataset(tmp_path / "out" / "fields.nc") as fields:
        ours = quietly(trained, table(6), seed=3, time="2020-01-04T12:00")
        np.testing.assert_allclose(both(fields), both(ours), atol=1e-5)


class Given(SimpleNamespace):
    """Flags, and which of them the command line gave."""

    def __getitem__(self, name):
        return SimpleNamespace(present=name in self.given)


def options(**changes):
    given = {name for name, value in ({"observations": "", "out": ""} | changes).items() if value is not None}
    names = {f"{key}_name": "" for key in ("lat", "lon", "u", "v", "sigma", "time")}
    usual = {
        "model": "model", "observations": "track.csv", "out": "fields.nc", "members": 4, "seed": 0, "time": None,
        "step": None, "sigma": 0.005, "method": None, "raw": False, "cache": None, "export": None, "rows": 4,
        "chunk": None, "figure": None, "leave_out": False,
    }  # fmt: skip
    return Given(given=given, **(usual | names | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": "fields.csv"}, r"suffix must be one of \.nc"),
        ({"out": None}, "are needed"),
        ({"figure": "fields.gif"}, r"suffix must be one of \.png"),
        ({"figure": "no/../track.csv"}, r"suffix must be one of \.png"),
        ({"figure": "a.png", "export": "vehicle", "observations": None, "out": None}, "takes no --figure"),
        ({"rows": 8}, "--rows is of a program that --export=FOLDER writes"),
        ({"observations": None}, "are needed"),
        ({"model": "nowhere"}, "no model in nowhere"),
        ({"observations": "nowhere.csv"}, "nowhere.csv"),
        ({"out": "link.nc"}, r"link.nc is a file that this command reads"),
        ({"out": "link.nc", "observations": "tr*.csv"}, r"link.nc is a file that this command reads"),
        ({"out": "training.nc"}, r"training.nc is a file that this command reads, and would be lost"),
        ({"out": "mine.zarr"}, r"cannot write mine\.zarr: it exists and is not a Zarr store"),
        ({"cache": "track.csv"}, r"--cache=track\.csv: track\.csv is a file, not a folder"),
        ({"cache": "track.csv/cache"}, r"--cache=track\.csv/cache: .*track\.csv is a file"),
        ({"export": "vehicle"}, "takes no --observations, --out$"),
        (
            {"export": "vehicle", "observations": None, "out": None, "seed": 1, "time": "2020", "lat_name": "y"},
            "takes no --seed, --time, --lat_name$",
        ),
        ({"export": "vehicle", "members": 2, "observations": None, "out": None}, "antithetic pairs, two of them"),
    ],
)
def test_mistakes_of_the_command_write_nothing(trained, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    data = trained.training["config"]["data"] | {"fields": str(tmp_path / "training.nc")}
    config = trained.training["config"] | {"data": data}
    model.save(dataclasses.replace(trained, training=trained.training | {"config": config}), "model")
    Path("training.nc").write_text("fields")
    at().to_csv("track.csv")
    Path("link.nc").symlink_to("track.csv")
    Path("mine.zarr").mkdir()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(inpaint, "FLAGS", options(**changes))
    with pytest.raises(InputError, match=message):
        inpaint.main([])
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_hands_its_options_on(trained, tmp_path, monkeypatch):
    """To the function, and to the export of a program."""
    monkeypatch.chdir(tmp_path)
    model.save(trained, "model")
    at().to_csv("track.csv")
    seen = []

    def catching(function):
        signature = inspect.signature(function)

        def caught(*args, **options):
            seen.append(signature.bind(*args, **options).arguments)
            raise InputError("seen")

        return caught

    monkeypatch.setattr(inpaint, "inpaint", catching(inpaint.inpaint))
    monkeypatch.setattr(export, "export", catching(export.export))
    given = {
        "members": 6, "seed": 5, "time": "2020-01-01", "step": "1h", "sigma": 0.03, "method": "mmps", "raw": True,
        "chunk": 9, "leave_out": True,
    }  # fmt: skip
    names = {key: f"my {key}" for key in ("lat", "lon", "u", "v", "sigma", "time")}
    for_a_vehicle = {"rows": 7, "members": 6, "method": "kalman_cg", "raw": True}
    for changes in (
        given | {f"{key}_name": name for key, name in names.items()},
        for_a_vehicle | {"export": "vehicle", "observations": None, "out": None},
    ):
        monkeypatch.setattr(inpaint, "FLAGS", options(**changes))
        with pytest.raises(InputError, match="seen"):
            inpaint.main([])
    assert {name: seen[0][name] for name in given} == given
    assert seen[0]["columns"] == names
    assert seen[0]["observations"] == "track.csv"
    assert {name: seen[1][name] for name in for_a_vehicle} == for_a_vehicle
    assert seen[1]["folder"] == Path("vehicle")


@pytest.fixture
def series(trained, tmp_path, monkeypatch):
    """The command on a table of five hours, and what of them it had to make; stops when told."""
    monkeypatch.chdir(tmp_path)
    model.save(trained, "model")
    hours = np.repeat(pd.date_range("2020-03-01", periods=5, freq="h"), 3)
    table(15, seed=2, time=hours).to_csv("track.csv", index=False)
    monkeypatch.setattr(unfinished, "WORTH", 0)
    batches = []

    def run(stop_at=99, **changes):
        batches.clear()

        def made(method, trained, fields, cases, *rest):
            if len(batches) == stop_at:
                raise KeyboardInterrupt
            batches.append([str(case.time)[:13] for case in cases])
            return run_method(method, trained, fields, cases, *rest)

        monkeypatch.setattr(methods, "run_method", made)
        monkeypatch.setattr(inpaint, "FLAGS", options(**({"chunk": 8} | changes)))
        inpaint.main([])

    return SimpleNamespace(run=run, batches=batches)


def test_a_stopped_series_goes_on_where_it_was(series, tmp_path):
    series.run(out="whole.nc")
    whole = list(series.batches)
    assert len(whole) == 3
    with pytest.raises(KeyboardInterrupt):
        series.run(stop_at=2)
    assert series.batches == whole[:2]
    kept = sorted(path.name for path in tmp_path.glob("fields.nc_unfinished_*/*"))
    assert kept == ["kalman_0_2.npz", "kalman_1_2.npz"]
    # Another seed, other observations or times have other members.
    before = pd.read_csv("track.csv")
    for seed, more, hours in ((1, 0.0, 0), (0, 0.01, 0), (0, 0.0, 5)):
        time = pd.to_datetime(before.time) + pd.Timedelta(hours=hours)
        before.assign(u=before.u + more, time=time).to_csv("track.csv", index=False)
        with pytest.raises(KeyboardInterrupt):
            series.run(stop_at=1, seed=seed)
        assert len(series.batches) == 1
        assert series.batches == whole[:1] or hours
    before.to_csv("track.csv", index=False)
    series.run()
    assert series.batches == whole[2:]
    assert len(list(tmp_path.glob("*unfinished*"))) == 3
    with xr.open_dataset("fields.nc") as found, xr.open_dataset("whole.nc") as expected:
        xr.testing.assert_equal(found, expected)


def test_a_series_with_a_gate_goes_on_where_it_was(series, trained, tmp_path):
    """Each batch is sampled twice, the second time without a tenth of the observations."""
    model.save(calibrated_with(trained, gate=Gate(0.3, 0.7, -0.4)), "gated")
    series.run(model="gated", members=8, chunk=16, out="whole.nc")
    whole = list(series.batches)
    assert len(whole) == 6
    assert whole[::2] == whole[1::2]
    with pytest.raises(KeyboardInterrupt):
        series.run(model="gated", members=8, chunk=16, stop_at=4)
    kept = sorted(path.name for path in tmp_path.glob("fields.nc_unfinished_*/*"))
    assert kept == ["kalman_0_2.npz", "kalman_1_2.npz", "kalman_held_out_0_2.npz", "kalman_held_out_1_2.npz"]
    series.run(model="gated", members=8, chunk=16)
    assert series.batches == whole[4:]
    with xr.open_dataset("fields.nc") as found, xr.open_dataset("whole.nc") as expected:
        xr.testing.assert_equal(found, expected)


def test_what_cannot_be_written_is_kept(series, tmp_path, monkeypatch):
    def full(*_):
        raise InputError("no space left")

    for place, writer in ((readers, "write_dataset"), (inpaint, "figure")):
        with monkeypatch.context() as patch:
            patch.setattr(place, writer, full)
            with pytest.raises(InputError, match="no space left"):
                series.run(figure="fields.png")
        assert len(list(tmp_path.glob("fields.nc_unfinished_*/*"))) == 3
    series.run()
    assert not series.batches
    assert not list(tmp_path.glob("*unfinished*"))


def test_the_method_of_a_model_has_the_options_of_the_function(trained, monkeypatch):
    (_, *theirs), (_, *ours) = (
        [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()]
        for function in (inpaint.inpaint, model.Model.inpaint)
    )
    assert ours == theirs
    given = {name: object() for name, *_ in ours}
    monkeypatch.setattr(inpaint, "inpaint", lambda *args, **options: (args, options))
    (_, *positional), named = trained.inpaint(**given)
    assert dict(zip(given, positional, strict=False)) | named == given


def test_the_package_is_cheap_to_import_and_brings_a_model():
    code = "import sys, jax_repaint; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    shipped = jax_repaint.load()
    assert shipped.ocean.shape == (44, 94)
    assert repr(shipped) == (
        "Model(conditional, network of 2,408,034 parameters with channels (32, 64, 96), 44 x 94 cells at "
        "lat 18.2900..18.3096, lon -64.7248..-64.6800, calibrated for 16 members of kalman_jvp, "
        "16 of kalman, 16 of kalman_cg, 16 of kalman_ridge)"
    )
    assert model.fingerprint(jax_repaint.load("ram_head")) == model.fingerprint(shipped)
    with pytest.raises(InputError, match="no model in elsewhere"):
        jax_repaint.load("elsewhere")


ALONE = """
import sys, numpy as np, jax
from jax import export
jax.numpy.linalg.qr(jax.numpy.eye(2))  # loads LAPACK, which jax 0.7 does not do for an exported program
run = jax.jit(export.deserialize(bytearray(open("vehicle/inpaint.jaxexport", "rb").read())).call)
given = np.load("given.npz")
names = ("cells", "weights", "values", "sigma", "valid", "seed")
members, mean, std, low, high = run(*(given[name] for name in names))
np.savez("made.npz", members=members, mean=mean, std=std, low=low, high=high)
assert not [name for name in sys.modules if name.startswith(("jax_repaint", "flax"))]
"""


def test_a_program_has_no_kernel_of_one_platform(trained, monkeypatch):
    monkeypatch.setattr(unet, "suited", lambda network: network)  # as on a GPU
    of_a_gpu = dataclasses.replace(trained.network, dtype="bfloat16", attention_implementation="cudnn")
    half = dataclasses.replace(trained, network=of_a_gpu)
    program = jax.export.export(jax.jit(export.program(half, 4)), platforms=("cpu", "cuda"))(*export.shapes(3))
    assert program.platforms == ("cpu", "cuda")


def test_a_program_of_each_sampler_makes_the_members_of_inpaint(trained):
    (frame,) = collect(table(6, sigma=0.02), GRID)
    names = ("cells", "weights", "values", "sigma", "valid")
    given = [np.asarray(getattr(frame.observation, name)) for name in names]
    made = {}
    for method in ("kalman", "kalman_cg", "kalman_jvp"):
        made[method] = np.asarray(jax.jit(export.program(trained, 4, method))(*given, np.int32(5))[0])
        expected = inpaint.estimate(trained, [frame], 4, 5, method)[0].members
        np.testing.assert_allclose(made[method], expected, atol=5e-5)
    for one, other in itertools.combinations(made.values(), 2):
        assert np.nanmax(np.abs(one - other)) > 0.01
    with pytest.raises(InputError, match="'adaptive' cannot be exported; kalman, kalman_cg, kalman_jvp, given can"):
        export.program(trained, 4, "adaptive")


@pytest.mark.slow
def test_an_exported_program_makes_the_same_members_without_this_package(trained, tmp_path, capsys):
    pytest.importorskip("flatbuffers")
    varied = {"members": 4, "weight": (0.5, 1.0), "spread": (2.0, 1.0), "scale": (3.0, 2.0), "blocks": 7}
    calibrated = calibrated_with(trained, promised=False, **varied)
    text = export.export(calibrated, tmp_path / "vehicle", rows=10, members=4, platforms=("cpu",))
    assert "up to 10 observations, 4 calibrated members" in text
    off = re.search(r"move members by (\S+) mm/s and the mean by (\S+) mm/s at most", text)
    assert max(map(float, off.groups())) < 0.1
    description = json.loads((tmp_path / "vehicle" / export.DESCRIPTION).read_text())
    assert description["model_fingerprint"] == model.fingerprint(trained)
    assert description["inputs"]["cells"] == [[10, 4], "int32"]
    assert description["calibrated"]
    assert "7 blocks of time are too few" in description["interval"]
    (frame,) = collect(table(6, sigma=0.02), GRID)
    names = ("cells", "weights", "values", "sigma", "valid")
    padded = {name: np.array(getattr(frame.observation, name))[:10] for name in names}
    # What stands in unused rows does not matter.
    padded["values"][6:], padded["weights"][6:] = 9.0, 0.25
    np.savez(tmp_path / "given.npz", **padded, seed=np.int32(5))
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "vehicle" / export.GRID) as grid, np.load(tmp_path / "made.npz") as made:
        for name in ("lat", "lon", "ocean"):
            np.testing.assert_array_equal(grid[name], getattr(GRID, name))
        assert {name: list(made[short].shape) for name, short in zip(description["outputs"], made, strict=True)} == (
            description["outputs"]
        )
        exact = inpaint.estimate(calibrated, [frame], 4, 5, "kalman", calibrated.calibrations[0])[0]
        raw = inpaint.estimate(calibrated, [frame], 4, 5, "kalman")[0]
        assert np.nanmax(np.abs(exact.members - raw.members)) > 0.01
        np.testing.assert_allclose(made["members"], exact.members, atol=5e-5)
        np.testing.assert_allclose(made["mean"], exact.members.mean(0), atol=1e-5)
        for name in ("std", "low", "high"):
            np.testing.assert_allclose(made[name], getattr(exact, name), atol=1e-4, err_msg=name)
    program = jax.jit(export.program(trained, 4))
    made = program(*(padded[name] for name in names), np.int32(5))
    for ours, theirs in zip(made, (raw.members, raw.members.mean(0), raw.std, raw.low, raw.high), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-5)


def test_an_export_without_a_calibration_is_warned_of_once(trained, tmp_path, caplog):
    pytest.importorskip("flatbuffers")
    text = export.export(trained, tmp_path / "vehicle", rows=4, members=4, method="kalman", platforms=("cpu",))
    assert "4 raw members" in text
    assert caplog.text.count("the model has no calibration") == 1


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize(("first", "sampler"), [("kalman", "kalman"), ("kalman_ridge", "kalman_jvp")])
def test_an_export_is_calibrated_as_inpaint_is(trained, tmp_path, monkeypatch, raw, first, sampler):
    """Of the default, or what that corrects by if it starts from a regression."""
    names, seen = dict.fromkeys((first, sampler)), []
    calibrations = [calibrated_with(trained, method=name).calibrations[0] for name in names]
    ready = dataclasses.replace(trained, calibrations=tuple(calibrations))

    def caught(_, members, method, calibration):
        seen.append((members, method, calibration))
        raise InputError("seen")

    monkeypatch.setattr(export, "program", caught)
    with pytest.raises(InputError, match="seen"):
        export.export(ready, tmp_path, members=8, raw=raw)
    assert seen == [(8, sampler, None if raw else ready.calibrations[-1])]


def test_the_program_knows_the_variance_of_the_linear_estimate(trained):
    (frame,) = collect(table(6, sigma=0.02), GRID)
    observation = observe.pad_grid(frame.observation, GRID.ocean.shape, trained.padded)
    noise = gains.noise_covariance(observation)
    gain = gains.kalman_gain(trained.gaussian, observation, noise, jnp.float32(jnp.inf))
    found = export.linear_variance(guide.Evidence(trained.gaussian.ocean, observation, noise, trained.gaussian, gain))
    exact = linear.analysis(trained.gaussian, observation).variance
    np.testing.assert_allclose(found, exact, rtol=1e-3, atol=1e-6)


def damaged(content, rng):
    """The bytes with their end cut off, or some bits turned."""
    if rng.integers(3) == 0:
        return content[: rng.integers(len(content))]
    turned = bytearray(content)
    for at in rng.integers(len(content), size=1 + rng.integers(6)):
        turned[at] ^= 1 << rng.integers(8)
    return bytes(turned)


def outcome(call, *arguments):
    """What comes back, or None, and the sentence that it was refused with."""
    try:
        return call(*arguments), ""
    except InputError as e:
        return None, str(e)


def test_damaged_tables_are_read_or_refused_in_a_sentence(tmp_path):
    content = table(6, time="2020-01-01T00:00", sigma=0.01).to_csv(index=False).encode()
    refused = 0
    for number in range(240):
        path = tmp_path / "damaged.csv"
        path.write_bytes(damaged(content, np.random.default_rng(number)))
        frames, sentence = outcome(collect, path, GRID)
        refused += frames is None
        assert "\n" not in sentence
        assert all(np.isfinite(np.asarray(frame.observation.values)).all() for frame in frames or ())
    assert 80 < refused < 240


@pytest.mark.parametrize(
    "change",
    [
        ('"heads": 2', '"heads": 0'),
        ('"blocks": 1', '"blocks": 1000000000'),
        ('"steps": 250', '"steps": Infinity'),
        ('"steps": 250', '"steps": 90000000000'),
        ('"training": {', '"training": ' + 20000 * "[" + "{"),
        ('"grid": null', '"grid": [3, 4]'),
    ],
)
def test_numbers_out_of_proportion_are_refused_at_once(trained, tmp_path, change):
    model.save(trained, tmp_path / "model")
    path = tmp_path / "model" / model.DESCRIPTION
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change))
    with pytest.raises(InputError):
        model.load(tmp_path / "model")


def test_damaged_models_are_read_or_refused_in_a_sentence(trained, tmp_path):
    folder = tmp_path / "model"
    model.save(trained, folder)
    whole = {name: (folder / name).read_bytes() for name in (model.WEIGHTS, model.DESCRIPTION)}
    refused = 0
    for number in range(60):
        rng = np.random.default_rng(number)
        chosen = (model.WEIGHTS, model.DESCRIPTION)[number % 2]
        for name, content in whole.items():
            # The header of the weights, most of whose bytes are numbers that no check can find fault with.
            end = 3000 if name == model.WEIGHTS else len(content)
            (folder / name).write_bytes(damaged(content[:end], rng) + content[end:] if name == chosen else content)
        loaded, sentence = outcome(model.load, folder)
        refused += loaded is None
        assert "\n" not in sentence
    assert refused > 30
