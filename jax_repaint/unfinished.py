"""What an evaluation has made before it ends, so that the same command goes on where it was stopped.

OUT/unfinished_DIGITS/METHOD_FIRST_COUNT.npz    members of COUNT cases from number FIRST on; seconds and calls

The digits name everything that members depend on, so that another evaluation into the same folder has files of its own.
They are removed when their evaluation has written its tables.
"""

import contextlib
import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from jax_repaint import files
from jax_repaint.errors import InputError
from jax_repaint.methods import Result

WORTH = 10.0  # seconds from which a file is worth its room


class Unfinished:
    """The parts of one evaluation that are done.

    Args:
      out: folder of the evaluation.
      asked: everything that members depend on, as JSON takes it.
    """

    def __init__(self, out: Path, asked: Mapping[str, Any]):
        digits = hashlib.blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=8).hexdigest()
        self.folder = out / f"unfinished_{digits}"
        if self.folder.exists():
            logging.info("goes on with what %s holds of this evaluation", self.folder)

    def get(self, method: str, first: int, count: int) -> Result | None:
        """The result of `count` cases from number `first` on; None where it has to be made."""
        path = self._path(method, first, count)
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as held:
                members = [held[f"members_{i}"] for i in range(count)]
                return Result(members, float(held["seconds"]), int(held["calls"]), bool(held["antithetic"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            logging.warning("%s cannot be read and is made again", path)
            return None

    def put(self, method: str, first: int, result: Result) -> None:
        """Keeps a result that took longer than WORTH; where the disk is full it is made again after a stop."""
        if result.seconds * len(result.members) < WORTH:
            return
        held = {f"members_{i}": made for i, made in enumerate(result.members)}
        try:
            with files.whole_file(self._path(method, first, len(result.members))) as temporary:
                np.savez(
                    temporary, seconds=result.seconds, calls=result.calls, antithetic=result.antithetic, **held
                )  # fmt: skip
        except InputError as e:
            logging.warning("%s: after a stop it would be made again", e)

    def remove(self) -> None:
        """Removes the files of this evaluation."""
        for path in self.folder.glob("*.npz"):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _path(self, method: str, first: int, count: int) -> Path:
        return self.folder / f"{method}_{first}_{count}.npz"
