"""Files are whole or absent, and a user's mistake is one line and exit code 2."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import xarray as xr

from jax_repaint import command, model
from jax_repaint.data import readers
from jax_repaint.errors import InputError
from jax_repaint.files import DAMAGED, cache_folder, check_writable, replace_folder, whole_file


def test_a_file_appears_whole_with_the_rights_of_the_user(tmp_path):
    path = tmp_path / "new" / "folder" / "result.nc"
    before = os.umask(0o027)
    try:
        with whole_file(path) as temporary:
            temporary.write_text("half")
            assert temporary.suffix == ".nc"
            assert temporary.parent == path.parent
            assert not path.exists()
            temporary.write_text("whole")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert path.read_text() == "whole"
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(path.parent.iterdir()) == [path]


def test_models_and_stores_have_the_rights_of_the_user(tmp_path):
    before = os.umask(0o027)
    try:
        model.save(tiny.model(), tmp_path / "model")
        readers.write(tiny.fields(), tmp_path / "fields.zarr")
        readers.write(tiny.fields(), tmp_path / "fields.nc")
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert len(modes) > 10
    assert {path: mode for path, mode in modes.items() if mode != (0o750 if path.is_dir() else 0o640)} == {}


def write(path, error=None):
    with whole_file(path) as temporary:
        temporary.write_text("new")
        if error:
            raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_file_leaves_the_old_one(tmp_path, error):
    path = tmp_path / "result.npz"
    write(path)
    path.write_text("old")
    with pytest.raises(error):
        write(str(path), error)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_bit_that_turned_is_damage_and_no_mistake_of_the_program():
    content, rng = io.BytesIO(), np.random.default_rng(0)
    np.savez(content, x=rng.standard_normal(20), y=1.0)
    found = set()
    for _ in range(3000):
        harmed = bytearray(content.getvalue())
        harmed[rng.integers(len(harmed))] ^= 1 << rng.integers(8)
        try:
            with np.load(io.BytesIO(harmed), allow_pickle=False) as held:
                held["x"], float(held["y"])
        except DAMAGED as e:
            found.add(type(e))
    assert len(found) > 3


def test_a_full_disk_is_the_users_to_mend(tmp_path):
    with pytest.raises(InputError, match=r"cannot write .*result\.npz: No space left"):
        write(tmp_path / "result.npz", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert not list(tmp_path.iterdir())


def test_folders_that_cannot_be_written_are_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("not a folder")
    for refuse in (check_writable, write):
        with pytest.raises(InputError, match=r"cannot write .*file/result\.nc: .*file is a file, not a folder"):
            refuse(file / "result.nc")
    (tmp_path / "result.nc").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        write(tmp_path / "result.nc")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "result.nc"]


def test_a_link_stays_and_a_pipe_is_refused(tmp_path):
    (tmp_path / "old.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "old.txt")
    with whole_file(tmp_path / "link.txt") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "old.txt").read_text() == "new"
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(InputError, match="no regular file"), whole_file(tmp_path / "pipe.txt"):
        pass
    with pytest.raises(InputError, match="no regular file"):
        check_writable(tmp_path / "pipe.txt")
    assert (tmp_path / "pipe.txt").is_fifo()


def test_what_is_read_is_not_replaced(tmp_path):
    (tmp_path / "data.nc").write_text("data")
    (tmp_path / "link.nc").symlink_to("data.nc")
    inputs = [tmp_path / "gone.nc", tmp_path / "data.nc"]
    for path in (tmp_path / "data.nc", tmp_path / "link.nc", tmp_path / "." / "data.nc"):
        with pytest.raises(InputError, match="is a file that this command reads, and would be lost"):
            check_writable(path, (".nc",), inputs)
    check_writable(tmp_path / "gone.nc", (".nc",), inputs)


def test_a_folder_comes_back_if_the_new_one_does_not_arrive(tmp_path):
    folder, old = tmp_path / "model", tmp_path / "old"
    folder.mkdir()
    (folder / "weights").write_text("first")
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "nowhere", folder, old)
    assert (folder / "weights").read_text() == "first"
    assert not old.exists()


def test_check_writable_wants_a_known_suffix_and_leaves_nothing(tmp_path):
    check_writable(tmp_path / "deep" / "result.nc", (".nc", ".npz"))
    check_writable(str(tmp_path / "result"))
    assert [p.name for p in tmp_path.rglob("*")] == ["deep"]
    (tmp_path / "folder.nc").mkdir()
    with pytest.raises(InputError, match=r"folder\.nc: it is a folder"):
        check_writable(tmp_path / "folder.nc", (".nc",))
    (tmp_path / "folder.zarr").mkdir()
    (tmp_path / "file.zarr").write_text("mine")
    for name in ("folder.zarr", "file.zarr"):
        with pytest.raises(InputError, match=rf"{name}: it exists and is not a Zarr store"):
            check_writable(tmp_path / name, (".nc", ".zarr"))
    xr.Dataset({"u": ("x", np.zeros(3))}).to_zarr(tmp_path / "store.zarr", zarr_format=2)
    check_writable(tmp_path / "store.zarr", (".nc", ".zarr"))
    with pytest.raises(InputError, match=r"one of \.nc, \.npz"):
        check_writable(tmp_path / "other" / "result.csv", (".nc", ".npz"))
    assert not (tmp_path / "other").exists()


def test_the_cache_is_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("JAX_REPAINT_CACHE", "/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
    assert cache_folder("twin", "key") == Path("/own/twin/key")
    monkeypatch.setenv("JAX_REPAINT_CACHE", "")
    assert cache_folder("twin") == Path("/shared/jax_repaint/twin")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/user")
    assert cache_folder() == Path("/home/user/.cache/jax_repaint")


@pytest.fixture
def outcome(monkeypatch, capsys):
    """Exit code and stderr of a command, with absl's parsing and exits reduced to calls."""

    def app_run(guarded, flags_parser):
        guarded(flags_parser(sys.argv))

    def of(main, *argv):
        monkeypatch.setattr(sys, "argv", ["command", *argv])
        monkeypatch.setattr(command.app, "run", app_run)
        code = 0
        try:
            command.run(main)
        except SystemExit as e:
            code = e.code
        return code, capsys.readouterr().err

    return of


def test_a_mistake_is_one_line_and_code_2(outcome):
    def refuse(_):
        raise InputError("frames must be at least 1, got 0")

    assert outcome(refuse) == (2, "error: frames must be at least 1, got 0\n")
    assert outcome(lambda _: None) == (0, "")
    code, text = outcome(lambda _: None, "--no_such_flag=1")
    assert code == 2
    assert text.startswith("error: Unknown command line flag 'no_such_flag'")
    assert text.count("\n") == 1


def test_what_the_system_refuses_is_one_line(outcome, tmp_path):
    """Whatever it is in the middle of."""
    name = tmp_path / ("long" * 100)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert outcome(lambda _: check_writable(name)) == (2, f"error: cannot use {name}: File name too long\n")
    assert outcome(full) == (2, "error: No space left on device\n")


def test_a_mistake_of_the_program_stays_visible(outcome):
    def fail(_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        outcome(fail)


def test_a_real_command_ends_with_one_line_and_code_2(tmp_path):
    program = (
        "import sys; from jax_repaint import command; from jax_repaint.errors import InputError\n"
        "def main(_):\n    print('begun')\n    raise InputError('what, and what would be right')\n"
        "command.run(main)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (2, "begun\n", "error: what, and what would be right\n")
