"""The bundle of an exported program: engines, tokenizers and the table."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import slipcast
from slipcast.bundle.manifest import SCHEMA_VERSION, SHALLOW, Component, Target
from slipcast.bundle.program import PROGRAM, TILED, Program, ProgramCall, Shallow, Variant
from slipcast.bundle.program_manifest import AdaptersRecord
from slipcast.bundle.sampling import Sampling
from slipcast.progress import Advance, SilentStages, Stages
from slipcast_compiler.engines import Casts, Source, Sources, build_targets, tensorrt
from slipcast_compiler.engines.contents import PORTABLE
from slipcast_compiler.export.closed import PROMPT_TABLE, close, tabulate
from slipcast_compiler.export.graphs import Check, Quantized
from slipcast_compiler.export.program import TABLE, contracts, read_record
from slipcast_compiler.export.program_guard import embed_prompts, write_program_guard
from slipcast_compiler.export.slots import Slots, is_adaptable, make_slots
from slipcast_compiler.export.unspecialised import Strangers, make_strangers
from slipcast_compiler.host import publish
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.isolate import run_isolated
from slipcast_compiler.recipe.passes import AdaptersTable
from slipcast_compiler.recipe.recipe import GuardTable
from slipcast_compiler.recipe.targets import TargetTable

DENOISER, FEATURE = "denoiser", "feature"


@dataclass(frozen=True)
class Split:
    """A denoiser in two: a directory of the cache that has both, the `feature` that crosses, and the mask of steps."""

    folder: Path
    feature: str
    share: float
    mask: tuple[bool, ...]


@dataclass(frozen=True)
class ProgramGraphs:
    """What the bundle of a captured program is built from. `entry`: of the cache, which has an exported program;
    `samplings`: by variant, in place of its loop's; `closed`: all prompts of a closed family, and the table of them;
    `split`: the denoiser in two, for feature caching; `quantized`: by precision, by component, what takes
    its place there; `casts`: by target's name, see build_target; `guard`: what tells strangers, by the recipe's
    table; `strangers`: what draws those."""

    entry: Path
    samplings: tuple[Sampling, ...] = ()
    closed: tuple[tuple[str, ...], Path] | None = None
    split: Split | None = None
    quantized: Mapping[str, Mapping[str, Quantized]] = field(default_factory=dict)
    slots: Slots | None = None
    casts: Mapping[str, Casts] = field(default_factory=dict)
    guard: tuple[GuardTable, Path] | None = None
    strangers: Strangers | None = None

    @property
    def record(self) -> Program:
        """The program."""
        record = self._sampled(read_record(self.entry))
        if not any(each.loop and each.loop.sampling.guidance_interval for each in record.every):
            record = guided_only(record)
        if self.closed:
            record = close(record, self.closed[0], contracts(self.entry, record))
        return with_shallow(record, self.split) if self.split else record

    @property
    def left_out(self) -> set[str]:
        """Components of the entry that belong to steps without guidance, of which there are none."""
        whole, kept = read_record(self.entry), self._sampled(read_record(self.entry))
        if any(each.loop and each.loop.sampling.guidance_interval for each in kept.every):
            return set()
        every, guided = (
            {call.component for variant in each.every for call in variant.every_call}
            for each in (whole, guided_only(whole))
        )
        return every - guided

    def _sampled(self, record: Program) -> Program:
        if not self.samplings:
            return record
        own = [
            {"loop": variant.loop and variant.loop.model_copy(update={"sampling": sampling})}
            for variant, sampling in zip(record.every, self.samplings, strict=True)
        ]
        others = [each.model_copy(update=loop) for each, loop in zip(record.variants, own[1:], strict=True)]
        return record.model_copy(update={**own[0], "variants": tuple(others)})

    @property
    def identity(self) -> dict[str, Any]:
        """What a run of its graphs in fp32 depends on; plain JSON, for the cache's keys."""
        table = self.closed and self.closed[1].name
        return {
            "program": self.entry.name,
            "table": table,
            "split": self.split and [self.split.folder.name, self.split.mask],
            "samplings": [each.model_dump(mode="json") for each in self.samplings],
        }

    @property
    def contracts(self) -> dict[str, Component]:
        """By component, what its engines take and return."""
        names = dict.fromkeys(call.component for variant in self.record.every for call in variant.every_call)
        files = {name: self._folder(name) / f"{name}.json" for name in names}
        if self.slots:
            files |= {
                name: self.slots.folder("", plain) / f"{name}.json" for plain, name in self.slots.components.items()
            }
        if self.strangers:
            files |= {name: self.strangers.folder / f"{name}.json" for name in self.strangers.components.values()}
        return {name: Component.model_validate_json(file.read_text()) for name, file in files.items()}

    def _folder(self, component: str) -> Path:
        """Where its graph lies."""
        if self.strangers and component in self.strangers.components.values():
            return self.strangers.folder
        return self.split.folder if self.split and component in (DENOISER, SHALLOW) else self.entry

    def sources(self, precision: str = "fp32") -> Sources:
        """Of a target in a precision, with what is quantised for it."""
        quantized = self.quantized.get(precision, {})
        checks: dict[str, Check | None] = {name: each.check for name, each in quantized.items()}
        folders = {name: self._folder(name) for name in self.contracts}
        folders |= {name: each.folder for name, each in quantized.items()}
        exact = self.record.exact
        if slots := self.slots:
            names = slots.components
            folders |= {name: slots.folder(precision, plain) for plain, name in names.items()}
            checks |= {name: None for plain, name in names.items() if plain in checks}  # the graph was checked
            exact |= {name for plain, name in names.items() if plain in exact}
        if self.strangers:
            exact |= {name for plain, name in self.strangers.components.items() if plain in exact}
        found = {name: Source(each / f"{name}.onnx", f"{each.name}/{name}") for name, each in folders.items()}
        return Sources(found, tensorrt.Lengths(self.record, self.contracts), checks, exact)

    def with_slots(self, table: AdaptersTable, precisions: Collection[str], cache: Cache, advance: Advance) -> Self:
        """With slots for adapters in the graphs of targets in these precisions."""
        graphs = {
            each: {name: (source.model, source.identity) for name, source in self.sources(each).components.items()}
            for each in ("", *(each for each in precisions if each in self.quantized))
        }
        slots = make_slots(graphs, table, cache, advance)
        return replace(self, slots=slots, casts=with_stand_ins(self.casts, slots.components))

    def with_strangers(self, entry: Path, cache: Cache) -> Self:
        """With what draws strangers, of the program with the checkpoint's own weights in an entry of the cache. What of
        a denoiser was neither rewritten nor quantised draws theirs too."""
        own = replace(self, entry=entry, samplings=(), closed=None, split=None, quantized={}, slots=None)
        quantized = frozenset[str]().union(*self.quantized.values())
        changed = tuple(
            name for name in own.contracts if is_adaptable(name) and (entry != self.entry or name in quantized)
        )
        strangers = make_strangers(entry, changed, self.entry, cache)
        return replace(self, strangers=strangers, casts=with_stand_ins(self.casts, strangers.components))


