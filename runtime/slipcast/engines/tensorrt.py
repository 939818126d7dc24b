"""TensorRT-RTX and TensorRT on an NVIDIA GPU: one file, since the libraries share their API.

An engine file is code for the GPU: it is deserialised only from bundles whose digests were checked (slipcast.bundle).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from cuda.bindings import runtime as cuda

from slipcast.engines import Array
from slipcast.errors import HostError, RequestError, ResourceError
from slipcast.manifest import TensorSpec

Shape = tuple[int, ...]
Profile = tuple[Shape, Shape, Shape]  # least, usual, most

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64", "INT32": "int32"}


class TensorRtEngine:
    """One engine with one execution context and a stream of its own; see slipcast.engines.Engine."""

    def __init__(self, library: str, model: Path) -> None:
        self._trt: Any = importlib.import_module(library)
        self._log: list[str] = []
        self._name = model.name
        self._buffers: dict[str, tuple[int, int]] = {}  # tensor -> (device pointer, bytes)
        self._stream: Any = None
        # The library keeps a plain pointer to its logger.
        self._logger = _make_logger(self._trt, self._log)
        self._runtime = self._trt.Runtime(self._logger)
        self._engine = self._deserialize(model.read_bytes())
        self._context = self._open_context()
        self._stream = _checked(cuda.cudaStreamCreate())
        specs = [self._spec(self._engine.get_tensor_name(i)) for i in range(self._engine.num_io_tensors)]
        is_input = {s.name: self._engine.get_tensor_mode(s.name) == self._trt.TensorIOMode.INPUT for s in specs}
        self.inputs = tuple(spec for spec in specs if is_input[spec.name])
        self.outputs = tuple(spec for spec in specs if not is_input[spec.name])
        self._profiles: dict[str, Profile] = {
            spec.name: tuple(map(tuple, self._engine.get_tensor_profile_shape(spec.name, 0)))  # type: ignore[misc]
            for spec in self.inputs
        }

    def __call__(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Evaluate the graph; every input by name. RequestError for a shape that the engine was not built for."""
        check_shapes(self._name, {name: array.shape for name, array in arrays.items()}, self._profiles)
        given = {s.name: np.ascontiguousarray(arrays[s.name], s.dtype) for s in self.inputs}
        for name, array in given.items():
            self._context.set_input_shape(name, array.shape)
            pointer, to_device = self._reserve(name, array.nbytes), cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
            _checked(cuda.cudaMemcpyAsync(pointer, array.ctypes.data, array.nbytes, to_device, self._stream))
        results: dict[str, Array] = {
            spec.name: np.empty(tuple(self._context.get_tensor_shape(spec.name)), spec.dtype) for spec in self.outputs
        }
        for name, array in results.items():
            self._reserve(name, array.nbytes)
        if not self._context.execute_async_v3(int(self._stream)):
            raise HostError(f"{self._name}: the engine failed", got=self._complaints(), hint="run `slipcast doctor`")
        for name, array in results.items():
            pointer, to_host = self._buffers[name][0], cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
            _checked(cuda.cudaMemcpyAsync(array.ctypes.data, pointer, array.nbytes, to_host, self._stream))
        _checked(cuda.cudaStreamSynchronize(self._stream))
        return results

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._stream is not None:
            cuda.cudaStreamSynchronize(self._stream)
            cuda.cudaStreamDestroy(self._stream)
        for pointer, _ in self._buffers.values():
            cuda.cudaFree(pointer)
        self._buffers, self._stream = {}, None
        self._context = self._engine = self._runtime = None  # in this order: each uses the next

    def _deserialize(self, data: bytes) -> Any:
        if hasattr(self._runtime, "get_engine_validity"):  # TensorRT-RTX, which reads the header only
            validity, reasons = self._runtime.get_engine_validity(data)
            if validity == self._trt.EngineValidity.INVALID:
                raise self._refused(", ".join(name_reasons(self._trt.EngineInvalidityDiagnostics, int(reasons))))
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise self._refused("")
        return engine

    def _refused(self, reasons: str) -> HostError:
        return HostError(
            f"{self._name}: {self._trt.__name__} {self._trt.__version__} cannot run this engine here",
            expected="the GPU and the library version that it was built for", got=reasons or self._complaints(),
            hint="`slipcast doctor BUNDLE` compares them; use another target, or compile the bundle again",
        )  # fmt: skip

    def _open_context(self) -> Any:
        config = self._engine.create_runtime_config()
        if hasattr(self._trt, "CudaGraphStrategy"):  # TensorRT-RTX captures by itself, once per shape
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        context = self._engine.create_execution_context(config)
        if context is None:
            raise ResourceError(
                f"{self._name}: no execution context", got=self._complaints(),
                hint='free GPU memory, or load with residency="sequential"',
            )  # fmt: skip
        return context

    def _reserve(self, name: str, size: int) -> int:
        """The device buffer of a tensor, of at least `size` bytes; it is kept, so that captured graphs stay valid."""
        pointer, has = self._buffers.get(name, (0, 0))
        if has < size:
            if has:
                _checked(cuda.cudaFree(pointer))
                del self._buffers[name]
            pointer = int(_checked(cuda.cudaMalloc(size)))
            self._buffers[name] = pointer, size
        self._context.set_tensor_address(name, pointer)
        return pointer

    def _spec(self, name: str) -> TensorSpec:
        shape = tuple(size if size >= 0 else "?" for size in self._engine.get_tensor_shape(name))
        dtype = self._engine.get_tensor_dtype(name).name
        # Not validated: what no manifest can promise is refused when it is compared with one.
        return TensorSpec.model_construct(name=name, dtype=_DTYPES.get(dtype, dtype), shape=shape)

    def _complaints(self) -> str:
        return "; ".join(self._log[-3:]) or "no reason given"


