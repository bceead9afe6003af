"""Points of a file or data set as a table: tracks, trajectories, moorings and stations, in the layouts of CF."""

import re
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr

from jax_repaint.data import readers, titles
from jax_repaint.data.cf import MESH, factor, is_flag, opened, read_points
from jax_repaint.data.source import Source, attribute, dims_of, door
from jax_repaint.errors import InputError

OF_POINTS = re.compile(r"(traj(ector(y|ies))?|drifter|buoy|float|glider|profile|station)s?(_?id)?|obs", re.IGNORECASE)
POINT = "point of a track"  # dimension; no variable is called so
OF_DEPTH = ("depth", "sea_water_pressure")  # begin the standard names


class Points(NamedTuple):
    """The table of a track.

    Attributes:
      table: as of a CSV file.
      lost: (m,) bool, rows that have no velocity and do not count.
      depths: its columns that are depths by their attributes.
    """

    table: pd.DataFrame
    lost: np.ndarray
    depths: list[str]


def points(source: Any, columns: Mapping[str, str], name: str, timed: bool = True) -> Points | None:
    """The table of a file or data set whose velocities lie at points; None of anything else.

    Args:
      timed: whether their times count; otherwise the table has none.
    """
    if isinstance(source, xr.Dataset):
        return _from_track(source, columns, Source(name), timed)
    paths = readers.files_of(source) if isinstance(source, str | Path) else []
    # A series of files is one of fields.
    if len(paths) != 1 or readers.kind_of(paths[0]) not in ("netcdf", "zarr"):
        return None
    with opened(paths[0]) as dataset, door(paths[0]):
        return _from_track(dataset, columns, Source(name), timed, from_file=True)


def _from_track(
    dataset: xr.Dataset, columns: Mapping[str, str], source: Source, timed: bool, from_file: bool = False
) -> Points | None:
    dataset = _along_points(dataset, columns, source)
    if dataset is None:
        return None
    listing = pd.DataFrame(columns=list(dataset.variables))
    names = titles.find(listing, by_standard_name(dataset, columns, listing.columns), source.name)
    if not from_file:
        for key in ("u", "v"):
            if not units_of(dataset[names[key]]):
                titles.check_unit(names[key], source.name)
        velocities = [dataset[names[key]] for key in ("u", "v")]
        units = usual_units(velocities, source.name)
        dataset = dataset.assign({str(x.name): with_units(x, units) for x in velocities})
        dataset = dataset.assign({n: _encoded(x.variable) for n, x in dataset.items() if _of_cftime(x)})
    if "sigma" in columns:
        names = {key: name for key, name in names.items() if key not in ("sigma_u", "sigma_v")}
    if not timed:
        names.pop("time", None)
    table = pd.DataFrame(read_points(dataset, names, source))
    depths = []
    for n in dataset.variables:
        if _may_be_depth(dataset[n], n) and n not in names.values():
            units = attribute(dataset[n], "units")
            title = f"{n} ({units})" if units else n
            table[title] = dataset[n].values
            depths += [title] * _is_depth(dataset[n])
    lost = table[["u", "v"]].isna().any(axis=1).to_numpy()
    if lost.any():
        source.notice(f"{lost.sum()} of {len(table)} points have no velocity and are left out")
    source.say()
    return Points(table, lost, depths)


def by_standard_name(dataset: xr.Dataset, columns: Mapping[str, str], among: Iterable[str]) -> dict[str, str]:
    """The names that the user gave, those of variables whose standard name no other has, and the only one of dates."""
    named = dict(columns)
    for key, standard in titles.STANDARD_NAMES.items():
        matches = [n for n in among if attribute(dataset[n], "standard_name").removeprefix("surface_") == standard]
        if len(matches) == 1:
            named.setdefault(key, matches[0])
    among = [n for n in among if isinstance(n, str)]
    if "time" not in named and not any(titles.plain(n) in titles.NAMES["time"] for n in among):
        of_dates = [n for n in among if dated(dataset[n])]
        if len(of_dates) == 1:
            named["time"] = of_dates[0]
    return named


