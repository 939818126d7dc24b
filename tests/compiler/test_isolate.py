"""Work in a process of its own: results, progress, errors and deaths come back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from slipcast.errors import ArtifactError, ResourceError, SlipcastError
from slipcast_compiler.host.isolate import Remote, run_isolated


def _allocate(megabytes: int, advance: Any) -> int:
    advance(1, 2)
    return len(b"x" * (megabytes * 1_000_000))


def _fail(kind: str, advance: Any) -> None:
    if kind == "ours":
        raise ArtifactError("file.bin: broken", expected="whole", got="half")
    if kind == "theirs":
        raise ZeroDivisionError("by zero")
    os.kill(os.getpid(), signal.SIGKILL)


class _Counter:
    """Remembers from call to call."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, step: int) -> tuple[int, int]:
        self.count += step
        return self.count, os.getpid()

    def fail(self, kind: str) -> None:
        _fail(kind, None)


def test_a_remote_object_stays_until_it_dies() -> None:
    with Remote(_Counter) as remote:
        first, pid = remote.call("add", 2)
        assert (first, pid != os.getpid()) == (2, True)
        with pytest.raises(ArtifactError, match=r"file\.bin: broken"):
            remote.call("fail", "ours")
        assert remote.call("add", 3) == (5, pid)
        with pytest.raises(ResourceError, match="fail: its process died"):
            remote.call("fail", "killed")
        count, another = remote.call("add", 1)  # a new one, from the beginning
        assert (count, another != pid) == (1, True)
    with pytest.raises(ProcessLookupError):
        os.kill(another, 0)


def test_result_progress_and_own_peak_memory() -> None:
    ballast = b"x" * 400_000_000  # of this process, which the child's peak must not show
    seen: list[tuple[int, int]] = []
    done = run_isolated(_allocate, 100, advance=lambda *at: seen.append(at))
    assert (done.result, seen) == (100_000_000, [(1, 2)])
    assert 100 < done.peak_memory_mb < 400
    assert ballast


def test_errors_come_through() -> None:
    with pytest.raises(ArtifactError, match=r"file\.bin: broken"):
        run_isolated(_fail, "ours")
    with pytest.raises(SlipcastError, match="ZeroDivisionError: by zero"):
        run_isolated(_fail, "theirs")
    with pytest.raises(ResourceError, match="its process died"):
        run_isolated(_fail, "killed")


def test_the_traceback_is_a_note_and_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SlipcastError) as caught:
        run_isolated(_fail, "theirs")
    assert "ZeroDivisionError" in caught.value.__notes__[0]
    assert capfd.readouterr().err == ""


def _sleep(advance: Any) -> None:
    advance(os.getpid(), 0)
    time.sleep(60)


def test_an_interrupt_ends_the_child_at_once() -> None:
    children = []

    def interrupt(pid: int, _: int) -> None:
        children.append(pid)
        os.kill(pid, signal.SIGINT)  # as a terminal sends it to both; the child has to leave it to its parent
        raise KeyboardInterrupt

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_isolated(_sleep, advance=interrupt)
    assert time.monotonic() - begin < 10
    with pytest.raises(ProcessLookupError):
        os.kill(children[0], 0)


def _lock_and_sleep(advance: Any) -> None:
    import multiprocessing

    lock = multiprocessing.RLock()  # as tqdm has one
    with lock:
        _sleep(advance)


INTERRUPTED = """
from test_isolate import _lock_and_sleep, run_isolated

def interrupt(pid, _):
    raise KeyboardInterrupt

if __name__ == "__main__":
    try:
        run_isolated(_lock_and_sleep, advance=interrupt)
    except KeyboardInterrupt:
        print("interrupted")
"""
ORPHANED = """
import os
from test_isolate import _sleep, run_isolated

def die(pid, _):
    print(pid, flush=True)
    os.kill(os.getpid(), 9)

if __name__ == "__main__":
    run_isolated(_sleep, advance=die)
"""


def _script(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(code)
    return subprocess.run(
        [sys.executable, str(folder / "script.py")], env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True, text=True, timeout=50, check=False,
    )  # fmt: skip


def test_an_interrupt_leaves_nothing_on_stderr(tmp_path: Path) -> None:
    done = _script(INTERRUPTED, tmp_path)
    assert (done.stdout, done.stderr) == ("interrupted\n", "")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the child goes on to its next progress report")
def test_the_child_dies_with_its_parent(tmp_path: Path) -> None:
    done = _script(ORPHANED, tmp_path)  # which returns when the child too has closed its stdout
    status = Path(f"/proc/{int(done.stdout)}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"
    assert done.stderr == ""
