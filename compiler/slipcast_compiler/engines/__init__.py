"""Engines from ONNX: one file per target, each a pure function from a model to files."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from slipcast.bundle.manifest import EngineFiles, Target
from slipcast.engines import ENGINES
from slipcast.errors import SlipcastError
from slipcast.progress import Advance, Stages
from slipcast_compiler.engines import onnxruntime, openvino, tensorrt
from slipcast_compiler.engines.pool import Pool
from slipcast_compiler.engines.timings import find_timings
from slipcast_compiler.export.graphs import Check, Graphs
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.recipe.targets import QUANTIZED, REST, TargetTable

logger = logging.getLogger("slipcast")

# (component.onnx with its .data beside it, precision, directory to write to, fp32=names of nodes that stay so) -> names
# of the files written; those of tensorrt.LIBRARIES take tensorrt.Options and a place for timings besides
BUILDERS: dict[str, Callable[..., EngineFiles]] = {
    "onnxruntime": onnxruntime.build,
    "onnxruntime-gpu": onnxruntime.build_for_gpu,
    "onnxruntime-tensorrt": onnxruntime.build_for_gpu,
    "openvino": openvino.build,
    "tensorrt-rtx": tensorrt.build,
    "tensorrt": tensorrt.build,
}


Casts = Mapping[str, Mapping[str, Any]]  # by component, what stays in fp32 of it; see precision/mixed.py
NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Source:
    """A component's portable graph, with its weights beside it; `identity`: a hash of all that it was made from."""

    model: Path
    identity: str


@dataclass(frozen=True)
class Sources:
    """What a target is built from. `sizes`: what those of engines with profiles follow from. `quantized`: by component
    whose graph is in INT8 or INT4, what sees whether an engine reads it right, where there is one. `exact`: what is in
    fp32 whatever the target."""

    components: Mapping[str, Source]
    sizes: tensorrt.Sizes
    quantized: Mapping[str, Check | None] = field(default_factory=dict)
    exact: frozenset[str] = frozenset()


def sources_of(graphs: Graphs, precision: str = "fp32") -> Sources:
    """Of a target in a precision, with what is quantised for it. Directories in the cache are named by a hash of their
    inputs."""
    quantized = graphs.quantized.get(precision, NONE)
    folders = {**graphs.components, **{name: each.folder for name, each in quantized.items()}}
    components = {name: Source(folder / f"{name}.onnx", folder.name) for name, folder in folders.items()}
    return Sources(components, graphs.original.image, {name: each.check for name, each in quantized.items()})


def build_targets(
    sources: Mapping[str, Sources],
    tables: tuple[TargetTable, ...],
    folder: Path,
    cache: Cache,
    stages: Stages,
    casts: Mapping[str, Casts] = NONE,
) -> list[Target]:
    """All targets, in the bundle at `folder`. One that fails does not keep the others from being built.

    `sources` and `casts`: by target's name, see build_target.

    Raises the first failure's class, with all of them, once every target was tried: a bundle has what its recipe asks
    for, or is not made. What was built is in the cache.
    """
    pool, targets, failures = Pool(folder), [], dict[str, SlipcastError]()
    for table in tables:
        with stages.stage(f"build {table.name}") as advance:
            try:
                targets.append(
                    build_target(table, sources[table.name], pool, cache, advance, casts.get(table.name, NONE))
                )
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
    table: TargetTable, sources: Sources, pool: Pool, cache: Cache, advance: Advance, casts: Casts = NONE
) -> Target:
    """Every component's engine for a target, from the cache or built, put into the bundle.

    `casts`: of a target in half precision, which nodes stay in fp32, by component; see precision.mixed.measure_cast.
    """
    engines: dict[str, EngineFiles] = {}
    for done, name in enumerate(sources.components):
        advance(done, len(sources.components))
        rest = table.precision in QUANTIZED and name not in sources.quantized
        own = table.model_copy(update={"precision": REST[table.engine]}) if rest else table
        own = table.model_copy(update={"precision": "fp32"}) if name in sources.exact else own
        entry = _build_engine(own, name, sources, list(casts[name]["fp32"]) if name in casts else [], cache)
        files = EngineFiles.model_validate_json((entry / "files.json").read_text())
        engines[name] = pool.add(entry, files, table.name)
    return declare(table, sources.components, sources.sizes).model_copy(update={"components": engines})


def declare(table: TargetTable, components: Iterable[str], sizes: tensorrt.Sizes) -> Target:
    """The manifest's record of a target, before its engines are built."""
    bound = tensorrt.built(table, components, sizes) if table.engine in tensorrt.LIBRARIES else None
    device = ENGINES[table.engine].device
    return Target(engine=table.engine, device=device, precision=table.precision, components={}, built=bound)


def _build_engine(table: TargetTable, name: str, sources: Sources, fp32: list[str], cache: Cache) -> Path:
    """The cache's directory with one component's engine, and files.json, which names its files."""
    bound, source = table.engine in tensorrt.LIBRARIES, sources.components[name]
    options = [tensorrt.options(table, name, sources.sizes)] if bound else []
    timings = [find_timings(table.engine, cache.root)] if bound else []  # decide nothing but how long it takes

    def make(out: Path) -> None:
        files = BUILDERS[table.engine](source.model, table.precision, out, *options, *timings, fp32=fp32)
        if table.precision in QUANTIZED and (check := sources.quantized[name]):
            check(table.engine, out, files)
        (out / "files.json").write_text(files.model_dump_json())

    inputs = {
        "source": source.identity,
        "component": name,
        "target": table.model_dump(exclude={"max_cast_error"}),
        "options": [dataclasses.asdict(each) for each in options],
        "fp32": fp32,
    }
    return cache.get("engine", inputs, make)
