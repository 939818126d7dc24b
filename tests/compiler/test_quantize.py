"""INT8: options, the graph that holds it, the limit, protection, and what happens to a graph that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compiler.quantizing import quantise, recorded, write_samples
from slipcast.bundle.manifest import EngineFiles
from slipcast.engines import ENGINES
from slipcast.errors import CheckFailed, NumericalError, RecipeError
from slipcast_compiler.engines import BUILDERS, tensorrt
from slipcast_compiler.graph import qdq
from slipcast_compiler.precision.quantize import EngineCheck
from slipcast_compiler.precision.sensitivity import Found, search
from slipcast_compiler.recipe.passes import Quantize
from slipcast_compiler.recipe.reading import parse_recipe

CHANNELS, CELLS = 16, 4
LAYERS = {"conv_in", "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out", "conv_out"}


def tiny_denoiser() -> Any:
    """conv -> norm -> attention with one head -> residual -> conv, as a U-Net has them; one channel is an outlier."""
    rng = np.random.default_rng(0)
    linear = {f"attn.to_{name}": (CHANNELS, CHANNELS) for name in ("q", "k", "v", "out")}
    shapes = {"conv_in": (CHANNELS, 4, 3, 3), **linear, "conv_out": (4, CHANNELS, 3, 3)}
    weights = {name: rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:])) for name, shape in shapes.items()}
    gamma = np.ones(CHANNELS)
    gamma[3] = 30  # what SmoothQuant is for
    tensors = {f"model.{name}.weight": array for name, array in weights.items()}
    tensors |= {"model.norm.weight": gamma, "model.norm.bias": np.zeros(CHANNELS)}
    initializers = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in tensors.items()]
    for name, shape in (("tokens", [0, CHANNELS, -1]), ("cells", [0, CHANNELS, CELLS, CELLS])):
        initializers.append(numpy_helper.from_array(np.array(shape, np.int64), name))

    def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> Any:
        return helper.make_node(kind, inputs, [output], f"node_{output}", **attributes)

    nodes = [
        node("Conv", ["sample", "model.conv_in.weight"], "features", pads=[1, 1, 1, 1]),
        node("Reshape", ["features", "tokens"], "rows"),
        node("Transpose", ["rows"], "x", perm=[0, 2, 1]),
        node("LayerNormalization", ["x", "model.norm.weight", "model.norm.bias"], "normed"),
        *(node("MatMul", ["normed", f"model.attn.to_{name}.weight"], name) for name in "qkv"),
        node("Transpose", ["k"], "kt", perm=[0, 2, 1]),
        node("MatMul", ["q", "kt"], "scores"),
        node("Softmax", ["scores"], "shares"),
        node("MatMul", ["shares", "v"], "mixed"),
        node("MatMul", ["mixed", "model.attn.to_out.weight"], "attended"),
        node("Add", ["attended", "x"], "sum"),
        node("Transpose", ["sum"], "turned", perm=[0, 2, 1]),
        node("Reshape", ["turned", "cells"], "grid"),
        node("Conv", ["grid", "model.conv_out.weight"], "prediction", pads=[1, 1, 1, 1]),
    ]
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 4, CELLS, CELLS])
        for n in ("sample", "prediction")
    ]
    graph = helper.make_graph(nodes, "tiny", ends[:1], ends[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "denoiser.onnx"
    qdq.save(tiny_denoiser(), path)
    return path


@pytest.fixture(scope="module")
def samples(source: Path) -> Path:
    return write_samples(source, CELLS, 12)


def int8_weights(model: Path) -> dict[str, tuple[int, ...]]:
    graph = onnx.load(model).graph
    types = {tensor.name: tensor for tensor in graph.initializer}
    read = [
        types[node.input[0]] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in types
    ]
    return {tensor.name: tuple(tensor.dims) for tensor in read if tensor.data_type == TensorProto.INT8}


class TestRecipe:
    GOOD = 'name = "x"\n[model]\npath = "m"\n[[targets]]\nengine = "openvino"\nprecision = "int8"\n[passes.quantize]\n'

    def test_good(self) -> None:
        parsed = parse_recipe(self.GOOD + 'protect = ["conv_*"]', "r.toml")
        assert parsed.passes.quantize == Quantize(protect=("conv_*",))

    @pytest.mark.parametrize(
        "line", ["samples = 0", "smooth_quant_alpha = 1.5", "max_error = 0", "weights_only = 1", "bits = 4"]
    )
    def test_options_have_lines(self, line: str) -> None:
        with pytest.raises(RecipeError, match=rf"r\.toml:8: passes\.quantize\.{line.split()[0]}"):
            parse_recipe(self.GOOD + line, "r.toml")

    def test_target_without_table(self) -> None:
        with pytest.raises(RecipeError, match=r"a target in int8 needs \[passes\.quantize\]"):
            parse_recipe(self.GOOD.replace("[passes.quantize]", ""), "r.toml")

    def test_table_without_target(self) -> None:
        with pytest.raises(RecipeError, match="no target has precision int8"):
            parse_recipe(self.GOOD.replace('"int8"', '"bf16"'), "r.toml")
        with pytest.raises(RecipeError, match=r"(?s)2 problems.*r\.toml:7: passes.quantize: no target has precision"):
            parse_recipe(self.GOOD.replace('"int8"', '"bf16"') + "[decode]\ntile = 1", "r.toml")


class TestGraph:
    def test_all_layers_are_int8_and_nothing_else(self, source: Path, samples: Path, tmp_path: Path) -> None:
        model, report = quantise(source, samples, tmp_path / "out", max_error=1.0)
        assert (report["layers"], report["quantised"], report["kept"]) == (6, 6, {})
        weights = int8_weights(model)
        assert len(weights) == len(LAYERS)
        assert sorted(weights.values()) == sorted(
            [(CHANNELS, 4, 3, 3), (4, CHANNELS, 3, 3), *[(CHANNELS, CHANNELS)] * 4]
        )
        graph = onnx.load(model).graph
        types = {output: node.op_type for node in graph.node for output in node.output}
        for node in graph.node:
            fed = [types.get(name) == "DequantizeLinear" for name in node.input]
            quantised = node.op_type in qdq.WEIGHTED and node.name not in ("node_scores", "node_mixed")
            # "x" is read by a quantised layer's norm and by the residual sum, which must not lose precision
            assert all(fed) if quantised else not any(fed), node.name
        assert 0 < report["error"] < 0.2
        assert (model.with_name("denoiser.onnx.data")).stat().st_size < source.with_name(
            "denoiser.onnx.data"
        ).stat().st_size

    def test_smoothing_is_exact_and_helps(self, source: Path, samples: Path, tmp_path: Path) -> None:
        _, plain = quantise(source, samples, tmp_path / "plain", max_error=10.0, smooth_quant_alpha=0.0)
        _, smoothed = quantise(source, samples, tmp_path / "smooth", max_error=10.0, smooth_quant_alpha=0.5)
        assert (plain["smoothed_norms"], smoothed["smoothed_norms"]) == (0, 1)
        assert smoothed["error"] < plain["error"]
        model = onnx.load(source)
        nodes = {name for names in qdq.layers_of(model.graph).values() for name in names}
        peak = np.linspace(0.0, 5.0, CHANNELS, dtype=np.float32)
        assert qdq.smooth(model, nodes, 0.5, lambda names: dict.fromkeys(names, peak)) == 1
        qdq.save(model, tmp_path / "exact.onnx")
        assert recorded(samples).error(qdq.session(tmp_path / "exact.onnx")) < 1e-5

    def test_weights_only(self, source: Path, samples: Path, tmp_path: Path) -> None:
        model, report = quantise(source, samples, tmp_path / "weights", weights_only=True, max_error=1.0)
        kinds = [node.op_type for node in onnx.load(model).graph.node]
        assert (kinds.count("QuantizeLinear"), kinds.count("DequantizeLinear")) == (0, 6)
        _, both = quantise(source, samples, tmp_path / "both", max_error=1.0, smooth_quant_alpha=0.0)
        assert 0 < report["error"] < both["error"]

    def test_the_limit_holds(self, source: Path, samples: Path, tmp_path: Path) -> None:
        _, free = quantise(source, samples, tmp_path / "free", max_error=1.0)
        limit = free["error"] / 2
        model, report = quantise(source, samples, tmp_path / "bound", max_error=limit)
        assert report["error_all"] == pytest.approx(free["error"])
        assert report["error"] <= limit
        assert recorded(samples).error(qdq.session(model)) == pytest.approx(report["error"])
        assert 0 < report["quantised"] < 6
        assert set(report["kept"].values()) == {"damage"}
        alone = {layer: error for layer, count, error in report["tried"] if count == 1}
        others = [error for layer, error in alone.items() if layer not in report["kept"]]
        assert all(alone[layer] >= max(others, default=0.0) for layer in report["kept"])

    def test_a_limit_without_measurements(self, source: Path, samples: Path, tmp_path: Path) -> None:
        _, report = quantise(source, samples, tmp_path / "out", max_error=1e-6, measurements=0)
        assert (report["quantised"], report["tried"]) == (0, [])
        assert report["error"] <= 1e-6  # smoothing rounds

    def test_protected_layers_stay(self, source: Path, samples: Path, tmp_path: Path) -> None:
        model, report = quantise(source, samples, tmp_path / "out", protect=("conv_*",), max_error=1.0)
        assert report["kept"] == {"conv_in": "protected", "conv_out": "protected"}
        assert not any("conv" in name for name in int8_weights(model))
        assert len(int8_weights(model)) == 4
        with pytest.raises(RecipeError, match=r"'convv\*' fits no layer"):
            quantise(source, samples, tmp_path / "none", protect=("convv*",))

    def test_zero_strength_changes_nothing(self, source: Path, samples: Path, tmp_path: Path) -> None:
        model, report = quantise(source, samples, tmp_path / "out", protect=("*",))
        assert (report["quantised"], report["error"], report["smoothed_norms"]) == (0, 0.0, 0)
        assert recorded(samples).error(qdq.session(model)) == 0.0


class TestSigned:
    """What TensorRT reads."""

    def test_symmetric_ranges_are_the_same_numbers(self, source: Path, samples: Path, tmp_path: Path) -> None:
        model, report = quantise(source, samples, tmp_path / "out", max_error=1.0, symmetric=True)
        signed = tmp_path / "signed" / "denoiser.onnx"
        signed.parent.mkdir()
        assert qdq.make_signed(model, signed) == 0
        graph = onnx.load(signed).graph
        tensors = {tensor.name: tensor for tensor in graph.initializer}
        zeros = [tensors[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"]
        assert {(zero.data_type, numpy_helper.to_array(zero).item()) for zero in zeros} == {(TensorProto.INT8, 0)}
        (sample,) = ({"sample": arrays["sample"]} for arrays in [np.load(samples / "0003.npz")])
        np.testing.assert_array_equal(*(qdq.session(path)(sample)["prediction"] for path in (model, signed)))
        check = EngineCheck(model, recorded(samples), report["error"])
        check("tensorrt-rtx", tmp_path, EngineFiles(model="denoiser.engine"))

    def test_other_ranges_are_widened(self, source: Path, samples: Path, tmp_path: Path) -> None:
        model, report = quantise(source, samples, tmp_path / "out", max_error=1.0)
        assert qdq.make_signed(model, tmp_path / "signed.onnx") > 0
        widened = recorded(samples).error(qdq.session(tmp_path / "signed.onnx"))
        assert 0 < widened < report["error"] * 2.5

    @pytest.mark.skipif(not ENGINES["tensorrt-rtx"].can_build(), reason="tensorrt-rtx is not installed")
    @pytest.mark.parametrize("capabilities", [(), ("8.6", "8.9")])
    def test_tensorrt_builds(
        self, source: Path, samples: Path, tmp_path: Path, capabilities: tuple[str, ...], caplog: Any
    ) -> None:
        model, _ = quantise(source, samples, tmp_path / "out", max_error=1.0)
        (tmp_path / "engine").mkdir()
        options = tensorrt.Options("tensorrt_rtx", (("batch", (1, 2, 8)),), capabilities)
        files = tensorrt.build(model, "int8", tmp_path / "engine", options)
        assert (tmp_path / "engine" / files.model).stat().st_size > 0
        assert "ranges of activations were widened" in caplog.text


class TestSearch:
    """Errors that add up in squares, of layers that are named by their place."""

    def found(self, alone: dict[str, float], limit: float, budget: int = 1000) -> tuple[Found, list[int]]:
        sizes = []

        def error(chosen: frozenset[str], samples: int) -> float:
            sizes.append(len(chosen))
            return float(sum(alone[layer] ** 2 for layer in chosen) ** 0.5)

        return search(list(alone), error, limit, budget, _ignore), sizes

    def test_the_worst_layer_is_kept(self) -> None:
        found, _ = self.found({"a": 0.3, "b": 0.1, "c": 0.4, "d": 0.0}, 0.35)
        assert (found.kept, found.error) == (("c",), pytest.approx(0.1**0.5))

    def test_few_bad_layers_are_found_without_trying_all(self) -> None:
        alone = {f"layer{i}": 1.0 if i in (17, 200) else 1e-3 for i in range(256)}
        found, sizes = self.found(alone, 0.1)
        assert set(found.kept) == {"layer17", "layer200"}
        assert len(sizes) < 40

    @pytest.mark.parametrize("limit", [0.1, 0.2, 0.5, 0.8])
    def test_the_same_as_by_trying_all(self, limit: float) -> None:
        rng = np.random.default_rng(0)
        alone = {f"layer{i}": float(error) for i, error in enumerate(rng.lognormal(-3, 1.5, 40))}
        found, sizes = self.found(alone, limit)
        worst = sorted(alone, key=lambda layer: -alone[layer])
        assert set(found.kept) == set(worst[: len(found.kept)])
        assert found.error <= limit < self.found({k: alone[k] for k in worst[len(found.kept) - 1 :]}, 99.0)[0].error
        assert len(sizes) <= 2 * len(alone)

    @pytest.mark.parametrize("budget", [0, 1, 2, 6, 12])
    def test_a_budget_holds_and_costs_layers_only(self, budget: int) -> None:
        found, sizes = self.found({f"layer{i}": 1.0 if i == 9 else 1e-3 for i in range(64)}, 0.1, budget)
        assert len(found.tried) <= budget and len(sizes) <= budget + 2
        assert found.error <= 0.1 and "layer9" in found.kept
        assert len(found.kept) == 64 // 2 ** (budget // 2)

    def test_errors_that_do_not(self) -> None:
        found = search(list("abcd"), lambda chosen, _: 0.0 if len(chosen) < 2 else 1.0, 0.5, 1000, _ignore)
        assert len(found.quantised) < 2 and found.error == 0.0


def _ignore(done: int, total: int) -> None:
    pass


@pytest.mark.parametrize("engine", [name for name in ENGINES if "int8" in ENGINES[name].precisions])
class TestEngines:
    def built(self, engine: str, model: Path, out: Path) -> Any:
        if not ENGINES[engine].available():
            pytest.skip(ENGINES[engine].why_not())
        out.mkdir()
        return BUILDERS[engine](model, "int8", out)

    def test_an_engine_that_reads_the_graph_right(
        self, engine: str, source: Path, samples: Path, tmp_path: Path
    ) -> None:
        model, report = quantise(source, samples, tmp_path / "quantized", max_error=1.0)
        files = self.built(engine, model, tmp_path / "engine")
        check = EngineCheck(model, recorded(samples), report["error"])
        check(engine, tmp_path / "engine", files)

    def test_a_wrong_graph_is_caught(self, engine: str, source: Path, samples: Path, tmp_path: Path) -> None:
        path, report = quantise(source, samples, tmp_path / "quantized", max_error=1.0)
        model = onnx.load(path)
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        weights = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in tensors]
        scale = tensors[weights[-1].input[1]]
        scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(1.5), scale.name))
        (tmp_path / "wrong").mkdir()
        qdq.save(model, tmp_path / "wrong" / "denoiser.onnx")
        files = self.built(engine, tmp_path / "wrong" / "denoiser.onnx", tmp_path / "engine")
        with pytest.raises(CheckFailed, match=f"{engine} gives other numbers"):
            EngineCheck(path, recorded(samples), report["error"])(engine, tmp_path / "engine", files)


def test_predictions_that_are_not_finite(samples: Path) -> None:
    with pytest.raises(NumericalError, match="not finite"):
        recorded(samples).error(lambda inputs: {"prediction": inputs["sample"] * np.nan})
