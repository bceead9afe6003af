"""Fills a field in from a few observations, with an ensemble that says how sure it is.

    python -m jax_repaint.inpaint --observations=track.csv --step=1h --out=fields.nc
    python -m jax_repaint.inpaint --export=vehicle --rows=64

    import jax_repaint
    fields = jax_repaint.load().inpaint("track.csv", step="1h")

Observations are points or cells (data/observations.py). The result is a CF-1.11 data set, in which only the members
carry the standard names of currents: programs that drift particles choose their variables by these. A command that was
stopped goes on where it was.
"""

import datetime
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import xarray as xr
from absl import flags, logging
from scipy import ndimage

import jax_repaint
from jax_repaint import calibration as calibrations
from jax_repaint import command, device, files, gains, methods, metrics, observe, plots, provenance
from jax_repaint import model as models
from jax_repaint.calibration import Calibration, Gate
from jax_repaint.cases import (
    LARGEST_ERROR,
    LEAST_POINT_SIGMA,
    LEAST_SIGMA,
    OBSERVATION_ERROR,
    Case,
    files_of,
    hold_out_of,
    prior_of,
)
from jax_repaint.checks import check_number, whole_number
from jax_repaint.data import readers
from jax_repaint.data.fields import Fields, crop
from jax_repaint.data.observations import Grid, Observed, collect
from jax_repaint.ensemble import frame_batches
from jax_repaint.errors import InputError
from jax_repaint.model import Model
from jax_repaint.prior import linear
from jax_repaint.unfinished import Unfinished

METHODS = ("linear_samples", *methods.REPAINT, *methods.POSTERIOR)
EPOCH = np.datetime64(0, "ns")  # stands for a time that is not known
STRANGE, IMPOSSIBLE = 20, 100  # standard deviations from the mean that are warned of, and refused
DRAWN = 3  # fields in a picture
OF_FEW = ("kalman_cg", "cov_pigdm")  # methods that are not for dense observations
EXACT = (*methods.REPAINT, "paste", "dps")  # methods that take observations as exact, whatever their standard errors
DENSE = 0.05  # of the ocean cells; a swath of three cells has up to 0.03 inside of it, `gaps:0.8` 0.15
MANY, FEW = 24, 3  # fields; more come from a table whose every row has its own time
UNLIKELY = 3  # standard errors between mean and observations; 0.1 to 1.6 for those made of the twin's held-out frames
CLIMATOLOGICAL = "climatological_standard_deviation"
CALIBRATED = "5 to 95 %, calibrated on held-out frames"

Keep = Callable[[str, int, Callable[[], methods.Result]], methods.Result]

_compiled: set[tuple] = set()


class Estimate(NamedTuple):
    """What is known of one field in m/s, NaN on land.

    Attributes:
      time: of the field; NaT if unknown.
      members: (M, y, x, 2).
      prior_mean: (y, x, 2), the best linear estimate from the same observations.
      std, low, high: (y, x, 2), standard deviation of a member and the 5 to 95 % interval; NaN if members are too few.
      observed: (y, x) bool, cells that an observation lies in.
      values: (y, x, 2), mean of the observations in a cell; NaN elsewhere.
      misfit: of the mean to the observations, in standard errors.
    """

    time: np.datetime64
    members: np.ndarray
    prior_mean: np.ndarray
    std: np.ndarray
    low: np.ndarray
    high: np.ndarray
    observed: np.ndarray
    values: np.ndarray
    misfit: float


