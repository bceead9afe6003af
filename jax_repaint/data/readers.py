"""Velocity files of the oceanographer's usual kinds, to and from `Fields`.

    read    NetCDF 3 and 4, Zarr (CF names), .npz, MATLAB 5 and 7.3, pickles of plain arrays
    write   NetCDF 4, Zarr, .npz; what is written reads back equal

What a file says wins over what is usual: attributes before names, names before positions. What a file leaves
open is refused rather than guessed.
"""

import contextlib
import io
import itertools
import os
import pickle
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import sleep

import h5netcdf
import h5py
import numpy as np
import pandas as pd
import scipy.io
import xarray as xr
from absl import logging
from xarray.backends import H5NetCDFStore

from jax_repaint.data.fields import Fields
from jax_repaint.errors import InputError
from jax_repaint.files import whole_file

FILL = np.float32(9.96921e36)  # NetCDF's own default for floats
TOO_FAST = 50.0  # m/s; no current, but an undeclared fill value
MATLAB_EPOCH = 719529  # datenum of 1970-01-01
MATLAB_DATES = (600_000, 800_000)  # the years 1642 to 2190; other numbers are not datenums
RAM_HEAD = Path(__file__).with_name("ramhead_grid.npz")
ASSUMED_GRID = "%s has no lat and lon; its grid of 44 x 94 cells is taken to be Ram Head's"

PAIRS = (
    ("u", "v"),
    ("uo", "vo"),
    ("water_u", "water_v"),
    ("ugos", "vgos"),
    ("ugosa", "vgosa"),
    ("utotal", "vtotal"),
    ("ucur", "vcur"),
    ("uvel", "vvel"),
    ("ssu", "ssv"),
    ("usurf", "vsurf"),
    ("u_surf", "v_surf"),
    ("u_velocity", "v_velocity"),
    ("u_current", "v_current"),
    ("u_eastward", "v_northward"),
    ("u_east", "v_north"),
    ("vozocrtx", "vomecrty"),
)
NORTHWARD = {"eastward": "northward", "x_velocity": "y_velocity", "x_sea_water": "y_sea_water"}

PREFIXES = {"": 1.0, "k": 1000.0, "d": 0.1, "c": 0.01, "m": 0.001}
TIME = r"(s|sec|seconds?|h|hr|hours?)"
SPEED = re.compile(
    r"([kdcm]??|kilo|deci|centi|milli)(?:m|met(?:er|re)s?)"
    rf"(?:\s*(?:/|\bper\b)\s*{TIME}|[\s.*·]*{TIME}\s*(?:\*\*|\^)?\s*[({{]?[-⁻][1¹][)}}]?)"
)
KNOT = r"kn|kts?|knots?"

# Standard name: units, usual variable names.
AXES = {
    "time": (r".+ since .+", ("time", "ocean_time", "time_counter", "t", "date")),
    "latitude": (r"degrees?_?n(orth)?", ("lat", "latitude", "nav_lat", "lats", "lat_rho")),
    "longitude": (r"degrees?_?e(ast)?", ("lon", "longitude", "nav_lon", "lons", "lon_rho")),
}


def read(path: str | os.PathLike, *, u: str | None = None, v: str | None = None, name: str | None = None) -> Fields:
    """The velocity fields of a file, in m/s, (time, y, x), row 0 in the south.

    Args:
      path: NetCDF or HDF5, a Zarr folder, .npz, .mat or a pickle of plain arrays; told apart by content.
      u, v: names of the eastward and northward variables, needed where a file has several pairs.
      name: what to call the fields in messages; by default the name of the file.

    Raises:
      InputError: the file is missing, damaged or of another kind; no pair or several; dimensions, units, times
        or coordinates that cannot be used.
    """
    path = Path(path)
    name = name or path.name
    if (u is None) != (v is None):
        raise InputError(f"{name}: give both u and v, or neither")
    kind = _kind(path)
    if kind in ("netcdf", "zarr"):
        return _read_cf(path, kind, u, v, name)
    if kind == "npz":
        return _read_npz(path, u or "u", v or "v", name)
    arrays = {"mat": _mat5, "mat73": _mat73, "pickle": _unpickle}[kind](path)
    if isinstance(arrays, list):
        return _from_stacks(arrays, name)
    return _from_matlab_order(arrays, u or "u", v or "v", name)


