"""The best linear estimate: the mean and covariance of training fields as a Gaussian prior.

    Sigma = sum_i lambda_i e_i e_i^T + rest (I - E E^T)       principal directions (EOFs) e_i, one variance for the rest

which is probabilistic principal component analysis (Tipping and Bishop 1999, "Probabilistic Principal Component
Analysis", eq. 8). The number of directions and the size of the rest decide how far it trusts the sample covariance;
`select` chooses both on validation frames. Few or unsteady frames say little of a covariance; then a share of a fitted
kernel is blended in, as hybrid data assimilation does (Hamill and Snyder 2000, "A hybrid ensemble Kalman filter - 3D
variational analysis scheme", eq. 4).
"""

import dataclasses
import itertools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import scipy.linalg

from jax_repaint import gains, guide, memory
from jax_repaint.checks import whole_number
from jax_repaint.denoise import PrincipalGaussian
from jax_repaint.errors import InputError
from jax_repaint.observe import Observation
from jax_repaint.prior.analysis import Analysis, DenseAnalysis, PrincipalAnalysis

OVERSAMPLING = 32
POWER_PASSES = 3
RANKS = (8, 16, 32, 64, 128, 256, 384, 512, 768, 1024)
RESTS = (0.3, 1.0, 3.0)
MOST_WITH_GAPS = 64  # directions of an EM, whose matrices grow with the square: what fills gaps is of large scale
PRIOR_FRAMES = 1.0  # frames at zero that EM adds to those of each cell
FRAMES = 200  # of one pattern that are analysed at a time
CONVERGED = 1e-4  # change by an iteration of EM, of the largest variance


@dataclasses.dataclass(frozen=True)
class Choice:
    """What `select` found: number of directions, factor on the variance left out, mean square error by that.

    `share` is that of the training covariance in a blend with a kernel.
    """

    rank: int
    rest: float
    error: float
    share: float = 1.0


def fit(
    x: np.ndarray,
    ocean: np.ndarray,
    rank: int,
    seed: int = 0,
    *,
    share: float = 1.0,
    kernel_root: np.ndarray | None = None,
) -> PrincipalGaussian:
    """Mean, leading EOFs and remaining variance of training fields.

    Sigma = share X^T X / n + (1 - share) R R^T,   X the anomalies (n, values on ocean), R a root of a covariance

    lambda_i are the squared singular values of the rows of both parts together, found from a random sketch with power
    passes (Halko, Martinsson and Tropp 2011, "Finding structure with randomness", algorithms 4.4 and 5.1).

    Args:
      x: (n, y, x, c) standardised fields, zero on land.
      ocean: (y, x) bool.
      rank: directions to keep; fewer if there are fewer rows or values.
      share: of the training covariance, 0..1; 1 without a kernel.
      kernel_root: R (values, values), standardised, component fastest.

    Raises:
      InputError: fewer than two frames, no direction, a share outside [0, 1] or below 1 without a kernel.
    """
    n = len(x)
    if n < 2:
        raise InputError(f"a covariance needs at least two frames, got {n}")
    rank = whole_number("rank", rank, 1)
    if not 0 <= share <= 1 or (share < 1 and kernel_root is None):
        raise InputError(f"the share of the training covariance is 1, or in [0, 1] beside a kernel; got {share}")
    values = np.asarray(x, np.float32)[:, ocean].reshape(n, -1)
    mean = values.mean(0, dtype=np.float64).astype(np.float32)
    rows = (values - mean) * np.float32(np.sqrt(share / n))
    size = rows.shape[1]
    most = n - 1
    if share < 1:
        rows = np.concatenate([rows, np.sqrt(np.float32(1 - share)) * kernel_root.T])
        most = len(rows)
    rank = min(rank, most, size - 1)
    sketch = min(rank + OVERSAMPLING, len(rows), size)
    basis = np.random.default_rng(seed).standard_normal((size, sketch), np.float32)
    for _ in range(POWER_PASSES + 1):
        basis, _ = np.linalg.qr(rows.T @ (rows @ basis))
    _, singular, turn = np.linalg.svd(rows @ basis, full_matrices=False)
    variance = singular[:rank].astype(np.float64) ** 2
    total = float(np.einsum("nv,nv->", rows, rows, dtype=np.float64))
    # Fields with fewer degrees of freedom than directions leave nothing; a noise floor keeps Sigma invertible.
    rest = max((total - variance.sum()) / (size - rank), 1e-6 * total / size)
    return _gaussian(ocean, mean, turn[:rank] @ basis.T, variance, rest)


