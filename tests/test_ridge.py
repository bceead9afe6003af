"""The regression of a pattern is the formula, finds what no covariance tells, and samplers start from it."""

import dataclasses
import time
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from jax_repaint import archive, methods, metrics, model, observe, points, results, sweep
from jax_repaint.cases import make_cases
from jax_repaint.data import readers
from jax_repaint.data.fields import prepare
from jax_repaint.errors import InputError
from jax_repaint.methods import run_method
from jax_repaint.prepare import prepare as prepare_data
from jax_repaint.prior import linear, ridge
from jax_repaint.study import open_study
from tests.test_linear import OCEAN, SEA, SHAPE, covariance_of, draw, on_grid, on_sea, truth

ERROR = 0.05


@pytest.fixture(scope="module")
def frames():
    """Fields of three directions; the amplitude of the second is the square of the first."""
    factor = np.linalg.qr(truth(3, 0.0)[0])[0]
    a = np.random.default_rng(0).normal(size=(500, 3))
    a[:, 1] = (a[:, 0] ** 2 - 1) / np.sqrt(2)
    return on_grid((10 * a) @ factor.T + 0.01 * np.random.default_rng(1).normal(size=(500, SEA.size)))


@pytest.fixture(scope="module")
def gaussian(frames):
    return linear.fit(frames[:300], OCEAN, 3)


@pytest.fixture(scope="module")
def kept(gaussian, frames):
    return ridge.archive(gaussian, frames[:300], frames[300:400])


def seen(field, count, size=None):
    """Some cells of a field, and padded rows."""
    cells = observe.cells(OCEAN, count / OCEAN.sum(), np.random.default_rng(4))
    return observe.from_cells(cells, field, ERROR, OCEAN, size=size)


@pytest.mark.parametrize("points", [False, True], ids=["cells", "points"])
def test_coefficients_are_those_of_the_estimates(points):
    """Also where rows share cells."""
    fields = draw(truth(10, 0.01), 60, 1)
    prior = linear.fit(fields, OCEAN, 6)
    if points:
        lat, lon = np.array([4.3, 4.6, 5.8, 6.5]), np.array([1.6, 1.9, 3.2, 7.1])
        observation = observe.from_points(lat, lon, np.zeros((4, 2)), ERROR, *map(np.arange, SHAPE), OCEAN, size=6)
    else:
        observation = seen(fields[0], 8, size=10)
    values = np.random.default_rng(2).normal(size=(5, observation.size, 2)).astype(np.float32)
    estimates = linear.estimate(prior, observation, values)
    expected = on_sea(estimates - np.asarray(prior.mean)) @ on_sea(prior.direction).T
    np.testing.assert_allclose(linear.coefficients(prior, observation, values), expected, atol=1e-4)
    np.testing.assert_allclose(
        ridge.coefficients(prior, estimates), expected, rtol=2e-3, atol=1e-3 * np.abs(expected).max()
    )


def test_the_regression_is_the_dense_formula(gaussian, kept, frames, monkeypatch):
    monkeypatch.setattr(ridge, "COMPONENTS", (2,))
    observation = seen(frames[450], 1, size=3)
    found = ridge.regression(gaussian, kept, observation)
    assert found.choice.components == 2
    rows = np.repeat(np.asarray(observation.on_grid(SHAPE)[0]).reshape(-1), 2)[SEA]
    e, mean, covariance = on_sea(gaussian.direction), on_sea(gaussian.mean), covariance_of(gaussian)
    gain = covariance[:, rows] @ np.linalg.inv(covariance[np.ix_(rows, rows)] + ERROR**2 * np.eye(rows.sum()))
    told = ridge.observed(gaussian, observation, kept.train, np.random.default_rng([0, 0x52]))
    assert told.shape == (300, 3, 2)
    assert not told[:, 1:].any()
    estimated = (told[:, 0] - mean[rows]) @ gain.T @ e.T
    centre = estimated.mean(0)
    value, vector = np.linalg.eigh(np.cov(estimated.T, ddof=0))
    turn = vector[:, :-3:-1] / value[:-3:-1] ** 0.25
    z = (estimated - centre) @ turn
    unit = np.mean(np.sum(z**2, 1))
    length, penalty = found.choice.length, found.choice.penalty
    k = np.array([[np.exp(-np.sum((p - q) ** 2) / (2 * length**2 * unit)) for q in z] for p in z])
    weights = np.linalg.solve(k + penalty * np.eye(len(z)), kept.train - estimated)
    values = np.asarray(observation.values)
    own = (on_sea(frames[450]) - mean)[rows] @ gain.T @ e.T
    at = (own - centre) @ turn
    expected = np.exp(-np.sum((at - z) ** 2, 1) / (2 * length**2 * unit)) @ weights @ e
    offset = found.offset(values[None])[0]
    np.testing.assert_allclose(on_sea(offset), expected, atol=2e-3 * np.abs(expected).max())
    assert not offset[~OCEAN].any()


