"""Kalman gains of a pattern of observations under the conditional covariance of a Gaussian prior.

    x0 + C_t A^T S^-1 (y - A x0),   S = A C_t A^T + R,   C_t = (Sigma^-1 + I / sigma^2)^-1

For Sigma = sum lambda_i e_i e_i^T + rest (I - E E^T) C_t has the same directions and c = v sigma^2 / (v + sigma^2) for
each variance v; sigma = inf gives the analysis of the prior itself. Made on the host in float64 (`kalman_gains`), once
for all frames that share a pattern, or inside of jit for patterns that change from call to call (`kalman_gain`).
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from flax import struct
from scipy import sparse

from jax_repaint import memory
from jax_repaint.array_types import Array, Field, Float, Level, Values
from jax_repaint.denoise import PrincipalGaussian
from jax_repaint.errors import InputError
from jax_repaint.observe import BUCKETS, CORNERS, Observation

# Rounded factors (TPU, TF32) would leave more misfit at the observations than their noise.
HIGHEST = jax.lax.Precision.HIGHEST


@struct.dataclass
class Gain:
    """C_t A^T S^-1 in two thin factors, c_rest A^T S^-1 + sum_i e_i along_i; a leading axis runs over levels.

    Where no two rows see the same cell, K = c_rest A A^T + R has a block for each row, and by Woodbury's identity

        S^-1 = K^-1 (I - A E along)

    so that a pattern with more values than the prior has directions needs no matrix of its own size.

    Attributes:
      inverse: (m, c, m, c), S^-1; (m, c, c), K^-1, of a gain by blocks.
      along: (r, m, c), (c_i - c_rest) e_i^T A^T S^-1. Kept beside `inverse` because in float32 the product of its
        factors would lose what S^-1 (up to 1 / sigma_obs^2) magnifies.
      log_det: log det S.
      by_blocks: whether `inverse` is K^-1.
    """

    inverse: Float[Array, "*n m c m c"] | Float[Array, "*n m c c"]
    along: Float[Array, "*n r m c"]
    log_det: Float[Array, "*n"]
    by_blocks: bool = struct.field(pytree_node=False, default=False)


class Rows(NamedTuple):
    """What of a pattern changes the program of a sampler: how many rows it has, and the kind of its gains."""

    size: int
    by_blocks: bool


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


def conditional_variance(variance: Array, sigma: Level) -> Array:
    """Variance of x0 given x in a direction of prior variance v: v sigma^2 / (v + sigma^2), and v at sigma = inf."""
    return variance / (1 + variance / sigma**2)


def rows_of(gaussian: PrincipalGaussian, observation: Observation) -> Rows:
    """The rows of a pattern; its gains are by blocks where that is possible and takes less than S^-1."""
    more = observation.size * gaussian.mean.shape[-1] > gaussian.variance.size
    return Rows(observation.size, more and see_cells_of_their_own(_seen(gaussian, observation)))


def kalman_gains(
    gaussian: PrincipalGaussian,
    observation: Observation,
    sigma: np.ndarray,
    correlation: float | np.ndarray = 0.0,
) -> Gain:
    """Gains of one pattern at every level, to be made once, outside of jit and vmap.

    S = c_rest A A^T + sum_i (c_i - c_rest) (A e_i) (A e_i)^T + R is solved on the host in float64: with precise
    observations its condition number is beyond float32. The same gains serve every frame with this pattern; they take
    (2m + r) 2m numbers a level, by blocks (2 + r) 2m, where C_t A^T S^-1 itself would take 2m a value of the field.

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
    return _gains(gaussian, observation, sigma, correlation, np.float32)


def exact_gains(
    gaussian: PrincipalGaussian, observation: Observation, sigma: np.ndarray, correlation: float | np.ndarray = 0.0
) -> Gain:
    """`kalman_gains` in float64, on the host.

    Rows that see the same cells precisely have an S^-1 whose large entries cancel in A^T S^-1, beyond float32.
    """
    return _gains(gaussian, observation, sigma, correlation, np.float64)


