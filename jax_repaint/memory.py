"""How much memory a process may still take."""

from collections.abc import Iterator
from pathlib import Path

import psutil


def available() -> int:
    """Bytes that may still be taken without swapping, the cache of files counted as free.

    What the machine has left, or what the control group of a container or of a batch job allows if that is less.
    """
    return max(min([psutil.virtual_memory().available, *_allowed(Path("/"))]), 0)


def _allowed(root: Path) -> Iterator[int]:
    """What each control group above this process leaves of its limit."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for group in groups:
        _, kinds, path = group.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        # Version 2 has one tree of groups, version 1 one for each kind.
        top = root / "sys/fs/cgroup" / kinds
        limit, used = ("memory.limit_in_bytes", "memory.usage_in_bytes") if kinds else ("memory.max", "memory.current")
        folder = top / path.lstrip("/")
        for here in (folder, *folder.parents):
            try:
                rows = (line.split() for line in (here / "memory.stat").read_text().splitlines())
                cached = dict(rows).get("inactive_file", "0")
                yield int((here / limit).read_text()) - int((here / used).read_text()) + int(cached)
            except (OSError, ValueError):
                # No limit ("max"), or no files of this group in a container.
                pass
            if here == top:
                break
