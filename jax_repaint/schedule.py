"""Noise schedules: variance-preserving steps and noise levels.

Variance-preserving steps t = 0..T-1 (Ho et al. 2020, "Denoising Diffusion Probabilistic Models"):
    x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps,     alpha_t = 1 - beta_t,   alpha_bar_t = prod alpha
Noise levels (Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models"):
    x = x0 + sigma n,     sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t),     x = x_t / sqrt(alpha_bar_t)
"""

import math

import jax.numpy as jnp
import numpy as np
from flax import struct

from jax_repaint.array_types import Array, Float, Level
from jax_repaint.checks import check_number, whole_number
from jax_repaint.errors import InputError


@struct.dataclass
class Schedule:
    """Tables of a variance-preserving schedule; index t = 0 has the least noise.

    Attributes:
      beta, alpha, alpha_bar: (T,).
      alpha_bar_prev: alpha_bar_{t-1}, 1 at t = 0.
      posterior_variance: beta_tilde_t = (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) beta_t (Ho et al., eq. 7).
      sigma: noise over signal, (T,).
    """

    beta: Float[Array, " T"]
    alpha: Float[Array, " T"]
    alpha_bar: Float[Array, " T"]
    alpha_bar_prev: Float[Array, " T"]
    posterior_variance: Float[Array, " T"]
    sigma: Float[Array, " T"]

    @property
    def steps(self) -> int:
        """T."""
        return self.beta.shape[-1]

    @classmethod
    def create(cls, beta: np.ndarray) -> "Schedule":
        """Tables from beta (T,), accumulated in float32.

        The networks and results this package is held to used float32 here: alpha_1 is off by 3e-4 of beta_1, which
        375 steps turn into 1e-3 of the field. A network meets the noise levels that its own training computed.

        Raises:
          InputError: beta outside (0, 1), or so small or large that no noise or no signal is left in float32.
        """
        beta = np.asarray(beta, np.float32)
        if beta.ndim != 1 or not beta.size or not ((beta > 0) & (beta < 1)).all():
            raise InputError("beta must be a sequence of numbers between 0 and 1")
        one = np.float32(1)
        alpha = one - beta
        alpha_bar = np.cumprod(alpha, dtype=np.float32)
        if not (alpha_bar[0] < 1 and alpha_bar[-1] > 1e-12):
            raise InputError(
                f"alpha_bar goes from {alpha_bar[0]:g} to {alpha_bar[-1]:g}, between which float32 loses the noise of "
                "the first step or the signal of the last one"
            )
        before = np.concatenate([[one], alpha_bar[:-1]])
        posterior_variance = (one - before) / (one - alpha_bar) * beta
        sigma = np.sqrt((one - alpha_bar) / alpha_bar)
        return cls(*map(jnp.asarray, (beta, alpha, alpha_bar, before, posterior_variance, sigma)))

    @classmethod
    def linear(cls, steps: int = 250, min_beta: float = 1e-4, max_beta: float = 0.02) -> "Schedule":
        """beta_t from `min_beta` to `max_beta` in equal steps; the defaults end at alpha_bar 0.0797, sigma 3.40."""
        if steps < 2 or not 0 < min_beta <= max_beta < 1:
            raise InputError(
                "a linear schedule needs steps >= 2 and 0 < min_beta <= max_beta < 1, "
                f"got {steps}, {min_beta}, {max_beta}"
            )
        return cls.create(np.linspace(min_beta, max_beta, steps))

    def step_of(self, sigma: Level) -> Level:
        """The step t (a real number in 0..T-1) whose noise level is sigma, linear in log sigma between steps."""
        return jnp.interp(
            jnp.log(sigma), jnp.log(self.sigma), jnp.arange(self.steps, dtype=self.sigma.dtype)
        )  # clamped at both ends


def levels(count: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> np.ndarray:
    """Noise levels from sigma_max down to sigma_min, equally spaced in sigma^(1/rho) (Karras et al. 2022, eq. 5).

    Args:
      count: number of levels, at least 2.
      sigma_min, sigma_max: 0 < sigma_min < sigma_max.

    Returns:
      (count,) float64, decreasing.

    Raises:
      InputError: no whole number of levels, or ends that are no such numbers.
    """
    count = whole_number("the number of levels", count, 2)
    check_number("sigma_min", sigma_min)
    check_number("sigma_max", sigma_max)
    if not 0 < sigma_min < sigma_max < math.inf:
        raise InputError(f"levels need finite 0 < sigma_min < sigma_max, got {sigma_min}, {sigma_max}")
    made = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), count) ** rho
    # Not a rounding away from what was asked for.
    made[0], made[-1] = sigma_max, sigma_min
    return made
