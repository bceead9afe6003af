"""The linear-Gaussian estimate of a field from one pattern of observations, however its gain was found.

    mean     = background + G (y - A background)
    sample   = x_p + G (y + sigma n - A x_p),   x_p a draw of the prior             (Matheron's rule)

G depends on the pattern and the noise alone, so one analysis serves every frame that shares them.
"""

import abc

import jax
import jax.numpy as jnp
from flax import struct

from jax_repaint import gains, guide
from jax_repaint.array_types import Array, Field, Float, Key, Values
from jax_repaint.observe import Observation


class Analysis(abc.ABC):
    """Gain and error of a linear estimate for one pattern.

    Attributes:
      observation: the pattern; its values are not used.
      background: prior mean (y, x, c), in the units of the observation.
      variance: posterior variance (y, x, c); zero on land.
    """

    observation: Observation
    background: Field
    variance: Field

    @abc.abstractmethod
    def increment(self, innovation: Values) -> Field:
        """G d, zero on land; d (m, c) is 0 on padded rows."""

    def mean(self, values: Values) -> Field:
        """Posterior mean for observed values (m, c); vmap over values for frames that share the pattern."""
        return self.update(self.background, values)

    def update(self, field: Field, values: Values) -> Field:
        """field + G (values - A field)."""
        misfit = values - self.observation.apply(field)
        return field + self.increment(jnp.where(self.observation.valid[:, None], misfit, 0.0))

    def sample(self, key: Key, prior_draw: Field, values: Values) -> Field:
        """A posterior sample from a prior draw x_p (Matheron's rule; Doucet 2010, eq. 6).

        n has independent components; `posterior.linear_sample` draws from any R.
        """
        noise = self.observation.sigma * jax.random.normal(key, values.shape, values.dtype)
        return self.update(prior_draw, values + noise)


@struct.dataclass
class DenseAnalysis(Analysis):
    """An analysis with its gain as one matrix.

    Attributes:
      gain: (y, x, c, m, c); zero on land.
    """

    observation: Observation
    background: Field
    gain: Float[Array, "y x c m c"]
    variance: Field

    def increment(self, innovation: Values) -> Field:
        """See Analysis."""
        # Rounded factors (TPU, TF32) would show.
        return jnp.einsum("yxcmd,md->yxc", self.gain, innovation, precision=gains.HIGHEST)


@struct.dataclass
class PrincipalAnalysis(Analysis):
    """An analysis of a PrincipalGaussian with its gain in the factors of `gains.Gain`.

    Attributes:
      evidence: with the gain of sigma = inf.
    """

    evidence: guide.Evidence
    variance: Field

    @property
    def observation(self) -> Observation:
        """See Analysis."""
        return self.evidence.observation

    @property
    def background(self) -> Field:
        """See Analysis."""
        return self.evidence.gaussian.mean

    def increment(self, innovation: Values) -> Field:
        """See Analysis."""
        given = self.evidence
        return gains.increment(given.gaussian, given.observation, given.gain, innovation, jnp.inf)
