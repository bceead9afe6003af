"""A workdir is for one run at a time, and a folder that is read and written anew for one process.

WORKDIR/lock, lock.K    held while process K of a run writes there, free as soon as it is gone
"""

import contextlib
import errno
import fcntl
import io
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import logging

from jax_repaint.errors import InputError
from jax_repaint.files import reason

LOCK = "lock"


@contextlib.contextmanager
def locked(workdir: str | os.PathLike, index: int = 0, count: int = 1, run: str = "sweep") -> Iterator[None]:
    """Holds `workdir` for process `index` of the `count` that share one run, which is called a sweep or a training.

    The system takes a lock back from a process that is gone, so none is ever stale. Where the file system has no
    locks, a warning says so and nothing is held.

    Raises:
      InputError: another run, or the same process of this one, is running there; or the folder cannot be written.
    """
    workdir = Path(workdir)
    with contextlib.ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            shared, own = (stack.enter_context(open(workdir / n, "a+")) for n in (LOCK, f"{LOCK}.{index}"))
            _share(shared, count, workdir, run)
            _take(own, workdir, run)
        except OSError as e:
            if e.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL):
                raise InputError(f"cannot write {workdir}: {reason(e)}") from e
            logging.warning("%s has no locks (%s): see to it that no other %s runs there", workdir, e.strerror, run)
        yield


@contextlib.contextmanager
def in_turn(folder: str | os.PathLike) -> Iterator[None]:
    """Holds a folder, without a file in it, for what takes a moment; waits until others are done.

    Where the file system has no locks of folders nothing is held.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _share(file: io.TextIOWrapper, count: int, workdir: Path, run: str) -> None:
    """The lock of the folder, which the processes of one run share; the first one writes how many they are."""
    for _ in range(20):
        if _try(file, fcntl.LOCK_EX):
            _sign(file, count)
            # Another one may step in between, when this lock is given up for a shared one.
            if count == 1 or _try(file, fcntl.LOCK_SH):
                return
        elif count > 1 and _try(file, fcntl.LOCK_SH):
            holder = _signature(file)
            if holder.get("processes") == count:
                return
            raise InputError(
                f"a {run} of {holder.get('processes')} processes is running in {workdir}; this one is of {count}"
            )
        # The first process of a run holds it alone for a moment.
        time.sleep(0.05)
    raise _running(file, workdir, run)


def _take(file: io.TextIOWrapper, workdir: Path, run: str) -> None:
    if not _try(file, fcntl.LOCK_EX):
        raise _running(file, workdir, run)
    _sign(file, 1)


def _try(file: io.TextIOWrapper, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sign(file: io.TextIOWrapper, count: int) -> None:
    file.truncate(0)
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "processes": count})
    # What a full disk does not take must not be left in a buffer, as closing the file would fail on it again.
    os.write(file.fileno(), text.encode())


def _signature(file: io.TextIOWrapper) -> dict[str, Any]:
    file.seek(0)
    try:
        return json.load(file)
    except ValueError:
        return {}


def _running(file: io.TextIOWrapper, workdir: Path, run: str) -> InputError:
    holder = _signature(file)
    return InputError(
        f"another {run} is running in {workdir} (process {holder.get('pid', '?')} on {holder.get('host', '?')}); "
        "wait for it, stop it, or choose another workdir"
    )
