"""Engines from ONNX: one file per target, each a pure function from a model to files."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import cast

from slipcast.engines import ENGINES
from slipcast.errors import SlipcastError
from slipcast.manifest import ComponentName, EngineFiles, ImageGeometry, Target
from slipcast.progress import Advance, Stages
from slipcast_compiler.build import onnxruntime, openvino, tensorrt
from slipcast_compiler.cache import Cache
from slipcast_compiler.passes.quantize import Quantized
from slipcast_compiler.recipe import TargetTable

logger = logging.getLogger("slipcast")

# (component.onnx with its .data beside it, precision, directory to write to) -> names of the files written; those for
# GPUs take tensorrt.Options besides
BUILDERS: dict[str, Callable[..., EngineFiles]] = {
    "onnxruntime": onnxruntime.build,
    "openvino": openvino.build,
    "tensorrt-rtx": tensorrt.build,
    "tensorrt": tensorrt.build,
}


def build_targets(
    tables: tuple[TargetTable, ...],
    exported: dict[str, Path],
    image: ImageGeometry,
    folder: Path,
    cache: Cache,
    stages: Stages,
    quantized: Quantized | None = None,
) -> list[Target]:
    """All targets, in the bundle at `folder`. One that fails does not keep the others from being built.

    Raises the first failure's class, with all of them, once every target was tried: a bundle has what its recipe asks
    for, or is not made. What was built is in the cache.
    """
    targets, failures = [], dict[str, SlipcastError]()
    for table in tables:
        name = f"{table.engine}-{table.precision}"
        with stages.stage(f"build {name}") as advance:
            try:
                targets.append(build_target(table, exported, image, folder, cache, advance, quantized))
            except SlipcastError as error:
                logger.warning("%s failed; going on with the others", name)
                failures[name] = error
    if failures:
        first = next(iter(failures.values()))
        raise type(first)(
            f"{len(failures)} of {len(tables)} targets could not be built; nothing was published:\n"
            + "\n".join(f"{name}: {error}" for name, error in failures.items()),
            hint="the other engines are in the cache: mend these, or take them out of the recipe, and compile again",
        ) from first
    return targets


def build_target(
    table: TargetTable,
    exported: dict[str, Path],
    image: ImageGeometry,
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
        built = _cached(table, name, source, image, cache, check)
        files = EngineFiles.model_validate_json((built / "files.json").read_text())
        named = {kind: f"{place}/{file}" for kind, file in files if file}
        for file in named.values():
            shutil.copyfile(built / Path(file).name, folder / file)
        engines[cast(ComponentName, name)] = EngineFiles(**named)
    device = ENGINES[table.engine].device
    bound = tensorrt.built(table) if device == "cuda" else None
    return Target(engine=table.engine, device=device, precision=table.precision, components=engines, built=bound)


def _cached(
    table: TargetTable,
    name: str,
    source: Path,
    image: ImageGeometry,
    cache: Cache,
    check: Callable[[str, Path, EngineFiles], None] | None,
) -> Path:
    options = [tensorrt.options(table, name, image)] if ENGINES[table.engine].device == "cuda" else []

    def make(out: Path) -> None:
        files = BUILDERS[table.engine](source / f"{name}.onnx", table.precision, out, *options)
        if check:
            check(table.engine, out, files)
        (out / "files.json").write_text(files.model_dump_json())

    # The export's directory is named by the hash of all that it was made from.
    inputs = {
        "source": source.name, "component": name, "target": table.model_dump(),
        "options": [dataclasses.asdict(o) for o in options],
    }  # fmt: skip
    return cache.get("engine", inputs, make)
