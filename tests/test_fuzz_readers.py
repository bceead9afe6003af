"""Damaged files: fields or one sentence, never another exception, never a crash, never code that runs from data."""

import io
import json
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
import xarray as xr

from jax_repaint.data import probe, readers
from jax_repaint.errors import InputError

KINDS = ("netcdf4", "netcdf3", "croco", "npz", "mat5", "mat73", "pickle")
SUFFIX = {"netcdf4": "nc", "netcdf3": "nc", "croco": "nc", "mat5": "mat", "mat73": "mat"}
CASES = 30  # of each kind
MEMORY = 8 * 2**30

# A damaged file may bring the whole process down, so that another one reads them and says how far it came.
READS = """
import json, resource, sys, warnings
from jax_repaint.data import probe, readers
from jax_repaint.errors import InputError
probe.PATIENCE = 4
resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
warnings.simplefilter("error")
with open("files.json") as file:
    paths = json.load(file)
for path in paths:
    print(path, end=" ", flush=True)
    try:
        readers.read(path, time="2000-01-01" if "croco" in path else None)
        outcome = "fields"
    except InputError as e:
        outcome = "sentence" if 10 < len(str(e)) < 600 and "\\n" not in str(e) else f"no sentence: {e!r}"
    except Exception as e:
        outcome = f"{type(e).__name__}: {e!r}"
    print(outcome.replace("\\n", " "), flush=True)
"""


def whole(kind: str) -> bytes:
    """A small file of this kind that reads well."""
    rng = np.random.default_rng(0)
    u, v = rng.normal(0, 0.2, (2, 6, 5, 7)).astype(np.float32)
    u[:, 0, 0] = v[:, 0, 0] = np.nan
    lat, lon = 30 + 0.1 * np.arange(5.0), 10 + 0.1 * np.arange(7.0)
    days = 730000 + np.arange(6) / 24
    out = io.BytesIO()
    if kind in ("netcdf4", "netcdf3"):
        data = {n: (("time", "lat", "lon"), x, {"units": "m s-1"}) for n, x in (("uo", u), ("vo", v))}
        time = ("time", np.arange(6.0), {"units": "hours since 2001-01-01"})
        dataset = xr.Dataset(data, {"time": time, "lat": lat, "lon": lon})
        with tempfile.TemporaryDirectory() as folder:
            dataset.to_netcdf(Path(folder) / "whole.nc", engine={"netcdf4": "h5netcdf", "netcdf3": "scipy"}[kind])
            return (Path(folder) / "whole.nc").read_bytes()
    if kind == "croco":
        with h5py.File(out, "w") as file:
            for name, x in croco(rng).items():
                file[name] = x
                file[name].attrs["units"] = {"u": "m/s", "v": "m/s", "time": "second"}.get(name, "1")
            scales = {(4, 5): ("eta_rho", "xi_rho"), (2, 4, 4): ("time", "eta_rho", "xi_u")}
            scales |= {(2, 3, 5): ("time", "eta_v", "xi_rho"), (2,): ("time",)}
            for dim, n in {"eta_rho": 4, "xi_rho": 5, "xi_u": 4, "eta_v": 3}.items():
                file[dim] = np.arange(float(n))
            for dim in ("eta_rho", "xi_rho", "xi_u", "eta_v", "time"):
                file[dim].make_scale(dim)
            for name in croco(rng):
                for axis, dim in enumerate(scales[file[name].shape]):
                    if name != dim:
                        file[name].dims[axis].attach_scale(file[dim])
        return out.getvalue()
    if kind == "npz":
        np.savez(out, u=u, v=v, lat=lat, lon=lon, time=np.datetime64("2001-01-01", "h") + np.arange(6))
        return out.getvalue()
    arrays = {"u": u.T, "v": v.T, "ocean_time": days, "lat": lat, "lon": lon}
    if kind == "mat5":
        scipy.io.savemat(out, arrays, do_compression=True)
        return out.getvalue()
    if kind == "mat73":
        with h5py.File(out, "w", userblock_size=512) as file:
            for name, x in arrays.items():
                file.create_dataset(name, data=x.T, compression="gzip" if x.ndim > 1 else None)
        content = bytearray(out.getvalue())
        content[:128] = b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(116) + bytes(8) + b"\x00\x02IM"
        return bytes(content)
    return pickle.dumps(arrays, 4)


def croco(rng: np.random.Generator) -> dict[str, np.ndarray]:
    lat, lon = np.meshgrid(30 + np.arange(4.0) / 10, 10 + np.arange(5.0) / 10, indexing="ij")
    u, v = rng.normal(0, 0.2, (2, 4, 4)), rng.normal(0, 0.2, (2, 3, 5))
    return {"u": u, "v": v, "lat_rho": lat, "lon_rho": lon, "mask_rho": np.ones((4, 5)), "time": np.arange(2.0)}


