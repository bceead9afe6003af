"""Inpaints held-out fields by several methods and compares them.

    python -m jax_repaint.evaluate --model=runs/small/model --frames=64 --out=results

Baselines stand in every table: the mean of the training frames (climatology), the Gaussian process of earlier results
(seed_gp), one fitted to the training frames (gp), the best linear estimate from their covariance (linear) and samples
of its posterior (linear_samples). The networks' methods start from the linear estimate. A ratio compares ensemble mean
with ensemble mean, over the same frames, against the best of the baselines.

The model's frames are split again as in its training; the frames that are scored are drawn from the test part. The
method that the model is calibrated for has two rows, as it is and calibrated; --raw leaves the second out.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
import xarray as xr
from absl import flags, logging
from ml_collections import ConfigDict

from jax_repaint import command, details, device, files, metrics, model, observe, plots, sample, train
from jax_repaint.calibration import Gate
from jax_repaint.checks import whole_number
from jax_repaint.data import readers, twin
from jax_repaint.data.fields import Fields, Split, crop
from jax_repaint.ensemble import (
    frame_batches,
    in_chunks,
    member_keys,
    posterior_ensemble,
    repaint_ensemble,
    survivors,
)
from jax_repaint.errors import InputError
from jax_repaint.guide import Evidence, prior_draw
from jax_repaint.model import Model
from jax_repaint.posterior import Posterior, evidence_for
from jax_repaint.prior import gp, linear
from jax_repaint.prior.analysis import Analysis
from jax_repaint.sample import Known, Outcome, Repaint, method

BASELINES = ("climatology", "seed_gp", "gp", "linear", "linear_samples")
REPAINT = tuple(sample.METHODS)
POSTERIOR = ("kalman", "given", "cov_pigdm", "pigdm", "mmps", "dps", "paste")
METHODS = (*BASELINES, *REPAINT, *POSTERIOR)
PAIRED = POSTERIOR  # methods whose members come in antithetic pairs
START = 3.4  # noise level that posterior samplers start from; chosen on validation frames among 3.4, 10, 30 and 130
LEVELS = 16  # of posterior samplers
ERROR = 0.005  # m/s, what the methods take the observations' standard error to be


@dataclasses.dataclass(frozen=True)
class Case:
    """One field to inpaint.

    Attributes:
      pattern: such as "line:22".
      frame: its number in the series.
      time: of the field.
      truth: (y, x, 2) m/s.
      observed: (y, x) bool.
      observation: standardised, on the padded grid.
      analysis: the linear prior's.
    """

    pattern: str
    frame: int
    time: np.datetime64
    truth: np.ndarray
    observed: np.ndarray
    observation: observe.Observation
    analysis: Analysis


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
        if len(members) < (4 if self.antithetic else 2):
            return np.full(members.shape[1:], np.nan)
        return np.sqrt(metrics.ensemble_variance(members, self.antithetic))


def make_cases(
    trained: Model,
    fields: Fields,
    numbers: Sequence[int],
    patterns: Sequence[str],
    seed: int = 0,
) -> list[Case]:
    """Every pattern on every frame; patterns with a random part are drawn anew for each frame.

    Args:
      fields: the frames to inpaint, on the model's grid; what falls into their gaps is neither observed nor scored.
      numbers: their numbers in the series, which name them in every random key.

    Raises:
      InputError: no pattern or one that cannot be drawn, no cell left to observe or to score, another grid.
    """
    if not patterns:
        raise InputError("at least one pattern is needed")
    trained.check_grid(fields)
    cases, known = [], {}
    for pattern in patterns:
        for number, velocity, when in zip(numbers, fields.velocity, fields.time, strict=True):
            observed = observed_cells(fields, velocity, pattern, int(number), seed)
            observation = observation_of(trained, velocity, observed)
            # A fixed pattern has one analysis for all its frames.
            name = observed.tobytes()
            if name not in known:
                known = {name: linear.analysis(trained.gaussian, observation)}
            analysis = known[name]
            cases.append(Case(pattern, int(number), when, velocity, observed, observation, analysis))
    return cases


def observed_cells(fields: Fields, velocity: np.ndarray, pattern: str, number: int, seed: int) -> np.ndarray:
    """The cells (y, x) that a pattern observes in one of the frames: those drawn that have a value.

    Args:
      velocity: of the frame, `number` its number in the series.

    Raises:
      InputError: a pattern that cannot be drawn, no cell left to observe or to score.
    """
    drawn = observe.parse(pattern, fields.ocean, observe.pattern_rng(seed, number))
    observed = drawn & np.isfinite(velocity).all(-1)
    if not observed.any():
        raise InputError(f"{fields.name}: {pattern} meets no cell with a value in frame {number}")
    metrics.scored_cells(velocity, fields.ocean, observed)
    return observed


def observation_of(trained: Model, velocity: np.ndarray, observed: np.ndarray) -> observe.Observation:
    """The observed cells of a field in m/s, standardised, on the padded grid."""
    x = trained.standardiser.standardise(velocity, trained.ocean)
    observation = observe.from_cells(observed, x, 1.0, trained.ocean)
    sigma = jnp.asarray(ERROR / np.asarray(trained.standardiser.std))[None]
    return observe.pad_grid(observation, observed.shape, trained.padded).replace(
        sigma=jnp.where(observation.valid[:, None], sigma, 1.0)
    )


def prior_of(trained: Model, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance (y, x, 2) of the linear estimate, m/s and (m/s)^2."""
    mean = trained.to_velocity(case.analysis.mean(case.observation.values))
    return mean, trained.standardiser.restore_variance(np.asarray(crop(case.analysis.variance, trained.ocean.shape)))


