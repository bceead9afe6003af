"""The Ram Head twin: currents of a tidal headland, simulated on its real coastline.

A reduced-gravity shallow-water model on a C grid of 50 m cells (Ram Head, St John, 18.29-18.31 N):

    u_t + (u.grad)u - f v = -g' eta_x + nu lap u - Cd |u| u / H + r (u_ext - u) + d(u_bg)/dt + stir u_eddy    (v alike)
    eta_t + div(H u)      = -eta_relax r eta
    u_bg   = sum_k a_k(t) U_k      through-flow modes, driven by tides, seasons and slow and fast weather
    u_eddy = sum_j e_j(t) E_j      random non-divergent eddies, new patterns in every window
    u_ext  = u_bg + u_eddy

The relaxation r acts in a sponge around the domain that is kept. West, south and east rims take the velocity of u_ext;
the north rim is a wall, behind a sponge in which what flows north leaves through the relaxation of the surface. Time
steps are those of Wicker and Skamarock, "Time-splitting methods for elastic models using forward time schemes" (2002):
three Runge-Kutta stages, inside each of which gravity waves take short forward-backward steps.

The series is simulated in windows of 240 h that start from rest 24 h earlier, when the memory of a start is gone. So a
window is a function of the parameters, the seed and its number alone: windows run side by side, are cached, and a long
series begins with every shorter one.

    python -m jax_repaint.data.twin --frames=17040 --out=twin.nc
    python -m jax_repaint.data.twin --frames=17040 --first=17040 --out=later.nc
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse.linalg
from absl import flags, logging
from scipy import ndimage, sparse

from jax_repaint import command, distributed
from jax_repaint.array_types import Array
from jax_repaint.data import readers
from jax_repaint.data.fields import Fields
from jax_repaint.errors import InputError
from jax_repaint.files import cache_folder, check_writable, whole_file

PAD = (10, 8, 10, 10)  # cells added in the south, north, west and east
GRID = (44 + PAD[0] + PAD[1], 94 + PAD[2] + PAD[3])  # of the simulation
WINDOW = 240  # hours kept of each window
SPIN_UP = 24  # hours before them
NAME = "Ram Head twin"
START = np.datetime64("2020-01-01T00", "ns")
MODEL = 1  # raise it when the model changes, so that no older cache is taken for the new one
GHOST = 2  # cells beyond a face that the advection looks at
ROW = GRID[1] + 2 * GHOST
INNER = GHOST * ROW + GHOST  # the first flat index that has neighbours on all sides
ISLAND_DEPTH = 0.02  # metres, where the stream function of a mode crosses an island
# Degrees an hour (Schureman, "Manual of Harmonic Analysis and Prediction of Tides", 1958, table 2).
TIDES = {"M2": 28.9841042, "S2": 30.0, "N2": 28.4397295, "K1": 15.0410686, "O1": 13.9430356}


@dataclasses.dataclass(frozen=True)
class Twin:
    """Parameters, in metres, seconds and m/s where nothing else is said; the defaults reproduce the place's statistics.

    Attributes:
      seed: of weather and eddies.
      f, cmax, friction (Cd), viscosity (nu): of the equations; g' = cmax^2 / max H.
      depth_coast, depth_shelf, depth_slope: H = coast + (shelf - coast + slope (1 - y))(1 - exp(-d / shoal)), d the
        distance to land and y from 0 in the south to 1 in the north.
      depth_bump, bump_length: relative roughness of the bottom, and its length in cells.
      dt, substeps: long step, and short ones in its last stage.
      divergence_damping: in units of dx^2 / short step.
      sponge, sponge_time: width in cells, relaxation time at its outer edge.
      eddies, eddy_speed, eddy_scales, eddy_hours: number, rms speed, smallest and largest scale, decorrelation time.
      stir: acceleration by eddies inside the domain, 1/s.
      eta_relax: relaxation of the surface in the sponge, relative to that of the velocity.
      mean, season: of the three modes (east-west, south-north, round the cape).
      tides: (name, amplitude and phase in degrees of each mode).
      slow, fast: standard deviations of weather that decorrelates in 60 h and in 5 h.
    """

    seed: int = 0
    dx: float = 50.0
    f: float = 4.57e-5
    cmax: float = 3.0
    depth_coast: float = 5.0
    depth_shelf: float = 24.0
    shoal: float = 350.0
    depth_slope: float = 10.0
    depth_bump: float = 0.3
    bump_length: float = 4.0
    geography_seed: int = 7
    friction: float = 0.0045
    viscosity: float = 0.6
    dt: float = 30.0
    substeps: int = 4
    divergence_damping: float = 0.1
    sponge: int = 8
    sponge_time: float = 200.0
    eddies: int = 96
    eddy_speed: float = 0.1
    eddy_scales: tuple[float, float] = (600.0, 1800.0)
    eddy_hours: float = 2.5
    stir: float = 7e-5
    eta_relax: float = 0.2
    mean: tuple[float, float, float] = (-0.09, -0.125, -0.035)
    tides: tuple[tuple[str, tuple[float, float, float], tuple[float, float, float]], ...] = (
        ("M2", (0.082, -0.0112, 0.044), (0, 60, 20)),
        ("S2", (0.0213, -0.0034, 0.0119), (30, 90, 50)),
        ("N2", (0.0189, -0.0028, 0.0119), (-20, 40, 0)),
        ("K1", (0.0246, -0.0045, 0.0176), (100, 10, 60)),
        ("O1", (0.0189, -0.0039, 0.0154), (80, 0, 40)),
    )
    slow: tuple[float, float, float] = (0.045, 0.014, 0.034)
    fast: tuple[float, float, float] = (0.025, 0.014, 0.022)
    season: tuple[float, float, float] = (0.02, 0.014, 0.0)

    def key(self) -> str:
        """Name of the cache of these parameters; 16 hex digits."""
        text = json.dumps([MODEL, WINDOW, SPIN_UP, dataclasses.asdict(self)], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class State(NamedTuple):
    """u and v on west and south faces, m/s, and eta in cells, m; flat arrays (see Sea)."""

    u: Array
    v: Array
    eta: Array


class Geometry(NamedTuple):
    """The padded grid (Y, X) = GRID; u faces are (Y, X + 1), v faces (Y + 1, X).

    Attributes:
      ocean: (Y, X) bool.
      depth: (Y, X) m.
      open_u, open_v: 1 on faces between two ocean cells and on the rim, 0 on the coast.
      rim_u, rim_v: 1 on the faces of the outer rim.
      depth_u, depth_v: m on faces.
      sponge, sponge_u, sponge_v: relaxation rate r, 1/s.
      modes_u, modes_v: (3, ...) through-flow modes U_k, about 1 m/s in open water.
    """

    ocean: np.ndarray
    depth: np.ndarray
    open_u: np.ndarray
    open_v: np.ndarray
    rim_u: np.ndarray
    rim_v: np.ndarray
    depth_u: np.ndarray
    depth_v: np.ndarray
    sponge: np.ndarray
    sponge_u: np.ndarray
    sponge_v: np.ndarray
    modes_u: np.ndarray
    modes_v: np.ndarray


def grid() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ocean (44, 94) bool, lat (44,), lon (94,) of the real place; row 0 in the south."""
    with np.load(readers.RAM_HEAD, allow_pickle=False) as file:
        return ~file["land"], file["lat"], file["lon"]