def inpaint(
    trained: Model,
    observations: Any,
    members: int = 16,
    seed: int = 0,
    time: str | np.datetime64 | None = None,
    *,
    columns: Mapping[str, Any] | None = None,
    sigma: float = OBSERVATION_ERROR,
    step: str | datetime.timedelta | np.timedelta64 | None = None,
    method: str | None = None,
    raw: bool = False,
    leave_out: bool = False,
    chunk: int | None = None,
    progress: bool = True,
    unfinished: Unfinished | None = None,
) -> xr.Dataset:
    """Fields from observations, one for each of their times.

    Args:
      trained: the model, on whose grid the fields are.
      observations: path, DataFrame, xarray Dataset or pair, or array; columns, sigma (m/s), time, step and
        leave_out are those of `data.observations.collect`; a step may be a duration too, and a column's name a number.
      members: of the ensemble; even where they come in antithetic pairs.
      seed: names the members; a field depends on it, its time and its observations, in the order of their rows, and
        but for rounding on no other field.
      method: one of METHODS; by default `default_method`.
      raw: whether a calibration that came with the model is left out.
      chunk: members sampled at a time, of several times where they have fewer; what pays on the device by default.
      progress: whether to say on stderr that a program is being compiled, and how far things are.
      unfinished: keeps what is made before the end, until it is told to remove that.

    Returns:
      eastward_ and northward_sea_water_velocity (realization, time, lat, lon), mean, standard deviation, 5 to 95 %
      interval, prior mean and observations (time, lat, lon) of each, its standard deviation without observations
        (lat, lon), `observed` and `misfit`; m/s, NaN on land.

    Raises:
      InputError: observations that cannot be used or are not in m/s, too many for the memory, a method or number of
        members that does not exist, an option of another kind.
    """
    columns, step = _names(columns), _duration(step)
    check_number("sigma", sigma)
    for name, value in (("raw", raw), ("leave_out", leave_out), ("progress", progress)):
        if not isinstance(value, bool | np.bool_):
            raise InputError(f"{name} must be True or False, got {value!r}")
    if not method and default_method(trained) == "linear_samples":
        logging.warning(
            "the model is calibrated for linear_samples, which is taken and uses no network; --method= (method=) names "
            "another"
        )
    method = method or default_method(trained)
    if method not in METHODS:
        raise InputError(f"method {method!r} is not one of {', '.join(METHODS)}")
    methods.check_methods([method], members)
    if unfinished is not None and not isinstance(unfinished, Unfinished):
        raise InputError(f"unfinished must be an Unfinished(path), got {type(unfinished).__name__}")
    members, seed = int(members), whole_number("seed", seed, 0)
    if members < (least := metrics.least_members(method in methods.PAIRED)):
        raise InputError(f"for a spread {method} needs {least} members at least, got {members}")
    chunk = device.usual_batch() if chunk is None else whole_number("chunk", chunk, 1)
    grid = Grid(trained.ocean, trained.lat, trained.lon)
    frames = collect(observations, grid, columns=columns, sigma=sigma, time=time, step=step, leave_out=leave_out)
    _check_units(trained, frames)
    _warn_of_times(frames)
    if method in OF_FEW:
        _warn_of_dense(method, frames, grid)
    if method in EXACT:
        _warn_of_errors(method, frames)
    calibration = None if raw else calibration_of(trained, method, members)
    made: dict[int, Estimate] = {}
    rows = [gains.rows_of(trained.gaussian, _observation(trained, frame, method)) for frame in frames]
    batches = list(frame_batches(rows, members, chunk, trained.gaussian, methods.LEVELS))
    if unfinished:
        asked = {
            "frames": [_digits(frame) for frame in frames],
            "batches": [list(map(int, batch)) for batch in batches],
            "members": members,
            "seed": seed,
        }
        unfinished.begin(trained, asked)
    with command.bar(len(frames), method, "field", progress and len(frames) > 1) as bar:
        for number, batch in enumerate(batches):
            if progress:
                _announce(trained, rows[batch[0]], len(batch), members, method)
            mine = [frames[i] for i in batch]
            keep = (lambda what, *one, number=number: unfinished.made(what, number, *one)) if unfinished else None
            fields = estimate(trained, mine, members, seed, method, calibration, chunk, keep)
            made |= zip(batch, fields, strict=True)
            bar.update(len(made) - bar.n)
    estimates = [made[number] for number in range(len(frames))]
    _warn_of_misfit(estimates)
    attributes = _attributes(trained, frames, members, seed, method, calibration)
    if isinstance(observations, str | Path):
        attributes["observations_file"] = Path(observations).name
    return to_dataset(trained, estimates, attributes)


def _names(columns: Mapping[str, Any] | None) -> dict[str, str]:
    """Names of columns as text, as they are compared; tables without a header have numbers."""
    if columns is None:
        return {}
    if not isinstance(columns, Mapping):
        raise InputError(f"columns must be a dictionary such as {{'u': 'vx'}}, got {columns!r}")
    return {key: str(name) for key, name in columns.items() if name is not None and str(name) != ""}


def _duration(step: Any) -> Any:
    """A step that pandas knows; NumPy's durations it does not."""
    if step is None or isinstance(step, str | datetime.timedelta | pd.offsets.BaseOffset):
        return step
    if isinstance(step, np.timedelta64) and np.datetime_data(step)[0] != "generic":
        # Months and years have no fixed length.
        if np.isnat(step) or np.datetime_data(step)[0] in "YM":
            raise InputError(f"step {step!r} is not a fixed duration such as 1h or 30min")
        return pd.Timedelta(step)
    raise InputError(f"step must be a duration with its unit, such as '1h' or a timedelta, got {step!r}")


