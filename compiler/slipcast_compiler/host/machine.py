"""The machine that measures: what a document says of it, so that figures of others are not compared by mistake."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from slipcast.bundle.validation import Strict
from slipcast.engines import cpu_threads


class Machine(Strict):
    """Without its name. `memory_gb`: 1e9 bytes, None where the system does not tell; `cores`: that may be used."""

    processor: str
    cores: int
    memory_gb: float | None
    system: str
    python: str


class Processor(Strict):
    """What its name leaves open: two of one name differ. `flags`: the instructions that matrix products are made of;
    `caches`: of one core, in the system's words."""

    family: int
    model: int
    stepping: int
    flags: tuple[str, ...]
    caches: dict[str, str]


LIBRARIES_BYTES = 600_000_000  # torch, diffusers and what they import, resident
INSTRUCTIONS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")


def this_processor() -> Processor | None:
    """None where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text("ascii", "replace").splitlines()
        pairs = (line.partition(":") for line in reversed(lines))
        known = {name.strip(): value.strip() for name, _, value in pairs}
        return Processor(
            family=int(known["cpu family"]),
            model=int(known["model"]),
            stepping=int(known["stepping"]),
            flags=tuple(name for name in INSTRUCTIONS if name in known["flags"].split()),
            caches=_caches(Path("/sys/devices/system/cpu/cpu0/cache")),
        )
    except (OSError, KeyError, ValueError):
        return None


def _caches(folder: Path) -> dict[str, str]:
    found = {}
    for cache in sorted(folder.glob("index*")):
        level, kind, size = ((cache / name).read_text("ascii").strip() for name in ("level", "type", "size"))
        found[f"L{level} {kind.lower()}"] = size
    return found


def this_machine() -> Machine:
    """The one that this process runs on."""
    return Machine(
        processor=_processor(),
        cores=cpu_threads(),
        memory_gb=_memory_gb(),
        system=platform.system(),
        python=platform.python_version(),
    )


def load_average() -> float | None:
    """Of the last minute; None where the system has none."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def wait_without_spinning() -> None:
    """On a machine that is busy already, let threads of OpenMP sleep while they wait for one another.

    Theirs is to spin, on cores that what they wait for then has not: pictures in torch were seen to take seven times as
    long. Libraries look at it when they are loaded, so that it is for processes that start from now on. On a quiet
    machine spinning is a little faster, and what is measured there is what users get.
    """
    load = load_average()
    if load is not None and load > cpu_threads():
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("ascii", "replace").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
    except (ValueError, OSError, AttributeError):
        return None