def write(fields: Fields, path: str | os.PathLike) -> None:
    """Writes .nc, .zarr or .npz, whole or not at all; `read` gives equal fields back.

    Raises:
      InputError: another suffix, a path that cannot be written, or a folder that is no Zarr store.
    """
    path = Path(path)
    if path.suffix == ".nc":
        write_netcdf(to_dataset(fields), path)
    elif path.suffix == ".zarr":
        _write_zarr(to_dataset(fields), path)
    elif path.suffix == ".npz":
        content = {"u": fields.u, "v": fields.v, "ocean": fields.ocean}
        with whole_file(path) as temporary:
            np.savez_compressed(temporary, **content, lat=fields.lat, lon=fields.lon, time=fields.time)
    else:
        raise InputError(f"cannot write {path}: the suffix must be .nc, .zarr or .npz")


def write_netcdf(dataset: xr.Dataset, path: str | os.PathLike) -> None:
    """A data set as compressed NetCDF 4, whole or not at all.

    Raises:
      InputError: the path cannot be written or the disk is full.
    """
    for variable in dataset.data_vars.values():
        if variable.dtype.kind == "f" and variable.ndim > 1:
            variable.encoding |= {"zlib": True, "complevel": 1, "shuffle": True}
    # On a full disk HDF5 can end the process, so that it writes to memory.
    content = io.BytesIO()
    with h5netcdf.File(content, "w") as file:
        dataset.dump_to_store(H5NetCDFStore(file))
    with whole_file(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def to_dataset(fields: Fields) -> xr.Dataset:
    """The fields as a CF-1.11 data set: u, v (time, lat, lon) in m s-1, ocean (lat, lon) and coordinates."""
    y, x = ("lat", "lon") if fields.lat.ndim == 1 else ("y", "x")
    lat_dims, lon_dims = ((y,), (x,)) if fields.lat.ndim == 1 else ((y, x), (y, x))
    lat = {"standard_name": "latitude", "long_name": "latitude", "units": "degrees_north"}
    lon = {"standard_name": "longitude", "long_name": "longitude", "units": "degrees_east"}
    if fields.lat.ndim == 1:
        lat["axis"], lon["axis"] = "Y", "X"
    number, units = _encode_time(fields.time)
    time = {"standard_name": "time", "axis": "T", "units": units, "calendar": "proleptic_gregorian"}
    data = {
        component: (
            ("time", y, x),
            values,
            {
                "standard_name": f"{direction}_sea_water_velocity",
                "long_name": f"{direction} current",
                "units": "m s-1",
            },
            {"_FillValue": FILL},
        )
        for component, direction, values in (("u", "eastward", fields.u), ("v", "northward", fields.v))
    }
    mask = {
        "standard_name": "sea_binary_mask",
        "long_name": "cells with a current",
        "flag_values": np.array([0, 1], np.int8),
        "flag_meanings": "land sea",
    }
    data["ocean"] = ((y, x), fields.ocean.astype(np.int8), mask)
    coordinates = {
        "time": ("time", number, time),
        "lat": (lat_dims, fields.lat, lat, {"_FillValue": None}),
        "lon": (lon_dims, fields.lon, lon, {"_FillValue": None}),
    }
    return xr.Dataset(data, coordinates, {"Conventions": "CF-1.11", "title": fields.name})


def _encode_time(time: np.ndarray) -> tuple[np.ndarray, str]:
    """Whole numbers since 1970 in the longest unit that holds every time exactly."""
    number = time.astype("datetime64[ns]").astype(np.int64)
    for unit, nanoseconds in (("seconds", 10**9), ("milliseconds", 10**6), ("microseconds", 10**3)):
        if not (number % nanoseconds).any():
            return number // nanoseconds, f"{unit} since 1970-01-01 00:00:00"
    return number, "nanoseconds since 1970-01-01 00:00:00"


def _write_zarr(dataset: xr.Dataset, path: Path) -> None:
    if path.exists() and not _is_zarr(path):
        raise InputError(f"cannot write {path}: it exists and is not a Zarr store")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.stem}.", dir=path.parent))
    except OSError as e:
        raise InputError(f"cannot write {path}: {e.strerror or e}") from e
    try:
        new, old = folder / "new.zarr", folder / "old.zarr"
        dataset.to_zarr(new, mode="w", zarr_format=2, consolidated=True)
        # A folder cannot be replaced in one step; the old one comes back if the new one does not arrive.
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(new, path)
        except OSError:
            if old.exists():
                os.rename(old, path)
            raise
    except OSError as e:
        raise InputError(f"cannot write {path}: {e.strerror or e}") from e
    finally:
        # Where one of Zarr's threads fails, the others write on for a moment, and make the folder again.
        for _ in range(20):
            shutil.rmtree(folder, ignore_errors=True)
            sleep(0.02)
            if not folder.exists():
                break


