"""INT4: weights in 4 bits, the graph that reads them, what is left alone, the limit, and engines that read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from slipcast.bundle.manifest import Component, TensorSpec
from slipcast.engines import ENGINES
from slipcast.errors import CheckFailed, NumericalError, RecipeError, ResourceError
from slipcast.progress import silent
from slipcast_compiler.engines import BUILDERS
from slipcast_compiler.export.slots import write_adapted
from slipcast_compiler.graph import int4, qdq
from slipcast_compiler.graph.linear import linear_layers
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.precision.evaluations import Evaluations
from slipcast_compiler.precision.int4 import check_of, choose, quantize_graph, quantize_weights
from slipcast_compiler.recipe.passes import QuantizeInt4
from slipcast_compiler.recipe.reading import parse_recipe

INPUTS, HIDDEN = 64, 96
WITHOUT_BRANCH = int4.Packing(group=32, rank=0)


def graph_of(*nodes: Any, **weights: Any) -> Any:
    """sample [batch, 64] -> prediction [batch, 64]."""
    constants = [
        numpy_helper.from_array(np.asarray(each, np.float32), f"model.{name}") for name, each in weights.items()
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", INPUTS]) for n in ("sample", "prediction")]
    graph = helper.make_graph(list(nodes), "g", ends[:1], ends[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def node(kind: str, inputs: str, output: str, **attributes: Any) -> Any:
    """Inputs with a dot are weights."""
    names = [f"model.{name}" if "." in name else name for name in inputs.split()]
    return helper.make_node(kind, names, [output], f"node_{output}", **attributes)


def perceptron() -> Any:
    """A linear layer as MatMul, one as Gemm with a bias, and a branch that reads the first one's weight again."""
    rng = np.random.default_rng(0)
    return graph_of(
        node("MatMul", "sample up.weight.T", "hidden"),
        node("Relu", "hidden", "bent"),
        node("Gemm", "bent down.weight down.bias", "once", transB=1),
        node("MatMul", "once up.weight.T", "again"),
        node("MatMul", "again out.weight.T", "prediction"),
        **{
            "up.weight.T": rng.standard_normal((INPUTS, HIDDEN)) / 8,
            "down.weight": rng.standard_normal((INPUTS, HIDDEN)) / 8,
            "down.bias": rng.standard_normal(INPUTS),
            "out.weight.T": rng.standard_normal((HIDDEN, INPUTS)) / 8,
        },
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "denoiser.onnx"
    qdq.save(perceptron(), path)
    return path


@pytest.fixture(scope="module")
def recorded(source: Path) -> Evaluations:
    (folder := source.parent / "samples").mkdir()
    rng, run = np.random.default_rng(1), qdq.session(source)
    for place in range(4):
        sample = rng.standard_normal((8, INPUTS)).astype(np.float32)
        np.savez(folder / f"{place:04}.npz", sample=sample, prediction=run({"sample": sample})["prediction"])
    return Evaluations(folder)


def quantise(source: Path, recorded: Evaluations, out: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
    out.mkdir()
    quantize_graph(source, recorded, QuantizeInt4(**options), out, lambda done, total: None)
    spec = {name: TensorSpec(name=name, dtype="float32", shape=("batch", INPUTS)) for name in ("sample", "prediction")}
    contract = Component(inputs=(spec["sample"],), outputs=(spec["prediction"],))
    (out / "denoiser.json").write_text(contract.model_dump_json())
    return out / "denoiser.onnx", json.loads((out / "quantize.json").read_text())


class TestPack:
    @settings(deadline=None, max_examples=60)
    @given(
        seed=st.integers(0, 2**32 - 1),
        inputs=st.sampled_from([32, 48, 64, 160, 256]),
        outputs=st.integers(1, 300),
        group=st.sampled_from([16, 32, 64, 128]),
        rank=st.sampled_from([0, 4, 16]),
        spread=st.sampled_from([1.0, 1e-6, 1e6]),
    )
    def test_what_is_packed_stands_for_the_weight(
        self, seed: int, inputs: int, outputs: int, group: int, rank: int, spread: float
    ) -> None:
        rng = np.random.default_rng(seed)
        weight = (rng.standard_normal((inputs, outputs)) * spread).astype(np.float32)
        packing = int4.Packing(group, rank)
        made = int4.pack(weight, rng.random(inputs).astype(np.float32), packing)
        assert made.scales.shape == (inputs // packing.group_of(inputs), outputs) and len(made.scales) > 1
        assert -8 <= made.integers.astype(int).min() <= made.integers.astype(int).max() <= 7
        # Rounding alone is off by half of a step, clipped weights by more: never by as much as they are.
        assert np.linalg.norm(made.whole() - weight) < 0.25 * np.linalg.norm(weight)

    @given(seed=st.integers(0, 2**32 - 1), spread=st.floats(1e-3, 1e3))
    @settings(deadline=None, max_examples=30)
    def test_what_4_bits_hold_is_exact(self, seed: int, spread: float) -> None:
        integers = np.random.default_rng(seed).integers(-7, 8, (64, 5))
        integers[::32] = 7  # the largest of every group
        weight = (integers * spread).astype(np.float32)
        found = int4.pack(weight, np.ones(64, np.float32), WITHOUT_BRANCH)
        assert found.whole() == pytest.approx(weight, rel=1e-5)
        assert (found.integers.astype(int) == integers).all()

    def test_nothing_and_what_is_not_asked_for(self) -> None:
        nothing = int4.pack(np.zeros((32, 3), np.float32), np.zeros(32, np.float32), int4.Packing(16, 4))
        assert not nothing.whole().any() and np.isfinite(nothing.scales).all()
        assert int4.pack(np.ones((32, 3), np.float32), np.ones(32, np.float32), WITHOUT_BRANCH).down.shape == (32, 0)

    def test_inputs_that_are_large_count_for_more(self) -> None:
        rng = np.random.default_rng(3)
        weight, importance = rng.standard_normal((64, 50)).astype(np.float32), np.ones(64, np.float32)
        importance[:8] = 1e4
        weight[8:16] *= 4  # outliers that do not matter
        by_weight = int4.pack(weight, importance, WITHOUT_BRANCH).whole() - weight
        evenly = int4.pack(weight, np.ones(64, np.float32), WITHOUT_BRANCH).whole() - weight
        assert np.linalg.norm(by_weight[:8]) < 0.9 * np.linalg.norm(evenly[:8])

    def test_the_branch_takes_what_is_of_low_rank(self) -> None:
        rng = np.random.default_rng(4)
        small = rng.standard_normal((128, 96)) * 0.01
        weight = (small + rng.standard_normal((128, 3)) @ rng.standard_normal((3, 96))).astype(np.float32)
        without, with_it = (
            np.linalg.norm(int4.pack(weight, np.ones(128, np.float32), int4.Packing(64, rank)).whole() - weight)
            for rank in (0, 4)
        )
        assert with_it < 0.02 * without


class TestGraph:
    def test_layers(self) -> None:
        layers = int4.packable_layers(perceptron().graph)
        assert {name: len(each) for name, each in layers.items()} == {"up": 2, "down": 1, "out": 1}
        assert layers["down"] == [int4.Linear("node_once", "model.down.weight", HIDDEN, INPUTS, True)]

    @pytest.mark.parametrize(
        ("made", "shape"),
        [
            (node("MatMul", "sample odd.weight", "prediction"), (40, 64)),  # no multiple of 16
            (node("MatMul", "sample odd.weight", "prediction"), (16, 64)),  # one group alone
            (node("MatMul", "sample odd.weight", "prediction"), (2, 64, 64)),
            (node("MatMul", "odd.weight sample", "prediction"), (64, 64)),
            (node("Gemm", "sample odd.weight", "prediction", transA=1), (64, 64)),
            (node("Gemm", "sample odd.weight", "prediction", alpha=0.5), (64, 64)),
            (node("Gather", "sample odd.weight", "prediction"), (64, 64)),
        ],
    )
    def test_what_is_left_alone(self, made: Any, shape: tuple[int, ...]) -> None:
        assert not int4.packable_layers(graph_of(made, **{"odd.weight": np.ones(shape)}).graph)

    def test_weights_that_others_read(self) -> None:
        """Tied embeddings, and one weight that is read both ways."""
        for other in (
            node("Gather", "odd.weight sample", "again"),
            node("Gemm", "sample odd.weight", "again", transB=1),
        ):
            model = graph_of(
                node("MatMul", "sample odd.weight", "prediction"), other, **{"odd.weight": np.ones((64, 64))}
            )
            assert not int4.packable_layers(model.graph)

    @pytest.mark.parametrize("rank", [0, 8])
    def test_it_computes_what_the_packed_weights_say(self, source: Path, tmp_path: Path, rank: int) -> None:
        original, packing = onnx.load(source, load_external_data=False), int4.Packing(16, rank)
        layers = int4.packable_layers(original.graph)
        ones = {linear.weight: np.ones(linear.inputs, np.float32) for each in layers.values() for linear in each}
        tensors = int4.pack_all(original.graph, source.parent, layers, ones, packing, tmp_path / "packed")
        onnx.save(int4.with_int4(original, layers, tensors, packing), tmp_path / "made.onnx")
        (tmp_path / f"{source.name}.data").write_bytes(source.with_name(f"{source.name}.data").read_bytes())
        x = np.random.default_rng(5).standard_normal((3, INPUTS)).astype(np.float32)
        found = qdq.session(tmp_path / "made.onnx")({"sample": x})["prediction"]

        weights = {each.name: numpy_helper.to_array(each) for each in onnx.load(source).graph.initializer}
        up, down, out = (
            int4.pack(weight, np.ones(len(weight), np.float32), packing).whole()
            for weight in (weights["model.up.weight.T"], weights["model.down.weight"].T, weights["model.out.weight.T"])
        )
        once = np.maximum(x @ up, 0) @ down + weights["model.down.bias"]
        assert found == pytest.approx(once @ up @ out, rel=1e-3, abs=1e-3)


class TestQuantise:
    def test_all_layers(self, source: Path, recorded: Evaluations, tmp_path: Path) -> None:
        model, report = quantise(source, recorded, tmp_path / "out", max_error=1.0)
        assert (report["layers"], report["quantised"], report["kept"]) == (3, 3, {})
        assert (
            report["error"] == pytest.approx(recorded.error(qdq.session(model)), rel=1e-6) and 0 < report["error"] < 0.3
        )
        types = {each.name: each.data_type for each in onnx.load(model).graph.initializer}
        assert sorted(name for name, kind in types.items() if kind == TensorProto.INT4) == [
            "model.down.weight.int4", "model.out.weight.T.int4", "model.up.weight.T.int4", "model.up.weight.T.int4.1",
        ]  # fmt: skip
        assert not {"model.up.weight.T", "model.down.weight", "model.out.weight.T"} & types.keys()

    def test_layers_are_kept_until_the_limit_holds(self, source: Path, recorded: Evaluations, tmp_path: Path) -> None:
        whole = quantise(source, recorded, tmp_path / "whole", max_error=1.0)[1]["error"]
        _, report = quantise(source, recorded, tmp_path / "out", max_error=0.8 * whole)
        assert 0 < report["quantised"] < 3 and report["error"] <= 0.8 * whole < report["error_all"]
        assert set(report["kept"].values()) == {"damage"}

    def test_protected(self, source: Path, recorded: Evaluations, tmp_path: Path) -> None:
        model, report = quantise(source, recorded, tmp_path / "out", max_error=1.0, protect=["up"])
        assert report["kept"] == {"up": "protected"} and report["quantised"] == 2
        assert "model.up.weight.T" in {each.name for each in onnx.load(model).graph.initializer}

    def test_components_that_have_many_linear_layers(self, source: Path, tmp_path: Path) -> None:
        convolved = graph_of(
            node("MatMul", "sample few.weight", "prediction"),
            **{"few.weight": np.ones((64, 64)), "conv.weight": np.ones((64, 65, 3, 3))},
        )
        qdq.save(convolved, tmp_path / "decoder.onnx")
        folders = {"denoiser": source.parent, "decoder": tmp_path}
        assert choose(folders, ("d*",), lambda done, total: None) == {"denoiser": ["down"]}
        with pytest.raises(RecipeError, match=r"passes\.quantize_int4\.protect: 'conv' fits no layer"):
            choose(folders, ("conv",), lambda done, total: None)

    def test_what_is_left_of_a_component(self, source: Path, tmp_path: Path) -> None:
        """One whose layers are all protected stays as it is."""
        qdq.save(perceptron(), tmp_path / "text_encoder.onnx")
        folders = {"denoiser": source.parent, "text_encoder": tmp_path}
        assert choose(folders, ("up", "down", "out"), lambda done, total: None) == {}
        recorded = dict.fromkeys(folders, Evaluations(tmp_path))
        with pytest.raises(RecipeError, match="no component of which linear layers have 10%"):
            quantize_weights(folders, recorded, QuantizeInt4(protect=("*",)), Cache(tmp_path / "cache"), silent)

    def test_nothing_holds(self, source: Path, recorded: Evaluations, tmp_path: Path) -> None:
        model, report = quantise(source, recorded, tmp_path / "out", max_error=1e-9)
        assert report["quantised"] == 0 and report["error"] < 1e-9
        assert {each.name for each in onnx.load(model).graph.initializer} >= {"model.up.weight.T", "model.out.weight.T"}


def test_slots_for_adapters_beside_4_bits(source: Path, recorded: Evaluations, tmp_path: Path) -> None:
    """As a bundle has them in INT4: what the layer gives, and the product of what a run gives."""
    model, _ = quantise(source, recorded, tmp_path / "made", max_error=1.0)
    layers = {name: each for name, each in linear_layers(onnx.load(source).graph).items() if name == "down"}
    graph = {each.name: numpy_helper.to_array(each) for each in onnx.load(model).graph.initializer}
    (out := tmp_path / "out").mkdir()
    write_adapted(model, layers, ("other", "down"), 4, out, silent)
    rng = np.random.default_rng(0)
    sample, down, up = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((3, INPUTS), (HIDDEN, 4), (4, INPUTS))
    )
    run, weights = qdq.session(out / "denoiser_adapted.onnx"), {}
    for linear in (each for every in int4.packable_layers(onnx.load(source).graph).values() for each in every):
        integers, scales = graph[f"{linear.weight}.int4"].astype(np.float32), graph[f"{linear.weight}.scale"]
        whole = (integers.reshape(len(scales), -1, linear.outputs) * scales[:, None]).reshape(linear.inputs, -1)
        weights[linear.weight] = whole + graph[f"{linear.weight}.down"] @ graph[f"{linear.weight}.up"]
    first = weights["model.up.weight.T"]
    bent = np.maximum(sample @ first, 0)
    wanted = (
        (bent @ (weights["model.down.weight"] + down @ up) + graph["model.down.bias"])
        @ first
        @ weights["model.out.weight.T"]
    )
    found = run({"sample": sample, "down_1": down, "up_1": up})["prediction"]
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-2)


class TestErrors:
    """Of what a component gives: each output by itself."""

    def evaluations(self, folder: Path, **outputs: Any) -> Evaluations:
        (folder := folder / "denoiser").mkdir()
        np.savez(folder / "0000.npz", sample=np.zeros(1), **outputs)
        return Evaluations(folder, tuple(outputs))

    def test_a_mask_does_not_hide_the_others(self, tmp_path: Path) -> None:
        keys, mask = np.ones(10), np.full(10, np.finfo(np.float32).min)
        recorded = self.evaluations(tmp_path, keys=keys, mask=mask)
        assert recorded.error(lambda _: {"keys": 1.1 * keys, "mask": mask}) == pytest.approx(0.1)

    def test_infinity_where_it_belongs(self, tmp_path: Path) -> None:
        mask = np.array([0.0, -np.inf])
        recorded = self.evaluations(tmp_path, mask=mask)
        assert recorded.error(lambda _: {"mask": mask}) == 0
        for wrong in (np.array([0.0, 1.0]), np.array([np.nan, -np.inf])):
            with pytest.raises(NumericalError, match="the quantised denoiser gives is not finite"):
                recorded.error(lambda _, wrong=wrong: {"mask": wrong})

    def test_zeros(self, tmp_path: Path) -> None:
        recorded = self.evaluations(tmp_path, nothing=np.zeros(3))
        assert recorded.error(lambda _: {"nothing": np.zeros(3)}) == 0
        assert recorded.error(lambda _: {"nothing": np.ones(3)}) > 1

    def test_no_evaluation(self, tmp_path: Path) -> None:
        with pytest.raises(ResourceError, match="no evaluation was recorded"):
            Evaluations(tmp_path).error(lambda _: {})


@pytest.mark.parametrize("engine", [name for name in ENGINES if "int4" in ENGINES[name].precisions])
class TestEngines:
    def test_an_engine_keeps_weights_in_4_bits_and_reads_them_right(
        self, engine: str, source: Path, recorded: Evaluations, tmp_path: Path
    ) -> None:
        if not ENGINES[engine].available():
            pytest.skip(ENGINES[engine].why_not())
        model, _ = quantise(source, recorded, tmp_path / "made", max_error=1.0, rank=0)
        (out := tmp_path / "engine").mkdir()
        files = BUILDERS[engine](model, "int4", out)
        check_of(model, recorded)(engine, out, files)
        weights = 2 * INPUTS * HIDDEN + HIDDEN * INPUTS
        assert (out / str(files.weights)).stat().st_size < 0.75 * weights

    def test_a_wrong_graph_is_caught(self, engine: str, source: Path, recorded: Evaluations, tmp_path: Path) -> None:
        if not ENGINES[engine].available():
            pytest.skip(ENGINES[engine].why_not())
        path, _ = quantise(source, recorded, tmp_path / "made", max_error=10.0)
        model = onnx.load(path)
        scale = next(each for each in model.graph.initializer if each.name.endswith(".scale"))
        scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(1.5), scale.name))
        (wrong := tmp_path / "wrong").mkdir()
        qdq.save(model, wrong / "denoiser.onnx")
        (out := tmp_path / "engine").mkdir()
        files = BUILDERS[engine](wrong / "denoiser.onnx", "int4", out)
        with pytest.raises(CheckFailed, match=f"{engine} gives other numbers"):
            check_of(path, recorded)(engine, out, files)


