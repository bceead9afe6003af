"""Ensembles: many members of many frames from one sampler, by vmap over both and in chunks.

Every random number comes from a key folded from (seed, frame, member), into which the samplers fold stage and step.
So a member does not depend on how many others are computed, in what order, or in chunks of what size.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_repaint import guide
from jax_repaint.array_types import Array, Float, Int, Key
from jax_repaint.denoise import Denoiser, PrincipalGaussian
from jax_repaint.errors import InputError
from jax_repaint.posterior import Posterior, linear_sample, posterior
from jax_repaint.prior.analysis import Analysis
from jax_repaint.sample import Known, Repaint, repaint_stages
from jax_repaint.schedule import Schedule


def member_keys(seed: int, frames: Sequence[int], members: Sequence[int]) -> Key:
    """Keys (frames, members), folded from the seed, the number of the frame and the number of the member."""
    root = jax.random.key(seed)

    def one(frame: Int[Array, ""], member: Int[Array, ""]) -> Key:
        return jax.random.fold_in(jax.random.fold_in(root, frame), member)

    of_members = jax.vmap(one, (None, 0))
    return jax.jit(jax.vmap(of_members, (0, None)))(jnp.asarray(frames, jnp.int32), jnp.asarray(members, jnp.int32))


def in_chunks(
    run: Callable[[Int[Array, "k"], Any], Float[Array, "k ..."]], rows: np.ndarray, per_row: Any, chunk: int
) -> np.ndarray:
    """run(rows, per_row) over chunks of one size, so that it compiles once; the last one is filled up and cut.

    Args:
      run: rows (k,) and the rows of `per_row` to results (k, ...).
      rows: (n,) whole numbers.
      per_row: a pytree of arrays (n, ...).
      chunk: rows a call, at least 1.
    """
    if chunk < 1:
        raise InputError(f"a chunk holds at least one member, got {chunk}")
    count = len(rows)
    chunk = min(chunk, count)
    results = []
    for start in range(0, count, chunk):
        take = np.minimum(np.arange(start, start + chunk), count - 1)
        results.append(np.asarray(run(jnp.asarray(rows[take]), jax.tree.map(lambda x, t=take: x[t], per_row))))
    return np.concatenate(results)[:count]


@jax.jit
def _repaint_rows(
    denoiser: Denoiser,
    known: Known,
    schedule: Schedule,
    stages: tuple[Repaint, ...],
    var_decay: Float[Array, ""],
    rows: Int[Array, "k"],
    keys: Key,
) -> Float[Array, "k s y x c"]:
    def one(row: Int[Array, ""], key: Key) -> Float[Array, "s y x c"]:
        mine = jax.tree.map(lambda leaf: leaf[row], known)
        return repaint_stages(key, denoiser, mine, schedule, stages, var_decay)

    return jax.vmap(one)(rows, keys)


def repaint_ensemble(
    denoiser: Denoiser,
    known: Known,
    schedule: Schedule,
    stages: Sequence[Repaint],
    *,
    frames: Sequence[int],
    members: int,
    seed: int = 0,
    var_decay: float = 0.1,
    chunk: int = 64,
) -> Float[np.ndarray, "n members s y x c"]:
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

    Returns:
      float32, standardised; stage by stage.

    Raises:
      InputError: no members, or another number of frames than of fields.
    """
    if members < 1:
        raise InputError(f"an ensemble has at least one member of each frame, got {members}")
    if len(frames) != len(known.value):
        raise InputError(f"{len(frames)} frames are numbered, {len(known.value)} are given")
    keys = member_keys(seed, frames, range(members)).reshape(-1)
    rows = np.repeat(np.arange(len(frames)), members)
    decay = jnp.asarray(var_decay, jnp.float32)

    def run(rows: Array, keys: Key) -> Array:
        return _repaint_rows(denoiser, known, schedule, tuple(stages), decay, rows, keys)

    x = in_chunks(run, rows, keys, chunk)
    return x.reshape(len(frames), members, *x.shape[1:])


@jax.jit
def _posterior_rows(
    denoiser: Denoiser,
    evidence: guide.Evidence,
    gaussian: PrincipalGaussian,
    analysis: Analysis,
    hyper: Posterior,
    keys: Key,
    signs: Float[Array, "k"],
) -> Float[Array, "k y x c"]:
    def one(key: Key, sign: Float[Array, ""]) -> Float[Array, "y x c"]:
        draw_key, noise_key, run_key = jax.random.split(key, 3)
        start = linear_sample(noise_key, analysis, guide.prior_draw(gaussian, draw_key), evidence, sign)
        return posterior(run_key, denoiser, evidence, hyper, start, sign)

    return jax.vmap(one)(keys, signs)


def posterior_ensemble(
    denoiser: Denoiser,
    evidence: guide.Evidence,
    gaussian: PrincipalGaussian,
    analysis: Analysis,
    hyper: Posterior,
    *,
    frame: int,
    members: int,
    seed: int = 0,
    chunk: int = 64,
) -> Float[np.ndarray, "members y x c"]:
    """Members of one field by a posterior sampler, in antithetic pairs (2j, 2j + 1).

    Args:
      denoiser: D(x; sigma).
      evidence: of the field, with its values (posterior.evidence_for).
      gaussian: linear prior, from whose posterior the members start.
      analysis: of the same pattern by that prior.
      hyper: levels and correction.
      frame, seed: name the members' keys.
      members: an even number.
      chunk: members sampled at a time.

    Raises:
      InputError: an odd number of members.
    """
    if members < 2 or members % 2:
        raise InputError(f"antithetic members come in pairs, got {members} members")
    pairs = member_keys(seed, [frame], range(members // 2))[0]
    keys = jnp.repeat(pairs, 2)
    signs = np.tile(np.float32([1, -1]), members // 2)

    def run(rows: Array, signs: Array) -> Array:
        return _posterior_rows(denoiser, evidence, gaussian, analysis, hyper, keys[rows], signs)

    return in_chunks(run, np.arange(members), signs, chunk)
