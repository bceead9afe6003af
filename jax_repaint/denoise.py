"""Denoisers: the expected clean field given a noisy one, D(x; sigma) = E[x0 | x = x0 + sigma n].

A denoiser is a pytree that is called with ONE field (y, x, c) and a noise level; vmap outside. Every sampler of this
package sees nothing else of a network. Networks take a key more, which turns their dropout on in training.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct

from jax_repaint.array_types import Array, Field, Float, Key, Level, Scalar
from jax_repaint.nets import unet
from jax_repaint.schedule import Schedule

# Noise embedding of networks on a continuous level: log sigma between these ends covers positions 0..POSITIONS.
EMBEDDED_SIGMA = (1e-3, 1e3)
POSITIONS = 1000.0


class Denoiser(Protocol):
    """Anything that estimates x0 of one field."""

    def __call__(self, x: Field, sigma: Level) -> Field:
        """E[x0 | x]; x: (y, x, c) = x0 + sigma n."""


@struct.dataclass
class EpsDenoiser:
    """A network that predicts eps at the steps of a variance-preserving schedule.

    D(x; sigma) = x - sigma eps(a x, t(sigma)),   a = 1 / sqrt(1 + sigma^2)

    Land and padding are cells like any other here: such networks have seen noise on them in training.
    """

    params: dict
    schedule: Schedule
    graphdef: nnx.GraphDef = struct.field(pytree_node=False)

    def __call__(self, x: Field, sigma: Level, dropout: Key | None = None) -> Field:
        sigma = floating(sigma)
        scaled = x * jax.lax.rsqrt(1 + sigma**2)
        position = self.schedule.step_of(sigma)
        # Steps of the schedule itself arrive with rounding errors of their logarithms.
        nearest = jnp.round(position)
        position = jnp.where(jnp.abs(position - nearest) < 1e-3, nearest, position)
        return x - sigma * unet.apply(self.graphdef, self.params, scaled[None], position[None], dropout)[0]


@struct.dataclass
class Preconditioner:
    """Scalings under which a network sees and predicts fields of unit variance (Karras et al. 2022, eq. 7, table 1).

    c_skip = s^2 / (sigma^2 + s^2),  c_out = sigma s / sqrt(sigma^2 + s^2),  c_in = 1 / sqrt(sigma^2 + s^2), s = 1.
    """

    skip: Level
    out: Level
    into: Level
    position: Level


def floating(sigma: Level) -> Level:
    """A noise level as a floating number, which a whole number is too."""
    sigma = jnp.asarray(sigma)
    return sigma if jnp.issubdtype(sigma.dtype, jnp.floating) else sigma.astype(jnp.float32)


def precondition(sigma: Level) -> Preconditioner:
    """Scalings at `sigma` for standardised data; the position covers log sigma evenly."""
    sigma = floating(sigma)
    total = 1 + sigma**2
    low, high = np.log(EMBEDDED_SIGMA[0]), np.log(EMBEDDED_SIGMA[1])
    position = POSITIONS * (jnp.log(sigma) - low) / (high - low)
    return Preconditioner(1 / total, sigma * jax.lax.rsqrt(total), jax.lax.rsqrt(total), position)


@struct.dataclass
class EdmDenoiser:
    """A network on a continuous noise level, blind to land.

    D(x; sigma) = ocean (c_skip x + c_out F(c_in ocean x, sigma))   (Karras et al. 2022, eq. 7)
    """

    params: dict
    ocean: Float[Array, "y x 1"]
    graphdef: nnx.GraphDef = struct.field(pytree_node=False)

    def __call__(self, x: Field, sigma: Level, dropout: Key | None = None) -> Field:
        x = x * self.ocean
        scale = precondition(sigma)
        f = unet.apply(self.graphdef, self.params, scale.into * x[None], scale.position[None], dropout)[0]
        return self.ocean * (scale.skip * x + scale.out * f)


@struct.dataclass
class PrincipalGaussian:
    """A Gaussian with orthonormal directions and one remaining variance (Tipping and Bishop 1999, eq. 5-6).

    Sigma = sum_i lambda_i e_i e_i^T + rest (I - sum_i e_i e_i^T) on the ocean, so that Sigma + sigma^2 I is diagonal
    in the same directions at every sigma and its exact denoiser costs two matrix products.

    Attributes:
      mean: (y, x, c).
      direction: (r, y, x, c), orthonormal, zero on land.
      variance: (r,), lambda_i.
      rest: scalar variance of every direction left out.
      ocean: (y, x, 1), 1 on ocean.
    """

    mean: Field
    direction: Float[Array, "r y x c"]
    variance: Float[Array, " r"]
    rest: Level
    ocean: Float[Array, "y x 1"]

    def __call__(self, x: Field, sigma: Level) -> Field:
        """E[x0 | x] = mean + sum_i (w_i - w_rest) <e_i, x - mean> e_i + w_rest (x - mean),  w = v / (v + sigma^2)."""
        anomaly, sigma = (x - self.mean) * self.ocean, floating(sigma)
        weight, rest = self.variance / (self.variance + sigma**2), self.rest / (self.rest + sigma**2)
        leading = self.combine((weight - rest) * self.project(anomaly))
        return self.ocean * self.mean + leading + rest * anomaly

    # Products of matrices: of more axes than two XLA makes slow loops on a CPU inside of lax.scan, where samplers are.

    def project(self, field: Field) -> Float[Array, " r"]:
        """<e_i, field>, the amplitudes of a field along the directions."""
        return jnp.matmul(self._matrix, field.ravel(), precision=jax.lax.Precision.HIGHEST)

    def combine(self, amplitude: Float[Array, " r"]) -> Field:
        """sum_i a_i e_i, the field (y, x, c) of amplitudes along the directions."""
        field = jnp.matmul(amplitude, self._matrix, precision=jax.lax.Precision.HIGHEST)
        return field.reshape(self.direction.shape[1:])

    @property
    def _matrix(self) -> Float[Array, "r v"]:
        count, *field = self.direction.shape  # there may be no direction
        return self.direction.reshape(count, math.prod(field))

    def residual_variance(self, sigma: Level) -> Level:
        """Mean square error of this denoiser per ocean value, mean of v sigma^2 / (v + sigma^2)."""
        return self._per_value(lambda v: v / (1 + v / sigma**2))

    def removed_variance(self, sigma: Level) -> Level:
        """Mean square of x - D(x; sigma) per ocean value, mean of sigma^4 / (v + sigma^2)."""
        return self._per_value(lambda v: sigma**4 / (v + sigma**2))

    def log_density(self, x: Field, sigma: Level) -> Scalar:
        """log N(x; mean, Sigma + sigma^2 I) over the ocean, without the constant -n/2 log(2 pi)."""
        anomaly = (x - self.mean) * self.ocean
        along = self.project(anomaly)
        others = self.direction.shape[-1] * self.ocean.sum() - self.variance.size
        # |anomaly|^2 - |along|^2 would lose the little that is left.
        left = anomaly - self.combine(along)
        variance, rest = self.variance + sigma**2, self.rest + sigma**2
        squares = jnp.sum(along**2 / variance) + jnp.sum(left**2) / rest
        return -0.5 * (squares + jnp.sum(jnp.log(variance)) + others * jnp.log(rest))

    def _per_value(self, of_variance: Callable[[Array], Array]) -> Level:
        count = self.direction.shape[-1] * self.ocean.sum()
        others = count - self.variance.size
        return (of_variance(self.variance).sum() + others * of_variance(self.rest)) / count


@struct.dataclass
class Regimes:
    """A mixture of K Gaussians of the same grid and rank, p(x0) = sum_k weight_k N(x0; mean_k, Sigma_k).

    Attributes:
      weight: (K,), sums to 1.
      gaussian: every leaf with a leading axis K.
    """

    weight: Float[Array, " K"]
    gaussian: PrincipalGaussian

    def each(self) -> list[PrincipalGaussian]:
        """The K Gaussians one by one."""
        return [jax.tree.map(lambda leaf, k=k: leaf[k], self.gaussian) for k in range(len(self.weight))]

    def __call__(self, x: Field, sigma: Level) -> Field:
        """E[x0 | x]: the regimes' exact denoisers, weighted by p(k | x)."""

        def one(gaussian: PrincipalGaussian) -> tuple[Scalar, Field]:
            return gaussian.log_density(x, sigma), gaussian(x, sigma)

        likely, each = jax.vmap(one)(self.gaussian)
        weight = jax.nn.softmax(jnp.log(self.weight) + likely)
        return jnp.einsum("k,kyxc->yxc", weight, each, precision=jax.lax.Precision.HIGHEST)


