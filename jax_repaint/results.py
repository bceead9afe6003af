"""What a sweep keeps on disk: rows in Parquet parts that are written whole and checked by their names.

    WORKDIR/config.json                     what the sweep is; with a part there, a changed one is refused
    WORKDIR/lock, lock.K                    see locks.py
    WORKDIR/environment.json                and one for each further process, see provenance.py
    WORKDIR/parts/UNIT-CHECKSUM.parquet     rows of finished tasks

A task is one point on one frame with one pattern and one seed; UNIT is the hash of the tasks that a part holds,
CHECKSUM that of its bytes. Whatever is killed, a part is there and right, or its tasks are run again.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging

from jax_repaint import files, locks
from jax_repaint.checkpoint import flatten
from jax_repaint.errors import InputError
from jax_repaint.methods import DETERMINISTIC
from jax_repaint.provenance import ENVIRONMENT

CONFIG, PARTS, ROWS_VERSION = "config.json", "parts", "rows_version"
# Raised with every change of the code that makes other rows of the same settings; a workdir of older rows is refused.
VERSION = 3
# One row is one point, pattern, frame, seed, stage and size of the ensemble.
SCHEMA = pa.schema(
    {
        "task": pa.string(),  # hash of model, data, point, seed, pattern and frame
        "point": pa.int64(),  # its number in the sweep
        "label": pa.string(),
        "method": pa.string(),
        "settings": pa.string(),  # of the point, as JSON
        "pattern": pa.string(),
        "seed": pa.int64(),
        "frame": pa.int64(),
        "time": pa.timestamp("ns"),
        "block": pa.int64(),  # frames within a decorrelation time, for intervals
        "stage": pa.int64(),  # from 1
        "observed": pa.int64(),  # cells given
        "ocean": pa.int64(),  # cells in all
        # Scores of scoring.FrameScores; empty if a member failed.
        "members": pa.int64(),
        "antithetic": pa.bool_(),
        "cells": pa.int64(),
        "mse_member": pa.float64(),
        "mse_mean": pa.float64(),
        "variance": pa.float64(),
        "crps": pa.float64(),
        "coverage90": pa.float64(),
        "energy_member": pa.float64(),
        "energy_truth": pa.float64(),
        "failed_members": pa.int64(),  # whose values are not finite
        "failed_at": pa.string(),  # where the first of them failed
        **{f"mse_{name}": pa.float64() for name in DETERMINISTIC},
        # Squared errors by distance to the nearest observation; edges in cells.
        "distance_edges": pa.list_(pa.float64()),
        "distance_cells": pa.list_(pa.int64()),
        "distance_mean": pa.list_(pa.float64()),
        "distance_linear": pa.list_(pa.float64()),
        "calls": pa.int64(),  # of the network, for all members, up to this stage
        "device_seconds": pa.float64(),  # the task's share of its batch, up to this stage
        "compile_seconds": pa.float64(),  # of the task's program
    }
)
KEY = ["point", "seed", "pattern", "frame", "stage", "members"]
TIMES = ["device_seconds", "compile_seconds"]  # all that another run of the same task changes


def digest(content: Any) -> str:
    """16 hex digits that name what can be written as JSON."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()