@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_onnxruntime_multiplies_by_4_bits(rank: int, dimensions: int, tmp_path: Path) -> None:
    """Whatever else is done with the product: no weight is made whole again, and each is on the disk once."""
    import onnxruntime

    model = perceptron() if dimensions == 2 else graph_of(
        node("MatMul", "sample up.weight.T", "hidden"), node("MatMul", "hidden down.weight.T", "once"),
        node("MatMul", "once up.weight.T", "again"), node("Add", "again up.bias", "sum"),
        node("MatMul", "sum down.weight.T", "prediction"),
        **{"up.weight.T": np.random.default_rng(0).standard_normal((INPUTS, HIDDEN)), "up.bias": np.ones(HIDDEN),
           "down.weight.T": np.random.default_rng(1).standard_normal((HIDDEN, INPUTS))},
    )  # fmt: skip
    shape: list[Any] = ["batch", INPUTS] if dimensions == 2 else ["batch", 5, INPUTS]
    for value in (*model.graph.input, *model.graph.output):
        value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, shape))
    qdq.save(model, tmp_path / "denoiser.onnx")
    (tmp_path / "samples").mkdir()
    sample = np.random.default_rng(2).standard_normal([3, *shape[1:]]).astype(np.float32)
    given = qdq.session(tmp_path / "denoiser.onnx")({"sample": sample})
    np.savez(tmp_path / "samples" / "0000.npz", sample=sample, **given)
    (tmp_path / "out").mkdir()
    options = QuantizeInt4(max_error=1.0, rank=rank)
    quantize_graph(tmp_path / "denoiser.onnx", Evaluations(tmp_path / "samples"), options, tmp_path / "out", silent)
    settings = onnxruntime.SessionOptions()
    settings.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(tmp_path / "out" / "denoiser.onnx", settings, providers=["CPUExecutionProvider"])
    operators = [each.op_type for each in onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node]
    assert "DequantizeLinear" not in operators and operators.count("MatMulNBits") == 4
    if not rank:
        assert (tmp_path / "out" / "denoiser.onnx.data").stat().st_size < 0.75 * 3 * INPUTS * HIDDEN