def _is_zarr(path: Path) -> bool:
    return any((path / marker).is_file() for marker in (".zgroup", "zarr.json", ".zmetadata"))


@contextlib.contextmanager
def _door(path: Path) -> Iterator[None]:
    """Where libraries meet a file: whatever they raise becomes one sentence."""
    try:
        with warnings.catch_warnings():
            # Several fill values and vague reference dates: xarray decodes both as they are meant.
            warnings.simplefilter("ignore", xr.SerializationWarning)
            yield
    except InputError:
        raise
    except Exception as e:
        lines = str(e).strip().splitlines()
        raise InputError(f"cannot read {path}: {lines[0] if lines else type(e).__name__}") from e


def _kind(path: Path) -> str:
    """What the content is; the suffix decides only where two kinds look alike."""
    try:
        if path.is_dir():
            if _is_zarr(path):
                return "zarr"
            raise InputError(f"{path} is a folder, but not a Zarr store")
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror or e}") from e
    if not head:
        raise InputError(f"{path} is empty")
    if head.startswith(b"MATLAB 7.3") or (head.startswith(b"\x89HDF") and path.suffix == ".mat"):
        return "mat73"
    for start, kind in (
        (b"CDF", "netcdf"),
        (b"\x89HDF", "netcdf"),
        (b"PK\x03\x04", "npz"),
        (b"MATLAB", "mat"),
    ):
        if head.startswith(start):
            return kind
    by_suffix = {".mat": "mat", ".pickle": "pickle", ".pkl": "pickle"}.get(path.suffix.lower())
    if by_suffix is None:
        raise InputError(f"{path} is none of NetCDF, Zarr, .npz, .mat, .pickle")
    return by_suffix


# NetCDF and Zarr


def _read_cf(path: Path, kind: str, u: str | None, v: str | None, name: str) -> Fields:
    with _door(path), _open(path, kind) as raw:
        for variable in raw.variables.values():
            _mend_attributes(variable)
        dataset = xr.decode_cf(raw, decode_times=False, decode_coords=False)
        u, v = _choose_pair(dataset, u, v, name)
        u, v = dataset[u], dataset[v]
        _refuse_staggered(u, v, name)
        axes = _axes(dataset, u, v, name)
        time = _decode_time(axes["time"], name)
        lat, lon = axes["latitude"], axes["longitude"]
        grid = lat.dims + lon.dims if lat.ndim == 1 else tuple(d for d in u.dims if d in lat.dims)
        order = (*axes["time"].dims, *grid)
        velocities = [_to_frames(component, order, name) for component in (u, v)]
        ocean = _ocean(dataset, grid)
        if lat.ndim == 2:
            lat, lon = lat.transpose(*grid), lon.transpose(*grid)
        lat, lon = lat.values, lon.values
        if lat.ndim == 2 and not _eastward(u):
            lat, lon = _regular(lat, lon)
            if lat.ndim == 2:
                raise InputError(
                    f"{name}: {u.name} and {v.name} run along a curvilinear grid, not to the east and north; "
                    "rotate them first"
                )
    return _assemble(*velocities, lat, lon, time, ocean, name)


