"""Trains a network to remove noise from velocity fields.

    loss = mean over frames of weight(sigma) |D(x0 + sigma n; sigma) - x0|^2,   averaged over ocean cells and components

    form       sigma                                       weight
    eps        of a step t drawn uniformly                 1 / sigma^2: the usual |eps_theta - eps|^2
    edm        log-uniform in sigma_min..sigma_max         (1 + sigma^2) / sigma^2 (Karras et al. 2022, section 5)
    anchored   log-uniform in sigma_min..sigma_max         1 / mean square error of the exact Gaussian denoiser
    conditional  as anchored, with observations drawn anew for every frame and given to both denoisers (conditional.py)

`train.focus` is the share of levels that are drawn from train.focus_min..focus_max only, log-uniform there too.

    python -m jax_repaint.train --config=configs/attn.py --workdir=runs/attn

Of fields with gaps, as radars have them, the average is over ocean cells that have a value.

Starting it again on the same workdir continues the run, bit for bit as if it had never stopped. All devices share each
batch, those of several processes too (distributed.py); the loss is that of one device but for rounding.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import tqdm
from absl import flags, logging
from flax import nnx, traverse_util
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from jax_repaint import command, distributed, files, guide, model, observe, plots
from jax_repaint.array_types import Array, Field, Float, Key, Level
from jax_repaint.checkpoint import Checkpoints, claim, holds_run, release
from jax_repaint.conditional import ConditionalDenoiser
from jax_repaint.data import fields as fields_lib
from jax_repaint.data import readers, twin
from jax_repaint.data.fields import Fields, Split, Standardiser
from jax_repaint.denoise import PrincipalGaussian
from jax_repaint.errors import InputError
from jax_repaint.locks import locked
from jax_repaint.model import Model
from jax_repaint.nets import unet
from jax_repaint.prior import gp, linear

# Keys are folded from (seed, purpose, ...), so that no two purposes share a number.
ORDER, NOISE, HELD_OUT = range(3)
SIGMAS = (1e-6, 1e6)  # noise levels whose fourth power float32 can still hold
SHARES = (1.0, 0.5, 0.1)  # of the training covariance in the linear prior
EXPECTED = 2048  # frames, evenly spread, at most, from which EM finds what fills gaps
BLENDED = 6000  # ocean cells up to which a kernel's covariance is blended in; its root takes N^3 / 3 products


class Diverged(Exception):
    """The loss is not finite."""


def default_config() -> ConfigDict:
    """Every setting with its default; the files in configs/ change what is theirs."""
    return ConfigDict(
        {
            "data": {
                "fields": "",  # a file; empty for the Ram Head twin
                "frames": 17040,  # of the twin
                "twin_seed": 0,
                # Fractions, or ranges of frames or dates as text: "0:250", "2002-01-01/2002-09-07".
                "train": "0.7",
                "validation": "0.15",
                "test": "0.15",
                "allow_short_gap": False,
                "block_split": False,  # 130-hour blocks with 10-hour gaps, which leak
                "shared_scale": False,  # one standard deviation for u and v
            },
            "model": {
                "network": "standard_attn",
                "form": "eps",
                "dtype": "float32",
                "rank": 256,  # most EOFs of the linear prior
                "gp_steps": 200,  # of fitting the GP that stands in tables beside the network
            },
            "noise": {
                "steps": 250,
                "min_beta": 1e-4,
                "max_beta": 0.02,
                # Of all forms but eps, whose levels are those of the steps.
                "sigma_min": 0.01,
                "sigma_max": 130.0,
            },
            # What a conditional denoiser is given in training.
            "observed": {
                "patterns": 4096,
                "rows": 96,  # most cells of a pattern
                "error": 0.05,  # standard error, in standard deviations of the field
            },
            "train": {
                "seed": 0,
                "epochs": 200,
                "batch": 16,
                "accumulate": 1,  # batches a step
                "learning_rate": 3e-4,
                "warmup_epochs": 10.0,
                "weight_decay": 1e-4,
                "clip": 1.0,
                "ema": 0.9999,
                "ocean_only": True,  # loss over ocean cells; False: over land and padding too (not of conditional)
                # Mirrored currents past a real coast are no currents of that coast.
                "flips": False,
                # Share of noise levels drawn between focus_min and focus_max; the others from all of the range.
                "focus": 0.0,
                "focus_min": 0.5,
                "focus_max": 20.0,
                "dispatch": 25,  # steps a call of the device
                "held_out": 0,  # validation frames for the held-out loss; 0: all
                # Epochs between held-out losses and what is written with them; on a GPU an epoch may take seconds.
                "score_every": 1,
                "keep": 2,
                "save_minutes": 10.0,
            },
            "init_from": "",  # folder of a model, whose weights to start from
            "tensorboard": False,
        }
    )


def smoke(config: ConfigDict, arg: str) -> ConfigDict:
    """The same experiment in less than a minute on two cores for `smoke`; unchanged for an empty `arg`.

    Raises:
      InputError: another `arg`.
    """
    if arg == "smoke":
        config.data.frames = 48
        # Two days of tides are not long enough to wait for them to decorrelate.
        config.data.allow_short_gap = True
        config.model.rank = 16
        config.model.gp_steps = 10
        config.train.epochs = 2
        config.train.warmup_epochs = 1.0
        config.train.batch = 2
        config.train.dispatch = 4
        config.train.held_out = 8
    elif arg:
        raise InputError(f"the argument of a configuration is smoke or nothing, got {arg!r}")
    return config


def check_config(config: ConfigDict) -> None:
    """Raises InputError at a value that cannot work."""
    t, m, n = config.train, config.model, config.noise
    if m.network not in unet.NETWORKS:
        raise InputError(f"model.network {m.network!r} is not one of {', '.join(unet.NETWORKS)}")
    if m.form not in model.FORMS:
        raise InputError(f"model.form {m.form!r} is not one of {', '.join(model.FORMS)}")
    for name in ("epochs", "batch", "accumulate", "dispatch", "score_every", "keep"):
        if t[name] < 1:
            raise InputError(f"train.{name} must be at least 1, got {t[name]}")
    if not 0 <= t.seed < 2**32:
        raise InputError(f"train.seed must be in 0 to 2^32 - 1, got {t.seed}")
    if not 0 < t.learning_rate < math.inf:
        raise InputError(f"train.learning_rate must be positive and finite, got {t.learning_rate}")
    if not t.clip > 0:
        raise InputError(f"train.clip must be positive, got {t.clip}")
    for name in ("weight_decay", "warmup_epochs", "held_out", "save_minutes"):
        if not 0 <= t[name] < math.inf:
            raise InputError(f"train.{name} must not be negative or infinite, got {t[name]}")
    if not 0 <= t.ema < 1:
        raise InputError(f"train.ema must be in [0, 1), got {t.ema}")
    if t.warmup_epochs >= t.epochs:
        raise InputError(f"train.warmup_epochs ({t.warmup_epochs}) must be less than train.epochs ({t.epochs})")
    if not SIGMAS[0] <= n.sigma_min < n.sigma_max <= SIGMAS[1]:
        raise InputError(
            f"noise levels must be {SIGMAS[0]:g} <= sigma_min < sigma_max <= {SIGMAS[1]:g}, "
            f"got {n.sigma_min}, {n.sigma_max}"
        )
    if m.form == "conditional" and not t.ocean_only:
        raise InputError("train.ocean_only must be True for model.form conditional, which knows nothing of land")
    if not 0 <= t.focus < 1:
        raise InputError(f"train.focus must be in [0, 1), got {t.focus}")
    if t.focus and m.form == "eps":
        raise InputError("train.focus must be 0 for model.form eps, whose levels are those of the steps")
    if t.focus and not n.sigma_min <= t.focus_min < t.focus_max <= n.sigma_max:
        raise InputError(
            f"train.focus_min < train.focus_max must lie in {n.sigma_min} to {n.sigma_max}, the range of noise, "
            f"got {t.focus_min}, {t.focus_max}"
        )
    least = {"patterns": 1, "rows": 4}
    for name, value in least.items():
        if config.observed[name] < value:
            raise InputError(f"observed.{name} must be at least {value}, got {config.observed[name]}")
    if not 0 < config.observed.error < math.inf:
        raise InputError(f"observed.error must be positive and finite, got {config.observed.error}")
    if m.rank < 1:
        raise InputError(f"model.rank must be at least 1, got {m.rank}")
    model.make_schedule(dict(n))
    network_config(config)
    if config.tensorboard:
        _tensorboard()


def _tensorboard() -> type:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as e:
        raise InputError("tensorboard=True needs the extra: pip install 'jax-repaint[tensorboard]'") from e
    return SummaryWriter


def _part(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def load_fields(path: str, frames: int, seed: int = 0) -> Fields:
    """A file, or the twin if `path` is empty."""
    return readers.read(path) if path else twin.generate(frames, twin.Twin(seed=seed))


def split_fields(fields: Fields, data: ConfigDict) -> Split:
    """The split that `config.data` describes, without frames that are nearly all gap."""
    if data.block_split:
        split = fields_lib.block_split(fields)
    else:
        parts = (_part(data[name]) for name in ("train", "validation", "test"))
        split = fields_lib.split(fields, *parts, allow_short_gap=data.allow_short_gap)
    return fields_lib.well_covered(fields, split)


# Frames (n, Y, X, 2); with gaps also which cells are present, (n, Y, X, 1) bool.
Frames = Array | tuple[Array, Array]


def _parts(frames: Frames) -> tuple[Array, ...]:
    return frames if isinstance(frames, tuple) else (frames,)


class Prepared(NamedTuple):
    """Data as the device sees it, and the priors fitted to the training part.

    Attributes:
      train, validation: standardised and padded.
      split, standardiser, gaussian, kernel, choice: see Model and prior/linear.py.
    """

    train: Frames
    validation: Frames
    split: Split
    standardiser: Standardiser
    gaussian: PrincipalGaussian
    kernel: gp.Kernel
    choice: linear.Choice


def prepare(fields: Fields, config: ConfigDict) -> Prepared:
    """Splits, standardises and pads; fits the linear prior and the GP."""
    split = split_fields(fields, config.data)
    logging.info("%s", split.describe())
    if split.train.size < config.train.batch * config.train.accumulate:
        raise InputError(
            f"{split.train.size} training frames are fewer than a batch of "
            f"{config.train.batch} x {config.train.accumulate}"
        )
    standardiser = Standardiser.from_fields(fields, split.train, config.data.shared_scale)
    multiple = unet.NETWORKS[config.model.network].multiple
    parts = [fields.select(index) for index in (split.train, split.validation)]
    (train, ocean, present), (validation, _, validation_present) = (
        fields_lib.prepare_with_gaps(part, standardiser, multiple) for part in parts
    )
    if any(part.gaps for part in parts):
        shares = [100 * (1 - part.gaps) for part in parts]
        logging.info("%.3g %% of the training values and %.3g %% of the validation values are present", *shares)
    else:
        present = validation_present = None
    logging.info("fitting the linear estimate and a Gaussian process")
    gaussian, kernel, choice = fit_priors(
        parts[0], train, validation, ocean, config.model.rank, config.model.gp_steps, standardiser,
        present, validation_present,
    )  # fmt: skip
    if present is not None:
        # The network sees all cells. A draw of the prior given the present ones leaves their joint distribution as it
        # is, where the Gaussian is right. Its mean would be too calm beside real neighbours, and tell at every noise
        # level what the present cells hold; zeros would be edges that no field has. The loss counts none of them.
        train = _filled(gaussian, train, present, 0), present[..., None]
        validation = _filled(gaussian, validation, validation_present, 1), validation_present[..., None]
    return Prepared(train, validation, split, standardiser, gaussian, kernel, choice)


def _filled(gaussian: PrincipalGaussian, x: np.ndarray, present: np.ndarray, seed: int) -> np.ndarray:
    # Another machine may find the directions with other signs, which turns the draws round.
    return np.asarray(distributed.same(linear.fill(gaussian, x, present, seed)))


def fit_priors(
    fields: Fields,
    train: np.ndarray,
    validation: np.ndarray,
    ocean: np.ndarray,
    rank: int,
    gp_steps: int,
    standardiser: Standardiser,
    present: np.ndarray | None = None,
    validation_present: np.ndarray | None = None,
) -> tuple[PrincipalGaussian, gp.Kernel, linear.Choice]:
    """The linear prior, chosen on validation frames, and the GP by marginal likelihood of training frames.

    The linear prior is the training covariance, or a blend with the covariance of the GP where that does better. Fields
    with gaps, where `present` and `validation_present` (n, Y, X) tell which cells have a value, are first filled with
    draws of the Gaussian that EM finds, whose covariance is the one that it expects.
    """
    climatology = gp.background("climatology", fields.velocity, fields.ocean)
    kernel, _ = gp.fit("matern32", fields.velocity, fields.ocean, fields.places(), climatology, gp_steps)
    shown = np.unique(np.linspace(0, len(validation) - 1, 48).astype(int))
    frames = validation[shown]
    patterns = []
    for spec in observe.usual(fields.ocean):
        for draw in range(1 if spec.startswith("line") else 2):
            seen = observe.parse(spec, fields.ocean, observe.pattern_rng(0, draw))
            pattern = observe.from_cells(seen, np.zeros((*seen.shape, 2)), 0.01, fields.ocean)
            patterns.append(observe.pad_grid(pattern, seen.shape, ocean.shape))
    root = None
    if fields.ocean.sum() <= BLENDED:
        root = gp.prior_root(kernel, fields.ocean, fields.places()).rows(standardiser.std)
    seen = None
    if present is not None:
        some = np.unique(np.linspace(0, len(train) - 1, EXPECTED).astype(int))
        train = _filled(linear.fit_with_gaps(train[some], present[some], ocean, rank), train, present, 0)
        seen = validation_present[shown]
    found = []
    for share in SHARES if root is not None else (1.0,):
        gaussian = linear.fit(train, ocean, rank, share=share, kernel_root=root)
        chosen, choice = linear.select(gaussian, frames, patterns, present=seen)
        found.append((choice.error, chosen, dataclasses.replace(choice, share=share)))
    _, gaussian, choice = min(found, key=lambda candidate: candidate[0])
    logging.info(
        "linear prior: %d EOFs, %g of the covariance from the training frames; mean square error %.3g of the variance "
        "from a few cells of validation frames",
        choice.rank, choice.share, choice.error,
    )  # fmt: skip
    return gaussian, kernel, choice


class State(NamedTuple):
    """What a run is: `sums` adds up loss and gradient norm since the epoch began, `best` is the lowest loss so far."""

    params: dict
    ema: dict
    optimiser: Any
    step: Array
    sums: Array
    best: Array


class Plan(NamedTuple):
    """Numbers of steps: in an epoch (a multiple of a dispatch), in a dispatch, in all."""

    epoch: int
    dispatch: int
    total: int


def plan(frames: int, config: ConfigDict) -> Plan:
    """An epoch sees every frame once, apart from a remainder of less than one dispatch and an eighth of the steps."""
    steps = frames // (config.train.batch * config.train.accumulate)
    # Where a batch is large, whole dispatches of the length that is allowed could leave out nearly half of the frames.
    longest = min(config.train.dispatch, steps)
    dispatch = next(length for length in range(longest, 0, -1) if 8 * (steps % length) <= steps)
    epoch = steps // dispatch * dispatch
    return Plan(epoch, dispatch, epoch * config.train.epochs)


def make_optimiser(config: ConfigDict, steps: Plan) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW under a clipped gradient; linear warm-up from 1e-3 of the rate, then a cosine to 0."""
    t = config.train
    total = max(steps.total, 2)
    warm = min(max(round(t.warmup_epochs * steps.epoch), 1), total - 1)
    rate = optax.warmup_cosine_decay_schedule(1e-3 * t.learning_rate, t.learning_rate, warm, total)
    return optax.chain(optax.clip_by_global_norm(t.clip), optax.adamw(rate, weight_decay=t.weight_decay)), rate


