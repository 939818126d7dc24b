"""Run the sides: each started, loaded and warmed up alone, then image by image in turn."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slipcast.errors import SlipcastError
from slipcast.progress import Advance, Stages
from slipcast_compiler.bench.energy import Meter
from slipcast_compiler.bench.figures import Floats
from slipcast_compiler.bench.plan import BUNDLE, BenchPlan, Side
from slipcast_compiler.bench.process import Drawn, SideProcess

ROUNDS = 3  # of each batch size above 1
PAUSE_S = 0.05  # between two sides: thread pools spin for a while after their work


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
    batches: dict[int, list[Drawn]] = field(default_factory=dict)

    @property
    def seconds(self) -> list[float]:
        """Of each image, one at a time."""
        return [each.seconds for each in self.drawn]

    @property
    def images(self) -> Floats:
        """float32 [n, h, w, c]."""
        return np.concatenate([each.images for each in self.drawn])


@dataclass
class Results:
    """By side; a peer that failed is in `failed`, with what it said, and nowhere else."""

    measured: dict[str, Measured]
    failed: dict[str, str]
    reference: Floats | None
    no_reference: str | None = None


class _Running:
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


def measure(plan: BenchPlan, stages: Stages) -> Results:
    """Everything. The bundle's errors are raised, a peer's are kept."""
    meter = Meter()
    with ExitStack() as stack:
        running = _Running(stack)
        for side in plan.sides:
            with stages.stage(f"start {side.name}"):
                running.attempt(side.name, lambda side=side: running.start(side, plan))  # type: ignore[misc]
        with stages.stage("images, one side after the other") as advance:
            _one_by_one(running, plan, meter, advance)
        for size in plan.options.batches:
            if size > 1:
                with stages.stage(f"batches of {size}") as advance:
                    _in_batches(running, plan, size, advance)
    results = Results(running.measured, running.failed, None, plan.no_quality)
    try:
        results.reference = _reference(running, plan, stages)
    except SlipcastError as error:  # what was measured is worth having without it
        results.no_reference = str(error)
    return results


def _one_by_one(running: _Running, plan: BenchPlan, meter: Meter, advance: Advance) -> None:
    for image in range(plan.options.images):
        advance(image, plan.options.images)
        for name in running.in_turn(image):
            measured = running.measured[name]
            if measured.side.images is not None and image >= measured.side.images:
                continue

            def draw(name: str = name, measured: Measured = measured, image: int = image) -> None:
                time.sleep(PAUSE_S)
                meter.read()
                measured.drawn.append(running.processes[name].draw(*plan.requests(image, 1)))
                measured.joules.append(meter.read())

            running.attempt(name, draw)


def _in_batches(running: _Running, plan: BenchPlan, size: int, advance: Advance) -> None:
    """One round that does not count, then ROUNDS."""
    for turn in range(ROUNDS + 1):
        advance(turn, ROUNDS + 1)
        for name in running.in_turn(turn):
            measured = running.measured[name]
            if not measured.side.batches:
                continue

            def draw(name: str = name, measured: Measured = measured, turn: int = turn) -> None:
                time.sleep(PAUSE_S)
                drawn = running.processes[name].draw(*plan.requests(turn * size, size))
                if turn:
                    measured.batches.setdefault(size, []).append(drawn)

            running.attempt(name, draw)


def _reference(running: _Running, plan: BenchPlan, stages: Stages) -> Floats | None:
    """The original's pictures: those of a side, or drawn now, when nothing is measured any more."""
    side = plan.reference
    if side is None:
        return None
    if side.name in running.failed:
        raise SlipcastError("the original failed")
    if side.name in running.measured:
        return running.measured[side.name].images
    with (
        stages.stage("pictures of the original, for quality") as advance,
        SideProcess(side.name, side.interpreter, side.job) as process,
    ):
        process.open()
        pictures = []
        for image in range(plan.options.images):
            advance(image, plan.options.images)
            pictures.append(process.draw(*plan.requests(image, 1)).images)
    return np.concatenate(pictures)


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