def _gains(
    gaussian: PrincipalGaussian,
    observation: Observation,
    sigma: np.ndarray,
    correlation: float | np.ndarray,
    dtype: type[np.floating],
) -> Gain:
    """Solved in float64 whatever the `dtype` of what is returned: level by level, as one takes the most memory."""
    sigma = np.atleast_1d(np.asarray(sigma, np.float64))
    rows = rows_of(gaussian, observation)
    _check_memory(rows, gaussian, len(sigma))
    noise = np.asarray(noise_covariance(observation, correlation), np.float64)
    if not (sigma > 0).all():
        raise InputError(f"noise levels must be positive, got {sigma.min()}")
    levels_of = _levels_by_blocks if rows.by_blocks else _levels
    seen, leading = seen_by(gaussian, observation)
    levels = [[np.asarray(part, dtype) for part in level] for level in levels_of(gaussian, seen, leading, noise, sigma)]
    put = jnp.asarray if dtype is np.float32 else np.asarray
    return Gain(*(put(np.stack(part)) for part in zip(*levels, strict=True)), rows.by_blocks)


def _variances(gaussian: PrincipalGaussian, level: float) -> tuple[float, np.ndarray]:
    """c_rest and c_i - c_rest (r,) of a level, float64."""
    left = conditional_variance(float(gaussian.rest), level)
    return left, conditional_variance(np.asarray(gaussian.variance, np.float64), level) - left


def _levels(
    gaussian: PrincipalGaussian,
    seen: sparse.csr_array,
    leading: Float[np.ndarray, "m c r"],
    noise: Float[np.ndarray, "m c c"],
    sigma: np.ndarray,
) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
    """S^-1, `along` and log det S of every level from one Cholesky factor of S each."""
    rows, components, rank = leading.shape
    size = rows * components
    for level, factor in zip(sigma, factors(gaussian, seen, leading, noise, sigma), strict=True):
        inverse = scipy.linalg.cho_solve((factor, True), np.eye(size))
        along = _variances(gaussian, level)[1][:, None] * (leading.reshape(size, rank).T @ inverse)
        log_det = 2 * np.log(np.diag(factor)).sum()
        yield inverse.reshape(rows, components, rows, components), along.reshape(rank, rows, components), log_det


def factors(
    gaussian: PrincipalGaussian,
    seen: sparse.csr_array,
    leading: Float[np.ndarray, "m c r"],
    noise: Float[np.ndarray, "m c c"],
    sigma: np.ndarray,
) -> Iterator[Float[np.ndarray, "mc mc"]]:
    """Lower Cholesky factors of S, float64, of every level."""
    rows, components, rank = leading.shape
    size = rows * components
    leading = leading.reshape(size, rank)
    overlap = np.einsum("mn,cd->mcnd", (seen @ seen.T).toarray(), np.eye(components)).reshape(size, size)
    errors = np.einsum("mn,mcd->mcnd", np.eye(rows), noise).reshape(size, size)
    for level in sigma:
        left, excess = _variances(gaussian, level)
        yield scipy.linalg.cholesky(left * overlap + (leading * excess) @ leading.T + errors, lower=True)


def _levels_by_blocks(
    gaussian: PrincipalGaussian,
    seen: sparse.csr_array,
    leading: Float[np.ndarray, "m c r"],
    noise: Float[np.ndarray, "m c c"],
    sigma: np.ndarray,
) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
    """K^-1, `along` and log det S of every level."""
    gram = None
    if alike(seen, noise):
        flat = _flat(leading)
        gram = flat.T @ flat
    for level in sigma:
        blocks = Blocks.of(gaussian, seen, leading, noise, level, gram)
        yield blocks.inverse, blocks.along(), blocks.log_det()


