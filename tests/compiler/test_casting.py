"""A graph in half precision: what is rounded, and what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from slipcast_compiler.graph.casting import cast_graph, rounded_graph

HALF = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def value(name: str, *shape: Any) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def save(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], **weights: Any) -> Path:
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), path)
    return path


def types(path: Path) -> dict[str, int]:
    """Tensor -> type, as ONNX itself infers them; strict, so that a graph that mixes types is an error."""
    onnx.checker.check_model(path, full_check=True)
    model = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True, data_prop=True)
    known = {i.name: i.data_type for i in model.graph.initializer}
    values = (*model.graph.input, *model.graph.output, *model.graph.value_info)
    return known | {v.name: v.type.tensor_type.elem_type for v in values}


def run(path: Path, **arrays: Any) -> Any:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, arrays)[0]


def run_bytes(model: bytes, **arrays: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, arrays)[0]


@pytest.fixture
def embedding(tmp_path: Path) -> Path:
    """sin(t * f) @ w + b, as a timestep's embedding begins."""
    nodes = [
        helper.make_node("Mul", ["t", "f"], ["angle"], name="angles"),
        helper.make_node("Sin", ["angle"], ["wave"], name="wave"),
        helper.make_node("MatMul", ["wave", "w"], ["product"], name="product"),
        helper.make_node("Add", ["product", "b"], ["y"], name="sum"),
    ]
    rng = np.random.default_rng(0)
    weights = {
        "f": rng.random((1, 16)).astype(np.float32), "w": rng.standard_normal((16, 8)).astype(np.float32),
        "b": np.ones(8, np.float32),
    }  # fmt: skip
    return save(tmp_path / "e.onnx", nodes, [value("t", "batch", 1)], [value("y", "batch", 8)], **weights)


@pytest.mark.parametrize("precision", HALF)
def test_weights_and_activations_are_half_and_the_ends_are_not(embedding: Path, tmp_path: Path, precision: str) -> None:
    cast_graph(embedding, precision, out := tmp_path / "out.onnx")
    found = types(out)
    assert (found["t"], found["y"]) == (TensorProto.FLOAT, TensorProto.FLOAT)
    assert found["product"] == found[f"w.{precision}"] == found[f"b.{precision}"] == HALF[precision]
    assert not {"w", "b"} & set(found)
    assert (tmp_path / "out.onnx.data").exists()


@pytest.mark.parametrize("precision", HALF)
def test_named_nodes_stay_in_fp32(embedding: Path, tmp_path: Path, precision: str) -> None:
    cast_graph(embedding, precision, out := tmp_path / "out.onnx", ("angles", "product"))
    found = types(out)
    assert found["angle"] == found["product"] == found["w"] == TensorProto.FLOAT
    assert found["wave"] == found[f"b.{precision}"] == HALF[precision]  # between two of them, and after
    t = np.array([[981.0], [999.0]], np.float32)
    with_angles, without = (run_bytes(rounded_graph(embedding, precision, names), t=t) for names in ([], ["angles"]))
    assert np.abs(without - run(embedding, t=t)).max() < np.abs(with_angles - run(embedding, t=t)).max()


@pytest.mark.parametrize("fp32", [(), ("wave",), ("angles", "wave"), ("product", "sum")])
def test_the_rounded_graph_rounds_as_the_cast_one_does(embedding: Path, fp32: tuple[str, ...]) -> None:
    """Spelled out in numpy, for fp16."""

    def half(array: Any) -> Any:
        return np.asarray(array, np.float32).astype(np.float16).astype(np.float32)

    def compute(name: str, f: Any, *values: Any) -> Any:
        return f(*values) if name in fp32 else half(f(*(half(value) for value in values)))

    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(embedding).graph.initializer}
    t = np.array([[981.0], [3.3]], np.float32)
    angle = compute("angles", np.multiply, t, tensors["f"])
    product = compute("product", np.matmul, compute("wave", np.sin, angle), tensors["w"])
    wanted = compute("sum", np.add, product, tensors["b"])
    found = run_bytes(rounded_graph(embedding, "fp16", fp32), t=t)
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-4)  # at most a unit apart, from sums in another order
    assert np.mean(found == wanted) > 0.8


def test_what_does_not_fit_is_infinite(tmp_path: Path) -> None:
    """As it is measured; so may be a mask without harm."""
    nodes = [helper.make_node("Add", ["x", "mask"], ["y"], name="sum")]
    weights = {"mask": np.array([0.0, -np.inf, 1e6], np.float32)}
    source = save(tmp_path / "m.onnx", nodes, [value("x", 3)], [value("y", 3)], **weights)
    cast_graph(source, "fp16", out := tmp_path / "out.onnx")
    x = np.ones(3, np.float32)
    assert run(out, x=x).tolist() == run_bytes(rounded_graph(source, "fp16"), x=x).tolist() == [1.0, -np.inf, np.inf]
    cast_graph(source, "fp16", out, ("sum",))
    assert run(out, x=x).tolist() == [1.0, -np.inf, 1e6 + 1]


def test_half_of_the_range_is_left_for_other_inputs(tmp_path: Path) -> None:
    source = save(tmp_path / "m.onnx", [helper.make_node("Neg", ["x"], ["y"])], [value("x", 4)], [value("y", 4)])
    x = np.array([1.0, 32000.0, 33000.0, 3e-6], np.float32)
    found = run_bytes(rounded_graph(source, "fp16"), x=x)
    np.testing.assert_allclose(found, [-1, -32000, -np.inf, -3e-6], rtol=0.01)
    assert np.isfinite(run_bytes(rounded_graph(source, "bf16"), x=x)).all()


def test_quantised_layers_stay_so(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "sx", "zx"], ["qx"]),
        helper.make_node("DequantizeLinear", ["qx", "sx", "zx"], ["dx"]),
        helper.make_node("DequantizeLinear", ["qw", "sw", "zw"], ["dw"], axis=1),
        helper.make_node("MatMul", ["dx", "dw"], ["y"], name="product"),
    ]
    rng = np.random.default_rng(0)
    weights = {
        "sx": np.float32(0.02), "zx": np.int8(0), "sw": np.full(8, 3e-6, np.float32), "zw": np.zeros(8, np.int8),
        "qw": rng.integers(-127, 128, (16, 8)).astype(np.int8),
    }  # fmt: skip
    source = save(tmp_path / "q.onnx", nodes, [value("x", 4, 16)], [value("y", 4, 8)], **weights)
    cast_graph(source, "fp16", out := tmp_path / "out.onnx", ("product",))  # which would cost it its INT8 kernel
    found = types(out)
    assert found["qw"] == found["qx"] == TensorProto.INT8
    assert found["dx"] == found["dw"] == TensorProto.FLOAT16
    assert found["sx"] == found["sw"] == TensorProto.FLOAT  # 3e-6 has six bits left in fp16


def test_sizes_of_a_resize_stay_in_fp32(tmp_path: Path) -> None:
    nodes = [helper.make_node("Resize", ["x", "", "scales"], ["y"], mode="nearest")]
    weights = {"scales": np.array([1, 1, 2, 2], np.float32)}
    source = save(tmp_path / "r.onnx", nodes, [value("x", 1, 1, 2, 2)], [value("y", 1, 1, 4, 4)], **weights)
    cast_graph(source, "fp16", out := tmp_path / "out.onnx")
    assert types(out)["scales"] == TensorProto.FLOAT
    x = np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)
    np.testing.assert_array_equal(run(out, x=x), run(source, x=x))
