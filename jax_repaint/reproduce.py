"""Does the experiments of the notes again, and says of each finding whether it holds.

    python -m jax_repaint.reproduce --workdir=runs/reproduce
    python -m jax_repaint.reproduce --workdir=runs/reproduce --scale=full --configs=configs/attn.py,configs/standard.py

Two networks, with attention and plain, are trained in WORKDIR/models unless folders of models are named. The sweeps of
configs/sweeps run in WORKDIR/sweeps, and a training that goes on in wrong and right ways (resumption.py) in
WORKDIR/resume. Started again, it goes on where it was. The page (findings.py) has the notes' numbers of each finding
beside those found.
"""

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
from absl import flags, logging
from ml_collections import ConfigDict

from jax_repaint import command, evaluate, files, findings, levels, model, resumption, sample, sweep, train
from jax_repaint.data.fields import Fields, Split
from jax_repaint.errors import InputError
from jax_repaint.findings import Evidence
from jax_repaint.model import Model
from jax_repaint.study import Cases, Study, open_study

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
    "ddpm_vs_gp": Size(16, 1),
    "bulk": Size(32, 1),
    "attention": Size(32, 1),
    "consecutive": Size(16, 1),
    "anneal_floor": Size(32, 1),
    "x0_blend": Size(32, 1),
    "stages": Size(24, 1),
    "gamma": Size(16, 1),
    "two_stage": Size(32, 1),
    "guidance_scale": Size(32, 1),
    "equal_weight": Size(16, 8, "head_to_head", ("gp_init", "adaptive", "uniform")),
    "ensemble_size": Size(8, 8),
    "calls": Size(4, 4),
    "patterns": Size(4, 4),
}
FULL_FRAMES = 128
LEVELS, RESUME = "levels", "resume"  # errors by noise level, continued runs
PARTS = (*SWEEPS, LEVELS, RESUME)
# Mean noise weight of `adaptive` from the notes' GP under line:22; `uniform` has it in every missing cell.
MEAN_WEIGHT = 0.303


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
    name: str, attention: str, plain: str, scale: str = "cpu", frames: int = 0, **changes: Any
) -> ConfigDict:
    """The configuration of one of SWEEPS.

    Args:
      attention, plain: folders of the two models; all but the sweep `attention` use the first.
      scale: of SCALES.
      frames: at most so many; 0 for no limit.
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
    config.points = ConfigDict(kept)
    for point in config.points.values():
        if name == "attention":
            point.model = attention if point.label.startswith("attention") else plain
        if point.method == "uniform" and config.prior == "seed_gp":
            point.noise_floor = MEAN_WEIGHT
    config.update(changes)
    return config


def check_names(names: Sequence[str]) -> Sequence[str]:
    """The names; raises InputError at one that is not among PARTS."""
    for name in names:
        if name not in PARTS:
            raise InputError(f"{name!r} is not one of {', '.join(PARTS)}")
    return names


def run_sweeps(
    workdir: Path, attention: str, plain: str, names: Sequence[str] = tuple(SWEEPS), scale: str = "cpu",
    frames: int = 0, changes: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Runs what is left of the sweeps in WORKDIR/sweeps.

    Raises:
      InputError: an unknown name, a folder that holds no model, a workdir that holds other sweeps.
    """
    for name in (name for name in check_names(names) if name in SWEEPS):
        logging.info("sweep %s", name)
        study = open_study(sweep_config(name, attention, plain, scale, frames, **(changes or {})))
        sweep.run(study, workdir / "sweeps" / name)


# --- models ---------------------------------------------------------------------------------------------------


def trained_model(path: Path, workdir: Path) -> str:
    """Folder of the model that a configuration of configs/ makes; trains what is left of it.

    Raises:
      InputError: no such configuration, or `workdir` cannot be used for it.
      Interrupted: SIGTERM stopped the training.
    """
    config, folder = read_config(path), workdir / "model"
    log = workdir / "log.csv"
    ended = log.exists() and (pd.read_csv(log)["epoch"] >= config.train.epochs).any()
    if ended and json.loads(json.dumps(config.to_dict())) == model.load(folder).training["config"]:
        return str(folder)
    if train.train(config, workdir) is None:
        raise Interrupted
    return str(folder)


