"""A captured pipeline itself, as diffusers runs it: what its bundle is judged against."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save_file

from slipcast.bundle.manifest import Metrics, Quality, Target
from slipcast.bundle.program import Output, Program
from slipcast.errors import ArtifactError, CheckFailed, NumericalError
from slipcast.progress import Advance, Stages
from slipcast_compiler.capture.call import make_call, pictures_of
from slipcast_compiler.capture.fitting import with_pictures
from slipcast_compiler.capture.open import open_with_weights
from slipcast_compiler.capture.program import leaves
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.isolate import run_isolated
from slipcast_compiler.host.machine import this_machine
from slipcast_compiler.host.quiet import quiet
from slipcast_compiler.judge import bundled
from slipcast_compiler.judge.evaluate import Judged, not_runnable, performance
from slipcast_compiler.judge.gate import apply_gate
from slipcast_compiler.judge.metrics import Reference, Samples, intervals, psnr, summarise
from slipcast_compiler.judge.originals import Run, read_run
from slipcast_compiler.model.original import Prompts
from slipcast_compiler.recipe.recipe import GateTable

Floats = npt.NDArray[np.float32]
PICTURES = "pictures.safetensors"
NUMBERS = ("audio", "array")  # what is no picture
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class PipelineDrawing:
    """What a pipeline is to draw: for each prompt and seed pipe(**call), of the calls in turns."""

    root: Path
    pipeline: str | None
    calls: tuple[Mapping[str, Any], ...]
    prompts: Prompts
    seeds: tuple[int, ...]
    precision: Literal["fp32", "bf16"] = "fp32"

    def of(self, variant: int) -> tuple[Prompts, tuple[int, ...]]:
        """The prompts and seeds of a call, by its place."""
        count = len(self.calls)
        return self.prompts[variant::count], self.seeds[variant::count]


@dataclass(frozen=True)
class VariantOriginals:
    """What a pipeline drew by one of its calls, and what that took. `run`: whose images are as the pipeline returned
    them, see laid. `pictures`: what it was given, by the names of pictures_of, float32 [1, c, h, w]."""

    prompts: Prompts
    seeds: tuple[int, ...]
    precision: Literal["fp32", "bf16"]
    run: Run
    pictures: Mapping[str, Floats]

    @property
    def given(self) -> dict[str, Any]:
        """The pictures by argument, as a run takes them."""
        found: dict[str, Any] = {}
        for name in sorted(self.pictures, key=lambda name: (len(name), name)):
            argument, listed, _ = name.partition("[")
            if listed:
                found.setdefault(argument, []).append(self.pictures[name])
            else:
                found[argument] = self.pictures[name]
        return found

    def laid(self, kind: Output) -> Floats:
        """As a bundle gives them: [n, h, w, c] or, of videos, [n, frames, h, w, c]; of sounds and arrays [n, ...]."""
        images = self.run.images
        return images if kind in NUMBERS else np.moveaxis(images, -3, -1)


PipelineOriginals = tuple[VariantOriginals, ...]  # by place among the calls, as Program.every has the variants


@dataclass(frozen=True)
class ProgramJudged(Judged):
    """`runs` are of the default variant; `variants`: by target id, the runs of each, and how far they are from the
    pipeline's."""

    variants: Mapping[str, tuple[tuple[Run, Metrics], ...]]


def draw_originals(
    drawing: PipelineDrawing, given: Mapping[str, Any], cache: Cache, advance: Advance
) -> PipelineOriginals:
    """In a process of its own, or from the cache; `given`: what the pipeline is, for the cache's key."""

    def build(folder: Path) -> None:
        made = run_isolated(draw, drawing, advance=advance)
        for place, result in enumerate(made.result):
            (own := folder / str(place)).mkdir()
            read_run(result, made.peak_memory_mb).save(own)
            save_file(result["pictures"], own / PICTURES)

    drawn = {"images": [drawing.prompts, drawing.seeds], "precision": drawing.precision}
    inputs = {**given, **drawn, "machine": this_machine().model_dump()}
    entry = cache.get("pipeline", inputs, build)
    folders = [entry / str(place) for place in range(len(drawing.calls))]
    return tuple(
        VariantOriginals(*drawing.of(place), drawing.precision, Run.load(own), load_file(own / PICTURES))
        for place, own in enumerate(folders)
    )


