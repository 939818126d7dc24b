"""What a point is worth: latency and latents of its engines, and pictures by the gate. See explore.Evaluate."""

from __future__ import annotations

import hashlib
import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from slipcast.errors import RecipeError
from slipcast.progress import Advance, Stages
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.isolate import Remote, run_isolated
from slipcast_compiler.host.quiet import quiet
from slipcast_compiler.judge import bundled
from slipcast_compiler.judge.originals import draw_original
from slipcast_compiler.model import original
from slipcast_compiler.model.original import Drawing, Prompts
from slipcast_compiler.plan import Plan
from slipcast_compiler.recipe.seeds import SEARCH
from slipcast_compiler.search.candidate import Candidate, apply_trial, make_candidate
from slipcast_compiler.search.judge import judge, open_reference
from slipcast_compiler.search.levers import Overrides
from slipcast_compiler.search.measuring import Job, Measuring, Variant

PROXIES = 8  # images whose latents are compared
LATENTS = "latents.npy"


@dataclass(frozen=True)
class Drawings:
    """Calibration prompts by the original: some for latents, and others to judge pictures on. None is held out."""

    proxies: Drawing
    judged: Drawing

    @classmethod
    def of(cls, plan: Plan) -> Self:
        """Ranked by their hash, as those of a profile; RecipeError where there are not two."""
        table, family = plan.recipe.evaluate, plan.family
        ranked = family.ranked if family else ()
        if family and len(ranked) < 2:
            raise RecipeError(
                "[search]: the family is too small", expected="at least two calibration prompts", got=len(ranked)
            )
        count = min(PROXIES, len(ranked) // 2) if ranked else PROXIES
        proxies: Prompts = ranked[:count] if ranked else (None,) * count
        judged: Prompts = ranked[count:][: table.images] if ranked else (None,) * table.images
        seeds = SEARCH.take(count + len(judged))
        return cls(
            Drawing(plan.original, plan.reference, proxies, seeds[:count]),
            Drawing(plan.original, plan.reference, judged, seeds[count:]),
        )


class Evaluator:
    """Measures points of a plan's space. Two engines are kept, in `work`: the recipe's own and the last point's."""

    def __init__(self, plan: Plan, pins: Overrides, cache: Cache, work: Path, stages: Stages) -> None:
        assert plan.recipe.search
        self._objective = plan.recipe.search.objective
        self._plan, self._cache, self._work = plan, cache, work
        self._folders: dict[str, Path] = {}
        self._memory: dict[str, float] = {}
        base = apply_trial(plan, pins)
        self._drawings = drawings = Drawings.of(base)
        with stages.stage("search: the original") as advance:
            latents = _original_latents(drawings.proxies, cache, advance)
            pictures = draw_original(drawings.judged, cache, advance)
        self._reference = open_reference(base, drawings.judged.prompts, pictures)
        with stages.stage("search: the recipe itself"):
            own = make_candidate(base, cache)
            self._own = own.key
            variant = self._variant(own)
        job = Job(variant, drawings.proxies.prompts, drawings.proxies.seeds, latents)
        self._remote = Remote(partial(Measuring, job))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._remote.close()

    def measure(self, overrides: Overrides) -> dict[str, Any]:
        """As Measuring does, with memory_mb: peak of a process that makes one image."""
        begin, candidate = time.perf_counter(), self._candidate(overrides)
        variant = self._variant(candidate)
        memory, prepare_s = self._memory[candidate.key], time.perf_counter() - begin
        found = self._remote.call("measure", variant)
        objectives = {
            "latency": (found["ratio"], f"{found['ratio']:.3f} of the recipe's latency"),
            "memory": (memory, f"{memory:.0f} MB"),
        }
        objective, shown = objectives[self._objective]
        return {"objective": objective, "shown": shown, **found, "memory_mb": memory, "prepare_s": round(prepare_s, 3)}

    def judge(self, overrides: Overrides) -> dict[str, Any]:
        """See judge.judge."""
        variant, judged = self._variant(self._candidate(overrides)), self._drawings.judged
        pictures = self._remote.call("draw", variant, judged.prompts, judged.seeds)
        return judge(self._plan.recipe.gate, self._reference.sample(pictures))

    def _candidate(self, overrides: Overrides) -> Candidate:
        return make_candidate(apply_trial(self._plan, overrides), self._cache)

    def _variant(self, candidate: Candidate) -> Variant:
        """With engines that are there, or are built."""
        key = candidate.key
        if key not in self._folders:
            for other in [name for name in self._folders if name != self._own]:
                shutil.rmtree(self._folders.pop(other))
            folder = self._folders[key] = self._work / hashlib.sha256(key.encode()).hexdigest()[:16]
            target = candidate.build(folder, self._cache)
            if key not in self._memory:
                first = (self._drawings.proxies.prompts[:1], self._drawings.proxies.seeds[:1], 1)
                peak = run_isolated(bundled.make_images, folder, target, *first).peak_memory_mb
                self._memory[key] = round(peak, 1)
        return candidate.variant(self._folders[key])


def _original_latents(drawing: Drawing, cache: Cache, advance: Advance) -> Path:
    """A file with the original's latents at the end, float32 [n, c, h, w]."""

    def build(folder: Path) -> None:
        np.save(folder / LATENTS, run_isolated(_draw_latents, drawing, advance=advance).result)

    return cache.get("latents", drawing.inputs, build) / LATENTS


def _draw_latents(drawing: Drawing, advance: Advance) -> Any:
    """In a process of its own: the checkpoint in torch, image by image."""
    import torch

    with quiet(), torch.no_grad():
        pipe, drawn = drawing.open(), []
        for done, (prompt, seed) in enumerate(drawing.images):
            advance(done, len(drawing.seeds))
            noise, generators = original.draw_noise(pipe, drawing.original.size, (seed,))
            text = None if prompt is None else [prompt]
            drawn.append(original.sample_latents(pipe, drawing.sampling, text, noise, generators).numpy())
        return np.concatenate(drawn)
