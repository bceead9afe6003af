"""What training frames know of a pattern of observations beyond their covariance: a kernel ridge regression.

An archive keeps training frames by their coefficients a_j = E^T (x_j - mean) in the directions E of the linear prior.
For one pattern,

    y_j = A (mean + E a_j + rest^1/2 (I - E E^T) n_j) + e_j,   n_j ~ N(0, I),   e_j ~ N(0, R)

is what could have been observed of each, with what the prior says of the part of the field that is not kept, and
l_j = E^T (x_lin(y_j) - mean) what the linear estimate makes of it. The regression predicts what that leaves,

    x(y) = x_lin(y) + E C^T k(y),   C = (K + lambda I)^-1 (a - l),   k(y)_j = exp(-|z(y) - z(y_j)|^2 / (2 s^2 m))

with K_ij = k(y_i)_j and z the leading principal components of l, each divided by the root of its standard deviation:
that half evens out what is of large scale and what is of small. m is the mean of |z_j|^2 over the training frames.
The number of components, s and lambda are those with the smallest error on validation frames, of which the archive
keeps some; if none is better than the linear estimate, nothing is added to it.

Source: Saunders, Gammerman and Vovk, "Ridge regression learning algorithm in dual variables" (1998), eq. 11.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import scipy.linalg

from jax_repaint import gains
from jax_repaint.array_types import Float
from jax_repaint.denoise import PrincipalGaussian
from jax_repaint.observe import Observation
from jax_repaint.prior import linear

COMPONENTS = (30, 60, 120)
LENGTHS = (0.7, 1.0, 1.4)  # two frames lie 1.4 apart
PENALTIES = (0.3, 1.0, 3.0)
TRAIN, VALIDATION = 3000, 600  # frames of an archive, at most
SEARCHED = 1500  # training frames that numbers are chosen with, at most: each takes n^3 / 3 products


@dataclasses.dataclass(frozen=True)
class Archive:
    """Frames by their coefficients in the directions of a linear prior, float32.

    Attributes:
      train: (n, r), of training frames.
      validation: (k, r), of validation frames.
    """

    train: Float[np.ndarray, "n r"]
    validation: Float[np.ndarray, "k r"]


@dataclasses.dataclass(frozen=True)
class Choice:
    """What `select` found: components, length s and penalty lambda; `error` is the sum of squares left over that of
    the targets.
    """

    components: int
    length: float
    penalty: float
    error: float


def spaced(numbers: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the numbers, evenly spaced."""
    return numbers[np.unique(np.linspace(0, len(numbers) - 1, min(count, len(numbers))).round().astype(int))]


def archive(gaussian: PrincipalGaussian, train: np.ndarray, validation: np.ndarray) -> Archive:
    """The archive of some of the standardised fields (n, Y, X, c) without gaps, as precise as its file keeps it."""
    some = (x[spaced(np.arange(len(x)), most)] for x, most in ((train, TRAIN), (validation, VALIDATION)))
    return Archive(*(coefficients(gaussian, x) for x in some))


def coefficients(gaussian: PrincipalGaussian, x: np.ndarray) -> Float[np.ndarray, "n r"]:
    """E^T (x - mean) of standardised fields (n, Y, X, c), rounded to float16."""
    ocean = np.asarray(gaussian.ocean)[..., 0] > 0
    away = (np.asarray(x, np.float32) - np.asarray(gaussian.mean))[:, ocean].reshape(len(x), -1)
    directions = np.asarray(gaussian.direction)[:, ocean].reshape(gaussian.variance.size, -1)
    return (away @ directions.T).astype(np.float16).astype(np.float32)


def observed(
    gaussian: PrincipalGaussian, observation: Observation, a: np.ndarray, rng: np.random.Generator
) -> Float[np.ndarray, "n m c"]:
    """y of the module docstring of frames with coefficients a (n, r), float32; 0 in rows that are not used."""
    ocean = np.asarray(gaussian.ocean)[..., 0].reshape(-1) > 0
    seen, leading = gains.seen_by(gaussian, observation)
    seen, leading = seen[:, ocean].astype(np.float32), leading.astype(np.float32)
    direction = np.asarray(gaussian.direction).reshape(len(gaussian.variance), ocean.size, -1)[:, ocean]
    background = np.asarray(observation.apply(gaussian.mean))
    noise = np.linalg.cholesky(np.asarray(gains.noise_covariance(observation), np.float64)).astype(np.float32)
    valid = np.asarray(observation.valid)[:, None]
    made = np.empty((len(a), *background.shape), np.float32)
    for number in range(0, len(a), linear.FRAMES):
        some = a[number : number + linear.FRAMES]
        n = rng.standard_normal((len(some), *direction.shape[1:]), np.float32)
        rough = (seen @ n.transpose(1, 0, 2).reshape(n.shape[1], -1)).reshape(len(valid), len(some), -1)
        along = np.tensordot(n, direction, ((1, 2), (1, 2)))
        errors = rng.standard_normal((len(some), *background.shape), np.float32)
        scale = np.sqrt(np.float32(gaussian.rest))
        values = background + np.tensordot(some - scale * along, leading, (1, 2)) + scale * rough.transpose(1, 0, 2)
        made[number : number + linear.FRAMES] = np.where(valid, values + np.einsum("mcd,nmd->nmc", noise, errors), 0)
    return made


