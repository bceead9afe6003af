"""C-grids and turned grids against loops, closed forms, great-circle bearings and the files' own second opinion."""

import math

import numpy as np
import pytest
import xarray as xr

from jax_repaint.data import readers, staggered, vertical
from jax_repaint.errors import InputError

EARTH = 6371.0
LON0 = 58.0


def polar(x, y):
    """Latitude and longitude of kilometres on the north polar stereographic plane, LON0 pointing down.

    Snyder (1987), equations 20-16 to 20-18 for the sphere and true scale at the pole.
    """
    rho = np.hypot(x, y)
    return np.degrees(np.pi / 2 - 2 * np.arctan(rho / (2 * EARTH))), LON0 + np.degrees(np.arctan2(x, -y))


def mesh(shape, x0=-2500.0, y0=-2200.0, step=20.0):
    y, x = y0 + step * np.arange(shape[0]), x0 + step * np.arange(shape[1])
    return np.meshgrid(x, y)


def bearing(lat1, lon1, lat2, lon2):
    """Degrees clockwise from north of the great circle from one point to another, the textbook formula."""
    a, b, turn = map(math.radians, (lat1, lat2, lon2 - lon1))
    east = math.sin(turn) * math.cos(b)
    north = math.cos(a) * math.sin(b) - math.sin(a) * math.cos(b) * math.cos(turn)
    return math.degrees(math.atan2(east, north))


class TestAngle:
    def test_on_a_polar_grid_it_is_the_longitude_from_the_vertical(self):
        lat, lon = polar(*mesh((9, 11)))
        angle, hand = staggered.grid_angle(lat, lon)
        assert hand == 1
        # x points to the east where the meridian runs down the plane, and turns with the meridians.
        np.testing.assert_allclose(np.degrees(angle)[:, 1:-1], (LON0 - lon)[:, 1:-1], atol=1e-4)
        np.testing.assert_allclose(np.degrees(angle), LON0 - lon, atol=0.02)

    def test_it_agrees_with_great_circle_bearings(self):
        rng = np.random.default_rng(0)
        lat, lon = polar(*mesh((6, 7), x0=700, y0=-900, step=1.0))
        angle = 90 - np.degrees(staggered.grid_angle(lat, lon)[0])
        for j, i in zip(rng.integers(6, size=20), rng.integers(1, 6, size=20), strict=True):
            expected = bearing(lat[j, i], lon[j, i], lat[j, i + 1], lon[j, i + 1])
            assert angle[j, i] == pytest.approx(expected, abs=0.02)

    def test_rows_that_run_south_make_the_grid_left_handed(self):
        lat, lon = polar(*mesh((9, 11)))
        angle, hand = staggered.grid_angle(lat[::-1], lon[::-1])
        assert hand == -1
        np.testing.assert_allclose(np.degrees(angle), LON0 - lon[::-1], atol=0.02)

    @pytest.mark.parametrize("hand", [1, -1])
    def test_turning_keeps_speeds_and_finds_the_axes(self, hand):
        angle = np.array([0.3, -2.0])
        x = staggered.turn(np.ones(2), np.zeros(2), angle, hand)
        y = staggered.turn(np.zeros(2), np.ones(2), angle, hand)
        np.testing.assert_allclose(x, [np.cos(angle), np.sin(angle)])
        np.testing.assert_allclose(np.arctan2(y[1], y[0]), (angle + hand * np.pi / 2 + np.pi) % (2 * np.pi) - np.pi)


class TestCentres:
    @pytest.mark.parametrize("equal", [False, True], ids=["true-shapes", "equal-shapes"])
    def test_they_are_the_means_of_their_faces(self, equal):
        rng = np.random.default_rng(1)
        cells = (6, 8)
        u = rng.normal(size=(2, 6, 8 if equal else 7))
        v = rng.normal(size=(2, 6 if equal else 5, 8))
        wet_u, wet_v = rng.random(u.shape[1:]) > 0.3, rng.random(v.shape[1:]) > 0.3
        u[0][~wet_u] = v[0][~wet_v] = 0.341
        got = staggered.to_centres(u, v, wet_u, wet_v)
        rows, columns = staggered.cells(u.shape, v.shape)
        assert got[0].shape == (2, *np.empty(cells)[rows, columns].shape)
        for t, j, i in np.ndindex(got[0].shape):
            left, right = ((u[t, j + 1, k] if wet_u[j + 1, k] else 0) for k in (i, i + 1))
            below, above = ((v[t, k, i + 1] if wet_v[k, i + 1] else 0) for k in (j, j + 1))
            assert got[0][t, j, i] == pytest.approx((left + right) / 2)
            assert got[1][t, j, i] == pytest.approx((below + above) / 2)

    def test_a_gap_stays_a_gap_and_land_does_not(self):
        u, v = np.ones((1, 4, 4)), np.ones((1, 4, 4))
        wet = np.ones((4, 4), bool)
        u[0, 2, 1] = np.nan
        dry = wet.copy()
        dry[2, 1] = False
        np.testing.assert_array_equal(np.isnan(staggered.to_centres(u, v, wet, wet)[0][0]).sum(), 2)
        assert not np.isnan(staggered.to_centres(u, v, dry, wet)[0]).any()

    def test_cells_lie_half_way_between_faces_across_the_date_line(self):
        faces = np.tile([179.4, 179.8, -179.8, -179.4], (3, 1))
        middle = staggered.face_positions_to_cells(faces, (2, 4))
        np.testing.assert_allclose(middle % 360, [[179.6, 180.0, 180.4]])

    def test_offsets_tell_the_conventions_apart(self):
        lat, lon = (a[2:-2:2, 2:-2:2] for a in polar(*mesh((20, 24), step=10.0)))
        whole = polar(*mesh((20, 24), step=10.0))
        after_x, after_y = (
            np.stack([a[2 + dy : -2 + dy : 2, 2 + dx : -2 + dx : 2] for a in whole]) for dy, dx in ((0, 1), (1, 0))
        )
        before_x, before_y = (
            np.stack([a[2 + dy : dy - 2 : 2, 2 + dx : dx - 2 : 2] for a in whole]) for dy, dx in ((0, -1), (-1, 0))
        )
        assert staggered.offset(after_x, after_y) == pytest.approx((0.5, -0.5), abs=0.01)
        assert staggered.offset(before_x, before_y) == pytest.approx((-0.5, 0.5), abs=0.01)
        assert staggered.offset(np.stack([lat, lon]), np.stack([lat, lon])) == pytest.approx((0, 0), abs=1e-9)


