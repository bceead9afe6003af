"""What made a result: the code and the libraries, by their versions, and the machine.

WORKDIR/environment.json, environment.K.json    a list with one entry for every start of process 0, or K
"""

import datetime
import hashlib
import importlib.metadata
import json
import platform
import shlex
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import jax

from jax_repaint import files
from jax_repaint.errors import InputError

ENVIRONMENT = "environment.json"
PACKAGE = Path(__file__).resolve().parent


@cache
def revision(package: Path = PACKAGE) -> str:
    """Commit of the working copy that the package lies in, with `.dirty` if files were changed; empty without one."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", package, *words], capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    try:
        # An environment may lie in the working copy of another project.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != package.parent:
            return ""
        return git("rev-parse", "--short=12", "HEAD") + ".dirty" * bool(git("status", "--porcelain", "-uno"))
    except (OSError, subprocess.SubprocessError):
        return ""


@cache
def source(package: Path = PACKAGE) -> str:
    """16 hex digits of the package's modules as they are, committed or not."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def versions(*names: str) -> dict[str, str]:
    """Versions of this package, with its revision as in PEP 440 (1.0+g0123abc), and of the distributions named."""
    ours = importlib.metadata.version("jax_repaint")
    ours = f"{ours}+g{revision()}" if revision() else ours
    return {"jax_repaint": ours} | {name: importlib.metadata.version(name) for name in names}


def note_start(workdir: Path, index: int = 0) -> None:
    """Adds what runs here, on what and since when to the list in `workdir`.

    Raises:
      InputError: the folder cannot be written, or the file there is no such list.
    """
    path = Path(workdir) / (f"environment.{index}.json" if index else ENVIRONMENT)
    starts = []
    if path.exists():
        try:
            starts = json.loads(path.read_text())
        except (OSError, ValueError) as e:
            raise InputError(f"{path} cannot be read ({e}); move it away") from e
        if not isinstance(starts, list):
            raise InputError(f"{path} holds no list of starts; move it away")
    devices = jax.local_devices()
    starts += [
        {
            "started": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "command": shlex.join(sys.orig_argv),
            "host": socket.gethostname(),
            "python": platform.python_version(),
            "versions": versions("jax", "jaxlib", "flax", "optax", "numpy"),
            "devices": f"{len(devices)} x {devices[0].device_kind}, {devices[0].platform}",
        }
    ]
    with files.whole_file(path) as temporary:
        temporary.write_text(json.dumps(starts, indent=1) + "\n")
