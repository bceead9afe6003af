"""C-grids to cell centres, and components along a grid to the east and north.

On a C-grid u lies on the faces between cells along x, v on those along y. The current of a cell is the mean over
its two faces; a face on the coast has no flow through it, whatever number the file holds there:

    u(j, i) = (wet u(j, i - 1/2) + wet u(j, i + 1/2)) / 2,      v(j, i) = (wet v(j - 1/2, i) + wet v(j + 1/2, i)) / 2

Cells at the rim of which a face is not in the file are cut off. Source: Arakawa and Lamb, Computational design of
the basic dynamical processes of the UCLA general circulation model (1977), Methods in Computational Physics 17.
"""

import numpy as np


def cells(u_shape: tuple[int, ...], v_shape: tuple[int, ...]) -> tuple[slice, slice]:
    """Rows and columns of the cells with all four faces, where face i lies between the cells i and i + 1."""
    return slice(1, min(u_shape[-2], v_shape[-2])), slice(1, min(u_shape[-1], v_shape[-1]))


def to_centres(u: np.ndarray, v: np.ndarray, wet_u: np.ndarray, wet_v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """u, v (time, y, x) of `cells` from those on faces; wet (y, x) is True where water flows through a face.

    A gap, NaN on a wet face, stays one in the cells beside it.
    """
    rows, columns = cells(u.shape, v.shape)
    u, v = np.where(wet_u, u, 0)[:, rows, : columns.stop], np.where(wet_v, v, 0)[:, : rows.stop, columns]
    return (u[:, :, :-1] + u[:, :, 1:]) / 2, (v[:, :-1] + v[:, 1:]) / 2


def water_beside(wet_u: np.ndarray, wet_v: np.ndarray) -> np.ndarray:
    """(y, x) of `cells`, True where water flows through at least one face."""
    rows, columns = cells(wet_u.shape, wet_v.shape)
    wet_u, wet_v = wet_u[rows, : columns.stop], wet_v[: rows.stop, columns]
    return wet_u[:, :-1] | wet_u[:, 1:] | wet_v[:-1] | wet_v[1:]


def faces(wet: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wet faces of u (y, x - 1) and v (y - 1, x) from wet cells (y, x): those between two wet cells."""
    return wet[:, :-1] & wet[:, 1:], wet[:-1] & wet[1:]


def face_positions_to_cells(u_place: np.ndarray, v_shape: tuple[int, ...]) -> np.ndarray:
    """Centres of `cells` (y, x) from the latitudes or longitudes of the faces of u."""
    rows, columns = cells(u_place.shape, v_shape)
    left, right = u_place[rows, : columns.stop - 1], u_place[rows, columns]
    return left + ((right - left + 180) % 360 - 180) / 2


def offset(u_place: np.ndarray, v_place: np.ndarray) -> tuple[float, float]:
    """How far u lies from v along x and along y, in cells, from (lat, lon) (2, y, x) in degrees; medians.

    (1/2, -1/2) where face i follows cell i (ROMS, NEMO), (-1/2, 1/2) where it leads (MITgcm), 0 on common points.
    """
    rows, columns = (min(u_place.shape[i], v_place.shape[i]) for i in (1, 2))
    u_place, v_place = u_place[:, :rows, :columns], v_place[:, :rows, :columns]

    def metric(difference: np.ndarray, lat: np.ndarray) -> np.ndarray:
        north, east = difference
        return np.stack([north, ((east + 180) % 360 - 180) * np.cos(np.radians(lat))], -1)

    lat = v_place[0, :-1, :-1]
    along_x = metric(v_place[:, :-1, 1:] - v_place[:, :-1, :-1], lat)
    along_y = metric(v_place[:, 1:, :-1] - v_place[:, :-1, :-1], lat)
    apart = metric(u_place[:, :-1, :-1] - v_place[:, :-1, :-1], lat)
    basis = np.stack([along_x, along_y], -1)
    usable = np.isfinite(basis).all((-1, -2)) & np.isfinite(apart).all(-1)
    usable &= np.abs(np.linalg.det(np.where(usable[..., None, None], basis, 0))) > 0
    if not usable.any():
        return np.nan, np.nan
    solved = np.linalg.solve(basis[usable], apart[usable][..., None])[..., 0]
    return float(np.median(solved[:, 0])), float(np.median(solved[:, 1]))


def grid_angle(lat: np.ndarray, lon: np.ndarray) -> tuple[np.ndarray, int]:
    """Angle (y, x) from east to growing x, radians counterclockwise, and 1 where y is to the left of x, else -1.

        angle = atan2(t . north, t . east),   t = r(i + 1) - r(i - 1)

    r are the cells' unit vectors, t the tangent along x (one-sided at the rim), east and north the local directions.
    """
    phi, turn = np.radians(lat), np.radians(lon)
    place = np.stack([np.cos(phi) * np.cos(turn), np.cos(phi) * np.sin(turn), np.sin(phi)], -1)
    east = np.stack([-np.sin(turn), np.cos(turn), np.zeros_like(turn)], -1)
    north = np.stack([-np.sin(phi) * np.cos(turn), -np.sin(phi) * np.sin(turn), np.cos(phi)], -1)
    along_x, along_y = np.gradient(place, axis=1), np.gradient(place, axis=0)
    left = (np.cross(along_x, along_y) * place).sum(-1)
    return np.arctan2((along_x * north).sum(-1), (along_x * east).sum(-1)), 1 if np.median(left) > 0 else -1


def turn(u: np.ndarray, v: np.ndarray, angle: np.ndarray, hand: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Eastward and northward components from those along x and y.

    eastward = u cos(angle) - hand v sin(angle),   northward = u sin(angle) + hand v cos(angle)
    """
    cosine, sine = np.cos(angle), np.sin(angle)
    return u * cosine - hand * v * sine, u * sine + hand * v * cosine
