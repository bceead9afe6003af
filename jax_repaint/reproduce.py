"""Does the experiments of the notes again, and says of each finding whether it holds.

    python -m jax_repaint.reproduce --workdir=runs/reproduce
    python -m jax_repaint.reproduce --workdir=runs/reproduce --scale=full --configs=configs/attn.py,configs/standard.py

Networks with attention and plain ones, from two seeds each, are trained in WORKDIR/models unless folders of models are
named. The first pair does everything; the others are compared with each other. The sweeps of configs/sweeps run in
WORKDIR/sweeps, and a training that goes on in wrong and right ways (resumption.py) in WORKDIR/resume. Started again, it
goes on where it was. The page (findings.py) has the notes' numbers of each finding beside those found.

A test part of three months is four blocks of the bootstrap. Two years that no network saw are twenty:

    python -m jax_repaint.data.twin --first=17040 --frames=17040 --out=later.nc
    python -m jax_repaint.reproduce --workdir=runs/reproduce_later --fields=later.nc
"""

import dataclasses
import importlib.util
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
from absl import flags, logging
from ml_collections import ConfigDict

from jax_repaint import command, files, findings, levels, model, resumption, sample, scoring, sweep, train
from jax_repaint.cases import block_length, check_unseen, data_of, pick
from jax_repaint.data import readers, twin
from jax_repaint.data.fields import Fields, Split
from jax_repaint.errors import InputError
from jax_repaint.findings import Evidence
from jax_repaint.model import Model, check_same_grid
from jax_repaint.study import Study, open_study

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SCALES = ("cpu", "full")


@dataclasses.dataclass(frozen=True)
class Size:
    """How much of a sweep is run on a CPU; `full` takes 128 frames of each and the members of its file.

    Attributes:
      frames, members: of it.
      file: in configs/sweeps, where it is not the name of the sweep.
      methods: of the points that are kept; empty for all.
    """

    frames: int
    members: int
    file: str = ""
    methods: tuple[str, ...] = ()


SWEEPS = {
    "head_to_head": Size(128, 1),
    "ddpm_vs_gp": Size(128, 1),
    "bulk": Size(128, 1),
    "attention": Size(128, 1),
    "consecutive": Size(128, 1),
    "anneal_floor": Size(128, 1),
    "x0_blend": Size(128, 1),
    "stages": Size(128, 1),
    "gamma": Size(128, 1),
    "two_stage": Size(128, 1),
    "guidance_scale": Size(128, 1),
    "equal_weight": Size(32, 8, "head_to_head", ("gp_init", "adaptive", "uniform")),
    "ensemble_size": Size(16, 8),
    "calls": Size(16, 4),
    "patterns": Size(12, 4),
}
FULL_FRAMES = 128
LEVELS, RESUME = "levels", "resume"  # errors by noise level, continued runs
PARTS = (*SWEEPS, LEVELS, RESUME)
Pair = tuple[str, str]  # folders of a model with attention and of a plain one
# Mean noise weight of `adaptive` from the notes' GP under line:22; `uniform` has it in every missing cell.
MEAN_WEIGHT = 0.335


