"""Progress on stderr: bars on a terminal, plain lines elsewhere; and the time each stage took."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

Advance = Callable[[int, int], None]
"""Called with (done, total)."""


def silent(done: int, total: int) -> None:
    """Progress that nobody sees."""


@dataclass
class Stages:
    """Shows stages while they run and remembers their seconds, for the report."""

    seconds: dict[str, float] = field(default_factory=dict)
    console: Console = field(default_factory=lambda: Console(stderr=True, highlight=False))

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Advance]:
        """Yields the function that reports progress within the stage."""
        begin = time.perf_counter()
        with self._bar(name) if self.console.is_terminal else self._lines(name) as advance:
            yield advance
        took = time.perf_counter() - begin
        self.seconds[name] = round(self.seconds.get(name, 0.0) + took, 3)
        self.say(f"{name}: {took:.1f} s")

    def say(self, text: str) -> None:
        """One line for the user."""
        self.console.print(text, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def _bar(self, name: str) -> Iterator[Advance]:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as bars:
            task = bars.add_task(name, total=None)
            yield lambda done, total: bars.update(task, completed=done, total=total)

    @contextlib.contextmanager
    def _lines(self, name: str) -> Iterator[Advance]:
        """A line at the start and at most one every ten seconds after it."""
        last = time.monotonic()
        print(f"{name} ...", file=sys.stderr, flush=True)

        def advance(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= 10:
                last = time.monotonic()
                print(f"{name}: {done}/{total}", file=sys.stderr, flush=True)

        yield advance


class SilentStages(Stages):
    """Stages of which there are too many to tell."""

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Advance]:
        """Shows nothing."""
        yield silent

    def say(self, text: str) -> None:
        """Nothing."""
