"""The cut on graphs small enough to see what the best one is, and the rewrite that takes batches out of the way."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx_ir.passes.common import LiftConstantsToInitializersPass, ShapeInferencePass

from slipcast_compiler.graph.broadcast import broadcast_late
from slipcast_compiler.graph.cut import Binding, bind, cut

# Shapes that the exporter knows, and ONNX's shape inference does not find.
KNOWN = {
    "t = Expand": "float[batch] t", "r = Reshape": "float[batch,2,2] r", "row = Reshape": "float[batch,4] row",
}  # fmt: skip


def _model(inputs: str, body: str, outputs: str = "float[batch,4] prediction") -> ir.Model:
    known = [text for what, text in KNOWN.items() if what in body]
    text = f'<ir_version: 10, opset_import: ["" : 23]> g ({inputs}) => ({outputs}) <{", ".join(known)}> {{ {body} }}'
    model = ShapeInferencePass()(ir.from_onnx_text(text)).model
    return LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model).model


def _run(model: ir.Model, arrays: dict[str, Any]) -> dict[str, Any]:
    data = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]
    return dict(zip(names, session.run(None, {i.name: arrays[i.name] for i in session.get_inputs()}), strict=True))


def _crosses(model: ir.Model, stage_name: str) -> set[str | None]:
    return {value.name for value in cut(model).graphs[stage_name].graph.outputs}


SAMPLE, TEXT, TIME = "float[batch,4] sample", "float[batch,4] text", "float[1] timestep"
W = "w = Constant <value = float[4,4] {1,2,3,4,5,6,7,8,9,8,7,6,5,4,3,2}> () "


def test_binding_times_join() -> None:
    graph = _model(
        f"{SAMPLE}, {TEXT}, {TIME}",
        "c = Constant <value_float = 2.0> () t = Mul(timestep, c) p = Mul(text, c) m = Add(t, p) "
        "prediction = Add(m, sample)",
    ).graph
    found = {value.name: binding for value, binding in bind(graph).items()}
    both = Binding.STEP | Binding.PROMPT
    assert (found["c"], found["t"], found["p"]) == (Binding.CONSTANT, Binding.STEP, Binding.PROMPT)
    assert (found["m"], found["prediction"]) == (both, Binding.LATENT)


def test_what_grows_stays_inside() -> None:
    body = W + (
        "k = MatMul(text, w) axes = Constant <value_ints = [2]> () u = Unsqueeze(k, axes) "
        "size = Constant <value_ints = [1, 1, 9000]> () big = Expand(u, size) s = Unsqueeze(sample, axes) "
        "prediction = Add(big, s)"
    )
    model = _model(f"{SAMPLE}, {TEXT}", body, "float[batch,4,9000] prediction")
    assert _crosses(model, "prompt") == {"u"}  # of the same size as k, with one node less in the loop


def test_a_node_that_saves_few_bytes_is_not_worth_its_place_in_the_loop() -> None:
    body = W + "k = MatMul(text, w) twice = Concat <axis = 1> (k, k) prediction = Add(twice, sample)"
    inputs = f"float[batch,8] sample, {TEXT}"
    assert _crosses(_model(inputs, body, "float[batch,8] prediction"), "prompt") == {"twice"}


def test_real_work_stays_outside_however_large_its_result() -> None:
    body = (
        "w = ConstantOfShape(n) k = MatMul(text, w) r = ReduceSum <keepdims = 1> (k, axis) prediction = Mul(k, sample)"
    )
    body = body.replace("w = ", "n = Constant <value_ints = [4, 90000]> () axis = Constant <value_ints = [1]> () w = ")
    model = _model(f"float[batch,1] sample, {TEXT}", body, "float[batch,90000] prediction")
    assert _crosses(model, "prompt") == {"k"}


def test_what_is_returned_is_returned_by_the_loop_whenever_it_is_known() -> None:
    body = (
        W + "k = MatMul(text, w) scale = Mul(timestep, timestep) shown = Add(k, scale) prediction = Add(shown, sample)"
    )
    outputs = "float[batch,4] prediction, float[batch,4] shown, float[1] scale"
    model = _model(f"{SAMPLE}, {TEXT}, {TIME}", body, outputs)
    given = {"sample": np.ones((2, 4)), "text": np.ones((2, 4)), "timestep": np.full(1, 3.0)}
    arrays = {name: array.astype(np.float32) for name, array in given.items()}
    wanted, parts = _run(model, arrays), cut(model).graphs
    for name in ("step", "prompt", "prompt+step", "denoise"):
        arrays |= _run(parts[name], arrays) if name in parts else {}
    for name, array in wanted.items():
        np.testing.assert_array_equal(_run(parts["denoise"], arrays)[name], array)


def test_a_tensor_that_many_use_crosses_once() -> None:
    body = W + ("k = MatMul(text, w) a = Add(k, sample) b = Mul(k, a) c = Sub(k, b) prediction = MatMul(c, w)")
    parts = cut(_model(f"{SAMPLE}, {TEXT}", body))
    assert [value.name for value in parts.graphs["denoise"].graph.inputs] == ["sample", "k"]


# Each expands the timestep to the batch, and then does something else with it.
EXPAND = (
    "n = Shape <start = 0, end = 1> (sample) t = Expand(timestep, n) "
    "ax = Constant <value_ints = [1]> () u = Unsqueeze(t, ax) "
)
BROADCASTS = {
    "elementwise": "row = Sin(u) prediction = Add(sample, row)",
    "matmul": "v = Constant <value = float[1,4] {1,2,3,4}> () row = MatMul(u, v) prediction = Mul(row, sample)",
    "gemm": "v = Constant <value = float[4,1] {1,2,3,4}> () b = Constant <value = float[4] {1,2,3,4}> () "
    "row = Gemm <transB = 1> (u, v, b) prediction = Mul(row, sample)",
    "concat": "row = Concat <axis = 1> (u, u, u, u) prediction = Sub(row, sample)",
    "softmax": "c = Constant <value = float[1,4] {1,2,3,4}> () m = Mul(u, c) row = Softmax <axis = 1> (m) "
    "prediction = Sub(row, sample)",
    "reshape": "c = Constant <value = float[1,4] {1,2,3,4}> () m = Mul(u, c) "
    "s = Constant <value_ints = [-1, 2, 2]> () r = Reshape(m, s) p = Transpose <perm = [0, 2, 1]> (r) "
    "s2 = Constant <value_ints = [-1, 4]> () row = Reshape(p, s2) prediction = Sub(row, sample)",
    "split": "c = Constant <value = float[1,4] {1,2,3,4}> () m = Mul(u, c) "
    "a, b = Split <axis = 1, num_outputs = 2> (m) row = Concat <axis = 1> (b, a) prediction = Sub(row, sample)",
}
# And these need the batch: rows are made a batch again just before.
WIDENED = {
    "joined with a batch": "z = Constant <value_ints = [0]> () f = Constant <value_ints = [4]> () "
    "row = Sin(u) both = Concat <axis = 1> (row, sample) s = Slice(both, z, f, ax) "
    "prediction = Identity(s)",
    "softmax over the batch": "row = Sin(u) soft = Softmax <axis = 0> (row) prediction = Add(soft, sample)",
    "size taken": "row = Sin(u) m = Shape(row) q = Cast <to = 1> (m) k = ReduceSum <keepdims = 0> (q) "
    "prediction = Mul(sample, k)",
    "output": "c = Constant <value = float[1,4] {1,2,3,4}> () row = Mul(u, c) prediction = Sin(row)",
}


@pytest.mark.parametrize("name", [*BROADCASTS, *WIDENED])
@pytest.mark.parametrize("batch", [1, 3])
def test_late_broadcasts_change_nothing_but_where(name: str, batch: int) -> None:
    model = _model(f"{SAMPLE}, {TIME}", EXPAND + (BROADCASTS | WIDENED)[name])
    arrays = {"sample": np.random.default_rng(0).standard_normal((batch, 4), np.float32)}
    arrays["timestep"] = np.array([0.7], np.float32)
    wanted = _run(model, arrays)["prediction"]
    broadcast_late(model)
    np.testing.assert_array_equal(_run(model, arrays)["prediction"], wanted)
    row = next(value for node in model.graph for value in node.outputs if value.name == "row")
    assert row.shape is not None and row.shape[0] == 1
    assert any(node.op_type == "Expand" for node in model.graph) == (name in WIDENED)


def test_of_two_cuts_that_cost_the_same_less_is_inside() -> None:
    body = W + "k = MatMul(text, w) g = Neg(k) h = Abs(g) prediction = Add(h, sample)"
    assert _crosses(_model(f"{SAMPLE}, {TEXT}", body), "prompt") == {"h"}
