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
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd
import xarray as xr
from absl import logging

from jax_repaint import observe
from jax_repaint.data import readers
from jax_repaint.data.cf import MESH, is_flag, opened, read_points, unpack_limits
from jax_repaint.data.fields import Fields, unmasked
from jax_repaint.data.source import Choice, Source, attribute, dims_of, door, instant
from jax_repaint.errors import InputError
from jax_repaint.observe import Observation

TABLES = (".csv", ".txt", ".tsv", ".dat")
TOO_FAST = 50.0  # m/s; no current, but a wrong unit or an undeclared fill value
SHOWN = 5
OF_POINTS = re.compile(r"(traj(ector(y|ies))?|drifter|buoy|float|glider|profile|station)s?(_?id)?|obs", re.IGNORECASE)
POINT = "point of a track"  # dimension; no variable is called so
LEAVE_OUT = "--leave_out (leave_out=True) leaves them out"
UNKNOWN = np.datetime64("NaT", "ns")
STANDARD = "sea_water_velocity"
NAMES = {
    "lat": ("lat", "latitude", "nav_lat"),
    "lon": ("lon", "longitude", "long", "lng", "nav_lon"),
    "u": ("u", "uo", "water_u", "ucur", "ewct", "u_east", "u_eastward", "eastward", "ve", f"eastward_{STANDARD}"),
    "v": ("v", "vo", "water_v", "vcur", "nsct", "v_north", "v_northward", "northward", "vn", f"northward_{STANDARD}"),
    "sigma": ("sigma", "error", "std", "uncertainty", "standard_error", "err", "std_err", "stderr", "sd"),
    "time": ("time", "datetime", "timestamp", "date_time", "date", "date/time", "obs_time"),
}
NAMES |= {
    f"sigma_{c}": tuple(
        name
        for word in ("sigma", "error", "std", "err", "sd", "uncertainty")
        for name in (f"{word}_{c}", f"{c}_{word}")
    )
    for c in "uv"
}
# In the output of OpenDrift x is east.
NAMES |= {"u": (*NAMES["u"], f"x_{STANDARD}"), "v": (*NAMES["v"], f"y_{STANDARD}")}
STANDARD_NAMES = {
    "lat": "latitude",
    "lon": "longitude",
    "u": f"eastward_{STANDARD}",
    "v": f"northward_{STANDARD}",
    "sigma_u": f"eastward_{STANDARD} standard_error",
    "sigma_v": f"northward_{STANDARD} standard_error",
    "time": "time",
}
NEEDED = ("lat", "lon", "u", "v")
VELOCITIES = ("u", "v", "sigma", "sigma_u", "sigma_v")
# Names of columns that say at which depth a row was observed, without the unit behind them; and of quality flags.
UNIT = re.compile(r"\s*[\[(].*[\])]$|[\s_]+(m|met(er|re)s?|d?bars?)$")
DEPTH = re.compile(
    r"((sensor|instrument|nominal|measurement|obs|sample|drogue|bin|cell)[\s_]?)?(depths?|deph)"
    r"|z|lev(el)?s?|bins?|layers?|pres(s|sure)?|depth[\s_](bin|level|layer|cell)",
    re.IGNORECASE,
)
COUNTED = re.compile(r"lev|bin|layer|cell", re.IGNORECASE)
SWAY = 2.0  # m or dbar, within which a vehicle keeps a depth
OF_DEPTH = ("depth", "sea_water_pressure")  # begin the standard names
# A unit of speed at the end of a name, such as u_cm_s or "speed [kn]".
SPEED = re.compile(
    r"(?:^|[\W_])((k|c|d|m|kilo|centi|deci|milli)?(?:m|met(?:er|re)s?)[\W_]*(?:p|per)?[\W_]*(s|sec|seconds?|h|hr|hours?)"
    r"(?:[\W_]*[1¹])?|kn|kts?|knots?|mph|(?:ft|feet)[\W_]*(?:p|per)?[\W_]*s)[\W_]*$",
    re.IGNORECASE,
)
ZONE = re.compile(r"(?<=\w)[\s_-]*[\[(]?(utc|gmt)[\])]?$")
WHEN = re.compile(
    r"(?<![a-z])((date|unix|m)?time(stamp)?|date(num)?|(year)?day|year|month|hour|minute|second|sec|when|epoch|unix|utc|gmt"
    r"|elapsed|julian|jd|doy)s?(?![a-z])"
)
DATE = r"\d{1,4}([-/.])\d{1,2}\1\d{1,4}(\D.*)?"
DAY = r"\d{4}-\d\d-\d\d|\d{8}"
ERROR = re.compile(
    r"(?<![a-z])(sigma|err(or)?s?|std([ _]?(err|dev))?|stderr|stddev|sd|se|rmse?|uncert(ainty)?)(?![a-z])"
)
CLOCK = r"(0 days )?\d\d?:\d\d(:\d\d(\.\d+)?)?\s*(Z|[+-]\d\d(:?\d\d)?)?"
FLAG = re.compile(r"(^|[\W_])(qc|qf|qc_?flags?|flags?|quality)([\W_\d]|$)", re.IGNORECASE)


