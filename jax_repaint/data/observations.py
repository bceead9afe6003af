"""What people have observed, in the forms they have it in, as observations on a model's grid in m/s.

    table   CSV file or DataFrame with lat, lon, u, v in m/s, optionally sigma (or sigma_u and sigma_v) and time
    track   the same as variables of a NetCDF or Zarr file or of an xarray Dataset, in their units: of a track, of
            trajectories, of one mooring or of several stations
    field   NetCDF, Zarr or another file of `readers`, or xarray: on the model's grid, missing where nothing is known
    array   (y, x, 2) on the model's grid, NaN where nothing is known

A row of a table is a point: it sees the ocean cells around it with bilinear weights and has an error of its own.
"""

import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd
import xarray as xr
from absl import logging

from jax_repaint import observe
from jax_repaint.data import readers, titles, tracks
from jax_repaint.data.cf import is_flag, is_velocity, of_forecast, unpack_limits
from jax_repaint.data.fields import Fields, mesh, unmasked
from jax_repaint.data.source import Choice, attribute, instant
from jax_repaint.errors import InputError
from jax_repaint.observe import Observation

TABLES = (".csv", ".txt", ".tsv", ".dat")
TOO_FAST = 50.0  # m/s; no current, but a wrong unit or an undeclared fill value
LEAVE_OUT = "--leave_out (leave_out=True) leaves them out"
UNKNOWN = np.datetime64("NaT", "ns")


class Grid(NamedTuple):
    """Where the model lives: ocean (y, x) bool, lat and lon in degrees."""

    ocean: np.ndarray
    lat: np.ndarray
    lon: np.ndarray


class Observed(NamedTuple):
    """Observations of one field in m/s on the model's grid.

    Attributes:
      time: NaT if unknown.
      count: how many.
      observation: what.
      rows: (count,) of the table that they stand in, counted from 0; None if in none.
      places: (count, 2) latitude and longitude of these rows, as in the table.
    """

    time: np.datetime64
    count: int
    observation: Observation
    rows: np.ndarray | None = None
    places: np.ndarray | None = None


def collect(
    source: Any,
    grid: Grid,
    *,
    columns: Mapping[str, str] | None = None,
    sigma: float = 0.005,
    time: str | np.datetime64 | None = None,
    step: str | None = None,
    leave_out: bool = False,
) -> list[Observed]:
    """The observations of every field to inpaint, in the order of time.

    Args:
      source: path, DataFrame, xarray Dataset or pair of DataArrays, Fields, or array (module docstring).
      columns: own names of "lat", "lon", "u", "v", "sigma", "time" where they are not the usual ones.
      sigma: standard error of u and v, m/s, of observations that bring none.
      time: the one time that all observations count for.
      step: times of a table are rounded to multiples of this, "1h" or "30min".
      leave_out: whether rows of a table that are on land, outside the grid or without values, and cells of a field
        that are on land, are left out, with a warning, instead of refused.

    Raises:
      InputError: no observation, one that is not finite, on land, outside the grid or has no positive error; a
        file, a column, a time or a grid that cannot be used.
    """
    columns, when = _check_columns(columns), None if time is None else _one_time(time)
    name = Path(source).name if isinstance(source, str | Path) else "the observations"
    table = isinstance(source, pd.DataFrame) or Path(name).suffix.lower() in TABLES
    points = None if table else tracks.points(source, columns, name, timed=when is None)
    if points is not None:
        return _from_table(points.table, grid, {}, sigma, when, step, name, leave_out, points)
    names = sorted(columns.keys() - {"u", "v"})
    if names and not table:
        raise InputError(f"{name} is no table of points: of fields u and v can be named, not {names[0]}")
    errors = None
    if isinstance(source, str | Path):
        source, errors = (_read_table(Path(source)), None) if table else _read(Path(source), columns, when)
    if isinstance(source, pd.DataFrame):
        return _from_table(source, grid, columns, sigma, when, step, name, leave_out)
    if step is not None:
        raise InputError("a step to round times to goes with tables of points")
    known = True
    if _is_pair(source):
        source = _joined(*source)
    if isinstance(source, xr.Dataset):
        source, errors, known = _from_xarray(source, columns, when)
    if isinstance(source, Fields):
        return _from_fields(source, errors, grid, sigma, when, known, leave_out)
    if isinstance(source, np.ndarray | jax.Array):
        source = np.ma.asanyarray(source)
        if source.dtype.kind not in "fiu":
            raise InputError(f"an array of observations holds numbers, got {source.dtype}")
        velocity = unmasked(source)
        _check_cells(velocity, grid, name)
        present = np.isfinite(velocity)
        if halves := int((present[..., 0] ^ present[..., 1]).sum()):
            logging.warning("%s: %d values have one component only; they count as missing", name, halves)
        (velocity,) = _on_ocean(velocity[None], grid, name, leave_out)
        return [_of_cells(velocity, grid, sigma, UNKNOWN if when is None else when, name)]
    raise InputError(
        f"observations are a path, a DataFrame, an xarray Dataset or pair of DataArrays, or an array (y, x, 2); "
        f"got {type(source).__name__}"
    )


