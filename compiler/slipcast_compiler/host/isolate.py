"""Run a function in a fresh process: its own imports, its own peak memory, and a crash that is only its own."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Self, TypeVarTuple

from slipcast.engines.resources import as_resource_error
from slipcast.errors import ResourceError, SlipcastError
from slipcast.progress import Advance
from slipcast.timing.memory import peak_mb

Ts = TypeVarTuple("Ts")

PR_SET_PDEATHSIG = 1  # prctl(2): the signal that the kernel sends when the parent is gone


@dataclass(frozen=True)
class Isolated:
    """What the function returned, and the process's peak resident memory in megabytes (1e6 bytes)."""

    result: Any
    peak_memory_mb: float


def run_isolated(function: Callable[[*Ts, Advance], Any], *arguments: *Ts, advance: Advance | None = None) -> Isolated:
    """function(*arguments, advance) in a spawned process, which does not outlive this call.

    Errors of slipcast come through as themselves, others as SlipcastError with the traceback as a note. Raises
    ResourceError where the process was killed, as it is when memory runs out.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(there, function, arguments), daemon=True)
    with _interrupts_ignored():
        process.start()
    there.close()
    try:
        result = _listen(here, advance)
        process.join(timeout=5)
        return result
    except EOFError:
        process.join()
        raise ResourceError(
            f"{function.__name__}: its process died", expected="exit code 0", got=f"exit code {process.exitcode}",
            hint="-9 means that memory ran out: close other programs, or take a larger machine; -11 that a library "
            "crashed, such as an engine's: another engine, or another version of it, may not",
        ) from None  # fmt: skip
    finally:
        process.kill()
        process.join()
        here.close()


class Remote:
    """An object that `make()` makes in a process of its own, which stays until `close`, or until it dies.

    A call after it has died starts another one. Errors come through as they do in run_isolated.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._process: Any = None
        self._pipe: Any = None

    def call(self, method: str, *arguments: Any) -> Any:
        """object.method(*arguments); both ways by pickle. ResourceError where the process died of it."""
        if self._process is None:
            self._start()
        try:
            self._pipe.send((method, arguments))
            return _listen(self._pipe, None).result
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode
            self.close()
            raise ResourceError(
                f"{method}: its process died", expected="an answer", got=f"exit code {code}",
                hint="exit code -9 means that memory ran out: close other programs",
            ) from None  # fmt: skip

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, self._make), daemon=True)
        with _interrupts_ignored():
            self._process.start()
        there.close()


def _listen(pipe: Connection, advance: Advance | None) -> Isolated:
    while True:
        kind, content = pipe.recv()
        if kind == "result":
            return Isolated(*content)
        if kind == "error":
            raise content
        if advance:
            advance(*content)


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """A process started in here never sees Ctrl-C, which goes to all of a terminal: its parent does, and ends it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _child(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    if not _tied_to_parent():
        return
    with contextlib.suppress(BrokenPipeError):  # nobody is left to tell
        pipe.send(_outcome(pipe, function, arguments))


def _serve(pipe: Connection, make: Callable[[], Any]) -> None:
    made: list[Any] = []

    def call(method: str, arguments: tuple[Any, ...], _: Advance) -> Any:
        if not made:
            made.append(make())
        return getattr(made[0], method)(*arguments)

    if not _tied_to_parent():
        return
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            pipe.send(_outcome(pipe, call, pipe.recv()))


def _tied_to_parent() -> bool:
    """Make this process end with its parent; False where that is gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # The locks of this kind leave no name behind that would be reported as leaked where this process is killed.
        multiprocessing.set_start_method("fork", force=True)
    parent = multiprocessing.parent_process()
    return not parent or parent.is_alive()  # it may have died before it could be asked to take this process along


def _outcome(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        result = function(*arguments, lambda done, total: pipe.send(("progress", (done, total))))
        return "result", (result, peak_mb())
    except BrokenPipeError:
        raise
    except Exception as error:
        told = as_resource_error(error, type(error).__name__) or SlipcastError(f"{type(error).__name__}: {error}")
        failure = error if isinstance(error, SlipcastError) else told
        failure.add_note(traceback.format_exc())
        return "error", failure
