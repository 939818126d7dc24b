"""Run a function in a fresh process: its own imports, its own peak memory, and a crash that is only its own."""

from __future__ import annotations

import multiprocessing
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from slipcast.errors import ResourceError, SlipcastError
from slipcast.progress import Advance
from slipcast_compiler.memory import peak_memory_mb


@dataclass(frozen=True)
class Isolated:
    """What the function returned, and the process's peak resident memory in megabytes (1e6 bytes)."""

    result: Any
    peak_memory_mb: float


def run_isolated(function: Callable[..., Any], *arguments: Any, advance: Advance | None = None) -> Isolated:
    """function(*arguments, advance) in a spawned process.

    Errors of slipcast come through as themselves, others as SlipcastError with the traceback's last line. Raises
    ResourceError where the process was killed, as it is when memory runs out.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(there, function, arguments), daemon=True)
    process.start()
    there.close()
    try:
        while True:
            kind, content = here.recv()
            if kind == "progress":
                if advance:
                    advance(*content)
            elif kind == "error":
                raise content
            else:
                return Isolated(*content)
    except EOFError:
        process.join()
        raise ResourceError(
            f"{function.__name__}: its process died", expected="exit code 0", got=f"exit code {process.exitcode}",
            hint="exit code -9 means that memory ran out: close other programs, or compile on a larger machine",
        ) from None  # fmt: skip
    finally:
        process.join(timeout=10)
        if process.is_alive():
            process.kill()


def _child(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        result = function(*arguments, lambda done, total: pipe.send(("progress", (done, total))))
        pipe.send(("result", (result, peak_memory_mb())))
    except SlipcastError as error:
        pipe.send(("error", error))
    except KeyboardInterrupt:
        pass
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        pipe.send(("error", SlipcastError(f"{function.__name__}: {type(error).__name__}: {error}")))
