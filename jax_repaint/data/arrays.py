"""Plain arrays: .npz, MATLAB 5 and 7.3, pickles of NumPy arrays; nothing in them is ever run.

npz       u, v (time, y, x) in m/s, lat, lon, time, and ocean or land (y, x)
mat       u, v (x, y, time) in m/s, ocean_time in days since year 0, lat, lon
pickle    a dictionary or list of the arrays of .mat, or velocity stacks on the grid of Ram Head
"""

import pickle
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import scipy.io

from jax_repaint.data.source import Choice, Raw, Source, door
from jax_repaint.errors import InputError

MATLAB_EPOCH = 719529  # datenum of 1970-01-01
MATLAB_DATES = (600_000, 800_000)  # the years 1642 to 2190; other numbers are not datenums
RAM_HEAD = Path(__file__).with_name("ramhead_grid.npz")
ASSUMED_GRID = "no lat and lon; its grid of 44 x 94 cells is taken to be Ram Head's"
KINDS = "fiubMUS"  # of arrays that are data: no objects, no records


def read_arrays(path: Path, kind: str, choice: Choice, source: Source) -> Raw:
    """The velocities of an .npz, .mat or pickle file.

    Raises:
      InputError: damaged, hostile, or without the arrays that its kind needs.
    """
    for option in ("grid", "depth", "level", "time", "directions"):
        if getattr(choice, option) is not None:
            raise source.error(f"{option} goes with NetCDF and Zarr, not with .npz, .mat or a pickle")
    u, v = choice.u or "u", choice.v or "v"
    source.facts |= {"pair": f"{u}, {v} in m/s", "components": "eastward and northward"}
    if kind == "npz":
        return _read_npz(path, u, v, source)
    arrays = {"mat": _mat5, "mat73": _mat73, "pickle": _unpickle}[kind](path)
    if isinstance(arrays, list):
        return _from_stacks(arrays, source)
    return _from_matlab_order(arrays, u, v, source)


def _read_npz(path: Path, u: str, v: str, source: Source) -> Raw:
    with door(path), path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        missing = [key for key in (u, v, "lat", "lon", "time") if key not in file.files]
        if missing:
            raise InputError(f"{source.name} has no {', '.join(missing)}; it has {', '.join(file.files) or 'nothing'}")
        used = (u, v, "lat", "lon", "time", "ocean", "land")
        arrays = {key: np.asarray(file[key]) for key in used if key in file.files}
    time = parse_time(arrays["time"], source)
    ocean = arrays.get("ocean")
    if ocean is None and "land" in arrays:
        ocean = arrays["land"] == 0
    if ocean is not None and ocean.dtype.kind not in "fiub":
        raise source.error(f"ocean must hold numbers, got {ocean.dtype}")
    ocean = None if ocean is None else np.atleast_2d(ocean)
    return Raw(arrays[u], arrays[v], arrays["lat"], arrays["lon"], time, ocean)


def parse_time(time: np.ndarray, source: Source) -> np.ndarray:
    """datetime64 of datetime64 or ISO 8601 text, without a zone in UTC."""
    if time.dtype.kind == "M":
        return time
    if time.dtype.kind not in "US":
        raise source.error(f"time must hold datetime64 or ISO 8601 text, got {time.dtype}")
    if not time.size:
        return np.zeros(0, "datetime64[ns]")
    try:
        text = time.ravel().astype(str)
        return pd.to_datetime(text, format="ISO8601", utc=True).tz_localize(None).to_numpy()
    except (ValueError, OverflowError) as e:
        raise source.error(f"times such as {str(time.flat[0])[:40]!r} are not ISO 8601") from e


def _mat5(path: Path) -> dict[str, np.ndarray]:
    with door(path):
        content = scipy.io.loadmat(path)
    return {key: x for key, x in content.items() if isinstance(x, np.ndarray) and x.dtype.kind in "fiub"}


def _mat73(path: Path) -> dict[str, np.ndarray]:
    """MATLAB 7.3 is HDF5 in column order: every axis comes reversed."""
    with door(path), h5py.File(path, "r") as file:
        found = {key: x for key, x in file.items() if isinstance(x, h5py.Dataset) and x.dtype.kind in "fiub"}
        return {key: x[()].T for key, x in found.items()}


