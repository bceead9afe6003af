"""Corrections and posterior samplers against dense algebra, where prior and posterior are Gaussian and known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import sparse

from jax_repaint import gains, guide, memory, observe, transition
from jax_repaint.denoise import PrincipalGaussian
from jax_repaint.errors import InputError
from jax_repaint.posterior import Posterior, antithetic, evidence_for, linear_sample, posterior
from jax_repaint.prior.analysis import DenseAnalysis

SHAPE = (16, 24)
NOISE = 0.05


@pytest.fixture(scope="module")
def ocean():
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    return ~((y < 5) & (x > 17)) & ~((y - 11) ** 2 + (x - 6) ** 2 < 5)


@pytest.fixture(scope="module")
def gaussian(ocean):
    """30 leading directions of a smooth random covariance of mean variance 1; the first has a third of it."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    waves = rng.normal(size=(400, 2)) * 0.35
    phases = waves[:, :1, None] * y + waves[:, 1:, None] * x + rng.uniform(0, 2 * np.pi, (400, 1, 1))
    fields = np.cos(phases)[..., None] * rng.normal(size=(400, 1, 1, 2)) * ocean[..., None]
    _, scale, direction = np.linalg.svd(fields.reshape(400, -1), full_matrices=False)
    variance, count = scale**2, 2 * ocean.sum()
    variance[0] += 0.4 * variance.sum()
    variance *= count / variance.sum()
    rest = variance[30:].sum() / (count - 30)
    mean = 0.3 * rng.normal(size=(*SHAPE, 2)) * ocean[..., None]
    fields = (mean, direction[:30].reshape(30, *SHAPE, 2), variance[:30], rest, ocean[..., None])
    return PrincipalGaussian(*(jnp.asarray(a, jnp.float32) for a in fields))


@pytest.fixture(scope="module")
def observation(ocean, gaussian):
    """24 walked cells and 3 points between cells of one random truth."""
    rng = np.random.default_rng(1)
    truth = np.asarray(guide.prior_draw(gaussian, jax.random.key(5)))
    walked = observe.from_cells(observe.walk(ocean, 24, rng), truth, NOISE, ocean, size=28)
    lat, lon = np.array([8.3, 8.6, 12.5]), np.array([12.2, 12.9, 20.5])
    points = observe.from_points(lat, lon, np.zeros((3, 2)), NOISE, *map(np.arange, SHAPE), ocean, size=4)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), walked, points)
    return both.replace(values=jnp.where(both.valid[:, None], both.apply(jnp.asarray(truth)), 0.0))


@pytest.fixture(scope="module")
def dense(gaussian, observation, ocean):
    """Sigma, A (with rows of padding left out) and y in float64, on the ocean."""
    sea = np.flatnonzero(np.repeat(ocean.reshape(-1), 2))
    e = np.asarray(gaussian.direction, float).reshape(30, -1)[:, sea]
    covariance = (e.T * (np.asarray(gaussian.variance, float) - float(gaussian.rest))) @ e
    covariance += float(gaussian.rest) * np.eye(sea.size)
    unit = jnp.eye(2 * ocean.size).reshape(-1, *SHAPE, 2)
    valid = np.asarray(observation.valid)
    operator = np.asarray(jax.jit(jax.vmap(observation.apply))(unit), float)[sea][:, valid].reshape(sea.size, -1).T
    values = np.asarray(observation.values, float)[valid].reshape(-1)
    return sea, covariance, operator, values


@pytest.fixture(scope="module")
def linear(dense, gaussian, observation, ocean):
    """The exact posterior as an Analysis, and its covariance."""
    sea, covariance, a, _ = dense
    gain = np.linalg.solve(a @ covariance @ a.T + NOISE**2 * np.eye(len(a)), a @ covariance).T
    left = covariance - gain @ a @ covariance
    full = np.zeros((2 * ocean.size, observation.size, 2))
    full[np.ix_(sea, np.flatnonzero(observation.valid))] = gain.reshape(sea.size, -1, 2)
    variance = np.zeros(2 * ocean.size)
    variance[sea] = np.diag(left)
    arrays = full.reshape(*SHAPE, 2, -1, 2), variance.reshape(*SHAPE, 2)
    # The analysis multiplies by `valid`, which strict promotion forbids for booleans.
    rows = observation.replace(valid=observation.valid.astype(jnp.float32))
    return DenseAnalysis(rows, gaussian.mean, *(jnp.asarray(v, jnp.float32) for v in arrays)), left


def conditional(dense, x, sigma, mean, noise):
    """E[x0 | x, y] by stacking both observations of x0, float64 on the ocean."""
    sea, covariance, a, y = dense
    stacked = np.concatenate([np.eye(sea.size), a])
    errors = np.diag(np.concatenate([np.full(sea.size, sigma**2), np.full(len(a), noise**2)]))
    gain = np.linalg.solve(stacked @ covariance @ stacked.T + errors, stacked @ covariance).T
    return mean + gain @ (np.concatenate([x, y]) - stacked @ mean)


def run(gaussian, evidence, hyper, members, analysis=None, paired=True, seed=0):
    """Members of a jitted sampler from a corrected start (without an analysis: from noise about the prior mean)."""

    def member(key, sign):
        keys = jax.random.split(key, 3)
        start = gaussian.mean
        if analysis is not None:
            prior = guide.prior_draw(gaussian, keys[0])
            start = linear_sample(keys[1], analysis, prior, evidence, sign)
        return posterior(keys[2], gaussian, evidence, hyper, start, sign)

    keys, signs = antithetic(jax.random.key(seed), members)
    if not paired:
        keys, signs = jax.random.split(jax.random.key(seed), members), jnp.ones(members)
    return np.asarray(jax.jit(jax.vmap(member))(keys, signs), float)


