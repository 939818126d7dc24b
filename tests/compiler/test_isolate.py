"""Work in a process of its own: results, progress, errors and deaths come back."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

from slipcast.errors import ArtifactError, ResourceError, SlipcastError
from slipcast_compiler.isolate import run_isolated


def _allocate(megabytes: int, advance: Any) -> int:
    advance(1, 2)
    return len(b"x" * (megabytes * 1_000_000))


def _fail(kind: str, advance: Any) -> None:
    if kind == "ours":
        raise ArtifactError("file.bin: broken", expected="whole", got="half")
    if kind == "theirs":
        raise ZeroDivisionError("by zero")
    os.kill(os.getpid(), signal.SIGKILL)


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
