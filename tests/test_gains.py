"""Gains of many rows, by blocks or of merged rows, against dense linear algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_repaint import gains, guide, memory, observe, posterior
from jax_repaint.conditional import share_observed
from jax_repaint.denoise import PrincipalGaussian, Regimes
from jax_repaint.ensemble import frame_batches, own_bytes, posterior_ensemble, stack_analyses, stack_evidence
from jax_repaint.errors import InputError
from jax_repaint.posterior import Posterior, evidence_for
from jax_repaint.prior import linear
from jax_repaint.prior.analysis import DenseAnalysis, PrincipalAnalysis

SHAPE, RANK = (8, 12), 6
OCEAN = np.ones(SHAPE, bool)
OCEAN[:2, 8:] = False
SEA = np.flatnonzero(np.repeat(OCEAN.reshape(-1), 2))
LEVELS = [0.03, 0.7, 20.0, np.inf]


@pytest.fixture(scope="module")
def gaussian():
    rng = np.random.default_rng(0)
    y, x = np.indices(SHAPE)
    waves = np.cos(0.5 * (rng.normal(size=(30, 2, 1, 1)) * np.stack([y, x])).sum(1) + rng.uniform(0, 6, (30, 1, 1)))
    fields = waves[..., None] * rng.normal(size=(30, 1, 1, 2)) + 0.05 * rng.normal(size=(30, *SHAPE, 2))
    return linear.fit((fields * OCEAN[..., None]).astype(np.float32), OCEAN, RANK)


def field_of(gaussian, number):
    return np.asarray(guide.prior_draw(gaussian, jax.random.key(number)))


@pytest.fixture(scope="module")
def observation(gaussian):
    """Most cells of a field with errors of their own, and rows that pad."""
    seen = observe.cells(OCEAN, 0.7, np.random.default_rng(3))
    sigma = np.random.default_rng(4).uniform(0.05, 0.4, (seen.sum(), 2))
    return observe.from_cells(seen, field_of(gaussian, 1), sigma, OCEAN)


@pytest.fixture(scope="module")
def alike(gaussian):
    """Most cells of a field with one error, and rows that pad."""
    seen = observe.cells(OCEAN, 0.7, np.random.default_rng(3))
    return observe.from_cells(seen, field_of(gaussian, 1), 0.1, OCEAN)


@pytest.fixture(scope="module")
def later(alike):
    """Those without the first, as where one is held out: rows that pad come before and after."""
    return alike.rows(jnp.arange(alike.size) > 0)


@pytest.fixture(scope="module")
def spaced(gaussian):
    """Points between cells of which no two have a corner in common, one of them at the coast."""
    y, x = np.meshgrid([0.4, 2.3, 4.6, 6.5], [0.7, 2.5, 4.4, 7.4, 9.3], indexing="ij")
    wet = (y > 2) | (x < 8)
    lat, lon = y[wet], x[wet]
    points = observe.from_points(lat, lon, np.zeros((lat.size, 2)), 0.1, *map(np.arange, SHAPE), OCEAN)
    return points.replace(values=points.apply(jnp.asarray(field_of(gaussian, 2))))


def dense_of(gaussian, observation, correlation=0.0):
    """Sigma, A and R on the ocean, of valid rows, float64."""
    e = np.asarray(gaussian.direction, float).reshape(RANK, -1)[:, SEA]
    rest = float(gaussian.rest)
    sigma = (e.T * (np.asarray(gaussian.variance, float) - rest)) @ e + rest * np.eye(SEA.size)
    valid = np.asarray(observation.valid)
    a = np.zeros((valid.sum(), OCEAN.size))
    cells, weights = np.asarray(observation.cells)[valid], np.asarray(observation.weights, float)[valid]
    np.add.at(a, (np.arange(len(a))[:, None], cells), weights)
    errors = np.asarray(observation.sigma, float)[valid]
    noise = np.zeros((len(a), 2, len(a), 2))
    for row, (u, v) in enumerate(errors):
        noise[row, :, row] = [[u**2, correlation * u * v], [correlation * u * v, v**2]]
    return sigma, np.kron(a, np.eye(2))[:, SEA], noise.reshape(2 * len(a), 2 * len(a))


def covariance_at(covariance, sigma):
    return np.linalg.inv(np.linalg.inv(covariance) + np.eye(len(covariance)) / sigma**2)


def close(found, exact, rtol):
    np.testing.assert_allclose(found, exact, atol=rtol * np.abs(exact).max())


def one_level(gain, number):
    return jax.tree.map(lambda leaf: leaf[number], gain)


@pytest.mark.parametrize(
    ("kind", "correlation"),
    [("observation", 0.6), ("spaced", 0.6), ("spaced", 0.0), ("alike", 0.0), ("later", 0.0), ("alike", 0.6)],
)
def test_gains_by_blocks_are_those_of_dense_algebra(gaussian, kind, correlation, request):
    observation = request.getfixturevalue(kind)
    gain = gains.kalman_gains(gaussian, observation, np.array(LEVELS), correlation)
    assert gain.by_blocks
    covariance, a, noise = dense_of(gaussian, observation, correlation)
    valid = np.asarray(observation.valid)
    misfit = np.zeros(observation.values.shape, np.float32)
    misfit[valid] = np.random.default_rng(5).normal(size=(valid.sum(), 2))
    for number, sigma in enumerate(LEVELS):
        c = covariance_at(covariance, sigma)
        s = a @ c @ a.T + noise
        weighed = np.linalg.solve(s, misfit[valid].reshape(-1))
        here = one_level(gain, number)
        close(gains.weigh(gaussian, observation, here, misfit)[valid].reshape(-1), weighed, 1e-5)
        added = gains.increment(gaussian, observation, here, misfit, sigma)
        close(np.asarray(added).reshape(-1)[SEA], c @ a.T @ weighed, 1e-5)
        assert not np.asarray(added)[~OCEAN].any()
        # Padded rows are exact observations of nothing, with error 1 and the correlation of the others.
        padded = (~valid).sum() * np.log(1 - correlation**2)
        assert float(here.log_det) == pytest.approx(np.linalg.slogdet(s)[1] + padded, abs=2e-3)
        left = np.trace(c - c @ a.T @ np.linalg.solve(s, a @ c)) / SEA.size
        found = jax.jit(gains.remaining_variance)(gaussian, observation, here, jnp.float32(sigma))
        assert float(found) == pytest.approx(left, rel=1e-4)


def test_each_row_may_have_a_correlation_of_its_own(observation):
    correlation = np.random.default_rng(6).uniform(-0.9, 0.9, observation.size)
    noise = gains.noise_covariance(observation, correlation)
    for found, (u, v), one in zip(noise, np.asarray(observation.sigma, float), correlation, strict=True):
        np.testing.assert_allclose(found, [[u**2, one * u * v], [one * u * v, v**2]], rtol=1e-5)
    with pytest.raises(InputError, match=rf"one number or one a row \({observation.size}\), got \(3,\)"):
        gains.noise_covariance(observation, correlation[:3])


@pytest.mark.parametrize("kind", ["observation", "spaced"])
def test_the_analysis_by_blocks_is_that_of_dense_algebra(gaussian, kind, request):
    observation = request.getfixturevalue(kind)
    found = linear.analysis(gaussian, observation, 0.6)
    assert isinstance(found, PrincipalAnalysis)
    covariance, a, noise = dense_of(gaussian, observation, 0.6)
    gain = np.linalg.solve(a @ covariance @ a.T + noise, a @ covariance).T
    mean = np.asarray(gaussian.mean, float).reshape(-1)[SEA]
    values = np.asarray(observation.values, float)[np.asarray(observation.valid)].reshape(-1)
    exact = mean + gain @ (values - a @ mean)
    close(np.asarray(found.mean(observation.values)).reshape(-1)[SEA], exact, 1e-5)
    close(np.asarray(found.variance).reshape(-1)[SEA], np.diag(covariance - gain @ a @ covariance), 1e-5)
    assert not np.asarray(found.variance)[~OCEAN].any()
    other = linear.estimate(gaussian, observation, np.stack([observation.values] * 2))
    for one in other if kind == "observation" else ():
        # Of errors without a correlation.
        plain = linear.analysis(gaussian, observation).mean(observation.values)
        close(one, np.asarray(plain), 1e-5)


@pytest.fixture(scope="module")
def track(gaussian):
    """Many points of a few squares, along a straight line and all over one, twice in one place, at the coast, alone."""
    rng = np.random.default_rng(9)
    along = np.linspace(0, 1, 30)
    at = [np.stack([5 - 2.2 * along, 1 + 3.4 * along], 1), rng.uniform([3, 7], [4, 8], (25, 2)), [[5.3, 9.6]] * 7]
    at += [rng.uniform([1.6, 7.1], [2.4, 7.9], (9, 2)), [[6.5, 2.5], [6.2, 0.7]]]
    lat, lon = np.concatenate(at).T
    sigma = rng.uniform(0.05, 0.5, lat.size)[:, None] * [1.0, 1.7]
    points = observe.from_points(lat, lon, np.zeros((lat.size, 2)), sigma, *map(np.arange, SHAPE), OCEAN)
    values = points.apply(jnp.asarray(field_of(gaussian, 3))) + points.sigma * rng.normal(size=points.values.shape)
    return points.replace(values=jnp.where(points.valid[:, None], values, 0).astype(jnp.float32))


def test_merged_rows_say_the_same(gaussian, track):
    few = observe.merged(track)
    assert int(few.valid.sum()) < 0.6 * int(track.valid.sum())
    _, squares = np.unique(np.asarray(few.cells)[np.asarray(few.valid)], axis=0, return_counts=True)
    assert squares.max() <= 4
    covariance, a, noise = dense_of(gaussian, track, 0.4)
    gain = np.linalg.solve(a @ covariance @ a.T + noise, a @ covariance).T
    mean = np.asarray(gaussian.mean, float).reshape(-1)[SEA]
    exact = mean + gain @ (np.asarray(track.values, float)[np.asarray(track.valid)].reshape(-1) - a @ mean)
    found = linear.analysis(gaussian, few, 0.4)
    close(np.asarray(found.mean(few.values)).reshape(-1)[SEA], exact, 1e-5)
    close(np.asarray(found.variance).reshape(-1)[SEA], np.diag(covariance - gain @ a @ covariance), 1e-5)


def test_a_network_is_given_the_same_by_merged_rows(gaussian, track):
    """Estimate, its error and the share of each cell that is seen, at a level."""
    x, sigma = jnp.asarray(field_of(gaussian, 4)), 1.3
    made = []
    for seen in (track, observe.merged(track)):
        gain = one_level(gains.kalman_gains(gaussian, seen, np.array([sigma])), 0)
        evidence = guide.Evidence(gaussian.ocean, seen, gains.noise_covariance(seen), gaussian, gain)
        error = gains.remaining_variance(gaussian, seen, gain, jnp.float32(sigma))
        estimate = guide.kalman(lambda x: gaussian(x, sigma), x, sigma, 0.0, evidence)
        made.append((estimate, error, share_observed(evidence)))
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-5), *made)
    assert made[0][2].max() == 1
    assert 0 < np.asarray(made[0][2])[6, 2, 0] < 1


def test_rows_that_cannot_be_merged_stay(gaussian, track):
    few = track.rows(jnp.arange(track.size) < 4)
    same = observe.merged(few)
    for name in ("cells", "weights", "values", "sigma"):
        np.testing.assert_array_equal(getattr(same, name)[:4], getattr(few, name)[:4])
    assert same.size == 16
    ratio = jnp.asarray(np.random.default_rng(0).uniform(0.5, 2, track.sigma.shape), jnp.float32)
    apart = observe.merged(track.replace(sigma=track.sigma * ratio))
    assert apart.valid.sum() == track.valid.sum()
    # Whole cells are rows of their own.
    cells = observe.from_cells(OCEAN, field_of(gaussian, 1), 0.1, OCEAN)
    assert observe.merged(cells).valid.sum() == OCEAN.sum()


@pytest.mark.parametrize("error", [1e-2, 1e-4])
def test_precise_observations_keep_their_precision(gaussian, error):
    """In float32 what S^-1 magnifies must not show: observed cells end within a few hundredths of their errors."""
    truth = field_of(gaussian, 6)
    seen = observe.cells(OCEAN, 0.8, np.random.default_rng(7))
    observation = observe.from_cells(seen, truth, error, OCEAN)
    found = np.asarray(linear.analysis(gaussian, observation).mean(observation.values))
    covariance, a, noise = dense_of(gaussian, observation)
    mean = np.asarray(gaussian.mean, float).reshape(-1)[SEA]
    exact = mean + covariance @ a.T @ np.linalg.solve(a @ covariance @ a.T + noise, a @ (truth.reshape(-1)[SEA] - mean))
    np.testing.assert_allclose(found.reshape(-1)[SEA], exact, atol=3e-6)
    assert np.abs(found - truth)[seen].max() < 5 * error


def test_only_rows_that_see_cells_of_their_own_have_blocks(gaussian, observation, spaced):
    def by_blocks(one):
        return gains.rows_of(gaussian, one).by_blocks

    assert by_blocks(observation)
    assert by_blocks(spaced)
    shared = observe.from_points(
        np.arange(4, 7.5, 0.5), np.arange(1, 4.5, 0.5), np.zeros((7, 2)), 0.1, *map(np.arange, SHAPE), OCEAN
    )
    assert not by_blocks(shared)
    # A corner that counts for nothing is not seen.
    land = observe.from_weights(
        np.stack([np.flatnonzero(OCEAN)[:16], np.full(16, np.flatnonzero(~OCEAN)[0])], 1),
        np.full((16, 2), 0.5), np.zeros((16, 2)), 0.1,
    )  # fmt: skip
    assert by_blocks(land)
    # Fewer values than directions have the smaller matrix of the two.
    few = observe.from_cells(observe.cells(OCEAN, 0.02, np.random.default_rng(0)), field_of(gaussian, 1), 0.1, OCEAN, 2)
    assert not by_blocks(few)
    assert isinstance(linear.analysis(gaussian, few), DenseAnalysis)


def test_a_cell_in_two_corners_of_a_row_counts_once(gaussian):
    """Rows of one cell, written in one corner or in two."""
    cells, level = np.flatnonzero(OCEAN)[:40:2, None], 0.5
    once, twice = (
        observe.from_weights(np.repeat(cells, share.size, 1), np.tile(share, (20, 1)), np.zeros((20, 2)), 0.1)
        for share in (np.ones(1), np.array([0.3, 0.7]))
    )
    found = []
    for rows in (once, twice):
        gain = one_level(gains.kalman_gains(gaussian, rows, np.array([level])), 0)
        assert gain.by_blocks
        left = jax.jit(gains.remaining_variance)(gaussian, rows, gain, jnp.float32(level))
        found.append((gain.inverse, gain.along, gain.log_det, left))
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5), *found)


def test_a_prior_without_directions_has_blocks_alone(observation):
    white = guide.white(jnp.asarray(OCEAN[..., None], jnp.float32))
    gain = one_level(gains.kalman_gains(white, observation, np.array([0.5])), 0)
    assert gain.along.shape == (0, observation.size, 2)
    misfit = jnp.where(observation.valid[:, None], 1.0, 0.0)
    left = 0.25 / 1.25
    expected = np.where(observation.valid[:, None], left / (left + np.square(observation.sigma)), 0)
    found = gains.increment(white, observation, gain, misfit, 0.5).reshape(-1, 2)[observation.cells[:, 0]]
    np.testing.assert_allclose(np.where(observation.valid[:, None], found, 0), expected, rtol=1e-5)


@pytest.mark.parametrize("correction", ["kalman", "cov_pigdm", "pigdm", "regimes", "given"])
def test_samples_are_the_same_either_way(gaussian, observation, correction, monkeypatch):
    """Whole samplers by blocks and by S^-1: the same members but for rounding, alone and with other frames."""

    class Given(PrincipalGaussian):
        def given(self, x, sigma, evidence):
            return guide.kalman(lambda x: self(x, sigma), x, sigma, sigma, evidence)

    denoiser = Given(**vars(gaussian))
    jax.tree_util.register_dataclass(Given, list(vars(gaussian)), [])
    shifted = gaussian.replace(mean=gaussian.mean + 0.3 * gaussian.ocean)
    mixture = Regimes(jnp.array([0.6, 0.4]), jax.tree.map(lambda *leaves: jnp.stack(leaves), gaussian, shifted))
    hyper = Posterior.create(10.0, 0.05, 4, correction=correction)
    second = observation.of(jnp.asarray(field_of(gaussian, 8)))

    def sampled(seen):
        prior = mixture if correction == "regimes" else gaussian
        evidence = [evidence_for(hyper, gaussian.ocean, one, prior) for one in seen]
        analyses = [linear.analysis(gaussian, one) for one in seen]
        frames = [4, 9][-len(seen) :]
        made = posterior_ensemble(denoiser, evidence, gaussian, analyses, hyper, frames=frames, members=4)
        return made, evidence[0].gain

    both, gain = sampled([observation, second])
    assert gain.by_blocks
    alone, _ = sampled([second])
    np.testing.assert_allclose(both[1], alone[0], atol=2e-5)
    monkeypatch.setattr(gains, "rows_of", lambda _, one: gains.Rows(one.size, False))
    # Kept gains are of the other kind.
    monkeypatch.setattr(posterior._latest_gains, "_kept", {})
    whole, gain = sampled([observation, second])
    assert not gain.by_blocks
    np.testing.assert_allclose(both, whole, atol=2e-4)


def test_frames_of_both_kinds_are_not_sampled_together(gaussian, spaced):
    """As many rows, of points with corners in common and without."""
    near = spaced.replace(cells=jnp.broadcast_to(spaced.cells[:1], spaced.cells.shape))
    rows = [gains.rows_of(gaussian, one) for one in (spaced, near, spaced)]
    assert rows[0].size == rows[1].size
    assert rows[0] != rows[1]
    assert frame_batches(rows, 4, 64, gaussian, 3, 1) == [[0, 2], [1]]
    hyper = Posterior.create(10.0, 0.05, 3)
    evidence = [evidence_for(hyper, gaussian.ocean, one, gaussian) for one in (spaced, near)]
    with pytest.raises(InputError, match="gains of one kind"):
        stack_evidence(evidence)
    analyses = [linear.analysis(gaussian, one) for one in (spaced, near)]
    x = posterior_ensemble(gaussian, evidence, gaussian, analyses, hyper, frames=[1, 2], members=2)
    np.testing.assert_allclose(
        x[1:], posterior_ensemble(gaussian, evidence[1:], gaussian, analyses[1:], hyper, frames=[2], members=2),
        atol=2e-5,
    )  # fmt: skip


def test_analyses_that_do_not_go_together_are_refused(gaussian, observation, spaced):
    near = spaced.replace(cells=jnp.broadcast_to(spaced.cells[:1], spaced.cells.shape))
    analyses = [linear.analysis(gaussian, one) for one in (spaced, near)]
    with pytest.raises(InputError, match="analyses of one kind"):
        stack_analyses(analyses)
    other = linear.analysis(gaussian.replace(rest=2 * gaussian.rest), observation)
    with pytest.raises(InputError, match="analyses of the same prior"):
        stack_analyses([linear.analysis(gaussian, observation), other])
    few = observe.merged(spaced)
    evidence = [guide.Evidence(gaussian.ocean, one, None, gaussian) for one in (spaced, few)]
    assert spaced.size == few.size
    with pytest.raises(InputError, match="merged observations"):
        stack_evidence(evidence)


def test_own_bytes_by_blocks_are_those_of_the_gains(gaussian, observation):
    hyper = Posterior.create(10.0, 0.05, 5)
    evidence, analysis = (
        evidence_for(hyper, gaussian.ocean, observation, gaussian),
        linear.analysis(gaussian, observation),
    )
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((evidence.gain, analysis.evidence.gain)))
    assert own_bytes(gains.rows_of(gaussian, observation), gaussian, 5) == held


def test_memory_grows_with_the_rows_and_not_with_their_square(gaussian, monkeypatch):
    """What is too much for S^-1 fits by blocks, and what does not is refused."""
    large = jax.tree.map(lambda leaf: jnp.tile(leaf, (*(1,) * (leaf.ndim - 3), 30, 30, 1)), gaussian.ocean)
    direction = jnp.tile(gaussian.direction, (1, 30, 30, 1)) / 30
    prior = PrincipalGaussian(
        jnp.tile(gaussian.mean, (30, 30, 1)), direction, 900 * gaussian.variance, gaussian.rest, large
    )
    ocean = np.asarray(large)[..., 0] > 0
    truth = np.tile(field_of(gaussian, 1), (30, 30, 1))
    observation = observe.from_cells(observe.cells(ocean, 0.6, np.random.default_rng(1)), truth, 0.05, ocean)
    assert observation.size > 40_000
    monkeypatch.setattr(memory, "available", lambda: 2**30)
    found = linear.analysis(prior, observation)
    left = np.asarray(found.mean(observation.values))[ocean] - truth[ocean]
    assert np.mean(left**2) == pytest.approx(np.mean(np.asarray(found.variance)[ocean]), rel=0.2)
    assert np.mean(left**2) < 0.1 * np.mean(truth[ocean] ** 2)
    monkeypatch.setattr(memory, "available", lambda: 2**25)
    with pytest.raises(InputError, match=r"observed positions at 16 noise levels need .* fit: thin"):
        gains.kalman_gains(prior, observation, np.full(16, 1.0))
    monkeypatch.setattr(memory, "available", lambda: 2**24)
    with pytest.raises(InputError, match="does not fit into the memory"):
        linear.analysis(prior, observation)
