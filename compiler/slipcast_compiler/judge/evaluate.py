"""The bundle through the runtime, as a host would run it, against the original: every target that can run here."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipcast.bundle.manifest import (
    MANIFEST_NAME,
    Comparison,
    Metrics,
    Performance,
    Quality,
    Target,
    read_manifest,
)
from slipcast.bundle.records import BaseGuard
from slipcast.engines import ENGINES, refusal
from slipcast.errors import HostError
from slipcast.progress import Advance, Stages
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.isolate import run_isolated
from slipcast_compiler.host.machine import this_machine
from slipcast_compiler.judge import bundled
from slipcast_compiler.judge.gate import GateRow, apply_gate
from slipcast_compiler.judge.judges import Judges, compare, open_judges, weights_of_judges
from slipcast_compiler.judge.metrics import Samples, choose_captions, summarise
from slipcast_compiler.judge.originals import Evaluation, Originals, Run, measure_original, read_run

logger = logging.getLogger("slipcast")

NOBODY = Judges()
MEMORY, QUALITY = "memory.json", "quality.json"


@dataclass(frozen=True)
class Judged:
    """`targets`: all, with what was found of those that ran; by target id, what they drew, how the gate's limits hold,
    and why others could not run here."""

    targets: tuple[Target, ...]
    runs: Mapping[str, Run]
    gates: Mapping[str, tuple[GateRow, ...]]
    not_run: Mapping[str, str]

    @property
    def fields(self) -> dict[str, Any]:
        """The manifest's; of the whole bundle is said what is of its first target that ran."""
        first = next(target for target in self.targets if target.id in self.runs)
        return {"targets": self.targets, "quality": first.quality, "performance": first.performance}


def judge_targets(
    evaluation: Evaluation, originals: Originals, folder: Path, targets: Sequence[Target], cache: Cache, stages: Stages
) -> Judged:
    """Draw with every target of the bundle in `folder`, each in a process of its own; from the cache where neither the
    target's engines nor the machine have changed."""
    with stages.stage("evaluate original") as advance:
        before = measure_original(evaluation, originals, cache, advance)
    judge = LazyJudge(evaluation, originals, cache)
    runs, judged, gates, not_run = {}, {}, {}, not_runnable(targets)
    for target in (target for target in targets if target.id not in not_run):
        with stages.stage(f"evaluate {target.id}") as advance:
            entry = run_bundle(folder, target, originals, cache, advance)
            runs[target.id] = run = Run.load(entry)
            quality = judge(run, entry)
            found = performance(before, run, json.loads((entry / MEMORY).read_text()))
        judged[target.id] = target.model_copy(update={"quality": quality, "performance": found})
        gates[target.id] = apply_gate(evaluation.gate, quality)
    return Judged(tuple(judged.get(target.id, target) for target in targets), runs, gates, not_run)


def not_runnable(targets: Sequence[Target]) -> dict[str, str]:
    """Target -> why it cannot run on this machine, and so is not judged. Raises HostError where that is all of them."""
    found = {target.id: why for target in targets if (why := refusal(target))}
    for name, why in found.items():
        logger.warning("%s is in the bundle, but was not run here and is not judged: %s", name, why)
    if len(found) == len(targets):
        raise HostError(
            "no target can run here, so that no picture could be judged", got="; ".join(found.values()),
            hint='add a target that can: [[targets]] engine = "onnxruntime"',
        )  # fmt: skip
    return found


def run_bundle(root: Path, target: Target, originals: Originals, cache: Cache, advance: Advance) -> Path:
    """The same prompts and seeds through the runtime, in a process of its own: an entry of the cache, with the run and
    with the memory of each component."""
    manifest = read_manifest((root / MANIFEST_NAME).read_bytes())
    digests = {entry.path: entry.sha256 for entry in manifest.files}
    inputs = {
        "manifest": manifest.model_dump(mode="json", exclude={"targets", "files", "quality", "performance"}),
        "target": target.model_dump(mode="json"),
        "files": {path: digests[path] for path in [*manifest.shared_files, *target.files]},
        "images": [originals.prompts, originals.seeds, len(originals.bf16)],
        "machine": this_machine().model_dump(),
    }

    def build(out: Path) -> None:
        arguments = (root, target.id, originals.prompts, originals.seeds, len(originals.bf16))
        isolated = run_isolated(bundled.make_images, *arguments, advance=advance)
        read_run(isolated.result, isolated.peak_memory_mb).save(out)
        (out / MEMORY).write_text(json.dumps(measure_memory(root, target)))

    return cache.get("run", inputs, build, runs=(ENGINES[target.engine].module,))


