"""Files written by other libraries are read as they are meant; what cannot be used is refused in one line."""

import errno
import os
import pickle
import re

import cftime
import h5py
import numpy as np
import pytest
import scipy.io
import xarray as xr

from jax_repaint.data import cf as cf_module
from jax_repaint.data import readers
from jax_repaint.data.fields import Fields
from jax_repaint.errors import InputError

FRAMES, Y, X = 5, 3, 4
TIME = np.datetime64("2001-02-03T06", "ns") + np.arange(FRAMES) * np.timedelta64(3, "h")
LAT, LON = np.array([-40.5, -40.25, -40.0]), np.array([10.1, 10.3, 10.5, 10.7])
DATENUM = (TIME - np.datetime64("1970-01-01")) / np.timedelta64(1, "D") + 719529


def velocity(seed=0, land=True):
    """(time, y, x, 2), land in the south-west corner, one gap."""
    out = np.random.default_rng(seed).normal(0, 0.3, (FRAMES, Y, X, 2)).astype(np.float32)
    if land:
        out[:, 0, 0] = np.nan
        out[2, 1, 3] = np.nan
    return out


def fields(**other):
    content = {"velocity": velocity(), "lat": LAT, "lon": LON, "time": TIME} | other
    return Fields.create(**content)


def cf(u=None, v=None, units="m s-1", dims=("time", "lat", "lon"), names=("uo", "vo"), lat=LAT, lon=LON, time=TIME):
    """A plain data set as xarray users write it, with CF names only where they are needed."""
    data = velocity()
    u, v = data[..., 0] if u is None else u, data[..., 1] if v is None else v
    attributes = {"units": units}
    return xr.Dataset(
        {names[0]: (dims, u, attributes), names[1]: (dims, v, attributes)},
        {"time": time, "lat": ("lat", lat), "lon": ("lon", lon)},
    )


def saved(tmp_path, dataset, name="file.nc", **encoding):
    dataset.to_netcdf(tmp_path / name, engine="h5netcdf", encoding=encoding)
    return tmp_path / name


def assert_equal(one, other):
    for part in ("velocity", "ocean", "lat", "lon", "time"):
        a, b = getattr(one, part), getattr(other, part)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert one.hash() == other.hash()


def refused(path, message, **choice):
    with pytest.raises(InputError, match=message) as caught:
        readers.read(path, **choice)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


CURVED_LAT = LAT[:, None] + 0.01 * np.arange(X)
CURVED_LON = LON + 0.02 * np.arange(Y)[:, None]
WITH_EMPTY_OCEAN_CELL = np.ones((Y, X), bool)


class TestRoundTrip:
    @pytest.mark.parametrize("suffix", [".nc", ".zarr", ".npz"])
    @pytest.mark.parametrize(
        "change",
        [
            {},
            {"lat": CURVED_LAT, "lon": CURVED_LON},
            {"ocean": WITH_EMPTY_OCEAN_CELL},
            {"time": TIME + np.timedelta64(1, "ns") * np.arange(FRAMES)},
            {"time": TIME - np.timedelta64(60 * 365, "D") + np.timedelta64(7, "ms")},
            {"lat": np.array([-1.0, 0.0, 1.0]), "lon": np.array([178.0, 179.0, 180.0, 181.0])},
            {"velocity": velocity(1, land=False), "lon": np.array([-2.0, -1.0, 0.0, 1.0])},
        ],
        ids=["regular", "curvilinear", "empty-cell", "nanoseconds", "before-1970", "date-line", "no-land"],
    )
    def test_what_is_written_reads_back_equal(self, tmp_path, suffix, change):
        original = fields(**change)
        path = tmp_path / "new" / f"out{suffix}"
        readers.write(original, path)
        assert_equal(readers.read(path), original)
        assert os.listdir(path.parent) == [path.name]

    @pytest.mark.parametrize("suffix", [".nc", ".zarr", ".npz"])
    def test_a_second_writing_replaces_the_first(self, tmp_path, suffix):
        path = tmp_path / f"out{suffix}"
        readers.write(fields(velocity=velocity(7)), path)
        readers.write(fields(), path)
        assert_equal(readers.read(path), fields())
        assert os.listdir(tmp_path) == [path.name]

    @pytest.mark.parametrize("suffix", [".nc", ".zarr"])
    def test_other_programs_find_cf_names_units_dates_and_masks(self, tmp_path, suffix):
        path = tmp_path / f"out{suffix}"
        readers.write(fields(), path)
        opened = xr.open_dataset(path, engine="h5netcdf") if suffix == ".nc" else xr.open_zarr(path, chunks=None)
        with opened as dataset:
            assert dataset.attrs["Conventions"] == "CF-1.11"
            for name, direction, component in (("u", "eastward", 0), ("v", "northward", 1)):
                assert dataset[name].attrs["standard_name"] == f"{direction}_sea_water_velocity"
                assert dataset[name].attrs["units"] == "m s-1"
                assert dataset[name].dims == ("time", "lat", "lon")
                np.testing.assert_array_equal(dataset[name], velocity()[..., component])
            assert dataset["lat"].attrs["units"] == "degrees_north"
            assert dataset["lon"].attrs["units"] == "degrees_east"
            np.testing.assert_array_equal(dataset["lat"], LAT)
            np.testing.assert_array_equal(dataset["time"], TIME)
            np.testing.assert_array_equal(dataset["ocean"], fields().ocean)

    def test_npz_holds_plain_arrays_only(self, tmp_path):
        readers.write(fields(), tmp_path / "out.npz")
        with np.load(tmp_path / "out.npz", allow_pickle=False) as file:
            assert set(file.files) == {"u", "v", "lat", "lon", "time", "ocean"}
            np.testing.assert_array_equal(file["u"], velocity()[..., 0])
            assert file["time"].dtype == "datetime64[ns]"

    def test_the_name_is_that_of_the_file_or_the_given_one(self, tmp_path):
        readers.write(fields(), tmp_path / "out.npz")
        assert readers.read(tmp_path / "out.npz").name == "out.npz"
        assert readers.read(str(tmp_path / "out.npz"), name="Agulhas").name == "Agulhas"


