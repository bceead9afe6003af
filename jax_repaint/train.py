"""Trains a network to remove noise from velocity fields.

    python -m jax_repaint.train --config=configs/attn.py --workdir=runs/attn

What the loss of each form is stands in optimise.py, every setting in settings.py.

Starting it again on the same workdir continues the run, bit for bit as if it had never stopped, on as many
cores. All devices share each batch, those of several processes too (distributed.py); the loss is that of one device but
for rounding.
"""

import contextlib
import dataclasses
import json
import math
import signal
import sys
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import tqdm
from absl import flags, logging
from flax import traverse_util
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from jax_repaint import SHIPPED, command, distributed, files, model, plots, provenance
from jax_repaint.array_types import Array, Level
from jax_repaint.checkpoint import LOG, Checkpoints, began_from, claim, holds_run, release
from jax_repaint.data.fields import Fields
from jax_repaint.errors import InputError
from jax_repaint.locks import locked
from jax_repaint.model import Model
from jax_repaint.nets import unet
from jax_repaint.optimise import Plan, State, make_held_out, make_loss, make_optimiser, make_steps, plan
from jax_repaint.prepare import Frames, Prepared, load_fields, missing, prepare, time_range
from jax_repaint.settings import check_config, default_config, network_config, sigma_range


class Diverged(InputError):
    """The loss is not finite, which another learning rate or better data mend."""


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
      fingerprint: of the fields; kept, like `missing`, as it reads all frames and each better model says it.
      network: built by `config`.
      data: and the `steps` in which it is seen.
      linear_loss: held-out loss of the exact Gaussian denoiser.
      checkpoints, log: of the first process, None on others.
      init_from: the model that the run began with, which a later start need not name.
    """

    config: ConfigDict
    workdir: Path
    fields: Fields
    fingerprint: str
    network: unet.UNetConfig
    data: Prepared
    steps: Plan
    linear_loss: float
    checkpoints: Checkpoints | None
    log: "Log | None" = None
    init_from: str = ""

    @cached_property
    def missing(self) -> dict[str, dict[str, float]]:
        """What the model says of gaps."""
        return missing(self.fields, self.data.split)

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
            archive=data.archive,
            schedule={k: float(config.noise[k]) for k in ("steps", "min_beta", "max_beta")},
            sigma=sigma_range(config),
            training={
                "data": fields.name,
                "fingerprint": self.fingerprint,
                "split": data.split.describe(),
                "parts": {
                    name: [int(part[0]), int(part[-1]) + 1]
                    for name in ("train", "validation", "test")
                    for part in [getattr(data.split, name)]
                },
                "decorrelation": data.split.decorrelation,
                "time": time_range(fields, data.split),
                "step": int(state.step),
                "held_out_loss": float(state.best),
                "held_out_loss_of_linear": self.linear_loss,
                "linear_prior": dataclasses.asdict(data.choice),
                "config": config.to_dict() | {"init_from": self.init_from},
                "versions": provenance.versions("jax", "flax", "optax"),
                **self.missing,
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
    distributed.at_first(lambda: files.check_makeable(workdir, f"workdir {workdir}"))
    mesh = distributed.over_all_devices(config.train.batch, config.model.form)
    if fields is None:
        settings = config.data.fields, config.data.frames, config.data.twin_seed
        fields = distributed.at_all(lambda: load_fields(*settings))
    fingerprint = fields.hash()
    identity = (workdir, config.to_dict(), {"fields": fingerprint, "name": fields.name})
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
        distributed.at_first(lambda: provenance.note_start(workdir))
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
        began = distributed.at_first(lambda: began_from(workdir)) if resuming else config.init_from
        run = Run(config, workdir, fields, fingerprint, network, data, steps, linear_loss, checkpoints, log, began)
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


def _weights_of(config: ConfigDict, network: unet.UNetConfig) -> dict:
    folder, form = config.init_from, config.model.form
    inside = Path(folder) / "model"
    loaded = model.load(inside if folder != SHIPPED and inside.is_dir() else folder)
    # A network of another form has learnt another target, and of other steps other positions.
    if form != loaded.form and {loaded.form, form} != {"anchored", "conditional"}:
        raise InputError(f"init_from: the model in {folder} is of form {loaded.form}, not {form}")
    if form == "eps" and loaded.schedule != (schedule := {k: float(config.noise[k]) for k in loaded.schedule}):
        raise InputError(f"init_from: the model in {folder} knows the steps {loaded.schedule}, not {schedule}")
    # Dropout and the number type change no weight.
    alike = dataclasses.replace(loaded.network, dropout=network.dropout, dtype=network.dtype)
    if dataclasses.replace(alike, inputs=network.inputs) != network or (form == loaded.form and alike != network):
        raise InputError(f"init_from: the network of {folder} is another one: {loaded.network}")
    return loaded.params if form == loaded.form else _with_inputs_of(network, loaded.params)


def _with_inputs_of(network: unet.UNetConfig, params: dict) -> dict:
    """The same function of the inputs that both have: kernels of others start from 0, or are left out.

    What is left out saw which cells are observed, and 0 where none was. Scales start from 1: behind a scale of 0 no
    gradient would reach a kernel of 0, nor the other way round.
    """
    shapes = traverse_util.flatten_dict(unet.structure(network)[1])
    flat = traverse_util.flatten_dict(params)
    for name, leaf in flat.items():
        shape = shapes[name].shape
        kept = leaf[tuple(map(slice, shape))]
        more = [(0, new - old) for new, old in zip(shape, kept.shape, strict=True)]
        flat[name] = jnp.pad(kept, more, constant_values=float(name[-1] == "scale"))
    return traverse_util.unflatten_dict(flat)


class Log:
    """log.csv, loss.png and TensorBoard events of a run, one row for each epoch that is scored."""

    def __init__(self, workdir: Path, epochs: int, tensorboard: bool, linear_loss: float, words: bool = False):
        self.path, self.linear_loss, self.words = workdir / LOG, linear_loss, words
        rows = files.read_table(self.path, numbers=["epoch"]).to_dict("records") if self.path.exists() else []
        # Epochs after the checkpoint are run again.
        self.rows = [row for row in rows if row["epoch"] <= epochs]
        self.events = tensorboard()(str(workdir / "tensorboard")) if tensorboard else None

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
    except (RuntimeError, ValueError) as e:
        distributed.end_if_alone(e)
        raise
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