class Blocks(NamedTuple):
    """The matrices of Woodbury's identity for one level, float64.

    With B = A E and D = diag(c_i - c_rest),   along = (D^-1 + B^T K^-1 B)^-1 B^T K^-1 = D^(1/2) M^-1 D^(1/2) B^T K^-1

    Attributes:
      inverse: (m, c, c), K^-1.
      weighed: (m, c, r), K^-1 B.
      root: (r,), of D.
      factor: (r, r), lower Cholesky factor of M = I + D^(1/2) B^T K^-1 B D^(1/2).
    """

    inverse: np.ndarray
    weighed: np.ndarray
    root: np.ndarray
    factor: np.ndarray

    @classmethod
    def of(
        cls,
        gaussian: PrincipalGaussian,
        seen: sparse.csr_array,
        leading: Float[np.ndarray, "m c r"],
        noise: Float[np.ndarray, "m c c"],
        level: float,
        gram: Float[np.ndarray, "r r"] | None = None,
    ) -> "Blocks":
        """From `seen_by` of rows that see cells of their own, and R of each row.

        `gram` is B^T B, which serves all levels where K is one number (`alike`).
        """
        left, excess = _variances(gaussian, level)
        share = own_share(seen)
        inverse = np.linalg.inv(left * share[:, None, None] * np.eye(noise.shape[-1]) + noise)
        root = np.sqrt(np.maximum(excess, 0.0))
        if gram is None:
            weighed = inverse @ leading
            inner = _flat(leading).T @ _flat(weighed)
        else:
            scale = inverse[share.argmax(), 0, 0]
            weighed, inner = scale * leading, scale * gram
        factor = scipy.linalg.cholesky(np.eye(root.size) + root[:, None] * inner * root, lower=True)
        return cls(inverse, weighed, root, factor)

    def along(self) -> Float[np.ndarray, "r m c"]:
        """(c_i - c_rest) e_i^T A^T S^-1."""
        rows, components, rank = self.weighed.shape
        # One product of all rows: solving for each of them takes twice the time.
        inverse = scipy.linalg.cho_solve((self.factor, True), np.eye(rank))
        along = (self.root[:, None] * inverse * self.root) @ _flat(self.weighed).T
        return along.reshape(rank, rows, components)

    def log_det(self) -> float:
        """log det S = log det K + log det M."""
        return float(2 * np.log(np.diag(self.factor)).sum() - np.linalg.slogdet(self.inverse)[1].sum())

    def gain(self) -> Gain:
        """In float32."""
        return Gain(*(jnp.asarray(part, jnp.float32) for part in (self.inverse, self.along(), self.log_det())), True)


def seen_by(
    gaussian: PrincipalGaussian, observation: Observation
) -> tuple[sparse.csr_array, Float[np.ndarray, "m c r"]]:
    """A of one component without corners on land (m, y x), and A e_i of every direction; float64."""
    cells, direction = np.asarray(observation.cells), np.asarray(gaussian.direction)
    rank, *grid, components = direction.shape
    # Four values a row and direction: as a product with A every cell of every direction would be cast and read.
    corners = direction.reshape(rank, math.prod(grid), components)[:, cells]
    return _seen(gaussian, observation), np.einsum("mk,rmkc->mcr", _wet_weights(gaussian, observation), corners)


def _wet_weights(gaussian: PrincipalGaussian, observation: Observation) -> Float[np.ndarray, "m k"]:
    """Weights without those of corners on land, float64."""
    ocean = np.asarray(gaussian.ocean).reshape(-1)
    return np.asarray(observation.weights, np.float64) * ocean[np.asarray(observation.cells)]


def _seen(gaussian: PrincipalGaussian, observation: Observation) -> sparse.csr_array:
    """A of one component without corners on land (m, y x); a cell that two corners of a row share counts once."""
    cells, weights = np.asarray(observation.cells), _wet_weights(gaussian, observation)
    starts = cells.shape[1] * np.arange(len(cells) + 1)
    seen = sparse.csr_array(
        (weights.reshape(-1), cells.reshape(-1).copy(), starts), shape=(len(cells), gaussian.ocean.size)
    )
    seen.sum_duplicates()
    return seen


def _flat(leading: Float[np.ndarray, "m c r"]) -> Float[np.ndarray, "mc r"]:
    rows, components, rank = leading.shape
    return leading.reshape(rows * components, rank)


def own_share(seen: sparse.csr_array) -> Float[np.ndarray, " m"]:
    """The diagonal of A A^T of one component."""
    return np.asarray(seen.multiply(seen).sum(1)).reshape(-1)


def alike(seen: sparse.csr_array, noise: Float[np.ndarray, "m c c"]) -> bool:
    """Whether K of rows that see cells of their own is one number times the identity at every level.

    Rows that see nothing, as padded ones, do not count: their B is 0.
    """
    share = own_share(seen)
    used, first = share > 0, share.argmax()
    same = noise[used] == noise[first, 0, 0] * np.eye(noise.shape[-1])
    return bool((share[used] == share[first]).all() and same.all())


def see_cells_of_their_own(seen: sparse.csr_array) -> bool:
    """Whether no two rows see the same cell."""
    return bool(np.bincount(seen.indices[seen.data != 0], minlength=1).max() <= 1)


