"""The Gaussian-process prior against reference outputs, dense NumPy algebra, autodiff and tinygp's own conditioning."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tinygp

from jax_repaint import observe
from jax_repaint.errors import InputError
from jax_repaint.prior import gp

SHAPE = (5, 7)
NUMBERS = {
    "rbf_legacy": (1.4, 0.2, 1e-4),
    "rbf": (2.0, 0.05, 1e-4),
    "matern32": (3.0, 0.04, 1e-3),
    "matern52": (3.0, 0.04, 1e-3),
    "divergence_free": (2.5, 0.05, 1e-4),
}


def kernel_of(name):
    return gp.Kernel.create(name, *NUMBERS[name])


def dense(kernel, p, q):
    """(2 n, 2 m) covariance, component fastest, by the formulas in NumPy float64."""
    l, v = float(kernel.lengthscale), float(kernel.variance)  # noqa: E741
    north, east = np.moveaxis(p[:, None] - q[None], -1, 0)
    d = np.hypot(north, east)
    one = {
        "rbf_legacy": lambda: v**2 * np.exp(-d / (2 * l**2)),
        "rbf": lambda: v * np.exp(-(d**2) / (2 * l**2)),
        "matern32": lambda: v * (1 + 3**0.5 * d / l) * np.exp(-(3**0.5) * d / l),
        "matern52": lambda: v * (1 + 5**0.5 * d / l + 5 * d**2 / (3 * l**2)) * np.exp(-(5**0.5) * d / l),
    }
    if kernel.name == "divergence_free":
        bell = v * np.exp(-(d**2) / (2 * l**2))
        block = [[1 - north**2 / l**2, north * east / l**2], [north * east / l**2, 1 - east**2 / l**2]]
        return np.einsum("ijnm,nm->nimj", np.array(block), bell).reshape(2 * len(p), 2 * len(q))
    return np.kron(one[kernel.name](), np.eye(2))


@pytest.fixture(scope="module")
def problem():
    """A small sea with land, uneven positions, bilinear points of unequal errors, two of them at one place."""
    rng = np.random.default_rng(0)
    ocean = np.ones(SHAPE, bool)
    ocean[2, 3:5] = ocean[0, 0] = False
    positions = gp.pixels(SHAPE) * [1.0, 0.8] + 0.1 * rng.random((*SHAPE, 2))
    # The third lies between two land cells and two ocean cells: land has no weight there.
    lat, lon = np.array([3.3, 1.7, 2.7, 4.0, 4.0, 0.2]), np.array([2.6, 0.4, 3.6, 6.0, 6.0, 5.1])
    sigma = np.array([0.01, 0.05, 0.02, 0.03, 0.03, 0.1])[:, None] * [1.0, 0.5]
    values = rng.normal(size=(6, 2)) * 0.2
    axes = np.arange(SHAPE[0]), np.arange(SHAPE[1])
    observation = observe.from_points(lat, lon, values, sigma, *axes, ocean)
    background = np.where(ocean[..., None], rng.normal(size=(*SHAPE, 2)), 0).astype(np.float32) * 0.1
    return ocean, positions, observation, background


def dense_analysis(kernel, problem):
    """Gain (2 D, 2 m), covariance (2 D, 2 D) and R of the valid rows; D are all cells, land included."""
    _, positions, observation, _ = problem
    count, points = int(observation.valid.sum()), positions.reshape(-1, 2)
    rows = np.zeros((count, len(points)))
    for row, cells, weights in zip(rows, np.asarray(observation.cells), np.asarray(observation.weights), strict=False):
        np.add.at(row, cells, weights)
    a = np.kron(rows, np.eye(2))
    k = dense(kernel, points, points)
    floor = max(float(kernel.noise), 1e-6)
    r = np.diag(np.maximum(np.asarray(observation.sigma, float)[:count].reshape(-1) ** 2, floor))
    gain = k @ a.T @ np.linalg.inv(a @ k @ a.T + r)
    return gain, k - gain @ a @ k, r


@pytest.mark.parametrize("case", ["rbf_legacy-pixels-3", "rbf-pixels-4"])
def test_analysis_of_reference_fields(shared, case):
    with np.load(shared / "golden" / "gp.npz") as file:
        golden = {key: np.moveaxis(file[f"{key}/{case}"], 0, -1) for key in ("field", "mean", "var")}
        ocean, known = ~file[f"land/{case}"], file[f"known/{case}"] & ~file[f"land/{case}"]
        meta = json.loads(str(file[f"meta/{case}"]))
    kernel = gp.Kernel.create(meta["kernel"], meta["lengthscale"], meta["variance"], meta["noise"])
    observation = observe.from_cells(known, golden["field"], 1e-4, ocean)
    zero = gp.background("zero", golden["field"][None], ocean)
    result = gp.analysis(kernel, observation, ocean, gp.pixels(ocean.shape), zero)
    # The reference sets observed cells to what was observed, without error; the analysis leaves them their noise.
    unseen, prior = ocean & ~known, float(kernel.block(jnp.zeros(2), jnp.zeros(2))[0, 0])
    expected, mean = golden["mean"][unseen], result.mean(observation.values)[unseen]
    np.testing.assert_allclose(mean, expected, atol=2e-6 * np.abs(expected).max(), rtol=0)
    np.testing.assert_allclose(result.variance[unseen], golden["var"][unseen], rtol=1e-6, atol=1e-6 * prior)


def test_seed_kernel_is_that_of_the_reference(shared):
    with np.load(shared / "golden" / "gp.npz") as file:
        meta = json.loads(str(file["meta/rbf_legacy-pixels-3"]))
    assert gp.seed_gp().to_json() == pytest.approx(
        {"name": meta["kernel"]} | {k: pytest.approx(meta[k], rel=1e-7) for k in ("lengthscale", "variance", "noise")}
    )


@pytest.mark.parametrize("name", gp.NAMES)
def test_analysis_equals_dense_algebra(problem, name):
    ocean, positions, observation, background = problem
    kernel = kernel_of(name)
    result = gp.analysis(kernel, observation, ocean, positions, background)
    gain, covariance, r = dense_analysis(kernel, problem)
    count, water = int(observation.valid.sum()), ocean[..., None]
    gain = gain.reshape(*SHAPE, 2, count, 2) * water[..., None, None]
    assert result.gain.shape == (*SHAPE, 2, observation.size, 2)
    assert result.gain.dtype == result.variance.dtype == np.float32
    np.testing.assert_allclose(result.gain[:, :, :, :count], gain, rtol=1e-6, atol=1e-6 * np.abs(gain).max())
    np.testing.assert_allclose(
        result.variance, np.diag(covariance).reshape(*SHAPE, 2) * water, rtol=1e-6, atol=1e-7 * covariance.max()
    )
    np.testing.assert_allclose(result.observation.sigma[:count].reshape(-1) ** 2, np.diag(r), rtol=1e-6)


@pytest.mark.parametrize("name", gp.NAMES)
def test_the_estimator_equals_dense_algebra(problem, name):
    ocean, positions, observation, background = problem
    kernel, count = kernel_of(name), int(observation.valid.sum())
    gain, _, _ = dense_analysis(kernel, problem)
    estimate = gp.estimator(kernel, observation, ocean, positions, background)
    seen = np.asarray(observation.apply(jnp.asarray(background)), float)[:count]
    for scale in (1.0, -3.0):
        values = scale * np.asarray(observation.values)
        # What stands in padded rows does not count.
        values[count:] = np.nan
        change = (gain @ (values[:count] - seen).reshape(-1)).reshape(*SHAPE, 2)
        exact = background + np.where(ocean[..., None], change, 0)
        found = estimate(values)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-6 * np.abs(exact).max())


@pytest.mark.parametrize("name", ["matern32", "divergence_free"])
def test_padded_rows_and_land_have_no_part(problem, name):
    ocean, positions, observation, background = problem
    analyse = functools.partial(gp.analysis, kernel_of(name), ocean=ocean, positions=positions, background=background)
    result = analyse(observation)
    count = int(observation.valid.sum())
    assert not np.any(result.gain[:, :, :, count:])
    assert not np.any(result.gain[~ocean])
    assert not np.any(result.variance[~ocean])
    # Rubbish in padded rows, then none of them.
    rubbish = observation.replace(
        weights=jnp.where(observation.valid[:, None], observation.weights, 1.0),
        sigma=jnp.where(observation.valid[:, None], observation.sigma, 1e-3),
    )
    tight = jax.tree.map(lambda leaf: leaf[:count], observation)
    for other in (analyse(rubbish), analyse(tight)):
        np.testing.assert_allclose(other.gain[:, :, :, :count], result.gain[:, :, :, :count], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(other.variance, result.variance, rtol=1e-5, atol=1e-8)
    assert not np.any(analyse(rubbish).gain[:, :, :, count:])
    nothing = analyse(observation.replace(valid=jnp.zeros_like(observation.valid)))
    assert not np.any(nothing.gain)
    np.testing.assert_allclose(nothing.variance[ocean], kernel_of(name).variance, rtol=1e-6)


def test_one_analysis_serves_every_frame(problem):
    ocean, positions, observation, background = problem
    result = gp.analysis(kernel_of("matern52"), observation, ocean, positions, background)
    values = jax.random.normal(jax.random.key(0), (3, observation.size, 2))
    means = jax.jit(jax.vmap(result.mean))(values)
    gain, _, _ = dense_analysis(kernel_of("matern52"), problem)
    count = int(observation.valid.sum())
    innovation = np.asarray(values - observation.apply(jnp.asarray(background))[None])[:, :count].reshape(3, -1)
    update = (innovation @ gain.T).reshape(3, *SHAPE, 2) * ocean[..., None]
    np.testing.assert_allclose(means, background[None] + update, atol=3e-6)


@pytest.mark.parametrize(
    ("name", "theirs"), [("matern32", tinygp.kernels.Matern32), ("matern52", tinygp.kernels.Matern52)]
)
def test_equals_conditioning_by_tinygp(problem, name, theirs):
    ocean, positions, _, _ = problem
    kernel, observed = kernel_of(name), np.zeros(SHAPE, bool)
    observed[[0, 1, 3, 4], [2, 5, 1, 4]] = True
    field = np.random.default_rng(1).normal(size=(*SHAPE, 2)) * 0.2
    observation = observe.from_cells(observed, field, 0.04, ocean)
    result = gp.analysis(kernel, observation, ocean, positions, np.zeros((*SHAPE, 2)))
    mean = result.mean(observation.values)

    @jax.jit
    def condition(values):
        covariance = float(kernel.variance) * theirs(float(kernel.lengthscale), tinygp.kernels.distance.L2Distance())
        process = tinygp.GaussianProcess(covariance, jnp.asarray(positions[observed]), diag=0.04**2)
        # `condition` adds `diag` to what it returns.
        posterior = process.condition(values, jnp.asarray(positions[ocean]), diag=0.0).gp
        return posterior.loc, posterior.variance

    with jax.enable_x64(True):
        for c in range(2):
            loc, variance = condition(field[observed][:, c])
            np.testing.assert_allclose(mean[ocean][:, c], loc, atol=1e-6)
            np.testing.assert_allclose(result.variance[ocean][:, c], variance, rtol=1e-6, atol=1e-9)


def test_noise_of_kernel_is_a_floor():
    kernel = gp.Kernel.create("rbf", 2.0, 0.05, noise=1e-3)
    np.testing.assert_allclose(kernel.error_variance(jnp.array([1e-3, 0.1])), [1e-3, 1e-2], rtol=1e-6)
    np.testing.assert_allclose(gp.seed_gp().error_variance(jnp.array([1e-5])), [1e-6], rtol=1e-6)


def stream_covariance(p, q, lengthscale, variance):
    return variance * lengthscale**2 * jnp.exp(-jnp.sum((p - q) ** 2) / (2 * lengthscale**2))


def test_divergence_free_kernel_is_that_of_a_stream_function():
    """<w w'> by differentiating <psi psi'> at both ends: u = -d psi/dy, v = d psi/dx."""
    kernel = kernel_of("divergence_free")

    @jax.jit
    @jax.vmap
    def both(p, q):
        mixed = jax.jacfwd(jax.grad(stream_covariance), argnums=1)(p, q, kernel.lengthscale, kernel.variance)
        turn = jnp.array([[-1.0, 0.0], [0.0, 1.0]])  # d/dy, d/dx of psi to u, v
        return kernel.block(p, q), turn @ mixed @ turn.T

    # Gradient at p in its rows, at q in its columns.
    p, q = jax.random.normal(jax.random.key(1), (2, 20, 2)) * 3
    q = q.at[0].set(p[0])
    ours, theirs = both(p, q)
    np.testing.assert_allclose(ours, theirs, atol=1e-6 * float(kernel.variance) * 10)
    assert np.abs(ours[1:, 0, 1]).max() > 0.1 * float(kernel.variance)


@pytest.mark.parametrize("name", ["divergence_free", "rbf"])
def test_conditioned_mean_fields_are_non_divergent(name):
    """The mean of any data is sum_j block(., q_j) a_j; only the divergence-free kernel has no divergence in it."""
    kernel = kernel_of(name)
    q, a = jax.random.normal(jax.random.key(2), (2, 12, 2)) * 3

    def mean(p):
        return jnp.einsum("jcd,jd->c", jax.vmap(kernel.block, (None, 0))(p, q), a)

    gradient = jax.jit(jax.vmap(jax.jacfwd(mean)))(jax.random.normal(jax.random.key(3), (30, 2)) * 2)
    divergence = gradient[:, 0, 1] + gradient[:, 1, 0]  # du/dx + dv/dy, positions being (y, x)
    size = np.abs(gradient).max()
    if name == "divergence_free":
        assert np.abs(divergence).max() < 2e-6 * size
    else:
        assert np.abs(divergence).max() > 0.1 * size


@pytest.mark.parametrize("name", ["matern52", "divergence_free"])
def test_posterior_samples_have_the_analytic_moments(problem, name):
    ocean, positions, observation, background = problem
    kernel, number = kernel_of(name), 6000
    result = gp.analysis(kernel, observation, ocean, positions, background)
    root = gp.prior_root(kernel, ocean, positions)

    @jax.jit
    @jax.vmap
    def sample(key):
        of_prior, of_noise = jax.random.split(key)
        draw = root.draw(of_prior, result.background)
        return draw, result.sample(of_noise, draw, observation.values)

    draws, samples = map(np.asarray, sample(jax.random.split(jax.random.key(4), number)))
    assert not np.any(draws[:, ~ocean])
    _, covariance, _ = dense_analysis(kernel, problem)
    points, water = positions.reshape(-1, 2), np.repeat(ocean.reshape(-1), 2)
    scale = np.array([2.0, 0.5])
    rows = root.rows(scale) * np.tile(scale, ocean.sum())[:, None]
    exact = dense(kernel, points, points)[np.ix_(water, water)]
    np.testing.assert_allclose(rows @ rows.T, exact, atol=1e-5 * exact.max())
    cases = [
        (draws, result.background, dense(kernel, points, points)),
        (samples, result.mean(observation.values), covariance),
    ]
    for fields, mean, expected in cases:
        rows, expected = fields.reshape(number, -1)[:, water], expected[np.ix_(water, water)]
        std = np.sqrt(np.diag(expected))
        error = np.abs(rows.mean(0) - np.asarray(mean).reshape(-1)[water]) / std
        assert error.max() < 4.5 / np.sqrt(number)
        deviation = (np.cov(rows, rowvar=False) - expected) / np.outer(std, std)
        # Standard error of a covariance is at most sqrt(2 / n) std std'.
        assert np.abs(deviation).max() < 4.5 * np.sqrt(2 / number)


def synthetic(kernel, shape, frames, noise, seed):
    """Draws of a kernel with white noise (frames, y, x, 2), from NumPy's factor of the dense covariance."""
    rng = np.random.default_rng(seed)
    points = gp.pixels(shape).reshape(-1, 2)
    k = dense(kernel, points, points) + noise * np.eye(2 * len(points))
    return (rng.normal(size=(frames, len(k))) @ np.linalg.cholesky(k).T).reshape(frames, *shape, 2)


