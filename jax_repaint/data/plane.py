"""The tangent plane on which distances are measured and maps are drawn.

Azimuthal equidistant projection of the sphere: distance and bearing from the centre are exact, other distances are
stretched by less than (r / R)^2 / 6 at radius r (0.4 % at 1,000 km).

Source: Snyder, Map Projections: A Working Manual (1987), equations 5-3, 22-4, 22-5 and 25-2.
"""

import numpy as np

EARTH_RADIUS = 6371008.8  # metres, mean radius of the WGS 84 ellipsoid


def on_sphere(lat: np.ndarray, lon: np.ndarray) -> np.ndarray:
    """Positions (y, x, 3) in metres from the centre of the earth, of cells at lat, lon (y, x) in degrees."""
    phi, theta = np.radians(lat), np.radians(lon)
    return EARTH_RADIUS * np.stack([np.cos(phi) * np.cos(theta), np.cos(phi) * np.sin(theta), np.sin(phi)], -1)


def metres(lat: np.ndarray, lon: np.ndarray) -> np.ndarray:
    """Positions (y, x, 2) in metres north and east of the centre, of cells at lat, lon (y, x) in degrees."""
    north, east, cosine = _from_centre(*_about_centre(lat, lon))
    # atan2 keeps its accuracy at small angles, where the arc cosine of the textbook loses half of them.
    sine = np.hypot(north, east)
    angle = np.arctan2(sine, cosine)
    stretch = np.where(sine > 0, angle / np.where(sine > 0, sine, 1), 1)
    return EARTH_RADIUS * np.stack([stretch * north, stretch * east], -1)


def convergence(lat: np.ndarray, lon: np.ndarray) -> np.ndarray:
    """Angle (y, x), radians counterclockwise, by which a cell's own east and north are turned on the plane.

        angle = (bearing of the line from the centre where it arrives) - (its bearing where it starts)

    Nearly the difference of longitude times the sine of the latitude; 0 at the centre.
    """
    phi, phi0, turn = _about_centre(lat, lon)
    north, east, _ = _from_centre(phi, phi0, turn)
    # Seen from the cell, the line arrives from where the centre is.
    back_north, back_east, _ = _from_centre(phi0, phi, -turn)
    apart = np.hypot(north, east) > 0
    angle = np.arctan2(-back_east, -back_north) - np.arctan2(east, north)
    return np.where(apart, (angle + np.pi) % (2 * np.pi) - np.pi, 0)


def _about_centre(lat: np.ndarray, lon: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
    """Latitude, that of the centre, and longitude from the centre's, in radians."""
    phi = np.radians(lat)
    turn = np.radians(lon - lon[0, 0] + 180) % (2 * np.pi) - np.pi  # the date line is no seam
    if np.ptp(turn) <= np.pi:
        return phi, np.radians((lat.min() + lat.max()) / 2), turn - (turn.min() + turn.max()) / 2
    # Half way round the earth and more, or round a pole, a corner is nothing to count from.
    x, y, z = on_sphere(lat, lon).mean((0, 1))
    across = np.hypot(x, y)
    lon0 = np.arctan2(y, x) if across > 1e-9 * EARTH_RADIUS else 0.0  # over a pole no meridian is the middle one
    return phi, np.arctan2(z, across), (np.radians(lon) - lon0 + np.pi) % (2 * np.pi) - np.pi


def _from_centre(phi: np.ndarray, phi0: np.ndarray, turn: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """North and east parts of the sine of the distance from latitude phi0 to phi, and its cosine."""
    north = np.cos(phi0) * np.sin(phi) - np.sin(phi0) * np.cos(phi) * np.cos(turn)
    cosine = np.sin(phi0) * np.sin(phi) + np.cos(phi0) * np.cos(phi) * np.cos(turn)
    return north, np.cos(phi) * np.sin(turn), cosine
