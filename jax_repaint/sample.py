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

import inspect
import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jax_repaint import transition
from jax_repaint.array_types import Array, Bool, Field, Int, Key, Level
from jax_repaint.checks import check_number, whole_number
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


class Outcome(NamedTuple):
    """What a run ends with; `repaint_stages` puts an axis of stages in front, ensembles their own before it.

    Attributes:
      x: (y, x, c), with the observed values in the observed cells; NaN in all missing cells of a run that failed.
      failed: number of the first pass of the loop after which x_t was not finite, -1 if it always was.
    """

    x: Field
    failed: Int[Array, ""]


class Failure(NamedTuple):
    """Where a run failed: stage from 1, pass of its loop from 0, diffusion step of that pass."""

    stage: int
    iteration: int
    t: int

    def __str__(self) -> str:
        return f"stage {self.stage}, iteration {self.iteration}, t {self.t}"


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
        "flat" leaves the prior variance out, v' = 0: the noise weight is `noise_floor` in every missing cell.
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
        for name, value in (("gamma", gamma), ("guidance_scale", guidance_scale)):
            check_number(name, value)
        for name, value in (("noise_floor", noise_floor), ("blend", blend), ("confidence_floor", confidence_floor)):
            check_number(name, value)
            if not 0 <= value <= 1:
                raise InputError(f"{name} must be in [0, 1], got {value}")
        if not 0 < gamma < math.inf:
            raise InputError(f"gamma must be positive, got {gamma}")
        if not 0 <= guidance_scale < math.inf:
            raise InputError(f"guidance_scale must be a number, not negative, got {guidance_scale}")
        if anneal not in (0, 1):
            raise InputError(f"anneal must be 0 or 1, got {anneal!r}")
        resample_steps, t_start = whole_number("resample_steps", resample_steps, 1), whole_number("t_start", t_start, 0)
        if start not in ("prior", "noise"):
            raise InputError(f"start must be prior or noise, got {start!r}")
        if normalise not in ("minmax", "prior", "flat"):
            raise InputError(f"normalise must be minmax, prior or flat, got {normalise!r}")
        numbers = (noise_floor, gamma, float(anneal), blend, guidance_scale, confidence_floor)
        return cls(
            *(jnp.asarray(v, jnp.float32) for v in numbers),
            t_start, resample_steps, start, bool(guidance_scale > 0), normalise,
        )  # fmt: skip

    @property
    def calls(self) -> int:
        """Network calls of one member."""
        return self.t_start * self.resample_steps + 1


VAR_DECAY = 0.1
_ADAPTIVE = {"noise_floor": 0.2, "gamma": 3.0}
_REFINED = {"t_refine": 50, "refine_floor": 0.3}
METHODS = {
    "plain": {"start": "noise"},
    "gp_init": {},
    "adaptive": _ADAPTIVE,
    "guided": {"guidance_scale": 1e-3},
    "x0_blend": {"blend": 1.0},
    "blend_adaptive": _ADAPTIVE | {"blend": 1.0},
    "anneal": _ADAPTIVE | {"anneal": True},
    "uniform": {"noise_floor": 0.47, "normalise": "flat"},
    "two_stage": _ADAPTIVE | _REFINED | {"stages": 2},
    "multistage": _ADAPTIVE | _REFINED | {"stages": 6},
}
_SETTINGS = inspect.signature(Repaint.create).parameters


def method(name: str, steps: int = 250, **changes: float | str | bool) -> tuple[Repaint, ...]:
    """The stages of a named method of the notes, each setting of which can be changed.

    plain           from noise, all steps
    gp_init         from the prior mean at t 75, as all the others
    adaptive        noise_floor .2, gamma 3
    guided          guidance_scale 1e-3
    x0_blend        blend 1
    blend_adaptive  adaptive and x0_blend together
    anneal          adaptive, the floor rising to 1 as t goes to 0
    uniform         noise weight noise_floor (.47) in every missing cell: the control of adaptive, given its mean weight
    two_stage       adaptive, then once more from t_refine 50 with refine_floor .3, the prior being the first output
    multistage      the same with `stages` (6) stages in all

    Args:
      name: one of METHODS.
      steps: of the schedule.
      changes: arguments of Repaint.create, which hold for all stages; in methods of several stages t_start and
        noise_floor are those of the first, t_refine and refine_floor those of the others.

    Raises:
      InputError: an unknown method or setting, a number outside its range.
    """
    if name not in METHODS:
        raise InputError(f"method {name!r} is not one of {', '.join(METHODS)}")
    first = ({"t_start": steps - 1} if name == "plain" else {"t_start": 75}) | METHODS[name] | changes
    several = {key: first.pop(key) for key in ("stages", "t_refine", "refine_floor") if key in first}
    unknown = [key for key in changes if key not in _SETTINGS and key not in METHODS[name]]
    if unknown:
        raise InputError(f"method {name} has no setting {unknown[0]!r}")
    check_start(first["t_start"], steps)
    stages = whole_number("stages", several.get("stages", 1), 1)
    if stages > 1:
        check_start(several["t_refine"], steps)
    later = first | {"t_start": several.get("t_refine"), "noise_floor": several.get("refine_floor")}
    return (Repaint.create(**first), *(Repaint.create(**later) for _ in range(stages - 1)))


