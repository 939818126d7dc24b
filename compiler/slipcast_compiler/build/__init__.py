"""Engines from ONNX: one file per target, each a pure function from a model to files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import cast

from slipcast.manifest import ComponentName, EngineFiles, Target
from slipcast.progress import Advance
from slipcast_compiler.build import onnxruntime, openvino
from slipcast_compiler.cache import Cache
from slipcast_compiler.passes.quantize import Quantized
from slipcast_compiler.recipe import TargetTable

# (component.onnx with its .data beside it, precision, directory to write to) -> names of the files written
BUILDERS: dict[str, Callable[[Path, str, Path], EngineFiles]] = {
    "onnxruntime": onnxruntime.build,
    "openvino": openvino.build,
}


def build_target(
    table: TargetTable,
    exported: dict[str, Path],
    folder: Path,
    cache: Cache,
    advance: Advance,
    quantized: Quantized | None = None,
) -> Target:
    """Every component's engine for a target, from the cache or built, copied into the bundle at `folder`.

    A target in int8 has `quantized` for its denoiser; its other components are in the precision of the rest.
    """
    engines: dict[ComponentName, EngineFiles] = {}
    if table.precision == "int8":
        assert quantized
        exported = exported | {"denoiser": quantized.folder}
    place = f"{table.engine}-{table.precision}"
    (folder / place).mkdir()
    for done, (name, source) in enumerate(exported.items()):
        advance(done, len(exported))
        check = quantized.check if quantized and source == quantized.folder else None
        built = _cached(table, name, source, cache, check)
        files = EngineFiles.model_validate_json((built / "files.json").read_text())
        named = {kind: f"{place}/{file}" for kind, file in files if file}
        for file in named.values():
            shutil.copyfile(built / Path(file).name, folder / file)
        engines[cast(ComponentName, name)] = EngineFiles(**named)
    return Target(engine=table.engine, device="cpu", precision=table.precision, components=engines)


def _cached(
    table: TargetTable, name: str, source: Path, cache: Cache, check: Callable[[str, Path, EngineFiles], None] | None
) -> Path:
    def make(out: Path) -> None:
        files = BUILDERS[table.engine](source / f"{name}.onnx", table.precision, out)
        if check:
            check(table.engine, out, files)
        (out / "files.json").write_text(files.model_dump_json())

    # The export's directory is named by the hash of all that it was made from.
    return cache.get("engine", {"source": source.name, "component": name, "target": table.model_dump()}, make)
