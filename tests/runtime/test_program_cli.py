"""Captured programs as ONNX Runtime runs them, and the commands that know them."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import onnx
import programs
import pytest
from fakes import LENGTH, WIDTH, Fakes
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from programs import LATENT, PICTURE, write_program
from test_cli import Cli
from test_program import drawn, with_picture

import slipcast
from slipcast.bundle.manifest import ProgramManifest, read_any_manifest
from slipcast.bundle.reader import open_any_bundle
from slipcast.cli.program_lines import program_lines


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capsys)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return programs.use(fakes.install(monkeypatch))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_program(tmp_path / "bundle")


def node(operator: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, inputs.split(), [output], **attributes)


NODES: dict[str, list[onnx.NodeProto]] = {
    "conditioning": [
        node("Cast", "ids", "floats", to=TensorProto.FLOAT), node("Unsqueeze", "floats last", "columns"),
        node("Mul", "columns factors", "angles"), node("Sin", "angles", "hidden"),
    ],
    "denoiser": [
        node("ReduceMean", "context", "first", keepdims=0), node("ReduceMean", "other", "second", keepdims=0),
        node("Sub", "first second", "text"), node("Mul", "timestep small", "time"), node("Add", "text time", "shift"),
        node("Mul", "sample most", "part"), node("Add", "part shift", "prediction"),
    ],
    "update": [node("Mul", "sigma prediction", "change"), node("Sub", "sample change", "sample_out")],
    "decoder": [
        node("Gather", "latent channels", "three", axis=1), node("Mul", "three quarter", "scaled"),
        node("Add", "scaled half", "levels"), node("Reshape", "levels apart", "cells"),
        node("Expand", "cells squares", "blocks"), node("Reshape", "blocks picture", "image"),
    ],
}  # fmt: skip
CONSTANTS = {
    "last": np.array([2]), "factors": np.arange(1, WIDTH + 1, dtype=np.float32), "small": np.float32(1e-4),
    "most": np.float32(0.8), "channels": np.arange(3), "quarter": np.float32(0.25), "half": np.float32(0.5),
    "apart": np.array([1, 3, 8, 1, 8, 1]), "squares": np.array([1, 3, 8, 2, 8, 2]), "picture": np.array(PICTURE),
}  # fmt: skip


def write_real(root: Path) -> Path:
    """The bundle of `programs`, with graphs that do the same."""
    parts, changed = programs.components(), programs.program()
    parts["update"]["outputs"][0]["name"] = "sample_out"
    for each in changed["calls"]:
        if each["component"] == "update":
            each["outputs"] = {"sample_out": each["outputs"]["sample"]}
    write_program(root, components=parts)
    for name, nodes in NODES.items():
        used = {value for each in nodes for value in each.input}
        constants = [numpy_helper.from_array(np.asarray(v), k) for k, v in CONSTANTS.items() if k in used]
        values = {
            side: [
                helper.make_tensor_value_info(
                    s["name"], TensorProto.INT64 if s["dtype"] == "int64" else TensorProto.FLOAT, s["shape"]
                )
                for s in parts[name][side]
            ]
            for side in ("inputs", "outputs")
        }
        graph = helper.make_graph(nodes, name, values["inputs"], values["outputs"], constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.save(model, root / f"{name}.onnx")
        (root / f"{name}.data").unlink()
        (root / f"{name}.xml").unlink()
        (root / f"{name}.bin").unlink()
    document = programs.document(root, components=parts, program=changed)
    document["targets"][0]["components"] = {name: {"model": f"{name}.onnx"} for name in parts}
    (root / "manifest.json").write_text(json.dumps(document))
    return root


FRAMES = 5


def write_moving(root: Path, engines: Fakes, **changes: Any) -> Path:
    """The bundle of `programs`, which gives a video; `changes` of its program."""
    parts, decode = programs.components(), engines.functions["decoder"]
    parts["decoder"]["outputs"] = [fakes.spec("image", 1, FRAMES, *PICTURE[1:])]
    shades = np.linspace(0.5, 1, FRAMES, dtype=np.float32).reshape(FRAMES, 1, 1, 1, 1)
    engines.functions["decoder"] = lambda arrays: {"image": (decode(arrays)["image"] * shades).transpose(1, 0, 2, 3, 4)}
    return write_program(root, components=parts, program=programs.program(**{"output": "frames", **changes}))


@pytest.mark.parametrize("residency", ["all", "sequential"])
def test_a_run_on_an_engine(tmp_path: Path, residency: Any) -> None:
    root = write_real(tmp_path / "b")
    with slipcast.load(root, residency=residency) as pipe:
        output = pipe(["a red circle", "a star"], negative_prompt="blue", seed=7, output_type="np")
    wanted = [drawn(root, prompt, "blue", 7 + i)[0] for i, prompt in enumerate(["a red circle", "a star"])]
    np.testing.assert_allclose(output.images, wanted, atol=1e-5)


def test_openvino_takes_scalars(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    from slipcast.engines.openvino import OpenVinoEngine

    model, root = tmp_path / "denoiser.xml", write_real(tmp_path / "b")
    openvino.save_model(openvino.Core().read_model(root / "denoiser.onnx"), model, compress_to_fp16=False)
    text = np.zeros((1, LENGTH, WIDTH), np.float32)
    given = {"sample": np.ones(LATENT, np.float32), "context": text, "other": text}
    with OpenVinoEngine(model, model.with_suffix(".bin"), "fp32") as engine:
        for timestep in programs.TABLE["denoiser.timestep"]:
            found = engine(given | {"timestep": np.array(timestep)})["prediction"]
            np.testing.assert_allclose(found, 0.8 + timestep * 1e-4, atol=1e-5)


class TestRun:
    def test_a_picture(self, cli: Cli, engines: Fakes, bundle: Path, tmp_path: Path) -> None:
        options = ("--prompt", "a star", "--negative-prompt", "blue", "--seed", "7", "--steps", "2")
        assert cli("run", bundle, *options, "--num-images", "2", "-o", tmp_path / "out", "--json") == 0
        assert cli.json["files"] == [str(tmp_path / "out" / f"{seed}.png") for seed in (7, 8)]
        assert (cli.json["steps"], cli.json["guard"]) == ([2, 2], [])
        with Image.open(tmp_path / "out" / "8.png") as picture:
            wanted = (drawn(bundle, "a star", "blue", 8)[0] * 255).round()
            assert np.abs(np.asarray(picture) - wanted).max() <= 1

    def test_other_texts(self, cli: Cli, engines: Fakes, bundle: Path, tmp_path: Path) -> None:
        given = ("--prompt", "a star", "--seed", "7", "-o")
        assert cli("run", bundle, "--text", "negative_prompt=blue", *given, tmp_path / "a.png") == 0
        assert cli("run", bundle, "--negative-prompt", "blue", *given, tmp_path / "b.png") == 0
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
        for text in ("prompt_2=x", "negative_prompt"):
            assert cli("run", bundle, "--text", text, *given, tmp_path / "c.png") == 2
            assert "give ARGUMENT=TEXT, of prompt, negative_prompt" in cli.err

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ((), "--prompt is missing"),
            (("--prompt", "a", "--steps", "30"), "num_inference_steps is fixed in this bundle"),
            (("--prompt", "a", "--guidance-scale", "7"), "expected: 4.5"),
            (("--prompt", "a", "--guard", "refuse"), "guard is not usable"),
            (("--prompt", "a", "--image", "x.png"), "this bundle takes none"),
            (("--prompt", "a", "-o", "x.npz"), "pictures have no such format"),
        ],
    )
    def test_what_is_refused(self, cli: Cli, engines: Fakes, bundle: Path, options: tuple[str, ...], says: str) -> None:
        assert cli("run", bundle, *options, "--json") == 2
        assert says in cli.err
        assert engines.calls == []

    def test_a_picture_to_draw_on(self, cli: Cli, engines: Fakes, tmp_path: Path) -> None:
        engines.functions["encoder"] = lambda arrays: {"latent": np.repeat(arrays["picture"][:, :1, ::2, ::2], 4, 1)}
        root, file = write_program(tmp_path / "b", **with_picture()), tmp_path / "a=b.png"
        Image.radial_gradient("L").save(file)
        for given in (str(file), f"image={file}"):
            assert cli("run", root, "--image", given, "-o", tmp_path / "x.png") == 0
        assert cli("run", root, "-o", tmp_path / "x.png") == 2
        assert "image is missing" in cli.err
        (tmp_path / "bad.png").write_text("no picture")
        assert cli("run", root, "--image", tmp_path / "bad.png", "-o", tmp_path / "x.png") == 2
        assert "no picture that can be read" in cli.err

    def test_pictures_of_a_list_and_arrays(self, cli: Cli, engines: Fakes, tmp_path: Path) -> None:
        changes = with_picture()
        changes["components"]["mixer"] = {
            "inputs": [fakes.spec(name, *PICTURE) for name in ("a", "b")], "outputs": [fakes.spec("picture", *PICTURE)],
        }  # fmt: skip
        program = changes["program"]
        program["sources"] = [
            *({**program["sources"][0], "value": f"image{at}", "place": at} for at in (1, 0)),
            program["sources"][1],
        ]  # fmt: skip
        program["calls"].insert(0, programs.call("mixer", {"a": "image0", "b": "image1"}, {"picture": "image"}))
        program["steps"] = [2]
        engines.functions["mixer"] = lambda arrays: {"picture": arrays["a"] - arrays["b"] / 2}
        engines.functions["encoder"] = lambda arrays: {"latent": np.repeat(arrays["picture"][:, :1, ::2, ::2], 4, 1)}
        root = write_program(tmp_path / "b", **changes)
        np.save(tmp_path / "one.npy", np.ones(PICTURE, np.float32))
        Image.new("L", (5, 5), 51).save(tmp_path / "two.png")
        given = ("--image", tmp_path / "one.npy", "--seed", "1", "-o", tmp_path / "x.png")
        assert cli("run", root, *given, "--image", f"image={tmp_path / 'two.png'}") == 0
        (mixed,) = [arrays for name, arrays in engines.calls if name == "mixer"]
        assert (mixed.a == 1).all()
        np.testing.assert_allclose(mixed.b, 0.2)
        assert cli("run", root, *given) == 2
        assert "image is a list in this bundle\n  expected: a list of 2, the first a picture, 16x16" in cli.err
        assert cli("run", root, "--image", f"imag={tmp_path / 'two.png'}") == 2
        assert "give ARGUMENT=FILE, of image" in cli.err
        assert cli("inspect", root) == 0
        assert "arguments    image (16x16, RGB; 16x16, RGB)" in cli.out

    def test_a_video(self, cli: Cli, engines: Fakes, tmp_path: Path) -> None:
        moving = write_moving(tmp_path / "m", engines, rate=24)
        given = ("--prompt", "a", "--seed", "1", "-o")
        assert cli("run", moving, *given, tmp_path / "x.png") == 0
        with Image.open(tmp_path / "x.png") as animation:
            assert animation.n_frames == FRAMES
        assert cli("run", moving, *given, tmp_path / "x.webp", "--num-images", "2", "--fps", "5", "--json") == 0
        assert cli.json["files"] == [str(tmp_path / f"x-{seed}.webp") for seed in (1, 2)]
        with Image.open(tmp_path / "x-2.webp") as animation:
            animation.load()
            assert (animation.n_frames, animation.info["duration"]) == (FRAMES, 200)
        assert cli("inspect", moving) == 0
        assert "gives        videos of 24 frames a second: image" in cli.out

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            (("-o", "x.jpg"), "videos have no such format\n  expected: .png, .webp, .gif, .mp4; or a directory"),
            (("-o", "x.wav"), "videos have no such format"),
            (("--fps", "0"), "fps is not usable"),
        ],
    )
    def test_what_is_refused_of_a_video(
        self, cli: Cli, engines: Fakes, tmp_path: Path, options: tuple[str, ...], says: str
    ) -> None:
        assert cli("run", write_moving(tmp_path / "m", engines), "--prompt", "a", *options) == 2
        assert says in cli.err
        assert engines.opened == []

    def test_fps_of_a_picture(self, cli: Cli, engines: Fakes, bundle: Path) -> None:
        assert cli("run", bundle, "--prompt", "a", "--fps", "5") == 2
        assert "none: this bundle gives no video" in cli.err

    def test_arrays_and_sounds(self, cli: Cli, engines: Fakes, tmp_path: Path) -> None:
        given = ("--prompt", "a", "--seed", "1", "-o")
        plain = write_moving(tmp_path / "p", engines, output="array")
        assert cli("run", plain, *given, tmp_path / "x.npz") == 0
        with np.load(tmp_path / "x.npz") as arrays:
            assert arrays["0000"].shape == (1, FRAMES, *PICTURE[1:])
        parts = programs.components()
        parts["decoder"]["outputs"] = [fakes.spec("image", 1, 2, 8)]
        heard = np.linspace(-1, 1, 16, dtype=np.float32).reshape(1, 2, 8)
        engines.functions["decoder"] = lambda arrays: {"image": heard}
        sounding = write_program(tmp_path / "s", components=parts, program=programs.program(output="audio", rate=16e3))
        assert cli("run", sounding, *given, tmp_path / "x.wav") == 0
        with wave.open(str(tmp_path / "x.wav")) as file:
            assert file.getparams()[:4] == (2, 2, 16000, 8)
        assert cli("inspect", sounding) == 0
        assert "gives        sounds of 16000 samples a second: image" in cli.out


class TestOtherCommands:
    def test_inspect(self, cli: Cli, bundle: Path) -> None:
        assert cli("inspect", bundle) == 0
        for line in (
            "captured  (schema 1.0",
            "program      FakePipeline: 7 calls, 2 steps",
            "arguments    prompt (to be given), negative_prompt ('')",
            "fixed        num_inference_steps=2, guidance_scale=4.5, height=16, tiled=False",
            "gives        pictures: image",
            f"source       ids int64[1, {LENGTH}]: input_ids of prompt by tokenizer.json",
            "source       noise float32[1, 4, 8, 8]: noise",
            "calls        conditioning  2 times",
            "calls        denoiser update  2 times",
            "    <- sample float32[1, 4, 8, 8]",
            "target onnxruntime-cpu-fp32",
        ):
            assert line in cli.out, line
        assert cli("inspect", bundle, "--json") == 0
        assert cli.json["program"]["steps"] == [3, 5]

    def test_inspect_of_a_picture(self) -> None:
        fields = {"path": "x", "size": 1, "sha256": "0" * 64}
        document = programs.document(Path("nowhere"), **with_picture()) | {"files": []}
        paths = [
            "table.safetensors",
            *(f"{name}{end}" for name in document["components"] for end in (".onnx", ".data")),
        ]
        document["files"] = [fields | {"path": path} for path in paths]
        manifest = read_any_manifest(json.dumps(document).encode())
        assert isinstance(manifest, ProgramManifest)
        assert "  arguments    image (16x16, RGB)" in program_lines(manifest)
        assert not [line for line in program_lines(manifest) if "together" in line]

    def test_inspect_tells_what_goes_together(self, tmp_path: Path) -> None:
        manifest = open_any_bundle(write_program(tmp_path / "b", **programs.together(4))).manifest
        assert isinstance(manifest, ProgramManifest)
        assert "  together     up to 4 images in a call of denoiser" in program_lines(manifest)

    def test_verify_and_doctor(self, cli: Cli, bundle: Path) -> None:
        assert cli("verify", bundle) == 0
        assert cli.out.startswith("ok: ")
        assert cli("doctor", bundle, "--json") in (0, 3)
        assert any("onnxruntime-cpu-fp32" in finding["name"] for finding in cli.json["findings"])
        (bundle / "table.safetensors").write_bytes((bundle / "table.safetensors").read_bytes()[:-1] + b"\0")
        assert cli("verify", bundle) == 4
        assert "table.safetensors: content differs" in cli.err

    def test_report(self, cli: Cli, bundle: Path) -> None:
        (bundle / "report.html").write_text("<p>")
        (bundle / "report.json").write_text("{}")
        (bundle / "manifest.json").write_text(json.dumps(programs.document(bundle)))
        assert cli("report", bundle) == 0
        assert "onnxruntime-cpu-fp32: not judged" in cli.out

    def test_what_is_for_others_says_so(self, cli: Cli, bundle: Path) -> None:
        assert cli("report", bundle) == 4
        assert "holds no report" in cli.err

    def test_profile_run(self, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("slipcast.timing.measure.measure_component", lambda *_: None)
        monkeypatch.setattr("slipcast.timing.measure.MOST_RUNS", 1)
        bundle, page = write_real(tmp_path / "b"), tmp_path / "page.html"
        given = ("--prompt", "a star", "--text", "negative_prompt=blue", "-o", page)
        assert cli("profile-run", bundle, *given, "--json") == 0
        calls = {each["name"]: each["calls"] for each in cli.json["components"]}
        assert calls == {"conditioning": 2, "denoiser": 2, "update": 2, "decoder": 1}
        assert cli.json["sampler"] == "FakePipeline" and len(cli.json["steps"]) == 2
        assert {layer["component"] for layer in cli.json["layers"]} <= set(calls)
        total = sum(step["seconds"] for step in cli.json["steps"]) + cli.json["outside_steps_s"]
        assert total == pytest.approx(cli.json["seconds"])
        assert "2 steps of FakePipeline" in page.read_text("utf-8")
        assert cli("profile-run", bundle, "--prompt", "a star", "--steps", "3", "-o", page) == 2
        assert "num_inference_steps is fixed in this bundle" in cli.err