def network_config(config: ConfigDict) -> unet.UNetConfig:
    """The named network for a form: those on the linear estimate see it, and a conditional one what is observed."""
    named = unet.NETWORKS[config.model.network]
    return dataclasses.replace(
        named,
        dtype=config.model.dtype,
        inputs=model.INPUTS[config.model.form],
        zero_output=named.zero_output or config.model.form in ("anchored", "conditional"),
    )


Loss = Callable[..., Level]


def level_at(place: Level, config: ConfigDict) -> Level:
    """Noise level at `place` in 0..1 of the distribution that training draws from: its quantile function.

    log sigma has the density  (1 - focus) U(sigma_min, sigma_max) + focus U(focus_min, focus_max)  of two uniform ones.
    """
    n, t = config.noise, config.train
    low, high = math.log(n.sigma_min), math.log(n.sigma_max)
    if not t.focus:
        return jnp.exp(low + (high - low) * place)
    inner, outer = math.log(t.focus_min), math.log(t.focus_max)
    below, until = ((1 - t.focus) * (knot - low) / (high - low) for knot in (inner, outer))
    quantiles = jnp.asarray([0.0, below, until + t.focus, 1.0])
    return jnp.exp(jnp.interp(place, quantiles, jnp.asarray([low, inner, outer, high])))