def check_start(t_start: int, steps: int) -> None:
    """Raises InputError unless t_start is a step of the schedule."""
    check_number("t_start", t_start)
    if not 0 <= t_start < steps:
        raise InputError(f"t_start {t_start} is not a step of the schedule, which has steps 0..{steps - 1}")


def check_known(known: Known) -> None:
    """Raises InputError unless the arrays of `known` (each with or without leading axes) are of one grid."""
    *_, y, x, c = np.shape(known.value)
    if not jnp.issubdtype(known.value.dtype, jnp.floating):
        raise InputError(f"the values of a field are floating numbers, got {known.value.dtype}")
    for name, last in (("missing", 1), ("prior_mean", c), ("prior_variance", c)):
        shape = np.shape(getattr(known, name))
        if shape[-3:] != (y, x, last) or shape[:-3] != np.shape(known.value)[:-3]:
            raise InputError(f"{name} must be on the grid of the field, (..., {y}, {x}, {last}), got {shape}")
    if known.missing.dtype != bool:
        raise InputError(f"missing must be True or False in every cell, got {known.missing.dtype}")


def static_part(stages: Sequence[Repaint]) -> Hashable:
    """All that makes another program of the stages; stages that differ in numbers only have it in common."""
    return tuple(jax.tree.structure(stage) for stage in stages)


def first_failure(stages: Sequence[Repaint], failed: Int[np.ndarray, " s"]) -> Failure | None:
    """Where a member failed first, from `Outcome.failed` of its stages; None if it did not."""
    for number, (stage, iteration) in enumerate(zip(stages, np.asarray(failed).tolist(), strict=True), start=1):
        if iteration >= 0:
            return Failure(number, iteration, int(_timetable(stage.t_start, stage.resample_steps)[0][iteration]))
    return None


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
    # 0^gamma has no finite derivative in gamma, nor has a branch of it that is not taken.
    risen = jnp.where(doubt > 0, jnp.maximum(doubt, 1e-30) ** gamma, 0.0)
    return jnp.where(missing, floor + (1 - floor) * risen, 1.0)


class _Step(NamedTuple):
    """Scan inputs: step t, its number in the run, whether the next iteration stays at t."""

    t: Array
    number: Array
    again: Array


