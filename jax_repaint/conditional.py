"""A denoiser that is given the observations: D(x, y; sigma) = E[x0 | x = x0 + sigma n, y = A x0 + e].

A sampler needs no correction of such an estimate. For observed cells the observation and x together are cells of less
noise, and E[x0 | x, y] is denoising with a noise level of its own in each cell; a network that learns it has to see
the pattern, and has to be trained on patterns.

    D(x, y; sigma) = G + c F((x - G) / r(sigma), G, observed; sigma)
    G = E[x0 | x, y] of the Gaussian prior, the Kalman analysis of its exact denoiser
    c^2 = expected mean square error of G,   r^2 = mean square of x - D_G without observations

With F = 0 it is the best linear estimate from x and y together. Without observations it is `denoise.AnchoredDenoiser`.
"""

import jax.numpy as jnp
from flax import nnx, struct

from jax_repaint import gains, guide
from jax_repaint.array_types import Array, Field, Float, Key, Level
from jax_repaint.denoise import PrincipalGaussian, anchored, floating


@struct.dataclass
class ConditionalDenoiser:
    """The denoiser of the module docstring; called without observations it is one of the prior."""

    params: dict
    gaussian: PrincipalGaussian
    graphdef: nnx.GraphDef = struct.field(pytree_node=False)

    def __call__(self, x: Field, sigma: Level, dropout: Key | None = None) -> Field:
        """E[x0 | x]."""
        x, sigma = x * self.gaussian.ocean, floating(sigma)
        nowhere = jnp.zeros_like(self.gaussian.ocean)
        error = self.gaussian.residual_variance(sigma)
        return self._correct(x, sigma, self.gaussian(x, sigma), error, nowhere, dropout)

    def given(self, x: Field, sigma: Level, evidence: guide.Evidence, dropout: Key | None = None) -> Field:
        """E[x0 | x, y].

        Args:
          x: (y, x, c) = x0 + sigma n.
          evidence: with the Gaussian of this denoiser and the gain of this level.
        """
        x, sigma = x * self.gaussian.ocean, floating(sigma)
        estimate = guide.kalman(lambda x: self.gaussian(x, sigma), x, sigma, sigma, evidence)
        error = gains.remaining_variance(self.gaussian, evidence.observation, evidence.gain, sigma)
        return self._correct(x, sigma, estimate, error, share_observed(evidence), dropout)

    def _correct(
        self, x: Field, sigma: Level, estimate: Field, error: Level, observed: Array, dropout: Key | None
    ) -> Field:
        return anchored(self.params, self.graphdef, self.gaussian, x, sigma, estimate, error, [observed], dropout)


def share_observed(evidence: guide.Evidence) -> Float[Array, "y x 1"]:
    """How much of each cell the observations see, 0..1: 1 in an observed cell, the weights of points between cells."""
    seen = evidence.observation
    ones, share = seen.valid.astype(jnp.float32)[:, None], seen.weights if seen.share is None else seen.share
    return jnp.minimum(evidence.replace(observation=seen.replace(weights=share)).spread(ones), 1.0)
