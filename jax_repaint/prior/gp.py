"""Gaussian-process prior of a velocity field, its analysis for one pattern, its draws and the fit of its numbers.

    x ~ N(background, K),  y = A x + e,  e ~ N(0, R)
    G = K A^T (A K A^T + R)^{-1},   variance = diag(K - G A K)
    (Rasmussen & Williams, "Gaussian Processes for Machine Learning", 2006, eq. 2.23-24)

K is a covariance of velocity vectors (u eastward, v northward) at positions (y, x), y northward and x eastward, in
pixels or metres; R is diagonal: max(sigma^2, noise, 1e-6) with sigma the error of the observation and noise that of
the kernel. Linear algebra is in float64, on the host where the accelerator has none; results are float32.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tinygp
from flax import struct

from jax_repaint.array_types import Array, Cells, Field, Float, Int, Key, Scalar, Values
from jax_repaint.errors import InputError
from jax_repaint.observe import Observation
from jax_repaint.prior.analysis import DenseAnalysis

NAMES = ("rbf_legacy", "rbf", "matern32", "matern52", "divergence_free")
BACKGROUNDS = ("zero", "constant", "climatology")
FRAMES, FRAMES_WITH_GAPS = 8, 2  # of a step of a fit
JITTER = 1e-6  # smallest variance on the diagonal, (m/s)^2
ROOT_JITTER = 1e-8  # of the prior variance: keeps the root of a smooth kernel real


class DivergenceFree(tinygp.kernels.Kernel):
    """Velocity of a random stream function with a Gaussian covariance, at points ((y, x), component), scaled to 1.

        u = -d psi / dy,  v = d psi / dx,  <psi psi'> = l^2 exp(-|r|^2 / 2)
        <w_i w_j'> = (delta_ij (1 - |r|^2) + r_i r_j) exp(-|r|^2 / 2),     r = (x - x', y - y') / l

    Source: Narcowich & Ward, "Generalized Hermite interpolation via matrix-valued conditionally positive definite
    functions" (1994): K = (-Laplacian I + grad grad^T) phi.
    """

    scale: Scalar

    def evaluate(self, X1, X2):
        (p, i), (q, j) = X1, X2
        r = (p - q)[::-1] / self.scale  # positions are (y, x), components (east, north)
        square = r @ r
        return (jnp.where(i == j, 1 - square, 0) + r[i] * r[j]) * jnp.exp(-square / 2)


@struct.dataclass
class Kernel:
    """Covariance of velocities at two positions, d apart.

        rbf_legacy        variance^2 exp(-d / (2 lengthscale^2)) I
        rbf               variance exp(-d^2 / (2 lengthscale^2)) I
        matern32          variance (1 + a) exp(-a) I,                 a = sqrt(3) d / lengthscale
        matern52          variance (1 + a + a^2 / 3) exp(-a) I,       a = sqrt(5) d / lengthscale
        divergence_free   variance (I (1 - d^2 / lengthscale^2) + r r^T / lengthscale^2) exp(-d^2 / (2 lengthscale^2))

    Attributes:
      name: one of NAMES; static.
      lengthscale: in the unit of the positions (rbf_legacy: in its square root).
      variance: of one component, (m/s)^2 (rbf_legacy: standard deviation, m/s).
      noise: least variance of the observation error, (m/s)^2; not below 1e-6 where it is used.
    """

    name: str = struct.field(pytree_node=False)
    lengthscale: Scalar
    variance: Scalar
    noise: Scalar

    @classmethod
    def create(cls, name: str, lengthscale: float, variance: float, noise: float = JITTER) -> "Kernel":
        """A kernel of given numbers.

        Raises:
          InputError: unknown name; lengthscale or variance not positive, noise negative, or one of them not finite.
        """
        _check_name(name)
        numbers = {"lengthscale": lengthscale, "variance": variance, "noise": noise}
        for key, value in numbers.items():
            if not (math.isfinite(value) and (value > 0 or (key == "noise" and value == 0))):
                sign = "zero or more" if key == "noise" else "positive"
                raise InputError(f"{key} of kernel {name} must be finite and {sign}, got {value}")
        return cls(name, *(jnp.asarray(value, jnp.float32) for value in numbers.values()))

    def tinygp(self) -> tinygp.kernels.Kernel:
        """The covariance of one component at positions (2,); divergence_free: at points (position, component)."""
        distance = tinygp.kernels.distance.L2Distance()
        if self.name == "rbf_legacy":
            return self.variance**2 * tinygp.kernels.Exp(2 * self.lengthscale**2, distance)
        kinds = {
            "rbf": tinygp.kernels.ExpSquared,
            "matern32": lambda scale: tinygp.kernels.Matern32(scale, distance),
            "matern52": lambda scale: tinygp.kernels.Matern52(scale, distance),
            "divergence_free": DivergenceFree,
        }
        return self.variance * kinds[self.name](self.lengthscale)

    def block(self, p: Float[Array, "2"], q: Float[Array, "2"]) -> Float[Array, "2 2"]:
        """Covariance of (u, v) at position p with (u, v) at position q."""
        if self.name == "divergence_free":
            points = [(jnp.stack([position] * 2), jnp.arange(2)) for position in (p, q)]
            return self.tinygp()(*points)
        return self.tinygp().evaluate(p, q) * jnp.eye(2, dtype=p.dtype)

    def error_variance(self, sigma: Array) -> Array:
        """R: max(sigma^2, noise, 1e-6), of the shape of `sigma`."""
        return jnp.maximum(jnp.square(sigma), jnp.maximum(self.noise, JITTER))

    def to_json(self) -> dict[str, str | float]:
        """Plain numbers that `from_json` reads back exactly."""
        numbers = {key: float(getattr(self, key)) for key in ("lengthscale", "variance", "noise")}
        return {"name": self.name, **numbers}

    @classmethod
    def from_json(cls, content: Mapping[str, str | float]) -> "Kernel":
        """The kernel that `to_json` wrote.

        Raises:
          InputError: an entry is missing or of the wrong kind.
        """
        try:
            return cls.create(content["name"], *(float(content[key]) for key in ("lengthscale", "variance", "noise")))
        except (KeyError, TypeError, ValueError) as e:
            if isinstance(e, InputError):
                raise
            raise InputError(f"a kernel needs name, lengthscale, variance and noise, got {content}") from e


def seed_gp() -> Kernel:
    """The kernel that earlier results of this method used: positions in pixels, zero background, values in m/s."""
    return Kernel.create("rbf_legacy", lengthscale=14.1, variance=0.0103420345, noise=1e-8)


def pixels(shape: tuple[int, int]) -> np.ndarray:
    """Positions (y, x, 2) in grid cells."""
    return np.stack(np.indices(shape), -1).astype(float)


def background(kind: str, velocity: np.ndarray, ocean: np.ndarray) -> np.ndarray:
    """Prior mean (y, x, 2) float32 of training frames (n, y, x, 2), m/s; zero on land; gaps (NaN) do not count.

    `zero`; `constant`: each component's mean over ocean cells and frames; `climatology`: the mean of each cell over
    the frames, and the constant in cells without any value.

    Raises:
      InputError: unknown kind, shapes differ, or there is no value to average.
    """
    if kind not in BACKGROUNDS:
        raise InputError(f"background {kind!r} is not one of {', '.join(BACKGROUNDS)}")
    velocity = _check_velocity(velocity, ocean)
    if kind == "zero":
        return np.zeros((*ocean.shape, 2), np.float32)
    present = np.isfinite(velocity) & ocean[..., None]
    count, total = present.sum(0), np.where(present, velocity, 0).sum(0, dtype=float)
    if not count.any((0, 1)).all():
        raise InputError("no training value on ocean cells to take a background from")
    constant = total.sum((0, 1)) / count.sum((0, 1))
    mean = np.where(count > 0, total / np.maximum(count, 1), constant) if kind == "climatology" else constant
    return np.where(ocean[..., None], mean, 0).astype(np.float32)


def analysis(
    kernel: Kernel, observation: Observation, ocean: Cells, positions: np.ndarray, background: Field
) -> DenseAnalysis:
    """The analysis of one pattern; its `mean` serves every frame that shares pattern and errors.

        G = K A^T (A K A^T + R)^{-1},    variance = diag(K - G A K)

    The observation of the result holds the errors that were used, sqrt(R), so that `Analysis.sample` perturbs by them.
    No matrix exceeds cells times observed values. Float64, then rounded: gain and variance to 6e-8, relative.

    Args:
      kernel: lengthscale in the unit of `positions`.
      observation: m rows in m/s; rows that are not valid have no effect.
      ocean: (y, x) bool.
      positions: (y, x, 2).
      background: (y, x, 2), m/s.

    Raises:
      InputError: shapes differ, a position is not finite, or an observed cell is on land or outside the grid.
    """
    ocean, positions, cells, weights = _check_pattern(observation, ocean, positions, background)
    with _float64():
        wide, sigma = _wide(kernel), np.asarray(observation.sigma, float)
        gain, variance, used = map(np.asarray, _analysis(wide, cells, weights, sigma, ocean, positions))
    return DenseAnalysis(
        observation=observation.replace(sigma=jnp.asarray(used)),
        background=jnp.asarray(background, jnp.float32),
        gain=jnp.asarray(gain),
        variance=jnp.asarray(variance),
    )


def estimator(
    kernel: Kernel, observation: Observation, ocean: Cells, positions: np.ndarray, background: Field
) -> Callable[[Values], Float[np.ndarray, "y x 2"]]:
    """The mean of `analysis` as a function of observed values (m, 2), background + K A^T (A K A^T + R)^{-1} (y - A b).

    Without a gain and a variance, which take nearly all of the time where a pattern has thousands of cells. Arguments
    and errors as of `analysis`; float32.
    """
    ocean, positions, cells, weights = _check_pattern(observation, ocean, positions, background)
    valid, background = np.asarray(observation.valid)[:, None], np.asarray(background, float)
    seen = np.einsum("mk,mkc->mc", weights, background.reshape(-1, 2)[cells])
    with _float64():
        wide, sigma = _wide(kernel), np.asarray(observation.sigma, float)
        cross, factor = _solved(wide, cells, weights, sigma, positions.reshape(-1, 2))[:2]

    def estimate(values: Values) -> Float[np.ndarray, "y x 2"]:
        innovation = np.where(valid, np.asarray(values, float) - seen, 0.0)
        with _float64():
            change = np.asarray(_change(cross, factor, innovation)).reshape(positions.shape)
        return (background + np.where(ocean[..., None], change, 0)).astype(np.float32)

    return estimate


def _check_pattern(
    observation: Observation, ocean: Cells, positions: np.ndarray, background: Field
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Ocean and positions as arrays, cells and weights (m, k) of the corners that count."""
    ocean, positions = _check_grid(ocean, positions)
    if np.shape(background) != positions.shape:
        raise InputError(f"background {np.shape(background)} does not fit the grid; expected {positions.shape}")
    cells, valid = np.asarray(observation.cells), np.asarray(observation.valid)
    weights = np.asarray(observation.weights, float) * valid[:, None]
    if not 0 <= cells.min() <= cells.max() < ocean.size:
        raise InputError(f"observed cells {cells.min()}..{cells.max()} are not on a grid of {ocean.size} cells")
    on_land = (~ocean.reshape(-1)[cells] & (weights != 0)).any(-1)
    if on_land.any():
        raise InputError(f"observation {int(on_land.argmax())} is on land")
    corners = weights.any(0) | (np.arange(weights.shape[1]) == 0)  # whole cells have only the first
    return ocean, positions, cells[:, corners], weights[:, corners]