def _check_columns(columns: Mapping[str, str] | None) -> dict[str, str]:
    chosen = {key: value for key, value in (columns or {}).items() if value}
    unknown = sorted(chosen.keys() - titles.NAMES.keys())
    if unknown:
        raise InputError(f"names can be given to {', '.join(titles.NAMES)}, not to {unknown[0]!r}")
    return chosen


def _one_time(time: str | np.datetime64) -> np.datetime64:
    try:
        return instant(time)
    except ValueError as e:
        raise InputError(f"time {time!r} is not a date such as 2020-01-04T12:00 in the years 1678..2261") from e


def _is_pair(source: Any) -> bool:
    return isinstance(source, Sequence) and len(source) == 2 and all(isinstance(part, xr.DataArray) for part in source)


def _joined(u: xr.DataArray, v: xr.DataArray) -> xr.Dataset:
    """One data set of both; coordinates that differ by rounding are those of u."""
    rounded = {n: x for n, x in u.coords.items() if n in v.coords and _same_place(x, v.coords[n])}
    try:
        return xr.merge([u.rename("u"), v.assign_coords(rounded).rename("v")], join="exact", compat="no_conflicts")
    except ValueError as e:
        raise InputError(f"u and v do not lie on the same points and times: {str(e).strip().splitlines()[0]}") from e


def _same_place(one: xr.DataArray, other: xr.DataArray) -> bool:
    if one.dims != other.dims or one.shape != other.shape or one.dtype.kind != "f" or other.dtype.kind not in "fiu":
        return False
    return np.allclose(other.values.astype(float), one.values, rtol=0, atol=readers.SAME_PLACE, equal_nan=True)


def _read_table(path: Path) -> pd.DataFrame:
    try:
        with path.open(encoding="utf-8-sig") as file:
            lines = file.read().splitlines()
        comments = [number for number, line in enumerate(lines) if line.lstrip().startswith("#")]
        first = next((number for number, line in enumerate(lines) if line.strip() and number not in comments), 0)
        head = lines[first] if lines else ""
        separator = max(",;\t", key=head.count)
        if separator not in head and len(head.split()) >= len(titles.NEEDED):
            separator = r"\s+"
        columns = len(re.split(separator, head.strip()))
        like_rows = [n for n in comments if n > first and len(re.split(separator, lines[n].strip())) >= columns]
        with warnings.catch_warnings():
            # Rows longer than the header would lose values with a warning only.
            warnings.simplefilter("error")
            options = {"sep": separator, "dtype": str, "skiprows": comments, "skipinitialspace": True,
                       "index_col": False, "encoding": "utf-8-sig"}  # fmt: skip
            table = pd.read_csv(path, **options)
            # pandas renames a second column of one name.
            names = pd.read_csv(path, header=None, nrows=1, **options).iloc[0].dropna().str.strip().str.lower()
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror or e}") from e
    except Exception as e:
        # Whatever pandas raises on a damaged file.
        lines = str(e).strip().splitlines()
        raise InputError(f"cannot read {path}: {lines[0] if lines else type(e).__name__}") from e
    if names.duplicated().any():
        raise InputError(f"{path.name} has several columns of one name: {', '.join(names)}")
    if like_rows:
        more = f" (as {len(like_rows) - 1} more)" if len(like_rows) > 1 else ""
        logging.warning(
            "%s: line %d looks like a row%s but begins with #, and does not count", path.name, like_rows[0] + 1, more
        )
    return table


