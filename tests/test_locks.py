"""A workdir is for one run at a time, and free as soon as that is gone."""

import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
import threading

import pytest

from jax_repaint import locks
from jax_repaint.errors import InputError

HOLD = "import sys, time; from jax_repaint import locks\nwith locks.locked(sys.argv[1]): print('in'); time.sleep(60)"


def without_locks(file, kind):
    raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))


def test_unwritable_folders_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*file/sweep"), locks.locked(tmp_path / "file" / "sweep"):
        pass


def test_a_disk_that_takes_no_more_is_named(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write .*: File too large"), locks.locked(tmp_path):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_two_runs_exclude_each_other(tmp_path):
    with locks.locked(tmp_path):
        message = rf"another sweep is running in .* \(process {os.getpid()} on "
        with pytest.raises(InputError, match=message), locks.locked(tmp_path):
            pass
        with pytest.raises(InputError, match="another sweep is running"), locks.locked(tmp_path, 0, 2):
            pass
    with locks.locked(tmp_path, 1, 2), locks.locked(tmp_path, 0, 2):
        for index, count, message in ((1, 2, "another sweep"), (0, 1, "another sweep"), (0, 3, "of 2 processes")):
            with pytest.raises(InputError, match=message), locks.locked(tmp_path, index, count):
                pass
    with locks.locked(tmp_path):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    with subprocess.Popen([sys.executable, "-uc", HOLD, tmp_path], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "in\n"
        with pytest.raises(InputError, match=f"process {holder.pid} on"), locks.locked(tmp_path):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with locks.locked(tmp_path):
            pass


def test_what_takes_a_moment_is_done_in_turn(tmp_path, monkeypatch):
    done = []

    def second():
        with locks.in_turn(tmp_path):
            done.append("second")

    with locks.in_turn(tmp_path):
        waiting = threading.Thread(target=second)
        waiting.start()
        waiting.join(0.1)
        done.append("first")
    waiting.join(10)
    assert done == ["first", "second"]
    assert not list(tmp_path.iterdir())
    # As the file system of a network may not have them.
    monkeypatch.setattr(fcntl, "flock", without_locks)
    with locks.in_turn(tmp_path):
        pass


def test_file_systems_without_locks_are_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(fcntl, "flock", without_locks)
    with locks.locked(tmp_path):
        (tmp_path / "part").write_text("")
    assert "has no locks" in caplog.text