@pytest.mark.parametrize("name", ["rbf_legacy", "matern52", "divergence_free"])
def test_fit_finds_the_numbers_of_a_draw(name):
    shape, noise = (12, 16), 4e-3
    lengthscale, variance, _ = NUMBERS[name]
    truth = gp.Kernel.create(name, lengthscale, variance, noise)
    velocity = synthetic(truth, shape, 60, noise, seed=5)
    velocity[:, 3, 4:7] = np.nan
    ocean, background = np.isfinite(velocity[0, ..., 0]), np.full((*shape, 2), 0.1)
    fitted, loss = gp.fit(name, velocity + 0.1, ocean, gp.pixels(shape), background, steps=80, points=96, seed=6)
    assert loss.shape == (80,)
    assert np.isfinite(loss).all()
    for number in ("lengthscale", "variance", "noise"):
        assert float(getattr(fitted, number)) == pytest.approx(float(getattr(truth, number)), rel=0.15), number


@pytest.mark.parametrize("name", ["matern52", "divergence_free"])
def test_fit_of_frames_with_gaps_finds_them_too(name):
    shape, noise = (12, 16), 4e-3
    truth = gp.Kernel.create(name, *NUMBERS[name][:2], noise)
    velocity = synthetic(truth, shape, 60, noise, seed=5)
    rng = np.random.default_rng(1)
    velocity[rng.random(velocity.shape[:3]) < 0.2] = np.nan
    velocity[::2, 2:7, 3:9] = np.nan
    background = np.zeros((*shape, 2))
    fitted, loss = gp.fit(
        name, velocity, np.ones(shape, bool), gp.pixels(shape), background, steps=80, points=64, seed=6
    )
    for number in ("lengthscale", "variance", "noise"):
        assert float(getattr(fitted, number)) == pytest.approx(float(getattr(truth, number)), rel=0.15), number
    # Minus log p of its own draws, a value.
    cells = [rng.permutation(gp.pixels(shape).reshape(-1, 2))[:64] for _ in range(20)]
    expected = [
        0.5 * (1 + np.linalg.slogdet(2 * np.pi * (dense(truth, p, p) + noise * np.eye(128)))[1] / 128) for p in cells
    ]
    assert loss[40:].mean() == pytest.approx(np.mean(expected), abs=0.05)


