"""Files are written whole or not at all."""

import contextlib
import os
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from jax_repaint.errors import InputError

# What NumPy raises where an .npz file is damaged.
DAMAGED = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile)


def reason(e: OSError) -> str:
    """What the system says; more plainly where a file is in the place of a folder."""
    return f"{e.filename} is a file, not a folder" if isinstance(e, FileExistsError) else e.strerror or str(e)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path` and renames it to `path` when the block ends without error.

    The temporary name keeps the suffix of `path`, because writers choose their format by it. A link stays one: what it
    leads to is replaced.

    Raises:
      InputError: the folder cannot be written, `path` is a device or a pipe, or the disk is full; nothing is left
        behind.
    """
    path = Path(os.path.realpath(path))
    _check_regular(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    except OSError as e:
        raise InputError(f"cannot write {path}: {reason(e)}") from e
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        publish(temporary)
        os.replace(temporary, path)
    except OSError as e:
        raise InputError(f"cannot write {path}: {e.strerror or e}") from e
    finally:
        temporary.unlink(missing_ok=True)


def read_table(path: Path, columns: Sequence[str] = (), numbers: Sequence[str] = ()) -> pd.DataFrame:
    """The table in a .csv file; one without columns if the file is empty.

    Raises:
      InputError: the file cannot be read, is no table, lacks one of `columns` or `numbers`, or has words in a column
        of `numbers`.
    """
    try:
        table = pd.read_csv(path)
    except pd.errors.EmptyDataError:
        table = pd.DataFrame()
    except (OSError, ValueError) as e:
        raise InputError(f"{path} is no table ({' '.join(str(e).split())})") from e
    for name in (*columns, *numbers):
        if name not in table:
            raise InputError(f"{path} has no column {name!r}")
    check_numbers(table, numbers, path)
    return table


def check_numbers(table: pd.DataFrame, columns: Sequence[str], path: Path) -> None:
    """Raises InputError if one of the columns of the table, which `path` holds, is missing or not of numbers."""
    for name in columns:
        if name not in table:
            raise InputError(f"{path} has no column {name!r}")
        if len(table) and not pd.api.types.is_numeric_dtype(table[name]):
            wrong = table[name][pd.to_numeric(table[name], errors="coerce").isna() & table[name].notna()]
            shown = (wrong if len(wrong) else table[name]).iloc[0]
            raise InputError(f"{path}: column {name!r} holds {shown!r}, which is no number")


def replace_folder(new: Path, folder: Path, old: Path) -> None:
    """Moves `new` to `folder`, and what is there to `old`.

    A folder cannot be replaced in one step; the old one comes back if the new one does not arrive.
    """
    try:
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
    except BaseException:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        raise


def publish(path: Path) -> None:
    """Gives a temporary file or folder, which is private, the rights that the user's umask leaves."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def _check_regular(path: Path) -> None:
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InputError(f"cannot write {path}: it is no regular file")


def check_kept(path: Path, inputs: Sequence[str | os.PathLike]) -> None:
    """Raises InputError if `path` is one of the files that are read."""
    if path.exists() and any(os.path.exists(one) and path.samefile(one) for one in inputs):
        raise InputError(f"{path} is a file that this command reads, and would be lost; give --out another name")


def is_zarr(path: Path) -> bool:
    """Whether a folder is a Zarr store, by its markers."""
    return any((path / marker).is_file() for marker in (".zgroup", "zarr.json", ".zmetadata"))


def check_store(path: Path) -> None:
    """Raises InputError if `path` has the suffix of a Zarr store and something else is there."""
    if path.suffix == ".zarr" and path.exists() and not is_zarr(path):
        raise InputError(f"cannot write {path}: it exists and is not a Zarr store")


def check_writable(
    path: str | os.PathLike, suffixes: tuple[str, ...] = (), inputs: Sequence[str | os.PathLike] = ()
) -> None:
    """Before long work: whether `path` has a known suffix and its folder takes files; creates the folder.

    Args:
      inputs: files that are read, of which `path` must be none.

    Raises:
      InputError: it has not, or does not, `path` is a folder and no Zarr store, or one of `inputs`, which would be
        lost.
    """
    path = Path(path)
    if suffixes and path.suffix not in suffixes:
        raise InputError(f"cannot write {path}: the suffix must be one of {', '.join(suffixes)}")
    if path.is_dir() and path.suffix != ".zarr":
        raise InputError(f"cannot write {path}: it is a folder")
    check_store(path)
    _check_regular(path)
    check_kept(path, inputs)
    check_parent(path)


def check_parent(path: Path) -> None:
    """Raises InputError if the folder that `path` is to lie in takes no files; creates it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as e:
        raise InputError(f"cannot write {path}: {reason(e)}") from e


def check_makeable(folder: Path, what: str) -> None:
    """Before long work: whether files can be written into a folder that may not be there yet; makes nothing.

    Raises:
      InputError: a file or missing rights are in the way; `what` begins the sentence.
    """
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not there.is_dir():
        raise InputError(f"{what}: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{what}: {there} cannot be written to; give a folder of your own")


def cache_folder(*parts: str) -> Path:
    """A folder for what can be computed again: under JAX_REPAINT_CACHE, else XDG_CACHE_HOME, else ~/.cache."""
    own, shared = os.environ.get("JAX_REPAINT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    root = Path(own) if own else Path(shared or Path.home() / ".cache") / "jax_repaint"
    return root.joinpath(*parts)
