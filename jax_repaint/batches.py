"""The batches of a sweep: points x cases x members that one compiled program samples together.

Points are grouped by what makes another program (points.same_program). A batch is as large as pays on the device and
fits into its memory, which compiling the program tells beforehand. What a batch holds changes no member of it.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Collection, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from jax_repaint import device, ensemble, gains, guide
from jax_repaint.cases import Case
from jax_repaint.methods import FROM_RIDGE, linear_samples, ridge_offset
from jax_repaint.model import Model
from jax_repaint.points import Program, same_program
from jax_repaint.posterior import evidence_for
from jax_repaint.sample import first_failure
from jax_repaint.study import Estimates, Study, Where


@dataclasses.dataclass(frozen=True)
class Group:
    """Numbers of points and cases of one compiled program."""

    points: list[int]
    cases: list[Where]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Numbers of points, and cases of one seed, that are sampled together and written as one part."""

    points: list[int]
    cases: list[Where]


def make_groups(study: Study) -> list[Group]:
    """The groups of a study, in the order of their first points."""
    groups: dict[Hashable, Group] = {}
    for point, program in zip(study.points, study.programs, strict=True):
        for where in study.cases[point.consecutive]:
            # The gains of posterior samplers have a row for each observation.
            key = same_program(point, program), None if point.repaint else where.size
            group = groups.setdefault(key, Group([], []))
            if point.number not in group.points:
                group.points.append(point.number)
            if point.number == group.points[0]:
                group.cases.append(where)
    return list(groups.values())


def left_of(
    study: Study, group: Group, done: Collection[str] = (), index: int = 0, count: int = 1
) -> dict[Where, list[int]]:
    """Numbers of the points that are not done of each case of process `index` of `count`; no finished cases."""
    left = {}
    for where in group.cases[index::count]:
        numbers = [number for number in group.points if study.task(study.points[number], where) not in done]
        if numbers:
            left[where] = numbers
    return left


