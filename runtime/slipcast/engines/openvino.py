"""OpenVINO on the CPU: the fast target."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from types import TracebackType
from typing import Any, Self, cast

import numpy as np

from slipcast.bundle.manifest import TensorSpec
from slipcast.engines import Array, LayerTime, cpu_threads
from slipcast.engines.files import ModelFile, contents
from slipcast.engines.resources import out_of_memory
from slipcast.errors import ArtifactError


@contextmanager
def _telemetry_absent() -> Iterator[None]:
    """OpenVINO forks, writes below HOME and reports to Google Analytics when it is imported, unless the package that
    does so is not installed; None in sys.modules is how Python says so."""
    modules, name = cast(dict[str, Any], sys.modules), "openvino_telemetry"
    known = name in modules
    modules.setdefault(name, None)
    try:
        yield
    finally:
        if not known:
            del modules[name]


with _telemetry_absent():
    import openvino

# the library is for whoever else needs it without telemetry
__all__ = ["OpenVinoEngine", "bf16_is_native", "open_engine", "openvino"]

logger = logging.getLogger("slipcast")

_DTYPES = {"f32": "float32", "f16": "float16", "i64": "int64", "i32": "int32"}
_PARAMETER = re.compile(r"(?:model\.)?(.+)\.(?:weight|bias)(?![a-z])")
_HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "bf16"}  # int8 is in the graph; the hint is for the rest


class OpenVinoEngine:
    """One compiled model; see slipcast.engines.Engine.

    The batch stays dynamic: it costs time against a graph reshaped to one batch size, but gives bit-equal images for
    every batch size, which a reshaped graph does not.
    """

    def __init__(self, model: ModelFile, weights: ModelFile, precision: str, profile: bool = False) -> None:
        core = openvino.Core()
        options = {
            "INFERENCE_PRECISION_HINT": _hint(precision),
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": cpu_threads(),
            **({"PERF_COUNT": True} if profile else {}),
        }
        try:
            graph = core.read_model(model.read_bytes(), _tensor(weights))
            self._modules = _modules(graph) if profile else {}
            compiled = core.compile_model(graph, "CPU", options)
            self.inputs = tuple(_spec(port) for port in compiled.inputs)
            self.outputs = tuple(_spec(port) for port in compiled.outputs)
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            raise ArtifactError(
                f"{model.name}: OpenVINO {openvino.__version__} cannot load it",
                got=str(error).strip(),
                hint="run `slipcast verify`; where the digests hold, upgrade openvino: it cannot read the graph",
            ) from error
        self._request: Any = compiled.create_infer_request()
        self._given: dict[str, Array] = {}

    def __call__(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Evaluate the graph; every input by name. The results are copies, not views of the engine's memory."""
        # Handing an array over costs tens of microseconds, and a loop takes dozens that stay: those of the
        # last call are not handed over again. Their memory is shared, so that a change inside them is seen.
        fresh = {
            name: np.ascontiguousarray(array) for name, array in arrays.items() if self._given.get(name) is not array
        }
        self._given |= fresh
        try:
            results = self._request.infer(fresh, share_inputs=True, share_outputs=False)
        except BaseException:  # what was handed over before that is not known
            self._given.clear()
            raise
        return {spec.name: results[i] for i, spec in enumerate(self.outputs)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._request = None


class ProfiledOpenVinoEngine(OpenVinoEngine):
    """With performance counters; see slipcast.engines.ProfiledEngine."""

    def __init__(self, model: ModelFile, weights: ModelFile, precision: str) -> None:
        super().__init__(model, weights, precision, profile=True)
        self._calls = self._calls_before = 0
        self._before: dict[str, int] = {}

    def __call__(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        self._calls += 1
        return super().__call__(arrays)

    def start_profile(self) -> None:
        """See ProfiledEngine."""
        self._calls_before, self._before = self._calls, self._microseconds()

    def layers(self) -> tuple[LayerTime, ...]:
        """See ProfiledEngine. The plugin rounds down to whole microseconds: what takes less reads as nothing."""
        spent, calls = self._microseconds(), self._calls - self._calls_before
        times = {name: (total - self._before.get(name, 0)) / 1e6 for name, total in spent.items()}
        about = {info.node_name: info for info in self._request.profiling_info}
        return tuple(
            LayerTime(name, about[name].node_type, about[name].exec_type, self._modules.get(name, ""), seconds, calls)
            for name, seconds in times.items()
            if seconds > 0
        )

    def _microseconds(self) -> dict[str, int]:
        """By layer, since it was opened: a counter holds the mean of all calls."""
        spent: dict[str, int] = {}
        for info in self._request.profiling_info:
            total = info.real_time // timedelta(microseconds=1) * self._calls
            spent[info.node_name] = spent.get(info.node_name, 0) + total
        return spent


def open_engine(model: ModelFile, weights: ModelFile | None, precision: str) -> OpenVinoEngine:
    """`weights` is the .bin that belongs to the .xml."""
    return OpenVinoEngine(model, _needed(model, weights), precision)


def open_profiled_engine(model: ModelFile, weights: ModelFile | None, precision: str) -> ProfiledOpenVinoEngine:
    """As open_engine, with the profiler on."""
    return ProfiledOpenVinoEngine(model, _needed(model, weights), precision)


def _hint(precision: str) -> str:
    """What OpenVINO is asked for: f32 in place of bf16 where the processor has no instructions for bf16, which
    OpenVINO would emulate with AVX-512, 35 times slower than f32 for a product of two matrices of 1024 x 1024."""
    wanted = _HINTS[precision]
    return wanted if wanted != "bf16" or bf16_is_native() else "f32"


@cache  # so that it is said once
def bf16_is_native() -> bool:
    """Whether the processor computes in bf16 itself; where not, a warning says so."""
    native = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if not native:
        logger.warning("this processor has no bf16 instructions: OpenVINO computes in fp32 what would be in bf16")
    return native


def _tensor(weights: ModelFile) -> Any:
    """The bytes in memory of the library's own, which it gives back once no constant lies in them."""
    data = contents(weights)
    tensor = openvino.Tensor(openvino.Type.u8, [data.size])
    tensor.data[:] = data
    return tensor


def _needed(model: ModelFile, weights: ModelFile | None) -> ModelFile:
    if weights is None:
        raise ArtifactError(f"{model.name}: the manifest names no weights for it", expected="an .xml with its .bin")
    return weights


def _modules(graph: Any) -> dict[str, str]:
    """Layer -> module of the original: constants keep the names of the parameters that they are."""
    modules = {}
    for node in graph.get_ops():
        for value in node.input_values():
            source = value.get_node()
            while source.get_type_name() in ("Convert", "Transpose", "Reshape", "Multiply"):  # kept in fp16, or scaled
                source = source.input_value(0).get_node()
            parameter = _PARAMETER.match(source.get_friendly_name())
            if parameter and source.get_type_name() == "Constant":
                modules[node.get_friendly_name()] = parameter[1]
    return modules


def _spec(port: Any) -> TensorSpec:
    shape = tuple(d.get_length() if d.is_static else "?" for d in port.partial_shape)
    dtype = port.element_type.get_type_name()
    # Not validated: what no manifest can promise is refused when it is compared with one.
    return TensorSpec.model_construct(name=port.any_name, dtype=_DTYPES.get(dtype, dtype), shape=shape)