def on_sea(fields, dense):
    return np.asarray(fields, float).reshape(*np.shape(fields)[:-3], -1)[..., dense[0]]


@pytest.mark.parametrize("sigma", [0.02, 1.0, 50.0])
def test_conditional_covariance_is_the_dense_inverse(gaussian, dense, sigma):
    covariance = dense[1]
    exact = np.linalg.inv(np.linalg.inv(covariance) + np.eye(len(covariance)) / sigma**2)
    e = on_sea(gaussian.direction, dense)
    variance, rest = np.asarray(gaussian.variance, float), float(gaussian.rest)
    left = gains.conditional_variance(rest, sigma)
    mine = (e.T * (gains.conditional_variance(variance, sigma) - left)) @ e + left * np.eye(e.shape[1])
    np.testing.assert_allclose(mine, exact, atol=1e-6 * np.abs(exact).max())


@pytest.mark.parametrize("correction", ["kalman", "cov_pigdm", "mmps", "kalman_cg", "kalman_jvp"])
@pytest.mark.parametrize("sigma", [0.03, 0.8, 20.0])
def test_corrections_of_the_exact_denoiser_are_exact(gaussian, observation, dense, correction, sigma):
    """The Jacobian of the exact denoiser is C_t / sigma^2, so all of them are the conditional mean."""
    hyper = Posterior.create(sigma, 0.01, 2, correction=correction)
    evidence = evidence_for(hyper, gaussian.ocean, observation, gaussian)
    if evidence.gain is not None:
        evidence = evidence.replace(gain=jax.tree.map(lambda g: g[0], evidence.gain))
    options = {"cg_steps": 150} if correction == "mmps" else {}
    x = guide.prior_draw(gaussian, jax.random.key(1)) + sigma * jax.random.normal(jax.random.key(2), (*SHAPE, 2))

    @jax.jit
    def correct(x):
        return guide.CORRECTIONS[correction](lambda x: gaussian(x, sigma), x, sigma, 0.0, evidence, **options)

    exact = conditional(dense, on_sea(x, dense), sigma, on_sea(gaussian.mean, dense), NOISE)
    np.testing.assert_allclose(on_sea(correct(x), dense), exact, atol=2e-3 if sigma > 1 else 3e-4)


