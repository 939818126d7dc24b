"""ONNX Runtime on the CPU: the portable target."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from slipcast.engines import Array, LayerTime, cpu_threads
from slipcast.errors import ArtifactError, ResourceError
from slipcast.manifest import TensorSpec

# From 1.29 on, official builds write below HOME and report to Microsoft, unless told not to before they are imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

_DTYPES = {
    "tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64", "tensor(int32)": "int32",
}  # fmt: skip


class OnnxRuntimeEngine:
    """One session; see slipcast.engines.Engine."""

    def __init__(self, model: Path, trace: Path | None = None) -> None:
        options = onnxruntime.SessionOptions()
        if trace:
            options.enable_profiling = True
            options.profile_file_prefix = str(trace)
        options.intra_op_num_threads = cpu_threads()
        options.log_severity_level = 3
        try:
            self._session: Any = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library raises a dozen types of its own, all of which mean this
            raise ArtifactError(
                f"{model.name}: ONNX Runtime {onnxruntime.__version__} cannot load it", got=str(error).strip(),
                hint="run `slipcast verify`; where the digests hold, upgrade onnxruntime: it cannot read the graph",
            ) from error  # fmt: skip
        self.inputs = tuple(_spec(node) for node in self._session.get_inputs())
        self.outputs = tuple(_spec(node) for node in self._session.get_outputs())

    def __call__(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Evaluate the graph; every input by name."""
        results = self._session.run(None, dict(arrays))
        return {spec.name: array for spec, array in zip(self.outputs, results, strict=True)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._session = None


class ProfiledOnnxRuntimeEngine(OnnxRuntimeEngine):
    """Writes every call to a trace, in a temporary directory; see slipcast.engines.ProfiledEngine."""

    def __init__(self, model: Path) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="slipcast-profile-")
        self._calls = self._before = 0
        try:
            super().__init__(model, Path(self._folder.name) / "trace")
        except BaseException:
            self._folder.cleanup()
            raise

    def __call__(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        self._calls += 1
        return super().__call__(arrays)

    def start_profile(self) -> None:
        """See ProfiledEngine."""
        self._before = self._calls

    def layers(self) -> tuple[LayerTime, ...]:
        """See ProfiledEngine. Raises ResourceError where the trace is not complete."""
        trace = Path(self._session.end_profiling())
        try:
            events = json.loads(trace.read_bytes())
        except ValueError as error:
            raise ResourceError(
                f"ONNX Runtime's trace is damaged: {error}", hint=f"is there space left in {trace.parent}?"
            ) from error
        runs = sorted(event["ts"] for event in events if event["name"] == "model_run")
        if len(runs) != self._calls:  # the library keeps the first million events, and is silent about the rest
            raise ResourceError(
                "ONNX Runtime's trace ends early", expected=f"{self._calls} calls", got=str(len(runs)),
                hint="profile fewer steps",
            )  # fmt: skip
        begin = runs[self._before] if self._before < len(runs) else float("inf")
        return _layer_times([event for event in events if event["ts"] >= begin], self._calls - self._before)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        super().__exit__(kind, error, at)  # first: a session that ends writes its trace
        self._folder.cleanup()


def open_engine(model: Path, weights: Path | None, precision: str) -> OnnxRuntimeEngine:
    """`weights` is found by the library beside the model, as the graph says; `precision` is in the graph."""
    return OnnxRuntimeEngine(model)


def open_profiled_engine(model: Path, weights: Path | None, precision: str) -> ProfiledOnnxRuntimeEngine:
    """As open_engine, with the profiler on."""
    return ProfiledOnnxRuntimeEngine(model)


def _layer_times(events: list[dict[str, Any]], calls: int) -> tuple[LayerTime, ...]:
    """Sums over the events of each node; the library counts in whole microseconds."""
    seconds: dict[tuple[str, str, str], float] = {}
    for event in events:
        name, suffix, _ = event["name"].rpartition("_kernel_time")
        if event.get("cat") == "Node" and suffix:
            about = event["args"]
            provider = about.get("provider", "").removesuffix("ExecutionProvider")
            types = [next(iter(output)) for output in about.get("output_type_shape", [])]
            key = (name, about.get("op_name", "?"), " ".join([provider, *types[:1]]))
            seconds[key] = seconds.get(key, 0.0) + event["dur"] / 1e6
    return tuple(LayerTime(name, kind, kernel, "", s, calls) for (name, kind, kernel), s in seconds.items() if s)


def _spec(node: Any) -> TensorSpec:
    shape = tuple(d if isinstance(d, int) else str(d or "?") for d in node.shape)
    # Not validated: what no manifest can promise is refused when it is compared with one.
    return TensorSpec.model_construct(name=node.name, dtype=_DTYPES.get(node.type, node.type), shape=shape)
