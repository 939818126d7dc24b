"""TensorRT cannot be installed everywhere: that the names we use of it exist is checked against a list of those of 11.4
(tensorrt-11.4-names.txt: the classes that are used here), and against TensorRT-RTX where that is installed."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

from conftest import ROOT

# What variables of these files hold.
BUILDER = {
    "builder": "Builder", "network": "INetworkDefinition", "parser": "OnnxParser", "config": "IBuilderConfig",
    "profile": "IOptimizationProfile", "tensor": "ITensor", "e": "ParserError", "layer": "IAttentionOutputLayer",
    "layer.attention": "IAttention",
}  # fmt: skip
RUNTIME = {
    "self._engine": "ICudaEngine", "self._context": "IExecutionContext", "self._runtime": "Runtime",
    "config": "IRuntimeConfig",
}  # fmt: skip
FILES = {
    ROOT / "compiler/slipcast_compiler/engines/tensorrt.py": BUILDER,
    ROOT / "compiler/slipcast_compiler/engines/timings.py": {"config": "IBuilderConfig"},
    ROOT / "runtime/slipcast/engines/tensorrt.py": RUNTIME,
}
# Asked for where the library has it, or by keys of a recipe that are for one of the two.
RTX_ALONE = {
    "ComputeCapability", "IBuilderConfig.num_compute_capabilities", "IBuilderConfig.set_compute_capability",
    "CudaGraphStrategy", "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE", "IRuntimeConfig.cuda_graph_strategy",
    "EngineValidity", "EngineValidity.INVALID", "EngineInvalidityDiagnostics", "Runtime.get_engine_validity",
}  # fmt: skip


def used() -> set[str]:
    """Members of the library, and of its objects, as CLASS.MEMBER."""
    found = set()
    for file, objects in FILES.items():
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not isinstance(node, ast.Attribute) or node.attr.startswith("__") or node.attr == "name":
                continue  # the list has no `name`, of anything
            owner = ast.unparse(node.value).removeprefix("self._trt").removeprefix("trt")
            if ast.unparse(node.value) in ("trt", "self._trt"):
                found.add(node.attr)
            elif owner.startswith("."):
                found.add(f"{owner[1:]}.{node.attr}")
            elif owner in objects:
                found.add(f"{objects[owner]}.{node.attr}")
    return found


def test_names_of_tensorrt() -> None:
    names = set(Path(__file__).with_name("tensorrt-11.4-names.txt").read_text("utf-8").split())
    assert len(used()) > 50
    assert used() - names == RTX_ALONE


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
def test_names_of_tensorrt_rtx() -> None:
    library = importlib.import_module("tensorrt_rtx")

    def there(name: str) -> bool:
        owner, _, member = name.partition(".")
        return hasattr(getattr(library, owner), member) if member else hasattr(library, owner)

    assert sorted(name for name in used() if not there(name)) == []
