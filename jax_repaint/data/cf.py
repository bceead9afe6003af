"""NetCDF and Zarr as oceanographers write them: which variables, where, when, in which directions.

What a file says wins over what is usual: attributes before names, names before positions. What a file leaves
open is refused rather than guessed, with what to say about it. Source: CF conventions 1.11; UGRID 1.0 for meshes.
"""

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import xarray as xr

from jax_repaint.data import titles, vertical
from jax_repaint.data.positions import Component, place
from jax_repaint.data.source import Choice, Raw, Source, attribute, dims_of, door, in_degrees, instant, rows_first
from jax_repaint.errors import InputError

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
DURATION = re.compile(r"(millisec(ond)?|sec(ond)?|minute|min|hour|hr|h|s|day|d)s?", re.IGNORECASE)

# Standard name: units, usual variable names.
AXES = {
    "time": (r".+ since .+", ("time", "ocean_time", "time_counter", "t", "date")),
    "latitude": (r"degrees?_?n(orth)?", ("lat", "latitude", "nav_lat", "lats", "lat_rho")),
    "longitude": (r"degrees?_?e(ast)?", ("lon", "longitude", "nav_lon", "lons", "lon_rho")),
}
# In names of files: 20200104, 2020-01-04 or 2020_01_04; behind it T06, T0600, _060000, _06-00-00 or the like, but not
# _06, which may count anything.
DATE = re.compile(r"(?<!\d)((?:19|20)\d\d)([-_]?)(0[1-9]|1[0-2])\2(0[1-9]|[12]\d|3[01])(?!\d)")
HOUR, MINUTES = r"([01]\d|2[0-3])", r"([0-5]\d){1,2}|(:[0-5]\d){1,2}|([-_][0-5]\d){2}"
CLOCK = re.compile(rf"(T{HOUR}({MINUTES})?|[-_ ]{HOUR}({MINUTES}))(Z|UTC|h)?(?![^\W_])", re.IGNORECASE)
MESH = re.compile(r"(?<!depth_)(nele|elem(ent)?|node|nod2d?|face|cell|tri|edge)s?$", re.IGNORECASE)
ERROR = re.compile(r"\s|standard_(error|deviation)|variance|uncertainty")  # of a velocity, not one itself
SPREAD = re.compile(r"standard[ _](error|deviation)|uncertainty")
REFERENCE = re.compile(r"(forecast_)?ref(erence)?_?time", re.IGNORECASE)
BAD = re.compile(
    r"bad|fail|suspect|missing|questionable|invalid|poor|reject|outlier|(?<!de)spike|erroneous|unusable|degraded|exceed"
    r"|out[ _]of[ _]|not?[ _](good|valid|use)",
    re.IGNORECASE,
)
FLAGS = ("flag_meanings", "flag_masks", "flag_values")
QUALITY = re.compile(r"(^|_)(qc|qcflag|quality|primary|flags?)(_|$)", re.IGNORECASE)


def read_cf(path: Path, kind: str, v_path: Path | None, choice: Choice, source: Source) -> Raw:
    """The velocities of a file, or of one file for u and one for v.

    Raises:
      InputError: damaged, no pair or several; an axis, units, times or positions that cannot be used.
    """
    with contextlib.ExitStack() as stack:
        dataset = stack.enter_context(opened(path, kind))
        other = stack.enter_context(opened(v_path)) if v_path else dataset
        grid = stack.enter_context(opened(Path(choice.grid))) if choice.grid else dataset
        stack.enter_context(door(path))
        for content in (dataset, other):
            _refuse_mesh(content, source)
        names = _choose_pair(dataset, other, choice, source)
        u, v = (
            _component(content, grid, name, along, choice, source)
            for content, name, along in zip((dataset, other), names, (1, 0), strict=True)
        )
        if not np.array_equal(u.time, v.time, equal_nan=True):
            raise source.error(f"{names[0]} and {names[1]} are of different times, {_span(u.time)} and {_span(v.time)}")
        source.facts["pair"] = f"{names[0]}, {names[1]} in {attribute(dataset[names[0]], 'units')}"
        found = [
            _errors_of(content, name, axis)
            for content, name, axis in zip((dataset, other), names, ("eastward", "northward"), strict=True)
        ]
        if all(len(errors) == 1 for errors, _ in found):
            source.facts["errors"] = " ".join(errors[0] for errors, _ in found)
        elif unclear := [name for errors, others in found for name in (*errors, *others)]:
            source.facts["other errors"] = " and ".join(dict.fromkeys(unclear))
        # NEMO has positions of u and of v in files of their own; one file made of both keeps those of one.
        faces = "depthu" in dataset[names[0]].dims and "depthv" in other[names[1]].dims
        if faces and u.lat is not None and np.array_equal(u.lat, v.lat, equal_nan=True):
            raise source.error(
                f"{names[0]} and {names[1]} lie on different faces of the cells (depthu, depthv) and have the same "
                "positions; give the file of each as it was before they were merged"
            )
        raw = place(u, v, grid, dataset, choice, source)
        return _timed(raw, source)


