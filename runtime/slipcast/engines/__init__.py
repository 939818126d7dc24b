"""Engines: one compiled component graph on one target. Arrays in, arrays out.

An `Engine` is made open and is closed by leaving its `with` block. Each target lives in a file of its own, which
imports the vendor's library only when it is opened.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol, Self

import numpy as np
import numpy.typing as npt

from slipcast.bundle.manifest import Built, Component, Target, TensorSpec
from slipcast.bundle.program import rows_of_image
from slipcast.engines import cuda
from slipcast.engines.files import ModelFile
from slipcast.engines.resources import as_resource_error
from slipcast.errors import ArtifactError, HostError, RequestError

Array = npt.NDArray[np.generic]
BATCH = "batch"  # what a contract calls the dimension of rows; any other that is free follows a text, or a size
OLDEST_PORTABLE = 8.0  # engines that name no compute capability run from Ampere on


class Engine(Protocol):
    """What the pipeline needs of a target."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __call__(self, arrays: Mapping[str, Array]) -> dict[str, Array]: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True)
class LayerTime:
    """What some calls of an engine spent in one layer, by the engine's own profiler.

    `kind`: the operator. `kernel`: what executed it, with the precision. `module`: the original's module whose weights
    it holds, or "" where that is not known. `seconds`: of all `calls` together.
    """

    name: str
    kind: str
    kernel: str
    module: str
    seconds: float
    calls: int


class ProfiledEngine(Engine, Protocol):
    """An engine that was opened with `profile=True`."""

    def start_profile(self) -> None:
        """Leave out of `layers` what was called so far: first calls compile kernels."""

    def layers(self) -> tuple[LayerTime, ...]:
        """Layers that took time since `start_profile`. To be asked once, after the last call."""
        ...


Instrument = Callable[[str, Callable[..., Engine]], Engine]
"""What a pipeline calls whenever it opens an engine: `instrument(component, open)` returns the engine that it uses, and
closes. `open()` opens the real one, `open(profile=True)` a ProfiledEngine."""


class EngineWrapper:
    """An engine around another, which passes everything on: to derive from, for what instruments return."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.inputs, self.outputs = engine, engine.inputs, engine.outputs

    def __call__(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        return self.engine(arrays)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.engine.__exit__(kind, error, at)


def as_it_is(component: str, open: Callable[..., Engine]) -> Engine:
    """The engine itself: the Instrument of a pipeline that has no other."""
    return open()


@dataclass(frozen=True)
class EngineKind:
    """Where an engine's code is, which distribution it needs, and what it runs on.

    `distribution`: what has to be installed, where the name that is imported does not tell. `note`: what to know
    besides the usual command to install it. `builds_with`: what has to be here to build its engines. `by_rows`: it
    divides batches itself, and its opener is told which inputs have rows.
    """

    module: str
    library: str
    extra: str | None
    precisions: tuple[str, ...]
    device: str = "cpu"
    opener: str = "open_engine"
    distribution: str = ""
    note: str = ""
    builds_with: Literal["nothing", "library", "device"] = "library"
    by_rows: bool = False

    def installed(self) -> bool:
        """Whether the vendor's library is installed (it is not imported)."""
        found = importlib.util.find_spec(self.library) is not None
        return found and (not self.distribution or _installed(self.distribution))

    def available(self) -> bool:
        """Whether its engines can run here: the library is installed, and the device is there."""
        return self.installed() and (self.device == "cpu" or bool(cuda.look().gpus))

    def can_build(self) -> bool:
        """Whether its engines can be built here."""
        return {"nothing": True, "library": self.installed(), "device": self.available()}[self.builds_with]

    def why_not(self) -> str:
        """One line that says what to do where `available()` is false."""
        if self.device != "cpu" and self.installed():
            return cuda.look().problem or "no CUDA device"
        wanted = f"slipcast[{self.extra}]" if self.extra else "slipcast"
        return f"{self.distribution or self.library} is not installed: pip install '{wanted}'{self.note}"


REPLACES = " after pip uninstall -y onnxruntime, which has the same files"

ENGINES: dict[str, EngineKind] = {
    "tensorrt": EngineKind(
        "slipcast.engines.tensorrt",
        "tensorrt",
        "tensorrt",
        ("fp32", "fp16", "bf16", "int8"),
        "cuda",
        "open_tensorrt",
        note=", from NVIDIA's own package index (--extra-index-url)",
        builds_with="device",
    ),
    "tensorrt-rtx": EngineKind(
        "slipcast.engines.tensorrt",
        "tensorrt_rtx",
        "tensorrt-rtx",
        ("fp32", "fp16", "bf16", "int8"),
        "cuda",
        "open_tensorrt_rtx",
    ),
    "onnxruntime-tensorrt": EngineKind(
        "slipcast.engines.onnxruntime",
        "onnxruntime",
        "cuda",
        ("fp32", "fp16"),
        "cuda",
        "open_tensorrt",
        distribution="onnxruntime-gpu",
        note=REPLACES,
        builds_with="nothing",
    ),
    "onnxruntime-gpu": EngineKind(
        "slipcast.engines.onnxruntime",
        "onnxruntime",
        "cuda",
        ("fp32", "fp16"),
        "cuda",
        "open_cuda",
        distribution="onnxruntime-gpu",
        note=REPLACES,
        builds_with="nothing",
    ),
    "openvino": EngineKind(
        "slipcast.engines.openvino", "openvino", "openvino", ("fp32", "bf16", "int8", "int4"), by_rows=True
    ),
    "onnxruntime": EngineKind("slipcast.engines.onnxruntime", "onnxruntime", None, ("fp32", "int8", "int4")),
}


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def engine_kind(name: str) -> EngineKind:
    """The entry of ENGINES, or RequestError with the candidates."""
    if name not in ENGINES:
        raise RequestError(f"unknown engine {name!r}", expected=", ".join(ENGINES), got=name)
    return ENGINES[name]