class TestRecipe:
    GOOD = 'name = "x"\n[model]\npath = "m"\n[[targets]]\nengine = "openvino"\nprecision = "int4"\n'

    def test_a_target_is_enough(self) -> None:
        parsed = parse_recipe(self.GOOD, "r.toml")
        assert parsed.int4_options == QuantizeInt4() and parsed.samples_needed == QuantizeInt4().samples
        chosen = parse_recipe(self.GOOD + "[passes.quantize_int4]\ngroup_size = 128\nsamples = 3\n", "r.toml")
        assert chosen.int4_options == QuantizeInt4(group_size=128, samples=3) and chosen.samples_needed == 3
        assert parse_recipe(self.GOOD.replace("int4", "bf16"), "r.toml").int4_options is None

    def test_a_table_that_nothing_reads(self) -> None:
        with pytest.raises(RecipeError, match=r"no target has precision int4: \[passes\.quantize_int4\]"):
            parse_recipe(self.GOOD.replace("int4", "bf16") + "[passes.quantize_int4]\n", "r.toml")
        with pytest.raises(RecipeError, match=r"no target has precision int8: \[passes\.quantize\]"):
            parse_recipe(self.GOOD + "[passes.quantize]\n", "r.toml")

    @pytest.mark.parametrize("line", ["group_size = 24", "rank = -1", "max_error = 0", "bits = 4"])
    def test_options_have_lines(self, line: str) -> None:
        with pytest.raises(RecipeError, match=r"r\.toml:8"):
            parse_recipe(self.GOOD + f"[passes.quantize_int4]\n{line}\n", "r.toml")
