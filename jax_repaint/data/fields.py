"""Velocity fields on a grid, and what happens to them between the file and the network.

Fields      m/s on disk, (time, y, x, component), row 0 in the south, NaN on land and in gaps
split       chronological parts separated by guard gaps no shorter than the decorrelation time
Standardiser    z = (velocity - mean) / std, land_value on land
pad, crop   zero rows in the north and columns in the east, so that a network can halve the grid
"""

import dataclasses
import hashlib
import math
import re
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from absl import logging
from scipy import fft, signal

from jax_repaint.checks import whole_number
from jax_repaint.data import plane
from jax_repaint.data.staggered import grid_angle
from jax_repaint.errors import InputError

HOUR = np.timedelta64(3_600_000_000_000, "ns")
CORRELATED = math.exp(-1)
LONGEST_LAG = 1 / 4  # of the record: longer lags rest on too few pairs
FEWEST_PAIRED = 1 / 4  # of the frames of a lag, over those of the lag that has most: of campaigns, as of whole records
CELLS_FOR_CORRELATION = 2048
SAME_STEP = 1e-4  # of a step, by which times that were written as fractions are off
FEWEST_LAGGED = 8  # frames of which a decorrelation time can be measured
LEAST_COVERAGE = 0.1  # of the ocean cells: frames with fewer values say too little to train on or to score


