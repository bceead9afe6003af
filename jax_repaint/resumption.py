"""What becomes of a run that goes on under another optimiser: the damage of the notes, made on purpose.

A network is trained by Adam at a constant rate. Branches start from the state it is then in and see the same batches:

    continued   Adam at that rate, as before
    loaded      its moments in AdamW, under a cosine fast-forwarded to the epoch it is in and set once an epoch
    mirrored    the same, and the frames mirrored at random for the first two epochs
    weights     its weights alone: AdamW with fresh moments, warm-up and cosine of its own (train's init_from)
    decayed     Adam with its moments, the rate falling to 0 as a cosine

Each also has an average of its weights with a decay of .9999 a step from the start of the branch, without warm-up.

Stopped or killed, it goes on from the last epoch of each:

    FOLDER/unfinished/NAME.npz    the state of a branch, the average of its weights, the losses of its epochs so far
    FOLDER/lock, lock.0           held while it trains (locks.py)
"""

import copy
import dataclasses
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from absl import logging
from ml_collections import ConfigDict

from jax_repaint.cases import block_length
from jax_repaint.checkpoint import claim, holds_run, pack, unpack
from jax_repaint.data import fields as fields_lib
from jax_repaint.data.fields import Fields, Split
from jax_repaint.errors import InputError
from jax_repaint.files import DAMAGED, read_table, whole_file
from jax_repaint.locks import locked
from jax_repaint.model import Model
from jax_repaint.nets import unet
from jax_repaint.optimise import Plan, State, make_loss, make_steps
from jax_repaint.settings import network_config

DECAY, EMA = 1e-4, 0.9999  # of the weights in AdamW, of their average
MIRRORED = 2  # epochs of the branch of that name that are mirrored
BRANCHES = ("continued", "loaded", "mirrored", "weights", "decayed")
AVERAGED = "loaded, averaged weights"
FIRST = "before, frames in a row"  # the same weights on the first part of the held-out frames
SETTINGS, CURVES, LOSSES, UNFINISHED = "settings.json", "curves.csv", "losses.csv", "unfinished"


@dataclasses.dataclass(frozen=True)
class Length:
    """How long it takes.

    Attributes:
      epoch: steps.
      before: epochs of Adam at a constant rate.
      after: epochs of each branch.
      held_out: validation frames; all of them where there are fewer.
      dispatch: steps between two changes of the rate, and between two averages of the weights.
    """

    epoch: int = 200
    before: int = 20
    after: int = 6
    held_out: int = 256
    dispatch: int = 10


@dataclasses.dataclass(frozen=True)
class Resumption:
    """What came of it.

    Attributes:
      curves: branch, epoch, loss, averaged_loss: held-out losses; the branch `before` is what all start from.
      losses: of each held-out frame at the end of each branch, one column a branch, in the order of time.
      length: how long it took.
      block: held-out frames within a decorrelation time.
      refusal: what `train` says to a changed optimiser in the workdir of a run.
    """

    curves: pd.DataFrame
    losses: pd.DataFrame
    length: Length
    block: int
    refusal: str


def rates(peak: float, length: Length) -> dict[str, Callable[[float], float]]:
    """Learning rate of each branch after so many epochs of its own."""
    horizon, warm = 4 * length.before, max(length.before / 12, 1)

    def cosine(epoch: float, warm: float, total: float) -> float:
        if epoch < warm:
            return peak * (1e-3 + (1 - 1e-3) * epoch / warm)
        return peak * 0.5 * (1 + math.cos(math.pi * min((epoch - warm) / (total - warm), 1)))

    def loaded(epoch: float) -> float:
        return cosine(length.before + math.floor(epoch), warm, horizon)

    return {
        "continued": lambda epoch: peak,
        "loaded": loaded,
        "mirrored": loaded,
        "weights": lambda epoch: cosine(epoch, length.after / 6, length.after),
        "decayed": lambda epoch: cosine(epoch, 0.0, length.after),
    }


def refusal(config: ConfigDict) -> str:
    """The sentence with which `train` refuses a workdir whose run had another optimiser; empty if it does not."""
    changed = copy.deepcopy(config)
    changed.train.weight_decay, changed.train.warmup_epochs = 10 * DECAY, config.train.warmup_epochs / 2
    with tempfile.TemporaryDirectory() as folder:
        claim(folder, config.to_dict(), {})
        # Before its first state a run gives way to any other.
        (Path(folder) / "checkpoints" / "last" / "1").mkdir(parents=True)
        try:
            holds_run(folder, changed.to_dict(), {})
        except InputError as e:
            return str(e).replace(folder, "WORKDIR")
    return ""