def _first_named(dataset: xr.Dataset, columns: Mapping[str, str], among: Sequence[str]) -> dict[str, str]:
    """What a variable is -> the first that is called so."""
    plain = {n.lower(): n for n in among}
    usual = titles.NAMES | {key: (name,) for key, name in by_standard_name(dataset, columns, among).items()}
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
        if set(titles.NEEDED) <= found.keys():
            lat, lon, u, v = (dims[found[key]] for key in titles.NEEDED)
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
    about = [n for n in within if _may_be_depth(dataset[n], n) or is_flag(dataset[n], n)]
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


def _is_depth(variable: xr.DataArray) -> bool:
    """Whether attributes tell it."""
    standard = attribute(variable, "standard_name")
    vertical = attribute(variable, "axis").upper() == "Z" or attribute(variable, "positive").lower() in ("up", "down")
    return variable.dtype.kind in "fiu" and (standard.startswith(OF_DEPTH) if standard else vertical)


def _may_be_depth(variable: xr.DataArray, name: str) -> bool:
    if attribute(variable, "standard_name") or variable.dtype.kind not in "fiu":
        return _is_depth(variable)
    return _is_depth(variable) or titles.says_depth(name) or titles.hints_depth(name)


def _spread(variable: xr.Variable, along: Mapping[str, int]) -> xr.Variable:
    """A variable at every point: repeated along the dimensions that it lacks."""
    some = variable.isel({d: 0 for d in variable.dims if d not in along})
    values = some.to_base_variable().set_dims(dict(along)).transpose(*along).values
    # Limits of packed numbers need the encoding.
    return xr.Variable(POINT, values.ravel(), variable.attrs, variable.encoding)


def dated(variable: xr.DataArray) -> bool:
    """Whether it holds dates: of NumPy, of cftime, or as numbers since one."""
    return variable.dtype.kind == "M" or _of_cftime(variable) or " since " in str(variable.attrs.get("units", ""))


def _of_cftime(variable: xr.DataArray) -> bool:
    return variable.dtype.kind == "O" and bool(_known_dates(variable).any())


def _known_dates(variable: xr.DataArray | xr.Variable) -> np.ndarray:
    """Which of the values are dates of cftime; the first ones may be missing."""
    return np.array([hasattr(value, "calendar") for value in variable.values.flat])


def _encoded(variable: xr.Variable) -> xr.Variable:
    """Dates of cftime along one dimension as files hold them, not a number where one is missing."""
    known = _known_dates(variable)
    made = xr.conventions.encode_cf_variable(variable[known])
    values = pd.Series(made.values, index=np.flatnonzero(known)).reindex(range(known.size))
    return xr.Variable(variable.dims, values.to_numpy(), made.attrs)


def units_of(variable: xr.DataArray) -> list[Any]:
    """Its attribute of units, in any case; empty without."""
    return [value for key, value in variable.attrs.items() if key.lower() in ("unit", "units")]


def usual_units(velocities: Sequence[xr.DataArray], name: str) -> str:
    """What velocities and errors without units are in: what the velocities are in, m s-1 where none says.

    Raises:
      InputError: one of the velocities is in other units than m/s by its attribute, and another has none.
    """
    known = {str(x.name): str(units_of(x)[0]) for x in velocities if units_of(x)}
    lost = [str(x.name) for x in velocities if not units_of(x)]
    for other, units in known.items() if lost else ():
        if factor(units, other, Source(name)) != 1:
            raise InputError(f"{name}: {other} is in {units} and {lost[0]} has no units; give it those that it is in")
    said = set(known.values())
    return said.pop() if len(said) == 1 else "m s-1"


def with_units(variable: xr.DataArray, usual: str) -> xr.DataArray:
    """With its units as CF calls them, the usual ones where it has none."""
    return variable.assign_attrs(units=[*units_of(variable), usual][0])