class Grid(NamedTuple):
    """Where the model lives: ocean (y, x) bool, lat and lon in degrees."""

    ocean: np.ndarray
    lat: np.ndarray
    lon: np.ndarray


class Points(NamedTuple):
    """The table of a track, and which of its rows (m,) have no velocity and do not count."""

    table: pd.DataFrame
    lost: np.ndarray


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
    points = None if table else _points(source, columns, name)
    if points is not None:
        return _from_table(points.table, grid, {}, sigma, when, step, name, leave_out, points.lost)
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
        source = xr.Dataset(dict(zip("uv", source, strict=True)))
    if isinstance(source, xr.Dataset):
        known = any(_dated(variable) for variable in source.coords.values())
        source, errors = _from_xarray(source, columns)
    if isinstance(source, Fields):
        return _from_fields(source, errors, grid, sigma, when, known, leave_out)
    if isinstance(source, np.ndarray | jax.Array):
        source = np.ma.asanyarray(source)
        if source.dtype.kind not in "fiu":
            raise InputError(f"an array of observations holds numbers, got {source.dtype}")
        velocity = unmasked(source)
        _check_cells(velocity, grid, name)
        (velocity,) = _on_ocean(velocity[None], grid, name, leave_out)
        return [_of_cells(velocity, grid, sigma, UNKNOWN if when is None else when, name)]
    raise InputError(
        f"observations are a path, a DataFrame, an xarray Dataset or pair of DataArrays, or an array (y, x, 2); "
        f"got {type(source).__name__}"
    )


def _check_columns(columns: Mapping[str, str] | None) -> dict[str, str]:
    chosen = {key: value for key, value in (columns or {}).items() if value}
    unknown = sorted(chosen.keys() - NAMES.keys())
    if unknown:
        raise InputError(f"names can be given to {', '.join(NAMES)}, not to {unknown[0]!r}")
    return chosen


def _one_time(time: str | np.datetime64) -> np.datetime64:
    try:
        return instant(time)
    except ValueError as e:
        raise InputError(f"time {time!r} is not a date such as 2020-01-04T12:00 in the years 1678..2261") from e


def _is_pair(source: Any) -> bool:
    return isinstance(source, Sequence) and len(source) == 2 and all(isinstance(part, xr.DataArray) for part in source)


# Tables of points


def _read_table(path: Path) -> pd.DataFrame:
    try:
        with path.open(encoding="utf-8-sig") as file:
            head = next((line for line in file if line.strip() and not line.startswith("#")), "")
        separator = max(",;\t", key=head.count)
        with warnings.catch_warnings():
            # Rows longer than the header would lose values with a warning only.
            warnings.simplefilter("error")
            options = {"sep": separator, "dtype": str, "comment": "#", "skipinitialspace": True, "index_col": False,
                       "encoding": "utf-8-sig"}  # fmt: skip
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
    return table