def read_config(path: Path) -> ConfigDict:
    """The configuration of a file in configs/.

    Raises:
      InputError: it is not there.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing: the experiments are in configs/, beside the package in its repository")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def sweep_config(
    name: str, attention: str, plain: str, scale: str = "cpu", frames: int = 0, again: Sequence[Pair] = (),
    **changes: Any,
) -> ConfigDict:  # fmt: skip
    """The configuration of one of SWEEPS.

    Args:
      attention, plain: folders of the two models; all but the sweep `attention` use the first.
      scale: of SCALES.
      frames: at most so many; 0 for no limit.
      again: the models of other seeds, which the sweep `attention` compares too.
      changes: other settings of points.default_config.
    """
    size = SWEEPS[name]
    config = read_config(CONFIGS / "sweeps" / f"{size.file or name}.py")
    config.model = attention
    config.frames = size.frames if scale == "cpu" else FULL_FRAMES
    config.frames = min(config.frames, frames or config.frames)
    if scale == "cpu":
        config.members = size.members
        config.sizes = tuple(n for n in config.sizes if n < size.members)
    kept = {key: point for key, point in config.points.items() if point.method in (size.methods or (point.method,))}
    if name == "attention":
        kept = _of_pairs(kept, [(attention, plain), *again])
    config.points = ConfigDict(kept)
    for point in config.points.values():
        if point.method == "uniform" and config.prior == "seed_gp":
            point.noise_floor = MEAN_WEIGHT
    config.update(changes)
    return config


def _of_pairs(points: Mapping[str, ConfigDict], pairs: Sequence[Pair]) -> dict[str, Any]:
    """Points of the sweep `attention` for every pair of models."""
    made = {}
    for number, (attention, plain) in enumerate(pairs, start=1):
        for key, point in points.items():
            folder = attention if point.label.startswith("attention") else plain
            made[f"{number}_{key}"] = point.to_dict() | {"model": folder, "label": numbered(point.label, number)}
    return made


def numbered(label: str, number: int) -> str:
    """The label of a point as that of pair `number` of models: "attention, plain" is "attention 2, plain"."""
    return label if number == 1 else label.replace(",", f" {number},", 1)


def check_names(names: Sequence[str]) -> Sequence[str]:
    """The names; raises InputError at one that is not among PARTS."""
    for name in names:
        if name not in PARTS:
            raise InputError(f"{name!r} is not one of {', '.join(PARTS)}")
    return names


def run_sweeps(
    workdir: Path, attention: str, plain: str, names: Sequence[str] = tuple(SWEEPS), scale: str = "cpu",
    frames: int = 0, again: Sequence[Pair] = (), changes: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Runs what is left of the sweeps in WORKDIR/sweeps; a task that several of them have is run once.

    Raises:
      InputError: an unknown name, a folder that holds no model, a workdir that holds other sweeps.
    """
    for name in (name for name in check_names(names) if name in SWEEPS):
        logging.info("sweep %s", name)
        study = open_study(sweep_config(name, attention, plain, scale, frames, again, **(changes or {})))
        folders = [workdir / "sweeps" / other for other in SWEEPS if other != name]
        sweep.run(study, workdir / "sweeps" / name, others=folders)


# --- models ---------------------------------------------------------------------------------------------------


def trained_model(path: Path, workdir: Path, again: int = 0) -> str:
    """Folder of the model that a configuration of configs/ makes; trains what is left of it.

    Args:
      again: added to the seed of the configuration.

    Raises:
      InputError: no such configuration, or `workdir` cannot be used for it.
      Interrupted: SIGTERM stopped the training.
    """
    config, folder = read_config(path), workdir / "model"
    config.train.seed += again
    if (
        _ended(workdir, config.train.epochs)
        and json.loads(json.dumps(config.to_dict())) == model.load(folder).training["config"]
    ):
        return str(folder)
    if train.train(config, workdir) is None:
        raise Interrupted
    return str(folder)


def _ended(workdir: Path, epochs: int) -> bool:
    """Whether the last epoch of a training has its model and its state; the log has it before they are written."""
    log = workdir / "log.csv"
    if not log.exists():
        return False
    rows = files.read_table(log, numbers=["epoch", "step"])
    last = rows.loc[rows["epoch"] >= epochs, "step"]
    return any((workdir / "checkpoints" / "last" / str(step)).is_dir() for step in last)


class Interrupted(Exception):
    """SIGTERM stopped a training, which the same command continues."""