def _to_u(cells: np.ndarray) -> np.ndarray:
    grown = np.pad(cells, ((0, 0), (1, 1)), mode="edge")
    return (grown[:, 1:] + grown[:, :-1]) / 2


def _to_v(cells: np.ndarray) -> np.ndarray:
    return _to_u(cells.T).T


@functools.lru_cache(maxsize=4)
def geometry(twin: Twin) -> Geometry:
    """Coast, depth, sponge and through-flow modes of the padded grid."""
    south, north, west, east = PAD
    ocean, _, _ = grid()
    rows, columns = ocean.shape
    cape = int(np.flatnonzero(~ocean[-1]).max()) + 1
    ocean = np.pad(ocean, ((south, north), (west, east)), constant_values=True)
    # North of the domain lies the island itself, as far east as the cape.
    ocean[south + rows :, : west + cape] = False
    shape = ocean.shape

    y, x = np.mgrid[: shape[0], : shape[1]]
    distance = twin.dx * ndimage.distance_transform_edt(ocean)
    rough = ndimage.gaussian_filter(
        np.random.default_rng(twin.geography_seed).standard_normal(shape), twin.bump_length, mode="reflect"
    )
    rough = np.clip(rough / rough.std(), -2, 2)
    deep = twin.depth_shelf - twin.depth_coast + twin.depth_slope * (1 - y / (shape[0] - 1))
    depth = twin.depth_coast + deep * (1 - np.exp(-distance / twin.shoal))
    depth = np.maximum(depth * (1 + twin.depth_bump * rough), twin.depth_coast)

    outside = np.stack([south - y, y - (south + rows - 1), west - x, x - (west + columns - 1)]).max(0)
    sponge = np.clip(outside / twin.sponge, 0, 1) ** 2 / twin.sponge_time

    open_u = np.pad(ocean, ((0, 0), (1, 1)), mode="edge")
    open_u = open_u[:, 1:] & open_u[:, :-1]
    open_v = np.pad(ocean, ((1, 1), (0, 0)), mode="edge")
    open_v = open_v[1:] & open_v[:-1]
    rim_u, rim_v = np.zeros(open_u.shape), np.zeros(open_v.shape)
    rim_u[:, [0, -1]], rim_v[[0, -1]] = 1, 1
    modes_u, modes_v = _modes(ocean, depth, open_u, open_v)
    return Geometry(
        ocean, depth, open_u * 1.0, open_v * 1.0, rim_u, rim_v, _to_u(depth), _to_v(depth),
        sponge, _to_u(sponge), _to_v(sponge), modes_u, modes_v,
    )  # fmt: skip