def make_loss(config: ConfigDict, gaussian: PrincipalGaussian, graphdef: nnx.GraphDef | None) -> Loss:
    """loss(params, x0, key, place, training) of one frame; `place` in 0..1 says where on the range its noise lies.

    With one argument more, present (Y, X, 1) bool, only ocean cells that are present count, and are observed.
    Without a network (graphdef None) the loss of the exact Gaussian denoiser, which a network has to beat.
    """
    schedule = model.make_schedule(dict(config.noise))
    ocean = gaussian.ocean
    cells = ocean if config.train.ocean_only else jnp.ones_like(ocean)
    form = config.model.form
    if form == "conditional":
        return _make_conditional_loss(config, gaussian, graphdef)

    def loss(params: dict, x0: Field, key: Key, place: Level, training: bool, present: Array | None = None) -> Level:
        if form == "eps":
            t = jnp.minimum((place * schedule.steps).astype(jnp.int32), schedule.steps - 1)
            sigma = schedule.sigma[t]
            weight = 1 / sigma**2
        else:
            sigma = level_at(place, config)
            weight = (1 + sigma**2) / sigma**2 if form == "edm" else 1 / gaussian.residual_variance(sigma)
        noise, dropout = jax.random.split(key)
        x = x0 + sigma * jax.random.normal(noise, x0.shape)
        if graphdef is None:
            estimate = gaussian(x, sigma)
        else:
            denoiser = model.make_denoiser(form, graphdef, params, gaussian, schedule)
            estimate = denoiser(x, sigma, dropout if training else None)
        error = estimate - x0
        counted = cells if present is None else _present_cells(cells, ocean, present)
        return weight * jnp.sum(counted * error**2) / (_count(counted, present) * x0.shape[-1])

    return loss


