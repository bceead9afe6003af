"""What a training does in one step.

    loss = mean over frames of weight(sigma) |D(x0 + sigma n; sigma) - x0|^2,   averaged over ocean cells and components

    form       sigma                                       weight
    eps        of a step t drawn uniformly                 1 / sigma^2: the usual |eps_theta - eps|^2
    edm        log-uniform in sigma_min..sigma_max         (1 + sigma^2) / sigma^2 (Karras et al. 2022, section 5)
    anchored   log-uniform in sigma_min..sigma_max         1 / mean square error of the exact Gaussian denoiser
    conditional  as anchored, with observations drawn anew for every frame and given to both denoisers (conditional.py)

`train.focus` is the share of levels that are drawn from train.focus_min..focus_max only, log-uniform there too.

Of fields with gaps, as radars have them, the average is over ocean cells that have a value.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jax_repaint import distributed, gains, guide, model, observe
from jax_repaint.array_types import Array, Field, Float, Key, Level
from jax_repaint.conditional import ConditionalDenoiser
from jax_repaint.data.fields import Standardiser
from jax_repaint.denoise import PrincipalGaussian
from jax_repaint.prepare import Frames, arrays_of

# Keys are folded from (seed, purpose, ...), so that no two purposes share a number.
ORDER, NOISE, HELD_OUT = range(3)


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
        return guide.Evidence(gaussian.ocean, seen.replace(values=values), gains.noise_covariance(seen), gaussian)

    def loss(params: dict, x0: Field, key: Key, place: Level, training: bool, present: Array | None = None) -> Level:
        sigma = level_at(place, config)
        noise, pattern, dropout = jax.random.split(key, 3)
        x = x0 + sigma * jax.random.normal(noise, x0.shape)
        evidence = observe_some(x0, pattern, present)
        gain = gains.kalman_gain(gaussian, evidence.observation, evidence.noise, sigma)
        evidence = evidence.replace(gain=gain)
        if graphdef is None:
            estimate = guide.kalman(lambda x: gaussian(x, sigma), x, sigma, sigma, evidence)
        else:
            denoiser = ConditionalDenoiser(params, gaussian, graphdef)
            estimate = denoiser.given(x, sigma, evidence, dropout if training else None)
        # Of all ocean cells, with gaps too: a weight that network and Gaussian share.
        expected = gains.remaining_variance(gaussian, evidence.observation, gain, sigma)
        ocean = gaussian.ocean
        counted = ocean if present is None else _present_cells(ocean, ocean, present)
        error = counted * (estimate - x0)
        return jnp.sum(error**2) / (_count(counted, present) * x0.shape[-1]) / expected

    return loss


def make_places(key: Key, count: int, stratified: bool) -> Float[Array, " b"]:
    """Places on the noise range: uniform, or one in each of `count` equal parts of it."""
    u = jax.random.uniform(key, (count,))
    return (jnp.arange(count, dtype=u.dtype) + u) / count if stratified else u


def _make_mirrors(
    ocean: Array, grid: tuple[int, int], standardiser: Standardiser | None
) -> Callable[[Key, Array, list[Array]], tuple[Array, list[Array]]]:
    """mirrored(key, frames, present): each frame, and its cells, as mirrored east-west and north-south or as they are.

    East-west mirrors change the sign of u, north-south mirrors of v. The coast stays: `train.flips` is off for that.
    """
    rows, columns = (
        np.r_[np.arange(inner)[::-1], np.arange(inner, side)] for inner, side in zip(grid, ocean.shape[:2], strict=True)
    )
    # A velocity of zero in standardised units, about which a component turns round.
    still = jnp.zeros(2) if standardiser is None else jnp.asarray(-standardiser.mean / standardiser.std)

    def turn(x0: Array, component: int) -> Array:
        return x0.at[..., component].set(2 * still[component] - x0[..., component])

    def mirrored(key: Key, x0: Array, present: list[Array]) -> tuple[Array, list[Array]]:
        turned, land = jax.random.bernoulli(key, 0.5, (2, len(x0), 1, 1, 1)), x0
        x0 = jnp.where(turned[0], turn(x0[:, :, columns], 0), x0)
        x0 = jnp.where(turned[1], turn(x0[:, rows], 1), x0)
        present = [jnp.where(turned[0], cells[:, :, columns], cells) for cells in present]
        present = [jnp.where(turned[1], cells[:, rows], cells) for cells in present]
        return jnp.where(ocean[None] > 0, x0, land), present

    return mirrored


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
    mirrored = _make_mirrors(ocean, grid or ocean.shape[:2], standardiser) if t.flips else None
    gradient_of = jax.value_and_grad(_make_batch_loss(config, loss, mirrored, mesh))

    def mean_gradient(params: dict, data: Frames, index: Array, key: Key) -> tuple[Level, dict]:
        """Of batches (accumulate, batch) of frames."""

        def add(total: tuple, part: tuple) -> tuple[tuple, None]:
            rows, part_key = part
            new = gradient_of(params, tuple(frames[rows] for frames in arrays_of(data)), part_key)
            return jax.tree.map(jnp.add, total, new), None

        keys = jax.random.split(key, t.accumulate)
        total = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        if on_cpu:
            for part in range(t.accumulate):
                total, _ = add(total, (index[part], keys[part]))
        else:
            total, _ = jax.lax.scan(add, total, (index, keys))
        return jax.tree.map(lambda x: x / t.accumulate, total)

    def one(state: State, order: Array, data: Frames) -> tuple[State, Array]:
        count = t.batch * t.accumulate
        begin = (state.step % steps.epoch) * count
        index = jax.lax.dynamic_slice(order, (begin,), (count,)).reshape(t.accumulate, t.batch)
        noise = jax.random.fold_in(jax.random.fold_in(key, NOISE), state.step)
        return _stepped(state, *mean_gradient(state.params, data, index, noise), optimiser, t.ema)

    @partial(distributed.jit, mesh=mesh, donate_argnums=0, static_argnums=2)
    def run(state: State, data: Frames, count: int) -> tuple[State, Array]:
        epoch, frames = state.step // steps.epoch, len(arrays_of(data)[0])
        if steps.epoch * t.batch * t.accumulate > frames:
            # A slice beyond the end would be the last batch again.
            raise ValueError(f"{frames} frames are fewer than {steps.epoch} batches of {t.batch} x {t.accumulate}")
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


def _make_batch_loss(config: ConfigDict, loss: Loss, mirrored: Callable | None, mesh: Mesh | None) -> Loss:
    """batch_loss(params, frames, key): mean loss of frames, each with noise, level and mirrors of its own."""
    stratified = config.model.form != "eps"

    def batch_loss(params: dict, frames: tuple[Array, ...], key: Key) -> Level:
        x0, *present = frames
        where, noise, mirror = jax.random.split(key, 3)
        if mirrored:
            x0, present = mirrored(mirror, x0, present)
        places = make_places(where, len(x0), stratified)
        keys = jax.random.split(noise, len(x0))
        x0, keys, places, *present = distributed.split((x0, keys, places, *present), mesh)
        axes = (None, 0, 0, 0, None, *(0 for _ in present))
        return jnp.mean(jax.vmap(loss, axes)(params, x0, keys, places, True, *present))

    return batch_loss


def _stepped(
    state: State, value: Level, gradient: dict, optimiser: optax.GradientTransformation, ema: float
) -> tuple[State, Level]:
    """The state after a step, and the loss of the step."""
    # optax mixes whole numbers and fractions, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        updates, optimiser_state = optimiser.update(gradient, state.optimiser, state.params)
        params = optax.apply_updates(state.params, updates)
    n = state.step.astype(jnp.float32)
    decay = jnp.minimum(ema, (1 + n) / (10 + n))
    averaged = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, params)
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient)))
    sums = state.sums + jnp.stack([value, norm])
    # A gradient that is not finite ruins the parameters before the loss shows it.
    value = jnp.where(jnp.isfinite(norm), value, norm)
    return State(params, averaged, optimiser_state, state.step + 1, sums, state.best), value


def make_held_out(config: ConfigDict, loss: Loss, data: Frames, mesh: Mesh | None = None) -> Callable[[dict], Level]:
    """held_out(params): loss of validation frames, each with noise and level of its own that never change."""
    frames = len(arrays_of(data)[0])
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
    kept = distributed.replicate(tuple(part[np.unique(index)] for part in arrays_of(data)), mesh)
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