def known_of(trained: Model, case: Case) -> Known:
    """What the RePaint family pastes and starts from: the observed cells, the linear estimate and its variance."""
    observed, value = case.observation.on_grid(trained.padded)
    ocean = np.asarray(trained.gaussian.ocean)[..., 0] > 0
    missing = jnp.asarray(ocean & ~np.asarray(observed))[..., None]
    land = jnp.asarray(trained.standardiser.land_value)[None, None]
    value = jnp.where(jnp.asarray(ocean)[..., None], value, land)
    mean = case.analysis.mean(case.observation.values)
    return Known(value, missing, mean * trained.gaussian.ocean, case.analysis.variance)


def gp_analysis(trained: Model, fields: Fields, name: str) -> Callable[[Case], Analysis]:
    """The analysis of a case in m/s by the Gaussian process `name`, seed_gp or gp; cases of one pattern share it.

    Raises:
      InputError: the model has no fitted GP.
    """
    ocean, error = fields.ocean, ERROR
    if name == "seed_gp":
        # It took cells as exact: of its own error variance there is 1e-6 (m/s)^2.
        error = math.sqrt(gp.JITTER)
        kernel, places, background = gp.seed_gp(), gp.pixels(fields.shape), np.zeros((*fields.shape, 2), np.float32)
    else:
        if trained.kernel is None:
            raise InputError("this model was exported without a fitted GP")
        kernel, places = trained.kernel, fields.places()
        background = np.where(ocean[..., None], trained.to_velocity(trained.gaussian.mean), 0)

    known: dict[bytes, Analysis] = {}

    def analyse(case: Case) -> Analysis:
        observation, cells = observe.from_cells(case.observed, case.truth, error, ocean), case.observed.tobytes()
        if cells not in known:
            known.clear()
            known[cells] = gp.analysis(kernel, observation, ocean, places, jnp.asarray(background))
        found = known[cells]
        return found.replace(observation=found.observation.replace(values=observation.values))

    return analyse


def _gp_estimate(trained: Model, fields: Fields, name: str) -> Callable[[Case], np.ndarray]:
    analyse = gp_analysis(trained, fields, name)

    def estimate(case: Case) -> np.ndarray:
        analysis = analyse(case)
        return np.where(fields.ocean[..., None], np.asarray(analysis.mean(analysis.observation.values)), np.nan)

    return estimate