def write_part(workdir: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Writes rows (columns of SCHEMA) whole, and returns the part.

    Raises:
      InputError: the folder cannot be written or the disk is full; nothing is left behind.
    """
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), buffer, compression="zstd")
    content = buffer.getvalue()
    unit = digest(sorted({row["task"] for row in rows}))
    path = Path(workdir) / PARTS / f"{unit}-{_checksum(content)}.parquet"
    with files.whole_file(path) as temporary:
        temporary.write_bytes(content)
    return path


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def read_parts(workdir: Path, remove_damaged: bool = False) -> pd.DataFrame:
    """The rows of all parts that are whole, in the order of KEY; damaged parts are named in a warning.

    Args:
      remove_damaged: whether damaged parts are deleted too.
    """
    tables = [SCHEMA.empty_table()]
    for path in sorted((Path(workdir) / PARTS).glob("[!.]*.parquet")):
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            # Another process has found it damaged too, and was faster.
            continue
        if path.stem.split("-")[-1] != _checksum(content):
            logging.warning("%s is damaged; its rows are computed again", path)
            if remove_damaged:
                path.unlink(missing_ok=True)
            continue
        tables.append(pq.read_table(io.BytesIO(content), schema=SCHEMA))
    rows = pa.concat_tables(tables).to_pandas()
    # Only processes that knew nothing of each other can have run a task twice; their rows are alike.
    return rows.drop_duplicates(["task", "stage", "members"]).sort_values(KEY, ignore_index=True)


def in_order(rows: pd.DataFrame, patterns: Sequence[str]) -> pd.DataFrame:
    """Rows with their patterns in this order, which is that of tables; those that it lacks come last."""
    place = {pattern: number for number, pattern in enumerate(patterns)}
    return rows.sort_values(
        "pattern",
        key=lambda names: names.map(lambda name: place.get(name, len(place))),
        kind="stable",
        ignore_index=True,
    )


def remove_unfinished(workdir: Path) -> None:
    """Deletes what killed processes were writing; for a process that is alone in `workdir`."""
    for path in (Path(workdir) / PARTS).glob(".*.parquet"):
        path.unlink(missing_ok=True)


def claim(workdir: Path, sweep: Mapping[str, Any], alone: bool = False) -> None:
    """Makes `workdir` this sweep's, or sees that it is.

    Args:
      sweep: what it is, as JSON can hold it.
      alone: whether no other process can be at work there: a sweep that has finished nothing then gives way.

    Raises:
      InputError: the folder belongs to another sweep, with what differs; or to something else; or cannot be written.
    """
    if not is_claimed(workdir, sweep, alone):
        with files.whole_file(Path(workdir) / CONFIG) as temporary:
            temporary.write_text(json.dumps(sweep, indent=1, sort_keys=True) + "\n")


def is_sweep(workdir: Path) -> bool:
    """Whether `workdir` is a sweep's, which has no parts before its first batch is finished."""
    if (Path(workdir) / PARTS).is_dir():
        return True
    try:
        return ROWS_VERSION in json.loads((Path(workdir) / CONFIG).read_text())
    except (OSError, ValueError, TypeError):
        return False


def is_claimed(workdir: Path, sweep: Mapping[str, Any], alone: bool = False) -> bool:
    """Whether `workdir` is this sweep's, and not free yet; raises as `claim` does, and writes nothing."""
    path = Path(workdir) / CONFIG
    # Processes of one sweep that start together make this file, and the first parts, at the same time.
    others = [p.name for p in path.parent.iterdir() if not p.name.startswith((locks.LOCK, "."))]
    if not path.exists():
        if others:
            raise InputError(f"{workdir} is not empty and holds no sweep; choose another workdir")
        return False
    try:
        theirs = flatten(json.loads(path.read_text()))
    except (OSError, ValueError, AttributeError) as e:
        raise InputError(f"{path} cannot be read ({e})") from e
    ours = flatten(json.loads(json.dumps(sweep)))
    if ROWS_VERSION in ours and ROWS_VERSION not in theirs:
        raise InputError(f"{workdir} holds something else, such as a training, and no sweep; choose another workdir")
    names = sorted(n for n in theirs.keys() | ours.keys() if theirs.get(n) != ours.get(n))
    if names and alone and _is_unused(path.parent):
        return False
    if names:
        shown = "; ".join(f"{n}: {theirs.get(n)!r} there, {ours.get(n)!r} here" for n in names[:8])
        more = f"; and {len(names) - 8} more" if len(names) > 8 else ""
        # Machines round differently, and each simulates the twin for itself.
        copied = ", or bring the cache of the machine that began it (~/.cache/jax_repaint)" * (names == ["frames"])
        raise InputError(f"{workdir} holds another sweep ({shown}{more}); choose another workdir{copied}")
    return True


def _is_unused(workdir: Path) -> bool:
    """Whether there is no more than a sweep makes before its first part."""
    made = (CONFIG, ENVIRONMENT.removesuffix("json"), locks.LOCK, ".")
    others = [path for path in workdir.iterdir() if not path.name.startswith(made)]
    return all(path.name == PARTS and not any(path.glob("[!.]*")) for path in others)
