"""INT8 attention: which gains, what it is divided by, and what engines are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compiler.quantizing import contract, quantise, recorded, write_samples
from slipcast.engines import ENGINES, open_engine
from slipcast_compiler.engines import BUILDERS
from slipcast_compiler.graph import qdq, sdpa
from slipcast_compiler.precision.quantize import EngineCheck

SIDE, HEADS, WIDTH = 32, 2, 8
CHANNELS, TOKENS = HEADS * WIDTH, SIDE * SIDE
NAME = "mid.attn1.sdpa"


def denoiser(tokens: int = TOKENS, **attributes: Any) -> Any:
    """Self-attention over the first `tokens` keys, with projections and a residual sum."""
    rng = np.random.default_rng(0)
    layers = {"in": (4, CHANNELS), "out": (CHANNELS, 4)}
    layers |= {f"mid.attn1.to_{name}": (CHANNELS, CHANNELS) for name in ("q", "k", "v", "out.0")}
    arrays = {f"model.{n}.weight": rng.standard_normal(s) / np.sqrt(s[0]) for n, s in layers.items()}
    tensors = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()]
    sizes = {
        "rows": [0, 4, -1],
        "heads": [0, -1, HEADS, WIDTH],
        "joined": [0, -1, CHANNELS],
        "cells": [0, 4, SIDE, SIDE],
    }
    sizes |= {"begin": [0], "end": [tokens], "axis": [2]}
    tensors += [numpy_helper.from_array(np.array(size, np.int64), name) for name, size in sizes.items()]

    def node(kind: str, inputs: str, output: str, **more: Any) -> Any:
        return helper.make_node(kind, inputs.split(), [output], f"node_{output}", **more)

    nodes = [
        node("Reshape", "sample rows", "flat"),
        node("Transpose", "flat", "cells_last", perm=[0, 2, 1]),
        node("MatMul", "cells_last model.in.weight", "x"),
    ]
    for name in "qkv":
        nodes += [
            node("MatMul", f"x model.mid.attn1.to_{name}.weight", name),
            node("Reshape", f"{name} heads", f"{name}4"),
            node("Transpose", f"{name}4", f"{name}t", perm=[0, 2, 1, 3]),
        ]
    nodes += [
        *(node("Slice", f"{name}t begin end axis", f"{name}s") for name in "kv"),
        node("Attention", "qt ks vs", "mixed", **attributes),
        node("Transpose", "mixed", "mixed_t", perm=[0, 2, 1, 3]),
        node("Reshape", "mixed_t joined", "mixed_3"),
        node("MatMul", "mixed_3 model.mid.attn1.to_out.0.weight", "attended"),
        node("Add", "attended x", "sum"),
        node("MatMul", "sum model.out.weight", "four"),
        node("Transpose", "four", "four_t", perm=[0, 2, 1]),
        node("Reshape", "four_t cells", "prediction"),
    ]
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 4, SIDE, SIDE]) for n in ("sample", "prediction")
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "denoiser.onnx"
    qdq.save(denoiser(), path)
    return path


@pytest.fixture(scope="module")
def samples(source: Path) -> Path:
    return write_samples(source, SIDE, 4)


def noted(model: Path) -> list[str]:
    return [p.value for node in onnx.load(model).graph.node for p in node.metadata_props if p.key == sdpa.SCALES]


class TestWhich:
    def test_it_is_named_after_its_module(self) -> None:
        assert sdpa.attentions_of(denoiser().graph) == {NAME: "node_mixed"}

    @pytest.mark.parametrize("more", [{"tokens": sdpa.TOKENS - 1}, {"is_causal": 1}, {"softcap": 5.0}])
    def test_what_gains_nothing_or_is_more_than_two_products_is_left(self, more: Any) -> None:
        assert sdpa.attentions_of(denoiser(**more).graph) == {}

    def test_masks_are_left(self) -> None:
        model = denoiser()
        next(node for node in model.graph.node if node.op_type == "Attention").input.append("mask")
        assert sdpa.attentions_of(model.graph) == {}


def test_scales_are_those_of_the_largest_seen() -> None:
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((2, HEADS, TOKENS, WIDTH)).astype(np.float32) for _ in range(3))
    given = {"qt": q, "ks": k, "vs": v}
    found = sdpa.scales_of(denoiser().graph, ["node_mixed"], lambda inputs: given, [{}])["node_mixed"]
    scores = np.exp(q @ k.swapaxes(-1, -2) / np.sqrt(WIDTH))
    most = (scores / scores.sum(-1, keepdims=True)).max()
    wanted = [np.abs(q).max() / 127, np.abs(k).max() / 127, np.abs(v).max() / 127, most / 255]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("scale", [None, 0.25])
def test_spelled_out_it_is_the_same_but_for_rounding(source: Path, samples: Path, tmp_path: Path, scale: Any) -> None:
    model = denoiser(**({"scale": scale} if scale else {}))
    qdq.save(model, tmp_path / "whole.onnx")
    whole = qdq.session(tmp_path / "whole.onnx")
    fine = [1e-2, 1e-2, 1e-2, 1e-4]
    sdpa.annotate(model, {"node_mixed": fine})
    (tmp_path / "noted").mkdir()
    (tmp_path / "out").mkdir()
    qdq.save(model, tmp_path / "noted" / "denoiser.onnx")
    parts = sdpa.spelled_out(tmp_path / "noted" / "denoiser.onnx", tmp_path / "out")
    assert parts.parent == tmp_path / "out"
    kinds = [node.op_type for node in onnx.load(parts).graph.node]
    assert (kinds.count("Attention"), kinds.count("Softmax"), kinds.count("QuantizeLinear")) == (0, 1, 4)
    small = {"sample": 0.1 * np.load(samples / "0000.npz")["sample"]}  # so that it fits the scales
    found, wanted = (qdq.session(parts)(small)["prediction"], whole(small)["prediction"])
    assert 0 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.03
    assert sdpa.spelled_out(source, tmp_path) == source  # there is nothing to do


class TestQuantize:
    def test_the_graph_holds_it_whole(self, source: Path, samples: Path, tmp_path: Path) -> None:
        model, report = quantise(source, samples, tmp_path / "out", max_error=1.0)
        assert (report["attentions"], report["attentions_quantised"], report["layers"]) == (1, 1, 7)
        assert len(noted(model)) == 1
        assert [node.op_type for node in onnx.load(model).graph.node].count("Attention") == 1
        spelled = sdpa.spelled_out(model, samples)  # any directory will do
        error = recorded(samples).error(qdq.session(spelled))
        assert error == pytest.approx(report["error"], rel=1e-3)
        assert recorded(samples).error(qdq.session(model)) < error

    @pytest.mark.parametrize(
        ("options", "kept"),
        [
            ({"protect": ("*.sdpa",), "max_error": 1.0}, {NAME: "protected"}),
            ({"max_error": 1e-7, "measurements": 0}, None),
        ],
    )
    def test_it_is_kept_as_layers_are(
        self, source: Path, samples: Path, tmp_path: Path, options: Any, kept: Any
    ) -> None:
        model, report = quantise(source, samples, tmp_path / "out", **options)
        assert report["attentions_quantised"] == 0
        assert noted(model) == []
        assert kept is None or report["kept"] == kept

    def test_weights_only_leaves_it(self, source: Path, samples: Path, tmp_path: Path) -> None:
        model, report = quantise(source, samples, tmp_path / "out", max_error=1.0, weights_only=True)
        assert (report["attentions"], noted(model)) == (0, [])

    @pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
    def test_engines(self, engine: str, source: Path, samples: Path, tmp_path: Path) -> None:
        """OpenVINO computes it in INT8, as was measured; ONNX Runtime as it was."""
        if not ENGINES[engine].available():
            pytest.skip(ENGINES[engine].why_not())
        model, report = quantise(source, samples, tmp_path / "out", max_error=1.0)
        (tmp_path / "engine").mkdir()
        files = BUILDERS[engine](model, "int8", tmp_path / "engine")
        assert sorted(f.name for f in (tmp_path / "engine").iterdir()) == sorted(
            filter(None, (files.model, files.weights))
        )
        EngineCheck(model, recorded(samples), report["error"])(engine, tmp_path / "engine", files)
        paths = tmp_path / "engine" / files.model, tmp_path / "engine" / files.weights if files.weights else None
        exact = recorded(samples).error(qdq.session(model))
        with open_engine(engine, *paths, "fp32" if engine == "openvino" else "int8", contract(SIDE)) as run:
            error = recorded(samples).error(run)
        assert (error > 1.02 * exact) is (engine == "openvino"), (error, exact, report["error"])
        # With bf16 for the rest, where the engine computes in it.
        with open_engine(engine, *paths, "int8", contract(SIDE)) as run:
            assert recorded(samples).error(run) < report["error"] + 0.02
