"""What the readers share: where fields come from, what is said about it, and where libraries meet a file."""

import contextlib
import dataclasses
import os
import re
import warnings
from collections.abc import Hashable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr
from absl import logging

from jax_repaint.data.fields import Fields, in_nanoseconds
from jax_repaint.errors import InputError

LONGEST = 200  # characters of a library's own message; some quote the file
SUSPECT = 5.0  # m/s; where many values are the largest and above that, they stand for missing ones
TOO_FAST = 50.0  # m/s; no current, but an undeclared fill value
ZEROS = 0.01  # of the values; exact zeros of both components are rarer in currents
FAST = 3.0  # m/s, on average; currents of whole seas have tenths of it


def instant(time: str | np.datetime64) -> np.datetime64:
    """A date as ISO 8601 writes it, in UTC where it has no zone; datetime64[ns].

    Raises:
      ValueError: a number, `now`, a text that is no such date (which of 04/01/2020 is the month nobody can tell), or a
        year outside 1678..2261.
    """
    if isinstance(time, int | float | np.number) or (isinstance(time, str) and not time.strip()[:1].isdigit()):
        raise ValueError(time)
    try:
        parsed = pd.to_datetime(time, utc=True, format="ISO8601" if isinstance(time, str) else None)
        parsed = in_nanoseconds(parsed.tz_localize(None).to_datetime64())
    except (TypeError, OverflowError, AttributeError) as e:
        raise ValueError(time) from e
    if np.isnat(parsed):
        raise ValueError(time)
    return parsed


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the user says about a file where the file leaves it open; see `readers.read`.

    Attributes:
      over: velocities along whose dimensions u and v, which are their errors, are repeated where they lack some.
    """

    u: str | None = None
    v: str | None = None
    grid: str | os.PathLike | None = None
    depth: float | None = None
    level: int | None = None
    time: str | None = None
    directions: str | None = None
    undated: str | None = None
    constant: bool = False
    over: tuple[str, str] | None = None


@dataclasses.dataclass
class Source:
    """One file or series on its way to `Fields`: its name, notices for the user and what was understood.

    Attributes:
      name: in messages.
      notices: texts without the name, in the order of their discovery, and how many files each is about.
      facts: topic to sentence, for `python -m jax_repaint.data.describe`.
      wet: faces of u and v on a C-grid that hold a value in some frame; given, those of the whole series.
    """

    name: str
    notices: dict[str, int] = dataclasses.field(default_factory=dict)
    facts: dict[str, str] = dataclasses.field(default_factory=dict)
    wet: tuple[np.ndarray, np.ndarray] | None = None

    def error(self, text: str) -> InputError:
        """The exception for what cannot be used."""
        return InputError(f"{self.name}: {text}")

    def notice(self, text: str) -> None:
        """Remembers what the user should know; said once by `say`."""
        self.notices.setdefault(text, 1)

    def take(self, other: "Source") -> None:
        """Adds the notices and facts of one file of a series."""
        for text in other.notices:
            self.notices[text] = self.notices.get(text, 0) + 1
        self.facts |= other.facts

    def say(self) -> None:
        """Logs the notices; of a series, how many files each is about."""
        for text, count in self.notices.items():
            logging.warning("%s: %s%s", self.name, text, f" (in {count} files)" if count > 1 else "")


@dataclasses.dataclass(frozen=True, eq=False)
class Raw:
    """Fields before validation: u, v (time, y, x) in m/s, eastward and northward; ocean (y, x) or None."""

    u: np.ndarray
    v: np.ndarray
    lat: np.ndarray
    lon: np.ndarray
    time: np.ndarray
    ocean: np.ndarray | None = None


NO_DEGREES = re.compile(
    r"(?i:rad.*|degrees?_(w(est)?|s(outh)?)|k?m|(kilo)?met(er|re)s?|(arc)?_?(min|sec).*)|degrees?[WS]"
)
PROJECTED = {
    axis: (f"projection_{axis.lower()}_coordinate", f"projection_{axis.lower()}_angular_coordinate", f"grid_{place}")
    for axis, place in (("X", "longitude"), ("Y", "latitude"))
}
# Names of dimensions of which nobody doubts which is which; i and j are used either way.
ALONG = {
    "X": re.compile(r"n?x|x[cghqt]|x_\w+|xi(_\w+)?|r?lon(gitude)?|col(umn)?s?", re.IGNORECASE),
    "Y": re.compile(r"n?y|y[cghqt]|y_\w+|eta(_\w+)?|r?lat(itude)?|rows?", re.IGNORECASE),
}


def attribute(variable: xr.DataArray | xr.Variable, name: str) -> str:
    """An attribute as text, empty where it is absent."""
    return str(variable.attrs.get(name, "")).strip()


def dims_of(variable: xr.DataArray) -> str:
    """Dimensions and their lengths, such as (time=24, lat=10, lon=12)."""
    return "(" + ", ".join(f"{d}={n}" for d, n in variable.sizes.items()) + ")"


def rows_first(dims: tuple, dataset: xr.Dataset) -> tuple:
    """Two horizontal dimensions as (y, x), where coordinates or names tell that they are (x, y); others as they are."""
    if len(dims) == 2 and _runs_along(dims[0], "X", dataset) and _runs_along(dims[1], "Y", dataset):
        return dims[::-1]
    return dims


def _runs_along(dim: Hashable, axis: str, dataset: xr.Dataset) -> bool:
    coordinate = dataset.variables.get(dim, xr.Variable((), 0))
    said, standard = attribute(coordinate, "axis").upper(), attribute(coordinate, "standard_name")
    if said or standard in {name for names in PROJECTED.values() for name in names}:
        return said == axis or standard in PROJECTED[axis]
    return bool(ALONG[axis].fullmatch(str(dim)))


@contextlib.contextmanager
def door(path: Path) -> Iterator[None]:
    """Where libraries meet a file: whatever they raise becomes one sentence."""
    try:
        with warnings.catch_warnings():
            # Several fill values, fill values of another type and vague reference dates: xarray decodes them as meant.
            warnings.simplefilter("ignore", xr.SerializationWarning)
            yield
    except InputError:
        raise
    except Exception as e:
        line = next(iter(str(e).strip().splitlines()), "") or type(e).__name__
        raise InputError(f"cannot read {path}: {line if len(line) <= LONGEST else line[:LONGEST] + '...'}") from e


def assemble(raw: Raw, source: Source, constant: bool = False) -> Fields:
    """Validated fields, turned so that row 0 is south and column 0 west; frames without any value are dropped."""
    raw = _check(raw, source)
    _check_columns(raw.lon, source)
    raw = _north_up(raw)
    velocity, ocean, time = np.stack([raw.u, raw.v], -1), raw.ocean, raw.time
    missing = np.isnan(velocity).any(-1)
    if ocean is None and not missing.any():
        still = (velocity == 0).all((0, 3))
        if still.any() and not still.all():
            source.notice(f"{still.sum()} cells that are exactly zero in every frame count as land")
            ocean = ~still
    if ocean is not None and ocean.shape == missing.shape[1:]:
        missing |= ~ocean
    empty = missing.all((1, 2))
    zero = (missing | (velocity == 0).all(-1)).all((1, 2)) & ~empty
    if zero.any() and not zero.all():
        source.notice(f"{_frames(zero, time)} exactly zero everywhere; a start from rest is no current to learn")
    held = ~missing & ~zero[:, None, None]
    if held.any() and (share := (velocity[held] == 0).all(-1).mean()) > ZEROS:
        source.notice(f"{100 * share:.2g} % of the values are exactly zero; they count as currents, not as missing")
    if empty.any() and not empty.all() and time.shape == empty.shape:
        source.notice(f"{_frames(empty, time)} without any value and left out")
        velocity, time = velocity[~empty], time[~empty]
    return Fields.create(velocity, raw.lat, raw.lon, time, ocean, source.name, constant)


def _frames(chosen: np.ndarray, time: np.ndarray) -> str:
    """How many frames, with a verb: "2 of 24 frames, the first of 2019-01-01T00:00:00, are"."""
    count, first = int(chosen.sum()), time[int(chosen.argmax())].astype("datetime64[s]")
    verb = "is" if count == 1 else "are"
    which = f"that of {first}," if count == 1 else f"the first of {first},"
    return f"{count} of {chosen.size} frames, {which} {verb}"


def _check(raw: Raw, source: Source) -> Raw:
    if raw.u.shape != raw.v.shape:
        raise source.error(f"u is {raw.u.shape} and v is {raw.v.shape}; they must be equal")
    if raw.u.ndim != 3:
        raise source.error(f"u has {raw.u.ndim} dimensions {raw.u.shape}; expected (time, latitude, longitude)")
    lat, lon = np.atleast_1d(raw.lat), np.atleast_1d(raw.lon)
    for what, x in (("u", raw.u), ("v", raw.v), ("lat", lat), ("lon", lon)):
        if x.dtype.kind not in "fiu":
            raise source.error(f"{what} must hold numbers, got {x.dtype}")
    with np.errstate(over="ignore", invalid="ignore"):
        u, v = raw.u.astype(np.float32), raw.v.astype(np.float32)
    fastest = max(float(np.abs(x[~np.isnan(x)]).max(initial=0)) for x in (u, v))
    if fastest > TOO_FAST:
        raise source.error(f"velocities reach {fastest:.4g} m/s; is a fill value undeclared or a unit wrong?")
    mean = float(np.nanmean(np.hypot(u, v))) if np.isfinite(u + v).any() else 0.0
    if mean > FAST:
        source.notice(f"the mean speed is {mean:.3g} m/s; are the velocities in cm/s?")
    # Speeds find those that were turned.
    for x in (u, v, np.hypot(u, v)):
        extreme = float(np.nanmax(np.abs(x), initial=0))
        count = int((np.abs(x) >= (1 - 1e-5) * extreme).sum())
        if extreme > SUSPECT and count > max(2, 1e-3 * np.isfinite(x).sum()):
            raise source.error(f"{count} values are {extreme:.4g} m/s exactly; is a fill value undeclared?")
    return dataclasses.replace(raw, u=u, v=v, lat=lat.astype(float), lon=lon.astype(float))


def _check_columns(lon: np.ndarray, source: Source) -> None:
    """Refuses columns from both ends of the longitudes, such as -180, -179, 178, 179, which are neighbours."""
    step = np.diff(lon)
    if lon.ndim == 1 and (step > 0).all() and (step > 180).any():
        k = int(step.argmax())
        raise source.error(
            f"longitude has a gap of {step[k]:g} degrees between {lon[k]:g} and {lon[k + 1]:g}; order its columns as "
            f"{lon[k + 1]:g} to {lon[-1]:g}, then {lon[0]:g} to {lon[k]:g}"
        )


def in_degrees(coordinate: xr.DataArray, source: Source) -> None:
    """Refuses a latitude or longitude in radians, minutes or a length, or that counts westward or southward."""
    units = attribute(coordinate, "units")
    if NO_DEGREES.fullmatch(units):
        raise source.error(f"{coordinate.name} has the units {units!r}; degrees east and north are expected")


def _north_up(raw: Raw) -> Raw:
    """Turned by the mean step, so that curvilinear grids turn like regular ones; the date line is no step."""
    u, v, lat, lon, ocean = raw.u, raw.v, raw.lat, raw.lon, raw.ocean
    if lon.ndim == 1:
        lon = np.unwrap(lon, period=360)
    if lat.size and np.diff(lat, axis=0).sum() < 0:
        u, v, lat = u[:, ::-1], v[:, ::-1], lat[::-1]
        lon = lon[::-1] if lon.ndim == 2 else lon
        ocean = None if ocean is None else ocean[::-1]
    if lon.size and ((np.diff(lon) + 180) % 360 - 180).sum() < 0:
        u, v, lon = u[:, :, ::-1], v[:, :, ::-1], lon[..., ::-1]
        lat = lat[:, ::-1] if lat.ndim == 2 else lat
        ocean = None if ocean is None else ocean[:, ::-1]
    return Raw(u, v, lat, lon, raw.time, ocean)
