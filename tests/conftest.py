"""What the tests share: one workspace, and in it one compile of the reference model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# Before any test imports them: ONNX Runtime shall not report home, and torch's threads shall not spin while they wait,
# which makes a busy machine many times slower.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

# A shell starts what is in its background with SIGINT ignored, which children inherit: tests send it to them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


def run_cli(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """The `slipcast` command as a user starts it: a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "slipcast.cli.main", *arguments],
        cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip


class _Files(LoadScopeScheduling):  # type: ignore[misc]
    """A file's tests stay in one process; and so do all files that use the compiled bundle, which is made once."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        text = (ROOT / file).read_text("utf-8")
        return "bundle" if "shapes_bundle" in text or "workspace" in text else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _Files:
    """The one above."""
    return _Files(config, log)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that looks like the checkout, where README's commands can leave their artifacts."""
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    return folder


@pytest.fixture(scope="session")
def shapes_bundle(workspace: Path) -> Path:
    """The shipped recipe, compiled once per test session."""
    done = run_cli("compile", "recipes/shapes-circles.toml", cwd=workspace)
    assert done.returncode == 0, done.stderr
    return workspace / "artifacts" / "shapes-circles"
