"""TensorRT-RTX and TensorRT engines. One builder: the libraries share their API, so the library is a parameter.

Precision is in the graph (strongly typed networks): the exported fp32 graph is cast before it is parsed, and one with
INT8 in it has its activations in signed numbers besides. The build runs in a process of its own with its log kept, so
that a crash, or the end of memory, costs one target and names the layer. TensorRT-RTX builds without a GPU; TensorRT
builds on, and for, the GPU that is there, and keeps how fast its kernels were for the next build (timings.py).

What is left out: engines without weights, which nothing here fills. Without a GPU TensorRT-RTX 1.7.1 gives up on those,
and on engines that can be refitted: `refit` is for TensorRT alone.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import re
import tempfile
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipcast.bundle.manifest import Built, Component, EngineFiles, ImageGeometry
from slipcast.bundle.program import IMAGES, Program
from slipcast.bundle.tiles import SMALLEST_TILE
from slipcast.engines import ENGINES, cuda
from slipcast.errors import HostError, ResourceError, SlipcastError
from slipcast.progress import Advance
from slipcast_compiler.engines.needs import need_graph_libraries
from slipcast_compiler.engines.timings import keep_timings, read_timings
from slipcast_compiler.host.isolate import run_isolated
from slipcast_compiler.recipe.targets import TargetTable

logger = logging.getLogger("slipcast")

LIBRARIES = ("tensorrt-rtx", "tensorrt")  # the targets that are built here
MAX_IMAGES = 4  # that one call can ask for, where the recipe does not say
SHOWN_LINES = 8
# How the library's log names what it is working on: a node of the graph, or layers that it fused.
_LAYER = re.compile(r"Parsing node: (.+)|Node name: (.+)|(\{ForeignNode\[.*?\]\})")
_MEMORY = re.compile(r"out of memory|bad_alloc|allocat\w+ fail|fail\w* .{0,20}allocat", re.IGNORECASE)

_LAW = re.compile(r"(?:(?P<scale>\d+)\*)?(?P<length>[a-z]\w*)(?P<offset>[+-]\d+)?")

Range = tuple[int, int, int]  # least, usual, most
Ranges = tuple[tuple[str, Range], ...]  # by name of a free dimension


@dataclass(frozen=True)
class Options:
    """Everything an engine depends on besides its graph; `ranges`: of the graph's free dimensions, by name.

    `hardware_compatibility` is a member of the library's HardwareCompatibilityLevel.
    """

    library: str
    ranges: Ranges
    compute_capabilities: tuple[str, ...] = ()
    workspace_mb: int | None = None
    hardware_compatibility: str | None = None
    weight_streaming: bool = False
    version_compatible: bool = False
    refit: bool = False


@dataclass(frozen=True)
class Made:
    """An engine's file and what making it took: the memory is its process's peak, resident, in megabytes (1e6 bytes).

    `widened`: ranges of activations that were made symmetric, and less exact by that.
    """

    engine: Path
    seconds: float
    peak_memory_mb: float
    widened: int


@dataclass(frozen=True)
class Lengths:
    """What sizes of a captured program's engines follow from: its `program`, and the contracts of its components."""

    program: Program
    contracts: Mapping[str, Component]


Sizes = ImageGeometry | Lengths


def built(table: TargetTable, components: Iterable[str], sizes: Sizes) -> Built:
    """What the manifest says of such a target: with which version of the library, on which GPUs and for which shapes it
    runs."""
    kind = ENGINES[table.engine]
    capabilities: tuple[str, ...] = table.compute_capabilities or ()
    if kind.builds_with == "device" and table.hardware_compatibility != "ampere_plus":
        capabilities = (cuda.look().gpus[0].compute_capability,)  # it was built on, and for, this one
    return Built(
        library_version=importlib.metadata.version(kind.library),
        compute_capabilities=capabilities,
        version_compatible=bool(table.version_compatible),
        max_images=1 if isinstance(sizes, Lengths) else table.max_images or MAX_IMAGES,
        profiles={name: dict(options(table, name, sizes).ranges) for name in components},
    )


