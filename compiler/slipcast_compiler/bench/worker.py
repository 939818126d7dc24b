"""One side of a benchmark, in a process of its own: reads requests from stdin, a JSON object a line, and answers.

Standard library and numpy only: it also runs in environments where slipcast is not installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np

Draw = Callable[[list[str | None], list[int]], tuple[Any, dict[str, float] | None]]


def main() -> None:
    """The first request is the job; then pictures are drawn until stdin ends."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to the log: the channel is ours alone
    here = Path(__file__).parent
    job = json.loads(sys.stdin.readline())
    try:
        side = _load(here / "sides" / job["side"])
        begin = time.perf_counter()
        if job.get("prepare"):
            side.prepare(job)
            _answer(channel, {"seconds": time.perf_counter() - begin})
            return
        draw: Draw = side.open_side(job)
        _answer(channel, {"load_s": time.perf_counter() - begin, "about": side.describe()})
        for line in sys.stdin:
            _answer(channel, _draw(draw, json.loads(line)) | {"peak_memory_mb": _peak_memory_mb()})
    except Exception as error:
        traceback.print_exc()
        _answer(channel, {"error": type(error).__name__, "message": str(error)})


def _draw(draw: Draw, request: dict[str, Any]) -> dict[str, Any]:
    """From the prompt to the picture in memory; saving it is not the side's time."""
    begin = time.perf_counter()
    pictures, components = draw(request["prompts"], request["seeds"])
    seconds = time.perf_counter() - begin
    np.save(request["file"], np.asarray(pictures, np.float32))
    return {"seconds": seconds, "components_s": components}


def _peak_memory_mb() -> float:
    """As slipcast.timing.memory.peak_mb, which is not installed everywhere."""
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text("ascii", "replace")
        return next(int(line.split()[1]) * 1024 / 1e6 for line in status.splitlines() if line.startswith("VmHWM:"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes, on macOS


def _answer(channel: TextIO, content: dict[str, Any]) -> None:
    channel.write(json.dumps(content) + "\n")
    channel.flush()


def _load(file: Path) -> Any:
    """A module from its file: the package around it is not importable everywhere."""
    spec = importlib.util.spec_from_file_location(f"slipcast_bench_{file.stem}", file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