@dataclasses.dataclass(frozen=True, eq=False)
class Fields:
    """A series of velocity fields; built and validated by `create`.

    Attributes:
      velocity: (time, y, x, 2) float32, u (eastward) and v (northward) in m/s; NaN on land and in gaps,
        always in both components together.
      ocean: (y, x) bool, True where a current can be measured.
      lat, lon: degrees, float64; (y,) and (x,) on a regular grid, else (y, x). Row 0 is the southernmost.
      time: (time,) datetime64[ns], strictly increasing.
      name: where the fields came from.
    """

    velocity: np.ndarray
    ocean: np.ndarray
    lat: np.ndarray
    lon: np.ndarray
    time: np.ndarray
    name: str = ""

    @classmethod
    def create(
        cls,
        velocity: np.ndarray,
        lat: np.ndarray,
        lon: np.ndarray,
        time: np.ndarray,
        ocean: np.ndarray | None = None,
        name: str = "fields",
        constant: bool = False,
    ) -> "Fields":
        """Validated fields; without `ocean`, a cell is ocean if it has a value in at least one frame.

        A cell with one component only counts as missing in that frame. Ocean cells that miss in some frames
        are gaps: allowed, and reported. A component may be `constant` where the values are a few observations.

        Raises:
          InputError: shapes disagree, coordinates or times cannot be used, there is no ocean cell, a frame is
            empty, a value is infinite, or a component never changes and may not.
        """
        velocity = np.array(unmasked(velocity, np.float32))
        lat, lon, time = unmasked(lat), unmasked(lon), _as_time(time, name)
        _check_shapes(velocity, time, name)
        check_grid(lat, lon, velocity.shape[1:3], name)
        _check_times(time, name)
        if np.isinf(velocity).any():
            frame = int(np.flatnonzero(np.isinf(velocity).any((1, 2, 3)))[0])
            raise InputError(f"{name}: frame {frame} ({_date(time[frame])}) holds infinite velocities")
        present = ~np.isnan(velocity)
        halves = present[..., 0] ^ present[..., 1]
        present = present.all(-1)
        if halves.any():
            logging.warning("%s: %d values have one component only; they count as missing", name, int(halves.sum()))
        ocean = present.any(0) if ocean is None else np.array(ocean, bool)
        if ocean.shape != velocity.shape[1:3]:
            raise InputError(f"{name}: ocean is {ocean.shape} but the grid is {velocity.shape[1:3]}")
        if not ocean.any():
            raise InputError(f"{name}: no ocean cell, every value is missing; is the mask or the fill value wrong?")
        present &= ocean
        velocity[~present] = np.nan
        fields = cls(velocity, ocean, lat, lon, time, name)
        _check_values(fields, present, constant)
        return fields

    def __len__(self) -> int:
        return len(self.velocity)

    @property
    def u(self) -> np.ndarray:
        """Eastward velocity, a view (time, y, x)."""
        return self.velocity[..., 0]

    @property
    def v(self) -> np.ndarray:
        """Northward velocity, a view (time, y, x)."""
        return self.velocity[..., 1]

    @property
    def shape(self) -> tuple[int, int]:
        """(y, x)."""
        return self.ocean.shape

    @property
    def gaps(self) -> float:
        """Fraction of the values on ocean cells that are missing."""
        return float(np.isnan(self.u)[:, self.ocean].mean())

    @property
    def present(self) -> np.ndarray:
        """(time, y, x) bool, True where there is a value; False on land."""
        return ~np.isnan(self.u)

    @property
    def coverage(self) -> np.ndarray:
        """(time,) fraction of the ocean cells that have a value in each frame."""
        return self.present[:, self.ocean].mean(1)

    @property
    def step(self) -> np.timedelta64:
        """Median time between frames.

        Raises:
          InputError: fewer than two frames.
        """
        if len(self) < 2:
            raise InputError(f"{self.name}: one frame has no time step")
        return np.median(np.diff(self.time).astype(np.int64)).astype("timedelta64[ns]")

    @property
    def spacing(self) -> tuple[float, float]:
        """Median distance in metres between neighbouring cells to the north and to the east."""
        place = plane.on_sphere(*self._positions())
        north, east = (np.linalg.norm(np.diff(place, axis=axis), axis=-1) for axis in (0, 1))
        return float(np.median(north)), float(np.median(east))

    def cell_sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Sizes of the cells along x and along y, each (y, x), in metres."""
        place = plane.on_sphere(*self._positions())
        dx, dy = (np.linalg.norm(np.gradient(place, axis=axis), axis=-1) for axis in (1, 0))
        return dx, dy

    def metres(self) -> np.ndarray:
        """Cell centres (y, x, 2): metres north and east of the domain's centre, on the plane there (`plane`)."""
        return plane.metres(*self._positions())

    def convergence(self) -> np.ndarray:
        """Angle (y, x), radians counterclockwise, by which a cell's own east and north are turned on that plane."""
        return plane.convergence(*self._positions())

    def _positions(self) -> tuple[np.ndarray, np.ndarray]:
        """Latitude and longitude of cells (y, x)."""
        return (self.lat, self.lon) if self.lat.ndim == 2 else np.meshgrid(self.lat, self.lon, indexing="ij")

    def along_grid(self, velocity: np.ndarray) -> np.ndarray:
        """Components (..., y, x, 2) along growing x and growing y of eastward and northward ones.

        Rows of a regular grid run east; those of another one at an angle, and its y grows to the left of them or to the
        right (`staggered.grid_angle`).
        """
        if self.lat.ndim == 1:
            return velocity
        angle, hand = grid_angle(self.lat, self.lon)
        east, north = velocity[..., 0], velocity[..., 1]
        cosine, sine = np.cos(angle), np.sin(angle)
        return np.stack([east * cosine + north * sine, hand * (north * cosine - east * sine)], -1)

    def places(self) -> np.ndarray:
        """Cell centres (y, x, 2), as `metres`, in units of the distance between neighbours to the north."""
        return self.metres() / self.spacing[0]

    def hash(self) -> str:
        """Fingerprint of the content (everything but the name), equal on every machine; 32 hex digits."""
        digest = hashlib.blake2b(repr(self.velocity.shape).encode(), digest_size=16)
        parts = [*self.velocity, self.lat, self.lon]
        for part in parts:
            digest.update(np.ascontiguousarray(part, part.dtype.newbyteorder("<")).tobytes())
        digest.update(self.ocean.tobytes())
        digest.update(self.time.astype("<i8").tobytes())
        return digest.hexdigest()

    def select(self, index: np.ndarray | slice | Sequence[int]) -> "Fields":
        """The frames of `index`, on the same grid and the same ocean."""
        return dataclasses.replace(self, velocity=self.velocity[index], time=self.time[index])

    def covered(self, fraction: float = 1.0) -> "Fields":
        """The same fields with land where less than `fraction` of the frames have a value.

        Frames that had values nowhere else are left out.

        Raises:
          InputError: no cell is covered that often.
        """
        ocean = self.ocean & (self.present.mean(0) >= fraction)
        kept = (self.present & ocean).any((1, 2))
        if ocean.any() and not kept.all():
            logging.warning("%s: %d of %d frames keep no value and are left out", self.name, (~kept).sum(), len(kept))
        else:
            kept[:] = True
        return type(self).create(self.velocity[kept], self.lat, self.lon, self.time[kept], ocean, self.name)