def _usable(
    missing: Mapping[str, np.ndarray], lost: np.ndarray, lat: np.ndarray, lon: np.ndarray, grid: Grid, name: str,
    leave_out: bool,
) -> np.ndarray:  # fmt: skip
    """Rows (m,) bool that lie on the ocean of the grid and lack nothing; others are refused, or left out.

    Args:
      missing: title of a column -> rows (m,) bool without a value.
      lost: rows (m,) bool that do not count, whatever they hold; the others keep their numbers.
    """
    without = np.any(list(missing.values()), 0)
    if without.any() and not leave_out:
        gaps = [f"{title} is missing or not finite in {titles.rows_of(m)}" for title, m in missing.items() if m.any()]
        raise InputError(f"{name}: {'; '.join(gaps)} (counted from 0); {LEAVE_OUT}")
    blank = without | lost
    axes = np.ravel(grid.lat)[0], np.ravel(grid.lon)[0]
    filled = [np.where(blank, first, values) for first, values in zip(axes, (lat, lon), strict=True)]
    places = observe.place(filled[0], _same_meridian(filled[1], grid), grid.lat, grid.lon, grid.ocean)
    places = places._replace(outside=places.outside & ~blank, on_land=places.on_land & ~blank)
    elsewhere = (~blank).sum() > 1 and (places.outside | blank).all()
    if elsewhere or not leave_out:
        listed = ~blank if elsewhere else np.ones_like(blank)
        some = observe.Places(*(part if part is None else part[listed] for part in places))
        if wrong := observe.misplaced(some, lat[listed], lon[listed], grid.lat, grid.lon):
            raise InputError(f"{name}: {wrong}{'' if elsewhere else f'; {LEAVE_OUT}'}")
    usable = ~(blank | places.outside | places.on_land)
    if not (usable | lost).all():
        kinds = {"on land": places.on_land, "outside the grid": places.outside, "without values": without}
        _say_left_out(kinds, lost, name)
    return usable


def _say_left_out(kinds: Mapping[str, np.ndarray], lost: np.ndarray, name: str) -> None:
    """Warns of rows (m,) bool of each kind, which are not those that are lost.

    Raises:
      InputError: no other row is left.
    """
    counts = [(int(bad.sum()), kind) for kind, bad in kinds.items() if bad.any()]
    (count, kind), *others = counts
    words = ", ".join([f"{count} observation{'s' * (count > 1)} {kind}", *(f"{n} {other}" for n, other in others)])
    left_out = np.any(list(kinds.values()), 0)
    if (left_out | lost).all():
        raise InputError(f"no observation is left: {name} has {words}")
    logging.warning("%s: left out %s (%s, counted from 0)", name, words, titles.rows_of(left_out))


def _same_meridian(lon: np.ndarray, grid: Grid) -> np.ndarray:
    """Longitudes written as those of a regular grid, where the same meridian may be -65 or 295."""
    if grid.lon.ndim > 1:
        return lon
    middle = (grid.lon[0] + grid.lon[-1]) / 2
    return middle + (lon - middle + 180) % 360 - 180