def models_of(
    workdir: Path, named: Sequence[Sequence[str]], configs: Sequence[str], seeds: int = 1, fields: str = ""
) -> list[Pair]:
    """Folders of the models with attention and plain, in pairs: those named, and trained ones where none are.

    Args:
      named: folders with attention, and plain ones.
      configs: of the two kinds.
      seeds: pairs, if no folder is named.
      fields: file of what they are to be tried on, if not on the test part of their data.

    Raises:
      InputError: a folder that holds no model, a configuration that is not there, folders that are no pairs, fields on
        another grid or those of a training.
    """
    if len(configs) != 2 or len({Path(path).stem for path in configs}) != 2:
        raise InputError(f"configs are two files, of the network with attention and of the plain one, got {configs}")
    counts = {len(folders) for folders in named if folders} or {seeds}
    if len(counts) > 1:
        raise InputError(f"models come in pairs, but {' and '.join(str(len(folders)) for folders in named)} are named")
    # Before long work.
    models, untrained = [], []
    for folders, path in zip(named, configs, strict=True):
        models += [model.load(folder) for folder in folders]
        untrained += [] if folders else [read_config(_found(path))]
    if fields:
        _check_fields(readers.read(fields), models, untrained)
    kinds = [
        folders or [_trained(_found(path), workdir, again) for again in range(max(counts))]
        for folders, path in zip(named, configs, strict=True)
    ]
    return list(zip(*kinds, strict=True))


def _trained(path: Path, workdir: Path, again: int) -> str:
    return trained_model(path, workdir / "models" / f"{path.stem}{f'_{again}' if again else ''}", again)


def _check_fields(fields: Fields, models: Sequence[Model], untrained: Sequence[ConfigDict]) -> None:
    """Raises InputError if fields are on another grid than models, trained or not yet, or those of a training."""
    check_unseen(models, fields)
    for one in models:
        check_same_grid(one, fields)
    for config in untrained:
        # Of the twin one frame says where it is.
        own = readers.read(config.data.fields) if config.data.fields else twin.select(np.arange(1))
        check_same_grid(own, fields)
        if own.hash() == fields.hash():
            raise InputError(
                f"{fields.name} is what a model is to be trained on; of its frames only a part is held out"
            )


def _found(path: str) -> Path:
    """A configuration by its path from here or from the repository."""
    return Path(path) if Path(path).is_file() else CONFIGS.parent / path


# --- evidence -------------------------------------------------------------------------------------------------


def gather(
    workdir: Path, attention: str, plain: str, names: Sequence[str], *, scale: str = "cpu", frames: int = 0,
    again: Sequence[Pair] = (), changes: Mapping[str, Any] | None = None, beside: Sequence[str] = (), sigmas: int = 9,
    length: resumption.Length | None = None,
) -> Evidence:  # fmt: skip
    """What the findings are judged by: rows of finished sweeps, errors by noise level, continued runs.

    Args:
      names: among PARTS.
      again: the models of other seeds, of which the losses are shown.
      beside: folders of other models, for the errors by noise level.
      sigmas: noise levels.
      length: of the continued runs.
    """
    options = {"scale": scale, "frames": frames} | dict(changes or {})
    models = {name: model.load(folder) for name, folder in named_models(attention, plain).items()}
    weight, threshold = variance_facts(open_study(sweep_config("head_to_head", attention, plain, **options)))
    denoising, found = {}, None
    if {LEVELS, RESUME} & set(names):
        fields, split = data_of(models["attention"], options.get("fields"), options.get("part", "test"))
    if LEVELS in names:
        others = {f"{one.training['config']['model']['network']}, {one.form}": one for one in map(model.load, beside)}
        denoising = errors_by_level(models | others, fields, split, min(64, frames or 64), sigmas)
    if RESUME in names and options.get("part") == "all":
        # It is trained on, and that data had no part in training.
        fields, split = data_of(models["attention"], None)
    # What is mirrored needs rows that run east.
    if RESUME in names and (fields.gaps or fields.lat.ndim == 2):
        why = "has gaps" if fields.gaps else "lies on a curvilinear grid"
        logging.warning("%s %s, on which no training is continued in wrong ways", fields.name, why)
    elif RESUME in names:
        config = ConfigDict(models["attention"].training["config"])
        found = resumption.run(models["attention"], fields, split, config, workdir / "resume", length)
    return Evidence(
        sweeps={name: pd.read_parquet(workdir / "sweeps" / name / "rows.parquet") for name in names if name in SWEEPS},
        threshold=threshold,
        weight=weight,
        levels=denoising,
        visible=visible_scales(models["attention"]),
        losses={
            name: tuple(one.get(key, math.nan) for key in ("held_out_loss", "held_out_loss_of_linear"))
            for name, folder in named_models(attention, plain, again).items()
            for one in [model.load(folder).training]
        },
        resumption=found,
    )


