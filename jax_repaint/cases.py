"""Fields to inpaint: which frames, what is observed of each, and the linear estimate of the rest.

Frames are drawn from the part of a model's fields that its training did not see. A case is one of them with a pattern.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from jax_repaint import metrics, observe
from jax_repaint.data import fields as fields_lib
from jax_repaint.data import readers, twin
from jax_repaint.data.fields import Fields, Split, crop, prepare_with_gaps
from jax_repaint.errors import InputError
from jax_repaint.model import Model
from jax_repaint.prepare import load_fields, split_fields
from jax_repaint.prior import gp, linear
from jax_repaint.prior.analysis import Analysis
from jax_repaint.sample import Known
from jax_repaint.settings import default_config

FRAMES_A_DIRECTION = 4  # of a linear prior, at least; with two, members of a short series spread half of their error
OBSERVATION_ERROR = 0.005  # m/s, what the methods take the standard error of observations without errors to be
LARGEST_ERROR = 1e6  # m/s; beyond it is a fill value
# Standard error over the standard deviation of the currents. In float32 a few observations of one cell that have a
# smaller one leave nothing right of the inverse of their covariance.
LEAST_SIGMA = 1e-4
# Of points between cells, which are nearly alike where they share some: with smaller ones the rounding of that inverse
# comes into the mean of `kalman_jvp`, up to 0.3 at 1e-4 (tests/test_inpaint.py). Those that are smaller count as this.
LEAST_POINT_SIGMA = 1e-3


def data_of(trained: Model, path: str | None, part: str = "test") -> tuple[Fields, Split]:
    """The fields a model was trained on (or a file with the same grid) and their split, as in its training.

    Args:
      part: what is to stand in `Split.test`: "train", "validation" or "test", or "all" for a whole file of which no
        frame had a part in training, which is the validation part too, and decorrelates as the training's frames did.

    Raises:
      InputError: fields that cannot be read, are on another grid, or, for "all", are those of the training.
    """
    if part == "all":
        return _unseen(trained, path)
    config = default_config()
    config.update(ConfigDict(trained.origin["config"]))
    data = config.data
    fields = load_fields(data.fields if path is None else path, data.frames, data.twin_seed)
    trained.check_grid(fields)
    same = fields.hash() == trained.origin["fingerprint"]
    if not same and path is None and not data.fields:
        logging.info(
            "%s differs from that of the training as machines round differently; its hours are the same", fields.name
        )
    elif not same:
        logging.warning(
            "%s is not the data that the model was trained on, and its test part may not be held out; if none of its "
            "frames had a part in training, the part all takes every one",
            fields.name,
        )
    split = split_fields(fields, data)
    return fields, dataclasses.replace(split, test=getattr(split, part))


def _unseen(trained: Model, path: str | None) -> tuple[Fields, Split]:
    if not path:
        raise InputError("all frames are held out only of a file (fields) of which none had a part in training")
    fields = readers.read(path)
    trained.check_grid(fields)
    check_unseen([trained], fields)
    covered = np.flatnonzero(fields.coverage >= fields_lib.LEAST_COVERAGE)
    if not covered.size:
        raise InputError(f"{fields.name}: no frame has values in {fields_lib.LEAST_COVERAGE:.0%} of the ocean cells")
    logging.info("%d of %d frames of %s are taken as held out", covered.size, len(fields), fields.name)
    # That of the training goes for the place. Measured anew, under tides that come back for months, it is now a month
    # and now half a year.
    decorrelation = trained.training.get("decorrelation", math.nan) * _frames_a_frame(trained, fields)
    if math.isnan(decorrelation):
        known = len(fields) >= fields_lib.FEWEST_LAGGED
        decorrelation = fields_lib.decorrelation_time(fields) if known else float(len(fields))
    return fields, Split(covered[:0], covered, covered, decorrelation=decorrelation)


def _frames_a_frame(trained: Model, fields: Fields) -> float:
    """Frames of `fields` in the time from one frame of the training to the next; 1 where that is not known."""
    first, last = np.array(trained.training.get("time", ["NaT", "NaT"]), "datetime64[ns]")
    parts = [trained.training.get("parts", {}).get(name, [0, 0]) for name in ("train", "validation")]
    steps = max(stop for _, stop in parts) - 1 - min(start for start, _ in parts)
    if np.isnat(first) or steps < 1 or last <= first or len(fields) < 2:
        return 1.0
    return float((last - first) / steps / fields.step)


def check_unseen(models: Iterable[Model], fields: Fields) -> None:
    """Raises InputError if the fields are those that a model was trained on; warns if they are of the same time."""
    for one in models:
        if fields.hash() == one.training.get("fingerprint"):
            raise InputError(f"{fields.name} is what a model was trained on; of its frames only a part is held out")
        first, last = np.array(one.training.get("time", ["NaT", "NaT"]), "datetime64[ns]")
        same = int(((first <= fields.time) & (fields.time <= last)).sum())
        if same:
            logging.warning(
                "%d of %d frames of %s are of the time that a model was trained on, from %s to %s; of the same "
                "currents they are not held out",
                same, len(fields), fields.name, *one.training["time"],
            )  # fmt: skip


def files_of(trained: Model, path: str | None) -> list[Path]:
    """The files that `data_of` reads; none of a model that does not say what it was trained on."""
    path = trained.training.get("config", {}).get("data", {}).get("fields") if path is None else path
    return readers.files_of(path) if path else []


def held_out(
    trained: Model, path: str | None = None, part: str = "test"
) -> tuple[Callable[[np.ndarray], Fields], Split]:
    """`data_of` as a function that gives frames by their numbers, and the split; of the twin it makes those alone.

    Raises:
      InputError: fields that cannot be read, or are on another grid.
    """
    data = trained.origin["config"]["data"]
    if path or data["fields"] or data["block_split"]:
        fields, split = data_of(trained, path, part)
        return fields.select, split
    parts = {name: np.arange(*trained.origin["parts"][name]) for name in ("train", "validation", "test")}
    made = partial(twin.select, twin=twin.Twin(seed=data["twin_seed"]))
    return made, Split(**parts | {"test": parts[part]}, decorrelation=trained.origin["decorrelation"])


def with_directions(trained: Model, fields: Fields, split: Split, directions: int) -> Model:
    """The model with a linear prior of another number of directions, from the covariance of the training frames.

    That alone: a share of a kernel, as the prior of few frames may have, is not blended in.

    Raises:
      InputError: no direction, more than the frames have, or frames that do not go with the model.
    """
    if directions < 1:
        raise InputError(f"a linear prior has at least one direction, got {directions}")
    trained.check_grid(fields)
    x, _, present = prepare_with_gaps(fields.select(split.train), trained.standardiser, trained.padded)
    x = linear.fill(trained.gaussian, x, present, 0, split.train)
    made = linear.fit(x, np.asarray(trained.gaussian.ocean)[..., 0] > 0, directions)
    if made.variance.size < directions:
        raise InputError(
            f"{len(x)} training frames of {np.sum(trained.ocean)} ocean cells tell no {directions} directions apart; "
            f"take fewer than {made.variance.size}"
        )
    if directions > len(x) / FRAMES_A_DIRECTION:
        logging.warning(
            "%d directions are many for %d training frames, which leave too little variance for the rest: the linear "
            "estimate will be too sure of itself", directions, len(x),
        )  # fmt: skip
    return trained.with_prior(made)


def pick(split: Split, frames: int, seed: int = 0) -> np.ndarray:
    """Numbers of `frames` test frames, drawn without replacement, in the order of time.

    Raises:
      InputError: `frames` is not positive.
    """
    if frames < 1:
        raise InputError(f"at least one frame must be inpainted, got {frames}")
    return np.sort(np.random.default_rng([seed, 0xF4]).choice(split.test, min(frames, split.test.size), replace=False))


def block_length(split: Split, frames: int) -> int:
    """How many of `frames` random test frames lie within one decorrelation time: the block of the bootstrap."""
    return int(np.clip(round(frames * split.decorrelation / split.test.size), 1, max(frames // 4, 1)))


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
      error: what methods are told of the standard error of a value, m/s.
      noisy: (y, x, 2) m/s, observed values where they have errors of that size; None where they are the truth.
      offset: (y, x, 2) m/s, from the linear estimate to another that posterior samplers are to start from, 0 where
        the two are the same; None for the linear one.
    """

    pattern: str
    frame: int
    time: np.datetime64
    truth: np.ndarray
    observed: np.ndarray
    observation: observe.Observation
    analysis: Analysis
    error: float = OBSERVATION_ERROR
    noisy: np.ndarray | None = None
    offset: np.ndarray | None = None

    @property
    def seen(self) -> np.ndarray:
        """(y, x, 2) m/s, the observed values on the cells that are observed."""
        return self.truth if self.noisy is None else self.noisy