def _find_columns(table: pd.DataFrame, columns: Mapping[str, str], name: str) -> dict[str, Any]:
    """What a column is -> its name in the table."""
    listing = ", ".join(map(str, table.columns)) or "no columns"
    plain = {_plain(column): column for column in table.columns}
    if len(plain) < len(table.columns):
        raise InputError(f"{name} has several columns of one name: {listing}")
    found = {}
    for key, usual in NAMES.items():
        asked = columns.get(key)
        names = (_plain(asked),) if asked else usual
        matches = [column for n in names for column in _called(n, plain, "" if asked else key)]
        if asked and not matches:
            raise InputError(f"{name} has no column {asked!r}; it has {listing}")
        if len(matches) > 1:
            hint = "; a day and a clock time go into one column, such as 2021-09-17T00:10" * (key == "time")
            raise InputError(f"{name} has several columns for {key}, {', '.join(map(str, matches))}; say which{hint}")
        if matches:
            found[key] = matches[0]
    missing = [key for key in NEEDED if key not in found]
    if missing:
        raise InputError(
            f"{name} has no column for {', '.join(missing)} that could be recognised; it has {listing}; name it by "
            f"--{missing[0]}_name=... (columns={{'{missing[0]}': ...}})"
        )
    for one, other in (("u", "v"), ("lat", "lon")):
        if found[one] == found[other]:
            raise InputError(f"{name}: {one} and {other} are one column, {found[one]}; it has {listing}")
    if ("sigma_u" in found) != ("sigma_v" in found):
        raise InputError(f"{name} has an error of one component only; it has {listing}")
    unknown = [str(t) for t in table.columns if t not in found.values() and ERROR.search(_plain(t))]
    if unknown and "sigma" not in found and "sigma_u" not in found:
        logging.warning(
            "%s: %s may hold errors of the velocities, which are not used: name one by --sigma_name=... "
            "(columns={'sigma': ...}), or call them sigma, or sigma_u and sigma_v", name, " and ".join(unknown),
        )  # fmt: skip
    return found


def _plain(title: Any) -> str:
    return str(title).strip().lower()


def _called(name: str, plain: Mapping[str, Any], key: str = "") -> list[Any]:
    """The titles, by what they are plainly, of a name; behind one of a time may stand UTC, of a velocity m/s."""

    def bare(found: str) -> str:
        if key == "time":
            return ZONE.sub("", found)
        before, _, foreign = _unit(found)
        return before if key in VELOCITIES and not foreign else found

    return [title for found, title in plain.items() if name in (found, bare(found))]


def _unit(title: Any) -> tuple[str, str, bool]:
    """A name without the unit of speed behind it, that unit, empty if there is none, and whether it is not m/s."""
    found = SPEED.search(str(title))
    if not found:
        return _plain(title), "", False
    unit, prefix, time = found.groups()
    foreign = bool(not time or prefix or time.lower().startswith("h"))
    return str(title)[: found.start()].strip(" _").lower(), unit.strip(), foreign


def _check_unit(title: Any, name: str) -> None:
    _, unit, foreign = _unit(title)
    if foreign:
        raise InputError(f"{name}: {title} is in {unit} by its name; give velocities and their errors in m/s")


def _check_units(table: pd.DataFrame, columns: Mapping[str, str], name: str) -> None:
    """Refuses velocities and errors whose name, given or as usual, says that they are not in m/s."""
    plain = {_plain(title): title for title in table.columns}
    for key in VELOCITIES:
        asked = columns.get(key, columns.get("sigma") if key.startswith("sigma") else None)
        if asked:
            _check_unit(asked, name)
        elif not any(_called(usual, plain, key) for usual in NAMES[key]):
            for title in plain.values():
                if _unit(title)[0] in NAMES[key]:
                    _check_unit(title, name)


def _rows(bad: np.ndarray) -> str:
    """Such as "row 3" or "rows 3, 8 and 4 more", counted from 0."""
    number = np.flatnonzero(bad)
    shown = ", ".join(map(str, number[:SHOWN]))
    more = f" and {number.size - SHOWN} more" if number.size > SHOWN else ""
    return f"row{'s' * (number.size > 1)} {shown}{more}"