def with_stand_ins(casts: Mapping[str, Casts], components: Mapping[str, str]) -> dict[str, Casts]:
    """By target, what stays in fp32 of those that take others' places too: nodes have the names that they have there,
    but for layers that passes took apart."""
    return {
        target: {**found, **{name: found[plain] for plain, name in components.items() if plain in found}}
        for target, found in casts.items()
    }


def guided_only(record: Program) -> Program:
    """The program without what it does without guidance, for a sampling that never asks for it."""
    first, *others = (_guided_only(variant) for variant in record.every)
    rest = [variant.model_copy(update=each) for variant, each in zip(record.variants, others, strict=True)]
    return record.model_copy(update={**first, "variants": tuple(rest)})


def _guided_only(variant: Variant) -> dict[str, Any]:
    if not (loop := variant.loop) or not loop.unguided:
        return {}
    kept, read = list(range(len(variant.calls))), set(variant.given)
    read |= {loop.sample, *(value for call in loop.calls for value in call.inputs.values())}
    for place in reversed(range(len(variant.calls))):
        call = variant.calls[place]
        if place < loop.at and not read.intersection(call.outputs.values()):
            kept.remove(place)
        else:
            read.update(call.inputs.values())
    components = {call.component for call in (*loop.calls, *(variant.calls[place] for place in kept))}
    columns = {name: each for name, each in loop.columns.items() if name.partition(".")[0] in components}
    at = sum(place < loop.at for place in kept)
    changed = loop.model_copy(update={"at": at, "unguided": (), "columns": columns})
    return {"calls": tuple(variant.calls[place] for place in kept), "loop": changed}


def with_shallow(record: Program, split: Split) -> Program:
    """The program whose denoiser gives a feature, which a shallow one takes at the steps that are not full."""
    loop = record.loop
    assert loop
    whole = next(call for call in loop.calls if call.component == DENOISER)
    contract = Component.model_validate_json((split.folder / f"{SHALLOW}.json").read_text())
    names = [spec.name for spec in contract.inputs]
    inputs = {name: value for name, value in whole.inputs.items() if name in names} | {split.feature: FEATURE}
    outputs = {name: value for name, value in whole.outputs.items() if value == loop.output}
    giving = whole.model_copy(update={"outputs": whole.outputs | {split.feature: FEATURE}})
    columns = {f"{SHALLOW}.{name}": loop.columns[of] for name in names if (of := f"{DENOISER}.{name}") in loop.columns}
    call = ProgramCall(component=SHALLOW, inputs=inputs, outputs=outputs)
    changes = {
        "calls": tuple(giving if call is whole else call for call in loop.calls),
        "columns": loop.columns | columns,
        "shallow": Shallow(call=call, mask=split.mask, share=split.share),
    }
    changed = record.model_copy(update={"loop": loop.model_copy(update=changes)})
    return Program.model_validate_json(changed.model_dump_json())