def _timetable(t_start: int, resample_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """t of every pass of the loop, and whether the next one stays at it."""
    t = np.append(np.repeat(np.arange(t_start, 0, -1), resample_steps), 0)
    return t, np.append(np.tile(np.arange(resample_steps) < resample_steps - 1, t_start), False)


def repaint(
    key: Key,
    denoiser: Denoiser,
    known: Known,
    schedule: Schedule,
    stage: Repaint,
    draw: Draw = jax.random.normal,
    largest_variance: Level | None = None,
) -> Outcome:
    """One member of one field by one stage of the RePaint family (module docstring).

    Args:
      key: of this (seed, frame, member, stage); every draw folds in its step.
      denoiser: D(x; sigma) for one field.
      known: what is pasted and what the run starts from.
      schedule: variance-preserving steps; `stage.t_start` < T.
      stage: hyperparameters.
      draw: noise source with the signature of jax.random.normal.
      largest_variance: the scale of v' under `normalise="prior"`.

    Raises:
      InputError: t_start is not a step of the schedule, or the arrays of `known` are not of one grid.
    """
    check_start(stage.t_start, schedule.steps)
    check_known(known)
    shape, dtype = known.value.shape, known.value.dtype
    v = _doubt(known, stage, largest_variance)
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

    def step(state: Outcome, now: _Step) -> tuple[Outcome, None]:
        x_t, t = state.x, now.t
        if stage.guided:
            gradient, x0 = jax.grad(pull, has_aux=True)(x_t, t)
        else:
            x0 = pull(x_t, t)[1]
        b = stage.blend * trust
        x0 = (1 - b) * x0 + b * known.prior_mean
        mu = transition.ancestral_mean(x_t, x0, schedule.beta[t], schedule.alpha_bar[t], schedule.alpha_bar_prev[t])
        if stage.guided:
            mu = mu - stage.guidance_scale * gradient
        # What the formula gives at t = 0, but beta_0 / (1 - alpha_bar_0) is 0.9998 in float32 instead of 1.
        mu = jnp.where(t > 0, mu, x0)
        w = weight(t)
        # At t = 0 beta_tilde is 0 and alpha_bar_prev is 1: no noise and clean values by the same formulas.
        x_s = mu + w * jnp.sqrt(schedule.posterior_variance[t]) * noise(now.number, 0)
        pasted = transition.diffuse(known.value, noise(now.number, 1), schedule.alpha_bar_prev[t])
        x_s = jnp.where(known.missing, x_s, pasted)
        back = transition.renoise(x_s, w * noise(now.number, 2), schedule.beta[t])
        x = jnp.where(now.again, back, x_s)
        fails = (state.failed < 0) & ~jnp.isfinite(x).all()
        return Outcome(x, jnp.where(fails, now.number, state.failed)), None

    t, again = _timetable(stage.t_start, stage.resample_steps)
    steps = _Step(jnp.asarray(t, jnp.int32), jnp.arange(t.size, dtype=jnp.int32), jnp.asarray(again))
    n = noise(jnp.asarray(len(steps.t), jnp.int32), 3)
    if stage.start == "noise":
        x = n
    else:
        start = jnp.where(known.missing, known.prior_mean, known.value)
        x = transition.diffuse(start, weight(steps.t[0]) * n, schedule.alpha_bar[stage.t_start])
    x, failed = jax.lax.scan(step, Outcome(x, jnp.asarray(-1, jnp.int32)), steps)[0]
    # Some of its cells may still look like currents.
    return Outcome(jnp.where(known.missing & (failed >= 0), jnp.nan, x), failed)


def _largest(known: Known) -> Level:
    return jnp.max(jnp.where(known.missing, known.prior_variance, 0.0))


def _doubt(known: Known, stage: Repaint, largest_variance: Level | None) -> Field:
    """v' as `stage.normalise` says."""
    if stage.normalise == "flat":
        return jnp.zeros_like(known.prior_variance)
    if stage.normalise == "prior":
        largest = _largest(known) if largest_variance is None else largest_variance
        return doubt(known.prior_variance, known.missing, largest)
    return doubt(known.prior_variance, known.missing)


def repaint_stages(
    key: Key,
    denoiser: Denoiser,
    known: Known,
    schedule: Schedule,
    stages: Sequence[Repaint],
    var_decay: float | Level = VAR_DECAY,
    draw: Draw = jax.random.normal,
) -> Outcome:
    """Stages in turn: each starts from the last one's output, its variance map multiplied by var_decay once more.

    What var_decay does depends on `normalise`. Under the faithful "minmax" the map is scaled to 0..1 over the missing
    cells, v' = (v - min v) / (max v - min v), and any factor on v cancels: var_decay has no effect at all while the
    decayed range var_decay^(s - 1) (max v - min v) of stage s stays above 1e-12. Below, v' is 1 everywhere, the noise
    weight is 1 in every cell, and the stage turns from adaptive into gp_init at once. With var_decay .1 a range of
    1e-6..1e-5 gets there at stage 8, one of 1e-5..1e-4 at stage 9, which is where the notes' results get worse
    again. Under "prior", v' = v / (largest v of the first stage): each stage has var_decay times the doubt of the one
    before, and the noise weight falls towards the floor. Under "flat" the map is not used.

    Args:
      key: of this (seed, frame, member); stage s, from 1, uses fold_in(key, s - 1).
      stages: hyperparameters; neighbours of the same program are scanned, so that ten stages compile two loops.
      var_decay: factor on the prior variance before every stage but the first.

    Returns:
      The output of every stage, x (s, y, x, c) and failed (s,). A stage that starts from a failed one fails at once.

    Raises:
      InputError: no stages, or as `repaint`.
    """
    if not stages:
        raise InputError("at least one stage is needed")
    for stage in stages:
        check_start(stage.t_start, schedule.steps)
    check_known(known)
    largest = _largest(known)
    outcomes, done = [], 0
    while done < len(stages):
        program = jax.tree.structure(stages[done])
        run = list(itertools.takewhile(lambda s, p=program: jax.tree.structure(s) == p, stages[done:]))
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *run)

        def one(known: Known, inputs: tuple[Repaint, Array]) -> tuple[Known, Outcome]:
            stage, number = inputs
            decay = jnp.where(number > 0, var_decay, 1.0).astype(known.prior_variance.dtype)
            now = known._replace(prior_variance=decay * known.prior_variance)
            stage_key = jax.random.fold_in(key, number)
            outcome = repaint(stage_key, denoiser, now, schedule, stage, draw, largest)
            return now._replace(prior_mean=outcome.x), outcome

        numbers = jnp.arange(done, done + len(run), dtype=jnp.int32)
        known, outcome = jax.lax.scan(one, known, (stacked, numbers))
        outcomes.append(outcome)
        done += len(run)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *outcomes)
