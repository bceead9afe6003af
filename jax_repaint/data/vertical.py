"""Levels: one by its depth or number, or a depth between levels that follow the bottom.

    z = hc s + (h - hc) C                   ocean_s_coordinate_g1
    z = h (hc s + h C) / (hc + h)           ocean_s_coordinate_g2

without the elevation of the surface. Source: CF conventions 1.11, appendix D; Shchepetkin and McWilliams, The regional
oceanic modeling system (2005), Ocean Modelling 9.
"""

import re

import numpy as np
import xarray as xr

from jax_repaint.data.source import Choice, Source, attribute, dims_of, rows_first

VERTICAL = re.compile(r"depth[tuvw]?|(olevel|lev|level)s?|z|z_?l|z_?t|s_rho|sigma|siglay|st_ocean|nz", re.IGNORECASE)
NEAR_SURFACE = 5.0  # m, below which an uppermost level still stands for what is above it
METRES = ("m", "meter", "metre", "meters", "metres")


def choose(dataset: xr.Dataset, x: xr.DataArray, choice: Choice, source: Source) -> dict:
    """The chosen place on the vertical axis, {dimension: index}; the surface where nothing is asked for.

    Raises:
      InputError: there is no such level, or the axis does not tell.
    """
    axes = [d for d in x.dims if _is_vertical(dataset, d)]
    if not axes:
        if choice.level is not None or choice.depth:
            raise source.error(f"{x.name} {dims_of(x)} has no vertical axis, so no depth or level can be chosen")
        return {}
    axis, count = axes[0], x.sizes[axes[0]]
    below, unit = _below(dataset[axis]) if axis in dataset.variables else (None, "")
    if choice.level is not None:
        index = choice.level
        if not 0 <= index < count:
            raise source.error(f"level {index} of {axis} does not exist; {x.name} has the levels 0 to {count - 1}")
    elif choice.depth:
        index = _nearest(x.name, axis, below, unit, choice.depth, source)
    elif count == 1:
        return {axis: 0}
    elif below is None:
        raise source.error(
            f"{x.name} has {count} levels along {axis} without depths, so which is the surface is not known; choose "
            f"one by level=0 to level={count - 1}"
        )
    else:
        index = int(np.argmin(below))
    what = f"level {index} of {axis}" + ("" if below is None else f" ({dataset[axis].values[index]:.4g}{unit})")
    source.facts["depth"] = f"{what} of {count}"
    if count > 1 and choice.level is None and choice.depth is None:
        source.notice(f"the uppermost {what} of {count} is read; depth or level chooses another")
    return {axis: index}


def _is_vertical(dataset: xr.Dataset, dim: str) -> bool:
    if dim in dataset.variables:
        coordinate = dataset[dim]
        standard = attribute(coordinate, "standard_name")
        if attribute(coordinate, "axis").upper() == "Z" or attribute(coordinate, "positive"):
            return True
        if standard in ("depth", "height", "altitude") or standard.startswith("ocean_s"):
            return True
        if standard or attribute(coordinate, "axis"):
            return False
    return bool(VERTICAL.fullmatch(str(dim)))


UPWARD = ("ocean_s", "height", "altitude")


def _below(coordinate: xr.DataArray) -> tuple[np.ndarray | None, str]:
    """How far below the surface (n,), and " m" where that is in metres; None where it is not known."""
    if coordinate.ndim != 1 or coordinate.dtype.kind not in "fiu" or not np.isfinite(coordinate.values).all():
        return None, ""
    values = coordinate.values.astype(float)
    positive = attribute(coordinate, "positive").lower()
    if positive not in ("up", "down") and attribute(coordinate, "standard_name").startswith(UPWARD):
        positive = "up"
    if positive == "down" and values.max() <= 0:
        positive = "up"  # xmitgcm calls heights below zero positive down
    below = {"up": -values, "down": values}.get(positive, np.abs(values))
    return below, " m" if attribute(coordinate, "units").lower() in METRES else ""


def _nearest(name: str, axis: str, below: np.ndarray | None, unit: str, depth: float, source: Source) -> int:
    if below is None or not unit:
        raise source.error(f"the levels of {name} along {axis} are not in metres, so choose by level=, not by depth=")
    order = np.sort(below)
    above, below_last = ((order[1] - order[0]) / 2, (order[-1] - order[-2]) / 2) if order.size > 1 else (0, 0.5)
    if not max(order[0] - max(above, NEAR_SURFACE), 0) <= depth <= order[-1] + below_last:
        levels = f"{order[0]:g} to {order[-1]:g} m" if order.size > 1 else f"{order[0]:g} m only"
        raise source.error(f"a depth of {depth:g} m is outside {name}, which has {levels}")
    return int(np.abs(below - depth).argmin())