@contextlib.contextmanager
def _open(path: Path, kind: str) -> Iterator[xr.Dataset]:
    """The file as it is, without any decoding."""
    if kind == "zarr":
        with xr.open_zarr(path, decode_cf=False, consolidated=False, chunks=None) as dataset:
            yield dataset
        return
    with path.open("rb") as file:
        classic = file.read(3) == b"CDF"
        file.seek(0)
        # Given its path, SciPy maps the file into memory and cannot close it where it is damaged.
        source, engine = (file, "scipy") if classic else (path, "h5netcdf")
        with xr.open_dataset(source, engine=engine, decode_cf=False) as dataset:
            yield dataset


def _mend_attributes(variable: xr.Variable) -> None:
    """Renames `Unit` to `units`; drops the fill value of axes, where CF allows none (CF-1.11, 2.5.1)."""
    for key in [k for k in variable.attrs if k != "units" and k.lower() in ("unit", "units")]:
        variable.attrs.setdefault("units", variable.attrs.pop(key))
    if variable.ndim == 1 and isinstance(variable, xr.IndexVariable):
        for key in ("_FillValue", "missing_value"):
            variable.attrs.pop(key, None)


def _text(variable: xr.DataArray, attribute: str) -> str:
    return str(variable.attrs.get(attribute, "")).strip()


def _choose_pair(dataset: xr.Dataset, u: str | None, v: str | None, name: str) -> tuple[str, str]:
    listing = ", ".join(str(n) for n in dataset.data_vars) or "nothing"
    if u is not None:
        for asked in (u, v):
            if asked not in dataset.variables:
                raise InputError(f"{name} has no variable {asked!r}; it has {listing}")
        return u, v
    pairs = _pairs(dataset)
    if not pairs:
        raise InputError(f"{name} has no pair of velocities that could be recognised; it has {listing}")
    if len(pairs) > 1:
        found = ", ".join(f"({a}, {b})" for a, b in pairs)
        raise InputError(f"{name} has several pairs of velocities, {found}; say which by u and v")
    return pairs[0]


def _pairs(dataset: xr.Dataset) -> list[tuple[str, str]]:
    """Pairs by standard name, then by variable name among variables that no standard name speaks for."""
    fields = {str(n): x for n, x in dataset.data_vars.items() if x.ndim >= 2 and x.dtype.kind in "fiu"}
    by_standard: dict[str, list[str]] = {}
    for n, x in fields.items():
        by_standard.setdefault(_text(x, "standard_name"), []).append(n)
    pairs = []
    for standard, eastward in by_standard.items():
        if "sea_water" not in standard or "velocity" not in standard:
            continue
        if _northward(standard):
            pairs += itertools.product(eastward, by_standard.get(_northward(standard), []))
    unnamed = {n.lower(): n for n in by_standard.get("", [])}
    described = [(n, _northward(n)) for n in unnamed if re.search("velocity|current", n)]
    return pairs + [(unnamed[a], unnamed[b]) for a, b in [*PAIRS, *described] if a in unnamed and b in unnamed]


def _northward(eastward: str) -> str:
    """The name of the other component; empty where `eastward` is not a name of the first."""
    for a, b in NORTHWARD.items():
        if a in eastward:
            return eastward.replace(a, b).replace("at_u_location", "at_v_location")
    return ""


def _eastward(u: xr.DataArray) -> bool:
    return "eastward" in _text(u, "standard_name") or "eastward" in str(u.name).lower()


