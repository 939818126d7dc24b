"""TensorRT-RTX and TensorRT on an NVIDIA GPU: one file, since the libraries share their API.

An engine file is code for the GPU, and one that later versions of TensorRT can run is code for the host too: it is
deserialised only from bundles whose digests were checked (slipcast.bundle.reader).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np
from cuda.bindings import runtime as cuda

from slipcast.bundle.manifest import TensorSpec
from slipcast.engines import Array
from slipcast.engines.device import SCRATCH, Graphs, checked
from slipcast.engines.files import ModelFile
from slipcast.errors import HostError, RequestError, ResourceError

Shape = tuple[int, ...]
Profile = tuple[Shape, Shape, Shape]  # least, usual, most

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64", "INT32": "int32"}


class TensorRtEngine:
    """One engine with one execution context and a stream of its own; see slipcast.engines.Engine.

    Arrays come from the host and go back there. The latents of a step are tens of kilobytes, and what guidance and
    DPM-Solver++(2M) do with them takes 23 microseconds on the host, for one picture of 64 x 64 latent cells (88 for
    128 x 128; one core of an AMD EPYC), where an evaluation takes milliseconds; what is large, the conditioning, stays
    on the device as long as the caller cannot change it. So samplers run on the host, where they are the same for every
    target. What the copies themselves take has not been measured: that needs a GPU.
    """

    def __init__(self, library: str, model: ModelFile, capture: bool = True) -> None:
        """`capture`: make CUDA graphs of calls, which costs the first ones and spares the others their launches."""
        self._trt: Any = importlib.import_module(library)
        self._log: list[str] = []
        self._name = model.name
        self._buffers: dict[str, tuple[int, int]] = {}  # tensor -> (device pointer, bytes)
        self._given: dict[str, Array] = {}  # what lies in them, and cannot change
        self._shapes: dict[str, Shape] = {}
        self._scratch_size = self._scratch = 0
        self._stream: Any = None
        # The library keeps a plain pointer to its logger.
        self._logger = _make_logger(self._trt, self._log)
        self._runtime = self._trt.Runtime(self._logger)
        if library == "tensorrt":
            self._runtime.engine_host_code_allowed = True  # engines that are version_compatible bring their own runtime
        self._engine = self._deserialize(model.read_bytes())
        self._context = self._open_context(capture)
        self._stream = checked(cuda.cudaStreamCreate())
        # TensorRT-RTX captures by itself, once per shape.
        self._graphs = Graphs(self._stream) if capture and not hasattr(self._trt, "CudaGraphStrategy") else None
        specs = [self._spec(self._engine.get_tensor_name(i)) for i in range(self._engine.num_io_tensors)]
        is_input = {s.name: self._engine.get_tensor_mode(s.name) == self._trt.TensorIOMode.INPUT for s in specs}
        self.inputs = tuple(spec for spec in specs if is_input[spec.name])
        self.outputs = tuple(spec for spec in specs if not is_input[spec.name])
        self._profiles: dict[str, Profile] = {
            spec.name: tuple(map(tuple, self._engine.get_tensor_profile_shape(spec.name, 0)))  # type: ignore[misc]
            for spec in self.inputs
        }
        SCRATCH.join()

    def __call__(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Evaluate the graph; every input by name. RequestError for a shape that the engine was not built for.

        A read-only array that is the very one of the last call is not copied to the device again.
        """
        shapes = {name: array.shape for name, array in arrays.items()}
        check_shapes(self._name, shapes, self._profiles)
        with SCRATCH.turn:
            self._shape(shapes)
            for spec in self.inputs:
                self._send(spec, arrays[spec.name])
            results: dict[str, Array] = {
                spec.name: np.empty(tuple(self._context.get_tensor_shape(spec.name)), spec.dtype)
                for spec in self.outputs
            }
            for name, array in results.items():
                self._reserve(name, array.nbytes)
            if not self._enqueue():
                raise HostError(
                    f"{self._name}: the engine failed", got=self._complaints(), hint="run `slipcast doctor`"
                )
            for name, array in results.items():
                pointer, to_host = self._buffers[name][0], cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
                checked(cuda.cudaMemcpyAsync(array.ctypes.data, pointer, array.nbytes, to_host, self._stream))
            checked(cuda.cudaStreamSynchronize(self._stream))
        return results

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._stream is None:
            return
        cuda.cudaStreamSynchronize(self._stream)
        if self._graphs:
            self._graphs.clear()
        cuda.cudaStreamDestroy(self._stream)
        for pointer, _ in self._buffers.values():
            cuda.cudaFree(pointer)
        self._buffers, self._given, self._stream = {}, {}, None
        self._context = self._engine = self._runtime = None  # in this order: each uses the next
        SCRATCH.leave()

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
            expected="the GPU and the library version that it was built for",
            got=reasons or self._complaints(),
            hint="`slipcast doctor BUNDLE` compares them; use another target, or compile the bundle again",
        )

    def _open_context(self, capture: bool) -> Any:
        if self._engine.streamable_weights_size:  # it was built to leave weights on the host where memory is short
            self._engine.weight_streaming_budget_v2 = self._engine.get_weight_streaming_automatic_budget()
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if capture and hasattr(self._trt, "CudaGraphStrategy"):
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        context = self._engine.create_execution_context(config)
        if context is None:
            raise ResourceError(
                f"{self._name}: no execution context",
                got=self._complaints(),
                hint='free GPU memory, or load with residency="sequential"',
            )
        return context

    def _shape(self, shapes: dict[str, Shape]) -> None:
        """Tell the context the shapes of a call, and where it may compute."""
        if shapes != self._shapes:
            for name, shape in shapes.items():
                self._context.set_input_shape(name, shape)
            self._shapes, self._scratch_size = shapes, self._context.update_device_memory_size_for_shapes()
            self._scratch = -1  # the context wants to be told again
        pointer = SCRATCH.reserve(self._scratch_size)
        if self._scratch_size and pointer != self._scratch:
            self._context.set_device_memory(pointer, self._scratch_size)
            self._scratch = pointer

    def _send(self, spec: TensorSpec, array: Array) -> None:
        if self._given.get(spec.name) is array:
            return
        given = np.ascontiguousarray(array, spec.dtype)
        pointer, to_device = self._reserve(spec.name, given.nbytes), cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        # From memory that is not page-locked: the call returns when the array has been read.
        checked(cuda.cudaMemcpyAsync(pointer, given.ctypes.data, given.nbytes, to_device, self._stream))
        self._given.pop(spec.name, None)
        if not array.flags.writeable:
            self._given[spec.name] = array

    def _enqueue(self) -> bool:
        def enqueue() -> bool:
            return bool(self._context.execute_async_v3(int(self._stream)))

        if self._graphs is None:
            return enqueue()
        return self._graphs.run((tuple(self._shapes.items()), self._scratch), enqueue)

    def _reserve(self, name: str, size: int) -> int:
        """The device buffer of a tensor, of at least `size` bytes; it is kept, so that captured graphs stay valid."""
        pointer, has = self._buffers.get(name, (0, 0))
        if has < size:
            if self._graphs:
                self._graphs.clear()
            if has:
                checked(cuda.cudaFree(pointer))
                del self._buffers[name]
            pointer = int(checked(cuda.cudaMalloc(size)))
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


def open_engine(model: ModelFile, weights: ModelFile | None, precision: str, *, library: str) -> TensorRtEngine:
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
                f"{engine}: it was not built for this shape of {name}",
                expected=f"{list(least)} to {list(most)}",
                got=list(shape),
                hint="ask for fewer images at once, or compile with a larger max_images",
            )


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
