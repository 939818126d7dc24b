"""Engines from ONNX: one file per target, each a pure function from a model to files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from slipcast.manifest import EngineFiles
from slipcast_compiler.build import onnxruntime, openvino

# (component.onnx with its .data beside it, precision, directory to write to) -> names of the files written
BUILDERS: dict[str, Callable[[Path, str, Path], EngineFiles]] = {
    "onnxruntime": onnxruntime.build,
    "openvino": openvino.build,
}