def run(
    trained: Model, fields: Fields, split: Split, config: ConfigDict, folder: Path, length: Length | None = None
) -> Resumption:
    """Trains before and after what an earlier call has not, or reads what it wrote into `folder`.

    Args:
      trained: gives the standardiser and the linear prior; its weights are not used.
      fields, split: it was trained on.
      config: of the training; network, batch and learning rate are taken.

    Raises:
      InputError: `folder` holds another experiment, another one is running there, or it cannot be written.
    """
    length = _within(length or Length(), split.train.size // config.train.batch)
    settings = {"config": config.to_dict(), "length": dataclasses.asdict(length), "fields": fields.hash()}
    settings = json.loads(json.dumps(settings))
    held_out = min(length.held_out, split.validation.size)
    block = block_length(dataclasses.replace(split, test=split.validation), held_out)
    path = folder / SETTINGS
    with locked(folder, run="training"):
        if path.exists():
            _check_same(path, settings)
            curves = read_table(folder / CURVES, ["branch"], numbers=["epoch", "loss", "averaged_loss"])
            losses = read_table(folder / LOSSES, numbers=["before", FIRST, *BRANCHES, AVERAGED])
        else:
            kept = _Kept(folder / UNFINISHED, settings)
            curves, losses = _train(trained, fields, split, config, kept, length)
            for name, table in ((CURVES, curves), (LOSSES, losses)):
                with whole_file(folder / name) as temporary:
                    table.to_csv(temporary, index=False)
            _write(path, settings)
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    return Resumption(curves, losses, length, block, refusal(config))


def _within(length: Length, batches: int) -> Length:
    """The same with epochs of no more steps than there are batches, which would be the last one again and again."""
    epoch = min(length.epoch, batches // length.dispatch * length.dispatch)
    if not epoch:
        raise InputError(f"continued runs need {length.dispatch} batches of training frames, there are {batches}")
    return dataclasses.replace(length, epoch=epoch)


def _check_same(path: Path, settings: Mapping[str, Any]) -> None:
    try:
        theirs = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise InputError(f"{path} cannot be read ({e}); with its folder moved away the experiment starts anew") from e
    if theirs != settings:
        folder = path.parent.parent if path.parent.name == UNFINISHED else path.parent
        raise InputError(f"{folder} holds another experiment; choose another workdir")


def _write(path: Path, settings: Mapping[str, Any]) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")


class _Kept:
    """The last epoch of each branch in a folder, for a call that goes on.

    Raises:
      InputError: the folder is of other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.folder = folder
        path = folder / SETTINGS
        if path.exists():
            _check_same(path, settings)
        else:
            _write(path, settings)

    def get(self, branch: str, start: Any) -> tuple[Any, list[tuple[float, float]]]:
        """What was put last, with the structure of `start`; that and no losses if there is nothing."""
        path = self.folder / f"{branch}.npz"
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as held:
                losses = [tuple(pair) for pair in held["losses"].tolist()]
                found = unpack(start, {name: held[name] for name in held.files if name != "losses"})
        except FileNotFoundError:
            return start, []
        except DAMAGED:
            logging.warning("%s cannot be read; its epochs are trained again", path)
            return start, []
        logging.info("%s goes on after %d epochs", branch, len(losses))
        return jax.tree.map(jnp.asarray, found), losses

    def put(self, branch: str, state: Any, losses: list[tuple[float, float]]) -> None:
        """Keeps a state and the losses of the epochs up to it.

        Raises:
          InputError: the folder cannot be written, or the disk is full; what was put before stays.
        """
        with whole_file(self.folder / f"{branch}.npz") as temporary:
            np.savez(temporary, losses=np.asarray(losses, np.float64), **pack(state))


class _Run:
    """Steps and held-out losses under a rate that is set from outside."""

    def __init__(
        self, trained: Model, fields: Fields, split: Split, config: ConfigDict, kept: _Kept, length: Length
    ):  # fmt: skip
        config = copy.deepcopy(config)
        config.train.accumulate, config.train.dispatch = 1, length.dispatch
        network = network_config(config)
        graphdef, self.params = unet.create(network, config.train.seed)
        self.loss = make_loss(config, trained.gaussian, graphdef)
        self.kept, self.length, self.peak = kept, length, config.train.learning_rate
        plan = Plan(length.epoch, length.dispatch, length.epoch * (length.before + length.after))
        self.optimiser = optax.chain(
            optax.clip_by_global_norm(config.train.clip),
            optax.inject_hyperparams(optax.adamw)(learning_rate=self.peak, weight_decay=0.0),
        )

        def frames(numbers: np.ndarray, count: int) -> jax.Array:
            chosen = numbers[np.unique(np.linspace(0, len(numbers) - 1, count).astype(int))]
            return jnp.asarray(fields_lib.prepare(fields.select(chosen), trained.standardiser, trained.padded)[0])

        def steps(flips: bool) -> Callable:
            config.train.flips = flips
            own = copy.deepcopy(config)
            return make_steps(
                own, self.loss, self.optimiser, plan, trained.gaussian.ocean, fields.shape,
                standardiser=trained.standardiser,
            )  # fmt: skip

        self.data = frames(split.train, length.epoch * config.train.batch)
        self.held_out = frames(split.validation, length.held_out)
        self.row = frames(split.validation[: length.held_out], length.held_out)
        self.steps = {flips: steps(flips) for flips in (False, True)}
        self.judge = jax.jit(self._judge)

    def _judge(self, params: dict, frames: jax.Array) -> jax.Array:
        """Loss of each frame, with noise and level of its own that never change."""
        count = len(frames)
        places = np.random.default_rng(0).permutation((np.arange(count) + 0.5) / count).astype(np.float32)
        keys = jax.random.split(jax.random.key(1), count)
        return jax.lax.map(lambda now: self.loss(params, *now, False), (frames, keys, jnp.asarray(places)))

    def start(self, params: dict) -> State:
        """A state with fresh moments."""
        with jax.numpy_dtype_promotion("standard"):
            moments = self.optimiser.init(params)
        return State(params, params, moments, jnp.int32(0), jnp.zeros(2), jnp.float32(jnp.inf))

    def go(
        self, branch: str, state: State, epochs: int, rate: Callable[[float], float], decay: float, mirrored: int = 0
    ) -> tuple[State, list[tuple[float, float]]]:
        """State after `epochs`, with the average of its weights, and the two held-out losses after each.

        A branch that an earlier call has begun goes on from its last epoch.
        """
        moved = 1 - EMA**self.length.dispatch
        (state, average), losses = self.kept.get(branch, jax.tree.map(jnp.copy, (state, state.params)))
        for epoch in range(len(losses), epochs):
            for step in range(0, self.length.epoch, self.length.dispatch):
                clip, moments = state.optimiser
                numbers = {"learning_rate": rate(epoch + step / self.length.epoch), "weight_decay": decay}
                own = {name: jnp.asarray(value, jnp.float32) for name, value in numbers.items()}
                moments = moments._replace(hyperparams=moments.hyperparams | own)
                state, _ = self.steps[epoch < mirrored](state._replace(optimiser=(clip, moments)), self.data)
                average = optax.incremental_update(state.params, average, moved)
            losses.append(tuple(float(self.judge(p, self.held_out).mean()) for p in (state.params, average)))
            self.kept.put(branch, (state, average), losses)
        return state._replace(ema=average), losses


def _train(
    trained: Model, fields: Fields, split: Split, config: ConfigDict, kept: _Kept, length: Length
) -> tuple[pd.DataFrame, pd.DataFrame]:
    run = _Run(trained, fields, split, config, kept, length)
    before, losses = run.go("before", run.start(run.params), length.before, lambda epoch: run.peak, 0.0)
    rows = [("before", epoch + 1, *pair) for epoch, pair in enumerate(losses)]
    ends = {"before": run.judge(before.params, run.held_out), FIRST: run.judge(before.params, run.row)}
    for name, rate in rates(run.peak, length).items():
        start = run.start(before.params)._replace(step=before.step) if name == "weights" else before
        decay = DECAY if name in ("loaded", "mirrored", "weights") else 0.0
        state, losses = run.go(name, start, length.after, rate, decay, MIRRORED if name == "mirrored" else 0)
        rows += [(name, length.before + epoch + 1, *pair) for epoch, pair in enumerate(losses)]
        ends[name] = run.judge(state.params, run.held_out)
        if name == "loaded":
            ends[AVERAGED] = run.judge(state.ema, run.held_out)
    curves = pd.DataFrame(rows, columns=["branch", "epoch", "loss", "averaged_loss"])
    return curves, pd.DataFrame({name: np.asarray(values, np.float64) for name, values in ends.items()})