def _numbers(table: pd.DataFrame, found: Mapping[str, Any], name: str) -> dict[str, np.ndarray]:
    """The columns `found`, NaN where something is missing; words are refused, of all columns at once."""
    numbers, wrong = {}, []
    for key, title in found.items():
        column = table[title]
        numbers[key] = np.asarray(pd.to_numeric(column, errors="coerce"), np.float64)
        words = np.isnan(numbers[key]) & column.notna().to_numpy()
        if words.any():
            text = str(column.iloc[int(words.argmax())])[:40]
            wrong.append(f"{title} is not a number in {_rows(words)}, such as {text!r}")
    if wrong:
        raise InputError(f"{name}: {'; '.join(wrong)} (counted from 0)")
    return numbers


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
        columns = [f"{title} is missing or not finite in {_rows(bad)}" for title, bad in missing.items() if bad.any()]
        raise InputError(f"{name}: {'; '.join(columns)} (counted from 0); {LEAVE_OUT}")
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
    logging.warning("%s: left out %s (%s, counted from 0)", name, words, _rows(left_out))


def _same_meridian(lon: np.ndarray, grid: Grid) -> np.ndarray:
    """Longitudes written as those of a regular grid, where the same meridian may be -65 or 295."""
    if grid.lon.ndim > 1:
        return lon
    middle = (grid.lon[0] + grid.lon[-1]) / 2
    return middle + (lon - middle + 180) % 360 - 180


def _with_whole_times(
    table: pd.DataFrame, columns: Mapping[str, str], name: str
) -> tuple[pd.DataFrame, Mapping[str, str]]:
    """With a column of days and one of clock times joined to one, and what the columns are called then.

    Also where one of the two is named: days alone would put all of their rows into one field.
    """
    asked = _plain(columns.get("time", ""))
    plain = {_plain(title): title for title in table.columns}
    usual = [title for n in NAMES["time"] for title in _called(n, plain, "time")]
    found = dict.fromkeys([*_called(asked, plain), *usual])
    if len(found) < 2 or len(plain) < len(table.columns):
        return table, columns
    days, clocks = ([t for t in found if _all_like(pattern, table[t])] for pattern in (DAY, CLOCK))
    named = plain.get(asked)
    days, clocks = ([named] if named in kind else kind for kind in (days, clocks))
    chosen = not asked or named in (*days, *clocks)
    if len(days) != 1 or len(clocks) != 1 or not chosen or (len(found) > 2 and not asked):
        if named in days:
            logging.warning(
                "%s: all rows of a day in %s count for one field, as no other column, or several, hold times of day "
                "such as 06:10", name, named,
            )  # fmt: skip
        return table, columns
    (day,), (clock,) = days, clocks
    # 6:10 is no ISO 8601, but clear.
    hours = _as_text(table[clock]).str.removeprefix("0 days ").str.replace(r"^(?=\d:)", "0", regex=True)
    joined = (_as_text(table[day]) + "T" + hours).where(table[day].notna() & table[clock].notna())
    if asked:
        logging.warning("%s: %s and %s are joined into one time", name, day, clock)
    title = f"{day} and {clock}"
    return table.drop(columns=[day, clock]).assign(**{title: joined}), {**columns, "time": title}


def _as_text(column: pd.Series) -> pd.Series:
    return column.astype(str).str.strip()


def _all_like(pattern: str, column: pd.Series) -> bool:
    known = column.dropna()
    return bool(len(known) and _as_text(known).str.fullmatch(pattern, case=False).all())


def _says_time(column: pd.Series) -> bool:
    """Whether the name or the values of a column are those of several times."""
    title = re.sub("(?<=[a-z])(?=[A-Z])", " ", str(column.name))
    dates = pd.api.types.is_datetime64_any_dtype(column) or _all_like(DATE, column)
    return (dates or bool(WHEN.search(title.lower()))) and not FLAG.search(title) and column.nunique() > 1


def _check_times(table: pd.DataFrame, found: Mapping[str, Any], named: bool, name: str) -> None:
    """Refuses rows of several times that would count for one, and says where those of a day do."""
    unknown = [str(t) for t in table.columns if t not in found.values() and _says_time(table[t])]
    if not unknown:
        return
    if "time" not in found:
        raise InputError(
            f"{name}: {', '.join(unknown)} may hold times, of which none is known; say which by --time_name=... "
            "(columns={'time': ...}), join several into one such as 2020-01-04T12:00, or give one for all rows by "
            "--time (time=...)"
        )
    if not named and _all_like(DAY, table[found["time"]]):
        others = " and ".join(unknown)
        logging.warning(
            "%s: all rows of a day in %s count for one field, whatever their %s", name, found["time"], others
        )