EAST, NORTH = 0.3, -0.2


def along(lon):
    """Components along x and y of the current (EAST, NORTH) on the polar grid."""
    angle = np.radians(LON0 - lon)
    return EAST * np.cos(angle) + NORTH * np.sin(angle), -EAST * np.sin(angle) + NORTH * np.cos(angle)


def roms(equal=False, angle=True, masks=("mask_rho", "mask_u", "mask_v"), land_value=0.341, wave=True):
    """A ROMS file of a current to the east and north, on a turned C-grid of 7 x 9 cells with land in a corner."""
    x, y = mesh((7, 9))
    lat, lon = polar(x, y)
    cut_x, cut_y = (9, 7) if equal else (8, 6)
    u = along(polar(x + 10, y)[1])[0][:, :cut_x]
    v = along(polar(x, y + 10)[1])[1][:cut_y]
    wet = np.ones((7, 9), bool)
    wet[:3, :4] = False
    wet_u, wet_v = np.ones((7, cut_x), bool), np.ones((cut_y, 9), bool)
    wet_u[:, :8], wet_v[:6] = staggered.faces(wet)
    growth = np.array([1.0, 2.0])[:, None, None] if wave else np.ones((2, 1, 1))
    u, v = np.where(wet_u, growth * u, land_value), np.where(wet_v, growth * v, land_value)
    dims = (("eta_u", "xi_u"), ("eta_v", "xi_v")) if equal else (("eta_rho", "xi_u"), ("eta_v", "xi_rho"))
    rho = ("eta_rho", "xi_rho")
    content = {
        "u": (("ocean_time", *dims[0]), u, {"units": "m s-1"}),
        "v": (("ocean_time", *dims[1]), v, {"units": "m s-1"}),
        "angle": (rho, np.radians(LON0 - lon), {"units": "radians"}),
        "mask_rho": (rho, wet.astype(float)),
        "mask_u": (dims[0], wet_u.astype(float)),
        "mask_v": (dims[1], wet_v.astype(float)),
    }
    kept = {"u", "v", *masks} | ({"angle"} if angle else set())
    time = ("ocean_time", [0.0, 1.0], {"units": "days since 2001-01-01"})
    coordinates = {"ocean_time": time, "lat_rho": (rho, lat), "lon_rho": (rho, lon)}
    return xr.Dataset({k: x for k, x in content.items() if k in kept}, coordinates)


def saved(tmp_path, dataset, name="file.nc"):
    dataset.to_netcdf(tmp_path / name, engine="h5netcdf")
    return tmp_path / name


