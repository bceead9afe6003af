"""From each component on its own points, in the directions of its grid, to both on common points, east and north."""

import dataclasses
import re

import numpy as np
import xarray as xr

from jax_repaint.data import staggered
from jax_repaint.data.arrays import regular
from jax_repaint.data.source import Choice, Raw, Source, attribute, in_degrees, rows_first


@dataclasses.dataclass(frozen=True, eq=False)
class Component:
    """One component in the file's own directions: values (time, y, x) in m/s, and where they lie if that is known."""

    name: str
    standard_name: str
    values: np.ndarray
    dims: tuple
    time: np.ndarray
    lat: np.ndarray | None
    lon: np.ndarray | None
    ocean: np.ndarray | None


def place(u: Component, v: Component, grid: xr.Dataset, dataset: xr.Dataset, choice: Choice, source: Source) -> Raw:
    """Both components on common points, eastward and northward.

    Raises:
      InputError: positions are missing, do not fit together or leave the directions open.
    """
    for name in ("lat_rho", "lon_rho"):
        for content in (d for d in (grid, dataset) if name in d.variables):
            in_degrees(content[name], source)
    rho = [_static(n, grid, dataset) for n in ("lat_rho", "lon_rho")]
    has_rho = all(place is not None and place.ndim == 2 for place in rho)
    if u.dims == v.dims and u.lat is None and has_rho and all("rho" in str(d) for d in u.dims):
        u, v = (dataclasses.replace(c, lat=rho[0], lon=rho[1]) for c in (u, v))
    if u.dims == v.dims and _same_points(u, v):
        if u.lat is None:
            raise source.error(f"no latitude nor longitude found for {u.name} {_shape(u)}")
        if u.values.shape != v.values.shape:
            raise source.error(f"{u.name} is {u.values.shape} and {v.name} is {v.values.shape}; they must be equal")
        return _collocated(u, v, grid, dataset, choice, source)
    raw, cells = _from_rho(u, v, rho, grid, dataset, source) if has_rho else (_from_faces(u, v, source), None)
    if min(raw.u.shape[1:]) < 2:
        raise source.error(f"{u.name} {_shape(u)} and {v.name} {_shape(v)} share fewer than 2 x 2 whole cells")
    lat, lon = regular(raw.lat, raw.lon)
    if lat.ndim == 1 or choice.directions == "east":
        source.facts["components"] = "eastward and northward"
        return dataclasses.replace(raw, lat=lat, lon=lon)
    return _turned(raw, *_angle(raw, cells, grid, dataset, source), source)


def _static(name: str, *datasets: xr.Dataset) -> np.ndarray | None:
    """A variable of the grid (y, x), without singleton axes; the first data set that has it counts."""
    dataset = next((d for d in datasets if name in d.variables), None)
    if dataset is None or dataset[name].dtype.kind not in "fiub":
        return None
    found = dataset[name]
    found = found.squeeze([d for d in found.dims if found.sizes[d] == 1 and found.ndim > 2])
    return found.transpose(*rows_first(found.dims, dataset)).values.astype(float)


def _shape(component: Component) -> str:
    return "(" + ", ".join(f"{d}={n}" for d, n in zip(component.dims, component.values.shape[1:], strict=True)) + ")"


def _same_points(u: Component, v: Component) -> bool:
    """Whether the positions are equal to a hundredth of a cell, or unknown."""
    if u.lat is None or v.lat is None:
        return True
    if u.lat.shape != v.lat.shape or u.lon.shape != v.lon.shape:
        return False
    step = max(float(np.nanmax(u.lat) - np.nanmin(u.lat)) / max(len(u.lat) - 1, 1), 1e-9)
    apart = np.abs((u.lon - v.lon + 180) % 360 - 180)
    return bool(np.nanmax(np.abs(u.lat - v.lat), initial=0) < 0.01 * step and np.nanmax(apart, initial=0) < 0.01 * step)