def options(table: TargetTable, component: str, sizes: Sizes) -> Options:
    """The options of a component's engine, from the recipe and what the pipeline will ask of the component."""
    ranges = _of_lengths(component, sizes) if isinstance(sizes, Lengths) else _of_image(table, component, sizes)
    return Options(
        library=ENGINES[table.engine].library,
        ranges=ranges,
        compute_capabilities=table.compute_capabilities or (),
        workspace_mb=table.workspace_mb,
        hardware_compatibility=table.hardware_compatibility,
        weight_streaming=bool(table.weight_streaming),
        version_compatible=bool(table.version_compatible),
        refit=bool(table.refit),
    )


def _of_image(table: TargetTable, component: str, image: ImageGeometry) -> Ranges:
    rows = 2 * (table.max_images or MAX_IMAGES)  # guidance doubles them
    height, width = (min(image.tile, size // image.factor) for size in (image.height, image.width))
    return (
        ("batch", (1, 1, 1) if component == "vae_decoder" else (1, 2, rows)),  # pictures are decoded one by one
        ("tile_height", (min(SMALLEST_TILE, height), height, height)),
        ("tile_width", (min(SMALLEST_TILE, width), width, width)),
    )


def _of_lengths(component: str, sizes: Lengths) -> Ranges:
    """Of dimensions that follow the length of a text, which are called as "2*length+1" is; built for the longest,
    and for one image."""
    found = {}
    for spec in sizes.contracts[component].inputs:
        for name in (size for size in spec.shape if isinstance(size, str)):
            law = _LAW.fullmatch(name)
            assert law, name
            scale, offset = int(law["scale"] or 1), int(law["offset"] or 0)
            known = [each.lengths for each in sizes.program.every] + [sizes.program.sizes]
            ranges = [each[law["length"]] for each in known if law["length"] in each]
            ends = min(each.minimum for each in ranges), max(each.maximum for each in ranges)
            least, most = (scale * each + offset for each in ends)
            found[name] = (least, least if law["length"] == IMAGES else most, most)
    return tuple(found.items())


def build(
    model: Path,
    precision: str,
    out: Path,
    options: Options,
    timings: Path | None = None,
    fp32: Collection[str] = (),
) -> EngineFiles:
    """Write out/NAME.engine for a graph in fp32 (or with INT8 in it), whose weights lie beside it; see make_engine."""
    made = make_engine(model, precision, out, options, timings, fp32)
    if made.widened:
        logger.warning(
            "%s: %d ranges of activations were widened to be symmetric, as %s wants them, and are less exact: compile "
            "with passes.quantize.symmetric = true", model.stem, made.widened, options.library,
        )  # fmt: skip
    logger.info(
        "%s for %s in %s: %.1f s, %.0f MB of memory at the most, %.1f MB", model.stem, options.library, precision,
        made.seconds, made.peak_memory_mb, made.engine.stat().st_size / 1e6,
    )  # fmt: skip
    return EngineFiles(model=made.engine.name)


def make_engine(
    model: Path,
    precision: str,
    out: Path,
    options: Options,
    timings: Path | None = None,
    fp32: Collection[str] = (),
) -> Made:
    """`timings`: a file with those of earlier builds, to which this one adds. `fp32`: nodes that are not cast.

    HostError where the library refuses the graph, ResourceError where memory ran out or the library crashed; both name
    the component and what it was working on.
    """
    if precision != "fp32":
        need_graph_libraries()
    engine = out / f"{model.stem}.engine"
    with tempfile.TemporaryDirectory(prefix=".build-", dir=out) as scratch:
        log, clock = Path(scratch) / "log.txt", time.perf_counter()
        try:
            # Apart, so that what is mapped while casting is gone when the library wants memory: 4 of 10 GB for SD 1.5.
            cast = run_isolated(_in_precision, model, precision, fp32, log.parent)
            done = run_isolated(_build, cast.result.model, engine, log, options, timings)
        except SlipcastError as error:
            raise _explained(error, model.stem, options.library, log) from error
    peak = max(cast.peak_memory_mb, done.peak_memory_mb)
    return Made(engine, time.perf_counter() - clock, peak, cast.result.widened)


def _build(model: Path, engine: Path, log: Path, options: Options, timings: Path | None, _: Advance) -> None:
    """The child process."""
    with log.open("wb", buffering=0) as stream:  # of the operating system, so that a crash loses nothing of it
        for descriptor in (1, 2):  # the library, and those it calls, also write there
            os.dup2(stream.fileno(), descriptor)
        trt = importlib.import_module(options.library)
        builder = trt.Builder(_make_logger(trt))
        network = _parse(trt, builder, model)
        config = _configure(trt, builder, network, options)
        if timings:
            read_timings(config, timings)
        serialized = builder.build_serialized_network(network, config)
        if serialized is None:
            raise HostError("the library gave up")
        engine.write_bytes(serialized)
        if timings:
            keep_timings(config, timings)


@dataclass(frozen=True)
class Cast:
    """The graph as the library shall read it, and how many ranges of activations had to be widened for it."""

    model: Path
    widened: int = 0


def _in_precision(model: Path, precision: str, fp32: Collection[str], folder: Path, _: Advance) -> Cast:
    """`folder` is for graphs on the way."""
    if precision == "fp32":
        return Cast(model)
    # Here, so that targets of other engines can be built where these are not installed.
    from slipcast_compiler.graph.casting import cast_graph
    from slipcast_compiler.graph.qdq import make_signed

    widened = 0
    if precision == "int8":
        signed = folder / "signed" / model.name
        signed.parent.mkdir()
        widened = make_signed(model, signed)
        model = signed
    cast_graph(model, "fp16" if precision == "int8" else precision, folder / model.name, fp32)
    return Cast(folder / model.name, widened)


def _make_logger(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            os.write(1, f"{severity.name}: {message}\n".encode())

    return Log()


def _parse(trt: Any, builder: Any, model: Path) -> Any:
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, builder.logger)
    # From the file, so that weights are mapped where they lie.
    if not parser.parse_from_file(str(model)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        raise HostError(
            "the graph is refused",
            got="; ".join(f"{e.node_name()} [{e.node_operator()}]: {e.desc()}" for e in errors[:3]) or "no reason",
        )
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_OUTPUT:
            # Attention without a kernel of its own (in fp32, say) is otherwise refused. The bindings return the base
            # class, of which this one only adds the accessors.
            layer.__class__ = trt.IAttentionOutputLayer
            layer.attention.decomposable = True
    return network


def _configure(trt: Any, builder: Any, network: Any, options: Options) -> Any:
    config = builder.create_builder_config()
    if options.compute_capabilities:
        config.num_compute_capabilities = len(options.compute_capabilities)
        for i, capability in enumerate(options.compute_capabilities):
            if not config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}"), i):
                raise HostError(f"compute capability {capability} is refused")
    if options.workspace_mb:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mb * 1_000_000)
    if options.hardware_compatibility:
        level = getattr(trt.HardwareCompatibilityLevel, options.hardware_compatibility.upper())
        config.hardware_compatibility_level = level
    for flag in ("weight_streaming", "version_compatible", "refit"):
        if getattr(options, flag):
            config.set_flag(getattr(trt.BuilderFlag, flag.upper()))
    profile, ranges = builder.create_optimization_profile(), dict(options.ranges)
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        free = [tensor.get_dimension_name(i) if size == -1 else "" for i, size in enumerate(tensor.shape)]
        if any(free):
            shapes = [
                [ranges[name][k] if name else size for name, size in zip(free, tensor.shape, strict=True)]
                for k in range(3)
            ]
            profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)
    return config


def _explained(error: SlipcastError, component: str, library: str, log: Path) -> SlipcastError:
    """The same error with what the log tells: the layer last worked on, and what the library complained of."""
    lines = log.read_text("utf-8", "replace").splitlines() if log.exists() else []
    layers = [next(filter(None, found.groups())) for line in lines if (found := _LAYER.search(line))]
    complaints = [line for line in lines if not line.startswith(("VERBOSE", "INFO", "WARNING"))][-SHOWN_LINES:]
    memory = any(_MEMORY.search(line) for line in complaints)
    kind = ResourceError if memory else type(error)
    failure = kind(
        f"{component}: {library} failed" + (f" at {layers[-1]}" if layers else " before it reached a layer"),
        expected=error.expected, got="\n    ".join(filter(None, [str(error.got or error.message), *complaints])),
        hint=error.hint or "build on a machine with more memory, or leave this target out of the recipe"
        if memory or isinstance(error, ResourceError) else "choose another precision or leave this target out",
    )  # fmt: skip
    failure.add_note("\n".join(lines[-50:]))
    return failure