def _times(column: pd.Series, step: str | None, name: str) -> np.ndarray:
    # Of up to seven digits a number counts from somewhere; 20200104 is a date.
    if pd.api.types.is_numeric_dtype(column) or column.astype(str).str.fullmatch(r"\d{1,7}(\.\d*)?").all():
        raise InputError(f"{name}: {column.name} holds numbers; expected dates such as 2020-01-04T12:00")
    try:
        times = pd.to_datetime(column, utc=True, format="ISO8601", errors="coerce").dt.tz_localize(None)
        # `now` and `today` are dates to pandas, another one at every run.
        bad = (times.isna() | column.astype(str).str.strip().isin(["now", "today"])).to_numpy()
        if bad.any():
            text = str(column.iloc[int(bad.argmax())])[:40]
            raise InputError(
                f"{name}: {column.name} is no date such as 2020-01-04T12:00 in {_rows(bad)}: {text!r}; dates are read "
                "as ISO 8601, year first"
            )
        times = times.astype("datetime64[ns]")
    except (ValueError, TypeError, OverflowError, AttributeError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"{name}: {column.name} does not hold dates such as 2020-01-04T12:00 ({e})") from e
    if step is None:
        return times.to_numpy()
    try:
        length = pd.Timedelta(pd.tseries.frequencies.to_offset(step).nanos)
        if length <= pd.Timedelta(0):
            raise ValueError
        # `round` takes halves to the even multiple, so that of half hours every second hour would have three.
        return (times + length / 2).dt.floor(step).to_numpy()
    except ValueError as e:
        raise InputError(f"step {step!r} is not a fixed duration such as 1h or 30min") from e


def _from_table(
    table: pd.DataFrame,
    grid: Grid,
    columns: Mapping[str, str],
    sigma: float,
    when: np.datetime64 | None,
    step: str | None,
    name: str,
    leave_out: bool,
    lost: np.ndarray | None = None,
) -> list[Observed]:
    if isinstance(table.index, pd.DatetimeIndex):
        table = table.rename_axis(index=table.index.name or "time")
    levels = [level for level in table.index.names if level is not None and level not in table.columns]
    table, columns = _with_whole_times(table.reset_index(levels), columns, name)
    _check_units(table, columns, name)
    found = _find_columns(table, columns, name)
    lost = np.zeros(len(table), bool) if lost is None else lost
    if lost.all():
        raise InputError(f"no observation: {name} has no row{' with a velocity' * bool(lost.size)}")
    # A column that was named goes before those that are found.
    own = ("sigma_u", "sigma_v") if "sigma_u" in found and "sigma" not in columns else ("sigma",) * 2
    keys = [key for key in dict.fromkeys((*NEEDED, *own)) if key in found]
    numbers = _numbers(table, {key: found[key] for key in keys}, name)
    dated = when is None and "time" in found
    if step is not None and not dated:
        raise InputError("a step to round times to goes with a column of times, and without time=")
    if when is None:
        _check_times(table, found, named="time" in columns, name=name)
    flags = [str(title) for title in table.columns if FLAG.search(str(title)) and title not in found.values()]
    if flags:
        logging.warning("%s: the quality flags %s do not count; leave bad rows out", name, ", ".join(flags))
    missing = {found[key]: ~np.isfinite(numbers[key]) & ~lost for key in keys}
    if dated:
        missing[found["time"]] = table[found["time"]].isna().to_numpy() & ~lost
    kept = np.flatnonzero(_usable(missing, lost, numbers["lat"], numbers["lon"], grid, name, leave_out))
    _check_depth(table, kept, found.values(), name)
    lat, lon, u, v = (numbers[key][kept] for key in NEEDED)
    errors = np.stack([numbers[key][kept] if key in numbers else np.full(kept.size, float(sigma)) for key in own], -1)
    _check_speed(u, v, name)
    if not (errors > 0).all():
        bad = np.isin(np.arange(len(table)), kept[~(errors > 0).all(1)])
        raise InputError(f"{name}: the error sigma must be positive, but is not in {_rows(bad)}")
    velocity, places, lon = np.stack([u, v], -1), np.stack([lat, lon], -1), _same_meridian(lon, grid)
    points = observe.from_points(lat, lon, velocity, errors, grid.lat, grid.lon, grid.ocean)
    times = np.full(kept.size, UNKNOWN if when is None else when)
    if dated:
        # What stands in rows that are left out does not matter.
        column = table[found["time"]]
        column = column.where(np.isin(np.arange(len(table)), kept), column.iloc[kept[0]])
        times = _times(column, step, name)[kept]
    cells, weights, values, errors = (
        np.asarray(leaf) for leaf in (points.cells, points.weights, points.values, points.sigma)
    )
    collected = []
    for one in np.unique(times):
        rows = np.flatnonzero(np.isnat(times) if np.isnat(one) else times == one)
        observation = observe.from_weights(cells[rows], weights[rows], values[rows], errors[rows])
        collected.append(Observed(one, rows.size, observation, kept[rows], places[rows]))
    return collected