class Interrupted(Exception):
    """SIGTERM stopped a training, which the same command continues."""


def models_of(workdir: Path, named: Sequence[str], configs: Sequence[str]) -> tuple[str, str]:
    """Folders of the models with attention and plain: those named, and trained ones for empty names.

    Raises:
      InputError: a folder that holds no model, a configuration that is not there.
    """
    if len(configs) != 2 or len({Path(path).stem for path in configs}) != 2:
        raise InputError(f"configs are two files, of the network with attention and of the plain one, got {configs}")
    for folder, path in zip(named, configs, strict=True):
        # Before long work.
        if folder:
            model.load(folder)
        else:
            read_config(_found(path))
    attention, plain = (
        folder or trained_model(_found(path), workdir / "models" / Path(path).stem)
        for folder, path in zip(named, configs, strict=True)
    )
    return attention, plain


def _found(path: str) -> Path:
    """A configuration by its path from here or from the repository."""
    return Path(path) if Path(path).is_file() else CONFIGS.parent / path


# --- evidence -------------------------------------------------------------------------------------------------


def gather(
    workdir: Path, attention: str, plain: str, names: Sequence[str], *, scale: str = "cpu", frames: int = 0,
    changes: Mapping[str, Any] | None = None, beside: Sequence[str] = (), sigmas: int = 9,
    length: resumption.Length | None = None,
) -> Evidence:  # fmt: skip
    """What the findings are judged by: rows of finished sweeps, errors by noise level, continued runs.

    Args:
      names: among PARTS.
      beside: folders of other models, for the errors by noise level.
      sigmas: noise levels.
      length: of the continued runs.
    """
    options = {"scale": scale, "frames": frames} | dict(changes or {})
    models = {"attention": model.load(attention), "plain": model.load(plain)}
    weight, threshold = variance_facts(open_study(sweep_config("head_to_head", attention, plain, **options)))
    denoising, found = {}, None
    if {LEVELS, RESUME} & set(names):
        fields, split = evaluate.data_of(models["attention"], options.get("fields"))
    if LEVELS in names:
        others = {f"{one.training['config']['model']['network']}, {one.form}": one for one in map(model.load, beside)}
        denoising = errors_by_level(models | others, fields, split, min(64, frames or 64), sigmas)
    if RESUME in names:
        config = ConfigDict(models["attention"].training["config"])
        found = resumption.run(models["attention"], fields, split, config, workdir / "resume", length)
    return Evidence(
        sweeps={name: pd.read_parquet(workdir / "sweeps" / name / "rows.parquet") for name in names if name in SWEEPS},
        threshold=threshold,
        weight=weight,
        levels=denoising,
        visible=visible_scales(models["attention"]),
        losses={
            name: (one.training["held_out_loss"], one.training["held_out_loss_of_linear"])
            for name, one in models.items()
        },
        resumption=found,
    )


def errors_by_level(
    models: Mapping[str, Model], fields: Fields, split: Split, frames: int, count: int
) -> dict[str, pd.DataFrame]:
    """levels.table of each model, at `count` levels over all of their ranges and at the last of the notes' steps."""
    numbers = evaluate.pick(split, frames)
    ends = min(one.sigma[0] for one in models.values()), max(one.sigma[1] for one in models.values())
    last = max(float(one.steps.sigma[-1]) for one in models.values())
    sigmas = np.unique([*np.geomspace(*ends, count), last])
    made = {}
    for name, one in models.items():
        own = sigmas[(sigmas >= 0.999 * one.sigma[0]) & (sigmas <= 1.001 * one.sigma[1])]
        errors = levels.denoising_errors(one, fields.select(numbers), numbers, own)
        made[name] = levels.table(errors, own, evaluate.block_length(split, len(numbers)))
    return made


