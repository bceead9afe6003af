"""The sampling loop of the RePaint family: one field, one member; vmap outside.

Notation of schedule.py; x in standardised units, `observed` cells are pasted, the others are `missing` (land and
padding count as observed with the value they had in training). For t = t_start..0, and for t > 0 `resample_steps`
times:

    x0  = D(x / sqrt(alpha_bar_t); sigma_t)
    x0 <- (1 - b) x0 + b prior,                       b = blend (1 - confidence_floor) (1 - v')
    mu  = mean of q(x_s | x_t, x0)
    mu <- mu - guidance_scale grad_x || (1 - confidence_floor) (1 - v') (x0(x) - prior) ||^2
    x'  = mu + w sqrt(beta_tilde_t) n                 missing cells
    x'  = sqrt(alpha_bar_s) y + sqrt(1 - alpha_bar_s) n     observed cells
    x  <- sqrt(alpha_t) x' + w sqrt(beta_t) n         before the next resampling of the same t

The noise weight w = floor + (1 - floor) v'^gamma, with v' the prior variance scaled to 0..1 over the missing cells,
holds back noise where the prior is sure. Lugmayr et al. 2022, "RePaint", algorithm 1, is the case w = 1.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jax_repaint import transition
from jax_repaint.array_types import Array, Bool, Field, Float, Key, Level
from jax_repaint.denoise import Denoiser
from jax_repaint.errors import InputError
from jax_repaint.schedule import Schedule

Draw = Callable[..., Array]


class Known(NamedTuple):
    """What the sampler pastes and what it starts from, on the grid.

    Attributes:
      value: (y, x, c) observed values; on land and padding the value they had in training.
      missing: (y, x, 1) True where the field is to be inpainted.
      prior_mean, prior_variance: (y, x, c) estimate of the missing cells and its error variance.
    """

    value: Field
    missing: Bool[Array, "y x 1"]
    prior_mean: Field
    prior_variance: Field


@struct.dataclass
class Repaint:
    """Hyperparameters of one stage. Leaves are numbers of the formulas; the rest changes the program.

    Attributes:
      noise_floor: noise weight where the prior is surest, 0..1; 1 turns adaptive noise off.
      gamma: exponent of the noise weight, > 0.
      anneal: 1 raises the floor to 1 as t goes to 0: floor_t = floor + (1 - floor)(1 - t / t_start); 0 keeps it.
      blend: share of the confidence-weighted prior put into x0, 0..1.
      guidance_scale: step of the gradient guidance towards the prior, >= 0.
      confidence_floor: lowest doubt about the prior in blend and guidance, 0..1.
      t_start: first step; T - 1 or less.
      resample_steps: passes over each t > 0.
      start: "prior" diffuses observations and prior mean to t_start, "noise" starts from pure noise.
      guided: whether the gradient of guidance is taken at all.
      normalise: "minmax" scales the prior variance of each frame to 0..1 over the missing cells, as the notes did:
        any constant factor on it cancels, until its range falls below 1e-12 and v' is 1 everywhere.
        "prior" divides by the largest prior variance of the first stage, so that a factor means something.
    """

    noise_floor: Level
    gamma: Level
    anneal: Level
    blend: Level
    guidance_scale: Level
    confidence_floor: Level
    t_start: int = struct.field(pytree_node=False)
    resample_steps: int = struct.field(pytree_node=False)
    start: str = struct.field(pytree_node=False)
    guided: bool = struct.field(pytree_node=False)
    normalise: str = struct.field(pytree_node=False)

    @classmethod
    def create(
        cls,
        t_start: int,
        *,
        noise_floor: float = 1.0,
        gamma: float = 1.0,
        anneal: bool = False,
        blend: float = 0.0,
        guidance_scale: float = 0.0,
        confidence_floor: float = 0.2,
        resample_steps: int = 5,
        start: str = "prior",
        normalise: str = "minmax",
    ) -> "Repaint":
        """Checks the numbers and makes leaves of them.

        Raises:
          InputError: a number is outside its range.
        """
        for name, value in (("noise_floor", noise_floor), ("blend", blend), ("confidence_floor", confidence_floor)):
            if not 0 <= value <= 1:
                raise InputError(f"{name} must be in [0, 1], got {value}")
        if not gamma > 0:
            raise InputError(f"gamma must be positive, got {gamma}")
        if not guidance_scale >= 0:
            raise InputError(f"guidance_scale must not be negative, got {guidance_scale}")
        if int(resample_steps) != resample_steps or resample_steps < 1:
            raise InputError(f"resample_steps must be a whole number, at least 1, got {resample_steps}")
        if int(t_start) != t_start or t_start < 0:
            raise InputError(f"t_start must be a step 0..T-1, got {t_start}")
        if start not in ("prior", "noise"):
            raise InputError(f"start must be prior or noise, got {start!r}")
        if normalise not in ("minmax", "prior"):
            raise InputError(f"normalise must be minmax or prior, got {normalise!r}")
        numbers = (noise_floor, gamma, float(anneal), blend, guidance_scale, confidence_floor)
        return cls(
            *(jnp.asarray(v, jnp.float32) for v in numbers),
            int(t_start), int(resample_steps), start, bool(guidance_scale > 0), normalise,
        )  # fmt: skip

    @property
    def calls(self) -> int:
        """Network calls of one member."""
        return self.t_start * self.resample_steps + 1


def method(name: str, steps: int = 250, **changes: float) -> tuple[Repaint, ...]:
    """The stages of a named method of the notes: plain, gp_init, adaptive, guided, x0_blend, multistage.

    plain 250 steps from noise; the others from t 75; adaptive floor .2, gamma 3; multistage is adaptive followed by
    `stages` - 1 (default 5) refinements from t 50 with floor .3, each starting from the last output.
    """
    stages = int(changes.pop("stages", 6))
    recipes = {
        "plain": {"t_start": steps - 1, "start": "noise"},
        "gp_init": {"t_start": 75},
        "adaptive": {"t_start": 75, "noise_floor": 0.2, "gamma": 3.0},
        "guided": {"t_start": 75, "guidance_scale": 1e-3},
        "x0_blend": {"t_start": 75, "blend": 1.0},
        "multistage": {"t_start": 75, "noise_floor": 0.2, "gamma": 3.0},
    }
    if name not in recipes:
        raise InputError(f"method {name!r} is not one of {', '.join(recipes)}")
    first = recipes[name] | changes
    check_start(first["t_start"], steps)
    if name != "multistage":
        return (Repaint.create(**first),)
    if stages < 1:
        raise InputError(f"multistage needs at least one stage, got {stages}")
    later = first | {"t_start": min(50, steps - 1), "noise_floor": 0.3}
    return (Repaint.create(**first), *(Repaint.create(**later) for _ in range(stages - 1)))


def check_start(t_start: int, steps: int) -> None:
    """Raises InputError unless t_start is a step of the schedule."""
    if not 0 <= t_start < steps:
        raise InputError(f"t_start {t_start} is not a step of the schedule, which has steps 0..{steps - 1}")


def doubt(variance: Field, missing: Bool[Array, "y x 1"], largest: Level | None = None) -> Field:
    """v', the prior variance scaled to 0..1 over the missing cells of all components.

    v' = clip((v - min v) / (max v - min v), 0, 1), and 1 everywhere when the range is below 1e-12; with `largest`,
    v' = clip(v / largest, 0, 1).
    """
    if largest is not None:
        return jnp.where(largest > 0, jnp.clip(variance / jnp.where(largest > 0, largest, 1.0), 0, 1), 1.0)
    low = jnp.min(jnp.where(missing, variance, jnp.inf))
    high = jnp.max(jnp.where(missing, variance, -jnp.inf))
    flat = ~(high - low >= 1e-12)
    scaled = jnp.clip((variance - low) / jnp.where(flat, 1.0, high - low), 0, 1)
    return jnp.where(flat, 1.0, scaled)


def noise_weight(doubt: Field, missing: Bool[Array, "y x 1"], floor: Level, gamma: Level) -> Field:
    """w = floor + (1 - floor) v'^gamma on missing cells, 1 elsewhere."""
    # 0^gamma has no finite derivative in gamma; the tiny offset is below float32's reach of the result.
    return jnp.where(missing, floor + (1 - floor) * jnp.maximum(doubt, 1e-30) ** gamma, 1.0)