@jax.jit
def _analysis(kernel, cells, weights, sigma, ocean, positions):
    """Gain (y, x, c, m, c), variance (y, x, c) and sqrt(R) (m, c), rounded to float32."""
    points, rows = positions.reshape(-1, 2), 2 * len(cells)
    cross, factor, error = _solved(kernel, cells, weights, sigma, points)
    gain = jax.scipy.linalg.cho_solve((factor, True), cross.reshape(-1, rows).T).T.reshape(cross.shape)
    prior = jax.vmap(lambda p: jnp.diag(kernel.block(p, p)))(points)
    variance = jnp.maximum(prior - (gain * cross).sum((2, 3)), 0)
    gain = jnp.where(ocean[..., None, None, None], gain.reshape(*ocean.shape, *gain.shape[1:]), 0)
    variance = jnp.where(ocean[..., None], variance.reshape(*ocean.shape, 2), 0)
    return tuple(a.astype(jnp.float32) for a in (gain, variance, jnp.sqrt(error)))


@jax.jit
def _change(cross, factor, innovation):
    """K A^T (A K A^T + R)^-1 d, (cells c,)."""
    solved = jax.scipy.linalg.cho_solve((factor, True), innovation.reshape(-1))
    return cross.reshape(-1, solved.size) @ solved