def turning(train: np.ndarray, components: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean (d,) and T (d, count): (rows - mean) T are the z of the module docstring, from `train` (n, d)."""
    mean = train.mean(0)
    _, singular, directions = np.linalg.svd(train - mean, full_matrices=False)
    # What is constant on the training frames has no scale.
    count = min(components, int((singular > 1e-6 * singular[0]).sum()))
    return mean, directions[:count].T / np.sqrt(singular[:count] / np.sqrt(train.dtype.type(len(train))))


def kernel(at: np.ndarray, train: np.ndarray, length: float) -> np.ndarray:
    """exp(-|z_i - z_j|^2 / (2 s^2 m)), (k, n), of predictors `at` (k, d) and `train` (n, d), m the mean of |z_j|^2."""
    norms = (train**2).sum(1)
    squares = (at**2).sum(1)[:, None] + norms - 2 * at @ train.T
    unit = np.maximum(norms.mean(), np.finfo(train.dtype).tiny)
    return np.exp(-np.maximum(squares, 0) / (2 * length**2 * unit))


def solve(matrix: np.ndarray, targets: np.ndarray, penalty: float) -> np.ndarray:
    """(K + penalty I)^-1 R, (n, values), of a kernel matrix K (n, n) and targets R."""
    matrix = matrix.copy()
    matrix[np.diag_indices_from(matrix)] += matrix.dtype.type(penalty)
    factor = scipy.linalg.cho_factor(matrix, overwrite_a=True, check_finite=False)
    return scipy.linalg.cho_solve(factor, targets, check_finite=False)


def select(
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    components: Sequence[int] = COMPONENTS,
    lengths: Sequence[float] = LENGTHS,
    penalties: Sequence[float] = PENALTIES,
) -> Choice | None:
    """The regression whose error on validation frames is smallest; None if none is better than predicting 0.

    Args:
      train, validation: predictors (n, d) and targets R (n, values).
    """
    (y, r), (y_val, r_val) = train, validation
    total, best = float(np.sum(np.square(r_val), dtype=np.float64)), None
    if not total:
        return None
    mean, turn = turning(y, max(components))
    whole, whole_val = (y - mean) @ turn, (y_val - mean) @ turn
    for count, length in itertools.product(components, lengths):
        z, z_val = whole[:, :count], whole_val[:, :count]
        matrix, between = kernel(z, z, length), kernel(z_val, z, length)
        for penalty in penalties:
            left = r_val - between @ solve(matrix, r, penalty)
            error = float(np.sum(np.square(left), dtype=np.float64)) / total
            if error < (1.0 if best is None else best.error):
                best = Choice(z.shape[1], length, penalty, error)
    return best


@dataclasses.dataclass(frozen=True)
class Regression:
    """The regression of one pattern.

    Attributes:
      gaussian: the linear prior.
      observation: the pattern; its values are not used.
      choice: what was chosen; None if nothing is added to the linear estimate.
      mean, turn: of `turning`.
      train: z of the training frames (n, components).
      weights: C (n, r).
    """

    gaussian: PrincipalGaussian
    observation: Observation
    choice: Choice | None = None
    mean: np.ndarray | None = None
    turn: np.ndarray | None = None
    train: np.ndarray | None = None
    weights: np.ndarray | None = None

    def offset(self, values: np.ndarray) -> Float[np.ndarray, "n y x c"]:
        """x(y) - x_lin(y) of n frames from their values (n, m, c), standardised; zero on land."""
        direction = np.asarray(self.gaussian.direction)
        if self.choice is None:
            return np.zeros((len(values), *direction.shape[1:]), np.float32)
        seen = linear.coefficients(self.gaussian, self.observation, values).astype(np.float32)
        found = kernel((seen - self.mean) @ self.turn, self.train, self.choice.length) @ self.weights
        return np.tensordot(found, direction, 1).astype(np.float32)


def regression(gaussian: PrincipalGaussian, kept: Archive, observation: Observation, seed: int = 0) -> Regression:
    """Learns what is left of one pattern, in some seconds on the host.

    Args:
      gaussian: the linear prior of the archive.
      observation: standardised, on the grid of the prior.
      seed: of the errors of the observations of archived frames.
    """
    rng = np.random.default_rng([seed, 0x52])
    parts = []
    for a in (kept.train, kept.validation):
        estimated = linear.coefficients(gaussian, observation, observed(gaussian, observation, a, rng))
        parts.append((estimated.astype(np.float32), a - estimated.astype(np.float32)))
    (estimated, targets), validation = parts
    some = spaced(np.arange(len(targets)), SEARCHED)
    choice = select((estimated[some], targets[some]), validation)
    if choice is None:
        return Regression(gaussian, observation)
    mean, turn = turning(estimated, choice.components)
    z = (estimated - mean) @ turn
    weights = solve(kernel(z, z, choice.length), targets, choice.penalty)
    return Regression(gaussian, observation, choice, mean, turn, z, weights)
