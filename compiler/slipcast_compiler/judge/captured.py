"""A captured pipeline itself, as diffusers runs it: what its bundle is judged against."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save_file

from slipcast.bundle.program import NUMBERS, Output
from slipcast.errors import ArtifactError
from slipcast.progress import Advance
from slipcast_compiler.capture.call import make_call, pictures_of
from slipcast_compiler.capture.fitting import with_pictures
from slipcast_compiler.capture.open import open_with_weights, open_without_weights
from slipcast_compiler.capture.processing import call_pipeline
from slipcast_compiler.capture.program import leaves
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.isolate import Isolated, run_isolated
from slipcast_compiler.host.machine import this_machine
from slipcast_compiler.host.quiet import quiet
from slipcast_compiler.judge.originals import Run, read_run
from slipcast_compiler.model.original import Precision, Prompts

Floats = npt.NDArray[np.float32]
PICTURES = "pictures.safetensors"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class PipelineDrawing:
    """What a pipeline is to draw: for each prompt and seed pipe(**call), of the calls in turns; nothing, without a
    precision. `device`: as torch calls it."""

    root: Path
    pipeline: str | None
    calls: tuple[Mapping[str, Any], ...]
    prompts: Prompts
    seeds: tuple[int, ...]
    precision: Precision | None = "fp32"
    device: str = "cpu"

    def of(self, variant: int) -> tuple[Prompts, tuple[int, ...]]:
        """The prompts and seeds of a call, by its place."""
        count = len(self.calls)
        return self.prompts[variant::count], self.seeds[variant::count]


@dataclass(frozen=True)
class VariantOriginals:
    """What a pipeline drew by one of its calls, and what that took. `run`: whose images are as the pipeline returned
    them, see laid; None where it was not to draw. `pictures`: what it was given, by the names of pictures_of, float32
    [1, c, h, w]."""

    prompts: Prompts
    seeds: tuple[int, ...]
    run: Run | None
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
        assert self.run
        images = self.run.images
        return images if kind in NUMBERS else np.moveaxis(images, -3, -1)


@dataclass(frozen=True)
class PipelineOriginals:
    """What a pipeline drew: by place among its calls, as Program.every has the variants; and of prompts out of the
    family, by the first of them. `machine`: in words, the one that drew where that was another one, whose seconds say
    nothing here."""

    variants: tuple[VariantOriginals, ...]
    outside: VariantOriginals | None = None
    precision: Precision | None = "fp32"
    machine: str | None = None

    @property
    def timed(self) -> Run | None:
        """The run of the default call, where it was drawn on this machine."""
        return None if self.machine else self.variants[0].run

    @property
    def every(self) -> tuple[VariantOriginals, ...]:
        """All that a bundle draws too."""
        return (*self.variants, *([self.outside] if self.outside else []))


def draw_originals(
    drawing: PipelineDrawing, outside: PipelineDrawing | None, given: Mapping[str, Any], cache: Cache, advance: Advance
) -> PipelineOriginals:
    """In processes of their own, or from the cache; `outside`: of prompts out of the family; `given`: what the pipeline
    is, for the cache's key."""
    strangers = _draw_each(outside, given, cache, advance) if outside else (None,)
    return PipelineOriginals(_draw_each(drawing, given, cache, advance), strangers[0], drawing.precision)


def _draw_each(
    drawing: PipelineDrawing, given: Mapping[str, Any], cache: Cache, advance: Advance
) -> tuple[VariantOriginals, ...]:
    """By place among its calls."""

    def build(folder: Path) -> None:
        save_drawn(run_isolated(draw, drawing, advance=advance), folder)

    drawn = {"images": [drawing.prompts, drawing.seeds], "precision": drawing.precision}
    inputs = {**given, **drawn, "machine": this_machine().model_dump()}
    entry = cache.get("pipeline", inputs, build)
    return load_drawn(drawing, entry)


def save_drawn(made: Isolated, folder: Path) -> None:
    """What `draw` returned, into a directory."""
    for place, result in enumerate(made.result):
        (own := folder / str(place)).mkdir()
        if "images" in result:
            read_run(result, made.peak_memory_mb).save(own)
        save_file(result["pictures"], own / PICTURES)


def load_drawn(drawing: PipelineDrawing, folder: Path) -> tuple[VariantOriginals, ...]:
    """By place among its calls, what save_drawn left."""
    folders = [folder / str(place) for place in range(len(drawing.calls))]
    return tuple(
        VariantOriginals(*drawing.of(place), Run.load(own) if drawing.precision else None, load_file(own / PICTURES))
        for place, own in enumerate(folders)
    )


def draw(drawing: PipelineDrawing, advance: Advance) -> list[dict[str, Any]]:
    """By call, one result for each of its prompts and seeds.

    Each has images (float32 [n, c, h, w] in [0, 1]; of a video [n, frames, c, h, w]; of anything else as it is),
    seconds of each, load_s, and the pictures that it was given; these alone where nothing is to be drawn.
    ArtifactError where the pipeline itself gives no numbers.
    """
    if not drawing.precision:
        empty = open_without_weights(drawing.root, drawing.pipeline)
        return [{"pictures": _pictures(make_call(empty, with_pictures(empty, given)))} for given in drawing.calls]
    begin = time.perf_counter()
    pipe = open_with_weights(drawing.root, drawing.pipeline, DTYPES[drawing.precision])
    torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32
    if drawing.device != "cpu":
        pipe.to(drawing.device)
    load_s, done, made = time.perf_counter() - begin, 0, []
    for place, given in enumerate(drawing.calls):
        results, seconds, call = [], [], dict[str, Any]()
        given = with_pictures(pipe, given)
        for prompt, seed in zip(*drawing.of(place), strict=True):
            advance(done, len(drawing.seeds))
            begin = time.perf_counter()
            call = make_call(pipe, given, prompt or "", seed)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)  # for draws that are not by the call's generator
                results.append(draw_one(pipe, call, drawing.root))
            seconds.append(time.perf_counter() - begin)
            done += 1
        images = np.stack(results)
        made.append({"images": images, "seconds": seconds, "load_s": load_s, "pictures": _pictures(call)})
    return made


def _pictures(call: Mapping[str, Any]) -> dict[str, Floats]:
    return {name: value.numpy() for name, value in pictures_of(call).items()}


def draw_one(pipe: Any, call: Mapping[str, Any], root: Path) -> Any:
    """What a pipeline returns for one image, as it lays it, in fp32; see draw."""
    with quiet():
        result = call_pipeline(pipe, call)
    tensor = next(found for _, found in leaves(dict(result.items()) if hasattr(result, "items") else result))
    array = tensor.float().cpu().numpy()[0]
    if not np.isfinite(array).all():
        prompt, seed = call.get("prompt"), call["generator"].initial_seed() if "generator" in call else None
        raise ArtifactError(
            f"{root}: the pipeline itself gives NaN or infinity, so that nothing can be judged by it",
            expected="numbers",
            got=f"prompt {prompt!r}, seed {seed}" if prompt else f"seed {seed}",
            hint="leave the prompt out of the family, or look at the checkpoint's weights and the recipe's [call]",
        )
    return array
