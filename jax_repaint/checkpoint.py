"""Training state on disk: plain arrays through orbax, and what they belong to.

WORKDIR/config.json         resolved configuration and fingerprint of the data; with a state there, others are refused
WORKDIR/environment.json    versions, revision and devices of every start (provenance.py)
WORKDIR/checkpoints/last    the latest states, to continue from
WORKDIR/lock, lock.0        held by the training that writes there (locks.py)

    python -m jax_repaint.checkpoint import --torch=FILE.pt --network=standard_attn --out=MODEL

makes a model of a PyTorch checkpoint (torch_import.py).
"""

import dataclasses
import functools
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import flags, logging

from jax_repaint import command
from jax_repaint.errors import InputError
from jax_repaint.files import read_table, reason, whole_file
from jax_repaint.locks import LOCK
from jax_repaint.provenance import ENVIRONMENT

CONFIG, LOG = "config.json", "log.csv"
BESIDE = 1 << 20  # bytes at most that a state takes beside its numbers
# What a continued run may change: where things lie, and what it keeps. The data are told by their fingerprint.
FREE = frozenset(
    f"config.{name}" for name in ("data.fields", "init_from", "tensorboard", "train.keep", "train.save_minutes")
) | {"config.reset_best", "data.name"}  # older runs have reset_best


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}, with sequences as lists."""
    flat = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = list(value) if isinstance(value, tuple | list) else value
    return flat


def holds_run(
    workdir: Path, config: Mapping[str, Any], data: Mapping[str, Any], usual: Mapping[str, Any] | None = None
) -> bool:
    """Whether `workdir` holds states of this run to continue from; writes nothing.

    Args:
      usual: the configuration by default; a run that began before there was a setting has its usual value.

    Raises:
      InputError: the folder belongs to a run with another configuration or other data, or to something else, or its
        states are gone and what they have trained would be lost.
    """
    workdir = Path(workdir)
    path = workdir / CONFIG
    if path.exists():
        try:
            text = json.loads(path.read_text())
            theirs = flatten(text)
        except (OSError, ValueError, AttributeError) as e:
            raise InputError(f"{path} cannot be read ({e})") from e
        if not {"config", "data"} <= text.keys():
            raise InputError(f"{workdir} holds something else, such as a sweep, and no run; choose another workdir")
        # As JSON, because a float that JSON wrote is equal to itself when read.
        ours = flatten(json.loads(json.dumps({"config": config, "data": data})))
        theirs = flatten(json.loads(json.dumps({"config": usual or {}}))) | theirs
        names = sorted(n for n in theirs.keys() | ours.keys() if theirs.get(n) != ours.get(n) and n not in FREE)
        # A run that was killed before its first checkpoint has nothing to continue from, or to lose.
        if names and not _is_unused(workdir):
            lines = "; ".join(f"{n}: {theirs.get(n)!r} there, {ours.get(n)!r} here" for n in names)
            raise InputError(
                f"{workdir} holds a run of another kind ({lines}); choose another workdir, or start one from its "
                "weights with --config.init_from="
            )
        if _has_state(workdir):
            return True
        # One that was killed between its first model and its first state has one row, and not much to lose.
        if (workdir / LOG).exists() and len(read_table(workdir / LOG, numbers=["epoch"])) > 1:
            raise InputError(
                f"{workdir} holds a trained model but no state to continue from; choose another workdir, to start from "
                f"its weights with --config.init_from={workdir}, or remove it to train anew"
            )
        return False
    # A killed start may leave the beginning of config.json, under a name with a dot.
    if workdir.exists() and any(not path.name.startswith((LOCK, ".")) for path in workdir.iterdir()):
        raise InputError(f"{workdir} is not empty and holds no run; choose another workdir")
    return False


def _has_state(workdir: Path) -> bool:
    return any(state.name.isdigit() for state in workdir.glob("checkpoints/last/*"))


def _is_unused(workdir: Path) -> bool:
    """Whether there is no more than a run makes before its first state, log and model."""
    made = {CONFIG, ENVIRONMENT, "checkpoints", "tensorboard"}
    others = [path for path in workdir.iterdir() if path.name not in made and not path.name.startswith((LOCK, "."))]
    return not others and not _has_state(workdir)


def began_from(workdir: Path) -> str:
    """The model whose weights the run of `workdir` began with, which a later start is free to name or not."""
    return json.loads((Path(workdir) / CONFIG).read_text())["config"].get("init_from", "")


def claim(workdir: Path, config: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Makes `workdir` this run's.

    Raises:
      InputError: the folder cannot be written.
    """
    with whole_file(Path(workdir) / CONFIG) as temporary:
        temporary.write_text(json.dumps({"config": config, "data": data}, indent=1, sort_keys=True) + "\n")
    logging.info("new run in %s", workdir)


