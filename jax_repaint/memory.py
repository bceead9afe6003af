"""How much memory this machine has left."""

import os
from pathlib import Path


def available() -> int:
    """Bytes that a process may still take without swapping, the cache of files counted as free."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kibibytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        return 1024 * int(kibibytes)
    except (OSError, StopIteration, ValueError):
        # Not Linux: pages that hold nothing at all.
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
