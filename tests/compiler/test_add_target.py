"""`slipcast build`: a target more for a published bundle, without torch; all of it or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from slipcast.bundle.manifest import Component, EngineFiles, ImageGeometry, Sampling, Target, TensorSpec, read_manifest
from slipcast.bundle.reader import check_digests, open_bundle
from slipcast.engines import ENGINES
from slipcast.errors import CheckFailed, HostError, RecipeError, ResourceError, SlipcastError
from slipcast.progress import Stages
from slipcast.sampling.schedules import NoiseProcess
from slipcast_compiler import engines as build
from slipcast_compiler.add_target import add_target
from slipcast_compiler.engines.pool import Pool
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.publish import write_manifest
from slipcast_compiler.precision.mixed import check_cast
from slipcast_compiler.recipe.reading import parse_target
from slipcast_compiler.recipe.targets import TargetTable

needs_rtx = pytest.mark.skipif(not ENGINES["tensorrt-rtx"].can_build(), reason="tensorrt-rtx is not installed")
SIZE = 16


def graph(scale: float = 0.5) -> Any:
    """prediction = conv(sample) + 0 * timestep."""
    weight = np.zeros((3, 3, 3, 3), np.float32)
    weight[range(3), range(3), 1, 1] = scale
    nothing = np.zeros(1, np.float32)
    nodes = [
        helper.make_node("Conv", ["sample", "w"], ["h"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Mul", ["timestep", "z"], ["t"], name="zero"),
        helper.make_node("Add", ["h", "t"], ["prediction"], name="sum"),
    ]
    latent = ["batch", 3, SIZE, SIZE]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("sample", latent), ("timestep", [1]), ("prediction", latent))
    ]
    tensors = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(nothing, "z")]
    proto = helper.make_graph(nodes, "g", ends[:2], ends[2:], tensors)
    return helper.make_model(proto, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """An unconditional pixel model on ONNX Runtime in fp32."""
    root = tmp_path / "bundle"
    (root / "onnxruntime-fp32").mkdir(parents=True)
    model = root / "onnxruntime-fp32" / "denoiser.onnx"
    onnx.save_model(graph(), model, save_as_external_data=True, location="denoiser.onnx.data", size_threshold=0)
    latent = ("batch", 3, SIZE, SIZE)
    sample, timestep, prediction = (
        TensorSpec(name=name, dtype="float32", shape=shape)
        for name, shape in (("sample", latent), ("timestep", (1,)), ("prediction", latent))
    )
    files = EngineFiles(model="onnxruntime-fp32/denoiser.onnx", weights="onnxruntime-fp32/denoiser.onnx.data")
    target = Target(engine="onnxruntime", device="cpu", precision="fp32", components={"denoiser": files})
    fields: dict[str, Any] = {
        "schema_version": "1.0", "slipcast_version": "0.1.0", "name": "tiny", "base_model": "tiny", "family": None,
        "source_sha256": "0" * 64, "text": (), "targets": (target,),
        "components": {"denoiser": Component(inputs=(sample, timestep), outputs=(prediction,))},
        "image": ImageGeometry(width=SIZE, height=SIZE, channels=3, factor=1, tile=SIZE, overlap=2),
        "sampling": Sampling(sampler="euler", schedule="leading", steps=2, guidance_scale=1.0, noise=NoiseProcess()),
    }  # fmt: skip
    write_manifest(root, fields)
    return root


def state(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*") if path.is_file()
    }  # fmt: skip


def add(bundle: Path, wanted: str, *overrides: str, output: Path | None = None, **options: Any) -> Any:
    table, cache = parse_target(wanted, overrides), Cache(bundle.parent / "cache")
    return add_target(bundle, table, output or bundle, cache, Stages(), images=2, **options)


class TestCasts:
    def test_half_precision_is_measured_on_what_the_graphs_read(self, bundle: Path) -> None:
        add(bundle, "openvino:bf16")
        (found,) = bundle.parent.glob("cache/mixed-precision-*/found.json")
        denoiser = json.loads(found.read_text())["denoiser"]
        assert (denoiser["fp32"], denoiser["nodes"], denoiser["limit"]) == ({}, 3, 0.03)
        assert 0 < denoiser["error"] < 0.01
        (inputs,) = bundle.parent.glob("cache/inputs-*/denoiser")
        arrays = dict(np.load(inputs / "0001.npz"))
        assert arrays["prediction"] == pytest.approx(arrays["sample"] / 2)
        assert len(list(inputs.iterdir())) == 2  # of one image in two steps

    def test_other_sampling_reads_other_things(self, bundle: Path) -> None:
        add(bundle, "openvino:bf16")
        document = json.loads((bundle / "manifest.json").read_text())
        document["sampling"]["steps"] = 3
        (bundle / "manifest.json").write_text(json.dumps(document))
        add(bundle, "openvino:bf16", replace=True)
        assert sorted(len(list(f.iterdir())) for f in bundle.parent.glob("cache/inputs-*/denoiser")) == [2, 3]

    def test_a_host_that_cannot_rewrite_graphs_is_told_at_once(self, bundle: Path, monkeypatch: Any) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnx_ir" else find_spec(name))
        with pytest.raises(HostError, match=r"onnx_ir not installed(.|\n)*slipcast\[build\]"):
            add(bundle, "openvino:bf16")
        assert not (bundle.parent / "cache").exists()

    def test_what_would_be_too_far_off_stays_in_fp32(self, bundle: Path) -> None:
        added = add(bundle, "openvino:bf16", "max_cast_error=1e-6")
        layers = ElementTree.parse(bundle / added.target.components["denoiser"].model).findall("layers/layer")
        marked = {layer.get("name") for layer in layers if layer.find("rt_info") is not None}
        assert {"conv/WithoutBiases", "w"} <= marked or {"conv", "w"} <= marked
        assert added.target.addition and added.target.addition.psnr_worst > 60

    def test_an_engine_that_rounds_all_the_same_is_told(self, bundle: Path, caplog: Any) -> None:
        (bundle.parent / "inputs" / "denoiser").mkdir(parents=True)
        sample = np.random.default_rng(0).standard_normal((1, 3, SIZE, SIZE), np.float32)
        other = {"sample": sample, "timestep": np.ones(1, np.float32), "prediction": 0.51 * sample}
        np.savez(bundle.parent / "inputs" / "denoiser" / "0000.npz", **other)
        found: Any = {"denoiser": {"fp32": {"conv": "Conv"}, "limit": 0.01}}
        (target,) = open_bundle(bundle).manifest.targets
        check_cast(bundle, target, (), found, bundle.parent / "inputs", Stages())
        assert found["denoiser"]["engine_error"] == pytest.approx(0.01 / 0.51, rel=0.01)
        assert "denoiser on onnxruntime-cpu-fp32 is 0.02 off, more than 0.01" in caplog.text


class TestAdded:
    def test_compared_with_the_graphs_it_came_from_and_without_torch(self, bundle: Path, tmp_path: Path) -> None:
        """In a process where torch cannot be imported, nor in its children."""
        for name in ("torch", "diffusers", "transformers"):
            (tmp_path / "banned").mkdir(exist_ok=True)
            (tmp_path / "banned" / f"{name}.py").write_text("raise SystemExit('banned')")
        arguments = ["build", str(bundle), "--target", "openvino:fp32", "--images", "2", "--json", "--cache", "cache"]
        code = f"import sys; from slipcast.cli.main import cli; cli.main({arguments}, standalone_mode=False)\n"
        done = subprocess.run(
            [sys.executable, "-c", f"{code}assert not {{'torch', 'diffusers'}} & set(sys.modules)"], cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path / "banned")}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert (found["target"], found["not_run"]) == ("openvino-cpu-fp32", None)
        assert found["addition"]["against"] == "onnxruntime-cpu-fp32"
        assert found["addition"]["images"] == 2
        assert found["addition"]["psnr_worst"] > 80
        opened = open_bundle(bundle)
        check_digests(opened)
        assert [target.id for target in opened.manifest.targets] == ["onnxruntime-cpu-fp32", "openvino-cpu-fp32"]
        assert opened.manifest.targets[1].addition
        assert sorted(path.name for path in tmp_path.iterdir()) == ["banned", "bundle", "cache"]

    @needs_rtx
    @pytest.mark.skipif(ENGINES["tensorrt-rtx"].available(), reason="here is a GPU")
    def test_what_cannot_run_here_is_added_and_said_to_be(self, bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
        made = add(bundle, "tensorrt-rtx:fp16")
        assert made.target.addition is None
        assert made.not_run in caplog.text
        assert "tensorrt-rtx-cuda-fp16 was not run here and is compared with nothing" in caplog.text
        add(bundle, "tensorrt-rtx:fp16", 'compute_capabilities=["8.6", "8.9"]')
        opened = open_bundle(bundle)
        check_digests(opened)
        # A host takes the first that it can run: some GPUs before any, GPUs before CPUs.
        ids = [target.id for target in opened.manifest.targets]
        assert ids == ["tensorrt-rtx-cuda-fp16-sm86-sm89", "tensorrt-rtx-cuda-fp16", "onnxruntime-cpu-fp32"]
        names = {target.files[0] for target in opened.manifest.targets[:2]}
        assert names == {"tensorrt-rtx-fp16-sm86-sm89/denoiser.engine", "tensorrt-rtx-fp16/denoiser.engine"}

    @pytest.mark.skipif(ENGINES["onnxruntime-gpu"].available(), reason="here is a GPU")
    def test_the_same_bytes_are_there_once(self, bundle: Path) -> None:
        before = state(bundle)
        made = add(bundle, "onnxruntime-gpu:fp32")
        assert made.target.files == made.manifest.targets[-1].files
        assert {**state(bundle), "manifest.json": ""} == {**before, "manifest.json": ""}

    def test_elsewhere(self, bundle: Path, tmp_path: Path) -> None:
        before = state(bundle)
        made = add(bundle, "openvino:bf16", output=tmp_path / "other")
        assert state(bundle) == before
        assert read_manifest((tmp_path / "other" / "manifest.json").read_bytes()) == made.manifest

    def test_built_again(self, bundle: Path) -> None:
        add(bundle, "openvino:fp32")
        before = state(bundle)
        with pytest.raises(RecipeError, match=r"has a target openvino-cpu-fp32 already(.|\n)*--replace"):
            add(bundle, "openvino:fp32")
        assert state(bundle) == before
        made = add(bundle, "openvino:fp32", replace=True)
        assert len(made.manifest.targets) == 2
        check_digests(open_bundle(bundle))


class TestRefused:
    def refused(self, bundle: Path, kind: type[SlipcastError], problem: str, wanted: str) -> None:
        before = state(bundle)
        with pytest.raises(kind, match=problem):
            add(bundle, wanted)
        assert state(bundle) == before
        assert {path.name for path in bundle.parent.iterdir()} <= {"bundle", "cache"}

    def test_no_portable_graphs(self, bundle: Path) -> None:
        problem = r"no portable graphs for a target in int8(.|\n)*a target onnxruntime in int8(.|\n)*\[\[targets\]\]"
        self.refused(bundle, RecipeError, problem, "openvino:int8")

    def test_its_own_source(self, bundle: Path) -> None:
        self.refused(bundle, RecipeError, "has a target onnxruntime-cpu-fp32 already", "onnxruntime:fp32")

    @pytest.mark.skipif(ENGINES["tensorrt"].can_build(), reason="TensorRT is here")
    def test_a_library_that_is_not_here(self, bundle: Path) -> None:
        self.refused(bundle, HostError, "target tensorrt cannot be built here", "tensorrt:fp16")

    def test_a_build_that_fails(self, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any, **options: Any) -> None:
            raise HostError("the library gave up")

        monkeypatch.setitem(build.BUILDERS, "openvino", fail)
        self.refused(bundle, HostError, "gave up", "openvino:fp32")

    def test_other_pictures(self, bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        builder = build.BUILDERS["openvino"]

        def misread(model: Path, precision: str, out: Path, **options: Any) -> Any:
            onnx.save(graph(scale=-0.5), out / "denoiser.onnx")
            return builder(out / "denoiser.onnx", precision, out)

        monkeypatch.setitem(build.BUILDERS, "openvino", misread)
        self.refused(bundle, CheckFailed, "makes other pictures than onnxruntime-cpu-fp32", "openvino:fp32")

    def test_row_25_a_full_disk(self, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
        self.refused(bundle, ResourceError, r"the disk is too full(.|\n)*about 0 MB(.|\n)*0 MB free", "openvino:fp32")

    def test_a_damaged_bundle(self, bundle: Path) -> None:
        weights = bundle / "onnxruntime-fp32" / "denoiser.onnx.data"
        weights.write_bytes(weights.read_bytes()[:-1] + b"!")
        self.refused(bundle, SlipcastError, r"denoiser\.onnx\.data: content differs", "openvino:fp32")

    def test_unusable_words(self) -> None:
        with pytest.raises(RecipeError, match=r"--target openvino:fp16 is not usable(.|\n)*offers fp32, bf16"):
            parse_target("openvino:fp16")
        with pytest.raises(RecipeError, match="max_images: not for openvino"):
            parse_target("openvino", ["max_images=2"])
        with pytest.raises(RecipeError, match="unknown key 'depth'"):
            parse_target("openvino", ["depth=2"])


def test_compiled_targets_share_too(bundle: Path, tmp_path: Path) -> None:
    source = build.Source(bundle / "onnxruntime-fp32" / "denoiser.onnx", "a")
    (tmp_path / "out").mkdir()
    pool, image = Pool(tmp_path / "out"), read_manifest((bundle / "manifest.json").read_bytes()).image
    targets: list[Target] = [
        build.build_target(
            TargetTable(engine=engine),
            build.Sources({"denoiser": source}, image),
            pool,
            Cache(tmp_path / "cache"),
            lambda *_: None,
        )
        for engine in ("onnxruntime", "onnxruntime-gpu")
    ]
    assert targets[0].components == targets[1].components
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["onnxruntime-fp32"]