def release(workdir: Path) -> None:
    """Takes `claim` back, for a run that has written no state: another one may have the workdir."""
    made = Path(workdir) / "checkpoints"
    if any(path.is_file() for path in made.rglob("*")):
        return
    shutil.rmtree(made, ignore_errors=True)
    shutil.rmtree(Path(workdir) / "tensorboard", ignore_errors=True)
    for name in (CONFIG, ENVIRONMENT):
        (Path(workdir) / name).unlink(missing_ok=True)


@dataclasses.dataclass
class Checkpoints:
    """The states of a workdir, in an orbax manager."""

    last: ocp.CheckpointManager

    @classmethod
    def open(cls, workdir: str | os.PathLike, keep: int) -> "Checkpoints":
        """Opens or makes the folder; the latest `keep` states are kept."""
        folder = Path(workdir).resolve() / "checkpoints" / "last"
        options: dict[str, Any] = {"enable_async_checkpointing": False}
        if jax.process_count() > 1:
            # Of several processes this one alone reads and writes, and waits for no other.
            alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
            options |= {"multiprocessing_options": alone, "create": False}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return cls(ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=keep, **options)))
        except OSError as e:
            raise InputError(f"cannot write checkpoints to {folder}: {reason(e)}") from e

    def save(self, step: int, state: Any) -> None:
        """Writes the state whole.

        Raises:
          InputError: the disk is full or cannot be written; older states stay.
        """
        if step in self.last.all_steps():
            return
        content, folder = pack(state), self.last.directory
        try:
            # Threads of orbax that find no room say so in pages of their own. Some file systems do not know their size.
            needed, disk = sum(leaf.nbytes for leaf in content.values()) + BESIDE, shutil.disk_usage(folder)
            if disk.total and disk.free < needed:
                raise InputError(
                    f"cannot write the checkpoint of step {step}: {folder} has room for {disk.free / 1e6:.1f} MB, and "
                    f"it takes {needed / 1e6:.1f} MB"
                )
            self.last.save(step, args=ocp.args.StandardSave(content))
        except InputError:
            raise
        except OSError as e:
            raise InputError(f"cannot write the checkpoint of step {step} to {folder}: {reason(e)}") from e
        except ValueError as e:
            # So orbax reports a full disk, from its storage layer, with settings behind the reason.
            why = str(e).partition(" [")[0].rpartition(": ")[2]
            raise InputError(f"cannot write the checkpoint of step {step} to {folder}: {why}") from e

    def restore(self, like: Any) -> Any | None:
        """The latest state, or None before the first; `like` gives structure, shapes and types.

        Raises:
          InputError: the checkpoint is damaged or of another network.
        """
        step = self.last.latest_step()
        if step is None:
            return None
        template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype), pack(like))
        shown = sys.unraisablehook
        sys.unraisablehook = functools.partial(_show_unless_late, shown)
        try:
            tree = self.last.restore(step, args=ocp.args.StandardRestore(template))
        except Exception as e:
            # Whatever orbax and tensorstore raise on damaged files; their messages run over pages.
            first = str(e).strip().split("\n")[0][:200]
            others = len(self.last.all_steps()) > 1
            advice = "remove that folder to continue from the one before" if others else "there is none before it"
            raise InputError(
                f"the checkpoint of step {step} in {self.last.directory} cannot be read ({first}); {advice}"
            ) from e
        # Not in a `finally`: after a failure the replies are still to come.
        sys.unraisablehook = shown
        return unpack(like, tree)

    def close(self) -> None:
        """Waits for writing to end."""
        self.last.close()


