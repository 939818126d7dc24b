"""OpenVINO on the CPU: the fast target."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from io import BytesIO
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self, cast

import numpy as np

from slipcast.bundle.manifest import TensorSpec
from slipcast.engines import Array, LayerTime, cpu_threads
from slipcast.engines.files import ModelFile, contents
from slipcast.engines.kept import find, store
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
_HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "bf16", "int4": "bf16"}  # integers are in the graph: for the rest


STREAMS = 2  # requests that run side by side, each on its share of the threads
ONE_STREAM = 2**28  # bytes of weights from which on there is one: each has much of them in an order of its own
KEPT = 4  # compiled graphs


NO_ROWS: Mapping[str, int] = MappingProxyType({})


class OpenVinoEngine:
    """One model; see slipcast.engines.Engine.

    It is compiled when it is called, for the shapes that it is called with: static graphs are faster than dynamic ones.
    Rows of a batch go in groups, each a request of its own on one of two streams, so that few graphs serve every batch
    and an image's rows meet the same kernels whatever else is in the batch. In a large model one row keeps all threads
    busy: there rows go one after another through one graph, which also needs the least memory.
    """

    def __init__(
        self,
        model: ModelFile,
        weights: ModelFile,
        precision: str,
        batched: Mapping[str, int] = NO_ROWS,
        apart: Set[str] = frozenset(),
        profile: bool = False,
    ) -> None:
        """`batched`: the inputs that have rows of a batch, and how many of one go together; free dimensions of others
        are of the call's size. `apart`: the outputs that have rows of a batch; others are the same for all."""
        self._model, self._weights, self._batched, self._apart = model, weights, batched, apart
        self._streams = 1 if profile or _size(weights) > ONE_STREAM else min(STREAMS, cpu_threads())
        self._options = {
            "INFERENCE_PRECISION_HINT": _hint(precision),
            "INFERENCE_NUM_THREADS": cpu_threads(),
            **({"PERF_COUNT": True} if profile else {}),
        }
        self._graph = self._read()
        self.inputs = tuple(_spec(port) for port in self._graph.inputs)
        self.outputs = tuple(_spec(port) for port in self._graph.outputs)
        self._compiled: dict[Any, _Static] = {}
        self._pairs: bool | None = None

    def __call__(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Evaluate the graph; every input by name. The results are copies, not views of the engine's memory."""
        rows = max((len(arrays[name]) // each for name, each in self._batched.items()), default=1)
        by_pairs = rows % 2 == 0 and rows > self._streams > 1 and self._pairs_are_exact(arrays)
        results = self._evaluate(arrays, rows, 2 if by_pairs else 1)
        return {spec.name: results[i] for i, spec in enumerate(self.outputs)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._graph, self._compiled = None, {}

    def _evaluate(self, arrays: Mapping[str, Array], rows: int, size: int) -> list[Array]:
        """By output, from rows in groups of that size."""
        batched = self._batched
        shapes = {n: (size * batched[n], *a.shape[1:]) if n in batched else a.shape for n, a in arrays.items()}
        found = self._static(shapes, rows // size)(arrays, batched, size, rows // size)
        return [
            np.concatenate(parts) if spec.name in self._apart and len(parts) > 1 else parts[0].copy()
            for spec, parts in zip(self.outputs, found, strict=True)
        ]

    def _pairs_are_exact(self, arrays: Mapping[str, Array]) -> bool:
        """Whether two rows at once give what each gives alone, to the last bit: kernels are chosen by shape and host.

        Looked at once, for the first such batch.
        """
        if self._pairs is None:
            rows = 2 * self._streams  # as many as the graphs are for that are there anyway
            batched = self._batched
            some = {name: a[: rows * batched[name]] if name in batched else a for name, a in arrays.items()}
            by_pairs, alone = self._evaluate(some, rows, 2), self._evaluate(some, rows, 1)
            self._pairs = all(map(np.array_equal, by_pairs, alone))
            if not self._pairs:
                logger.info("%s: rows go one by one: two at once round differently here", self._model.name)
        return self._pairs

    def _static(self, shapes: dict[str, tuple[int, ...]], groups: int) -> _Static:
        """The graph for these shapes, on streams where groups run side by side; the one used longest ago makes way."""
        streams = min(self._streams, groups)
        key = streams, *sorted(shapes.items())
        static = self._compiled.pop(key, None) or self._compile(shapes, streams)
        self._compiled[key] = static
        if len(self._compiled) > KEPT:
            self._compiled.pop(next(iter(self._compiled)))
        return static

    def _compile(self, shapes: dict[str, tuple[int, ...]], streams: int) -> _Static:
        options = self._options | ({"NUM_STREAMS": streams} if streams > 1 else {"PERFORMANCE_HINT": "LATENCY"})
        # Not kept after that: a compiled graph has its weights in an order of its own.
        graph, self._graph = self._graph or self._read(), None
        core = openvino.Core()
        with self._refusals():
            key = self._key(core, shapes, options)
            if key and (kept := find(key)):
                with suppress(RuntimeError):  # not what this library wrote: it is compiled again
                    return _Static(core.import_model(BytesIO(kept), "CPU", options))
            graph.reshape(shapes)
            compiled = core.compile_model(graph, "CPU", options)
            if key:
                store(key, lambda: cast(bytes, compiled.export_model().getvalue()))
            return _Static(compiled)

    def _key(self, core: Any, shapes: Mapping[str, tuple[int, ...]], options: Mapping[str, Any]) -> str | None:
        """All that a compiled graph depends on; None where files have no digests that were verified."""
        digests = [file.entry.sha256 for file in (self._model, self._weights) if not isinstance(file, Path)]
        if len(digests) < 2:
            return None
        host = [core.get_property("CPU", name) for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")]
        return repr((openvino.get_version(), host, digests, sorted(shapes.items()), sorted(options.items())))

    def _read(self) -> Any:
        with self._refusals():
            return openvino.Core().read_model(self._model.read_bytes(), _tensor(self._weights))

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            raise ArtifactError(
                f"{self._model.name}: OpenVINO {openvino.__version__} cannot load it",
                got=str(error).strip(),
                hint="run `slipcast verify`; where the digests hold, upgrade openvino: it cannot read the graph",
            ) from error


class _Static:
    """A graph compiled for one set of shapes, and its requests: one for each group of rows that runs at once."""

    def __init__(self, compiled: Any) -> None:
        self._graph = compiled
        self._requests: list[Any] = []
        self._given: list[dict[str, Array]] = []  # by request, the whole arrays
        self.calls = 0

    def __call__(
        self, arrays: Mapping[str, Array], batched: Mapping[str, int], size: int, groups: int
    ) -> list[list[Array]]:
        """By output, of each group, in the engine's own memory. Arrays of `batched` are cut into `groups` of `size`
        times their rows; the others go to each."""
        while len(self._requests) < groups:
            self._requests.append(self._graph.create_infer_request())
            self._given.append({})
        requests, started = self._requests[:groups], []
        self.calls += groups
        try:
            for i, (request, given) in enumerate(zip(requests, self._given, strict=False)):
                # Handing an array over costs tens of microseconds, and a loop takes dozens that stay: those of the
                # last call are not handed over again. Their memory is shared, so that a change inside them is seen.
                fresh = {name: array for name, array in arrays.items() if given.get(name) is not array}
                own = {name: slice(i * size * each, (i + 1) * size * each) for name, each in batched.items()}
                # not ascontiguousarray, which gives a number without dimensions one
                parts = {name: np.asarray(a[own[name]] if name in own else a, order="C") for name, a in fresh.items()}
                request.start_async(parts, share_inputs=True)
                given |= fresh
                started.append(request)
            for request in started:
                request.wait()
        except BaseException:  # what was handed over is not known
            self._requests, self._given = [], []
            for request in started:
                with suppress(RuntimeError):
                    request.wait()
            raise
        return [[r.get_output_tensor(i).data for r in requests] for i in range(len(self._graph.outputs))]

    def profile(self) -> Any:
        """What the plugin counted, by layer: the mean of all calls."""
        return self._requests[0].profiling_info if self._requests else []


class ProfiledOpenVinoEngine(OpenVinoEngine):
    """With performance counters, on one stream; see slipcast.engines.ProfiledEngine."""

    def __init__(
        self, model: ModelFile, weights: ModelFile, precision: str, batched: Mapping[str, int] = NO_ROWS,
        apart: Set[str] = frozenset(),
    ) -> None:  # fmt: skip
        super().__init__(model, weights, precision, batched, apart, profile=True)
        self._modules = _modules(self._graph)
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
        about = {info.node_name: info for static in self._compiled.values() for info in static.profile()}
        return tuple(
            LayerTime(name, about[name].node_type, about[name].exec_type, self._modules.get(name, ""), seconds, calls)
            for name, seconds in times.items()
            if seconds > 0
        )

    def _microseconds(self) -> dict[str, int]:
        """By layer, since it was opened."""
        spent: dict[str, int] = {}
        for static in self._compiled.values():
            for info in static.profile():
                total = info.real_time // timedelta(microseconds=1) * static.calls
                spent[info.node_name] = spent.get(info.node_name, 0) + total
        return spent


def open_engine(
    model: ModelFile, weights: ModelFile | None, precision: str, batched: Mapping[str, int] = NO_ROWS,
    apart: Set[str] = frozenset(),
) -> OpenVinoEngine:  # fmt: skip
    """`weights` is the .bin that belongs to the .xml; `batched`, `apart`: see OpenVinoEngine."""
    return OpenVinoEngine(model, _needed(model, weights), precision, batched, apart)


def open_profiled_engine(
    model: ModelFile, weights: ModelFile | None, precision: str, batched: Mapping[str, int] = NO_ROWS,
    apart: Set[str] = frozenset(),
) -> ProfiledOpenVinoEngine:  # fmt: skip
    """As open_engine, with the profiler on."""
    return ProfiledOpenVinoEngine(model, _needed(model, weights), precision, batched, apart)


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


def _size(file: ModelFile) -> int:
    return file.stat().st_size if isinstance(file, Path) else file.entry.size


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