@struct.dataclass
class AnchoredDenoiser:
    """A network that corrects the exact Gaussian denoiser of the training covariance.

    D(x; sigma) = D_G(x; sigma) + c(sigma) F((x - D_G) / r(sigma), D_G),   c^2, r^2 = mean squares of x0 - D_G, x - D_G

    With F = 0 it is the best linear denoiser; F is left to learn what the covariance cannot say.
    """

    params: dict
    gaussian: PrincipalGaussian
    graphdef: nnx.GraphDef = struct.field(pytree_node=False)

    def __call__(self, x: Field, sigma: Level, dropout: Key | None = None) -> Field:
        x, sigma = x * self.gaussian.ocean, floating(sigma)
        linear, error = self.gaussian(x, sigma), self.gaussian.residual_variance(sigma)
        return anchored(self.params, self.graphdef, self.gaussian, x, sigma, linear, error, dropout=dropout)


def anchored(
    params: dict,
    graphdef: nnx.GraphDef,
    gaussian: PrincipalGaussian,
    x: Field,
    sigma: Level,
    estimate: Field,
    error: Level,
    also: Sequence[Array] = (),
    dropout: Key | None = None,
) -> Field:
    """G + c F((x - G) / r, G, also; sigma), an estimate of x0 with what a network makes of the rest.

    Args:
      x: (y, x, c), zero on land.
      estimate: (y, x, c), G.
      error: c^2, the expected mean square error of G per ocean value.
      also: more channels that the network sees, (y, x, n) each.
    """
    removed = (x - estimate) * jax.lax.rsqrt(gaussian.removed_variance(sigma))
    seen = jnp.concatenate([removed, estimate, *also], axis=-1)
    f = unet.apply(graphdef, params, seen[None], precondition(sigma).position[None], dropout)[0]
    return estimate + jnp.sqrt(error) * gaussian.ocean * f