def _check_units(trained: Model, frames: Sequence[Observed]) -> None:
    """Warns of the observation that is least like a current of the training.

    Raises:
      InputError: most are unlike any, some hold the same value that is unlike any, or one cannot be a current.
    """
    mean, std = trained.standardiser.mean, trained.standardiser.std
    values = [np.asarray(frame.observation.values)[: frame.count] for frame in frames]
    away = [np.abs((one - mean) / std).max(1) for one in values]
    typical = float(np.quantile(np.concatenate(away), 0.5, method="lower"))
    if typical > STRANGE:
        raise InputError(
            f"the observations are typically {typical:.0f} standard deviations of the training currents away from "
            "their mean; they must be in m/s"
        )
    every = np.concatenate(values)
    strange = np.abs((every - mean) / std) > STRANGE
    for name, ours, theirs in zip("uv", every.T, strange.T, strict=True):
        number, times = np.unique(ours[theirs], return_counts=True)
        if times.max(initial=0) > 1:
            raise InputError(
                f"{times.max()} of {len(every)} observations have {name} = {number[times.argmax()]:g} m/s exactly, "
                "unlike any current of the training; is a fill value undeclared? leave them out"
            )
    number = max(range(len(frames)), key=lambda i: away[i].max())
    worst = int(away[number].argmax())
    if away[number][worst] > IMPOSSIBLE:
        u, v = values[number][worst]
        raise InputError(
            f"{_whereabouts(trained, frames[number], worst)}: (u, v) = ({u:.4g}, {v:.4g}) is "
            f"{away[number][worst]:.0f} standard deviations of the training currents away from their mean; leave it "
            "out, or give it in m/s"
        )
    if away[number][worst] > STRANGE:
        logging.warning(
            "an observation is %.0f standard deviations of the training currents away from their mean; is it in m/s, "
            "and no fill value? %s, (u, v) = (%.4g, %.4g)",
            away[number][worst], _whereabouts(trained, frames[number], worst), *values[number][worst],
        )  # fmt: skip


def _whereabouts(trained: Model, frame: Observed, number: int) -> str:
    """Such as "row 3 (counted from 0) at lat 18.3000 lon -64.7000"."""
    if frame.rows is not None:
        (lat, lon), what = frame.places[number], f"row {frame.rows[number]} (counted from 0)"
    else:
        y, x = np.unravel_index(int(frame.observation.cells[number, 0]), trained.ocean.shape)
        lat, lon = (trained.lat[y], trained.lon[x]) if trained.lat.ndim == 1 else (trained.lat[y, x], trained.lon[y, x])
        what = f"cell (y={y}, x={x})"
    when = "" if np.isnat(frame.time) else f" of {np.datetime_as_string(frame.time, 's')}"
    return f"{what} at lat {lat:.4f} lon {lon:.4f}{when}"


def _warn_of_times(frames: Sequence[Observed]) -> None:
    """Of many fields, or some with one observation each, as a track with its own time in every row gives."""
    alone = sum(frame.count == 1 for frame in frames)
    scattered = len(frames) >= FEW and alone > len(frames) / 2
    if scattered or len(frames) > MANY:
        logging.warning(
            "%d times%s; each gets a field of its own%s",
            len(frames),
            ", most with one observation" if scattered else "",
            "; --step=1h or --time=... (step=, time=) joins them" if frames[0].rows is not None else "",
        )


def _errors(frames: Sequence[Observed]) -> np.ndarray:
    """Standard errors of all observations, m/s."""
    return np.concatenate([np.asarray(f.observation.sigma)[np.asarray(f.observation.valid)].ravel() for f in frames])


def _warn_of_errors(method: str, frames: Sequence[Observed]) -> None:
    """Where standard errors are said that the method has no use for."""
    if (largest := _errors(frames).max()) > OBSERVATION_ERROR * (1 + 1e-6):
        logging.warning(
            "%s takes observations as exact: it does not use their standard errors, of up to %.3g m/s, but where it "
            "starts from the linear estimate", method, largest,
        )  # fmt: skip


def _warn_of_dense(method: str, frames: Sequence[Observed], grid: Grid) -> None:
    """Single fields of OF_FEW go astray where most is observed (docs/results_samplers.md, Forwards or backwards)."""
    inside = 0
    for frame in frames:
        observed = np.asarray(frame.observation.on_grid(grid.ocean.shape)[0])
        inside = max(inside, int((observed & ndimage.binary_erosion(observed | ~grid.ocean, border_value=1)).sum()))
    share = inside / grid.ocean.sum()
    if share > DENSE:
        logging.warning(
            "%s is for few or scattered observations, and %.0f %% of the ocean cells are observed with all their "
            "neighbours; kalman or kalman_jvp (--method=, method=) is better there", method, 100 * share,
        )  # fmt: skip