class _Step(NamedTuple):
    """Scan inputs: step t, its number in the run, whether the next iteration stays at t."""

    t: Array
    number: Array
    again: Array


def _steps(t_start: int, resample_steps: int) -> _Step:
    t = np.append(np.repeat(np.arange(t_start, 0, -1), resample_steps), 0)
    again = np.append(np.tile(np.arange(resample_steps) < resample_steps - 1, t_start), False)
    return _Step(jnp.asarray(t, jnp.int32), jnp.arange(t.size, dtype=jnp.int32), jnp.asarray(again))


def repaint(
    key: Key,
    denoiser: Denoiser,
    known: Known,
    schedule: Schedule,
    stage: Repaint,
    draw: Draw = jax.random.normal,
    largest_variance: Level | None = None,
) -> Field:
    """One member of one field by one stage of the RePaint family (module docstring).

    Args:
      key: of this (seed, frame, member, stage); every draw folds in its step.
      denoiser: D(x; sigma) for one field.
      known: what is pasted and what the run starts from.
      schedule: variance-preserving steps; `stage.t_start` < T.
      stage: hyperparameters.
      draw: noise source with the signature of jax.random.normal.
      largest_variance: the scale of v' under `normalise="prior"`.

    Returns:
      (y, x, c), with the observed values in the observed cells.
    """
    check_start(stage.t_start, schedule.steps)
    shape, dtype = known.value.shape, known.value.dtype
    largest = None
    if stage.normalise == "prior":
        largest = largest_variance if largest_variance is not None else _largest(known)
    v = doubt(known.prior_variance, known.missing, largest)
    # Confidence in the prior, for blend and guidance: 0 outside the missing cells.
    trust = jnp.where(known.missing, (1 - stage.confidence_floor) * (1 - v), 0.0)

    def noise(number: Array, purpose: int) -> Array:
        return draw(jax.random.fold_in(jax.random.fold_in(key, number), purpose), shape, dtype)

    def weight(t: Array) -> Field:
        risen = 1 - t.astype(dtype) / max(stage.t_start, 1)
        floor = stage.noise_floor + stage.anneal * (1 - stage.noise_floor) * risen
        return noise_weight(v, known.missing, floor, stage.gamma)

    def pull(x_t: Field, t: Array) -> tuple[Level, Field]:
        x0 = denoiser(x_t / jnp.sqrt(schedule.alpha_bar[t]), schedule.sigma[t])
        return jnp.sum((trust * (x0 - known.prior_mean)) ** 2), x0

    def step(x_t: Field, now: _Step) -> tuple[Field, None]:
        t = now.t
        if stage.guided:
            gradient, x0 = jax.grad(pull, has_aux=True)(x_t, t)
        else:
            x0 = pull(x_t, t)[1]
        b = stage.blend * trust
        x0 = (1 - b) * x0 + b * known.prior_mean
        mu = transition.ancestral_mean(x_t, x0, schedule.beta[t], schedule.alpha_bar[t], schedule.alpha_bar_prev[t])
        if stage.guided:
            # The last step returns x0 itself.
            mu = mu - jnp.where(t > 0, stage.guidance_scale, 0.0) * gradient
        w = weight(t)
        # At t = 0 beta_tilde is 0, mu is x0 and alpha_bar_prev is 1: no noise and clean values by the same formulas.
        x_s = mu + w * jnp.sqrt(schedule.posterior_variance[t]) * noise(now.number, 0)
        pasted = transition.diffuse(known.value, noise(now.number, 1), schedule.alpha_bar_prev[t])
        x_s = jnp.where(known.missing, x_s, pasted)
        back = transition.renoise(x_s, w * noise(now.number, 2), schedule.beta[t])
        return jnp.where(now.again, back, x_s), None

    steps = _steps(stage.t_start, stage.resample_steps)
    n = noise(jnp.asarray(len(steps.t), jnp.int32), 3)
    if stage.start == "noise":
        x = n
    else:
        start = jnp.where(known.missing, known.prior_mean, known.value)
        x = transition.diffuse(start, weight(steps.t[0]) * n, schedule.alpha_bar[stage.t_start])
    return jax.lax.scan(step, x, steps)[0]


