"""Attention in slices: the same numbers in a part of the memory, and whole again for engines that want it so."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from slipcast.engines.onnxruntime import OnnxRuntimeEngine, ProfiledOnnxRuntimeEngine
from slipcast.progress import Advance
from slipcast.timing.memory import resident_mb
from slipcast_compiler.engines import onnxruntime
from slipcast_compiler.graph import qdq, slices
from slipcast_compiler.host.isolate import run_isolated

HEADS = 8
MASKS = {"bool": TensorProto.BOOL, "float32": TensorProto.FLOAT}


def attention(tokens: int, keys: int, width: int = 8, mask: Any = None, free: bool = False, **attributes: Any) -> Any:
    """One operator; its number of rows is free, and those of tokens and keys where that is so."""
    sizes = {"q": ("queries" if free else tokens), "k": ("keys" if free else keys), "v": ("keys" if free else keys)}
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", HEADS, size, width])
        for name, size in sizes.items()
    ]
    if mask is not None:
        inputs.append(helper.make_tensor_value_info("mask", MASKS[str(mask.dtype)], mask.shape))
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", HEADS, sizes["q"], width])
    node = helper.make_node("Attention", [value.name for value in inputs], ["out"], "attention", **attributes)
    graph = helper.make_graph([node], "g", inputs, [out])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def attention_twice() -> Any:
    model = attention(1500, 1500)
    model.graph.node.append(helper.make_node("Attention", ["out", "k", "v"], ["again"], "second"))
    model.graph.output.append(helper.make_tensor_value_info("again", TensorProto.FLOAT, ["batch", HEADS, 1500, 8]))
    model.graph.value_info.append(model.graph.output[0])
    return model


def arrays(rows: int, tokens: int, keys: int, width: int = 8) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    sizes = {"q": tokens, "k": keys, "v": keys}
    return {name: rng.standard_normal((rows, HEADS, size, width), dtype=np.float32) for name, size in sizes.items()}


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 3), tokens=st.integers(1, 70), keys=st.integers(1, 40), fit=st.integers(1, 80),
    mask=st.sampled_from([None, "bool", "float32"]), scale=st.sampled_from([None, 0.3]), free=st.booleans(),
)  # fmt: skip
def test_slices_of_any_size_are_what_torch_computes(
    rows: int, tokens: int, keys: int, fit: int, mask: str | None, scale: float | None, free: bool
) -> None:
    """`fit`: how many queries of a row fit into a slice."""
    given_arrays, rng, masks = arrays(rows, tokens, keys), np.random.default_rng(1), None
    if mask:
        noise = rng.standard_normal((1, 1, tokens, keys), dtype=np.float32)
        masks = noise > -0.5 if mask == "bool" else noise
        if mask == "bool":
            masks[..., 0] = True  # no query without a key
        given_arrays["mask"] = masks
    model = attention(tokens, keys, mask=masks, free=free, **({"scale": scale} if scale else {}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "SMALL", 0)
        patch.setattr(slices, "BYTES", 4 * rows * HEADS * keys * fit)
        found = qdq.session(model.SerializeToString())(given_arrays)["out"]
    q, k, v = (torch.from_numpy(given_arrays[name]) for name in "qkv")
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=None if masks is None else torch.from_numpy(masks), scale=scale
    )
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-5)


def test_several_in_one_graph() -> None:
    model = attention_twice()
    inputs = arrays(2, 1500, 1500)
    found = qdq.session(model.SerializeToString())(inputs)["again"]
    q, k, v = (torch.from_numpy(inputs[name]) for name in "qkv")
    attend = torch.nn.functional.scaled_dot_product_attention
    np.testing.assert_allclose(found, attend(attend(q, k, v), k, v).numpy(), rtol=1e-3, atol=1e-5)
    slices.slice_attention(model)
    assert [node.domain for node in model.graph.node] == [slices.PLAIN] * 2
    assert len(model.functions) == 1


@pytest.mark.parametrize("left", [{"tokens": 20, "keys": 20}, {"is_causal": 1}, {"softcap": 5.0}])
def test_what_is_small_or_more_than_two_products_is_left(left: dict[str, Any]) -> None:
    model = attention(**{"tokens": 1500, "keys": 1500, **left})
    before = model.SerializeToString()
    slices.slice_attention(model)
    assert model.SerializeToString() == before


def test_heads_in_the_width_are_left() -> None:
    sizes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4096, 64]) for name in "qkv"]
    node = helper.make_node("Attention", [*"qkv"], ["out"], q_num_heads=8, kv_num_heads=8)
    model = helper.make_model(helper.make_graph([node], "g", sizes, []))
    slices.slice_attention(model)
    assert not model.functions


@pytest.mark.parametrize("masked", [False, True])
def test_it_can_be_had_whole_again(masked: bool, tmp_path: Path) -> None:
    mask = np.ones((1, 1, 1500, 1500), np.float32) if masked else None
    onnx.save(attention(1500, 1500, mask=mask), tmp_path / "graph.onnx")
    (tmp_path / "engine").mkdir()
    files = onnxruntime.build(tmp_path / "graph.onnx", "fp32", tmp_path / "engine")
    sliced = tmp_path / "engine" / files.model
    onnx.checker.check_model(sliced)
    assert onnx.load(sliced) != onnx.load(tmp_path / "graph.onnx")
    assert slices.write_whole(sliced, tmp_path / "whole.onnx")
    assert onnx.load(tmp_path / "whole.onnx") == onnx.load(tmp_path / "graph.onnx")
    assert not slices.write_whole(tmp_path / "whole.onnx", tmp_path / "again.onnx")
    assert not (tmp_path / "again.onnx").exists()


def test_a_profile_tells_each_once(tmp_path: Path) -> None:
    model = attention_twice()
    slices.slice_attention(model)
    onnx.save(model, tmp_path / "graph.onnx")
    with ProfiledOnnxRuntimeEngine(tmp_path / "graph.onnx") as engine:
        engine.start_profile()
        begin = time.perf_counter()
        engine(arrays(2, 1500, 1500))
        took = time.perf_counter() - begin
        layers = engine.layers()
    assert len([layer for layer in layers if layer.kind == "Attention"]) == 2
    assert sum(layer.seconds for layer in layers) < took


def _run(model: Path, rows: int, tokens: int, width: int, _: Advance) -> float:
    """The megabytes that it took to have the engine and the arrays."""
    with OnnxRuntimeEngine(model) as engine:
        inputs, before = arrays(rows, tokens, tokens, width), resident_mb()
        engine(inputs)
    return before


def test_it_takes_the_memory_that_plans_count(tmp_path: Path) -> None:
    """And not that of all scores, of which there are 1.1 GB."""
    onnx.save(attention(4096, 4096, 40), tmp_path / "graph.onnx")
    (tmp_path / "engine").mkdir()
    onnxruntime.build(tmp_path / "graph.onnx", "fp32", tmp_path / "engine")
    done = run_isolated(_run, tmp_path / "engine" / "graph.onnx", 2, 4096, 40)
    without, peak = done.result, done.peak_memory_mb
    counted = slices.scores_bytes((2, HEADS, 4096, 40), 4096) / 1e6
    given = 2 * HEADS * 4096 * 40 * 4 / 1e6
    assert counted == pytest.approx(134 + 3 * given, abs=1)
    assert 0.5 * counted < peak - without < 1.25 * (counted + given)