def _warn_of_misfit(estimates: Sequence[Estimate]) -> None:
    missed = [one for one in estimates if one.misfit > UNLIKELY]
    if missed:
        worst = max(missed, key=lambda one: one.misfit)
        at = "" if np.isnat(worst.time) else f" at {np.datetime_as_string(worst.time, 'm')}"
        others = f" (and at {len(missed) - 1} other times by more than {UNLIKELY})" if len(missed) > 1 else ""
        logging.warning(
            "the ensemble mean misses the observations by %.2g standard errors%s%s; they are unlikely for the model, "
            "or sigma is too small", worst.misfit, at, others,
        )  # fmt: skip


def default_method(trained: Model) -> str:
    """That of the model's first calibration; else `given` if its network takes observations, else `kalman`."""
    if trained.calibrations and trained.calibrations[0].method in METHODS:
        return trained.calibrations[0].method
    return "given" if trained.form == "conditional" else "kalman"


def estimate(
    trained: Model,
    frames: Sequence[Observed],
    members: int,
    seed: int,
    method: str,
    calibration: Calibration | None = None,
    chunk: int | None = None,
    keep: Keep | None = None,
) -> list[Estimate]:
    """The ensembles of some fields, sampled together where their observations have as many rows.

    Args:
      calibration: for ensembles of this method and size; None leaves them as they are.
      chunk: members sampled at a time; what pays on the device by default.
      keep: takes a name, the number of fields and what samples them, and gives their result, which it may have kept.

    Raises:
      InputError: members that are not finite.
    """
    chunk = chunk or device.usual_batch()
    cases = [_case(trained, frame, method) for frame in frames]
    sample = partial(methods.run_method, method, trained, None, cases, members, seed, chunk)
    ensembles = (keep(method, len(cases), sample) if keep else sample()).members
    for case, made in zip(cases, ensembles, strict=True):
        fine = np.isfinite(made[:, trained.ocean]).all((1, 2))
        if fine.sum() < members:
            where = "" if np.isnat(case.time) else f" of the field at {case.time}"
            raise InputError(
                f"{members - fine.sum()} of {members} members by {method}{where} are not finite; try another method, "
                "or larger standard errors of the observations"
            )
    weights = [1.0] * len(frames)
    if calibration is not None and calibration.gate is not None:
        weights = _weights(trained, calibration.gate, frames, cases, members, seed, method, chunk, keep)
    return [
        _estimate(trained, frame, case, made, calibration, weight, method in methods.PAIRED)
        for frame, case, made, weight in zip(frames, cases, ensembles, weights, strict=True)
    ]


def _estimate(
    trained: Model,
    frame: Observed,
    case: Case,
    made: np.ndarray,
    calibration: Calibration | None,
    weight: float,
    antithetic: bool,
) -> Estimate:
    """What members (M, y, x, 2) in m/s say of a field, corrected by the calibration."""
    prior_mean, prior_variance = prior_of(trained, case)
    if calibration is not None:
        made = calibration.apply(prior_mean, prior_variance, made, weight, case.observed)
    if len(made) < metrics.least_members(antithetic):
        std = np.full(made.shape[1:], np.nan, np.float32)
    else:
        std = np.sqrt(np.maximum(metrics.ensemble_variance(made, antithetic), 0)).astype(np.float32)
    if calibration is not None:
        low, high = calibration.interval(prior_variance, made)
    else:
        half = metrics.half_width(len(made), antithetic) * std
        low, high = made.mean(0) - half, made.mean(0) + half
    _, values = frame.observation.on_grid(trained.ocean.shape)
    values = np.where(case.observed[..., None], values, np.nan).astype(np.float32)
    misfit = misfit_of(frame.observation, made.mean(0))
    return Estimate(case.time, made, prior_mean, std, low, high, case.observed, values, misfit)


def _digits(frame: Observed) -> str:
    """Name of the observations of one field and of its time."""
    told = hashlib.blake2b(str(frame.time).encode(), digest_size=8)
    for part in jax.tree.leaves(frame.observation):
        told.update(np.asarray(part).tobytes())
    return told.hexdigest()


def misfit_of(observation: observe.Observation, mean: np.ndarray) -> float:
    """Root mean square of (y - A mean) / sigma over observations and components; mean (y, x, 2) is NaN on land."""
    apart = (observation.values - observation.apply(jnp.asarray(np.nan_to_num(mean)))) / observation.sigma
    return float(np.sqrt(np.mean(np.asarray(apart, np.float64)[np.asarray(observation.valid)] ** 2)))