def open_engine(model: Path, weights: Path | None, precision: str, *, library: str) -> TensorRtEngine:
    """Weights and precision are in the engine file. HostError where the host is not one that it was built for."""
    return TensorRtEngine(library, model)


open_tensorrt_rtx = partial(open_engine, library="tensorrt_rtx")
open_tensorrt = partial(open_engine, library="tensorrt")


def check_shapes(engine: str, shapes: Mapping[str, Shape], profiles: Mapping[str, Profile]) -> None:
    """RequestError, naming the legal range, for an input that is missing, unknown or outside the engine's profile."""
    if shapes.keys() != profiles.keys():
        raise RequestError(f"{engine}: wrong inputs", expected=", ".join(profiles), got=", ".join(shapes))
    for name, shape in shapes.items():
        least, _, most = profiles[name]
        fits = len(shape) == len(least) and all(
            low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
        )
        if not fits:
            raise RequestError(
                f"{engine}: it was not built for this shape of {name}", expected=f"{list(least)} to {list(most)}",
                got=list(shape), hint="ask for fewer images at once, or compile with a larger max_images",
            )  # fmt: skip


def name_reasons(flags: Any, reasons: int) -> list[str]:
    """The names of the bits of EngineInvalidityDiagnostics that are set."""
    names = [name for name in dir(flags) if name.isupper()]
    return [name.lower().replace("_", " ") for name in names if reasons & int(getattr(flags, name))]


def _make_logger(trt: Any, lines: list[str]) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                lines.append(message)

    return Log()


def _checked(result: tuple[Any, ...]) -> Any:
    """What a CUDA call returned after its status; ResourceError or HostError where that is none of success."""
    status, *values = result
    if status == cuda.cudaError_t.cudaErrorMemoryAllocation:
        raise ResourceError("GPU memory ran out", hint='load with residency="sequential", or ask for fewer images')
    if status != cuda.cudaError_t.cudaSuccess:
        raise HostError("CUDA failed", got=status.name, hint="run `slipcast doctor`; a lost device needs a new process")
    return values[0] if values else None