def _modes(
    ocean: np.ndarray, depth: np.ndarray, open_u: np.ndarray, open_v: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Irrotational through-flows from stream functions of the transport on corners, div(grad(psi) / H) = 0.

    H u = -psi_y, H v = psi_x; psi is 0 on the mainland and given on the rim, where the normal velocity of a mode is
    uniform over the sides it enters and leaves by.
    """
    pieces, _ = ndimage.label(ocean == 0)
    mainland = pieces == pieces[-1, 0]
    shape = tuple(side + 1 for side in ocean.shape)
    fixed = ndimage.maximum_filter(np.pad(mainland, 1, mode="edge"), 2)[1:, 1:]
    rim = np.zeros(shape, bool)
    rim[[0, -1]], rim[:, [0, -1]] = True, True

    # 1 / H on the edges between corners: an edge between two corners in a column is a u face.
    shallow = np.where(ocean, depth, ISLAND_DEPTH)
    over_u, over_v = 1 / _to_u(shallow), 1 / _to_v(shallow)
    number = np.arange(rim.size).reshape(shape)
    first = np.concatenate([number[:-1].ravel(), number[:, :-1].ravel()])
    second = np.concatenate([number[1:].ravel(), number[:, 1:].ravel()])
    weight = np.concatenate([over_u.ravel(), over_v.ravel()])
    graph = sparse.coo_matrix((weight, (first, second)), (rim.size, rim.size))
    graph = (graph + graph.T).tocsr()
    laplacian = (sparse.diags(np.asarray(graph.sum(1)).ravel()) - graph).tocsr()
    known = (rim | fixed).ravel()
    solve = scipy.sparse.linalg.splu(laplacian[~known][:, ~known].tocsc()).solve

    def along(faces: np.ndarray) -> np.ndarray:
        """Share of the transport through a side of the rim, from its first corner to each of its corners."""
        total = np.concatenate([[0], np.cumsum(faces)])
        return total / total[-1]

    wall_w, wall_e = along(_to_u(depth)[:, 0] * open_u[:, 0]), along(_to_u(depth)[:, -1] * open_u[:, -1])
    wall_s, wall_n = along(_to_v(depth)[0] * open_v[0]), along(_to_v(depth)[-1] * open_v[-1])
    us, vs = [], []
    for enters, leaves in (("west", "east"), ("south", "north"), ("west", "north")):
        psi = np.zeros(shape)
        psi[:, 0] = 1 - wall_w if enters == "west" else 0
        psi[0] = psi[0, 0] + (wall_s if enters == "south" else 0)
        psi[:, -1] = psi[0, -1] * ((1 - wall_e) if leaves == "east" else 1)
        psi[-1] = psi[-1, -1] * (wall_n if leaves == "north" else 1)
        psi[fixed] = 0
        flat = psi.ravel()
        flat[~known] = solve(-(laplacian[~known][:, known] @ flat[known]))
        psi = flat.reshape(shape)
        u = -np.diff(psi, axis=0) / _to_u(depth) * open_u
        v = np.diff(psi, axis=1) / _to_v(depth) * open_v
        speed = np.hypot((u[:, 1:] + u[:, :-1]) / 2, (v[1:] + v[:-1]) / 2)
        scale = np.median(speed[ocean])
        us.append(u / scale)
        vs.append(v / scale)
    return np.stack(us), np.stack(vs)


def _red_noise(rng: np.random.Generator, count: int, hours: float, smooth: int) -> np.ndarray:
    """Ornstein-Uhlenbeck series of unit variance, one value an hour, averaged over `smooth` hours; (count,)."""
    memory = float(np.exp(-1 / hours))
    kick = rng.standard_normal(count + smooth - 1)
    kick[1:] *= np.sqrt(1 - memory**2)
    # lfilter gives the same bits, but to import scipy.signal takes 0.4 s, and this 2 ms for a year of hours.
    series = list(itertools.accumulate(kick.tolist(), lambda before, value: value + memory * before))
    return np.convolve(series, np.full(smooth, 1 / smooth), "valid")


def through_flow(twin: Twin, hours: int) -> np.ndarray:
    """a_k(t), m/s, (hours, 3), from SPIN_UP hours before the first frame; a longer series begins with a shorter one."""
    t = np.arange(-SPIN_UP, hours - SPIN_UP)[:, None]
    a = np.array(twin.mean) + np.array(twin.season) * np.cos(2 * np.pi * t / 8766)
    for name, amplitude, phase in twin.tides:
        a = a + np.array(amplitude) * np.cos(np.radians(TIDES[name] * t - np.array(phase)))
    for k in range(3):
        for part, (sd, memory, smooth) in enumerate(((twin.slow, 60, 4), (twin.fast, 5, 1))):
            rng = np.random.default_rng([twin.seed, k, part])
            a[:, k] += sd[k] * _red_noise(rng, hours, memory, smooth)
    return a


class Eddies(NamedTuple):
    """E_j on faces, flat (n, cells), and e_j(t), m/s, (hours, n)."""

    u: np.ndarray
    v: np.ndarray
    strength: np.ndarray


def eddies(twin: Twin, window: int, hours: int) -> Eddies:
    """Stream functions of Gaussian-filtered white noise, with the coast as a wall to them."""
    g = geometry(twin)
    rng = np.random.default_rng([twin.seed, window, 99])
    shape = tuple(side + 1 for side in g.ocean.shape)
    us, vs, strength = [], [], []
    for length in np.geomspace(*twin.eddy_scales, twin.eddies) / twin.dx:
        # Filtered on a grid with margins, or the patterns would be stronger at the rim.
        margin = int(3 * length)
        noise = rng.standard_normal([side + 2 * margin for side in shape])
        psi = ndimage.gaussian_filter(noise, length, mode="constant", truncate=3)
        psi = psi[margin : margin + shape[0], margin : margin + shape[1]]
        u, v = -np.diff(psi, axis=0), np.diff(psi, axis=1)
        scale = np.sqrt(np.mean(u**2) + np.mean(v**2))
        us.append(u / scale * g.open_u)
        vs.append(v / scale * g.open_v)
        # The whole window's, whatever is asked for: the next pattern must find the generator where it always is.
        strength.append(_red_noise(rng, SPIN_UP + WINDOW, twin.eddy_hours, 1)[:hours])
    strength = twin.eddy_speed / np.sqrt(twin.eddies) * np.stack(strength, -1)
    return Eddies(flatten(np.stack(us), "edge"), flatten(np.stack(vs), "edge"), np.float32(strength))


class Sea(NamedTuple):
    """The geometry as the solver sees it: flat arrays of one length, a ghost ring around the grid, u and v on the
    west and south face of each cell.

    The flat layout makes every neighbour a slice at a constant offset, which compiles to vector instructions; padded
    two-dimensional stencils run five times slower.

    Attributes:
      ocean: 1 in ocean cells.
      open: 1 on faces without a coast; of u and v.
      free: those of them that are not prescribed by u_ext.
      depth, sponge: on faces; sponge_cells in cells.
      gravity: g' = cmax^2 / max H.
    """

    ocean: Array
    open: tuple[Array, Array]
    free: tuple[Array, Array]
    depth: tuple[Array, Array]
    sponge: tuple[Array, Array]
    sponge_cells: Array
    gravity: Array


class Forcing(NamedTuple):
    """u_ext and accelerations, each of (u, v)."""

    external: tuple[Array, Array]
    push: tuple[Array, Array]


def flatten(field: np.ndarray, mode: str = "constant") -> np.ndarray:
    """(..., y, x) of cells or faces to (..., n) with the ghost ring, zero or continued from the edge."""
    width = [(0, 0)] * (field.ndim - 2)
    shape = GRID
    rest = [(GHOST, GHOST - (side - cells)) for side, cells in zip(field.shape[-2:], shape, strict=True)]
    return np.float32(np.pad(field, width + rest, mode=mode).reshape(*field.shape[:-2], -1))


def unflatten(flat: Array, faces: tuple[int, int] = (0, 0)) -> Array:
    """(n,) to (y, x) of cells; `faces` (0, 1) keeps the last u face, (1, 0) the last v face."""
    y, x = GRID
    whole = flat.reshape(y + 2 * GHOST, x + 2 * GHOST)
    return whole[GHOST : GHOST + y + faces[0], GHOST : GHOST + x + faces[1]]


def sea(twin: Twin) -> Sea:
    """The solver's view of `geometry`."""
    g = geometry(twin)
    open_ = flatten(g.open_u), flatten(g.open_v)
    rim = flatten(g.rim_u), flatten(g.rim_v)
    return Sea(
        ocean=flatten(g.ocean * 1.0),
        open=open_,
        free=tuple(o * (1 - r) for o, r in zip(open_, rim, strict=True)),
        depth=(flatten(g.depth_u, "edge"), flatten(g.depth_v, "edge")),
        sponge=(flatten(g.sponge_u), flatten(g.sponge_v)),
        sponge_cells=flatten(g.sponge),
        gravity=np.float32(twin.cmax**2 / g.depth.max()),
    )


def _at(q: Array, dy: int, dx: int) -> Array:
    """Neighbours of the inner part of a flat array."""
    offset = dy * ROW + dx
    return q[INNER + offset : q.shape[0] - INNER + offset]


def _advection(q: Array, speed: Array, dy: int, dx: int, length: float) -> Array:
    """c q_x, third-order upwind: fourth-order centred differences plus |c| dx^3 / 12 times the fourth derivative."""
    far_w, near_w, here, near_e, far_e = (_at(q, k * dy, k * dx) for k in (-2, -1, 0, 1, 2))
    centred = 8 * (near_e - near_w) - (far_e - far_w)
    smooth = far_e - 4 * near_e + 6 * here - 4 * near_w + far_w
    return (speed * centred + jnp.abs(speed) * smooth) / (12 * length)


def _slow(twin: Twin, sea: Sea, now: State, forcing: Forcing) -> tuple[Array, Array]:
    """Accelerations of u and v without gravity waves, on the inner part."""
    v_at_u = (_at(now.v, 0, 0) + _at(now.v, 0, -1) + _at(now.v, 1, 0) + _at(now.v, 1, -1)) / 4
    u_at_v = (_at(now.u, 0, 0) + _at(now.u, 0, 1) + _at(now.u, -1, 0) + _at(now.u, -1, 1)) / 4

    def one(k: int, q: Array, east: Array, north: Array, turned: Array) -> Array:
        inertia = _advection(q, east, 0, 1, twin.dx) + _advection(q, north, 1, 0, twin.dx)
        here = _at(q, 0, 0)
        around = _at(q, 0, 1) + _at(q, 0, -1) + _at(q, 1, 0) + _at(q, -1, 0) - 4 * here
        drag = twin.friction * jnp.sqrt(east**2 + north**2) / _at(sea.depth[k], 0, 0)
        relaxed = _at(sea.sponge[k], 0, 0) * (_at(forcing.external[k], 0, 0) - here)
        pushed = twin.f * turned + _at(forcing.push[k], 0, 0)
        return pushed + relaxed + twin.viscosity / twin.dx**2 * around - inertia - drag * here

    du = one(0, now.u, _at(now.u, 0, 0), v_at_u, v_at_u)
    dv = one(1, now.v, u_at_v, _at(now.v, 0, 0), -u_at_v)
    return du, dv


def gravity_waves(
    twin: Twin, sea: Sea, now: State, slow: tuple[Array, Array], forcing: Forcing, dt: Array, count: Array
) -> State:
    """`count` forward-backward steps of length dt under accelerations `slow` of the inner part."""
    damping = twin.divergence_damping * twin.dx**2 / dt
    free = tuple(_at(x, 0, 0) for x in sea.free)
    given = tuple((_at(o, 0, 0) - f) * _at(e, 0, 0) for o, f, e in zip(sea.open, free, forcing.external, strict=True))
    ocean, sponge = _at(sea.ocean, 0, 0), _at(sea.sponge_cells, 0, 0)

    def with_inner(q: Array, inner: Array) -> Array:
        # Joined, not updated in place: XLA on CPUs copies it by blocks, but updates element by element.
        return jnp.concatenate([q[:INNER], inner, q[-INNER:]])

    def step(_, s: State) -> State:
        def pressure(dy: int, dx: int) -> Array:
            spread = _at(s.u, dy, dx + 1) - _at(s.u, dy, dx) + _at(s.v, dy + 1, dx) - _at(s.v, dy, dx)
            return sea.gravity * _at(s.eta, dy, dx) - damping / twin.dx * _at(sea.ocean, dy, dx) * spread

        u = _at(s.u, 0, 0) + dt * (slow[0] - (pressure(0, 0) - pressure(0, -1)) / twin.dx)
        v = _at(s.v, 0, 0) + dt * (slow[1] - (pressure(0, 0) - pressure(-1, 0)) / twin.dx)
        u, v = with_inner(s.u, given[0] + free[0] * u), with_inner(s.v, given[1] + free[1] * v)
        east, north = sea.depth[0] * u, sea.depth[1] * v
        outflow = (_at(east, 0, 1) - _at(east, 0, 0) + _at(north, 1, 0) - _at(north, 0, 0)) / twin.dx
        eta = _at(s.eta, 0, 0)
        eta = eta - dt * ocean * (outflow + twin.eta_relax * sponge * eta)
        return State(u, v, with_inner(s.eta, eta))

    return jax.lax.fori_loop(0, count, step, now)


def step(twin: Twin, sea: Sea, now: State, forcing: Forcing) -> State:
    """One step of length dt."""
    half = max(twin.substeps // 2, 1)
    lengths = jnp.array([twin.dt / 3 / half, twin.dt / 2 / half, twin.dt / twin.substeps], jnp.float32)
    counts = jnp.array([half, half, twin.substeps], jnp.int32)

    # A loop, because XLA on CPUs recomputes a stage for each of its uses when stages are unrolled.
    def stage(latest: State, size: tuple[Array, Array]) -> tuple[State, None]:
        return gravity_waves(twin, sea, now, _slow(twin, sea, latest, forcing), forcing, *size), None

    return jax.lax.scan(stage, now, (lengths, counts))[0]


@functools.partial(jax.jit, static_argnums=0)
def _simulate(twin: Twin, sea: Sea, modes: tuple[Array, Array], a: Array, e: "Eddies") -> Array:
    """Velocity in the cells of the domain at the end of every hour, (hours - 1, y, x, 2)."""
    steps = round(3600 / twin.dt)
    south, north, west, east = PAD

    def drivers(a: Array, strength: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        return (a @ modes[0], a @ modes[1]), (strength @ e.u, strength @ e.v)

    def hour(carry: tuple, forced: tuple[Array, Array]) -> tuple[tuple, Array]:
        state, before = carry
        after = drivers(*forced)
        drift = tuple((x1 - x0) / 3600 for x0, x1 in zip(before[0], after[0], strict=True))

        def advance(i: Array, state: State) -> State:
            w = (i.astype(jnp.float32) + 0.5) / steps
            background, eddy = jax.tree.map(lambda x0, x1: (1 - w) * x0 + w * x1, before, after)
            forcing = Forcing(
                external=tuple(b + d for b, d in zip(background, eddy, strict=True)),
                push=tuple(d + twin.stir * x for d, x in zip(drift, eddy, strict=True)),
            )
            return step(twin, sea, state, forcing)

        state = jax.lax.fori_loop(0, steps, advance, state)
        u, v = unflatten(state.u, (0, 1)), unflatten(state.v, (1, 0))
        centre = jnp.stack([(u[:, 1:] + u[:, :-1]) / 2, (v[1:] + v[:-1]) / 2], -1)
        return (state, after), centre[south : u.shape[0] - north, west : v.shape[1] - east]

    rest = State(*(jnp.zeros(sea.ocean.shape, jnp.float32) for _ in range(3)))
    return jax.lax.scan(hour, (rest, drivers(a[0], e.strength[0])), (a[1:], e.strength[1:]))[1]


def simulate(twin: Twin, window: int, hours: int = WINDOW) -> np.ndarray:
    """The first `hours` frames of a window, m/s, (hours, 44, 94, 2) float32, NaN on land.

    Raises:
      InputError: more hours than a window has, or the model became unstable, as it does far from the defaults.
    """
    if not 0 < hours <= WINDOW:
        raise InputError(f"a window has 1 to {WINDOW} hours, got {hours}")
    first = window * WINDOW
    a = through_flow(twin, first + SPIN_UP + hours)[first:]
    g = geometry(twin)
    modes = flatten(g.modes_u, "edge"), flatten(g.modes_v, "edge")
    patterns = eddies(twin, window, SPIN_UP + hours)
    # The same frames beside every accelerator: other rounding would grow into other eddies.
    with jax.default_device(distributed.host()):
        velocity = np.array(_simulate(twin, sea(twin), modes, np.float32(a), patterns))[SPIN_UP - 1 :]
    ocean = grid()[0]
    if not np.isfinite(velocity[:, ocean]).all():
        raise InputError(f"the twin became unstable in window {window}; a shorter dt or weaker forcing helps")
    velocity[:, ~ocean] = np.nan
    return velocity


_parsing = threading.Lock()


def _window(twin: Twin, window: int, hours: int, folder: Path | None) -> np.ndarray:
    """A window from the cache, or simulated and put there."""
    path = folder and folder / f"{window:04d}.npy"
    try:
        if path and path.exists():
            # NumPy parses the header as Python; in CPython 3.11 two threads that do so at once raise SystemError.
            with _parsing:
                kept = np.load(path, allow_pickle=False, mmap_mode="r")
            if len(kept) >= hours:
                return kept[:hours]
    except (OSError, ValueError, EOFError):
        logging.warning("%s cannot be read; its window is simulated again", path)
    velocity = simulate(twin, window, hours)
    try:
        if path:
            with whole_file(path) as temporary:
                np.save(temporary, velocity)
    except InputError as e:
        # Only time is lost. It is said once, not for each of many windows.
        logging.log_first_n(
            logging.WARNING, "%s; simulated windows are not kept, JAX_REPAINT_CACHE names another folder", 1, e
        )
    return velocity


def _announce(hours: dict[int, int], folder: Path | None) -> None:
    """Says what is simulated for minutes, which in a log no bar shows."""
    new = sum(count for window, count in hours.items() if not (folder and (folder / f"{window:04d}.npy").exists()))
    if new > WINDOW:
        logging.info("simulating %d hours of the twin%s", new, f", which are kept in {folder}" if folder else "")


def windows(
    twin: Twin, frames: int, cache: bool = True, workers: int | None = None, first: int = 0
) -> Iterator[np.ndarray]:
    """The windows of `frames` hours in order, those at both ends cut; simulated by as many threads as there are cores.

    Threads are enough: the time is spent inside one compiled program, which holds no lock.
    """
    folder = cache_folder("twin", twin.key()) if cache else None
    workers = workers or os.cpu_count() or 1
    counts = {
        i: min(WINDOW, first + frames - i * WINDOW) for i in range(first // WINDOW, -(-(first + frames) // WINDOW))
    }
    _announce(counts, folder)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(_window, twin, i, count, folder) for i, count in counts.items()]
        try:
            for i, job in zip(counts, jobs, strict=True):
                yield job.result()[max(first - i * WINDOW, 0) :]
        finally:
            for job in jobs:
                job.cancel()


def select(index: np.ndarray, twin: Twin | None = None, cache: bool = True) -> Fields:
    """The frames of these numbers alone, simulated no further than they need: (len(index),) increasing hours."""
    twin = twin or Twin()
    index = np.asarray(index)
    ocean, lat, lon = grid()
    folder = cache_folder("twin", twin.key()) if cache else None
    hours = {int(w): int((index[index // WINDOW == w] % WINDOW).max()) + 1 for w in np.unique(index // WINDOW)}
    _announce(hours, folder)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        jobs = {w: pool.submit(_window, twin, w, count, folder) for w, count in hours.items()}
        velocity = np.stack([jobs[int(i) // WINDOW].result()[int(i) % WINDOW] for i in index])
    return Fields.create(velocity, lat, lon, _times(index), ocean, NAME)


def _times(index: np.ndarray) -> np.ndarray:
    return START + index * np.timedelta64(3600 * 10**9, "ns")


def generate(
    frames: int, twin: Twin | None = None, cache: bool = True, progress: bool = True, first: int = 0
) -> Fields:
    """`frames` hourly fields of the twin.

    Args:
      frames: at least 1.
      twin: parameters; the default ones if None.
      cache: keep and reuse windows in the user's cache folder.
      progress: show a bar.
      first: number of the first one.

    Raises:
      InputError: no frame is asked for, `first` is negative, or the model became unstable.
    """
    twin = twin or Twin()
    if frames < 1:
        raise InputError(f"a twin needs at least one frame, got {frames}")
    if first < 0:
        raise InputError(f"the first frame of a twin has number 0, got {first}")
    ocean, lat, lon = grid()
    velocity = np.empty((frames, *ocean.shape, 2), np.float32)
    done = 0
    with command.bar(frames, "twin", "frame", progress) as bar:
        for part in windows(twin, frames, cache, first=first):
            velocity[done : done + len(part)] = part
            done += len(part)
            bar.update(len(part))
    return Fields.create(velocity, lat, lon, _times(first + np.arange(frames)), ocean, NAME)


FLAGS = flags.FLAGS


def _define_flags() -> None:
    flags.DEFINE_integer("frames", 17040, "Hourly frames to simulate.", lower_bound=1)
    flags.DEFINE_integer("first", 0, "Number of the first one; from 17040 on they are of other years.", lower_bound=0)
    flags.DEFINE_string("out", "twin.nc", "File to write: .nc, .zarr or .npz.")
    flags.DEFINE_integer("seed", 0, "Of weather and eddies.", lower_bound=0)
    flags.DEFINE_bool("cache", True, "Keep simulated windows in the user's cache folder and reuse them.")


def main(_) -> None:
    """Simulates and writes a series."""
    out = Path(FLAGS.out)
    check_writable(out, (".nc", ".zarr", ".npz"))
    fields = generate(FLAGS.frames, Twin(seed=FLAGS.seed), FLAGS.cache, first=FLAGS.first)
    readers.write(fields, out)
    print(f"wrote {len(fields)} hourly fields of {fields.shape[0]} x {fields.shape[1]} cells to {out}")


if __name__ == "__main__":
    _define_flags()
    command.run(main)
