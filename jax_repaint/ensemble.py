"""Ensembles: many members of many frames from one sampler, by vmap over both, in chunks, on all local devices.

Every random number comes from a key folded from (seed, frame, member), into which the samplers fold stage and step.
So a member does not depend on how many others are computed, in what order, in chunks of what size or on how many
devices; and members of the same number have the same noise under all hyperparameters.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_repaint import gains, guide, sample
from jax_repaint.array_types import Array, Float, Int, Key
from jax_repaint.checks import check_number
from jax_repaint.denoise import Denoiser, PrincipalGaussian
from jax_repaint.errors import InputError
from jax_repaint.posterior import Posterior, linear_sample, posterior
from jax_repaint.prior.analysis import Analysis, PrincipalAnalysis
from jax_repaint.sample import Known, Outcome, Repaint, repaint_stages
from jax_repaint.schedule import Schedule


def member_keys(seed: int, frames: Sequence[int], members: Sequence[int]) -> Key:
    """Keys (frames, members), folded from the seed, the number of the frame and the number of the member.

    Raises:
      InputError: a seed that is no whole number, or of more than 32 bits, which would name the members of another one.
    """
    if not isinstance(seed, jax.Array):
        check_number("a seed", seed)
        if not (0 <= seed < 2**32 and int(seed) == seed):
            raise InputError(f"a seed is a whole number from 0 to {2**32 - 1}, got {seed}")
        seed = int(seed)
    return _member_keys(jax.random.key(seed), jnp.asarray(frames, jnp.int32), jnp.asarray(members, jnp.int32))


@jax.jit
def _member_keys(root: Key, frames: Int[Array, " f"], members: Int[Array, " m"]) -> Key:
    def one(frame: Int[Array, ""], member: Int[Array, ""]) -> Key:
        return jax.random.fold_in(jax.random.fold_in(root, frame), member)

    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(frames, members)


def share(rows: int, devices: int) -> tuple[int, int]:
    """How many of `rows` a device takes, and how many devices that needs: no more of them than the work lasts with all.

    Devices that only repeat the last row would take time from the others where they are cores of one CPU.
    """
    each = -(-rows // devices)
    return each, -(-rows // each)


def over_devices(rows: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the one axis "members", over as many as `rows` need of all local devices or those given.

    Raises:
      InputError: there is no device.
    """
    chosen = np.asarray(jax.local_devices() if devices is None else devices, object)
    if not chosen.size:
        raise InputError("members need at least one device")
    return Mesh(chosen[: share(rows, chosen.size)[1]], ("members",), axis_types=(AxisType.Auto,))


def in_chunks(
    run: Callable[..., Any],
    rows: np.ndarray,
    per_row: Any,
    chunk: int,
    shared: Any = (),
    devices: Sequence[jax.Device] | None = None,
) -> Any:
    """run(rows, per_row, *shared) over chunks of one size, so that it compiles once; the last is filled up and cut.

    The rows of a chunk are split evenly over the devices that they need (`share`), and filled up where they are fewer.

    Args:
      run: rows (k,), the rows of `per_row` and all of `shared` to a pytree of results (k, ...).
      rows: (n,) whole numbers.
      per_row: a pytree of arrays (n, ...).
      chunk: rows a call, at least 1.
      shared: further arguments, copied to every device once.
      devices: all local ones by default.

    Returns:
      Results (n, ...) as numpy arrays.

    Raises:
      InputError: a chunk of no row.
    """
    if chunk < 1:
        raise InputError(f"a chunk holds at least one member, got {chunk}")
    count = len(rows)
    mesh = over_devices(min(chunk, count), devices)
    split, whole = NamedSharding(mesh, PartitionSpec("members")), NamedSharding(mesh, PartitionSpec())
    # On one device nothing is placed: arrays stay where they are.
    place = jax.device_put if mesh.size > 1 or devices is not None else lambda tree, _: tree
    shared = place(shared, whole)
    chunk = -(-min(chunk, count) // mesh.size) * mesh.size
    results = []
    for start in range(0, count, chunk):
        take = np.minimum(np.arange(start, start + chunk), count - 1)
        mine = place((jnp.asarray(rows[take]), jax.tree.map(lambda x, t=take: x[t], per_row)), split)
        results.append(jax.tree.map(np.asarray, run(*mine, *shared)))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *results)


