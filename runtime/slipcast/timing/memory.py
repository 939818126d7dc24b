"""Memory of this process and of the machine, in megabytes (1e6 bytes)."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil


def resident_mb() -> float:
    """What is resident of this process."""
    return float(psutil.Process().memory_info().rss / 1e6)


def peak_mb() -> float:
    """The most that was ever resident of this process."""
    if sys.platform == "linux":
        # psutil does not tell, and ru_maxrss begins with the parent's: a new process inherits it.
        status = Path("/proc/self/status").read_text("ascii", "replace")
        return next(int(line.split()[1]) * 1024 / 1e6 for line in status.splitlines() if line.startswith("VmHWM:"))
    if sys.platform == "win32":
        return float(psutil.Process().memory_info().peak_wset / 1e6)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes, on macOS


def available_mb(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> float:
    """What can be had without swapping; in a container at most what it may use, which psutil does not know."""
    free = float(psutil.virtual_memory().available / 1e6)
    try:
        return min(free, int(limit.read_text("ascii")) / 1e6)
    except (OSError, ValueError):  # no container, or one without a limit, whose file says "max"
        return free