def _errors_of(dataset: xr.Dataset, name: str, axis: str) -> tuple[list[str], list[str]]:
    """Variables with the standard errors of a velocity (CF-1.11, 3.3 and 3.4), and those that say less of what.

    An error may lack dimensions of its velocity, as one for all times does. A velocity without a standard name is
    that along its `axis`.
    """
    x = dataset[name]
    listed = _names_in(attribute(x, "ancillary_variables"))
    whole = f"{_standard(x) or f'{axis}_sea_water_velocity'} standard_error"
    wide = {n: {d for d in v.dims if dataset.sizes[d] != 1} for n, v in dataset.variables.items()}
    among = {
        str(n): other
        for n, other in dataset.data_vars.items()
        if n != name and other.dtype.kind in "fiu" and wide[n] <= wide[name] and not is_flag(other, str(n))
    }
    errors = [n for n, other in among.items() if attribute(other, "standard_name").endswith("standard_error")]
    own = [n for n in errors if n in listed or _standard(among[n]) == whole]
    return own, [n for n, other in among.items() if n not in own and (n in errors or _may_be_error(other, n))]


def _may_be_error(variable: xr.DataArray, name: str) -> bool:
    if titles.plain(name) in (*titles.NAMES["sigma_u"], *titles.NAMES["sigma_v"]):
        return True
    told = attribute(variable, "standard_name"), attribute(variable, "long_name")
    # A coordinate of levels may be called sigma.
    return variable.ndim >= 2 and bool(titles.ERROR.search(name.lower()) or SPREAD.search(" ".join(told).lower()))


def _standard(variable: xr.DataArray) -> str:
    return attribute(variable, "standard_name").removeprefix("surface_")


def _span(time: np.ndarray) -> str:
    return f"{len(time)} from {np.datetime_as_string(time[0], 's')}" if len(time) else "none"


def _timed(raw: Raw, source: Source) -> Raw:
    """Without the frames whose time is missing."""
    known = ~np.isnat(raw.time)
    if known.all() or not known.any():
        return raw
    lost = known.size - int(known.sum())
    source.notice(f"{lost} of {known.size} frames have no time and are left out")
    return Raw(raw.u[known], raw.v[known], raw.lat, raw.lon, raw.time[known], raw.ocean)


def read_points(dataset: xr.Dataset, names: Mapping[str, str], source: Source) -> dict[str, np.ndarray]:
    """Columns (m,) of a track: u, v and their errors in m/s, NaN where limits or flags hide a value, lat, lon, time.

    Raises:
      InputError: units or times that cannot be used.
    """
    out = {}
    for key, name in names.items():
        whole = dataset[name]
        if key == "time":
            out[key] = _times(whole, whole, Choice(), source)
        elif key in ("lat", "lon"):
            out[key] = _numbers(whole, source)
        else:
            # An error without units has those of the velocity.
            units = attribute(whole, "units") or attribute(dataset[names["v" if key == "sigma_v" else "u"]], "units")
            x = _without_bad(dataset, _within_limits(whole, whole, source), {}, source) if key in "uv" else whole
            out[key] = x.values.astype(float) * factor(units, name, source)
    return out


# Opening