@jax.jit
def repaint_rows(
    rows: Int[Array, " k"],
    per_row: tuple[Key, tuple[Repaint, ...], Float[Array, " k"]],
    denoiser: Denoiser,
    known: Known,
    schedule: Schedule,
) -> Outcome:
    """One chunk of members of the RePaint family, for `in_chunks` and device.compile_ahead: one compiled program.

    Args:
      rows: of `known`, the field of each member.
      per_row: key, stages (every leaf (k,)) and var_decay of each member.
      denoiser, known, schedule: see `repaint_ensemble`; the same for all members.

    Returns:
      Every leaf (k, ...); see `sample.repaint_stages`.
    """

    def one(row: Int[Array, ""], key: Key, stages: tuple[Repaint, ...], var_decay: Float[Array, ""]) -> Outcome:
        mine = jax.tree.map(lambda leaf: leaf[row], known)
        return repaint_stages(key, denoiser, mine, schedule, stages, var_decay)

    return jax.vmap(one)(rows, *per_row)


def repaint_ensemble(
    denoiser: Denoiser,
    known: Known,
    schedule: Schedule,
    stages: Sequence[Repaint],
    *,
    frames: Sequence[int],
    members: int,
    seed: int = 0,
    var_decay: float = sample.VAR_DECAY,
    chunk: int = 64,
    devices: Sequence[jax.Device] | None = None,
    last: bool = False,
) -> Outcome:
    """Members of n fields by the stages of the RePaint family (sample.repaint_stages).

    Args:
      denoiser: D(x; sigma).
      known: n fields, every leaf (n, ...).
      schedule: variance-preserving steps.
      stages: of `sample.method`.
      frames: n numbers that name the frames in the keys.
      members: of each frame.
      seed: of all of them.
      var_decay: factor on the prior variance before every later stage.
      chunk: members sampled at a time; what memory allows.
      devices: that share the members of a chunk; all local ones by default.
      last: whether to keep what the last stage gave alone, so that memory does not grow with the stages.

    Returns:
      Stage by stage, numpy: x (n, members, s, y, x, c) float32, standardised, and failed (n, members, s). With `last`
      x has one stage, and failed all of them.

    Raises:
      InputError: no members, another number of frames than of fields, arrays of different grids, values that are not
        finite, t_start that is not a step of the schedule.
    """
    outcome = repaint_sweep(
        denoiser, known, schedule, [stages], frames=frames, members=members, seed=seed, var_decay=[var_decay],
        chunk=chunk, devices=devices, last=last,
    )  # fmt: skip
    return jax.tree.map(lambda leaf: leaf[0], outcome)


def repaint_sweep(
    denoiser: Denoiser,
    known: Known,
    schedule: Schedule,
    points: Sequence[Sequence[Repaint]],
    *,
    frames: Sequence[int],
    members: int,
    seed: int = 0,
    var_decay: Sequence[float] | None = None,
    chunk: int = 64,
    devices: Sequence[jax.Device] | None = None,
    last: bool = False,
) -> Outcome:
    """`repaint_ensemble` at p points of the hyperparameters in one batch and one program, with the same noise at each.

    Args:
      points: p lists of stages with the same static part (`same_program` sorts others).
      var_decay: of each point; VAR_DECAY by default.

    Returns:
      As `repaint_ensemble`, with the points in front: x (p, n, members, s, y, x, c), failed (p, n, members, s).

    Raises:
      InputError: as `repaint_ensemble`; no points, or points of different programs.
    """
    var_decay = [sample.VAR_DECAY] * len(points) if var_decay is None else list(var_decay)
    _check_points(points, var_decay, schedule)
    _check_frames(known, frames, members)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *(tuple(stages) for stages in points))
    shape = len(points), len(frames), members
    point, row, member = (i.reshape(-1) for i in np.indices(shape))
    keys = member_keys(seed, frames, range(members))[row, member]
    per_row = keys, jax.tree.map(lambda leaf: leaf[point], stacked), np.float32(var_decay)[point]

    def run(*arguments: Any) -> Outcome:
        # The program is the same, and with it every digit.
        outcome = repaint_rows(*arguments)
        return outcome._replace(x=outcome.x[:, -1:]) if last else outcome

    outcome = in_chunks(run, row, per_row, chunk, (denoiser, known, schedule), devices)
    return jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), outcome)


