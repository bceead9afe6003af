"""What the columns of a table are, by their titles and values: places, velocities, errors, times, depths.

A table has lat, lon, u, v in m/s, optionally sigma (or sigma_u and sigma_v) and time. What may be one of them, or says
that rows are of several times or depths, and is not known, is refused or said.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pandas as pd
from absl import logging

from jax_repaint.errors import InputError

SHOWN = 5
STANDARD = "sea_water_velocity"
NAMES = {
    "lat": ("lat", "latitude", "nav_lat", "lat_uv"),
    "lon": ("lon", "longitude", "long", "lng", "nav_lon", "lon_uv"),
    "u": ("u", "uo", "water_u", "ucur", "ewct", "u_east", "u_eastward", "eastward", "ve", f"eastward_{STANDARD}"),
    "v": ("v", "vo", "water_v", "vcur", "nsct", "v_north", "v_northward", "northward", "vn", f"northward_{STANDARD}"),
    "sigma": ("sigma", "error", "std", "uncertainty", "standard_error", "err", "std_err", "stderr", "sd"),
    "time": ("time", "datetime", "timestamp", "date_time", "date", "date/time", "obs_time", "time_uv"),
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
UNIT = re.compile(r"\s*[\[(].*[\])]$|[\s_,]+(m|met(er|re)s?|d?bars?)$")
_WATER = r"dep(th(s|\d+|[tuvw])?|h)"
_AFTER = (
    r"bin|level|layer|cell|mean|adjusted|water|(below|of)[\s_](the[\s_])?(sea[\s_])?(surface|observation|instrument)"
)
DEPTH = re.compile(
    rf"((sensor|instr(ument)?|nominal|measurement|obs(ervation)?|sample|drogue|bin|cell|mean)[\s_]?)?{_WATER}"
    rf"|z|lev(el)?s?|n?bins?|layers?|(bin|cell|layer|level)[\s_]?(no|nr|num(ber)?|index|#)\.?|bin#"
    rf"|pres(s|sure)?|({_WATER}|pres(s|sure)?)[\s_,]+({_AFTER})|depsm|prdm",
    re.IGNORECASE,
)
# Of columns that may say it, but are as often about something else; and of those that surely are.
HINTS_DEPTH = re.compile(
    r"(?<![a-z])(z|dep(th|h)?|pres(s|sure)?|height|altitude|lev(el)?|bin|layer|range|prof(undidad)?)(?![a-z])",
    re.IGNORECASE,
)
OTHER_DEPTH = re.compile(
    r"water[\s_]depth|bottom|floor|bed|bathy|count|size|mixed|air|atm|wave|wind|swell|tid(e|al)|sea[\s_](level|surface)|ssh",
    re.IGNORECASE,
)
COUNTED = re.compile(r"lev|bin|layer|cell", re.IGNORECASE)
SWAY = 2.0  # m or dbar, within which a vehicle keeps a depth
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
FLAG = re.compile(r"(^|[\W_])(qc|qf|qc_?flags?|p?flags?|quality|qartod|good|valid)([\W_\d]|$)|[a-z]qc$", re.IGNORECASE)


def find(table: pd.DataFrame, columns: Mapping[str, str], name: str) -> dict[str, Any]:
    """What a column is -> its name in the table."""
    listing = ", ".join(map(str, table.columns)) or "no columns"
    by_name = {plain(column): column for column in table.columns}
    if len(by_name) < len(table.columns):
        raise InputError(f"{name} has several columns of one name: {listing}")
    found = {}
    for key, usual in NAMES.items():
        asked = columns.get(key)
        names = (plain(asked),) if asked else usual
        matches = [column for n in names for column in called(n, by_name, "" if asked else key)]
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
    unknown = [str(t) for t in table.columns if t not in found.values() and ERROR.search(plain(t))]
    if unknown and "sigma" not in found and "sigma_u" not in found:
        logging.warning(
            "%s: %s may hold errors of the velocities, which are not used: name one by --sigma_name=... "
            "(columns={'sigma': ...}), or call them sigma, or sigma_u and sigma_v", name, " and ".join(unknown),
        )  # fmt: skip
    return found


def plain(title: Any) -> str:
    """A title as it is compared: in lower case, without blanks around it."""
    return str(title).strip().lower()


def called(name: str, by_name: Mapping[str, Any], key: str = "") -> list[Any]:
    """The titles, by what they are plainly, of a name; behind one of a time may stand UTC, of a velocity m/s."""

    def bare(found: str) -> str:
        if key == "time":
            return ZONE.sub("", found)
        before, _, foreign = _unit(found)
        return before if key in VELOCITIES and not foreign else found

    return [title for found, title in by_name.items() if name in (found, bare(found))]


def _unit(title: Any) -> tuple[str, str, bool]:
    """A name without the unit of speed behind it, that unit, empty if there is none, and whether it is not m/s."""
    found = SPEED.search(str(title))
    if not found:
        return plain(title), "", False
    unit, prefix, time = found.groups()
    foreign = bool(not time or prefix or time.lower().startswith("h"))
    return str(title)[: found.start()].strip(" _").lower(), unit.strip(), foreign


def check_unit(title: Any, name: str) -> None:
    """Raises InputError at a title that says another unit of speed than m/s."""
    _, unit, foreign = _unit(title)
    if foreign:
        raise InputError(f"{name}: {title} is in {unit} by its name; give velocities and their errors in m/s")


def check_units(table: pd.DataFrame, columns: Mapping[str, str], name: str) -> None:
    """Refuses velocities and errors whose name, given or as usual, says that they are not in m/s."""
    by_name = {plain(title): title for title in table.columns}
    for key in VELOCITIES:
        asked = columns.get(key, columns.get("sigma") if key.startswith("sigma") else None)
        if asked:
            check_unit(asked, name)
        elif not any(called(usual, by_name, key) for usual in NAMES[key]):
            for title in by_name.values():
                if _unit(title)[0] in NAMES[key]:
                    check_unit(title, name)


def rows_of(bad: np.ndarray) -> str:
    """Such as "row 3" or "rows 3, 8 and 4 more", counted from 0."""
    number = np.flatnonzero(bad)
    shown = ", ".join(map(str, number[:SHOWN]))
    more = f" and {number.size - SHOWN} more" if number.size > SHOWN else ""
    return f"row{'s' * (number.size > 1)} {shown}{more}"


def numbers(table: pd.DataFrame, found: Mapping[str, Any], name: str) -> dict[str, np.ndarray]:
    """The columns `found`, NaN where something is missing; words are refused, of all columns at once."""
    numbers, wrong, first = {}, [], []
    for key, title in found.items():
        column = table[title]
        numbers[key] = np.asarray(pd.to_numeric(column, errors="coerce"), np.float64)
        words = np.isnan(numbers[key]) & column.notna().to_numpy()
        if words.any():
            text = str(column.iloc[int(words.argmax())])[:40]
            wrong.append(f"{title} is not a number in {rows_of(words)}, such as {text!r}")
            first.append(np.flatnonzero(words).tolist() == [0])
    if wrong:
        hint = "; remove that row if it has the units" if len(wrong) > 1 and all(first) else ""
        raise InputError(f"{name}: {'; '.join(wrong)} (counted from 0){hint}")
    return numbers


def with_whole_times(
    table: pd.DataFrame, columns: Mapping[str, str], name: str
) -> tuple[pd.DataFrame, Mapping[str, str]]:
    """With a column of days and one of clock times joined to one, and what the columns are called then.

    Also where one of the two is named: days alone would put all of their rows into one field.
    """
    asked = plain(columns.get("time", ""))
    by_name = {plain(title): title for title in table.columns}
    usual = [title for n in NAMES["time"] for title in called(n, by_name, "time")]
    found = dict.fromkeys([*called(asked, by_name), *usual])
    if len(found) < 2 or len(by_name) < len(table.columns):
        return table, columns
    days, clocks = ([t for t in found if _all_like(pattern, table[t])] for pattern in (DAY, CLOCK))
    named = by_name.get(asked)
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


def check_times(table: pd.DataFrame, found: Mapping[str, Any], named: bool, name: str) -> None:
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


def times(column: pd.Series, step: str | None, name: str) -> np.ndarray:
    """Dates of a column (m,) in UTC, rounded to multiples of `step`.

    Raises:
      InputError: numbers, what is no date of ISO 8601, a step that is no fixed duration.
    """
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
                f"{name}: {column.name} is no date such as 2020-01-04T12:00 in {rows_of(bad)}: {text!r}; dates are "
                "read as ISO 8601, year first"
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


def says_depth(title: Any) -> bool:
    """Whether a title is that of a depth, a pressure or the number of a level."""
    return bool(DEPTH.fullmatch(UNIT.sub("", str(title).strip().lower())))


def hints_depth(title: Any) -> bool:
    """Whether a title may be that of a depth, or of something else."""
    bare = re.sub("(?<=[a-z])(?=[A-Z])", " ", str(title))
    return bool(HINTS_DEPTH.search(bare)) and not OTHER_DEPTH.search(bare) and not FLAG.search(bare)


def check_depth(
    table: pd.DataFrame, kept: np.ndarray, used: Collection[Any], name: str, known: Collection[Any] = ()
) -> None:
    """Refuses rows of several depths, whose currents would stand for one; warns where a column may be a depth.

    Args:
      known: columns that are depths, whatever their titles say.
    """
    for title in (title for title in table.columns if title not in used):
        said = title in known or says_depth(title)
        if not said and not hints_depth(title):
            continue
        column = table[title].iloc[kept].dropna()
        numbers = pd.to_numeric(column, errors="coerce")
        values = numbers if numbers.notna().all() else column.astype(str).str.strip()
        several = values.nunique() > 1
        # A level that is counted is one of several, however near; metres sway.
        if several and values is numbers and not COUNTED.search(str(title)):
            several = np.ptp(numbers) > SWAY
        if several:
            low, high = (f"{x:g}" if values is numbers else x for x in (values.min(), values.max()))
            if not said:
                logging.warning(
                    "%s: %s, from %s to %s, does not count; if it is a depth, keep the rows of one",
                    name, title, low, high,
                )  # fmt: skip
                continue
            raise InputError(
                f"{name}: rows are of {title} from {low} to {high}, a field is of one depth: keep the rows of one, or "
                f"leave {title} out if it says something else"
            )