@contextlib.contextmanager
def opened(path: Path, kind: str | None = None) -> Iterator[xr.Dataset]:
    """The file with numbers decoded and times as they are."""
    with contextlib.ExitStack() as stack:
        with door(path):
            raw = stack.enter_context(_open(path, kind or ("zarr" if path.is_dir() else "netcdf")))
            for variable in raw.variables.values():
                _mend_attributes(variable)
            dataset = xr.decode_cf(raw, decode_times=False, decode_coords=False)
        yield dataset


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


# Variables


def _refuse_mesh(dataset: xr.Dataset, source: Source) -> None:
    meshes = [n for n, x in dataset.variables.items() if attribute(x, "cf_role") == "mesh_topology"]
    dims = [d for d in dataset.sizes if MESH.search(str(d)) and dataset.sizes[d] > 1]
    if meshes or (dims and _scattered(dataset, dims)):
        raise source.error(
            f"the velocities lie on an unstructured mesh ({', '.join(map(str, meshes or dims))}), not on rows and "
            "columns; interpolate them to a regular grid first, for instance by `cdo remapbil` or scipy's griddata"
        )


def _scattered(dataset: xr.Dataset, dims: list) -> bool:
    """Whether a latitude or longitude runs along one of `dims` alone."""
    return any(
        x.ndim == 1 and x.dims[0] in dims and any(_is_axis(x, str(n), axis) for axis in ("latitude", "longitude"))
        for n, x in dataset.variables.items()
    )


def _is_axis(variable: xr.Variable, name: str, axis: str) -> bool:
    units, names = AXES[axis]
    return bool(
        attribute(variable, "standard_name") == axis
        or re.fullmatch(units, attribute(variable, "units").lower())
        or name.lower() in names
    )


def _choose_pair(dataset: xr.Dataset, other: xr.Dataset, choice: Choice, source: Source) -> tuple[str, str]:
    listing = ", ".join(str(n) for n in dataset.data_vars) or "nothing"
    if choice.u is not None:
        for content, asked in ((dataset, choice.u), (other, choice.v)):
            if asked not in content.variables:
                listing = ", ".join(str(n) for n in content.data_vars) or "nothing"
                raise InputError(f"{source.name} has no variable {asked!r}; it has {listing}")
            if content[asked].dtype.kind not in "fiu":
                raise source.error(f"{asked} holds no numbers but {content[asked].dtype}")
        if other is dataset and choice.u == choice.v:
            raise source.error(f"u and v are one variable, {choice.u}; it has {listing}")
        return choice.u, choice.v
    if any("radial_sea_water_velocity" in attribute(x, "standard_name") for x in dataset.data_vars.values()):
        raise source.error(
            "it has radial velocities, of which eastward and northward velocities beside them are parts; combine the "
            "radials of several stations to currents before (or name the velocities)"
        )
    pairs = _pairs(dataset, other)
    if not pairs:
        flat = next((x for n, x in dataset.data_vars.items() if x.ndim == 1 and is_velocity(x, str(n))), None)
        if flat is not None and _scattered(dataset, list(flat.dims)):
            raise source.error(f"{flat.name} {dims_of(flat)} lies on scattered points or a track, not on a grid")
        alone = _half(dataset) if other is dataset else ""
        raise InputError(f"{source.name} has no pair of velocities that could be recognised; it has {listing}{alone}")
    if len(pairs) > 1:
        found = ", ".join(f"({a}, {b})" for a, b in pairs)
        raise InputError(f"{source.name} has several pairs of velocities, {found}; say which by u and v")
    return pairs[0]


def _candidates(dataset: xr.Dataset) -> dict[str, list[str]]:
    """Names of possible velocities by standard name."""
    found: dict[str, list[str]] = {}
    for n, x in dataset.data_vars.items():
        if x.ndim >= 2 and x.dtype.kind in "fiu":
            found.setdefault(attribute(x, "standard_name"), []).append(str(n))
    return found