def same_program(points: Sequence[Sequence[Repaint]]) -> list[list[int]]:
    """Numbers of the points of each program, in order: what `repaint_sweep` takes at once."""
    groups: dict[Hashable, list[int]] = {}
    for number, stages in enumerate(points):
        groups.setdefault(sample.static_part(stages), []).append(number)
    return list(groups.values())


def _check_points(points: Sequence[Sequence[Repaint]], var_decay: Sequence[float], schedule: Schedule) -> None:
    if not points or not points[0]:
        raise InputError("at least one point of at least one stage is needed")
    if len(same_program(points)) > 1:
        raise InputError("points of one sweep may differ in numbers only, not in t_start, resample_steps or start")
    if len(var_decay) != len(points):
        raise InputError(f"{len(points)} points are given, {len(var_decay)} values of var_decay")
    for value in var_decay:
        check_number("var_decay", value)
        if not 0 <= value <= 1:
            raise InputError(f"var_decay must be in [0, 1], got {value}")
    for stage in points[0]:
        sample.check_start(stage.t_start, schedule.steps)


def _check_frames(known: Known, frames: Sequence[int], members: int) -> None:
    if members < 1:
        raise InputError(f"an ensemble has at least one member of each frame, got {members}")
    if len(frames) != len(known.value):
        raise InputError(f"{len(frames)} frames are numbered, {len(known.value)} are given")
    sample.check_known(known)
    for name in ("value", "prior_mean", "prior_variance"):
        if not bool(jnp.isfinite(getattr(known, name)).all()):
            raise InputError(f"{name} of the fields to inpaint has values that are not finite")


def survivors(
    name: str, stages: Sequence[Repaint], frames: Sequence[int], outcome: Outcome
) -> list[Float[np.ndarray, "k s y x c"]]:
    """The members of each frame that did not fail, and a warning that says which did, and where.

    Args:
      name: of the method, for messages.
      stages, frames: of the run.
      outcome: of `repaint_ensemble`.

    Raises:
      InputError: a frame has fewer than two members left (or none, where one was asked for).
    """
    kept = []
    for frame, x, failed in zip(frames, outcome.x, outcome.failed, strict=True):
        fine = (failed < 0).all(-1)
        where = [str(sample.first_failure(stages, one)) for one in failed[~fine]]
        remedy = "smaller steps (guidance_scale) or another denoiser may help"
        first, every = (f" from {'; '.join(some)}" for some in (where[:1], where))
        _check_left(name, frame, fine, f", the first one{first}; {remedy}", every)
        kept.append(x[fine])
    return kept


def finite_members(
    name: str, frames: Sequence[int], ensembles: Sequence[np.ndarray], ocean: np.ndarray, antithetic: bool = False
) -> list[np.ndarray]:
    """The members of each frame that are finite, and a warning that says how many are not: `survivors` of others.

    Args:
      name: of the method, for messages.
      frames: of the ensembles (M, y, x, 2).
      ocean: (y, x) bool, the cells that have values.
      antithetic: whether members 2j and 2j + 1 are partners, which are kept or left out together.

    Raises:
      InputError: a frame has fewer than two members left (or none, where one was asked for).
    """
    kept = []
    for frame, x in zip(frames, ensembles, strict=True):
        fine = np.isfinite(x[:, ocean]).all((1, 2))
        if antithetic:
            fine = fine.reshape(-1, 2).all(1).repeat(2)
        _check_left(name, frame, fine, "; another method or another denoiser may help")
        kept.append(x if fine.all() else x[fine])
    return kept