class TestNetcdf:
    def test_a_plain_file_needs_names_only(self, tmp_path, caplog):
        got = readers.read(saved(tmp_path, cf()))
        assert caplog.messages == ["file.nc: 1.8 % of the values on ocean cells are missing"]
        assert_equal(got, fields())

    def test_netcdf3_is_read(self, tmp_path):
        cf().to_netcdf(tmp_path / "classic.nc", engine="scipy", format="NETCDF3_CLASSIC")
        assert_equal(readers.read(tmp_path / "classic.nc"), fields())

    def test_zarr_of_both_formats_is_read(self, tmp_path):
        for version in (2, 3):
            path = tmp_path / f"v{version}.zarr"
            cf().to_zarr(path, zarr_format=version, consolidated=False)
            assert_equal(readers.read(path), fields())

    def test_rows_run_north_and_columns_east(self, tmp_path):
        dataset = cf().isel(lat=slice(None, None, -1), lon=slice(None, None, -1))
        assert_equal(readers.read(saved(tmp_path, dataset)), fields())

    def test_curvilinear_grids_run_north_and_east_too(self, tmp_path):
        curved = cf(dims=("time", "y", "x"), names=("eastward_current", "northward_current")).drop_vars(["lat", "lon"])
        # The last of the longitudes are beyond the date line.
        lon = (CURVED_LON + 169.3 + 180) % 360 - 180
        curved = curved.assign_coords(lat=(("y", "x"), CURVED_LAT), lon=(("y", "x"), lon))
        expected = fields(lat=CURVED_LAT, lon=lon)
        assert_equal(readers.read(saved(tmp_path, curved)), expected)
        turned = curved.isel(y=slice(None, None, -1), x=slice(None, None, -1)).transpose("x", "time", "y")
        # Places keep the order of their axes, which is not that of the currents.
        turned = turned.assign({name: current.transpose("time", "y", "x") for name, current in turned.items()})
        assert turned["lat"].dims == ("x", "y")
        assert_equal(readers.read(saved(tmp_path, turned, "turned.nc")), expected)

    def test_axes_come_in_any_order_and_a_single_depth_goes(self, tmp_path):
        dataset = cf().expand_dims(depth=[0.5], axis=1).transpose("lon", "depth", "time", "lat")
        assert_equal(readers.read(saved(tmp_path, dataset)), fields())

    def test_a_mask_may_have_its_axes_in_another_order(self, tmp_path):
        ocean = np.ones((Y, X), bool)
        ocean[2, 3] = ocean[1, 0] = False
        mask = ocean.T.astype(np.int8), {"standard_name": "sea_binary_mask"}
        got = readers.read(
            saved(tmp_path, cf(*np.moveaxis(velocity(land=False), -1, 0)).assign(m=(("lon", "lat"), *mask)))
        )
        np.testing.assert_array_equal(got.ocean, ocean)

    def test_a_mask_turns_with_its_rows_and_columns(self, tmp_path):
        ocean = np.ones((Y, X), bool)
        ocean[2, 3] = ocean[1, 0] = False
        dataset = cf(*np.moveaxis(velocity(land=False), -1, 0))
        dataset["m"] = (("lat", "lon"), ocean.astype(np.int8), {"standard_name": "sea_binary_mask"})
        for turned in ({"lat": slice(None, None, -1)}, {"lon": slice(None, None, -1)}):
            got = readers.read(saved(tmp_path, dataset.isel(turned)))
            np.testing.assert_array_equal(got.ocean, ocean)
            np.testing.assert_array_equal(got.velocity[:, ocean], velocity(land=False)[:, ocean])

    def test_a_single_frame_may_have_a_scalar_time(self, tmp_path):
        got = readers.read(saved(tmp_path, cf().isel(time=0)))
        np.testing.assert_array_equal(got.velocity, velocity()[:1])
        np.testing.assert_array_equal(got.time, TIME[:1])

    @pytest.mark.parametrize("named", [True, False])
    @pytest.mark.parametrize("frames", [FRAMES, 1])
    def test_the_time_at_which_a_forecast_began_is_not_that_of_its_fields(self, tmp_path, frames, named):
        """As cfgrib writes them: `time` is when the forecast began and `valid_time` what it is for."""
        hours = (TIME - np.datetime64("2001-01-01")) / np.timedelta64(1, "h")
        units = {"units": "hours since 2001-01-01"}
        began = units | {"standard_name": "forecast_reference_time"}
        valid = units | ({"standard_name": "time"} if named else {})
        dataset = cf().assign_coords(
            time=("time", hours - 24, began), valid_time=("time", hours, valid), step=((), 24.0, {"units": "hours"})
        )
        if frames == 1:
            dataset = dataset.isel(time=0)
        got = readers.read(saved(tmp_path, dataset))
        np.testing.assert_array_equal(got.time, TIME[:frames])
        np.testing.assert_array_equal(got.velocity, velocity()[:frames])

    def test_a_reference_time_may_be_known_by_its_name_alone(self, tmp_path):
        units = {"units": "hours since 2001-01-01"}
        dataset = cf().isel(time=0, drop=True)
        for name, hour in (("forecast_reference_time", 0), ("valid_time", 30)):
            dataset = dataset.assign_coords({name: ((), hour, units)})
        assert readers.read(saved(tmp_path, dataset)).time == np.datetime64("2001-01-02T06")

    def test_an_axis_of_times_outranks_other_times_whatever_they_are_called(self, tmp_path):
        """Those of each frame that are no axis too, before one for all."""
        hours = {"units": "hours since 2001-02-03T06"}
        named = hours | {"standard_name": "time"}
        axis = cf().assign_coords(time=("time", 3.0 * np.arange(FRAMES), hours))
        other = axis.assign_coords(written=("time", 100.0 + np.arange(FRAMES), named))
        np.testing.assert_array_equal(readers.read(saved(tmp_path, other, "other.nc")).time, TIME)
        frames = axis.rename(time="when").swap_dims(when="frame").assign_coords(written=((), 100.0, named))
        np.testing.assert_array_equal(readers.read(saved(tmp_path, frames, "frames.nc")).time, TIME)

    def test_longitudes_pass_the_date_line_and_greenwich(self, tmp_path):
        west = np.array([178.5, 179.5, -179.5, -178.5])
        got = readers.read(saved(tmp_path, cf(lon=west)))
        np.testing.assert_array_equal(got.lon, [178.5, 179.5, 180.5, 181.5])
        np.testing.assert_array_equal(got.velocity, velocity())
        got = readers.read(saved(tmp_path, cf(lon=np.array([358.0, 359.0, 0.0, 1.0]))))
        np.testing.assert_array_equal(np.diff(got.lon), 1)
        np.testing.assert_array_equal(got.velocity, velocity())

    def test_packed_integers_are_unpacked(self, tmp_path):
        packing = {"dtype": "int16", "scale_factor": 0.001, "add_offset": 0.1, "_FillValue": -32767}
        got = readers.read(saved(tmp_path, cf(), uo=packing, vo=packing))
        np.testing.assert_allclose(got.velocity, velocity(), rtol=0, atol=0.00051)
        np.testing.assert_array_equal(got.ocean, fields().ocean)
        assert got.velocity.dtype == np.float32

    @pytest.mark.parametrize(
        ("limits", "low", "high"),
        [
            ({"valid_range": np.float32([-0.4, 0.3])}, -0.4, 0.3),
            ({"valid_min": np.float32(-0.2), "valid_max": np.float64(0.4)}, -0.2, 0.4),
            ({"valid_max": np.float32(0.25)}, -np.inf, 0.25),
            ({"valid_max": np.int16(1), "valid_range": np.float32([-0.1, 0.1])}, -0.1, 0.1),
            ({"valid_max": 1e60}, -np.inf, np.inf),
        ],
    )
    def test_values_outside_the_limits_of_their_variable_are_missing(self, tmp_path, caplog, limits, low, high):
        data = cf()
        data["uo"].attrs.update(limits)
        # Values on a limit are inside.
        edge = np.float32(high if np.isfinite(high) else 1)
        data["uo"][1, 1, 2] = edge
        u = data["uo"].values.copy()
        outside = (u < np.float32(low)) | (u > np.float32(high))
        got = readers.read(saved(tmp_path, data))
        expected = np.isnan(u) | outside
        np.testing.assert_array_equal(np.isnan(got.u), expected)
        np.testing.assert_array_equal(np.isnan(got.v), expected)
        assert got.u[1, 1, 2] == edge
        said = f"{outside.sum()} of {(~np.isnan(u)).sum()} values lie outside valid_"
        assert (said in caplog.text) == outside.any()

    @pytest.mark.parametrize("scale", [0.001, -0.001])
    @pytest.mark.parametrize(("unpacked", "kind"), [(False, np.int16), (True, np.float64)])
    def test_limits_of_packed_integers_are_packed_unless_they_are_of_another_type(
        self, tmp_path, scale, unpacked, kind
    ):
        packing = {"dtype": "int16", "scale_factor": scale, "add_offset": 0.1, "_FillValue": -32767}
        data = cf()
        data["uo"][1, 1, 1:3] = np.array([0.3, 0.301])
        limits = np.array([-200, 300]) / 1000
        packed = np.sort(np.rint((limits - 0.1) / scale))
        data["uo"].attrs["valid_range"] = (limits if unpacked else packed).astype(kind)
        u = data["uo"].values.copy()
        got = readers.read(saved(tmp_path, data, uo=packing, vo=packing))
        steps = np.rint((u - 0.1) / scale)
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(np.isnan(got.u), ~((steps >= packed[0]) & (steps <= packed[1])))
        assert list(np.isnan(got.u[1, 1, 1:3])) == [False, True]

    def test_limits_of_packed_floats_are_packed(self, tmp_path):
        packing = {"dtype": "float32", "scale_factor": 0.01, "add_offset": 0.1}
        data = cf()
        data["uo"].attrs["valid_range"] = np.float32([-25, 15])
        path = saved(tmp_path, data, uo=packing, vo=packing)
        with h5py.File(path) as file:
            stored = file["uo"][()]
        inside = (stored >= -25) & (stored <= 15)
        assert 0 < inside.sum() < np.isfinite(stored).sum()
        np.testing.assert_array_equal(~np.isnan(readers.read(path).u), inside)

    def test_limits_of_unsigned_bytes(self, tmp_path):
        u = np.broadcast_to(np.array([10, 100, 200, 250], np.uint8), (FRAMES, Y, X))
        data = cf(u=u.view(np.int8), v=np.zeros((FRAMES, Y, X), np.int8) + np.arange(1, 4, dtype=np.int8)[:, None])
        for name in ("uo", "vo"):
            data[name].attrs |= {"_Unsigned": "true", "scale_factor": 0.01}
        data["uo"].attrs["valid_range"] = np.array([20, 240], np.uint8).view(np.int8)
        got = readers.read(saved(tmp_path, data))
        np.testing.assert_allclose(got.u[0, 0], [np.nan, 1.0, 2.0, np.nan], rtol=1e-6)

    def test_limits_that_are_none_do_not_count_and_those_of_nothing_are_refused(self, tmp_path, caplog):
        data = cf()
        data["uo"].attrs["valid_range"] = "-2 to 2"
        assert_equal(readers.read(saved(tmp_path, data)), fields(name="file.nc"))
        assert "valid_range of uo is '-2 to 2', which is no limit" in caplog.text
        data["uo"].attrs["valid_range"] = [100.0, 200.0]
        with pytest.raises(InputError, match="every value lies outside valid_range of uo, 100 to 200 m s-1; correct"):
            readers.read(saved(tmp_path, data))

    @pytest.mark.parametrize(
        ("units", "factor"),
        [
            ("cm/s", 0.01),
            ("km/h", 1 / 3.6),
            ("cm s-1", 0.01),
            ("mms-1", 0.001),
            ("dm.s^-1", 0.1),
            ("km hour-1", 1 / 3.6),
            ("knots", 1852 / 3600),
            ("kt", 1852 / 3600),
            ("Centimeters per Second", 0.01),
        ],
    )
    def test_other_units_are_converted_with_a_notice(self, tmp_path, caplog, units, factor):
        u = velocity()[..., 0]
        path = saved(tmp_path, cf(u / np.float32(factor), velocity()[..., 1] / np.float32(factor), units))
        np.testing.assert_allclose(readers.read(path).u, u, rtol=1e-6)
        assert f"file.nc: uo is converted from {units} to m/s" in caplog.messages

    @pytest.mark.parametrize(
        "units",
        [
            *("m/s", "m s-1", "ms-1", "m.s-1", "m s**-1", "m s^-1", "m*s^{-1}", "m s⁻¹", "M/S", "m / s", "m/sec"),
            *("meter second-1", "meters/second", "metre per second", "metres sec^(-1)"),
        ],
    )
    def test_metres_per_second_have_many_spellings(self, tmp_path, caplog, units):
        assert_equal(readers.read(saved(tmp_path, cf(units=units))), fields())
        assert not [m for m in caplog.messages if "converted" in m]

    @pytest.mark.parametrize(
        "units", ["", "m", "degrees", "m s-2", "m-1 s-1", "m/s-1", "m2 s-1", "s m-1", "mph", "m s", "knot-1", "m s-10"]
    )
    def test_unknown_units_are_refused(self, tmp_path, units):
        has = f"the units {units!r}" if units else "no units"
        refused(saved(tmp_path, cf(units=units)), re.escape(f"file.nc: uo has {has}; expected m s-1"))

    def test_the_attribute_unit_is_understood(self, tmp_path):
        days = (TIME - np.datetime64("1900-01-01")) / np.timedelta64(1, "D")
        dataset = cf(time=days)
        for variable in dataset.variables.values():
            variable.attrs["Unit"] = variable.attrs.pop("units", "degrees")
        dataset["time"].attrs["Unit"] = "days since 1900-1-1"
        assert_equal(readers.read(saved(tmp_path, dataset)), fields())

    def test_fill_values_on_axes_are_no_fill_values(self, tmp_path):
        path = saved(tmp_path, cf(time=np.arange(FRAMES), lat=np.array([-1.0, 0.0, 1.0])))
        with h5py.File(path, "a") as file:
            file["time"].attrs["units"] = "hours since 2019-01-01"
            file["time"].attrs["_FillValue"] = file["time"].dtype.type(0)
            file["lat"].attrs["_FillValue"] = 0.0
        got = readers.read(path)
        assert got.time[0] == np.datetime64("2019-01-01")
        np.testing.assert_array_equal(got.lat, [-1, 0, 1])

    def test_several_fill_values_all_count(self, tmp_path):
        u = velocity()[..., 0].copy()
        u[3, 2, 2] = -999
        path = saved(tmp_path, cf(u), uo={"_FillValue": np.float32(9.97e36)})
        with h5py.File(path, "a") as file:
            file["uo"].attrs["missing_value"] = np.float32(-999)
        assert np.isnan(readers.read(path).velocity[3, 2, 2]).all()

    def test_standard_names_outrank_variable_names(self, tmp_path):
        dataset = cf(names=("a", "b"))
        dataset["a"].attrs["standard_name"] = "eastward_sea_water_velocity"
        dataset["b"].attrs["standard_name"] = "northward_sea_water_velocity"
        assert_equal(readers.read(saved(tmp_path, dataset)), fields())

    @pytest.mark.parametrize("names", [*cf_module.PAIRS, ("U", "V"), ("eastward_current", "northward_current")])
    def test_usual_names_are_known(self, tmp_path, names):
        assert_equal(readers.read(saved(tmp_path, cf(names=names))), fields())

    def test_winds_and_ice_are_no_currents(self, tmp_path):
        wind = cf(names=("u10", "v10"))
        wind["u10"].attrs["standard_name"], wind["v10"].attrs["standard_name"] = "eastward_wind", "northward_wind"
        ice = cf(names=("ui", "vi"))
        ice["ui"].attrs["standard_name"] = "eastward_sea_ice_velocity"
        ice["vi"].attrs["standard_name"] = "northward_sea_ice_velocity"
        refused(saved(tmp_path, xr.merge([wind, ice])), "no pair of velocities .* it has u10, v10, ui, vi")
        assert_equal(readers.read(saved(tmp_path, xr.merge([wind, ice, cf()]))), fields())

    def test_errors_of_velocities_and_means_over_depth_are_no_currents(self, tmp_path):
        dataset = xr.merge([cf(names=names) for names in (("a", "b"), ("c", "d"), ("e", "f"))])
        kinds = ("{}_sea_water_velocity", "{}_sea_water_velocity standard_error", "barotropic_{}_sea_water_velocity")
        for names, kind in zip(("ab", "cd", "ef"), kinds, strict=True):
            for name, direction in zip(names, ("eastward", "northward"), strict=True):
                dataset[name].attrs["standard_name"] = kind.format(direction)
        assert_equal(readers.read(saved(tmp_path, dataset)), fields())
        assert_equal(readers.read(saved(tmp_path, dataset[["e", "f"]], "mean.nc")), fields())

    def test_a_choice_settles_several_pairs(self, tmp_path):
        path = saved(tmp_path, xr.merge([cf(), cf(2 * velocity()[..., 0], names=("ugos", "vgos"))]))
        refused(path, r"several pairs of velocities, \(uo, vo\), \(ugos, vgos\); say which by u and v")
        assert_equal(readers.read(path, u="uo", v="vo"), fields())
        np.testing.assert_array_equal(readers.read(path, u="ugos", v="vgos").u, 2 * velocity()[..., 0])
        refused(path, "no variable 'east'; it has uo, vo, ugos, vgos", u="east", v="vo")
        refused(path, "give both u and v", u="uo")
        refused(path, "u and v are one variable, uo; it has uo, vo, ugos, vgos", u="uo", v="uo")

    def test_twice_the_same_standard_name_is_ambiguous(self, tmp_path):
        dataset = cf(names=("a", "b"))
        dataset["c"] = dataset["b"].copy()
        for name, standard in (("a", "eastward"), ("b", "northward"), ("c", "northward")):
            dataset[name].attrs["standard_name"] = f"{standard}_sea_water_velocity"
        refused(saved(tmp_path, dataset), r"\(a, b\), \(a, c\)")

    def test_a_regular_grid_may_have_two_dimensional_coordinates(self, tmp_path):
        lat, lon = np.meshgrid(LAT, LON, indexing="ij")
        dataset = cf(dims=("time", "y", "x")).drop_vars(["lat", "lon"])
        dataset = dataset.assign_coords(nav_lat=(("y", "x"), lat), nav_lon=(("y", "x"), lon))
        assert_equal(readers.read(saved(tmp_path, dataset)), fields())

    def test_a_grid_of_parallels_whose_columns_lean_is_not_regular(self, tmp_path):
        lat, lon = np.broadcast_arrays(LAT[:, None], CURVED_LON)
        dataset = cf(dims=("time", "y", "x")).drop_vars(["lat", "lon"])
        dataset = dataset.assign_coords(nav_lat=(("y", "x"), lat), nav_lon=(("y", "x"), lon))
        got = readers.read(saved(tmp_path, dataset), directions="east")
        assert_equal(got, fields(lat=np.array(lat), lon=np.array(lon)))

    def test_still_cells_of_a_file_without_gaps_are_land(self, tmp_path, caplog):
        still = velocity(land=False)
        still[:, 1, 2] = still[:, 2, 1, 0] = still[:, 2, 2, 1] = 0
        got = readers.read(saved(tmp_path, cf(still[..., 0], still[..., 1])))
        assert not got.ocean[1, 2]
        assert got.ocean.sum() == Y * X - 1
        assert "file.nc: 1 cells that are exactly zero in every frame count as land" in caplog.messages


