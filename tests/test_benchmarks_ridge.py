"""The regression that stands beside the samplers is the formula, finds what no linear estimate can, and runs."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from absl import flags
from scipy import linalg

from benchmarks import ridge
from jax_repaint import metrics, model
from jax_repaint.cases import OBSERVATION_ERROR
from jax_repaint.data import readers
from jax_repaint.errors import InputError
from jax_repaint.methods import run_method


def test_weights_are_the_dense_formula():
    rng = np.random.default_rng(0)
    train, at, targets = rng.standard_normal((9, 3)), rng.standard_normal((4, 3)), rng.standard_normal((9, 5))

    def kernel(a, b):
        unit = np.mean(np.sum(train**2, 1))
        return np.array([[np.exp(-np.sum((p - q) ** 2) / (2 * 1.7**2 * unit)) for q in b] for p in a])

    dual = np.linalg.inv(kernel(train, train) + 0.3 * np.eye(9)) @ targets
    np.testing.assert_allclose(ridge.weights(train, at, 1.7, 0.3) @ targets, kernel(at, train) @ dual, atol=1e-12)
    # With next to no penalty it meets every target.
    np.testing.assert_allclose(ridge.weights(train, train, 1.7, 1e-12) @ targets, targets, atol=1e-6)


def test_components_are_uncorrelated_with_the_root_of_their_variance():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((200, 6)) @ rng.standard_normal((6, 6)) + 3
    z, same = ridge.turned(rows, [rows], 4)
    variance = np.linalg.eigvalsh(np.cov(rows.T, ddof=0))[::-1][:4]
    np.testing.assert_allclose(z.T @ z / 200, np.diag(np.sqrt(variance)), atol=1e-10)
    np.testing.assert_array_equal(z, same)
    # All of them measure distance by the root of the covariance, and a value that never changes adds no component.
    (z,) = ridge.turned(np.concatenate([rows, np.ones((200, 1))], 1), [], 99)
    anomaly = rows - rows.mean(0)
    distance = np.einsum("ni,ij,nj->n", anomaly, np.linalg.inv(linalg.sqrtm(np.cov(rows.T, ddof=0))), anomaly)
    np.testing.assert_allclose(np.sum(z**2, 1), distance)


def test_selects_by_the_error_on_validation_frames():
    rng = np.random.default_rng(0)
    parts = [(rng.standard_normal((n, 4)), rng.standard_normal((n, 3))) for n in (30, 10)]
    choice = ridge.select(*parts, (2, 4), (0.5, 2.0), (0.1, 1.0))
    errors = {}
    for count in (2, 4):
        z, z_val = ridge.turned(parts[0][0], [parts[1][0]], count)
        for length in (0.5, 2.0):
            for penalty in (0.1, 1.0):
                left = parts[1][1] - ridge.weights(z, z_val, length, penalty) @ parts[0][1]
                errors[count, length, penalty] = np.sum(left**2) / np.sum(parts[1][1] ** 2)
    assert choice.error == pytest.approx(min(errors.values()))
    assert errors[choice.components, choice.length, choice.penalty] == min(errors.values())


def test_finds_what_no_linear_estimate_can():
    """Products of observed values, uncorrelated with them."""
    rng = np.random.default_rng(0)
    train, validation, test = (rng.standard_normal((n, 3)) for n in (400, 100, 100))

    def left(y):
        return np.stack([y[:, 0] * y[:, 1], y[:, 2] ** 2 - 1], 1)

    line, *_ = np.linalg.lstsq(train, left(train), rcond=None)
    assert np.mean((left(test) - test @ line) ** 2) > 0.9 * np.mean(left(test) ** 2)
    choice = ridge.select((train, left(train)), (validation, left(validation)), (2, 3), (1.0, 4.0), (1e-3, 1.0))
    assert choice.components == 3
    z, z_test = ridge.turned(train, [test], 3)
    found = ridge.weights(z, z_test, choice.length, choice.penalty) @ left(train)
    assert np.mean((left(test) - found) ** 2) < 0.05 * np.mean(left(test) ** 2)
    # Where nothing is to be found it is no worse than nothing.
    noise = [(y, rng.standard_normal((len(y), 50))) for y in (train, validation)]
    assert ridge.select(*noise, (3,), (1.0, 4.0), (1e-3, 1e3)).error == pytest.approx(1, abs=0.02)


def test_all_frames_observe_the_same_cells_and_leave_what_the_linear_estimate_does():
    trained, fields = tiny.model(), tiny.fields().select(np.arange(51, 55))
    cases = ridge.make_cases(trained, fields, range(51, 55), "cells:0.2")
    assert len({case.observed.tobytes() for case in cases}) == 1
    means = run_method("linear", trained, fields, cases, 1).members
    values, left = ridge.seen_and_left(trained, cases[0], fields.velocity)
    scored = fields.ocean & ~cases[0].observed
    assert values.shape == (4, 2 * cases[0].observed.sum())
    for row, case, (mean,) in zip(left, cases, means, strict=True):
        np.testing.assert_allclose(row, (case.truth - mean)[scored].reshape(-1), atol=1e-5)
        assert np.mean(row**2) == pytest.approx(metrics.mse(mean, case.truth, scored), rel=1e-3)


def test_observations_have_the_errors_that_are_asked_for():
    trained, fields = tiny.model(), tiny.fields()
    numbers = np.arange(51, 55)
    seen = {}
    for error in (None, 0.05):
        cases = ridge.make_cases(trained, fields.select(numbers), numbers, "cells:0.2", error=error)
        seen[error] = np.stack([case.seen[case.observed] - case.truth[case.observed] for case in cases])
        base = np.concatenate(run_method("linear", trained, fields, cases, 1).members)
        parts = [fields.select(np.arange(30)), fields.select(np.arange(38, 46))]
        made, _ = ridge.ridge(trained, cases, base, *parts)
        np.testing.assert_array_equal(made[:, cases[0].observed], base[:, cases[0].observed])
        # Every method is told the error: the linear estimate of noisier values is another gain.
        told = np.asarray(cases[0].observation.sigma)[np.asarray(cases[0].observation.valid)]
        np.testing.assert_allclose(told * trained.standardiser.std, error or OBSERVATION_ERROR, rtol=1e-5)
    assert not seen[None].any()
    assert seen[0.05].std() == pytest.approx(0.05, rel=0.2)


def run(monkeypatch, folder, **options):
    asked = {"model": str(folder / "model"), "fields": str(folder / "tiny.nc"), "patterns": ["line:4", "cells:0.2"]}
    asked |= {"frames": 6, "train": 30, "members": 2, "methods": ["kalman"], "seed": 0, "error": None, "out": None}
    asked |= {"start": False, "smoke": False}
    monkeypatch.setattr(flags, "FLAGS", SimpleNamespace(**(asked | options)))
    ridge.main([])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ridge")
    readers.write(tiny.fields(), folder / "tiny.nc")
    model.save(tiny.model(data=readers.read(folder / "tiny.nc")), folder / "model")
    return folder


def test_the_command_runs(monkeypatch, folder, capsys):
    run(monkeypatch, folder, out=str(folder / "ridge.json"))
    printed = capsys.readouterr().out
    found = json.loads((folder / "ridge.json").read_text())["patterns"]
    assert [p["pattern"] for p in found] == ["line:4", "cells:0.2"]
    for p in found:
        assert (p["frames"], p["train"], p["validation"]) == (6, 30, 8)
        assert f"{p['pattern']}, {p['observed']} cells" in printed
        rows = {r["method"]: r for r in p["rows"]}
        assert list(rows) == ["linear", "ridge", "kalman"]
        for r in rows.values():
            for base in ("linear", "ridge"):
                assert r[base]["ratio"] == pytest.approx(r["mse"] / rows[base]["mse"])
                assert r[base]["lo"] <= r[base]["ratio"] <= r[base]["hi"]
    run(monkeypatch, folder, patterns=["line:4"], methods=["linear_samples", "paste"], error=0.03, start=True)
    printed = capsys.readouterr().out
    assert "cells observed with errors of 0.03 m/s in all of 6 frames" in printed
    assert [line.split("  ")[0].strip() for line in printed.splitlines()[-5:]][-1] == "paste from ridge"
    assert "linear_samples from ridge" not in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patterns": []}, "at least one pattern"),
        ({"methods": ["kalmann"]}, "kalmann"),
        ({"members": 3}, "3 is odd"),
        ({"patterns": ["line:x"]}, "line:x"),
    ],
)
def test_mistakes_are_named(monkeypatch, folder, options, message):
    with pytest.raises(InputError, match=message):
        run(monkeypatch, folder, **options)


def test_frames_with_gaps_are_refused():
    fields = tiny.fields()
    fields.velocity[3, 5, 8] = np.nan
    split = SimpleNamespace(train=np.arange(41), validation=np.arange(42, 50), test=np.arange(51, 60))
    with pytest.raises(InputError, match="missing"):
        ridge.measure_pattern(tiny.model(), fields.select, split, "line:4", 3, 41, [], 2)