def _present_cells(cells: Array, ocean: Array, present: Array) -> Array:
    """`cells` without those of the ocean that are not present."""
    return jnp.where((ocean > 0) & ~present, 0.0, cells)


def _count(cells: Array, present: Array | None) -> Level:
    # Mirrored frames may have all that is present on land.
    return cells.sum() if present is None else jnp.maximum(cells.sum(), 1.0)


def _make_conditional_loss(config: ConfigDict, gaussian: PrincipalGaussian, graphdef: nnx.GraphDef | None) -> Loss:
    wet = np.asarray(gaussian.ocean)[..., 0] > 0
    table = observe.pattern_table(wet, config.observed.patterns, config.observed.rows, config.train.seed)
    cells, counts = (jnp.asarray(part) for part in table)

    def observe_some(x0: Field, key: Key, present: Array | None) -> guide.Evidence:
        which, noise = jax.random.split(key)
        number = jax.random.randint(which, (), 0, len(counts))
        seen = observe.from_table(cells[number], counts[number], x0, config.observed.error)
        if present is not None:
            seen = seen.within(present[..., 0])
        values = seen.values + seen.sigma * jax.random.normal(noise, seen.values.shape)
        return guide.Evidence(gaussian.ocean, seen.replace(values=values), guide.noise_covariance(seen), gaussian)

    def loss(params: dict, x0: Field, key: Key, place: Level, training: bool, present: Array | None = None) -> Level:
        sigma = level_at(place, config)
        noise, pattern, dropout = jax.random.split(key, 3)
        x = x0 + sigma * jax.random.normal(noise, x0.shape)
        evidence = observe_some(x0, pattern, present)
        gain = guide.kalman_gain(gaussian, evidence.observation, evidence.noise, sigma)
        evidence = evidence.replace(gain=gain)
        if graphdef is None:
            estimate = guide.kalman(lambda x: gaussian(x, sigma), x, sigma, sigma, evidence)
        else:
            denoiser = ConditionalDenoiser(params, gaussian, graphdef)
            estimate = denoiser.given(x, sigma, evidence, dropout if training else None)
        # Of all ocean cells, with gaps too: a weight that network and Gaussian share.
        expected = guide.remaining_variance(gaussian, evidence.observation, gain, sigma)
        ocean = gaussian.ocean
        counted = ocean if present is None else _present_cells(ocean, ocean, present)
        error = counted * (estimate - x0)
        return jnp.sum(error**2) / (_count(counted, present) * x0.shape[-1]) / expected

    return loss


def make_places(key: Key, count: int, stratified: bool) -> Float[Array, " b"]:
    """Places on the noise range: uniform, or one in each of `count` equal parts of it."""
    u = jax.random.uniform(key, (count,))
    return (jnp.arange(count, dtype=u.dtype) + u) / count if stratified else u