def make_cases(
    trained: Model,
    fields: Fields,
    numbers: Sequence[int],
    patterns: Sequence[str],
    seed: int = 0,
    error: float | None = None,
) -> list[Case]:
    """Every pattern on every frame; patterns with a random part are drawn anew for each frame.

    Args:
      fields: the frames to inpaint, on the model's grid; what falls into their gaps is neither observed nor scored.
      numbers: their numbers in the series, which name them in every random key.
      error: standard error of the observed values, m/s, whose errors are independent, and those of a cell the same
        under every pattern; None for the true values, which methods take to be off by OBSERVATION_ERROR.

    Raises:
      InputError: no pattern or one that cannot be drawn, no cell left to observe or to score, another grid, an error
        that single precision cannot tell from 0, or that no instrument has.
    """
    if not patterns:
        raise InputError("at least one pattern is needed")
    least = LEAST_SIGMA * float(np.max(trained.standardiser.std))
    if error is not None and not least <= error <= LARGEST_ERROR:
        raise InputError(f"the standard error of observations is {least:.2g} to {LARGEST_ERROR:g} m/s, got {error}")
    trained.check_grid(fields)
    cases, analysis_of = [], _LatestPattern(partial(linear.analysis, trained.gaussian))
    told = OBSERVATION_ERROR if error is None else error
    for pattern in patterns:
        for number, velocity, when in zip(numbers, fields.velocity, fields.time, strict=True):
            observed = observed_cells(fields, velocity, pattern, int(number), seed)
            noisy = None if error is None else with_errors(velocity, error, int(number), seed)
            observation = observation_of(trained, velocity if noisy is None else noisy, observed, told)
            analysis = analysis_of(observed.tobytes(), observation)
            cases.append(Case(pattern, int(number), when, velocity, observed, observation, analysis, told, noisy))
    return cases