class TestChoices:
    """What a file leaves open and the caller says."""

    def deep(self, depth=(0.5, 10.0, 30.0), **attributes):
        """Velocities that are multiplied by 1, 2, 3 from level to level."""
        data = velocity()
        layers = [data * k for k in range(1, len(depth) + 1)]
        u, v = (np.stack([x[..., c] for x in layers], 1) for c in (0, 1))
        dataset = cf(u, v, dims=("time", "depth", "lat", "lon"))
        return dataset.assign_coords(depth=("depth", np.array(depth), {"units": "m"} | attributes))

    @pytest.mark.parametrize(
        ("depth", "attributes", "asked", "factor"),
        [
            ((0.5, 10.0, 30.0), {"positive": "down"}, None, 1),
            ((30.0, 10.0, 0.5), {"positive": "down"}, None, 3),
            ((-30.0, -10.0, -0.5), {"positive": "up"}, None, 3),
            ((-0.5, -10.0, -30.0), {}, None, 1),
            ((0.5, 10.0, 30.0), {}, 0, 1),
            ((0.5, 10.0, 30.0), {}, 12, 2),
            ((0.5, 10.0, 30.0), {}, 39.5, 3),
            ((-30.0, -10.0, -0.5), {"positive": "up"}, 35, 1),
            ((1.0, 10.0, 20.0), {"standard_name": "height"}, None, 3),
        ],
    )
    def test_the_nearest_level_or_the_surface(self, tmp_path, depth, attributes, asked, factor):
        got = readers.read(saved(tmp_path, self.deep(depth, **attributes)), depth=asked)
        np.testing.assert_allclose(got.velocity, factor * velocity(), rtol=1e-6)

    def test_flags_are_those_of_the_level_that_is_taken(self, tmp_path):
        dataset, flag = self.deep(), np.zeros((FRAMES, 3, Y, X), np.int8)
        flag[1, 1, 2, 2] = 4
        meanings = {"flag_values": np.array([1, 4], np.int8), "flag_meanings": "good bad"}
        dataset["uo_qc"] = (("time", "depth", "lat", "lon"), flag, meanings)
        dataset["uo"].attrs["ancillary_variables"] = "uo_qc"
        path = saved(tmp_path, dataset)
        for level, lost in ((0, False), (1, True), (2, False)):
            assert np.isnan(readers.read(path, level=level).u[1, 2, 2]) == lost

    def test_the_surface_is_taken_with_a_notice(self, tmp_path, caplog):
        readers.read(saved(tmp_path, self.deep()))
        assert (
            "file.nc: the uppermost level 0 of depth (0.5 m) of 3 is read; depth or level chooses another"
            in caplog.messages
        )

    def test_a_level_far_below_a_depth_does_not_stand_for_it(self, tmp_path):
        path = saved(tmp_path, self.deep((100.0, 120.0, 160.0)))
        np.testing.assert_array_equal(readers.read(path, depth=90).velocity, readers.read(path, level=0).velocity)
        refused(path, "a depth of 89 m is outside uo, which has 100 to 160 m", depth=89)
        one = saved(tmp_path, self.deep((5.0, 20.0, 30.0)).isel(depth=[0]), "one.nc")
        assert readers.read(one, depth=0.5).velocity.shape == readers.read(path).velocity.shape
        refused(saved(tmp_path, self.deep((6.0, 20.0, 30.0)).isel(depth=[0]), "one.nc"), "6 m only", depth=0.5)

    def test_levels_without_metres_are_chosen_by_number(self, tmp_path):
        dataset = self.deep((-0.9, -0.5, -0.1), units="1", standard_name="ocean_s_coordinate_g2")
        path = saved(tmp_path, dataset.rename(depth="s_rho"))
        np.testing.assert_allclose(readers.read(path).velocity, 3 * velocity(), rtol=1e-6)
        np.testing.assert_allclose(readers.read(path, level=1).velocity, 2 * velocity(), rtol=1e-6)
        refused(path, "the levels of uo along s_rho are not in metres, so choose by level=", depth=10)

    @pytest.mark.parametrize(
        ("choice", "message"),
        [
            ({"depth": 100}, "file.nc: a depth of 100 m is outside uo, which has 0.5 to 30 m"),
            ({"depth": -1}, "a depth of -1 m is outside uo"),
            # Half a layer below the last level, which is 20 m thick, is still its own.
            ({"depth": 40.5}, "a depth of 40.5 m is outside uo"),
            ({"level": 1, "depth": 5}, "file.nc: give a depth or a level, not both"),
            ({"level": 3}, "level 3 of depth does not exist; uo has the levels 0 to 2"),
            ({"time": "2001-01-01"}, "the times in time have dates of their own; leave time=2001-01-01 out"),
            ({"v_path": "nowhere.nc"}, "cannot read nowhere.nc: No such file"),
            ({"grid": "nowhere.nc"}, "cannot read nowhere.nc: No such file"),
            ({"grid": readers.RAM_HEAD}, "is neither NetCDF nor Zarr, as file.nc is"),
        ],
    )
    def test_impossible_choices_are_refused(self, tmp_path, choice, message):
        refused(saved(tmp_path, self.deep()), message, **choice)

    def test_choices_that_go_with_other_files_are_refused(self, tmp_path):
        refused(saved(tmp_path, cf()), r"uo \(time=5, lat=3, lon=4\) has no vertical axis", depth=5)
        readers.write(fields(), tmp_path / "out.npz")
        refused(tmp_path / "out.npz", "depth goes with NetCDF and Zarr", depth=5)
        refused(tmp_path / "out.npz", "v_path goes with NetCDF and Zarr", v_path=tmp_path / "out.npz")

    @pytest.mark.parametrize(("units", "step"), [("second", 1), ("hours", 3600), ("days", 86400)])
    def test_times_that_count_from_no_date(self, tmp_path, units, step):
        path = saved(tmp_path, cf(time=("time", np.arange(FRAMES) * 1.0, {"units": units})))
        got = readers.read(path, time="2005-03-01")
        np.testing.assert_array_equal(got.time, np.datetime64("2005-03-01", "s") + step * np.arange(FRAMES))
        refused(path, f"count '{units}' from no date; say from which by time, such as 2000-01-01")
        refused(path, "the time 'spring' is no date such as 2000-01-01", time="spring")

    def test_a_frame_without_time_takes_the_given_one_or_its_name(self, tmp_path, caplog):
        dataset = cf().isel(time=0, drop=True)
        path = saved(tmp_path, dataset)
        assert readers.read(path, time="2005-03-01T12:00").time == np.datetime64("2005-03-01T12:00")
        assert readers.read(path, time="2005-03-01T12:00+02:00").time == np.datetime64("2005-03-01T10:00")
        refused(path, r"no time found for uo \(lat=3, lon=4\); give it by time, such as 2000-01-01T12:00")
        for name in ("currents_20040229.nc", "2004-02-29_currents.nc"):
            assert readers.read(saved(tmp_path, dataset, name)).time == np.datetime64("2004-02-29")
        assert (
            "currents_20040229.nc: no time axis; the date in its name, 2004-02-29T00:00:00, is taken" in caplog.messages
        )
        refused(saved(tmp_path, dataset, "20040229_20040301.nc"), "no time found")

    @pytest.mark.parametrize(
        ("name", "time"),
        [
            ("roms_20200104_0600.nc", "06:00:00"),
            ("cur_20200104T060000Z.nc", "06:00:00"),
            ("cur_2020-01-04T06.nc", "06:00:00"),
            ("wrf_2020-01-04_18:30:15", "18:30:15"),
            ("cur_2020_01_04_18-30-15.nc", "18:30:15"),
            ("20200104t2359_v2.nc", "23:59:00"),
            ("cur_20200104_0600_utm33.nc", "06:00:00"),
            ("cur_20200104_12.nc", "00:00:00"),
            ("cur_20200104_0600m.nc", "00:00:00"),
            ("cur_20200104_2500.nc", "00:00:00"),
        ],
    )
    def test_an_hour_behind_the_date_in_the_name_counts(self, tmp_path, caplog, name, time):
        got = readers.read(saved(tmp_path, cf().isel(time=0, drop=True), name))
        assert got.time == np.datetime64(f"2020-01-04T{time}")
        assert f"{name}: no time axis; the date in its name, 2020-01-04T{time}, is taken" in caplog.messages

    def test_frames_without_a_time_or_any_value_are_left_out(self, tmp_path, caplog):
        hours = np.arange(FRAMES) * 3.0
        hours[1] = np.nan
        path = saved(tmp_path, cf(time=("time", hours, {"units": "hours since 2001-02-03T06:00"})))
        np.testing.assert_array_equal(readers.read(path).velocity, velocity()[[0, 2, 3, 4]])
        assert "file.nc: 1 of 5 frames have no time and are left out" in caplog.messages
        u = np.where(np.arange(FRAMES) == 3, np.nan, 1)[:, None, None] * velocity()[..., 0]
        got = readers.read(saved(tmp_path, cf(u), "empty.nc"))
        np.testing.assert_array_equal(got.time, TIME[[0, 1, 2, 4]])
        assert any("1 of 5 frames, that of 2001-02-03T15:00:00, is without any value" in m for m in caplog.messages)