@pytest.mark.parametrize("points", [False, True], ids=["cells", "points"])
def test_observed_values_have_the_covariance_of_the_prior(points):
    """That of the part outside the directions too, of which the archive keeps nothing."""
    prior = linear.fit(draw(truth(10, 0.3), 400, 1), OCEAN, 6)
    assert float(prior.rest) > 0.05
    if points:
        lat, lon = np.array([4.3, 4.6, 5.8]), np.array([1.6, 1.9, 3.2])
        observation = observe.from_points(lat, lon, np.zeros((3, 2)), ERROR, *map(np.arange, SHAPE), OCEAN, size=4)
    else:
        observation = seen(np.zeros((*SHAPE, 2)), 3, size=4)
    e, rest = on_sea(prior.direction), float(prior.rest)
    a = np.sqrt(np.asarray(prior.variance)) * np.random.default_rng(3).normal(size=(40000, 6))
    values = ridge.observed(prior, observation, a, np.random.default_rng(4))
    assert not values[:, 3].any()
    units = np.eye(SEA.size).reshape(SEA.size, -1)
    seen_by = np.stack([np.asarray(observation.apply(on_grid(unit[None])[0]))[:3].reshape(-1) for unit in units], 1)
    expected = seen_by @ covariance_of(prior) @ seen_by.T + ERROR**2 * np.eye(6)
    found = np.cov(values[:, :3].reshape(len(a), -1).T)
    np.testing.assert_allclose(found, expected, atol=0.03 * np.diag(expected).max())
    np.testing.assert_allclose(
        values[:, :3].reshape(len(a), -1).mean(0), seen_by @ on_sea(prior.mean), atol=4 * np.sqrt(expected.max() / 4e4)
    )
    # Given the coefficients only that part and the errors are left.
    left = values[:, :3].reshape(len(a), -1) - seen_by @ on_sea(prior.mean) - a @ e @ seen_by.T
    expected = rest * seen_by @ (np.eye(SEA.size) - e.T @ e) @ seen_by.T + ERROR**2 * np.eye(6)
    np.testing.assert_allclose(np.cov(left.T), expected, atol=0.03 * np.diag(expected).max())


@pytest.mark.parametrize("rest", [0.3, 1.0])
def test_what_the_directions_leave_is_not_taken_for_a_signal(rest):
    """Gaussian fields, much of whose variance is outside the directions: nothing is to be found."""
    plain = draw(truth(3, rest), 800, 5)
    prior = linear.fit(plain[:300], OCEAN, 3)
    observation = seen(plain[0], 8)
    found = ridge.regression(prior, ridge.archive(prior, plain[:300], plain[300:400]), observation)
    values = np.stack([np.asarray(observation.apply(field)) for field in plain[400:]])
    estimates = linear.estimate(prior, observation, values)
    left = [np.mean((estimates + part - plain[400:])[:, OCEAN] ** 2) for part in (0, found.offset(values))]
    assert left[1] < 1.01 * left[0]
    assert found.choice is None or found.choice.error > 0.95