def judge_program(
    folder: Path, program: Program, targets: Sequence[Target], originals: PipelineOriginals, gate: GateTable,
    stages: Stages,
) -> ProgramJudged:  # fmt: skip
    """Draw the same with every target of the bundle in `folder`, each in a process of its own: each variant what the
    pipeline drew by its call. Of all pictures together the gate is asked, and so of every variant; time is that of the
    default one.

    Of a video every frame is compared, of arrays the numbers: see sample_results. CheckFailed, with the target, where
    a result is no number.
    """
    runs, judged, gates, not_run = {}, {}, {}, not_runnable(targets)
    variants = {}
    arguments = arguments_of(program, originals)
    jobs = [bundled.Job(each.prompts, each.seeds, given) for each, given in zip(originals, arguments, strict=True)]
    for target in (target for target in targets if target.id not in not_run):
        with stages.stage(f"evaluate {target.id}") as advance:
            try:
                made = run_isolated(bundled.run_program, folder, target.id, jobs, advance=advance)
            except NumericalError as error:
                raise CheckFailed(
                    f"{target.id} gives what is no number, where the pipeline gives numbers; nothing was published",
                    got=error.message,
                    hint="a precision with more range, such as bf16 in place of fp16, or fp32",
                ) from error
        found = [read_run(result, made.peak_memory_mb) for result in made.result]
        pairs = zip(originals, found, strict=True)
        samples = [sample_results(each.laid(program.output), run.images, program.output) for each, run in pairs]
        floors: Any = {"precision": Metrics(), "seed": Metrics()}  # not measured
        quality = Quality(**compare_results(samples), noise_floor=floors)
        measured = performance(originals[0].run, found[0], {})
        runs[target.id] = found[0]
        variants[target.id] = tuple((run, summarise(each)) for run, each in zip(found, samples, strict=True))
        judged[target.id] = target.model_copy(update={"quality": quality, "performance": measured})
        gates[target.id] = apply_gate(gate, quality)
    return ProgramJudged(tuple(judged.get(target.id, target) for target in targets), runs, gates, not_run, variants)


def arguments_of(program: Program, originals: PipelineOriginals) -> list[dict[str, Any]]:
    """By variant, what a run is given besides a text: pictures, and what chooses the variant."""
    return [
        {**original.given, **{name: variant.fixed[name] for name in program.listed}}
        for original, variant in zip(originals, program.every, strict=True)
    ]


def compare_results(samples: Sequence[Samples]) -> dict[str, Any]:
    """The fields of a Comparison of all together; see sample_results."""
    pooled = {name: np.concatenate([each[name] for each in samples]) for name in samples[0]}
    own = {"images": len(pooled["psnr"]), "intervals": intervals(pooled)}
    return summarise(pooled).model_dump() | own


def sample_results(originals: Floats, found: Floats, kind: Output) -> Samples:
    """Of each picture; of sounds and arrays the PSNR alone, whose peak is the originals' largest number."""
    if kind not in NUMBERS:
        return Reference(as_pictures(originals), ()).sample(as_pictures(found))
    scale = np.float32(np.abs(originals).max() or 1)
    pairs = zip(originals / scale, found.reshape(originals.shape) / scale, strict=True)
    return {"psnr": np.array([psnr(a, b) for a, b in pairs])}


def as_pictures(results: Floats) -> Floats:
    """[n, h, w, c] or [n, frames, h, w, c] as RGB, frames one after another: [m, h, w, 3]."""
    pictures = results.reshape(-1, *results.shape[-3:])[..., :3]
    return np.repeat(pictures, 3, -1) if pictures.shape[-1] == 1 else pictures


def draw(drawing: PipelineDrawing, advance: Advance) -> list[dict[str, Any]]:
    """By call, one result for each of its prompts and seeds.

    Each has images (float32 [n, c, h, w] in [0, 1]; of a video [n, frames, c, h, w]; of anything else as it is),
    seconds of each, load_s, and the pictures that it was given. ArtifactError where the pipeline itself gives no
    numbers.
    """
    begin = time.perf_counter()
    pipe = open_with_weights(drawing.root, drawing.pipeline, DTYPES[drawing.precision])
    load_s, done, made = time.perf_counter() - begin, 0, []
    for place, given in enumerate(drawing.calls):
        results, seconds, call = [], [], dict[str, Any]()
        given = with_pictures(pipe, given)
        for prompt, seed in zip(*drawing.of(place), strict=True):
            advance(done, len(drawing.seeds))
            begin = time.perf_counter()
            call = make_call(pipe, given, prompt or "", seed)
            results.append(draw_one(pipe, call, drawing.root))
            seconds.append(time.perf_counter() - begin)
            done += 1
        pictures = {name: value.numpy() for name, value in pictures_of(call).items()}
        made.append({"images": np.stack(results), "seconds": seconds, "load_s": load_s, "pictures": pictures})
    return made


def draw_one(pipe: Any, call: Mapping[str, Any], root: Path) -> Any:
    """What a pipeline returns for one image, as it lays it, in fp32; see draw."""
    with quiet():
        result = pipe(**call)
    tensor = next(found for _, found in leaves(dict(result.items()) if hasattr(result, "items") else result))
    array = tensor.float().numpy()[0]
    if not np.isfinite(array).all():
        prompt, seed = call.get("prompt"), call["generator"].initial_seed() if "generator" in call else None
        raise ArtifactError(
            f"{root}: the pipeline itself gives NaN or infinity, so that nothing can be judged by it",
            expected="numbers",
            got=f"prompt {prompt!r}, seed {seed}" if prompt else f"seed {seed}",
            hint="leave the prompt out of the family, or look at the checkpoint's weights and the recipe's [call]",
        )
    return array
