"""What stays in fp32 where the rest is cast: what overflows, what loses its angles, and nothing that does no harm."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from slipcast.engines.openvino import bf16_is_native, open_engine
from slipcast.errors import RecipeError
from slipcast_compiler.engines import Source, openvino
from slipcast_compiler.graph import qdq
from slipcast_compiler.graph.casting import cast_graph
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.precision.mixed import MAX_ERROR, WORST, measure_cast, search_graph, search_graphs, worst_error
from slipcast_compiler.recipe.reading import parse_target
from slipcast_compiler.recipe.targets import TargetTable

WIDTH = 32

Arrays = list[dict[str, Any]]  # by evaluation


def value(name: str, *shape: Any) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def save(path: Path, nodes: list[Any], inputs: list[Any], **weights: Any) -> Path:
    constants = [numpy_helper.from_array(np.asarray(array, np.float32), name) for name, array in weights.items()]
    constants.append(numpy_helper.from_array(np.array([-1, 1]), "shape"))
    graph = helper.make_graph(nodes, "g", inputs, [value("y", "batch", WIDTH)], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.save_model(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=64)
    return path


def recorded(model: Path, inputs: Arrays) -> Arrays:
    run = qdq.session(model)
    return [arrays | run(arrays) for arrays in inputs]


def write(folder: Path, model: Path, inputs: Arrays) -> None:
    folder.mkdir(parents=True)
    for i, arrays in enumerate(recorded(model, inputs)):
        np.savez(folder / f"{i:04}.npz", **arrays)


def find(model: Path, inputs: Arrays, precision: str, limit: float | None = None) -> dict[str, Any]:
    return search_graph(model, recorded(model, inputs), precision, limit or MAX_ERROR[precision])


def layer(name: str, read: str, gives: str) -> Any:
    return helper.make_node("MatMul", [read, f"{name}.w"], [gives], name=name)


@pytest.fixture
def overflowing(tmp_path: Path) -> Path:
    """Ten layers; what comes out of the fourth is around 1e6, and normalised again by the sixth."""
    rng, nodes, weights, last = np.random.default_rng(0), list[Any](), dict[str, Any](), "x"
    for i in range(10):
        weights[f"l{i}.w"] = rng.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5
        nodes.append(layer(f"l{i}", last, last := f"h{i}"))
        if i in (3, 5):
            weights[f"s{i}"] = np.array(1e3)
            kind = "Mul" if i == 3 else "Div"
            nodes += [helper.make_node(kind, [last, f"s{i}"], [f"a{i}"], name=f"scale{i}")]
            nodes += [helper.make_node(kind, [f"a{i}", f"s{i}"], [last := f"b{i}"], name=f"again{i}")]
    nodes.append(helper.make_node("Identity", [last], ["y"], name="end"))
    return save(tmp_path / "model.onnx", nodes, [value("x", "batch", WIDTH)], **weights)


@pytest.fixture
def angles(tmp_path: Path) -> Path:
    """As a timestep's embedding begins, sin(t * f), for t up to 1000; and eight layers after it."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Reshape", ["t", "shape"], ["column"], name="row"),
        helper.make_node("Mul", ["column", "f"], ["angle"], name="angles"),
        helper.make_node("Sin", ["angle"], ["h0"], name="wave"),
        *(layer(f"l{i}", f"h{i}", f"h{i + 1}" if i < 7 else "y") for i in range(8)),
    ]
    weights = {f"l{i}.w": rng.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5 for i in range(8)}
    return save(tmp_path / "angles.onnx", nodes, [value("t", 1)], f=rng.random((1, WIDTH)), **weights)


@pytest.fixture
def noise() -> Arrays:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((2, WIDTH), np.float32)} for _ in range(4)]