def levels_of(trained: Model, name: str, count: int = LEVELS) -> Posterior:
    """Hyperparameters of a posterior sampler: `count` levels from START, or less where the model was trained on less.

    Raises:
      InputError: `given` with a network that takes no observations.
    """
    if name == "given" and trained.form != "conditional":
        raise InputError(f"the method given needs a model of form conditional, this one is {trained.form}")
    return Posterior.create(min(START, trained.sigma[1]), max(trained.sigma[0], 0.01), count, correction=name)


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

    Raises:
      InputError: an unknown method, an odd number of antithetic members, a method that asks the network about noise
        it was not trained for, too little memory for one member.
    """
    began = time.monotonic()
    chunk = chunk or device.usual_batch()
    calls = 0
    frames = [case.frame for case in cases]
    if name == "climatology":
        made = [trained.to_velocity(trained.gaussian.mean)[None] for _ in cases]
    elif name in ("seed_gp", "gp"):
        estimate = _gp_estimate(trained, fields, name)
        made = [estimate(case)[None] for case in cases]
    elif name == "linear":
        made = [trained.to_velocity(case.analysis.mean(case.observation.values))[None] for case in cases]
    elif name == "linear_samples":
        made, chunk = [], min(chunk, members)
        for case in cases:

            def drawn(chunk: int, case: Case = case) -> np.ndarray:
                return linear_samples(trained, case, members, seed, chunk)

            x, chunk = device.with_less_memory(drawn, chunk)
            made.append(trained.to_velocity(x))
    elif name in REPAINT:
        stages = stages_of(trained, name)
        known = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[known_of(trained, case) for case in cases])

        def repainted(chunk: int) -> Outcome:
            return repaint_ensemble(
                trained.denoiser, known, trained.steps, stages, frames=frames, members=members, seed=seed, chunk=chunk,
                last=True,
            )  # fmt: skip

        # Half of a chunk that is never filled would be the same call again.
        outcome, _ = device.with_less_memory(repainted, min(chunk, members * len(cases)))
        made = [trained.to_velocity(x[:, -1]) for x in survivors(name, stages, frames, outcome)]
        calls = sum(stage.calls for stage in stages)
    elif name in POSTERIOR:
        hyper = levels_of(trained, name, count)
        made = [np.empty(0)] * len(cases)
        sizes = [case.observation.size for case in cases]
        for batch in frame_batches(sizes, members, chunk, trained.gaussian, hyper.calls):
            mine = [cases[i] for i in batch]
            evidence = [
                evidence_for(hyper, trained.gaussian.ocean, case.observation, trained.gaussian) for case in mine
            ]

            def sampled(chunk: int, mine: Sequence[Case] = mine, evidence: Sequence[Evidence] = evidence) -> np.ndarray:
                return posterior_ensemble(
                    trained.denoiser, evidence, trained.gaussian, [case.analysis for case in mine], hyper,
                    frames=[case.frame for case in mine], members=members, seed=seed, chunk=chunk,
                )  # fmt: skip

            x, chunk = device.with_less_memory(sampled, chunk)
            for i, one in zip(batch, x, strict=True):
                made[i] = trained.to_velocity(one)
        calls = hyper.calls
    else:
        raise InputError(f"method {name!r} is not one of {', '.join(METHODS)}")
    return Result(made, (time.monotonic() - began) / len(cases), calls * members, name in PAIRED)


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


def hold_out_of(places: np.ndarray, seed: int, frame: int, share: float = 0.1) -> np.ndarray:
    """A random `share` of the `places` that are observed in a frame, at least one."""
    rng = np.random.default_rng([seed, frame, 0x6A])
    return rng.choice(places, max(1, round(share * places.size)), replace=False)


def hold_out(trained: Model, case: Case, seed: int = 0, share: float = 0.1) -> tuple[Case, np.ndarray]:
    """The same case without some of its observations, at least one, and the cells they are on, (y, x) bool.

    Raises:
      InputError: there are fewer than two observations.
    """
    places = np.flatnonzero(case.observed)
    if places.size < 2:
        raise InputError(f"{case.pattern} observes {places.size} cells of frame {case.frame}, too few to hold some out")
    held = np.zeros(case.observed.size, bool)
    held[hold_out_of(places, seed, case.frame, share)] = True
    held = held.reshape(case.observed.shape)
    observation = observation_of(trained, case.truth, case.observed & ~held)
    less = dataclasses.replace(
        case,
        observed=case.observed & ~held,
        observation=observation,
        analysis=linear.analysis(trained.gaussian, observation),
    )
    return less, held


def gate_evidence(
    name: str,
    trained: Model,
    fields: Fields,
    cases: Sequence[Case],
    members: int,
    seed: int = 0,
    chunk: int | None = None,
) -> list[np.ndarray]:
    """`Gate.evidence` of each case, from a second run without a tenth of its observations."""
    less, held = zip(*(hold_out(trained, case, seed) for case in cases), strict=True)
    result = run_method(name, trained, fields, less, members, seed, chunk)
    evidence = []
    for case, cells, made in zip(less, held, result.members, strict=True):
        mean, variance = (part[cells] for part in prior_of(trained, case))
        values = case.truth[cells]
        misfit = (values - mean) ** 2
        error = np.mean((values - made.mean(0)[cells]) ** 2)
        evidence.append(Gate.evidence(misfit.mean(), error, np.mean(misfit / (variance + ERROR**2))))
    return evidence


def calibrated(
    trained: Model, fields: Fields, cases: Sequence[Case], result: Result, seed: int = 0, chunk: int | None = None
) -> Result:
    """What the model's calibration makes of the raw result of its method; with a gate, after a second run.

    Raises:
      InputError: ensembles of another size than it was learnt with.
    """
    began = time.monotonic()
    learnt = trained.calibration
    gates, calls = [1.0] * len(cases), result.calls
    if learnt.gate is not None:
        evidence = gate_evidence(learnt.method, trained, fields, cases, learnt.members, seed, chunk)
        gates, calls = [learnt.gate.of(one) for one in evidence], 2 * calls
    members, intervals = [], []
    for case, made, gate in zip(cases, result.members, gates, strict=True):
        mean, variance = prior_of(trained, case)
        members.append(learnt.apply(mean, variance, made, gate))
        intervals.append(learnt.interval(variance, members[-1]))
    seconds = result.seconds + (time.monotonic() - began) / len(cases)
    return Result(members, seconds, calls, result.antithetic, intervals)


def calibrated_name(trained: Model, methods: Sequence[str], members: int) -> str | None:
    """The name of the row that the model's calibration adds to those of `methods`; None where it does not apply."""
    learnt = trained.calibration
    if learnt is None or learnt.method not in methods:
        return None
    if learnt.members != members:
        logging.warning(
            "the model's calibration is for %d members of %s, not for %d, and is not used",
            learnt.members, learnt.method, members,
        )  # fmt: skip
        return None
    return f"{learnt.method}_calibrated"


