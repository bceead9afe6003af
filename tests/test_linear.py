"""The linear prior against eigenvectors and dense algebra in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jax_repaint import gains, guide, memory, observe
from jax_repaint.errors import InputError
from jax_repaint.prior import linear

SHAPE = (8, 12)
OCEAN = ~((np.indices(SHAPE)[0] < 3) & (np.indices(SHAPE)[1] > 8))
SEA = np.flatnonzero(np.repeat(OCEAN.reshape(-1), 2))
ERROR = 0.02


def truth(rank, noise, seed=0):
    """Factor (values, rank) of smooth directions of falling variance, noise variance and mean, on the ocean."""
    rng = np.random.default_rng(seed)
    y, x = np.indices(SHAPE)
    phase = rng.normal(size=(rank, 2)) * 0.5
    waves = np.cos(phase[:, :1, None] * y + phase[:, 1:, None] * x + rng.uniform(0, 6, (rank, 1, 1)))
    fields = (waves[..., None] * rng.normal(size=(rank, 1, 1, 2))).reshape(rank, -1)[:, SEA]
    return (fields / np.linspace(1, 4, rank)[:, None]).T, noise, 0.3 * rng.normal(size=SEA.size)


def on_grid(values):
    fields = np.zeros((*values.shape[:-1], 2 * OCEAN.size), np.float32)
    fields[..., SEA] = values
    return fields.reshape(*values.shape[:-1], *SHAPE, 2)


def on_sea(fields):
    fields = np.asarray(fields, float)
    return fields.reshape(*fields.shape[:-3], -1)[..., SEA]


def draw(true, count, seed):
    factor, noise, mean = true
    rng = np.random.default_rng(seed)
    rough = np.sqrt(noise) * rng.normal(size=(count, SEA.size))
    return on_grid(mean + rng.normal(size=(count, factor.shape[1])) @ factor.T + rough)


def covariance_of(gaussian):
    """Sigma on the ocean, float64."""
    e, rest = on_sea(gaussian.direction), float(gaussian.rest)
    return (e.T * (np.asarray(gaussian.variance, float) - rest)) @ e + rest * np.eye(SEA.size)


def total(gaussian):
    return float(gaussian.variance.sum()) + float(gaussian.rest) * (SEA.size - gaussian.variance.size)


@pytest.fixture(scope="module")
def fields():
    return draw(truth(10, 0.01), 300, 1)


@pytest.fixture(scope="module")
def gaussian(fields):
    return linear.fit(fields, OCEAN, 12)


@pytest.fixture(scope="module")
def observation():
    """Eight cells, five points between cells of which one is at the coast, and padded rows; values of a new field."""
    rng = np.random.default_rng(2)
    field = draw(truth(10, 0.01), 1, 3)[0]
    whole = observe.from_cells(observe.cells(OCEAN, 0.1, rng), field, ERROR, OCEAN, size=10)
    lat, lon = np.array([4.3, 5.8, 6.5, 2.1, 2.7]), np.array([1.6, 3.2, 10.1, 6.4, 8.9])
    points = observe.from_points(lat, lon, np.zeros((5, 2)), 3 * ERROR, *map(np.arange, SHAPE), OCEAN, size=7)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), whole, points)
    return both.replace(values=jnp.where(both.valid[:, None], both.apply(jnp.asarray(field)) + 0.01, 0.0))


@pytest.fixture(scope="module")
def dense(gaussian, observation):
    """Posterior mean, covariance and gain on the ocean in float64; valid rows."""
    valid = np.asarray(observation.valid)
    operator = np.zeros((observation.size, OCEAN.size))
    np.add.at(operator, (np.arange(observation.size)[:, None], np.asarray(observation.cells)), observation.weights)
    operator = np.kron(operator[valid], np.eye(2))[:, SEA]
    covariance = covariance_of(gaussian)
    errors = np.diag(np.asarray(observation.sigma, float)[valid].reshape(-1) ** 2)
    gain = np.linalg.solve(operator @ covariance @ operator.T + errors, operator @ covariance).T
    mean = on_sea(gaussian.mean)
    misfit = np.asarray(observation.values, float)[valid].reshape(-1) - operator @ mean
    return mean + gain @ misfit, covariance - gain @ operator @ covariance, gain, valid


@pytest.fixture(scope="module")
def found(gaussian, observation):
    return linear.analysis(gaussian, observation)


def test_fit_matches_eigenvectors(fields, gaussian):
    values = on_sea(fields)
    eigenvalue, vector = np.linalg.eigh(np.cov(values.T, bias=True))
    eigenvalue, vector = eigenvalue[::-1], vector[:, ::-1]
    np.testing.assert_allclose(on_sea(gaussian.mean), values.mean(0), atol=1e-6)
    np.testing.assert_allclose(gaussian.variance[:10], eigenvalue[:10], rtol=1e-4)
    np.testing.assert_allclose(gaussian.rest, eigenvalue[12:].mean(), rtol=1e-3)
    e = on_sea(gaussian.direction)
    np.testing.assert_allclose(e @ e.T, np.eye(12), atol=1e-5)
    # The last two directions lie in the noise, where eigenvalues are too close to tell apart.
    np.testing.assert_allclose(np.linalg.svd(e[:10] @ vector[:, :10])[1], 1, atol=1e-5)
    assert not np.asarray(gaussian.direction)[:, ~OCEAN].any()
    np.testing.assert_array_equal(gaussian.ocean[..., 0] > 0, OCEAN)


def test_fit_with_fewer_frames_than_directions_is_invertible(fields):
    few = linear.fit(fields[:4], OCEAN, 12)
    assert few.variance.shape == (3,)
    assert float(few.rest) > 0
    np.testing.assert_allclose(np.trace(covariance_of(few)), on_sea(fields[:4]).var(0).sum(), rtol=1e-4)
    with pytest.raises(InputError, match="at least two frames"):
        linear.fit(fields[:1], OCEAN, 3)


def test_fit_of_fields_with_fewer_degrees_of_freedom_is_invertible(fields):
    """Directions that they leave empty have no less variance than the rest."""
    flat = np.random.default_rng(5).normal(size=(30, 2)).astype(np.float32) @ fields[:2].reshape(2, -1)
    few = linear.fit(flat.reshape(30, *SHAPE, 2), OCEAN, 6)
    variances = np.linalg.eigvalsh(covariance_of(few))
    np.testing.assert_allclose(variances[:-2], float(few.rest), rtol=1e-2)
    np.testing.assert_allclose(variances[-2:].sum(), on_sea(flat.reshape(30, *SHAPE, 2)).var(0).sum(), rtol=1e-3)


@pytest.mark.parametrize("rank", [0, 1, 5, 12, 50])
def test_truncate_keeps_the_total_variance(gaussian, rank):
    short = linear.truncate(gaussian, rank)
    assert short.variance.shape == short.direction.shape[:1] == (min(rank, 12),)
    np.testing.assert_allclose(total(short), total(gaussian), rtol=1e-5)


def test_truncate_scales_the_rest_up_to_the_last_direction(gaussian):
    one = linear.truncate(gaussian, 5)
    np.testing.assert_allclose(linear.truncate(gaussian, 5, 0.3).rest, 0.3 * one.rest, rtol=1e-6)
    np.testing.assert_allclose(linear.truncate(gaussian, 5, 1e6).rest, gaussian.variance[4], rtol=1e-6)


def test_analysis_matches_dense_algebra(found, observation, dense):
    mean, covariance, gain, valid = dense
    np.testing.assert_allclose(on_sea(found.mean(observation.values)), mean, atol=2e-5)
    np.testing.assert_allclose(on_sea(found.variance), np.diag(covariance), atol=5e-6)
    rows = np.moveaxis(np.asarray(found.gain, float).reshape(-1, observation.size, 2)[SEA], 0, -1)
    np.testing.assert_allclose(rows[valid].reshape(-1, SEA.size).T, gain, atol=2e-5)
    assert not rows[~valid].any()
    for field in (found.gain, found.variance, found.mean(observation.values)):
        assert not np.asarray(field)[~OCEAN].any()


def test_correlated_errors_weigh_as_in_dense_algebra(gaussian, observation):
    correlated = linear.analysis(gaussian, observation, 0.7)
    valid = np.asarray(observation.valid)
    unit = jnp.eye(2 * OCEAN.size).reshape(-1, *SHAPE, 2)
    a = np.asarray(jax.vmap(observation.apply)(unit), float)[SEA][:, valid].reshape(SEA.size, -1).T
    noise = np.kron(np.diag(np.asarray(observation.sigma, float)[valid][:, 0] ** 2), [[1, 0.7], [0.7, 1]])
    c = covariance_of(gaussian)
    gain = np.linalg.solve(a @ c @ a.T + noise, a @ c).T
    misfit = (np.asarray(observation.values, float) - np.asarray(observation.apply(gaussian.mean), float))[valid]
    mean = on_sea(gaussian.mean) + gain @ misfit.reshape(-1)
    np.testing.assert_allclose(on_sea(correlated.mean(observation.values)), mean, atol=2e-5)
    np.testing.assert_allclose(on_sea(correlated.variance), np.diag(c - gain @ a @ c), atol=5e-6)


def test_variance_of_precise_observations_is_their_error(gaussian, found, observation):
    observed = np.asarray(observation.on_grid(SHAPE)[0])
    left = np.asarray(found.variance)
    cells = np.asarray(observation.cells)[:8, 0]
    at_cells = left.reshape(-1, 2)[cells]
    assert (at_cells <= ERROR**2 * 1.001).all()
    assert at_cells.mean() > 0.5 * ERROR**2
    prior = np.diag(covariance_of(gaussian))
    assert (on_sea(left) <= prior * 1.0001).all()
    assert left[OCEAN & ~observed].min() > ERROR**2


@pytest.mark.parametrize("error", [5e-4, 0.02])
def test_variance_beside_precise_points_is_not_lost_in_a_difference(gaussian, error):
    """Thirty points in a few squares of cells, against float64."""
    rng = np.random.default_rng(4)
    lat, lon = rng.uniform(4, 6.9, 30), rng.uniform(2, 4.9, 30)
    points = observe.from_points(lat, lon, np.zeros((30, 2)), error, *map(np.arange, SHAPE), OCEAN)
    variance = linear.analysis(gaussian, points).variance
    valid = np.asarray(points.valid)
    unit = jnp.eye(2 * OCEAN.size).reshape(-1, *SHAPE, 2)
    a = np.asarray(jax.vmap(points.apply)(unit), float)[SEA][:, valid].reshape(SEA.size, -1).T
    c = covariance_of(gaussian)
    left = np.diag(c - c @ a.T @ np.linalg.solve(a @ c @ a.T + error**2 * np.eye(len(a)), a @ c))
    assert np.sqrt(left.min()) < 5 * error
    np.testing.assert_allclose(np.sqrt(on_sea(variance)), np.sqrt(left), rtol=0.005)


def test_estimate_is_the_mean_of_the_analysis(gaussian, found, observation):
    values = np.random.default_rng(0).normal(size=(5, observation.size, 2)).astype(np.float32)
    expected = jax.vmap(found.mean)(jnp.asarray(values))
    np.testing.assert_allclose(linear.estimate(gaussian, observation, values), expected, atol=5e-5)


@pytest.mark.parametrize("count", [4, 16])
def test_estimate_leaves_land_out_of_a_point_beside_it(gaussian, count):
    """Rows of a cell of the ocean and one of land; by S^-1, and by blocks as they have more values than directions."""
    wet, dry = np.flatnonzero(OCEAN)[:count], np.flatnonzero(~OCEAN)[:1]
    values = np.random.default_rng(2).normal(size=(count, 2))
    cells, weights = np.stack([wet, np.repeat(dry, count)], 1), np.full((count, 2), 0.5)
    rows = observe.from_weights(cells, weights, values, ERROR, count)
    assert gains.rows_of(gaussian, rows).by_blocks == (count == 16)
    a, c = np.zeros((2 * count, SEA.size)), covariance_of(gaussian)
    a[np.arange(len(a)), np.searchsorted(SEA, (2 * wet[:, None] + [0, 1]).ravel())] = 0.5
    mean = on_sea(gaussian.mean)
    gain = np.linalg.solve(a @ c @ a.T + ERROR**2 * np.eye(len(a)), a @ c).T
    found = linear.estimate(gaussian, rows, np.asarray(rows.values)[None])[0]
    np.testing.assert_allclose(on_sea(found), mean + gain @ (values.reshape(-1) - a @ mean), atol=5e-5)
    np.testing.assert_array_equal(found[~OCEAN], np.asarray(gaussian.mean)[~OCEAN])


def test_samples_have_the_posterior_mean_and_covariance(gaussian, found, observation, dense):
    @jax.jit
    @jax.vmap
    def sample(key):
        prior, noise = jax.random.split(key)
        return found.sample(noise, guide.prior_draw(gaussian, prior), observation.values)

    count = 4000
    samples = on_sea(sample(jax.random.split(jax.random.key(0), count)))
    mean, covariance = dense[:2]
    scale = np.sqrt(np.diag(covariance))
    assert np.abs((samples.mean(0) - mean) / scale).max() < 5 / np.sqrt(count)
    correlation = np.cov(samples.T) / scale[:, None] / scale
    error = correlation - covariance / scale[:, None] / scale
    assert np.abs(error).max() < 7 * np.sqrt(2 / count)
    assert np.sqrt(np.mean(error**2)) < 2 / np.sqrt(count)


def test_select_finds_the_true_rank_from_few_frames():
    true = truth(4, 0.05, seed=5)
    gaussian = linear.fit(draw(true, 24, 6), OCEAN, 20)
    patterns = [
        observe.from_cells(observe.cells(OCEAN, 0.2, np.random.default_rng(i)), np.zeros((*SHAPE, 2)), ERROR, OCEAN)
        for i in range(3)
    ]
    validation = draw(true, 60, 7)
    chosen, choice = linear.select(gaussian, validation, patterns, ranks=(1, 2, 4, 8, 20), rests=(0.3, 1.0, 3.0))
    assert choice.rank == 4
    assert chosen.variance.shape == (4,)

    def error(prior):
        """Of unseen frames, relative to climatology."""
        frames = draw(true, 200, 8)
        errors = []
        for pattern in patterns:
            values = np.stack([np.asarray(pattern.of(jnp.asarray(x)).values) for x in frames[:40]])
            errors.append(np.mean((on_sea(linear.estimate(prior, pattern, values)) - on_sea(frames[:40])) ** 2))
        return np.mean(errors) / np.mean((on_sea(frames[:40]) - on_sea(gaussian.mean)) ** 2)

    np.testing.assert_allclose(error(chosen), choice.error, rtol=0.2)
    assert error(chosen) < error(gaussian)


def test_a_blend_is_that_of_the_two_covariances(fields):
    root = np.random.default_rng(4).normal(size=(SEA.size, SEA.size)).astype(np.float32) / 8
    blend = linear.fit(fields, OCEAN, 150, share=0.3, kernel_root=root)
    anomaly = on_sea(fields) - on_sea(fields).mean(0)
    expected = 0.3 * anomaly.T @ anomaly / len(anomaly) + 0.7 * root.astype(float) @ root.T
    values = np.linalg.eigvalsh(expected)[::-1]
    rank = blend.variance.size
    assert rank == min(150, SEA.size - 1)
    np.testing.assert_allclose(blend.variance[:40], values[:40], rtol=1e-4)
    np.testing.assert_allclose(total(blend), values.sum(), rtol=1e-5)
    e = on_sea(blend.direction)[:20]
    np.testing.assert_allclose(e @ expected @ e.T, np.diag(values[:20]), atol=1e-3 * values[0])
    for wrong in ({"share": 0.5}, {"share": 1.5, "kernel_root": root}):
        with pytest.raises(InputError, match="share of the training covariance"):
            linear.fit(fields, OCEAN, 5, **wrong)


def test_a_kernel_helps_where_frames_are_few():
    """Frames of a smooth Gaussian process: its kernel is the covariance that eight of them cannot tell."""
    y, x = np.indices(SHAPE).reshape(2, -1)[:, OCEAN.reshape(-1)]
    kernel = np.exp(-((y[:, None] - y) ** 2 + (x[:, None] - x) ** 2) / 12.0)
    root = np.kron(np.linalg.cholesky(kernel + 1e-6 * np.eye(len(y))), np.eye(2)).astype(np.float32)
    frames = on_grid(np.random.default_rng(5).normal(size=(60, SEA.size)) @ root.T)
    patterns = [
        observe.from_cells(observe.cells(OCEAN, 0.2, np.random.default_rng(i)), np.zeros((*SHAPE, 2)), ERROR, OCEAN)
        for i in range(3)
    ]
    errors = {}
    for share in (1.0, 0.1):
        prior = linear.fit(frames[:8], OCEAN, 64, share=share, kernel_root=root)
        errors[share] = linear.select(prior, frames[8:], patterns)[1].error
    assert errors[0.1] < 0.6 * errors[1.0]


def test_select_finds_the_errors_of_single_estimates(gaussian, fields):
    """Its estimates share one product of all truncations; `estimate` solves for each of them alone."""
    few = observe.from_cells(observe.cells(OCEAN, 0.1, np.random.default_rng(1)), fields[0], ERROR, OCEAN)
    many = observe.from_cells(observe.cells(OCEAN, 0.8, np.random.default_rng(2)), fields[0], ERROR, OCEAN)
    target = on_sea(fields[:9])
    apart = observe.from_points([4.5, 6.5], [4.5, 8.5], np.zeros((2, 2)), ERROR, *map(np.arange, SHAPE), OCEAN)
    for pattern in (few, many, apart):
        values = np.stack([np.asarray(pattern.of(jnp.asarray(x)).values) for x in fields[:9]])
        for rank, rest in ((3, 1.0), (12, 0.3)):
            guess = on_sea(linear.estimate(linear.truncate(gaussian, rank, rest), pattern, values))
            expected = np.sum((guess - target) ** 2) / np.sum((target - on_sea(gaussian.mean)) ** 2)
            choice = linear.select(gaussian, fields[:9], [pattern], ranks=(rank,), rests=(rest,))[1]
            assert choice.error == pytest.approx(expected, rel=1e-4)
    points = observe.from_points([4.5, 4.6], [4.5, 4.4], np.zeros((2, 2)), ERROR, *map(np.arange, SHAPE), OCEAN)
    for wrong in (
        points,
        many.replace(sigma=many.sigma.at[0].set(0.5)),
        many.replace(cells=many.cells.at[1].set(many.cells[0])),
    ):
        with pytest.raises(InputError, match="see cells of their own, with the same error"):
            linear.select(gaussian, fields[:9], [wrong])


def test_select_takes_no_more_directions_than_it_must(gaussian, fields):
    pattern = observe.from_cells(observe.cells(OCEAN, 0.2, np.random.default_rng(4)), fields[0], ERROR, OCEAN)
    ranks, rests = (2, 4, 6, 8, 12), (0.3, 1.0, 3.0)
    alone = {
        (rank, rest): linear.select(gaussian, fields[:9], [pattern], ranks=(rank,), rests=(rest,))[1].error
        for rank in ranks
        for rest in rests
    }
    lowest, chosen = min(alone.values()), []
    for tolerance in (0.0, 0.1, 1.0, 9.0, 99.0):
        fewest = min(rank for (rank, _), error in alone.items() if error <= lowest * (1 + tolerance))
        error, rest = min((alone[fewest, rest], rest) for rest in rests)
        prior, choice = linear.select(gaussian, fields[:9], [pattern], ranks=ranks, rests=rests, tolerance=tolerance)
        assert (choice.rank, choice.rest, prior.variance.size) == (fewest, rest, fewest)
        assert choice.error == pytest.approx(error, rel=1e-5)
        chosen.append(fewest)
    assert len(set(chosen)) > 2


def test_select_counts_each_pattern_relative_to_climatology(gaussian, fields):
    pattern = observe.from_cells(OCEAN & (np.indices(SHAPE)[0] == 4), fields[0], ERROR, OCEAN)
    _, one = linear.select(gaussian, fields[:9], [pattern], ranks=(12,), rests=(1.0,))
    _, two = linear.select(gaussian, fields[:9], [pattern, pattern], ranks=(12, 99), rests=(1.0,))
    np.testing.assert_allclose(one.error, two.error, rtol=1e-6)
    values = fields[:9].reshape(9, -1, 2)[:, np.asarray(pattern.cells)[:, 0]] * np.asarray(pattern.valid)[:, None]
    guess = on_sea(linear.estimate(gaussian, pattern, values))
    target = on_sea(fields[:9])
    expected = np.mean((guess - target) ** 2) / np.mean((on_sea(gaussian.mean) - target) ** 2)
    np.testing.assert_allclose(one.error, expected, rtol=1e-5)


def test_an_analysis_that_does_not_fit_is_refused(monkeypatch):
    made = tiny.model("anchored")
    observed = np.zeros(made.ocean.shape, bool)
    observed[4, 6] = True
    observation = observe.from_cells(observed, np.zeros((*observed.shape, 2)), 0.1, made.ocean)
    observation = observe.pad_grid(observation, made.ocean.shape, made.padded)
    linear.analysis(made.gaussian, observation)
    monkeypatch.setattr(memory, "available", lambda: 10_000)
    with pytest.raises(InputError, match=r"does not fit into the memory: it needs .* take fewer frames"):
        linear.analysis(made.gaussian, observation)


@pytest.mark.parametrize("sigma", [1e-2, 1e-4, 1e-5])
def test_many_precise_rows_of_one_cell(gaussian, sigma):
    """Forty rows in one cell are one of an error sqrt(40) times smaller, however large the entries of S^-1."""
    observed = np.zeros(SHAPE, bool)
    observed[5, 4] = True
    rng = np.random.default_rng(0)
    values = 0.7 + sigma * rng.normal(size=(40, 2))
    once = observe.from_cells(observed, np.full((*SHAPE, 2), 0.7), sigma / np.sqrt(40), OCEAN)
    cells, weights = (np.repeat(np.asarray(leaf[:1]), 40, 0) for leaf in (once.cells, once.weights))
    many = observe.from_weights(cells, weights, values, np.full((40, 2), sigma))
    # Padded rows of both have no value.
    single = jnp.zeros_like(once.values).at[0].set(values.mean(0))
    expected = linear.analysis(gaussian, once).mean(single)
    np.testing.assert_allclose(linear.analysis(gaussian, many).mean(many.values), expected, atol=5e-5)
    np.testing.assert_allclose(
        linear.estimate(gaussian, many, np.asarray(many.values)[None])[0], np.asarray(expected), atol=5e-5
    )