class TestSyntheticRoms:
    @pytest.mark.parametrize("equal", [False, True], ids=["true-shapes", "equal-shapes"])
    @pytest.mark.parametrize("angle", [False, True], ids=["geometry", "angle"])
    @pytest.mark.parametrize("masks", [("mask_rho",), ("mask_rho", "mask_u", "mask_v"), ("mask_u", "mask_v")])
    def test_a_current_to_the_east_and_north_comes_back(self, tmp_path, equal, angle, masks):
        got = readers.read(saved(tmp_path, roms(equal, angle, masks)))
        lat = polar(*mesh((7, 9)))[0]
        wet = np.ones((7, 9), bool)
        wet[:3, :4] = False
        end = (None, None) if equal and "mask_u" in masks else (-1, -1)
        inside = (slice(1, end[0]), slice(1, end[1]))
        np.testing.assert_array_equal(got.ocean, wet[inside])
        np.testing.assert_allclose(got.lat, lat[inside])
        # Away from the coast, where a face of no flow halves the component.
        far = np.ones((7, 9), bool)
        far[:4, :5] = False
        far = far[inside]
        for t, growth in enumerate((1, 2)):
            np.testing.assert_allclose(got.u[t][far], growth * EAST, atol=3e-4)
            np.testing.assert_allclose(got.v[t][far], growth * NORTH, atol=3e-4)
        assert np.nanmax(np.abs(got.velocity)) < 2.001 * math.hypot(EAST, NORTH)

    def test_the_grid_may_be_in_a_file_of_its_own(self, tmp_path):
        whole = roms()
        path = saved(tmp_path, whole)
        names = ["lat_rho", "lon_rho", "angle", "mask_rho", "mask_u", "mask_v"]
        bare = saved(tmp_path, whole.drop_vars(names), "bare.nc")
        grid = saved(tmp_path, whole[names].drop_vars("ocean_time", errors="ignore"), "grid.nc")
        np.testing.assert_array_equal(readers.read(bare, grid=grid).velocity, readers.read(path).velocity)
        with pytest.raises(InputError, match=r"bare.nc: u lies on \(eta_rho=7, xi_u=8\) .* by grid"):
            readers.read(bare)
        other = saved(tmp_path, roms(equal=True)[["lat_rho", "lon_rho"]].isel(eta_rho=slice(0, 5)), "other.nc")
        with pytest.raises(InputError, match=r"lat_rho \(5, 9\) do not fit together"):
            readers.read(bare, grid=other)

    def test_currents_in_the_cells_have_the_places_of_the_grid(self, tmp_path):
        whole = roms()
        u, v = np.random.default_rng(0).normal(0, 0.3, (2, 2, 7, 9)).astype(np.float32)
        dims = ("ocean_time", "eta_rho", "xi_rho")
        currents = {name: (dims, x, {"units": "m s-1"}) for name, x in (("u_eastward", u), ("v_northward", v))}
        grid = saved(tmp_path, whole[["lat_rho", "lon_rho"]].drop_vars("ocean_time", errors="ignore"), "grid.nc")
        got = readers.read(saved(tmp_path, xr.Dataset(currents, {"ocean_time": whole["ocean_time"]})), grid=grid)
        for found, expected in zip((got.lat, got.lon, got.u, got.v), (*polar(*mesh((7, 9))), u, v), strict=True):
            np.testing.assert_array_equal(found, expected)

    def test_without_masks_missing_faces_are_land(self, tmp_path):
        got = readers.read(saved(tmp_path, roms(masks=(), land_value=np.nan)))
        expected = readers.read(saved(tmp_path, roms(), "masked.nc"))
        np.testing.assert_array_equal(got.velocity, expected.velocity)

    @pytest.mark.parametrize("masks", [(), ("mask_rho", "mask_u", "mask_v")])
    def test_a_gap_of_one_file_of_a_series_is_no_wall(self, tmp_path, masks):
        """Files of a frame each are what one file of all frames is: gaps are of their frame, walls of all."""
        dataset = roms(masks=masks, land_value=np.nan)
        u = dataset["u"].values.copy()
        u[1, 5, 4] = np.nan
        dataset["u"] = (dataset["u"].dims, u, dataset["u"].attrs)
        whole = readers.read(saved(tmp_path, dataset))
        assert 0 < np.isnan(whole.velocity[1][whole.ocean]).sum() <= 4
        files = [saved(tmp_path, dataset.isel(ocean_time=[n]), f"part{n}.nc") for n in (0, 1)]
        for order in (files, files[::-1]):
            got = readers.read(order)
            np.testing.assert_array_equal(got.velocity, whole.velocity)
            np.testing.assert_array_equal(got.ocean, whole.ocean)

    def test_rows_may_be_stored_from_north_to_south_where_the_angle_is_given(self, tmp_path, caplog):
        """v keeps pointing to the left of u, whatever the order of the rows."""
        whole = roms(masks=("mask_rho", "mask_u", "mask_v"))
        expected = readers.read(saved(tmp_path, whole))
        turned = whole.isel(eta_v=slice(None, None, -1), eta_rho=slice(None, None, -1))
        got = readers.read(saved(tmp_path, turned, "turned.nc"))
        for part in ("ocean", "lat", "lon"):
            np.testing.assert_array_equal(getattr(got, part), getattr(expected, part))
        np.testing.assert_allclose(got.velocity, expected.velocity, atol=1e-6)
        far = got.ocean.copy()
        far[:3, :4] = False
        np.testing.assert_allclose(got.velocity[0][far], [[EAST, NORTH]] * far.sum(), atol=3e-4)
        assert not [m for m in caplog.messages if "angle differs" in m]

    def test_a_dry_cell_between_open_faces_is_land(self, tmp_path):
        """As banks are that fall dry: the masks of u and v know the coast only."""
        dataset = roms()
        expected = readers.read(saved(tmp_path, dataset)).ocean.copy()
        dataset["mask_rho"][4, 6] = 0.0
        got = readers.read(saved(tmp_path, dataset, "dry.nc")).ocean
        expected[3, 5] = False
        np.testing.assert_array_equal(got, expected)

    def test_masks_of_another_subset_are_refused(self, tmp_path):
        dataset = roms()
        dataset["mask_u"] = (dataset["mask_u"].dims, np.roll(dataset["mask_u"].values, 3, axis=1))
        with pytest.raises(InputError, match="mask_u and mask_v do not lie between the points of mask_rho"):
            readers.read(saved(tmp_path, dataset))

    @pytest.mark.parametrize("angle", [False, True], ids=["geometry", "angle"])
    def test_axes_may_be_stored_in_another_order(self, tmp_path, angle):
        dataset = roms(angle=angle).isel(eta_rho=slice(0, 7), xi_rho=slice(0, 9))
        expected = readers.read(saved(tmp_path, dataset))
        got = readers.read(saved(tmp_path, dataset.transpose("xi_u", "xi_rho", ...), "turned.nc"))
        for part in ("velocity", "ocean", "lat", "lon"):
            np.testing.assert_array_equal(getattr(got, part), getattr(expected, part))

    def test_cells_in_radians_are_refused(self, tmp_path):
        dataset = roms()
        dataset["lon_rho"] = np.radians(dataset["lon_rho"]).assign_attrs(units="radian")
        with pytest.raises(InputError, match="lon_rho has the units 'radian'; degrees east and north are expected"):
            readers.read(saved(tmp_path, dataset))

    def test_an_angle_in_degrees_is_understood_and_a_wrong_one_is_noticed(self, tmp_path, caplog):
        dataset = roms()
        dataset["angle"] = (dataset["angle"].dims, np.degrees(dataset["angle"].values), {"units": "degrees"})
        expected = readers.read(saved(tmp_path, roms(), "radians.nc"))
        np.testing.assert_allclose(readers.read(saved(tmp_path, dataset)).velocity, expected.velocity, atol=1e-6)
        dataset["angle"] = (dataset["angle"].dims, -roms()["angle"].values, {"units": "radians"})
        readers.read(saved(tmp_path, dataset, "wrong.nc"))
        assert any("angle differs from the direction of the rows by" in m for m in caplog.messages)