def _pairs(dataset: xr.Dataset, other: xr.Dataset) -> list[tuple[str, str]]:
    """Pairs by standard name, then by variable name among variables that no standard name speaks for."""
    first, second = _candidates(dataset), _candidates(other)
    pairs = []
    for standard, eastward in first.items():
        if _is_current(standard) and _northward(standard):
            pairs += [(standard, *pair) for pair in itertools.product(eastward, second.get(_northward(standard), []))]
    # The mean over depth is meant only where there is nothing else.
    local = [pair[1:] for pair in pairs if "barotropic" not in pair[0]] or [pair[1:] for pair in pairs]
    a_names, b_names = ({n.lower(): n for n in names.get("", [])} for names in (first, second))
    described = [(n, _northward(n)) for n in a_names if re.search("velocity|current", n)]
    named = [(a_names[a], b_names[b]) for a, b in [*PAIRS, *described] if a in a_names and b in b_names]
    if local or named:
        return local + named
    # One may have lost its standard name on the way.
    a_names, b_names = (
        {n.lower(): n for standard, group in names.items() if not standard or _is_current(standard) for n in group}
        for names in (first, second)
    )
    return [(a_names[a], b_names[b]) for a, b in PAIRS if a in a_names and b in b_names]


def _half(dataset: xr.Dataset) -> str:
    """A hint where a file has one component only."""
    found = _candidates(dataset)
    known = {name for pair in PAIRS for name in pair}
    one = [n for standard, group in found.items() for n in group if n.lower() in known or _is_current(standard)]
    return f"; if the other component of {one[0]} is in another file, give that by v_path (--v_file)" if one else ""


def _is_current(standard_name: str) -> bool:
    return "sea_water" in standard_name and "velocity" in standard_name and not ERROR.search(standard_name)


def is_velocity(variable: xr.DataArray, name: str) -> bool:
    """Whether it is a component of a current by its standard name or its own."""
    return _is_current(attribute(variable, "standard_name")) or any(name.lower() in pair for pair in PAIRS)


def _northward(eastward: str) -> str:
    """The name of the other component; empty where `eastward` is not a name of the first."""
    for a, b in NORTHWARD.items():
        if a in eastward:
            return eastward.replace(a, b).replace("at_u_location", "at_v_location")
    return ""


# One component


def _component(
    dataset: xr.Dataset, grid_file: xr.Dataset, name: str, along: int, choice: Choice, source: Source
) -> Component:
    whole = dataset[name] if choice.over is None else _spread_over(dataset[choice.over[1 - along]], dataset[name])
    axis = vertical.bottom_following(dataset, whole)
    if axis and choice.depth and choice.level is None:
        valid = _within_limits(whole, whole, source)
        chosen, x = {}, vertical.at_depth(dataset, grid_file, valid, axis, along, choice.depth, source)
    else:
        chosen = vertical.choose(dataset, whole, choice, source)
        x = _within_limits(whole.isel(chosen), whole, source)
    time = _find(dataset, "time", x)
    places = {axis: _find(dataset, axis, x) for axis in ("latitude", "longitude")}
    lost = " nor ".join(axis for axis, found in places.items() if found is None)
    lat, lon = (None, None) if lost else places.values()
    frames = () if time is None else time.dims
    # Faces of a staggered grid may do without positions where its cells have them.
    wide = tuple(d for d in x.dims if d not in frames and x.sizes[d] > 1)
    grid = rows_first(wide, dataset) if lost else _grid_dims(dataset, x, lat, lon, source)
    if set(frames) & set(grid):
        raise source.error(f"{name} {dims_of(whole)} lies on points that move with time, not on a grid")
    extra = [d for d in x.dims if d not in (*frames, *grid) and x.sizes[d] > 1]
    if lost and len(grid) != 2:
        raise source.error(f"no {lost} found for {name} {dims_of(whole)}")
    undated = [d for d in extra if time is None and str(d).lower() in AXES["time"][1]]
    if undated:
        raise source.error(
            f"{name} {dims_of(whole)} has no variable with the times of {undated[0]}; add one that counts such as "
            "'hours since 2020-01-01', by its attribute units"
        )
    if extra:
        raise source.error(
            f"{name} has the dimensions {dims_of(whole)}; expected time, latitude and longitude only, "
            f"so select one of {', '.join(map(str, extra))} first"
        )
    x = _without_bad(dataset, x, chosen, source)
    x = x.squeeze([d for d in x.dims if d not in (*frames, *grid)]).transpose(*frames, *grid)
    values = x.values if frames else x.values[None]
    values = values * factor(attribute(whole, "units"), name, source)
    if lat is not None and lat.ndim == 2:
        lat, lon = lat.transpose(*grid), lon.transpose(*grid)
        nowhere = int(((lat.values == 0) & (lon.values == 0)).sum())
        # Where all are 0 the grid is known by other points.
        if 1 < nowhere < lat.size:
            raise source.error(
                f"{lat.name} and {lon.name} are both 0 in {nowhere} cells, as NEMO leaves them where land has no "
                "processor; put in the positions of its mesh_mask.nc or coordinates.nc"
            )
    return Component(
        name,
        attribute(whole, "standard_name"),
        values,
        grid,
        _times(whole, time, choice, source),
        None if lat is None else _numbers(lat, source),
        None if lon is None else _numbers(lon, source),
        _sea_mask(dataset, grid),
    )