def bottom_following(dataset: xr.Dataset, x: xr.DataArray) -> str:
    """The axis of `x` whose levels follow the bottom and say how; empty where there is none."""
    for axis in x.dims:
        known = attribute(dataset[axis], "standard_name") if axis in dataset.variables else ""
        if known in ("ocean_s_coordinate_g1", "ocean_s_coordinate_g2") and attribute(dataset[axis], "formula_terms"):
            return str(axis)
    return ""


def at_depth(
    dataset: xr.Dataset, grid: xr.Dataset, x: xr.DataArray, axis: str, along: int, depth: float, source: Source
) -> xr.DataArray:
    """Linear between levels that follow the bottom; NaN below the bottom and where no level is near the surface.

    Args:
      dataset, grid: where the terms of the formula are; the grid's outrank the data's.
      x: velocities on cells, or on faces where their grid has another shape or other dimensions.
      axis: the vertical one of `x`.
      along: horizontal axis that the faces lie between cells of, 1 for u and 0 for v.
      depth: metres below the surface at rest.

    Raises:
      InputError: a term is missing or does not fit; above the surface or below the bottom everywhere.
    """
    terms = dict(re.findall(r"(\w+):\s*(\S+)", attribute(dataset[axis], "formula_terms")))
    found = {}
    for term in ("C", "depth", "depth_c"):
        content = next((d for d in (grid, dataset) if terms.get(term) in d.variables), None)
        if content is None:
            raise source.error(
                f"the depths of the levels of {x.name} need {terms.get(term, term)}, which is missing; choose by level="
            )
        found[term] = content[terms[term]].squeeze()
        found[term] = found[term].transpose(*rows_first(found[term].dims, content))
    deepest = float(np.nanmax(found["depth"].values, initial=0))
    if not 0 <= depth <= deepest:
        raise source.error(f"a depth of {depth:g} m is outside {x.name}, whose bottom lies down to {deepest:g} m")
    s, stretched = (np.asarray(c, float)[:, None, None] for c in (dataset[axis], found["C"]))
    height, critical = np.asarray(found["depth"], float), float(found["depth_c"])
    y, width = rows_first(tuple(d for d in x.dims if d != axis)[-2:], dataset)
    if {y, width} != set(found["depth"].dims):
        height = _between(height, along, x.sizes[y], x.sizes[width])
    if height.shape != (x.sizes[y], x.sizes[width]) or s.shape != stretched.shape:
        raise source.error(f"{terms['depth']} {height.shape} does not fit {x.name}; choose by level=")
    if attribute(dataset[axis], "standard_name").endswith("g1"):
        below = -(critical * s + (height - critical) * stretched)
    else:
        below = -height * (critical * s + height * stretched) / (critical + height)
    downwards = np.argsort(-s.ravel())
    below = below[downwards]
    values = x.transpose(..., axis, y, width).values[..., downwards, :, :]
    count = (below <= depth).sum(0)
    upper, lower = np.clip(count - 1, 0, len(s) - 1), np.clip(count, 0, len(s) - 1)
    top, bottom = (np.take_along_axis(below, k[None], 0)[0] for k in (upper, lower))
    share = np.where(bottom > top, np.clip((depth - top) / np.where(bottom > top, bottom - top, 1), 0, 1), 0)
    index = [np.broadcast_to(k, (*values.shape[:-3], 1, *k.shape)) for k in (upper, lower)]
    above, under = (np.take_along_axis(values, k, -3)[..., 0, :, :] for k in index)
    near_surface = -s.max() <= 1.5 * np.median(np.abs(np.diff(s, axis=0))) if len(s) > 1 else False
    known = (depth <= height) & ((count > 0) | near_surface)
    source.facts["depth"] = f"{depth:g} m, between levels of {axis}"
    out = np.where(known, (1 - share) * above + share * under, np.nan)
    return x.isel({axis: 0}).transpose(..., y, width).copy(data=out)


def _between(height: np.ndarray, along: int, rows: int, columns: int) -> np.ndarray:
    """Depths of the bottom at faces: the mean of both cells, or of the last cell where the next is not in the file."""
    behind = np.concatenate([height, np.take(height, [-1], along)], along)
    front = np.take(behind, np.arange(1, behind.shape[along]), along)
    return ((height + front) / 2)[:rows, :columns]
