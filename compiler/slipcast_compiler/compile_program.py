"""The compile of a captured pipeline, in order. Each stage is a call, as in compile.py."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import slipcast
from slipcast.bundle.manifest import SCHEMA_VERSION, Metrics, Quality
from slipcast.bundle.program import PROGRAM
from slipcast.bundle.program import Program as Record
from slipcast.errors import ArtifactError, CheckFailed
from slipcast.progress import Advance, Stages
from slipcast_compiler.capture.call import make_call
from slipcast_compiler.capture.open import open_with_weights
from slipcast_compiler.capture.texts import AWKWARD
from slipcast_compiler.capture.verify import LIMIT, verify
from slipcast_compiler.compile import Compiled
from slipcast_compiler.engines import Source, Sources, build_targets
from slipcast_compiler.engines.contents import family_record
from slipcast_compiler.export.program import TABLE, contracts, export_program, read_record
from slipcast_compiler.host import publish
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.isolate import run_isolated
from slipcast_compiler.host.machine import this_machine, wait_without_spinning
from slipcast_compiler.judge import bundled, captured
from slipcast_compiler.judge.evaluate import compare, not_runnable, performance
from slipcast_compiler.judge.gate import apply_gate, missed
from slipcast_compiler.judge.metrics import Reference
from slipcast_compiler.judge.originals import Run, read_run
from slipcast_compiler.plan_program import ProgramPlan, find
from slipcast_compiler.recipe.seeds import GATE

VERIFIED = "verified.json"


def compile_program(plan: ProgramPlan, output: Path, cache: Cache, stages: Stages) -> Compiled:
    """Make the bundle at `output`. CheckFailed, with the report written beside it, where the program is not the
    pipeline or the gate is missed."""
    wait_without_spinning()
    recipe, root = plan.recipe, plan.checkpoint.root
    source = digest(root, recipe.model.pipeline)
    given = {"source": source, "pipeline": recipe.model.pipeline, "call": recipe.call}

    # The pipeline's own code, recorded, compared with itself on another prompt and seed, and exported.
    def capture(folder: Path) -> None:
        run_isolated(export_pipeline, root, recipe.model.pipeline, recipe.call, folder, advance=advance)

    with stages.stage("capture and export") as advance:
        entry = cache.get("program", given, capture)
    record = read_record(entry)

    # What the pipeline draws of prompts that nothing was captured of.
    prompts = plan.held_out
    seeds = GATE.take(len(prompts), recipe.evaluate.seed)

    def draw(folder: Path) -> None:
        arguments = (root, recipe.model.pipeline, recipe.call, prompts, seeds)
        made = run_isolated(captured.draw, *arguments, advance=advance)
        read_run(made.result, made.peak_memory_mb).save(folder)

    machine = this_machine().model_dump()
    with stages.stage("originals") as advance:
        original = Run.load(cache.get("pipeline", given | {"images": [prompts, seeds], "machine": machine}, draw))

    with publish.workspace(output) as folder:
        components = {name: Source(entry / f"{name}.onnx", f"{entry.name}/{name}") for name in contracts(entry, record)}
        sources = dict.fromkeys((table.name for table in recipe.targets), Sources(components, None))
        targets = build_targets(sources, recipe.targets, folder, cache, stages)
        fields = _contents(plan, source, entry, record, folder)
        publish.write_program_manifest(folder, {**fields, "targets": tuple(targets)})

        # The bundle against the pipeline: what can run here.
        reference, gates, judged, not_run = Reference(original.images, prompts), {}, {}, not_runnable(targets)
        for target in (target for target in targets if target.id not in not_run):
            with stages.stage(f"evaluate {target.id}") as advance:
                arguments = (folder, target.id, prompts, seeds, len(prompts))
                made = run_isolated(bundled.make_images, *arguments, advance=advance)
                run = read_run(made.result, made.peak_memory_mb)
            quality = Quality(**compare(reference, run.images), noise_floor={"precision": Metrics(), "seed": Metrics()})
            found = performance(original, run, {})
            judged[target.id] = target.model_copy(update={"quality": quality, "performance": found})
            gates[target.id] = apply_gate(recipe.gate, quality)
        fields["targets"] = tuple(judged.get(target.id, target) for target in targets)
        first = next(iter(judged.values()))
        fields |= {"quality": first.quality, "performance": first.performance}
        report = {
            "recipe": recipe.model_dump(mode="json", exclude_none=True),
            "capture": dict(plan.summary),
            "verified": json.loads((entry / VERIFIED).read_text()),
            "targets": [target.model_dump(mode="json") for target in fields["targets"]],
            "not_run": not_run,
            "seconds": dict(stages.seconds),
            "host_notes": {},
        }
        (folder / "report.json").write_text(json.dumps(report, indent=1))
        if misses := missed(gates):
            raise CheckFailed("the gate was missed; nothing was published:\n  " + "\n  ".join(misses))
        with stages.stage("publish"):
            manifest = publish.write_program_manifest(folder, fields)
            publish.publish(folder, output)
    return Compiled(output, manifest, report)


def export_pipeline(
    root: Path, pipeline: str | None, given: Mapping[str, Any], folder: Path, advance: Advance
) -> dict[str, Any]:
    """Capture, verify and export into `folder`; runs in a process of its own. CheckFailed where the program is not the
    pipeline; ArtifactError for a weight that is no number."""
    pipe = open_with_weights(root, pipeline)
    _check_weights(pipe, root)
    found = find(pipe, given)
    calls = [make_call(pipe, given, AWKWARD, seed=1) for _ in range(2)]
    verdict = verify(found.program, pipe, *calls)
    if not verdict.holds:
        raise CheckFailed(
            f"{found.program.pipeline}: what was captured is not the pipeline for another prompt and seed",
            expected=f"a relative error of {LIMIT:g}",
            got=f"{verdict.error}; the first to differ is {verdict.difference}",
            hint="`slipcast capture --verify` shows what the pipeline reads into Python",
        )
    export_program(found.program, found.cut, pipe, found.templates, found.call, folder, advance)
    (folder / VERIFIED).write_text(json.dumps({"error": verdict.error}))
    return {}


def digest(root: Path, pipeline: str | None) -> str:
    """SHA-256 over names and contents of a checkpoint's files, and over the module of a pipeline of the user's own."""
    total = hashlib.sha256()
    files = [(file.relative_to(root).as_posix(), file) for file in sorted(root.rglob("*")) if file.is_file()]
    module, _, _ = (pipeline or "").rpartition(":")
    if module:
        files.append((module, Path(inspect.getfile(importlib.import_module(module)))))
    for name, file in files:
        with file.open("rb") as stream:
            total.update(f"{name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def _check_weights(pipe: Any, root: Path) -> None:
    from torch import nn

    for name, component in pipe.components.items():
        for path, weight in component.named_parameters() if isinstance(component, nn.Module) else ():
            if not weight.isfinite().all():
                raise ArtifactError(f"{root}: {name}.{path} is not finite", expected="numbers", got="NaN or infinity")


def _contents(plan: ProgramPlan, source: str, entry: Path, record: Record, folder: Path) -> dict[str, Any]:
    """Copies tokenizers and the table into the bundle; the manifest's fields but for the targets."""
    tokenizers = {each.tokenizer for each in record.sources if each.kind == "prompt"}
    for name in (*sorted(tokenizers), *([TABLE] if record.table else [])):
        shutil.copyfile(entry / name, folder / name)
    return {
        "schema_version": ".".join(map(str, SCHEMA_VERSION)),
        "requires": (PROGRAM,),
        "slipcast_version": slipcast.__version__,
        "name": plan.recipe.name,
        "base_model": plan.checkpoint.name,
        "source_sha256": source,
        "family": plan.family and family_record(plan.family),
        "components": contracts(entry, record),
        "program": record,
    }