def _spread_over(x: xr.DataArray, variable: xr.DataArray) -> xr.DataArray:
    """A variable repeated along the dimensions of `x` that it lacks."""
    alone = [d for d in variable.dims if d not in x.dims]
    spread = variable.squeeze(alone, drop=True).variable.to_base_variable().set_dims(dict(x.sizes)).transpose(*x.dims)
    made = xr.DataArray(spread, x.coords, name=variable.name)
    # Limits of packed numbers need it.
    made.encoding = variable.encoding
    return made


def _numbers(coordinate: xr.DataArray, source: Source) -> np.ndarray:
    if coordinate.dtype.kind not in "fiu":
        raise source.error(f"{coordinate.name} must hold numbers, got {coordinate.dtype}")
    in_degrees(coordinate, source)
    return coordinate.values.astype(float)


def _grid_dims(dataset: xr.Dataset, x: xr.DataArray, lat: xr.DataArray, lon: xr.DataArray, source: Source) -> tuple:
    if lat.ndim == 1 and lat.dims == lon.dims:
        raise source.error(f"{x.name} {dims_of(x)} lies on scattered points or a track, not on a grid")
    if lat.ndim != lon.ndim or (lat.ndim == 2 and set(lat.dims) != set(lon.dims)):
        raise source.error(f"latitude {dims_of(lat)} and longitude {dims_of(lon)} do not make a grid")
    if lat.ndim == 1:
        return lat.dims + lon.dims
    return rows_first(tuple(d for d in x.dims if d in lat.dims), dataset)


def _find(dataset: xr.Dataset, axis: str, x: xr.DataArray) -> xr.DataArray | None:
    """The coordinate on some of the dimensions of `x` that is `axis` by standard name, units or its own name."""
    units, names = AXES[axis]
    ranks = (0, 1) if axis == "time" else (1, 2)
    said = f"{attribute(x, 'coordinates')} {x.encoding.get('coordinates', '')}"
    listed = () if axis == "time" else _names_in(said)

    def order(variable: xr.DataArray) -> tuple:
        # What the velocities name outranks, and an axis of theirs outranks a scalar or an auxiliary coordinate.
        by = (
            attribute(variable, "standard_name") == axis,
            re.fullmatch(units, attribute(variable, "units").lower()),
            str(variable.name).lower() in names,
        )
        evidence = next((i for i, holds in enumerate(by) if holds), None)
        if attribute(variable, "standard_name") == f"grid_{axis}":
            evidence = None  # of a rotated pole, whatever its units
        # Of models whose rows turn towards the pole, "h point nominal longitude" is that of the rows that do not.
        nominal = "nominal" in attribute(variable, "long_name").lower()
        return (
            evidence is None,
            nominal,
            variable.name not in listed,
            variable.name not in x.dims,
            variable.ndim == 0,
            evidence,
        )

    candidates = [
        dataset[n]
        for n, v in dataset.variables.items()
        if v.ndim in ranks and set(v.dims) <= set(x.dims) and not of_forecast(v, str(n)) and not order(dataset[n])[0]
    ]
    return min(candidates, key=order, default=None)


def of_forecast(variable: xr.Variable, name: str) -> bool:
    """Whether it is the time at which a forecast began, or how long ago that was."""
    standard = attribute(variable, "standard_name")
    return standard.startswith("forecast_") or (not standard and bool(REFERENCE.fullmatch(name)))


