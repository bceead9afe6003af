"""Samples of p(x0 | y) from a corrected denoiser: one field, one member; vmap outside.

x = x0 + sigma n in standardised units; levels sigma_1 > ... > sigma_N, sigma_{N+1} = 0. From x = x_p + sigma_1 n, with
x_p a posterior SAMPLE of the linear prior, for every level

    x0 = correction(D(x; sigma))                            guide.py; land keeps the values of the start
    x  = x0 + sqrt(sigma'^2 - v) (x - x0) / sigma + sqrt(v) n,    v = eta^2 sigma'^2 (1 - sigma'^2 / sigma^2)

and the output is the last corrected x0. Started from noise alone, N(0, sigma_1^2), the directions of the field whose
variance exceeds sigma_1^2 are lost; from the linear mean, their spread is.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jax_repaint import gains, guide, transition
from jax_repaint.array_types import Array, Field, Float, Key, Level
from jax_repaint.checks import check_number, whole_number
from jax_repaint.denoise import Denoiser, PrincipalGaussian, Regimes
from jax_repaint.errors import InputError
from jax_repaint.latest import Latest
from jax_repaint.observe import Observation
from jax_repaint.prior.analysis import Analysis
from jax_repaint.sample import Draw
from jax_repaint.schedule import levels

CG_STEPS = {"mmps": 1, "kalman_cg": 2, "kalman_jvp": 3}  # docs/results_samplers.md, The length of a step


@struct.dataclass
class Posterior:
    """Hyperparameters of a posterior sampler. Leaves are numbers of the formulas; the rest changes the program.

    Attributes:
      sigma: (N,) noise levels, decreasing.
      eta: share of fresh noise in a step; 1 ancestral, 0 deterministic.
      dps_step: step of the correction `dps`, in standardised units.
      correction: a name of guide.CORRECTIONS.
      cg_steps: conjugate gradient steps of `mmps`, `kalman_cg` and `kalman_jvp`.
      second_order: extrapolate x0 from the last two levels (needs eta = 0).
    """

    sigma: Float[Array, " N"]
    eta: Level
    dps_step: Level
    correction: str = struct.field(pytree_node=False)
    cg_steps: int = struct.field(pytree_node=False)
    second_order: bool = struct.field(pytree_node=False)

    @classmethod
    def create(
        cls,
        sigma_max: float,
        sigma_min: float = 0.01,
        count: int = 16,
        *,
        correction: str = "kalman",
        eta: float = 1.0,
        dps_step: float = 0.3,
        cg_steps: int | None = None,
        second_order: bool = False,
        stop_sigma: float = 0.0,
    ) -> "Posterior":
        """Checks the numbers and makes leaves of them; levels with rho 7 (schedule.levels).

        Args:
          cg_steps: by default those of CG_STEPS.
          stop_sigma: levels below it are not run. For the mean alone about 1.5 is enough: what smaller levels add
            to a member has no mean.

        Raises:
          InputError: a number is outside its range, an unknown correction, a second order step with eta > 0.
        """
        if correction not in guide.CORRECTIONS:
            raise InputError(f"correction {correction!r} is not one of {', '.join(guide.CORRECTIONS)}")
        for name, value in (("eta", eta), ("dps_step", dps_step), ("stop_sigma", stop_sigma), ("sigma_max", sigma_max)):
            check_number(name, value)
        if not 0 <= eta <= 1:
            raise InputError(f"eta must be in [0, 1], got {eta}")
        if second_order and eta > 0:
            raise InputError(f"second order steps are deterministic: eta must be 0, got {eta}")
        if not 0 < dps_step < math.inf:
            raise InputError(f"dps_step must be positive and finite, got {dps_step}")
        usual = CG_STEPS.get(correction, 1)
        cg_steps = usual if cg_steps is None else whole_number("cg_steps", cg_steps, 1)
        if not 0 <= stop_sigma <= sigma_max:
            raise InputError(f"stop_sigma must be from 0 to the first level {sigma_max}, got {stop_sigma}")
        sigma = levels(count, sigma_min, sigma_max)
        # The first level always runs: rounding may leave it a little below sigma_max.
        run = np.append(True, sigma[1:] >= stop_sigma)
        numbers = (jnp.asarray(v, jnp.float32) for v in (sigma[run], eta, dps_step))
        return cls(*numbers, correction, cg_steps, bool(second_order))

    @property
    def calls(self) -> int:
        """Network calls of one member, without those of gradients."""
        return self.sigma.shape[-1]


def evidence_for(
    hyper: Posterior,
    ocean: Float[Array, "y x 1"],
    observation: Observation | None = None,
    gaussian: PrincipalGaussian | Regimes | None = None,
    correlation: float | np.ndarray = 0.0,
) -> guide.Evidence:
    """What `posterior` needs to know of one pattern, with the gains of its levels where the correction has them.

    Made outside of jit and vmap (gains.kalman_gains). Frames that share the pattern differ in
    `evidence.observation.values` alone, and the gains of the latest patterns are kept.

    Args:
      hyper: its levels and correction.
      ocean: (y, x, 1), 1 on ocean.
      observation: in standardised units; may be left out for the correction `none` only.
      gaussian: prior of `kalman`, `kalman_cg`, `kalman_jvp`, `cov_pigdm` and `given`; of `regimes` their mixture.
      correlation: of the errors of u and v (gains.noise_covariance); the same as of the analysis to start from.

    Raises:
      InputError: the correction needs an observation or a Gaussian prior that was not given, a prior of another grid
        or coast, an observation outside of the grid.
    """
    ocean = jnp.asarray(ocean, jnp.float32)
    if hyper.correction == "none":
        return guide.Evidence(ocean)
    if observation is None:
        raise InputError(f"the correction {hyper.correction} needs an observation")
    if int(observation.cells.max()) >= ocean.size:
        raise InputError(
            f"an observation is at cell {int(observation.cells.max())} of a grid of {ocean.size}; was it made for "
            "another grid, or not padded (observe.pad_grid)?"
        )
    known = guide.Evidence(ocean, observation, gains.noise_covariance(observation, correlation))
    if hyper.correction == "pigdm":
        gaussian = guide.white(ocean, observation.values.shape[-1])
    elif hyper.correction not in ("kalman", "cov_pigdm", "given", "regimes", "kalman_cg", "kalman_jvp"):
        return known
    mixture = hyper.correction == "regimes"
    if not isinstance(gaussian, Regimes if mixture else PrincipalGaussian):
        needed = "mixture of regimes" if mixture else "Gaussian prior"
        raise InputError(f"the correction {hyper.correction} needs a {needed}")
    for prior in (each := gaussian.each() if mixture else [gaussian]):
        if prior.ocean.shape != ocean.shape or not bool((prior.ocean == ocean).all()):
            raise InputError(
                f"the prior is of another grid or coast: {prior.ocean.shape[:2]} with {int(prior.ocean.sum())} ocean "
                f"cells, the field is {ocean.shape[:2]} with {int(ocean.sum())}"
            )
    found = [_gains(prior, observation, np.asarray(hyper.sigma), correlation) for prior in each]
    if mixture:
        return known.replace(regimes=gaussian, gain=jax.tree.map(lambda *g: jnp.stack(g, 1), *found))
    return known.replace(gaussian=gaussian, gain=found[0])


# Of 256 MB at most.
_latest_gains: Latest[gains.Gain] = Latest(2**28, lambda gain: sum(leaf.nbytes for leaf in jax.tree.leaves(gain)))


def _gains(
    gaussian: PrincipalGaussian, observation: Observation, sigma: np.ndarray, correlation: float | np.ndarray
) -> gains.Gain:
    """gains.kalman_gains, from those of the latest patterns where it has been made before."""
    others = gaussian, sigma, np.asarray(correlation, np.float32)
    return _latest_gains.of_pattern(
        observation, others, lambda: gains.kalman_gains(gaussian, observation, sigma, correlation)
    )


def antithetic(key: Key, members: int) -> tuple[Key, Float[Array, " members"]]:
    """Keys and signs of members in pairs: member 2j + 1 has the noise of member 2j with its sign changed."""
    if members < 1:
        raise InputError(f"at least one member is needed, got {members}")
    number = jnp.arange(members, dtype=jnp.int32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, number // 2)
    return keys, 1.0 - 2.0 * (number % 2).astype(jnp.float32)


def linear_sample(
    key: Key,
    analysis: Analysis,
    prior_draw: Field,
    evidence: guide.Evidence,
    sign: float | Level = 1.0,
    draw: Draw = jax.random.normal,
) -> Field:
    """A posterior sample of the linear prior to start from, mean + sign (Matheron's sample - mean).

    Args:
      key: of the observation errors; neither that of `prior_draw` nor that of `posterior`.
      analysis: of this pattern, with the noise of `evidence`.
      prior_draw: (y, x, c), a draw of the prior of the analysis (guide.prior_draw).
      sign: -1 for the second member of an antithetic pair.
    """
    values = evidence.observation.values
    errors = draw(key, values.shape, values.dtype)
    errors = jnp.einsum("mcd,md->mc", jnp.linalg.cholesky(evidence.noise), errors, precision=gains.HIGHEST)
    mean = analysis.mean(values)
    return mean + sign * (analysis.update(prior_draw, values + errors) - mean)


class _Level(NamedTuple):
    """Scan inputs: number, sigma, the next sigma, share of the last change of x0 to add, gain."""

    number: Array
    sigma: Array
    following: Array
    extrapolation: Array
    gain: gains.Gain | None


def posterior(
    key: Key,
    denoiser: Denoiser,
    evidence: guide.Evidence,
    hyper: Posterior,
    start: Field,
    sign: float | Level = 1.0,
    draw: Draw = jax.random.normal,
) -> Field:
    """One member of one field (module docstring).

    Deterministic steps may be of second order: DPM-Solver++(2M) (Lu et al. 2022, algorithm 2) is, for x = x0 + sigma n,
    the first order step from the extrapolated x0 + h / (2 h_before) (x0 - x0_before), h = log(sigma / sigma').

    Args:
      key: of this (seed, frame, member); every draw folds in the number of its level.
      denoiser: D(x; sigma) for one field.
      evidence: of `evidence_for` with the same hyperparameters.
      start: (y, x, c), a sample of `linear_sample`; on land the value that land had in training.
      sign: -1 turns every draw around, for the second member of an antithetic pair.
      draw: noise source with the signature of jax.random.normal.

    Returns:
      (y, x, c), the corrected x0 of the last level.

    Raises:
      InputError: the evidence was made for another number of levels.
    """
    sigma, gain = hyper.sigma, evidence.gain
    if gain is not None and len(gain.inverse) != len(sigma):
        raise InputError(f"the gains are of {len(gain.inverse)} levels, the sampler has {len(sigma)}")
    correct = guide.CORRECTIONS[hyper.correction]
    informed = hyper.correction == "given"
    if informed and not hasattr(denoiser, "given"):
        raise InputError("the correction given needs a denoiser that takes observations (form conditional)")
    options = {"dps": {"step": hyper.dps_step}} | {name: {"cg_steps": hyper.cg_steps} for name in CG_STEPS}

    def noise(number: Array) -> Field:
        return sign * draw(jax.random.fold_in(key, number), start.shape, start.dtype)

    def step(state: tuple[Field, Field], now: _Level) -> tuple[tuple[Field, Field], None]:
        x, before = state
        here = evidence.replace(gain=now.gain)

        def denoise(x: Field) -> Field:
            return denoiser.given(x, now.sigma, here) if informed else denoiser(x, now.sigma)

        x0 = correct(denoise, x, now.sigma, now.following, here, **options.get(hyper.correction, {}))
        x0 = jnp.where(evidence.ocean > 0, x0, start)
        ahead = x0 + now.extrapolation * (x0 - before)
        return (transition.ddim(x, ahead, noise(now.number), now.sigma, now.following, hyper.eta), x0), None

    extrapolation = jnp.zeros_like(sigma)
    if hyper.second_order:
        h = jnp.log(sigma[:-1] / sigma[1:])
        # Nothing lies before the first level, and the last step goes to x0 itself.
        extrapolation = extrapolation.at[1:-1].set(h[1:] / (2 * h[:-1]))
    number = 1 + jnp.arange(len(sigma), dtype=jnp.int32)
    run = _Level(number, sigma, jnp.append(sigma[1:], 0.0), extrapolation, gain)
    x = start + sigma[0] * noise(jnp.zeros((), jnp.int32))
    return jax.lax.scan(step, (x, x), run)[0][0]
