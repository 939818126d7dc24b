"""Engines from ONNX: one file per target, each a pure function from a model to files."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from slipcast.bundle.manifest import ComponentName, EngineFiles, ImageGeometry, Target
from slipcast.engines import ENGINES
from slipcast.errors import SlipcastError
from slipcast.progress import Advance, Stages
from slipcast_compiler.engines import onnxruntime, openvino, tensorrt
from slipcast_compiler.engines.pool import Pool
from slipcast_compiler.engines.timings import find_timings
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.precision.quantize import Quantized
from slipcast_compiler.recipe.recipe import REST, TargetTable

logger = logging.getLogger("slipcast")

# (component.onnx with its .data beside it, precision, directory to write to, fp32=names of nodes that stay so) -> names
# of the files written; those of tensorrt.LIBRARIES take tensorrt.Options and a place for timings besides
BUILDERS: dict[str, Callable[..., EngineFiles]] = {
    "onnxruntime": onnxruntime.build,
    "onnxruntime-gpu": onnxruntime.build,
    "onnxruntime-tensorrt": onnxruntime.build,
    "openvino": openvino.build,
    "tensorrt-rtx": tensorrt.build,
    "tensorrt": tensorrt.build,
}


@dataclass(frozen=True)
class Source:
    """A component's portable graph, with its weights beside it; `identity`: a hash of all that it was made from."""

    model: Path
    identity: str


def exported_sources(exported: Mapping[str, Path], quantized: Quantized | None = None) -> dict[str, Source]:
    """Of directories in the cache, which are named by such a hash; `quantized`: in place of the exported denoiser."""
    folders = {**exported, **({"denoiser": quantized.folder} if quantized else {})}
    return {name: Source(folder / f"{name}.onnx", folder.name) for name, folder in folders.items()}


def build_targets(
    tables: tuple[TargetTable, ...],
    exported: dict[str, Path],
    image: ImageGeometry,
    folder: Path,
    cache: Cache,
    stages: Stages,
    quantized: Quantized | None = None,
    casts: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> list[Target]:
    """All targets, in the bundle at `folder`. One that fails does not keep the others from being built.

    `casts`: by target's name, see build_target.

    Raises the first failure's class, with all of them, once every target was tried: a bundle has what its recipe asks
    for, or is not made. What was built is in the cache.
    """
    pool, targets, failures = Pool(folder), [], dict[str, SlipcastError]()
    for table in tables:
        chosen = quantized if table.precision == "int8" else None
        sources, check = exported_sources(exported, chosen), chosen.check if chosen else None
        with stages.stage(f"build {table.name}") as advance:
            try:
                own = casts.get(table.name, {})
                targets.append(build_target(table, sources, image, pool, cache, advance, check, own))
            except SlipcastError as error:
                logger.warning("%s failed; going on with the others", table.name)
                failures[table.name] = error
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
    sources: Mapping[str, Source],
    image: ImageGeometry,
    pool: Pool,
    cache: Cache,
    advance: Advance,
    check: Callable[[str, Path, EngineFiles], None] | None = None,
    casts: Mapping[str, Any] = MappingProxyType({}),
) -> Target:
    """Every component's engine for a target, from the cache or built, put into the bundle.

    In int8 the denoiser's source is the quantised graph, and `check` sees whether the engine reads it right.
    `casts`: of a target in half precision, which nodes stay in fp32, by component; see mixed_precision.measure_cast.
    """
    engines: dict[ComponentName, EngineFiles] = {}
    for done, (name, source) in enumerate(sources.items()):
        advance(done, len(sources))
        rest = table.precision == "int8" and name != "denoiser"
        own = table.model_copy(update={"precision": REST[table.engine]}) if rest else table
        fp32 = list(casts[name]["fp32"]) if name in casts else []
        entry = _cached(own, name, source, image, cache, None if rest else check, fp32)
        files = EngineFiles.model_validate_json((entry / "files.json").read_text())
        engines[cast(ComponentName, name)] = pool.add(entry, files, table.name)
    return declare(table, sources, image).model_copy(update={"components": engines})


def declare(table: TargetTable, components: Iterable[str], image: ImageGeometry) -> Target:
    """The manifest's record of a target, before its engines are built."""
    bound = tensorrt.built(table, components, image) if table.engine in tensorrt.LIBRARIES else None
    device = ENGINES[table.engine].device
    return Target(engine=table.engine, device=device, precision=table.precision, components={}, built=bound)


def _cached(
    table: TargetTable,
    name: str,
    source: Source,
    image: ImageGeometry,
    cache: Cache,
    check: Callable[[str, Path, EngineFiles], None] | None,
    fp32: list[str],
) -> Path:
    bound = table.engine in tensorrt.LIBRARIES
    options = [tensorrt.options(table, name, image)] if bound else []
    timings = [find_timings(table.engine, cache.root)] if bound else []  # decide nothing but how long it takes

    def make(out: Path) -> None:
        files = BUILDERS[table.engine](source.model, table.precision, out, *options, *timings, fp32=fp32)
        if check:
            check(table.engine, out, files)
        (out / "files.json").write_text(files.model_dump_json())

    inputs = {
        "source": source.identity, "component": name, "target": table.model_dump(exclude={"max_cast_error"}),
        "options": [dataclasses.asdict(o) for o in options], "fp32": fp32,
    }  # fmt: skip
    return cache.get("engine", inputs, make)
