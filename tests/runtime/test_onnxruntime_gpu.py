"""ONNX Runtime's providers for GPUs where there is none: every way to fall back to the CPU is an error."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from bundles import SHAPE, add_model
from onnx import TensorProto, helper, numpy_helper

from slipcast.bundle.manifest import Component, TensorSpec
from slipcast.engines import ENGINES, cuda, open_engine
from slipcast.engines import onnxruntime as engine
from slipcast.engines.cuda import Cuda, Gpu
from slipcast.errors import HostError

CONTRACT = Component(
    inputs=(TensorSpec(name="x", dtype="float32", shape=tuple(SHAPE)),),
    outputs=(TensorSpec(name="y", dtype="float32", shape=tuple(SHAPE)),),
)
NAMES = ("onnxruntime-gpu", "onnxruntime-tensorrt")
without_cuda = pytest.mark.skipif(
    engine.CUDA in onnxruntime.get_available_providers(), reason="this build has the CUDA provider"
)


@pytest.fixture
def add(tmp_path: Path) -> Path:
    onnx.save(add_model(), tmp_path / "add.onnx")
    return tmp_path / "add.onnx"


@pytest.fixture
def linear(tmp_path: Path) -> Path:
    """A layer between two nodes of the arithmetic of shapes."""
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="attn.to_q"),
        helper.make_node("Shape", ["h"], ["s"]),
        helper.make_node("Reshape", ["h", "s"], ["y"]),
    ]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "l.onnx")
    return tmp_path / "l.onnx"


@pytest.mark.parametrize("name", NAMES)
class TestRow20:
    @pytest.mark.skipif(ENGINES["onnxruntime-gpu"].available(), reason="it can run here")
    def test_not_installed(self, name: str, add: Path) -> None:
        with pytest.raises(HostError, match=f"engine {name} cannot run here") as caught:
            open_engine(name, add, None, "fp32", CONTRACT)
        assert caught.value.exit_code == 3

    @without_cuda
    def test_a_build_for_the_cpu(self, name: str, add: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As where onnxruntime was installed over onnxruntime-gpu: the GPU is there, the distribution too."""
        monkeypatch.setattr(cuda, "look", lambda: Cuda((Gpu("Some GPU", "8.9", 10**10),), "13.0"))
        monkeypatch.setattr("slipcast.engines._installed", lambda distribution: True)
        assert ENGINES[name].available()
        with pytest.raises(HostError, match=r"add\.onnx: .* would not run it on the GPU") as caught:
            open_engine(name, add, None, "fp32", CONTRACT)
        assert "ExecutionProvider is not in this build; providers here: " in str(caught.value.got)
        assert caught.value.exit_code == 3
        with pytest.raises(HostError, match="no profiler"):
            open_engine(name, add, None, "fp32", CONTRACT, profile=True)

    def test_needs_no_library_to_be_built(self, name: str) -> None:
        assert ENGINES[name].can_build()


class TestPlacement:
    def session(self, model: Path) -> Any:
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry(engine.PLACEMENT, "1")
        return onnxruntime.InferenceSession(model, options, providers=[engine.CPU])

    def test_a_provider_that_did_not_load(self, linear: Path) -> None:
        with pytest.raises(HostError, match="CUDAExecutionProvider did not load; providers here: CPUExecutionProvider"):
            engine.check_placement(linear, self.session(linear), (engine.CUDA,))

    def test_a_layer_on_the_cpu(self, linear: Path) -> None:
        """The library's own account of what it put where."""
        session = self.session(linear)
        with pytest.raises(HostError, match=r"leaves layers to the CPU: attn\.to_q"):
            engine.check_placement(linear, session, (engine.CPU,))

    def test_the_arithmetic_of_shapes_may_stay(self, linear: Path) -> None:
        node = SimpleNamespace(name="", op_type="Shape")
        parts = [SimpleNamespace(ep_name=engine.CPU, get_nodes=lambda: [node])]
        session = SimpleNamespace(
            get_providers=lambda: [engine.CUDA, engine.CPU], get_provider_graph_assignment_info=lambda: parts
        )
        engine.check_placement(linear, session, (engine.CUDA,))
        node.op_type = "Conv"
        with pytest.raises(HostError, match="to the CPU: Conv"):
            engine.check_placement(linear, session, (engine.CUDA,))
