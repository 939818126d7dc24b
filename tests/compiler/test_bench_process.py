"""A side's process: it answers, and its errors and its death have names."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slipcast.engines import cpu_threads
from slipcast.errors import ArtifactError
from slipcast_compiler.bench import process
from slipcast_compiler.bench.process import SideError, SideProcess

PACKAGE = Path(process.__file__).parent
SIDE = """
import os, sys
import numpy as np
print("a library that prints to stdout")
def open_side(job):
    if job.get("fail") == "theirs":
        raise ZeroDivisionError("by zero")
    if job.get("fail") == "ours":
        from slipcast.errors import ArtifactError
        raise ArtifactError("bundle: broken")
    def draw(prompts, seeds):
        if prompts[0] == "die":
            print("last words", file=sys.stderr, flush=True)
            os._exit(9)
        if prompts[0] == "big":
            sum(np.ones(50_000_000))
        return np.full((len(seeds), 2, 2, 3), seeds[0], np.float32), {"denoiser": 0.5}
    return draw
def describe():
    return {"threads": os.environ["OMP_NUM_THREADS"], "slipcast": "slipcast_compiler" in sys.modules}
"""


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    side = tmp_path / "side.py"
    side.write_text(SIDE)
    return {"side": str(side)}


def test_pictures_times_and_own_memory(job: dict[str, Any]) -> None:
    ballast = b"x" * 300_000_000  # of this process, which the side's peak must not show
    with SideProcess("fake", sys.executable, job) as side:
        assert side.open()["about"] == {"threads": str(cpu_threads()), "slipcast": False}
        drawn = side.draw([None, None], [7, 8])
        assert drawn.images.shape == (2, 2, 2, 3)
        assert (drawn.images == 7).all()
        assert drawn.components_s == {"denoiser": 0.5}
        assert 0 < drawn.seconds < side.age_s
        assert drawn.peak_memory_mb < 200
    assert ballast


def test_errors_come_through(job: dict[str, Any]) -> None:
    with (
        SideProcess("fake", sys.executable, job | {"fail": "theirs"}) as side,
        pytest.raises(SideError, match="fake: ZeroDivisionError: by zero"),
    ):
        side.open()
    with (
        SideProcess("fake", sys.executable, job | {"fail": "ours"}) as side,
        pytest.raises(ArtifactError, match="bundle: broken"),
    ):
        side.open()


def test_a_death_is_told_with_its_last_words(job: dict[str, Any]) -> None:
    with SideProcess("fake", sys.executable, job) as side:
        side.open()
        with pytest.raises(SideError, match=r"(?s)fake: its process died.*exit code 9.*last words"):
            side.draw(["die"], [1])


def test_no_process_is_left(job: dict[str, Any]) -> None:
    with SideProcess("fake", sys.executable, job) as side:
        side.open()
        pid = side._process.pid
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_what_runs_elsewhere_imports_nothing_of_ours() -> None:
    """These files run under interpreters that have neither slipcast nor its libraries."""
    allowed = {*sys.stdlib_module_names, "numpy", "torch", "onnxruntime"}
    for file in (PACKAGE / "worker.py", PACKAGE / "sides" / "optimum.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.partition(".")[0] for name in names} <= allowed, file
    assert np.float32
