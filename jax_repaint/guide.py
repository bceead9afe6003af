"""Corrections of the x0 estimate: from E[x0 | x] to E[x0 | x, y] for observations y = A x0 + e, e ~ N(0, R).

x = x0 + sigma n in standardised units, one field. By Bayes' rule and Tweedie's formula

    E[x0 | x, y] = x0 + sigma^2 grad_x log p(y | x),    p(y | x) ~= N(y; A x0, S),    S = A V A^T + R

so that a correction is a choice of V ~= Cov[x0 | x], and of sigma^2 J^T, J = dx0/dx, or V itself in front of A^T:

    paste      V = c I, R -> 0             observed cells take their values
    kalman     V = C_t                     x0 + C_t A^T S^-1 (y - A x0)              no gradient
    regimes    V = C_t of each regime of a mixture, weighted by p(regime | x, y)      no gradient
    cov_pigdm  V = C_t                     x0 + sigma^2 J^T A^T S^-1 (y - A x0)
    pigdm      V = sigma^2 / (1 + sigma^2) I, otherwise cov_pigdm
    mmps       V = sigma^2 J               the same, S^-1 by conjugate gradients
    dps        a step of constant length along the gradient of |y - A x0|
    given      none: the denoiser itself has been given y (conditional.py)

C_t = (Sigma^-1 + I / sigma^2)^-1 is exact for a Gaussian prior. For Sigma = sum lambda_i e_i e_i^T + rest (I - E E^T)
it has the same directions and c = v sigma^2 / (v + sigma^2) for each variance v. Every correction is called as
`correction(denoise, x, sigma, sigma_next, evidence)` with `denoise` the denoiser at sigma; vmap outside.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from flax import struct
from scipy import sparse

from jax_repaint import memory
from jax_repaint.array_types import Array, Field, Float, Key, Level, Scalar, Values
from jax_repaint.denoise import PrincipalGaussian, Regimes
from jax_repaint.errors import InputError
from jax_repaint.observe import BUCKETS, CORNERS, Observation

# Rounded factors (TPU, TF32) would leave more misfit at the observations than their noise.
HIGHEST = jax.lax.Precision.HIGHEST


@struct.dataclass
class Gain:
    """C_t A^T S^-1 in two thin factors, c_rest A^T inverse + sum_i e_i along_i; a leading axis runs over levels.

    Attributes:
      inverse: (m, c, m, c), S^-1.
      along: (r, m, c), (c_i - c_rest) e_i^T A^T S^-1. Kept beside `inverse` because in float32 the product of its
        factors would lose what S^-1 (up to 1 / sigma_obs^2) magnifies.
    """

    inverse: Float[Array, "*n m c m c"]
    along: Float[Array, "*n r m c"]


@struct.dataclass
class Evidence:
    """What is known of one field beside the denoiser.

    Attributes:
      ocean: (y, x, 1), 1 on ocean.
      observation: y and A; None for samples of the prior.
      noise: (m, c, c), R of each position; errors of different positions are independent.
      gaussian: the prior of `gain`.
      gain: of every level of the sampler, or of one level where a correction sees it.
      regimes: of the correction `regimes`, whose gains have an axis K more (after that of the levels).
    """

    ocean: Float[Array, "y x 1"]
    observation: Observation | None = None
    noise: Float[Array, "m c c"] | None = None
    gaussian: PrincipalGaussian | None = None
    gain: Gain | None = None
    regimes: Regimes | None = None

    def misfit(self, x0: Field) -> Values:
        """y - A x0; 0 on padded rows."""
        return jnp.where(self.observation.valid[:, None], self.observation.values - self.observation.apply(x0), 0.0)

    def spread(self, values: Values) -> Field:
        """A^T v."""
        return self.ocean * self.observation.adjoint(values, self.ocean.shape[:2])


Denoise = Callable[[Field], Field]
Correction = Callable[[Denoise, Field, Level, Level, Evidence], Field]


def noise_covariance(observation: Observation, correlation: float | np.ndarray = 0.0) -> Float[Array, "m c c"]:
    """R of each position, R_cd = sigma_c sigma_d (1 if c = d else correlation).

    Args:
      correlation: of the errors of u and v, scalar or (m,), in (-1, 1).

    Raises:
      InputError: a correlation outside (-1, 1), or not one a row.
    """
    correlation = np.asarray(correlation, np.float32)
    if not (np.abs(correlation) < 1).all():
        raise InputError(f"correlation of the errors of u and v must be in (-1, 1), got {correlation}")
    if correlation.shape not in ((), (observation.size,)):
        raise InputError(f"correlation must be one number or one a row ({observation.size}), got {correlation.shape}")
    rows = jnp.asarray(np.broadcast_to(correlation, (observation.size,)))[:, None, None]
    same = jnp.eye(observation.sigma.shape[-1], dtype=jnp.float32)[None]
    return observation.sigma[:, :, None] * observation.sigma[:, None, :] * (rows + (1 - rows) * same)


def white(ocean: Float[Array, "y x 1"], components: int = 2) -> PrincipalGaussian:
    """The Gaussian of independent values of variance 1 on the ocean."""
    field = (*ocean.shape[:2], components)
    return PrincipalGaussian(
        jnp.zeros(field), jnp.zeros((0, *field)), jnp.zeros(0), jnp.ones(()), jnp.asarray(ocean, jnp.float32)
    )


def conditional_variance(variance: Array, sigma: Level) -> Array:
    """Variance of x0 given x in a direction of prior variance v: v sigma^2 / (v + sigma^2), and v at sigma = inf."""
    return variance / (1 + variance / sigma**2)


def kalman_gains(
    gaussian: PrincipalGaussian,
    observation: Observation,
    sigma: np.ndarray,
    correlation: float | np.ndarray = 0.0,
) -> Gain:
    """Gains of one pattern at every level, to be made once, outside of jit and vmap.

    S = c_rest A A^T + sum_i (c_i - c_rest) (A e_i) (A e_i)^T + R is solved on the host in float64: with precise
    observations its condition number is beyond float32. The same gains serve every frame with this pattern; they take
    (2m + r) 2m numbers a level, where C_t A^T S^-1 itself would take 2m a value of the field.

    Args:
      gaussian: prior in the units of the observation.
      observation: the pattern; its values are not used.
      sigma: (n,) levels; inf gives the gain of the linear analysis itself.
      correlation: see `noise_covariance`.

    Returns:
      Gain with leading axis n, float32.

    Raises:
      InputError: a level is not positive, or memory does not hold that many observations.
    """
    gain = exact_gains(gaussian, observation, sigma, correlation)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), gain)


def exact_gains(
    gaussian: PrincipalGaussian, observation: Observation, sigma: np.ndarray, correlation: float | np.ndarray = 0.0
) -> Gain:
    """`kalman_gains` in float64, on the host.

    Rows that see the same cells precisely have an S^-1 whose large entries cancel in A^T S^-1, beyond float32.
    """
    sigma = np.atleast_1d(np.asarray(sigma, np.float64))
    _check_memory(observation, gaussian, len(sigma))
    variance, rest, noise = (
        np.asarray(a, np.float64)
        for a in (gaussian.variance, gaussian.rest, noise_covariance(observation, correlation))
    )
    if not (sigma > 0).all():
        raise InputError(f"noise levels must be positive, got {sigma.min()}")
    rows, components = observation.size, noise.shape[-1]
    size = rows * components
    seen, leading = seen_by(gaussian, observation)
    leading = leading.reshape(size, variance.size)
    same = np.eye(components)
    overlap = np.einsum("mn,cd->mcnd", (seen @ seen.T).toarray(), same).reshape(size, size)
    errors = np.einsum("mn,mcd->mcnd", np.eye(rows), noise).reshape(size, size)

    inverses, alongs = [], []
    for level in sigma:
        left = conditional_variance(rest, level)
        excess = conditional_variance(variance, level) - left
        s = left * overlap + (leading * excess) @ leading.T + errors
        inverse = scipy.linalg.cho_solve(scipy.linalg.cho_factor(s, lower=True), np.eye(size))
        inverses.append(inverse.reshape(rows, components, rows, components))
        alongs.append((excess[:, None] * (leading.T @ inverse)).reshape(variance.size, rows, components))
    return Gain(np.stack(inverses), np.stack(alongs))


def seen_by(
    gaussian: PrincipalGaussian, observation: Observation
) -> tuple[sparse.csr_array, Float[np.ndarray, "m c r"]]:
    """A of one component without corners on land (m, y x), and A e_i of every direction; float64."""
    cells, direction = np.asarray(observation.cells), np.asarray(gaussian.direction)
    rank, *grid, components = direction.shape
    weights = np.asarray(observation.weights, np.float64) * np.asarray(gaussian.ocean).reshape(-1)[cells]
    starts = cells.shape[1] * np.arange(len(cells) + 1)
    size = math.prod(grid)
    seen = sparse.csr_array((weights.reshape(-1), cells.reshape(-1), starts), shape=(len(cells), size))
    # Four values a row and direction: as a product with A every cell of every direction would be cast and read.
    corners = direction.reshape(rank, size, components)[:, cells]
    return seen, np.einsum("mk,rmkc->mcr", weights, corners)


def _check_memory(observation: Observation, gaussian: PrincipalGaussian, levels: int) -> None:
    """Before the work: whether the gains fit into half of what memory is free."""
    components, rank = gaussian.direction.shape[-1], gaussian.variance.size
    free = memory.available() / 2

    def needed(rows: int) -> int:
        size = rows * components
        # Gains of every level in float32, the float64 matrices of one, and the corners of every direction in float32.
        return size * (4 * levels * (size + rank) + 8 * (6 * size + 2 * rank) + 4 * CORNERS * rank)

    if needed(observation.size) > free:
        fit = next((rows for rows in reversed(BUCKETS) if needed(rows) <= free), 0)
        raise InputError(
            f"{observation.size} observed positions at {levels} noise levels need "
            f"{needed(observation.size) / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free; {fit} fit: "
            "thin the observations out, or ask for fewer levels"
        )


def kalman_gain(
    gaussian: PrincipalGaussian, observation: Observation, noise: Float[Array, "m c c"], sigma: Level
) -> Gain:
    """The gain of one level inside of jit, in float32: for patterns that change from call to call.

    S = K + B B^T = T^T T,   K = c_rest A A^T + R = L L^T,   B = A E (c - c_rest)^(1/2),   T of the QR of (L^T; B^T)

    S itself is never formed, so that the condition number that counts is the root of its own: on the Ram Head twin the
    analysis differs by less than 1e-4 standard deviations from that of `kalman_gains`.

    Args:
      gaussian: prior in the units of the observation.
      observation: the pattern; its values are not used.
      noise: R of each position (noise_covariance).
      sigma: level; inf for the linear analysis.
    """
    rows, components = observation.size, gaussian.direction.shape[-1]
    size = rows * components
    left = conditional_variance(gaussian.rest, sigma)
    excess = conditional_variance(gaussian.variance, sigma) - left
    wet = _on_ocean(gaussian, observation)
    same = jnp.eye(components, dtype=noise.dtype)
    base = left * jnp.einsum("mn,cd->mcnd", _overlap(wet), same).reshape(size, size)
    base = base + jnp.einsum("mn,mcd->mcnd", jnp.eye(rows, dtype=noise.dtype), noise).reshape(size, size)
    leading = jax.vmap(wet.apply)(gaussian.direction).reshape(-1, size)
    tall = jnp.concatenate([jnp.linalg.cholesky(base).T, jnp.sqrt(jnp.maximum(excess, 0.0))[:, None] * leading])
    root = jnp.linalg.qr(tall, mode="r")

    def solve(right: Array) -> Array:
        half = jax.scipy.linalg.solve_triangular(root, right, trans="T")
        return jax.scipy.linalg.solve_triangular(root, half)

    inverse = solve(jnp.eye(size, dtype=root.dtype))
    along = excess[:, None] * solve(leading.T).T
    return Gain(inverse.reshape(rows, components, rows, components), along.reshape(-1, rows, components))


def remaining_variance(gaussian: PrincipalGaussian, observation: Observation, gain: Gain, sigma: Level) -> Level:
    """Mean square error per ocean value of the Gaussian estimate given x at `sigma` and y.

    tr(C_t - C_t A^T S^-1 A C_t) / n
    tr(S^-1 A C_t^2 A^T) = c_rest^2 tr(S^-1 A A^T) + sum_i (c_i + c_rest) <along_i, A e_i>
    """
    count = gaussian.direction.shape[-1] * gaussian.ocean.sum()
    left = conditional_variance(gaussian.rest, sigma)
    variance = conditional_variance(gaussian.variance, sigma)
    wet = _on_ocean(gaussian, observation)
    along = jnp.einsum("rmc,rmc->r", gain.along, jax.vmap(wet.apply)(gaussian.direction), precision=HIGHEST)
    scattered = left**2 * jnp.einsum("mcnc,mn->", gain.inverse, _overlap(wet), precision=HIGHEST)
    learnt = scattered + jnp.sum((variance + left) * along)
    # Where nearly everything is known rounding must not make it negative.
    return jnp.maximum(gaussian.residual_variance(sigma) - learnt / count, 1e-3 * left)


def _on_ocean(gaussian: PrincipalGaussian, observation: Observation) -> Observation:
    """The same positions, without their corners on land."""
    return observation.replace(weights=observation.weights * gaussian.ocean.reshape(-1)[observation.cells])


def _overlap(observation: Observation) -> Float[Array, "m m"]:
    """A A^T of one component."""
    cells, weights = observation.cells, observation.weights
    meet = (cells[:, :, None, None] == cells[None, None]).astype(weights.dtype)
    return jnp.einsum("mk,mknl,nl->mn", weights, meet, weights, precision=HIGHEST)


def prior_draw(gaussian: PrincipalGaussian, key: Key, draw: Callable[..., Array] = jax.random.normal) -> Field:
    """A draw of N(mean, Sigma), mean + Sigma^(1/2) n, zero on land apart from the mean; (y, x, c)."""
    n = gaussian.ocean * draw(key, gaussian.mean.shape, gaussian.mean.dtype)
    excess = (jnp.sqrt(gaussian.variance) - jnp.sqrt(gaussian.rest)) * gaussian.project(n)
    return gaussian.mean + jnp.sqrt(gaussian.rest) * n + gaussian.combine(excess)


def none(denoise: Denoise, x: Field, sigma: Level, sigma_next: Level, evidence: Evidence) -> Field:
    """x0 itself: samples of the prior that the denoiser has learnt."""
    return denoise(x)


def paste(denoise: Denoise, x: Field, sigma: Level, sigma_next: Level, evidence: Evidence) -> Field:
    """x0 with the values of the observed cells, A^+ y + (I - A^+ A) x0.

    Wang et al. 2023 ("Zero-Shot Image Restoration Using Denoising Diffusion Null-Space Model"), algorithm 1. Points
    between cells count for their heaviest cell; observation errors are not used.
    """
    observed, value = evidence.observation.on_grid(evidence.ocean.shape[:2])
    return jnp.where(observed[..., None], value, denoise(x))


def kalman(denoise: Denoise, x: Field, sigma: Level, sigma_next: Level, evidence: Evidence) -> Field:
    """x0 + C_t A^T (A C_t A^T + R)^-1 (y - A x0): the Kalman analysis of the estimate, exact for a Gaussian prior.

    The moment matching of Rozet et al. 2024 (see `mmps`) with the conditional covariance of the Gaussian prior in the
    place of the network's Jacobian; no gradients.
    """
    x0 = denoise(x)
    return x0 + _analyse(evidence.gaussian, evidence.gain, evidence.misfit(x0), sigma, evidence)


def regimes(denoise: Denoise, x: Field, sigma: Level, sigma_next: Level, evidence: Evidence) -> Field:
    """x0 + sum_k w_k C_k A^T S_k^-1 (y - A x0): Kalman analyses of a mixture, weighted by p(k | x, y).

    w_k ~ weight_k N(x; mean_k, Sigma_k + sigma^2 I) N(y; A x0_k, S_k),   x0_k = E[x0 | x, k]
    """
    x0 = denoise(x)
    mixture, misfit = evidence.regimes, evidence.misfit(x0)

    def one(gaussian: PrincipalGaussian, gain: Gain) -> tuple[Scalar, Field]:
        error = evidence.misfit(gaussian(x, sigma))
        inverse = gain.inverse.reshape((error.size, error.size))
        fit = -jnp.sum(error * _weigh(gain, error)) + jnp.linalg.slogdet(inverse)[1]
        added = _analyse(gaussian, gain, misfit, sigma, evidence)
        return gaussian.log_density(x, sigma) + 0.5 * fit, added

    likely, added = jax.vmap(one)(mixture.gaussian, evidence.gain)
    weight = jax.nn.softmax(jnp.log(mixture.weight) + likely)
    return x0 + jnp.einsum("k,kyxc->yxc", weight, added, precision=HIGHEST)


def _analyse(gaussian: PrincipalGaussian, gain: Gain, misfit: Values, sigma: Level, evidence: Evidence) -> Field:
    """C_t A^T S^-1 (y - A x0)."""
    along = jnp.einsum("rmc,mc->r", gain.along, misfit, precision=HIGHEST)
    return gaussian.combine(along) + conditional_variance(gaussian.rest, sigma) * evidence.spread(_weigh(gain, misfit))


def cov_pigdm(denoise: Denoise, x: Field, sigma: Level, sigma_next: Level, evidence: Evidence) -> Field:
    """x0 + sigma^2 J^T A^T (A C_t A^T + R)^-1 (y - A x0).

    Song et al. 2023 ("Pseudoinverse-Guided Diffusion Models for Inverse Problems"), with C_t in the place of their
    r_t^2 I, r_t^2 = sigma^2 / (1 + sigma^2). The gains of `white` have that very C_t: `pigdm`.
    """
    x0, pull = jax.vjp(denoise, x)
    return x0 + sigma**2 * pull(evidence.spread(_weigh(evidence.gain, evidence.misfit(x0))))[0]


def mmps(
    denoise: Denoise, x: Field, sigma: Level, sigma_next: Level, evidence: Evidence, *, cg_steps: int = 1
) -> Field:
    """x0 + sigma^2 J^T A^T v, (sigma^2 A J^T A^T + R) v = y - A x0, v by conjugate gradients from 0.

    Moment matching posterior sampling (Rozet et al. 2024, "Learning Diffusion Priors from Observations by Expectation
    Maximization"). The Jacobian of a network is not symmetric: more than 3 steps may make it worse.
    """
    x0, pull = jax.vjp(denoise, x)

    def covary(v: Values) -> Field:
        return sigma**2 * pull(evidence.spread(v))[0]

    def operator(v: Values) -> Values:
        return jnp.einsum("mcd,md->mc", evidence.noise, v, precision=HIGHEST) + evidence.observation.apply(covary(v))

    return x0 + covary(conjugate_gradients(operator, evidence.misfit(x0), cg_steps))


def dps(denoise: Denoise, x: Field, sigma: Level, sigma_next: Level, evidence: Evidence, *, step: Level = 0.3) -> Field:
    """x0 - step sqrt((1 + sigma^2)(1 + sigma'^2)) / (1 - sigma'^2 / sigma^2) grad_x |y - A x0(x)|.

    Under ancestral steps (eta = 1) to sigma' = `sigma_next` this moves the variance-preserving x_t by
    -step grad_{x_t} |y - A x0|, as Chung et al. 2023 ("Diffusion Posterior Sampling for General Noisy Inverse
    Problems", algorithm 1 with its normalised step). `step` is a length in standardised units (standard deviations
    of the field), taken once a level: it has to be tuned again for another number of levels. Implementations that
    differentiate the square and divide by the norm take twice the step.
    """
    x0, pull = jax.vjp(denoise, x)
    misfit = evidence.misfit(x0)
    length = jnp.sqrt(jnp.sum(misfit**2))
    downhill = pull(evidence.spread(misfit / jnp.maximum(length, jnp.finfo(x.dtype).tiny)))[0]
    scale = jnp.sqrt((1 + sigma**2) * (1 + sigma_next**2)) / (1 - (sigma_next / sigma) ** 2)
    return x0 + step * scale * downhill


CORRECTIONS: dict[str, Correction] = {
    "none": none,
    "paste": paste,
    "kalman": kalman,
    "regimes": regimes,
    "cov_pigdm": cov_pigdm,
    "pigdm": cov_pigdm,
    "mmps": mmps,
    "dps": dps,
    "given": none,
}


def conjugate_gradients(operator: Callable[[Array], Array], right: Array, steps: int) -> Array:
    """v after `steps` steps from 0 of operator(v) = right (Hestenes and Stiefel 1952, section 3).

    Stays where it is once the residual has reached rounding, or where a direction has no positive curvature (the
    Jacobian of a network is not a covariance).
    """
    enough = (jnp.finfo(right.dtype).eps ** 2) * jnp.sum(right**2)

    def step(state: tuple[Array, Array, Array], _: None) -> tuple[tuple[Array, Array, Array], None]:
        v, residual, direction = state
        image = operator(direction)
        square, curvature = jnp.sum(residual**2), jnp.sum(direction * image)
        usable = (curvature > 0) & (square > enough)
        length = jnp.where(usable, square / jnp.where(usable, curvature, 1.0), 0.0)
        left = residual - length * image
        turn = jnp.where(usable, jnp.sum(left**2) / jnp.where(usable, square, 1.0), 0.0)
        return (v + length * direction, left, left + turn * direction), None

    return jax.lax.scan(step, (jnp.zeros_like(right), right, right), length=steps)[0][0]


def _weigh(gain: Gain, misfit: Values) -> Values:
    """S^-1 (y - A x0)."""
    return jnp.einsum("mcnd,nd->mc", gain.inverse, misfit, precision=HIGHEST)
