"""Velocity files of the oceanographer's usual kinds, to and from `Fields`.

    read    NetCDF 3 and 4, Zarr (cf.py), .npz, MATLAB 5 and 7.3, pickles of plain arrays (arrays.py); one or a series
    write   NetCDF 4, Zarr, .npz; what is written reads back equal

What a file leaves open is refused rather than guessed, with what to say about it.
"""

import glob
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import sleep

import h5netcdf
import numpy as np
import xarray as xr
from xarray.backends import H5NetCDFStore

from jax_repaint.data import arrays
from jax_repaint.data.cf import read_cf
from jax_repaint.data.fields import Fields
from jax_repaint.data.probe import check_hdf5
from jax_repaint.data.source import Choice, Raw, Source, assemble, door
from jax_repaint.errors import InputError
from jax_repaint.files import check_store, is_zarr, reason, replace_folder, whole_file

FILL = np.float32(9.96921e36)  # NetCDF's own default for floats
STORES = (".nc", ".zarr")
RAM_HEAD = arrays.RAM_HEAD
SHEETS = (".xlsx", ".xlsm", ".ods")
SAME_PLACE = 1e-4  # degrees, between the files of a series

Paths = str | os.PathLike | Sequence[str | os.PathLike]


def read(
    path: Paths,
    *,
    u: str | None = None,
    v: str | None = None,
    name: str | None = None,
    v_path: Paths | None = None,
    grid: str | os.PathLike | None = None,
    depth: float | None = None,
    level: int | None = None,
    time: str | None = None,
    directions: str | None = None,
    undated: str | None = None,
    constant: bool = False,
) -> Fields:
    """The velocity fields of a file or a series of files, in m/s, eastward and northward, row 0 in the south.

    Args:
      path: NetCDF or HDF5, a Zarr folder, .npz, .mat or a pickle of plain arrays, told apart by content; or several
        as a list or a pattern such as "2002*.nc", put in the order of their times.
      u, v: names of the two variables, needed where a file has several pairs.
      name: what to call the fields in messages; by default the name of the file.
      v_path: file, list or pattern with v, where `path` holds u only.
      grid: file with lat_rho, lon_rho, angle and masks of a C-grid, where the data files lack them.
      depth: metres below the surface: the nearest level, or linear between levels that follow the bottom; by default
        the uppermost level.
      level: number of a level from 0 on, instead of a depth.
      time: date of a file without times, or from which its times count where they name no date.
      directions: "grid" or "east", where components on a curvilinear grid may run along either.
      undated: as time, but of no account where a file has dates of its own that can be read.
      constant: whether a component may never change, as among a few observations.

    Raises:
      InputError: a file is missing, damaged or of another kind; no pair or several; dimensions, units, times
        or coordinates that cannot be used; files of a series that contradict each other.
    """
    choice = Choice(u, v, grid, depth, level, time, directions, undated, constant)
    return understand(path, choice, v_path, name)[0]


def understand(
    path: Paths, choice: Choice, v_path: Paths | None = None, name: str | None = None
) -> tuple[Fields, Source]:
    """The fields of `read`, and what was understood about their files.

    Raises:
      InputError: as `read`.
    """
    paths = files_of(path)
    v_paths = [None] * len(paths) if v_path is None else files_of(v_path)
    source = Source(name or paths[0].name + (f" and {len(paths) - 1} more" if len(paths) > 1 else ""))
    if len(v_paths) != len(paths):
        raise source.error(f"{len(paths)} files hold u, but {len(v_paths)} files hold v")
    if (choice.u is None) != (choice.v is None):
        raise source.error("give both u and v, or neither")
    if choice.depth is not None and choice.level is not None:
        raise source.error("give a depth or a level, not both")
    if choice.directions not in (None, "grid", "east"):
        raise source.error(f"directions must be 'grid' or 'east', got {choice.directions!r}")
    parts, sources = [], []
    for one, other in zip(paths, v_paths, strict=True):
        sources.append(source if len(paths) == 1 else Source(one.name))
        parts.append(_read_one(one, other, choice, sources[-1]))
    for number, wet in _missing_in_one(sources).items():
        sources[number] = Source(paths[number].name, wet=wet)
        parts[number] = _read_one(paths[number], v_paths[number], choice, sources[number])
    try:
        raw = parts[0] if len(parts) == 1 else _series(parts, sources, choice.constant, source)
        return assemble(raw, source, choice.constant), source
    finally:
        source.say()