def _from_table(
    table: pd.DataFrame,
    grid: Grid,
    columns: Mapping[str, str],
    sigma: float,
    when: np.datetime64 | None,
    step: str | None,
    name: str,
    leave_out: bool,
    points: tracks.Points | None = None,
) -> list[Observed]:
    if isinstance(table.index, pd.DatetimeIndex):
        table = table.rename_axis(index=table.index.name or "time")
    levels = [level for level in table.index.names if level is not None and level not in table.columns]
    table, columns = titles.with_whole_times(table.reset_index(levels), columns, name)
    titles.check_units(table, columns, name)
    found = titles.find(table, columns, name)
    lost, depths = (np.zeros(len(table), bool), []) if points is None else (points.lost, points.depths)
    if lost.all():
        raise InputError(f"no observation: {name} has no row{' with a velocity' * bool(lost.size)}")
    # A column that was named goes before those that are found.
    own = ("sigma_u", "sigma_v") if "sigma_u" in found and "sigma" not in columns else ("sigma",) * 2
    keys = [key for key in dict.fromkeys((*titles.NEEDED, *own)) if key in found]
    numbers = titles.numbers(table, {key: found[key] for key in keys}, name)
    dated = when is None and "time" in found
    if step is not None and not dated:
        raise InputError("a step to round times to goes with a column of times, and without time=")
    if when is None:
        titles.check_times(table, found, named="time" in columns, name=name)
    flags = [str(title) for title in table.columns if titles.FLAG.search(str(title)) and title not in found.values()]
    if flags:
        logging.warning("%s: the quality flags %s do not count; leave bad rows out", name, ", ".join(flags))
    missing = {found[key]: ~np.isfinite(numbers[key]) & ~lost for key in keys}
    if dated:
        missing[found["time"]] = table[found["time"]].isna().to_numpy() & ~lost
    kept = np.flatnonzero(_usable(missing, lost, numbers["lat"], numbers["lon"], grid, name, leave_out))
    titles.check_depth(table, kept, found.values(), name, depths)
    lat, lon, u, v = (numbers[key][kept] for key in titles.NEEDED)
    errors = np.stack([numbers[key][kept] if key in numbers else np.full(kept.size, float(sigma)) for key in own], -1)
    _check_speed(u, v, name)
    if not (errors > 0).all():
        bad = np.isin(np.arange(len(table)), kept[~(errors > 0).all(1)])
        raise InputError(f"{name}: the error sigma must be positive, but is not in {titles.rows_of(bad)}")
    velocity, places, lon = np.stack([u, v], -1), np.stack([lat, lon], -1), _same_meridian(lon, grid)
    points = observe.from_points(lat, lon, velocity, errors, grid.lat, grid.lon, grid.ocean)
    times = np.full(kept.size, UNKNOWN if when is None else when)
    if dated:
        # What stands in rows that are left out does not matter.
        column = table[found["time"]]
        column = column.where(np.isin(np.arange(len(table)), kept), column.iloc[kept[0]])
        times = titles.times(column, step, name)[kept]
    cells, weights, values, errors = (
        np.asarray(leaf) for leaf in (points.cells, points.weights, points.values, points.sigma)
    )
    collected = []
    for one in np.unique(times):
        rows = np.flatnonzero(np.isnat(times) if np.isnat(one) else times == one)
        observation = observe.from_weights(cells[rows], weights[rows], values[rows], errors[rows])
        collected.append(Observed(one, rows.size, observation, kept[rows], places[rows]))
    return collected


def _check_speed(u: np.ndarray, v: np.ndarray, name: str) -> None:
    fastest = max(np.abs(u).max(), np.abs(v).max())
    if fastest > TOO_FAST:
        raise InputError(f"{name}: velocities reach {fastest:.4g} m/s; is a unit wrong, or a fill value undeclared?")


def _read(
    path: Path, columns: Mapping[str, str], when: np.datetime64 | None, name: str | None = None
) -> tuple[Fields, Fields | None]:
    """The velocities of a file, and their standard errors if it has some."""
    undated = None if when is None else np.datetime_as_string(when)
    choice = Choice(columns.get("u"), columns.get("v"), undated=undated, constant=True)
    fields, understood = readers.understand(path, choice, name=name)
    errors = understood.facts.get("errors", "")
    if not errors:
        if unknown := understood.facts.get("other errors"):
            logging.warning(
                "%s: %s are not known as errors of these velocities and are not used; their standard_name would be "
                "that of the velocity with standard_error behind it, as 'eastward_sea_water_velocity standard_error'",
                fields.name, unknown,
            )  # fmt: skip
        return fields, None
    if understood.wet is not None or understood.facts["components"] != "eastward and northward":
        logging.warning("%s: its errors %s are of other directions or points and are not used", fields.name, errors)
        return fields, None
    u, v = errors.split()
    over = tuple(understood.facts["pair"].partition(" in ")[0].split(", "))
    choice = Choice(u, v, undated=undated, constant=True, directions="east", over=over)
    return fields, readers.understand(path, choice, name=f"{fields.name}, errors {u} and {v}")[0]