def _collocated(
    u: Component, v: Component, grid: xr.Dataset, dataset: xr.Dataset, choice: Choice, source: Source
) -> Raw:
    raw = Raw(u.values, v.values, u.lat, u.lon, u.time, u.ocean)
    source.facts["components"] = "eastward and northward"
    along = "grid_eastward" in u.standard_name
    eastward = not along and ("eastward" in u.standard_name or "eastward" in u.name.lower())
    if eastward and choice.directions != "grid":
        return raw
    lat, lon = regular(raw.lat, raw.lon)
    if lat.ndim == 1 or choice.directions == "east":
        return dataclasses.replace(raw, lat=lat, lon=lon)
    if choice.directions is None and not re.search("x_velocity|x_sea_water|grid_eastward", u.standard_name):
        raise source.error(
            f"{u.name} and {v.name} lie on a curvilinear grid and may run along it or to the east and north; say which "
            "by directions, 'grid' or 'east'"
        )
    if _static("angle", grid, dataset) is None:
        if [str(d).lower() for d in u.dims] in (["i", "j"], ["ni", "nj"]):
            raise source.error(
                f"{u.name} {_shape(u)} may run along {u.dims[0]}, as in most models, or along the second of two "
                f"dimensions; transpose to ({u.dims[1]}, {u.dims[0]}) or rename them to (y, x)"
            )
        raw = _along_growing_axes(raw, u.dims, dataset)
    return _turned(raw, *_angle(raw, (slice(None), slice(None)), grid, dataset, source), source)


def _along_growing_axes(raw: Raw, dims: tuple, dataset: xr.Dataset) -> Raw:
    """Turned so that projected coordinates grow with the index: components run along them, not along the index."""
    back = [slice(None, None, -1) if d in dataset.variables and _falls(dataset[d]) else slice(None) for d in dims]
    ocean = None if raw.ocean is None else raw.ocean[tuple(back)]
    parts = [x[(slice(None), *back)] for x in (raw.u, raw.v)]
    return Raw(*parts, raw.lat[tuple(back)], raw.lon[tuple(back)], raw.time, ocean)


def _falls(axis: xr.DataArray) -> bool:
    return axis.ndim == 1 and axis.dtype.kind in "fiu" and axis.size > 1 and bool((np.diff(axis.values) < 0).all())


def _angle(
    raw: Raw, cells: tuple[slice, slice] | None, grid: xr.Dataset, dataset: xr.Dataset, source: Source
) -> tuple[np.ndarray, int]:
    """Angle from east to x in radians and handedness, by the variable `angle` or else by the positions."""
    by_place, hand = staggered.grid_angle(raw.lat, raw.lon)
    angle = None if cells is None else _static("angle", grid, dataset)
    if angle is None:
        source.facts["components"] = "along the grid, turned by the directions of its rows"
        return by_place, hand
    content = next(d for d in (grid, dataset) if "angle" in d.variables)
    if "deg" in attribute(content["angle"], "units").lower():
        angle = np.radians(angle)
    if angle.ndim == 2:
        angle = angle[cells]
    if angle.shape != by_place.shape:
        raise source.error(f"angle is {angle.shape} on the cells that u and v share, which are {by_place.shape}")
    apart = float(np.median(np.abs(np.angle(np.exp(1j * (angle - by_place))))))
    if apart > 0.1:
        source.notice(
            f"angle differs from the direction of the rows by {np.degrees(apart):.0f} degrees; it is taken as given"
        )
    source.facts["components"] = "along the grid, turned by its variable angle"
    # By the definition of angle y is to the left of x, in whatever order the file has its rows and columns.
    return angle, 1


def _turned(raw: Raw, angle: np.ndarray, hand: int, source: Source) -> Raw:
    halves = int((np.isnan(raw.u) ^ np.isnan(raw.v)).sum())
    if halves:
        source.notice(f"{halves} values have one component only; they count as missing")
    u, v = staggered.turn(raw.u, raw.v, angle, hand)
    source.notice(f"u and v run along the grid and are turned to the east and north, by {_degrees(angle)}")
    return dataclasses.replace(raw, u=u, v=v)


def _degrees(angle: np.ndarray) -> str:
    low, high = np.degrees(np.unwrap(np.sort(angle.ravel())))[[0, -1]]
    return f"{low:.3g} to {high:.3g} degrees"


