"""A sweep ready to run: its points, models and frames, and the cases that all points are tried on.

A case is a pattern on a frame, drawn from a seed; what the baselines make of it does not depend on the point. A task
is a point on a case, and has a name that is the same wherever and whenever it is run.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jax_repaint import SHIPPED, metrics, model, observe, results
from jax_repaint.cases import (
    OBSERVATION_ERROR,
    Case,
    GPBaseline,
    block_length,
    check_unseen,
    data_of,
    held_out,
    known_of,
    make_cases,
    observed_cells,
    pick,
)
from jax_repaint.checks import check_complete
from jax_repaint.data.fields import Fields, Split, pad
from jax_repaint.errors import InputError
from jax_repaint.model import Model
from jax_repaint.points import FREE, Point, Program, default_config, describe, make_program, plain, read_points
from jax_repaint.sample import Known

# What a picture can show beside settings of the points.
DRAWN = frozenset({"label", "stage", "calls", "members", "coverage", "pattern", "distance"})
KEPT_BYTES = 1 << 30  # of what the baselines make of the cases of one model and one prior


@dataclasses.dataclass(frozen=True)
class Where:
    """One case: all but the point of a task.

    Attributes:
      seed, pattern, frame: name it.
      size: rows of its observation, which make another program of a posterior sampler.
    """

    seed: int
    pattern: str
    frame: int
    size: int = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True)
class Estimates:
    """What does not depend on the point: the case, and what the baselines make of it.

    Attributes:
      case: with truth and observation.
      scored: (y, x) bool.
      baselines: (y, x, 2) m/s by name.
      known: what the RePaint family starts from.
    """

    case: Case
    scored: np.ndarray
    baselines: dict[str, np.ndarray]
    known: Known


Made = tuple[np.ndarray, dict[str, np.ndarray], Known]  # all of Estimates but its case


@dataclasses.dataclass
class Study:
    """A sweep ready to run.

    Attributes:
      config: of points.default_config.
      points: and `programs`, in the same order.
      models: by folder.
      fields: the frames of all cases, `numbers` theirs in the series.
      frames: numbers of the frames of points with random (False) and consecutive (True) frames.
      blocks: frames within a decorrelation time, in the same way.
    """

    config: ConfigDict
    points: list[Point]
    programs: list[Program]
    models: dict[str, Model]
    fields: Fields
    numbers: np.ndarray
    frames: dict[bool, np.ndarray]
    blocks: dict[bool, int]

    @cached_property
    def patterns(self) -> list[str]:
        """Observation patterns."""
        return list(observe.patterns_of(self.config.patterns) or observe.usual(self.fields.ocean))

    @cached_property
    def cases(self) -> dict[bool, list[Where]]:
        """Cases of points with random and with consecutive frames."""
        made = {}
        for consecutive, frames in self.frames.items():
            made[consecutive] = []
            for seed, pattern, frame in itertools.product(self.config.seeds, self.patterns, frames.tolist()):
                velocity = self.fields.velocity[int(np.searchsorted(self.numbers, frame))]
                # What falls into gaps is not observed, and may make another program of it.
                seen = observed_cells(self.fields, velocity, pattern, frame, seed)
                made[consecutive].append(Where(seed, pattern, frame, observe.bucket(int(seen.sum()))))
        return made

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the sweep is, as it is kept in the workdir: usual values of the code, too."""
        error = self.config.error
        return {
            # Without errors a sweep is what it was before there were any.
            "config": {k: v for k, v in self.config.to_dict().items() if k not in FREE and (k, v) != ("error", 0)},
            "models": {folder: model.fingerprint(one) for folder, one in self.models.items()},
            "frames": self.fields.hash(),
            results.ROWS_VERSION: results.VERSION,
            "observation_error": [error, "drawn"] if error else OBSERVATION_ERROR,
            "programs": {
                point.label: describe(point, program) for point, program in zip(self.points, self.programs, strict=True)
            },
        }

    @cached_property
    def _named(self) -> list[str]:
        """What of each point goes into the names of its tasks: all that its rows depend on."""
        common = [self.identity[key] for key in ("frames", results.ROWS_VERSION, "observation_error")]
        names = []
        for point in self.points:
            own = {key: value for key, value in point.settings.items() if key != "label"}
            own["model"] = self.identity["models"][point.model]
            names.append(results.digest([common, own, self.identity["programs"][point.label]]))
        return names

    @cached_property
    def _makers(self) -> dict[tuple[str, str], "Cases"]:
        return {}

    def maker(self, point: Point) -> "Cases":
        """Makes the cases of a point; points of one model and one prior share it, and what it has made.

        Raises:
          InputError: the point starts from a fitted GP that its model does not have.
        """
        key = point.model, point.prior
        if key not in self._makers:
            self._makers[key] = Cases(self, self.models[point.model], point.prior)
        return self._makers[key]

    def task(self, point: Point, where: Where) -> str:
        """Name of a point on a case: the same wherever and whenever it is run, by code that makes the same rows."""
        name, sizes = self._named[point.number], list(point.sizes(self.config))
        return results.digest([name, sizes, where.seed, where.pattern, where.frame])


