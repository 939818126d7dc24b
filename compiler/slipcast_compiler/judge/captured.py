"""A captured pipeline itself, as diffusers runs it: what its bundle is judged against."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save_file

from slipcast.bundle.manifest import Metrics, Quality, Target
from slipcast.bundle.program import Output, Program
from slipcast.errors import ArtifactError, CheckFailed, NumericalError
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
from slipcast_compiler.judge.metrics import Reference, intervals, psnr, summarise
from slipcast_compiler.judge.originals import Run, read_run
from slipcast_compiler.model.original import Prompts
from slipcast_compiler.recipe.recipe import GateTable

Floats = npt.NDArray[np.float32]
PICTURES = "pictures.safetensors"
NUMBERS = ("audio", "array")  # what is no picture


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
    """What it drew, and what that took. `run`: whose images are as the pipeline returned them, see laid. `pictures`: by
    argument, what it was given, float32 [1, c, h, w]."""

    prompts: Prompts
    seeds: tuple[int, ...]
    run: Run
    pictures: Mapping[str, Floats]

    def laid(self, kind: Output) -> Floats:
        """As a bundle gives them: [n, h, w, c] or, of videos, [n, frames, h, w, c]; of sounds and arrays [n, ...]."""
        images = self.run.images
        return images if kind in NUMBERS else np.moveaxis(images, -3, -1)


def draw_originals(
    drawing: PipelineDrawing, given: Mapping[str, Any], cache: Cache, advance: Advance
) -> PipelineOriginals:
    """In fp32, in a process of its own, or from the cache; `given`: what the pipeline is, for the cache's key."""

    def build(folder: Path) -> None:
        made = run_isolated(draw, drawing, advance=advance)
        read_run(made.result, made.peak_memory_mb).save(folder)
        save_file(made.result["pictures"], folder / PICTURES)

    inputs = {**given, "images": [drawing.prompts, drawing.seeds], "machine": this_machine().model_dump()}
    entry = cache.get("pipeline", inputs, build)
    return PipelineOriginals(drawing.prompts, drawing.seeds, Run.load(entry), load_file(entry / PICTURES))


def judge_program(
    folder: Path, program: Program, targets: Sequence[Target], originals: PipelineOriginals, gate: GateTable,
    stages: Stages,
) -> Judged:  # fmt: skip
    """Draw the same with every target of the bundle in `folder`, each in a process of its own.

    Of a video every frame is compared, of arrays the numbers: see compare_results. CheckFailed, with the target, where
    a result is no number.
    """
    runs, judged, gates, not_run = {}, {}, {}, not_runnable(targets)
    for target in (target for target in targets if target.id not in not_run):
        with stages.stage(f"evaluate {target.id}") as advance:
            prompts, seeds = originals.prompts, originals.seeds
            arguments = (folder, target.id, prompts, seeds, originals.pictures)
            try:
                made = run_isolated(bundled.run_program, *arguments, advance=advance)
            except NumericalError as error:
                raise CheckFailed(
                    f"{target.id} gives what is no number, where the pipeline gives numbers; nothing was published",
                    got=error.message,
                    hint="a precision with more range, such as bf16 in place of fp16, or fp32",
                ) from error
        runs[target.id] = run = read_run(made.result, made.peak_memory_mb)
        floors: Any = {"precision": Metrics(), "seed": Metrics()}  # not measured
        compared = compare_results(originals.laid(program.output), run.images, program.output)
        quality = Quality(**compared, noise_floor=floors)
        found = performance(originals.run, run, {})
        judged[target.id] = target.model_copy(update={"quality": quality, "performance": found})
        gates[target.id] = apply_gate(gate, quality)
    return Judged(tuple(judged.get(target.id, target) for target in targets), runs, gates, not_run)


def compare_results(originals: Floats, found: Floats, kind: Output) -> dict[str, Any]:
    """The fields of a Comparison; of sounds and arrays the PSNR alone, whose peak is the original's largest number."""
    if kind not in NUMBERS:
        return compare(Reference(as_pictures(originals), ()), as_pictures(found))
    scale = np.float32(np.abs(originals).max() or 1)
    pairs = zip(originals / scale, found.reshape(originals.shape) / scale, strict=True)
    samples = {"psnr": np.array([psnr(a, b) for a, b in pairs])}
    return summarise(samples).model_dump() | {"images": len(found), "intervals": intervals(samples)}


def as_pictures(results: Floats) -> Floats:
    """[n, h, w, c] or [n, frames, h, w, c] as RGB, frames one after another: [m, h, w, 3]."""
    pictures = results.reshape(-1, *results.shape[-3:])[..., :3]
    return np.repeat(pictures, 3, -1) if pictures.shape[-1] == 1 else pictures


def draw(drawing: PipelineDrawing, advance: Advance) -> dict[str, Any]:
    """One result for each prompt and seed.

    Returns images (float32 [n, c, h, w] in [0, 1]; of a video [n, frames, c, h, w]; of anything else as it is), seconds
    of each, load_s, and the pictures that it was given. ArtifactError where the pipeline itself gives no numbers.
    """
    begin = time.perf_counter()
    pipe = open_with_weights(drawing.root, drawing.pipeline)
    load_s, results, seconds = time.perf_counter() - begin, [], []
    call: dict[str, Any] = {}
    for i, (prompt, seed) in enumerate(zip(drawing.prompts, drawing.seeds, strict=True)):
        advance(i, len(drawing.seeds))
        begin = time.perf_counter()
        call = make_call(pipe, drawing.call, prompt or "", seed)
        with quiet():
            result = pipe(**call)
        seconds.append(time.perf_counter() - begin)
        tensor = next(found for _, found in leaves(dict(result.items()) if hasattr(result, "items") else result))
        array = tensor.float().numpy()[0]
        if not np.isfinite(array).all():
            raise ArtifactError(
                f"{drawing.root}: the pipeline itself gives NaN or infinity, so that nothing can be judged by it",
                expected="numbers, in fp32",
                got=f"prompt {prompt!r}, seed {seed}" if prompt else f"seed {seed}",
                hint="leave the prompt out of the family, or look at the checkpoint's weights and the recipe's [call]",
            )
        results.append(array)
    pictures = {name: value.numpy() for name, value in call.items() if isinstance(value, torch.Tensor)}
    return {"images": np.stack(results), "seconds": seconds, "load_s": load_s, "pictures": pictures}
