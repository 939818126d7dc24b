"""Peak memory of this process, and what is free. Standard library only: a benchmark's sides have nothing else."""

from __future__ import annotations

import resource
import sys


def peak_memory_mb() -> float:
    """Peak resident memory of this process in megabytes (1e6 bytes)."""
    try:
        # Not ru_maxrss: on Linux a new process inherits its parent's.
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 / 1e6 for line in status if line.startswith("VmHWM:"))
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def available_bytes(root: str = "/") -> int | None:
    """Memory that can be had without swapping, in a container at most what it may use; None where nobody tells."""
    try:
        with open(f"{root}proc/meminfo", encoding="ascii") as lines:
            free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    try:
        with open(f"{root}sys/fs/cgroup/memory.max", encoding="ascii") as limit:
            return min(free, int(limit.read()))
    except (OSError, ValueError):  # no container, or one without a limit, whose file says "max"
        return free