def open_study(config: ConfigDict) -> Study:
    """Reads models and frames.

    Raises:
      InputError: a value that cannot work, a model or fields that cannot be read.
    """
    config = plain(config)
    _check(config)
    points = read_points(config)
    _check_drawn(config, points)
    models = {folder: model.load(folder or SHIPPED) for folder in dict.fromkeys(p.model for p in points)}
    programs = [make_program(point, models[point.model]) for point in points]
    first = next(iter(models.values()))
    if config.part == "all":
        fields, split = data_of(first, config.fields or None, config.part)
        check_unseen(models.values(), fields)
        select = fields.select
    else:
        _check_parts(models)
        select, split = held_out(first, config.fields or None, config.part)
    kinds = dict.fromkeys(point.consecutive for point in points)
    frames = {kind: _frames(split, config, kind) for kind in kinds}
    numbers = np.unique(np.concatenate(list(frames.values())))
    chosen = select(numbers)
    for one in models.values():
        one.check_grid(chosen)
    blocks = {kind: _block(split, config, kind, len(some)) for kind, some in frames.items()}
    study = Study(config, points, programs, models, chosen, numbers, frames, blocks)
    names = [results.digest([study.task(point, where) for where in study.cases[point.consecutive]]) for point in points]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise InputError(f"{points[number].label} and {points[names.index(name)].label} are the same point")
    return study


def _check(config: ConfigDict) -> None:
    usual = default_config(lambda add: None).to_dict()
    del usual["points"]
    check_complete(config.to_dict(), usual, "sweep")
    for name in ("frames", "members", "stretches"):
        if config[name] < 1:
            raise InputError(f"{name} must be at least 1, got {config[name]}")
    for name in ("batch", "memory_gb", "error"):
        if not 0 <= config[name] < math.inf:
            raise InputError(f"{name} must be a number that is not negative, got {config[name]}")
    for name in ("seeds", "sizes"):
        if any(type(number) is not int for number in config[name]):
            raise InputError(f"{name} must be whole numbers, got {config[name]}")
    if config.part not in ("test", "validation", "all"):
        raise InputError(f"part must be test, validation or all, got {config.part!r}")
    if not config.seeds or any(not 0 <= seed < 2**32 for seed in config.seeds):
        raise InputError(f"seeds must be whole numbers from 0 to {2**32 - 1}, at least one, got {config.seeds}")
    if len(set(config.seeds)) < len(config.seeds):
        raise InputError(f"seeds must differ from each other, got {config.seeds}")
    if any(not 1 <= size < config.members for size in config.sizes) or len(set(config.sizes)) < len(config.sizes):
        raise InputError(f"sizes must be from 1 and below members ({config.members}), got {config.sizes}")


def _check_drawn(config: ConfigDict, points: Sequence[Point]) -> None:
    """Raises InputError if the picture is to show what no point has."""
    known = DRAWN.union(*(point.settings for point in points))
    for name, what in (("x", config.x), ("curve", config.curve)):
        if what not in known and (what or name == "x"):
            raise InputError(f"{name} is {what!r}, but the points have {', '.join(sorted(known))}")


