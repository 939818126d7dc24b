"""TensorRT engines, built for real where the library is installed (no GPU is needed); and libraries that fail."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from slipcast.bundle.manifest import Component, ImageGeometry, Sampling, TensorSpec
from slipcast.bundle.program import LengthRange, Program
from slipcast.engines import ENGINES
from slipcast.errors import HostError, RecipeError, ResourceError
from slipcast.progress import Stages
from slipcast.sampling.schedules import NoiseProcess
from slipcast_compiler.engines import build_targets, sources_of, tensorrt
from slipcast_compiler.engines.tensorrt import Options
from slipcast_compiler.export.graphs import Graphs
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.model.checkpoint import Checkpoint
from slipcast_compiler.model.original import Original
from slipcast_compiler.plan import make_plan
from slipcast_compiler.recipe.reading import parse_recipe
from slipcast_compiler.recipe.targets import TargetTable

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"
)
OPTIONS = Options("tensorrt_rtx", (("batch", (1, 2, 8)),))
IMAGE = ImageGeometry(width=96, height=64, channels=4, factor=4, tile=20, overlap=4)
RECIPE = """
name = "r"
model = {path = "nowhere"}
targets = [{engine = "tensorrt-rtx", precision = "fp16", KEYS}]
"""
CRASHING = """
import os
class ILogger:
    def __init__(self): pass
class Severity: name = "VERBOSE"
class NetworkDefinitionCreationFlag: STRONGLY_TYPED = 0
class Builder:
    def __init__(self, logger): self.logger = logger
    def create_network(self, flags): return self
class OnnxParser:
    def __init__(self, network, logger): self.logger = logger
    def parse_from_file(self, path):
        self.logger.log(Severity, "Parsing node: first_conv [Conv]")
        self.logger.log(Severity, "Parsing node: second_conv [Conv]")
        LAST
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Linear layers and attention, which has no kernel in fp32."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["q"], name="to_q"),
        helper.make_node("Sigmoid", ["q"], ["k"], name="to_k"),
        helper.make_node("Attention", ["q", "k", "x"], ["y"], q_num_heads=4, kv_num_heads=4, name="attention"),
    ]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 16, 512]) for name in "xy"]
    weight = np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32)
    graph = helper.make_graph(nodes, "g", value[:1], value[1:], [numpy_helper.from_array(weight, "w")])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    (tmp_path / "model").mkdir()
    path = tmp_path / "model" / "denoiser.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="denoiser.onnx.data")
    return path


@pytest.fixture
def crashing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "crashing_trt.py").write_text(CRASHING.replace("LAST", "os.abort()"))
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@needs_library
class TestBuild:
    def test_precision_is_in_the_engine(self, model: Path, out: Path) -> None:
        sizes = {}
        for precision in ("fp32", "fp16", "bf16"):
            files = tensorrt.build(model, precision, out, OPTIONS)
            assert (files.model, files.weights) == ("denoiser.engine", None)
            assert [file.name for file in out.iterdir()] == ["denoiser.engine"]  # neither log nor cast graph
            sizes[precision] = (out / files.model).stat().st_size
        weights = 512 * 512
        assert sizes["fp32"] - sizes["fp16"] > weights
        assert abs(sizes["fp16"] - sizes["bf16"]) < weights / 10

    def test_compute_capabilities_change_the_engine(self, model: Path, out: Path) -> None:
        tensorrt.build(model, "fp16", out, OPTIONS)
        portable = (out / "denoiser.engine").read_bytes()
        options = dataclasses.replace(OPTIONS, compute_capabilities=("8.6", "8.9"), workspace_mb=100)
        tensorrt.build(model, "fp16", out, options)
        assert (out / "denoiser.engine").read_bytes() != portable

    def test_what_the_library_refuses_is_named(self, model: Path, out: Path) -> None:
        proto = onnx.load(model)
        proto.graph.node[2].op_type = "Divination"
        proto.graph.node[2].domain = "elsewhere"
        proto.opset_import.append(helper.make_opsetid("elsewhere", 1))
        onnx.save(proto, model)
        with pytest.raises(HostError, match="denoiser: tensorrt_rtx failed at attention") as caught:
            tensorrt.build(model, "fp32", out, OPTIONS)
        assert "attention [Divination]: " in str(caught.value.got)
        assert list(out.iterdir()) == []

    def test_a_capability_that_has_no_such_type(self, model: Path, out: Path) -> None:
        """Turing has no bf16: the library says so, and that comes through."""
        options = dataclasses.replace(OPTIONS, compute_capabilities=("7.5",))
        with pytest.raises(HostError, match=r"denoiser: tensorrt_rtx failed(.|\n)*(?i:bf16|bfloat16)"):
            tensorrt.build(model, "bf16", out, options)