def test_finds_what_no_covariance_tells(gaussian, kept, frames):
    """Of two directions one observes one, whose square is the other."""
    observation = seen(frames[0], 1)
    found = ridge.regression(gaussian, kept, observation)
    values = np.stack([np.asarray(observation.apply(field)) for field in frames[400:]])
    estimates = linear.estimate(gaussian, observation, values)
    left = [np.mean((estimates + part - frames[400:])[:, OCEAN] ** 2) for part in (0, found.offset(values))]
    assert left[1] < 0.9 * left[0]
    assert found.choice.error < 0.95
    # Gaussian fields leave nothing to be found.
    plain = draw(truth(3, 1e-4), 400, 5)
    prior = linear.fit(plain[:300], OCEAN, 3)
    nothing = ridge.regression(prior, ridge.archive(prior, plain[:300], plain[300:]), seen(plain[0], 3))
    assert nothing.choice is None or nothing.choice.error > 0.97


def test_predictors_that_never_change_tell_nothing():
    same = np.full((5, 3), 2, np.float32)
    mean, turn = ridge.turning(same, 3)
    z = (same - mean) @ turn
    np.testing.assert_array_equal(ridge.kernel(z, z, 1.0), np.ones((5, 5)))
    choice = ridge.select((same, np.eye(5, dtype=np.float32)), (same, -np.eye(5, dtype=np.float32)))
    assert choice is None


def test_nothing_is_added_where_it_does_not_help(gaussian, kept):
    observation = seen(np.zeros((*SHAPE, 2)), 4)
    found = ridge.Regression(gaussian, observation)
    assert not found.offset(np.ones((2, observation.size, 2))).any()
    assert ridge.select((kept.train, kept.train), (kept.validation, -kept.validation)) is None
    assert ridge.select((kept.train, kept.train), (kept.validation, 0 * kept.validation)) is None


@pytest.fixture(scope="module")
def trained():
    made, fields = tiny.model("anchored"), tiny.fields()
    parts = (prepare(fields.select(np.arange(*made.training["parts"][name])), made.standardiser, made.padded)[0]
             for name in ("train", "validation"))  # fmt: skip
    return dataclasses.replace(made, archive=ridge.archive(made.gaussian, *parts))


def test_a_model_keeps_its_archive(trained, tmp_path):
    model.save(trained, tmp_path / "with")
    found = model.load(tmp_path / "with")
    for name, part in vars(trained.archive).items():
        np.testing.assert_array_equal(getattr(found.archive, name), part)
    without = dataclasses.replace(trained, archive=None)
    model.save(without, tmp_path / "without")
    assert model.load(tmp_path / "without").archive is None
    assert model.fingerprint(found) == model.fingerprint(trained) != model.fingerprint(without)
    model.store_archive(tmp_path / "without", trained.archive)
    assert model.fingerprint(model.load(tmp_path / "without")) == model.fingerprint(trained)
    assert trained.with_prior(trained.gaussian).archive is None
    path = tmp_path / "with" / model.WEIGHTS
    tensors = load_file(path)
    for wrong in (np.zeros((3, 2), np.float16), np.zeros(3, np.float16), np.zeros((0, 8), np.float16)):
        save_file(tensors | {"archive/train": wrong}, path)
        with pytest.raises(InputError, match="an archive of"):
            model.load(tmp_path / "with")
    save_file(tensors | {"archive/train": np.full((3, 8), np.nan, np.float16)}, path)
    with pytest.raises(InputError, match="archive/train holds numbers that are not finite"):
        model.load(tmp_path / "with")
    with pytest.raises(InputError, match="no model that an archive could be added to"):
        model.store_archive(tmp_path / "nothing", trained.archive)


