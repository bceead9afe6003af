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

from jax_repaint import guide
from jax_repaint.denoise import PrincipalGaussian
from jax_repaint.errors import InputError
from jax_repaint.observe import Observation
from jax_repaint.prior.analysis import Analysis

OVERSAMPLING = 32
POWER_PASSES = 3
RANKS = (8, 16, 32, 64, 128, 256, 384)
RESTS = (0.3, 1.0, 3.0)


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
      InputError: fewer than two frames, a share outside [0, 1] or below 1 without a kernel.
    """
    n, (y, width), components = len(x), ocean.shape, x.shape[-1]
    if n < 2:
        raise InputError(f"a covariance needs at least two frames, got {n}")
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
    direction = np.zeros((rank, y, width, components), np.float32)
    direction[:, ocean] = (turn[:rank] @ basis.T).reshape(rank, -1, components)
    field = np.zeros((y, width, components), np.float32)
    field[ocean] = mean.reshape(-1, components)
    return PrincipalGaussian(
        jnp.asarray(field),
        jnp.asarray(direction),
        jnp.asarray(np.maximum(variance, rest), jnp.float32),
        jnp.asarray(rest, jnp.float32),
        jnp.asarray(ocean[..., None], jnp.float32),
    )


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


def analysis(gaussian: PrincipalGaussian, observation: Observation) -> Analysis:
    """The posterior of one pattern, G = Sigma A^T (A Sigma A^T + R)^-1, its variance diag(Sigma - G A Sigma).

    Solved in float64 on the host, returned in float32; both in the units of the prior.

    Args:
      gaussian: prior.
      observation: pattern and errors; its values are not used.
    """
    gain = guide.kalman_gains(gaussian, observation, np.array([np.inf]))
    inverse, along = np.asarray(gain.inverse[0], np.float64), np.asarray(gain.along[0], np.float64)
    direction, ocean = np.asarray(gaussian.direction), np.asarray(gaussian.ocean)
    grid, components = ocean.shape[:2], direction.shape[-1]
    rows, rest = observation.size, float(gaussian.rest)
    seen = np.zeros((rows, ocean.size), np.float32)
    np.add.at(seen, (np.arange(rows)[:, None], np.asarray(observation.cells)), np.asarray(observation.weights))
    seen *= ocean.reshape(1, -1)

    def with_rest(of_rows: np.ndarray, of_directions: np.ndarray) -> np.ndarray:
        """rest A^T of_rows + E of_directions as (cells, c, m c)."""
        leading = np.tensordot(direction.reshape(len(direction), -1), of_directions.astype(np.float32), (0, 0))
        scattered = rest * np.tensordot(seen, of_rows.astype(np.float32), (0, 0))
        return (leading + scattered.reshape(leading.shape)).reshape(*grid, components, rows, components)

    gains = with_rest(inverse, along)
    same = np.eye(rows * components).reshape((rows, components) * 2)
    excess = np.asarray(gaussian.variance) - rest
    leading = np.einsum("mk,rkc->rmc", seen, direction.reshape(len(direction), -1, components), optimize=True)
    covariance = with_rest(same, excess[:, None, None] * leading)
    prior = np.einsum("r,ryxc->yxc", excess, direction**2) + rest * ocean
    variance = prior - np.einsum("yxcmd,yxcmd->yxc", gains, covariance)
    return Analysis(
        observation=observation,
        background=gaussian.mean,
        gain=jnp.asarray(gains),
        variance=jnp.asarray(np.maximum(variance, 0) * ocean, jnp.float32),
    )


def estimate(gaussian: PrincipalGaussian, observation: Observation, values: np.ndarray) -> np.ndarray:
    """Posterior means (n, y, x, c) of n frames that share a pattern, from values (n, m, c), without the gain itself."""
    gain = guide.kalman_gains(gaussian, observation, np.array([np.inf]))
    known = guide.Evidence(gaussian.ocean, observation, gaussian=gaussian, gain=gain)
    mean = gaussian.mean
    misfit = (values - np.asarray(observation.apply(mean))) * np.asarray(observation.valid)[:, None]
    along = np.einsum("rmc,nmc->nr", gain.along[0], misfit)
    weighed = np.einsum("mcpd,npd->nmc", gain.inverse[0], misfit)
    leading = np.tensordot(along, np.asarray(gaussian.direction), 1)
    scattered = np.stack([np.asarray(known.spread(jnp.asarray(w, jnp.float32))) for w in weighed])
    return np.asarray(mean) + leading + float(gaussian.rest) * scattered


def select(
    gaussian: PrincipalGaussian,
    x: np.ndarray,
    observations: Sequence[Observation],
    ranks: Sequence[int] = RANKS,
    rests: Sequence[float] = RESTS,
) -> tuple[PrincipalGaussian, Choice]:
    """The truncation whose estimates of validation frames are best, by mean square error relative to climatology.

    Args:
      gaussian: fitted to training frames with the largest rank.
      x: (n, y, x, c) standardised validation frames.
      observations: patterns; every one is used on every frame, and counts by its error relative to climatology's.

    Returns:
      The prior and what was chosen; `error` is the mean of those relative errors.
    """
    ocean = np.asarray(gaussian.ocean)[..., 0] > 0
    target = np.asarray(x)[:, ocean]
    climatology = np.asarray(gaussian.mean)[ocean]
    reference = float(np.mean((target - climatology) ** 2))
    best = None
    kept = sorted({min(rank, gaussian.variance.size) for rank in ranks})
    for rank, rest in itertools.product(kept, rests):
        candidate = truncate(gaussian, rank, rest)
        error = 0.0
        for observation in observations:
            corners = x.reshape(len(x), -1, x.shape[-1])[:, observation.cells]
            seen = np.einsum("mk,nmkc->nmc", observation.weights, corners)
            guess = estimate(candidate, observation, seen)[:, ocean]
            error += float(np.mean((guess - target) ** 2)) / reference / len(observations)
        if best is None or error < best[1].error:
            best = candidate, Choice(rank, rest, error)
    return best