@pytest.mark.parametrize("name", ["rbf", "divergence_free"])
def test_log_probability_equals_dense_algebra(name):
    kernel, rng = kernel_of(name), np.random.default_rng(7)
    where, values = rng.random((9, 2)) * 5, rng.normal(size=(3, 9, 2)) * 0.2
    k = dense(kernel, where, where) + float(kernel.noise) * np.eye(18)
    rows = values.reshape(3, -1)
    expected = -0.5 * np.sum(rows * np.linalg.solve(k, rows.T).T) - 1.5 * np.linalg.slogdet(2 * np.pi * k)[1]
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: np.asarray(leaf, float), kernel)
        ours = float(jax.jit(gp.log_probability)(wide, where, values))
    assert ours == pytest.approx(expected, rel=1e-9)


def test_fit_repeats_and_follows_its_seed():
    velocity, ocean = np.random.default_rng(8).normal(size=(5, 4, 5, 2)), np.ones((4, 5), bool)
    fits = [
        gp.fit("rbf", velocity, ocean, gp.pixels((4, 5)), np.zeros((4, 5, 2)), steps=4, points=10, frames=3, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert fits[0][0].to_json() == fits[1][0].to_json()
    assert fits[0][0].to_json() != fits[2][0].to_json()


def test_the_first_step_of_a_fit_is_as_long_as_told():
    """That of Adam, whatever the gradient: each logarithm moves by the learning rate."""
    velocity, ocean = synthetic(kernel_of("rbf"), (4, 5), 6, 1e-3, seed=3), np.ones((4, 5), bool)
    made = []
    for rate in (0.05, 0.25):
        fitted, _ = gp.fit("rbf", velocity, ocean, gp.pixels((4, 5)), np.zeros((4, 5, 2)), steps=1, learning_rate=rate)
        made.append(np.log([fitted.lengthscale, fitted.variance, fitted.noise]))
    np.testing.assert_allclose(np.abs(made[1] - made[0]), 0.2, rtol=1e-3)


def test_backgrounds():
    ocean = np.array([[True, True, False], [True, True, True]])
    velocity = np.random.default_rng(9).normal(size=(4, 2, 3, 2))
    velocity[:, ~ocean] = np.nan
    velocity[1, 0, 0, 0] = np.nan
    velocity[:, 1, 2] = np.nan
    assert not gp.background("zero", velocity, ocean).any()
    constant = gp.background("constant", velocity, ocean)
    climatology = gp.background("climatology", velocity, ocean)
    for c in range(2):
        mean = np.nanmean(velocity[:, ocean][..., c])
        np.testing.assert_allclose(constant[ocean][:, c], mean, rtol=1e-6)
        np.testing.assert_allclose(climatology[0, 0, c], np.nanmean(velocity[:, 0, 0, c]), rtol=1e-5)
        np.testing.assert_allclose(climatology[1, 1, c], velocity[:, 1, 1, c].mean(), rtol=1e-5)
        np.testing.assert_allclose(climatology[1, 2, c], mean, rtol=1e-6)
    for field in (constant, climatology):
        assert field.dtype == np.float32
        assert not field[~ocean].any()


def test_json_round_trip_is_exact():
    kernel = gp.Kernel.create("matern32", 12345.678, 0.0321, 1.7e-5)
    text = json.dumps(kernel.to_json())
    again = gp.Kernel.from_json(json.loads(text))
    assert again.name == kernel.name
    jax.tree.map(np.testing.assert_array_equal, again, kernel)


def test_hyperparameters_are_leaves(problem):
    """Another number compiles nothing, and kernels of one name are vmapped."""
    ocean, positions, observation, background = problem
    gp.analysis(kernel_of("rbf"), observation, ocean, positions, background)
    before = gp._analysis._cache_size()
    gp.analysis(gp.Kernel.create("rbf", 3.3, 0.7, 1e-3), observation, ocean, positions, background)
    assert gp._analysis._cache_size() == before
    kernels = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(gp.Kernel.create("rbf", s, 1.0) for s in (1.0, 2.0)))
    at = jnp.array([0.0, 1.0])
    np.testing.assert_allclose(
        jax.vmap(lambda k: k.block(jnp.zeros(2), at)[0, 0])(kernels), np.exp([-1 / 2, -1 / 8]), rtol=1e-6
    )


OCEAN, POSITIONS, ZERO = np.ones((3, 4), bool), gp.pixels((3, 4)), np.zeros((3, 4, 2))
NOISY = np.random.default_rng(10).normal(size=(4, 3, 4, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gp.Kernel.create("cubic", 1.0, 1.0), "cubic.*not one of rbf_legacy"),
        (lambda: gp.Kernel.create("rbf", 0.0, 1.0), "lengthscale.*positive"),
        (lambda: gp.Kernel.create("rbf", 1.0, float("nan")), "variance.*finite"),
        (lambda: gp.Kernel.create("rbf", 1.0, 1.0, -1e-9), "noise.*zero or more"),
        (lambda: gp.Kernel.from_json({"name": "rbf", "lengthscale": 1.0}), "needs name, lengthscale"),
        (lambda: gp.Kernel.from_json({"name": "rbf", "lengthscale": "far", "variance": 1, "noise": 1}), "needs name"),
        (lambda: gp.Kernel.from_json({"name": "rbf", "lengthscale": -1, "variance": 1, "noise": 1}), "positive, got"),
        (lambda: gp.background("median", NOISY, OCEAN), "median.*not one of zero"),
        (lambda: gp.background("zero", NOISY[0], OCEAN), "velocity"),
        (lambda: gp.background("constant", NOISY * np.nan, OCEAN), "no training value"),
        (lambda: gp.prior_root(kernel_of("rbf"), OCEAN, POSITIONS[:2]), "positions"),
        (lambda: gp.prior_root(kernel_of("rbf"), ~OCEAN, POSITIONS), "no ocean cell"),
        (lambda: gp.prior_root(kernel_of("rbf"), OCEAN, POSITIONS * np.inf), "finite"),
        (lambda: gp.fit("rbf", NOISY, OCEAN, POSITIONS, ZERO, steps=0), "steps"),
        (lambda: gp.fit("rbf", NOISY, OCEAN, POSITIONS, ZERO[:2]), "background"),
        (lambda: gp.fit("cubic", NOISY, OCEAN, POSITIONS, ZERO), "cubic"),
        (lambda: gp.fit("rbf", np.where(POSITIONS[None] > 0, np.nan, NOISY), OCEAN, POSITIONS, ZERO), "gaps"),
        (lambda: gp.fit("rbf", NOISY * 0, OCEAN, POSITIONS, ZERO), "differ from their background"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(InputError, match=message), np.errstate(invalid="ignore"):
        call()


def test_observations_that_do_not_fit_the_grid_are_named():
    analyse = functools.partial(gp.analysis, kernel_of("rbf"), ocean=OCEAN, positions=POSITIONS)
    inside = observe.from_weights(np.array([[5], [7]]), np.ones((2, 1)), np.ones((2, 2)), 0.1)
    with pytest.raises(InputError, match="background"):
        analyse(inside, background=ZERO[:2])
    with pytest.raises(InputError, match="not on a grid of 12 cells"):
        analyse(observe.from_weights(np.array([[12]]), np.ones((1, 1)), np.ones((1, 2)), 0.1), background=ZERO)
    land = OCEAN.copy()
    land[1, 3] = False
    with pytest.raises(InputError, match="observation 1 is on land"):
        gp.analysis(kernel_of("rbf"), inside, land, POSITIONS, ZERO)