def variance_facts(study: Study) -> tuple[float, int]:
    """Mean noise weight of `adaptive` on the first case, and the first stage at which its decayed variance is flat."""
    point = next(point for point in study.points if point.method == "adaptive")
    (stage,) = sample.method("adaptive")
    cases = Cases(study, study.models[point.model], point.prior)
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


def about(attention: str, plain: str, command_line: str) -> list[str]:
    """Lines on how the page was made."""
    lines = []
    for name, folder in (("attention", attention), ("plain", plain)):
        one = model.load(folder)
        size = sum(np.size(leaf) for leaf in jax.tree.leaves(one.params))
        text = one.training
        losses = [f"{text[key]:.4g}" for key in ("held_out_loss", "held_out_loss_of_linear")]
        network, noise = f"`{text['config']['model']['network']}`", f"{one.sigma[0]:.2g} to {one.sigma[1]:.3g}"
        size = f"{size / 1e6:.2f} million"
        lines.append(
            [name, network, size, one.form, noise, f"{text['step']:,}", *losses, f"`{model.fingerprint(one)}`"]
        )
    head = ("model", "network", "parameters", "form", "noise", "steps", "held-out loss", "of the Gaussian denoiser",
            "name")  # fmt: skip
    first = model.load(attention)
    sentence = (
        f"Made by the command below on `{first.training['data']}`. Errors are on unobserved ocean cells of held-out "
        "frames; a loss has the weights of its form, and beside it stands that of the exact Gaussian denoiser. Without "
        "--attention and --plain the command trains both networks first."
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
    flags.DEFINE_string("attention", "", "Folder of the model with attention; trained if empty.")
    flags.DEFINE_string("plain", "", "Folder of the plain model; trained if empty.")
    flags.DEFINE_list(
        "configs", ["configs/micro_attn.py", "configs/micro.py"], "Configurations of the two, with attention first."
    )
    flags.DEFINE_enum("scale", "cpu", SCALES, "full: 128 frames and all members everywhere, for a GPU.")
    flags.DEFINE_integer("frames", 0, "At most so many frames; 0 for no limit.", lower_bound=0)
    flags.DEFINE_list("only", [], f"Parts among {', '.join(PARTS)}; all if empty.")
    flags.DEFINE_list("beside", [], "Folders of other models, whose errors by noise level are shown too.")
    flags.DEFINE_string("out", "", "The page (.md); by default WORKDIR/reproduction.md. Its pictures lie beside it.")
    flags.mark_flag_as_required("workdir")


def main(_) -> None:
    """Runs what is left, writes the page and prints the verdicts."""
    workdir = Path(FLAGS.workdir)
    out = Path(FLAGS.out or workdir / "reproduction.md")
    names = check_names(FLAGS.only or PARTS)
    files.check_writable(out, (".md",))
    for folder in FLAGS.beside:
        model.load(folder)
    try:
        attention, plain = models_of(workdir, (FLAGS.attention, FLAGS.plain), FLAGS.configs)
    except Interrupted:
        print(f"stopped; the same command continues from {workdir}")
        sys.exit(143)
    run_sweeps(workdir, attention, plain, names, FLAGS.scale, FLAGS.frames)
    evidence = gather(workdir, attention, plain, names, scale=FLAGS.scale, frames=FLAGS.frames, beside=FLAGS.beside)
    named = ("scale", "frames", "only", "attention", "plain", "configs", "beside")
    options = {name: FLAGS[name].serialize() for name in named if FLAGS[name].value != FLAGS[name].default}
    line = " ".join(["python -m jax_repaint.reproduce --workdir=WORKDIR", *options.values()])
    verdicts = findings.write(evidence, out, about(attention, plain, line))
    width = max(map(len, verdicts), default=0)
    for title, judged in verdicts.items():
        print(f"{title:<{width}}  {judged}")
    print(f"\nwrote {out}")


if __name__ == "__main__":
    _define_flags()
    command.run(main)