def make_steps(
    config: ConfigDict,
    loss: Loss,
    optimiser: optax.GradientTransformation,
    steps: Plan,
    ocean: Array,
    grid: tuple[int, int] | None = None,
    mesh: Mesh | None = None,
    standardiser: Standardiser | None = None,
) -> Callable[[State, Frames], tuple[State, Array]]:
    """dispatch(state, data) -> state, losses: `steps.dispatch` training steps in one call of the device.

    `ocean` is (Y, X, 1); `grid` (y, x) is what it was before it was padded, which mirrors leave where it is. Devices of
    `mesh` share each batch. Of mirrored frames the component across the mirror changes its sign: in m/s, which are
    those of `standardiser`, or without one in standardised units.
    """
    t = config.train
    key = jax.random.key(t.seed)
    # XLA on CPUs runs the gradients of convolutions more than ten times slower inside a loop.
    on_cpu = jax.default_backend() == "cpu"
    stratified = config.model.form != "eps"
    rows, columns = (
        np.r_[np.arange(inner)[::-1], np.arange(inner, side)]
        for inner, side in zip(grid or ocean.shape[:2], ocean.shape[:2], strict=True)
    )

    # A velocity of zero in standardised units, about which a component turns round.
    still = jnp.zeros(2) if standardiser is None else jnp.asarray(-standardiser.mean / standardiser.std)

    def turn(x0: Array, component: int) -> Array:
        return x0.at[..., component].set(2 * still[component] - x0[..., component])

    def batch_loss(params: dict, frames: tuple[Array, ...], key: Key) -> Level:
        x0, *present = frames
        where, noise, mirror = jax.random.split(key, 3)
        if t.flips:
            # East-west mirrors turn u round, north-south mirrors v; the coast stays, which is why this is off.
            turned = jax.random.bernoulli(mirror, 0.5, (2, len(x0), 1, 1, 1))
            x0 = jnp.where(turned[0], turn(x0[:, :, columns], 0), x0)
            x0 = jnp.where(turned[1], turn(x0[:, rows], 1), x0)
            x0 = x0 * ocean[None]
            present = [jnp.where(turned[0], cells[:, :, columns], cells) for cells in present]
            present = [jnp.where(turned[1], cells[:, rows], cells) for cells in present]
        places = make_places(where, len(x0), stratified)
        keys = jax.random.split(noise, len(x0))
        x0, keys, places, *present = distributed.split((x0, keys, places, *present), mesh)
        axes = (None, 0, 0, 0, None, *(0 for _ in present))
        return jnp.mean(jax.vmap(loss, axes)(params, x0, keys, places, True, *present))

    def one(state: State, order: Array, data: Frames) -> tuple[State, Array]:
        count = t.batch * t.accumulate
        begin = (state.step % steps.epoch) * count
        index = jax.lax.dynamic_slice(order, (begin,), (count,)).reshape(t.accumulate, t.batch)
        keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, NOISE), state.step), t.accumulate)

        def add(total: tuple, part: tuple) -> tuple[tuple, None]:
            rows, part_key = part
            frames = tuple(part[rows] for part in _parts(data))
            new = jax.value_and_grad(batch_loss)(state.params, frames, part_key)
            return jax.tree.map(jnp.add, total, new), None

        total = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
        if on_cpu:
            for part in range(t.accumulate):
                total, _ = add(total, (index[part], keys[part]))
        else:
            total, _ = jax.lax.scan(add, total, (index, keys))
        value, gradient = total
        value, gradient = jax.tree.map(lambda x: x / t.accumulate, (value, gradient))
        # optax mixes whole numbers and fractions, which strict promotion forbids.
        with jax.numpy_dtype_promotion("standard"):
            updates, optimiser_state = optimiser.update(gradient, state.optimiser, state.params)
            params = optax.apply_updates(state.params, updates)
        n = state.step.astype(jnp.float32)
        decay = jnp.minimum(t.ema, (1 + n) / (10 + n))
        ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, params)
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient)))
        sums = state.sums + jnp.stack([value, norm])
        # A gradient that is not finite ruins the parameters before the loss shows it.
        value = jnp.where(jnp.isfinite(norm), value, norm)
        return State(params, ema, optimiser_state, state.step + 1, sums, state.best), value

    @partial(distributed.jit, mesh=mesh, donate_argnums=0, static_argnums=2)
    def run(state: State, data: Frames, count: int) -> tuple[State, Array]:
        epoch, frames = state.step // steps.epoch, len(_parts(data)[0])
        order = jax.random.permutation(jax.random.fold_in(jax.random.fold_in(key, ORDER), epoch), frames)
        if count == 1:
            return one(state, order, data)
        return jax.lax.scan(lambda s, _: one(s, order, data), state, length=count)

    def dispatch(state: State, data: Frames) -> tuple[State, Array]:
        if not on_cpu:
            return run(state, data, steps.dispatch)
        losses = []
        for _ in range(steps.dispatch):
            state, loss = run(state, data, 1)
            losses.append(loss)
        return state, jnp.stack(losses)

    return dispatch