def measure_memory(root: Path, target: Target) -> dict[str, float]:
    """Megabytes that each component adds, each in a process of its own: freed memory is used again, and not seen."""
    return {name: run_isolated(bundled.measure_memory, root, target.id, name).result for name in target.components}


class Judge:
    """Measures runs against the originals; what belongs to the originals alone is computed once."""

    def __init__(self, originals: Originals, judges: Judges = NOBODY) -> None:
        self._count = count = len(originals.bf16)
        prompts, strangers = originals.prompts[:count], originals.prompts[count:]
        self._held_out = held_out = judges.reference(originals.fp32[:count], prompts)
        self._outside = strangers and judges.outside(originals.fp32[count:], strangers)
        self._fixed: dict[str, Any] = {
            "noise_floor": {
                "precision": _floor(held_out.sample(originals.bf16)),
                "seed": _floor(held_out.sample(originals.other_seeds, pixels=False)),
            },
            **judges.record,
        }

    def __call__(self, run: Run) -> Quality:
        """All metrics of a run, of held-out prompts and of those out of the family apart."""
        held_out, others = run.images[: self._count], run.images[self._count :]
        outside = Comparison(**compare(self._outside.sample(others))) if self._outside else None
        return Quality(**compare(self._held_out.sample(held_out)), **self._fixed, out_of_family=outside)


class LazyJudge:
    """A judge that is opened when something has to be measured, and not for what is in the cache."""

    def __init__(self, evaluation: Evaluation, originals: Originals, cache: Cache) -> None:
        self._evaluation, self._originals, self._cache = evaluation, originals, cache
        table, folder = evaluation.table, evaluation.folder
        pictures = (originals.fp32, originals.bf16, originals.other_seeds)
        self._inputs = {
            "pictures": [hashlib.sha256(each.tobytes()).hexdigest() for each in pictures],
            "prompts": originals.prompts,
            "captions": choose_captions(evaluation.captions),
            "weights": weights_of_judges(table, folder),
        }
        self._judge: Judge | None = None

    def __call__(self, run: Run, entry: Path) -> Quality:
        """All metrics of a run, which is in this entry of the cache."""

        def build(out: Path) -> None:
            self._judge = self._judge or open_judge(self._evaluation, self._originals)
            (out / QUALITY).write_text(json.dumps(self._judge(run).model_dump(mode="json")))

        found = self._cache.get("quality", self._inputs | {"run": entry.name}, build)
        return Quality.model_validate_json((found / QUALITY).read_text())


def open_judge(evaluation: Evaluation, originals: Originals) -> Judge:
    """With the scorer and the weights that [evaluate] names."""
    return Judge(originals, open_judges(evaluation.table, evaluation.folder, evaluation.captions))


def _floor(samples: Samples) -> Metrics:
    """As summarise, but nothing where the unchanged model's own pictures are not finite: that is no floor."""
    found = summarise(samples)
    if all(value is None or math.isfinite(value) for value in found.model_dump().values()):
        return found
    logger.warning("the original in bf16, or with other seeds, makes broken pictures: a noise floor is left out")
    return Metrics()


def performance(original_run: Run | None, run: Run, memory: dict[str, float]) -> Performance:
    """Time and memory of a run beside the original's, where that was drawn here; `memory` by component."""
    return Performance(
        peak_memory_full_mb=round(original_run.peak_memory_mb, 1) if original_run else None,
        peak_memory_bundle_mb=round(run.peak_memory_mb, 1),
        components_memory_mb=memory,
        latency_full_s=round(original_run.latency_s, 4) if original_run else None,
        latency_bundle_s=round(run.latency_s, 4),
        components_s={name: round(s, 5) for name, s in run.components_s.items()},
        load_s=round(run.load_s, 4),
    )


def count_alarms(
    record: BaseGuard | None, distances: Mapping[str, Sequence[float]], held_out: int
) -> dict[str, Any] | None:
    """What the guard said of the prompts that pictures were judged on, by target; plain JSON, for the report.

    `distances`: by target, of which the first `held_out` are of the family.
    """
    if not record:
        return None
    found, others = {}, 0
    for target, each in distances.items():
        strange = [distance > record.threshold for distance in each]
        others = len(strange) - held_out
        found[target] = {"held_out": sum(strange[:held_out]), "out_of_family": sum(strange[held_out:])}
    return {**record.model_dump(mode="json"), "alarms": found, "held_out": held_out, "out_of_family": others}