@jax.jit
def _solved(kernel, cells, weights, sigma, points):
    """K A^T (cells, c, m, c), the lower Cholesky factor of A K A^T + R, and R (m, c)."""
    rows, corners = 2 * len(cells), [(cells[:, k], weights[:, k]) for k in range(cells.shape[1])]
    # cells (c) times observed positions (c): land too, so that A K A^T is A applied to it.
    block = jax.vmap(jax.vmap(kernel.block, (None, 0), out_axes=1), (0, None))
    cross = sum(block(points, points[cell]) * weight[None, None, :, None] for cell, weight in corners)
    seen = sum(cross[cell] * weight[:, None, None, None] for cell, weight in corners)
    error = kernel.error_variance(sigma)
    factor = jnp.linalg.cholesky(seen.reshape(rows, rows) + jnp.diag(error.reshape(-1)))
    return cross, factor, error


@struct.dataclass
class PriorRoot:
    """A square root of the prior covariance on the ocean cells, L L^T = K + 1e-8 variance I.

    Attributes:
      root: (N, N) where the components are independent and alike, else (2 N, 2 N), component fastest.
      cells: flat indices of the N ocean cells.
    """

    root: Float[Array, "k k"]
    cells: Int[Array, " n"]

    def draw(self, key: Key, background: Field) -> Field:
        """A draw of the prior: background + L n on ocean (y, x, 2), m/s; vmap over keys."""
        noise = jax.random.normal(key, (2 * len(self.cells),), self.root.dtype).reshape(len(self.root), -1)
        values = jnp.matmul(self.root, noise, precision=jax.lax.Precision.HIGHEST).reshape(-1, 2)
        return background.reshape(-1, 2).at[self.cells].add(values).reshape(background.shape)

    def rows(self, scale: np.ndarray) -> Float[np.ndarray, "2n 2n"]:
        """L of both components together, component fastest, each divided by its entry of `scale` (2,)."""
        root = np.asarray(self.root)
        if len(root) == len(self.cells):
            root = np.kron(root, np.eye(2, dtype=root.dtype))
        return root / np.tile(np.asarray(scale, root.dtype), len(self.cells))[:, None]