def errors_by_level(
    models: Mapping[str, Model], fields: Fields, split: Split, frames: int, count: int
) -> dict[str, pd.DataFrame]:
    """levels.table of each model, at `count` levels over all of their ranges and at the last of the notes' steps."""
    numbers = pick(split, frames)
    ends = min(one.sigma[0] for one in models.values()), max(one.sigma[1] for one in models.values())
    last = max(float(one.steps.sigma[-1]) for one in models.values())
    sigmas = np.unique([*np.geomspace(*ends, count), last])
    made = {}
    for name, one in models.items():
        own = sigmas[one.knows(sigmas)]
        errors = levels.denoising_errors(one, fields.select(numbers), numbers, own)
        made[name] = levels.table(errors, own, block_length(split, len(numbers)))
    return made


def variance_facts(study: Study) -> tuple[float, int]:
    """Mean noise weight of `adaptive` on the first case, and the first stage at which its decayed variance is flat."""
    point = next(point for point in study.points if point.method == "adaptive")
    (stage,) = sample.method("adaptive")
    cases = study.maker(point)
    (case,) = cases.make(study.cases[point.consecutive][:1])
    missing = np.broadcast_to(case.known.missing, case.known.prior_variance.shape)
    doubt = sample.doubt(case.known.prior_variance, case.known.missing)
    weight = np.asarray(sample.noise_weight(doubt, case.known.missing, stage.noise_floor, stage.gamma))
    decayed = np.asarray(case.known.prior_variance)[missing]
    stages = 1
    while np.ptp(decayed) >= 1e-12:
        decayed, stages = decayed * np.float32(0.1), stages + 1
    return float(weight[missing].mean()), stages


def visible_scales(trained: Model) -> tuple[float, int, float, int]:
    """Noise level of the last step, EOFs that stand above it, their share of the training variance, EOFs in all."""
    sigma, variance = float(trained.steps.sigma[-1]), np.asarray(trained.gaussian.variance)
    above = variance > sigma**2
    total = variance.sum() + float(trained.gaussian.rest) * 2 * trained.ocean.sum()
    return sigma, int(above.sum()), float(variance[above].sum() / total), len(variance)


def named_models(attention: str, plain: str, again: Sequence[Pair] = ()) -> dict[str, str]:
    """Folders by what the page calls the models."""
    return {
        numbered(f"{kind},", number)[:-1]: folder
        for number, pair in enumerate(((attention, plain), *again), start=1)
        for kind, folder in zip(("attention", "plain"), pair, strict=True)
    }


def about(attention: str, plain: str, command_line: str, again: Sequence[Pair] = (), fields: str = "") -> list[str]:
    """Lines on how the page was made; `fields` names the file of the frames, if they are not of the training's data."""
    lines = []
    for name, folder in named_models(attention, plain, again).items():
        one = model.load(folder)
        size = sum(np.size(leaf) for leaf in jax.tree.leaves(one.params))
        text = one.training
        # An imported checkpoint has not been trained here.
        losses = [
            findings.number(text.get(key, math.nan), ".4g") for key in ("held_out_loss", "held_out_loss_of_linear")
        ]
        steps = f"{text['step']:,}" if "step" in text else scoring.DASH
        network, noise = f"`{text['config']['model']['network']}`", f"{one.sigma[0]:.2g} to {one.sigma[1]:.3g}"
        size = f"{size / 1e6:.2f} million"
        lines.append([name, network, size, one.form, noise, steps, *losses, f"`{model.fingerprint(one)}`"])
    head = ("model", "network", "parameters", "form", "noise", "steps", "held-out loss", "of the Gaussian denoiser",
            "name")  # fmt: skip
    first = model.load(attention)
    sentence = (
        "The notes are the log of the PyTorch experiments that this project began with: RePaint with a UNet of two "
        "components, started from a Gaussian process, with noise that its variance modulates. "
        f"Made by the command below on `{first.training['data']}`. Errors are on unobserved ocean cells of held-out "
        f"frames{f' of `{fields}`, which had no part in training' if fields else ''}; a loss "
        "has the weights of its form, and beside it stands that of the exact Gaussian denoiser. Without --attention "
        "and --plain the command trains the networks first."
    )
    if first.form != "eps":
        sentence += (
            f" The notes' networks predict the noise (form eps); those here are of form {first.form}, on the same 250 "
            "steps where a sampler of the notes uses them."
        )
    return [sentence, f"    {command_line}", findings.markdown(head, lines, words=True)]