def _largest(known: Known) -> Level:
    return jnp.max(jnp.where(known.missing, known.prior_variance, 0.0))


def repaint_stages(
    key: Key,
    denoiser: Denoiser,
    known: Known,
    schedule: Schedule,
    stages: Sequence[Repaint],
    var_decay: float | Level = 0.1,
    draw: Draw = jax.random.normal,
) -> Float[Array, "s y x c"]:
    """Stages in turn: each starts from the last one's output, its variance map multiplied by var_decay once more.

    Under the faithful `normalise="minmax"`, var_decay has no effect while the decayed range of the variance stays
    above 1e-12; below, the noise weight becomes 1 everywhere (see `doubt`).

    Args:
      key: of this (seed, frame, member); stage s uses fold_in(key, s).
      stages: hyperparameters; neighbours of the same program are scanned, so that ten stages compile two loops.

    Returns:
      The output of every stage, (s, y, x, c).
    """
    if not stages:
        raise InputError("at least one stage is needed")
    for stage in stages:
        check_start(stage.t_start, schedule.steps)
    largest = _largest(known)
    outputs, done = [], 0
    while done < len(stages):
        run = [s for s in stages[done:] if _program(s) == _program(stages[done])]
        alike = next((i for i, s in enumerate(stages[done:]) if _program(s) != _program(stages[done])), len(run))
        run = run[:alike]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *run)

        def one(known: Known, inputs: tuple[Repaint, Array]) -> tuple[Known, Field]:
            stage, number = inputs
            decay = jnp.where(number > 0, var_decay, 1.0).astype(known.prior_variance.dtype)
            now = known._replace(prior_variance=decay * known.prior_variance)
            stage_key = jax.random.fold_in(key, number)
            x = repaint(stage_key, denoiser, now, schedule, stage, draw, largest)
            return now._replace(prior_mean=x), x

        numbers = jnp.arange(done, done + len(run), dtype=jnp.int32)
        known, xs = jax.lax.scan(one, known, (stacked, numbers))
        outputs.append(xs)
        done += len(run)
    return jnp.concatenate(outputs)


def _program(stage: Repaint) -> object:
    return jax.tree.structure(stage)
