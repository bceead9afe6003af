"""Every method by its name: baselines, the RePaint family, posterior samplers; and what one makes of some cases."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jax_repaint import device, gains, metrics, sample
from jax_repaint.calibration import NO_EVIDENCE, Gate
from jax_repaint.cases import Case, GPBaseline, hold_out, known_of, prior_of
from jax_repaint.checks import whole_number
from jax_repaint.data.fields import Fields, pad
from jax_repaint.ensemble import (
    finite_members,
    frame_batches,
    in_chunks,
    member_keys,
    posterior_ensemble,
    repaint_ensemble,
    survivors,
)
from jax_repaint.errors import InputError
from jax_repaint.guide import Evidence, prior_draw
from jax_repaint.latest import Latest
from jax_repaint.model import Model
from jax_repaint.observe import Observation
from jax_repaint.posterior import Posterior, evidence_for
from jax_repaint.prior import ridge
from jax_repaint.sample import Outcome, Repaint, method

DETERMINISTIC = ("climatology", "seed_gp", "gp", "linear")
BASELINES = (*DETERMINISTIC, "linear_samples")
REPAINT = tuple(sample.METHODS)
CORRECTIONS = ("kalman", "given", "cov_pigdm", "pigdm", "mmps", "kalman_cg", "kalman_jvp", "dps", "paste")
# Those that start from the regression of prior/ridge.py, and what they correct by.
FROM_RIDGE = {"kalman_ridge": "kalman_jvp"}
POSTERIOR = (*CORRECTIONS, *FROM_RIDGE)
METHODS = (*BASELINES, "ridge", *REPAINT, *POSTERIOR)
# Those that use observations by their likelihood alone, so that rows may be merged (observe.merged).
MERGING = (
    "linear_samples",
    "ridge",
    "kalman",
    "kalman_cg",
    "kalman_jvp",
    "kalman_ridge",
    "cov_pigdm",
    "pigdm",
    "given",
)
PAIRED = POSTERIOR  # methods whose members come in antithetic pairs
START = 3.4  # noise level that posterior samplers start from; chosen on validation frames among 3.4, 10, 30 and 130
LEVELS = 16  # of posterior samplers
HELD_OUT = "_held_out"  # behind the name of a method whose run lacks a tenth of the observations


@dataclasses.dataclass(frozen=True)
class Result:
    """What one method made of the cases: members (M, y, x, 2) in m/s of each, seconds and network calls a field.

    A calibrated method has central 90 % intervals, (low, high) of each case; others have those of their members.
    """

    members: list[np.ndarray]
    seconds: float
    calls: int
    antithetic: bool = False
    intervals: list[tuple[np.ndarray, np.ndarray]] | None = None

    def spread(self, case: int) -> np.ndarray:
        """Standard deviation of a member (y, x, 2), m/s; NaN where too few independent members are there to tell."""
        members = self.members[case]
        if len(members) < metrics.least_members(self.antithetic):
            return np.full(members.shape[1:], np.nan)
        return np.sqrt(metrics.ensemble_variance(members, self.antithetic))


def check_methods(methods: Sequence[str], members: int) -> None:
    """Raises InputError at no method, an unknown one, or members that are no number or not the pairs of a method."""
    whole_number("members", members, 1)
    if not methods:
        raise InputError("at least one method is needed")
    for name in methods:
        if name not in METHODS:
            raise InputError(f"method {name!r} is not one of {', '.join(METHODS)}")
        if name in PAIRED and members % 2:
            raise InputError(f"the members of {name} come in antithetic pairs: {members} is odd")


def levels_of(trained: Model, name: str, count: int = LEVELS) -> Posterior:
    """Hyperparameters of a posterior sampler: `count` levels from START, or less where the model was trained on less.

    Raises:
      InputError: `given` with a network that takes no observations; a method that starts from a regression with a
        model without an archive; either with another linear prior than the network's own.
    """
    if name == "given" and trained.form != "conditional":
        raise InputError(f"the method given needs a model of form conditional, this one is {trained.form}")
    if name == "given" and trained.anchor is not None:
        raise InputError("the method given needs the linear prior that its network was trained on")
    if name in FROM_RIDGE:
        check_archive(trained, name)
    sigma_max, sigma_min = min(START, trained.sigma[1]), max(trained.sigma[0], 0.01)
    return Posterior.create(sigma_max, sigma_min, count, correction=correction_of(name))


def correction_of(name: str) -> str:
    """What a method corrects by, of guide.CORRECTIONS; another method by its own name."""
    return FROM_RIDGE.get(name, name)


def check_archive(trained: Model, name: str) -> None:
    """Raises InputError if the model has no frames for the regression that a method needs."""
    if trained.anchor is not None:
        raise InputError(f"the method {name} needs the linear prior that its network was trained on")
    if trained.archive is None:
        raise InputError(
            f"the method {name} starts from a regression on training frames, which the model does not hold; "
            "python -m jax_repaint.archive --model=MODEL adds them"
        )


def stages_of(trained: Model, name: str) -> tuple[Repaint, ...]:
    """Hyperparameters of the stages of a method of the RePaint family.

    Raises:
      InputError: the network was not trained for the noise of their steps.
    """
    stages = method(name, trained.steps.steps)
    check_levels(trained, stages)
    return stages


def check_levels(trained: Model, program: Sequence[Repaint] | Posterior) -> None:
    """Raises InputError, with the setting to change, if a sampler asks the network about noise it was not trained for.

    Args:
      program: stages of the RePaint family, whose steps are those of the model's schedule, or a posterior sampler.
    """
    if isinstance(program, Posterior):
        trained.check_levels(np.asarray(program.sigma), "sigma_max and sigma_min must lie in that range")
        return
    sigma = np.asarray(trained.steps.sigma)
    known = np.flatnonzero(trained.knows(sigma))
    # Every stage goes down to step 0.
    trained.check_levels(
        sigma[:1],
        "the RePaint family ends at step 0 of the model's schedule and needs a network that was trained for its noise "
        f"(noise.sigma_min of at most {sigma[0]:.4g})",
    )
    for stage in program:
        trained.check_levels(sigma[[stage.t_start]], f"t_start must be a step up to {known[-1]}, not {stage.t_start}")


def run_method(
    name: str,
    trained: Model,
    fields: Fields,
    cases: Sequence[Case],
    members: int,
    seed: int = 0,
    chunk: int | None = None,
    count: int = LEVELS,
) -> Result:
    """The members of one method for every case.

    Args:
      name: one of METHODS.
      members: of each case; deterministic baselines give one.
      chunk: members sampled at a time, of several cases where they have fewer; what pays on the device by default.
      count: noise levels of posterior samplers.

    Members that are not finite are left out, of antithetic pairs both.

    Raises:
      InputError: an unknown method, an odd number of antithetic members, a method that asks the network about noise
        it was not trained for, too little memory for one member, a case with fewer than two members left.
    """
    began = time.monotonic()
    chunk = chunk or device.usual_batch()
    calls = 0
    if name in REPAINT:
        made, calls = _repainted(name, trained, cases, members, seed, chunk)
    elif name in POSTERIOR:
        made, calls = _sampled(name, trained, cases, members, seed, chunk, count)
    elif name == "linear_samples":
        made = _drawn(trained, cases, members, seed, chunk)
    elif name in METHODS:
        made = _estimated(name, trained, fields, cases)
    else:
        raise InputError(f"method {name!r} is not one of {', '.join(METHODS)}")
    if name == "linear_samples" or name in POSTERIOR:
        made = finite_members(name, [case.frame for case in cases], made, trained.ocean, name in PAIRED)
    return Result(made, (time.monotonic() - began) / len(cases), calls * members, name in PAIRED)


def _estimated(name: str, trained: Model, fields: Fields, cases: Sequence[Case]) -> list[np.ndarray]:
    """The one field, (1, y, x, 2) in m/s of each case, of a method that has no members."""
    if name in ("seed_gp", "gp"):
        baseline = GPBaseline(trained, fields, name)
        return [baseline.mean(case)[None] for case in cases]
    if name == "ridge":
        check_archive(trained, name)

    def standardised(case: Case) -> jax.Array:
        if name == "climatology":
            return trained.gaussian.mean
        mean = case.analysis.mean(case.observation.values)
        return mean + ridge_offset(trained, case.observation) if name == "ridge" else mean

    return [trained.to_velocity(standardised(case))[None] for case in cases]


def _drawn(trained: Model, cases: Sequence[Case], members: int, seed: int, chunk: int) -> list[np.ndarray]:
    """Members (M, y, x, 2) in m/s of each case, drawn from the posterior of the linear prior."""
    made, chunk = [], min(chunk, members)
    for case in cases:

        def drawn(chunk: int, case: Case = case) -> np.ndarray:
            return linear_samples(trained, case, members, seed, chunk)

        x, chunk = device.with_less_memory(drawn, chunk)
        made.append(trained.to_velocity(x))
    return made


def _repainted(
    name: str, trained: Model, cases: Sequence[Case], members: int, seed: int, chunk: int
) -> tuple[list[np.ndarray], int]:
    """Finite members (M, y, x, 2) in m/s of each case, and network calls of one, of the RePaint family."""
    stages = stages_of(trained, name)
    known = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[known_of(trained, case) for case in cases])
    frames = [case.frame for case in cases]

    def repainted(chunk: int) -> Outcome:
        return repaint_ensemble(
            trained.denoiser, known, trained.steps, stages, frames=frames, members=members, seed=seed, chunk=chunk,
            last=True,
        )  # fmt: skip

    # Half of a chunk that is never filled would be the same call again.
    outcome, _ = device.with_less_memory(repainted, min(chunk, members * len(cases)))
    made = [trained.to_velocity(x[:, -1]) for x in survivors(name, stages, frames, outcome)]
    return made, sum(stage.calls for stage in stages)


def _sampled(
    name: str, trained: Model, cases: Sequence[Case], members: int, seed: int, chunk: int, count: int
) -> tuple[list[np.ndarray], int]:
    """Members (M, y, x, 2) in m/s of each case, and network calls of one, of a posterior sampler."""
    hyper = levels_of(trained, name, count)
    made = [np.empty(0)] * len(cases)
    rows = [gains.rows_of(trained.gaussian, case.observation) for case in cases]
    for batch in frame_batches(rows, members, chunk, trained.gaussian, hyper.calls):
        mine = [cases[i] for i in batch]
        evidence = [evidence_of(trained, name, hyper, case) for case in mine]

        def sampled(chunk: int, mine: Sequence[Case] = mine, evidence: Sequence[Evidence] = evidence) -> np.ndarray:
            return posterior_ensemble(
                trained.denoiser, evidence, trained.gaussian, [case.analysis for case in mine], hyper,
                frames=[case.frame for case in mine], members=members, seed=seed, chunk=chunk,
            )  # fmt: skip

        x, chunk = device.with_less_memory(sampled, chunk)
        for i, one in zip(batch, x, strict=True):
            made[i] = trained.to_velocity(one)
    return made, hyper.calls


def evidence_of(trained: Model, name: str, hyper: Posterior, case: Case) -> Evidence:
    """What a posterior sampler knows of a case, and where it starts from."""
    made = evidence_for(hyper, trained.gaussian.ocean, case.observation, trained.gaussian)
    if case.offset is not None:
        offset = np.where(trained.ocean[..., None], case.offset / np.asarray(trained.standardiser.std), 0)
        return made.replace(offset=jnp.asarray(pad(offset, trained.padded), jnp.float32))
    if name in FROM_RIDGE:
        return made.replace(offset=ridge_offset(trained, case.observation))
    return made


# Of some megabytes each.
_latest_regressions: Latest[ridge.Regression] = Latest(8, lambda _: 1)


def ridge_offset(trained: Model, observation: Observation) -> jax.Array:
    """From the linear estimate to that of the regression, (Y, X, c), standardised."""
    others = trained.gaussian, vars(trained.archive)
    found = _latest_regressions.of_pattern(
        observation, others, lambda: ridge.regression(trained.gaussian, trained.archive, observation)
    )
    return jnp.asarray(found.offset(np.asarray(observation.values)[None])[0])


@jax.jit
def _linear_rows(gaussian, analysis, values, keys):
    def one(key):
        draw, noise = jax.random.split(key)
        return analysis.sample(noise, prior_draw(gaussian, draw), values)

    return jax.vmap(one)(keys)


def linear_samples(trained: Model, case: Case, members: int, seed: int = 0, chunk: int | None = None) -> np.ndarray:
    """Independent samples (M, Y, X, 2) of the linear prior's posterior, standardised."""
    keys = member_keys(seed, [case.frame], range(members))[0]

    def run(rows: jax.Array, keys: jax.Array) -> jax.Array:
        return _linear_rows(trained.gaussian, case.analysis, case.observation.values, keys)

    return in_chunks(run, np.arange(members), keys, chunk or device.usual_batch())


