"""What a point is worth: latency of its engines and results, and pictures by the gate. See explore.Evaluate."""

from __future__ import annotations

import hashlib
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from slipcast.progress import Stages
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.isolate import Remote, run_isolated
from slipcast_compiler.judge import bundled
from slipcast_compiler.search.judge import judge
from slipcast_compiler.search.measuring import Job, Measuring, Variant
from slipcast_compiler.search.subject import Candidate, Overrides, Subject

ORIGINALS = "originals.npz"


class Evaluator:
    """Measures points of a subject's space. Two engines are kept, in `work`: the recipe's own and the last point's."""

    def __init__(self, subject: Subject[Any], pins: Overrides, cache: Cache, work: Path, stages: Stages) -> None:
        self._recipe, self._subject = subject.facts.recipe, subject
        self._cache, self._work = cache, work
        self._folders: dict[str, Path] = {}
        self._memory: dict[str, float] = {}
        self._drawn = drawn = subject.draw(pins, cache, stages)
        named: dict[str, Any] = {str(place): result for place, result in enumerate(drawn.results)}
        np.savez(work / ORIGINALS, **named)
        with stages.stage("search: the recipe itself"):
            own = subject.candidate(pins, cache)
            self._own = own.key
            variant = self._variant(own)
        self._remote = Remote(partial(Measuring, Job(variant, drawn.proxies, work / ORIGINALS)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._remote.close()

    def measure(self, overrides: Overrides) -> dict[str, Any]:
        """As Measuring does, with memory_mb: peak of a process that makes one image."""
        begin, candidate = time.perf_counter(), self._subject.candidate(overrides, self._cache)
        variant = self._variant(candidate)
        memory, prepare_s = self._memory[candidate.key], time.perf_counter() - begin
        found = self._remote.call("measure", variant)
        objectives = {
            "latency": (found["ratio"], f"{found['ratio']:.3f} of the recipe's latency"),
            "memory": (memory, f"{memory:.0f} MB"),
        }
        assert self._recipe.search
        objective, shown = objectives[self._recipe.search.objective]
        return {"objective": objective, "shown": shown, **found, "memory_mb": memory, "prepare_s": round(prepare_s, 3)}

    def judge(self, overrides: Overrides) -> dict[str, Any]:
        """See judge.judge."""
        variant = self._variant(self._subject.candidate(overrides, self._cache))
        results = self._remote.call("draw", variant, self._drawn.judged)
        return judge(self._recipe.gate, self._drawn.samples(results))

    def _variant(self, candidate: Candidate) -> Variant:
        """With engines that are there, or are built."""
        key = candidate.key
        if key not in self._folders:
            for other in [name for name in self._folders if name != self._own]:
                shutil.rmtree(self._folders.pop(other))
            folder = self._work / hashlib.sha256(key.encode()).hexdigest()[:16]
            try:
                self._make(candidate, folder)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            self._folders[key] = folder
        return candidate.variant(self._folders[key])

    def _make(self, candidate: Candidate, folder: Path) -> None:
        """Its engines, and the memory that a process with them takes."""
        target = candidate.build(folder, self._cache)
        if candidate.key not in self._memory:
            first = self._drawn.proxies[0]
            jobs = [bundled.Job([first.prompt], [first.seed], first.given)]
            peak = run_isolated(bundled.run_program, folder, target, "all", jobs).peak_memory_mb
            self._memory[candidate.key] = round(peak, 1)
