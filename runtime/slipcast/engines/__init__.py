"""Engines: one compiled component graph on one target. Arrays in, arrays out.

An `Engine` is made open and is closed by leaving its `with` block. Each target lives in a file of its own, which
imports the vendor's library only when it is opened.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from slipcast.errors import ArtifactError, HostError, RequestError
from slipcast.manifest import Component, TensorSpec

Array = npt.NDArray[np.generic]


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


@dataclass(frozen=True)
class EngineKind:
    """Where an engine's code is and which distribution it needs."""

    module: str
    library: str
    extra: str | None
    precisions: tuple[str, ...]

    def available(self) -> bool:
        """Whether the vendor's library is installed (it is not imported)."""
        return importlib.util.find_spec(self.library) is not None

    def why_not(self) -> str:
        """One line that says what to do where `available()` is false."""
        wanted = f"slipcast[{self.extra}]" if self.extra else "slipcast"
        return f"{self.library} is not installed: pip install '{wanted}'"


# In order of preference for target="auto".
ENGINES: dict[str, EngineKind] = {
    "openvino": EngineKind("slipcast.engines.openvino", "openvino", "openvino", ("fp32", "bf16", "int8")),
    "onnxruntime": EngineKind("slipcast.engines.onnxruntime", "onnxruntime", None, ("fp32", "int8")),
}


def engine_kind(name: str) -> EngineKind:
    """The entry of ENGINES, or RequestError with the candidates."""
    if name not in ENGINES:
        raise RequestError(f"unknown engine {name!r}", expected=", ".join(ENGINES), got=name)
    return ENGINES[name]


def open_engine(
    name: str, model: Path, weights: Path | None, precision: str, contract: Component, profile: bool = False
) -> Engine:
    """Open an engine file and check that its inputs and outputs are those the manifest promises.

    `profile`: with the engine's own profiler on, as a ProfiledEngine. Raises HostError where the library, or its
    profiler, is missing, ArtifactError where the file does not fit the contract.
    """
    kind = engine_kind(name)
    if not kind.available():
        raise HostError(f"engine {name} cannot run here", hint=kind.why_not())
    if precision not in kind.precisions:
        raise HostError(
            f"{model.name}: this runtime does not run {name} in {precision}",
            expected=", ".join(kind.precisions), got=precision, hint="pip install -U slipcast",
        )  # fmt: skip
    try:
        module = importlib.import_module(kind.module)
    except ImportError as error:  # installed, but for another Python, or without a system library
        raise HostError(
            f"engine {name} cannot run here", got=str(error), hint=f"reinstall {kind.library}: it cannot be imported"
        ) from error
    opener = getattr(module, "open_profiled_engine", None) if profile else module.open_engine
    if opener is None:
        raise HostError(f"engine {name} has no profiler in this runtime", hint="pip install -U slipcast")
    engine: Engine = opener(model, weights, precision)
    for side in ("inputs", "outputs"):
        promised, found = getattr(contract, side), getattr(engine, side)
        if _comparable(promised) != _comparable(found):
            engine.__exit__(None, None, None)
            raise ArtifactError(
                f"{model.name}: {side} differ from the manifest's", expected=_shown(promised), got=_shown(found),
                hint="the file belongs to another bundle; compile again",
            )  # fmt: skip
    return engine


def cpu_threads() -> int:
    """The cores this process may use, which in a container is fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _comparable(specs: tuple[TensorSpec, ...]) -> list[tuple[str, str, tuple[int | None, ...]]]:
    """Names of free dimensions do not survive every vendor's format; that they are free does."""
    return [(s.name, s.dtype, tuple(d if isinstance(d, int) else None for d in s.shape)) for s in specs]


def _shown(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"{s.name} {s.dtype}[{', '.join(map(str, s.shape))}]" for s in specs)
