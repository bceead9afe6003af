"""Where points lie among the nodes of a curvilinear grid: the bilinear map of its cells, turned round.

    p(f, g) = (1 - f) (1 - g) p_00 + (1 - f) g p_01 + f (1 - g) p_10 + f g p_11

The corners are seen from the point, in the plane that touches the sphere there, so that neither the date line nor a
pole is special. Newton's method finds (f, g) in one cell; where they lie outside [0, 1] the next cell on that side is
tried.
"""

import numpy as np
from scipy import spatial

RADIUS = 6371.0  # km, of the earth
STEPS = 12  # of Newton's method; from the middle of a convex cell four do
CELLS = 32  # tried at most, beginning beside the nearest node
EDGE = 1e-9  # cells; a point on an edge belongs to both sides


def fractional_index(
    lat: np.ndarray, lon: np.ndarray, grid_lat: np.ndarray, grid_lon: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row and column of points in units of cells, and how far they are from the nearest node.

    Args:
      lat, lon: (m,) degrees.
      grid_lat, grid_lon: (y, x) degrees.

    Returns:
      row, column: (m,), outside of the grid extrapolated by up to one cell and NaN beyond that.
      distance: (m,) km.
    """
    nodes, points = _on_sphere(grid_lat, grid_lon), _on_sphere(lat, lon)
    chord, nearest = spatial.cKDTree(nodes.reshape(-1, 3)).query(points)
    last = np.array(grid_lat.shape) - 2
    cell = np.minimum(np.stack(np.unravel_index(nearest, grid_lat.shape), -1), last)
    for _ in range(CELLS):
        corners = _seen_from(lat, lon, nodes[cell[:, :1] + [0, 0, 1, 1], cell[:, 1:] + [0, 1, 0, 1]])
        within, solved = _inverse(corners)
        place = np.where(solved[:, None], cell + within, np.nan)
        following = np.clip(cell + (within > 1 + EDGE) - (within < -EDGE), 0, last)
        if (following == cell).all():
            break
        cell = following
    # From the other side of the earth a cell looks as it does from above.
    diagonals = (np.linalg.norm(one - other, axis=-1).max() for one, other in _across(nodes))
    place[chord > max(diagonals)] = np.nan
    return place[:, 0], place[:, 1], RADIUS * 2 * np.arcsin(np.minimum(chord / 2, 1))


def _across(nodes: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Both ends of both diagonals of all cells."""
    return (nodes[1:, 1:], nodes[:-1, :-1]), (nodes[1:, :-1], nodes[:-1, 1:])


def _on_sphere(lat: np.ndarray, lon: np.ndarray) -> np.ndarray:
    """(..., 3) on the unit sphere."""
    lat, lon = np.radians(lat), np.radians(lon)
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], -1)


def _seen_from(lat: np.ndarray, lon: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Corners (m, 4, 3) of the cell of each point in its own plane, (m, 4, 2): to the east and to the north."""
    lat, lon = np.radians(lat), np.radians(lon)
    east = np.stack([-np.sin(lon), np.cos(lon), np.zeros_like(lon)], -1)
    north = np.stack([-np.sin(lat) * np.cos(lon), -np.sin(lat) * np.sin(lon), np.cos(lat)], -1)
    return np.einsum("mki,mji->mkj", corners, np.stack([east, north], 1))


def _inverse(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(f, g) (m, 2) where the bilinear map of corners 00, 01, 10, 11 (m, 4, 2) is 0, within [-1, 2]; and whether."""
    p00, p01, p10, p11 = np.moveaxis(corners, 1, 0)
    up, across, twist = p10 - p00, p01 - p00, p11 - p10 - p01 + p00
    within = np.full(p00.shape, 0.5)
    for _ in range(STEPS):
        f, g = within[:, :1], within[:, 1:]
        misfit = p00 + f * up + g * across + f * g * twist
        by_f, by_g = up + g * twist, across + f * twist
        area = by_f[:, 0] * by_g[:, 1] - by_f[:, 1] * by_g[:, 0]
        step = np.stack([misfit[:, 0] * by_g[:, 1] - misfit[:, 1] * by_g[:, 0],
                         misfit[:, 1] * by_f[:, 0] - misfit[:, 0] * by_f[:, 1]], -1)  # fmt: skip
        # A cell without area holds no point.
        step = np.divide(step, area[:, None], out=np.zeros_like(step), where=area[:, None] != 0)
        within = np.clip(within - step, -1.0, 2.0)
    f, g = within[:, :1], within[:, 1:]
    misfit = np.abs(p00 + f * up + g * across + f * g * twist).max(-1)
    return within, misfit <= 1e-6 * np.abs(p11 - p00).max(-1)