def test_correlated_errors_weigh_as_in_dense_algebra(gaussian, observation, dense):
    gain = gains.kalman_gains(gaussian, observation, np.array([0.5, np.inf]), correlation=0.7)
    sea, covariance, a, _ = dense
    noise = NOISE**2 * np.kron(np.eye(len(a) // 2), [[1, 0.7], [0.7, 1]])
    valid = np.asarray(observation.valid)
    for level, c in enumerate([np.linalg.inv(np.linalg.inv(covariance) + 4 * np.eye(sea.size)), covariance]):
        exact = np.linalg.inv(a @ c @ a.T + noise)
        mine = np.asarray(gain.inverse[level])[valid][:, :, valid].reshape(len(a), -1)
        np.testing.assert_allclose(mine, exact, atol=1e-4 * np.abs(exact).max())


def test_corners_on_land_have_no_part_in_gains(gaussian, ocean):
    """A point that sees a cell of the ocean and one of land is told from less of the current, not from another."""
    wet, dry = np.flatnonzero(ocean)[[40, 200]], np.flatnonzero(~ocean)[[3, 20]]
    cells, ones = np.stack([wet, dry], 1), np.ones((2, 1))
    seen, less = (
        observe.from_weights(cells, np.concatenate([0.6 * ones, share * ones], 1), np.zeros((2, 2)), NOISE, 2)
        for share in (0.4, 0.0)
    )
    noise = gains.noise_covariance(seen)
    for make in (
        lambda one: gains.kalman_gains(gaussian, one, np.array([0.5])),
        lambda one: gains.kalman_gain(gaussian, one, noise, jnp.float32(0.5)),
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), make(seen), make(less))
    gain = gains.kalman_gain(gaussian, seen, noise, jnp.float32(0.5))
    left = [float(gains.remaining_variance(gaussian, one, gain, jnp.float32(0.5))) for one in (seen, less)]
    assert left[0] == pytest.approx(left[1], rel=1e-6)
    ones = jnp.ones((2, 2))
    for field in (gains.increment(gaussian, seen, gain, ones, 0.5), guide.Evidence(gaussian.ocean, seen).spread(ones)):
        assert np.abs(np.asarray(field).reshape(-1, 2)[wet]).min() > 1e-3
        np.testing.assert_allclose(np.asarray(field)[~ocean], 0, atol=1e-9)


@pytest.mark.parametrize("sigma", [0.02, 1.0, 80.0, np.inf])
def test_gains_on_the_device_are_those_of_the_host(gaussian, observation, sigma):
    host = jax.tree.map(lambda g: g[0], gains.kalman_gains(gaussian, observation, np.array([sigma]), correlation=0.4))
    noise = gains.noise_covariance(observation, 0.4)
    device = jax.jit(gains.kalman_gain)(gaussian, observation, noise, jnp.float32(sigma))
    for ours, exact in zip(jax.tree.leaves(device), jax.tree.leaves(host), strict=True):
        np.testing.assert_allclose(ours, exact, atol=1e-4 * np.abs(exact).max())


@pytest.mark.parametrize("sigma", [0.05, 1.0, 80.0, np.inf])
def test_remaining_variance_is_the_dense_trace(gaussian, observation, dense, sigma):
    sea, covariance, a, _ = dense
    given_x = np.linalg.inv(np.linalg.inv(covariance) + np.eye(sea.size) / sigma**2)
    left = given_x - given_x @ a.T @ np.linalg.solve(a @ given_x @ a.T + NOISE**2 * np.eye(len(a)), a @ given_x)
    gain = jax.tree.map(lambda g: g[0], gains.kalman_gains(gaussian, observation, np.array([sigma])))
    found = jax.jit(gains.remaining_variance)(gaussian, observation, gain, jnp.float32(sigma))
    assert float(found) == pytest.approx(np.trace(left) / sea.size, rel=1e-4)


@pytest.mark.parametrize("correction", ["paste", "pigdm"])
def test_corrections_without_a_covariance(gaussian, ocean, correction):
    """Both are Kalman corrections of a white prior: with exact observations, and with its own denoiser."""
    sigma, blank, white = 0.7, np.zeros((*SHAPE, 2)), guide.white(gaussian.ocean)
    noise = 1e-4 if correction == "paste" else 0.3
    cells = observe.cells(ocean, 0.1, np.random.default_rng(2))
    observation = observe.from_cells(cells, blank + 1.5, noise, ocean)
    x = 2 * jax.random.normal(jax.random.key(0), (*SHAPE, 2))
    fields = []
    for name in ("kalman", correction):
        # Whatever prior the others are given.
        prior = white if name == "kalman" else gaussian
        evidence = evidence_for(Posterior.create(sigma, correction=name), gaussian.ocean, observation, prior)
        if evidence.gain is not None:
            evidence = evidence.replace(gain=jax.tree.map(lambda g: g[0], evidence.gain))
        correct = jax.jit(lambda x, e, name=name: guide.CORRECTIONS[name](lambda x: white(x, sigma), x, sigma, 0.0, e))
        fields.append(np.asarray(correct(x, evidence)))
    np.testing.assert_allclose(fields[0], fields[1], atol=1e-5)
    gain = sigma**2 / (1 + sigma**2) / (sigma**2 / (1 + sigma**2) + noise**2)
    x0 = np.asarray(x) / (1 + sigma**2)
    np.testing.assert_allclose(fields[1][cells], (x0 + gain * (1.5 - x0))[cells], atol=1e-5)


def test_dps_is_the_variance_preserving_step(gaussian, observation):
    """An ancestral step from the corrected x0 is Chung's: the ancestral step less step grad |y - A x0|."""
    before, after, zeta = 0.3, 0.45, 0.4
    alpha = before / after
    sigma, following = (np.sqrt((1 - a) / a) for a in (before, after))
    evidence = evidence_for(Posterior.create(3.0, correction="dps"), gaussian.ocean, observation)
    x_t = jax.random.normal(jax.random.key(3), (*SHAPE, 2))

    def x0_of(x_t):
        return gaussian(x_t / np.float32(np.sqrt(before)), sigma)

    def distance(x_t):
        misfit = (observation.values - observation.apply(x0_of(x_t)))[observation.valid]
        return jnp.linalg.norm(misfit.reshape(-1))

    mean = transition.ancestral_mean(x_t, x0_of(x_t), 1 - alpha, before, after)
    expected = mean - zeta * jax.grad(distance)(x_t)
    x = x_t / np.float32(np.sqrt(before))
    x0 = guide.dps(lambda x: gaussian(x, sigma), x, sigma, following, evidence, step=zeta)
    stepped = np.float32(np.sqrt(after)) * transition.ddim(x, x0, jnp.zeros_like(x), sigma, following, 1.0)
    np.testing.assert_allclose(stepped, expected, atol=2e-5)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0])