def _gaussian(
    ocean: np.ndarray, mean: np.ndarray, direction: np.ndarray, variance: np.ndarray, rest: float
) -> PrincipalGaussian:
    """From mean (values,) and directions (rank, values) on ocean, component fastest."""
    rank, components = len(direction), mean.size // int(ocean.sum())
    directions = np.zeros((rank, *ocean.shape, components), np.float32)
    directions[:, ocean] = direction.reshape(rank, -1, components)
    field = np.zeros((*ocean.shape, components), np.float32)
    field[ocean] = mean.reshape(-1, components)
    return PrincipalGaussian(
        jnp.asarray(field),
        jnp.asarray(directions),
        jnp.asarray(np.maximum(variance, rest), jnp.float32),
        jnp.asarray(rest, jnp.float32),
        jnp.asarray(ocean[..., None], jnp.float32),
    )


def fit_with_gaps(
    x: np.ndarray, present: np.ndarray, ocean: np.ndarray, rank: int, iterations: int = 100
) -> PrincipalGaussian:
    """Mean, leading directions and remaining variance that make the present values likeliest, by EM.

    x = mean + W z + sqrt(rest) n,   z, n ~ N(0, I),   Sigma = W W^T + rest I

    E   of each frame, from its present cells p:   M = W_p^T W_p + rest I,   <z> = M^-1 W_p^T (x_p - mean_p),
        <z z^T> = rest M^-1 + <z> <z>^T
    M   of each cell, from the frames in which it is present:   [W mean] = sum x <[z 1]> (sum <[z 1] [z 1]^T> + I)^-1,
        rest = mean square of x - [W mean] [z 1] as expected
    X   z as expected gets mean 0 and covariance I again, by W <- W Cov[z]^(1/2), mean <- mean + W <z>

    The I is a frame that stays at zero, so that cells which are hardly ever present keep to the mean of all. Without X
    the scale of W would take hundreds of iterations where rest is small.

    Source: Tipping and Bishop 1999, appendix B; with gaps, Ilin and Raiko 2010, "Practical approaches to principal
    component analysis in the presence of missing values", section 3; X is the parameter expansion of Liu, Rubin and Wu
    1998, "Parameter expansion to accelerate EM: the PX-EM algorithm".

    Args:
      x: (n, y, x, c) standardised fields, zero on land; what gaps hold does not matter.
      present: (n, y, x) bool.
      ocean: (y, x) bool.
      rank: directions; fewer if there are fewer frames than four for each, as more would fit the gaps' neighbours.

    Raises:
      InputError: fewer than two frames, or one without any value.
    """
    seen = np.asarray(present)[:, ocean]
    if not seen.any(1).all():
        raise InputError(f"frame {int(seen.any(1).argmin())} has no value on ocean cells")
    n, cells = seen.shape
    values = np.where(seen[..., None], np.asarray(x)[:, ocean], 0).astype(np.float64)
    seen, components = seen.astype(np.float64), values.shape[-1]
    rank = min(rank, MOST_WITH_GAPS, max(n // 4, 1))
    mean = values.sum(0) / (seen.sum(0) + PRIOR_FRAMES)[:, None]
    start = np.zeros(x.shape, np.float32)
    start[:, ocean] = np.where(seen[..., None] > 0, values, mean)
    first = fit(start, ocean, rank)
    root, rest = _root(first), float(first.rest)
    rank = len(root)  # a small ocean has fewer
    loading = np.concatenate([root[:, ocean], mean[None]]).transpose(1, 0, 2)  # (cells, rank + 1, c)
    variance = np.zeros_like(mean)
    for _ in range(iterations):
        moments, z = _expect(values, seen, loading, rest)
        right = (z.T @ values.reshape(n, -1)).reshape(-1, cells, components).transpose(1, 0, 2)
        loading = np.concatenate([_solve(seen[:, part], moments, right[part]) for part in _chunks(cells)])
        explained = np.sum(loading * right) + PRIOR_FRAMES * np.sum(loading**2)
        rest = float(np.sum(values**2) - explained) / (components * seen.sum())
        rest = max(rest, 1e-6 * float(np.mean(loading[:, :-1] ** 2)) * rank)
        expected = moments.mean(0)
        turn = np.eye(rank + 1)
        turn[-1, :-1] = expected[-1, :-1]
        turn[:-1, :-1] = np.linalg.cholesky(expected[:-1, :-1] - np.outer(turn[-1, :-1], turn[-1, :-1])).T
        loading = turn @ loading
        # W itself may go on turning, which changes nothing.
        variance, before = np.sum(loading[:, :-1] ** 2, 1) + rest, variance
        if np.abs(variance - before).max() < CONVERGED * variance.max():
            break
    flat = loading[:, :-1].transpose(0, 2, 1).reshape(-1, loading.shape[1] - 1)
    direction, singular, _ = np.linalg.svd(flat, full_matrices=False)
    return _gaussian(ocean, loading[:, -1].reshape(-1), direction.T, singular**2 + rest, rest)


def _root(gaussian: PrincipalGaussian) -> np.ndarray:
    """W (rank, y, x, c) of Sigma = W^T W + rest I, float64."""
    excess = np.asarray(gaussian.variance, np.float64) - float(gaussian.rest)
    return np.sqrt(np.maximum(excess, 0))[:, None, None, None] * np.asarray(gaussian.direction, np.float64)


def _chunks(cells: int) -> list[slice]:
    """Parts that keep one matrix a cell within memory."""
    return [slice(begin, begin + 1024) for begin in range(0, cells, 1024)]


def _expect(values: np.ndarray, seen: np.ndarray, loading: np.ndarray, rest: float) -> tuple[np.ndarray, np.ndarray]:
    """<[z 1] [z 1]^T> (n, k, k) and <[z 1]> (n, k) of every frame."""
    n, rank = len(values), loading.shape[1] - 1
    precision = np.zeros((n, rank * rank))
    for part in _chunks(loading.shape[0]):
        w = loading[part, :-1]
        precision += seen[:, part] @ np.einsum("dkc,dlc->dkl", w, w).reshape(-1, rank * rank)
    covariance = np.linalg.inv(precision.reshape(n, rank, rank) + rest * np.eye(rank))
    misfit = seen[..., None] * (values - loading[:, -1])
    z = np.einsum("nkl,nl->nk", covariance, np.tensordot(misfit, loading[:, :-1], ([1, 2], [0, 2])))
    z = np.concatenate([z, np.ones((n, 1))], 1)
    moments = z[:, :, None] * z[:, None]
    moments[:, :-1, :-1] += rest * covariance
    return moments, z


def _solve(seen: np.ndarray, moments: np.ndarray, right: np.ndarray) -> np.ndarray:
    """[W mean] (cells, k, c) of cells that are present in the frames where `seen` (n, cells) is 1."""
    k = moments.shape[-1]
    total = (seen.T @ moments.reshape(-1, k * k)).reshape(-1, k, k)
    return np.linalg.solve(total + PRIOR_FRAMES * np.eye(k), right)


def fill(
    gaussian: PrincipalGaussian,
    x: np.ndarray,
    present: np.ndarray,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
) -> np.ndarray:
    """The same fields with a draw of the prior given the present cells in their gaps, (n, y, x, c) float32.

    x_m = mean_m + W_m z + sqrt(rest) n,   z ~ N(M^-1 W_p^T (x_p - mean_p), rest M^-1),   M = W_p^T W_p + rest I

    Args:
      gaussian: prior.
      x: (n, y, x, c) standardised; what gaps hold does not matter.
      present: (n, y, x) bool.
      seed: of the draws; each frame has a generator of its own.
      numbers: (n,) of the frames, which name their generators; their positions by default.
    """
    ocean, rest = np.asarray(gaussian.ocean)[..., 0] > 0, float(gaussian.rest)
    root, mean = _root(gaussian)[:, ocean], np.asarray(gaussian.mean, np.float64)[ocean]
    filled = np.array(x, np.float32)
    for number in np.flatnonzero(~present[:, ocean].all(1)):
        rng = np.random.default_rng([seed, number if numbers is None else numbers[number], 0xF11])
        known = present[number, ocean]
        seen, hidden = (root[:, cells].reshape(len(root), -1) for cells in (known, ~known))
        # Not what the gaps leave of W^T W: directions in float32 are orthonormal to 1e-7 of the largest variance, and a
        # frame of which little is seen may leave less.
        factor = scipy.linalg.cholesky(seen @ seen.T + rest * np.eye(len(root)), lower=True)
        values = filled[number, ocean].astype(np.float64)
        misfit = (values[known] - mean[known]).reshape(-1)
        z = scipy.linalg.cho_solve((factor, True), seen @ misfit)
        z += np.sqrt(rest) * scipy.linalg.solve_triangular(factor, rng.standard_normal(len(root)), trans=1, lower=True)
        noise = np.sqrt(rest) * rng.standard_normal((int((~known).sum()), values.shape[-1]))
        values[~known] = mean[~known] + (z @ hidden).reshape(noise.shape) + noise
        filled[number, ocean] = values
    return filled


def truncate(gaussian: PrincipalGaussian, rank: int, rest: float = 1.0) -> PrincipalGaussian:
    """The same prior with `rank` directions; what is left out joins the rest, which is then multiplied by `rest`."""
    count = gaussian.direction.shape[-1] * float(gaussian.ocean.sum())
    size = gaussian.variance.size
    rank = min(rank, size)
    left = float(gaussian.variance[rank:].sum()) + float(gaussian.rest) * (count - size)
    # A direction kept must not have less variance than those left out.
    level = min(rest * left / (count - rank), float(gaussian.variance[rank - 1]) if rank else np.inf)
    return gaussian.replace(
        direction=gaussian.direction[:rank], variance=gaussian.variance[:rank], rest=jnp.asarray(level, jnp.float32)
    )


def analysis(gaussian: PrincipalGaussian, observation: Observation, correlation: float | np.ndarray = 0.0) -> Analysis:
    """The posterior of one pattern, G = Sigma A^T (A Sigma A^T + R)^-1, its variance diag(Sigma - G A Sigma).

    Solved in float64 on the host, returned in float32; both in the units of the prior. The gain is one matrix, or in
    factors where `gains.rows_of` says so.

    Args:
      gaussian: prior.
      observation: pattern and errors; its values are not used.
      correlation: of the errors of u and v (gains.noise_covariance).

    Raises:
      InputError: the gain and what it is made of do not fit into the memory that is left.
    """
    if gains.rows_of(gaussian, observation).by_blocks:
        return _by_blocks(gaussian, observation, correlation)
    return _dense(gaussian, observation, correlation)


def _check_memory(needed: int, gaussian: PrincipalGaussian, observation: Observation) -> None:
    free = memory.available()
    if needed > free:
        raise InputError(
            f"the analysis of {observation.size} observed positions on {gaussian.ocean.size} cells does not fit into "
            f"the memory: it needs {needed / 1e9:.2g} GB and {free / 1e9:.2g} are free; take fewer frames or patterns "
            "at a time"
        )


def _by_blocks(
    gaussian: PrincipalGaussian, observation: Observation, correlation: float | np.ndarray
) -> PrincipalAnalysis:
    """The analysis of rows that see cells of their own.

    x = E z + w,   z ~ N(0, D),   w ~ N(0, rest I),   D = diag(lambda_i - rest)
    Cov[x | y] = Cov[w | y, z] + H Cov[z | y] H^T,    H = (I - rest A^T K^-1 A) E,   Cov[z | y] = D^(1/2) M^-1 D^(1/2)
    """
    field, rank = gaussian.mean.size, gaussian.variance.size
    # The directions in float64, what of them the observations leave, and that turned; and what rows see of them.
    _check_memory(8 * rank * (3 * field + 4 * observation.values.size), gaussian, observation)
    noise = gains.noise_covariance(observation, correlation)
    seen, leading = gains.seen_by(gaussian, observation)
    blocks = gains.Blocks.of(gaussian, seen, leading, np.asarray(noise, np.float64), np.inf)
    evidence = guide.Evidence(gaussian.ocean, observation, noise, gaussian, blocks.gain())
    rest, ocean, components = float(gaussian.rest), np.asarray(gaussian.ocean), gaussian.mean.shape[-1]
    left = np.asarray(gaussian.direction, np.float64).reshape(rank, ocean.size, components).transpose(1, 2, 0)
    scattered = seen.T @ blocks.weighed.reshape(observation.size, -1)
    left = (left - rest * scattered.reshape(left.shape)).reshape(-1, rank)
    turned = scipy.linalg.solve_triangular(blocks.factor, (left * blocks.root).T, lower=True)
    precision = np.einsum("mcc->mc", blocks.inverse)
    own = rest - rest**2 * (seen.multiply(seen).T @ precision)
    variance = own + np.einsum("rv,rv->v", turned, turned).reshape(own.shape)
    return PrincipalAnalysis(evidence, jnp.asarray(variance.reshape(gaussian.mean.shape) * ocean, jnp.float32))


def _dense(gaussian: PrincipalGaussian, observation: Observation, correlation: float | np.ndarray) -> DenseAnalysis:
    # Directions and covariance with what is observed, as it is, as (cells, c, m c) and turned; the gain in float32.
    values = observation.values.size
    _check_memory(gaussian.mean.size * (8 * (gaussian.variance.size + 3 * values) + 4 * values), gaussian, observation)
    noise = np.asarray(gains.noise_covariance(observation, correlation), np.float64)
    seen, leading = gains.seen_by(gaussian, observation)
    (factor,) = gains.factors(gaussian, seen, leading, noise, np.array([np.inf]))
    ocean, rest = np.asarray(gaussian.ocean), float(gaussian.rest)
    rows, components, rank = leading.shape
    excess = np.asarray(gaussian.variance, np.float64) - rest
    direction = np.asarray(gaussian.direction, np.float64).reshape(rank, -1)
    covariance = (direction.T @ (excess * leading.reshape(-1, rank)).T).reshape(
        ocean.size, components, rows, components
    )
    used = np.unique(seen.indices[seen.data != 0])
    weights = rest * seen[:, used].toarray().T
    for component in range(components):
        covariance[used, component, :, component] += weights
    covariance = covariance.reshape(-1, rows * components)
    # By the factor and not by the inverse, which loses what precise observations beside each other leave.
    turned = scipy.linalg.solve_triangular(factor, covariance.T, lower=True)
    variance = prior_variance(gaussian) - np.einsum("mv,mv->v", turned, turned).reshape(gaussian.mean.shape)
    gain = scipy.linalg.solve_triangular(factor, turned, lower=True, trans=1).T
    return DenseAnalysis(
        observation=observation,
        background=gaussian.mean,
        gain=jnp.asarray(gain.reshape(*gaussian.mean.shape, rows, components), jnp.float32),
        variance=jnp.asarray(np.maximum(variance, 0) * ocean, jnp.float32),
    )


def prior_variance(gaussian: PrincipalGaussian) -> np.ndarray:
    """diag(Sigma), the variance (y, x, c) without any observation, in the units of the prior; zero on land; float64."""
    rest = float(gaussian.rest)
    excess = np.asarray(gaussian.variance, np.float64) - rest
    squares = np.square(np.asarray(gaussian.direction, np.float64))
    return np.einsum("r,ryxc->yxc", excess, squares) + rest * np.asarray(gaussian.ocean, np.float64)


def _analysed(
    gaussian: PrincipalGaussian, observation: Observation, values: np.ndarray, gain: gains.Gain | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """b and w of n estimates from values (n, m, c): mean + E b + rest A^T w; (n, r) and (n, m, c), float64."""
    if gain is None:
        gain = gains.exact_gains(gaussian, observation, np.array([np.inf]))
    misfit = (values - np.asarray(observation.apply(gaussian.mean))) * np.asarray(observation.valid)[:, None]
    along = np.tensordot(misfit, gain.along[0], ((1, 2), (1, 2)))
    if gain.by_blocks:
        left = misfit - np.tensordot(along, gains.seen_by(gaussian, observation)[1], (1, 2))
        return along, np.einsum("mcd,nmd->nmc", gain.inverse[0], left)
    return along, np.einsum("mcpd,npd->nmc", gain.inverse[0], misfit)


def estimate(gaussian: PrincipalGaussian, observation: Observation, values: np.ndarray) -> np.ndarray:
    """Posterior means (n, y, x, c) of n frames that share a pattern, from values (n, m, c), without the gain itself."""
    along, weighed = _analysed(gaussian, observation, values)
    leading = np.tensordot(along, np.asarray(gaussian.direction), 1)
    ocean, weights = np.asarray(gaussian.ocean), np.asarray(observation.weights, np.float64)
    scattered = np.zeros((len(weighed), ocean.size, weighed.shape[-1]))
    np.add.at(scattered, (slice(None), np.asarray(observation.cells)), weights[..., None] * weighed[:, :, None])
    found = np.asarray(gaussian.mean) + leading + float(gaussian.rest) * scattered.reshape(leading.shape) * ocean
    return found.astype(np.float32)


def coefficients(gaussian: PrincipalGaussian, observation: Observation, values: np.ndarray) -> np.ndarray:
    """E^T (x - mean) of the posterior means x of n frames that share a pattern, (n, r) float64, without the means.

    Args:
      values: (n, m, c).
    """
    gain = gains.exact_gains(gaussian, observation, np.array([np.inf]))
    _, leading = gains.seen_by(gaussian, observation)
    found = []
    # Of thousands of frames the work in float64 would take several times the memory of the values.
    for number in range(0, len(values), FRAMES):
        along, weighed = _analysed(gaussian, observation, values[number : number + FRAMES], gain)
        found.append(along + float(gaussian.rest) * np.tensordot(weighed, leading, 2))
    return np.concatenate(found)


def select(
    gaussian: PrincipalGaussian,
    x: np.ndarray,
    observations: Sequence[Observation],
    ranks: Sequence[int] = RANKS,
    rests: Sequence[float] = RESTS,
    present: np.ndarray | None = None,
    tolerance: float = 0.0,
) -> tuple[PrincipalGaussian, Choice]:
    """The truncation whose estimates of validation frames are best, by mean square error relative to climatology.

    Args:
      gaussian: fitted to training frames with the largest rank.
      x: (n, y, x, c) standardised validation frames.
      observations: patterns of cells with one error; every one is used on every frame, and counts by its error
        relative to climatology's.
      present: (n, y, x) bool, of frames with gaps: only present cells are observed and count, and each frame has one
        of the patterns in turn, as no two share an analysis.
      tolerance: the fewest directions, and of those the best factor, whose error is at most 1 + tolerance times the
        lowest; what they cost grows with their number.

    Returns:
      The prior and what was chosen; `error` is the mean of those relative errors.

    Raises:
      InputError: cells that two rows see, or several errors.
    """
    kept = sorted({min(rank, gaussian.variance.size) for rank in ranks})
    tried = list(itertools.product(kept, rests))
    candidates = [truncate(gaussian, rank, rest) for rank, rest in tried]
    squares = np.zeros((len(observations), len(tried) + 1))
    if present is None:
        ocean = np.asarray(gaussian.ocean)[..., 0] > 0
        for kind, observation in enumerate(observations):
            squares[kind] = _square_errors(gaussian, candidates, observation, x, ocean)
    else:
        for number, (field, known) in enumerate(zip(x, present, strict=True)):
            kind = number % len(observations)
            observation = observations[kind].within(jnp.asarray(known))
            squares[kind] += _square_errors(gaussian, candidates, observation, field[None], known)
    used = squares[:, -1] > 0
    errors = np.mean(squares[used, :-1] / squares[used, -1:], 0)
    directions = np.array([rank for rank, _ in tried])
    fewest = directions[errors <= errors.min() * (1 + tolerance)].min()
    best = int(np.where(directions == fewest, errors, np.inf).argmin())
    return candidates[best], Choice(*tried[best], float(errors[best]))


def _square_errors(
    gaussian: PrincipalGaussian,
    candidates: Sequence[PrincipalGaussian],
    observation: Observation,
    x: np.ndarray,
    counted: np.ndarray,
) -> np.ndarray:
    """Sums of squared errors on the `counted` cells (y, x) of the estimates by every candidate, then of the mean.

    E[x | y] = mean + E z + rest A^T (y - A mean - B z) / k,   z = (D^-1 + B^T B / k)^-1 B^T (y - A mean) / k

    of rows that see cells of their own, k = rest A A^T + sigma^2 of each, D = diag(lambda_i - rest), B = A E.
    Candidates are truncations of the `gaussian`, so that they share B^T B: solving for each alone takes ten times as
    long.
    """
    seen, leading = gains.seen_by(gaussian, observation)
    noise = np.asarray(gains.noise_covariance(observation), np.float64)
    if not (gains.see_cells_of_their_own(seen) and gains.alike(seen, noise)):
        raise InputError("a prior is chosen for patterns whose rows see cells of their own, with the same error")
    share = float(gains.own_share(seen).max())
    error = float(noise[np.asarray(observation.valid).argmax(), 0, 0])
    mean, direction = np.asarray(gaussian.mean), np.asarray(gaussian.direction)
    corners = (x - mean).reshape(len(x), -1, x.shape[-1])[:, observation.cells]
    misfit = np.einsum("mk,nmkc->nmc", np.asarray(observation.weights, np.float64), corners)
    misfit = (misfit * np.asarray(observation.valid)[:, None]).reshape(len(x), -1)
    flat = leading.reshape(misfit.shape[1], -1)
    gram, right = flat.T @ flat, misfit @ flat
    target, modes = (x - mean)[:, counted], direction[:, counted].reshape(len(direction), -1)
    scatter = seen[:, counted.reshape(-1)].T
    sums = []
    for candidate in candidates:
        rest, rank = float(candidate.rest), candidate.variance.size
        k = rest * share + error
        root = np.sqrt(np.maximum(np.asarray(candidate.variance, np.float64) - rest, 0))
        inner = gram[:rank, :rank] * np.outer(root, root / k)
        inner.flat[:: rank + 1] += 1
        factor = scipy.linalg.cho_factor(inner, lower=True, overwrite_a=True, check_finite=False)
        z = root * scipy.linalg.cho_solve(factor, (right[:, :rank] * root).T / k, check_finite=False).T
        left = (misfit - z @ flat[:, :rank].T).reshape(len(x), observation.size, -1)
        own = np.stack([scatter @ one for one in left]) * (rest / k)
        guess = (z.astype(np.float32) @ modes[:rank]).reshape(target.shape) + own
        sums.append(np.sum((guess - target) ** 2, dtype=float))
    return np.array([*sums, np.sum(target**2, dtype=float)])
