"""What a bundle holds besides engines: tokenizers and tables, and the manifest's fields that name them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import slipcast
from slipcast.bundle.manifest import SCHEMA_VERSION, FamilyRecord, Target, TextInput
from slipcast.progress import silent
from slipcast_compiler.engines import build_target, sources_of
from slipcast_compiler.engines.pool import Pool
from slipcast_compiler.export.graphs import Graphs
from slipcast_compiler.export.guard import write_guard
from slipcast_compiler.export.parts import write_step_table
from slipcast_compiler.export.prompts import PROMPT_TABLE, prompts_record
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.publish import write_manifest
from slipcast_compiler.model.original import Original
from slipcast_compiler.recipe.family import Family
from slipcast_compiler.recipe.targets import TargetTable

PORTABLE = TargetTable(engine="onnxruntime")  # any machine can draw with it while it compiles


def write_bundle(graphs: Graphs, table: TargetTable, folder: Path, cache: Cache) -> Target:
    """A bundle with one target, without evidence: what is drawn with while a compile goes on. Returns the target."""
    sources = sources_of(graphs, table.precision)
    target = build_target(table, sources, Pool(folder), cache, silent)
    write_manifest(folder, {**write_contents(graphs, folder), "targets": (target,)})
    return target


def write_contents(graphs: Graphs, folder: Path) -> dict[str, Any]:
    """Write tokenizers and tables into the bundle at `folder`; returns the manifest's fields but for the targets."""
    original = graphs.original
    cut = write_step_table(graphs.step, graphs.sampling, folder) if graphs.step else None
    guard = write_guard(original, *graphs.guard, folder) if graphs.guard else None
    closed = prompts_record(graphs.closed, graphs.prompts) if graphs.prompts else None
    if graphs.prompts:
        shutil.copyfile(graphs.prompts, folder / PROMPT_TABLE)
    features = {
        "cut": cut,
        "caching": graphs.caching,
        "closed_family": closed,
        "guard": guard and guard.policy != "warn",
    }
    return {
        "schema_version": ".".join(map(str, SCHEMA_VERSION)),
        "slipcast_version": slipcast.__version__,
        "name": graphs.name,
        "base_model": original.checkpoint.name,
        "source_sha256": original.checkpoint.sha256,
        "family": graphs.family and family_record(graphs.family),
        "components": graphs.contracts,
        "text": () if closed else _write_texts(original, folder),
        "prompts": closed,
        "guard": guard,
        "image": original.image,
        "sampling": graphs.sampling,
        "reference": graphs.reference,
        "requires": (*graphs.sampling.requires, *(name for name, record in features.items() if record)),
        "not_compiled": original.checkpoint.not_compiled,
        "cut": cut,
        "caching": graphs.caching,
        **graphs.fields,
    }


def family_record(family: Family) -> FamilyRecord:
    """The manifest's record of a family."""
    return FamilyRecord(
        name=family.name,
        hash=family.hash,
        closed=family.closed,
        calibration=len(family.calibration),
        held_out=len(family.held_out),
    )


def _write_texts(original: Original, folder: Path) -> tuple[TextInput, ...]:
    """How prompts become conditioning; writes the tokenizers."""
    texts = []
    for text in original.checkpoint.architecture.text:
        tokenizer = original.tokenizers[text.tokenizer]
        (folder / f"{text.tokenizer}.json").write_bytes(tokenizer.data)
        texts.append(
            TextInput(
                component=text.component,
                tokenizer=f"{text.tokenizer}.json",
                max_length=original.sizes["text_length"],
                pad_token_id=tokenizer.pad_token_id,
                outputs=dict(text.outputs),
            )
        )
    return tuple(texts)