def _regular(lat: np.ndarray, lon: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(y,) and (x,) of (y, x) coordinates that are a regular grid; others as they are."""
    regular = lat.ndim == lon.ndim == 2 and (lat == lat[:, :1]).all() and (lon == lon[:1]).all()
    return (lat[:, 0], lon[0]) if regular else (lat, lon)


def _refuse_staggered(u: xr.DataArray, v: xr.DataArray, name: str) -> None:
    if u.dims != v.dims:
        raise InputError(
            f"{name}: {u.name} lies on {_dims(u)} and {v.name} on {_dims(v)}; a staggered grid must be "
            "interpolated to common points first"
        )


def _dims(variable: xr.DataArray) -> str:
    return "(" + ", ".join(f"{d}={n}" for d, n in variable.sizes.items()) + ")"


def _axes(dataset: xr.Dataset, u: xr.DataArray, v: xr.DataArray, name: str) -> dict[str, xr.DataArray]:
    axes = {axis: _find(dataset, axis, u.dims) for axis in AXES}
    missing = [axis for axis, found in axes.items() if found is None]
    if missing:
        raise InputError(f"{name}: no {' nor '.join(missing)} found for {u.name} {_dims(u)}")
    lat, lon = axes["latitude"], axes["longitude"]
    if lat.ndim == 1 and lat.dims == lon.dims:
        raise InputError(f"{name}: {u.name} {_dims(u)} lies on scattered points or a track, not on a grid")
    if lat.ndim != lon.ndim or (lat.ndim == 2 and set(lat.dims) != set(lon.dims)):
        raise InputError(f"{name}: latitude {_dims(lat)} and longitude {_dims(lon)} do not make a grid")
    used = {*axes["time"].dims, *lat.dims, *lon.dims}
    extra = [d for d in u.dims if d not in used and u.sizes[d] > 1]
    if extra:
        raise InputError(
            f"{name}: {u.name} has the dimensions {_dims(u)}; expected time, latitude and longitude only, "
            f"so select one of {', '.join(map(str, extra))} first"
        )
    return axes


def _find(dataset: xr.Dataset, axis: str, dims: tuple) -> xr.DataArray | None:
    """The coordinate on some of `dims` that is `axis` by standard name, by units or by its own name."""
    units, names = AXES[axis]
    ranks = (0, 1) if axis == "time" else (1, 2)

    def order(variable: xr.DataArray) -> tuple:
        # An axis of the velocities outranks a scalar or an auxiliary coordinate.
        by = (
            _text(variable, "standard_name") == axis,
            re.fullmatch(units, _text(variable, "units").lower()),
            str(variable.name).lower() in names,
        )
        evidence = next((i for i, holds in enumerate(by) if holds), None)
        return evidence is None, variable.name not in dims, variable.ndim == 0, evidence

    candidates = [
        dataset[n]
        for n, x in dataset.variables.items()
        if x.ndim in ranks and set(x.dims) <= set(dims) and not order(dataset[n])[0]
    ]
    return min(candidates, key=order, default=None)


def _decode_time(time: xr.DataArray, name: str) -> np.ndarray:
    """datetime64[ns] of a CF time coordinate."""
    units = _text(time, "units")
    if time.dtype.kind == "M":
        return np.atleast_1d(time.values)
    if " since " not in units:
        raise InputError(
            f"{name}: the times in {time.name} cannot be decoded, their units are {units!r}; "
            "expected such as 'hours since 2000-01-01'"
        )
    undecodable = (
        f"{name}: the times in {time.name} cannot be decoded from {units!r}, calendar "
        f"{_text(time, 'calendar') or 'standard'}; expected the civil calendar and the years 1678..2261"
    )
    try:
        decoded = xr.decode_cf(xr.Dataset({"time": time.variable}))["time"].values
    except Exception as e:
        raise InputError(undecodable) from e
    if decoded.dtype.kind != "M":
        raise InputError(undecodable)
    return np.atleast_1d(decoded)


def _to_frames(component: xr.DataArray, order: tuple, name: str) -> np.ndarray:
    """(time, y, x) in m/s."""
    squeezed = component.squeeze([d for d in component.dims if d not in order])
    values = squeezed.transpose(*order).values
    values = values if values.ndim == 3 else values[None]
    return values * _factor(_text(component, "units"), f"{name}: {component.name}")


def _factor(units: str, what: str) -> float:
    """Metres per second in one of `units`."""
    text = units.strip().lower()
    speed = SPEED.fullmatch(text)
    if speed:
        prefix, per, inverse = speed.groups()
        factor = PREFIXES[prefix[:1]] / (3600 if (per or inverse).startswith("h") else 1)
    elif re.fullmatch(KNOT, text):
        factor = 1852 / 3600
    else:
        has = f"the units {units!r}" if units else "no units"
        raise InputError(f"{what} has {has}; expected m s-1, cm s-1, km/h or knots")
    if factor != 1:
        logging.warning("%s is converted from %s to m/s", what, units)
    return factor


def _ocean(dataset: xr.Dataset, grid: tuple) -> np.ndarray | None:
    for variable in dataset.data_vars.values():
        if _text(variable, "standard_name") == "sea_binary_mask" and set(variable.dims) == set(grid):
            return variable.transpose(*grid).values == 1
    return None


# Plain arrays


def _read_npz(path: Path, u: str, v: str, name: str) -> Fields:
    with _door(path), path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        missing = [key for key in (u, v, "lat", "lon", "time") if key not in file.files]
        if missing:
            raise InputError(f"{name} has no {', '.join(missing)}; it has {', '.join(file.files) or 'nothing'}")
        used = (u, v, "lat", "lon", "time", "ocean", "land")
        arrays = {key: np.asarray(file[key]) for key in used if key in file.files}
    time = _parse_time(arrays["time"], name)
    ocean = arrays.get("ocean")
    if ocean is None and "land" in arrays:
        ocean = arrays["land"] == 0
    ocean = None if ocean is None else np.atleast_2d(ocean)
    return _assemble(arrays[u], arrays[v], arrays["lat"], arrays["lon"], time, ocean, name)


def _parse_time(time: np.ndarray, name: str) -> np.ndarray:
    """datetime64 of datetime64 or ISO 8601 text, without a zone in UTC."""
    if time.dtype.kind == "M":
        return time
    if time.dtype.kind not in "US":
        raise InputError(f"{name}: time must hold datetime64 or ISO 8601 text, got {time.dtype}")
    try:
        return pd.to_datetime(time.astype(str), format="ISO8601", utc=True).tz_localize(None).to_numpy()
    except ValueError as e:
        raise InputError(f"{name}: times such as {str(time.flat[0])!r} are not ISO 8601") from e


def _mat5(path: Path) -> dict[str, np.ndarray]:
    with _door(path):
        content = scipy.io.loadmat(path)
    return {key: x for key, x in content.items() if isinstance(x, np.ndarray) and x.dtype.kind in "fiub"}


def _mat73(path: Path) -> dict[str, np.ndarray]:
    """MATLAB 7.3 is HDF5 in column order: every axis comes reversed."""
    with _door(path), h5py.File(path, "r") as file:
        found = {key: x for key, x in file.items() if isinstance(x, h5py.Dataset) and x.dtype.kind in "fiub"}
        return {key: x[()].T for key, x in found.items()}


class _ArraysOnly(pickle.Unpickler):
    """Reads NumPy arrays, numbers, text and plain containers; any other name is refused, not looked up."""

    def find_class(self, module: str, name: str):
        # New functions at each call: a file can set attributes on what it is given.
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode("latin1")
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray"):
            allowed = {
                "ndarray": np.ndarray,
                "dtype": lambda kind, *flags: np.dtype(kind, *map(bool, flags)),  # Python 2 wrote flags as numbers
                "_reconstruct": np._core.multiarray._reconstruct,
                "scalar": np._core.multiarray.scalar,
            }
            if name in allowed:
                return allowed[name]
        if (module.removeprefix("numpy.").lstrip("_"), name) == ("core.numeric", "_frombuffer"):
            return lambda buffer, dtype, shape, order: np.frombuffer(buffer, dtype).reshape(shape, order=order)
        if module in ("builtins", "__builtin__") and name in ("bytes", "bytearray"):
            return {"bytes": bytes, "bytearray": bytearray}[name]
        raise InputError(f"it refers to {module}.{name}; only NumPy arrays in dict, list and tuple are read")


def _unpickle(path: Path) -> dict[str, np.ndarray] | list[np.ndarray]:
    """The named arrays of a dict; those of a list as u, v, ocean_time, lat, lon; or velocity stacks."""
    with _door(path), path.open("rb") as file:
        try:
            content = _ArraysOnly(file, encoding="latin1").load()
        except InputError as e:
            raise InputError(f"cannot read {path}: {e}") from None
    if isinstance(content, Mapping):
        return {str(k): x for k, x in content.items() if isinstance(x, np.ndarray) and x.dtype.kind in "fiubMUS"}
    arrays = [content] if isinstance(content, np.ndarray) else content
    if not isinstance(arrays, list | tuple) or not all(
        isinstance(x, np.ndarray) and x.dtype.kind in "fiubMUS" for x in arrays
    ):
        raise InputError(f"{path} holds no NumPy arrays in a dict, list or tuple")
    if arrays and all(x.ndim == 4 for x in arrays):
        return list(arrays)
    names = ("u", "v", "ocean_time", "lat", "lon")
    if len(arrays) > len(names):
        raise InputError(f"{path} holds {len(arrays)} arrays; expected {', '.join(names)}, or frames of four axes")
    return dict(zip(names, arrays, strict=False))


def _from_matlab_order(arrays: Mapping[str, np.ndarray], u: str, v: str, name: str) -> Fields:
    """Fields of u, v (x, y, time), `ocean_time` in days since year 0, and lat, lon."""
    time_name = next((key for key in ("ocean_time", "time") if key in arrays), "ocean_time")
    needed = [key for key in (u, v, time_name) if key not in arrays]
    if needed:
        found = ", ".join(f"{key} {x.shape}" for key, x in arrays.items()) or "no arrays"
        raise InputError(f"{name} has no {', '.join(needed)}; it has {found}")
    for key in (u, v):
        if arrays[key].ndim != 3:
            raise InputError(f"{name}: {key} is {arrays[key].shape}; expected three axes (x, y, time)")
    time = arrays[time_name].ravel()
    time = _from_datenum(time, name) if time.dtype.kind in "fiu" else _parse_time(time, name)
    shape = arrays[u].shape[1::-1]
    lat, lon = (_coordinate(arrays, names, shape) for names in (("lat", "latitude"), ("lon", "longitude")))
    if lat is None or lon is None:
        lat, lon = _ram_head()
        if shape != (lat.size, lon.size):
            raise InputError(f"{name} has no lat and lon, and its grid of {shape[0]} x {shape[1]} cells is not known")
        logging.warning(ASSUMED_GRID, name)
    else:
        # The shape of a square grid does not tell rows from columns, but latitude varies along y.
        if lat.ndim == lon.ndim == 2 and shape[0] == shape[1] and np.ptp(lat, 1).mean() > np.ptp(lat, 0).mean():
            lat, lon = lat.T, lon.T
        lat, lon = _regular(lat, lon)
    return _assemble(arrays[u].T, arrays[v].T, lat, lon, time, None, name)


def _coordinate(arrays: Mapping[str, np.ndarray], names: tuple[str, ...], shape: tuple[int, int]):
    """(n,) or (y, x), from whatever of (n, 1), (1, n), (x, y) and (y, x) the file has."""
    found = next((np.atleast_1d(arrays[key]) for key in names if key in arrays), None)
    if found is None:
        return None
    if found.size == max(found.shape):
        return found.ravel()
    return found if found.shape == shape else found.T


def _ram_head() -> tuple[np.ndarray, np.ndarray]:
    with np.load(RAM_HEAD) as grid:
        return grid["lat"], grid["lon"]


def _from_datenum(days: np.ndarray, name: str) -> np.ndarray:
    days = days.astype(float)
    if not ((days > MATLAB_DATES[0]) & (days < MATLAB_DATES[1])).all():
        raise InputError(
            f"{name}: the times {days.min():g} to {days.max():g} cannot be decoded; expected MATLAB "
            "datenums, days since year 0"
        )
    # Half an hour as a fraction of 730,000 days is known to about 10 microseconds.
    milliseconds = np.rint((days - MATLAB_EPOCH) * 86_400_000).astype(np.int64)
    return milliseconds.astype("datetime64[ms]")


def _from_stacks(arrays: list[np.ndarray], name: str) -> Fields:
    """Fields of unnamed velocity stacks, one after the other; they carry no times, so hours are counted."""
    lat, lon = _ram_head()
    layouts = {"(time, y, x, 2)": (0, 1, 2, 3), "(x, y, 2, time)": (3, 1, 0, 2), "(time, 2, y, x)": (0, 2, 3, 1)}
    frames = []
    for x in arrays:
        turned = [x.transpose(axes) for axes in layouts.values()]
        fitting = [f for f in turned if f.shape[1:] == (lat.size, lon.size, 2)]
        if not fitting:
            raise InputError(
                f"{name}: an array of {x.shape} without lat and lon; expected {' or '.join(layouts)} "
                f"on the grid of {lat.size} x {lon.size} cells"
            )
        frames.append(fitting[0])
    velocity = np.concatenate(frames)
    logging.warning(ASSUMED_GRID, name)
    logging.warning(
        "%s has no times; its %s frames are taken as hourly from 2000-01-01, in the order of the file",
        name,
        " + ".join(str(len(x)) for x in frames),
    )
    time = np.datetime64("2000-01-01", "h") + np.arange(len(velocity))
    return _assemble(velocity[..., 0], velocity[..., 1], lat, lon, time, None, name)


def _assemble(u, v, lat, lon, time, ocean, name: str) -> Fields:
    """Fields from (time, y, x) arrays in m/s, turned so that row 0 is south and column 0 west."""
    if u.shape != v.shape:
        raise InputError(f"{name}: u is {u.shape} and v is {v.shape}; they must be equal")
    if u.ndim != 3:
        raise InputError(f"{name}: u has {u.ndim} dimensions {u.shape}; expected (time, latitude, longitude)")
    lat, lon = np.atleast_1d(lat), np.atleast_1d(lon)
    for what, x in (("u", u), ("v", v), ("lat", lat), ("lon", lon)):
        if x.dtype.kind not in "fiu":
            raise InputError(f"{name}: {what} must hold numbers, got {x.dtype}")
    with np.errstate(over="ignore"):
        velocity = np.stack([u, v], -1).astype(np.float32)
    lat, lon = lat.astype(float), lon.astype(float)
    fastest = np.abs(velocity[~np.isnan(velocity)]).max(initial=0)
    if fastest > TOO_FAST:
        raise InputError(f"{name}: velocities reach {fastest:.4g} m/s; is a fill value undeclared or a unit wrong?")
    if ocean is None and not np.isnan(velocity).any():
        still = (velocity == 0).all((0, 3))
        if still.any() and not still.all():
            logging.warning("%s: %d cells that are exactly zero in every frame count as land", name, still.sum())
            ocean = ~still
    if lon.ndim == 1:
        lon = np.unwrap(lon, period=360)
    # By the mean step, so that curvilinear grids turn like regular ones; the date line is no step.
    if np.diff(lat, axis=0).sum() < 0:
        velocity, lat = velocity[:, ::-1], lat[::-1]
        lon = lon[::-1] if lon.ndim == 2 else lon
        ocean = None if ocean is None else ocean[::-1]
    if ((np.diff(lon) + 180) % 360 - 180).sum() < 0:
        velocity, lon = velocity[:, :, ::-1], lon[..., ::-1]
        lat = lat[:, ::-1] if lat.ndim == 2 else lat
        ocean = None if ocean is None else ocean[:, ::-1]
    return Fields.create(velocity, lat, lon, time, ocean, name)
