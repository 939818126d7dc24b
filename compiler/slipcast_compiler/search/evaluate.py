"""What a point is worth: latency and latents of its engines, and pictures by the gate. See explore.Evaluate."""

from __future__ import annotations

import hashlib
import itertools
import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from slipcast.bundle.manifest import Sampling
from slipcast.errors import RecipeError
from slipcast.progress import Advance, Stages
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.isolate import Remote, run_isolated
from slipcast_compiler.host.quiet import quiet
from slipcast_compiler.judge import bundled
from slipcast_compiler.judge.evaluate import draw_original
from slipcast_compiler.model import original
from slipcast_compiler.plan import Plan, Prompts
from slipcast_compiler.search.candidate import Engine, apply, engine_key, make_engine, variant_of
from slipcast_compiler.search.judge import judge, open_reference
from slipcast_compiler.search.levers import Overrides
from slipcast_compiler.search.measuring import Job, Measuring, Variant

PROXIES = 8  # images whose latents are compared
FIRST_SEED = 3 << 30  # beyond those of profiles; see profile.calibration_images
LATENTS = "latents.npy"


@dataclass(frozen=True)
class Images:
    """Calibration prompts with seeds: some for latents, and others to judge pictures on. None is held out."""

    proxies: Prompts
    proxy_seeds: tuple[int, ...]
    judged: Prompts
    judged_seeds: tuple[int, ...]

    @classmethod
    def of(cls, plan: Plan) -> Self:
        """Ranked by their hash, as those of a profile; RecipeError where there are not two."""
        table, ranked = plan.recipe.evaluate, list[str]()
        if plan.family:
            ranked = sorted(plan.family.calibration, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
            if len(ranked) < 2:
                raise RecipeError(
                    "[search]: the family is too small", expected="at least two calibration prompts", got=len(ranked)
                )
        count = min(PROXIES, len(ranked) // 2) if ranked else PROXIES
        proxies: Prompts = tuple(ranked[:count]) if ranked else (None,) * count
        judged: Prompts = tuple(ranked[count:][: table.images]) if ranked else (None,) * table.images
        taken = {(table.seed + i) % (1 << 32) for i in range(3 * table.images)}
        free = (seed for seed in itertools.count(FIRST_SEED) if seed not in taken)
        seeds = tuple(itertools.islice(free, count + len(judged)))
        return cls(proxies, seeds[:count], judged, seeds[count:])


class Evaluator:
    """Measures points of a plan's space. Two engines are kept, in `work`: the recipe's own and the last point's."""

    def __init__(self, plan: Plan, pins: Overrides, cache: Cache, work: Path, stages: Stages) -> None:
        assert plan.recipe.search
        self._objective = plan.recipe.search.objective
        self._plan, self._cache, self._work = plan, cache, work
        self._engines: dict[str, Engine] = {}
        self._memory: dict[str, float] = {}
        base, self._images = apply(plan, pins), Images.of(plan)
        images = self._images
        with stages.stage("search: the original") as advance:
            latents = _original_latents(base, images, cache, advance)
            pictures = draw_original(base, images.judged, images.judged_seeds, "float32", cache, advance)
        self._reference = open_reference(base, images.judged, pictures)
        with stages.stage("search: the recipe itself"):
            self._own = engine_key(base)
            own = self._variant(base)
        self._remote = Remote(partial(Measuring, Job(own, images.proxies, images.proxy_seeds, latents)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._remote.close()

    def measure(self, overrides: Overrides) -> dict[str, Any]:
        """As Measuring does, with memory_mb: peak of a process that makes one image."""
        begin, plan = time.perf_counter(), apply(self._plan, overrides)
        variant = self._variant(plan)
        memory, prepare_s = self._memory[engine_key(plan)], time.perf_counter() - begin
        found = self._remote.call("measure", variant)
        objectives = {
            "latency": (found["ratio"], f"{found['ratio']:.3f} of the recipe's latency"),
            "memory": (memory, f"{memory:.0f} MB"),
        }
        objective, shown = objectives[self._objective]
        return {"objective": objective, "shown": shown, **found, "memory_mb": memory, "prepare_s": round(prepare_s, 3)}

    def judge(self, overrides: Overrides) -> dict[str, Any]:
        """See judge.judge."""
        variant = self._variant(apply(self._plan, overrides))
        pictures = self._remote.call("draw", variant, self._images.judged, self._images.judged_seeds)
        return judge(self._plan.recipe.gate, self._reference.sample(pictures))

    def _variant(self, plan: Plan) -> Variant:
        return variant_of(plan, self._engine(plan), self._cache)

    def _engine(self, plan: Plan) -> Engine:
        key = engine_key(plan)
        if key not in self._engines:
            for other in [name for name in self._engines if name != self._own]:
                shutil.rmtree(self._engines.pop(other).folder)
            folder = self._work / hashlib.sha256(key.encode()).hexdigest()[:16]
            self._engines[key] = made = make_engine(plan, self._cache, folder)
            if key not in self._memory:
                image = (self._images.proxies[:1], self._images.proxy_seeds[:1], 1)
                peak = run_isolated(bundled.make_images, folder, made.target, *image).peak_memory_mb
                self._memory[key] = round(peak, 1)
        return self._engines[key]


def _original_latents(plan: Plan, images: Images, cache: Cache, advance: Advance) -> Path:
    """A file with the original's latents at the end, by plan.reference, float32 [n, c, h, w]."""
    arguments = (plan.checkpoint.root, plan.reference, plan.size, images.proxies, images.proxy_seeds)
    inputs = {
        "checkpoint": plan.checkpoint.sha256, "sampling": plan.reference.model_dump(mode="json"), "size": plan.size,
        "prompts": images.proxies, "seeds": images.proxy_seeds,
    }  # fmt: skip

    def build(folder: Path) -> None:
        np.save(folder / LATENTS, run_isolated(_draw_latents, *arguments, advance=advance).result)

    return cache.get("latents", inputs, build) / LATENTS


def _draw_latents(
    root: Path, sampling: Sampling, size: tuple[int, int], prompts: Prompts, seeds: tuple[int, ...], advance: Advance
) -> Any:
    """In a process of its own: the checkpoint in torch, image by image."""
    import torch

    with quiet(), torch.no_grad():
        pipe, drawn = original.open_pipeline(root, sampling, "float32"), []
        for done, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            advance(done, len(seeds))
            noise, generators = original.draw_noise(pipe, size, (seed,))
            text = None if prompt is None else [prompt]
            drawn.append(original.sample_latents(pipe, sampling, text, noise, generators).numpy())
        return np.concatenate(drawn)