def _weights(
    trained: Model,
    gate: Gate,
    frames: Sequence[Observed],
    cases: Sequence[Case],
    members: int,
    seed: int,
    method: str,
    chunk: int,
    keep: Keep | None,
) -> list[float]:
    """The weight of each field, from a second run without the observations of a tenth of its cells, as it was learnt.

    A point counts for its heaviest cell: alone, beside others of its cell, it would tell nothing. A field of one cell,
    of which nothing can be held out, has weight 1. The variance at a point between cells is taken to be the weighted
    mean of theirs, which is never too small.
    """
    cell = [np.where(f.observation.valid, f.observation.heaviest(), -1) for f in frames]
    places = [np.unique(each[each >= 0]) for each in cell]
    some = [i for i, observed in enumerate(places) if observed.size > 1]
    weights = [1.0] * len(frames)
    less, held = [], []
    for i in some:
        given = frames[i].observation
        out = np.isin(cell[i], hold_out_of(places[i], seed, cases[i].frame))
        held.append(out)
        less.append(_case(trained, frames[i]._replace(observation=given.rows(jnp.asarray(~out))), method))
    if not some:
        return weights
    sample = partial(methods.run_method, method, trained, None, less, members, seed, chunk)
    ensembles = (keep(f"{method}{methods.HELD_OUT}", len(less), sample) if keep else sample()).members
    for i, case, out, made in zip(some, less, held, ensembles, strict=True):
        given = frames[i].observation
        at_held = given.rows(jnp.asarray(out))
        mean, variance, ensemble = (
            np.asarray(at_held.apply(jnp.asarray(np.nan_to_num(field))))[out]
            for field in (*prior_of(trained, case), made.mean(0))
        )
        values, sigma = np.asarray(given.values)[out], np.asarray(given.sigma)[out]
        misfit = (values - mean) ** 2
        error = np.mean((values - ensemble) ** 2)
        weights[i] = gate.of(Gate.evidence(misfit.mean(), error, np.mean(misfit / (variance + sigma**2))))
    return weights


def calibration_of(trained: Model, method: str, members: int) -> Calibration | None:
    """The model's calibration for ensembles of this method and size; warnings if there is none, or of true values."""
    learnt = calibrations.find(trained.calibrations, method, members)
    # Samples of the linear posterior spread as the prior says, which validation frames chose.
    if not trained.calibrations and method != "linear_samples":
        logging.warning(
            "the model has no calibration: members are as sampled, which where training frames were few is too much "
            "alike; python -m jax_repaint.calibrate learns how far they should spread"
        )
    if trained.calibrations and learnt is None:
        logging.warning(
            "the calibration of this model is for %s, not for %d of %s, and is not used",
            calibrations.sizes(trained.calibrations), members, method,
        )  # fmt: skip
    if learnt is not None and not learnt.error:
        logging.warning(
            "the calibration for %s was learnt from true values: where observations have errors, members are too sure "
            "beside them; python -m jax_repaint.calibrate learns it from observations with errors", method,
        )  # fmt: skip
    return learnt


def _observation(trained: Model, frame: Observed, method: str) -> observe.Observation:
    """The observations of one field in the units and on the grid of the network, as few rows as the method allows.

    Raises:
      InputError: standard errors that single precision cannot tell from 0, or that are none.
    """
    mean, std = (jnp.asarray(part)[None] for part in (trained.standardiser.mean, trained.standardiser.std))
    given = frame.observation
    valid = given.valid[:, None]
    errors, least = np.asarray(given.sigma)[np.asarray(given.valid)], LEAST_SIGMA * np.asarray(std)
    if (errors < least).any():
        raise InputError(
            f"the standard error of an observation is {errors.min():.2g} m/s; samplers in single precision need "
            f"{least.max():.2g} m/s or more"
        )
    if (errors > LARGEST_ERROR).any():
        raise InputError(
            f"the standard error of an observation is {errors.max():.2g} m/s, more than {LARGEST_ERROR:g}; is a fill "
            "value undeclared?"
        )
    observation = observe.pad_grid(given, trained.ocean.shape, trained.padded).replace(
        values=jnp.where(valid, (given.values - mean) / std, 0.0), sigma=jnp.where(valid, given.sigma / std, 1.0)
    )
    # A field has one row a cell already.
    if frame.rows is None:
        return observation
    if method in methods.MERGING:
        observation = observe.merged(observation)
    # Points share cells, and thousands of them in a few say more than single precision can hold.
    return observation.replace(sigma=jnp.maximum(observation.sigma, LEAST_POINT_SIGMA))