def _says_depth(title: Any) -> bool:
    return bool(DEPTH.fullmatch(UNIT.sub("", str(title).strip().lower())))


def _check_depth(table: pd.DataFrame, kept: np.ndarray, used: Collection[Any], name: str) -> None:
    """Refuses rows of several depths, whose currents would stand for one."""
    for title in (title for title in table.columns if _says_depth(title) and title not in used):
        column = table[title].iloc[kept].dropna()
        numbers = pd.to_numeric(column, errors="coerce")
        values = numbers if numbers.notna().all() else column.astype(str).str.strip()
        several = values.nunique() > 1
        # A level that is counted is one of several, however near; metres sway.
        if several and values is numbers and not COUNTED.search(str(title)):
            several = np.ptp(numbers) > SWAY
        if several:
            low, high = (f"{x:g}" if values is numbers else x for x in (values.min(), values.max()))
            raise InputError(
                f"{name}: rows are of {title} from {low} to {high}, a field is of one depth: keep the rows of one, or "
                f"leave {title} out if it says something else"
            )


def _check_speed(u: np.ndarray, v: np.ndarray, name: str) -> None:
    fastest = max(np.abs(u).max(), np.abs(v).max())
    if fastest > TOO_FAST:
        raise InputError(f"{name}: velocities reach {fastest:.4g} m/s; is a unit wrong, or a fill value undeclared?")


# Tracks


def _points(source: Any, columns: Mapping[str, str], name: str) -> Points | None:
    """The table of a file or data set whose velocities lie at points; None of anything else."""
    if isinstance(source, xr.Dataset):
        return _from_track(source, columns, Source(name))
    paths = readers.files_of(source) if isinstance(source, str | Path) else []
    # A series of files is one of fields.
    if len(paths) != 1 or readers.kind_of(paths[0]) not in ("netcdf", "zarr"):
        return None
    with opened(paths[0]) as dataset, door(paths[0]):
        return _from_track(dataset, columns, Source(name), from_file=True)


def _from_track(
    dataset: xr.Dataset, columns: Mapping[str, str], source: Source, from_file: bool = False
) -> Points | None:
    dataset = _along_points(dataset, columns, source)
    if dataset is None:
        return None
    listing = pd.DataFrame(columns=list(dataset.variables))
    names = _find_columns(listing, _by_standard_name(dataset, columns, listing.columns), source.name)
    if not from_file:
        for key in ("u", "v"):
            if not _units(dataset[names[key]]):
                _check_unit(names[key], source.name)
        dataset = dataset.assign({names[key]: _with_units(dataset[names[key]]) for key in ("u", "v")})
    if "sigma" in columns:
        names = {key: name for key, name in names.items() if key not in ("sigma_u", "sigma_v")}
    table = pd.DataFrame(read_points(dataset, names, source))
    for n in dataset.variables:
        if _is_depth(dataset[n], n) and n not in names.values():
            units = attribute(dataset[n], "units")
            table[f"{n} ({units})" if units else n] = dataset[n].values
    lost = table[["u", "v"]].isna().any(axis=1).to_numpy()
    if lost.any():
        source.notice(f"{lost.sum()} of {len(table)} points have no velocity and are left out")
    source.say()
    return Points(table, lost)