def prior_root(kernel: Kernel, ocean: Cells, positions: np.ndarray) -> PriorRoot:
    """The root from which the prior is drawn; costly (N^3 / 3, for divergence_free 8 N^3 / 3): keep it.

    Factored in float64, held in float32.

    Raises:
      InputError: shapes differ or a position is not finite.
    """
    ocean, positions = _check_grid(ocean, positions)
    with _float64():
        root = np.asarray(_root(_wide(kernel), positions[ocean]))
    return PriorRoot(root=jnp.asarray(root), cells=jnp.asarray(np.flatnonzero(ocean), jnp.int32))


@jax.jit
def _root(kernel, points):
    points = _points(kernel, points)
    covariance = kernel.tinygp()(points, points)
    return jnp.linalg.cholesky(covariance + ROOT_JITTER * jnp.diag(jnp.diag(covariance))).astype(jnp.float32)


def fit(
    name: str,
    velocity: np.ndarray,
    ocean: Cells,
    positions: np.ndarray,
    background: Field,
    steps: int = 200,
    seed: int = 0,
    points: int = 256,
    frames: int | None = None,
    learning_rate: float = 0.1,
) -> tuple[Kernel, np.ndarray]:
    """The kernel that makes training frames likeliest, and the loss of every step.

        loss = -log p(velocity - background at random cells) / values,     p = N(0, K + max(noise, 1e-6) I)

    Adam on the logarithms of lengthscale, variance and noise, with a cosine decay of the step; every step takes new
    cells, shared by its frames, so that it factors one matrix. Logarithms are held in a box: lengthscales from a
    tenth of the mean spacing to ten extents of the ocean, variances from 1e-4 to 1e4 and noise from 1e-6 (and
    1e-6 (m/s)^2) to 10 times the sample's.

    Args:
      name: one of NAMES.
      velocity: (n, y, x, 2), m/s; training frames. In gaps (NaN) nothing is counted; every frame then has cells of
        its own among those that are present, as many as the frame with the fewest has.
      ocean: (y, x) bool.
      positions: (y, x, 2).
      background: (y, x, 2), m/s.
      steps, seed: number of steps; seed of the choice of cells and frames.
      points, frames: cells and frames a step, at most those there are; by default FRAMES, or FRAMES_WITH_GAPS, as each
        of those takes a matrix of its own.
      learning_rate: first step of a logarithm.

    Raises:
      InputError: unknown name, shapes differ, values equal the background everywhere, fewer than two ocean cells (in
        a frame with gaps: that have a value), or steps, points, frames or learning_rate are not positive.
    """
    _check_name(name)
    ocean, positions = _check_grid(ocean, positions)
    velocity = _check_velocity(velocity, ocean)
    if np.shape(background) != positions.shape:
        raise InputError(f"background {np.shape(background)} does not fit the grid; expected {positions.shape}")
    numbers = steps, points, FRAMES if frames is None else frames, learning_rate
    if min(numbers) <= 0:
        raise InputError(f"steps, points, frames and learning_rate must be positive, got {numbers}")
    values, where = velocity[:, ocean] - np.asarray(background, np.float32)[ocean], positions[ocean]
    present = np.isfinite(values).all(-1)
    if present.sum(1).min() < 2 <= len(where):
        raise InputError(f"{(present.sum(1) < 2).sum()} of {len(values)} training frames have gaps almost everywhere")
    known = values if present.all() else values[present]
    extent, variance = float(np.linalg.norm(np.ptp(where, axis=0))), float(np.mean(known**2, dtype=float))
    if len(where) < 2 or variance == 0:
        raise InputError("a fit needs at least two ocean cells and fields that differ from their background")

    spacing, least = extent / math.sqrt(len(where)), max(JITTER, 1e-6 * variance)
    start = [math.sqrt(spacing * extent), variance, max(0.1 * variance, least)]
    box = [[spacing / 10, variance / 1e4, least], [10 * extent, variance * 1e4, max(10 * variance, least)]]
    if name == "rbf_legacy":
        start, *box = ([math.sqrt(l / 2), math.sqrt(v), n] for l, v, n in (start, *box))  # noqa: E741

    rng = np.random.default_rng(seed)
    if frames is None:
        frames = FRAMES if present.all() else FRAMES_WITH_GAPS
    if present.all():
        cell = np.stack([rng.permutation(len(where))[:points] for _ in range(steps)])
        frame = np.stack([rng.permutation(len(values))[:frames] for _ in range(steps)])
        batches = where[cell], values[frame[:, :, None], cell[:, None, :]].astype(float)
    else:
        frame = np.stack([rng.permutation(len(values))[:frames] for _ in range(steps)])
        points = min(points, int(present.sum(1).min()))
        cell = np.stack([[rng.permutation(np.flatnonzero(present[f]))[:points] for f in row] for row in frame])
        batches = where[cell], values[frame[:, :, None], cell].astype(float)
    with _float64():
        numbers, loss = map(np.asarray, _fit(name, np.log(start), np.log(box), batches, float(learning_rate)))
    return Kernel.create(name, *map(float, np.exp(numbers))), loss