def test_a_step_keeps_the_noise_level_and_refreshes_a_share_eta_of_it(eta):
    """For x = x0 + sigma n: what is left of the noise and what is drawn anew have the variance of the next level."""
    sigma, following = 2.0, 1.2
    old, new = (
        transition.ddim(*(jnp.float32(a) for a in (sigma * n, 0, m, sigma, following, eta)))
        for n, m in ((1, 0), (0, 1))
    )
    ancestral = following * np.sqrt(1 - (following / sigma) ** 2)
    np.testing.assert_allclose(new, eta * ancestral, rtol=1e-6)
    np.testing.assert_allclose(old**2 + new**2, following**2, rtol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_sample_can_be_differentiated_by_its_own_numbers(gaussian, observation, eta):
    """Also to the last level, whose noise is none; against differences."""
    hyper, key = Posterior.create(3.4, 0.3, 6, eta=eta), jax.random.key(0)
    evidence = evidence_for(hyper, gaussian.ocean, observation, gaussian)
    start = jax.random.normal(jax.random.key(1), (*SHAPE, 2))

    def size(sigma, eta):
        return jnp.mean(posterior(key, gaussian, evidence, hyper.replace(sigma=sigma, eta=eta), start) ** 2)

    by_sigma, by_eta = jax.jit(jax.grad(size, (0, 1)))(hyper.sigma, hyper.eta)
    assert np.isfinite(by_sigma).all()
    step, size = 0.01, jax.jit(size)
    ends = eta if eta == 1.0 else eta + step, eta if eta == 0.0 else eta - step
    change = [float(size(hyper.sigma, jnp.float32(one))) for one in ends]
    assert float(by_eta) == pytest.approx((change[0] - change[1]) / (ends[0] - ends[1]), rel=0.1, abs=2e-3)
    along = step * hyper.sigma
    change = [float(size(hyper.sigma + sign * along, hyper.eta)) for sign in (1, -1)]
    assert float(by_sigma @ along) == pytest.approx((change[0] - change[1]) / 2, rel=0.05, abs=1e-4)


@pytest.mark.parametrize(
    "correction", ["kalman", "cov_pigdm", "pigdm", "mmps", "kalman_cg", "kalman_jvp", "dps", "paste"]
)
def test_single_precision_stays_where_a_program_asks_for_double(gaussian, observation, correction):
    hyper = Posterior.create(3.4, 0.3, 4, correction=correction)
    members = []
    for double in (False, True):
        with jax.enable_x64(double):
            evidence = evidence_for(hyper, gaussian.ocean, observation, gaussian)
            start = jnp.ones((*SHAPE, 2), jnp.float32)
            members.append(posterior(jax.random.key(0), gaussian, evidence, hyper, start))
    assert members[1].dtype == jnp.float32
    np.testing.assert_allclose(members[1], members[0], atol=2e-3)


@pytest.mark.parametrize(("correction", "turned"), [("kalman_jvp", False), ("kalman_cg", True)])
def test_a_step_along_the_jacobian_is_that_of_dense_algebra(gaussian, observation, dense, correction, turned):
    """Of a linear denoiser W x whose W is not symmetric: J = W for one, W^T for the other."""
    sea, covariance, a, y = dense
    sigma = 0.8
    w = np.eye(sea.size) + np.random.default_rng(4).normal(size=covariance.shape) / math.sqrt(sea.size)

    def denoise(x):
        inside = jnp.matmul(jnp.asarray(w, jnp.float32), x.ravel()[sea], precision="highest")
        return jnp.zeros(x.size).at[sea].set(inside).reshape(x.shape)

    hyper = Posterior.create(sigma, 0.01, 2, correction=correction)
    evidence = evidence_for(hyper, gaussian.ocean, observation, gaussian)
    evidence = evidence.replace(gain=jax.tree.map(lambda g: g[0], evidence.gain))
    x = gaussian.ocean * jax.random.normal(jax.random.key(2), (*SHAPE, 2))
    found = guide.CORRECTIONS[correction](denoise, x, jnp.float32(sigma), jnp.float32(0.5), evidence, cg_steps=1)
    x0 = w @ on_sea(x, dense)
    misfit = y - a @ x0
    prior = np.linalg.inv(np.linalg.inv(covariance) + np.eye(sea.size) / sigma**2)
    weighed = np.linalg.solve(a @ prior @ a.T + NOISE**2 * np.eye(len(a)), misfit)
    jacobian = w.T if turned else w
    curvature = weighed @ (sigma**2 * a @ jacobian @ a.T + NOISE**2 * np.eye(len(a))) @ weighed
    assert curvature > weighed @ misfit / guide.LONGEST  # otherwise another rule applies
    expected = x0 + sigma**2 * jacobian @ a.T @ weighed * (weighed @ misfit / curvature)
    np.testing.assert_allclose(on_sea(found, dense), expected, atol=2e-3)


@pytest.mark.parametrize("correction", ["mmps", "kalman_cg", "kalman_jvp"])
def test_conjugate_gradients_see_correlated_errors(gaussian, observation, dense, correction):
    """Of the exact denoiser what they come to is the conditional mean given x and y."""
    sea, covariance, a, y = dense
    sigma, correlation = 0.8, -0.7
    errors = observation.replace(sigma=observation.sigma * jnp.array([[6.0, 9.0]]))
    evidence = evidence_for(Posterior.create(sigma, 0.01, 2, correction=correction), gaussian.ocean, errors, gaussian,
                            correlation)  # fmt: skip
    if evidence.gain is not None:
        evidence = evidence.replace(gain=jax.tree.map(lambda g: g[0], evidence.gain))
    x = guide.prior_draw(gaussian, jax.random.key(1)) + sigma * jax.random.normal(jax.random.key(2), (*SHAPE, 2))
    correct = guide.CORRECTIONS[correction]
    steps = 60 if correction == "mmps" else 2
    found = jax.jit(lambda x: correct(lambda x: gaussian(x, sigma), x, sigma, 0.0, evidence, cg_steps=steps))(x)
    off = correlation * 54
    noise = NOISE**2 * np.kron(np.eye(len(a) // 2), [[36, off], [off, 81]])
    left = np.linalg.inv(np.linalg.inv(covariance) + np.eye(sea.size) / sigma**2)
    x0 = on_sea(gaussian(x, sigma), dense)
    exact = x0 + left @ a.T @ np.linalg.solve(a @ left @ a.T + noise, y - a @ x0)
    np.testing.assert_allclose(on_sea(found, dense), exact, atol=3e-4)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_row_that_says_nothing_does_not_change_the_steps_of_others(gaussian, observation, steps):
    sigma = 0.8
    x = guide.prior_draw(gaussian, jax.random.key(1)) + sigma * jax.random.normal(jax.random.key(2), (*SHAPE, 2))

    def corrected(seen):
        evidence = evidence_for(Posterior.create(sigma, 0.01, 2, correction="mmps"), gaussian.ocean, seen)
        return guide.mmps(lambda x: gaussian(x, sigma), x, sigma, 0.0, evidence, cg_steps=steps)

    without = corrected(observation.rows(jnp.arange(observation.size) != 0))
    useless = corrected(observation.replace(sigma=observation.sigma.at[0].set(1e4)))
    np.testing.assert_allclose(useless, without, atol=1e-4)
    assert np.abs(useless - corrected(observation)).max() > 0.01


@pytest.mark.parametrize(
    ("correction", "setting", "option"),
    [
        ("dps", {"dps_step": 0.05}, {"step": 0.05}), ("mmps", {"cg_steps": 3}, {"cg_steps": 3}),
        ("kalman_cg", {"cg_steps": 1}, {"cg_steps": 1}), ("kalman_jvp", {"cg_steps": 1}, {"cg_steps": 1}),
    ],
)  # fmt: skip
def test_a_correction_is_made_as_the_sampler_was_told(gaussian, observation, correction, setting, option):
    """A sampler of one level is one correction of its start; of a network whose Jacobian is not symmetric."""
    key, start = jax.random.key(5), gaussian.mean

    def denoise(x, sigma):
        return jnp.tanh(1.5 * gaussian(x, sigma)) * gaussian.ocean

    def sampled(**options):
        hyper = Posterior.create(1.0, 0.01, 2, correction=correction, stop_sigma=1.0, **options)
        evidence = evidence_for(hyper, gaussian.ocean, observation, gaussian)
        return posterior(key, denoise, evidence, hyper, start), evidence, hyper.sigma[0]

    found, evidence, sigma = sampled(**setting)
    x = start + sigma * jax.random.normal(jax.random.fold_in(key, 0), start.shape)
    if evidence.gain is not None:
        evidence = evidence.replace(gain=jax.tree.map(lambda g: g[0], evidence.gain))
    correct = guide.CORRECTIONS[correction]
    expected = correct(lambda x: denoise(x, sigma), x, sigma, jnp.float32(0.0), evidence, **option)
    np.testing.assert_allclose(found, jnp.where(gaussian.ocean > 0, expected, start), atol=1e-4)
    assert np.abs(found - sampled()[0]).max() > 0.01


def test_conjugate_gradients_halt_where_the_operator_is_not_positive():
    matrix = jnp.asarray(np.diag([2.0, 1.0, 0.5]), jnp.float32)
    right = jnp.asarray([1.0, 2.0, 3.0])
    solved = guide.conjugate_gradients(lambda v: (matrix @ v, v), right, 9)
    np.testing.assert_allclose(solved, [0.5, 2.0, 6.0], rtol=1e-5)
    np.testing.assert_array_equal(guide.conjugate_gradients(lambda v: (-v, v), right, 3), jnp.zeros(3))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_preconditioned_steps_are_those_of_scipy(steps):
    rng = np.random.default_rng(0)
    root, near = rng.normal(size=(2, 6, 6))
    matrix = root @ root.T + np.eye(6)
    inverse = np.linalg.inv(matrix + 0.1 * near @ near.T)
    right = rng.normal(size=6)
    expected, _ = sparse.linalg.cg(matrix, right, rtol=0, atol=0, maxiter=steps, M=inverse)
    m, p = jnp.asarray(matrix, jnp.float32), jnp.asarray(inverse, jnp.float32)
    found = guide.conjugate_gradients(
        lambda v: (m @ v, 3 * v), jnp.asarray(right, jnp.float32), steps, lambda r: p @ r
    )  # fmt: skip
    np.testing.assert_allclose(found, 3 * expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("factor", [-1.0, 0.0, 0.2])
def test_a_preconditioner_is_followed_where_the_operator_has_too_little_curvature(factor):
    """And no further: its own step, of length 1, is the last."""
    right = jnp.asarray([1.0, 2.0, 3.0])
    found = guide.conjugate_gradients(lambda v: (factor * 4 * v, v), right, 3, lambda r: r / 4)
    np.testing.assert_allclose(found, right / 4)
    better = guide.conjugate_gradients(lambda v: (0.3 * 4 * v, v), right, 3, lambda r: r / 4)
    np.testing.assert_allclose(better, right / 4 / 0.3, rtol=1e-6)


def test_a_later_direction_of_too_little_curvature_has_the_length_of_the_preconditioner():
    """And is the last. The measure is p^T M p, not r^T M^-1 r, of which the second has enough."""
    rng = np.random.default_rng(7)
    basis = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    right = rng.normal(size=4)
    m = np.diag([1.0, 2.0, 3.0, 4.0])
    root = np.sqrt(m)

    def solve(values, steps):
        s = jnp.asarray(root @ basis @ np.diag(values) @ basis.T @ root, jnp.float32)
        p = jnp.asarray(np.linalg.inv(m), jnp.float32)
        return guide.conjugate_gradients(lambda v: (s @ v, v), jnp.asarray(right, jnp.float32), steps, lambda r: p @ r)

    def directions(values):
        """p^T S p over p^T M p of two directions, in float64, and v after both with M's length of the second."""
        s = root @ basis @ np.diag(values) @ basis.T @ root
        z = np.linalg.solve(m, right)
        length = (right @ z) / (z @ s @ z)
        left = right - length * (s @ z)
        again = np.linalg.solve(m, left)
        p = again + (left @ again) / (right @ z) * z
        after = length * z + (left @ again) / (p @ m @ p) * p
        return [(one @ s @ one) / (one @ m @ one) for one in (z, p)], after

    good, bad = [1.0, 0.8, 1.2, 0.4], [4.0, 1.0, 1.0, 0.02]
    curvatures, other = directions(good)
    assert min(curvatures) > 0.25
    assert np.abs(solve(good, 2) - other).max() > 0.01
    (first, second), after = directions(bad)
    assert first > 0.25 > second
    np.testing.assert_allclose(solve(bad, 2), after, rtol=1e-5)
    np.testing.assert_array_equal(solve(bad, 5), solve(bad, 2))


def test_steps_do_not_depend_on_how_an_observation_is_written(gaussian, observation):
    """Once, or twice with half of its information and in other units; not so without a preconditioner."""

    def denoise(x):
        return jnp.tanh(1.5 * gaussian(x, 1.0)) * gaussian.ocean  # whose Jacobian is not symmetric

    def corrected(rows, correction):
        hyper = Posterior.create(1.0, 0.01, 2, correction=correction)
        evidence = evidence_for(hyper, gaussian.ocean, rows, gaussian)
        if evidence.gain is not None:
            evidence = evidence.replace(gain=jax.tree.map(lambda g: g[0], evidence.gain))
        x = jax.random.normal(jax.random.key(2), (*SHAPE, 2))
        return guide.CORRECTIONS[correction](denoise, x, jnp.float32(1.0), jnp.float32(0.5), evidence, cg_steps=2)

    half = observation.replace(sigma=np.float32(math.sqrt(2)) * observation.sigma)
    twice = jax.tree.map(lambda a: jnp.concatenate([a, a]), half)
    # Larger units for some of the rows.
    unit = jnp.where(jnp.arange(twice.size) % 3 == 0, 4.0, 1.0)[:, None]
    twice = twice.replace(weights=unit * twice.weights, values=unit * twice.values, sigma=unit * twice.sigma)
    for correction in ("kalman_cg", "kalman_jvp"):
        before = corrected(observation, correction)
        np.testing.assert_allclose(corrected(twice, correction), before, atol=2e-4)
    assert np.abs(corrected(twice, "mmps") - corrected(observation, "mmps")).max() > 0.01


def test_kalman_members_are_exact_posterior_samples(gaussian, observation, linear, dense):
    analysis, left = linear
    hyper = Posterior.create(3.4, 0.01, 31)
    evidence = evidence_for(hyper, gaussian.ocean, observation, gaussian)
    members = on_sea(run(gaussian, evidence, hyper, 128, analysis, paired=False), dense)
    best, exact = np.trace(left), on_sea(analysis.mean(observation.values), dense)
    variance = members.var(0, ddof=1).sum()
    squared = best + ((members.mean(0) - exact) ** 2).sum()
    assert (squared - variance / len(members)) / best == pytest.approx(1, abs=0.02)
    assert np.sqrt(variance / best) == pytest.approx(0.97, abs=0.05)


@pytest.mark.parametrize(
    "options", [{}, {"eta": 0.0, "second_order": True}, {"stop_sigma": 1.5}, {"correction": "cov_pigdm"}]
)
def test_mean_of_one_antithetic_pair_is_the_linear_estimate(gaussian, observation, linear, options):
    hyper = Posterior.create(3.4, **options)
    evidence = evidence_for(hyper, gaussian.ocean, observation, gaussian)
    pair = run(gaussian, evidence, hyper, 2, linear[0])
    assert np.abs(pair[0] - pair[1]).max() > 0.3
    np.testing.assert_allclose(pair.mean(0), linear[0].mean(observation.values), atol=1e-3)


def test_stopping_early_runs_fewer_levels():
    assert Posterior.create(80.0, 0.01, 31).calls == 31
    early = Posterior.create(80.0, 0.01, 31, stop_sigma=1.5)
    assert early.calls < 20
    assert 1.5 <= float(early.sigma[-1]) < 3
    assert Posterior.create(3.4, stop_sigma=3.4).calls == 1


def test_linear_samples_have_the_posterior_covariance(gaussian, observation, linear, dense):
    analysis, left = linear
    evidence = evidence_for(Posterior.create(3.4, correction="mmps"), gaussian.ocean, observation)

    def sample(key):
        one, two = jax.random.split(key)
        return linear_sample(two, analysis, guide.prior_draw(gaussian, one), evidence)

    samples = on_sea(jax.jit(jax.vmap(sample))(jax.random.split(jax.random.key(0), 2000)), dense)
    values, directions = np.linalg.eigh(left)
    anomaly = samples - on_sea(analysis.mean(observation.values), dense)
    np.testing.assert_allclose((anomaly @ directions[:, -20:]).var(0), values[-20:], rtol=0.15)


def test_errors_of_a_linear_sample_are_correlated_as_told():
    """With a gain that takes over what is observed, members are off by the errors alone."""
    ocean, sigma = np.ones((4, 4), bool), np.array([0.3, 1.1])
    seen = observe.from_cells(ocean, np.zeros((4, 4, 2)), sigma, ocean)
    gain = jnp.einsum("km,cd->kcmd", jnp.eye(16), jnp.eye(2)).reshape(4, 4, 2, 16, 2)
    analysis = DenseAnalysis(seen, jnp.zeros((4, 4, 2)), gain, jnp.zeros((4, 4, 2)))
    evidence = guide.Evidence(jnp.ones((4, 4, 1)), seen, gains.noise_covariance(seen, 0.8))
    draws = jax.vmap(lambda key: linear_sample(key, analysis, jnp.zeros((4, 4, 2)), evidence))
    samples = np.asarray(jax.jit(draws)(jax.random.split(jax.random.key(0), 3000)), float)
    np.testing.assert_allclose(np.cov(samples.reshape(-1, 2).T), [[0.09, 0.264], [0.264, 1.21]], rtol=0.03)


def test_prior_draws_are_the_mean_on_land(gaussian, ocean):
    shifted = gaussian.replace(mean=gaussian.mean + 0.4)
    draw = np.asarray(guide.prior_draw(shifted, jax.random.key(0)))
    np.testing.assert_array_equal(draw[~ocean], np.asarray(shifted.mean)[~ocean])
    assert np.abs(draw - np.asarray(shifted.mean))[ocean].min() > 0


def test_prior_draws_and_unguided_samples_have_the_prior_covariance(gaussian, dense):
    variance, rest = np.asarray(gaussian.variance), float(gaussian.rest)
    draws = jax.jit(jax.vmap(lambda key: guide.prior_draw(gaussian, key)))(jax.random.split(jax.random.key(1), 1500))
    hyper = Posterior.create(80.0, 0.01, 256, correction="none")
    samples = run(gaussian, evidence_for(hyper, gaussian.ocean), hyper, 500, paired=False)
    e = on_sea(gaussian.direction, dense)
    for fields in (np.asarray(draws, float), samples):
        anomaly = on_sea(fields - np.asarray(gaussian.mean), dense)
        along = anomaly @ e.T
        # 500 members: 6 % standard error a direction; 256 steps: 2.5 % too little, as x0 is used for a draw given x.
        np.testing.assert_allclose(along.var(0) / variance, 1, atol=0.2)
        assert np.mean(along.var(0) / variance) == pytest.approx(1, abs=0.05)
        assert (anomaly - along @ e).var() == pytest.approx(rest * (1 - 30 / e.shape[1]), rel=0.1)
        correlation = np.corrcoef(along.T) - np.eye(30)
        assert np.abs(correlation).max() < 0.2


def test_a_start_from_noise_loses_the_large_scale(gaussian, dense):
    """From N(0, I) in the variance-preserving x_T, white noise in place of a prior draw, variances are 24 / lambda."""
    sigma = 3.4
    hyper = Posterior.create(sigma, 0.01, 120, correction="none")
    evidence = evidence_for(hyper, gaussian.ocean)

    def member(key):
        one, two = jax.random.split(key)
        starts = (guide.prior_draw(prior, one) for prior in (guide.white(gaussian.ocean), gaussian))
        return [posterior(two, gaussian, evidence, hyper, start) for start in starts]

    white, corrected = jax.jit(jax.vmap(member))(jax.random.split(jax.random.key(0), 400))
    e, variance = on_sea(gaussian.direction, dense)[0], float(gaussian.variance[0])
    # Var E[x0 | x] + Var[x0 | x] over the variance of x0, for x of variance 1 + sigma^2.
    total = variance + sigma**2
    kept = variance * (1 + sigma**2) / total**2 + sigma**2 / total
    assert kept == pytest.approx(24 / variance, rel=0.1)
    assert (on_sea(white, dense) @ e).var() / variance == pytest.approx(kept, rel=0.2)
    assert (on_sea(corrected, dense) @ e).var() / variance == pytest.approx(1, abs=0.15)


def test_second_order_steps_are_of_second_order(gaussian, dense):
    """Errors against the exact flow, on which a direction's anomaly is proportional to sqrt(variance + sigma^2)."""
    x = guide.prior_draw(gaussian, jax.random.key(3)) + 20 * jax.random.normal(jax.random.key(4), (*SHAPE, 2))
    variance = np.asarray(gaussian.variance, float)
    anomaly = on_sea(x - gaussian.mean, dense) @ on_sea(gaussian.direction, dense).T
    exact = anomaly * np.sqrt((variance + 0.1**2) / (variance + 20**2)) * variance / (variance + 0.1**2)
    errors = {}
    for second_order in (False, True):
        for count in (16, 64):
            hyper = Posterior.create(20.0, 0.1, count, correction="none", eta=0.0, second_order=second_order)
            evidence = evidence_for(hyper, gaussian.ocean)
            # Without its start noise: x is already at the first level.
            sample = jax.jit(lambda x, h=hyper, e=evidence: posterior(jax.random.key(0), gaussian, e, h, x, 0.0))
            found = on_sea(sample(x) - gaussian.mean, dense) @ on_sea(gaussian.direction, dense).T
            errors[second_order, count] = np.abs(found - exact).max()
    assert np.log2(errors[False, 16] / errors[False, 64]) / 2 == pytest.approx(1, abs=0.25)
    assert np.log2(errors[True, 16] / errors[True, 64]) / 2 == pytest.approx(2, abs=0.35)
    assert errors[True, 16] < errors[False, 16] / 4


def test_second_order_steps_are_those_of_the_source_at_uneven_levels(gaussian):
    """Lu et al. 2022, algorithm 2, in lambda = -log sigma: D = (1 + 1 / 2r) x0 - x0_before / 2r, r = h_before / h."""
    sigma = np.array([20, 18, 6, 5.5, 2, 1.8, 0.6, 0.5, 0.1])
    draws = guide.prior_draw(gaussian, jax.random.key(3)), jax.random.normal(jax.random.key(4), (*SHAPE, 2))
    x = np.asarray(gaussian.ocean * (draws[0] + 20 * draws[1]))
    denoise = jax.jit(lambda x, sigma: gaussian(x, sigma))
    expected, before, steps = x.astype(float), None, -np.diff(np.log(sigma))
    for number, level in enumerate(sigma[:-1]):
        x0 = np.asarray(denoise(jnp.asarray(expected, jnp.float32), jnp.float32(level)), float)
        share = 0 if before is None else steps[number] / (2 * steps[number - 1])
        ahead = x0 if before is None else (1 + share) * x0 - share * before
        expected = np.exp(-steps[number]) * expected + (1 - np.exp(-steps[number])) * ahead
        before = x0
    hyper = Posterior.create(20.0, 0.1, sigma.size, correction="none", eta=0.0, second_order=True)
    hyper = hyper.replace(sigma=jnp.asarray(sigma, jnp.float32))
    evidence = evidence_for(hyper, gaussian.ocean)
    found = jax.jit(lambda x: posterior(jax.random.key(0), gaussian, evidence, hyper, x, 0.0))(x)
    last = denoise(jnp.asarray(expected, jnp.float32), jnp.float32(sigma[-1]))
    assert np.abs(np.asarray(last) - before).max() > 0.1
    np.testing.assert_allclose(found, last, atol=1e-4)


def test_land_keeps_the_start_and_pairs_mirror_every_draw(gaussian, observation, ocean):
    hyper = Posterior.create(3.4, count=4)
    evidence = evidence_for(hyper, gaussian.ocean, observation, gaussian)
    start = jnp.where(gaussian.ocean > 0, gaussian.mean, -0.7)
    draws = (1.0, jax.random.normal), (-1.0, lambda *shape: -jax.random.normal(*shape))

    @jax.jit
    def both():
        return [posterior(jax.random.key(0), gaussian, evidence, hyper, start, *options) for options in draws]

    field, mirrored = map(np.asarray, both())
    assert (field[~ocean] == np.float32(-0.7)).all()
    np.testing.assert_allclose(field, mirrored, atol=1e-6)


def test_more_observations_than_memory_holds_are_refused(gaussian, observation, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 1_000_000)
    with pytest.raises(InputError, match=r"32 observed positions at 16 noise levels need .* 16 fit"):
        gains.kalman_gains(gaussian, observation, np.full(16, 1.0))


def test_gains_of_a_pattern_are_made_once(gaussian, observation, monkeypatch):
    made = []
    make = gains.kalman_gains
    monkeypatch.setattr(gains, "kalman_gains", lambda *args: made.append(args) or make(*args))
    hyper = Posterior.create(2.7, count=3)
    first = evidence_for(hyper, gaussian.ocean, observation, gaussian)
    other = evidence_for(hyper, gaussian.ocean, observation.replace(values=observation.values + 1), gaussian)
    assert len(made) == 1
    assert other.gain is first.gain
    np.testing.assert_array_equal(other.observation.values, observation.values + 1)
    evidence_for(hyper, gaussian.ocean, observation.replace(sigma=2 * observation.sigma), gaussian)
    evidence_for(hyper.replace(sigma=2 * hyper.sigma), gaussian.ocean, observation, gaussian)
    assert len(made) == 3
    # As by another model.
    evidence_for(hyper, gaussian.ocean, observation, gaussian.replace(rest=2 * gaussian.rest))
    assert len(made) == 4


def test_kept_gains_are_of_the_same_correlation(gaussian, observation):
    hyper = Posterior.create(2.7, count=2)
    for correlation in (0.0, 0.6, -0.3, 0.0):
        found = evidence_for(hyper, gaussian.ocean, observation, gaussian, correlation)
        exact = gains.kalman_gains(gaussian, observation, np.asarray(hyper.sigma), correlation)
        np.testing.assert_array_equal(found.gain.inverse, exact.inverse)
        np.testing.assert_array_equal(found.noise, gains.noise_covariance(observation, correlation))


def test_the_level_that_a_sampler_stops_at_is_run():
    for count in range(2, 20):
        assert Posterior.create(2.0, 0.05, count, stop_sigma=0.05).calls == count
        assert Posterior.create(2.0, 0.05, count, stop_sigma=0.051).calls == count - 1


def test_mistakes_are_named(gaussian, observation):
    for options in (
        {"correction": "magic"},
        {"eta": 1.5},
        {"second_order": True},
        {"dps_step": 0.0},
        {"cg_steps": 0},
        {"stop_sigma": 9.0},
        {"sigma_min": 5.0},
        {"sigma_max": math.inf},
        {"sigma_max": math.nan},
        {"sigma_max": "3.4"},
        {"sigma_min": None},
        {"count": 2.5},
        {"count": 1},
        {"count": math.nan},
        {"dps_step": math.inf},
        {"dps_step": math.nan},
        {"eta": "1"},
        {"cg_steps": math.inf},
        {"stop_sigma": "0"},
    ):
        # Each message says which it was.
        named = "levels" if "count" in options else next(iter(options)).split("_")[0]
        with pytest.raises(InputError, match=named):
            Posterior.create(**({"sigma_max": 3.4} | options))
    hyper = Posterior.create(3.4)
    with pytest.raises(InputError, match="needs an observation"):
        evidence_for(hyper, gaussian.ocean)
    with pytest.raises(InputError, match="needs a Gaussian"):
        evidence_for(hyper, gaussian.ocean, observation)
    with pytest.raises(InputError, match="needs a mixture of regimes"):
        evidence_for(Posterior.create(3.4, correction="regimes"), gaussian.ocean, observation, gaussian)
    with pytest.raises(InputError, match="another grid or coast"):
        evidence_for(hyper, jnp.ones((*SHAPE, 1)), observation, gaussian)
    with pytest.raises(InputError, match="another grid, or not padded"):
        evidence_for(hyper, gaussian.ocean, observation.replace(cells=observation.cells + 200), gaussian)
    with pytest.raises(InputError, match="positive"):
        gains.kalman_gains(gaussian, observation, np.zeros(1))
    with pytest.raises(InputError, match="correlation"):
        evidence_for(hyper, gaussian.ocean, observation, gaussian, 1.0)
    evidence = evidence_for(hyper, gaussian.ocean, observation, gaussian)
    with pytest.raises(InputError, match="16 levels"):
        posterior(jax.random.key(0), gaussian, evidence, Posterior.create(3.4, count=8), gaussian.mean)
    with pytest.raises(InputError, match="member"):
        antithetic(jax.random.key(0), 0)