def _within_limits(x: xr.DataArray, whole: xr.DataArray, source: Source) -> xr.DataArray:
    """NaN outside `valid_range`, or `valid_min` and `valid_max`, of the variable `whole` (CF-1.11, 2.5.1)."""
    names = ("valid_range",) if "valid_range" in whole.attrs else ("valid_min", "valid_max")
    given = {name: np.ravel(whole.attrs[name]) for name in names if name in whole.attrs}
    if not given:
        return x
    sizes = {"valid_range": 2, "valid_min": 1, "valid_max": 1}
    odd = [n for n, v in given.items() if v.size != sizes[n] or v.dtype.kind not in "fiu" or np.isnan(v).any()]
    if odd:
        source.notice(f"{odd[0]} of {whole.name} is {whole.attrs[odd[0]]!r}, which is no limit, and does not count")
        return x
    low, high = given.get("valid_range", [given.get("valid_min", [-np.inf])[0], given.get("valid_max", [np.inf])[0]])
    low, high = _unpacked(low, -1, whole), _unpacked(high, 1, whole)
    x = x.compute()
    outside = (x < min(low, high)) | (x > max(low, high))
    count, present = int(outside.sum()), int(x.notnull().sum())
    if not count:
        return x
    limits = f"{min(low, high):g} to {max(low, high):g} {attribute(whole, 'units')}"
    text = f"{' and '.join(given)} of {whole.name}, {limits}"
    if count == present:
        raise source.error(f"every value lies outside {text}; correct the attributes")
    source.notice(f"{count} of {present} values lie outside {text}, and count as missing")
    return x.where(~outside)


def _unpacked(limit: np.number, side: int, whole: xr.DataArray) -> float:
    """A limit in the units of decoded values, with room for rounding towards `side`."""
    stored = np.dtype(whole.encoding.get("dtype", whole.dtype))
    scale, offset = (float(whole.encoding.get(key, usual)) for key, usual in (("scale_factor", 1), ("add_offset", 0)))
    if stored.kind == "f":
        with np.errstate(over="ignore"):
            # As the values themselves were rounded.
            return scale * float(np.asarray(limit).astype(stored)) + offset
    half = side * abs(scale) / 2
    if np.asarray(limit).dtype.kind == "f":
        # Of another type than the packed numbers: a limit of what they stand for.
        return float(limit) + half
    if str(whole.encoding.get("_Unsigned", "")).lower() == "true" and limit < 0:
        limit = int(limit) + 2 ** (8 * stored.itemsize)
    return scale * float(limit) + offset + np.sign(scale) * half


def unpack_limits(x: xr.DataArray) -> xr.DataArray:
    """The variable with its limits in the units of its decoded values, for when its packing is dropped."""
    sides = {"valid_range": (-1, 1), "valid_min": (-1,), "valid_max": (1,)}
    given = {name: np.ravel(x.attrs[name]) for name in sides if name in x.attrs}
    return x.assign_attrs(
        {
            name: np.squeeze([_unpacked(limit, side, x) for limit, side in zip(limits, sides[name], strict=True)])
            for name, limits in given.items()
            if limits.size == len(sides[name]) and limits.dtype.kind in "fiu"
        }
    )


def _without_bad(dataset: xr.Dataset, x: xr.DataArray, chosen: dict, source: Source) -> xr.DataArray:
    """NaN where a quality flag (CF-1.11, 3.5) on the chosen level calls the value bad."""
    listed = _names_in(attribute(x, "ancillary_variables"))
    # A value whose place or time is bad is bad too.
    elsewhere = [v for n, v in dataset.variables.items() if not any(_is_axis(v, str(n), axis) for axis in AXES)]
    others = {n for v in elsewhere for n in _names_in(attribute(v, "ancillary_variables"))} - set(listed)
    out = x
    for name, flag in dataset.variables.items():
        standard = attribute(flag, "standard_name")
        known = name in listed or is_flag(flag, str(name))
        if not known or name in others or not flag.dims or not set(flag.dims) <= {*x.dims, *chosen}:
            continue
        bad, meanings = _bad(flag.isel({d: i for d, i in chosen.items() if d in flag.dims}))
        if bad is None:
            # An error of the velocity has units.
            called = is_flag(flag, str(name)) and attribute(flag, "units") in ("", "1")
            if name not in listed or called or standard.endswith("_flag") or any(key in flag.attrs for key in FLAGS):
                source.notice(f"{name} looks like a quality flag but cannot be read and does not count")
            continue
        if bad.any():
            flagged = xr.DataArray(bad, dims=[d for d in flag.dims if d not in chosen])
            hidden = int((flagged & out.notnull()).sum())
            if hidden:
                source.notice(f"{hidden} values that {name} calls {meanings} count as missing")
            out = out.where(~flagged)
    return out