def gate_evidence(
    name: str,
    trained: Model,
    fields: Fields,
    cases: Sequence[Case],
    members: int,
    seed: int = 0,
    chunk: int | None = None,
    keep: Callable[[int, Callable[[], Result]], Result] | None = None,
) -> list[np.ndarray]:
    """`Gate.evidence` of each case, from a second run without a tenth of its observations; NO_EVIDENCE of one.

    Args:
      keep: takes the number of cases and what runs them, and gives their result, which it may have kept.
    """
    evidence = [NO_EVIDENCE] * len(cases)
    some = [i for i, case in enumerate(cases) if case.observed.sum() > 1]
    if not some:
        return evidence
    less, held = zip(*(hold_out(trained, cases[i], seed) for i in some), strict=True)
    make = partial(run_method, name, trained, fields, less, members, seed, chunk)
    result = keep(len(less), make) if keep else make()
    for i, case, cells, made in zip(some, less, held, result.members, strict=True):
        mean, variance = (part[cells] for part in prior_of(trained, case))
        values = case.seen[cells]
        misfit = (values - mean) ** 2
        error = np.mean((values - made.mean(0)[cells]) ** 2)
        evidence[i] = Gate.evidence(misfit.mean(), error, np.mean(misfit / (variance + case.error**2)))
    return evidence
