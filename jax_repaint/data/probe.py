"""HDF5 files are gone through by another process first: over a damaged heap the library can run for ever or crash.

One process serves all files; it starts with the first and ends with the program.
"""

import atexit
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from jax_repaint.errors import InputError

PATIENCE = 30.0  # seconds for the names and attributes of one file

# Only what breaks off matters here: what the library can say about a file, the reader will say.
LOOKS = """
import contextlib, json, sys, h5py

def look(group):
    for item in (group, *(get(group, name) for name in names(group))):
        for key in names(item.attrs) if hasattr(item, "attrs") else ():
            get(item.attrs, key)
        if item is not group and isinstance(item, h5py.Group):
            look(item)

def names(mapping):
    with contextlib.suppress(Exception):
        return list(mapping)
    return []

def get(mapping, key):
    with contextlib.suppress(Exception):
        return mapping[key]

for line in sys.stdin:
    with contextlib.suppress(Exception), h5py.File(json.loads(line), "r") as file:
        look(file)
    print("done", flush=True)
"""

_lock = threading.Lock()
_process: subprocess.Popen | None = None
_owner = 0


def check_hdf5(path: Path) -> None:
    """Goes through the names and attributes of an HDF5 file without risk to this process.

    Raises:
      InputError: the library does not come back from it.
    """
    if not sys.executable:
        return
    with _lock:
        process = _running()
        timer = threading.Timer(PATIENCE, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(os.path.abspath(path)) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = ""
        finally:
            timer.cancel()
        if not answer:
            _end()
            raise InputError(f"cannot read {path}: the HDF5 library breaks down over it, so the file is damaged")


def _running() -> subprocess.Popen:
    global _process, _owner
    # A forked program must not talk into its parent's pipes.
    if _process is None or _owner != os.getpid() or _process.poll() is not None:
        # -P keeps modules that lie beside the data from being imported.
        _process = subprocess.Popen(
            [sys.executable, "-P", "-c", LOOKS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        _owner = os.getpid()
    return _process


@atexit.register
def _end() -> None:
    global _process
    if _process is not None and _owner == os.getpid():
        _process.kill()
        _process.communicate()
        _process = None