class TestDepth:
    """Levels that follow the bottom, with a current that falls off linearly with depth."""

    def file(self, tmp_path, kind, **other):
        dataset, s = roms(), (np.arange(20) + 0.5) / 20 - 1
        stretched, critical = -(np.abs(s) ** 2.5), 20.0
        height = 60 + 10 * np.arange(7.0)[:, None] + 5 * np.arange(9.0)
        between = {"u": (height[:, 1:] + height[:, :-1]) / 2, "v": (height[1:] + height[:-1]) / 2}
        for name, h in between.items():
            level, curve = s[:, None, None], stretched[:, None, None]
            if kind == "g1":
                z = critical * level + (h - critical) * curve
            else:
                z = h * (critical * level + h * curve) / (critical + h)
            values = dataset[name].values[:, None] * (1 + 0.01 * z)
            dims = dataset[name].dims
            dataset[name] = ((dims[0], "s_rho", *dims[1:]), values, {"units": "m s-1"})
        terms = {
            "standard_name": f"ocean_s_coordinate_{kind}",
            "formula_terms": "s: s_rho C: Cs_r depth: h depth_c: hc",
        }
        dataset = dataset.assign_coords(s_rho=("s_rho", s, terms))
        dataset["Cs_r"], dataset["hc"] = ("s_rho", stretched), ((), critical)
        dataset["h"] = (("eta_rho", "xi_rho"), height)
        return saved(tmp_path, dataset.drop_vars(other.get("without", [])), "deep.nc"), height

    @pytest.mark.parametrize("kind", ["g1", "g2"])
    @pytest.mark.parametrize("depth", [3.0, 17.0, 40.0])
    def test_a_linear_profile_is_exact(self, tmp_path, kind, depth):
        path, _ = self.file(tmp_path, kind)
        surface = readers.read(saved(tmp_path, roms()))
        got = readers.read(path, depth=depth)
        np.testing.assert_array_equal(got.ocean, surface.ocean)
        np.testing.assert_allclose(got.velocity, (1 - 0.01 * depth) * surface.velocity, rtol=2e-4, atol=2e-5)

    def test_what_is_shallower_is_land(self, tmp_path):
        path, height = self.file(tmp_path, "g2")
        got, whole = readers.read(path, depth=120), readers.read(path).ocean
        height = height[1:-1, 1:-1]
        shallow, deep = whole & (height < 120 - 10), whole & (height > 120 + 10)
        assert shallow.any()
        assert not got.ocean[shallow].any()
        assert deep.any()
        assert got.ocean[deep].all()
        assert not got.gaps

    def test_above_the_uppermost_level_its_current_holds(self, tmp_path):
        """It is half a layer, less than a metre, below the surface."""
        path, _ = self.file(tmp_path, "g2")
        surface, got = readers.read(saved(tmp_path, roms())), readers.read(path, depth=0.05)
        np.testing.assert_array_equal(got.ocean, surface.ocean)
        ratio = (got.velocity / surface.velocity)[:, surface.ocean & (surface.velocity != 0).all((0, -1))]
        assert (ratio > 0.99).all()
        assert (ratio < 0.9995).all()

    @pytest.mark.parametrize("depth", [-17.0, 10_000.0, np.nan])
    def test_a_depth_in_the_air_or_the_ground_is_refused(self, tmp_path, depth):
        path, height = self.file(tmp_path, "g2")
        with pytest.raises(InputError, match=f"{depth:g} m is outside u, whose bottom lies down to {height.max():g} m"):
            readers.read(path, depth=depth)

    def test_axes_may_be_stored_in_another_order(self, tmp_path):
        path, _ = self.file(tmp_path, "g2")
        with xr.open_dataset(path, engine="h5netcdf", decode_times=False) as file:
            turned = saved(tmp_path, file.transpose("ocean_time", "xi_u", "xi_rho", ...), "turned.nc")
        np.testing.assert_array_equal(readers.read(turned, depth=17).velocity, readers.read(path, depth=17).velocity)

    def test_above_levels_of_the_lower_half_nothing_is_known(self, tmp_path):
        path, _ = self.file(tmp_path, "g2")
        with xr.open_dataset(path, engine="h5netcdf", decode_times=False) as file:
            lower = saved(tmp_path, file.isel(s_rho=slice(0, 10)), "lower.nc")
        with pytest.raises(InputError, match="no ocean cell"):
            readers.read(lower, depth=1)
        whole, got = readers.read(path, depth=40), readers.read(lower, depth=40)
        assert got.ocean.any()
        np.testing.assert_allclose(got.velocity[:, got.ocean], whole.velocity[:, got.ocean], rtol=1e-5)

    @pytest.mark.parametrize("along", [0, 1])
    def test_faces_are_as_deep_as_their_cells_on_average(self, along):
        """The last face, of which one cell is in the file, as deep as that."""
        height = np.array([[1.0, 3.0, 7.0], [2.0, 6.0, 20.0]])
        expected = {0: [[1.5, 4.5, 13.5], [2, 6, 20]], 1: [[2, 5, 7], [4, 13, 20]]}[along]
        np.testing.assert_array_equal(vertical._between(height, along, 2, 3), expected)
        rows, columns = (1, 3) if along == 0 else (2, 2)
        np.testing.assert_array_equal(
            vertical._between(height, along, rows, columns), np.array(expected)[:rows, :columns]
        )

    def test_a_grid_of_its_own_outranks_that_of_the_data(self, tmp_path):
        path, _ = self.file(tmp_path, "g2")
        expected = readers.read(path, depth=17)
        with xr.open_dataset(path, engine="h5netcdf", decode_times=False) as file:
            dataset = file.load()
        grid = dataset[["h", "angle", "lat_rho", "lon_rho"]].drop_vars("ocean_time", errors="ignore")
        grid["angle"] = np.degrees(grid["angle"]).assign_attrs(units="degrees")
        other = dataset.assign(h=2 * dataset["h"], angle=dataset["angle"].copy(data=dataset["angle"] / 2))
        got = readers.read(saved(tmp_path, other, "other.nc"), grid=saved(tmp_path, grid, "grid.nc"), depth=17)
        np.testing.assert_allclose(got.velocity, expected.velocity, atol=1e-6)

    def test_values_outside_their_limits_have_no_part_between_levels(self, tmp_path):
        path, _ = self.file(tmp_path, "g2")
        found = []
        for value in (np.nan, 4.0):
            with xr.open_dataset(path, engine="h5netcdf", decode_times=False) as file:
                dataset = file.load()
            dataset["u"].attrs["valid_max"] = 3.0
            dataset["u"][1, :, 5, 5] = value
            found.append(readers.read(saved(tmp_path, dataset, f"{value}.nc"), depth=17).velocity)
        assert np.isnan(found[0]).sum() > np.isnan(readers.read(path, depth=17).velocity).sum()
        np.testing.assert_array_equal(found[1], found[0])

    def test_a_missing_term_is_named(self, tmp_path):
        path, _ = self.file(tmp_path, "g2", without=["h"])
        with pytest.raises(
            InputError, match="the depths of the levels of u need h, which is missing; choose by level="
        ):
            readers.read(path, depth=10)
        assert readers.read(path, level=3).velocity.shape == (2, 5, 7, 2)


