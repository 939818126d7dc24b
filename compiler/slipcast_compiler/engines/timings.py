"""How fast kernels were, as TensorRT measured them while it built: kept for the next build, by its version and the GPU.

TensorRT-RTX has the same functions, and they do nothing.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from slipcast.engines import ENGINES, cuda


def find_timings(engine: str, root: Path) -> Path | None:
    """The file in the build cache at `root`, which may not be there yet; None for a library that measures nothing."""
    kind = ENGINES[engine]
    if kind.builds_with != "device":
        return None
    gpu = re.sub(r"\W+", "-", cuda.look().gpus[0].name)
    return root / f"timings-{kind.library}-{importlib.metadata.version(kind.library)}-{gpu}"


def read_timings(config: Any, file: Path) -> None:
    """Give the builder what is kept; nothing where it does not take that: it is of another GPU, or damaged."""
    kept = file.read_bytes() if file.is_file() else b""
    for content in (kept, b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return


def keep_timings(config: Any, file: Path) -> None:
    """Write what the builder has now, in one piece: another compile may be reading it."""
    with tempfile.NamedTemporaryFile(prefix=".timings-", dir=file.parent, delete=False) as made:
        made.write(config.get_timing_cache().serialize())
    os.replace(made.name, file)
