"""One-step updates of a variance-preserving chain: each formula once, for one field or any batch.

Notation of schedule.py; s = t - 1 is the next, less noisy step. The noise is an argument, not a key, so that tests
can fix it and samplers can scale it.
"""

import jax.numpy as jnp

from jax_repaint.array_types import Array, Level


def diffuse(x0: Array, noise: Array, alpha_bar: Level) -> Array:
    """x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) n (Ho et al. 2020, eq. 4)."""
    return jnp.sqrt(alpha_bar) * x0 + jnp.sqrt(1 - alpha_bar) * noise


def ancestral_mean(x_t: Array, x0: Array, beta: Level, alpha_bar: Level, alpha_bar_prev: Level) -> Array:
    """Mean of q(x_s | x_t, x0) (Ho et al. 2020, eq. 7).

    mu = sqrt(alpha_bar_s) beta_t / (1 - alpha_bar_t) x0 + sqrt(alpha_t) (1 - alpha_bar_s) / (1 - alpha_bar_t) x_t
    """
    to_x0 = jnp.sqrt(alpha_bar_prev) * beta / (1 - alpha_bar)
    to_x_t = jnp.sqrt(1 - beta) * (1 - alpha_bar_prev) / (1 - alpha_bar)
    return to_x0 * x0 + to_x_t * x_t


def renoise(x_s: Array, noise: Array, beta: Level) -> Array:
    """One step back up, x_t = sqrt(alpha_t) x_s + sqrt(beta_t) n (Lugmayr et al. 2022, algorithm 1, line 10)."""
    return jnp.sqrt(1 - beta) * x_s + jnp.sqrt(beta) * noise


def ddim(x: Array, x0: Array, noise: Array, sigma: Level, sigma_next: Level, eta: Level) -> Array:
    """From noise level sigma to sigma_next < sigma, in x = x0 + sigma n (Song et al. 2021, "DDIM", eqs. 12, 16).

    x' = x0 + sqrt(sigma'^2 - v) (x - x0) / sigma + sqrt(v) n,   v = eta^2 sigma'^2 (1 - sigma'^2 / sigma^2);
    eta = 1 is ancestral sampling, eta = 0 the deterministic flow.
    """
    left = 1 - (sigma_next / sigma) ** 2
    fresh = eta * sigma_next * _root(left)
    return x0 + sigma_next * _root(1 - eta**2 * left) / sigma * (x - x0) + fresh * noise


def _root(x: Level) -> Level:
    """Square root whose derivative at 0 is 0 and not infinite: where no noise is left it has no part in the result."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)
