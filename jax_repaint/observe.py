"""What is known of a field: observed positions, their values and their noise; and patterns to draw them from.

An observation is y = A x + e with e ~ N(0, diag(sigma^2)). Each of the m positions sees both components through
up to four grid cells with bilinear weights; an observed cell is a position with a single weight 1. Rows are padded
to a bucket so that another pattern of similar size does not compile again; padded rows have `valid` False.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from scipy import ndimage

from jax_repaint import locate
from jax_repaint.array_types import Array, Bool, Cells, Field, Float, Int, Values
from jax_repaint.data.fields import unmasked
from jax_repaint.errors import InputError

CORNERS = 4
SHOWN = 5  # points that a sentence names
BUCKETS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)


@struct.dataclass
class Observation:
    """Observed positions of one field, in the units of the field (standardised for samplers, m/s for files).

    Attributes:
      cells: flat cell index y * X + x of each position's corners.
      weights: weight of each corner; they sum to 1 on valid rows (but for `merged`) and are 0 on padded rows.
      values: observed (u, v).
      sigma: standard deviation of the observation error of (u, v), > 0.
      valid: False on rows that only pad.
      share: how much of each corner the positions see, of which rows are combinations (`merged`); None: `weights`.
    """

    cells: Int[Array, "m 4"]
    weights: Float[Array, "m 4"]
    values: Values
    sigma: Values
    valid: Bool[Array, " m"]
    share: Float[Array, "m 4"] | None = None

    @property
    def size(self) -> int:
        """Number of rows, padding included."""
        return self.cells.shape[-2]

    def apply(self, field: Field) -> Values:
        """A x: the field seen at the observed positions; 0 on padded rows."""
        corners = field.reshape(-1, field.shape[-1])[self.cells]
        return jnp.einsum("mk,mkc->mc", self.weights, corners, precision=jax.lax.Precision.HIGHEST)

    def adjoint(self, values: Values, shape: tuple[int, int]) -> Field:
        """A^T v on a grid of `shape` (y, x)."""
        spread = self.weights[..., None] * values[:, None, :]
        flat = jnp.zeros((shape[0] * shape[1], values.shape[-1]), values.dtype)
        return flat.at[self.cells.reshape(-1)].add(spread.reshape(-1, values.shape[-1])).reshape(*shape, -1)

    def heaviest(self) -> Int[Array, " m"]:
        """The flat index of the cell that each position is nearest to."""
        return jnp.take_along_axis(self.cells, jnp.argmax(self.weights, -1)[:, None], -1)[:, 0]

    def on_grid(self, shape: tuple[int, int]) -> tuple[Cells, Field]:
        """Observed cells and their values: every position counts for its heaviest cell, several are averaged."""
        heaviest = self.heaviest()
        one = self.valid.astype(self.values.dtype)
        count = jnp.zeros(shape[0] * shape[1], self.values.dtype).at[heaviest].add(one)
        total = jnp.zeros((shape[0] * shape[1], self.values.shape[-1]), self.values.dtype)
        total = total.at[heaviest].add(one[:, None] * self.values)
        mean = total / jnp.maximum(count, 1)[:, None]
        return (count > 0).reshape(shape), mean.reshape(*shape, -1)

    def of(self, field: Field) -> "Observation":
        """The same positions with the noise-free values of `field`."""
        return self.replace(values=self.apply(field))

    def within(self, present: Cells) -> "Observation":
        """The same positions; those that see a cell where `present` (y, x) is False only pad."""
        return self.rows((present.reshape(-1)[self.cells] | (self.weights == 0)).all(-1))

    def rows(self, kept: Bool[Array, " m"]) -> "Observation":
        """The rows where `kept`; the others only pad."""
        used = kept & self.valid
        return self.replace(
            weights=jnp.where(used[:, None], self.weights, 0.0),
            values=jnp.where(used[:, None], self.values, 0.0),
            sigma=jnp.where(used[:, None], self.sigma, 1.0),
            valid=used,
            share=None if self.share is None else jnp.where(used[:, None], self.share, 0.0),
        )


def merged(observation: Observation) -> Observation:
    """The same information of the field in at most four rows for each square of cells.

        y_i = w_i x + rho_i s e_i  of the rows i in a square,   W / rho = Q T   =>   Q^T y / rho = T x + s e

    The rows of T, (4, 4) or smaller, have the corners of the square, and what is left of y / rho says nothing of x: the
    posterior of x is the same, exactly. So a track costs no more than the squares that it crosses. A square with no
    more rows than corners keeps them, as does one whose errors of u and v are not in one ratio; errors of different
    rows are independent, those of u and v may be correlated alike in all.

    The rows of the result are no positions: their weights have length 1, their values and errors any size. Only methods
    that use A, y and R as S^-1 does may take them; not those that paste values, or measure |y - A x| without R.
    Preconditioned by S^-1, conjugate gradients are the same for all rows L A, L y, L R L^T with an invertible L; and
    without the rows that say nothing of x no step is drawn towards the length of S^-1.
    """
    cells, weights, values, sigma, valid = (
        np.asarray(leaf)
        for leaf in (observation.cells, observation.weights, observation.values, observation.sigma, observation.valid)
    )
    used = np.flatnonzero(valid)
    _, square, count = np.unique(cells[used], axis=0, return_inverse=True, return_counts=True)
    square = square.reshape(-1)
    kept, parts = np.isin(square, np.flatnonzero(count <= CORNERS)), []
    for number in np.flatnonzero(count > CORNERS):
        rows = used[square == number]
        rho = sigma[rows].astype(np.float64) / sigma[rows[0]]
        if np.ptp(rho / rho[:, :1]) > 1e-4:
            kept |= square == number
            continue
        q, t = np.linalg.qr(weights[rows] / rho[:, :1])
        # Of a row with a millionth of the length of another the square is told a millionth of a millionth.
        length = np.linalg.norm(t, axis=1)
        long = length > 1e-6 * length.max()
        share = np.zeros((long.sum(), CORNERS))
        share[0] = weights[rows].sum(0)
        length = length[long, None]
        y = (q.T @ (values[rows] / rho[:, :1]))[long]
        parts.append((np.tile(cells[rows[0]], (len(length), 1)), t[long] / length, y / length,
                      sigma[rows[0]] / length, share))  # fmt: skip
    own = used[kept]
    parts.insert(0, (cells[own], weights[own], values[own], sigma[own], weights[own]))
    joined = [np.concatenate(columns) for columns in zip(*parts, strict=True)]
    made = from_weights(*joined[:4])
    pad = made.size - len(joined[4])
    return made.replace(share=jnp.asarray(np.pad(joined[4], ((0, pad), (0, 0))), jnp.float32))


class Places(NamedTuple):
    """Where points lie on a grid.

    Attributes:
      row, column: (m,) in units of cells.
      outside: (m,) bool, more than half a cell outside.
      on_land: (m,) bool, inside, and the nearest cell is land.
      distance: (m,) km from the nearest cell of a curvilinear grid, or None.
    """

    row: np.ndarray
    column: np.ndarray
    outside: np.ndarray
    on_land: np.ndarray
    distance: np.ndarray | None


def bucket(count: int) -> int:
    """Smallest bucket that holds `count` rows."""
    for size in BUCKETS:
        if count <= size:
            return size
    return -(-count // BUCKETS[-1]) * BUCKETS[-1]


def from_cells(
    observed: np.ndarray, field: np.ndarray, sigma: float | np.ndarray, ocean: np.ndarray, size: int | None = None
) -> Observation:
    """An observation of whole cells.

    Args:
      observed: (y, x) bool, True where the cell is observed.
      field: (y, x, 2) velocities; only observed cells are read.
      sigma: observation error, in the units of `field`; one number or (m, 2), one of each observed cell.
      ocean: (y, x) bool.
      size: number of rows to pad to; by default the next bucket.

    Raises:
      InputError: nothing is observed, an observed cell is on land or not finite, sigma <= 0, shapes differ.
    """
    observed, ocean, field = np.asarray(observed, bool), np.asarray(ocean, bool), unmasked(field)
    if observed.shape != ocean.shape or field.shape != (*ocean.shape, 2):
        raise InputError(
            f"observed {observed.shape}, field {field.shape} and ocean {ocean.shape} are of different grids; "
            "expected (y, x), (y, x, 2) and (y, x)"
        )
    flat = np.flatnonzero(observed)
    if flat.size and not ocean.reshape(-1)[flat].all():
        y, x = np.unravel_index(flat[~ocean.reshape(-1)[flat]][0], ocean.shape)
        raise InputError(f"cell (y={y}, x={x}) is observed but lies on land")
    return from_weights(flat[:, None], np.ones((flat.size, 1)), field.reshape(-1, 2)[flat], sigma, size)


def from_weights(
    cells: np.ndarray,
    weights: np.ndarray,
    values: np.ndarray,
    sigma: float | np.ndarray,
    size: int | None = None,
) -> Observation:
    """An observation of m positions from flat cell indices and weights (m, k <= 4) and values (m, 2), padded.

    Raises:
      InputError: there is no position, a value or an error is not finite, or shapes do not fit.
    """
    count = len(cells)
    if count == 0:
        raise InputError("no observation: at least one observed position is needed")
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values).all(-1))[0])
        raise InputError(f"observation {row} is not finite (u, v = {values[row][0]}, {values[row][1]})")
    sigma = unmasked(sigma)
    if sigma.shape not in ((), (2,), values.shape):
        raise InputError(
            f"observation error sigma must be one number or {values.shape}, one a component, got {sigma.shape}"
        )
    sigma = np.broadcast_to(sigma, values.shape)
    if not (np.isfinite(sigma).all() and (sigma > 0).all()):
        raise InputError(f"observation error sigma must be positive and finite, got {sigma.min()}")
    size = bucket(count) if size is None else size
    if size < count:
        raise InputError(f"{count} observations do not fit into {size} rows")
    pad = size - count
    return Observation(
        cells=jnp.asarray(np.pad(cells, ((0, pad), (0, CORNERS - cells.shape[1]))), jnp.int32),
        weights=jnp.asarray(np.pad(weights, ((0, pad), (0, CORNERS - weights.shape[1]))), jnp.float32),
        values=jnp.asarray(np.pad(values, ((0, pad), (0, 0))), jnp.float32),
        sigma=jnp.asarray(np.pad(sigma, ((0, pad), (0, 0)), constant_values=1.0), jnp.float32),
        valid=jnp.arange(size) < count,
    )


def from_points(
    lat: np.ndarray,
    lon: np.ndarray,
    velocity: np.ndarray,
    sigma: float | np.ndarray,
    grid_lat: np.ndarray,
    grid_lon: np.ndarray,
    ocean: np.ndarray,
    size: int | None = None,
) -> Observation:
    """An observation at points, through bilinear weights on the ocean corners of the cell that holds each.

    Args:
      lat, lon: (m,) degrees.
      velocity: (m, 2) u, v.
      sigma: scalar, (2,) or (m, 2).
      grid_lat, grid_lon: degrees, (y,) and (x,) increasing, or (y, x) each on a curvilinear grid.
      ocean: (y, x) bool.
      size: rows to pad to.

    Raises:
      InputError: a point lies outside the grid by more than half a cell, or on land, or is not finite.
    """
    lat, lon, velocity = np.atleast_1d(unmasked(lat)), np.atleast_1d(unmasked(lon)), unmasked(velocity)
    velocity = velocity[None] if velocity.ndim == 1 else velocity
    if velocity.ndim != 2 or velocity.shape[1] != 2:
        raise InputError(f"velocities must be (m, 2), u and v of each point, got {velocity.shape}")
    if not lat.shape == lon.shape == velocity.shape[:1]:
        raise InputError(f"{lat.size} latitudes, {lon.size} longitudes and {len(velocity)} velocities were given")
    finite = np.isfinite(lat) & np.isfinite(lon)
    if not finite.all():
        raise InputError(f"{_listed(~finite, lat, lon, 'has', 'have')} no finite position")
    places = place(lat, lon, grid_lat, grid_lon, ocean)
    if wrong := misplaced(places, lat, lon, grid_lat, grid_lon):
        raise InputError(wrong)
    (row, col), (y, x) = (places.row, places.column), ocean.shape
    y0, x0 = np.clip(np.floor(row), 0, y - 2).astype(int), np.clip(np.floor(col), 0, x - 2).astype(int)
    fy, fx = np.clip(row - y0, 0, 1), np.clip(col - x0, 0, 1)
    ys = np.stack([y0, y0, y0 + 1, y0 + 1], -1)
    xs = np.stack([x0, x0 + 1, x0, x0 + 1], -1)
    weights = np.stack([(1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx], -1) * ocean[ys, xs]
    weights /= weights.sum(-1, keepdims=True)
    return from_weights(ys * x + xs, weights, velocity, sigma, size)


def place(lat: np.ndarray, lon: np.ndarray, grid_lat: np.ndarray, grid_lon: np.ndarray, ocean: np.ndarray) -> Places:
    """Where points (m,) in degrees, all finite, lie on a grid; arguments as of `from_points`."""
    grid_lat, grid_lon, distance = np.asarray(grid_lat, float), np.asarray(grid_lon, float), None
    if grid_lat.ndim == 1:
        row, column = _fractional_index(lat, grid_lat), _fractional_index(lon, grid_lon)
    else:
        row, column, distance = locate.fractional_index(lat, lon, grid_lat, grid_lon)
    y, x = ocean.shape
    # Far outside a curvilinear grid both are NaN.
    outside = ~((np.abs(row - (y - 1) / 2) <= y / 2) & (np.abs(column - (x - 1) / 2) <= x / 2))
    nearest = (np.rint(np.clip(np.where(outside, 0, at), 0, n - 1)).astype(int) for at, n in ((row, y), (column, x)))
    return Places(row, column, outside, ~outside & ~ocean[tuple(nearest)], distance)


def misplaced(places: Places, lat: np.ndarray, lon: np.ndarray, grid_lat: np.ndarray, grid_lon: np.ndarray) -> str:
    """What is wrong with points (m,) outside of a grid and on land, all in one sentence; empty if nothing is."""
    outside, found = places.outside, []
    if outside.all() and len(outside) > 1:
        return (
            f"all {len(outside)} observations lie outside the domain, the model is of another place: they are at "
            f"{extent(lat, lon)}, the model at {extent(grid_lat, grid_lon)}"
        )
    if outside.any():
        domain = f" ({extent(grid_lat, grid_lon)})"
        if places.distance is not None:
            domain = (
                f", {'up to ' * int(outside.sum() > 1)}{places.distance[outside].max():.3g} km from its nearest cell"
            )
        found.append(f"{_listed(outside, lat, lon)} outside the domain{domain}")
    if places.on_land.any():
        found.append(f"{_listed(places.on_land, lat, lon)} on land")
    return "; ".join(found)


def extent(lat: np.ndarray, lon: np.ndarray) -> str:
    """Such as "lat 18.2900..18.3096, lon -64.7248..-64.6800"."""
    return ", ".join(f"{name} {np.min(at):.4f}..{np.max(at):.4f}" for name, at in (("lat", lat), ("lon", lon)))


def _listed(bad: np.ndarray, lat: np.ndarray, lon: np.ndarray, one: str = "lies", many: str = "lie") -> str:
    """Such as "observations 3 at lat 18.3000 lon -64.7000, 8 at ... and 4 more lie", counted from 0."""
    number = np.flatnonzero(bad)
    shown = ", ".join(f"{i} at lat {lat[i]:.4f} lon {lon[i]:.4f}" for i in number[:SHOWN])
    more = f" and {number.size - SHOWN} more" if number.size > SHOWN else ""
    return f"observation{'s' * (number.size > 1)} {shown}{more} {many if number.size > 1 else one}"


def _fractional_index(value: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """Position of `value` in units of cells along an increasing axis, extrapolated at both ends."""
    axis = np.asarray(axis, float)
    low = np.clip(np.searchsorted(axis, value) - 1, 0, len(axis) - 2)
    return low + (value - axis[low]) / (axis[low + 1] - axis[low])


def pad_grid(observation: Observation, shape: tuple[int, int], padded: tuple[int, int]) -> Observation:
    """The same observation on a grid padded to the north and east, where flat indices are different."""
    y, x = observation.cells // shape[1], observation.cells % shape[1]
    return observation.replace(cells=y * padded[1] + x)


def pattern_rng(seed: int, frame: int) -> np.random.Generator:
    """The generator of the observation pattern of one frame; independent of every other frame."""
    return np.random.default_rng([seed, frame, 0x0B5])


def line(ocean: np.ndarray, row: int) -> np.ndarray:
    """Every ocean cell of one row (0 is the southernmost): a ferry or a radial of a radar. (y, x) bool.

    Raises:
      InputError: the row is outside the grid or without ocean.
    """
    if not 0 <= row < ocean.shape[0]:
        raise InputError(f"row {row} is outside the grid, which has rows 0..{ocean.shape[0] - 1}")
    observed = np.zeros_like(ocean, bool)
    observed[row] = ocean[row]
    if not observed.any():
        raise InputError(f"row {row} has no ocean cell to observe")
    return observed


def walk(ocean: np.ndarray, count: int, rng: np.random.Generator, turn: float = 0.2) -> np.ndarray:
    """`count` distinct ocean cells along a vehicle's persistent random walk. (y, x) bool.

    At each step the heading is kept with probability 1 - turn; blocked headings are replaced by a random free one,
    new cells before old ones. Starts in the largest connected piece of ocean.

    Raises:
      InputError: no such walk fits.
    """
    if count < 1:
        raise InputError(f"a walk has at least one cell, got {count}")
    largest = largest_piece(ocean)
    if count > largest.sum():
        raise InputError(f"a walk of {count} cells does not fit: the largest piece of ocean has {largest.sum()}")
    y, x = rng.choice(np.argwhere(largest))
    headings = np.array([(-1, 0), (0, 1), (1, 0), (0, -1)])
    heading = rng.integers(4)
    observed = np.zeros_like(ocean, bool)
    observed[y, x] = True
    # A walk boxed in by its own track goes back over it, so the number of steps is not the number of cells.
    for _ in range(1000 * count):
        if observed.sum() == count:
            break
        if rng.random() < turn:
            heading = (heading + rng.choice([-1, 1])) % 4
        free = [h for h in range(4) if _inside(largest, y + headings[h][0], x + headings[h][1])]
        fresh = [h for h in free if not observed[y + headings[h][0], x + headings[h][1]]]
        if heading not in (fresh or free):
            heading = rng.choice(fresh or free)
        y, x = y + headings[heading][0], x + headings[heading][1]
        observed[y, x] = True
    else:
        raise InputError(f"no walk of {count} cells found on this ocean")
    return observed


def largest_piece(ocean: np.ndarray) -> np.ndarray:
    """The largest connected piece of ocean, (y, x) bool.

    Raises:
      InputError: there is no ocean.
    """
    pieces, number = ndimage.label(ocean)
    if number == 0:
        raise InputError("no ocean cell to walk on")
    return pieces == 1 + np.argmax(ndimage.sum(ocean, pieces, range(1, number + 1)))


def _inside(ocean: np.ndarray, y: int, x: int) -> bool:
    return 0 <= y < ocean.shape[0] and 0 <= x < ocean.shape[1] and bool(ocean[y, x])


def cells(ocean: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """A random fraction of the ocean cells, at least one: moorings or drifters. (y, x) bool.

    Raises:
      InputError: the fraction is not in (0, 1], or there is no ocean.
    """
    if not 0 < fraction <= 1:
        raise InputError(f"fraction of observed cells must be in (0, 1], got {fraction}")
    flat = np.flatnonzero(ocean)
    if not flat.size:
        raise InputError("no ocean cell to observe")
    chosen = rng.choice(flat, max(1, round(fraction * flat.size)), replace=False)
    observed = np.zeros(ocean.size, bool)
    observed[chosen] = True
    return observed.reshape(ocean.shape)


def swath(ocean: np.ndarray, width: int, rng: np.random.Generator) -> np.ndarray:
    """Ocean cells within width / 2 cells of a random straight line over an ocean cell: an altimeter or an aircraft.

    Raises:
      InputError: the width is not positive, or there is no ocean.
    """
    if width < 1:
        raise InputError(f"width of a swath is at least one cell, got {width}")
    if not ocean.any():
        raise InputError("no ocean cell to observe")
    y, x = np.indices(ocean.shape)
    centre, angle = rng.choice(np.argwhere(ocean)), rng.uniform(0, np.pi)
    distance = np.abs((y - centre[0]) * np.cos(angle) - (x - centre[1]) * np.sin(angle))
    return ocean & (distance <= width / 2)


def gaps(ocean: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """All ocean cells but those under patches that hide a fraction of them: a radar with outages, or clouds.

    A cell is hidden where white noise, smoothed by a Gaussian of a twelfth of the shorter side of the grid, is highest.
    (y, x) bool.

    Raises:
      InputError: the fraction is not in (0, 1), or nothing is left to observe or to fill.
    """
    if not 0 < fraction < 1:
        raise InputError(f"fraction of hidden cells must be in (0, 1), got {fraction}")
    flat = np.flatnonzero(ocean)
    hidden = round(fraction * flat.size)
    if not 0 < hidden < flat.size:
        raise InputError(f"gaps of {fraction:g} of {flat.size} ocean cells leave nothing to observe or to fill")
    rough = rng.standard_normal(ocean.shape)
    smooth = ndimage.gaussian_filter(rough, min(ocean.shape) / 12).reshape(-1)[flat]
    observed = np.zeros(ocean.size, bool)
    observed[flat[np.argsort(smooth)[: flat.size - hidden]]] = True
    return observed.reshape(ocean.shape)


def parse(spec: str, ocean: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The observed cells that a text names: `line:22`, `walk:90`, `cells:0.02`, `swath:3`, `gaps:0.3`. (y, x) bool.

    Raises:
      InputError: the text is no pattern, or what it names does not fit the ocean.
    """
    kind, value = read_pattern(spec)
    try:
        if kind == "line":
            return line(ocean, value)
        return {"walk": walk, "cells": cells, "swath": swath, "gaps": gaps}[kind](ocean, value, rng)
    except InputError as e:
        raise InputError(f"pattern {spec}: {e}") from e