def _by_standard_name(dataset: xr.Dataset, columns: Mapping[str, str], among: Iterable[str]) -> dict[str, str]:
    """The names that the user gave, those of variables whose standard name no other has, and the only one of dates."""
    named = dict(columns)
    for key, standard in STANDARD_NAMES.items():
        matches = [n for n in among if attribute(dataset[n], "standard_name").removeprefix("surface_") == standard]
        if len(matches) == 1:
            named.setdefault(key, matches[0])
    among = [n for n in among if isinstance(n, str)]
    if "time" not in named and not any(_plain(n) in NAMES["time"] for n in among):
        dated = [n for n in among if _dated(dataset[n])]
        if len(dated) == 1:
            named["time"] = dated[0]
    return named


def _first_named(dataset: xr.Dataset, columns: Mapping[str, str], among: Sequence[str]) -> dict[str, str]:
    """What a variable is -> the first that is called so."""
    plain = {n.lower(): n for n in among}
    usual = NAMES | {key: (name,) for key, name in _by_standard_name(dataset, columns, among).items()}
    found = {
        key: [plain[n.strip().lower()] for n in names if n.strip().lower() in plain] for key, names in usual.items()
    }
    return {key: names[0] for key, names in found.items() if names}


def _along_points(dataset: xr.Dataset, columns: Mapping[str, str], source: Source) -> xr.Dataset | None:
    """The variables of points along one dimension, in the order of the file; None of anything else.

    Of points latitude and longitude share their dimension, or have none as those of a mooring. Of trajectories they
    share two, and change with time or are said to be of points. Dimensions of length 1 do not count.
    """
    named = {n: v for n, v in dataset.variables.items() if isinstance(n, str)}
    dims = {n: {d for d in v.dims if dataset.sizes[d] != 1} for n, v in named.items()}
    flat = [n for n in dims if dataset[n].ndim == 1]
    for among in (flat, list(dims)):
        found = _first_named(dataset, columns, among)
        if set(NEEDED) <= found.keys():
            lat, lon, u, v = (dims[found[key]] for key in NEEDED)
            moving = ("time" in found and bool(lat & dims[found["time"]])) or _says_points(dataset, lat)
            mesh = len(u) > 1 and any(MESH.search(str(d)) for d in u)
            if u == v and lat == lon and lat <= u and (len(lat) < 2 or moving) and not mesh:
                break
    else:
        return None
    own = [n for n in dims if dims[n] == u]
    time = _first_named(dataset, columns, own).get("time") or _first_named(
        dataset, columns, [n for n in dims if dims[n] <= u]
    ).get("time")
    whole = dataset[found["u"]]
    extra = [d for d in whole.dims if d in u - lat - (dims[time] if time else set())]
    if extra and len(u) > 1:
        raise source.error(
            f"{found['u']} lies on {dims_of(whole)}; choose one {extra[0]} before, for instance by "
            f"isel({extra[0]}=0) of xarray"
        )
    along = {d: dataset.sizes[d] for d in whole.dims if d in u}
    within = [n for n in dims if dims[n] <= u]
    about = [n for n in within if _is_depth(dataset[n], n) or is_flag(dataset[n], n)]
    # One error may go for all points of a station; vertical coordinates are called sigma too.
    errors = _first_named(
        dataset, columns, [n for n in within if "coordinate" not in attribute(dataset[n], "standard_name")]
    )
    about += [name for key, name in errors.items() if key.startswith("sigma")]
    kept = dict.fromkeys([*own, found["lat"], found["lon"], *([time] if time else []), *about])
    return xr.Dataset({n: _spread(dataset[n].variable, along) for n in kept})


def _says_points(dataset: xr.Dataset, dims: Collection[Hashable]) -> bool:
    """Whether CF's feature type or the name of a dimension tells points from cells of a curvilinear grid."""
    feature = str(dataset.attrs.get("featureType", "")).lower()
    return feature.startswith("trajectory") or any(OF_POINTS.fullmatch(str(d)) for d in dims)


def _is_depth(variable: xr.DataArray, name: str) -> bool:
    standard = attribute(variable, "standard_name")
    return variable.dtype.kind in "fiu" and (standard.startswith(OF_DEPTH) if standard else _says_depth(name))