def _score(case: Case, result: Result, i: int, size: int, ocean: np.ndarray) -> metrics.FrameScores:
    scored = metrics.scored_cells(case.truth, ocean, case.observed)
    score = metrics.score(case.truth, result.members[i][:size], scored, ocean, antithetic=result.antithetic)
    if result.intervals is None:
        return score
    low, high = result.intervals[i]
    inside = (low <= case.truth) & (case.truth <= high)
    return dataclasses.replace(score, coverage90=float(inside[scored].mean()))


def compare(cases: Sequence[Case], results: dict[str, Result], ocean: np.ndarray, block: int) -> list[dict]:
    """Rows of metrics.summary, one a pattern and method, each against the best deterministic baseline there.

    Where members failed and were left out, as many of every frame are scored as the frame with the fewest has.
    """
    rows = []
    for pattern in dict.fromkeys(case.pattern for case in cases):
        chosen = [i for i, case in enumerate(cases) if case.pattern == pattern]
        scores = {}
        for name, result in results.items():
            size = min(len(result.members[i]) for i in chosen)
            if any(len(result.members[i]) > size for i in chosen):
                logging.warning("%s, %s: scores are of %d members, which every frame has", pattern, name, size)
            scores[name] = [_score(cases[i], result, i, size, ocean) for i in chosen]
        bases = [name for name in results if name in BASELINES and name != "linear_samples"] or list(results)[:1]
        best = min(bases, key=lambda name: np.mean([s.mse_mean for s in scores[name]]))
        for name, result in results.items():
            row = metrics.summary(
                name, scores[name], result.calls, result.seconds, baseline=(best, scores[best]), block=block
            )
            rows.append({"pattern": pattern} | row)
    return rows


