"""The original's pictures: the reference that a bundle is judged against, and the runs behind the noise floors."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from slipcast.bundle.manifest import Sampling
from slipcast.progress import Advance
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.isolate import run_isolated
from slipcast_compiler.host.machine import this_machine
from slipcast_compiler.model.original import Drawing, Original, Prompts, make_images
from slipcast_compiler.recipe.recipe import EvaluateTable, GateTable
from slipcast_compiler.recipe.seeds import GATE, OUT_OF_FAMILY

Floats = npt.NDArray[np.float32]
PICTURES, FIGURES = "images.npy", "run.json"
MEASURED = 3  # images that time and memory of the original are taken from


@dataclass(frozen=True)
class Run:
    """Pictures of one run, with time and memory; images float32 [n, h, w, 3] in [0, 1]."""

    images: Floats
    seconds: tuple[float, ...]
    load_s: float
    peak_memory_mb: float
    components_s: dict[str, float]
    distances: tuple[float, ...] = ()  # of the prompts from the family, where the bundle has a guard

    @property
    def latency_s(self) -> float:
        """Median seconds of one image."""
        return statistics.median(self.seconds)

    def save(self, folder: Path) -> None:
        """Into an entry of the cache."""
        np.save(folder / PICTURES, self.images)
        figures = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "images"}
        (folder / FIGURES).write_text(json.dumps(figures))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """From an entry of the cache."""
        figures = json.loads((folder / FIGURES).read_text())
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in figures.items()
        }
        return cls(np.load(folder / PICTURES), **values)


@dataclass(frozen=True)
class Originals:
    """The unchanged model's pictures, float32 [n, h, w, 3]: the reference, and two runs that give the noise floors.

    The reference goes on, after the held-out prompts, with those out of the family. `drawn`: the run of the held-out
    ones, unless they came from the cache.
    """

    prompts: Prompts
    seeds: tuple[int, ...]
    fp32: Floats
    bf16: Floats
    other_seeds: Floats
    drawn: Run | None = None


@dataclass(frozen=True)
class Evaluation:
    """What the recipe says of judging: the original's pictures of `held_out` prompts, one image each, and of prompts
    out of the family, by its sampling; image i of the gate has the seed at table.seed + i. Paths of the table are
    relative to `folder`; `captions` are what retrieval chooses from."""

    original: Original
    sampling: Sampling
    held_out: Prompts
    strangers: tuple[str, ...]
    captions: tuple[str, ...]
    table: EvaluateTable
    gate: GateTable
    folder: Path

    def drawing(self, prompts: Prompts, seeds: tuple[int, ...]) -> Drawing:
        """Pictures of the original."""
        return Drawing(self.original, self.sampling, prompts, seeds)


def run_originals(evaluation: Evaluation, cache: Cache, advance: Advance) -> Originals:
    """Reference pictures and the runs behind the noise floors, from the cache where nothing has changed."""
    count, strangers, first = len(evaluation.held_out), evaluation.strangers, evaluation.table.seed
    seeds, others = GATE.take(count, first), GATE.take(count, first + count)
    last = OUT_OF_FAMILY.take(len(strangers), first)
    runs: list[tuple[Prompts, tuple[int, ...], str, bool]] = [
        (evaluation.held_out, seeds, "float32", True),
        (evaluation.held_out, seeds, "bfloat16", False),
        (evaluation.held_out, others, "float32", False),
        *([(strangers, last, "float32", False)] if strangers else []),
    ]
    total, done, drawn = 3 * count + len(strangers), 0, []
    for prompts, chosen, dtype, timed in runs:

        def report(i: int, _: int, before: int = done) -> None:
            advance(before + i, total)

        drawn.append(_drawn(evaluation.drawing(prompts, chosen), dtype, timed, cache, report))
        done += len(prompts)
    fp32, bf16, other_seeds, *rest = (images for images, _ in drawn)
    reference = np.concatenate([fp32, *rest])
    return Originals((*evaluation.held_out, *strangers), seeds + last, reference, bf16, other_seeds, drawn[0][1])


def measure_original(evaluation: Evaluation, originals: Originals, cache: Cache, advance: Advance) -> Run:
    """Time and memory of the original in fp32, on this machine: as the run that drew it found them, or measured now."""
    drawing = evaluation.drawing(originals.prompts[:MEASURED], originals.seeds[:MEASURED])

    def build(out: Path) -> None:
        run = originals.drawn
        if not run:
            isolated = run_isolated(make_images, drawing, "float32", True, advance=advance)
            run = read_run(isolated.result, isolated.peak_memory_mb)
        run.save(out)

    return Run.load(cache.get("timed", drawing.inputs | {"machine": this_machine().model_dump()}, build))


def draw_original(drawing: Drawing, cache: Cache, advance: Advance) -> Floats:
    """The original's pictures in fp32, float32 [n, h, w, 3]; from the cache, or drawn."""
    return _drawn(drawing, "float32", False, cache, advance)[0]


def _drawn(drawing: Drawing, dtype: str, timed: bool, cache: Cache, advance: Advance) -> tuple[Floats, Run | None]:
    """The pictures, and the run that drew them, if they were not in the cache; its seconds are worth something where it
    was `timed`."""
    runs = list[Run]()

    def build(folder: Path) -> None:
        made = run_isolated(make_images, drawing, dtype, timed, advance=advance)
        runs.append(read_run(made.result, made.peak_memory_mb))
        np.save(folder / PICTURES, made.result["images"])

    images: Floats = np.load(cache.get("original", drawing.inputs | {"dtype": dtype}, build) / PICTURES)
    return images, runs[0] if runs else None


def read_run(made: dict[str, Any], peak_memory_mb: float) -> Run:
    """What make_images returned, of the original or of a bundle."""
    return Run(
        made["images"],
        tuple(map(float, made["seconds"])),
        float(made["load_s"]),
        peak_memory_mb,
        made.get("components_s", {}),
        tuple(made.get("distances", ())),
    )
