"""The mixture of flow regimes is what it says, and ranks the samplers."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from scipy import stats

from benchmarks import toy
from jax_repaint.errors import InputError


@pytest.fixture(scope="module")
def prior():
    return toy.make_toy()


@pytest.fixture(scope="module")
def cases(prior):
    return toy.make_cases(prior, "line", 6)


def derivatives():
    """Divergence and vorticity of flat fields by central differences, inside of the grid."""
    fields = np.eye(toy.SIZE).reshape(-1, *toy.SHAPE, 2)
    d_x = (fields[:, 1:-1, 2:] - fields[:, 1:-1, :-2]) / 2
    d_y = (fields[:, 2:, 1:-1] - fields[:, :-2, 1:-1]) / 2
    divergence, vorticity = d_x[..., 0] + d_y[..., 1], d_x[..., 1] - d_y[..., 0]
    return (a.reshape(toy.SIZE, -1) for a in (divergence, vorticity))


@pytest.mark.parametrize("lengths", [(16, 9), (12, 12)])
def test_velocity_comes_from_streamfunction_and_potential(lengths):
    divergence, vorticity = derivatives()

    def energy(operator, covariance):
        return np.einsum("iv,ij,jv->v", operator, covariance, operator, optimize=True).mean()

    turning, diverging, both = (toy.velocity_covariance(lengths, 0.4, f) for f in (0, 1, 0.16))
    assert energy(divergence, turning) < 0.01 * energy(vorticity, turning)
    assert energy(vorticity, diverging) < 0.01 * energy(divergence, diverging)
    assert energy(divergence, both) / energy(vorticity, both) == pytest.approx(0.16 / 0.84, rel=0.05)
    for covariance in (turning, diverging, both):
        assert np.trace(covariance) == pytest.approx(toy.SIZE)
        assert np.linalg.eigvalsh(covariance)[0] > -1e-9


def test_prior_is_standardised(prior):
    assert np.trace(prior.covariance.mean(0) + prior.mean.T @ prior.mean / 4) == pytest.approx(toy.SIZE)
    np.testing.assert_allclose(prior.mean.mean(0), 0, atol=1e-12)
    rng = np.random.default_rng(0)
    draws = prior.sample(rng, np.arange(400) % 4)
    # A quarter of the variance is along one direction.
    assert float(prior.gaussian.variance[0]) == pytest.approx(182, abs=3)
    leading = np.asarray(prior.gaussian.direction[0]).reshape(-1)
    assert np.mean((draws @ leading) ** 2) == pytest.approx(182, rel=0.2)
    assert np.mean((draws @ prior.small) ** 2) * prior.small.shape[1] == pytest.approx(0.05 * toy.SIZE, rel=0.1)


@pytest.mark.parametrize("sigma", [0.03, 0.5, 3.4])
def test_denoiser_is_the_conditional_mean(prior, sigma):
    rng = np.random.default_rng(1)
    first, second = prior.sample(rng, np.array([0, 2]))
    # Between two regimes there is something to weigh.
    clean = 0.5 * (first + second) if sigma > 1 else second
    x = clean + sigma * rng.standard_normal(toy.SIZE)
    covariance = prior.covariance + sigma**2 * np.eye(toy.SIZE)
    logs = [stats.multivariate_normal.logpdf(x, m, c) for m, c in zip(prior.mean, covariance, strict=True)]
    weight = np.exp(logs - np.max(logs))
    means = [m + (c - sigma**2 * np.eye(toy.SIZE)) @ np.linalg.solve(c, x - m)
             for m, c in zip(prior.mean, covariance, strict=True)]  # fmt: skip
    expected = weight / weight.sum() @ np.stack(means)
    found = prior.denoiser(jnp.asarray(x.reshape(*toy.SHAPE, 2), jnp.float32), jnp.float32(sigma))
    np.testing.assert_allclose(np.asarray(found).reshape(-1), expected, atol=2e-3)


def test_posterior_is_the_conditional_mixture(prior, cases):
    exact = cases[0].exact
    seen = np.zeros((len(exact.seen), toy.SIZE))
    seen[np.arange(len(seen)), exact.seen] = 1
    evidence = []
    for k, (mean, covariance) in enumerate(zip(prior.mean, prior.covariance, strict=True)):
        information = np.linalg.inv(covariance)
        left = np.linalg.inv(information + seen.T @ seen / toy.NOISE**2)
        np.testing.assert_allclose(exact.variance[k], np.diag(left), atol=1e-6)
        expected = left @ (information @ mean + seen.T @ exact.values / toy.NOISE**2)
        np.testing.assert_allclose(exact.mean[k], expected, atol=1e-5)
        s = seen @ covariance @ seen.T + toy.NOISE**2 * np.eye(len(seen))
        evidence.append(stats.multivariate_normal.logpdf(exact.values, seen @ mean, s))
    weight = np.exp(evidence - np.max(evidence))
    np.testing.assert_allclose(exact.weight, weight / weight.sum(), atol=1e-6)
    draws = exact.sample(np.random.default_rng(0), 600)
    mean, variance = exact.moments()
    assert np.abs((draws.mean(0) - mean) / np.sqrt(variance / 600)).mean() == pytest.approx(0.8, abs=0.2)
    assert draws.var(0).sum() / variance.sum() == pytest.approx(1, abs=0.05)


def test_exact_samples_score_what_is_ideal(prior, cases):
    made = [case.exact.sample(np.random.default_rng(case.number), 16).reshape(16, *toy.SHAPE, 2) for case in cases]
    scores = [toy.score(prior, case, x) for case, x in zip(cases, made, strict=True)]
    row = toy.combine(scores, 16)
    assert row["single"] == pytest.approx(2, abs=0.15)
    assert row["mean"] == pytest.approx(1 + 1 / 16, abs=0.05)
    assert row["m_inf"] == pytest.approx(1, abs=0.05)
    assert row["SSR"] == pytest.approx(1, abs=0.05)
    assert row["cover"] == pytest.approx(15 / 17, abs=0.02)
    assert row["CRPS"] == pytest.approx(1, abs=0.05)
    assert row["small"] == pytest.approx(1, abs=0.1)
    # One estimate, the best there is: CRPS is its absolute error, sqrt 2 times that of the Gaussian around it.
    means = [case.exact.moments()[0].reshape(1, *toy.SHAPE, 2) for case in cases]
    row = toy.combine([toy.score(prior, case, x) for case, x in zip(cases, means, strict=True)], 1)
    assert row["mean"] == row["single"] == pytest.approx(1)
    assert row["CRPS"] == pytest.approx(np.sqrt(2), abs=0.06)
    assert row["SSR"] == row["cover"] == 0


def test_uniform_noise_has_the_mean_of_the_adaptive(cases):
    known = toy.known_of(cases)
    (stage,) = toy.method("adaptive")
    v = np.asarray(known.prior_variance[0], float)[np.asarray(known.missing[0])[..., 0]]
    v = (v - v.min()) / (v.max() - v.min())
    assert toy.mean_weight(known, stage) == pytest.approx(np.mean(0.2 + 0.8 * v**3), rel=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_ranking_of_samplers():
    """Kalman before S6 before one pass of RePaint, by fair CRPS; only the first has the right spread."""
    names = ["plain, 1 resample", "plain", "adaptive S6", "kalman 16"]
    results = toy.run("line", 4, 8, names=names)
    row = {r["method"]: r for r in results["rows"]}
    assert list(row) == names
    crps = {name: r["CRPS"] for name, r in row.items()}
    assert crps["kalman 16"] < 0.92 * crps["adaptive S6"]
    assert crps["kalman 16"] < 0.95 * crps["plain"]
    assert crps["adaptive S6"] < crps["plain, 1 resample"]
    assert row["adaptive S6"]["SSR"] < 0.6
    assert 0.85 < row["kalman 16"]["SSR"] < 1.15
    assert row["adaptive S6"]["calls"] > 100 * row["kalman 16"]["calls"]


@pytest.mark.slow
def test_smoke(monkeypatch, tmp_path, capsys):
    out = tmp_path / "toy.json"
    asked = {"smoke": True, "pattern": "walk", "cases": 16, "members": 16, "seed": 0, "out": str(out)}
    asked["methods"] = ["exact", "GP", "adaptive S1", "uniform 0", "kalman 16"]
    monkeypatch.setattr(flags, "FLAGS", SimpleNamespace(**asked))
    toy.main([])
    results = json.loads(out.read_text())
    assert "kalman 16" in capsys.readouterr().out
    rows = {r["method"]: r for r in results["rows"]}
    expected = ["exact samples", "GP mean", "GP samples", "adaptive S1", "kalman 16"]
    assert [name for name in rows if not name.startswith("uniform")] == expected
    assert len(rows) == 6
    assert all(np.isfinite(list(r.values())[1:]).all() for r in rows.values())
    assert (results["cases"], results["members"]) == (2, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ["kriging"]}, "method 'kriging' is not one of exact samples; GP mean; "),
        ({"pattern": "swath"}, "pattern 'swath' is not one of line, walk"),
        ({"members": 1}, "a case and two members, got 1 and 1"),
        ({"cases": 0}, "a case and two members, got 0 and 4"),
    ],
)
def test_mistakes_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        toy.run(**({"pattern": "line", "cases": 1, "members": 4} | options))
