"""Rewrites for the engines' sake change the form of a graph, and nothing that it computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import LiftConstantsToInitializersPass, ShapeInferencePass

from slipcast_compiler.graph.tidy import tidy

SCALES = "s = Constant <value = float[6] {1,-2,3,0.5,5,6}> () b = Constant <value = float[6] {6,5,4,3,2,1}> () "


def _model(inputs: str, body: str, output: str) -> ir.Model:
    text = f'<ir_version: 10, opset_import: ["" : 23]> g ({inputs}) => ({output}) {{ {body} }}'
    model = ShapeInferencePass()(ir.from_onnx_text(text)).model
    return LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model).model


def _onnxruntime(model: ir.Model, arrays: dict[str, Any]) -> Any:
    data = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, arrays)[0]


def _kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shape", ["4,5", "7"])
def test_group_norms_are_spelled_out(batch: int, shape: str) -> None:
    body = SCALES + "y = GroupNormalization <num_groups = 3, epsilon = 0.01> (x, s, b)"
    model = _model(f"float[batch,6,{shape}] x", body, f"float[batch,6,{shape}] y")
    x = np.random.default_rng(0).standard_normal((batch, 6, *map(int, shape.split(","))), np.float32)
    wanted = _onnxruntime(model, {"x": x})
    tidy(model.graph)
    assert _kinds(model) == ["Reshape", "InstanceNormalization", "Reshape", "Mul", "Add"]
    np.testing.assert_allclose(_onnxruntime(model, {"x": x}), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", ["h,4", "4,w", "t,h,w", "4,5"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("scales", [SCALES, SCALES.replace("s =", "s_ =") + "s = Expand(s_, n) "])
def test_group_norms_of_free_sizes_and_shared_weights_are_too(sizes: str, shared: bool, scales: str) -> None:
    body = "n = Constant <value_ints = [6]> () " + scales + "y = GroupNormalization <num_groups = 3> (x, s, b) "
    body += "other = GroupNormalization <num_groups = 2> (x, s, b) z = Add(y, other)" if shared else ""
    model = _model(f"float[batch,6,{sizes}] x", body, f"float[batch,6,{sizes}] {'z' if shared else 'y'}")
    shape = [int(size) if size.isdigit() else 3 for size in sizes.split(",")]
    x = np.random.default_rng(0).standard_normal((2, 6, *shape), np.float32)
    wanted = _onnxruntime(model, {"x": x})
    tidy(model.graph)
    assert _kinds(model).count("InstanceNormalization") == 1 + shared and "GroupNormalization" not in _kinds(model)
    np.testing.assert_allclose(_onnxruntime(model, {"x": x}), wanted, rtol=1e-5, atol=1e-5)


def test_group_norms_are_exact_where_the_mean_is_large() -> None:
    """A difference of means, as the operator is defined, loses what is small beside them."""
    model = _model("float[1,6,8] x", SCALES + "y = GroupNormalization <num_groups = 6> (x, s, b)", "float[1,6,8] y")
    x = np.random.default_rng(0).standard_normal((1, 6, 8)) * 0.01 + 3
    scale, bias = np.array([1, -2, 3, 0.5, 5, 6]), np.array([6, 5, 4, 3, 2, 1])
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    tidy(model.graph)
    found = _onnxruntime(model, {"x": x.astype(np.float32)})
    np.testing.assert_allclose(found, normal * scale[:, None] + bias[:, None], rtol=2e-3, atol=2e-3)


def test_masks_get_a_row_per_query() -> None:
    shapes = "float[batch,2,4,8] q, float[batch,2,5,8] k, float[batch,2,5,8] v, float[batch,1,1,5] m"
    model = _model(shapes, "y = Attention(q, k, v, m)", "float[batch,2,4,8] y")
    random = np.random.default_rng(0)
    arrays = {
        value.name: random.standard_normal([d if isinstance(d, int) else 3 for d in value.shape or ()], np.float32)
        for value in model.graph.inputs
    }
    wanted = ReferenceEvaluator(ir.to_proto(model)).run(None, arrays)[0]
    tidy(model.graph)
    np.testing.assert_allclose(_onnxruntime(model, arrays), wanted, rtol=1e-4, atol=1e-5)


def test_a_squeeze_that_torch_ignores_goes() -> None:
    model = _model(
        "float[batch,1,6] x", "a = Constant <value_ints = [1]> () y = Squeeze(x, a) z = Neg(y)", "float[batch,6] z"
    )
    tidy(model.graph)
    assert _kinds(model) == ["Squeeze", "Neg"]  # this one does something
    squeeze, x = model.graph[0], model.graph.inputs[0]
    x.shape = squeeze.outputs[0].shape = model.graph.outputs[0].shape = ir.Shape(["batch", 7, 6])
    tidy(model.graph)
    assert _kinds(model) == ["Neg"]


def test_an_unsqueeze_is_a_reshape_where_its_sizes_are_known() -> None:
    model = _model("float[batch,6] x", "a = Constant <value_ints = [1]> () y = Unsqueeze(x, a)", "float[batch,1,6] y")
    name = model.graph[0].name
    tidy(model.graph)
    assert _kinds(model) == ["Reshape"]
    assert (model.graph[0].name, model.graph.outputs[0].name) == (name, "y")
    x = np.arange(12, dtype=np.float32).reshape(2, 6)
    np.testing.assert_array_equal(_onnxruntime(model, {"x": x}), x[:, None])
    free = _model("float[b,n] x", "a = Constant <value_ints = [1]> () y = Unsqueeze(x, a)", "float[b,1,n] y")
    tidy(free.graph)
    assert _kinds(free) == ["Unsqueeze"]
