"""Memory of this process and of the machine, in megabytes (1e6 bytes)."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

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


def available_mb(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """What can be had without swapping; in a container, or another control group of Linux, at most what it may use,
    which psutil does not know."""
    return min([float(psutil.virtual_memory().available / 1e6), *_limits_mb(groups, own)])


def _limits_mb(groups: Path, own: Path) -> Iterator[float]:
    """Of the groups that a process is in, of either version, and of those that they are in; within a container its own
    is the root."""
    try:
        lines = [line.split(":", 2) for line in own.read_text("utf-8", "replace").splitlines()]
    except OSError:  # another system
        lines = []
    paths = {kind: PurePosixPath(path.lstrip("/")) for _, kind, path in lines}
    for kind, root, name in (("", groups, "memory.max"), ("memory", groups / "memory", "memory.limit_in_bytes")):
        path = paths.get(kind, PurePosixPath())
        for folder in {path, *path.parents}:
            with contextlib.suppress(OSError, ValueError):  # one without a limit says "max", or a number of exabytes
                yield int((root / folder / name).read_text("ascii")) / 1e6