def detail_rows(cases: Sequence[Case], results: dict[str, Result], fields: Fields) -> list[dict]:
    """Rows of details.summary, one a pattern and method."""
    rows = []
    for pattern in dict.fromkeys(case.pattern for case in cases):
        chosen = [i for i, case in enumerate(cases) if case.pattern == pattern]
        for name, result in results.items():
            frames = []
            for i in chosen:
                scored = metrics.scored_cells(cases[i].truth, fields.ocean, cases[i].observed)
                frames.append(details.of_frame(cases[i].truth, result.members[i], scored, fields, result.antithetic))
            rows.append({"pattern": pattern, "method": name} | details.summary(frames))
    return rows


def format_rows(rows: Sequence[dict]) -> str:
    """The tables of all patterns as text."""
    parts = []
    for pattern in dict.fromkeys(row["pattern"] for row in rows):
        mine = [row for row in rows if row["pattern"] == pattern]
        parts.append(f"{pattern}\n{metrics.format_table(mine)}")
    return "\n\n".join(parts)


def to_dataset(cases: Sequence[Case], result: Result, fields: Fields, history: str) -> xr.Dataset:
    """Members, mean, spread and truth of every case as a CF data set (pattern, time, realization, lat, lon)."""
    base = readers.to_dataset(fields)
    y, x = base["ocean"].dims
    patterns = list(dict.fromkeys(case.pattern for case in cases))
    shape = (len(patterns), len(fields), max(map(len, result.members)), *fields.shape)
    # Where members failed and were left out, the rows of the last ones stay empty.
    members = np.full((len(cases), shape[2], *fields.shape, 2), np.nan, np.float32)
    for filled, made in zip(members, result.members, strict=True):
        filled[: len(made)] = made
    members = members.reshape(*shape, 2)
    mean = np.stack([made.mean(0) for made in result.members])
    truth = np.stack([case.truth for case in cases]).reshape(len(patterns), len(fields), *fields.shape, 2)
    observed = np.stack([case.observed for case in cases]).reshape(truth.shape[:-1])
    spread = np.stack([result.spread(i) for i in range(len(cases))]).reshape(truth.shape)
    content = {}
    for c, direction in enumerate(("eastward", "northward")):
        name = f"{direction}_sea_water_velocity"
        for kind, values, words, statistic in (
            (name, members, "members of the ensemble", None),
            (f"{name}_mean", mean.reshape(truth.shape), "mean of the ensemble", "mean"),
            (f"{name}_spread", spread, "standard deviation of the ensemble", "standard_deviation"),
            (f"{name}_truth", truth, "held-out field", None),
        ):
            dims = ("pattern", "time", "realization", y, x) if values is members else ("pattern", "time", y, x)
            attributes = {"long_name": f"{direction} current, {words}", "units": "m s-1"}
            if values is members:
                # Programs that drift particles choose by standard names, and one variable must have them.
                attributes["standard_name"] = name
            if statistic:
                attributes["cell_methods"] = f"realization: {statistic}"
            content[kind] = (dims, values[..., c].astype(np.float32), attributes, {"_FillValue": readers.FILL})
    content["observed"] = (
        ("pattern", "time", y, x),
        observed.astype(np.int8),
        {"long_name": "cells given to the method", "flag_values": np.array([0, 1], np.int8),
         "flag_meanings": "inpainted observed"},
    )  # fmt: skip
    coordinates = {name: base[name] for name in ("time", "lat", "lon")}
    coordinates["pattern"] = ("pattern", np.array(patterns, object), {"long_name": "observation pattern"})
    coordinates["realization"] = (
        "realization",
        np.arange(shape[2], dtype=np.int32),
        {"standard_name": "realization", "units": "1"},
    )
    frames = np.array([case.frame for case in cases[: len(fields)]], np.int32)
    coordinates["frame"] = ("time", frames, {"long_name": "number in the series", "units": "1"})
    attributes = {
        "Conventions": "CF-1.11",
        "title": f"{fields.name}, inpainted",
        "history": history,
        "antithetic": np.int8(result.antithetic),
    }
    data = xr.Dataset(content, coordinates, attributes)
    data["ocean"] = base["ocean"]
    return data


