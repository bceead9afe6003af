"""Files as radars, models, moorings and gliders publish them, by their attributes and names."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from jax_repaint.data import readers, titles, tracks
from jax_repaint.data.observations import Grid, collect
from jax_repaint.errors import InputError

LAT, LON = 43 + 0.1 * np.arange(6), -3 + 0.1 * np.arange(8)
GRID = Grid(np.ones((6, 8), bool), LAT, LON)
TIME = np.datetime64("2021-03-09", "ns") + np.arange(3) * np.timedelta64(1, "h")
OCEANSITES = {"conventions": "OceanSITES reference table 2"}
PLACES = {
    "lat": {"units": "degrees_north", "standard_name": "latitude"},
    "lon": {"units": "degrees_east", "standard_name": "longitude"},
}
WORDS = "good_data probably_good_data bad_data"


def currents(**attributes):
    """u and v of 0.1 and 0.2 m/s, but u = 1.9 in one cell of each frame."""
    velocity = np.full((2, 3, 6, 8), 0.1, np.float32)
    velocity[1] = 0.2
    velocity[0, :, 2, 3] = 1.9
    content = {
        name: (("time", "lat", "lon"), values, {"units": "m s-1", "standard_name": f"{way}_sea_water_velocity"})
        for name, values, way in zip("uv", velocity, ("eastward", "northward"), strict=True)
    }
    data = xr.Dataset(content, {"time": TIME, "lat": ("lat", LAT, PLACES["lat"]), "lon": ("lon", LON, PLACES["lon"])})
    for name in "uv":
        data[name].attrs |= attributes
    return data


def flagged(data, name, values=(1, 4), **attributes):
    """With a flag that is the second of `values` where u is 1.9."""
    flags = np.where(data.u.values == np.float32(1.9), values[1], values[0])
    return data.assign({name: (("time", "lat", "lon"), flags, attributes)})


def written(data, tmp_path):
    path = tmp_path / "currents.nc"
    data.to_netcdf(path, engine="h5netcdf")
    return path


def hides(data, tmp_path):
    """Whether the flagged cell is missing in fields and in observations, of the file and of the data set."""
    path = written(data, tmp_path)
    found = [np.isnan(readers.read(path, constant=True).velocity[:, 2, 3]).all()]
    for source in (path, data):
        found += [not np.asarray(frame.observation.on_grid((6, 8))[0])[2, 3] for frame in collect(source, GRID)]
    assert all(found) or not any(found)
    return all(found)


@pytest.mark.parametrize("between", [", ", ",", " "])
def test_flags_are_found_in_lists_with_commas(tmp_path, between):
    """As those of European radars, where errors list the flags too."""
    meanings = {"flag_values": np.array([1, 2, 4], np.int8), "flag_meanings": WORDS}
    data = currents(ancillary_variables=between.join(["QCflag", "VART_QC"]))
    data["spread"] = ("time", "lat", "lon"), np.full((3, 6, 8), 0.03), {"units": "m s-1"}
    data["spread"].attrs["ancillary_variables"] = between.join(["VART_QC", "QCflag"])
    assert hides(flagged(data, "QCflag", **meanings), tmp_path)


@pytest.mark.parametrize("word", ["outlier", "out_of_range", "spike", "erroneous", "unusable", "not_valid", "not_good"])
def test_words_for_bad_values_hide_them(tmp_path, word):
    meanings = {"flag_values": np.array([1, 4], np.int8), "flag_meanings": f"good {word}"}
    assert hides(flagged(currents(), "qc", **meanings), tmp_path)


@pytest.mark.parametrize("word", ["despiked", "probably_good", "interpolated", "changed_value", "noted"])
def test_words_for_good_values_do_not(tmp_path, word):
    meanings = {"flag_values": np.array([1, 4], np.int8), "flag_meanings": f"good {word}"}
    assert not hides(flagged(currents(), "qc", **meanings), tmp_path)


def test_a_flag_of_the_velocity_without_meanings_is_told_of(tmp_path, caplog):
    data = flagged(currents(ancillary_variables="UCUR_QC"), "UCUR_QC", **OCEANSITES)
    assert not hides(data, tmp_path)
    assert caplog.text.count("UCUR_QC looks like a quality flag but cannot be read and does not count") >= 3


@pytest.mark.parametrize("kind", [bool, "S1"])
def test_flags_of_a_data_set_that_are_no_numbers_are_kept(tmp_path, caplog, kind):
    """A truth value hides, a letter is told of, as both do in a file."""
    meanings = {"flag_values": np.array([0, 1], np.int8), "flag_meanings": "good bad"} if kind is bool else {}
    data = flagged(currents(), "qc", (False, True) if kind is bool else (b"1", b"4"), **meanings)
    frames = collect(data, GRID)
    seen = [bool(np.asarray(frame.observation.on_grid((6, 8))[0])[2, 3]) for frame in frames]
    assert seen == [kind is not bool] * 3
    assert ("qc looks like a quality flag but cannot be read" in caplog.text) == (kind is not bool)


def turned(angle, at=(43.0, -3.0)):
    """Positions (6, 8) of a grid whose rows run `angle` degrees north of east."""
    y, x = np.meshgrid(np.arange(6), np.arange(8), indexing="ij")
    a = np.radians(angle)
    lat = at[0] + 0.05 * (x * np.sin(a) + y * np.cos(a))
    lon = at[1] + 0.05 * (x * np.cos(a) - y * np.sin(a)) / np.cos(np.radians(at[0]))
    return lat, lon


def along_rows(standard, lat, lon, dims=("y", "x"), **places):
    """A data set with 0.3 m/s along the rows of a grid, its true positions `lat` and `lon`, and others."""
    content = {"u": 0.3, "v": 0.0}
    data = {
        name: (("time", *dims), np.full((3, 6, 8), value), {"units": "m s-1", "standard_name": standard.format(way)})
        for (name, value), way in zip(content.items(), "xy", strict=True)
    }
    data |= {"lat2": (dims, lat, PLACES["lat"]), "lon2": (dims, lon, PLACES["lon"])}
    return xr.Dataset(data, {"time": TIME} | places)


def read_turned(data, tmp_path):
    fields = readers.read(written(data, tmp_path), constant=True)
    return fields, fields.velocity[0, 2, 3]


@pytest.mark.parametrize("angle", [30.0, -60.0])
def test_grid_eastward_is_along_the_grid(tmp_path, angle):
    data = along_rows("sea_water_{}_velocity", *turned(angle))
    expected = read_turned(data, tmp_path)[1]
    np.testing.assert_allclose(
        expected, 0.3 * np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))]), atol=0.01
    )
    for name, way in (("u", "eastward"), ("v", "northward")):
        data[name].attrs["standard_name"] = f"grid_{way}_sea_water_velocity"
    np.testing.assert_allclose(read_turned(data, tmp_path)[1], expected, atol=1e-6)


def test_true_positions_come_before_nominal_ones(tmp_path):
    """As in files of MOM6, where the axes are those of the rows that do not turn."""
    axes = {
        "yh": ("yh", LAT, {"units": "degrees_north", "long_name": "h point nominal latitude"}),
        "xh": ("xh", LON, {"units": "degrees_east", "long_name": "h point nominal longitude"}),
    }
    lat, lon = turned(40, (73.0, 10.0))
    fields, velocity = read_turned(
        along_rows("surface_sea_water_{}_velocity", lat, lon, ("yh", "xh"), **axes), tmp_path
    )
    np.testing.assert_allclose(fields.lat, lat, atol=1e-6)
    np.testing.assert_allclose(velocity, 0.3 * np.array([np.cos(np.radians(40)), np.sin(np.radians(40))]), atol=0.01)


@pytest.mark.parametrize("units", [("degrees_north", "degrees_east"), ("degrees", "degrees")])
def test_axes_of_a_rotated_pole_are_no_positions(tmp_path, units):
    axes = {
        "rlat": ("rlat", -5 + 0.05 * np.arange(6), {"units": units[0], "standard_name": "grid_latitude"}),
        "rlon": ("rlon", 0.05 * np.arange(8), {"units": units[1], "standard_name": "grid_longitude"}),
    }
    lat, lon = turned(-30, (73.0, 10.0))
    data = along_rows("sea_water_{}_velocity", lat, lon, ("rlat", "rlon"), **axes)
    np.testing.assert_allclose(read_turned(data, tmp_path)[0].lat, lat, atol=1e-6)
    with pytest.raises(InputError, match="no latitude nor longitude"):
        read_turned(data.drop_vars(["lat2", "lon2"]), tmp_path)
    # A list with commas is one of names too.
    for name in "uv":
        data[name].attrs["coordinates"] = "lat2, lon2"
    np.testing.assert_allclose(read_turned(data, tmp_path)[0].lon, lon, atol=1e-6)


def test_radial_velocities_are_no_currents(tmp_path):
    """Their eastward and northward parts have the standard names of currents."""
    data = currents()
    data["RDVA"] = data.u.assign_attrs(standard_name="radial_sea_water_velocity_away_from_instrument")
    path = written(data, tmp_path)
    for read in (readers.read, lambda path: collect(path, GRID)):
        with pytest.raises(InputError, match=r"radial velocities, of which eastward and northward .* are parts"):
            read(path)
    assert readers.read(path, u="u", v="v", constant=True).velocity.shape == (3, 6, 8, 2)


def test_components_on_different_faces_need_positions_of_their_own(tmp_path):
    data = currents().expand_dims("depthu", 1)
    data["v"] = data.v.rename(depthu="depthv")
    with pytest.raises(InputError, match=r"u and v lie on different faces of the cells \(depthu, depthv\) and have"):
        readers.read(written(data, tmp_path))
    u = data.u.rename(lon="lon_u").assign_coords(lon_u=("lon_u", LON + 0.05, PLACES["lon"]))
    v = data.v.rename(lat="lat_v").assign_coords(lat_v=("lat_v", LAT + 0.05, PLACES["lat"]))
    fields = readers.read(written(xr.merge([u, v]), tmp_path), constant=True)
    np.testing.assert_allclose([fields.lat[0], fields.lon[0]], [LAT[1], LON[1]], atol=1e-6)


@pytest.mark.parametrize(("scale", "asked"), [(100, True), (1, False)])
def test_velocities_that_are_too_fast_on_average_are_asked_about(tmp_path, caplog, scale, asked):
    """Arrays say no units."""
    data = currents()
    factor = scale * np.linspace(0.5, 1.5, data.u.size).reshape(data.u.shape)
    u, v = (factor * np.minimum(data[name].values, 0.25) for name in "uv")
    np.savez(tmp_path / "currents.npz", u=u, v=v, lat=LAT, lon=LON, time=TIME)
    readers.read(tmp_path / "currents.npz", constant=True)
    assert ("are the velocities in cm/s?" in caplog.text) == asked


@pytest.mark.parametrize(("zeros", "told"), [(0, False), (1, False), (2, True)])
def test_zeros_in_holes_that_move_are_told_of(tmp_path, caplog, zeros, told):
    """Of 144 values; arrays that began as zeros have them where nothing was measured."""
    data = currents()
    for frame in range(zeros):
        for name in "uv":
            data[name][frame, 4, frame] = 0
    readers.read(written(data, tmp_path), constant=True)
    assert ("of the values are exactly zero; they count as currents" in caplog.text) == told


def test_positions_of_an_average_over_depth_are_not_those_of_the_profile():
    """Gliders have both in one table."""
    table = pd.DataFrame({"latitude": [43.2], "longitude": [-2.8], "u": [0.1], "v": [0.2]})
    (frame,) = collect(table, GRID)
    assert frame.count == 1
    with pytest.raises(InputError, match="several columns for lat, latitude, lat_uv"):
        collect(table.assign(lat_uv=43.3, lon_uv=-2.7), GRID)
    (frame,) = collect(table.rename(columns={"latitude": "lat_uv", "longitude": "lon_uv"}), GRID)
    assert frame.count == 1


@pytest.mark.parametrize("title", ["Cell number", "cell_no", "bin_no", "Bin#", "nbins", "nbin", "layer no."])
def test_numbers_of_bins_are_depths(title):
    table = pd.DataFrame({"lat": [43.2, 43.2], "lon": [-2.8, -2.8], "u": [0.1, 0.3], "v": [0.2, 0.1], title: [1, 9]})
    with pytest.raises(InputError, match="depth"):
        collect(table, GRID)


@pytest.mark.parametrize("title", ["range (m)", "Prof", "profundidad"])
def test_what_may_be_depths_is_asked_about(title, caplog):
    table = pd.DataFrame({"lat": [43.2, 43.2], "lon": [-2.8, -2.8], "u": [0.1, 0.3], "v": [0.2, 0.1], title: [1, 9]})
    collect(table, GRID)
    assert title in caplog.text


@pytest.mark.parametrize("title", ["uQC", "velQC", "pflag", "good", "valid", "qartod_status", "u_qc", "QC"])
def test_titles_of_flags_are_known(title):
    assert titles.FLAG.search(title)


@pytest.mark.parametrize("title", ["u", "validity_days", "goodwin_buoy", "flagship", "quadrature"])
def test_titles_of_others_are_none(title):
    assert not titles.FLAG.search(title)


def test_a_section_with_cells_of_depth_is_no_mesh(tmp_path):
    """As ships write it: one cell has to be chosen before."""
    section = ("time", "depth_cell"), np.full((3, 2), 0.1), {"units": "m s-1"}
    data = xr.Dataset(
        {"u": section, "v": section, "lat": ("time", LAT[:3], PLACES["lat"]), "lon": ("time", LON[:3], PLACES["lon"])},
        {"time": TIME},
    )
    with pytest.raises(InputError, match="choose one depth_cell"):
        collect(written(data, tmp_path), GRID)
    assert tracks.MESH.search("ncells")


def test_a_row_of_units_is_told_of():
    """As ERDDAP writes it behind the titles."""
    table = pd.DataFrame({"latitude": ["degrees_north", "43.2"], "longitude": ["degrees_east", "-2.8"],
                          "u": ["m s-1", "0.1"], "v": ["m s-1", "0.2"]})  # fmt: skip
    with pytest.raises(InputError, match=r"\(counted from 0\); remove that row if it has the units$"):
        collect(table, GRID)
    with pytest.raises(InputError, match=r"\(counted from 0\)$"):
        collect(table.iloc[::-1], GRID)
    assert collect(table.iloc[1:], GRID)[0].count == 1
