"""Corrections of the x0 estimate: from E[x0 | x] to E[x0 | x, y] for observations y = A x0 + e, e ~ N(0, R).

x = x0 + sigma n in standardised units, one field. By Bayes' rule and Tweedie's formula

    E[x0 | x, y] = x0 + sigma^2 grad_x log p(y | x),    p(y | x) ~= N(y; A x0, S),    S = A V A^T + R

so that a correction is a choice of V ~= Cov[x0 | x], and of what is in front of A^T, with J = dx0/dx:

    paste      V = c I, R -> 0             observed cells take their values
    kalman     V = C_t                     x0 + C_t A^T S^-1 (y - A x0)              no gradient
    regimes    V = C_t of each regime of a mixture, weighted by p(regime | x, y)      no gradient
    cov_pigdm  V = C_t                     x0 + sigma^2 J^T A^T S^-1 (y - A x0)
    pigdm      V = sigma^2 / (1 + sigma^2) I, otherwise cov_pigdm
    mmps       V = sigma^2 J^T             x0 + V A^T S^-1 (y - A x0), by conjugate gradients
    kalman_cg  V = sigma^2 J^T             the same, preconditioned by S^-1 of kalman
    kalman_jvp V = sigma^2 J               the same
    dps        a step proportional to the gradient of |y - A x0|
    given      none: the denoiser itself has been given y (conditional.py)

C_t = (Sigma^-1 + I / sigma^2)^-1 is exact for a Gaussian prior (gains.py). Every correction is called as
`correction(denoise, x, sigma, sigma_next, evidence)` with `denoise` the denoiser at sigma; vmap outside.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from jax_repaint import gains
from jax_repaint.array_types import Array, Field, Float, Key, Level, Scalar, Values
from jax_repaint.denoise import PrincipalGaussian, Regimes
from jax_repaint.gains import HIGHEST, Gain
from jax_repaint.nets import convolution
from jax_repaint.observe import Observation


@struct.dataclass
class Evidence:
    """What is known of one field beside the denoiser.

    Attributes:
      ocean: (y, x, 1), 1 on ocean.
      observation: y and A; None for samples of the prior.
      noise: (m, c, c), R of each position; errors of different positions are independent.
      gaussian: the prior of `gain`.
      gain: of every level of the sampler, or of one level where a correction sees it.
      regimes: of the correction `regimes`, whose gains have an axis K more (after that of the levels).
      offset: added to the sample of the linear posterior that a member starts from; None for nothing.
    """

    ocean: Float[Array, "y x 1"]
    observation: Observation | None = None
    noise: Float[Array, "m c c"] | None = None
    gaussian: PrincipalGaussian | None = None
    gain: Gain | None = None
    regimes: Regimes | None = None
    offset: Field | None = None

    def misfit(self, x0: Field) -> Values:
        """y - A x0; 0 on padded rows."""
        return jnp.where(self.observation.valid[:, None], self.observation.values - self.observation.apply(x0), 0.0)

    def weigh(self, values: Values) -> Values:
        """S^-1 v of `gain`."""
        return gains.weigh(self.gaussian, self.observation, self.gain, values)

    def spread(self, values: Values) -> Field:
        """A^T v."""
        return self.ocean * self.observation.adjoint(values, self.ocean.shape[:2])


LONGEST = 4.0  # of a preconditioned step, in those that the preconditioner alone would take
Denoise = Callable[[Field], Field]
Correction = Callable[[Denoise, Field, Level, Level, Evidence], Field]


def white(ocean: Float[Array, "y x 1"], components: int = 2) -> PrincipalGaussian:
    """The Gaussian of independent values of variance 1 on the ocean."""
    field = (*ocean.shape[:2], components)
    # Of one type also where a program asks JAX for double precision.
    mean, direction, variance = (jnp.zeros(shape, jnp.float32) for shape in (field, (0, *field), (0,)))
    return PrincipalGaussian(mean, direction, variance, jnp.ones((), jnp.float32), jnp.asarray(ocean, jnp.float32))


def prior_draw(gaussian: PrincipalGaussian, key: Key, draw: Callable[..., Array] = jax.random.normal) -> Field:
    """A draw of N(mean, Sigma), mean + Sigma^(1/2) n, zero on land apart from the mean; (y, x, c)."""
    n = gaussian.ocean * draw(key, gaussian.mean.shape, gaussian.mean.dtype)
    excess = (jnp.sqrt(gaussian.variance) - jnp.sqrt(gaussian.rest)) * gaussian.project(n)
    return gaussian.mean + jnp.sqrt(gaussian.rest) * n + gaussian.combine(excess)


def none(denoise: Denoise, x: Field, sigma: Level, sigma_next: Level, evidence: Evidence) -> Field:
    """x0 itself: samples of the prior that the denoiser has learnt."""
    return denoise(x)


def paste(denoise: Denoise, x: Field, sigma: Level, sigma_next: Level, evidence: Evidence) -> Field:
    """x0 with the values of the observed cells, A^+ y + (I - A^+ A) x0.

    Wang et al. 2023 ("Zero-Shot Image Restoration Using Denoising Diffusion Null-Space Model"), algorithm 1. Points
    between cells count for their heaviest cell; observation errors are not used.
    """
    observed, value = evidence.observation.on_grid(evidence.ocean.shape[:2])
    return jnp.where(observed[..., None], value, denoise(x))


def kalman(denoise: Denoise, x: Field, sigma: Level, sigma_next: Level, evidence: Evidence) -> Field:
    """x0 + C_t A^T (A C_t A^T + R)^-1 (y - A x0): the Kalman analysis of the estimate, exact for a Gaussian prior.

    The moment matching of Rozet et al. 2024 (see `mmps`) with the conditional covariance of the Gaussian prior in the
    place of the network's Jacobian; no gradients.
    """
    x0 = denoise(x)
    return x0 + gains.increment(evidence.gaussian, evidence.observation, evidence.gain, evidence.misfit(x0), sigma)


def regimes(denoise: Denoise, x: Field, sigma: Level, sigma_next: Level, evidence: Evidence) -> Field:
    """x0 + sum_k w_k C_k A^T S_k^-1 (y - A x0): Kalman analyses of a mixture, weighted by p(k | x, y).

    w_k ~ weight_k N(x; mean_k, Sigma_k + sigma^2 I) N(y; A x0_k, S_k),   x0_k = E[x0 | x, k]
    """
    x0 = denoise(x)
    mixture, misfit = evidence.regimes, evidence.misfit(x0)

    def one(gaussian: PrincipalGaussian, gain: Gain) -> tuple[Scalar, Field]:
        error = evidence.misfit(gaussian(x, sigma))
        fit = jnp.sum(error * gains.weigh(gaussian, evidence.observation, gain, error)) + gain.log_det
        added = gains.increment(gaussian, evidence.observation, gain, misfit, sigma)
        return gaussian.log_density(x, sigma) - 0.5 * fit, added

    likely, added = jax.vmap(one)(mixture.gaussian, evidence.gain)
    weight = jax.nn.softmax(jnp.log(mixture.weight) + likely)
    return x0 + jnp.einsum("k,kyxc->yxc", weight, added, precision=HIGHEST)


def cov_pigdm(denoise: Denoise, x: Field, sigma: Level, sigma_next: Level, evidence: Evidence) -> Field:
    """x0 + sigma^2 J^T A^T (A C_t A^T + R)^-1 (y - A x0).

    Song et al. 2023 ("Pseudoinverse-Guided Diffusion Models for Inverse Problems"), with C_t in the place of their
    r_t^2 I, r_t^2 = sigma^2 / (1 + sigma^2). The gains of `white` have that very C_t: `pigdm`.
    """
    x0, pull = jax.vjp(denoise, x)
    return x0 + sigma**2 * pull(evidence.spread(evidence.weigh(evidence.misfit(x0))))[0]


def mmps(
    denoise: Denoise, x: Field, sigma: Level, sigma_next: Level, evidence: Evidence, *, cg_steps: int = 1
) -> Field:
    """x0 + sigma^2 J^T A^T v, (sigma^2 A J^T A^T + R) v = y - A x0, v by conjugate gradients from 0.

    Moment matching posterior sampling (Rozet et al. 2024, "Learning Diffusion Priors from Observations by Expectation
    Maximization"). The Jacobian of a network is not symmetric: more than 3 steps may make it worse. Rows are scaled by
    (sigma^2 / (1 + sigma^2) + R_ii)^(-1/2), which changes nothing where all errors are equal: without it the largest
    error would rule the length of the first step.
    """
    x0, pull = jax.vjp(denoise, x)
    scale = jax.lax.rsqrt(sigma**2 / (1 + sigma**2) + jnp.diagonal(evidence.noise, axis1=-2, axis2=-1))
    return _matched(x0, lambda v: pull(v)[0], sigma, evidence, cg_steps, None, scale)


def kalman_cg(
    denoise: Denoise, x: Field, sigma: Level, sigma_next: Level, evidence: Evidence, *, cg_steps: int = 2
) -> Field:
    """`mmps` with the conjugate gradients preconditioned by (A C_t A^T + R)^-1, that of `kalman`.

    One step is `cov_pigdm` with the length that the network's own covariance asks for, and exact for a Gaussian prior;
    more find directions that the prior does not know.
    """
    x0, pull = jax.vjp(denoise, x)
    return _matched(x0, lambda v: pull(v)[0], sigma, evidence, cg_steps, evidence.weigh)


def kalman_jvp(
    denoise: Denoise, x: Field, sigma: Level, sigma_next: Level, evidence: Evidence, *, cg_steps: int = 3
) -> Field:
    """x0 + sigma^2 J A^T v, (sigma^2 A J A^T + R) v = y - A x0: `kalman_cg` with J in the place of J^T.

    A covariance is symmetric, and so is J of an exact denoiser. Of a network J v is smooth, and small for v that is
    noise, as training asks. J^T v is neither, and dense observations, which tell small scales apart, amplify that
    (docs/results_samplers.md, Forwards or backwards).
    """
    with convolution.forwards():
        x0, push = jax.linearize(denoise, x)
    return _matched(x0, push, sigma, evidence, cg_steps, evidence.weigh)


def _matched(
    x0: Field,
    jacobian: Callable[[Field], Field],
    sigma: Level,
    evidence: Evidence,
    cg_steps: int,
    precondition: Callable[[Values], Values] | None,
    scale: float | Values = 1.0,
) -> Field:
    def operator(w: Values) -> tuple[Values, Field]:
        v = scale * w
        covariance = sigma**2 * jacobian(evidence.spread(v))
        noise = jnp.einsum("mcd,md->mc", evidence.noise, v, precision=HIGHEST)
        return scale * (noise + evidence.observation.apply(covariance)), covariance

    return x0 + conjugate_gradients(operator, scale * evidence.misfit(x0), cg_steps, precondition)


def dps(denoise: Denoise, x: Field, sigma: Level, sigma_next: Level, evidence: Evidence, *, step: Level = 0.3) -> Field:
    """x0 - step sqrt((1 + sigma^2)(1 + sigma'^2)) / (1 - sigma'^2 / sigma^2) grad_x |y - A x0(x)|.

    Under ancestral steps (eta = 1) to sigma' = `sigma_next` this moves the variance-preserving x_t by
    -step grad_{x_t} |y - A x0|, as Chung et al. 2023 ("Diffusion Posterior Sampling for General Noisy Inverse
    Problems", algorithm 1 with its normalised step). `step` multiplies a gradient without units and so has those of the
    field (standard deviations). It is taken once a level: it has to be tuned again for another number of levels.
    Implementations that differentiate the square and divide by the norm take twice the step.
    """
    x0, pull = jax.vjp(denoise, x)
    misfit = evidence.misfit(x0)
    length = jnp.sqrt(jnp.sum(misfit**2))
    downhill = pull(evidence.spread(misfit / jnp.maximum(length, jnp.finfo(x.dtype).tiny)))[0]
    scale = jnp.sqrt((1 + sigma**2) * (1 + sigma_next**2)) / (1 - (sigma_next / sigma) ** 2)
    return x0 + step * scale * downhill


CORRECTIONS: dict[str, Correction] = {
    "none": none,
    "paste": paste,
    "kalman": kalman,
    "regimes": regimes,
    "cov_pigdm": cov_pigdm,
    "pigdm": cov_pigdm,
    "mmps": mmps,
    "kalman_cg": kalman_cg,
    "kalman_jvp": kalman_jvp,
    "dps": dps,
    "given": none,
}


# Corrections that cost more than a network call.
WITH_GRADIENTS = ("cov_pigdm", "pigdm", "mmps", "kalman_cg", "kalman_jvp", "dps")


def conjugate_gradients(
    operator: Callable[[Array], tuple[Array, Array]],
    right: Array,
    steps: int,
    precondition: Callable[[Array], Array] | None = None,
) -> Array:
    """B v after `steps` steps from 0 of S v = right (Hestenes and Stiefel 1952, section 3; preconditioned, section 11).

    Stays where it is once the residual has reached rounding, or where a direction p has no positive curvature p^T S p
    (the Jacobian of a network is not a covariance). A preconditioner M is trusted to a factor of LONGEST: along a
    direction with less than p^T M p / LONGEST the step is as long as for S = M, and the last.

    Args:
      operator: v -> S v and B v, both linear.
      precondition: r -> M^-1 r, positive definite; r itself by default.
    """
    first = right if precondition is None else precondition(right)
    least = 0.0 if precondition is None else 1 / LONGEST
    enough = (jnp.finfo(right.dtype).eps ** 2) * jnp.sum(right * first)

    def step(state: tuple[Array, ...], _: None) -> tuple[tuple[Array, ...], None]:
        carried, residual, weighed, direction, trusted, going = state
        image, moved = operator(direction)
        square, curvature = jnp.sum(residual * weighed), jnp.sum(direction * image)
        going = going & (square > enough)
        curved = curvature > least * trusted
        usable = going & curved
        if precondition is None:
            length = jnp.where(usable, square / jnp.where(usable, curvature, 1.0), 0.0)
        else:
            length = jnp.where(going, square / jnp.where(going, jnp.where(curved, curvature, trusted), 1.0), 0.0)
        left = residual - length * image
        again = left if precondition is None else precondition(left)
        remaining = jnp.sum(left * again)
        turn = jnp.where(usable, remaining / jnp.where(usable, square, 1.0), 0.0)
        # p^T M p of the next p, as what is left is orthogonal to this one.
        trusted = remaining + turn**2 * trusted
        return (carried + length * moved, left, again, again + turn * direction, trusted, usable), None

    shape = jax.eval_shape(operator, right)[1]
    start = jnp.zeros(shape.shape, shape.dtype), right, first, first, jnp.sum(right * first), jnp.bool_(True)
    return jax.lax.scan(step, start, length=steps)[0][0]