def _from_xarray(
    dataset: xr.Dataset, columns: Mapping[str, str], when: np.datetime64 | None
) -> tuple[Fields, Fields | None, bool]:
    """Through a file, so that it is understood as every other file is; and whether its times have dates."""
    for title in (title for title in columns.values() if title in dataset and not tracks.units_of(dataset[title])):
        titles.check_unit(title, "the data set")
    kept = {
        str(n): x
        for n, x in dataset.data_vars.items()
        if x.dtype.kind in "fiu" or tracks.dated(x) or is_flag(x, str(n))
    }
    velocities = [x for n, x in kept.items() if n in (columns.get("u"), columns.get("v")) or is_velocity(x, n)]
    units = tracks.usual_units(velocities, "the data set")
    plain = xr.Dataset({n: _as_in_files(x, n, units) for n, x in kept.items()}, attrs={}).drop_encoding()
    known = any(tracks.dated(x) for n, x in plain.variables.items() if not of_forecast(x, str(n)))
    if not known:
        times = plain.sizes.get("time", 1)
        if times > 1:
            raise InputError(f"the data set has {times} times without dates; give them dates, or choose one of them")
        if when is None and "time" in plain.coords and plain["time"].dtype.kind not in "fiu":
            text = plain["time"].values.ravel()[0]
            logging.warning("the data set: its time is %s, no date, and does not count", text)
        plain = plain.drop_vars("time", errors="ignore")
        plain = plain.isel(time=0, missing_dims="ignore")
        plain = plain.assign_coords(time=((), np.datetime64(0, "ns"), {"standard_name": "time"}))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "observations.nc"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", xr.SerializationWarning)
                plain.to_netcdf(path, engine="h5netcdf")
        except Exception as e:
            # Whatever xarray raises on attributes and coordinates that no file can hold.
            lines = str(e).strip().splitlines()
            raise InputError(f"the data set cannot be written as NetCDF: {lines[0] if lines else e}") from e
        return *_read(path, columns, None, "the data set"), known


def _as_in_files(variable: xr.DataArray, name: str, units: str) -> xr.DataArray:
    """With its limits as files have them, and with the usual `units` where it may be a velocity or an error of one."""
    if variable.dtype.kind not in "fiu":
        return variable
    place = any(titles.plain(name) in titles.NAMES[axis] for axis in ("lat", "lon", "time"))
    error = attribute(variable, "standard_name").endswith("standard_error")
    speed = error or (variable.ndim >= 2 and not place and not is_flag(variable, name))
    return unpack_limits(tracks.with_units(variable, units) if speed else variable)


def _from_fields(
    fields: Fields, errors: Fields | None, grid: Grid, sigma: float, when: np.datetime64 | None, known: bool,
    leave_out: bool,
) -> list[Observed]:  # fmt: skip
    _check_grid(fields, grid)
    if when is not None and len(fields) > 1:
        raise InputError(f"{fields.name} has {len(fields)} times; one time can be given to one field only")
    times = fields.time if when is None else [when]
    if when is None and not known:
        times = [UNKNOWN]
    series = _on_ocean(fields.velocity, grid, fields.name, leave_out)
    sigmas = np.full_like(series, sigma)
    if errors is not None:
        series, sigmas = _with_errors(series, fields, errors, leave_out)
    some = ~np.isnan(series).any(-1).all((1, 2))
    if not some.any():
        raise InputError(f"{fields.name} has no value in the ocean of the model")
    if not some.all():
        logging.warning(
            "%s: %d of %d times have no value in the ocean of the model, and are left out",
            fields.name, np.sum(~some), some.size,
        )  # fmt: skip
    return [
        _of_cells(velocity, grid, sigma[np.isfinite(velocity).all(-1)], time, fields.name)
        for time, velocity, sigma, left in zip(times, series, sigmas, some, strict=True)
        if left
    ]


