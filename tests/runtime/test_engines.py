"""Engines: arrays in, arrays out, the same on every target; and files that are not what the manifest says."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bundles import SHAPE, add_model
from onnx import TensorProto, helper

from slipcast.bundle.manifest import Component, Manifest, TensorSpec, read_manifest
from slipcast.engines import ENGINES, Engine, EngineKind, cpu_threads, engine_kind, open_engine
from slipcast.errors import ArtifactError, HostError, RequestError

Contract = dict[str, list[tuple[str, str, list[int | str]]]]
FLOATS: tuple[str, str, list[int | str]] = ("x", "float32", [*SHAPE])
ADD: Contract = {"inputs": [FLOATS], "outputs": [("y", "float32", [*SHAPE])]}


def component(contract: Contract) -> Component:
    return Component(
        inputs=tuple(TensorSpec(name=n, dtype=d, shape=tuple(s)) for n, d, s in contract["inputs"]),  # type: ignore[arg-type]
        outputs=tuple(TensorSpec(name=n, dtype=d, shape=tuple(s)) for n, d, s in contract["outputs"]),  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def add(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("add") / "add.onnx"
    onnx.save(add_model(), path)
    return path


class TestRegistry:
    @pytest.mark.parametrize("name", ENGINES)
    def test_every_engine_has_its_module(self, name: str) -> None:
        kind = ENGINES[name]
        assert kind is engine_kind(name)
        if kind.available():
            assert callable(importlib.import_module(kind.module).open_engine)
        if not kind.installed():
            assert kind.library in kind.why_not() and "pip install 'slipcast" in kind.why_not()
        assert "fp32" in kind.precisions  # in which a decoder that overflows is tried again

    def test_unknown(self) -> None:
        with pytest.raises(RequestError, match="unknown engine 'abacus'\n.*openvino, onnxruntime"):
            engine_kind("abacus")

    def test_absent_library(self, add: Path) -> None:
        absent = EngineKind("slipcast.engines.none", "no_such_library", "x", ("fp32",))
        assert not absent.available()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(HostError, match=r"pip install 'slipcast\[x\]'"):
            patch.setitem(ENGINES, "onnxruntime", absent)
            open_engine("onnxruntime", add, None, "fp32", component(ADD))

    def test_library_that_is_there_and_cannot_be_imported(self, add: Path) -> None:
        broken = EngineKind("slipcast.engines.no_such_module", "onnxruntime", None, ("fp32",))
        with pytest.MonkeyPatch.context() as patch, pytest.raises(HostError, match="cannot be imported"):
            patch.setitem(ENGINES, "onnxruntime", broken)
            open_engine("onnxruntime", add, None, "fp32", component(ADD))

    def test_precision_of_a_newer_runtime(self, add: Path) -> None:
        with pytest.raises(HostError, match=r"add.onnx: this runtime does not run onnxruntime in bf16\n.*fp32"):
            open_engine("onnxruntime", add, None, "bf16", component(ADD))

    def test_threads_are_those_of_this_process(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert cpu_threads() >= 1
        monkeypatch.setattr("os.sched_getaffinity", lambda _: {3, 5, 8}, raising=False)
        assert cpu_threads() == 3


OTHERS: dict[str, Contract] = {
    "input's name": {**ADD, "inputs": [("sample", "float32", [*SHAPE])]},
    "input's dtype": {**ADD, "inputs": [("x", "float16", [*SHAPE])]},
    "input's shape": {**ADD, "inputs": [("x", "float32", [1, 4, 8, 9])]},
    "input's rank": {**ADD, "inputs": [("x", "float32", [1, 4, 8])]},
    "input free in the manifest only": {**ADD, "inputs": [("x", "float32", ["batch", 4, 8, 8])]},
    "an input more": {**ADD, "inputs": [FLOATS, ("t", "float32", [1])]},
    "no input": {**ADD, "inputs": []},
    "output's name": {**ADD, "outputs": [("z", "float32", [*SHAPE])]},
    "output's dtype": {**ADD, "outputs": [("y", "int64", [*SHAPE])]},
    "output's shape": {**ADD, "outputs": [("y", "float32", [2, 4, 8, 8])]},
}


class TestOnnxRuntime:
    def test_runs(self, add: Path) -> None:
        with open_engine("onnxruntime", add, None, "fp32", component(ADD)) as engine:
            found = engine({"x": np.ones(SHAPE, np.float32)})
        assert found.keys() == {"y"}
        np.testing.assert_array_equal(found["y"].ravel(), np.arange(256) + 1)

    @pytest.mark.parametrize("what", OTHERS)
    def test_a_contract_that_differs_is_refused(self, add: Path, what: str) -> None:
        side = what.split()[0].removesuffix("'s")
        side = "outputs" if side == "output" else "inputs"
        with pytest.raises(ArtifactError, match=f"add.onnx: {side} differ from the manifest's") as caught:
            open_engine("onnxruntime", add, None, "fp32", component(OTHERS[what]))
        assert "float32[1, 4, 8, 8]" in str(caught.value.got)
        assert caught.value.expected != caught.value.got

    def test_the_name_of_a_free_dimension_does_not_matter(self, tmp_path: Path) -> None:
        model = add_model()
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_param = "s77"
        onnx.save(model, tmp_path / "free.onnx")
        free: list[int | str] = ["batch", 4, 8, 8]
        contract: Contract = {"inputs": [("x", "float32", free)], "outputs": [("y", "float32", free)]}
        with open_engine("onnxruntime", tmp_path / "free.onnx", None, "fp32", component(contract)) as engine:
            assert engine({"x": np.ones((3, 4, 8, 8), np.float32)})["y"].shape == (3, 4, 8, 8)

    def test_an_engine_may_not_know_what_it_gives(self, tmp_path: Path) -> None:
        """Where it follows from sizes that are free; what it takes it has to know."""
        nodes = [
            helper.make_node("Shape", ["x"], ["size"]),
            helper.make_node("Abs", ["size"], ["target"]),  # which shape inference does not see through
            helper.make_node("Reshape", ["x", "target"], ["y"]),
        ]
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["s77", *SHAPE[1:]])
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["s78", "s79", "s80", "s81"])
        model = helper.make_model(
            helper.make_graph(nodes, "g", [x], [y]), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
        )
        onnx.save(model, tmp_path / "vague.onnx")

        def opened(first: str) -> Any:
            shape = [first, *SHAPE[1:]]
            contract: Contract = {"inputs": [("x", "float32", shape)], "outputs": [("y", "float32", shape)]}
            return open_engine("onnxruntime", tmp_path / "vague.onnx", None, "fp32", component(contract))

        with opened("images") as engine:
            assert engine({"x": np.ones(SHAPE, np.float32)})["y"].shape == tuple(SHAPE)
        with pytest.raises(ArtifactError, match="outputs differ"):
            opened("batch")
        model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "s79"
        onnx.save(model, tmp_path / "vague.onnx")
        with pytest.raises(ArtifactError, match="inputs differ"):
            opened("images")

    @pytest.mark.parametrize("kind", [TensorProto.BFLOAT16, TensorProto.BOOL, TensorProto.STRING])
    def test_a_type_that_no_manifest_knows(self, tmp_path: Path, kind: int) -> None:
        values = [helper.make_tensor_value_info(name, kind, [1]) for name in "xy"]
        graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", values[:1], values[1:])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.save(model, tmp_path / "odd.onnx")
        with pytest.raises(ArtifactError, match="differ from the manifest's"):
            open_engine("onnxruntime", tmp_path / "odd.onnx", None, "fp32", component(ADD))

    @pytest.mark.parametrize("content", [b"", b"\x08\x0a", b"not a model", b"\xff" * 1000])
    def test_a_file_that_is_no_model(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "bad.onnx").write_bytes(content)
        with pytest.raises(
            ArtifactError, match=r"bad\.onnx: ONNX Runtime [0-9.]+ cannot load it(.|\n)*slipcast verify"
        ):
            open_engine("onnxruntime", tmp_path / "bad.onnx", None, "fp32", component(ADD))


@pytest.mark.usefixtures("all_cores")  # streams are as many as the cores allow
class TestOpenVino:
    @pytest.mark.parametrize(("native", "hint"), [(True, "bf16"), (False, "f32")])
    def test_bf16_is_not_emulated(self, native: bool, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
        module = pytest.importorskip("slipcast.engines.openvino")
        monkeypatch.setattr(module, "bf16_is_native", lambda: native)
        assert [module._hint(precision) for precision in ("bf16", "int8", "fp32")] == [hint, hint, "f32"]

    def test_a_processor_without_bf16_is_said_once(self, caplog: pytest.LogCaptureFixture) -> None:
        module = pytest.importorskip("slipcast.engines.openvino")
        capabilities = module.openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        module.bf16_is_native.cache_clear()
        assert module.bf16_is_native() is module.bf16_is_native() is ("BF16" in capabilities)
        assert ("no bf16 instructions" in caplog.text) is ("BF16" not in capabilities)
        assert len(caplog.records) <= 1

    @pytest.mark.parametrize("content", ["", "<net", "not a model", "<net name='x'><layers></net>"])
    def test_a_file_that_is_no_model(self, tmp_path: Path, content: str) -> None:
        pytest.importorskip("slipcast.engines.openvino")
        (tmp_path / "bad.xml").write_text(content)
        (tmp_path / "bad.bin").write_bytes(b"")
        with pytest.raises(ArtifactError, match=r"bad\.xml: OpenVINO \S+ cannot load it(.|\n)*slipcast verify"):
            open_engine("openvino", tmp_path / "bad.xml", tmp_path / "bad.bin", "bf16", component(ADD))

    @pytest.fixture
    def squares(self, tmp_path: Path) -> Iterator[Any]:
        """x (rows, 3), of any number, times y (1, 3)."""
        openvino = pytest.importorskip("slipcast.engines.openvino").openvino
        ops = openvino.opset13
        x, y = ops.parameter([-1, 3], np.float32, name="x"), ops.parameter([1, 3], np.float32, name="y")
        product = ops.multiply(x, y, name="z")
        for node in (x, y, product):
            node.output(0).get_tensor().set_names({node.get_friendly_name()})
        openvino.save_model(openvino.Model([product], [x, y], "squares"), tmp_path / "m.xml")
        shapes: Any = {"inputs": [("x", "float32", ["batch", 3]), ("y", "float32", [1, 3])]}
        contract = component({**ADD, **shapes, "outputs": [("z", "float32", ["batch", 3])]})
        with open_engine("openvino", tmp_path / "m.xml", tmp_path / "m.bin", "fp32", contract) as engine:
            yield engine

    def test_rows_in_any_number(self, squares: Any) -> None:
        for rows in (1, 2, 3, 4, 8, 5, 1, 12):
            x, y = (
                np.random.default_rng(rows).standard_normal((rows, 3)).astype(np.float32),
                np.ones((1, 3), np.float32),
            )
            np.testing.assert_array_equal(squares({"x": x, "y": y * 2})["z"], x * 2)
            x += 1  # what was handed over is seen as it is now
            np.testing.assert_array_equal(squares({"x": x, "y": y * 3})["z"], x * 3)

    @pytest.mark.parametrize("first", ["length", "2*length+1"])
    def test_tokens_are_no_rows(self, tmp_path: Path, first: str) -> None:
        """A sum over a first dimension that is free, and no batch."""
        openvino = pytest.importorskip("slipcast.engines.openvino").openvino
        ops = openvino.opset13
        x = ops.parameter([-1, 3], np.float32, name="x")
        total = ops.add(x, ops.reduce_sum(x, np.array(0), keep_dims=True), name="z")
        for node in (x, total):
            node.output(0).get_tensor().set_names({node.get_friendly_name()})
        openvino.save_model(openvino.Model([total], [x], "sums"), tmp_path / "m.xml")
        contract = component({"inputs": [("x", "float32", [first, 3])], "outputs": [("z", "float32", [first, 3])]})
        with open_engine("openvino", tmp_path / "m.xml", tmp_path / "m.bin", "fp32", contract) as engine:
            for tokens in (4, 7, 1, 16):
                x = np.arange(3.0 * tokens, dtype=np.float32).reshape(tokens, 3)
                np.testing.assert_allclose(engine({"x": x})["z"], x + x.sum(0), rtol=1e-6)

    def test_graphs_that_are_kept_are_few(self, squares: Any) -> None:
        module = pytest.importorskip("slipcast.engines.openvino")
        compiled, compile_it = [], squares._compile

        def count(shapes: dict[str, tuple[int, ...]], streams: int) -> Any:
            compiled.append(shapes["x"])
            return compile_it(shapes, streams)

        squares._compile = count
        y = np.ones((1, 3), np.float32)
        for rows in (1, 3, 4, 8, 16, 64, 2, 1):
            squares({"x": np.ones((rows, 3), np.float32), "y": y})
        assert set(compiled) == {(1, 3), (2, 3)}
        assert len(squares._compiled) == len(compiled) <= module.KEPT

    def test_pairs_that_round_differently_are_not_used(self, squares: Any, caplog: pytest.LogCaptureFixture) -> None:
        evaluate, asked = squares._evaluate, []

        def by_another_kernel(arrays: Any, rows: int, size: int) -> Any:
            asked.append((rows, size))
            return [each + (size - 1) * 1e-7 for each in evaluate(arrays, rows, size)]

        squares._evaluate = by_another_kernel
        x, y = np.ones((8, 3), np.float32), np.ones((1, 3), np.float32)
        with caplog.at_level("INFO", "slipcast"):
            for _ in range(2):
                np.testing.assert_array_equal(squares({"x": x, "y": y})["z"], x)
        streams = squares._streams
        assert asked == [(2 * streams, 2), (2 * streams, 1), (8, 1), (8, 1)]
        assert caplog.text.count("rows go one by one") == 1

    def test_large_models_have_one_graph(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, squares: Any) -> None:
        module = pytest.importorskip("slipcast.engines.openvino")
        monkeypatch.setattr(module, "ONE_STREAM", -1)
        with module.OpenVinoEngine(tmp_path / "m.xml", tmp_path / "m.bin", "fp32", {"x": 1}, {"z"}) as engine:
            for rows in (1, 2, 3, 8):
                x = np.random.default_rng(rows).standard_normal((rows, 3)).astype(np.float32)
                np.testing.assert_array_equal(engine({"x": x, "y": np.ones((1, 3), np.float32)})["z"], x)
            assert len(engine._compiled) == 1

    def test_images_have_several_rows(self, squares: Any) -> None:
        """Which stay together, and of another input fewer."""
        squares._batched = {"x": 2, "y": 1}
        asked, compile_it = [], squares._compile

        def compiled(shapes: dict[str, tuple[int, ...]], streams: int) -> Any:
            asked.append((shapes["x"], shapes["y"]))
            return compile_it(shapes, streams)

        squares._compile = compiled
        x = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
        y = np.arange(1, 4, dtype=np.float32)[:, None] * np.ones((1, 3), np.float32)
        np.testing.assert_allclose(squares({"x": x, "y": y})["z"], x * np.repeat(y, 2, axis=0), rtol=1e-6)
        assert asked == [((2, 3), (1, 3))]

    def test_what_has_no_rows_is_the_same_for_all(self, squares: Any) -> None:
        squares._apart = frozenset()
        x, y = np.ones((4, 3), np.float32), np.ones((1, 3), np.float32)
        assert squares({"x": x, "y": y})["z"].shape == (1, 3)

    def test_what_fails_leaves_the_engine_as_it_was(self, squares: Any) -> None:
        x, y = np.ones((4, 3), np.float32), np.ones((1, 3), np.float32)
        before = squares({"x": x, "y": y})["z"]
        with pytest.raises((ArtifactError, RuntimeError)):
            squares({"x": np.ones((4, 5), np.float32), "y": y})
        np.testing.assert_array_equal(squares({"x": x, "y": y})["z"], before)

    def test_no_weights(self, tmp_path: Path) -> None:
        pytest.importorskip("slipcast.engines.openvino")
        with pytest.raises(ArtifactError, match=r"a\.xml: the manifest names no weights"):
            open_engine("openvino", tmp_path / "a.xml", None, "bf16", component(ADD))


@pytest.fixture(scope="module")
def manifest(shapes_bundle: Path) -> Manifest:
    return read_manifest((shapes_bundle / "manifest.json").read_bytes())


@pytest.fixture(scope="module")
def opened(shapes_bundle: Path, manifest: Manifest) -> Iterator[dict[str, dict[str, Engine]]]:
    """Every component on every target."""
    found: dict[str, dict[str, Engine]] = {}
    for target in manifest.targets:
        for name, files in target.components.items():
            assert files.weights
            paths = shapes_bundle / files.model, shapes_bundle / files.weights
            engine = open_engine(target.engine, *paths, target.precision, manifest.components[name])
            found.setdefault(target.id, {})[name] = engine
    yield found
    for engines in found.values():
        for engine in engines.values():
            engine.__exit__(None, None, None)


@pytest.fixture(scope="module")
def feed(opened: dict[str, dict[str, Engine]]) -> Feed:
    """Inputs of up to 8 rows; the denoiser takes what its other parts make of a prompt and a timestep."""
    rng, exact = np.random.default_rng(0), opened["onnxruntime-cpu-fp32"]
    timestep = {"timestep": np.array([481], np.float32)}
    text = {"encoder_hidden_states": rng.standard_normal((8, 32, 128)).astype(np.float32)}
    latent = rng.standard_normal((8, 4, 16, 16)).astype(np.float32)
    rows = {"input_ids": rng.integers(0, 600, (8, 32)), "sample": latent, "latent": latent, **text}
    rows |= exact["denoiser_prompt"](text)
    known = timestep | exact["denoiser_step"](timestep)

    def make(component: str, batch: int) -> dict[str, Any]:
        names = [spec.name for spec in exact[component].inputs]
        return {name: rows[name][:batch] if name in rows else known[name] for name in names}

    return make


TARGETS = ("openvino-cpu-bf16", "onnxruntime-cpu-fp32")
COMPONENTS = ("text_encoder", "denoiser_prompt", "denoiser", "vae_decoder")
Feed = Callable[[str, int], dict[str, Any]]


@pytest.mark.usefixtures("all_cores")
@pytest.mark.parametrize("component", COMPONENTS)
class TestCompiled:
    def test_targets_agree(self, opened: dict[str, dict[str, Engine]], feed: Feed, component: str) -> None:
        results = [opened[target][component](feed(component, 2)) for target in TARGETS]
        assert results[0].keys() == results[1].keys()
        for name in results[0]:
            fast, exact = (np.asarray(result[name], np.float64) for result in results)
            assert fast.shape == exact.shape
            assert np.linalg.norm(fast - exact) < 0.03 * np.linalg.norm(exact)

    @pytest.mark.parametrize("target", TARGETS)
    def test_rows_do_not_depend_on_the_batch(
        self, opened: dict[str, dict[str, Engine]], feed: Feed, component: str, target: str
    ) -> None:
        engine = opened[target][component]
        whole = engine(feed(component, 8))
        for batch in (1, 2, 3, 5):
            part = engine(feed(component, batch))
            for name, array in part.items():
                assert array.shape[0] == batch
                np.testing.assert_array_equal(array, whole[name][:batch])

    @pytest.mark.parametrize("target", TARGETS)
    def test_results_outlive_the_next_call(
        self, opened: dict[str, dict[str, Engine]], feed: Feed, component: str, target: str
    ) -> None:
        engine = opened[target][component]
        first = engine(feed(component, 2))
        kept = {name: array.copy() for name, array in first.items()}
        engine({name: array[::-1].copy() for name, array in feed(component, 2).items()})
        for name, array in first.items():
            np.testing.assert_array_equal(array, kept[name])
            assert array.flags.writeable

    @pytest.mark.parametrize("target", TARGETS)
    def test_inputs_are_left_alone_and_need_not_be_contiguous(
        self, opened: dict[str, dict[str, Engine]], feed: Feed, component: str, target: str
    ) -> None:
        engine, given = opened[target][component], feed(component, 2)
        expected = engine(given)
        for name, array in feed(component, 2).items():
            np.testing.assert_array_equal(given[name], array)
        strided = {name: np.repeat(array, 2, axis=-1)[..., ::2] for name, array in given.items()}
        if component != "denoiser":
            assert not any(array.flags.c_contiguous for array in strided.values())
        for name, array in engine(strided).items():
            np.testing.assert_array_equal(array, expected[name])

    @pytest.mark.parametrize("target", TARGETS)
    def test_the_engine_says_what_the_manifest_says(
        self, opened: dict[str, dict[str, Engine]], manifest: Manifest, component: str, target: str
    ) -> None:
        engine = opened[target][component]
        promised = json.loads(manifest.model_dump_json())["components"][component]
        assert [spec.name for spec in engine.inputs] == [spec["name"] for spec in promised["inputs"]]
        assert [spec.dtype for spec in engine.outputs] == [spec["dtype"] for spec in promised["outputs"]]