def shape_of(study: Study, left: dict[Where, list[int]], rows: int, alike: gains.Rows) -> tuple[int, int]:
    """Points and cases of a batch of about `rows` members: all points of as many cases as fit, or some of one case.

    All batches are of about the same size, so that little of the last one is filled up.

    Args:
      alike: rows of the observations, the same for all cases of a posterior sampler.
    """
    first = study.points[next(iter(left.values()))[0]]
    members, most = first.members, max(map(len, left.values()))
    fitting = rows
    if not first.repaint:
        # Posterior samplers take points one by one: each has gains of its own.
        most = 1
        gaussian, program = study.models[first.model].gaussian, study.programs[first.number]
        levels = 0 if program is None else program.calls
        fitting = ensemble.most_own_bytes() // ensemble.own_bytes(alike, gaussian, levels)
    points = min(max(rows // members, 1), most)
    points = math.ceil(most / math.ceil(most / points))
    cases = max(min(rows // (points * members), fitting), 1) if points == most else 1
    seeds = [where.seed for where in left]
    of_seed = max(seeds.count(seed) for seed in set(seeds))
    return points, math.ceil(of_seed / math.ceil(of_seed / min(cases, of_seed)))


def chunk_of(members: int, rows: int, devices: int) -> int:
    """Members a call, as many on each device that it needs: at most `rows`, but one a device; alike in all calls."""
    chunk = math.ceil(members / math.ceil(members / max(rows, devices)))
    each = max(min(-(-chunk // devices), rows // devices), 1)
    return each * min(-(-chunk // each), devices)


def make_batches(left: dict[Where, list[int]], shape: tuple[int, int]) -> list[Batch]:
    """What is left of a group in batches of a shape."""
    most_points, most_cases = shape
    batches = []
    for _, of_seed in itertools.groupby(left, lambda where: where.seed):
        of_seed = list(of_seed)
        for start in range(0, len(of_seed), most_cases):
            cases = of_seed[start : start + most_cases]
            numbers = sorted({number for where in cases for number in left[where]})
            batches += [Batch(numbers[i : i + most_points], cases) for i in range(0, len(numbers), most_points)]
    return batches


# --- sampling -------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Samples:
    """What a batch made of one task.

    Attributes:
      x: (members, stages, y, x, 2) m/s, NaN on land.
      failed_at: where each member failed up to the end of each stage, (members, stages) of text; empty if it did not.
      seconds: of the device.
    """

    x: np.ndarray
    failed_at: np.ndarray
    seconds: float


@dataclasses.dataclass
class Sampler:
    """Samples the batches of one group.

    Attributes:
      shape: points and cases of a batch.
      chunk: members a call of the device.
      memory, seconds: see device.Compiled; None for samples of the linear prior, which have no program of their own.
    """

    study: Study
    group: Group
    trained: Model
    shape: tuple[int, int] = (1, 1)
    chunk: int = 1
    memory: int | None = None
    seconds: float | None = None
    _kept: dict[int, tuple[bytes, guide.Evidence]] = dataclasses.field(default_factory=dict)

    @classmethod
    def plan(cls, study: Study, group: Group, left: dict[Where, list[int]], example: Estimates) -> "Sampler":
        """Compiles the program of a group for the largest batch that pays and fits.

        Args:
          left: what is to be sampled.
          example: any case of the group.
        """
        made = cls(study, group, study.models[study.points[group.points[0]].model])
        budget = int(study.config.memory_gb * 1e9) or device.free_memory()
        rows = study.config.batch or device.usual_batch()
        while True:
            made.shape = shape_of(study, left, rows, gains.rows_of(made.trained.gaussian, example.case.observation))
            devices = jax.local_device_count()
            made.chunk = chunk_of(made.members * math.prod(made.shape), rows, devices)
            try:
                made._compile(example)
            except jax.errors.JaxRuntimeError as e:
                if not device.is_full(e):
                    raise
                made.memory = 2 * budget
            if made.memory is None or made.memory <= budget or made.chunk <= devices:
                return made
            fitting = max(min(int(made.chunk * budget / made.memory), made.chunk - 1), 1)
            logging.warning(
                "%d members a call need %.2g GB and %.2g are free; taking %d",
                made.chunk, made.memory / 1e9, budget / 1e9, fitting,
            )  # fmt: skip
            rows = fitting

    @property
    def repaint(self) -> bool:
        """Whether the group belongs to the RePaint family."""
        return self.study.points[self.group.points[0]].repaint

    @property
    def members(self) -> int:
        """Members of each ensemble; all points of a group have as many."""
        return self.study.points[self.group.points[0]].members

    def _compile(self, example: Estimates) -> None:
        program = self.study.programs[self.group.points[0]]
        if program is None:
            return
        if self.repaint:
            rows, numbers = np.zeros(self.chunk, np.int32), np.zeros(self.chunk, np.float32)
            keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), self.chunk))
            stages = jax.tree.map(lambda leaf: numbers, program)
            known = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct((self.shape[1], *leaf.shape), leaf.dtype), example.known
            )
            shared = self.trained.denoiser, known, self.trained.steps
            compiled = device.compile_ahead(ensemble.repaint_rows, rows, (keys, stages, numbers), shared)
        else:
            gaussian = self.trained.gaussian
            alike = [gains.rows_of(gaussian, example.case.observation)] * self.shape[1]
            batch = ensemble.frame_batches(alike, self.members, self.chunk, gaussian, program.calls)
            frames, (_, members) = len(batch[0]), ensemble.batch_shape(self.members, self.chunk)
            rows, numbers = np.zeros(members, np.int32), np.zeros(members, np.float32)
            keys = jax.eval_shape(lambda: ensemble.member_keys(0, range(members), range(frames)))
            (evidence,) = self.evidence_of([self.group.points[0]], [example])[self.group.points[0]]
            evidence = jax.eval_shape(lambda: ensemble.stack_evidence([evidence] * frames))
            analyses = jax.eval_shape(lambda: ensemble.stack_analyses([example.case.analysis] * frames))
            shared = self.trained.denoiser, evidence, self.trained.gaussian, analyses, program
            compiled = device.compile_ahead(ensemble.posterior_frames, rows, (keys, numbers), shared)
        self.memory = compiled.memory
        self.seconds = compiled.seconds + (self.seconds or 0)

    def evidence_of(self, points: Sequence[int], estimates: Sequence[Estimates]) -> dict[int, list[guide.Evidence]]:
        """Evidence of every case for each posterior sampler among the points; the host's part of the work."""
        made = {}
        for number in points:
            program = self.study.programs[number]
            if not self.repaint and program is not None:
                made[number] = [self._evidence(number, one.case) for one in estimates]
        return made

    def run(
        self, batch: Batch, estimates: Sequence[Estimates], evidence: dict[int, list[guide.Evidence]]
    ) -> dict[tuple[int, int], Samples]:
        """Samples of every (number of the point, number of the case in the batch).

        Args:
          evidence: of `evidence_of`.
        """
        if self.repaint:
            return self._repaint(batch, estimates)
        made = {}
        for number in batch.points:
            if self.study.programs[number] is None:
                made |= self._linear(number, batch, estimates)
            else:
                made |= self._posterior(number, batch, estimates, evidence[number])
        return made

    def _repaint(self, batch: Batch, estimates: Sequence[Estimates]) -> dict[tuple[int, int], Samples]:
        study = self.study
        # A batch of another shape would be another program.
        points = _filled(batch.points, self.shape[0])
        chosen = _filled(list(range(len(estimates))), self.shape[1])
        known = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[estimates[i].known for i in chosen])
        frames = [batch.cases[i].frame for i in chosen]
        programs = [study.programs[number] for number in points]
        decay = [study.points[number].var_decay for number in points]

        def call(chunk: int) -> Any:
            return ensemble.repaint_sweep(
                self.trained.denoiser, known, self.trained.steps, programs, frames=frames,
                members=self.members, seed=batch.cases[0].seed, var_decay=decay, chunk=chunk,
            )  # fmt: skip

        began = time.perf_counter()
        outcome, self.chunk = device.with_less_memory(call, self.chunk)
        # What fills a batch up is not a cost of the others.
        seconds = (time.perf_counter() - began) / math.prod(self.shape)
        made = {}
        for p, number in enumerate(batch.points):
            for case in range(len(batch.cases)):
                failed_at = _failures(study.programs[number], outcome.failed[p, case])
                made[number, case] = Samples(self.trained.to_velocity(outcome.x[p, case]), failed_at, seconds)
        return made

    def _posterior(
        self, number: int, batch: Batch, estimates: Sequence[Estimates], evidence: Sequence[guide.Evidence]
    ) -> dict[tuple[int, int], Samples]:
        trained, program = self.trained, self.study.programs[number]
        chosen = _filled(list(range(len(estimates))), self.shape[1])

        def call(chunk: int) -> np.ndarray:
            return ensemble.posterior_ensemble(
                trained.denoiser, [evidence[i] for i in chosen], trained.gaussian,
                [estimates[i].case.analysis for i in chosen], program,
                frames=[batch.cases[i].frame for i in chosen], members=self.members, seed=batch.cases[0].seed,
                chunk=chunk,
            )  # fmt: skip

        began = time.perf_counter()
        x, self.chunk = device.with_less_memory(call, self.chunk)
        seconds = (time.perf_counter() - began) / len(chosen)
        return {(number, case): self._samples(x[case], seconds) for case in range(len(estimates))}

    def _linear(self, number: int, batch: Batch, estimates: Sequence[Estimates]) -> dict[tuple[int, int], Samples]:
        """Samples of the linear prior, case by case: they call no network."""
        made = {}
        for case, one in enumerate(estimates):

            def call(chunk: int, one: Case = one.case) -> np.ndarray:
                return linear_samples(self.trained, one, self.members, batch.cases[0].seed, chunk)

            began = time.perf_counter()
            x, _ = device.with_less_memory(call, min(self.chunk, self.members))
            made[number, case] = self._samples(x, time.perf_counter() - began)
        return made

    def _samples(self, x: np.ndarray, seconds: float) -> Samples:
        """Of members (M, y, x, 2), standardised."""
        x = self.trained.to_velocity(x)[:, None]
        finite = np.isfinite(x[..., self.trained.ocean, :]).all((-1, -2))
        return Samples(x, np.where(finite, "", "somewhere"), seconds)

    def _evidence(self, number: int, case: Case) -> guide.Evidence:
        """The gains of one point, kept from one frame to the next under the same pattern."""
        pattern, program = case.observed.tobytes(), self.study.programs[number]
        if self._kept.get(number, (b"",))[0] != pattern:
            made = evidence_for(program, self.trained.gaussian.ocean, case.observation, self.trained.gaussian)
            self._kept[number] = pattern, made
        made = self._kept[number][1].replace(observation=case.observation)
        if self.study.points[number].method in FROM_RIDGE:
            made = made.replace(offset=ridge_offset(self.trained, case.observation))
        return made


def _filled(items: list[int], count: int) -> list[int]:
    return items + items[-1:] * (count - len(items))


def _failures(stages: Program, failed: np.ndarray) -> np.ndarray:
    """Texts (members, stages) of Outcome.failed."""
    made = np.full(failed.shape, "", object)
    for member, stage in np.argwhere(failed >= 0):
        made[member, stage] = str(first_failure(stages, failed[member]))
    return made