class TestFaces:
    """Grids that give the positions of u and v only, as NEMO and MITgcm do."""

    def nemo(self, tmp_path, way=1, **change):
        x, y = mesh((6, 8))
        files = []
        for name, standard, dx, dy, part in (("vozocrtx", "x", 10, 0, 0), ("vomecrty", "y", 0, 10, 1)):
            lat, lon = polar(x + way * dx, y + way * dy)
            values = along(lon)[part][None, None] * np.array([1.0, 0.5])[None, :, None, None]
            dataset = xr.Dataset(
                {
                    name: (
                        ("t", "depth", "y", "x"),
                        values,
                        {"units": "m/s", "standard_name": f"sea_water_{standard}_velocity"},
                    )
                },
                {
                    "nav_lat": (("y", "x"), lat),
                    "nav_lon": (("y", "x"), lon),
                    "depth": ("depth", [0.5, 20.0], {"units": "m", "positive": "down"}),
                    "t": ("t", [0.0], {"units": "days since 2001-01-01"}),
                },
            )
            files.append(saved(tmp_path, dataset.assign(change.get(name, {})), f"{name}.nc"))
        return files

    @pytest.mark.parametrize("way", [1, -1], ids=["faces-follow", "faces-lead"])
    def test_u_and_v_in_two_files_meet_in_the_cells(self, tmp_path, way):
        u, v = self.nemo(tmp_path, way)
        got = readers.read(u, v_path=v)
        lat, lon = polar(*mesh((6, 8)))
        inside = (slice(1, None), slice(1, None)) if way == 1 else (slice(None, -1), slice(None, -1))
        np.testing.assert_allclose(got.lat, lat[inside], atol=1e-3)
        np.testing.assert_allclose(got.lon, lon[inside], atol=1e-3)
        np.testing.assert_allclose(got.u, EAST, atol=3e-4)
        np.testing.assert_allclose(got.v, NORTH, atol=3e-4)
        np.testing.assert_allclose(readers.read(u, v_path=v, depth=18).u, EAST / 2, atol=3e-4)

    @pytest.mark.parametrize("way", [1, -1], ids=["faces-follow", "faces-lead"])
    def test_a_cell_without_an_open_face_is_land(self, tmp_path, way):
        y, x, paths = 1, 2, []
        for path, other in zip(self.nemo(tmp_path, way), ((y, x - way), (y - way, x)), strict=True):
            with xr.open_dataset(path, engine="h5netcdf", decode_times=False) as file:
                dataset = file.load()
            for place in ((y, x), other):
                dataset[path.stem][:, :, *place] = np.nan
            paths.append(saved(tmp_path, dataset, f"land_{path.name}"))
        got = readers.read(paths[0], v_path=paths[1])
        np.testing.assert_array_equal(np.argwhere(~got.ocean), [[y - (way == 1), x - (way == 1)]])

    def test_points_a_tenth_of_a_cell_apart_are_neither_common_nor_faces(self, tmp_path):
        u, v = self.nemo(tmp_path, way=0.2)
        with pytest.raises(InputError, match=r"0\.10 and -0\.10 cells apart along x and y, where a C-grid has halves"):
            readers.read(u, v_path=v)

    def test_points_apart_by_rounding_are_common(self, tmp_path):
        u, v = self.nemo(tmp_path, way=0.002)
        got = readers.read(u, v_path=v)
        assert got.shape == (6, 8)
        np.testing.assert_allclose(got.u, EAST, atol=3e-4)
        np.testing.assert_allclose(got.v, NORTH, atol=3e-4)

    @pytest.mark.parametrize(("asked", "factor"), [({}, 1), ({"depth": 15}, 2), ({"level": 2}, 3)])
    def test_mitgcm_counts_its_heights_below_zero_as_positive_down(self, tmp_path, asked, factor):
        """As xmitgcm names them, faces before their cells; linear in place, so that the mean of two faces is exact."""
        x, y, z = 10 + 0.1 * np.arange(8), 40 + 0.1 * np.arange(6), np.array([-5.0, -15.0, -30.0])
        share = np.array([1.0, 2.0, 3.0])[None, :, None, None]
        u, v = (share * (0.1 + np.add.outer(c * (y - y[0]), d * (x - x[0]))) for c, d in ((0.3, 0.2), (-0.1, 0.4)))
        u, v = u - share * 0.2 * 0.05, v - share * -0.1 * 0.05
        east, north = {"units": "degrees_east"}, {"units": "degrees_north"}
        down = {"standard_name": "depth", "units": "m", "positive": "down", "axis": "Z"}
        named = {n: {"standard_name": f"sea_water_{n}_velocity", "units": "m s-1"} for n in "xy"}
        dataset = xr.Dataset(
            {"UVEL": (("time", "Z", "YC", "XG"), u, named["x"]), "VVEL": (("time", "Z", "YG", "XC"), v, named["y"])},
            {
                "time": ("time", [0.0], {"units": "days since 2001-01-01"}),
                "Z": ("Z", z, down),
                "XC": ("XC", x, east | {"standard_name": "longitude"}),
                "XG": ("XG", x - 0.05, east | {"standard_name": "longitude_at_f_location"}),
                "YC": ("YC", y, north | {"standard_name": "latitude"}),
                "YG": ("YG", y - 0.05, north | {"standard_name": "latitude_at_f_location"}),
            },
        )
        got = readers.read(saved(tmp_path, dataset), **asked)
        np.testing.assert_allclose(got.lat, y[:-1])
        np.testing.assert_allclose(got.lon, x[:-1])
        expected = [0.1 + np.add.outer(c * (y - y[0]), d * (x - x[0])) for c, d in ((0.3, 0.2), (-0.1, 0.4))]
        np.testing.assert_allclose(got.u[0], factor * expected[0][:-1, :-1], rtol=1e-5)
        np.testing.assert_allclose(got.v[0], factor * expected[1][:-1, :-1], rtol=1e-5)

    def test_what_does_not_belong_together_is_refused(self, tmp_path):
        u, v = self.nemo(tmp_path)
        with pytest.raises(InputError, match=r"has no pair .* if the other component of vozocrtx is in another file"):
            readers.read(u)
        with pytest.raises(InputError, match="1 files hold u, but 2 files hold v"):
            readers.read(u, v_path=[v, v])
        with pytest.raises(InputError, match="no pair"):
            readers.read(v, v_path=u)
        later = {"t": ("t", [1.0], {"units": "days since 2001-01-01"})}
        u, v = self.nemo(tmp_path, vomecrty=later)
        with pytest.raises(InputError, match="vozocrtx and vomecrty are of different times"):
            readers.read(u, v_path=v)
        u, v = self.nemo(tmp_path, vomecrty={"nav_lat": (("y", "x"), polar(*mesh((6, 8)))[0] + 1)})
        with pytest.raises(InputError, match="cells apart along x and y, where a C-grid has halves"):
            readers.read(u, v_path=v)


