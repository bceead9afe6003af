"""What is said about a file is true of it, and the command is one line where it cannot be."""

import subprocess
import sys

import numpy as np
import pytest
import tiny
import xarray as xr
from matplotlib.collections import QuadMesh
from matplotlib.quiver import Quiver

from jax_repaint.data import describe, readers
from jax_repaint.data.fields import Fields, split
from jax_repaint.data.source import Choice, Source


def gappy() -> Fields:
    """The tiny fields with a cell that misses in half of the frames."""
    fields = tiny.fields()
    fields.velocity[::2, 5, 5] = np.nan
    return Fields.create(fields.velocity, fields.lat, fields.lon, fields.time, fields.ocean, "gappy")


class TestWords:
    def test_they_are_those_of_the_fields(self):
        fields = tiny.fields()
        lines = describe.describe(fields, Source("tiny"))
        assert lines["grid"].startswith("7 x 12 cells, regular, 1.11 km by 1.06 km; latitude 18 to 18.06")
        assert lines["time"] == "60 frames from 2020-01-01T00:00:00 to 2020-01-03T11:00:00, step 1 h"
        assert lines["land"] == "23.8 % of the cells, or never observed"
        assert 1 - fields.ocean.mean() == pytest.approx(0.238, abs=5e-4)
        assert lines["gaps"] == "none"
        speed = np.hypot(fields.u, fields.v)[:, fields.ocean]
        assert lines["speed"].startswith(f"mean {speed.mean():.3g} m/s, largest {speed.max():.3g} m/s")

    def test_a_grid_across_the_date_line_is_as_wide_as_it_is(self):
        fields = tiny.fields()
        lon = (np.linspace(179.7, 180.3, 12) + 0.1 * np.arange(7)[:, None] + 180) % 360 - 180
        lat = fields.lat[:, None] + 0.001 * np.arange(12)
        across = Fields.create(fields.velocity, lat, lon, fields.time)
        lines = describe.describe(across, Source("across"))
        assert lines["grid"].endswith("longitude 179.7 to 180.9")

    def test_the_proposed_split_is_one_that_training_takes(self):
        fields = tiny.fields()
        lines = describe.describe(fields, Source("tiny"))
        ranges = [part.split("=")[1].rstrip(",") for part in lines["split"].split() if "=" in part]
        got, expected = split(fields, *ranges), split(fields)
        for name in ("train", "validation", "test"):
            np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
        assert f"decorrelation time {expected.decorrelation:.4g} frames" in lines["memory"]

    def test_gaps_are_counted(self):
        lines = describe.describe(gappy(), Source("gappy"))
        share = 100 * 30 / (60 * tiny.fields().ocean.sum())
        assert lines["gaps"].startswith(f"{share:.2g} % of the values on ocean cells are missing; 30 of 60 frames")

    def test_holes_in_the_record_and_short_records_are_said(self):
        fields = tiny.fields()
        keep = np.r_[0:20, 50:60]
        lines = describe.describe(fields.select(keep), Source("tiny"))
        assert lines["time"].endswith("step 1 h, the longest 31 h")
        short = describe.describe(fields.select(slice(0, 3)), Source("tiny"))
        assert short["split"] == "none: tiny: 3 frames are too few to measure a decorrelation time"
        assert describe.describe(fields.select([0]), Source("tiny"))["time"] == "one frame, 2020-01-01T00:00:00"

    def test_what_the_reader_understood_is_told(self, shared):
        folder = shared / "data/real"
        choice = Choice(grid=folder / "croco_grd.nc", time="2005-01-01")
        fields, source = readers.understand(folder / "croco_his.nc", choice)
        lines = describe.describe(fields, source)
        assert list(lines)[:4] == ["pair", "level", "points", "components"]
        assert lines["pair"] == "u, v in meter second-1"
        assert lines["level"] == "level 2 of s_rho (-0.9219) of 3"
        assert lines["points"] == "C-grid, averaged to cell centres with its masks"
        assert "time, counted from 2005-01-01T00:00:00" in lines["time"]


class TestPicture:
    def test_it_shows_means_deviations_and_gaps(self):
        fields = gappy()
        figure = describe.draw(fields, "tiny")
        axes = [ax for ax in figure.axes if ax.get_title(loc="left")]
        assert [ax.get_title(loc="left") for ax in axes] == [
            "mean current on mean speed (m/s)", "standard deviation (m/s)", "share of frames without a value",
        ]  # fmt: skip
        shown = [next(c for c in ax.collections if isinstance(c, QuadMesh)).get_array() for ax in axes]
        velocity = fields.velocity[:, fields.ocean].astype(float)
        speed = np.nanmean(np.hypot(*np.moveaxis(velocity, -1, 0)), 0)
        deviation = np.sqrt(np.nanvar(velocity, 0).sum(-1))
        missing = np.isnan(velocity[..., 0]).mean(0)
        for got, expected in zip(shown, (speed, deviation, missing), strict=True):
            np.testing.assert_allclose(got[fields.ocean], expected, rtol=1e-5, atol=1e-7)
            assert np.ma.getmaskarray(got)[~fields.ocean].all()
        assert axes[0].get_aspect() == 1

    def test_arrows_point_where_the_mean_current_goes(self):
        fields = tiny.fields()
        mean = fields.velocity.mean(0, dtype=float)
        (arrows,) = [c for ax in describe.draw(fields).axes for c in ax.collections if isinstance(c, Quiver)]
        place = fields.metres() / 1000
        assert len(arrows.U) == fields.ocean.sum()
        np.testing.assert_allclose(arrows.XY, place[fields.ocean][:, ::-1])
        drawn = (mean @ [1, 1j] * np.exp(1j * fields.convergence()))[fields.ocean]
        np.testing.assert_allclose(arrows.U + 1j * arrows.V, drawn, atol=1e-7)

    def test_without_gaps_there_are_two_panels(self):
        assert len([ax for ax in describe.draw(tiny.fields()).axes if ax.get_title(loc="left")]) == 2


class TestCommand:
    def test_words_without_a_name_are_files(self):
        given = ["a.nc", "--depth=3", "--out", "b.png", "c.nc", "--file=d.nc"]
        expected = ["--file=a.nc", "--depth=3", "--out", "b.png", "--file=c.nc", "--file=d.nc"]
        assert describe.name_files(given) == expected
        assert describe.name_files([]) == []

    def run(self, folder, *arguments):
        command = [sys.executable, "-m", "jax_repaint.data.describe", *arguments]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True)

    def test_it_prints_and_draws(self, tmp_path):
        fields = tiny.fields()
        for part, name in ((slice(0, 30), "first.nc"), (slice(30, 60), "second.nc")):
            readers.write(fields.select(part), tmp_path / "plain.nc")
            with xr.open_dataset(tmp_path / "plain.nc", engine="h5netcdf") as dataset:
                dataset.load().rename(u="uo", v="vo").to_netcdf(tmp_path / name, engine="h5netcdf")
        done = self.run(tmp_path, "first.nc", "second.nc", "--u=uo", "--v=vo", "--out=picture.png")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("first.nc and 1 more\n  files       2\n  pair        uo, vo in m s-1\n")
        assert "60 frames from 2020-01-01T00:00:00 to 2020-01-03T11:00:00" in done.stdout
        assert done.stdout.endswith("wrote picture.png\n")
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")

    def test_a_mistake_is_one_line(self, tmp_path):
        (tmp_path / "table.csv").write_text("u, v\n")
        done = self.run(tmp_path, "table.csv", "--out=picture.png")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "error: table.csv is none of NetCDF, Zarr, .npz, .mat, .pickle\n"
        assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]