def _on_ocean(velocity: np.ndarray, grid: Grid, name: str, leave_out: bool) -> np.ndarray:
    """Velocities (time, y, x, 2) without those of cells that are land of the model.

    Raises:
      InputError: there are such, and they are not to be left out.
    """
    ashore = np.isfinite(velocity).all(-1).any(0) & ~grid.ocean
    if not ashore.any():
        return velocity
    y, x = np.argwhere(ashore)[0]
    said = f"{name} has values in {ashore.sum()} cells that are land of the model, the first one (y={y}, x={x})"
    if not leave_out:
        raise InputError(f"{said}; {LEAVE_OUT}")
    logging.warning("%s; they are left out", said)
    return np.where(ashore[..., None], np.nan, velocity)


def _with_errors(series: np.ndarray, fields: Fields, errors: Fields, leave_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """Velocities (time, y, x, 2) whose errors are positive, and those errors.

    Raises:
      InputError: others have errors that are missing, 0 or negative, and are not to be left out.
    """
    numbers = {time: number for number, time in enumerate(errors.time)}
    none = np.full(series.shape[1:], np.nan)
    sigmas = np.stack([errors.velocity[numbers[time]] if time in numbers else none for time in fields.time])
    observed = np.isfinite(series).all(-1)
    bad = observed & ~(sigmas > 0).all(-1)
    if bad.any():
        day, y, x = np.argwhere(bad)[0]
        time = np.datetime_as_string(fields.time[day], "s")
        said = (
            f"{errors.name}: the errors must be positive, but are not, or are missing, in {bad.sum()} of "
            f"{observed.sum()} observed cells, the first one (y={y}, x={x}) at {time}"
        )
        if not leave_out:
            raise InputError(f"{said}; {LEAVE_OUT}")
        logging.warning("%s; they are left out", said)
    return np.where(bad[..., None], np.nan, series), sigmas


def _check_grid(fields: Fields, grid: Grid) -> None:
    same = fields.shape == grid.ocean.shape
    if same:
        off = mesh(fields.lat, fields.lon) - mesh(grid.lat, grid.lon)
        off[1] = (off[1] + 180) % 360 - 180
        # Ten metres: coordinates in float32 are off by less.
        same = np.abs(off).max() <= readers.SAME_PLACE
    if not same and not _overlap(fields, grid):
        raise InputError(
            f"{fields.name} does not touch the model's grid, the model is of another place: it is at "
            f"{observe.extent(fields.lat, fields.lon)}, the model at {observe.extent(grid.lat, grid.lon)}"
        )
    if not same:
        raise InputError(
            f"{fields.name} is on another grid than the model: {fields.shape} from {fields.lat.min():.4f} N "
            f"{fields.lon.min():.4f} E, the model {grid.ocean.shape} from {grid.lat.min():.4f} N "
            f"{grid.lon.min():.4f} E; give its values as a table of points (lat, lon, u, v)"
        )


def _overlap(fields: Fields, grid: Grid) -> bool:
    """Whether the boxes of both have a place in common; the same meridian may be written as -65 or 295."""
    north, south = min(np.max(fields.lat), np.max(grid.lat)), max(np.min(fields.lat), np.min(grid.lat))
    width = (np.ptp(fields.lon) + np.ptp(grid.lon)) / 2
    middles = [(np.min(lon) + np.max(lon)) / 2 for lon in (fields.lon, grid.lon)]
    apart = abs((middles[0] - middles[1] + 180) % 360 - 180)
    return bool(south <= north and apart <= width)


def _check_cells(velocity: np.ndarray, grid: Grid, name: str) -> None:
    if velocity.shape != (*grid.ocean.shape, 2):
        raise InputError(f"{name} {velocity.shape} is not on the model's grid, (y, x, 2) = {(*grid.ocean.shape, 2)}")


def _of_cells(velocity: np.ndarray, grid: Grid, sigma: float | np.ndarray, time: np.datetime64, name: str) -> Observed:
    observed = np.isfinite(velocity).all(-1)
    if np.isinf(velocity).any():
        raise InputError(f"{name}: a velocity is infinite")
    if observed.any():
        _check_speed(*velocity[observed].T, name)
    observation = observe.from_cells(observed, velocity, sigma, grid.ocean)
    return Observed(time, int(observed.sum()), observation)
