"""What the tests share: one workspace, and in it one compile of the reference model."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

# Before any test imports them: ONNX Runtime shall not report home, and torch's threads shall not spin while they wait,
# which makes a busy machine many times slower.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Each worker has cores of its own, for all its processes: engines and torch take a thread for each core that they see,
# and threads that wait for one another on a core which others have too wait long. See all_cores.
WORKER = os.environ.get("PYTEST_XDIST_WORKER")
CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set[int]()
if WORKER and len(CORES) >= (workers := int(os.environ["PYTEST_XDIST_WORKER_COUNT"])) > 1:
    number = int(WORKER.removeprefix("gw")) % workers  # one that takes the place of one that died counts on
    os.sched_setaffinity(0, sorted(CORES)[number::workers])
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

# A shell starts what is in its background with SIGINT ignored, which children inherit: tests send it to them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


def run_cli(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """The `slipcast` command as a user starts it: a process of its own. Where that is not the point, call_cli does."""
    return subprocess.run(
        [sys.executable, "-m", "slipcast.cli.main", *arguments],
        cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip


def call_cli(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The `slipcast` command in this process, which has its imports already; what it says and returns is the same."""
    from slipcast.cli.main import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    root, terminate = logging.getLogger(), signal.getsignal(signal.SIGTERM)
    handlers, root.handlers = root.handlers, []  # else logging goes to pytest, and not to stderr
    try:
        with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(arguments)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        root.handlers = handlers
        signal.signal(signal.SIGTERM, terminate)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def in_process(function: Callable[..., Any], *arguments: Any, advance: Callable[[int, int], None] | None = None) -> Any:
    """What isolate.run_isolated does, without the process, which takes seconds for its imports: for monkeypatch."""
    from slipcast.timing.memory import peak_mb
    from slipcast_compiler.host.isolate import Isolated

    return Isolated(function(*arguments, advance or (lambda done, total: None)), peak_mb())


ISOLATING = (
    "judge.originals", "judge.captured", "judge.elsewhere", "judge.programs", "passes.apply", "profile.profile",
    "profile.program", "schedule.early_exit", "schedule.program_timesteps", "schedule.program_caching",
    "graphs_program",
)  # fmt: skip


def compile_here(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`slipcast compile` with all that needs torch in this process."""
    return run_here("compile", *arguments, cwd=cwd)


def run_here(command: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The same of another command."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ISOLATING:
            patch.setattr(f"slipcast_compiler.{module}.run_isolated", in_process)
        return call_cli(command, "--debug", *arguments, cwd=cwd)  # what fails on another machine is seen once


BUNDLED = {"shapes_bundle", "build_cache"}  # fixtures that the compile of the reference recipe is behind


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests stay on one worker (--dist loadfile), and files come in this order.

    One file that needs the compiled bundle is first, and the others are last: so that one worker compiles it while the
    others have something else to do.
    """
    bundled: dict[Path, None] = {item.path: None for item in items if not BUNDLED.isdisjoint(item.fixturenames)}  # type: ignore[attr-defined]
    first, *late = bundled or [None]
    items.sort(key=lambda item: 0 if item.path == first else 2 if item.path in late else 1)


@pytest.fixture(scope="module")
def all_cores() -> Iterator[None]:
    """For tests of what engines do with several threads: the choice of kernels, and so the last bits, follow those."""
    own = os.sched_getaffinity(0) if CORES else CORES
    if CORES:
        os.sched_setaffinity(0, CORES)
    yield
    if own:
        os.sched_setaffinity(0, own)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of the whole session, which all workers have; locks in it end with the session."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if WORKER else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def workspace(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that looks like the checkout, where README's commands can leave their artifacts.

    It is this worker's own, but for the build cache, which is the session's.
    """
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    (folder / "artifacts").mkdir()
    (shared / "cache").mkdir(exist_ok=True)
    (folder / "artifacts" / "cache").symlink_to(shared / "cache")
    return folder


# Of the shipped recipe: to draw with the original would take most of the time.
FEW = (
    "--set", "evaluate.images=5",
    "--set", 'evaluate.out_of_family=["a large red square on a white background", "noon"]',
)  # fmt: skip


@pytest.fixture(scope="session")
def shapes_bundle(shared: Path, workspace: Path) -> Path:
    """The shipped recipe, judged on few images, compiled once per test session; in a copy of this worker's own."""
    compiled, bundle = shared / "shapes-circles", workspace / "artifacts" / "shapes-circles"
    with FileLock(shared / "shapes-circles.lock"):
        if not compiled.exists():
            before = bytes_under(shared / "cache")
            done = run_cli("compile", "recipes/shapes-circles.toml", *FEW, "-o", str(compiled), cwd=workspace)
            assert done.returncode == 0, done.stderr
            took = {
                "bundle": bytes_under(compiled),
                "cache": bytes_under(shared / "cache") - before,
                "memory": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
            }
            (shared / "took.json").write_text(json.dumps(took))
    shutil.copytree(compiled, bundle)
    return bundle


def bytes_under(folder: Path) -> int:
    """What its files need of the disk; a file with two names is one."""
    files = {(found := file.stat()).st_ino: found.st_size for file in folder.rglob("*") if file.is_file()}
    return sum(files.values())


@pytest.fixture(scope="session")
def took(shared: Path, shapes_bundle: Path) -> dict[str, int]:
    """Bytes that the compile of the reference recipe took: of its largest process's memory, and of the disk."""
    found: dict[str, int] = json.loads((shared / "took.json").read_text())
    return found


@pytest.fixture(scope="session")
def build_cache(shared: Path, shapes_bundle: Path) -> str:
    """The build cache of the session: the reference model is exported and its engines are built there."""
    return str(shared / "cache")


@pytest.fixture(scope="session")
def exported_denoiser(shared: Path) -> Callable[[str], Path]:
    """name -> the folder with denoiser.onnx of a small denoiser of that architecture, exported once per session.

    Its names are those of denoisers.DENOISERS, and shapes: all components of the reference model, as its recipe has
    them. Nothing is to be written there.
    """
    from compiler.denoisers import DENOISERS, export_denoiser, export_shapes

    def exported(name: str) -> Path:
        folder = shared / "denoisers" / name
        folder.parent.mkdir(exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.exists():
                work = folder.with_suffix(".work")
                work.mkdir()
                if name == "shapes":
                    export_shapes(work)
                else:
                    export_denoiser(DENOISERS[name], work)
                work.rename(folder)
        return folder

    return exported