class TestQualityFlags:
    def flagged(self, flags, **attributes):
        dataset = cf(velocity(land=False)[..., 0], velocity(land=False)[..., 1])
        dataset["primary_flag"] = (("time", "lat", "lon"), flags, attributes)
        for name in ("uo", "vo"):
            dataset[name].attrs["ancillary_variables"] = "primary_flag"
        return dataset

    @pytest.mark.parametrize(
        ("meanings", "attributes", "bad"),
        [
            ("pass not_evaluated suspect fail missing", {"flag_values": np.array([1, 2, 3, 4, 9], np.int8)}, (3, 4, 9)),
            ("good_data probably_good_data bad_data", {"flag_values": np.array([1, 2, 4], np.int8)}, (4,)),
            ("speed_failed no_error_estimate interpolated", {"flag_masks": np.array([1, 4, 8], np.int8)}, ()),
        ],
    )
    def test_what_they_call_bad_is_missing(self, tmp_path, caplog, meanings, attributes, bad):
        flags = np.random.default_rng(0).choice(np.array([1, 2, 3, 4, 8, 9], np.int8), (FRAMES, Y, X))
        hidden = flags & 1 > 0 if "flag_masks" in attributes else np.isin(flags, bad)
        got = readers.read(saved(tmp_path, self.flagged(flags, flag_meanings=meanings, **attributes)))
        np.testing.assert_array_equal(np.isnan(got.u), hidden)
        np.testing.assert_array_equal(got.u[~hidden], velocity(land=False)[..., 0][~hidden])
        assert any(f"{hidden.sum()} values that primary_flag calls" in m for m in caplog.messages)

    @pytest.mark.parametrize("codes", ["0b, 1b, 4b", "0 1 4", b"0UB,1UB,4UB", ["0", "1", "4"]])
    def test_codes_may_be_written_as_text(self, tmp_path, codes):
        flags = np.random.default_rng(1).choice(np.array([0, 1, 4], np.int8), (FRAMES, Y, X))
        got = readers.read(saved(tmp_path, self.flagged(flags, flag_values=codes, flag_meanings="no_qc good bad_data")))
        np.testing.assert_array_equal(np.isnan(got.u), flags == 4)
        masks = self.flagged(flags, flag_masks="1b, 4b", flag_meanings="interpolated failed")
        np.testing.assert_array_equal(np.isnan(readers.read(saved(tmp_path, masks, "masks.nc")).u), flags == 4)

    @pytest.mark.parametrize(
        "attributes",
        [
            {"flag_values": np.array([0, 1], np.int8), "flag_meanings": "good doubtful bad"},
            {"flag_values": "good is 0", "flag_meanings": "good doubtful bad"},
            {"flag_meanings": "good bad"},
            {"standard_name": "status_flag"},
        ],
    )
    def test_a_flag_that_cannot_be_read_is_said(self, tmp_path, caplog, attributes):
        flags = np.full((FRAMES, Y, X), 1, np.int8)
        assert readers.read(saved(tmp_path, self.flagged(flags, **attributes))).gaps == 0
        said = "file.nc: primary_flag looks like a quality flag but cannot be read and does not count"
        assert said in caplog.messages

    def test_errors_beside_the_velocities_are_no_flags(self, tmp_path, caplog):
        readers.read(saved(tmp_path, self.flagged(np.full((FRAMES, Y, X), 0.1), units="m s-1")))
        assert not caplog.messages

    def test_a_mask_with_a_value_asks_for_these_bits_to_be_this_number(self, tmp_path):
        """Two bits together, of four meanings (CF-1.11, example 3.5), beside a bit of another meaning."""
        flags = np.random.default_rng(2).integers(0, 8, (FRAMES, Y, X)).astype(np.int8)
        attributes = {
            "flag_masks": np.array([3, 3, 3, 3, 4], np.int8),
            "flag_values": np.array([0, 1, 2, 3, 4], np.int8),
            "flag_meanings": "good probably_good probably_bad fine interpolated",
        }
        got = readers.read(saved(tmp_path, self.flagged(flags, **attributes)))
        np.testing.assert_array_equal(np.isnan(got.u), flags % 4 == 2)

    def test_a_flag_that_is_missing_calls_nothing_bad(self, tmp_path):
        flags = np.random.default_rng(3).choice([0.0, 1.0, np.nan], (FRAMES, Y, X))
        attributes = {"flag_values": np.array([0, 1], np.int8), "flag_meanings": "bad good"}
        got = readers.read(saved(tmp_path, self.flagged(flags, **attributes)))
        np.testing.assert_array_equal(np.isnan(got.u), flags == 0)

    def test_flags_of_other_variables_do_not_count(self, tmp_path):
        flags = np.full((FRAMES, Y, X), 4, np.int8)
        dataset = self.flagged(flags, flag_meanings="good bad", flag_values=np.array([1, 4], np.int8))
        dataset = dataset.rename(primary_flag="sst_qc")
        dataset["sst"] = (("time", "lat", "lon"), velocity()[..., 0], {"ancillary_variables": "sst_qc"})
        for name in ("uo", "vo"):
            del dataset[name].attrs["ancillary_variables"]
        assert not readers.read(saved(tmp_path, dataset)).gaps

    @pytest.mark.parametrize("name", ["state", "flag", "PRIM"])
    def test_meanings_of_quality_count_under_any_name(self, tmp_path, caplog, name):
        flags = np.random.default_rng(4).choice(np.array([1, 4], np.int8), (FRAMES, Y, X))
        dataset = self.flagged(flags, flag_meanings="good bad", flag_values=np.array([1, 4], np.int8))
        dataset = dataset.rename(primary_flag=name)
        for component in ("uo", "vo"):
            del dataset[component].attrs["ancillary_variables"]
        got = readers.read(saved(tmp_path, dataset))
        np.testing.assert_array_equal(np.isnan(got.u), flags == 4)
        assert any(f"{(flags == 4).sum()} values that {name} calls bad count as missing" in m for m in caplog.messages)
        dataset[name].attrs["flag_meanings"] = "coast open_sea"
        assert not readers.read(saved(tmp_path, dataset, "other.nc")).gaps


