"""The linear-Gaussian estimate of a field from one pattern of observations, however its gain was found.

    mean     = background + G (y - A background)
    sample   = x_p + G (y + sigma n - A x_p),   x_p a draw of the prior             (Matheron's rule)

G depends on the pattern and the noise alone, so one analysis serves every frame that shares them.
"""

import jax
from flax import struct

from jax_repaint.array_types import Array, Field, Float, Key, Values
from jax_repaint.observe import Observation


@struct.dataclass
class Analysis:
    """Gain and error of a linear estimate for one pattern.

    Attributes:
      observation: the pattern; its values are not used.
      background: prior mean (y, x, c), in the units of the observation.
      gain: (y, x, c, m, c); zero on land.
      variance: posterior variance (y, x, c); zero on land.
    """

    observation: Observation
    background: Field
    gain: Float[Array, "y x c m c"]
    variance: Field

    def mean(self, values: Values) -> Field:
        """Posterior mean for observed values (m, c); vmap over values for frames that share the pattern."""
        return self.update(self.background, values)

    def update(self, field: Field, values: Values) -> Field:
        """field + G (values - A field)."""
        misfit = values - self.observation.apply(field)
        innovation = jax.numpy.where(self.observation.valid[:, None], misfit, 0.0)
        # The only product in float32 whose error shows (TPU and TF32 round its inputs to ten bits or fewer).
        precision = jax.lax.Precision.HIGHEST
        return field + jax.numpy.einsum("yxcmd,md->yxc", self.gain, innovation, precision=precision)

    def sample(self, key: Key, prior_draw: Field, values: Values) -> Field:
        """A posterior sample from a prior draw x_p (Matheron's rule; Doucet 2010, eq. 6).

        n has independent components; `posterior.linear_sample` draws from any R.
        """
        noise = self.observation.sigma * jax.random.normal(key, values.shape, values.dtype)
        return self.update(prior_draw, values + noise)