class TestCrash:
    @pytest.mark.usefixtures("crashing")
    def test_names_component_and_layer(self, model: Path, out: Path) -> None:
        with pytest.raises(ResourceError, match=r"denoiser: crashing_trt failed at second_conv \[Conv\]") as caught:
            tensorrt.build(model, "fp32", out, dataclasses.replace(OPTIONS, library="crashing_trt"))
        assert "-6" in str(caught.value.got)  # SIGABRT
        assert any("first_conv" in note for note in caught.value.__notes__)
        assert list(out.iterdir()) == []

    def test_memory_that_ran_out_is_told_from_other_failures(
        self, model: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        last = "Severity.name = 'ERROR'; self.logger.log(Severity, 'Out of memory at 8 GiB'); self.num_errors = 0"
        (tmp_path / "hungry_trt.py").write_text(CRASHING.replace("LAST", last))
        monkeypatch.syspath_prepend(str(tmp_path))
        with pytest.raises(ResourceError, match=r"second_conv(.|\n)*Out of memory at 8 GiB(.|\n)*more memory"):
            tensorrt.build(model, "fp32", out, dataclasses.replace(OPTIONS, library="hungry_trt"))

    @pytest.mark.usefixtures("crashing")
    def test_the_other_targets_survive(
        self, model: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kind = dataclasses.replace(ENGINES["tensorrt-rtx"], library="crashing_trt")
        monkeypatch.setitem(ENGINES, "tensorrt-rtx", kind)
        tables = (TargetTable(engine="tensorrt-rtx"), TargetTable(engine="onnxruntime"))
        cache, original = Cache(tmp_path / "cache"), Original(Checkpoint(tmp_path, "m"), IMAGE, {}, {})
        sampling = Sampling(sampler="euler", schedule="leading", steps=2, guidance_scale=1.0, noise=NoiseProcess())
        graphs = Graphs("m", original, None, sampling, sampling, {"denoiser": model.parent})
        with pytest.raises(ResourceError) as caught:
            build_targets({table.name: sources_of(graphs) for table in tables}, tables, out, cache, Stages())
        text = str(caught.value)
        assert "1 of 2 targets could not be built; nothing was published" in text
        assert "tensorrt-rtx-fp32: denoiser: crashing_trt failed at second_conv" in text
        assert (out / "onnxruntime-fp32" / "denoiser.onnx").read_bytes() == model.read_bytes()
        assert len([entry for entry in cache.root.iterdir() if entry.name.startswith("engine-")]) == 1


class TestOptions:
    def test_ranges_are_what_the_pipeline_asks(self) -> None:
        table = TargetTable(engine="tensorrt-rtx", max_images=3, compute_capabilities=("8.9",))
        denoiser, decoder = (tensorrt.options(table, name, IMAGE) for name in ("denoiser", "vae_decoder"))
        assert dict(denoiser.ranges)["batch"] == (1, 2, 6)  # guidance doubles three images
        assert dict(decoder.ranges) == {"batch": (1, 1, 1), "tile_height": (8, 16, 16), "tile_width": (8, 20, 20)}
        assert denoiser.compute_capabilities == ("8.9",)

    def test_ranges_of_a_captured_program_are_those_of_its_texts(self) -> None:
        specs = [TensorSpec(name="in_0", dtype="int64", shape=(1, "length")),
                 TensorSpec(name="in_1", dtype="float32", shape=(2, "2*length_2+3", 8))]  # fmt: skip
        program = Program.model_construct(lengths={
            "length": LengthRange(minimum=3, maximum=120), "length_2": LengthRange(minimum=2, maximum=50),
        })  # fmt: skip
        sizes = tensorrt.Lengths(program, {"denoiser": Component(inputs=tuple(specs), outputs=())})
        table = TargetTable(engine="tensorrt-rtx")
        found = dict(tensorrt.options(table, "denoiser", sizes).ranges)
        assert found == {"length": (3, 120, 120), "2*length_2+3": (7, 103, 103)}

    @needs_library
    @pytest.mark.parametrize("flag", ["weight_streaming", "version_compatible", "refit"])
    def test_flags_reach_the_library(self, flag: str) -> None:
        """By TensorRT-RTX, which has the names of all."""
        trt = importlib.import_module("tensorrt_rtx")
        table = TargetTable(engine="tensorrt", **{flag: True})
        builder = trt.Builder(trt.Logger())
        for options, wanted in ((tensorrt.options(table, "denoiser", IMAGE), True), (OPTIONS, False)):
            config = tensorrt._configure(trt, builder, builder.create_network(0), options)
            assert config.get_flag(getattr(trt.BuilderFlag, flag.upper())) is wanted

    @pytest.mark.parametrize(
        ("keys", "problem"),
        [
            ('compute_capabilities = ["9.9"]', "compute_capabilities"),
            ("compute_capabilities = []", "compute_capabilities"),
            ("max_images = 0", "max_images"),
            ('hardware_compatibility = "ampere_plus"', "not for tensorrt-rtx"),
            ("refit = true", "refit: not for tensorrt-rtx"),
        ],
    )
    def test_unusable_keys(self, keys: str, problem: str) -> None:
        with pytest.raises(RecipeError, match=problem):
            parse_recipe(RECIPE.replace("KEYS", keys), "r.toml")

    def test_keys_of_gpus_are_not_for_others(self) -> None:
        with pytest.raises(RecipeError, match="max_images: not for openvino"):
            parse_recipe(
                RECIPE.replace("tensorrt-rtx", "openvino").replace("fp16", "fp32").replace("KEYS", "max_images=2"), "r"
            )

    @needs_library
    @pytest.mark.skipif(ENGINES["tensorrt-rtx"].available(), reason="here is a GPU")
    def test_a_bundle_that_nothing_here_can_judge(self, tmp_path: Path) -> None:
        recipe = parse_recipe(RECIPE.replace("KEYS", "max_images = 1"), "r.toml")
        with pytest.raises(HostError, match=r"none of the recipe's targets can run here(.|\n)*onnxruntime"):
            make_plan(recipe, tmp_path)