def _check_left(name: str, frame: int, fine: np.ndarray, remedy: str, where: str = "") -> None:
    """Warns of members that are not finite; raises InputError where too few are left."""
    lost, members = int((~fine).sum()), len(fine)
    if members - lost < min(2, members):
        raise InputError(f"{name}: {lost} of {members} members of frame {frame} are not finite{remedy}")
    if lost:
        logging.warning(
            "%s: %d of %d members of frame %d are left out, not finite%s", name, lost, members, frame, where
        )


@jax.jit
def posterior_rows(
    rows: Int[Array, " k"],
    per_row: tuple[Key, Float[Array, " k"]],
    denoiser: Denoiser,
    evidence: guide.Evidence,
    gaussian: PrincipalGaussian,
    analysis: Analysis,
    hyper: Posterior,
) -> Float[Array, "k y x c"]:
    """One chunk of members of one frame by a posterior sampler: one compiled program.

    Args:
      rows: numbers of the members, which say no more than how many they are.
      per_row: key and sign of the noise of each member.
      denoiser, evidence, gaussian, analysis, hyper: see `posterior_ensemble`; the same for all members.
    """

    def one(key: Key, sign: Float[Array, ""]) -> Float[Array, "y x c"]:
        return _member(key, sign, denoiser, evidence, gaussian, analysis, hyper)

    return jax.vmap(one)(*per_row)


def _member(
    key: Key,
    sign: Float[Array, ""],
    denoiser: Denoiser,
    evidence: guide.Evidence,
    gaussian: PrincipalGaussian,
    analysis: Analysis,
    hyper: Posterior,
) -> Float[Array, "y x c"]:
    draw_key, noise_key, run_key = jax.random.split(key, 3)
    start = linear_sample(noise_key, analysis, guide.prior_draw(gaussian, draw_key), evidence, sign)
    if evidence.offset is not None:
        start = start + evidence.offset
    return posterior(run_key, denoiser, evidence, hyper, start, sign)


# What each frame has of its own; the coast and the prior are the same for all. Levels stay in front of frames, where
# the scan over them needs them.
_EVIDENCE = guide.Evidence(ocean=None, observation=0, noise=0, gaussian=None, gain=1, regimes=None, offset=0)
_PRINCIPAL = PrincipalAnalysis(_EVIDENCE.replace(gain=0), 0)
# Bytes that the frames of a call may have of their own; twelve of 96 rows and 16 levels have a seventh of it.
_OWN_BYTES = 2**30


def most_own_bytes(devices: int | None = None) -> int:
    """Bytes that the frames of a call may have of their own: every device has a copy, in one memory those of a CPU."""
    shared = (devices or jax.local_device_count()) if jax.default_backend() == "cpu" else 1
    return _OWN_BYTES // shared


@jax.jit
def posterior_frames(
    rows: Int[Array, " k"],
    per_row: tuple[Key, Float[Array, " k"]],
    denoiser: Denoiser,
    evidence: guide.Evidence,
    gaussian: PrincipalGaussian,
    analysis: Analysis,
    hyper: Posterior,
) -> Float[Array, "k f y x c"]:
    """`posterior_rows` of f frames at once, for `in_chunks` and device.compile_ahead: one compiled program.

    Args:
      rows: numbers of the members, as in `posterior_rows`.
      per_row: keys (k, f) and signs (k,).
      evidence, analysis: of the frames (`stack_evidence`, `stack_analyses`).
      denoiser, gaussian, hyper: the same for all.
    """

    axes = _PRINCIPAL if isinstance(analysis, PrincipalAnalysis) else 0

    # Members outside: they are what devices share, and an axis that is merged with others stays shared only in front.
    def members(keys: Key, sign: Float[Array, ""]) -> Float[Array, "f y x c"]:
        def one(key: Key, evidence: guide.Evidence, analysis: Analysis) -> Float[Array, "y x c"]:
            return _member(key, sign, denoiser, evidence, gaussian, analysis, hyper)

        return jax.vmap(one, (0, _EVIDENCE, axes))(keys, evidence, analysis)

    return jax.vmap(members)(*per_row)