def _case(trained: Model, frame: Observed, method: str) -> Case:
    """One field as the methods take it, with the linear analysis of its observations."""
    observation = _observation(trained, frame, method)
    observed = np.asarray(frame.observation.on_grid(trained.ocean.shape)[0])
    seconds = 0 if np.isnat(frame.time) else int(frame.time.astype("datetime64[s]").astype(np.int64))
    # Keys take 31 bits; two times share them if they are 68 years apart.
    return Case(
        pattern="observations",
        frame=seconds % 2**31,
        time=frame.time,
        truth=None,
        observed=observed,
        observation=observation,
        analysis=linear.analysis(trained.gaussian, observation),
    )


def _announce(trained: Model, alike: gains.Rows, frames: int, members: int, method: str) -> None:
    """Says once for each program of a network that it will be compiled."""
    if method == "linear_samples":
        return
    program = (trained.network, trained.form, trained.padded, alike, frames, members, method)
    if program in _compiled:
        return
    _compiled.add(program)
    fields = "" if frames == 1 else f" of {frames} fields"
    print(
        f"compiling for up to {alike.size} observations and {members} members{fields}; {_waits()}",
        file=sys.stderr,
    )


def _waits() -> str:
    """Who does not wait for it again: calls of this process, or also those that share a cache."""
    if folder := jax.config.jax_compilation_cache_dir:
        return f"{folder} keeps it for the next run"
    # Flags are defined by the command alone, and no later call is in its process.
    return "--cache=FOLDER keeps it for the next run" if "cache" in FLAGS else "later calls do not wait for it"


def _attributes(
    trained: Model, frames: Sequence[Observed], members: int, seed: int, method: str, calibration: Calibration | None
) -> dict[str, Any]:
    versions = provenance.versions("jax", "flax", "numpy")
    words = ", ".join(f"{name} {version}" for name, version in versions.items())
    fingerprint = models.fingerprint(trained)
    unknown = any(np.isnat(frame.time) for frame in frames)
    errors = _errors(frames)
    error = " to ".join(dict.fromkeys(f"{extreme:.3g}" for extreme in (errors.min(), errors.max())))
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "Conventions": "CF-1.11",
        "title": "Ocean currents inpainted from observations",
        "source": f"jax_repaint, {method} sampler on model {fingerprint} ({trained.training.get('data', 'own data')})",
        "history": f"{now} jax_repaint.inpaint, model {fingerprint}, method {method}, seed {seed}",
        "model_fingerprint": fingerprint,
        "sampler": method,
        "seed": seed,
        "members": members,
        "observations": sum(frame.count for frame in frames),
        "observation_standard_error": f"{error} m s-1" + ", not used by the sampler" * (method in EXACT),
        **words_on(calibration),
        "versions": words,
    } | ({"comment": "The time of the observations is not known; 1970-01-01 stands for it."} if unknown else {})


def words_on(calibration: Calibration | None) -> dict[str, str]:
    """What was done to members and interval, as attributes `calibration` and `interval`; None stands for nothing."""
    if calibration is None:
        interval = "5 to 95 % of Student's t with the ensemble's own mean and standard deviation, not calibrated"
        return {"calibration": "none, the members are as the sampler made them", "interval": interval}
    interval = CALIBRATED
    if calibration.gate is not None:
        interval = (
            "5 to 95 % of the calibrated ensemble; its width was learnt without the weights of single fields, and is "
            "not calibrated with them"
        )
    elif not calibration.promised:
        interval = (
            "5 to 95 % of Student's t with the calibrated mean and standard deviation; its width is not calibrated, as "
            f"{calibration.blocks} blocks of time are too few"
        )
    learnt = (
        f"mean and spread of the members by {calibration.frames} held-out fields in {calibration.blocks} blocks of time"
    )
    if calibration.gate is not None:
        learnt += ", and the weight of each field by a second run without a tenth of its observations"
    return {"calibration": learnt, "interval": interval}


def climatological_std(trained: Model) -> np.ndarray:
    """Standard deviation (y, x, 2) of the currents by the linear prior, without observations; m/s, NaN on land."""
    variance = trained.standardiser.restore_variance(crop(linear.prior_variance(trained.gaussian), trained.ocean.shape))
    return np.where(trained.ocean[..., None], np.sqrt(variance), np.nan).astype(np.float32)