def test_the_command_makes_the_archive_of_the_training_frames(trained, tmp_path, monkeypatch, capsys):
    readers.write(tiny.fields(), tmp_path / "tiny.nc")
    made = tiny.model("anchored", data=readers.read(tmp_path / "tiny.nc"))
    model.save(made, tmp_path / "model")
    given = {"model": str(tmp_path / "model"), "fields": str(tmp_path / "tiny.nc")}
    monkeypatch.setattr(archive, "FLAGS", SimpleNamespace(**given))
    archive.main([])
    assert "41 training and 8 validation frames are in" in capsys.readouterr().out
    found = model.load(tmp_path / "model")
    x = prepare(readers.read(tmp_path / "tiny.nc").select(np.arange(41)), made.standardiser, made.padded)[0]
    away = (x - np.asarray(made.gaussian.mean)).reshape(41, -1)
    expected = away @ np.asarray(made.gaussian.direction).reshape(8, -1).T
    np.testing.assert_allclose(found.archive.train, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    readers.write(tiny.fields(70), tmp_path / "longer.nc")
    monkeypatch.setattr(archive, "FLAGS", SimpleNamespace(**given | {"fields": str(tmp_path / "longer.nc")}))
    with pytest.raises(InputError, match=r"longer\.nc is not what the model was trained on"):
        archive.main([])
    monkeypatch.setattr(archive, "FLAGS", SimpleNamespace(model="ram_head", fields=None))
    with pytest.raises(InputError, match="is the model in the package"):
        archive.main([])


@pytest.mark.parametrize("kept", [True, False])
def test_a_training_keeps_what_its_setting_says(trained, kept, monkeypatch):
    tiny.register(monkeypatch)
    settings = tiny.config("anchored")
    settings.model.archive = kept
    data = prepare_data(tiny.fields(), settings)
    if not kept:
        assert data.archive is None
        return
    for part, x in zip(vars(data.archive).values(), (data.train, data.validation), strict=True):
        away = (x - np.asarray(data.gaussian.mean)).reshape(len(x), -1)
        expected = away @ np.asarray(data.gaussian.direction).reshape(8, -1).T
        np.testing.assert_allclose(part, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


@pytest.fixture
def chosen(monkeypatch):
    """A regression that adds something: on fields of a few waves none is found."""
    monkeypatch.setattr(ridge, "select", lambda *_: ridge.Choice(4, 2.0, 1.0, 0.9))
    monkeypatch.setattr(methods._latest_regressions, "_kept", {})


@pytest.mark.usefixtures("chosen")
def test_a_method_starts_from_the_regression(trained):
    fields = tiny.fields().select(np.arange(51, 53))
    cases = make_cases(trained, fields, [51, 52], ["cells:0.3"])
    own = run_method("kalman_ridge", trained, fields, cases, 2, count=3).members
    linear_mean = run_method("linear", trained, fields, cases, 1).members
    regressed = run_method("ridge", trained, fields, cases, 1).members
    moved = [
        dataclasses.replace(case, offset=np.nan_to_num(a[0] - b[0]))
        for case, a, b in zip(cases, regressed, linear_mean, strict=True)
    ]
    expected = run_method("kalman_jvp", trained, fields, moved, 2, count=3).members
    for case, ours, theirs, a, b in zip(cases, own, expected, regressed, linear_mean, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
        found = ridge.regression(trained.gaussian, trained.archive, case.observation)
        offset = found.offset(np.asarray(case.observation.values)[None])[0][:7, :12] * trained.standardiser.std
        np.testing.assert_allclose((a - b)[0][trained.ocean], offset[trained.ocean], atol=1e-5)
        assert np.abs(offset).max() > 0.01
    for name in ("ridge", "kalman_ridge"):
        with pytest.raises(InputError, match=rf"{name} starts from a regression .*python -m jax_repaint.archive"):
            run_method(name, dataclasses.replace(trained, archive=None), fields, cases, 2)
        with pytest.raises(InputError, match=f"{name} needs the linear prior"):
            run_method(name, trained.with_prior(trained.gaussian), fields, cases, 2)


def test_every_pattern_has_its_regression(trained, monkeypatch):
    """The latest are kept, by all that they depend on but the values."""
    made = []
    learn = ridge.regression
    monkeypatch.setattr(methods.ridge, "regression", lambda *given: made.append(1) or learn(*given))
    monkeypatch.setattr(methods._latest_regressions, "_kept", {})
    fields = tiny.fields().select(np.arange(51, 54))
    line = make_cases(trained, fields, [51, 52, 53], ["line:5"])
    offsets = [methods.ridge_offset(trained, case.observation) for case in line]
    assert len(made) == 1
    assert not np.array_equal(offsets[0], offsets[1]) or not np.any(offsets[0])
    (other,) = make_cases(trained, fields.select([0]), [51], ["line:5"], error=0.2)
    methods.ridge_offset(trained, other.observation)
    assert len(made) == 2


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize(("pattern", "patterns"), [("line:4", 1), ("cells:0.3", 2)])
def test_a_dry_run_counts_the_regressions(trained, tmp_path, monkeypatch, pattern, patterns):
    """Of two frames that share a line, or have cells of their own; one takes ten hours by this clock."""
    model.save(trained, tmp_path / "model")
    readers.write(tiny.fields(), tmp_path / "tiny.nc")
    config = points.default_config(lambda add: add(method="kalman_ridge", levels=3))
    config.update({"model": str(tmp_path / "model"), "fields": str(tmp_path / "tiny.nc"), "patterns": pattern})
    config.update({"frames": 2, "members": 2})
    learnt = []
    monkeypatch.setattr(sweep, "ridge_offset", lambda *_: learnt.append(1))
    real = time.perf_counter
    monkeypatch.setattr(sweep, "time", SimpleNamespace(perf_counter=lambda: real() + 36000 * len(learnt)))
    assert f"about {10 * patterns}.0 h on" in sweep.describe(open_study(config)).splitlines()[-1]


@pytest.mark.usefixtures("chosen")
def test_a_sweep_starts_there_too(trained, tmp_path):
    readers.write(tiny.fields(), tmp_path / "tiny.nc")
    data = readers.read(tmp_path / "tiny.nc")
    made = dataclasses.replace(tiny.model("anchored", data=data), archive=trained.archive)
    model.save(made, tmp_path / "model")

    def add_points(add):
        for method in ("kalman_jvp", "kalman_ridge"):
            add(method=method, levels=3)

    config = points.default_config(add_points)
    config.update({"model": str(tmp_path / "model"), "fields": str(tmp_path / "tiny.nc"), "patterns": "cells:0.3"})
    config.update({"frames": 2, "members": 2})
    sweep.run(open_study(config), tmp_path / "sweep", progress=False)
    rows = results.read_parts(tmp_path / "sweep").set_index(["method", "frame"])
    numbers = sorted({frame for _, frame in rows.index})
    cases = make_cases(made, data.select(numbers), numbers, ["cells:0.3"])
    for method in ("kalman_jvp", "kalman_ridge"):
        members = run_method(method, made, data, cases, 2, count=3).members
        for case, one in zip(cases, members, strict=True):
            expected = metrics.mse(one.mean(0), case.truth, data.ocean & ~case.observed)
            assert rows.loc[(method, case.frame), "mse_mean"] == pytest.approx(expected, rel=1e-4)
    assert not np.allclose(rows.loc["kalman_jvp", "mse_mean"], rows.loc["kalman_ridge", "mse_mean"], rtol=1e-4)


def test_the_archive_in_the_package_is_of_its_prior():
    """Principal components of training frames are uncorrelated and have the variances of the prior."""
    trained = model.load("ram_head")
    for part, size, loose in ((trained.archive.train, 3000, 0.1), (trained.archive.validation, 600, 0.3)):
        assert part.shape == (size, 256)
        np.testing.assert_allclose((part**2).mean(0), trained.gaussian.variance, rtol=loose)
    correlation = np.corrcoef(trained.archive.train.T) - np.eye(256)
    assert np.abs(correlation).max() < 0.1