def stack_evidence(evidence: Sequence[guide.Evidence]) -> guide.Evidence:
    """Evidence of f frames for `posterior_frames`; what each has of its own gets an axis in front, gains behind levels.

    Raises:
      InputError: frames with other numbers of rows, another prior, or gains of another kind; some with an offset.
    """
    first = evidence[0]
    sizes = sorted({one.observation.size for one in evidence})
    if len(sizes) > 1:
        raise InputError(f"frames that are sampled together need as many rows each, got {sizes} (frame_batches)")
    if len({one.observation.share is None for one in evidence}) > 1:
        raise InputError("frames that are sampled together need merged observations, or none that are")
    if len({one.gain is not None and one.gain.by_blocks for one in evidence}) > 1:
        raise InputError(
            "frames that are sampled together need gains of one kind, all by blocks or none (frame_batches)"
        )
    if len({one.offset is None for one in evidence}) > 1:
        raise InputError("frames that are sampled together start from an offset all, or none does")
    for one in evidence[1:]:
        if not (_same(one.gaussian, first.gaussian) and _same(one.regimes, first.regimes)):
            raise InputError("frames that are sampled together need the same prior")

    def stacked(name: str, axis: int) -> Any:
        each = [getattr(one, name) for one in evidence]
        return jax.tree.map(lambda *leaf: jnp.stack(leaf, axis), *each)

    own = {"observation": 0, "noise": 0, "gain": 1, "offset": 0}
    return first.replace(**{name: stacked(name, axis) for name, axis in own.items()})


def stack_analyses(analyses: Sequence[Analysis]) -> Analysis:
    """Analyses of f frames for `posterior_frames`; every leaf gets an axis in front, but for those of the prior.

    Raises:
      InputError: analyses of different kinds, or in factors of different priors.
    """
    first = analyses[0]
    if len({type(one) for one in analyses}) > 1:
        raise InputError("frames that are sampled together need analyses of one kind, in factors or not")
    if not isinstance(first, PrincipalAnalysis):
        return jax.tree.map(lambda *leaf: jnp.stack(leaf), *analyses)
    if not all(_same(one.evidence.gaussian, first.evidence.gaussian) for one in analyses[1:]):
        raise InputError("frames that are sampled together need analyses of the same prior")
    common = {"ocean": first.evidence.ocean, "gaussian": first.evidence.gaussian}
    own = [one.replace(evidence=one.evidence.replace(ocean=None, gaussian=None)) for one in analyses]
    stacked = jax.tree.map(lambda *leaf: jnp.stack(leaf), *own)
    return stacked.replace(evidence=stacked.evidence.replace(**common))


def _same(one: Any, other: Any) -> bool:
    """Whether two trees hold the same arrays."""
    if one is other:
        return True
    (leaves, kind), (others, other_kind) = jax.tree.flatten(one), jax.tree.flatten(other)
    return kind == other_kind and all(a is b or np.array_equal(a, b) for a, b in zip(leaves, others, strict=True))


def _rows_of(gaussian: PrincipalGaussian, evidence: guide.Evidence) -> gains.Rows:
    """Rows as the gains have them: those of `pigdm` are of another prior than the analysis."""
    if evidence.gain is None:
        return gains.rows_of(gaussian, evidence.observation)
    return gains.Rows(evidence.observation.size, evidence.gain.by_blocks)