def tabulate_prompts(graphs: ProgramGraphs, prompts: tuple[str, ...], cache: Cache, advance: Advance) -> ProgramGraphs:
    """With a table of these prompts, all that the bundle takes, in place of what computes it of texts: evaluated in
    fp32 by ONNX Runtime, or from the cache."""

    def make(out: Path) -> None:
        with tempfile.TemporaryDirectory(prefix=".closed-", dir=out.parent) as name:
            target = write_portable(graphs, Path(name), cache)
            run_isolated(tabulate, Path(name), target.id, prompts, out, advance=advance)

    # Of texts alone: whatever the noise levels.
    plain = any(each.loop and each.loop.unguided for each in graphs.record.every)
    entry = cache.get("closed", {"program": graphs.entry.name, "unguided": plain, "prompts": prompts}, make)
    return replace(graphs, closed=(prompts, entry))


def add_program_guard(
    graphs: ProgramGraphs, table: GuardTable, prompts: tuple[str, ...], cache: Cache, advance: Advance
) -> ProgramGraphs:
    """With what tells strangers by their distance to these prompts: evaluated in fp32 by ONNX Runtime, or from the
    cache. RecipeError where nothing is computed of a prompt alone."""

    def make(out: Path) -> None:
        with tempfile.TemporaryDirectory(prefix=".guard-", dir=out.parent) as name:
            target = write_portable(graphs, Path(name), cache)
            run_isolated(embed_prompts, Path(name), target.id, prompts, out, advance=advance)

    return replace(graphs, guard=(table, cache.get("program-guard", {**graphs.identity, "prompts": prompts}, make)))


def write_portable(graphs: ProgramGraphs, folder: Path, cache: Cache) -> Target:
    """A bundle for ONNX Runtime in fp32, without evidence: what is measured with while a compile goes on."""
    about = {"name": "portable", "base_model": "portable", "source_sha256": "0" * 64, "family": None}
    plain = replace(graphs, quantized={}, casts={}, guard=None, strangers=None)
    made = write_bundle(plain, (PORTABLE,), about, folder, cache, SilentStages())
    target: Target = made["targets"][0]
    return target


def write_bundle(
    graphs: ProgramGraphs, tables: tuple[TargetTable, ...], fields: Mapping[str, Any], folder: Path, cache: Cache,
    stages: Stages,
) -> dict[str, Any]:  # fmt: skip
    """A bundle in `folder`, complete but for the evidence; the manifest's fields, with the targets, beside those that
    are given."""
    record = graphs.record
    sources = {table.name: graphs.sources(table.precision) for table in tables}
    targets = build_targets(sources, tables, folder, cache, stages, graphs.casts)
    tokenizers = {each.tokenizer for variant in record.every for each in variant.sources if each.kind == "prompt"}
    for name in (*sorted(tokenizers), *([TABLE] if record.table else [])):
        shutil.copyfile(graphs.entry / name, folder / name)
    if graphs.closed:
        shutil.copyfile(graphs.closed[1] / PROMPT_TABLE, folder / PROMPT_TABLE)
    guard = write_program_guard(*graphs.guard, graphs.strangers, folder) if graphs.guard else None
    loops = [each.loop.sampling for each in record.every if each.loop]
    samplings = [*loops, *(graphs.strangers.samplings if graphs.strangers else ())]
    made = {
        "schema_version": ".".join(map(str, SCHEMA_VERSION)),
        "requires": (
            PROGRAM,
            *(["caching"] if graphs.split else []),
            *(["adapters"] if graphs.slots else []),
            *([TILED] if any(call.tiles for each in record.every for call in each.every_call) else []),
            *(["guard"] if guard and guard.policy != "warn" else []),
            *dict.fromkeys(name for each in samplings for name in each.requires),
        ),
        "guard": guard,
        "adapters": graphs.slots
        and AdaptersRecord(
            rank=graphs.slots.rank, layers=graphs.slots.layers, components=dict(graphs.slots.components)
        ),
        "slipcast_version": slipcast.__version__,
        "components": graphs.contracts,
        "program": record,
        "targets": tuple(targets),
    }
    publish.write_program_manifest(folder, {**fields, **made})
    return {**fields, **made}