def _names_in(text: str) -> list[str]:
    """Names that an attribute lists: by blanks as CF has it, or with commas, as European radars write them."""
    return re.findall(r"[^\s,;]+", text)


def is_flag(variable: xr.DataArray | xr.Variable, name: str) -> bool:
    """Whether it looks like quality flags: by its standard name, its meanings or its own name."""
    standard, meanings = attribute(variable, "standard_name"), attribute(variable, "flag_meanings")
    by_standard_name = standard.endswith(("quality_flag", "status_flag"))
    return by_standard_name or bool(QUALITY.search(name)) or bool(BAD.search(meanings))


def _bad(flag: xr.Variable) -> tuple[np.ndarray | None, str]:
    """Where the flag has a meaning such as fail or bad_data, and which of them occur; None where it has no meanings."""
    meanings = attribute(flag, "flag_meanings").replace(",", " ").split()
    masks, codes = (_whole_numbers(flag.attrs.get(key, [])) for key in FLAGS[1:])
    sizes = {-1 if a is None else a.size for a in (masks, codes)}
    if flag.dtype.kind not in "fiub" or not meanings or not {len(meanings)} <= sizes <= {0, len(meanings)}:
        return None, ""
    values = np.nan_to_num(flag.values.astype(float), nan=-(2.0**40)).astype(np.int64)
    bad, found = np.zeros(values.shape, bool), []
    for i, meaning in enumerate(meanings):
        if not BAD.search(meaning):
            continue
        bits = values & masks[i] if masks.size else values
        here = bits == codes[i] if codes.size else bits != 0
        if here.any():
            bad |= here
            found.append(meaning)
    return bad, ", ".join(found)


def _whole_numbers(given: object) -> np.ndarray | None:
    """Numbers of an attribute, also of a text such as "0b, 1b, 4b"; None where it is something else."""
    given = np.atleast_1d(given.decode("latin1") if isinstance(given, bytes) else given)
    if given.dtype.kind in "fiu":
        return given.astype(np.int64)
    words = " ".join(map(str, given)).replace(",", " ").split()
    numbers = [re.fullmatch(r"([+-]?\d{1,18})[bsluBSLU]*", word) for word in words]
    return np.array([int(n[1]) for n in numbers], np.int64) if all(numbers) else None


def _times(x: xr.DataArray, time: xr.DataArray | None, choice: Choice, source: Source) -> np.ndarray:
    """datetime64[ns] (frames,) of the file, of the choice, or of the file's name."""
    if time is None:
        return np.atleast_1d(_time_elsewhere(x, choice, source))
    try:
        return _times_of(time, choice, source)
    except InputError:
        if choice.undated is None or time.size != 1:
            raise
        return np.atleast_1d(_date(choice.undated, source))


def _times_of(time: xr.DataArray, choice: Choice, source: Source) -> np.ndarray:
    """datetime64[ns] (frames,) of a file's times, which may count from the date of the choice."""
    units = attribute(time, "units")
    if time.dtype.kind != "M" and " since " not in units:
        if not DURATION.fullmatch(units):
            raise source.error(
                f"the times in {time.name} cannot be decoded, their units are {units!r}; "
                "expected such as 'hours since 2000-01-01'"
            )
        given = choice.time or choice.undated
        if given is None:
            raise source.error(
                f"the times in {time.name} count {units!r} from no date; say from which by time, such as 2000-01-01"
            )
        start = np.datetime_as_string(_date(given, source), "s")
        time = time.copy()
        time.attrs["units"] = f"{units} since {start}"
        source.facts["time"] = f"{time.name}, counted from {start}"
    elif choice.time is not None:
        raise source.error(f"the times in {time.name} have dates of their own; leave time={choice.time} out")
    return _decode_time(time, source)