def unmasked(values: np.ndarray, dtype: type = np.float64) -> np.ndarray:
    """Floats, NaN where a NumPy masked array hides a value; `np.asarray` takes what is hidden."""
    if isinstance(values, np.ma.MaskedArray):
        values = values.astype(dtype).filled(np.nan)
    return np.asarray(values, dtype)


def in_nanoseconds(time: np.ndarray | np.datetime64) -> np.ndarray:
    """The same times as datetime64[ns].

    Raises:
      OverflowError: a year outside 1678..2261, of which NumPy would make another one.
    """
    exact = np.asarray(time).astype("datetime64[ns]")[()]
    if ((exact.astype(time.dtype) != time) & ~np.isnat(time)).any():
        raise OverflowError(f"{time} is not in the years 1678..2261")
    return exact


def _as_time(time: np.ndarray, name: str) -> np.ndarray:
    time = np.asarray(time)
    if time.dtype.kind != "M":
        raise InputError(f"{name}: time must hold dates (datetime64), got {time.dtype}")
    try:
        return in_nanoseconds(time)
    except OverflowError as e:
        raise InputError(f"{name}: times from {time.min()} to {time.max()} are not all in the years 1678..2261") from e


def _date(time: np.datetime64) -> str:
    return str(time.astype("datetime64[s]"))


def _check_shapes(velocity, time, name) -> None:
    if velocity.ndim != 4 or velocity.shape[-1] != 2:
        raise InputError(f"{name}: velocity must be (time, y, x, 2), got {velocity.shape}")
    frames, y, x = velocity.shape[:3]
    if time.shape != (frames,):
        raise InputError(f"{name}: {time.size} times for {frames} frames")
    if not frames:
        raise InputError(f"{name}: no frame")
    if y < 2 or x < 2:
        raise InputError(f"{name}: a grid of {(y, x)} cells is too small; at least 2 x 2 are needed")


def check_grid(lat: np.ndarray, lon: np.ndarray, shape: tuple[int, int], name: str) -> None:
    """Raises InputError unless lat and lon, degrees, are the axes (y), (x) or the positions (y, x) of a grid."""
    if (lat.shape, lon.shape) not in (((shape[0],), (shape[1],)), (shape, shape)):
        raise InputError(f"{name}: latitude {lat.shape} and longitude {lon.shape} do not fit a grid of {shape}")
    if not (np.isfinite(lat).all() and np.isfinite(lon).all()):
        raise InputError(f"{name}: latitude or longitude is missing in some cells")
    if np.abs(lat).max() > 90:
        raise InputError(f"{name}: latitude {lat.flat[np.abs(lat).argmax()]} is beyond the pole; degrees are expected")
    for what, axis in (("latitude", lat), ("longitude", lon)):
        if axis.ndim == 1 and not (np.diff(axis) > 0).all():
            raise InputError(f"{name}: {what} must increase along its axis; row 0 is the southernmost")


def mesh(lat: np.ndarray, lon: np.ndarray) -> np.ndarray:
    """(2, y, x) degrees, also of a regular grid."""
    return np.stack(np.meshgrid(lat, lon, indexing="ij") if lat.ndim == 1 else (lat, lon))


def _check_times(time, name) -> None:
    if np.isnat(time).any():
        raise InputError(f"{name}: the time of frame {int(np.isnat(time).argmax())} is missing")
    backwards = np.flatnonzero(np.diff(time) <= np.timedelta64(0, "ns"))
    if backwards.size:
        i = int(backwards[0])
        raise InputError(
            f"{name}: time must increase, but frame {i + 1} ({_date(time[i + 1])}) does not follow "
            f"frame {i} ({_date(time[i])}); sort them, and keep each time once (in xarray "
            "sortby('time').drop_duplicates('time'))"
        )