class _Kind:
    """The type of an array's numbers, as a pickle writes it; None for objects and records, which are not read."""

    def __init__(self, text: str, *_) -> None:
        dtype = np.dtype(_text(text))
        plain = dtype.kind in KINDS and not dtype.hasobject and dtype.subdtype is None and dtype.names is None
        self.dtype = dtype if plain else None

    def __setstate__(self, state: tuple) -> None:
        if self.dtype is None:
            return
        if self.dtype.kind == "M" and len(state) > 8:
            unit, count = state[8][1][:2]
            self.dtype = np.dtype(f"M8[{int(count)}{_text(unit)}]")
        self.dtype = self.dtype.newbyteorder("=" if _text(state[1]) == "|" else _text(state[1]))


class _Array:
    """An array, as a pickle writes it; its `array` is None where it holds objects, which are not read."""

    array = None

    def __init__(self, *_) -> None:
        pass

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, by_column, data = state
        self.array = _from_bytes(data, kind, shape, "F" if by_column else "C").array


def _text(text: str | bytes) -> str:
    return text.decode("latin1") if isinstance(text, bytes) else text


def _from_bytes(data, kind: _Kind, shape: tuple[int, ...], order: str = "C") -> _Array:
    """An array of exactly these bytes."""
    out = _Array()
    if kind.dtype is not None:
        data = data.encode("latin1") if isinstance(data, str) else bytes(memoryview(data))
        out.array = np.frombuffer(data, kind.dtype).reshape(shape, order=order)
    return out


def _bytes(*arguments) -> bytes:
    """What `bytes` and `bytearray` make of text or bytes; of a number they would make that many."""
    text = arguments[0] if arguments else b""
    return text.encode("latin1") if isinstance(text, str) else bytes(memoryview(text))


class _ArraysOnly(pickle.Unpickler):
    """Reads NumPy arrays, numbers, text and plain containers; any other name is refused, not looked up."""

    def find_class(self, module: str, name: str):
        # NumPy's own constructors would build arrays of objects out of bytes: they are never given to a file.
        # New functions and classes at each call: a file can set attributes on what it is given.
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode("latin1")
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray"):
            if name in ("ndarray", "_reconstruct"):
                return type("_Array", (_Array,), {})
            if name == "dtype":
                return type("_Kind", (_Kind,), {})
            if name == "scalar":
                return lambda kind, data=b"": _from_bytes(data, kind, ())
        if (module.removeprefix("numpy.").lstrip("_"), name) == ("core.numeric", "_frombuffer"):
            return lambda data, kind, shape, order: _from_bytes(data, kind, shape, order)
        if module in ("builtins", "__builtin__") and name in ("bytes", "bytearray"):
            return lambda *arguments: _bytes(*arguments)
        raise InputError(f"it refers to {module}.{name}; only NumPy arrays in dict, list and tuple are read")


def _unpickle(path: Path) -> dict[str, np.ndarray] | list[np.ndarray]:
    """The named arrays of a dict; those of a list as u, v, ocean_time, lat, lon; or velocity stacks."""
    with door(path), path.open("rb") as file:
        try:
            content = _ArraysOnly(file, encoding="latin1").load()
        except InputError as e:
            raise InputError(f"cannot read {path}: {e}") from None
    if isinstance(content, Mapping):
        return {str(k): x.array for k, x in content.items() if isinstance(x, _Array) and x.array is not None}
    arrays = [content] if isinstance(content, _Array) else content
    if not isinstance(arrays, list | tuple) or not all(isinstance(x, _Array) and x.array is not None for x in arrays):
        raise InputError(f"{path} holds no NumPy arrays in a dict, list or tuple")
    arrays = [x.array for x in arrays]
    if arrays and all(x.ndim == 4 for x in arrays):
        return arrays
    names = ("u", "v", "ocean_time", "lat", "lon")
    if len(arrays) > len(names):
        raise InputError(f"{path} holds {len(arrays)} arrays; expected {', '.join(names)}, or frames of four axes")
    return dict(zip(names, arrays, strict=False))


