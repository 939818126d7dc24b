"""Peak memory of this process. Standard library only: a benchmark's sides run where nothing else is installed."""

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