class TestSeries:
    def parts(self, tmp_path, suffix="nc"):
        whole, paths = cf(), []
        for i, frames in enumerate((slice(3, 5), slice(0, 3))):
            paths.append(tmp_path / f"part{i}.{suffix}")
            part = whole.isel(time=frames)
            part.to_zarr(paths[-1], zarr_format=2, consolidated=False) if suffix == "zarr" else saved(
                tmp_path, part, paths[-1].name
            )
        return paths

    @pytest.mark.parametrize("suffix", ["nc", "zarr"])
    def test_files_become_one_series_in_the_order_of_time(self, tmp_path, suffix):
        paths = self.parts(tmp_path, suffix)
        for path in (paths, str(tmp_path / "part*"), [tmp_path / "part[01].*"], tuple(map(str, paths))):
            assert_equal(readers.read(path), fields())

    def test_frames_in_two_files_are_read_once(self, tmp_path, caplog):
        paths = [*self.parts(tmp_path), saved(tmp_path, cf().isel(time=slice(2, 4)), "between.nc")]
        assert_equal(readers.read(paths), fields())
        assert any("2 frames of between.nc and others are in several files" in m for m in caplog.messages)

    def test_a_cell_that_is_sea_in_one_file_is_sea(self, tmp_path):
        """As on a bank that falls dry."""
        for number, dry in enumerate([(2, 3), (1, 0)]):
            data, sea = velocity(land=False), np.ones((Y, X), np.int8)
            data[:, *dry] = data[:, 0, 0] = np.nan
            sea[dry] = sea[0, 0] = 0
            part = cf(data[..., 0], data[..., 1]).assign(m=(("lat", "lon"), sea, {"standard_name": "sea_binary_mask"}))
            saved(tmp_path, part.isel(time=[2 * number, 2 * number + 1]), f"part{number}.nc")
        got = readers.read(tmp_path / "part*.nc")
        np.testing.assert_array_equal(np.argwhere(~got.ocean), [[0, 0]])
        np.testing.assert_array_equal(np.argwhere(np.isnan(got.u[:, 1:])), [[0, 1, 3], [1, 1, 3], [2, 0, 0], [3, 0, 0]])

    def test_frames_that_contradict_each_other_are_refused(self, tmp_path):
        other = cf(2 * velocity()[..., 0]).isel(time=slice(2, 4))
        paths = [*self.parts(tmp_path), saved(tmp_path, other, "other.nc")]
        refused(paths, "part1.nc and other.nc both hold 2001-02-03T12:00:00, with other values; leave one out")

    def test_what_another_frame_holds_contradicts_that_of_the_same_time_too(self, tmp_path):
        """The last file is of the time of one frame and has the values of another."""
        wrong = cf().isel(time=[0]).assign_coords(time=TIME[3:4])
        refused([*self.parts(tmp_path), saved(tmp_path, wrong, "wrong.nc")], "wrong.nc both hold .*, with other values")

    def test_a_copy_under_another_date_is_left_out(self, tmp_path, caplog):
        copy = cf().isel(time=[0]).assign_coords(time=[np.datetime64("2002-02-03", "ns")])
        assert_equal(readers.read([*self.parts(tmp_path), saved(tmp_path, copy, "copy.nc")]), fields())
        assert any("2002-02-03T00:00:00 in copy.nc repeats 2001-02-03T06:00:00" in m for m in caplog.messages)

    def test_notices_are_said_once_for_all_files(self, tmp_path, caplog):
        for i in range(3):
            saved(tmp_path, cf(units="cm/s").isel(time=[i]), f"day{i}.nc")
        readers.read(tmp_path / "day*.nc")
        assert sum("is converted from cm/s" in m for m in caplog.messages) == 2
        assert "day0.nc and 2 more: uo is converted from cm/s to m/s (in 3 files)" in caplog.messages

    def test_files_may_count_their_longitudes_apart(self, tmp_path):
        west = saved(tmp_path, cf(lon=LON - 360).isel(time=slice(3, None)), "west.nc")
        assert_equal(readers.read([saved(tmp_path, cf().isel(time=slice(0, 3)), "east.nc"), west]), fields())

    def test_a_lost_standard_name_does_not_part_a_pair(self, tmp_path):
        dataset = cf()
        dataset["uo"].attrs["standard_name"] = "eastward_sea_water_velocity"
        assert_equal(readers.read(saved(tmp_path, dataset)), fields())
        dataset["vo"].attrs["standard_name"] = "northward_wind"
        refused(saved(tmp_path, dataset), "has no pair of velocities")

    def test_a_workbook_is_called_so(self, tmp_path):
        (tmp_path / "table.xlsx").write_bytes(b"PK\x03\x04" + bytes(100))
        refused(tmp_path / "table.xlsx", "table.xlsx is a workbook; save its sheet as CSV")

    def test_other_grids_and_no_files_are_refused(self, tmp_path):
        paths = [*self.parts(tmp_path), saved(tmp_path, cf(lat=LAT + 1), "north.nc")]
        refused(paths, "north.nc lies on another grid than part0.nc; a series needs one grid")
        refused(tmp_path / "none*.nc", "no file matches .*none")
        refused([], "no file to read: the list is empty")
        refused([*self.parts(tmp_path), tmp_path / "none.nc"], "cannot read .*none.nc: No such file")

    def test_the_four_globcurrent_files(self, shared, caplog):
        folder = shared / "data/real"
        got = readers.read(folder / "globcurrent_daily/*.nc")
        year = readers.read(folder / "globcurrent_agulhas_2002_daily.npz")
        assert_equal(got, year.select(slice(0, 3)))
        assert any("2003-01-01T00:00:00 in 20030101" in m and "repeats 2002-01-01" in m for m in caplog.messages)


class TestMeshes:
    @pytest.mark.parametrize("dim", ["nMesh2_face", "nele", "node", "ncells", "nod2", "nSCHISM_hgrid_node", "mesh"])
    def test_they_are_refused_with_a_way_out(self, tmp_path, dim):
        values = velocity()[:, 0, :, 0]
        dataset = xr.Dataset(
            {n: (("time", dim), values, {"units": "m/s"}) for n in ("u", "v")},
            {
                "time": TIME,
                "lonc": (dim, LON, {"units": "degrees_east"}),
                "latc": (dim, LON, {"units": "degrees_north"}),
            },
        )
        if dim == "mesh":
            dataset["topology"] = ((), 0, {"cf_role": "mesh_topology"})
        refused(saved(tmp_path, dataset), "lie on an unstructured mesh .*interpolate them to a regular grid first")