def to_dataset(trained: Model, estimates: Sequence[Estimate], attributes: Mapping[str, Any]) -> xr.Dataset:
    """The estimates as a CF data set; what the variables are stands in `inpaint`."""
    times = np.array([EPOCH if np.isnat(one.time) else one.time for one in estimates])
    means = np.stack([one.members.mean(0) for one in estimates])
    base = readers.to_dataset(Fields(means, trained.ocean, trained.lat, trained.lon, times, "inpainted"))
    y, x = base["ocean"].dims
    calibrated = "calibrated " if attributes["interval"] == CALIBRATED else ""
    # (name, words, cell_methods) of the statistics.
    statistics = {
        "mean": ("mean of the ensemble", "realization: mean", means),
        "standard_deviation": (
            "standard deviation of a member",
            "realization: standard_deviation",
            np.stack([one.std for one in estimates]),
        ),
        "low": (f"lower end of the {calibrated}5 to 95 % interval", "", np.stack([one.low for one in estimates])),
        "high": (f"upper end of the {calibrated}5 to 95 % interval", "", np.stack([one.high for one in estimates])),
        "prior_mean": (
            "best linear estimate from the same observations",
            "",
            np.stack([one.prior_mean for one in estimates]),
        ),
        "observed": ("mean of the observations in the cell", "", np.stack([one.values for one in estimates])),
    }
    members = np.stack([one.members for one in estimates], 1)
    currents = climatological_std(trained)
    encoding = {"_FillValue": readers.FILL}
    content = {}
    for c, direction in enumerate(("eastward", "northward")):
        name = f"{direction}_sea_water_velocity"
        words = {"standard_name": name, "long_name": f"{direction} current, members of the ensemble", "units": "m s-1"}
        words["ancillary_variables"] = " ".join(f"{name}_{kind}" for kind in (*statistics, CLIMATOLOGICAL))
        content[name] = (("realization", "time", y, x), members[..., c].astype(np.float32), words, encoding)
        for kind, (text, cell_methods, values) in statistics.items():
            words = {"long_name": f"{direction} current, {text}", "units": "m s-1"}
            if cell_methods:
                words["cell_methods"] = cell_methods
            content[f"{name}_{kind}"] = (("time", y, x), values[..., c].astype(np.float32), words, encoding)
        words = {"long_name": f"{direction} current, standard deviation of the linear prior, without observations"}
        words["units"] = "m s-1"
        content[f"{name}_{CLIMATOLOGICAL}"] = ((y, x), currents[..., c], words, encoding)
    content["observed"] = (
        ("time", y, x),
        np.stack([one.observed for one in estimates]).astype(np.int8),
        {"long_name": "cells with an observation", "flag_values": np.array([0, 1], np.int8),
         "flag_meanings": "inpainted observed"},
    )  # fmt: skip
    content["misfit"] = (
        "time",
        np.array([one.misfit for one in estimates], np.float32),
        {"long_name": "root mean square of (y - A mean) / sigma over the observations y of both components, "
         "A mean the mean of the ensemble at their places", "units": "1"},
    )  # fmt: skip
    coordinates = {name: base[name] for name in ("time", "lat", "lon")}
    coordinates["realization"] = (
        "realization",
        np.arange(len(members), dtype=np.int32),
        {"standard_name": "realization", "long_name": "number of the member", "units": "1", "axis": "E"},
    )
    data = xr.Dataset(content, coordinates, dict(attributes))
    data["ocean"] = base["ocean"]
    return xr.decode_cf(data)


def figure(fields: xr.Dataset, path: str | Path) -> None:
    """Draws observations, prior mean, mean, a member and spread of up to three fields, evenly spread over the times.

    Args:
      fields: of `inpaint`.
      path: of a picture, whose suffix names its format.

    Raises:
      InputError: another suffix, or the file cannot be written.
    """
    direction = ("eastward_sea_water_velocity", "northward_sea_water_velocity")

    def of(kind: str = "") -> np.ndarray:
        return np.stack([fields[name + kind].values for name in direction], -1)

    parts = [of(f"_{kind}") for kind in ("observed", "prior_mean", "mean", "standard_deviation")]
    parts.insert(3, of()[0])
    ocean, observed, times = (fields[name].values for name in ("ocean", "observed", "time"))
    chosen = np.unique(np.linspace(0, len(times) - 1, DRAWN).round().astype(int))
    examples = [
        plots.Example(
            "" if times[i] == EPOCH else plots.clock(times[i]), None, observed[i] == 1, *(p[i] for p in parts)
        )
        for i in chosen
    ]
    on_grid = Fields(parts[2], ocean == 1, fields["lat"].values, fields["lon"].values, times, "inpainted")
    plots.currents(path, examples, on_grid.ocean, on_grid.metres(), convergence=on_grid.convergence())


