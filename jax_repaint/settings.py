"""Every setting of a training with its default, and which values work; configs/ changes what is an experiment's."""

import dataclasses
import math

from ml_collections import ConfigDict

from jax_repaint import model, observe
from jax_repaint.checks import check_complete
from jax_repaint.errors import InputError
from jax_repaint.nets import unet

SIGMAS = (1e-6, 1e6)  # noise levels whose fourth power float32 can still hold


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
                # Observations that the linear prior is chosen for, such as "gaps:0.3"; empty: a line, a walk and cells.
                "patterns": "",
                "gp_steps": 200,  # of fitting the GP that stands in tables beside the network
                # Whether the model keeps some frames, by their coefficients in the EOFs, for the method kalman_ridge.
                "archive": True,
            },
            "noise": {
                "steps": 250,
                "min_beta": 1e-4,
                "max_beta": 0.02,
                # Of all forms but eps, whose levels are those of the steps.
                "sigma_min": 0.01,
                "sigma_max": 130.0,
            },
            # What a conditional denoiser is given in training; the error is also that of model.patterns.
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
    """Raises InputError at a value that cannot work, or where `config` is of something else than a training."""
    check_complete(config.to_dict(), default_config().to_dict(), "training")
    t, m, n = config.train, config.model, config.noise
    check_split(config.data)
    if m.network not in unet.NETWORKS:
        raise InputError(f"model.network {m.network!r} is not one of {', '.join(unet.NETWORKS)}")
    if m.form not in model.FORMS:
        raise InputError(f"model.form {m.form!r} is not one of {', '.join(model.FORMS)}")
    for name in ("epochs", "batch", "accumulate", "dispatch", "score_every", "keep"):
        if t[name] < 1:
            raise InputError(f"train.{name} must be at least 1, got {t[name]}")
    if not 0 <= t.seed < 2**32:
        raise InputError(f"train.seed must be in 0 to 2^32 - 1, got {t.seed}")
    if config.data.twin_seed < 0:
        raise InputError(f"data.twin_seed must be 0 or more, got {config.data.twin_seed}")
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
    for name in ("rank", "gp_steps"):
        if m[name] < 1:
            raise InputError(f"model.{name} must be at least 1, got {m[name]}")
    for spec in observe.patterns_of(m.patterns):
        observe.read_pattern(spec)
    model.make_schedule(dict(n))
    network_config(config)
    if config.tensorboard:
        tensorboard()


def check_split(data: ConfigDict) -> None:
    """Raises InputError where `data` says in two ways how frames are to be split."""
    usual = default_config().data
    given = [name for name in ("train", "validation", "test") if data[name] != usual[name]]
    if data.block_split and given:
        raise InputError(f"data.block_split makes parts of its own; leave data.{given[0]} out, or block_split")


def tensorboard() -> type:
    """The writer of TensorBoard's logs.

    Raises:
      InputError: the extra that has it is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as e:
        raise InputError("tensorboard=True needs the extra: pip install 'jax-repaint[tensorboard]'") from e
    return SummaryWriter


def network_config(config: ConfigDict) -> unet.UNetConfig:
    """The named network for a form: those on the linear estimate see it, and a conditional one what is observed."""
    named = unet.NETWORKS[config.model.network]
    return dataclasses.replace(
        named,
        dtype=config.model.dtype,
        inputs=model.INPUTS[config.model.form],
        zero_output=named.zero_output or config.model.form in ("anchored", "conditional"),
    )


def sigma_range(config: ConfigDict) -> tuple[float, float]:
    """Smallest and largest noise level that the network has seen."""
    if config.model.form == "eps":
        sigma = model.make_schedule(dict(config.noise)).sigma
        return float(sigma[0]), float(sigma[-1])
    return float(config.noise.sigma_min), float(config.noise.sigma_max)
