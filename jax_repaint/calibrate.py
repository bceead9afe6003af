"""Learns how the ensembles of one method are to be corrected, and stores it with the model.

    python -m jax_repaint.calibrate --model=runs/small/model --method=kalman --members=16 --frames=64

The method inpaints frames of the validation part of the model's split; what it learns from them, `calibration.py` says.
Test frames take no part. The validation part has served before, to choose the best weights, three numbers of the linear
prior and, for methods that start from a regression, those of every pattern's (prior/ridge.py), which is a small leak.
Frames count as independent in blocks of time that are as long as it takes the errors of the linear estimate to be
forgotten, with the pattern where that takes longest; `--block` sets another length.
With --fields=FILE --part=all it learns from a whole file of which no frame had a part in training; what is evaluated
later should not be of that file.

`evaluate` and `inpaint` use a calibration for ensembles of the same method and size, unless they are told --raw. A
model has one for each method and size: a new one replaces it, but one from more blocks of time only with --replace. The
method of the first is the default of `inpaint`, until --default names another. Stopped, the same command goes on with
what MODEL/unfinished_* holds.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from absl import flags, logging

from jax_repaint import SHIPPED, calibration, command, device, files, gains, locks, methods, metrics, model, observe
from jax_repaint.calibration import Calibration
from jax_repaint.cases import OBSERVATION_ERROR, data_of, make_cases, observation_of, prior_of
from jax_repaint.data.fields import Fields, Split
from jax_repaint.ensemble import frame_batches
from jax_repaint.errors import InputError
from jax_repaint.model import Model
from jax_repaint.unfinished import Unfinished

METHODS = tuple(name for name in methods.METHODS if name not in (*methods.DETERMINISTIC, "ridge"))
RECORD = 1024  # frames at most whose linear estimate is made, to see how long its errors last


def pick(split: Split, frames: int, seed: int = 0) -> np.ndarray:
    """Numbers of `frames` validation frames, drawn without replacement, in the order of time."""
    count = min(frames, split.validation.size)
    return np.sort(np.random.default_rng([seed, 0xCB]).choice(split.validation, count, replace=False))


def block_length(trained: Model, fields: Fields, pattern: str, seed: int = 0, numbers: np.ndarray | None = None) -> int:
    """Frames in blocks of time that can pass for independent: of the logarithm of the linear estimate's error.

    The currents themselves are no measure: tides come back for months, the errors of an estimate do not.

    Args:
      fields: frames in the order of time; the first 1,024 are used.
      numbers: theirs in the series, in which blocks are counted; consecutive if None.
      pattern: of the observations, the same in all frames but for their gaps.

    Raises:
      InputError: the pattern does not fit, or meets cells with values in fewer than two frames.
    """
    fields = fields.select(slice(RECORD))
    observed = observe.parse(pattern, fields.ocean, observe.pattern_rng(seed, 0))
    errors, gappy = [], fields.gaps > 0
    if not gappy:
        (case,) = make_cases(trained, fields.select([0]), [0], [pattern], seed)
    for frame, velocity in enumerate(fields.velocity):
        if gappy:
            present = fields.ocean & np.isfinite(velocity).all(-1)
            if not ((present & observed).any() and (present & ~observed).any()):
                errors.append(np.nan)
                continue
            # Gaps make a pattern of its own, and an analysis, of every frame.
            (case,) = make_cases(trained, fields.select([frame]), [0], [pattern], seed)
        else:
            case = dataclasses.replace(case, observation=observation_of(trained, velocity, observed))
        scored = metrics.scored_cells(velocity, fields.ocean, observed)
        errors.append(metrics.mse(prior_of(trained, case)[0], velocity, scored))
    if (count := np.isfinite(errors).sum()) < 2:
        raise InputError(f"{fields.name}: {pattern} meets cells with values in {count} frames; two are needed")
    at = np.arange(len(errors)) if numbers is None else np.asarray(numbers)[: len(errors)]
    series = np.full(at[-1] - at[0] + 1, np.nan)
    series[at - at[0]] = np.log(errors)
    return calibration.independent_length(series)


def learn(
    trained: Model,
    fields: Fields,
    numbers: Sequence[int],
    patterns: Sequence[str],
    name: str,
    *,
    block: int,
    members: int = 16,
    seed: int = 0,
    chunk: int | None = None,
    gate: bool = False,
    error: float = OBSERVATION_ERROR,
    unfinished: Unfinished | None = None,
) -> Calibration:
    """Inpaints and learns.

    Args:
      fields: calibration frames, `numbers` theirs in the series.
      name: of the method, one of METHODS.
      block: frames of the series in a block of time.
      gate: also learns a weight for single frames, which takes a second run without a tenth of the observations.
      error: standard error of the observations, m/s; 0 for the true values, which methods take to be off by
        OBSERVATION_ERROR.
      unfinished: keeps the members of a batch until it is told to remove them.

    Raises:
      InputError: a method without an ensemble, members without a spread, patterns or fields that cannot be used,
        frames from less than two blocks whose members are finite.
    """
    check(name, members, block)
    blocks = blocks_of(numbers, block)
    if blocks < 2:
        raise InputError(f"{len(numbers)} frames in blocks of {block} frames are one block of time; two are needed")
    if blocks < calibration.BLOCKS_TO_PROMISE:
        logging.warning(
            "%d blocks of time: intervals will be those of Gaussian members; %d blocks allow a promise",
            blocks, calibration.BLOCKS_TO_PROMISE,
        )  # fmt: skip
    patterns = list(dict.fromkeys(patterns))
    cases = make_cases(trained, fields, numbers, patterns, seed, error or None)
    whole, made, evidence = [], [], []
    chunk = chunk or device.usual_batch()
    rows = [gains.rows_of(trained.gaussian, case.observation) for case in cases]
    batches = list(frame_batches(rows, members, chunk, trained.gaussian, methods.LEVELS))
    if unfinished:
        unfinished.begin(trained, {
            "fields": fields.hash(), "numbers": list(map(int, numbers)), "patterns": patterns,
            "members": members, "seed": int(seed), "error": float(error),
            "batches": [list(map(int, batch)) for batch in batches],
        })  # fmt: skip
    with command.bar(len(cases), name, "field") as bar:
        for number, batch in enumerate(batches):
            mine = [cases[i] for i in batch]
            make = partial(methods.run_method, name, trained, fields, mine, members, seed, chunk)
            ensembles = (unfinished.made(name, number, len(mine), make) if unfinished else make()).members
            # A batch that is filled up has its last case more than once.
            found = list(zip(mine, ensembles, strict=True))[: len(set(batch))]
            for case, ensemble in found:
                if len(ensemble) < members:
                    logging.warning("frame %d with %s is left out, as members of it failed", case.frame, case.pattern)
            kept = [(case, ensemble) for case, ensemble in found if len(ensemble) == members]
            whole += [case for case, _ in kept]
            made += [ensemble for _, ensemble in kept]
            if gate and kept:
                some = [case for case, _ in kept]
                keep = partial(unfinished.made, f"{name}{methods.HELD_OUT}", number) if unfinished else None
                evidence += methods.gate_evidence(name, trained, fields, some, members, seed, chunk, keep)
            bar.update(len(found))
    if len({case.frame // block for case in whole}) < 2:
        raise InputError(f"members of {name} failed in all fields but those of one block of time; two are needed")
    priors = [prior_of(trained, case) for case in whole]
    return calibration.fit(
        [case.truth for case in whole],
        [mean for mean, _ in priors],
        [variance for _, variance in priors],
        made,
        [metrics.scored_cells(case.truth, fields.ocean, case.observed) for case in whole],
        [case.frame // block for case in whole],
        method=name,
        antithetic=name in methods.PAIRED,
        patterns=patterns,
        seed=seed,
        error=float(error),
        evidence=evidence if gate else None,
    )


def check(name: str, members: int, block: int) -> None:
    """Raises InputError at a method without an ensemble, too few members for a spread, an empty block."""
    if name not in METHODS:
        raise InputError(f"method {name!r} cannot be calibrated; those with an ensemble are {', '.join(METHODS)}")
    methods.check_methods([name], members)
    least = metrics.least_members(name in methods.PAIRED)
    if members < least:
        raise InputError(f"the spread of {name} needs {least} members or more, got {members}")
    if block < 1:
        raise InputError(f"a block of time has at least one frame, got {block}")


def blocks_of(numbers: Sequence[int], block: int) -> int:
    """Blocks of time that frames of the series, by their numbers, are of."""
    return np.unique(np.asarray(numbers) // block).size


def check_replaced(old: Calibration | None, blocks: int) -> None:
    """Whether a calibration from `blocks` blocks of time may take an old one's place unasked.

    Raises:
      InputError: the old one rests on more blocks of time, by more than a tenth.
    """
    # Frames of other draws, or blocks of another length, are some more or fewer.
    if old is not None and old.blocks > 1.1 * blocks:
        raise InputError(
            f"the model has a calibration from more blocks of time, {words_of(old)}, than the {blocks} of this one; "
            "calibrate a copy of the model, take more --frames, or say --replace"
        )


def words_of(old: Calibration) -> str:
    """Such as "16 members of kalman from 384 fields in 124 blocks"."""
    return f"{old.members} members of {old.method} from {old.frames} fields in {old.blocks} blocks"


FLAGS = flags.FLAGS


def _define_flags() -> None:
    flags.DEFINE_string("model", None, "Folder of a model, as training writes it.")
    flags.DEFINE_string("fields", None, "File of fields; by default those that the model was trained on.")
    flags.DEFINE_string(
        "method", None, f"Among {', '.join(METHODS)}; by default that of the model's first calibration, or else kalman."
    )
    flags.DEFINE_integer("members", 16, "Members of the ensembles that the calibration is for.", lower_bound=2)
    flags.DEFINE_enum(
        "part", "validation", ("validation", "all"), "What the frames are drawn from: the validation part, or all of "
        "--fields, a file of which no frame had a part in training."
    )  # fmt: skip
    flags.DEFINE_integer("frames", 64, "Validation frames to inpaint, drawn at random.", lower_bound=2)
    flags.DEFINE_list(
        "patterns", [], "Observation patterns, such as line:22,walk:90,cells:0.02; by default the model's."
    )
    flags.DEFINE_integer("block", None, "Frames in a block of time; by default measured.", lower_bound=1)
    flags.DEFINE_float(
        "error", OBSERVATION_ERROR, "Standard error in m/s of the observations, which get errors of that size; 0 for "
        f"true values, which methods take to be off by {OBSERVATION_ERROR}.", lower_bound=0.0,
    )  # fmt: skip
    flags.DEFINE_bool("gate", False, "Also learn a weight for single frames; twice the work, here and in use.")
    flags.DEFINE_bool("replace", False, "Replace a calibration from more blocks of time, too.")
    flags.DEFINE_bool("default", False, "Make the method the default of inpaint, as that of the first calibration is.")
    flags.DEFINE_integer("seed", 0, "Of frames, patterns and members.", lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_integer("chunk", None, "Members sampled at a time; by default what pays on the device.", lower_bound=1)
    flags.mark_flag_as_required("model")


def main(_) -> None:
    """Calibrates a model."""
    trained = model.load(FLAGS.model)
    name = FLAGS.method or (trained.calibrations[0].method if trained.calibrations else "kalman")
    check(name, FLAGS.members, FLAGS.block or 1)
    if name in methods.POSTERIOR:
        methods.levels_of(trained, name)
    if FLAGS.model == SHIPPED:
        raise InputError(f"{SHIPPED} is the model in the package; calibrate a copy of its folder")
    files.check_writable(f"{FLAGS.model}/{model.DESCRIPTION}")
    fields, split = data_of(trained, FLAGS.fields, FLAGS.part)
    patterns = FLAGS.patterns or trained.patterns
    series = fields.select(split.validation)
    # Fields of all patterns are learnt from: those whose errors last longest say what is independent.
    lengths = (block_length(trained, series, pattern, FLAGS.seed, split.validation) for pattern in patterns)
    block = FLAGS.block or max(lengths)
    numbers = pick(split, FLAGS.frames, FLAGS.seed)
    logging.info("%d frames in blocks of %d frames", numbers.size, block)
    if not FLAGS.replace:
        check_replaced(calibration.find(trained.calibrations, name, FLAGS.members), blocks_of(numbers, block))
    unfinished = Unfinished(Path(FLAGS.model) / "unfinished")
    learnt = learn(
        trained, fields.select(numbers), numbers, patterns, name,
        block=block, members=FLAGS.members, seed=FLAGS.seed, chunk=FLAGS.chunk, gate=FLAGS.gate,
        error=FLAGS.error, unfinished=unfinished,
    )  # fmt: skip
    if FLAGS.gate and learnt.gate is None:
        logging.warning("the gate does not lower the error of blocks that it was not learnt from, and is not kept")
    print(learnt.describe())
    with locks.in_turn(FLAGS.model):
        # Another command may have put one there since, and a training that goes on another model.
        now = model.load(FLAGS.model)
        if model.fingerprint(now) != model.fingerprint(trained):
            raise InputError(
                f"{FLAGS.model} holds another model than when this began; calibrate it when its training is over"
            )
        old = calibration.find(now.calibrations, name, FLAGS.members)
        if not FLAGS.replace:
            check_replaced(old, learnt.blocks)
        if old is not None:
            logging.warning("replaces the calibration for %s by one for %s", words_of(old), words_of(learnt))
        model.store_calibration(FLAGS.model, learnt, FLAGS.default)
    unfinished.remove()
    print(f"\nstored in {FLAGS.model}")
    default = model.load(FLAGS.model).calibrations[0].method
    if default != name:
        print(f"inpaint takes {default} by default; --default makes it {name}")


if __name__ == "__main__":
    _define_flags()
    command.run(main)