def _from_rho(
    u: Component, v: Component, rho: list[np.ndarray], grid: xr.Dataset, dataset: xr.Dataset, source: Source
) -> tuple[Raw, tuple[slice, slice]]:
    """Cell centres of ROMS and CROCO, with their masks; and which rows and columns of the grid they are."""
    shape, (y_u, x_u), (y_v, x_v) = rho[0].shape, u.values.shape[1:], v.values.shape[1:]
    if rho[1].shape != shape or (y_u, x_v) != shape or y_v - shape[0] not in (0, -1) or x_u - shape[1] not in (0, -1):
        raise source.error(f"{u.name} {_shape(u)}, {v.name} {_shape(v)} and lat_rho {shape} do not fit together")
    masks = {n: _static(n, grid, dataset) for n in ("mask_rho", "mask_u", "mask_v")}
    wet = {n: None if m is None else m > 0.5 for n, m in masks.items()}
    for name, expected in (("mask_rho", shape), ("mask_u", (y_u, x_u)), ("mask_v", (y_v, x_v))):
        if wet[name] is not None and wet[name].shape != expected:
            raise source.error(f"{name} is {wet[name].shape} but its points are {expected}")
    wet_u, wet_v = wet["mask_u"], wet["mask_v"]
    if wet["mask_rho"] is not None:
        along_x, along_y = staggered.faces(wet["mask_rho"])
        if wet_u is None or wet_v is None:
            wet_u, wet_v = along_x, along_y
            u, v = (_cut(c, wet) for c, wet in ((u, wet_u), (v, wet_v)))
        rows, columns = along_y.shape[0], along_x.shape[1]
        if min(np.mean(wet_u[:, :columns] == along_x), np.mean(wet_v[:rows] == along_y)) < 0.9:
            raise source.error("mask_u and mask_v do not lie between the points of mask_rho; is one of another subset?")
    wet_u, wet_v, known = _wet(u, v, wet_u, wet_v, source)
    cells = staggered.cells(u.values.shape, v.values.shape)
    ocean = staggered.water_beside(wet_u, wet_v) if known else None
    if ocean is not None and wet["mask_rho"] is not None:
        ocean &= wet["mask_rho"][cells]
    centres = staggered.to_centres(u.values, v.values, wet_u, wet_v)
    return Raw(*centres, rho[0][cells], rho[1][cells], u.time, ocean), cells


def _cut(component: Component, like: np.ndarray) -> Component:
    return dataclasses.replace(component, values=component.values[:, : like.shape[0], : like.shape[1]])


def _wet(
    u: Component, v: Component, wet_u: np.ndarray | None, wet_v: np.ndarray | None, source: Source
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Wet faces, by mask and by what is not missing in every frame; and whether either told."""
    masked = wet_u is not None or wet_v is not None
    source.facts["grid"] = "C-grid, averaged to cell centres" + " with its masks" * masked
    wet_u, wet_v = (~np.isnan(c.values).all(0) & (True if w is None else w) for c, w in ((u, wet_u), (v, wet_v)))
    if source.wet is not None:
        wet_u, wet_v = source.wet
    source.wet = wet_u, wet_v
    known = masked or not (wet_u.all() and wet_v.all())
    if not known:
        source.notice("no mask and no gaps; cells at rest in every frame count as land")
    return wet_u, wet_v, known


def _from_faces(u: Component, v: Component, source: Source) -> Raw:
    """Cell centres of grids that give the positions of u and v only, such as NEMO."""
    if u.lat is None or v.lat is None:
        raise source.error(
            f"{u.name} lies on {_shape(u)} and {v.name} on {_shape(v)}, a staggered grid without the positions of its "
            "cells; give the file with lat_rho and lon_rho by grid"
        )
    places = []
    for c in (u, v):
        lat, lon = (c.lat, c.lon) if c.lat.ndim == 2 else np.meshgrid(c.lat, c.lon, indexing="ij")
        places.append(np.stack([lat, lon]))
    along_x, along_y = staggered.offset(*places)
    forward = np.allclose((along_x, along_y), (0.5, -0.5), atol=0.2)
    backward = np.allclose((along_x, along_y), (-0.5, 0.5), atol=0.2) and u.values.shape == v.values.shape
    if not (forward or backward):
        raise source.error(
            f"{u.name} lies on {_shape(u)} and {v.name} on {_shape(v)}, {along_x:.2f} and {along_y:.2f} cells apart "
            "along x and y, where a C-grid has halves; interpolate them to common points first"
        )
    way = slice(None) if forward else slice(None, None, -1)
    values = [c.values[:, way, way] for c in (u, v)]
    lat, lon = (place[way, way] for place in places[0])
    flipped = [dataclasses.replace(c, values=x) for c, x in zip((u, v), values, strict=True)]
    wet_u, wet_v, known = _wet(*flipped, None, None, source)
    centres = [x[:, way, way] for x in staggered.to_centres(*values, wet_u, wet_v)]
    ocean = staggered.water_beside(wet_u, wet_v)[way, way] if known else None
    lat, lon = (staggered.face_positions_to_cells(place, values[1].shape)[way, way] for place in (lat, lon))
    return Raw(*centres, lat, lon, u.time, ocean)
