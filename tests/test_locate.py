"""Points on grids that are turned on the sphere, where their row and column are known."""

import numpy as np
import pandas as pd
import pytest
from scipy.spatial.transform import Rotation

from jax_repaint import locate, observe
from jax_repaint.data.observations import Grid, collect
from jax_repaint.errors import InputError

STEP = 0.05  # degrees
SHAPE = (13, 21)
CENTRES = {"the open sea": (36.0, 14.0), "the date line": (-20.0, 180.0), "the pole": (89.9, 30.0)}


def turned(lat, lon, centre, angle=35.0):
    """Positions near (0, 0), on a sphere that is turned by `angle` and moved so that (0, 0) comes to `centre`."""
    lat, lon = np.radians(lat), np.radians(lon)
    where = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], -1)
    north, east = centre
    rotation = Rotation.from_euler("xyz", [angle, -north, east], degrees=True)
    x, y, z = np.moveaxis(rotation.apply(where.reshape(-1, 3)).reshape(where.shape), -1, 0)
    return np.degrees(np.arctan2(z, np.hypot(x, y))), np.degrees(np.arctan2(y, x))


def at(row, column, centre):
    """Where a place in units of cells is, with as many rows on both sides of the centre."""
    return turned(STEP * (row - (SHAPE[0] - 1) / 2), STEP * (column - (SHAPE[1] - 1) / 2), CENTRES[centre])


def grid(centre):
    return at(*np.indices(SHAPE), centre)


@pytest.mark.parametrize("centre", CENTRES)
def test_row_and_column_are_those_of_the_turned_grid(centre):
    rng = np.random.default_rng(0)
    row, column = rng.uniform(-0.4, 12.4, 400), rng.uniform(-0.4, 20.4, 400)
    row[:3], column[:3] = (0, 12, 5), (20, 0, 7)
    found = locate.fractional_index(*at(row, column, centre), *grid(centre))
    # The cells of the turned grid are flat to a part in ten thousand.
    np.testing.assert_allclose(found[0], row, atol=2e-4)
    np.testing.assert_allclose(found[1], column, atol=2e-4)
    assert found[2].max() < 0.75 * STEP * np.pi / 180 * locate.RADIUS


def test_a_bent_grid_is_walked_through_to_the_right_cell():
    # Quarter rings: the nearest node is often not a corner of the cell.
    def place(row, column):
        radius, angle = 1 + 0.02 * row, 0.5 * column
        return 10 + radius * np.sin(angle), 40 + radius * np.cos(angle)

    nodes = place(*np.indices((20, 4)))
    rng = np.random.default_rng(1)
    cell, within = np.stack([rng.integers(19, size=300), rng.integers(3, size=300)]), rng.uniform(0, 1, (2, 300))
    corners = [[place(*(cell + np.array([[i], [j]]))) for j in (0, 1)] for i in (0, 1)]
    (f, g), share = within, np.stack([1 - within, within])
    points = sum(share[i, 0] * share[j, 1] * np.stack(corners[i][j]) for i in (0, 1) for j in (0, 1))
    row, column, _ = locate.fractional_index(*points, *nodes)
    np.testing.assert_allclose(row, cell[0] + f, atol=0.02)
    np.testing.assert_allclose(column, cell[1] + g, atol=0.002)


def test_far_points_have_no_place_and_a_distance():
    lat, lon = CENTRES["the open sea"]
    antipode = (-lat, lon - 180)
    far = np.array([[lat, lon + 3.0], [lat + 90, lon], antipode])
    row, column, distance = locate.fractional_index(*far.T, *grid("the open sea"))
    assert np.isnan(row).all()
    assert np.isnan(column).all()
    # Three degrees along the parallel, less half of the grid.
    reach = np.radians(3.0) * np.cos(np.radians(lat)) * locate.RADIUS
    assert reach - 80 < distance[0] < reach - 20
    np.testing.assert_allclose(distance[2], np.pi * locate.RADIUS, rtol=0.01)


def seen(lat, lon, field, ocean=None, **places):
    ocean = np.ones(SHAPE, bool) if ocean is None else ocean
    values = np.zeros((len(lat), 2))
    observation = observe.from_points(lat, lon, values, 0.1, *places["on"], ocean)
    return np.asarray(observation.apply(field.astype(np.float32)))[: len(lat)]


@pytest.mark.parametrize("centre", CENTRES)
def test_a_bilinear_field_is_seen_as_it_is(centre):
    rng = np.random.default_rng(2)
    row, column = rng.uniform(0, 12, 50), rng.uniform(0, 20, 50)

    def field(row, column):
        return np.stack([0.1 * row - 0.02 * column, 0.01 * row * column], -1)

    got = seen(*at(row, column, centre), field(*np.indices(SHAPE)), on=grid(centre))
    np.testing.assert_allclose(got, field(row, column), atol=1e-4)


def test_a_regular_grid_written_in_two_dimensions_gives_the_same():
    lat, lon = 18 + 0.01 * np.arange(13), 295 + 0.01 * np.arange(21)
    rng = np.random.default_rng(3)
    ocean = rng.random(SHAPE) < 0.7
    points = rng.uniform(lat[0], lat[-1], 200), rng.uniform(lon[0], lon[-1], 200)
    nearest = [np.rint((p - axis[0]) / 0.01).astype(int) for p, axis in zip(points, (lat, lon), strict=True)]
    points = [p[ocean[tuple(nearest)]] for p in points]
    field = rng.standard_normal((*SHAPE, 2))
    expected = seen(*points, field, ocean, on=(lat, lon))
    # Also where the same meridian is written otherwise.
    points[1] = points[1] - 360
    got = seen(*points, field, ocean, on=np.meshgrid(lat, lon, indexing="ij"))
    np.testing.assert_allclose(got, expected, atol=1e-3)


class TestTables:
    """Points of a table on the curvilinear grid of a model."""

    places = grid("the open sea")
    model = Grid(np.ones(SHAPE, bool), *places)

    def table(self, lat, lon):
        return pd.DataFrame({"lat": lat, "lon": lon, "u": 0.1, "v": -0.2}, index=range(np.size(lat)))

    def test_they_see_their_cells(self):
        (frame,) = collect(self.table(*at(np.array([3.25, 7.0]), np.array([4.5, 20.0]), "the open sea")), self.model)
        on_grid = np.asarray(frame.observation.on_grid(SHAPE)[0])
        assert frame.count == 2
        assert on_grid[3, 4:6].sum() == 1
        assert on_grid[7, 20]

    def test_those_outside_are_refused_with_their_distance(self):
        lat, lon = at(np.array([3.0, 6.0]), np.array([4.0, 22.0]), "the open sea")
        with pytest.raises(InputError, match=r"observation 1 at .* outside the domain, 11\.1 km from its nearest cell"):
            collect(self.table(lat, lon), self.model)

    def test_those_on_land_are_refused(self):
        ocean = np.ones(SHAPE, bool)
        ocean[3, 4] = False
        with pytest.raises(InputError, match=r"observation 0 at .* lies on land"):
            collect(self.table(*at(np.array([3.2]), np.array([4.1]), "the open sea")), self.model._replace(ocean=ocean))

    def test_the_rim_reaches_half_a_cell(self):
        places = at(np.array([-0.49, 12.49]), np.array([5.0, 6.0]), "the open sea")
        (frame,) = collect(self.table(*places), self.model)
        assert np.asarray(frame.observation.on_grid(SHAPE)[0])[[0, 12], [5, 6]].all()