def batch_shape(members: int, chunk: int, devices: int | None = None) -> tuple[int, int]:
    """Frames and members of each of about `chunk` fields that are sampled together, as many members on each device.

    Args:
      members: of each frame.
      devices: that share the members; the number of the local ones by default.
    """
    together = math.prod(share(min(chunk, members), devices or jax.local_device_count()))
    return max(chunk // together, 1), together


def own_bytes(rows: gains.Rows, gaussian: PrincipalGaussian, levels: int) -> int:
    """Bytes of the gain of the linear analysis and of the gains of the levels, of one frame with these rows."""
    components, rank = gaussian.mean.shape[-1], gaussian.variance.size
    size = rows.size * components
    if rows.by_blocks:
        return 4 * (levels + 1) * (size * (components + rank) + 1)
    return 4 * (size * (gaussian.mean.size + levels * (size + rank)) + levels)


def frame_batches(
    rows: Sequence[gains.Rows],
    members: int,
    chunk: int,
    gaussian: PrincipalGaussian,
    levels: int,
    devices: int | None = None,
) -> list[list[int]]:
    """Numbers of the frames that are sampled together: with rows alike, as many as `chunk` and memory allow.

    Batches of rows alike have as many frames each. The last one is filled up with its last frame, whose result comes
    twice: a shorter one would be another program.

    Args:
      rows: of each frame's observation (gains.rows_of).
      levels: of the gains.
    """
    made, own = [], most_own_bytes(devices)
    for alike in dict.fromkeys(rows):
        mine = [number for number, other in enumerate(rows) if other == alike]
        most = min(batch_shape(members, chunk, devices)[0], max(own // own_bytes(alike, gaussian, levels), 1))
        each = -(-len(mine) // -(-len(mine) // most))
        for start in range(0, len(mine), each):
            batch = mine[start : start + each]
            made.append(batch + batch[-1:] * (each - len(batch)))
    return made


def posterior_ensemble(
    denoiser: Denoiser,
    evidence: Sequence[guide.Evidence],
    gaussian: PrincipalGaussian,
    analyses: Sequence[Analysis],
    hyper: Posterior,
    *,
    frames: Sequence[int],
    members: int,
    seed: int = 0,
    chunk: int = 64,
    antithetic: bool = True,
    devices: Sequence[jax.Device] | None = None,
) -> Float[np.ndarray, "n members y x c"]:
    """Members of n fields by a posterior sampler, in antithetic pairs (2j, 2j + 1) or independent.

    Args:
      denoiser: D(x; sigma).
      evidence: of each field, with its values (posterior.evidence_for).
      gaussian: linear prior, from whose posterior the members start.
      analyses: of the same patterns by that prior.
      hyper: levels and correction.
      frames: n numbers that name the frames in the keys.
      members: of each frame; an even number where they are antithetic.
      seed: of all of them.
      chunk: members sampled at a time; several frames where they have fewer.
      antithetic: whether every second member has the noise of the one before it with the opposite sign.
      devices: that share the members of a chunk; all local ones by default.

    Raises:
      InputError: no members, an odd number of antithetic ones, another number of frames than of fields, fields of
        different priors, evidence without an observation.
    """
    if antithetic and (members < 2 or members % 2):
        raise InputError(f"antithetic members come in pairs, got {members} members")
    if members < 1:
        raise InputError(f"an ensemble has at least one member, got {members}")
    if not len(frames) == len(evidence) == len(analyses) > 0:
        raise InputError(f"{len(frames)} frames are numbered, {len(evidence)} with {len(analyses)} analyses are given")
    if chunk < 1:
        raise InputError(f"a chunk holds at least one member, got {chunk}")
    if any(one.observation is None for one in evidence):
        raise InputError(
            f"members start from the linear posterior, but the evidence of {hyper.correction} has no observation"
        )
    number = np.arange(members)
    keys = member_keys(seed, frames, range(members))[:, number // 2 if antithetic else number]
    signs = np.where(antithetic & (number % 2 == 1), -1, 1).astype(np.float32)
    count = None if devices is None else len(devices)
    _, together = batch_shape(members, chunk, count)
    rows = [_rows_of(gaussian, one) for one in evidence]
    made: list[Any] = [None] * len(frames)
    for batch in frame_batches(rows, members, chunk, gaussian, hyper.calls, count):
        seen, found = stack_evidence([evidence[i] for i in batch]), stack_analyses([analyses[i] for i in batch])
        shared = denoiser, seen, gaussian, found, hyper
        x = in_chunks(posterior_frames, number, (keys[np.asarray(batch)].T, signs), together, shared, devices)
        for i, one in zip(batch, np.moveaxis(x, 1, 0), strict=True):
            made[i] = one
    return np.stack(made)