class TestCollocated:
    def polar_file(self, tmp_path, standard=True, flip=False, **other):
        x, y = mesh((6, 8))
        lat, lon = polar(x, y)
        names = {"u": "x_sea_water_velocity", "v": "y_sea_water_velocity"} if standard else {"u": "", "v": ""}
        values = np.stack([np.stack(along(lon))] * 2) * np.array([1.0, 2.0])[:, None, None, None]
        data = {
            n: (("time", "y", "x"), values[:, i], {"units": "m/s", "standard_name": names[n]})
            for i, n in enumerate("uv")
        }
        coordinates = {"latitude": (("y", "x"), lat), "longitude": (("y", "x"), lon)}
        coordinates |= {"x": x[0], "y": y[:, 0]} if standard else {}
        coordinates["time"] = np.datetime64("2001-01-01", "ns") + np.arange(2) * np.timedelta64(1, "h")
        dataset = xr.Dataset(data, coordinates)
        dataset = dataset.isel(y=slice(None, None, -1)) if flip else dataset
        return saved(tmp_path, dataset.assign(other))

    @pytest.mark.parametrize("flip", [False, True])
    def test_components_along_a_projection_are_turned(self, tmp_path, flip, caplog):
        mask = np.ones((6, 8), np.int8)
        mask[1, 2] = 0
        sea = (("y", "x"), mask[::-1] if flip else mask, {"standard_name": "sea_binary_mask"})
        got = readers.read(self.polar_file(tmp_path, flip=flip, sea=sea))
        lat, lon = (place[1, 2] for place in polar(*mesh((6, 8))))
        np.testing.assert_array_equal(~got.ocean, np.isclose(got.lat, lat) & np.isclose(got.lon, lon))
        assert (~got.ocean).sum() == 1
        np.testing.assert_allclose(got.u[0][got.ocean], EAST, atol=2e-4)
        np.testing.assert_allclose(got.v[1][got.ocean], 2 * NORTH, atol=4e-4)
        assert any("run along the grid and are turned to the east and north" in m for m in caplog.messages)

    @pytest.mark.parametrize("standard", [True, False], ids=["coordinates", "names"])
    def test_u_may_run_along_the_first_axis(self, tmp_path, standard):
        path = self.polar_file(tmp_path, standard)
        expected = readers.read(path, directions="grid").velocity
        np.testing.assert_allclose(expected[0], [[[EAST, NORTH]] * 8] * 6, atol=2e-4)
        with xr.open_dataset(path, engine="h5netcdf") as file:
            dataset = file.load()
        for number, order in enumerate((("time", "x", "y"), ("x", "y", "time"))):
            turned = saved(tmp_path, dataset.transpose(*order), f"{number}.nc")
            np.testing.assert_array_equal(readers.read(turned, directions="grid").velocity, expected)
        only_u = dataset.assign(u=dataset["u"].transpose("time", "x", "y"))
        with_angle = only_u.assign(angle=(("y", "x"), np.radians(LON0 - dataset["longitude"].values)))
        np.testing.assert_allclose(
            readers.read(saved(tmp_path, with_angle), directions="grid").velocity, expected, atol=2e-4
        )
        named = saved(tmp_path, dataset.drop_vars(["x", "y"], errors="ignore").rename(x="i", y="j"), "named.nc")
        np.testing.assert_array_equal(readers.read(named, directions="grid").velocity, expected)
        with xr.open_dataset(named, engine="h5netcdf") as file:
            turned = saved(tmp_path, file.transpose("time", "i", "j"), "turned.nc")
        with pytest.raises(InputError, match=r"u \(i=8, j=6\) may run along i, .*; transpose to \(j, i\) or rename"):
            readers.read(turned, directions="grid")

    def test_longitudes_of_u_and_v_may_count_to_180_and_to_360(self, tmp_path):
        lat, lon = np.array([10.0, 10.5, 11.0]), np.array([179.0, 179.5, 180.0, 180.5])
        values = np.random.default_rng(0).normal(0, 0.2, (2, 2, 3, 4))
        time = {"time": np.datetime64("2001-01-01", "ns") + np.arange(2) * np.timedelta64(1, "h")}
        paths = []
        for name, x, here in (("uo", values[0], lon), ("vo", values[1], (lon + 180) % 360 - 180)):
            dataset = xr.Dataset(
                {name: (("time", "lat", "lon"), x, {"units": "m/s"})}, time | {"lat": lat, "lon": here}
            )
            paths.append(saved(tmp_path, dataset, f"{name}.nc"))
        got = readers.read(paths[0], v_path=paths[1], u="uo", v="vo")
        np.testing.assert_array_equal(got.lon, lon)
        np.testing.assert_array_equal(got.u, values[0].astype(np.float32))
        np.testing.assert_array_equal(got.v, values[1].astype(np.float32))

    @pytest.mark.parametrize("axes", [("x", "y"), ()], ids=["projected", "positions"])
    @pytest.mark.parametrize("flip", [False, True])
    def test_an_angle_counts_in_whatever_order_the_rows_are(self, tmp_path, flip, axes):
        path = self.polar_file(tmp_path, flip=flip)
        with xr.open_dataset(path, engine="h5netcdf") as file:
            dataset = file.load().drop_vars({"x", "y"} - set(axes))
        turn = np.radians(LON0 - dataset["longitude"].values)
        dataset["angle"] = (("y", "x"), turn, {"units": "radians"})
        got = readers.read(saved(tmp_path, dataset, "angle.nc"))
        np.testing.assert_allclose(got.u[0], EAST, atol=1e-6)
        np.testing.assert_allclose(got.v[1], 2 * NORTH, atol=1e-6)

    def test_a_fill_value_that_nobody_declared_is_found_after_it_was_turned(self, tmp_path):
        with xr.open_dataset(self.polar_file(tmp_path), engine="h5netcdf") as file:
            dataset = file.load()
        for name in "uv":
            dataset[name][:, 2:4, 3:6] = -9.99
        with pytest.raises(InputError, match=r"12 values are 14.13 m/s exactly; is a fill value undeclared"):
            readers.read(saved(tmp_path, dataset, "filled.nc"))

    def test_the_user_says_what_the_file_does_not(self, tmp_path):
        path = self.polar_file(tmp_path, standard=False)
        with pytest.raises(InputError, match=r"lie on a curvilinear grid .* by directions, 'grid' or 'east'"):
            readers.read(path)
        np.testing.assert_allclose(readers.read(path, directions="grid").u[0], EAST, atol=2e-4)
        np.testing.assert_allclose(
            readers.read(path, directions="east").u[0], along(polar(*mesh((6, 8)))[1])[0], atol=1e-6
        )
        with pytest.raises(InputError, match="directions must be 'grid' or 'east', got 'north'"):
            readers.read(path, directions="north")