@functools.partial(jax.jit, static_argnums=0)
def _fit(name, start, box, batches, learning_rate):
    """Logarithms (3,) of the fitted numbers and losses (steps,)."""
    # A short memory: the steep first gradients would otherwise hold back hundreds of steps.
    optimiser = optax.adam(optax.cosine_decay_schedule(1.0, len(batches[0])), b2=0.9)

    def loss(numbers, where, values):
        kernel = Kernel(name, *jnp.exp(numbers))
        if where.ndim == 3:  # positions of its own for each frame
            each = jax.vmap(lambda where, values: log_probability(kernel, where, values[None]))(where, values)
            return -each.sum() / values.size
        return -log_probability(kernel, where, values) / values.size

    def step(carry, batch):
        numbers, state = carry
        value, gradient = jax.value_and_grad(loss)(numbers, *batch)
        with jax.numpy_dtype_promotion("standard"):  # Adam raises floats to an integer count
            updates, state = optimiser.update(gradient, state)
        return (jnp.clip(numbers + learning_rate * updates, *box), state), value

    (numbers, _), losses = jax.lax.scan(step, (start, optimiser.init(start)), batches)
    return numbers, losses


def log_probability(kernel: Kernel, where: Float[Array, "m 2"], values: Float[Array, "n m 2"]) -> Scalar:
    """log p of n frames of deviations from the background at shared positions: N(0, K + max(noise, 1e-6) I)."""
    noise = kernel.error_variance(jnp.zeros((), values.dtype))
    process = tinygp.GaussianProcess(kernel.tinygp(), _points(kernel, where), diag=noise)
    # Independent components are further frames of one component.
    rows = values if kernel.name == "divergence_free" else jnp.swapaxes(values, 1, 2)
    return jax.vmap(process.log_probability)(rows.reshape(-1, process.num_data)).sum()