class TestSearch:
    def test_what_overflows_stays_and_nothing_else(self, overflowing: Path, noise: Arrays, tmp_path: Path) -> None:
        found = find(overflowing, noise, "fp16")
        assert found["error_all"] == WORST
        assert 0 < found["error"] < MAX_ERROR["fp16"]
        # From where it grows to where it is small again; what is on either side is rounded.
        assert (
            {"again3", "l4", "l5", "scale5"}
            <= found["fp32"].keys()
            <= {"scale3", "again3", "l4", "l5", "scale5", "again5"}
        )
        assert found["fp32"]["again3"] == "Mul" and found["nodes"] == 15
        cast_graph(overflowing, "fp16", out := tmp_path / "cast.onnx", found["fp32"])
        onnx.checker.check_model(out, full_check=True)
        types = {t.name: t.data_type for t in onnx.load(out, load_external_data=False).graph.initializer}
        assert types["l4.w"] == TensorProto.FLOAT and types["l3.w.fp16"] == TensorProto.FLOAT16

    def test_an_overflow_in_one_sample_alone(self, overflowing: Path, noise: Arrays, tmp_path: Path) -> None:
        quiet = [{"x": arrays["x"] * np.float32(1 if i == 1 else 1e-3)} for i, arrays in enumerate(noise)]
        found = find(overflowing, quiet, "fp16")
        assert found["error_all"] == WORST and "again3" in found["fp32"] and len(found["fp32"]) < 8

    def test_a_mask_may_become_infinite(self, noise: Arrays, tmp_path: Path) -> None:
        nodes = [
            helper.make_node("Add", ["x", "mask"], ["masked"], name="mask"),
            helper.make_node("Softmax", ["masked"], ["y"], name="softmax"),
        ]
        mask = np.where(np.arange(WIDTH) < 9, 0.0, np.finfo(np.float32).min)
        model = save(tmp_path / "mask.onnx", nodes, [value("x", "batch", WIDTH)], mask=mask)
        found = find(model, noise, "fp16")
        assert not found["fp32"]
        cast_graph(model, "fp16", tmp_path / "cast.onnx")

    def test_both_denoisers_of_feature_caching_keep_the_same(self, overflowing: Path, noise: Arrays) -> None:
        """They read one file of weights."""
        folder = overflowing.parent
        shallow = overflowing.with_name("shallow.onnx")
        model = onnx.load(overflowing, load_external_data=False)
        model.graph.node.pop(0)
        model.graph.node[0].input[0] = "x"
        model.graph.initializer.pop(0)
        onnx.save(model, shallow)
        models = {"denoiser": overflowing, "denoiser_shallow": shallow}
        for name, path in models.items():
            write(folder / name, path, noise)
        found = search_graphs(models, folder, "fp16", MAX_ERROR["fp16"], lambda done, total: None)
        kept = found["denoiser"]["fp32"]
        assert kept == found["denoiser_shallow"]["fp32"] and "again3" in kept
        places = []
        for name, path in models.items():
            (out := folder / f"out-{name}").mkdir()
            files = openvino.build(path, "bf16", out, list(kept))
            places.append(out / str(files.weights))
        assert places[1].name == "model.bin" and places[0].read_bytes() == places[1].read_bytes()

    def test_bf16_reaches_as_far_as_fp32(self, overflowing: Path, noise: Arrays) -> None:
        found = find(overflowing, noise, "bf16")
        assert not found["fp32"] and found["error"] == found["error_all"] < MAX_ERROR["bf16"]

    def test_a_weight_that_does_not_fit_stays(self, noise: Arrays, tmp_path: Path) -> None:
        nodes = [
            helper.make_node("Mul", ["x", "w"], ["a"], name="large"),
            helper.make_node("Div", ["a", "w"], ["y"], name="back"),
        ]
        model = save(tmp_path / "large.onnx", nodes, [value("x", "batch", WIDTH)], w=np.full(WIDTH, 1e5))
        found = find(model, noise, "fp16")
        assert found["fp32"] == {"large": "Mul", "back": "Div"}
        cast_graph(model, "fp16", tmp_path / "cast.onnx", found["fp32"])

    @pytest.mark.parametrize("precision", ["fp16", "bf16"])
    def test_angles_stay(self, precision: str, angles: Path, tmp_path: Path) -> None:
        timesteps = [{"t": np.full(1, t, np.float32)} for t in (987.3, 651.2, 333.3, 21.7)]
        found = find(angles, timesteps, precision)
        assert {"angles"} <= found["fp32"].keys() <= {"row", "angles", "wave"}
        assert found["error"] < MAX_ERROR[precision] < found["error_all"]

    def test_one_that_cannot_hold_ends_in_fp32(self, overflowing: Path, noise: Arrays) -> None:
        found = find(overflowing, noise, "fp16", 1e-9)
        assert len(found["fp32"]) == found["nodes"] and found["error"] == 0.0


def test_the_worst_output_counts() -> None:
    wanted = [{"a": np.ones(4), "b": np.full(4, 100.0)}]
    assert worst_error(wanted, [{"a": np.full(4, 1.5), "b": np.full(4, 101.0)}]) == pytest.approx(0.5)
    assert worst_error(wanted, [{"a": np.full(4, np.nan), "b": np.full(4, 100.0)}]) == WORST
    assert worst_error([{"a": np.zeros(2)}], [{"a": np.zeros(2)}]) == 0.0
    assert worst_error([{"a": np.zeros(2)}], [{"a": np.ones(2)}]) == WORST