def with_errors(velocity: np.ndarray, error: float, number: int, seed: int) -> np.ndarray:
    """A field (y, x, 2) as it is observed with errors of `error` m/s; `number` and `seed` name them."""
    rng = np.random.default_rng([seed, number, 0xE7])
    return (velocity + error * rng.standard_normal(velocity.shape)).astype(np.float32)


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


def note_on(error: float | None) -> str:
    """What stands below a table: what errors observations had; nothing if they had none."""
    return f"\n\nobserved with errors of {error:g} m/s" if error else ""


def observation_of(
    trained: Model, velocity: np.ndarray, observed: np.ndarray, error: float = OBSERVATION_ERROR
) -> observe.Observation:
    """The observed cells of a field in m/s, standardised, on the padded grid; `error` is their standard error, m/s."""
    x = trained.standardiser.standardise(velocity, trained.ocean)
    observation = observe.from_cells(observed, x, 1.0, trained.ocean)
    sigma = jnp.asarray(error / np.asarray(trained.standardiser.std), jnp.float32)[None]
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


class _LatestPattern:
    """A function of a pattern, whose latest result serves the cases that follow with the same pattern."""

    def __init__(self, make: Callable[..., Any]):
        self._make, self._name, self._made = make, None, None

    def __call__(self, pattern: bytes, *arguments: Any) -> Any:
        if self._name != pattern:
            # Two at a time may be too many for the memory.
            self._made = None
            self._name, self._made = pattern, self._make(*arguments)
        return self._made


class GPBaseline:
    """A Gaussian process as a baseline, in m/s: `seed_gp`, or `gp` fitted to the training frames.

    Where observations have errors, both know how large these are.
    """

    def __init__(self, trained: Model, fields: Fields, name: str):
        """Of fields on the model's grid.

        Raises:
          InputError: the model has no fitted GP.
        """
        self._ocean, self._exact = fields.ocean, None
        if name == "seed_gp":
            # It took cells as exact: of its own error variance there is 1e-6 (m/s)^2.
            self._exact = math.sqrt(gp.JITTER)
            self._kernel, self._places = gp.seed_gp(), gp.pixels(fields.shape)
            self._background = np.zeros((*fields.shape, 2), np.float32)
        else:
            if trained.kernel is None:
                raise InputError("this model was exported without a fitted GP")
            self._kernel, self._places = trained.kernel, fields.places()
            self._background = np.where(self._ocean[..., None], trained.to_velocity(trained.gaussian.mean), 0)
        self._analysis = _LatestPattern(gp.analysis)
        self._estimator = _LatestPattern(gp.estimator)

    def analysis(self, case: Case) -> Analysis:
        """The analysis of the pattern of a case, with the values of the case."""
        found, seen = self._of(case, self._analysis), self._seen(case)
        return found.replace(observation=found.observation.replace(values=seen.values))

    def mean(self, case: Case) -> np.ndarray:
        """The estimate (y, x, 2), NaN on land."""
        made = self._of(case, self._estimator)(self._seen(case).values)
        return np.where(self._ocean[..., None], made, np.nan)

    def _of(self, case: Case, make: Callable[..., Any]) -> Any:
        seen = self._seen(case)
        pattern = case.observed.tobytes() + np.asarray(seen.sigma).tobytes()
        return make(pattern, self._kernel, seen, self._ocean, self._places, self._background)

    def _seen(self, case: Case) -> observe.Observation:
        error = self._exact if self._exact and case.noisy is None else case.error
        return observe.from_cells(case.observed, case.seen, error, self._ocean)


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
    observation = observation_of(trained, case.seen, case.observed & ~held, case.error)
    # Another start would know the cells that are held out.
    less = dataclasses.replace(
        case,
        observed=case.observed & ~held,
        observation=observation,
        analysis=linear.analysis(trained.gaussian, observation),
        offset=None,
    )
    return less, held