def _check_memory(rows: Rows, gaussian: PrincipalGaussian, levels: int) -> None:
    """Before the work: whether the gains fit into half of what memory is free."""
    components, rank = gaussian.direction.shape[-1], gaussian.variance.size
    free = memory.available() / 2

    def needed(count: int) -> int:
        size = count * components
        # Gains of every level in float32, the float64 matrices of one, and the corners of every direction in float32.
        # By blocks other levels are stacked beside one of `size` times `rank`.
        across = components if rows.by_blocks else size
        return size * (4 * levels * (across + rank) + 8 * (6 * across + 4 * rank) + 4 * CORNERS * rank)

    if needed(rows.size) > free:
        fit = int(free / needed(1)) if rows.by_blocks else next((n for n in reversed(BUCKETS) if needed(n) <= free), 0)
        raise InputError(
            f"{rows.size} observed positions at {levels} noise levels need "
            f"{needed(rows.size) / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free; {fit} fit: "
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
    log_det = 2 * jnp.log(jnp.abs(jnp.diagonal(root))).sum()
    return Gain(inverse.reshape(rows, components, rows, components), along.reshape(-1, rows, components), log_det)


def remaining_variance(gaussian: PrincipalGaussian, observation: Observation, gain: Gain, sigma: Level) -> Level:
    """Mean square error per ocean value of the Gaussian estimate given x at `sigma` and y.

    tr(C_t - C_t A^T S^-1 A C_t) / n
    tr(S^-1 A C_t^2 A^T) = c_rest^2 tr(S^-1 A A^T) + sum_i (c_i + c_rest) <along_i, A e_i>
    """
    count = gaussian.direction.shape[-1] * gaussian.ocean.sum()
    left = conditional_variance(gaussian.rest, sigma)
    variance = conditional_variance(gaussian.variance, sigma)
    wet = _on_ocean(gaussian, observation)
    leading = jax.vmap(wet.apply)(gaussian.direction)
    along = jnp.einsum("rmc,rmc->r", gain.along, leading, precision=HIGHEST)
    if gain.by_blocks:
        own = gain.inverse - jnp.einsum("mcd,rmd,rme->mce", gain.inverse, leading, gain.along, precision=HIGHEST)
        scattered = left**2 * jnp.einsum("mcc,m->", own, _own_overlap(wet), precision=HIGHEST)
    else:
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


def _own_overlap(observation: Observation) -> Float[Array, " m"]:
    """The diagonal of A A^T."""
    cells, weights = observation.cells, observation.weights
    meet = (cells[:, :, None] == cells[:, None, :]).astype(weights.dtype)
    return jnp.einsum("mk,mkl,ml->m", weights, meet, weights, precision=HIGHEST)


def increment(gaussian: PrincipalGaussian, observation: Observation, gain: Gain, misfit: Values, sigma: Level) -> Field:
    """C_t A^T S^-1 misfit.

    Args:
      gaussian, observation: of the gain.
      misfit: (m, c), y - A x0; 0 on padded rows.
      sigma: level of the gain.
    """
    leading = _leading(gaussian, gain, misfit)
    weighed = _weigh(observation, gain, misfit, leading)
    scattered = gaussian.ocean * observation.adjoint(weighed, gaussian.ocean.shape[:2])
    return leading + conditional_variance(gaussian.rest, sigma) * scattered


def weigh(gaussian: PrincipalGaussian, observation: Observation, gain: Gain, misfit: Values) -> Values:
    """S^-1 misfit; arguments as of `increment`."""
    return _weigh(observation, gain, misfit, _leading(gaussian, gain, misfit))


def _leading(gaussian: PrincipalGaussian, gain: Gain, misfit: Values) -> Field:
    """E along misfit, the part of the increment along the directions of the prior."""
    return gaussian.combine(jnp.einsum("rmc,mc->r", gain.along, misfit, precision=HIGHEST))


def _weigh(observation: Observation, gain: Gain, misfit: Values, leading: Field) -> Values:
    """S^-1 misfit; by blocks, of what the leading part leaves."""
    if gain.by_blocks:
        left = misfit - observation.apply(leading)
        return jnp.einsum("mcd,md->mc", gain.inverse, left, precision=HIGHEST)
    return jnp.einsum("mcnd,nd->mc", gain.inverse, misfit, precision=HIGHEST)
