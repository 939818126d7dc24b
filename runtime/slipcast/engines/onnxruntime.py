"""ONNX Runtime: on the CPU, the portable target; on an NVIDIA GPU, by its CUDA or TensorRT provider.

The library goes on without a provider that it cannot have, on the CPU and almost silently: here that is an error.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from slipcast.bundle.manifest import TensorSpec
from slipcast.engines import Array, LayerTime, cpu_threads
from slipcast.engines.files import ModelFile, contents
from slipcast.engines.resources import out_of_memory
from slipcast.errors import ArtifactError, HostError, ResourceError

# From 1.29 on, official builds write below HOME and report to Microsoft, unless told not to before they are imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

CPU, CUDA, TENSORRT = (f"{name}ExecutionProvider" for name in ("CPU", "CUDA", "Tensorrt"))
# What a provider for GPUs never leaves to the CPU on purpose, as it does with the arithmetic of shapes.
HEAVY = frozenset(
    (
        "Attention",
        "Conv",
        "ConvTranspose",
        "Gemm",
        "GroupNormalization",
        "InstanceNormalization",
        "LayerNormalization",
        "MatMul",
        "Softmax",
    )
)
CONTAINERS = ("If", "Loop", "Scan")  # whose nodes are told besides
PLACEMENT = "session.record_ep_graph_assignment_info"  # which since 1.24 keeps what get_provider_graph_... gives

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
}


class OnnxRuntimeEngine:
    """One session; see slipcast.engines.Engine."""

    def __init__(
        self,
        model: ModelFile,
        weights: ModelFile | None = None,
        trace: Path | None = None,
        providers: Sequence[str] = (),
        mapped: bool = False,
    ) -> None:
        """`weights`: read into memory, and without them what the graph says of a file of one's own. `providers`: for a
        GPU, in order of preference; HostError where the graph would not run on them. `mapped`: one's own weights are
        used as they lie in the file, slower, and take no memory that cannot be given back."""
        if missing := [name for name in providers if name not in available_providers()]:
            raise _fallen_back(model, f"{missing[0]} is not in this build", available_providers())
        options = onnxruntime.SessionOptions()
        if trace:
            options.enable_profiling = True
            options.profile_file_prefix = str(trace)
        options.intra_op_num_threads = cpu_threads()
        options.log_severity_level = 3
        if mapped:  # else matrices are copied into an order that kernels like better, and all turned before the first
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        if providers:
            options.add_session_config_entry(PLACEMENT, "1")
        # Said, where the library would guess by the suffix and by what stands at byte 4.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        held = contents(weights) if weights else None  # until the session is made, which copies what it needs
        if weights and held is not None:
            options.add_external_initializers_from_files_in_memory([weights.name], [held], [held.size])
        graph = model if isinstance(model, Path) and held is None else model.read_bytes()
        unfolded = ["ConstantFolding"] if mapped else None
        try:
            self._session: Any = onnxruntime.InferenceSession(
                graph, options, providers=[*providers, CPU], enable_fallback=False, disabled_optimizers=unfolded
            )
        except Exception as error:  # the library raises a dozen types of its own, all of which mean this
            if out_of_memory(error):
                raise
            raise ArtifactError(
                f"{model.name}: ONNX Runtime {onnxruntime.__version__} cannot load it",
                got=str(error).strip(),
                hint="run `slipcast verify`; where the digests hold, upgrade onnxruntime: it cannot read the graph",
            ) from error
        if providers:
            check_placement(model, self._session, providers)
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

    def __init__(self, model: ModelFile, weights: ModelFile | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="slipcast-profile-")
        self._calls = self._before = 0
        try:
            super().__init__(model, weights, Path(self._folder.name) / "trace")
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
                "ONNX Runtime's trace ends early",
                expected=f"{self._calls} calls",
                got=str(len(runs)),
                hint="profile fewer steps",
            )
        begin = runs[self._before] if self._before < len(runs) else float("inf")
        return _layer_times([event for event in events if event["ts"] >= begin], self._calls - self._before)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        super().__exit__(kind, error, at)  # first: a session that ends writes its trace
        self._folder.cleanup()


def open_engine(model: ModelFile, weights: ModelFile | None, precision: str) -> OnnxRuntimeEngine:
    """`weights` is the file that the graph names; `precision` is in the graph."""
    return OnnxRuntimeEngine(model, weights)


def available_providers() -> list[str]:
    """Those in the installed build; whether they load is another question."""
    return list(onnxruntime.get_available_providers())


def open_cuda(model: ModelFile, weights: ModelFile | None, precision: str) -> OnnxRuntimeEngine:
    """As open_engine, on a GPU by the CUDA provider."""
    return OnnxRuntimeEngine(model, weights, providers=(CUDA,))


def open_tensorrt(model: ModelFile, weights: ModelFile | None, precision: str) -> OnnxRuntimeEngine:
    """As open_engine, on a GPU by the TensorRT provider, and by CUDA where that has no kernel. It builds its engines
    whenever a session is opened: nothing is written to disk."""
    return OnnxRuntimeEngine(model, weights, providers=(TENSORRT, CUDA))


def check_placement(model: ModelFile, session: Any, providers: Sequence[str]) -> None:
    """HostError where a provider did not load, or a layer went to the CPU all the same."""
    if missing := [name for name in providers if name not in session.get_providers()]:
        raise _fallen_back(model, f"{missing[0]} did not load", session.get_providers())
    if not hasattr(session, "get_provider_graph_assignment_info"):  # before 1.24 nobody tells
        return
    on_cpu = [part.get_nodes() for part in session.get_provider_graph_assignment_info() if part.ep_name == CPU]
    if layers := [node.name or node.op_type for nodes in on_cpu for node in nodes if node.op_type in HEAVY]:
        shown = ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
        raise _fallen_back(model, f"it leaves layers to the CPU: {shown}", providers)


def _fallen_back(model: ModelFile, problem: str, has: Iterable[str]) -> HostError:
    return HostError(
        f"{model.name}: ONNX Runtime {onnxruntime.__version__} would not run it on the GPU",
        expected="a provider for GPUs",
        got=f"{problem}; providers here: {', '.join(has)}",
        hint="run `slipcast doctor`: pip uninstall -y onnxruntime onnxruntime-gpu, then install onnxruntime-gpu alone, "
        "with the CUDA and cuDNN that it names",
    )


def open_profiled_engine(model: ModelFile, weights: ModelFile | None, precision: str) -> ProfiledOnnxRuntimeEngine:
    """As open_engine, with the profiler on."""
    return ProfiledOnnxRuntimeEngine(model, weights)


def _layer_times(events: list[dict[str, Any]], calls: int) -> tuple[LayerTime, ...]:
    """Sums over the events of each node; the library counts in whole microseconds."""
    seconds: dict[tuple[str, str, str], float] = {}
    for event in events:
        name, suffix, _ = event["name"].rpartition("_kernel_time")
        about = event.get("args", {})
        if event.get("cat") == "Node" and suffix and about.get("op_name") not in CONTAINERS:
            provider = about.get("provider", "").removesuffix("ExecutionProvider")
            types = [next(iter(output)) for output in about.get("output_type_shape", [])]
            key = (name, about.get("op_name", "?"), " ".join([provider, *types[:1]]))
            seconds[key] = seconds.get(key, 0.0) + event["dur"] / 1e6
    return tuple(LayerTime(name, kind, kernel, "", s, calls) for (name, kind, kernel), s in seconds.items() if s)


def _spec(node: Any) -> TensorSpec:
    shape = tuple(d if isinstance(d, int) else str(d or "?") for d in node.shape)
    # Not validated: what no manifest can promise is refused when it is compared with one.
    return TensorSpec.model_construct(name=node.name, dtype=_DTYPES.get(node.type, node.type), shape=shape)