def make_held_out(config: ConfigDict, loss: Loss, data: Frames, mesh: Mesh | None = None) -> Callable[[dict], Level]:
    """held_out(params): loss of validation frames, each with noise and level of its own that never change."""
    frames = len(_parts(data)[0])
    count = min(config.train.held_out or frames, frames)
    index = np.linspace(0, frames - 1, count).astype(int)
    batch = min(config.train.batch, count)
    if mesh is not None:
        batch = -(-batch // mesh.size) * mesh.size
    padding = -count % batch
    rows = np.pad(index, (0, padding), mode="edge").reshape(-1, batch)
    counted = (np.arange(count + padding) < count).reshape(-1, batch)
    # Levels cover the range evenly and have nothing to do with the order in time.
    places = np.random.default_rng(0).permutation((np.arange(count) + 0.5) / count)
    places = np.pad(places, (0, padding), mode="edge").reshape(-1, batch).astype(np.float32)
    key = jax.random.fold_in(jax.random.key(config.train.seed), HELD_OUT)
    kept = distributed.replicate(tuple(part[np.unique(index)] for part in _parts(data)), mesh)
    rows = np.searchsorted(np.unique(index), rows)

    @partial(distributed.jit, mesh=mesh)
    def held_out(params: dict, kept: tuple[Array, ...]) -> Level:
        def part(total: Level, now: tuple) -> tuple[Level, None]:
            rows, places, counted = now
            keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
            x0, *present = (frames[rows] for frames in kept)
            x0, keys, places, *present = distributed.split((x0, keys, places, *present), mesh)
            axes = (None, 0, 0, 0, None, *(0 for _ in present))
            losses = jax.vmap(loss, axes)(params, x0, keys, places, False, *present)
            return total + jnp.sum(jnp.where(counted, losses, 0.0)), None

        inputs = (jnp.asarray(rows, jnp.int32), jnp.asarray(places), jnp.asarray(counted))
        return jax.lax.scan(part, jnp.zeros(()), inputs)[0] / count

    return lambda params: held_out(params, kept)


class Stop:
    """Remembers SIGTERM or a first Ctrl-C, which are taken up between two dispatches; a second Ctrl-C ends at once."""

    def __init__(self):
        self.asked = self.interrupted = False

    def __enter__(self) -> "Stop":
        # Of a job in the background of a shell Ctrl-C is ignored already.
        heard = [signal.SIGTERM] + [signal.SIGINT] * callable(signal.getsignal(signal.SIGINT))
        self.before = {number: signal.signal(number, self._ask) for number in heard}
        return self

    def _ask(self, number: int, _) -> None:
        self.asked = True
        if number == signal.SIGINT:
            self.interrupted = True
            logging.info("stopping after these steps")
            signal.signal(number, self.before[number])

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


@dataclasses.dataclass
class Run:
    """A run as all processes see it: what does not change while its state does. The first process writes.

    Attributes:
      config, workdir, fields: of it.
      network: built by `config`.
      data: and the `steps` in which it is seen.
      linear_loss: held-out loss of the exact Gaussian denoiser.
      checkpoints, log: of the first process, None on others.
    """

    config: ConfigDict
    workdir: Path
    fields: Fields
    network: unet.UNetConfig
    data: Prepared
    steps: Plan
    linear_loss: float
    checkpoints: Checkpoints | None
    log: "Log | None" = None

    def model(self, state: State) -> Model:
        """The averaged weights of a state, and all that samplers need beside them."""
        config, data, fields = self.config, self.data, self.fields
        return Model(
            network=self.network,
            form=config.model.form,
            params=jax.tree.map(np.asarray, state.ema),
            standardiser=data.standardiser,
            ocean=fields.ocean,
            lat=fields.lat,
            lon=fields.lon,
            gaussian=data.gaussian,
            kernel=data.kernel,
            schedule={k: float(config.noise[k]) for k in ("steps", "min_beta", "max_beta")},
            sigma=sigma_range(config),
            training={
                "data": fields.name,
                "fingerprint": fields.hash(),
                "split": data.split.describe(),
                "parts": {
                    name: [int(part[0]), int(part[-1]) + 1]
                    for name in ("train", "validation", "test")
                    for part in [getattr(data.split, name)]
                },
                "decorrelation": data.split.decorrelation,
                "step": int(state.step),
                "held_out_loss": float(state.best),
                "held_out_loss_of_linear": self.linear_loss,
                "linear_prior": dataclasses.asdict(data.choice),
                "config": config.to_dict(),
                "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
                **_missing(fields, data.split),
            },
        )

    def export(self, state: State) -> Model:
        """Writes the model of a state."""
        best = self.model(state)
        distributed.at_first(lambda: model.save(best, self.workdir / "model"))
        return best

    def exported(self, state: State) -> Model:
        """The model that an earlier part of the run has written; all processes have the same."""
        # The others take the place of theirs.
        best = distributed.at_first(lambda: model.load(self.workdir / "model")) or self.model(state)
        training = json.loads(distributed.same_text(json.dumps(best.training)))
        return dataclasses.replace(best, params=distributed.same(best.params), training=training)

    def save(self, state: State) -> None:
        """Writes a checkpoint."""
        distributed.at_first(lambda: self.checkpoints.save(int(state.step), state))

    def check_finite(self, losses: np.ndarray, done: int) -> None:
        """Raises Diverged at a loss that is not finite, of the steps that follow the first `done`."""
        if np.isfinite(losses).all():
            return
        at = done + int(np.flatnonzero(~np.isfinite(losses))[0])
        saved = distributed.at_first(lambda: self.checkpoints.last.latest_step())
        last = int(distributed.same(np.int32(saved or 0)))
        kept = f"the state of step {last} is in {self.workdir}" if last else "no state was saved before"
        raise Diverged(
            f"the loss or its gradient is not finite at step {at}; {kept}. A lower learning rate helps most often"
        )

    def end_epoch(
        self, state: State, held_out: Callable[[dict], Level], rate: optax.Schedule, began: float, steps: int
    ) -> tuple[State, bool]:
        """Scores a state at the end of an epoch and logs it; the state of the next one, and whether this is the best.

        Training loss and gradient norm are the means since the last time.

        Args:
          rate: learning rate by step.
          began: time.monotonic() at the end of the last one in this process, `steps` ago.

        Raises:
          Diverged: the held-out loss is not finite.
        """
        done = int(state.step)
        plain, averaged = float(held_out(state.params)), float(held_out(state.ema))
        if not math.isfinite(averaged):
            raise Diverged(f"the held-out loss is not finite at step {done}")
        since = (done - 1) % (self.steps.epoch * self.config.train.score_every) + 1
        sums, seconds = np.asarray(state.sums) / since, time.monotonic() - began
        row = {
            "epoch": done // self.steps.epoch,
            "step": done,
            "train_loss": float(sums[0]),
            "held_out_loss": plain,
            "ema_held_out_loss": averaged,
            "learning_rate": float(rate(float(done - 1))),
            "gradient_norm": float(sums[1]),
            "seconds": seconds,
            "frames_per_second": steps * self.config.train.batch * self.config.train.accumulate / seconds,
        }
        distributed.at_first(lambda: self.log.add(row))
        better = averaged < float(state.best)
        return state._replace(sums=jnp.zeros(2), best=jnp.float32(averaged) if better else state.best), better


def train(config: ConfigDict, workdir: Path, fields: Fields | None = None, progress: bool = True) -> Model | None:
    """Runs or continues a run in `workdir`; returns the best model, None if SIGTERM stopped it (any process).

    Raises:
      InputError: configuration, data or workdir cannot be used, or another training is writing there.
      Diverged: the loss is not finite; the last good checkpoint stays.
      KeyboardInterrupt: after Ctrl-C, once the state is saved.
    """
    workdir = Path(workdir)
    check_config(config)
    mesh = distributed.over_all_devices(config.train.batch)
    if fields is None:
        settings = config.data.fields, config.data.frames, config.data.twin_seed
        fields = distributed.at_all(lambda: load_fields(*settings))
    identity = (workdir, config.to_dict(), {"fields": fields.hash(), "name": fields.name})
    distributed.check_same(json.dumps(identity[1:]), "configuration and data")
    usual = default_config().to_dict()
    (resuming,) = distributed.any_of(bool(distributed.at_first(lambda: holds_run(*identity, usual))))
    network = network_config(config)
    graphdef, params = unet.create(network, config.train.seed)
    if config.init_from and resuming:
        logging.info("%s goes on from its own state; init_from is for the start of a run", workdir)
    elif config.init_from:
        params = distributed.at_first(lambda: _weights_of(config, network)) or params
    data = prepare(fields, config)
    steps = plan(len(data.split.train), config)
    optimiser, rate = make_optimiser(config, steps)
    loss = make_loss(config, data.gaussian, graphdef)
    held_out = make_held_out(config, loss, data.validation, mesh)
    linear_loss = float(make_held_out(config, make_loss(config, data.gaussian, None), data.validation, mesh)({}))
    logging.info("held-out loss of the exact Gaussian denoiser: %.5g", linear_loss)
    # A copy: the state is donated, and two names must not share one buffer.
    ema = jax.tree.map(jnp.copy, params)
    state = State(params, ema, optimiser.init(params), jnp.int32(0), jnp.zeros(2), jnp.float32(jnp.inf))
    # Only now: a run that is refused leaves a workdir that the corrected command can have.
    with contextlib.ExitStack() as held:
        distributed.at_first(lambda: held.enter_context(locked(workdir, run="training")))
        # Asked again, as another training may have been here in the meantime.
        distributed.at_first(lambda: holds_run(*identity, usual) or claim(*identity))
        checkpoints = distributed.at_first(lambda: Checkpoints.open(workdir, config.train.keep))
        restored = distributed.at_first(lambda: checkpoints.restore(state))
        if restored is not None:
            state = jax.tree.map(jnp.asarray, restored)
        state = distributed.replicate(distributed.same(state), mesh)
        shape, standardiser = fields.shape, data.standardiser
        dispatch = make_steps(config, loss, optimiser, steps, data.gaussian.ocean, shape, mesh, standardiser)
        # A bar is for terminals; what a batch job writes gets a line for each epoch.
        words = progress and not sys.stderr.isatty()
        done = int(state.step) // steps.epoch
        log = distributed.at_first(lambda: Log(workdir, done, config.tensorboard, linear_loss, words))
        run = Run(config, workdir, fields, network, data, steps, linear_loss, checkpoints, log)
        hidden = None if progress and jax.process_index() == 0 else True
        whole = {"total": steps.total, "initial": int(state.step), "unit": "step", "desc": "train"}
        try:
            with Stop() as stop, tqdm.tqdm(**whole, disable=hidden) as bar:
                state, trained = _go_on(run, state, dispatch, held_out, rate, mesh, stop, bar)
        except Diverged:
            # Of a run without a state there is nothing to keep, and another learning rate may have its workdir.
            distributed.at_first(lambda: checkpoints.last.latest_step() is None and release(workdir))
            raise
        distributed.at_first(lambda: checkpoints.close())
    if int(state.step) < steps.total:
        if stop.interrupted:
            raise KeyboardInterrupt
        return None
    return trained or run.exported(state)


def _go_on(
    run: Run,
    state: State,
    dispatch: Callable[[State, Frames], tuple[State, Array]],
    held_out: Callable[[dict], Level],
    rate: optax.Schedule,
    mesh: Mesh | None,
    stop: Stop,
    bar: tqdm.tqdm,
) -> tuple[State, Model | None]:
    """The steps that are left, or those before a SIGTERM; the last state, and the best model if this part wrote one."""
    frames, trained = distributed.replicate(run.data.train, mesh), None
    done = begun = int(state.step)
    saved = began = time.monotonic()
    while done < run.steps.total:
        state, losses = dispatch(state, frames)
        losses = np.asarray(losses)
        run.check_finite(losses, done)
        done += run.steps.dispatch
        bar.update(run.steps.dispatch)
        bar.set_postfix(loss=f"{losses.mean():.4g}")
        late = time.monotonic() - saved > 60 * run.config.train.save_minutes
        stopping, saving = distributed.any_of(stop.asked, late)
        if done % (run.steps.epoch * run.config.train.score_every) == 0 or done == run.steps.total:
            new, better = run.end_epoch(state, held_out, rate, began, done - begun)
            state = state._replace(**distributed.replicate({"sums": new.sums, "best": new.best}, mesh))
            # The model first: a run killed in between repeats the epoch and writes both.
            if better:
                trained = run.export(state)
            run.save(state)
            saved = began = time.monotonic()
            begun = done
        elif stopping or saving:
            run.save(state)
            saved = time.monotonic()
        if stopping:
            break
    return state, trained


def _missing(fields: Fields, split: Split) -> dict[str, dict[str, float]]:
    """What a model of fields with gaps says of them: fractions of ocean values, and frames that were left out."""
    if not fields.gaps:
        return {}
    missing = {name: fields.select(getattr(split, name)).gaps for name in ("train", "validation")}
    return {"missing": missing | {"frames_left_out": int((fields.coverage < fields_lib.LEAST_COVERAGE).sum())}}


def sigma_range(config: ConfigDict) -> tuple[float, float]:
    """Smallest and largest noise level that the network has seen."""
    if config.model.form == "eps":
        sigma = model.make_schedule(dict(config.noise)).sigma
        return float(sigma[0]), float(sigma[-1])
    return float(config.noise.sigma_min), float(config.noise.sigma_max)


def _weights_of(config: ConfigDict, network: unet.UNetConfig) -> dict:
    folder, form = config.init_from, config.model.form
    source = Path(folder)
    loaded = model.load(source / "model" if (source / "model").is_dir() else source)
    # A network of another form has learnt another target, and of other steps other positions.
    if form != loaded.form and (loaded.form, form) != ("anchored", "conditional"):
        raise InputError(f"init_from: the model in {folder} is of form {loaded.form}, not {form}")
    if form == "eps" and loaded.schedule != (schedule := {k: float(config.noise[k]) for k in loaded.schedule}):
        raise InputError(f"init_from: the model in {folder} knows the steps {loaded.schedule}, not {schedule}")
    # Dropout and the number type change no weight.
    alike = dataclasses.replace(loaded.network, dropout=network.dropout, dtype=network.dtype)
    grown = (loaded.network.inputs, network.inputs) == (model.INPUTS["anchored"], model.INPUTS["conditional"])
    if dataclasses.replace(alike, inputs=network.inputs) != network or not (grown or alike == network):
        raise InputError(f"init_from: the network of {folder} is another one: {loaded.network}")
    return _see_more(loaded.params, network) if grown else loaded.params


def _see_more(params: dict, network: unet.UNetConfig) -> dict:
    """The same function of the first inputs of a network that has more, whose kernels start from 0."""
    shapes = traverse_util.flatten_dict(unet.structure(network)[1])
    flat = traverse_util.flatten_dict(params)
    for name, leaf in flat.items():
        extra = [(0, new - old) for new, old in zip(shapes[name].shape, leaf.shape, strict=True)]
        flat[name] = jnp.pad(leaf, extra)
    return traverse_util.unflatten_dict(flat)


class Log:
    """log.csv, loss.png and TensorBoard events of a run, one row for each epoch that is scored."""

    def __init__(self, workdir: Path, epochs: int, tensorboard: bool, linear_loss: float, words: bool = False):
        self.path, self.linear_loss, self.words = workdir / "log.csv", linear_loss, words
        rows = pd.read_csv(self.path).to_dict("records") if self.path.exists() else []
        # Epochs after the checkpoint are run again.
        self.rows = [row for row in rows if row["epoch"] <= epochs]
        self.events = _tensorboard()(str(workdir / "tensorboard")) if tensorboard else None

    def add(self, row: dict[str, float]) -> None:
        """Appends a row to the table and draws the curves anew."""
        self.rows.append(row)
        if self.words:
            told = (row[name] for name in ("epoch", "train_loss", "held_out_loss", "ema_held_out_loss", "seconds"))
            logging.info("epoch %d: training loss %.4g, held out %.4g, with averaged weights %.4g; %.0f s", *told)
        table = pd.DataFrame(self.rows)
        with files.whole_file(self.path) as temporary:
            table.to_csv(temporary, index=False, float_format="%.6g")
        columns = ("epoch", "train_loss", "held_out_loss", "ema_held_out_loss", "learning_rate")
        curves = (table[name].to_numpy() for name in columns)
        plots.loss_curve(self.path.with_name("loss.png"), *curves, linear=self.linear_loss)
        if self.events:
            for name, value in row.items():
                self.events.add_scalar(name, value, int(row["step"]))
            self.events.flush()


FLAGS = flags.FLAGS


def _define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "Configuration, such as configs/attn.py or configs/attn.py:smoke.")
    flags.DEFINE_string("workdir", None, "Folder of the run; an existing run in it is continued.")
    flags.mark_flags_as_required(["config", "workdir"])
    distributed.define_flags()


def main(_) -> None:
    """Trains, and says where the model is."""
    try:
        trained = train(FLAGS.config, Path(FLAGS.workdir))
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the last state that was saved")
        sys.exit(130)
    except Diverged as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(1)
    if trained is None:
        if jax.process_index() == 0:
            print(f"stopped; the same command continues from {FLAGS.workdir}")
        sys.exit(143)
    loss = trained.training["held_out_loss"]
    if jax.process_index() == 0:
        print(f"lowest held-out loss {loss:.5g}; the model is in {Path(FLAGS.workdir) / 'model'}")


if __name__ == "__main__":
    _define_flags()
    command.run(distributed.connected(main))