def _show_unless_late(shown: Callable[[Any], object], problem: Any) -> None:
    """Where one array cannot be read, tensorstore reports each of the others to a loop that orbax has closed."""
    if not (isinstance(problem.exc_value, RuntimeError) and str(problem.exc_value) == "Event loop is closed"):
        shown(problem)


def pack(state: Any) -> dict[str, np.ndarray]:
    """The leaves of any state as a flat dictionary of arrays, numbered in order."""
    return {f"{i:05d}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}


def unpack(like: Any, tree: Mapping[str, Any]) -> Any:
    """The inverse of `pack`, with the structure of `like`."""
    return jax.tree.unflatten(jax.tree.structure(like), [tree[name] for name in sorted(tree)])


FLAGS = flags.FLAGS


def _define_flags() -> None:
    flags.DEFINE_string("torch", None, "Checkpoint of PyTorch (.pt) to import.")
    flags.DEFINE_string("network", "standard_attn", "Name of the network that it holds.")
    flags.DEFINE_string("fields", "", "File of the currents it was trained on; by default the Ram Head twin.")
    flags.DEFINE_integer("frames", 17040, "Frames of the twin.", lower_bound=16)
    for name, share in (("train", "0.7"), ("validation", "0.15"), ("test", "0.15")):
        flags.DEFINE_string(name, share, f"Fraction or range of the fields for {name}, as in a training's config.data.")
    flags.DEFINE_bool("allow_short_gap", False, "Accept parts that are closer than the decorrelation time.")
    flags.DEFINE_bool("block_split", False, "Split as its training did if that was by blocks of 130 hours, which leak.")
    flags.DEFINE_integer("rank", 256, "Most EOFs of the linear prior.", lower_bound=1)
    flags.DEFINE_string("patterns", "", "Observations that it is chosen for, such as gaps:0.3; by default few cells.")
    flags.DEFINE_string("out", None, "Folder of the model to write.")
    flags.mark_flags_as_required(("torch", "out"))


def main(_: Sequence[str]) -> None:
    """Imports a checkpoint of PyTorch as a model."""
    # Training uses this module.
    from jax_repaint import model, settings, torch_import

    config = settings.default_config()
    config.model.network, config.model.rank, config.model.patterns = FLAGS.network, FLAGS.rank, FLAGS.patterns
    config.data.fields, config.data.frames = FLAGS.fields, FLAGS.frames
    config.data.allow_short_gap = FLAGS.allow_short_gap
    config.data.block_split = FLAGS.block_split
    for name in ("train", "validation", "test"):
        config.data[name] = getattr(FLAGS, name)
    settings.check_split(config.data)
    # Before the currents are read and fitted.
    model.check_free(Path(FLAGS.out))
    made = torch_import.import_model(FLAGS.torch, config)
    model.save(made, FLAGS.out)
    print(f"wrote {FLAGS.out}: {FLAGS.network}, {made.training['split']}")


if __name__ == "__main__":
    # The one thing that this command does is named, as others may follow: `checkpoint import`.
    usage = "python -m jax_repaint.checkpoint import --torch=FILE.pt --network=NAME --out=FOLDER"
    if sys.argv[1:2] and sys.argv[1].lstrip("-") in ("h", "help", "helpshort", "helpfull"):
        _define_flags()
        print(f"{usage}\n\nmakes a model of a PyTorch checkpoint.\n{FLAGS.main_module_help()}")
        sys.exit(0)
    if "import" not in sys.argv[1:2]:
        print(f"error: say what to do: {usage}", file=sys.stderr)
        sys.exit(2)
    del sys.argv[1]
    _define_flags()
    command.run(main)
