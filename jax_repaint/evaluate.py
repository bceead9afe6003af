"""Inpaints held-out fields by several methods and compares them.

    python -m jax_repaint.evaluate --model=runs/small/model --frames=64 --out=results

Unless --methods names others, these baselines stand beside them: the mean of the training frames (climatology), the
Gaussian process of earlier results (seed_gp), one fitted to the training frames (gp), the best linear estimate from
their covariance (linear) and samples of its posterior (linear_samples). The networks' methods start from the linear
estimate. A ratio compares ensemble mean with ensemble mean, over the same frames, against the best of the baselines.

The model's frames are split again as in its training; the frames that are scored are drawn from the test part, or with
--fields=FILE --part=all from a whole file of which no frame had a part in training, such as another season. To choose a
method or a setting, take --part=validation, so that the test part stays unseen. A method that the model has a
calibration for has two rows, as it is and calibrated; --raw leaves the second out, as does the validation part, which
calibrations are learnt on.
Stopped or killed, the same command goes on with the fields that it had not done. In --out it replaces what an earlier
evaluation wrote, and nothing else.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import h5netcdf
import numpy as np
import xarray as xr
from absl import flags, logging

from jax_repaint import calibration, command, details, device, files, inpaint, metrics, model, plots, scoring
from jax_repaint.calibration import Calibration
from jax_repaint.cases import (
    OBSERVATION_ERROR,
    Case,
    block_length,
    data_of,
    files_of,
    make_cases,
    note_on,
    pick,
    prior_of,
    with_directions,
)
from jax_repaint.data import readers
from jax_repaint.data.fields import Fields
from jax_repaint.data.probe import check_hdf5
from jax_repaint.errors import InputError
from jax_repaint.methods import (
    BASELINES,
    DETERMINISTIC,
    HELD_OUT,
    METHODS,
    POSTERIOR,
    REPAINT,
    Result,
    check_archive,
    check_methods,
    correction_of,
    gate_evidence,
    levels_of,
    run_method,
    stages_of,
)
from jax_repaint.model import Model
from jax_repaint.unfinished import Unfinished

# The first columns of each table.
TABLES = {
    "table.csv": "pattern,method,frames,members,",
    "frames.csv": "pattern,frame,time,method,",
    "details.csv": "pattern,method,energy_score,",
}
FIELDS, FIGURE = "fields.nc", "figure.png"
TRUTH = "eastward_sea_water_velocity_truth"  # a variable of these files of fields alone
PART = 16  # cases of a network's method that are kept together when they are done


def calibrated(
    trained: Model, learnt: Calibration, fields: Fields, cases: Sequence[Case], result: Result, seed: int = 0,
    chunk: int | None = None, unfinished: Unfinished | None = None,
) -> Result:  # fmt: skip
    """What a calibration makes of the raw result of its method; with a gate, after a second run.

    Args:
      unfinished: has what of the second run is done.

    Raises:
      InputError: ensembles of another size than it was learnt with.
    """
    began = time.monotonic()
    gates, calls = [1.0] * len(cases), result.calls
    if learnt.gate is not None:
        evidence, size = [], _part_size(learnt.method, len(cases), learnt.members, chunk)
        for first in range(0, len(cases), size):
            keep = partial(unfinished.made, f"{learnt.method}{HELD_OUT}", first) if unfinished else None
            some = cases[first : first + size]
            evidence += gate_evidence(learnt.method, trained, fields, some, learnt.members, seed, chunk, keep)
        gates, calls = [learnt.gate.of(one) for one in evidence], 2 * calls
    members, intervals = [], []
    for case, made, gate in zip(cases, result.members, gates, strict=True):
        mean, variance = prior_of(trained, case)
        members.append(learnt.apply(mean, variance, made, gate, case.observed))
        intervals.append(learnt.interval(variance, members[-1]))
    seconds = result.seconds + (time.monotonic() - began) / len(cases)
    return Result(members, seconds, calls, result.antithetic, intervals)


def calibrations_for(trained: Model, methods: Sequence[str], members: int) -> dict[str, Calibration]:
    """Those of the model that apply, by method; a warning where a method has one for another number of members."""
    made = {name: calibration.find(trained.calibrations, name, members) for name in methods}
    others = [one for one in trained.calibrations if one.method in methods and made[one.method] is None]
    if others:
        logging.warning(
            "the model's calibration is for %s, not for %d, and is not used", calibration.sizes(others), members
        )
    return {name: learnt for name, learnt in made.items() if learnt is not None}


def calibrated_name(method: str) -> str:
    """Of the row of calibrated ensembles of a method."""
    return f"{method}_calibrated"


def usual_methods(trained: Model, other_prior: bool = False) -> list[str]:
    """The baselines, adaptive, kalman and the default of `inpaint`; with another prior, where that needs its own, what
    it corrects by.
    """
    default = inpaint.default_method(trained)
    named = default
    if other_prior:
        named = "kalman" if default == "given" else correction_of(default)
    return list(dict.fromkeys((*BASELINES, "adaptive", "kalman", named)))


def _score(case: Case, result: Result, i: int, size: int, ocean: np.ndarray) -> scoring.FrameScores:
    scored = metrics.scored_cells(case.truth, ocean, case.observed)
    score = scoring.score(case.truth, result.members[i][:size], scored, ocean, antithetic=result.antithetic)
    if result.intervals is None:
        return score
    low, high = result.intervals[i]
    inside = (low <= case.truth) & (case.truth <= high)
    return dataclasses.replace(score, coverage90=float(inside[scored].mean()))


Scores = dict[str, dict[str, list[scoring.FrameScores]]]


def score(cases: Sequence[Case], results: dict[str, Result], ocean: np.ndarray) -> Scores:
    """Scores of every frame, in the order of time, by pattern and method.

    Where members failed and were left out, as many of every frame are scored as the frame with the fewest has.
    """
    scores: Scores = {}
    for pattern in dict.fromkeys(case.pattern for case in cases):
        chosen = [i for i, case in enumerate(cases) if case.pattern == pattern]
        scores[pattern] = {}
        for name, result in results.items():
            size = min(len(result.members[i]) for i in chosen)
            if any(len(result.members[i]) > size for i in chosen):
                logging.warning("%s, %s: scores are of %d members, which every frame has", pattern, name, size)
            scores[pattern][name] = [_score(cases[i], result, i, size, ocean) for i in chosen]
    return scores


def compare(scores: Scores, results: dict[str, Result], block: int) -> list[dict]:
    """Rows of scoring.summary, one a pattern and method, each against the best deterministic baseline there.

    Raises:
      InputError: none of DETERMINISTIC is among the methods.
    """
    rows = []
    for pattern, by_method in scores.items():
        bases = [name for name in by_method if name in DETERMINISTIC]
        if not bases:
            raise InputError(f"a comparison needs a baseline, one of {', '.join(DETERMINISTIC)}")
        best = min(bases, key=lambda name: np.mean([s.mse_mean for s in by_method[name]]))
        for name, frames in by_method.items():
            calls, seconds = results[name].calls, results[name].seconds
            row = scoring.summary(name, frames, calls, seconds, baseline=(best, by_method[best]), block=block)
            rows.append({"pattern": pattern} | row)
    return rows


def frame_rows(cases: Sequence[Case], scores: Scores) -> list[dict]:
    """Rows of frames.csv, one a pattern, frame and method: what the rows of `compare` are the means of."""
    rows = []
    for pattern, by_method in scores.items():
        mine = [case for case in cases if case.pattern == pattern]
        for i, case in enumerate(mine):
            named = {"pattern": pattern, "frame": case.frame, "time": case.time}
            of = {"error": 0.0 if case.noisy is None else case.error}
            rows += [named | {"method": name} | of | vars(frames[i]) for name, frames in by_method.items()]
    return rows


def detail_rows(cases: Sequence[Case], results: dict[str, Result], fields: Fields) -> list[dict]:
    """Rows of details.summary, one a pattern and method."""
    rows = []
    for pattern in dict.fromkeys(case.pattern for case in cases):
        chosen = [i for i, case in enumerate(cases) if case.pattern == pattern]
        for name, result in results.items():
            frames = []
            for i in chosen:
                scored = metrics.scored_cells(cases[i].truth, fields.ocean, cases[i].observed)
                frames.append(details.of_frame(cases[i].truth, result.members[i], scored, fields, result.antithetic))
            rows.append({"pattern": pattern, "method": name} | details.summary(frames))
    return rows


def format_rows(rows: Sequence[dict]) -> str:
    """The tables of all patterns as text."""
    parts = []
    for pattern in dict.fromkeys(row["pattern"] for row in rows):
        mine = [row for row in rows if row["pattern"] == pattern]
        parts.append(f"{pattern}\n{scoring.format_table(mine)}")
    return "\n\n".join(parts)


def to_dataset(cases: Sequence[Case], result: Result, fields: Fields, history: str) -> xr.Dataset:
    """Members, mean, spread and truth of every case as a CF data set (pattern, time, realization, lat, lon)."""
    base = readers.to_dataset(fields)
    y, x = base["ocean"].dims
    patterns = list(dict.fromkeys(case.pattern for case in cases))
    shape = (len(patterns), len(fields), max(map(len, result.members)), *fields.shape)
    # Where members failed and were left out, the rows of the last ones stay empty.
    members = np.full((len(cases), shape[2], *fields.shape, 2), np.nan, np.float32)
    for filled, made in zip(members, result.members, strict=True):
        filled[: len(made)] = made
    members = members.reshape(*shape, 2)
    mean = np.stack([made.mean(0) for made in result.members])
    truth = np.stack([case.truth for case in cases]).reshape(len(patterns), len(fields), *fields.shape, 2)
    observed = np.stack([case.observed for case in cases]).reshape(truth.shape[:-1])
    spread = np.stack([result.spread(i) for i in range(len(cases))]).reshape(truth.shape)
    content = {}
    for c, direction in enumerate(("eastward", "northward")):
        name = f"{direction}_sea_water_velocity"
        for kind, values, words, statistic in (
            (name, members, "members of the ensemble", None),
            (f"{name}_mean", mean.reshape(truth.shape), "mean of the ensemble", "mean"),
            (f"{name}_spread", spread, "standard deviation of the ensemble", "standard_deviation"),
            (f"{name}_truth", truth, "held-out field", None),
        ):
            dims = ("pattern", "time", "realization", y, x) if values is members else ("pattern", "time", y, x)
            attributes = {"long_name": f"{direction} current, {words}", "units": "m s-1"}
            if values is members:
                # Programs that drift particles choose by standard names, and one variable must have them.
                attributes["standard_name"] = name
            if statistic:
                attributes["cell_methods"] = f"realization: {statistic}"
            content[kind] = (dims, values[..., c].astype(np.float32), attributes, {"_FillValue": readers.FILL})
    content["observed"] = (
        ("pattern", "time", y, x),
        observed.astype(np.int8),
        {"long_name": "cells given to the method", "flag_values": np.array([0, 1], np.int8),
         "flag_meanings": "inpainted observed"},
    )  # fmt: skip
    coordinates = {name: base[name] for name in ("time", "lat", "lon")}
    coordinates["pattern"] = ("pattern", np.array(patterns, object), {"long_name": "observation pattern"})
    coordinates["realization"] = (
        "realization",
        np.arange(shape[2], dtype=np.int32),
        {"standard_name": "realization", "units": "1"},
    )
    frames = np.array([case.frame for case in cases[: len(fields)]], np.int32)
    coordinates["frame"] = ("time", frames, {"long_name": "number in the series", "units": "1"})
    attributes = {
        "Conventions": "CF-1.11",
        "title": f"{fields.name}, inpainted",
        "history": history,
        "antithetic": np.int8(result.antithetic),
    }
    data = xr.Dataset(content, coordinates, attributes)
    data["ocean"] = base["ocean"]
    return data


def example(trained: Model, case: Case, members: np.ndarray, spread: np.ndarray) -> plots.Example:
    """One case as a figure shows it."""
    return plots.Example(
        name=case.pattern,
        truth=case.truth,
        observed=case.observed,
        values=case.seen,
        prior_mean=trained.to_velocity(case.analysis.mean(case.observation.values)),
        mean=members.mean(0),
        member=members[0],
        spread=spread,
        frame=case.frame,
        time=case.time,
    )


def check_out(out: Path, kept: Sequence[str] = (), inputs: Sequence[Path] = ()) -> None:
    """Before long work: whether what `run` writes into a folder would replace only what it wrote there before.

    Args:
      kept, inputs: as for `run`.

    Raises:
      InputError: a file of these names that no evaluation wrote, or that is read; the folder of a model.
    """
    if (out / model.DESCRIPTION).exists() or (out / model.WEIGHTS).exists():
        raise InputError(f"cannot write an evaluation to {out}: it is the folder of a model; give --out another")
    names = [*TABLES, FIELDS, *map(_file_of, kept)]
    for name in (*names, FIGURE):
        files.check_kept(out / name, inputs)
    there = [name for name in names if (out / name).exists()]
    others = [name for name in there if not _is_ours(out / name)]
    # A picture does not say what it is of; it is written last, so that a table is there if it is of an evaluation.
    if not there and (out / FIGURE).exists():
        others = [FIGURE]
    if others:
        raise InputError(
            f"cannot write an evaluation to {out}: {others[0]} is there, and is not of an earlier one; give --out "
            "another folder"
        )


def _file_of(method: str) -> str:
    return f"fields_{method}.nc"


def _is_ours(path: Path) -> bool:
    """Whether an evaluation wrote a table or a file of fields."""
    try:
        if path.name in TABLES:
            with path.open("rb") as file:
                head = TABLES[path.name].encode()
                return file.read(len(head)) == head
        check_hdf5(path)
        with h5netcdf.File(path) as data:
            return TRUTH in data.variables
    except (OSError, InputError, ValueError, KeyError, RuntimeError):
        return False


def run(
    trained: Model,
    fields: Fields,
    numbers: Sequence[int],
    patterns: Sequence[str],
    methods: Sequence[str],
    out: Path,
    *,
    members: int = 16,
    seed: int = 0,
    chunk: int | None = None,
    block: int = 1,
    shown: str | None = None,
    kept: Sequence[str] = (),
    raw: bool = False,
    inputs: Sequence[Path] = (),
    named: str | None = None,
    error: float | None = None,
) -> str:
    """Inpaints, writes table.csv, frames.csv, details.csv, fields.nc and figure.png, and returns the table as text.

    Where no deterministic baseline is among the methods, the linear estimate stands in front of them.

    Args:
      fields: the frames to inpaint, `numbers` theirs in the series.
      shown: the method whose members go into fields.nc and the figure; by default the last one, calibrated if it is.
      kept: other methods whose members are written too, into fields_{method}.nc.
      raw: whether to leave out the rows {method}_calibrated of methods that the model has a calibration for.
      inputs: files that are read, which `out` must not replace.
      named: what `history` calls the model; by default its fingerprint.
      error: of observations, see `make_cases`.

    Raises:
      InputError: methods, members or patterns that cannot be used, a folder that cannot be written or holds other
        files of these names.
    """
    check_methods(methods, members)
    if not set(methods) & set(DETERMINISTIC):
        methods = ["linear", *methods]
    members = int(members)
    patterns = list(dict.fromkeys(patterns))
    learnt = {} if raw else calibrations_for(trained, methods, members)
    shown = shown or (calibrated_name(methods[-1]) if methods[-1] in learnt else methods[-1])
    written = {FIELDS: shown} | {_file_of(name): name for name in kept if name != shown}
    for name in written.values():
        if name not in (*methods, *map(calibrated_name, learnt)):
            raise InputError(f"{name} is not among the methods that are run, {', '.join(methods)}")
    check_out(out, [name for name in written.values() if name != shown], inputs)
    cases = make_cases(trained, fields, numbers, patterns, seed, error)
    _check_model(trained, methods)
    for name in (*TABLES, *written, FIGURE):
        files.check_writable(out / name)
    unfinished = Unfinished(out / "unfinished")
    unfinished.begin(trained, {
        "fields": fields.hash(), "numbers": list(map(int, numbers)), "patterns": patterns, "members": members,
        "seed": int(seed), "error": error,
    })  # fmt: skip
    results = _run_all(methods, learnt, trained, fields, cases, members, seed, chunk, unfinished)
    for name in learnt:
        added = calibrated_name(name)
        if added not in results:
            written.pop(_file_of(added), None)
            written[FIELDS] = name if written[FIELDS] == added else written[FIELDS]
    # Everything that members depend on, calibrations too, so that the files of two evaluations are told apart.
    parts = [unfinished.folder.name, [one.to_json() for one in trained.calibrations]]
    told = hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8).hexdigest()
    scores = score(cases, results, fields.ocean)
    rows = compare(scores, results, block)
    scoring.write_csv(rows, out / "table.csv")
    scoring.write_csv(frame_rows(cases, scores), out / "frames.csv")
    scoring.write_csv(detail_rows(cases, results, fields), out / "details.csv")
    for file, name in written.items():
        history = f"jax_repaint, model {named or model.fingerprint(trained)}, method {name}, seed {seed}"
        history += f", observations with errors of {error:g} m/s" if error else ""
        data = to_dataset(cases, results[name], fields, history).assign_attrs(method=name, evaluation=told)
        readers.write_netcdf(data, out / file)
    examples = _examples(trained, cases, results[written[FIELDS]])
    title = f"{fields.name}, {written[FIELDS]}"
    plots.currents(out / FIGURE, examples, fields.ocean, fields.metres(), title, fields.convergence())
    unfinished.remove()
    return format_rows(rows) + note_on(error)


def _check_model(trained: Model, methods: Sequence[str]) -> None:
    """Raises InputError where a method asks more of the model than it has, before the first one runs."""
    for name in methods:
        if name in POSTERIOR:
            levels_of(trained, name)
        if name == "ridge":
            check_archive(trained, name)
        if name in REPAINT:
            stages_of(trained, name)
        if name == "gp" and trained.kernel is None:
            raise InputError("this model was exported without a fitted GP")


def _examples(trained: Model, cases: Sequence[Case], result: Result) -> list[plots.Example]:
    """The first frame of each pattern."""
    first: dict[str, int] = {}
    for i, case in enumerate(cases):
        first.setdefault(case.pattern, i)
    return [example(trained, cases[i], result.members[i], result.spread(i)) for i in first.values()]


def _run_all(
    methods: Sequence[str],
    learnt: dict[str, Calibration],
    trained: Model,
    fields: Fields,
    cases: Sequence[Case],
    members: int,
    seed: int,
    chunk: int | None,
    unfinished: Unfinished,
) -> dict[str, Result]:
    """What each method made, and its calibration of it where it has learnt one and no member failed."""
    results: dict[str, Result] = {}
    for name in methods:
        results[name] = _run_in_parts(name, trained, fields, cases, members, seed, chunk, unfinished)
        if name not in learnt:
            continue
        added = calibrated_name(name)
        # A calibration is for ensembles of one size.
        if min(map(len, results[name].members)) < members:
            logging.warning("members of %s failed; there is no row %s", name, added)
            continue
        results[added] = calibrated(trained, learnt[name], fields, cases, results[name], seed, chunk, unfinished)
    return results


def _run_in_parts(
    name: str,
    trained: Model,
    fields: Fields,
    cases: Sequence[Case],
    members: int,
    seed: int,
    chunk: int | None,
    unfinished: Unfinished,
) -> Result:
    """`run_method` of PART cases at a time, or as many as fill a chunk, apart from those that are done."""
    size = _part_size(name, len(cases), members, chunk)
    parts = []
    with command.bar(len(cases), name, "field") as bar:
        for first in range(0, len(cases), size):
            some = cases[first : first + size]
            make = partial(run_method, name, trained, fields, some, members, seed, chunk)
            parts.append(unfinished.made(name, first, len(some), make))
            bar.update(len(some))
    seconds = sum(part.seconds * len(part.members) for part in parts) / len(cases)
    made = [one for part in parts for one in part.members]
    return dataclasses.replace(parts[0], members=made, seconds=seconds)


def _part_size(name: str, cases: int, members: int, chunk: int | None) -> int:
    """Cases of a method that are run, and then kept, together."""
    if name in REPAINT or name in POSTERIOR or name == "ridge":
        return max(PART, -(-(chunk or device.usual_batch()) // members))
    return cases


FLAGS = flags.FLAGS


def _define_flags() -> None:
    flags.DEFINE_string("model", None, "Folder of a model, as training writes it.")
    flags.DEFINE_string("fields", None, "File of fields; by default those that the model was trained on.")
    flags.DEFINE_enum(
        "part", "test", ("test", "validation", "all"), "What the frames are drawn from: the test part, the validation "
        "part, to choose by, or all of --fields, a file of which no frame had a part in training."
    )  # fmt: skip
    flags.DEFINE_integer("frames", 64, "Frames to inpaint, drawn at random.", lower_bound=1)
    flags.DEFINE_list(
        "patterns", [], "Observation patterns, such as line:22,walk:90,cells:0.02; by default the model's."
    )
    flags.DEFINE_list(
        "methods", None, f"Among {', '.join(METHODS)}; by default the baselines, adaptive, kalman and the default of "
        "inpaint."
    )  # fmt: skip
    flags.DEFINE_list("keep", [], "Methods whose members go into fields_METHOD.nc, beside the last one's in fields.nc.")
    flags.DEFINE_integer("members", 16, "Members of an ensemble.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of frames, patterns and members.", lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_integer("chunk", None, "Members sampled at a time; by default what pays on the device.", lower_bound=1)
    flags.DEFINE_bool("raw", False, "Leave out the rows of calibrated methods.")
    flags.DEFINE_integer(
        "directions", None, "EOFs of the linear prior of baselines, starts and gains, fitted anew to the training "
        "frames; by default that of the model, which the network keeps. More pay where most of a field is observed "
        "and the training had thousands of frames.", lower_bound=1,
    )  # fmt: skip
    flags.DEFINE_float(
        "error", None, "Standard error in m/s of the observations, which get errors of that size; by default they are "
        f"the true values, and methods take them to be off by {OBSERVATION_ERROR}."
    )  # fmt: skip
    flags.DEFINE_string("out", "results", "Folder for the tables, fields.nc and figure.png.")
    flags.mark_flag_as_required("model")


def main(_) -> None:
    """Compares methods on held-out frames."""
    trained, out = model.load(FLAGS.model), Path(FLAGS.out)
    names = usual_methods(trained, FLAGS.directions is not None) if FLAGS.methods is None else FLAGS.methods
    check_methods(names, FLAGS.members)
    # Before the fields, whose simulation may take minutes; `run` asks it of all that is read.
    check_out(out, FLAGS.keep, readers.files_of(FLAGS.fields) if FLAGS.fields else ())
    fields, split = data_of(trained, FLAGS.fields, FLAGS.part)
    named = model.fingerprint(trained)
    if FLAGS.directions:
        named += f" with a linear prior of {FLAGS.directions} directions fitted anew"
        own = FLAGS.part != "all" and fields.hash() == trained.origin["fingerprint"]
        training = (fields, split) if own else data_of(trained, None)
        trained = with_directions(trained, *training, FLAGS.directions)
    numbers = pick(split, FLAGS.frames, FLAGS.seed)
    patterns = FLAGS.patterns or trained.patterns
    text = run(
        trained, fields.select(numbers), numbers, patterns, names, out,
        members=FLAGS.members, seed=FLAGS.seed, chunk=FLAGS.chunk, block=block_length(split, len(numbers)),
        kept=FLAGS.keep, raw=FLAGS.raw or FLAGS.part == "validation", inputs=files_of(trained, FLAGS.fields),
        named=named, error=FLAGS.error,
    )  # fmt: skip
    print(text)
    print(f"\nwrote {out / 'table.csv'}, {out / 'fields.nc'} and {out / 'figure.png'}")


if __name__ == "__main__":
    _define_flags()
    command.run(main)
