"""A captured pipeline itself, as diffusers runs it: what its bundle is judged against."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slipcast.bundle.manifest import Metrics, Quality, Target
from slipcast.progress import Advance, Stages
from slipcast_compiler.capture.call import make_call
from slipcast_compiler.capture.open import open_with_weights
from slipcast_compiler.capture.program import leaves
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.isolate import run_isolated
from slipcast_compiler.host.machine import this_machine
from slipcast_compiler.host.quiet import quiet
from slipcast_compiler.judge import bundled
from slipcast_compiler.judge.evaluate import Judged, compare, not_runnable, performance
from slipcast_compiler.judge.gate import apply_gate
from slipcast_compiler.judge.metrics import Reference
from slipcast_compiler.judge.originals import Run, read_run
from slipcast_compiler.model.original import Prompts
from slipcast_compiler.recipe.recipe import GateTable


@dataclass(frozen=True)
class PipelineDrawing:
    """What a pipeline is to draw: pipe(**call) for each prompt and seed."""

    root: Path
    pipeline: str | None
    call: Mapping[str, Any]
    prompts: Prompts
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class PipelineOriginals:
    """What it drew, and what that took."""

    prompts: Prompts
    seeds: tuple[int, ...]
    run: Run


def draw_originals(
    drawing: PipelineDrawing, given: Mapping[str, Any], cache: Cache, advance: Advance
) -> PipelineOriginals:
    """In fp32, in a process of its own, or from the cache; `given`: what the pipeline is, for the cache's key."""

    def build(folder: Path) -> None:
        made = run_isolated(draw, drawing, advance=advance)
        read_run(made.result, made.peak_memory_mb).save(folder)

    inputs = {**given, "images": [drawing.prompts, drawing.seeds], "machine": this_machine().model_dump()}
    return PipelineOriginals(drawing.prompts, drawing.seeds, Run.load(cache.get("pipeline", inputs, build)))


def judge_program(
    folder: Path, targets: Sequence[Target], originals: PipelineOriginals, gate: GateTable, stages: Stages
) -> Judged:
    """Draw the same with every target of the bundle in `folder`, each in a process of its own."""
    reference = Reference(originals.run.images, originals.prompts)
    runs, judged, gates, not_run = {}, {}, {}, not_runnable(targets)
    for target in (target for target in targets if target.id not in not_run):
        with stages.stage(f"evaluate {target.id}") as advance:
            arguments = (folder, target.id, originals.prompts, originals.seeds, len(originals.prompts))
            made = run_isolated(bundled.make_images, *arguments, advance=advance)
        runs[target.id] = run = read_run(made.result, made.peak_memory_mb)
        floors: Any = {"precision": Metrics(), "seed": Metrics()}  # not measured
        quality = Quality(**compare(reference, run.images), noise_floor=floors)
        found = performance(originals.run, run, {})
        judged[target.id] = target.model_copy(update={"quality": quality, "performance": found})
        gates[target.id] = apply_gate(gate, quality)
    return Judged(tuple(judged.get(target.id, target) for target in targets), runs, gates, not_run)


def draw(drawing: PipelineDrawing, advance: Advance) -> dict[str, Any]:
    """One result for each prompt and seed.

    Returns images (float32 [n, h, w, 3] in [0, 1]; of a video [n, frames, h, w, 3]; of anything else as it is), seconds
    of each, and load_s.
    """
    begin = time.perf_counter()
    pipe = open_with_weights(drawing.root, drawing.pipeline)
    load_s, results, seconds = time.perf_counter() - begin, [], []
    for i, (prompt, seed) in enumerate(zip(drawing.prompts, drawing.seeds, strict=True)):
        advance(i, len(drawing.seeds))
        begin = time.perf_counter()
        call = make_call(pipe, drawing.call, prompt or "", seed)
        with quiet():
            result = pipe(**call)
        seconds.append(time.perf_counter() - begin)
        tensor = next(found for _, found in leaves(dict(result.items()) if hasattr(result, "items") else result))
        array = tensor.float().numpy()[0]
        pictures = array.ndim in (3, 4) and array.shape[-3] in (1, 3, 4)
        results.append(np.moveaxis(array, -3, -1) if pictures else array)
    return {"images": np.stack(results), "seconds": seconds, "load_s": load_s}