def example(trained: Model, case: Case, members: np.ndarray, spread: np.ndarray) -> plots.Example:
    """One case as a figure shows it."""
    return plots.Example(
        name=case.pattern,
        truth=case.truth,
        observed=case.observed,
        values=case.truth,
        prior_mean=trained.to_velocity(case.analysis.mean(case.observation.values)),
        mean=members.mean(0),
        member=members[0],
        spread=spread,
        frame=case.frame,
        time=case.time,
    )


def pick(split: Split, frames: int, seed: int = 0) -> np.ndarray:
    """Numbers of `frames` test frames, drawn without replacement, in the order of time."""
    if frames < 1:
        raise InputError(f"at least one frame must be inpainted, got {frames}")
    return np.sort(np.random.default_rng([seed, 0xF4]).choice(split.test, min(frames, split.test.size), replace=False))


def block_length(split: Split, frames: int) -> int:
    """How many of `frames` random test frames lie within one decorrelation time: the block of the bootstrap."""
    return int(np.clip(round(frames * split.decorrelation / split.test.size), 1, max(frames // 4, 1)))


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


def run(
    trained: Model,
    fields: Fields,
    numbers: Sequence[int],
    patterns: Sequence[str],
    methods: Sequence[str],
    out: Path,
    *,
    members: int = 16,
    seed: int = 0,
    chunk: int | None = None,
    block: int = 1,
    shown: str | None = None,
    kept: Sequence[str] = (),
    raw: bool = False,
    inputs: Sequence[Path] = (),
) -> str:
    """Inpaints, writes table.csv, details.csv, fields.nc and figure.png into `out`, and returns the table as text.

    Args:
      fields: the frames to inpaint, `numbers` theirs in the series.
      shown: the method whose members go into fields.nc and the figure; by default the last one, calibrated if it is.
      kept: other methods whose members are written too, into fields_{method}.nc.
      raw: whether to leave out the row {method}_calibrated of the method that the model's calibration is for.
      inputs: files that are read, which `out` must not replace.
    """
    check_methods(methods, members)
    members = int(members)
    patterns = list(dict.fromkeys(patterns))
    added = None if raw else calibrated_name(trained, methods, members)
    shown = shown or (added if added and methods[-1] == trained.calibration.method else methods[-1])
    written = {shown: "fields.nc"} | {name: f"fields_{name}.nc" for name in kept if name != shown}
    for name in written:
        if name not in (*methods, added):
            raise InputError(f"{name} is not among the methods that are run, {', '.join(methods)}")
    cases = make_cases(trained, fields, numbers, patterns, seed)
    for name in methods:
        # What a method asks of the model, before the first one runs.
        if name in POSTERIOR:
            levels_of(trained, name)
        if name in REPAINT:
            stages_of(trained, name)
        if name == "gp" and trained.kernel is None:
            raise InputError("this model was exported without a fitted GP")
    for name in ("table.csv", "details.csv", *written.values(), "figure.png"):
        files.check_writable(out / name, inputs=inputs)
    results = {}
    for name in (bar := tqdm.tqdm(methods, unit="method", disable=None)):
        bar.set_description(name)
        results[name] = run_method(name, trained, fields, cases, members, seed, chunk)
        if added and name == trained.calibration.method:
            if min(map(len, results[name].members)) == members:
                results[added] = calibrated(trained, fields, cases, results[name], seed, chunk)
            else:
                # A calibration is for ensembles of one size.
                logging.warning("members of %s failed; there is no row %s", name, added)
    if added and added not in results:
        written.pop(added, None)
        if shown == added:
            shown = trained.calibration.method
            written[shown] = "fields.nc"
    rows = compare(cases, results, fields.ocean, block)
    metrics.write_csv(rows, out / "table.csv")
    metrics.write_csv(detail_rows(cases, results, fields), out / "details.csv")
    for name, file in written.items():
        history = f"jax_repaint, model {model.fingerprint(trained)}, method {name}, seed {seed}"
        data = to_dataset(cases, results[name], fields, history).assign_attrs(method=name)
        readers.write_netcdf(data, out / file)
    first = [next(i for i, case in enumerate(cases) if case.pattern == pattern) for pattern in dict.fromkeys(patterns)]
    result = results[shown]
    examples = [example(trained, cases[i], result.members[i], result.spread(i)) for i in first]
    plots.currents(out / "figure.png", examples, fields.ocean, fields.metres(), f"{fields.name}, {shown}")
    return format_rows(rows)


def data_of(trained: Model, path: str | None) -> tuple[Fields, Split]:
    """The fields a model was trained on (or a file with the same grid) and their split, as in its training."""
    config = train.default_config()
    config.update(ConfigDict(trained.origin["config"]))
    data = config.data
    fields = train.load_fields(data.fields if path is None else path, data.frames, data.twin_seed)
    trained.check_grid(fields)
    if fields.hash() != trained.origin["fingerprint"]:
        logging.warning(
            "%s is not the data that the model was trained on; its test part may not be held out", fields.name
        )
    return fields, train.split_fields(fields, data)


def files_of(trained: Model, path: str | None) -> list[Path]:
    """The files that `data_of` reads."""
    path = trained.training["config"]["data"]["fields"] if path is None else path
    return readers.files_of(path) if path else []


def held_out(trained: Model, path: str | None = None) -> tuple[Callable[[np.ndarray], Fields], Split]:
    """`data_of` as a function that gives frames by their numbers, and the split; of the twin it makes those alone.

    Raises:
      InputError: fields that cannot be read, or are on another grid.
    """
    data = trained.origin["config"]["data"]
    if path or data["fields"] or data["block_split"]:
        fields, split = data_of(trained, path)
        return fields.select, split
    parts = {name: np.arange(*trained.origin["parts"][name]) for name in ("train", "validation", "test")}
    made = partial(twin.select, twin=twin.Twin(seed=data["twin_seed"]))
    return made, Split(**parts, decorrelation=trained.origin["decorrelation"])


FLAGS = flags.FLAGS


def _define_flags() -> None:
    flags.DEFINE_string("model", None, "Folder of a model, as training writes it.")
    flags.DEFINE_string("fields", None, "File of fields; by default those that the model was trained on.")
    flags.DEFINE_integer("frames", 64, "Test frames to inpaint, drawn at random.", lower_bound=1)
    flags.DEFINE_list("patterns", [], "Observation patterns, such as line:22,walk:90,cells:0.02.")
    flags.DEFINE_list("methods", [*BASELINES, "adaptive", "kalman"], f"Among {', '.join(METHODS)}.")
    flags.DEFINE_list("keep", [], "Methods whose members go into fields_METHOD.nc, beside the last one's in fields.nc.")
    flags.DEFINE_integer("members", 16, "Members of an ensemble.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of frames, patterns and members.", lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_integer("chunk", None, "Members sampled at a time; by default what pays on the device.", lower_bound=1)
    flags.DEFINE_bool("raw", False, "Leave out the row of the method that the model is calibrated for.")
    flags.DEFINE_string("out", "results", "Folder for table.csv, fields.nc and figure.png.")
    flags.mark_flag_as_required("model")


def main(_) -> None:
    """Compares methods on held-out frames."""
    check_methods(FLAGS.methods, FLAGS.members)
    trained = model.load(FLAGS.model)
    fields, split = data_of(trained, FLAGS.fields)
    numbers = pick(split, FLAGS.frames, FLAGS.seed)
    patterns = FLAGS.patterns or observe.usual(fields.ocean)
    out = Path(FLAGS.out)
    text = run(
        trained, fields.select(numbers), numbers, patterns, FLAGS.methods, out,
        members=FLAGS.members, seed=FLAGS.seed, chunk=FLAGS.chunk, block=block_length(split, len(numbers)),
        kept=FLAGS.keep, raw=FLAGS.raw, inputs=files_of(trained, FLAGS.fields),
    )  # fmt: skip
    print(text)
    print(f"\nwrote {out / 'table.csv'}, {out / 'fields.nc'} and {out / 'figure.png'}")


if __name__ == "__main__":
    _define_flags()
    command.run(main)