def refusal(target: Target) -> str | None:
    """One line that says why a target cannot run here, and what to do; None where it can."""
    kind = ENGINES.get(target.engine)
    if kind is None:
        return "unknown to this runtime: pip install -U slipcast"
    if not kind.available():
        return kind.why_not()
    return _misfit(kind, target.built) if target.built else None


def _misfit(kind: EngineKind, built: Built) -> str | None:
    """Why engines that are bound to a version of their library and to GPUs do not fit what is here."""
    version = importlib.metadata.version(kind.library)
    if built.library_version != version and not (
        built.version_compatible and _release(version) > _release(built.library_version)
    ):
        wanted = f"{'>=' if built.version_compatible else '=='}{built.library_version}"
        return (
            f"built with {kind.library} {built.library_version}, and {version} is installed: "
            f"pip install '{kind.library}{wanted}', or compile again"
        )
    gpu, capabilities = cuda.look().gpus[0], built.compute_capabilities
    if capabilities and gpu.compute_capability not in capabilities:
        return (
            f"built for compute capability {' and '.join(capabilities)}, and {gpu.name} has {gpu.compute_capability}: "
            "compile again with that in compute_capabilities"
        )
    if not capabilities and float(gpu.compute_capability) < OLDEST_PORTABLE:
        return (
            f"portable engines need compute capability {OLDEST_PORTABLE} or later, and {gpu.name} has "
            f'{gpu.compute_capability}: compile with compute_capabilities = ["{gpu.compute_capability}"]'
        )
    return None


def _release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with, which order it among others."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def open_engine(
    name: str,
    model: ModelFile,
    weights: ModelFile | None,
    precision: str,
    contract: Component,
    profile: bool = False,
) -> Engine:
    """Open an engine file and check that its inputs and outputs are those the manifest promises.

    `profile`: with the engine's own profiler on, as a ProfiledEngine. Raises HostError where the library, or its
    profiler, is missing, ArtifactError where the file does not fit the contract, ResourceError where memory ran out.
    """
    kind = engine_kind(name)
    if not kind.available():
        raise HostError(f"engine {name} cannot run here", hint=kind.why_not())
    if precision not in kind.precisions:
        raise HostError(
            f"{model.name}: this runtime does not run {name} in {precision}",
            expected=", ".join(kind.precisions),
            got=precision,
            hint="pip install -U slipcast",
        )
    try:
        module = importlib.import_module(kind.module)
    except (ImportError, MemoryError) as error:  # installed, but for another Python, or without a system library
        if lack := as_resource_error(error, f"loading {kind.library}"):
            raise lack from error
        raise HostError(
            f"engine {name} cannot run here", got=str(error), hint=f"reinstall {kind.library}: it cannot be imported"
        ) from error
    opener = getattr(module, kind.opener.replace("open_", "open_profiled_") if profile else kind.opener, None)
    if opener is None:
        raise HostError(f"engine {name} has no profiler in this runtime", hint="pip install -U slipcast")
    try:
        told = {"batched": _batched(contract.inputs), "apart": {*_batched(contract.outputs)}} if kind.by_rows else {}
        engine: Engine = opener(model, weights, precision, **told)
    except Exception as error:
        if lack := as_resource_error(error, f"opening {model.name}"):
            raise lack from error
        raise
    for side in ("inputs", "outputs"):
        promised, found = getattr(contract, side), getattr(engine, side)
        if not _is_promised(promised, found, side == "outputs"):
            engine.__exit__(None, None, None)
            raise ArtifactError(
                f"{model.name}: {side} differ from the manifest's",
                expected=_shown(promised),
                got=_shown(found),
                hint="the file belongs to another bundle; compile again",
            )
    return engine


def _batched(specs: Iterable[TensorSpec]) -> dict[str, int]:
    """Those whose first dimension is free to count rows, and of how many a group has to be."""
    found = {spec.name: rows_of_image(spec.shape) or int(spec.shape[:1] == (BATCH,)) for spec in specs}
    return {name: rows for name, rows in found.items() if rows}


def cpu_threads() -> int:
    """The cores this process may use, which in a container is fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _comparable(specs: Sequence[TensorSpec]) -> list[tuple[str, str, tuple[int | None, ...]]]:
    """Names of free dimensions do not survive every vendor's format; that they are free does."""
    return [(s.name, s.dtype, tuple(d if isinstance(d, int) else None for d in s.shape)) for s in specs]


def _is_promised(promised: Sequence[TensorSpec], found: Sequence[TensorSpec], given: bool) -> bool:
    """Whether an engine's inputs, or what it gives (`given`), are those of the contract. Of what it gives of several
    images it may not know sizes that the contract has: no engine follows all the arithmetic of sizes that are free."""
    if len(promised) != len(found):
        return False
    for spec, one, other in zip(promised, _comparable(promised), _comparable(found), strict=True):
        known = tuple(b if b is not None else a for a, b in zip(one[2], other[2], strict=False))
        vague = given and rows_of_image(spec.shape) and len(one[2]) == len(other[2])
        if one != ((*other[:2], known) if vague else other):
            return False
    return True


def _shown(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"{s.name} {s.dtype}[{', '.join(map(str, s.shape))}]" for s in specs)