FLAGS = flags.FLAGS


def _define_flags() -> None:
    flags.DEFINE_string("workdir", None, "Folder of everything; what is finished in it is not run again.")
    flags.DEFINE_list("attention", [], "Folders of models with attention, one a seed; trained if empty.")
    flags.DEFINE_list("plain", [], "Folders of plain models, as many; trained if empty.")
    flags.DEFINE_list(
        "configs", ["configs/micro_attn.py", "configs/micro.py"], "Configurations of the two, with attention first."
    )
    flags.DEFINE_integer("seeds", 2, "Seeds that each of the two is trained from if no folder is named.", lower_bound=1)
    flags.DEFINE_enum("scale", "cpu", SCALES, "full: 128 frames and all members everywhere, for a GPU.")
    flags.DEFINE_integer("frames", 0, "At most so many frames; 0 for no limit.", lower_bound=0)
    flags.DEFINE_integer(
        "resume_epochs", resumption.Length.before, "Epochs of 200 steps at a constant rate that the runs of the part "
        "resume go on from.", lower_bound=1,
    )  # fmt: skip
    flags.DEFINE_list("only", [], f"Parts among {', '.join(PARTS)}; all if empty.")
    flags.DEFINE_string("fields", "", "File, none of whose frames had a part in training, to inpaint those of instead.")
    flags.DEFINE_list("beside", [], "Folders of other models, whose errors by noise level are shown too.")
    page = "The page (.md), with pictures beside; by default WORKDIR/reproduction.md, of parts reproduction_PARTS.md."
    flags.DEFINE_string("out", "", page)
    flags.mark_flag_as_required("workdir")


def main(_) -> None:
    """Runs what is left, writes the page and prints the verdicts."""
    workdir = Path(FLAGS.workdir)
    names = check_names(FLAGS.only or PARTS)
    # The page of all parts stays.
    parts = names if set(names) < set(PARTS) else ()
    out = Path(FLAGS.out or workdir / ("_".join(["reproduction", *parts]) + ".md"))
    files.check_writable(out, (".md",))
    for folder in FLAGS.beside:
        model.load(folder)
    folders = FLAGS.attention, FLAGS.plain
    try:
        (attention, plain), *again = models_of(workdir, folders, FLAGS.configs, FLAGS.seeds, FLAGS.fields)
    except Interrupted:
        print(f"stopped; the same command continues from {workdir}")
        sys.exit(143)
    changes = {"fields": FLAGS.fields, "part": "all"} if FLAGS.fields else {}
    options = {"scale": FLAGS.scale, "frames": FLAGS.frames, "again": again, "changes": changes}
    run_sweeps(workdir, attention, plain, names, **options)
    length = resumption.Length(before=FLAGS.resume_epochs)
    evidence = gather(workdir, attention, plain, names, **options, beside=FLAGS.beside, length=length)
    named = ("scale", "frames", "resume_epochs", "only", "attention", "plain", "configs", "seeds", "fields", "beside")
    given = {name: FLAGS[name].serialize() for name in named if FLAGS[name].value != FLAGS[name].default}
    line = " ".join(["python -m jax_repaint.reproduce --workdir=WORKDIR", *given.values()])
    verdicts = findings.write(evidence, out, about(attention, plain, line, again, Path(FLAGS.fields).name))
    width = max(map(len, verdicts), default=0)
    for title, judged in verdicts.items():
        print(f"{title:<{width}}  {judged}")
    print(f"\nwrote {out}")


if __name__ == "__main__":
    _define_flags()
    command.run(main)