class TestRealFiles:
    @pytest.fixture
    def real(self, shared):
        return shared / "data/real"

    def test_a_polar_stereographic_file_is_turned_by_its_projection(self, real, caplog):
        got = readers.read(real / "roms_arctic20_hourly_2017.nc")
        with xr.open_dataset(real / "roms_arctic20_hourly_2017.nc") as raw:
            u, v = (raw[n].values[:, 0].astype(float) for n in "uv")
            angle = np.radians(
                float(raw["polar_stereographic"].straight_vertical_longitude_from_pole) - raw.longitude.values
            )
        np.testing.assert_allclose(got.u, u * np.cos(angle) - v * np.sin(angle), atol=2e-4)
        np.testing.assert_allclose(got.v, u * np.sin(angle) + v * np.cos(angle), atol=2e-4)
        halves = int((np.isnan(u) ^ np.isnan(v)).sum())
        assert halves > 0.02 * u.size
        assert f"{got.name}: {halves} values have one component only; they count as missing" in caplog.messages
        assert not (got.ocean & (np.isnan(u) | np.isnan(v)).all(0)).any()

    def test_land_of_a_packed_roms_file_does_not_leak(self, real):
        got = readers.read(real / "roms_nordic_subset.nc")
        with xr.open_dataset(real / "roms_nordic_subset.nc") as raw:
            u, v = raw["u"].values[:, -1].astype(float), raw["v"].values[:, -1].astype(float)
            angle, land = raw["angle"].values, {n: raw[f"mask_{n}"].values < 0.5 for n in ("rho", "u", "v")}
            lat, lon = raw["lat_rho"].values, raw["lon_rho"].values
        assert np.unique(u[:, land["u"]]).size == 1
        # The variable angle and the positions of the cells say the same.
        np.testing.assert_allclose(staggered.grid_angle(lat, lon)[0], angle, atol=0.01)
        u[:, land["u"]] = v[:, land["v"]] = 0
        x, y = (u[:, 1:, :-1] + u[:, 1:, 1:]) / 2, (v[:, :-1, 1:] + v[:, 1:, 1:]) / 2
        turn = np.exp(1j * angle[1:, 1:])
        expected, here = (x + 1j * y) * turn, got.ocean
        np.testing.assert_allclose(got.u[:, here], expected.real[:, here], atol=1e-5)
        np.testing.assert_allclose(got.v[:, here], expected.imag[:, here], atol=1e-5)
        np.testing.assert_array_equal(got.ocean, ~land["rho"][1:, 1:])
        assert np.nanmax(np.abs(got.velocity)) < 0.6

    def test_croco_with_and_without_its_grid_file(self, real, caplog):
        alone = readers.read(real / "croco_his.nc", time="2005-01-01")
        with_grid = readers.read(real / "croco_his.nc", time="2005-01-01", grid=real / "croco_grd.nc")
        np.testing.assert_allclose(alone.velocity, with_grid.velocity, atol=1e-6)
        with xr.open_dataset(real / "croco_his.nc", decode_times=False) as raw:
            u, v, wet = raw["u"].values[:, -1], raw["v"].values[:, -1], raw["mask_rho"].values > 0.5
        np.testing.assert_array_equal(alone.ocean, wet[1:-1, 1:-1])
        here = alone.ocean
        np.testing.assert_allclose(alone.u[:, here], ((u[:, 1:-1, :-1] + u[:, 1:-1, 1:]) / 2)[:, here], atol=1e-5)
        np.testing.assert_allclose(alone.v[:, here], ((v[:, :-1, 1:-1] + v[:, 1:, 1:-1]) / 2)[:, here], atol=1e-5)
        np.testing.assert_array_equal(alone.time, np.array(["2005-01-01", "2005-01-04"], "datetime64[ns]"))
        assert any("1 of 2 frames, that of 2005-01-01T00:00:00, is exactly zero" in m for m in caplog.messages)

    def test_nemo_in_two_files(self, real):
        got = readers.read(real / "nemo_U_20200104.nc", v_path=real / "nemo_V_20200104.nc", depth=10)
        with xr.open_dataset(real / "nemo_U_20200104.nc") as u, xr.open_dataset(real / "nemo_V_20200104.nc") as v:
            x, y, level = u["vozocrtx"].values, v["vomecrty"].values, int(np.abs(u["deptht"].values - 10).argmin())
            # A cell shares its longitude with the face to its north and its latitude with that to its east.
            np.testing.assert_allclose(got.lon, v["nav_lon"].values[1:, 1:], atol=3e-3)
            np.testing.assert_allclose(got.lat, u["nav_lat"].values[1:, 1:], atol=3e-3)
        flow = (x[level, 1:, :-1] + x[level, 1:, 1:]) / 2 + 1j * (y[level, :-1, 1:] + y[level, 1:, 1:]) / 2
        np.testing.assert_allclose(np.hypot(got.u[0], got.v[0]), np.abs(flow), atol=1e-6)
        turned = np.degrees(np.angle((got.u[0] + 1j * got.v[0]) / flow))
        lat, lon = got.lat, got.lon
        for j, i in ((5, 7), (20, 30), (47, 40)):
            expected = 90 - bearing(lat[j, i - 1], lon[j, i - 1], lat[j, i + 1], lon[j, i + 1])
            assert turned[j, i] == pytest.approx(expected, abs=0.1)
        assert got.time == np.datetime64("2020-01-04T12:00")
