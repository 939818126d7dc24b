"""Profiles: what engines count, what is made of it, and how it is shown."""

from __future__ import annotations

import itertools
import json
import re
import time
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from html import unescape
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import onnx
import psutil
import pytest
from bundles import MODEL, save_external, write_files, write_manifest
from fakes import Fakes, write_fake
from onnx import TensorProto, helper, numpy_helper

from slipcast.bundle.evidence import USUAL_PROMPT
from slipcast.bundle.manifest import Component, TensorSpec
from slipcast.bundle.reader import open_bundle
from slipcast.cli.main import main
from slipcast.engines import EngineWrapper, LayerTime, ProfiledEngine, open_engine
from slipcast.errors import HostError, RequestError, ResourceError
from slipcast.progress import Stages
from slipcast.timing.component import measure_component
from slipcast.timing.flame import WIDTH, Block, draw
from slipcast.timing.measure import profile_run
from slipcast.timing.memory import available_mb, peak_mb, resident_mb
from slipcast.timing.page import _calls, render_page
from slipcast.timing.table import render_table

SIDE = 512
CONTRACT = Component(
    inputs=(TensorSpec(name="x", dtype="float32", shape=(SIDE, SIDE)),),
    outputs=(TensorSpec(name="y", dtype="float32", shape=(SIDE, SIDE)),),
)


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path | None]]:
    """y = sin(x @ w), slow enough to be counted, by engine."""
    path = tmp_path_factory.mktemp("product") / "product.onnx"
    weight = numpy_helper.from_array(np.eye(SIDE, dtype=np.float32) * 2, "model.block.0.proj.weight")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [SIDE, SIDE]) for name in "xy"]
    nodes = [
        helper.make_node("MatMul", ["x", weight.name], ["h"], name="node_linear"),
        helper.make_node("Sin", ["h"], ["y"], name="node_sin"),
    ]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    from slipcast.engines.openvino import openvino

    openvino.save_model(openvino.Core().read_model(path), path.with_suffix(".xml"), compress_to_fp16=True)
    return {"onnxruntime": (path, None), "openvino": (path.with_suffix(".xml"), path.with_suffix(".bin"))}


def opened(name: str, product: Mapping[str, tuple[Path, Path | None]]) -> Any:
    return open_engine(name, *product[name], "fp32", CONTRACT, profile=True)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