class TestPlainArrays:
    def matlab(self, **other):
        u, v = velocity()[..., 0].T.astype(float), velocity()[..., 1].T.astype(float)
        return {"u": u, "v": v, "ocean_time": DATENUM[:, None], "lat": LAT[:, None], "lon": LON[None], **other}

    def write(self, path, arrays):
        """As MATLAB writes: 7.3 is HDF5 with a header of 512 bytes and every array transposed."""
        if path.stem == "v5":
            scipy.io.savemat(path, arrays)
            return path
        with h5py.File(path, "w", userblock_size=512) as file:
            for key, x in arrays.items():
                file[key] = np.asarray(x).T
        with path.open("r+b") as file:
            file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(116) + bytes(8) + b"\x00\x02IM")
        return path

    @pytest.mark.parametrize("version", ["v5", "v73"])
    def test_matlab_arrays_run_x_y_time(self, tmp_path, version):
        path = self.write(tmp_path / f"{version}.mat", self.matlab())
        assert_equal(readers.read(path), fields())

    @pytest.mark.parametrize("version", ["v5", "v73"])
    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("square", [False, True])
    def test_matlab_coordinates_may_be_meshes_of_either_order(self, tmp_path, caplog, version, transposed, square):
        columns = slice(0, Y) if square else slice(None)
        mesh = np.meshgrid(LAT, LON[columns], indexing="ij")
        lat, lon = (a.T for a in mesh) if transposed else mesh
        arrays = self.matlab(lat=lat, lon=lon)
        arrays |= {"u": arrays["u"][columns], "v": arrays["v"][columns]}
        got = readers.read(self.write(tmp_path / f"{version}.mat", arrays))
        assert_equal(got, fields(velocity=velocity()[:, :, columns], lon=LON[columns]))
        said = f"{version}.mat: its square grid does not tell x from y; u and v are taken as (x, y, time)"
        assert (said in caplog.messages) == square

    def test_datenums_of_any_minute_are_exact(self, tmp_path):
        """As fractions of a day they are rounded, up or down."""
        time = TIME[0] + np.array([7, 20, 40, 71, 77]) * np.timedelta64(1, "m")
        days = (time - np.datetime64("1970-01-01")) / np.timedelta64(1, "D") + 719529
        np.testing.assert_array_equal(
            readers.read(self.write(tmp_path / "v5.mat", self.matlab(ocean_time=days))).time, time
        )

    def test_other_names_can_be_chosen(self, tmp_path):
        arrays = self.matlab()
        arrays |= {"east": arrays.pop("u"), "north": arrays.pop("v")}
        path = self.write(tmp_path / "v5.mat", arrays)
        assert_equal(readers.read(path, u="east", v="north"), fields())
        refused(path, r"v5.mat has no u, v; it has ocean_time \(5, 1\), lat")

    def test_the_ram_head_grid_is_known_by_its_shape(self, tmp_path, caplog):
        u = np.random.default_rng(0).normal(0, 0.1, (94, 44, 3))
        path = self.write(tmp_path / "v5.mat", {"u": u, "v": u[::-1], "ocean_time": DATENUM[:3]})
        got = readers.read(path)
        with np.load(readers.RAM_HEAD) as grid:
            np.testing.assert_array_equal(got.lat, grid["lat"])
            np.testing.assert_array_equal(got.lon, grid["lon"])
        np.testing.assert_array_equal(got.u, u.T.astype(np.float32))
        assert "v5.mat: no lat and lon; its grid of 44 x 94 cells is taken to be Ram Head's" in caplog.messages

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"ocean_time": np.arange(FRAMES) * 3600.0}, "cannot be decoded; expected MATLAB datenums"),
            ({"ocean_time": np.full(FRAMES, np.nan)}, "cannot be decoded; expected MATLAB datenums"),
            ({"ocean_time": DATENUM[::-1]}, "time must increase"),
            ({"ocean_time": DATENUM[:3]}, "3 times for 5 frames"),
            ({"ocean_time": np.zeros(0)}, "0 times for 5 frames"),
            ({"u": np.zeros((X, Y))}, r"u is \(4, 3\); expected three axes \(x, y, time\)"),
            ({"v": np.zeros((X, Y + 1, FRAMES))}, r"u is \(5, 3, 4\) and v is \(5, 4, 4\); they must be equal"),
            ({"lat": np.zeros(7)}, r"latitude \(7,\) and longitude \(4,\) do not fit"),
            ({"lat": np.array(3.0)}, r"latitude \(1,\) and longitude \(4,\) do not fit"),
        ],
    )
    @pytest.mark.parametrize("version", ["v5", "v73"])
    def test_bad_matlab_files_are_refused(self, tmp_path, change, message, version):
        refused(self.write(tmp_path / f"{version}.mat", self.matlab(**change)), message)

    def test_an_unknown_grid_is_refused(self, tmp_path):
        arrays = self.matlab()
        del arrays["lat"]
        refused(self.write(tmp_path / "v5.mat", arrays), "has no lat and lon, and its grid of 3 x 4 cells is not known")

    @pytest.mark.parametrize("protocol", [0, 2, 4, 5])
    def test_pickles_of_named_or_listed_arrays_are_read(self, tmp_path, protocol):
        arrays = self.matlab(note="no array", times=[1, 2.5, None])
        for content in (arrays, [arrays[k] for k in ("u", "v", "ocean_time", "lat", "lon")]):
            (tmp_path / "file.pickle").write_bytes(pickle.dumps(content, protocol))
            assert_equal(readers.read(tmp_path / "file.pickle"), fields())

    def test_pickles_of_another_byte_order_and_of_dates_in_steps_are_read(self, tmp_path):
        arrays = self.matlab(ocean_time=TIME.astype("datetime64[3h]"))
        content = {key: x.astype(x.dtype.newbyteorder(">")) for key, x in arrays.items()}
        (tmp_path / "file.pickle").write_bytes(pickle.dumps(content))
        assert_equal(readers.read(tmp_path / "file.pickle"), fields())

    def test_pickles_of_python_2_are_read(self, tmp_path):
        content = b"(dp0\n"
        for key, x in self.matlab().items():
            data = repr(x.tobytes(order="F"))[1:].encode()
            shape = b"".join(b"I%d\n" % n for n in x.shape)
            content += b"S'%b'\ncnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR" % key.encode()
            content += b"(I1\n(%btcnumpy\ndtype\n(S'f8'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI01\nS" % shape
            content += data + b"\ntbs"
        (tmp_path / "file.pickle").write_bytes(content + b".")
        assert_equal(readers.read(tmp_path / "file.pickle"), fields())

    @pytest.mark.parametrize("axes", [(0, 1, 2, 3), (2, 1, 3, 0), (0, 3, 1, 2)])
    def test_pickles_of_velocity_stacks_are_read(self, tmp_path, axes, caplog):
        x = np.random.default_rng(0).normal(0, 0.1, (6, 44, 94, 2)).astype(np.float32)
        parts = (x[:4].transpose(axes), x[4:].transpose(axes))
        (tmp_path / "file.pickle").write_bytes(pickle.dumps(parts))
        got = readers.read(tmp_path / "file.pickle")
        np.testing.assert_array_equal(got.velocity, x)
        np.testing.assert_array_equal(np.diff(got.time), np.timedelta64(1, "h"))
        assert any("no times; its 4 + 2 frames are taken as hourly" in m for m in caplog.messages)

    @pytest.mark.parametrize("protocol", [0, 2, 4, 5])
    @pytest.mark.parametrize(
        "call", [(os.system, "touch {}"), (eval, "open('{}', 'w')"), (os.mkdir, "{}"), (np.save, "{}", 1)]
    )
    def test_a_hostile_pickle_runs_nothing(self, tmp_path, call, protocol):
        trace = tmp_path / "trace"
        function, *arguments = call

        class Hostile:
            def __reduce__(self):
                return function, tuple(a.format(trace) if isinstance(a, str) else a for a in arguments)

        path = tmp_path / "file.pickle"
        path.write_bytes(pickle.dumps({**self.matlab(), "extra": Hostile()}, protocol))
        refused(path, f"refers to .*{function.__name__}; only NumPy arrays")
        assert sorted(os.listdir(tmp_path)) == ["file.pickle"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"\x80\x04ccopyreg\n_reconstructor\n.", "refers to copyreg._reconstructor"),
            (b"\x80\x04cbuiltins\ngetattr\n.", "refers to builtins.getattr"),
            (b"\x80\x04cnumpy\nload\n.", "refers to numpy.load"),
            (b"\x80\x04cnumpy\nsetbufsize\n.", "refers to numpy.setbufsize"),
            (b"\x80\x04cnumpy\nndarray.tofile\n.", "refers to numpy.ndarray.tofile"),
            (pickle.dumps(3.0), "holds no NumPy arrays"),
            (pickle.dumps(["a", "b"]), "holds no NumPy arrays"),
            (pickle.dumps([np.zeros(3)] * 6), "holds 6 arrays; expected u, v, ocean_time, lat, lon"),
            (pickle.dumps([np.array([None])]), "holds no NumPy arrays"),
            (pickle.dumps([np.zeros((3, 5, 5, 2))]), r"an array of \(3, 5, 5, 2\) .*; expected \(time, y, x, 2\) or"),
            (
                pickle.dumps([np.ones((3, 44, 94, 2)), np.ones((3, 44, 90, 2))]),
                r"an array of \(3, 44, 90, 2\) .* 44 x 94 cells",
            ),
            (pickle.dumps({}), "has no u, v, ocean_time; it has no arrays"),
            (pickle.dumps({"u": np.zeros(3)})[:-20], "cannot read"),
            (b"not a pickle", "cannot read"),
        ],
    )
    def test_other_pickles_are_refused(self, tmp_path, content, message):
        (tmp_path / "file.pickle").write_bytes(content)
        refused(tmp_path / "file.pickle", message)

    def npz(self, tmp_path, **change):
        arrays = {"u": velocity()[..., 0], "v": velocity()[..., 1], "lat": LAT, "lon": LON, "time": TIME} | change
        np.savez(tmp_path / "file.npz", **{key: x for key, x in arrays.items() if x is not None})
        return tmp_path / "file.npz"

    def test_a_frame_with_values_on_land_alone_is_left_out(self, tmp_path, caplog):
        data, ocean = velocity(land=False), np.ones((Y, X), bool)
        ocean[0, 0] = False
        data[2, ocean] = np.nan
        got = readers.read(self.npz(tmp_path, u=data[..., 0], v=data[..., 1], ocean=ocean))
        np.testing.assert_array_equal(got.time, np.delete(TIME, 2))
        np.testing.assert_array_equal(got.velocity[:, ocean], np.delete(data, 2, 0)[:, ocean])
        assert "1 of 5 frames, that of 2001-02-03T12:00:00, is without any value and left out" in caplog.text

    def test_npz_takes_dates_text_and_a_mask(self, tmp_path):
        assert_equal(readers.read(self.npz(tmp_path)), fields())
        assert_equal(readers.read(self.npz(tmp_path, time=TIME.astype("datetime64[h]"))), fields())
        assert_equal(readers.read(self.npz(tmp_path, time=TIME.astype(str))), fields())
        zoned = np.char.add(np.datetime_as_string(TIME + np.timedelta64(2, "h"), "s"), "+02:00")
        assert_equal(readers.read(self.npz(tmp_path, time=zoned)), fields())
        land = np.zeros((Y, X), bool)
        land[1, 2] = True
        assert_equal(readers.read(self.npz(tmp_path, land=land)), fields(ocean=~land))
        assert_equal(readers.read(self.npz(tmp_path, land=land, lat=LAT[::-1])), flipped(ocean=~land))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"v": None, "time": None}, "file.npz has no v, time; it has u, lat, lon"),
            ({"v": velocity()[:, 1:, :, 1]}, r"u is \(5, 3, 4\) and v is \(5, 2, 4\); they must be equal"),
            ({"u": velocity()[0, ..., 0], "v": velocity()[0, ..., 0]}, r"u has 2 dimensions \(3, 4\)"),
            ({"u": np.full((FRAMES, Y, X), "a")}, "u must hold numbers, got <U1"),
            ({"lat": np.array(["a", "b", "c"])}, "lat must hold numbers, got <U1"),
            ({"lat": np.array(3.0)}, r"latitude \(1,\) and longitude \(4,\) do not fit"),
            ({"u": np.full((FRAMES, Y, X), None)}, "cannot read .*file.npz.*allow_pickle"),
            ({"time": np.arange(FRAMES)}, "time must hold datetime64 or ISO 8601 text, got int64"),
            ({"time": np.array(["3 Feb 2001"] * FRAMES)}, "times such as '3 Feb 2001' are not ISO 8601"),
            ({"time": TIME[[0, 1, 1, 2, 3]]}, "time must increase, but frame 2"),
            ({"ocean": np.ones((X, Y), bool)}, r"ocean is \(4, 3\) but the grid is \(3, 4\)"),
            ({"ocean": np.ones(X, bool), "lon": LON[::-1]}, r"ocean is \(1, 4\) but the grid is \(3, 4\)"),
            ({"u": np.full((FRAMES, Y, X), 1e300)}, "velocities reach inf m/s"),
            ({"u": np.full((FRAMES, Y, X), 9.97e36)}, "reach 9.97e[+]36 m/s; is a fill value undeclared"),
        ],
    )
    def test_bad_npz_are_refused(self, tmp_path, change, message):
        refused(self.npz(tmp_path, **change), message)

    def test_an_npz_never_unpickles(self, tmp_path):
        class Hostile:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "trace"),)

        path = self.npz(tmp_path, u=np.array([Hostile()]))
        refused(path, "cannot read .*allow_pickle")
        assert os.listdir(tmp_path) == ["file.npz"]