def read_pattern(spec: str) -> tuple[str, int | float]:
    """Kind and number of a pattern, which `parse` draws on a grid.

    Raises:
      InputError: another kind, or no number.
    """
    kind, _, value = spec.partition(":")
    try:
        return kind, {"line": int, "walk": int, "cells": float, "swath": int, "gaps": float}[kind](value)
    except (KeyError, ValueError):
        raise InputError(
            f"pattern {spec!r} is not one of line:ROW, walk:CELLS, cells:FRACTION, swath:WIDTH, gaps:FRACTION"
        ) from None


def pattern_table(ocean: np.ndarray, count: int, rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random patterns to train on: a sixth none at all, the others lines, walks and scattered cells in equal parts.

    Lines are rows or columns of the grid, or the part of one that fits; walks and scattered cells have a number of
    cells from 4 to `rows`, spread evenly in its logarithm.

    Returns:
      Flat cell indices (count, rows), of which the first n count, and n (count,); int32.

    Raises:
      InputError: fewer than four rows, or ocean too small for them.
    """
    if rows < 4 or ocean.sum() < 4:
        raise InputError(f"patterns of 4 cells and more need 4 rows and 4 ocean cells, got {rows} and {ocean.sum()}")
    piece = int(largest_piece(ocean).sum())
    rows = min(rows, int(ocean.sum()))
    table, counts = np.zeros((count, rows), np.int32), np.zeros(count, np.int32)
    index = np.arange(ocean.size).reshape(ocean.shape)
    lines = [
        line[wet] for grid, water in ((index, ocean), (index.T, ocean.T)) for line, wet in zip(grid, water, strict=True)
    ]
    lines = [line for line in lines if line.size >= 4]
    for number in range(count):
        rng = np.random.default_rng([seed, number, 0x7AB])
        kind = rng.choice(["none", "line", "walk", "cells"], p=[1 / 6, 5 / 18, 5 / 18, 5 / 18])
        size = int(np.exp(rng.uniform(np.log(4), np.log(rows + 1))))
        if kind == "none":
            continue
        if kind == "line" and lines:
            chosen = lines[rng.integers(len(lines))]
            start = rng.integers(max(chosen.size - rows, 0) + 1)
            chosen = chosen[start : start + rows]
        elif kind == "walk":
            chosen = np.flatnonzero(walk(ocean, min(size, piece), rng))
        else:
            chosen = rng.choice(np.flatnonzero(ocean), size, replace=False)
        table[number, : chosen.size], counts[number] = chosen, chosen.size
    return table, counts


def from_table(cells: Int[Array, " m"], count: Int[Array, ""], field: Field, sigma: float) -> Observation:
    """One row of `pattern_table` as an observation of a standardised field (y, x, c), inside of jit."""
    valid = jnp.arange(len(cells)) < count
    values = jnp.where(valid[:, None], field.reshape(-1, field.shape[-1])[cells], 0.0)
    corners = jnp.zeros((len(cells), CORNERS), jnp.int32).at[:, 0].set(cells)
    weights = jnp.zeros((len(cells), CORNERS)).at[:, 0].set(valid.astype(jnp.float32))
    errors = jnp.where(valid[:, None], sigma, jnp.ones_like(values))
    return Observation(corners, weights, values, errors, valid)


def patterns_of(text: str) -> tuple[str, ...]:
    """The patterns of a setting such as "line:22, walk:90", in its order and each once; none of an empty text."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def usual(ocean: np.ndarray) -> tuple[str, ...]:
    """The three patterns that results are reported for: the middle row, a walk over 1/42 of the ocean, 2 % of cells.

    Where the middle row is all land, the nearest one with ocean.
    """
    middle = ocean.shape[0] // 2
    row = min(np.flatnonzero(ocean.any(1)), key=lambda y: abs(int(y) - middle))
    return f"line:{row}", f"walk:{max(round(ocean.sum() / 42), 2)}", "cells:0.02"