def files_of(path: Paths) -> list[Path]:
    """The files of a path, a pattern, or a list of them."""
    if not isinstance(path, str | os.PathLike):
        files = [file for one in path for file in files_of(one)]
        if not files:
            raise InputError("no file to read: the list is empty")
        return files
    text = os.fspath(path)
    if not any(c in text for c in "*?[") or os.path.lexists(text):
        return [Path(text)]
    found = sorted(glob.glob(text, recursive=True))
    if not found:
        raise InputError(f"no file matches {text}")
    return [Path(file) for file in found]


def _read_one(path: Path, v_path: Path | None, choice: Choice, source: Source) -> Raw:
    kind = kind_of(path)
    if kind in ("netcdf", "zarr"):
        for other in (Path(other) for other in (v_path, choice.grid) if other is not None):
            if kind_of(other) not in ("netcdf", "zarr"):
                raise InputError(f"{other} is neither NetCDF nor Zarr, as {path.name} is")
        return read_cf(path, kind, v_path, choice, source)
    if v_path is not None:
        raise source.error("v_path goes with NetCDF and Zarr, not with .npz, .mat or a pickle")
    with door(path):
        return arrays.read_arrays(path, kind, choice, source)


def _missing_in_one(sources: list[Source]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Numbers of the files that lack values on faces where others have some, and the wet faces of the whole series.

    Alone, such a gap of a C-grid would count as a wall, without a current through it.
    """
    found = [one.wet for one in sources]
    if any(one is None or [w.shape for w in one] != [w.shape for w in found[0]] for one in found):
        return {}
    whole = tuple(np.any(faces, axis=0) for faces in zip(*found, strict=True))
    return {i: whole for i, one in enumerate(found) if any((a != b).any() for a, b in zip(one, whole, strict=True))}


def _series(parts: list[Raw], sources: list[Source], constant: bool, source: Source) -> Raw:
    """The frames of several files in the order of their times, each once."""
    for part, one in zip(parts, sources, strict=True):
        source.take(one)
        if not (_same(part.lat, parts[0].lat) and _same(part.lon, parts[0].lon, period=360)):
            raise source.error(f"{one.name} lies on another grid than {sources[0].name}; a series needs one grid")
        if not part.u.shape == part.v.shape == (*part.time.shape, *parts[0].u.shape[1:]):
            raise source.error(f"{one.name} holds u {part.u.shape}, v {part.v.shape} and {part.time.size} times")
    time = np.concatenate([part.time.astype("datetime64[ns]") for part in parts])
    owner = np.concatenate([np.full(part.time.size, i) for i, part in enumerate(parts)])
    order = np.argsort(time, kind="stable")
    u, v = (np.concatenate([getattr(part, c) for part in parts])[order] for c in "uv")
    time, owner = time[order], owner[order]
    keep = _once(u, v, time, [sources[i].name for i in owner], constant, source)
    masks = [part.ocean for part in parts]
    ocean = None
    if all(mask is not None and mask.shape == u.shape[1:] for mask in masks):
        ocean = np.any(masks, axis=0)
    source.facts["files"] = str(len(parts))
    return Raw(u[keep], v[keep], parts[0].lat, parts[0].lon, time[keep], ocean)


def _same(one: np.ndarray, other: np.ndarray, period: float = np.inf) -> bool:
    """Whether coordinates are those of one place, longitudes however they are counted."""
    if one.shape != other.shape:
        return False
    turns = np.round((one - other) / period) * period if np.isfinite(period) else 0
    return np.allclose(one, other + turns, rtol=0, atol=SAME_PLACE, equal_nan=True)


def _once(
    u: np.ndarray, v: np.ndarray, time: np.ndarray, names: list[str], constant: bool, source: Source
) -> np.ndarray:
    """Numbers of the frames that are no repetition: of the same time, or of another time value for value.

    A few observations, or their errors, may be `constant`, and then are the same at another time.
    """
    seen: dict[bytes, int] = {}
    keep, same, copied = [], [], []
    kept = b""
    for i in range(len(time)):
        content = hashlib.blake2b(u[i].tobytes() + v[i].tobytes()).digest()
        first = seen.setdefault(content, i)
        if keep and time[i] == time[keep[-1]]:
            if content != kept:
                raise source.error(
                    f"{names[keep[-1]]} and {names[i]} both hold {time[i].astype('datetime64[s]')}, with other values; "
                    "leave one out"
                )
            same.append(i)
        elif first != i and not constant and not np.isnan(u[i]).all():
            copied.append((i, first))
        else:
            keep.append(i)
            kept = content
    if same:
        source.notice(f"{len(same)} frames of {names[same[0]]} and others are in several files and are read once")
    if copied:
        i, first = copied[0]
        source.notice(
            f"{len(copied)} frames repeat another one value for value and are left out: that of "
            f"{time[i].astype('datetime64[s]')} in {names[i]} repeats {time[first].astype('datetime64[s]')}"
        )
    return np.array(keep, int)


def write(fields: Fields, path: str | os.PathLike) -> None:
    """Writes .nc, .zarr or .npz, whole or not at all; `read` gives equal fields back.

    Raises:
      InputError: another suffix, a path that cannot be written, or a folder that is no Zarr store.
    """
    path = Path(path)
    if path.suffix in STORES:
        write_dataset(to_dataset(fields), path)
    elif path.suffix == ".npz":
        content = {"u": fields.u, "v": fields.v, "ocean": fields.ocean}
        with whole_file(path) as temporary:
            np.savez_compressed(temporary, **content, lat=fields.lat, lon=fields.lon, time=fields.time)
    else:
        raise InputError(f"cannot write {path}: the suffix must be .nc, .zarr or .npz")


def write_dataset(dataset: xr.Dataset, path: str | os.PathLike) -> None:
    """A data set as .nc or .zarr, one of STORES, whole or not at all.

    Raises:
      InputError: a path that cannot be written, or a folder that is no Zarr store.
    """
    path = Path(path)
    if path.suffix == ".zarr":
        _write_zarr(dataset, path)
    else:
        write_netcdf(dataset, path)


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
    check_store(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.stem}.", dir=path.parent))
    except OSError as e:
        raise InputError(f"cannot write {path}: {reason(e)}") from e
    try:
        new, old = folder / "new.zarr", folder / "old.zarr"
        dataset.to_zarr(new, mode="w", zarr_format=2, consolidated=True)
        replace_folder(new, path, old)
    except OSError as e:
        raise InputError(f"cannot write {path}: {reason(e)}") from e
    finally:
        # Where one of Zarr's threads fails, the others write on for a moment, and make the folder again.
        for _ in range(20):
            shutil.rmtree(folder, ignore_errors=True)
            sleep(0.02)
            if not folder.exists():
                break


def kind_of(path: Path) -> str:
    """What the content is; the suffix decides only where two kinds look alike."""
    try:
        if path.is_dir():
            if is_zarr(path):
                return "zarr"
            raise InputError(f"{path} is a folder, but not a Zarr store")
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror or e}") from e
    if not head:
        raise InputError(f"{path} is empty")
    if head.startswith((b"MATLAB 7.3", b"\x89HDF")):
        check_hdf5(path)
    if head.startswith(b"MATLAB 7.3") or (head.startswith(b"\x89HDF") and path.suffix == ".mat"):
        return "mat73"
    for start, kind in (
        (b"CDF", "netcdf"),
        (b"\x89HDF", "netcdf"),
        (b"PK\x03\x04", "npz"),
        (b"MATLAB", "mat"),
    ):
        if head.startswith(start):
            if path.suffix.lower() in SHEETS:
                raise InputError(f"{path} is a workbook; save its sheet as CSV")
            return kind
    by_suffix = {".mat": "mat", ".pickle": "pickle", ".pkl": "pickle"}.get(path.suffix.lower())
    if by_suffix is None:
        raise InputError(f"{path} is none of NetCDF, Zarr, .npz, .mat, .pickle")
    return by_suffix