def flipped(ocean):
    return fields(velocity=velocity()[:, ::-1], ocean=ocean[::-1])


class TestBadFiles:
    def test_missing_files_and_folders(self, tmp_path):
        refused(tmp_path / "none.nc", "cannot read .*none.nc: No such file")
        refused(tmp_path, "is a folder, but not a Zarr store")
        refused(tmp_path / ("x" * 300), "cannot read .*: File name too long")

    def test_a_file_that_may_not_be_read(self, tmp_path, monkeypatch):
        path = saved(tmp_path, cf())

        def denied(*_, **__):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(type(path), "open", denied)
        refused(path, "cannot read .*file.nc: Permission denied")

    def test_files_of_another_kind(self, tmp_path):
        (tmp_path / "empty.nc").touch()
        refused(tmp_path / "empty.nc", "is empty")
        (tmp_path / "table.csv").write_text("u, v\n1, 2\n")
        refused(tmp_path / "table.csv", "none of NetCDF, Zarr, .npz, .mat, .pickle")

    @pytest.mark.parametrize("kind", ["h5netcdf", "scipy", "npz", "v5.mat", "v73.mat", "pickle"])
    @pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
    def test_truncated_files(self, tmp_path, kind, share):
        path = tmp_path / kind
        rng = np.random.default_rng(0)
        u = rng.normal(0, 0.1, (20, 10, 10))
        grid = {"lat": np.arange(10.0), "lon": np.arange(10.0)}
        if kind in ("h5netcdf", "scipy"):
            cf(u, u, time=TIME[0] + np.arange(20) * np.timedelta64(1, "h"), **grid).to_netcdf(path, engine=kind)
        elif kind == "npz":
            np.savez(path.with_suffix(".npz"), u=u)
            path = path.with_suffix(".npz")
        else:
            arrays = {"u": u, "v": u, "ocean_time": DATENUM[0] + np.arange(20)} | grid
            if kind == "pickle":
                path = path.with_suffix(".pickle")
                path.write_bytes(pickle.dumps(arrays))
            else:
                path = TestPlainArrays().write(path, arrays)
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        refused(path, path.name)

    def test_a_damaged_zarr_store(self, tmp_path):
        readers.write(fields(), tmp_path / "out.zarr")
        (tmp_path / "out.zarr/u/.zarray").write_text("{")
        refused(tmp_path / "out.zarr", "cannot read .*out.zarr")

    @pytest.mark.parametrize(
        ("dataset", "message"),
        [
            (cf().drop_vars("vo"), "file.nc has no pair of velocities that could be recognised; it has uo"),
            (xr.Dataset(), "it has nothing"),
            (cf().isel(lat=0, lon=0), "no pair"),
            (cf().mean("lon"), "no longitude found for uo"),
            (cf().mean("time"), "no time found for uo"),
            (cf().drop_vars(["lat", "lon"]), r"no latitude nor longitude found for uo \(lat=3, lon=4\)"),
            (cf().expand_dims(depth=3), "uo has 3 levels along depth without depths, .* by level=0 to level=2"),
            (cf(np.zeros((FRAMES, Y, X)), np.zeros((FRAMES, Y, X))), "u is 0.0 m/s everywhere and always"),
            (cf(np.full((FRAMES, Y, X), 0.25)), "u is 0.25 m/s everywhere and always"),
            (cf(np.full((FRAMES, Y, X), np.nan)), "no ocean cell"),
            (cf(velocity()[..., 0] + np.float32(1e4)), "reach 1e[+]04 m/s; is a fill value undeclared or a unit"),
            (
                cf(time=TIME[::-1]),
                r"time must increase, but frame 1 .2001-02-03T15:00:00. does not follow .*; sort",
            ),
            (
                cf().drop_vars("time"),
                r"uo .time=5, lat=3, lon=4. has no variable with the times of time; add one",
            ),
            (cf(time=np.arange(FRAMES)), "times in time cannot be decoded, their units are ''; expected such as"),
            (cf(lat=np.array([0.0, 50.0, 100.0])), "latitude 100.0 is beyond the pole"),
            (cf(lat=np.array([0.0, 2.0, 1.0])), "latitude must increase"),
            (
                cf(lon=np.array([-180.0, -179.9, 179.8, 179.9])),
                "gap of 359.7 degrees between -179.9 and 179.8; order its columns as 179.8 to 179.9, then -180 to",
            ),
            (
                cf(lon=np.array([0.0, 1.0, 2.0, 359.0])),
                "a gap of 357 degrees between 2 and 359; order its columns as 359 to 359, then 0 to 2",
            ),
        ],
    )
    def test_unusable_content(self, tmp_path, dataset, message):
        refused(saved(tmp_path, dataset), message)

    @pytest.mark.parametrize(
        ("attributes", "message"),
        [
            ({"units": "hours since 2001-01-01", "calendar": "360_day"}, "from 'hours since .*', calendar 360_day"),
            ({"units": "days since 0001-01-01"}, "cannot be decoded from 'days since 0001-01-01', calendar standard"),
            ({"units": "days since 1900-01-01", "calendar": "julian"}, "since 1900-01-01', calendar julian"),
            ({"units": "days since 2100-02-25", "calendar": "julian"}, "since 2100-02-25', calendar julian"),
            ({"units": "hours since 2001-01-01 00:00 EST"}, "cannot be decoded from 'hours since .* EST': a zone is"),
            ({"units": "hours since 2001-01-01 00:00 UTC+2"}, "decoded from 'hours since .* UTC.2': a zone is"),
            ({"units": "hours since 2001-01-01 GMT -02:00"}, "decoded from 'hours since .* GMT -02:00': a zone is"),
            ({"units": "fortnights since 2001-01-01"}, "cannot be decoded from 'fortnights since"),
            ({"units": "hours since the flood"}, "cannot be decoded from 'hours since the flood'"),
            ({"units": "hours since 04/01/2020"}, "cannot be decoded from 'hours since 04/01/2020'"),
            ({"units": "days since 4-1-2020 00:00"}, "cannot be decoded from 'days since 4-1-2020 00:00'"),
            ({"units": "days since 01.04.2020"}, "cannot be decoded from 'days since 01.04.2020'"),
        ],
    )
    def test_times_outside_the_civil_calendar(self, tmp_path, attributes, message):
        dataset = cf(time=("time", np.arange(FRAMES) * 24.0, attributes))
        refused(saved(tmp_path, dataset), message)

    def test_a_julian_count_from_before_1900_is_refused(self, tmp_path):
        """Of dates of this century, which are other days than those of the civil calendar after as many."""
        attributes = {"units": "days since 1800-01-01", "calendar": "julian"}
        dataset = cf(time=("time", 80_000.0 + np.arange(FRAMES), attributes))
        refused(saved(tmp_path, dataset), "since 1800-01-01', calendar julian")

    @pytest.mark.parametrize(
        ("units", "days"),
        [
            ("days since 0001-01-01", 737426),
            ("days since 1-1-1", 737426),
            ("days since 1582-01-01", 159966),
            ("days since 2001-01-01 UTC", 6939),
            ("days since 2019-12-4", 28),
            ("days since 2019-12-04 00:00:00", 28),
            ("days since 01-01-2019", 365),
            ("days since 04/04/2019 00:00", 272),
            ("days since 31/12/2018", 366),
            ("days since 12.31.2018", 366),
        ],
    )
    def test_times_may_count_from_long_ago(self, tmp_path, units, days):
        """`days` lie before 2020-01-01, in the calendar that changes in October 1582."""
        dataset = cf(time=("time", days + np.arange(FRAMES), {"units": units}))
        assert str(readers.read(saved(tmp_path, dataset)).time[0])[:10] == "2020-01-01"

    @pytest.mark.parametrize("calendar", ["gregorian_proleptic", "julian", "GREGORIAN"])
    def test_other_calendars_that_count_the_same_days(self, tmp_path, calendar):
        last = cftime.datetime(2100, 2, 25, calendar="julian" if calendar == "julian" else "standard")
        days = cftime.date2num(last, "days since 1990-01-01", calendar=last.calendar)
        attributes = {"units": "days since 1990-1-1", "calendar": calendar}
        dataset = cf(time=("time", days + np.arange(FRAMES) / 4, attributes))
        assert str(readers.read(saved(tmp_path, dataset)).time[0])[:10] == "2100-02-25"

    def test_positions_that_nobody_filled_in(self, tmp_path):
        lat, lon = np.meshgrid(LAT, LON, indexing="ij")
        lat[:2, :2] = lon[:2, :2] = 0
        dataset = cf().drop_vars(["lat", "lon"]).rename(lat="y", lon="x")
        dataset = dataset.assign_coords(nav_lat=(("y", "x"), lat), nav_lon=(("y", "x"), lon))
        refused(saved(tmp_path, dataset), "nav_lat and nav_lon are both 0 in 4 cells, as NEMO leaves them")

    def test_a_fill_value_that_nobody_declared_may_be_no_larger_than_a_current(self, tmp_path):
        data = velocity(land=False)
        data[:, 1, 2] = -9.99
        data[1, 2] = -9.99
        path = saved(tmp_path, cf(100 * data[..., 0], 100 * data[..., 1], "cm/s"))
        refused(path, "9 values are 9.99 m/s exactly; is a fill value undeclared")
        fast = velocity(land=False) * 20
        assert np.abs(fast).max() > 10
        assert readers.read(saved(tmp_path, cf(fast[..., 0], fast[..., 1]), "fast.nc")).gaps == 0

    def test_u_and_v_on_different_points(self, tmp_path):
        dataset = cf().drop_vars("vo")
        dataset["vo"] = (("time", "lat_v", "lon"), velocity()[:, 1:, :, 1], {"units": "m/s"})
        message = r"uo lies on \(lat=3, lon=4\) and vo on \(lat_v=2, lon=4\), a staggered grid without .*by grid"
        refused(saved(tmp_path, dataset), message)

    @pytest.mark.parametrize(
        "units", ["radian", "rad", "km", "metres", "degrees_west", "degree_S", "degreeW", "arcmin"]
    )
    def test_positions_in_other_units_are_refused(self, tmp_path, units):
        for name in ("lat", "lon"):
            dataset = cf(lat=np.radians(LAT), lon=np.radians(LON))
            dataset[name].attrs["units"] = units
            message = f"{name} has the units '{units}'; degrees east and north are expected"
            refused(saved(tmp_path, dataset, f"{name}.nc"), message)

    def test_a_track_is_no_grid(self, tmp_path):
        values = velocity()[:, 0, 1:, 0]
        dataset = xr.Dataset(
            {n: (("time", "station"), values, {"units": "m/s"}) for n in ("u", "v")},
            {"time": TIME, "lat": ("station", LAT), "lon": ("station", LON[:3])},
        )
        refused(saved(tmp_path, dataset), "scattered points or a track, not on a grid")

    def test_components_along_a_curvilinear_grid(self, tmp_path):
        dataset = cf(dims=("time", "y", "x")).drop_vars(["lat", "lon"])
        dataset = dataset.assign_coords(lat=(("y", "x"), CURVED_LAT), lon=(("y", "x"), CURVED_LON))
        refused(saved(tmp_path, dataset), "uo and vo lie on a curvilinear grid .* by directions, 'grid' or 'east'")