FLAGS = flags.FLAGS
NAMES = ("lat", "lon", "u", "v", "sigma", "time")  # of columns
# Options that a program for a vehicle does not have, as its observations come later.
OF_OBSERVATIONS = ("observations", "out", "figure", "seed", "time", "step", "sigma", "chunk", "leave_out")
OF_OBSERVATIONS += tuple(f"{key}_name" for key in NAMES)


def _define_flags() -> None:
    flags.DEFINE_string("model", jax_repaint.SHIPPED, "Folder of a model; by default the one in the package.")
    flags.DEFINE_string("observations", None, "CSV of points (lat, lon, u, v), or a file of fields with gaps.")
    flags.DEFINE_string("out", None, "NetCDF file or Zarr store to write, by its suffix.")
    flags.DEFINE_string("figure", None, "Picture to write too (.png, .svg, .pdf), of up to three of the fields.")
    flags.DEFINE_integer(
        "members",
        16,
        "Members of the ensemble: two or more, or four and an even number for samplers in pairs, as the default is.",
        lower_bound=2,
    )
    flags.DEFINE_integer("seed", 0, "Of the members.", lower_bound=0, upper_bound=2**31 - 1)
    flags.DEFINE_string("time", None, "The one time that all observations count for.")
    flags.DEFINE_string("step", None, "Times of points are rounded to multiples of this, such as 1h.")
    flags.DEFINE_float("sigma", OBSERVATION_ERROR, "Standard error in m/s of observations that bring none.")
    flags.DEFINE_enum("method", None, METHODS, "Sampler; by default that of the model's first calibration.")
    flags.DEFINE_integer("chunk", None, "Members sampled at a time; by default what pays on the device.", lower_bound=1)
    flags.DEFINE_bool("raw", False, "Leave out the calibration that came with the model.")
    flags.DEFINE_bool("leave_out", False, "Leave out points that are on land, outside the grid or without values.")
    for key in NAMES:
        what = "column or variable" if key in "uv" else "column"
        flags.DEFINE_string(f"{key}_name", "", f"Name of the {what} that is {key}.")
    flags.DEFINE_string("cache", None, "Private folder where compiled programs are kept for other runs.")
    flags.DEFINE_string("export", None, "Folder for a program that inpaints without this package, for a vehicle.")
    flags.DEFINE_integer("rows", 64, "Most observations that the exported program takes.", lower_bound=1)


def main(_) -> None:
    """Inpaints a file, or exports a program that inpaints."""
    if FLAGS.cache:
        command.keep_programs(FLAGS.cache)
    if FLAGS.export:
        if given := [f"--{name}" for name in OF_OBSERVATIONS if FLAGS[name].present]:
            raise InputError(f"--export writes a program and takes no {', '.join(given)}")
        from jax_repaint import export

        trained, folder = jax_repaint.load(FLAGS.model), Path(FLAGS.export)
        print(export.export(trained, folder, FLAGS.rows, FLAGS.members, FLAGS.method, FLAGS.raw))
        return
    if not (FLAGS.observations and FLAGS.out):
        raise InputError("--observations=FILE and --out=FILE.nc or FILE.zarr are needed (or --export=FOLDER)")
    if FLAGS["rows"].present:
        raise InputError("--rows is of a program that --export=FOLDER writes; observations may have any number")
    trained = jax_repaint.load(FLAGS.model)
    inputs = [*readers.files_of(FLAGS.observations), *files_of(trained, None)]
    files.check_writable(FLAGS.out, readers.STORES, inputs=inputs)
    if FLAGS.figure:
        files.check_writable(FLAGS.figure, plots.FORMATS, inputs=inputs)
    columns = {key: getattr(FLAGS, f"{key}_name") for key in NAMES}
    out = Path(FLAGS.out)
    unfinished = Unfinished(out.with_name(f"{out.name}_unfinished"))
    fields = inpaint(
        trained, FLAGS.observations, FLAGS.members, FLAGS.seed, FLAGS.time,
        columns=columns, sigma=FLAGS.sigma, step=FLAGS.step, method=FLAGS.method, raw=FLAGS.raw, chunk=FLAGS.chunk,
        leave_out=FLAGS.leave_out, unfinished=unfinished,
    )  # fmt: skip
    readers.write_dataset(fields, FLAGS.out)
    if FLAGS.figure:
        figure(fields, FLAGS.figure)
    unfinished.remove()
    count = fields.sizes["time"]
    print(
        f"wrote {FLAGS.out}: {count} field{'s' * (count > 1)} of {FLAGS.members} members from "
        f"{fields.attrs['observations']} observations"
    )


if __name__ == "__main__":
    _define_flags()
    command.run(main)
