"""Run the sides: each started, loaded and warmed up alone, then image by image in turn.

Where memory is short for all at once, each peer has a turn with the bundle: ratios are of pairs in any case.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from slipcast.engines.targets import choose_target
from slipcast.errors import SlipcastError
from slipcast.progress import Advance, Stages
from slipcast.timing import memory
from slipcast_compiler.bench.energy import Meter
from slipcast_compiler.bench.figures import Floats
from slipcast_compiler.bench.gpu import Gpus
from slipcast_compiler.bench.plan import BUNDLE, BenchPlan, Side
from slipcast_compiler.bench.process import SideProcess
from slipcast_compiler.bench.running import Measured, Running, prepare
from slipcast_compiler.recipe.targets import BYTES, INT4_BYTES

ROUNDS = 3  # of each batch size above 1
LIBRARIES_BYTES = 700_000_000  # of a side with torch, and what a small model needs to draw
PAUSE_S = 0.05  # between two sides: thread pools spin for a while after their work


@dataclass
class Results:
    """By side; a peer that failed is in `failed`, with what it said, and nowhere else.

    `beside`: by peer, what the bundle did in turn with it; the bundle's own entry of `measured` is all of these.
    `apart`: why peers were not all in memory at once, where they were not. `gpus`: how many NVML counts.
    """

    measured: dict[str, Measured]
    failed: dict[str, str]
    reference: Floats | None
    no_reference: str | None = None
    beside: dict[str, Measured] = field(default_factory=dict)
    apart: str | None = None
    gpus: int = 0


def measure(plan: BenchPlan, stages: Stages) -> Results:
    """Everything. The bundle's errors are raised, a peer's are kept."""
    meter, gpus = Meter(), Gpus()
    peers, failed = _exported(plan, stages)
    groups, apart = _groups(plan, peers)
    bundles: list[Measured] = []
    results = Results({}, failed, None, plan.no_quality, apart=apart, gpus=len(gpus))
    for group in groups:
        with ExitStack() as stack:
            running = Running(stack)
            for side in (plan.sides[0], *group):
                with stages.stage(f"start {side.name}"):
                    running.attempt(side.name, partial(running.start, side, plan))
            bundle = running.measured[BUNDLE]
            if len(running.processes) > 1 or not bundles:
                _draw_all(running, plan, meter, gpus, stages)
                bundles.append(bundle)
        del running.measured[BUNDLE]
        results.beside |= dict.fromkeys(running.measured, bundle)
        results.measured |= running.measured
        results.failed |= running.failed
    results.measured = {BUNDLE: _together(bundles), **results.measured}
    try:
        results.reference = _reference(results, plan, stages)
    except SlipcastError as error:  # what was measured is worth having without it
        results.no_reference = str(error)
    return results


def _exported(plan: BenchPlan, stages: Stages) -> tuple[list[Side], dict[str, str]]:
    """The peers, those that export first having done so while nothing else is in memory; and which could not."""
    peers, failed = [], {}
    for side in plan.sides[1:]:
        try:
            if side.prepared:
                with stages.stage(f"export for {side.name}"):
                    prepare(side)
            peers.append(side)
        except SlipcastError as error:
            failed[side.name] = str(error)
    return peers, failed


def _groups(plan: BenchPlan, peers: list[Side]) -> tuple[list[Sequence[Side]], str | None]:
    """Peers that are in memory at once, beside the bundle: all of them, or, with the reason, one at a time.

    Of every side is expected that it holds the weights in fp32, and half as much again while it loads.
    """
    target = choose_target(plan.bundle.manifest, plan.options.target)
    files = {each.weights or each.model for each in target.components.values()}
    least = BYTES.get(target.precision, INT4_BYTES)  # of one weight
    weights = round(sum(plan.bundle.entry(name).size for name in files) * BYTES["fp32"] / least)
    free = memory.available_mb() * 1e6
    needed = (LIBRARIES_BYTES + weights * 3 // 2) * (1 + len(peers))
    if len(peers) < 2 or needed <= free:
        return [peers], None
    why = f"{1 + len(peers)} sides may need {needed / 1e9:.1f} GB at once, of which {free / 1e9:.1f} GB are free"
    return [[peer] for peer in peers], why


def _together(parts: Sequence[Measured]) -> Measured:
    """The bundle's rounds as one; start and warm-up are the first's."""
    whole = Measured(parts[0].side, None, parts[0].load_s, parts[0].cold_s, parts[0].about, parts[0].warm_up_s)
    for part in parts:
        whole.drawn += part.drawn
        whole.joules += part.joules
        whole.gpu_joules += part.gpu_joules
        whole.gpu_memory_mb += part.gpu_memory_mb
        for size, drawn in part.batches.items():
            whole.batches.setdefault(size, []).extend(drawn)
    return whole


def _draw_all(running: Running, plan: BenchPlan, meter: Meter, gpus: Gpus, stages: Stages) -> None:
    with stages.stage("images, one side after the other") as advance:
        _one_by_one(running, plan, meter, gpus, advance)
    for size in plan.options.batches:
        if size > 1:
            with stages.stage(f"batches of {size}") as advance:
                _in_batches(running, plan, size, advance)


def _one_by_one(running: Running, plan: BenchPlan, meter: Meter, gpus: Gpus, advance: Advance) -> None:
    for image in range(plan.options.images):
        advance(image, plan.options.images)
        for name in running.in_turn(image):
            measured = running.measured[name]
            if measured.side.images is not None and image >= measured.side.images:
                continue

            def draw(name: str = name, measured: Measured = measured, image: int = image) -> None:
                process = running.processes[name]
                time.sleep(PAUSE_S)
                meter.read()
                gpus.read()
                measured.drawn.append(process.draw(*plan.requests(image, 1)))
                measured.joules.append(meter.read())
                measured.gpu_joules.append(gpus.read())
                measured.gpu_memory_mb.append(gpus.memory_mb(process.pid))

            running.attempt(name, draw)


def _in_batches(running: Running, plan: BenchPlan, size: int, advance: Advance) -> None:
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


def _reference(results: Results, plan: BenchPlan, stages: Stages) -> Floats | None:
    """The original's pictures: those of a side, or drawn now, when nothing is measured any more."""
    side = plan.reference
    if side is None:
        return None
    if side.name in results.failed:
        raise SlipcastError("the original failed")
    if side.name in results.measured:
        return results.measured[side.name].images
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