class TestWriting:
    @pytest.mark.parametrize("name", ["out.csv", "out", "out.mat", "out.pickle"])
    def test_other_suffixes_are_refused(self, tmp_path, name):
        with pytest.raises(InputError, match=r"the suffix must be \.nc, .zarr or .npz"):
            readers.write(fields(), tmp_path / name)
        assert not os.listdir(tmp_path)

    @pytest.mark.parametrize("suffix", [".nc", ".zarr", ".npz"])
    def test_a_folder_that_cannot_be(self, tmp_path, suffix):
        (tmp_path / "file").touch()
        with pytest.raises(InputError, match=r"cannot write .*file is a file, not a folder"):
            readers.write(fields(), tmp_path / "file" / f"out{suffix}")

    @pytest.mark.parametrize("suffix", [".nc", ".npz"])
    def test_a_folder_is_not_replaced_by_a_file(self, tmp_path, suffix):
        (tmp_path / f"out{suffix}").mkdir()
        with pytest.raises(InputError, match=r"cannot write .*: Is a directory"):
            readers.write(fields(), tmp_path / f"out{suffix}")
        assert os.listdir(tmp_path) == [f"out{suffix}"]

    def test_only_a_zarr_store_is_replaced_by_one(self, tmp_path):
        (tmp_path / "out.zarr").mkdir()
        (tmp_path / "out.zarr/thesis.tex").touch()
        with pytest.raises(InputError, match="it exists and is not a Zarr store"):
            readers.write(fields(), tmp_path / "out.zarr")
        assert os.listdir(tmp_path / "out.zarr") == ["thesis.tex"]

    @pytest.mark.parametrize("existing", [False, True])
    @pytest.mark.parametrize("suffix", [".nc", ".zarr", ".npz"])
    def test_a_full_disk_leaves_what_was_there(self, tmp_path, suffix, existing):
        resource = pytest.importorskip("resource")
        path = tmp_path / f"out{suffix}"
        if existing:
            readers.write(fields(), path)
        noise = np.random.default_rng(0).normal(size=(24, 30, 30, 2))
        large = fields(velocity=noise, lat=np.arange(30.0), lon=np.arange(30.0), time=TIME[0] + np.arange(24))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            with pytest.raises(InputError, match=f"cannot write .*out{suffix}: File too large"):
                readers.write(large, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert os.listdir(tmp_path) == ([path.name] if existing else [])
        if existing:
            assert_equal(readers.read(path), fields())

    @pytest.mark.parametrize("existing", [False, True])
    @pytest.mark.parametrize("suffix", [".nc", ".zarr", ".npz"])
    def test_a_failing_rename_leaves_what_was_there(self, tmp_path, monkeypatch, suffix, existing):
        path = tmp_path / f"out{suffix}"
        if existing:
            readers.write(fields(), path)

        def full(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            with pytest.raises(InputError, match=f"cannot write .*out{suffix}: No space left on device"):
                readers.write(fields(velocity=velocity(3)), path)
        assert os.listdir(tmp_path) == ([path.name] if existing else [])
        if existing:
            assert_equal(readers.read(path), fields())

    def test_a_zarr_store_comes_back_when_the_new_one_cannot_take_its_place(self, tmp_path, monkeypatch):
        path = tmp_path / "out.zarr"
        readers.write(fields(), path)
        replace = os.replace

        def once(source, target):
            if target == path:
                raise OSError(errno.EIO, "Input/output error")
            replace(source, target)

        monkeypatch.setattr(os, "replace", once)
        with pytest.raises(InputError, match="Input/output error"):
            readers.write(fields(velocity=velocity(3)), path)
        monkeypatch.undo()
        assert os.listdir(tmp_path) == ["out.zarr"]
        assert_equal(readers.read(path), fields())


class TestRealFiles:
    @pytest.fixture
    def real(self, shared):
        return shared / "data/real"

    def test_a_year_of_globcurrent(self, real):
        got = readers.read(real / "globcurrent_agulhas_2002_daily.npz")
        assert got.u.shape == got.v.shape == (365, 41, 81)
        assert got.gaps == 0
        assert 1 - got.ocean.mean() == pytest.approx(0.23, abs=0.005)
        np.testing.assert_array_equal(got.time, np.datetime64("2002-01-01") + np.arange(365))

    def test_daily_source_files_equal_the_series(self, real):
        year = readers.read(real / "globcurrent_agulhas_2002_daily.npz")
        for day, path in enumerate(sorted((real / "globcurrent_daily").glob("2002*.nc"))):
            got = readers.read(path)
            assert_equal(got, year.select(slice(day, day + 1)))

    def test_two_pairs_of_duacs(self, real, caplog):
        path = real / "duacs_blacksea_20160707.nc"
        refused(path, r"several pairs of velocities, \(ugos, vgos\), \(ugosa, vgosa\); say which")
        got = readers.read(path, u="ugos", v="vgos")
        with h5py.File(path) as file:
            raw = file["ugos"][0].astype(float)
            scale = file["ugos"].attrs["scale_factor"]
            missing = file["ugos"][0] == file["ugos"].attrs["_FillValue"]
        np.testing.assert_array_equal(np.isnan(got.u[0]), missing)
        np.testing.assert_allclose(got.u[0][~missing], raw[~missing] * scale, rtol=1e-6)
        assert got.time == np.datetime64("2016-07-07")
        assert not np.array_equal(readers.read(path, u="ugosa", v="vgosa").u, got.u)

    def test_hf_radar_with_gaps_in_centimetres(self, real, caplog):
        path = real / "hfradar_maracoos_20190101.nc"
        got = readers.read(path)
        assert got.velocity.shape == (24, 187, 196, 2)
        np.testing.assert_array_equal(got.time, np.datetime64("2019-01-01T00") + np.arange(24))
        with h5py.File(path) as file:
            raw = file["u"][:, 0]
        present = raw != -999
        np.testing.assert_allclose(got.u[present], raw[present] / 100, rtol=1e-6)
        assert np.isnan(got.u[~present]).all()
        assert 0.05 < got.gaps < 0.28
        assert any("u is converted from cm/s to m/s" in m for m in caplog.messages)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            (
                "croco_his.nc",
                "the times in time count 'second' from no date; say from which by time, such as 2000-01-01",
            ),
            ("croco_grd.nc", "no pair of velocities that could be recognised; it has xl, el"),
            ("nemo_U_20200104.nc", "no pair .* if the other component of vozocrtx is in another file, give that by v_"),
        ],
    )
    def test_what_a_file_leaves_open(self, real, name, message):
        refused(real / name, message)
