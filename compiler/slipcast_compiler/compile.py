"""The whole compile, in order. Each stage is a call; what a stage does is in the module it calls."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import slipcast
from slipcast.errors import CheckFailed
from slipcast.manifest import Component, ComponentName, EngineFiles, FamilyRecord, Manifest, Target, TextInput
from slipcast.progress import Stages
from slipcast_compiler import evaluate, package, report
from slipcast_compiler.build import BUILDERS
from slipcast_compiler.cache import Cache
from slipcast_compiler.export import export_component
from slipcast_compiler.model import tokenizer_file
from slipcast_compiler.plan import Plan
from slipcast_compiler.recipe import TargetTable


@dataclass(frozen=True)
class Compiled:
    """What a compile made: the published bundle, or, where the gate said no, the report that says why."""

    output: Path
    manifest: Manifest
    record: dict[str, Any]


def compile_plan(plan: Plan, output: Path, cache: Cache, stages: Stages) -> Compiled:
    """Make the bundle at `output`. Raises CheckFailed, with the report written beside it, where the gate is missed."""
    size = (plan.image.width, plan.image.height)
    with stages.stage("originals") as advance:
        originals = evaluate.run_originals(
            plan.checkpoint, plan.sampling, plan.recipe, size, plan.prompts, cache, advance
        )
    exported = {}
    for name in plan.checkpoint.architecture.components:
        with stages.stage(f"export {name}"):
            exported[name] = export(plan, name, cache)
    with package.staging(output) as folder:
        targets = []
        for table in plan.recipe.targets:
            with stages.stage(f"build {table.engine}-{table.precision}") as advance:
                targets.append(build(table, exported, folder, cache, advance))
        fields = describe(plan, exported, folder)
        package.write_manifest(folder, {**fields, "targets": tuple(targets)})
        scorer = evaluate.Scorer(plan.recipe.evaluate.scorer, plan.folder) if plan.recipe.evaluate.scorer else None
        runs, judged = {}, []
        with stages.stage("evaluate original") as advance:
            before = evaluate.measure_original(plan.checkpoint, plan.sampling, size, originals, advance)
        for target in targets:
            with stages.stage(f"evaluate {target.id}") as advance:
                runs[target.id] = run = evaluate.run_bundle(folder, target, originals, advance)
                quality, performance = evaluate.judge(originals, run, scorer), evaluate.performance(before, run)
                judged.append(target.model_copy(update={"quality": quality, "performance": performance}))
        gates = {t.id: evaluate.apply_gate(plan.recipe.gate, t.quality) for t in judged if t.quality}
        first = judged[0]
        fields |= {"targets": tuple(judged), "quality": first.quality, "performance": first.performance}
        with stages.stage("report"):
            record = report.make_record(plan, fields, gates, stages.seconds)
            report.write(folder, record, originals, runs)
        manifest = package.write_manifest(folder, fields)
        missed = [(name, row) for name, rows in gates.items() for row in rows if row.passed is False]
        if missed:
            rejected = report.keep(folder, output)
            raise CheckFailed(
                "the gate was missed; nothing was published:"
                + "".join(f"\n  {name}: {row.metric} is {row.value}, limit {row.limit}" for name, row in missed),
                hint=f"look at {rejected / 'report.html'}, then change the recipe's targets, sampling or limits",
            )
        with stages.stage("publish"):
            package.publish(folder, output)
    return Compiled(output, manifest, record)


def export(plan: Plan, name: str, cache: Cache) -> Path:
    """The cache's directory with NAME.onnx, NAME.onnx.data and NAME.json (the component's contract)."""

    def make(folder: Path) -> None:
        contract = export_component(plan.checkpoint, name, plan.sizes, folder)
        (folder / f"{name}.json").write_text(contract.model_dump_json())

    inputs = {"checkpoint": plan.checkpoint.sha256, "component": name, "sizes": plan.sizes}
    return cache.get("export", inputs, make)


def build(table: TargetTable, exported: dict[str, Path], folder: Path, cache: Cache, advance: Any) -> Target:
    """Build every component's engine for a target, and copy them into the bundle."""
    engines: dict[ComponentName, EngineFiles] = {}
    place = f"{table.engine}-{table.precision}"
    (folder / place).mkdir()
    for done, (name, source) in enumerate(exported.items()):
        advance(done, len(exported))

        def make(out: Path, model: Path = source / f"{name}.onnx") -> None:
            files = BUILDERS[table.engine](model, table.precision, out)
            (out / "files.json").write_text(files.model_dump_json())

        built = cache.get("engine", {"source": source.name, "target": table.model_dump()}, make)
        files = EngineFiles.model_validate_json((built / "files.json").read_text())
        named = {key: f"{place}/{file}" for key, file in files if file}
        for file in named.values():
            shutil.copyfile(built / Path(file).name, folder / file)
        engines[cast(ComponentName, name)] = EngineFiles(**named)
    return Target(engine=table.engine, device="cpu", precision=table.precision, components=engines)


def describe(plan: Plan, exported: dict[str, Path], folder: Path) -> dict[str, Any]:
    """The manifest's fields that do not depend on targets; writes the tokenizers they name."""
    components = {
        name: Component.model_validate_json((source / f"{name}.json").read_text()) for name, source in exported.items()
    }
    texts = []
    for text in plan.checkpoint.architecture.text:
        data, length, pad = tokenizer_file(plan.checkpoint, text.tokenizer)
        (folder / f"{text.tokenizer}.json").write_bytes(data)
        texts.append(
            TextInput(
                component=cast(ComponentName, text.component),
                tokenizer=f"{text.tokenizer}.json",
                max_length=min(length, plan.sizes["text_length"]),
                pad_token_id=pad,
                outputs=dict(text.outputs),
            )
        )
    family = plan.family
    return {
        "schema_version": "1.0", "slipcast_version": slipcast.__version__, "name": plan.recipe.name,
        "base_model": plan.checkpoint.name, "source_sha256": plan.checkpoint.sha256,
        "family": family and FamilyRecord(
            name=family.name, hash=family.hash, closed=family.closed, calibration=len(family.calibration),
            held_out=len(family.held_out),
        ),
        "components": components, "text": tuple(texts), "image": plan.image, "sampling": plan.sampling,
        "not_compiled": plan.checkpoint.not_compiled,
    }  # fmt: skip