def _points(kernel, where):
    """What `kernel.tinygp()` takes for positions (n, 2): these or, component fastest, (position, component)."""
    if kernel.name != "divergence_free":
        return where
    return jnp.repeat(where, 2, axis=0), jnp.tile(jnp.arange(2), len(where))


@contextlib.contextmanager
def _float64() -> Iterator[None]:
    """Float64 inside; on the host where the default device is a TPU, which has no such arithmetic."""
    device = jax.local_devices(backend="cpu")[0] if jax.default_backend() == "tpu" else None
    # jax 0.8 moved it.
    enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    with enable_x64(True), jax.default_device(device):
        yield


def _wide(kernel: Kernel) -> Kernel:
    return jax.tree.map(lambda leaf: np.asarray(leaf, float), kernel)


def _check_name(name: str) -> None:
    if name not in NAMES:
        raise InputError(f"kernel {name!r} is not one of {', '.join(NAMES)}")


def _check_grid(ocean: Cells, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ocean, positions = np.asarray(ocean, bool), np.asarray(positions, float)
    if ocean.ndim != 2 or positions.shape != (*ocean.shape, 2):
        raise InputError(f"ocean {ocean.shape} and positions {positions.shape} must be (y, x) and (y, x, 2)")
    if not ocean.any():
        raise InputError("the grid has no ocean cell")
    if not np.isfinite(positions).all():
        raise InputError("positions must be finite, on land too")
    return ocean, positions


def _check_velocity(velocity: np.ndarray, ocean: np.ndarray) -> np.ndarray:
    if np.ndim(velocity) != 4 or np.shape(velocity)[1:] != (*ocean.shape, 2) or not len(velocity):
        raise InputError(f"velocity {np.shape(velocity)} must be (n, y, x, 2) on a grid of {ocean.shape}, n > 0")
    return np.asarray(velocity, np.float32)