def _from_matlab_order(arrays: Mapping[str, np.ndarray], u: str, v: str, source: Source) -> Raw:
    """Fields of u, v (x, y, time), `ocean_time` in days since year 0, and lat, lon."""
    time_name = next((key for key in ("ocean_time", "time") if key in arrays), "ocean_time")
    needed = [key for key in (u, v, time_name) if key not in arrays]
    if needed:
        found = ", ".join(f"{key} {x.shape}" for key, x in arrays.items()) or "no arrays"
        raise InputError(f"{source.name} has no {', '.join(needed)}; it has {found}")
    for key in (u, v):
        if arrays[key].ndim != 3:
            raise source.error(f"{key} is {arrays[key].shape}; expected three axes (x, y, time)")
    time = arrays[time_name].ravel()
    time = _from_datenum(time, source) if time.dtype.kind in "fiu" else parse_time(time, source)
    shape = arrays[u].shape[1::-1]
    lat, lon = (_coordinate(arrays, names, shape) for names in (("lat", "latitude"), ("lon", "longitude")))
    if lat is None or lon is None:
        lat, lon = ram_head()
        if shape != (lat.size, lon.size):
            raise InputError(
                f"{source.name} has no lat and lon, and its grid of {shape[0]} x {shape[1]} cells is not known"
            )
        source.notice(ASSUMED_GRID)
    elif not {lat.dtype.kind, lon.dtype.kind} <= set("fiu"):
        raise source.error(f"lat and lon must hold numbers, got {lat.dtype} and {lon.dtype}")
    else:
        # The shape of a square grid does not tell rows from columns, but latitude varies along y.
        if lat.ndim == lon.ndim == 2 and shape[0] == shape[1] and np.ptp(lat, 1).mean() > np.ptp(lat, 0).mean():
            lat, lon = lat.T, lon.T
        lat, lon = regular(lat, lon)
    if shape[0] == shape[1]:
        source.notice(f"its square grid does not tell x from y; {u} and {v} are taken as (x, y, time)")
    return Raw(arrays[u].T, arrays[v].T, lat, lon, time)


def _coordinate(arrays: Mapping[str, np.ndarray], names: tuple[str, ...], shape: tuple[int, int]):
    """(n,) or (y, x), from whatever of (n, 1), (1, n), (x, y) and (y, x) the file has."""
    found = next((np.atleast_1d(arrays[key]) for key in names if key in arrays), None)
    if found is None:
        return None
    if found.size == max(found.shape):
        return found.ravel()
    return found if found.shape == shape else found.T


def regular(lat: np.ndarray, lon: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(y,) and (x,) of (y, x) coordinates that are a regular grid; others as they are."""
    is_regular = lat.ndim == lon.ndim == 2 and (lat == lat[:, :1]).all() and (lon == lon[:1]).all()
    return (lat[:, 0], lon[0]) if is_regular else (lat, lon)


def ram_head() -> tuple[np.ndarray, np.ndarray]:
    """Latitudes (44,) and longitudes (94,) of the Ram Head domain."""
    with np.load(RAM_HEAD) as grid:
        return grid["lat"], grid["lon"]


def _from_datenum(days: np.ndarray, source: Source) -> np.ndarray:
    days = days.astype(float)
    if not ((days > MATLAB_DATES[0]) & (days < MATLAB_DATES[1])).all():
        raise source.error(
            f"the times {days.min():g} to {days.max():g} cannot be decoded; expected MATLAB datenums, days since year 0"
        )
    # Half an hour as a fraction of 730,000 days is known to about 10 microseconds.
    milliseconds = np.rint((days - MATLAB_EPOCH) * 86_400_000).astype(np.int64)
    return milliseconds.astype("datetime64[ms]")


def _from_stacks(arrays: list[np.ndarray], source: Source) -> Raw:
    """Fields of unnamed velocity stacks, one after the other; they carry no times, so hours are counted."""
    lat, lon = ram_head()
    layouts = {"(time, y, x, 2)": (0, 1, 2, 3), "(x, y, 2, time)": (3, 1, 0, 2), "(time, 2, y, x)": (0, 2, 3, 1)}
    frames = []
    for x in arrays:
        turned = [x.transpose(axes) for axes in layouts.values()]
        fitting = [f for f in turned if f.shape[1:] == (lat.size, lon.size, 2)]
        if not fitting:
            raise source.error(
                f"an array of {x.shape} without lat and lon; expected {' or '.join(layouts)} "
                f"on the grid of {lat.size} x {lon.size} cells"
            )
        frames.append(fitting[0])
    kinds = {x.dtype.kind for x in frames}
    if not kinds <= set("fiu"):
        raise source.error(f"velocities must be numbers, got {', '.join(sorted(str(x.dtype) for x in frames))}")
    velocity = np.concatenate(frames)
    source.notice(ASSUMED_GRID)
    counts = " + ".join(str(len(x)) for x in frames)
    source.notice(f"no times; its {counts} frames are taken as hourly from 2000-01-01, in the order of the file")
    time = np.datetime64("2000-01-01", "h") + np.arange(len(velocity))
    return Raw(velocity[..., 0], velocity[..., 1], lat, lon, time)