def _time_elsewhere(x: xr.DataArray, choice: Choice, source: Source) -> np.datetime64:
    given = choice.time or choice.undated
    if given is not None:
        source.facts["time"] = f"given as {given}"
        return _date(given, source)
    found = list(DATE.finditer(source.name))
    if len(found) != 1:
        raise source.error(f"no time found for {x.name} {dims_of(x)}; give it by time, such as 2000-01-01T12:00")
    clock = CLOCK.match(source.name, found[0].end())
    parts = re.findall(r"\d\d", clock[0]) if clock else []
    date = _date(f"{'-'.join(found[0].group(1, 3, 4))}T{':'.join([*parts, '00', '00'][:3])}", source)
    source.notice(f"no time axis; the date in its name, {date.astype('datetime64[s]')}, is taken")
    source.facts["time"] = "from the name of the file"
    return date


def _date(text: str, source: Source) -> np.datetime64:
    try:
        return instant(text)
    except ValueError as e:
        raise source.error(f"the time {text!r} is no date such as 2000-01-01 or 2000-01-01T12:00") from e


def _decode_time(time: xr.DataArray, source: Source) -> np.ndarray:
    """datetime64 of a CF time coordinate."""
    if time.dtype.kind == "M":
        return np.atleast_1d(time.values)
    undecodable = (
        f"the times in {time.name} cannot be decoded from {attribute(time, 'units')!r}, calendar "
        f"{attribute(time, 'calendar') or 'standard'}; expected the civil calendar and the years 1678..2261"
    )
    since = attribute(time, "units").partition(" since ")[2]
    zone = re.search(r"[a-z]{2,}", since, re.IGNORECASE)
    if zone and (zone[0].upper() not in ("UTC", "GMT") or re.match(r"\s*[+-]", since[zone.end() :])):
        # cftime ignores it, and turns the sign of what is behind UTC.
        raise source.error(
            f"the times in {time.name} cannot be decoded from {attribute(time, 'units')!r}: a zone is understood as "
            "UTC, or as an offset such as +02:00 alone"
        )
    date = re.match(r"\s*(\d{1,2})([-/.])(\d{1,2})\2\d{4}", since)
    # 01-01-1950 and 13/02/2020 are one date however they are read.
    if date and (one := int(date[1])) != (other := int(date[3])) and max(one, other) <= 12:
        raise source.error(
            f"the times in {time.name} cannot be decoded from {attribute(time, 'units')!r}: which of {date[0].strip()} "
            "is the month nobody can tell; expected such as 'hours since 2020-01-04'"
        )
    # From March 1900 on, for two centuries, both calendars count the same days between the same dates.
    julian = attribute(time, "calendar").lower() == "julian"
    civil = time.variable.copy()
    if julian or attribute(time, "calendar").lower() == "gregorian_proleptic":
        civil.attrs["calendar"] = "proleptic_gregorian"
    try:
        decoded = xr.decode_cf(xr.Dataset({"time": civil}))["time"].values
        start = xr.decode_cf(xr.Dataset({"time": xr.zeros_like(civil)}))["time"].values if julian else decoded
    except Exception as e:
        raise source.error(undecodable) from e
    if any(part.dtype.kind != "M" for part in (decoded, start)):
        raise source.error(undecodable)
    first, until = np.array(["1900-03-01", "2100-03-01"], "datetime64[ns]")
    if julian and not all((first <= part).all() and (part < until).all() for part in (decoded, start)):
        raise source.error(undecodable)
    return np.atleast_1d(decoded)


def factor(units: str, name: str, source: Source) -> float:
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
        raise source.error(f"{name} has {has}; expected m s-1, cm s-1, km/h or knots")
    if factor != 1:
        source.notice(f"{name} is converted from {units} to m/s")
    return factor


def _sea_mask(dataset: xr.Dataset, grid: tuple) -> np.ndarray | None:
    for variable in dataset.data_vars.values():
        if attribute(variable, "standard_name") == "sea_binary_mask" and set(variable.dims) == set(grid):
            return variable.transpose(*grid).values == 1
    return None