class TestOpenVino:
    """Its bf16 is a hint to the engine; what is to stay in fp32 is marked in its graph."""

    def marked(self, graph: Path) -> set[str]:
        """A mark is written under another name by each version; none marks anything else of a graph of floats."""
        layers = ElementTree.parse(graph).findall("layers/layer")
        return {layer.get("name", "") for layer in layers if layer.find("rt_info") is not None} - {
            layer.get("name", "") for layer in layers if layer.get("type") == "Convert"
        }

    def test_layers_of_the_nodes_are_marked_with_their_weights(self, overflowing: Path, tmp_path: Path) -> None:
        openvino.build(overflowing, "bf16", tmp_path, ("l4", "scale5"))
        assert self.marked(tmp_path / "model.xml") == {"l4", "l4.w", "scale5", "s5"}
        constants = ElementTree.parse(tmp_path / "model.xml").findall("layers/layer[@type='Const']")
        types = {layer.get("name"): layer.find("data").get("element_type") for layer in constants}  # type: ignore[union-attr]
        assert types["l4.w"] == "f32" and types["l3.w_compressed"] == "f16"

    def test_the_sum_that_a_convolution_is_fused_with(self, tmp_path: Path) -> None:
        """Of 19 convolutions of the reference model, each followed by a sum, none ran that was in fp32 alone."""
        rng, latent = np.random.default_rng(0), ["batch", 8, 16, 16]
        weights = {
            f"{n}{k}": rng.standard_normal(shape).astype(np.float32) / 8
            for n in "ab"
            for k, shape in (("w", (8, 8, 1, 1)), ("b", (8,)))
        }
        nodes = [
            helper.make_node("Conv", ["x", "aw", "ab"], ["a"], name="first"),
            helper.make_node("Conv", ["a", "bw", "bb"], ["b"], name="second"),
            helper.make_node("Add", ["a", "b"], ["y"], name="sum"),
        ]
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, latent) for name in "xy"]
        graph = helper.make_graph(
            nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(w, n) for n, w in weights.items()]
        )
        onnx.save(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10),
            tmp_path / "model.onnx",
        )
        (tmp_path / "out").mkdir()
        files = openvino.build(tmp_path / "model.onnx", "bf16", tmp_path / "out", ("second",))
        assert "y" in self.marked(tmp_path / "out" / files.model)  # the sum
        with open_engine(tmp_path / "out" / files.model, tmp_path / "out" / str(files.weights), "bf16") as run:
            assert np.isfinite(run({"x": rng.standard_normal((2, 8, 16, 16), np.float32)})["y"]).all()

    def test_marked_nodes_are_exact_where_others_are_not(self, angles: Path, tmp_path: Path) -> None:
        """A timestep of 987.3 is 988 in bf16."""
        if not bf16_is_native():
            pytest.skip("this processor has no bf16")
        t, errors = {"t": np.full((1,), 987.3, np.float32)}, []
        wanted = qdq.session(angles)(t)
        for fp32 in ((), ("row", "angles", "wave")):
            out = tmp_path / f"out{len(fp32)}"
            out.mkdir()
            files = openvino.build(angles, "bf16", out, fp32)
            with open_engine(out / files.model, out / str(files.weights), "bf16") as run:
                errors.append(worst_error([wanted], [run(t)]))
        assert errors[0] > 0.1 > 0.02 > errors[1]


class TestTarget:
    def test_a_limit_is_for_what_is_cast(self) -> None:
        assert parse_target("openvino:bf16", ("max_cast_error=0.01",)).max_cast_error == 0.01
        assert parse_target("openvino:int8", ("max_cast_error=0.01",)).half == "bf16"
        for wanted in ("openvino:fp32", "onnxruntime:int8"):
            with pytest.raises(RecipeError, match="max_cast_error: nothing of"):
                parse_target(wanted, ("max_cast_error=0.01",))
        with pytest.raises(RecipeError, match="greater than 0"):
            parse_target("openvino:bf16", ("max_cast_error=0",))

    def test_what_is_found_is_kept_and_told(
        self, overflowing: Path, noise: Arrays, tmp_path: Path, caplog: Any
    ) -> None:
        inputs = tmp_path / "inputs-of-some-hash"
        write(inputs / "denoiser", overflowing, noise)
        table, sources = (
            TargetTable(engine="onnxruntime-gpu", precision="fp16"),
            {"denoiser": Source(overflowing, "source")},
        )
        with caplog.at_level(logging.INFO, "slipcast"):
            found = measure_cast(table, sources, inputs, Cache(tmp_path / "cache"), lambda done, total: None)
        assert "again3" in found["denoiser"]["fp32"]
        assert "denoiser in fp16: " in caplog.text and "of 15 nodes stay in fp32" in caplog.text
        overflowing.unlink()  # so that it comes from the cache
        assert measure_cast(table, sources, inputs, Cache(tmp_path / "cache"), lambda done, total: None) == found