def _spread(variable: xr.Variable, along: Mapping[str, int]) -> xr.Variable:
    """A variable at every point: repeated along the dimensions that it lacks."""
    some = variable.isel({d: 0 for d in variable.dims if d not in along})
    values = some.to_base_variable().set_dims(dict(along)).transpose(*along).values
    # Limits of packed numbers need the encoding.
    return xr.Variable(POINT, values.ravel(), variable.attrs, variable.encoding)


# Fields with gaps


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
            logging.warning("%s: %s are not known as errors of these velocities and are not used", fields.name, unknown)
        return fields, None
    if understood.wet is not None or understood.facts["components"] != "eastward and northward":
        logging.warning("%s: its errors %s are of other directions or points and are not used", fields.name, errors)
        return fields, None
    u, v = errors.split()
    choice = Choice(u, v, undated=undated, constant=True, directions="east")
    return fields, readers.understand(path, choice, name=f"{fields.name}, errors {u} and {v}")[0]


def _dated(variable: xr.DataArray) -> bool:
    """Whether it holds dates: of NumPy, of cftime, or as numbers since one."""
    of_cftime = variable.dtype.kind == "O" and variable.size > 0 and hasattr(variable.values.flat[0], "calendar")
    return variable.dtype.kind == "M" or of_cftime or " since " in str(variable.attrs.get("units", ""))


def _units(variable: xr.DataArray) -> list[Any]:
    return [value for key, value in variable.attrs.items() if key.lower() in ("unit", "units")]


def _with_units(variable: xr.DataArray) -> xr.DataArray:
    return variable.assign_attrs(units=[*_units(variable), "m s-1"][0])


def _from_xarray(dataset: xr.Dataset, columns: Mapping[str, str]) -> tuple[Fields, Fields | None]:
    """Through a file, so that it is understood as every other file is."""
    for title in (title for title in columns.values() if title in dataset and not _units(dataset[title])):
        _check_unit(title, "the data set")
    fields = {
        name: unpack_limits(_with_units(variable))
        for name, variable in dataset.data_vars.items()
        if variable.dtype.kind in "fiu" and (variable.ndim >= 2 or is_flag(variable, str(name)))
    }
    plain = xr.Dataset(fields, attrs={}).drop_encoding()
    if not any(_dated(variable) for variable in plain.coords.values()):
        times = plain.sizes.get("time", 1)
        if times > 1:
            raise InputError(f"the data set has {times} times without dates; give them dates, or choose one of them")
        plain = plain.drop_vars("time", errors="ignore")
        plain = plain.isel(time=0, missing_dims="ignore").expand_dims(time=[np.datetime64(0, "ns")])
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
        return _read(path, columns, None, "the data set")


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
    return [
        _of_cells(velocity, grid, sigma if errors is None else _errors_of(velocity, day, errors), time, fields.name)
        for time, day, velocity in zip(
            times, fields.time, _on_ocean(fields.velocity, grid, fields.name, leave_out), strict=True
        )
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


def _errors_of(velocity: np.ndarray, time: np.datetime64, errors: Fields) -> np.ndarray:
    """Standard errors (m, 2) of the observed cells of one field."""
    observed = np.isfinite(velocity).all(-1)
    found = errors.velocity[errors.time == time]
    sigma = found[0][observed] if len(found) else np.full((int(observed.sum()), 2), np.nan)
    bad = int((~(sigma > 0)).any(-1).sum())
    if bad:
        raise InputError(
            f"{errors.name}: the errors must be positive, but are not, or are missing, in {bad} of {len(sigma)} "
            f"observed cells at {time.astype('datetime64[s]')}"
        )
    return sigma


def _check_grid(fields: Fields, grid: Grid) -> None:
    def places(lat: np.ndarray, lon: np.ndarray) -> np.ndarray:
        return np.stack(np.meshgrid(lat, lon, indexing="ij") if lat.ndim == 1 else (lat, lon))

    same = fields.shape == grid.ocean.shape
    if same:
        off = places(fields.lat, fields.lon) - places(grid.lat, grid.lon)
        off[1] = (off[1] + 180) % 360 - 180
        # Ten metres: coordinates in float32 are off by less.
        same = np.abs(off).max() <= 1e-4
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
