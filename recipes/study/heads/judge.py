"""Draw and score the pictures of every case: in torch, without export, in one process, each case cached by itself."""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from heads.cases import Case, Study
from slipcast.progress import Advance, silent
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.quiet import quiet
from slipcast_compiler.judge.metrics import psnr
from slipcast_compiler.judge.scorer import Scorer
from slipcast_compiler.model import original, rewrite
from slipcast_compiler.model.rewrite import TENSORS, UNCHANGED, Denoiser, Rewrite, write_tensors
from slipcast_compiler.passes import prune_heads
from slipcast_compiler.passes.context import Context
from slipcast_compiler.plan import Plan
from slipcast_compiler.profile.profile import Profile

Profiles = Mapping[tuple[str, int], Profile]
RECORD, PICTURES = "record.json", "pictures.npy"
TRIAL = 8  # images that an estimate is taken from


@dataclass(frozen=True)
class Recovered:
    """A denoiser after recovery, with the heads that stayed, by layer."""

    rewrite: Rewrite
    kept: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What the process is told. `recovered`: of the cases that are."""

    study: Study
    profiles: dict[tuple[str, int], Profile]
    recovered: dict[Case, Recovered]
    cache: Path


def judge_all(job: Job, advance: Advance) -> dict[str, Any]:
    """records (one of each case, in their order), originals (set -> seed -> CLIP scores), heads, ranks and scorer."""
    judge = Judge(job)
    records = []
    for done, case in enumerate(job.study.cases):
        advance(done, len(job.study.cases))
        records.append(judge.record(case))
    advance(len(records), len(records))
    originals = {
        name: {str(seed): judge.original(name, seed)[1] for seed in job.study.recipe.seeds} for name in job.study.sets
    }
    return {
        "scorer_sha256": judge.scorer.sha256,
        "heads": {a.name: a.heads for a in judge.layers},
        "originals": originals,
        "ranks": judge.ranks(),
        "records": records,
    }


def time_images(plan: Plan, advance: Advance) -> dict[str, float]:
    """Seconds of one image of a batch, and of opening the pipeline: what an estimate is made from."""
    begin = time.perf_counter()
    with quiet():
        pipe = original.open_pipeline(plan.checkpoint.root, plan.sampling, "float32")
    opened = time.perf_counter()
    assert plan.family
    prompts = [plan.family.held_out[0]] * TRIAL
    original.draw(pipe, plan.sampling, plan.original.size, prompts[:1], [0])  # warm-up
    warm = time.perf_counter()
    original.draw(pipe, plan.sampling, plan.original.size, prompts, range(TRIAL))
    return {"image": (time.perf_counter() - warm) / TRIAL, "open": opened - begin}


class Judge:
    """The original, the scorer, and what they have said so far."""

    def __init__(self, job: Job) -> None:
        from slipcast_compiler.model.layers import attention_layers

        self._study, self._profiles, self._recovered = job.study, job.profiles, job.recovered
        self._cache, plan = Cache(job.cache), job.study.plan
        with quiet():
            self._pipe = original.open_pipeline(plan.checkpoint.root, plan.sampling, "float32")
        self._unet = self._pipe.unet
        self._denoiser = Denoiser.of(plan.checkpoint, UNCHANGED)
        self.layers = attention_layers(self._denoiser.module)
        self.scorer = Scorer(job.study.recipe.scorer, job.study.folder)

    def record(self, case: Case) -> dict[str, Any]:
        """The case with its removed heads (bits in hexadecimal, the first head's the highest) and, by set of prompts,
        CLIP score and PSNR to the unpruned model's picture of every image."""
        recovered = self._recovered.get(case)
        inputs = self._shared(case.sets, case.seed) | {
            "options": case.options(self._study.recipe).model_dump(mode="json"),
            "profile": self._profiles[case.calibration, case.seed].digest if case.calibration else None,
            "recovered": recovered.rewrite.digest if recovered else None,
        }
        entry = self._cache.get("study", inputs, lambda out: self._judge(case, out))
        found: dict[str, Any] = json.loads((entry / RECORD).read_text())
        return _identity(case) | found

    def original(self, name: str, seed: int) -> tuple[Any, list[float]]:
        """The unpruned model's pictures of a set, float32 [n, h, w, 3], and their CLIP scores."""
        inputs = self._shared((name,), seed)
        entry = self._cache.get("study-original", inputs, lambda out: self._draw_original(name, seed, out))
        scores: list[float] = json.loads((entry / RECORD).read_text())
        return np.load(entry / PICTURES, allow_pickle=False), scores

    def ranks(self) -> dict[str, dict[str, dict[str, list[int]]]]:
        """criterion -> calibration -> seed -> rank of each head, 0 the least important; of what is measured."""
        found: dict[str, dict[str, dict[str, list[int]]]] = {}
        for case in self._study.cases:
            by_seed = found.setdefault(case.criterion, {}).setdefault(case.calibration or "", {})
            if case.calibration and str(case.seed) not in by_seed:
                scores = prune_heads.scores(self._denoiser, self._context(case), case.options(self._study.recipe))
                flat = np.concatenate([scores[layer.name] for layer in self.layers])
                by_seed[str(case.seed)] = np.argsort(np.argsort(flat, kind="stable")).tolist()
        return {
            criterion: kept
            for criterion, of in found.items()
            if (kept := {name: seeds for name, seeds in of.items() if name})
        }

    def _judge(self, case: Case, out: Path) -> None:
        found = self._recovered.get(case)
        with tempfile.TemporaryDirectory() as folder:
            rewritten, kept = (found.rewrite, found.kept) if found else self._prune(case, Path(folder))
            module = copy.deepcopy(self._unet)
            rewrite.load(module, rewritten.weights())
        sets = {name: self._score(module, name, case.seed) for name in case.sets}
        bits = "".join("01"[head not in kept[a.name]["kept"]] for a in self.layers for head in range(a.heads))
        (out / RECORD).write_text(json.dumps({"removed": f"{int(bits, 2):0{-(-len(bits) // 4)}x}", "sets": sets}))

    def _prune(self, case: Case, folder: Path) -> tuple[Rewrite, dict[str, Any]]:
        result = prune_heads.run(self._denoiser, self._context(case), case.options(self._study.recipe))
        return write_tensors(result.tensors, UNCHANGED, folder / TENSORS), result.report["layers"]

    def _score(self, module: Any, name: str, seed: int) -> dict[str, list[float]]:
        prompts, (before, _) = self._study.sets[name], self.original(name, seed)
        after = self._draw(module, prompts, seed)
        distances = [psnr(a, b) for a, b in zip(before, after, strict=True)]
        return {"clip": _rounded(self.scorer(after, prompts), 4), "psnr": _rounded(distances, 2)}

    def _draw_original(self, name: str, seed: int, out: Path) -> None:
        prompts = self._study.sets[name]
        pictures = self._draw(self._unet, prompts, seed)
        np.save(out / PICTURES, pictures)
        (out / RECORD).write_text(json.dumps(_rounded(self.scorer(pictures, prompts), 4)))

    def _draw(self, module: Any, prompts: Sequence[str], seed: int) -> Any:
        plan = self._study.plan
        self._pipe.unet = module
        return original.draw(
            self._pipe, plan.sampling, plan.original.size, prompts, [seed + i for i in range(len(prompts))]
        )

    def _context(self, case: Case) -> Context:
        key = (case.calibration or "", case.seed)
        return Context(self._study.plans.get(key, self._study.plan).task, self._profiles.get(key), silent)

    def _shared(self, sets: Sequence[str], seed: int) -> dict[str, Any]:
        plan = self._study.plan
        return {
            "checkpoint": plan.checkpoint.sha256,
            "sampling": plan.sampling.model_dump(mode="json"),
            "size": list(plan.original.size),
            "scorer": self.scorer.sha256,
            "seed": seed,
            "sets": {name: list(self._study.sets[name]) for name in sets},
        }


def _identity(case: Case) -> dict[str, Any]:
    return {
        "criterion": case.criterion,
        "correct": case.correct,
        "calibration": case.calibration,
        "ratio": case.ratio,
        "seed": case.seed,
        "recovered": case.recovered,
    }


def _rounded(values: Any, digits: int) -> list[float]:
    return [round(float(value), digits) for value in values]
