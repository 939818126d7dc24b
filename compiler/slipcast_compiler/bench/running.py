"""The sides that run, and what was seen of each."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slipcast.errors import SlipcastError
from slipcast_compiler.bench.figures import Floats
from slipcast_compiler.bench.plan import BUNDLE, BenchPlan, Side
from slipcast_compiler.bench.process import Drawn, SideProcess


@dataclass
class Measured:
    """What was seen of one side. `cold_s`: from starting the process to the first picture; `warm_up_s`: seconds of the
    pictures that are not counted, the first among them."""

    side: Side
    prepare_s: float | None = None
    load_s: float = 0.0
    cold_s: float = 0.0
    about: dict[str, Any] = field(default_factory=dict)
    warm_up_s: list[float] = field(default_factory=list)
    drawn: list[Drawn] = field(default_factory=list)
    joules: list[float | None] = field(default_factory=list)
    gpu_joules: list[float | None] = field(default_factory=list)
    gpu_memory_mb: list[float | None] = field(default_factory=list)
    batches: dict[int, list[Drawn]] = field(default_factory=dict)

    @property
    def seconds(self) -> list[float]:
        """Of each image, one at a time."""
        return [each.seconds for each in self.drawn]

    @property
    def images(self) -> Floats:
        """float32 [n, h, w, c]."""
        return np.concatenate([each.images for each in self.drawn])


class Running:
    """The sides that still run; a failing peer leaves, a failing bundle ends the benchmark."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.processes: dict[str, SideProcess] = {}
        self.measured: dict[str, Measured] = {}
        self.failed: dict[str, str] = {}

    def attempt(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except SlipcastError as error:
            if name == BUNDLE:
                raise
            self.failed[name] = str(error)
            self.measured.pop(name, None)
            if process := self.processes.pop(name, None):
                process.__exit__(None, None, None)

    def start(self, side: Side, plan: BenchPlan) -> None:
        measured = Measured(side)
        if side.prepared:
            measured.prepare_s = prepare(side)
        process = self.processes[side.name] = SideProcess(side.name, side.interpreter, side.job)
        self._stack.callback(process.__exit__, None, None, None)
        answer = process.open()
        measured.load_s, measured.about = answer["load_s"], answer["about"]
        measured.warm_up_s.append(process.draw(*plan.requests(0, 1)).seconds)
        measured.cold_s = process.age_s
        if side.images is None:  # a side of few images is too slow for a second that does not count
            measured.warm_up_s.append(process.draw(*plan.requests(0, 1)).seconds)
        self.measured[side.name] = measured

    def in_turn(self, shift: int) -> Iterator[str]:
        """Names of the sides, another one first each time, so that none always follows the same."""
        names = list(self.processes)
        shift %= len(names)
        yield from names[shift:] + names[:shift]


def prepare(side: Side) -> float:
    """Export the peer's model, in a process of its own, unless that was done before; the seconds it took then."""
    assert side.prepared
    record = side.prepared / "prepared.json"
    if not record.is_file():
        side.prepared.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=side.prepared.parent))
        try:
            job = side.job | {"prepare": True, "prepared": str(partial / "model")}
            with SideProcess(side.name, side.interpreter, job) as process:
                answer = process.open()
            (partial / record.name).write_text(json.dumps(answer), "utf-8")
            shutil.rmtree(side.prepared, ignore_errors=True)
            partial.rename(side.prepared)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return float(json.loads(record.read_text("utf-8"))["seconds"])