class TestEngines:
    def test_layers_of_the_calls_since_the_start(
        self, name: str, product: dict[str, tuple[Path, Path | None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
        (tmp_path / "temporary").mkdir()
        x = np.ones((SIDE, SIDE), np.float32)
        engine: ProfiledEngine
        with opened(name, product) as engine:
            for _ in range(4):
                engine({"x": x})
            engine.start_profile()
            begin = time.perf_counter()
            for _ in range(3):
                np.testing.assert_allclose(engine({"x": x})["y"], np.sin(2 * x), rtol=1e-5)
            took = time.perf_counter() - begin
            layers = engine.layers()
        (linear,) = [layer for layer in layers if layer.name == "node_linear"]
        assert linear.kind in ("MatMul", "FullyConnected")
        assert re.search("f32|float", linear.kernel)
        assert linear.module == ("block.0.proj" if name == "openvino" else "")
        assert {layer.calls for layer in layers} == {3}
        assert all(layer.seconds > 0 for layer in layers)
        assert 0 < sum(layer.seconds for layer in layers) <= took + 1e-5  # one microsecond of rounding a layer
        assert list(tmp_path.rglob("*")) == [tmp_path / "temporary"]

    def test_nothing_since_the_start(self, name: str, product: dict[str, tuple[Path, Path | None]]) -> None:
        with opened(name, product) as engine:
            engine({"x": np.ones((SIDE, SIDE), np.float32)})
            engine.start_profile()
            assert engine.layers() == ()

    def test_profilers_are_off_unless_asked_for(self, name: str, product: dict[str, tuple[Path, Path | None]]) -> None:
        with open_engine(name, *product[name], "fp32", CONTRACT) as engine:
            assert not hasattr(engine, "layers")


def test_a_trace_that_ends_early(product: dict[str, tuple[Path, Path | None]]) -> None:
    with opened("onnxruntime", product) as engine:
        engine({"x": np.ones((SIDE, SIDE), np.float32)})
        engine._calls += 1  # as where the library dropped what came after its millionth event
        with pytest.raises(ResourceError, match=r"(?s)ends early.*2 calls.*fewer steps"):
            engine.layers()


def test_an_engine_without_a_profiler(
    product: dict[str, tuple[Path, Path | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("slipcast.engines.onnxruntime.open_profiled_engine")
    with pytest.raises(HostError, match="onnxruntime has no profiler"):
        opened("onnxruntime", product)


class FakeProfiler(EngineWrapper):
    """A fake engine that says where the time of its calls went: nine tenths of it into three layers."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.times = list[float]()

    def __call__(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        begin = time.perf_counter()
        time.sleep(0.002)
        outputs = self.engine(arrays)
        self.times.append(time.perf_counter() - begin)
        return outputs

    def start_profile(self) -> None:
        self.times.clear()

    def layers(self) -> tuple[LayerTime, ...]:
        module, spent = "<b>.1.conv", sum(self.times)
        return (
            LayerTime("conv<1>", "Convolution", "jit_f32", module, 0.5 * spent, len(self.times)),
            LayerTime("conv2", "Convolution", "jit_f32", module, 0.3 * spent, len(self.times)),
            LayerTime("add", "Add", "jit_f32", "", 0.1 * spent, len(self.times)),
        )


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    """Fakes, plain and profiled; no process is started to measure memory."""
    found = fakes.install(monkeypatch)

    def open_fake(*arguments: Any, profile: bool = False) -> Any:
        return FakeProfiler(found(*arguments)) if profile else found(*arguments)

    monkeypatch.setattr("slipcast.run.base.open_engine", open_fake)
    memory = {"added_mb": 12.5, "peak_mb": 20.0}
    monkeypatch.setattr("slipcast.timing.measure.measure_component", lambda *_: memory)
    return found


def profiled(bundle: Path, **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "prompt": None, "target": "auto", "steps": None, "num_images": 1, "seed": 0, "allow_unlisted": False,
    }  # fmt: skip
    return profile_run(bundle, **arguments | changes, stages=Stages())


@pytest.fixture
def document(engines: Fakes, tmp_path: Path) -> dict[str, Any]:
    return profiled(write_fake(tmp_path / "bundle"), num_images=2)


class TestDocument:
    def test_parts_add_up(self, document: dict[str, Any]) -> None:
        total = document["seconds"]
        assert total == pytest.approx(np.mean(document["runs"]["with_profiler_s"]))
        assert sum(each["seconds"] for each in document["components"]) + document["host_s"] == pytest.approx(total)
        assert sum(step["seconds"] for step in document["steps"]) + document["outside_steps_s"] == pytest.approx(total)
        for component in document["components"]:
            layers, operators = (
                sum(each["seconds"] for each in document[kind] if each["component"] == component["name"])
                for kind in ("layers", "operators")
            )
            assert layers == pytest.approx(operators)
            assert layers + component["outside_layers_s"] == pytest.approx(component["seconds"])
            assert 0 < component["outside_layers_s"] < 0.3 * component["seconds"]
        assert document["host_s"] > 0
        assert document["outside_steps_s"] > 0

    def test_counts(self, document: dict[str, Any]) -> None:
        calls = {each["name"]: each["calls"] for each in document["components"]}
        assert calls == {"text_encoder": 1, "denoiser": 6, "vae_decoder": 2}
        assert [step["step"] for step in document["steps"]] == [1, 2, 3, 4, 5, 6]
        assert all(list(step["components"]) == ["denoiser"] for step in document["steps"])
        assert document["steps"][0]["timestep"] > document["steps"][-1]["timestep"]
        assert {each["component"]: each["calls"] for each in document["layers"]} == calls
        assert {each["layers"] for each in document["operators"]} == {1, 2}

    def test_runs_and_memory(self, document: dict[str, Any]) -> None:
        plain, with_profiler = document["runs"]["without_profiler_s"], document["runs"]["with_profiler_s"]
        assert len(plain) == len(with_profiler) == 5
        ratios = [with_it / without for with_it, without in zip(with_profiler, plain, strict=True)]
        assert document["profiler_overhead"] == pytest.approx(np.median(ratios) - 1)
        assert document["profiler_overhead"] > 0  # the fakes sleep with it
        assert document["memory"]["peak_mb"] >= document["memory"]["before_mb"] > 10
        assert document["target"] == "openvino-cpu-bf16"
        assert set(document["versions"]) == {"slipcast", "openvino"}
        json.dumps(document, allow_nan=False)

    def test_calls_do_not_overlap(self, document: dict[str, Any]) -> None:
        ends = [(0.0, 0.0), *((call["begin_s"], call["end_s"]) for call in document["timeline"])]
        assert all(before[1] <= after[0] < after[1] for before, after in itertools.pairwise(ends))
        assert ends[-1][1] <= document["seconds"]

    def test_engines_are_closed(self, document: dict[str, Any], engines: Fakes) -> None:
        assert sorted(engines.closed) == sorted(name for name, _ in engines.opened) == sorted(2 * fakes.COMPONENTS)

    @pytest.mark.parametrize(("available", "in_turn"), [(1e9, True), (0.0, False)])
    def test_both_kinds_are_open_where_there_is_room(
        self, engines: Fakes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, available: float, in_turn: bool
    ) -> None:
        monkeypatch.setattr("slipcast.timing.measure.available_mb", lambda: available)
        found = profiled(write_fake(tmp_path / "bundle"))
        assert found["runs"]["in_turn"] is in_turn
        assert engines.most_open == len(fakes.COMPONENTS) * (2 if in_turn else 1)
        assert len(found["runs"]["overheads"]) == 5
        assert ("no room for both" in render_table(found)) != in_turn


class TestRequest:
    def test_the_prompt_is_the_reports(self, engines: Fakes, tmp_path: Path) -> None:
        bundle = write_fake(tmp_path / "bundle")
        assert profiled(bundle)["prompt"] == USUAL_PROMPT
        (bundle / "report.json").write_text(json.dumps({"family": {"held_out_prompts": ["a teal square", "b"]}}))
        (bundle / "manifest.json").write_text(json.dumps(fakes.document(bundle)))
        assert profiled(bundle)["prompt"] == "a teal square"
        assert profiled(bundle, prompt="a ring")["prompt"] == "a ring"

    def test_steps_and_target(self, engines: Fakes, tmp_path: Path) -> None:
        found = profiled(write_fake(tmp_path / "bundle"), steps=3, target="onnxruntime")
        assert len(found["steps"]) == 3
        assert found["target"] == "onnxruntime-cpu-fp32"

    @pytest.mark.parametrize("wrong", [{"target": "tensorrt"}, {"steps": 0}, {"num_images": 0}, {"seed": -1}])
    def test_refused(self, engines: Fakes, tmp_path: Path, wrong: dict[str, Any]) -> None:
        with pytest.raises(RequestError):
            profiled(write_fake(tmp_path / "bundle"), **wrong)
        assert not engines.calls


class TestCommand:
    def test_text_and_page(
        self, engines: Fakes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as stop:
            main(["profile-run", str(write_fake(tmp_path / "bundle")), "--steps", "2"])
        out = capsys.readouterr().out
        assert stop.value.code == 0, out
        assert out.startswith("fake on openvino-cpu-bf16: 1 image, 2 steps of dpmpp_2m")
        assert out.endswith("picture: fake-profile.html\n")
        assert "<svg" in (tmp_path / "fake-profile.html").read_text("utf-8")

    def test_a_page_that_cannot_be_written(
        self, engines: Fakes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(SystemExit) as stop:
            main(["profile-run", str(write_fake(tmp_path / "bundle")), "-o", str(tmp_path / "file" / "page.html")])
        assert stop.value.code == 2
        assert "cannot be written to" in capsys.readouterr().err
        assert not engines.calls


class TestMemory:
    def test_of_this_process(self) -> None:
        before = resident_mb()
        held = np.ones(10_000_000)
        assert 0.9 * held.nbytes < 1e6 * (resident_mb() - before) < held.nbytes + 20e6
        most = peak_mb()
        assert most >= resident_mb() - 5  # the kernel counts in batches
        del held
        assert min(peak_mb(), most) > resident_mb() + 50

    @pytest.mark.parametrize(("limit", "expected"), [("4096000\n", 4.096), ("max\n", None), (f"{10**18}\n", None)])
    @pytest.mark.parametrize(
        ("groups", "file"),
        [
            ("0::/\n", "memory.max"),
            ("0::/a/b\n", "a/b/memory.max"),
            ("0::/a/b\u00fc\n", "a/memory.max"),
            ("9:cpu:/\n4:memory:/a\n0::/\n", "memory/a/memory.limit_in_bytes"),
            ("4:memory:/elsewhere\n", "memory/memory.limit_in_bytes"),  # as a container sees the machine's names
        ],
    )
    def test_what_is_free_is_at_most_the_groups(
        self, tmp_path: Path, groups: str, file: str, limit: str, expected: float | None
    ) -> None:
        (own := tmp_path / "cgroup").write_text(groups)
        free = available_mb(tmp_path, own)
        assert 10 < free < psutil.virtual_memory().total / 1e6
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(limit)
        assert available_mb(tmp_path, own) == (expected or pytest.approx(free, rel=0.5))

    def test_of_a_process_of_its_own(self, tmp_path: Path) -> None:
        """y = x + b, where b has 40 MB."""
        root, shape = tmp_path / "bundle", [1, 4, 1250, 2000]
        write_files(root)
        bias = numpy_helper.from_array(np.ones(shape, np.float32), "b")
        value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy"]
        graph = helper.make_graph([helper.make_node("Add", ["x", "b"], ["y"])], "g", value[:1], value[1:], [bias])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        (root / MODEL).unlink()
        save_external(model, root / MODEL)
        spec = {"dtype": "float32", "shape": shape}
        contract = {"inputs": [{"name": "x", **spec}], "outputs": [{"name": "y", **spec}]}
        write_manifest(root, components={"denoiser": contract})
        bundle = open_bundle(root)
        found = measure_component(bundle, bundle.manifest.targets[0], "denoiser", {"x": np.zeros(shape, np.float32)})
        assert found
        assert 75 < found["added_mb"] < 160  # b and y; of x, which is zeros, nothing is resident
        assert found["added_mb"] <= found["peak_mb"] + 1

    def test_unknown_where_the_process_fails(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        bundle = open_bundle(write_fake(tmp_path / "bundle"))  # its engines are text
        assert measure_component(bundle, bundle.manifest.targets[0], "denoiser", {"x": np.zeros(1)}) is None
        assert "the memory of denoiser is not known" in caplog.text


def rectangles(svg: str) -> list[tuple[str, float, float, float]]:
    """(title, x, y, width) of every block."""
    found = []
    for group in ET.fromstring(svg):
        rect = group[1]
        found.append((str(group[0].text), *(float(rect.attrib[key]) for key in ("x", "y", "width"))))
    return found


class TestFlame:
    def test_a_gap_below_nothing_has_no_width(self) -> None:
        """Between two calls lies a difference of means, which rounding can turn negative."""
        parts = _calls([("denoiser", 0.1 - 1e-16, 0.5)], 0.1, 0.5 - 1e-16, {"denoiser": "t0"})
        assert [part.seconds for part in parts if part.label == "host"] == [0.0, 0.0]
        draw(Block("run", 0.4, "rest", "", parts), "x")

    def test_widths_are_time(self) -> None:
        parts = (Block("a", 0.5, "t0"), Block("b", 0.3, "t1", "twice", (Block("c", 0.2, "t1"),)))
        found = rectangles(draw(Block("run", 1.0, "rest", "", parts), "x"))
        assert [(x, y, round(width)) for _, x, y, width in found] == [
            (0, 0, WIDTH), (0, 26, WIDTH / 2), (WIDTH / 2, 26, 0.3 * WIDTH), (WIDTH / 2, 52, 0.2 * WIDTH),
        ]  # fmt: skip
        assert found[2][0] == "b · twice · 300 ms, 30.0% of the run"

    def test_small_neighbours_share_a_block(self) -> None:
        parts = (Block("big", 0.5, "t0"), *(Block(f"n{i}", 1e-5, "t0") for i in range(7)), Block("n", 1e-5, "none"))
        found = rectangles(draw(Block("run", 1.0, "rest", "", parts), "x"))
        assert [title.split(" · ")[0] for title, *_ in found] == ["run", "big", "7 small ones", "n"]
        assert found[2][3] == pytest.approx(7e-5 * WIDTH, abs=0.01)

    def test_what_ran_side_by_side_fits(self) -> None:
        parts = (Block("a", 1.5, "t0"), Block("b", 0.5, "t1"))
        found = rectangles(draw(Block("run", 1.0, "rest", "", parts), "x"))
        assert [width for *_, width in found] == [WIDTH, 0.75 * WIDTH, 0.25 * WIDTH]

    def test_labels_are_cut_and_escaped(self) -> None:
        svg = draw(Block("run", 1.0, "rest", "", (Block("<i>" + "x" * 300, 1.0, "t0"), Block("gone", 1e-4, "t1"))), "x")
        texts = [text.text for text in ET.fromstring(svg).iter("text")]
        assert texts[0] == "run"
        assert texts[1].startswith("<i>xx") and texts[1].endswith("…")
        assert len(texts) == 2


class TestPage:
    def test_blocks_add_up_to_the_run(self, document: dict[str, Any]) -> None:
        for svg in re.findall(r"<svg.*?</svg>", render_page(document), re.DOTALL):
            found = rectangles(svg)
            for row in {y for _, _, y, _ in found if y <= 26}:
                assert sum(width for *_, y, width in found if y == row) == pytest.approx(WIDTH, abs=0.5)
            assert max(x + width for _, x, _, width in found) <= WIDTH + 0.5

    def test_everything_is_named_and_nothing_is_markup(self, document: dict[str, Any]) -> None:
        page = render_page(document | {"prompt": "<script>alert(1)</script>"})
        assert "<script" not in page and "<b>" not in page and "conv<1>" not in page
        for text in ("“<script>alert(1)</script>”", "conv<1>", "<b>.1.conv", "outside layers", "host", "text_encoder"):
            assert text in unescape(page)
        assert not re.search(r"(src|href)=|url\(|@import", page)
        assert page.count("<title>timestep") == 0
        assert len(re.findall(r"<title>step \d", page)) == 6

    def test_table(self, document: dict[str, Any]) -> None:
        text = render_table(document)
        for wanted in ("denoiser", "Convolution", "<b>.1.conv", "jit_f32", "host", "a step: median", "by pairs"):
            assert wanted in text
        document["components"][0]["memory"] = None
        assert "unknown" in render_table(document)