def damaged(content: bytes, seed: int) -> bytes:
    """Truncated, with flipped bits, with a run of bytes overwritten, or with a piece cut out."""
    rng = np.random.default_rng(seed)
    out = bytearray(content)
    way, place = seed % 4, int(rng.integers(len(out)))
    if way == 0:
        return bytes(out[:place])
    if way == 1:
        # Headers decide what a reader does: half of the flips are there.
        reach = len(out) if rng.random() < 0.5 else min(len(out), 2000)
        for i in rng.integers(reach, size=rng.integers(1, 9)):
            out[i] ^= 1 << int(rng.integers(8))
    elif way == 2:
        length = int(rng.integers(1, 64))
        out[place : place + length] = rng.bytes(len(out[place : place + length]))
    else:
        del out[place : place + int(rng.integers(1, 256))]
    return bytes(out)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, str]:
    """What came of every damaged file."""
    folder = tmp_path_factory.mktemp("damaged")
    files = []
    for kind in KINDS:
        content = whole(kind)
        for seed in range(CASES):
            files.append(f"{kind}_{seed}.{SUFFIX.get(kind, kind)}")
            (folder / files[-1]).write_bytes(damaged(content, seed))
    (folder / "files.json").write_text(json.dumps(files))
    before = sorted(folder.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", READS.replace("MEMORY", str(MEMORY))],
        cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert sorted(folder.iterdir()) == before
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    assert list(said) == files, f"the process ended at {done.stdout.splitlines()[-1]}: {done.stderr[-500:]}"
    return said


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_give_fields_or_a_sentence(outcomes, kind):
    mine = {file: outcome for file, outcome in outcomes.items() if file.startswith(f"{kind}_")}
    assert len(mine) == CASES
    assert not {file: outcome for file, outcome in mine.items() if outcome not in ("fields", "sentence")}
    assert sum(outcome == "sentence" for outcome in mine.values()) > CASES / 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_read_well_before_they_are_damaged(tmp_path, kind):
    path = tmp_path / f"{kind}.{SUFFIX.get(kind, kind)}"
    path.write_bytes(whole(kind))
    got = readers.read(path, time="2000-01-01" if kind == "croco" else None)
    assert got.velocity.shape == ((2, 2, 3, 2) if kind == "croco" else (6, 5, 7, 2))


class Made:
    """Pickles to whatever it is given: function, arguments and state."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


class Pickles:
    """Arrays that a pickle would build out of memory that is not theirs."""

    objects = Made(np.ndarray, ((1,), "O", b"\x10" * 8))
    state = Made(
        np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), (1, (1,), np.dtype("O"), False, b"\x10" * 8)
    )
    scalar = Made(np._core.multiarray.scalar, (np.dtype("O"), b"\x10" * 8))
    too_few_bytes = Made(
        np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), (1, (10**9,), np.dtype("f8"), False, b"\x10" * 8)
    )
    many_bytes = Made(bytearray, (10**12,))
    strides = Made(np.ndarray, ((10**6,), "f8", b"\x00" * 8, 0, (0,)))


@pytest.mark.parametrize("name", [name for name in vars(Pickles) if not name.startswith("_")])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_builds_nothing_out_of_foreign_memory(tmp_path, name, protocol):
    path = tmp_path / "file.pickle"
    path.write_bytes(pickle.dumps([getattr(Pickles, name)], protocol))
    with pytest.raises(InputError, match=r"file\.pickle"):
        readers.read(Path(path))


class TestProbe:
    """HDF5 files are gone through by another process first, as some damaged ones keep the library busy for ever."""

    @pytest.fixture
    def path(self, tmp_path):
        (tmp_path / "whole.nc").write_bytes(whole("netcdf4"))
        probe._end()
        yield tmp_path / "whole.nc"
        probe._end()

    @pytest.mark.parametrize("program", ["import time; time.sleep(60)", "import os; os.abort()", "input()"])
    def test_what_it_does_not_come_back_from_is_damaged(self, path, monkeypatch, program):
        with monkeypatch.context() as patch:
            patch.setattr(probe, "LOOKS", program)
            patch.setattr(probe, "PATIENCE", 1.0)
            with pytest.raises(InputError, match=r"cannot read .*whole\.nc: the HDF5 library breaks down over it"):
                readers.read(path)
        assert len(readers.read(path)) == 6

    def test_it_runs_no_module_that_lies_beside_the_data(self, path, monkeypatch):
        (path.parent / "h5py.py").write_text("open('trace', 'w')")
        monkeypatch.chdir(path.parent)
        probe.check_hdf5(Path("whole.nc"))
        assert not (path.parent / "trace").exists()

    def test_one_process_serves_all_files(self, path):
        readers.read(path)
        first = probe._process.pid
        readers.read(path)
        assert probe._process.pid == first
