"""ONNX Runtime on the CPU: the portable target."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from slipcast.engines import Array, cpu_threads
from slipcast.errors import ArtifactError
from slipcast.manifest import TensorSpec

# From 1.29 on, official builds write below HOME and report to Microsoft, unless told not to before they are imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

_DTYPES = {
    "tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64", "tensor(int32)": "int32",
}  # fmt: skip


class OnnxRuntimeEngine:
    """One session; see slipcast.engines.Engine."""

    def __init__(self, model: Path) -> None:
        options = onnxruntime.SessionOptions()
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


def open_engine(model: Path, weights: Path | None, precision: str) -> OnnxRuntimeEngine:
    """`weights` is found by the library beside the model, as the graph says; `precision` is in the graph."""
    return OnnxRuntimeEngine(model)


def _spec(node: Any) -> TensorSpec:
    shape = tuple(d if isinstance(d, int) else str(d or "?") for d in node.shape)
    # Not validated: what no manifest can promise is refused when it is compared with one.
    return TensorSpec.model_construct(name=node.name, dtype=_DTYPES.get(node.type, node.type), shape=shape)
