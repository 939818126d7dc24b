"""The bundle of an exported program: engines, tokenizers and the table."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import slipcast
from slipcast.bundle.manifest import SCHEMA_VERSION, Component
from slipcast.bundle.program import PROGRAM
from slipcast.errors import RecipeError
from slipcast.progress import Stages
from slipcast_compiler.engines import Source, Sources, build_targets
from slipcast_compiler.export.program import TABLE, contracts, read_record
from slipcast_compiler.host import publish
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.recipe.targets import TargetTable


def write_bundle(
    entry: Path, tables: tuple[TargetTable, ...], fields: Mapping[str, Any], folder: Path, cache: Cache, stages: Stages
) -> dict[str, Any]:
    """A bundle in `folder`, complete but for the evidence, of an entry of the cache that has an exported program; the
    manifest's fields, with the targets, beside those that are given."""
    record = read_record(entry)
    _check_rows(contracts(entry, record), tables)
    components = {name: Source(entry / f"{name}.onnx", f"{entry.name}/{name}") for name in contracts(entry, record)}
    sources = dict.fromkeys((table.name for table in tables), Sources(components, None))
    targets = build_targets(sources, tables, folder, cache, stages)
    tokenizers = {each.tokenizer for each in record.sources if each.kind == "prompt"}
    for name in (*sorted(tokenizers), *([TABLE] if record.table else [])):
        shutil.copyfile(entry / name, folder / name)
    made = {
        "schema_version": ".".join(map(str, SCHEMA_VERSION)),
        "requires": (PROGRAM,),
        "slipcast_version": slipcast.__version__,
        "components": contracts(entry, record),
        "program": record,
        "targets": tuple(targets),
    }
    publish.write_program_manifest(folder, {**fields, **made})
    return {**fields, **made}


def _check_rows(components: Mapping[str, Component], tables: tuple[TargetTable, ...]) -> None:
    """RecipeError where OpenVINO's engines would take the tokens of a text for the rows of a batch."""
    if not any(table.engine == "openvino" for table in tables):
        return
    for name, component in components.items():
        for spec in component.inputs:
            if spec.shape and isinstance(spec.shape[0], str):
                raise RecipeError(
                    f"{name}: the first dimension of an input follows the length of a prompt: not for OpenVINO",
                    expected="engine = onnxruntime",
                    got=f"{spec.name} [{', '.join(map(str, spec.shape))}]",
                )