def _check_parts(models: Mapping[str, Model]) -> None:
    """Raises InputError unless what is held out for one model is so for all."""
    (name, first), *others = models.items()
    for folder, one in others:
        if not model.same_parts(first, one):
            raise InputError(
                f"{folder or SHIPPED} was trained on other frames than {name or SHIPPED}: what is held out for one may "
                "be training data of the other"
            )


def _frames(split: Split, config: ConfigDict, consecutive: bool) -> np.ndarray:
    """Numbers of random frames, or of stretches of frames: one stretch at a random place in each share of the part."""
    seed, count = config.seeds[0], min(config.frames, split.test.size)
    if not consecutive:
        return pick(split, count, seed)
    stretches, rng, chosen = min(config.stretches, count), np.random.default_rng([seed, 0xC5]), []
    # Shares of both differ by one at most, the first ones being the longer: each stretch has room in its share.
    shares = zip(np.array_split(split.test, stretches), np.array_split(np.arange(count), stretches), strict=True)
    for room, stretch in shares:
        first = int(rng.integers(room.size - stretch.size + 1))
        chosen.append(room[first : first + stretch.size])
    return np.concatenate(chosen)


def _block(split: Split, config: ConfigDict, consecutive: bool, count: int) -> int:
    """How many of `count` frames lie within one decorrelation time, at most a quarter; of stretches, whole ones."""
    if not consecutive:
        return block_length(split, count)
    stretches = min(config.stretches, count)
    together = math.ceil(stretches * split.decorrelation / split.test.size)
    return max(min(together * math.ceil(count / stretches), count // 4), 1)


# --- cases ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Cases:
    """Makes the cases of a study for one model and one prior, a batch ahead of the device.

    What the baselines make of a case is kept for other points, up to KEPT_BYTES; its analysis is too large for that.
    """

    study: Study
    trained: Model
    prior: str

    def __post_init__(self) -> None:
        names = ("seed_gp", "gp") if self.trained.kernel is not None else ("seed_gp",)
        if self.prior not in ("linear", *names):
            raise InputError("this model was exported without a fitted GP to start from")
        self._gps = {name: GPBaseline(self.trained, self.study.fields, name) for name in names}
        self._made: dict[Where, Made] = {}
        self._room = KEPT_BYTES

    def make(self, cases: Sequence[Where]) -> list[Estimates]:
        """Cases in the order asked for."""
        made = {}
        for (seed, pattern), group in itertools.groupby(cases, lambda where: (where.seed, where.pattern)):
            group = list(group)
            numbers = [where.frame for where in group]
            fields = self.study.fields.select(np.searchsorted(self.study.numbers, numbers))
            error = self.study.config.error or None
            drawn = make_cases(self.trained, fields, numbers, [pattern], seed, error)
            for where, case in zip(group, drawn, strict=True):
                made[where] = Estimates(case, *self._made.get(where) or self._keep(where, self._estimate(case)))
        return [made[where] for where in cases]

    def _keep(self, where: Where, made: Made) -> Made:
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(made))
        if size <= self._room:
            self._made[where] = made
            self._room -= size
        return made

    def _estimate(self, case: Case) -> Made:
        ocean = self.study.fields.ocean
        known = known_of(self.trained, case)
        baselines = {
            "climatology": self.trained.to_velocity(self.trained.gaussian.mean),
            "linear": self.trained.to_velocity(case.analysis.mean(case.observation.values)),
        }
        for name, baseline in self._gps.items():
            if name != self.prior:
                baselines[name] = baseline.mean(case)
            else:
                analysis = baseline.analysis(case)
                mean = np.asarray(analysis.mean(analysis.observation.values))
                baselines[name] = np.where(ocean[..., None], mean, np.nan).astype(np.float32)
                standardiser, padded = self.trained.standardiser, self.trained.padded
                start = pad(standardiser.standardise(mean, ocean), padded) * self.trained.gaussian.ocean
                # One scale for u and v, whose variances are equal: v' of the samplers is about where, not which.
                variance = np.asarray(analysis.variance) / np.mean(np.asarray(standardiser.std) ** 2)
                known = known._replace(
                    prior_mean=jnp.asarray(start, jnp.float32),
                    prior_variance=jnp.asarray(pad(variance, padded), jnp.float32),
                )
        return metrics.scored_cells(case.truth, ocean, case.observed), baselines, known
