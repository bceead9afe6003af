"""What a long command has made before it ends, so that the same command goes on where it was stopped.

NAME_DIGITS/METHOD_NUMBER_COUNT.npz    members of the COUNT cases of a part, that NUMBER names; seconds and calls

The digits name everything that members depend on, so that another command of the same NAME has files of its own. They
are removed when their command has written what it is for.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from jax_repaint import files, provenance
from jax_repaint.errors import InputError
from jax_repaint.methods import Result
from jax_repaint.model import Model, fingerprint

WORTH = 1.0  # seconds from which a file is worth its room


class Unfinished:
    """The parts of one command that are done.

    Args:
      name: of the folder, without the digits.
    """

    def __init__(self, name: str | os.PathLike):
        self.name = self.folder = Path(name)

    def begin(self, trained: Model, asked: Mapping[str, Any]) -> None:
        """Looks for what is done of the same by the same program.

        Args:
          asked: everything that members depend on beside model, code and machine, as JSON takes it.
        """
        asked = dict(asked) | {
            "model": fingerprint(trained), "source": provenance.source(), "jax": jax.__version__,
            "backend": jax.default_backend(),
        }  # fmt: skip
        digits = hashlib.blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=8).hexdigest()
        self.folder = self.name.with_name(f"{self.name.name}_{digits}")
        if self.folder.exists():
            logging.info("goes on with what %s holds", self.folder)

    def made(self, method: str, number: int, count: int, make: Callable[[], Result]) -> Result:
        """The result of a part of `count` cases, from its file or as `make` makes it."""
        found = self._get(method, number, count)
        if found is None:
            found = make()
            self._put(method, number, found)
        return found

    def _get(self, method: str, number: int, count: int) -> Result | None:
        path = self._path(method, number, count)
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as held:
                members = [held[f"members_{i}"] for i in range(count)]
                return Result(members, float(held["seconds"]), int(held["calls"]), bool(held["antithetic"]))
        except FileNotFoundError:
            return None
        except files.DAMAGED:
            logging.warning("%s cannot be read and is made again", path)
            return None

    def _put(self, method: str, number: int, result: Result) -> None:
        if result.seconds * len(result.members) < WORTH:
            return
        held = {f"members_{i}": made for i, made in enumerate(result.members)}
        try:
            with files.whole_file(self._path(method, number, len(result.members))) as temporary:
                np.savez(
                    temporary, seconds=result.seconds, calls=result.calls, antithetic=result.antithetic, **held
                )  # fmt: skip
        except InputError as e:
            logging.warning("%s: after a stop it would be made again", e)

    def remove(self) -> None:
        """Removes the files of this command."""
        for path in self.folder.glob("*.npz"):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _path(self, method: str, number: int, count: int) -> Path:
        return self.folder / f"{method}_{number}_{count}.npz"