def _check_values(fields: Fields, present: np.ndarray, constant: bool) -> None:
    name = fields.name
    empty = np.flatnonzero(~present.any((1, 2)))
    if empty.size:
        shown = ", ".join(f"{i} ({_date(fields.time[i])})" for i in empty[:5])
        more = f" and {empty.size - 5} more" if empty.size > 5 else ""
        raise InputError(f"{name}: no value in frame {shown}{more}; leave such frames out")
    for component, values in (("u", fields.u), ("v", fields.v)):
        # A single frame may hold a few observations that are equal.
        if len(fields) > 1 and not constant and np.nanmin(values) == np.nanmax(values):
            raise InputError(f"{name}: {component} is {np.nanmin(values)} m/s everywhere and always")
    gaps = fields.gaps
    if gaps:
        logging.warning("%s: %.2g %% of the values on ocean cells are missing", name, 100 * gaps)


def autocorrelation(fields: Fields) -> np.ndarray:
    """Autocorrelation of the anomalies from each cell's time mean, at lags 0, 1, ... frames.

        r(l) = sum w a(t) a(t + l) / N(l)  /  (sum w a(t)^2 / N(0)),   N(l) = sum w over the pairs present

    Sums run over time, ocean cells and components; w is the cosine of the latitude. Of large grids every
    k-th ocean cell is used, so that at most 2,048 count. Frames are placed on a regular axis of the median
    time step (the nearest place), where missing frames and gaps take no part. Lags reach to a quarter of the
    record; one of few pairs of frames, as the longest within each of several campaigns, counts as 0.
    """
    place = np.rint((fields.time - fields.time[0]) / fields.step).astype(int)
    length = int(place[-1]) + 1
    cells = np.flatnonzero(fields.ocean)
    cells = cells[:: -(-cells.size // CELLS_FOR_CORRELATION)]
    lat = fields.lat if fields.lat.ndim == 2 else np.broadcast_to(fields.lat[:, None], fields.shape)
    weight = np.cos(np.radians(lat)).ravel()[cells]
    padded = fft.next_fast_len(2 * length, real=True)
    sums = np.zeros((2, padded // 2 + 1))
    for chunk in range(0, cells.size, 64):
        block = slice(chunk, chunk + 64)
        y, x = np.unravel_index(cells[block], fields.shape)
        series = fields.velocity[:, y, x].astype(float)
        present = ~np.isnan(series)
        series = np.where(present, series, 0)
        mean = series.sum(0) / np.maximum(present.sum(0), 1)
        series = np.where(present, series - mean, 0)
        regular = np.zeros((2, length, *series.shape[1:]))
        regular[0, place], regular[1, place] = series, present
        spectrum = np.abs(fft.rfft(regular, padded, axis=1)) ** 2
        sums += np.einsum("sfkc,k->sf", spectrum, weight[block])
    lags = np.arange(max(int(LONGEST_LAG * length), 1) + 1)
    covariance, pairs = fft.irfft(sums, padded, axis=1)[:, lags]
    # Where no pair of frames shares a lag, rounding leaves a small number instead of zero.
    known = (pairs > 0.5 * weight.min()) & _often_paired(place, length)[: lags.size]
    covariance = np.where(known, covariance / np.maximum(pairs, 1e-9), 0)
    if not covariance[0] > 0:
        raise InputError(f"{fields.name}: the fields never change, so they have no decorrelation time")
    return covariance / covariance[0]


def _often_paired(place: np.ndarray, length: int) -> np.ndarray:
    """Which lags (length,) have at least a quarter of the pairs of frames that the best one beyond 0 has."""
    there = np.zeros(length)
    there[place] = 1
    pairs = np.rint(signal.correlate(there, there, method="fft")[length - 1 :])
    return (np.arange(length) == 0) | (pairs >= FEWEST_PAIRED * pairs[1:].max(initial=1))


def decorrelation_time(fields: Fields) -> float:
    """Frames after which the fields are no longer alike: the last lag at which |r| is 1/e or more.

        tau = sup { l <= n / 4 : |r(l)| >= 1/e },   r linear between whole lags

    The last such lag, not the first crossing: under tides r falls through zero within hours and is strong
    again a tidal period later. For r = exp(-l / tau) this is the e-folding time tau. A record that is still
    correlated at a quarter of its length gets that quarter, with a warning.

    Raises:
      InputError: fewer than eight frames.
    """
    if len(fields) < FEWEST_LAGGED:
        raise InputError(f"{fields.name}: {len(fields)} frames are too few to measure a decorrelation time")
    strength = np.abs(autocorrelation(fields))
    last = int(np.flatnonzero(strength >= CORRELATED)[-1])
    if last == len(strength) - 1:
        logging.warning(
            "%s: still correlated (%.2f) at lag %d, a quarter of the record",
            fields.name,
            strength[last],
            last,
        )
        return float(last)
    return float(last + (strength[last] - CORRELATED) / (strength[last] - strength[last + 1]))


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Frame numbers of three parts.

    Attributes:
      train, validation, test: int arrays, increasing, disjoint.
      gap: unused frames between the two closest parts.
      decorrelation: measured decorrelation time, frames.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    gap: float = math.nan
    decorrelation: float = math.nan

    def describe(self) -> str:
        """One line for logs and reports."""
        return (
            f"{self.train.size} training, {self.validation.size} validation, {self.test.size} test frames; "
            f"smallest gap {self.gap:.4g} frames, decorrelation time {self.decorrelation:.4g} frames"
        )


def split(
    fields: Fields,
    train: float | str = 0.7,
    validation: float | str = 0.15,
    test: float | str = 0.15,
    gap: int | str | None = None,
    allow_short_gap: bool = False,
) -> Split:
    """Three parts of a series, apart by at least the decorrelation time.

    Args:
      train, validation, test: either fractions of the frames that remain after two gaps, in this order; or
        ranges: frames "0:250" (end excluded), dates "2002-01-01:2002-09-07" or, with times of day,
        "2002-01-01T00:00/2002-09-07T12:00" (end included: the whole day, hour or minute that is named).
      gap: for fractions: unused frames between parts, or a duration "36h" or "3d"; by default the measured
        decorrelation time, rounded up. Durations and that time last as long where frames are closer than elsewhere.
      allow_short_gap: accept gaps shorter than the decorrelation time; logged.

    Raises:
      InputError: ranges overlap, are empty or unreadable, fractions do not fit, or a gap is too short.
    """
    decorrelation = decorrelation_time(fields)
    parts = {"train": train, "validation": validation, "test": test}
    if all(isinstance(part, str) for part in parts.values()):
        if gap is not None:
            raise InputError("a gap goes with fractions; explicit ranges have the gaps between them")
        index = {name: _range(fields, name, part) for name, part in parts.items()}
    elif all(isinstance(part, int | float) for part in parts.values()):
        frames = math.ceil(decorrelation) if gap is None else _gap_frames(fields, gap)
        index = _fractions(fields, parts, frames, lasting=not isinstance(gap, int | float))
    else:
        raise InputError(f"give three fractions or three ranges to split by, not a mixture: {parts}")
    smallest, between = _smallest_gap(fields, index)
    if smallest < decorrelation - SAME_STEP:
        what = (
            f"{fields.name}: the gap between {between} is {smallest:.4g} frames, "
            f"shorter than the decorrelation time of {decorrelation:.4g} frames"
        )
        if not allow_short_gap:
            raise InputError(f"{what}; widen it, or accept the leak by allow_short_gap")
        logging.warning("%s", what)
    return Split(**index, gap=smallest, decorrelation=decorrelation)


def carve(fields: Fields, train: str, share: float = 0.2) -> tuple[str, str]:
    """A range of training frames as two: its first part to train on, its last `share` to validate on, with a gap.

    Raises:
      InputError: the range is empty, unreadable or too short for the decorrelation time.
    """
    index = _range(fields, "train", train)
    gap = math.ceil(decorrelation_time(fields))
    count = round(share * (index.size - gap))
    if count >= 1:
        begin = fields.time[int(index[-1]) + 1 - count]
        apart = int((fields.time[index] > begin - _lasting(fields, gap)).sum()) - count
        gap = max(gap, apart)
    if count < 1 or index.size - gap - count < 2:
        raise InputError(
            f"train range {train!r} holds {index.size} frames, too few for training, a gap of {gap} and validation"
        )
    first, end = int(index[0]), int(index[-1]) + 1
    return f"{first}:{end - count - gap}", f"{end - count}:{end}"


def well_covered(fields: Fields, parts: Split) -> Split:
    """The same parts without the frames in which less than a tenth of the ocean cells have a value; logged.

    Raises:
      InputError: no frame of a part is left.
    """
    enough = fields.coverage >= LEAST_COVERAGE
    kept = {name: part[enough[part]] for name in ("train", "validation", "test") for part in [getattr(parts, name)]}
    for name, part in kept.items():
        left_out = getattr(parts, name).size - part.size
        rule = f"values in less than {100 * LEAST_COVERAGE:g} % of the ocean cells"
        if not part.size:
            raise InputError(f"{fields.name}: all {left_out} {name} frames have {rule}; make land by Fields.covered")
        if left_out:
            logging.warning("%s: %d %s frames have %s and are left out", fields.name, left_out, name, rule)
    return dataclasses.replace(parts, **kept)


def block_split(fields: Fields) -> Split:
    """Repeated blocks of 130 h: 70 train, 10 unused, 15 validation, 10 unused, 15 test, 10 unused.

    Comparable with results that used this split; its gaps of ten hours leak, of which it warns (UserWarning).

    Raises:
      InputError: a part is empty.
    """
    hour = ((fields.time - fields.time[0]) // HOUR) % 130
    index = {
        "train": np.flatnonzero(hour < 70),
        "validation": np.flatnonzero((hour >= 80) & (hour < 95)),
        "test": np.flatnonzero((hour >= 105) & (hour < 120)),
    }
    for name, part in index.items():
        if not part.size:
            raise InputError(f"{fields.name}: the 130-hour block split leaves no {name} frame")
    decorrelation = decorrelation_time(fields)
    hours = decorrelation * (fields.step / HOUR)
    warnings.warn(
        f"the 130-hour block split has gaps of 10 h; these fields decorrelate in {hours:.3g} h; "
        "across shorter gaps validation and test errors look smaller than they are",
        UserWarning,
        stacklevel=2,
    )
    return Split(**index, gap=_smallest_gap(fields, index)[0], decorrelation=decorrelation)


def _range(fields: Fields, name: str, text: str) -> np.ndarray:
    """Frame numbers of a range of frames or dates."""
    frames = re.fullmatch(r"\s*(\d*)\s*:\s*(\d*)\s*", text)
    if frames:
        first, end = frames.groups()
        index = np.arange(len(fields))[int(first or 0) : int(end) if end else None]
    else:
        first, separator, end = (part.strip() for part in text.partition("/" if "/" in text else ":"))
        try:
            if not separator:
                raise ValueError
            after = in_nanoseconds(np.datetime64(first)) if first else fields.time[0]
            before = in_nanoseconds(np.datetime64(end) + 1) if end else fields.time[-1] + HOUR
        except (ValueError, OverflowError) as e:
            raise InputError(
                f"{name} range {text!r} is neither frames (0:250) nor dates (2002-01-01:2002-09-07) in 1678..2261"
            ) from e
        index = np.flatnonzero((fields.time >= after) & (fields.time < before))
    if not index.size:
        raise InputError(
            f"{name} range {text!r} holds no frame; {fields.name} has {len(fields)} frames "
            f"from {_date(fields.time[0])} to {_date(fields.time[-1])}"
        )
    return index


def _gap_frames(fields: Fields, gap: int | str) -> int:
    if not isinstance(gap, str):
        return whole_number("gap", gap, 0)
    try:
        # A number alone would be one of nanoseconds.
        length = pd.Timedelta("NaT" if re.fullmatch(r"\s*[-+]?[\d.]*\s*", gap) else gap)
    except ValueError:
        length = pd.NaT
    if length is pd.NaT:
        raise InputError(f"gap {gap!r} is not a number of frames nor a duration such as 36h or 3d")
    if length < pd.Timedelta(0):
        raise InputError(f"gap must not be negative, got {gap}")
    return math.ceil(length.to_timedelta64() / fields.step)


def _lasting(fields: Fields, frames: int) -> np.timedelta64:
    """From the last frame of a part to the first of the next, with `frames` usual steps unused."""
    return ((frames + 1 - SAME_STEP) * fields.step).astype("timedelta64[ns]")


def _fractions(fields: Fields, parts: Mapping[str, float], gap: int, lasting: bool) -> dict[str, np.ndarray]:
    """Frames of each part; where a gap is `lasting` of as many more as it takes in time."""
    if not min(parts.values()) > 0 or not sum(parts.values()) <= 1 + 1e-9:
        raise InputError(f"fractions to split by must be positive and add up to 1 at most, got {dict(parts)}")
    gaps = [gap, gap]
    while True:
        usable = len(fields) - sum(gaps)
        index, start, share = {}, 0, 0.0
        for (name, fraction), after in zip(parts.items(), [*gaps, 0], strict=True):
            # Rounding the running sum, not each part, loses no frame.
            begin, share = round(share * usable), share + fraction
            count = round(share * usable) - begin
            if usable <= 0 or count <= 0:
                frames = gaps[0] if gaps[0] == gaps[1] else f"{gaps[0]} and {gaps[1]}"
                raise InputError(
                    f"{fields.name}: {len(fields)} frames with two gaps of {frames} frames leave none for {name}"
                )
            index[name] = np.arange(start, start + count)
            start += count + after
        ends = [int(index[name][-1]) for name in list(parts)[:2]]
        needed = [int((fields.time[e + 1 :] < fields.time[e] + _lasting(fields, gap)).sum()) for e in ends]
        if not lasting or all(n <= g for n, g in zip(needed, gaps, strict=True)):
            return index
        # The cuts move with the gaps, which only grow, so that this ends.
        gaps = [max(pair) for pair in zip(needed, gaps, strict=True)]


def _smallest_gap(fields: Fields, index: Mapping[str, np.ndarray]) -> tuple[float, str]:
    """Unused frames (by time, so that holes in the record count) between the closest parts; their names."""
    owner = np.full(len(fields), -1)
    names = list(index)
    for number, name in enumerate(names):
        taken = owner[index[name]]
        if (taken >= 0).any():
            frame = int(index[name][(taken >= 0).argmax()])
            raise InputError(
                f"{names[owner[frame]]} and {name} overlap in {int((taken >= 0).sum())} frames, "
                f"the first is frame {frame} ({_date(fields.time[frame])})"
            )
        owner[index[name]] = number
    used = np.flatnonzero(owner >= 0)
    change = np.flatnonzero(np.diff(owner[used]))
    before, after = used[change], used[change + 1]
    gaps = (fields.time[after] - fields.time[before]) / fields.step - 1
    closest = int(gaps.argmin())
    return float(gaps[closest]), f"{names[owner[before[closest]]]} and {names[owner[after[closest]]]}"


@dataclasses.dataclass(frozen=True, eq=False)
class Standardiser:
    """z = (velocity - mean) / std on ocean, land_value on land; its methods take NumPy and JAX arrays.

    Attributes:
      mean, std: (2,) float32, m/s.
      land_value: (2,) float32, what land holds in standardised units.
    """

    mean: np.ndarray
    std: np.ndarray
    land_value: np.ndarray

    @classmethod
    def create(
        cls, mean: Sequence[float], std: Sequence[float], land_value: Sequence[float] = (0.0, 0.0)
    ) -> "Standardiser":
        """A standardiser of given numbers.

        Raises:
          InputError: not two numbers each, not finite, or std not positive.
        """
        parts = [np.asarray(part, np.float32) for part in (mean, std, land_value)]
        if any(part.shape != (2,) or not np.isfinite(part).all() for part in parts):
            raise InputError(
                f"mean, std and land value must be two finite numbers each, got {mean}, {std}, {land_value}"
            )
        if not (parts[1] > 0).all():
            raise InputError(f"standard deviations must be positive, got {std}; is a component constant?")
        return cls(*parts)

    @classmethod
    def from_fields(
        cls, fields: Fields, index: np.ndarray | slice | None = None, shared_scale: bool = False
    ) -> "Standardiser":
        """Mean and standard deviation over the ocean cells of the training frames `index` (None: all).

        With `shared_scale` both components are divided by the root mean square of their standard deviations,
        which keeps directions and divergence.

        Raises:
          InputError: a component is constant on these frames.
        """
        train = fields.velocity if index is None else fields.velocity[index]
        values = train[:, fields.ocean].reshape(-1, 2)
        if not np.isfinite(values).any():
            raise InputError(f"{fields.name}: no training value to standardise by")
        mean, std = np.nanmean(values, 0, dtype=float), np.nanstd(values, 0, dtype=float)
        # Rounding leaves a deviation of about 1e-8 in a constant component.
        if (std <= 1e-6 * np.abs(mean)).any():
            raise InputError(f"{fields.name}: {'uv'[int(std.argmin())]} is constant on the training frames")
        if shared_scale:
            std = np.full(2, np.sqrt(np.mean(std**2)))
        return cls.create(mean, std)

    def standardise(self, velocity, ocean=None):
        """(velocity - mean) / std as float32, (..., 2) from m/s; land_value where `ocean` (y, x) is False.

        Gaps on ocean cells stay NaN. Without `ocean` every value is taken to be water, as for observations.
        """
        xp = velocity.__array_namespace__()
        z = (velocity.astype(np.float32) - _last(self.mean, velocity)) / _last(self.std, velocity)
        if ocean is None:
            return z
        ocean = ocean.reshape((1,) * (z.ndim - 3) + (*ocean.shape, 1))
        return xp.where(ocean, z, _last(self.land_value, z))

    def restore(self, x):
        """m/s from standardised values (..., 2); land is not marked."""
        return x * _last(self.std, x) + _last(self.mean, x)

    def restore_variance(self, variance):
        """(m/s)^2 from variances (..., 2) in standardised units."""
        return variance * _last(self.std**2, variance)

    def to_json(self) -> dict[str, list[float]]:
        """Lists of numbers that `from_json` reads back exactly."""
        return {field.name: getattr(self, field.name).tolist() for field in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, Sequence[float]]) -> "Standardiser":
        """The standardiser that `to_json` wrote.

        Raises:
          InputError: an entry is missing or not two numbers.
        """
        try:
            return cls.create(content["mean"], content["std"], content["land_value"])
        except (KeyError, TypeError, ValueError) as e:
            if isinstance(e, InputError):
                raise
            raise InputError(f"a standardiser needs mean, std and land_value of two numbers each, got {content}") from e


def _last(pair: np.ndarray, like) -> np.ndarray:
    """`pair` with as many axes as `like`: ranks are never promoted silently."""
    return pair.reshape((1,) * (like.ndim - 1) + (2,))


def padded_shape(shape: tuple[int, int], multiple: int | tuple[int, int]) -> tuple[int, int]:
    """The smallest (y, x) not below `shape` whose sides are multiples of `multiple`."""
    multiple = (multiple, multiple) if isinstance(multiple, int) else multiple
    return tuple(-(-side // m) * m for side, m in zip(shape, multiple, strict=True))


def pad(x, multiple: int | tuple[int, int]):
    """(..., y, x, c) with zero rows in the north and zero columns in the east, to multiples of `multiple`."""
    y, width = x.shape[-3:-1]
    to_y, to_x = padded_shape((y, width), multiple)
    widths = [(0, 0)] * (x.ndim - 3) + [(0, to_y - y), (0, to_x - width), (0, 0)]
    return x.__array_namespace__().pad(x, widths)


def crop(x, shape: tuple[int, int]):
    """(..., y, x, c) without the rows and columns that `pad` added to a grid of `shape`."""
    return x[..., : shape[0], : shape[1], :]


def prepare(
    fields: Fields, standardiser: Standardiser, multiple: int | tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """What a network sees: standardised fields (time, Y, X, 2) float32, padded with land, and ocean (Y, X) bool.

    Raises:
      InputError: ocean cells have gaps, for which no value would be true.
    """
    if fields.gaps:
        complete = int((~np.isnan(fields.u)[:, fields.ocean]).all(1).sum())
        raise InputError(
            f"{fields.name}: {100 * fields.gaps:.2g} % of the values on ocean cells are missing and "
            f"{complete} of {len(fields)} frames are complete; use those, or make the cells with gaps land "
            "(Fields.covered)"
        )
    return prepare_with_gaps(fields, standardiser, multiple)[:2]


def prepare_with_gaps(
    fields: Fields, standardiser: Standardiser, multiple: int | tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `prepare`, with zero (the mean) in gaps, and present (time, Y, X) bool, True where there is a value."""
    x = standardiser.standardise(fields.velocity, fields.ocean)
    x = pad(np.where(np.isnan(x), np.float32(0), x), multiple)
    ocean, present = (pad(cells[..., None], multiple)[..., 0] for cells in (fields.ocean, fields.present))
    # The padding is land, in value too.
    return np.where(ocean[..., None], x, _last(standardiser.land_value, x)), ocean, present
