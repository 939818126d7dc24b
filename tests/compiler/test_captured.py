"""A pipeline that nothing describes, from recipe to picture: captured, compiled, judged, drawn with; and refused."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import slipcast
from conftest import ROOT, call_cli, compile_here
from slipcast.errors import ArtifactError, CheckFailed, HostError, NumericalError, RequestError
from slipcast_compiler.bench.plan import Options
from slipcast_compiler.bench.plan_program import plan_program
from slipcast_compiler.judge.captured import PipelineDrawing, draw
from slipcast_compiler.pages.program import write_program_report
from slipcast_compiler.pages.record import typed_program_record
from slipcast_compiler.recipe.reading import parse_recipe

sys.path.insert(0, str(ROOT / "tests" / "capture"))
from lpips_weights import write_lpips
from tiny import open_pipeline

RECIPE = """\
name = "tiny"
[model]
path = "model"
[call]
num_inference_steps = 2
height = 32
width = 32
[family]
prompts = ["a red circle", "a <b>blue</b> star", "a small white circle", "the background"]
held_out = 0.5
[gate]
psnr = 60
[[targets]]
engine = "onnxruntime"
[[targets]]
engine = "openvino"
"""
HELD_OUT = 2


@dataclass(frozen=True)
class Made:
    """Where a tiny pipeline and its recipe lie, and what the compile said."""

    folder: Path
    said: str

    @property
    def bundle(self) -> Path:
        return self.folder / "artifacts" / "tiny"

    @property
    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.bundle / "report.json").read_text("utf-8"))
        return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL, as people have checkpoints, with its recipe."""
    folder = tmp_path_factory.mktemp("captured")
    open_pipeline("stable_diffusion_xl").save_pretrained(folder / "model")
    (folder / "tiny.toml").write_text(RECIPE)
    (folder / "prompts.txt").write_text("a red circle\na blue star\n")
    return folder


@pytest.fixture(scope="module")
def made(place: Path) -> Made:
    """It is compiled once for all tests."""
    done = compile_here("tiny.toml", cwd=place)
    assert done.returncode == 0, done.stderr
    return Made(place, done.stdout)


def test_the_bundle_draws_what_the_pipeline_draws(made: Made) -> None:
    prompt, seed = "a large star on white", 3
    done = call_cli("run", str(made.bundle), "--prompt", prompt, "--seed", str(seed), "-o", "star.png", cwd=made.folder)
    assert done.returncode == 0, done.stderr
    found = np.asarray(Image.open(made.folder / "star.png")).astype(int)
    pipe, generator = open_pipeline("stable_diffusion_xl"), torch.Generator("cpu").manual_seed(seed)
    pictures = pipe(prompt, num_inference_steps=2, height=32, width=32, generator=generator, output_type="np").images
    assert np.abs(found - (pictures[0] * 255).round()).max() <= 1


def test_what_the_report_says(made: Made) -> None:
    record = typed_program_record(made.record)
    assert record.passed and record.verified <= record.limit
    assert [target["id"] for target in record.targets] == ["onnxruntime-cpu-fp32", "openvino-cpu-fp32"]
    assert all(target["quality"]["psnr_worst"] >= 60 for target in record.targets)
    assert list(record.parts) == ["conditioning", "start", "denoiser", "decoder"]
    assert (record.parts["conditioning"].uses, record.parts["denoiser"].uses) == (1, 2)
    assert record.parts["conditioning"].modules == ("text_encoder", "text_encoder_2")
    assert record.family and len(record.family.held_out_prompts) == HELD_OUT
    assert (record.texts, record.gives, record.fixed["height"]) == (("prompt",), "image", 32)
    assert record.sampling and (record.sampling["sampler"], record.sampling["steps"]) == ("euler", 2)
    assert record.free == ("num_inference_steps", "guidance_scale")
    recipe = parse_recipe((made.folder / "tiny.toml").read_text(), "tiny.toml")
    assert record.recipe["call"] == recipe.call
    assert call_cli("report", str(made.bundle), cwd=made.folder).returncode == 0


def test_what_the_page_shows(made: Made) -> None:
    page = (made.bundle / "report.html").read_text("utf-8")
    assert str(Path("artifacts") / "tiny" / "report.html") in made.said
    assert not re.search(r"<script|<link|https?://|<b>blue", page)
    assert page.count('src="data:image/png;base64,') == HELD_OUT * (1 + 2 * 2)
    plain = re.sub(r"<[^>]*>|\s+", " ", page)
    for text in (
        "The gate holds on every target.", "the program gives what the pipeline gives",
        r"a &lt;b&gt;blue&lt;/b&gt; star", r"conditioning +text_encoder, text_encoder_2 +once for the same texts",
        r"1 to 2 +unet +u \+ 5 \(c - u\)", r"noise +aten.randn.generator by the call&#39;s generator +float32",
        "num_inference_steps = 2", r"PSNR, worst image \(dB\) +\d+\.\d +60\.0 +passed",
    ):  # fmt: skip
        assert re.search(text, plain), text
    assert "noise floor" not in plain and "CLIP" not in plain


def test_a_page_without_pictures_or_a_loop(made: Made, tmp_path: Path) -> None:
    record = made.record | {"gives": "array", "family": None, "not_run": {"gpu": "none <here>"}}
    guard = {"operator": "_local_scalar_dense", "where": "diffusers/pipeline.py:12", "of": ["prompt"], "times": 3}
    record["capture"] |= {"loop": None, "guards": [guard]}
    nothing: Any = SimpleNamespace(
        judged=SimpleNamespace(runs={}, variants={}), program=SimpleNamespace(output="array")
    )
    write_program_report(tmp_path, record, nothing)
    page = (tmp_path / "report.html").read_text("utf-8")
    plain = re.sub(r"<[^>]*>|\s+", " ", page)
    for text in (
        r"_local_scalar_dense +diffusers/pipeline.py:12 +prompt +3", "the scheduler takes no step",
        "Of arrays PSNR alone is run", "The gate holds on every target that was run.", "none &lt;here&gt;",
    ):  # fmt: skip
        assert re.search(text, plain), text
    assert "<img" not in page and "Held-out prompts" not in page


@pytest.mark.slow
def test_bench_against_the_pipeline_itself(made: Made) -> None:
    options = (
        "--against",
        "diffusers,openvino-genai",
        "--model",
        "model",
        "--images",
        "2",
        "-o",
        "bench.json",
        "--json",
    )
    done = call_cli("bench", str(made.bundle), *options, cwd=made.folder)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert list(document["sides"]) == ["bundle", "diffusers"]
    assert document["sides"]["bundle"]["quality"]["psnr_mean"]["value"] > 60
    assert document["ratios"]["diffusers"]["pairs"] == 2
    assert document["settings"]["image"] == "32x32"
    assert document["settings"]["sampling"] == {
        "sampler": "StableDiffusionXLPipeline", "steps": 2, "guidance_scale": 5.0,
    }  # fmt: skip
    assert document["missing"]["openvino-genai"]["reason"] == "does not know captured pipelines"


def test_what_bench_refuses_of_a_captured_pipeline(made: Made, tmp_path: Path) -> None:
    model, other = made.folder / "model", tmp_path / "other"
    shutil.copytree(model, other)
    (other / "README.md").write_text("of another day")
    for options, error, says in (
        (Options(("difusers",)), RequestError, "unknown peer 'difusers'"),
        (Options(("openvino-genai",)), HostError, "does not know captured pipelines"),
        (Options(("diffusers",), tmp_path / "nowhere"), RequestError, "name it with --model DIR"),
        (Options(("diffusers",), made.folder), ArtifactError, "model_index.json: not found"),
        (Options(("diffusers",), other), ArtifactError, "not the model that the bundle was compiled from"),
        (Options((), model, steps=5000), RequestError, "steps"),
    ):
        with pytest.raises(error, match=says):
            plan_program(made.bundle, options)
    plan = plan_program(made.bundle, Options(("diffusers-bf16",), model))
    assert [side.name for side in plan.sides] == ["bundle", "diffusers-bf16"]
    assert plan.reference and plan.reference.job["dtype"] == "float32"
    assert plan.requests(0, 3) == ([*plan.prompts, plan.prompts[0]][:3], [1000, 1001, 1002])


def test_a_second_compile_exports_nothing(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def export(*_: Any) -> None:
        raise AssertionError("it is in the cache")

    monkeypatch.setattr("slipcast_compiler.graphs_program.export_pipeline", export)
    again = compile_here("tiny.toml", "--set", "gate.psnr=200", "-o", "artifacts/missed", cwd=made.folder)
    assert (again.returncode, "limit 200" in again.stderr) == (1, True), again.stderr
    assert "artifacts/missed.rejected/report.html" in again.stderr
    page = (made.folder / "artifacts" / "missed.rejected" / "report.html").read_text("utf-8")
    assert "The gate was missed: this bundle was not published." in page
    assert not (made.folder / "artifacts" / "missed").exists()


def replaced(old: str, new: str) -> str:
    assert old in RECIPE
    return RECIPE.replace(old, new)


def test_scores_lpips_and_prompts_out_of_the_family(made: Made) -> None:
    """Judged and shown as of any bundle; nothing else changes, so that nothing is built again."""
    write_lpips(made.folder, "alex")
    scorer = ROOT / "recipes" / "models" / "shapes-scorer"
    asked = f'{{scorer = "{scorer}", lpips = ".", out_of_family = ["a dog"]}}'
    limits = "{psnr = 60, clip_drop = 0.01, clip_drop_worst = 0.01, retrieval_drop = 0, lpips = 0.001}"
    given = ("--set", f"evaluate={asked}", "--set", f"gate={limits}", "-o", "artifacts/scored")
    done = compile_here("tiny.toml", *given, cwd=made.folder)
    assert done.returncode == 0, done.stderr
    scored = made.folder / "artifacts" / "scored"
    record = typed_program_record(json.loads((scored / "report.json").read_text("utf-8")))
    assert record.passed and record.family and record.family.out_of_family_prompts == ("a dog",)
    for rows in record.gate.values():
        assert [row.passed for row in rows] == [True, True, True, True, None, True]
    quality = record.targets[0]["quality"]
    assert quality["out_of_family"]["images"] == 1 and quality["out_of_family"]["psnr_worst"] > 60
    assert quality["clip_score_mean"] == pytest.approx(quality["original"]["clip_score_mean"], abs=1e-4)
    page = (scored / "report.html").read_text("utf-8")
    plain = re.sub(r"<[^>]*>|\s+", " ", page)
    for text in (
        r"CLIP change, mean +\S+ % +-1.00 % +passed", r"LPIPS, mean +0.0000 +0.0010 +passed", "Out of the family",
        r"a dog +· seed 2\d+ +original", "LPIPS weights", "of 4 of the family",
    ):  # fmt: skip
        assert re.search(text, plain), text
    assert "noise floor" not in plain
    said = call_cli("report", str(scored), cwd=made.folder).stdout
    assert "out of the family: CLIP" in said and "LPIPS" in said


def test_found_levels_and_early_exit(made: Made) -> None:
    """In more steps than the pipeline's own, of the same capture."""
    given = ("--set", "sampling.steps=6", "--set", "early_exit={max_error=0.9, prompts=2}", "--set", "gate={}")
    levels = ("--set", 'timesteps={method="dp", prompts=2, fine_steps=9}')
    done = compile_here("tiny.toml", *given, *levels, "-o", "artifacts/early", cwd=made.folder)
    assert done.returncode == 0, done.stderr
    early = made.folder / "artifacts" / "early"
    record = typed_program_record(json.loads((early / "report.json").read_text("utf-8")))
    assert record.timesteps and record.sampling and record.free == ("guidance_scale",)
    assert record.sampling["sigmas"] == record.timesteps["sigmas"] and len(record.timesteps["sigmas"]) == 7
    assert record.early_exit and record.recipe["early_exit"] == {"max_error": 0.9, "prompts": 2}
    for found in record.early_exit["targets"].values():
        assert found["evaluations"] < found["all_evaluations"] == 6 and found["error"] <= 0.9
    page = re.sub(r"<[^>]*>|\s+", " ", (early / "report.html").read_text("utf-8"))
    assert re.search(r"Early exit, at an error of 0.9 or less on the mean of 2 calibration prompts: onnx", page)
    assert re.search(r"Found by dp on calibration prompts.+ linspace +\d", page)
    manifest = json.loads((early / "manifest.json").read_text())
    assert manifest["requires"] == ["program", "early_exit"]
    assert all(target["early_exit"] > 0 for target in manifest["targets"])
    done = call_cli("run", str(early), "--prompt", "a red circle", "--seed", "1", "-o", "e.png", cwd=made.folder)
    assert done.returncode == 0, done.stderr


def test_feature_caching(made: Made) -> None:
    given = ("--set", "sampling.steps=5", "--set", "caching={full_steps=3, share=0.9}", "--set", "gate={}")
    done = compile_here("tiny.toml", *given, "-o", "artifacts/cached", cwd=made.folder)
    assert done.returncode == 0, done.stderr
    cached = made.folder / "artifacts" / "cached"
    record = typed_program_record(json.loads((cached / "report.json").read_text("utf-8")))
    assert record.caching and sum(record.caching["mask"]) == record.caching["full_steps"] == 3
    assert set(record.caching["engines"]) == {"denoiser", "denoiser_shallow"} and record.caching["share"] <= 0.9
    manifest = json.loads((cached / "manifest.json").read_text())
    assert manifest["requires"] == ["program", "caching"]
    assert manifest["program"]["loop"]["shallow"]["mask"] == record.caching["mask"]
    page = re.sub(r"<[^>]*>|\s+", " ", (cached / "report.html").read_text("utf-8"))
    assert "3 of 5 steps evaluate the whole denoiser" in page
    assert re.search("caching +3 of 5 steps in full: F", call_cli("inspect", str(cached)).stdout)
    done = call_cli("run", str(cached), "--prompt", "a red circle", "--seed", "1", "-o", "c.png", cwd=made.folder)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_steps_without_guidance(made: Made) -> None:
    """In half precision and in INT8: each of both denoisers is measured on calls of its own."""
    targets = 'targets=[{engine="openvino", precision="bf16"}, {engine="onnxruntime", precision="int8"}]'
    given = ("sampling={steps=4, guidance_interval=[0.0, 3.0]}", "gate={}", targets, "passes.quantize.samples=4")
    options = [word for each in given for word in ("--set", each)]
    done = compile_here("tiny.toml", *options, "-o", "artifacts/interval", cwd=made.folder)
    assert done.returncode == 0, done.stderr
    bundle = made.folder / "artifacts" / "interval"
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["requires"] == ["program", "guidance_interval"]
    assert manifest["program"]["loop"]["sampling"]["guidance_interval"] == [0.0, 3.0]
    assert manifest["program"]["loop"]["unguided"][-1]["component"] == "denoiser_2"
    record = typed_program_record(json.loads((bundle / "report.json").read_text("utf-8")))
    assert set(record.quantized["int8"]) == {"denoiser", "denoiser_2"}
    assert "guidance at sigma 0.0 to 3.0 alone" in (bundle / "report.html").read_text("utf-8")
    assert re.search("guidance +at sigma 0 to 3; else denoiser_2", call_cli("inspect", str(bundle)).stdout)
    done = call_cli("run", str(bundle), "--prompt", "a red circle", "--seed", "1", "-o", "i.png", cwd=made.folder)
    assert done.returncode == 0, done.stderr
    # Of a closed family, where images stop early: at guidance of 1 they are the pipeline's own all the same.
    more = (
        *given[:2],
        "family.closed=true",
        "early_exit={max_error=0.9, prompts=2}",
        'targets=[{engine="onnxruntime"}]',
    )
    options = [word for each in more for word in ("--set", each)]
    done = compile_here("tiny.toml", *options, "-o", "artifacts/closed-interval", cwd=made.folder)
    assert done.returncode == 0, done.stderr
    bundle, prompt = made.folder / "artifacts" / "closed-interval", "a red circle"
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert set(manifest["requires"]) == {"program", "guidance_interval", "early_exit"}
    assert not {"conditioning", "conditioning_halves"} & set(manifest["components"])
    pipe, generator = open_pipeline("stable_diffusion_xl"), torch.Generator("cpu").manual_seed(3)
    asked = {"num_inference_steps": 2, "guidance_scale": 1.0}  # other steps than the bundle's, which take them all
    wanted = pipe(prompt, height=32, width=32, generator=generator, output_type="np", **asked).images
    with slipcast.load(bundle) as loaded:
        found = loaded(prompt, seed=3, output_type="np", **asked).images
    assert np.abs(found - wanted).max() < 1e-3


REFUSED = {
    "all guided": (RECIPE + "[sampling]\nguidance_interval = [0.0, 10000.0]\n", "leaves out none of the steps, or all"),
    "no guidance": (
        replaced("[family]", "guidance_scale = 1.0\n[family]") + "[sampling]\nguidance_interval = [0.0, 3.0]\n",
        "guidance_interval is not for this pipeline: its guidance_scale is no number above 1",
    ),
    "listed guidance": (
        replaced("height = 32\nwidth = 32", "height = [32, 64]\nwidth = [32, 64]")
        + "[sampling]\nguidance_interval = [0.0, 3.0]\n",
        "guidance_interval is for one combination of what call lists",
    ),
    "features without guidance": (
        RECIPE + "[caching]\nfull_steps = 2\n[sampling]\nsteps = 4\nguidance_interval = [0.0, 3.0]\n",
        "[caching] does not go with sampling.guidance_interval",
    ),
    "key": (replaced("height =", "hieght ="), "did you mean height?"),
    "value": (replaced("height = 32", "height = 33"), "divisible by 8"),
    "prompt": (replaced("[family]", 'prompt = "x"\n[family]'), "those of the [family]"),
    "generator": (replaced("[family]", "generator = 1\n[family]"), "call.generator"),
    "images": (replaced("[family]", "num_images_per_prompt = 2\n[family]"), "one by one"),
    "steps": (replaced("num_inference_steps = 2", "num_inference_steps = 0"), "depends on no prompt"),
    "sampling": (RECIPE + "[sampling]\nwidth = 64\n", "goes under [call]"),
    "noise": (RECIPE + '[sampling]\nschedule = "leading"\n', "begins at another noise level"),
    "schedule": (RECIPE + '[sampling]\nschedule = "flow"\n', "not a schedule for epsilon"),
    "guidance": (RECIPE + "[sampling]\nguidance_scale = 1.0\n", "another program"),
    "no family": (re.sub(r"\[family\].*?\[gate\]", "[gate]", RECIPE, flags=re.DOTALL), "expected: a [family]"),
    "tensorrt": (RECIPE + '[[targets]]\nengine = "tensorrt-rtx"\nmax_images = 2\n', "max_images"),
    "pass": (RECIPE + "[profile]\nprompts = 1\n[passes.recover]\nsteps = 9\n", "too few calibration prompts"),
    "few": (RECIPE + "[passes.low_rank]\nenergy = 0.9\n", "at least 4 different ones"),
    "scorer": (RECIPE + '[evaluate]\nscorer = "clip"\n', "evaluate.scorer does not exist"),
    "steps to exit": (RECIPE + "[early_exit]\n", "of 2 steps none can be left out"),
    "others' steps": (
        replaced("num_inference_steps = 2", "num_inference_steps = [3, 4]") + "[early_exit]\n",
        "[early_exit] is not for this pipeline: its numbers of steps are listed",
    ),
    "no finer steps": (RECIPE + "[timesteps]\nfine_steps = 4\n[sampling]\nsteps = 4\n", "fine_steps is no finer"),
    "drawn noise": (
        RECIPE + '[timesteps]\n[sampling]\nsampler = "euler_ancestral"\n', "has no trajectory to come near to"
    ),
    "others' levels": (
        replaced("num_inference_steps = 2", "num_inference_steps = [3, 4]") + "[timesteps]\n",
        "[timesteps] is not for this pipeline: its numbers of steps are listed",
    ),
    "no shallow step": (RECIPE + "[caching]\nfull_steps = 2\n", "no step is left that could be shallow"),
    "two a step": (RECIPE + '[caching]\n[sampling]\nsampler = "heun"\n', "more often than once a step"),
    "too small a share": (RECIPE + "[caching]\nfull_steps = 1\nshare = 0.01\n", "unet has no place where one feature"),
    "listed features": (
        replaced("height = 32\nwidth = 32", "height = [32, 64]\nwidth = [32, 64]") + "[caching]\nfull_steps = 1\n",
        "one combination of what call lists",
    ),
    "stranger": (RECIPE + '[evaluate]\nout_of_family = ["a red circle"]\n', "a prompt is of the family"),
    "variant": (replaced("path =", 'variant = "fp16"\npath ='), "no component of model has such weights"),
    "pipeline": (replaced("path =", 'pipeline = "UNet2DModel"\npath ='), "no pipeline UNet2DModel"),
    "module": (replaced("path =", 'pipeline = "nowhere:Class"\npath ='), "nowhere cannot be imported"),
    "model": (replaced('"model"', '"nowhere"'), "model.path does not exist"),
}  # fmt: skip


@pytest.mark.parametrize(("recipe", "said"), REFUSED.values(), ids=REFUSED)
def test_what_a_dry_run_refuses(recipe: str, said: str, place: Path) -> None:
    (place / "wrong.toml").write_text(recipe)
    done = call_cli("compile", "wrong.toml", "--dry-run", cwd=place)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert said in done.stderr


def test_an_empty_negative_prompt_is_fixed(place: Path) -> None:
    (place / "empty.toml").write_text(replaced("[family]", 'negative_prompt = ""\n[family]'))
    done = call_cli("compile", "empty.toml", "--dry-run", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["call"]["negative_prompt"] == ""
    assert summary["family"] == {"calibration": 2, "held_out": HELD_OUT}
    assert summary["targets"] == ["onnxruntime-fp32", "openvino-fp32"]


def test_init_writes_a_recipe_with_the_pipelines_arguments(place: Path) -> None:
    done = call_cli("init", "model", "prompts.txt", "-o", "first.toml", cwd=place)
    assert done.returncode == 0, done.stderr
    text = (place / "first.toml").read_text("utf-8")
    for line in ("# num_inference_steps = 50", "# guidance_scale = 5.0", "# height = 32", "# width = 32"):
        assert f"\n{line}\n" in text
    assert "[sampling]" not in text and "scorer" not in text
    commented = parse_recipe(re.sub(r"^# (?=\w+ = [\d\"])", "", text, flags=re.MULTILINE), "first.toml")
    assert (commented.call["num_inference_steps"], commented.call["negative_prompt"]) == (50, "blurry")
    assert parse_recipe(text, "first.toml").call == {}
    alone = call_cli("init", "model", "-o", "alone.toml", cwd=place)
    assert (alone.returncode, "MODEL PROMPTS" in alone.stderr) == (2, True)


def test_a_model_needs_no_recipe(place: Path) -> None:
    """The number of steps is the pipeline's own, where nothing else is said."""
    given = ("--set", 'targets=[{engine="onnxruntime"}]', "--dry-run", "--json")
    done = call_cli("compile", "model", "--prompts", "prompts.txt", *given, cwd=place)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["name"], summary["call"]) == ("model-prompts", {"num_inference_steps": 50})
    assert summary["parts"]["denoiser"]["uses"] == summary["loop"]["steps"] == 50


def test_capture_of_what_is_not_there(place: Path) -> None:
    for given, got in (("nowhere", "no such directory"), ("tiny.toml", "a file")):
        done = call_cli("capture", given, cwd=place)
        assert (done.returncode, got in done.stderr, "recipe" in done.stderr) == (2, True, False), done.stderr


def test_a_pipeline_whose_pictures_are_no_numbers(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "model", tmp_path / "model")
    pipe = open_pipeline("stable_diffusion_xl")
    weight = pipe.vae.decoder.conv_in.weight.data
    kept = weight.clone()
    try:
        weight.copy_(3e38 * weight.sign())  # finite, but not what is summed; and less so what is normalised
        pipe.vae.save_pretrained(tmp_path / "model" / "vae")
    finally:
        weight.copy_(kept)
    call = {"num_inference_steps": 1, "height": 32, "width": 32}
    drawing = PipelineDrawing(tmp_path / "model", None, (call,), ("a star",), (5,))
    with pytest.raises(ArtifactError, match="'a star', seed 5"):
        draw(drawing, lambda done, total: None)


def test_a_target_whose_pictures_are_no_numbers(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_program(*_: Any) -> None:
        raise NumericalError("decoder: out_0 is not finite")

    monkeypatch.setattr("slipcast_compiler.judge.bundled.run_program", run_program)
    done = compile_here("tiny.toml", "-o", "artifacts/broken", cwd=made.folder)
    assert done.returncode == CheckFailed.exit_code
    assert "onnxruntime-cpu-fp32 gives what is no number" in done.stderr
    assert "decoder: out_0" in done.stderr


def test_a_picture_that_is_not_there_is_refused_in_the_dry_run(place: Path) -> None:
    options = ("--dry-run", "--set", "call.ip_adapter_image='none.png'")
    done = call_cli("compile", "tiny.toml", *options, cwd=place)
    assert done.returncode == 2
    assert "call.ip_adapter_image: none.png is no picture that can be read" in done.stderr


def test_a_recipe_chooses_the_sampler(made: Made) -> None:
    """In the dry run; what such a bundle draws is seen in tests/capture/test_driving.py."""
    text = (
        made.folder / "tiny.toml"
    ).read_text() + '[sampling]\nsampler = "dpmpp_2m"\nschedule = "karras"\nsteps = 4\n'
    (made.folder / "sampled.toml").write_text(text)
    done = call_cli("compile", "sampled.toml", "--dry-run", "--json", cwd=made.folder)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    chosen = {name: summary["sampling"][name] for name in ("sampler", "schedule", "steps", "guidance_scale")}
    assert chosen == {"sampler": "dpmpp_2m", "schedule": "karras", "steps": 4, "guidance_scale": 5.0}
    assert summary["arguments"]["numbers"] == {"num_inference_steps": 2, "guidance_scale": 5.0}


@pytest.mark.slow
def test_integers_and_half_precision(place: Path) -> None:
    """The loop is calibrated and quantised, linear layers of all components are in 4 bits, and what bf16 would spoil is
    found, on the pipeline's own calls."""
    text = RECIPE[: RECIPE.index("[gate]")].replace('"tiny"', '"small"') + "[passes.quantize]\nsamples = 4\n"
    for target in (
        '"onnxruntime"\nprecision = "int8"',
        '"openvino"\nprecision = "int8"',
        '"openvino"\nprecision = "bf16"',
        '"onnxruntime"\nprecision = "int4"',
        '"openvino"\nprecision = "int4"',
    ):
        text += f"[[targets]]\nengine = {target}\n"
    (place / "small.toml").write_text(text)
    done = compile_here("small.toml", cwd=place)
    assert done.returncode == 0, done.stderr
    bundle = place / "artifacts" / "small"
    record = typed_program_record(json.loads((bundle / "report.json").read_text("utf-8")))
    found = record.quantized["int8"]["denoiser"]
    assert 0 < found["quantised"] <= found["layers"] and 0 < found["error"] <= found["options"]["max_error"]
    assert any(layer.startswith("unet.") for layer in found["kept"] | dict.fromkeys(found["tried"][0][:1]))
    casts = record.mixed_precision
    assert set(casts) == {"openvino-int8", "openvino-bf16", "openvino-int4"}
    assert {"conditioning", "denoiser_prompt"} <= record.quantized["int4"].keys()
    assert "decoder" not in record.quantized["int4"]  # of which most are convolutions
    for each in record.quantized["int4"].values():
        assert 0 < each["quantised"] <= each["layers"] and each["error"] <= each["options"]["max_error"]
    assert all(each["error"] <= each["limit"] for found in casts.values() for each in found.values())
    whole = {target["id"]: target["quality"]["psnr_worst"] for target in record.targets}
    least = {name: 20 if name.endswith("int4") else 30 for name in whole}
    assert all(least[name] < psnr < 90 for name, psnr in whole.items()), whole
    for integers, name in (("int8", "denoiser"), ("int4", "conditioning")):
        graph = onnx.load(bundle / f"onnxruntime-{integers}" / f"{name}.onnx", load_external_data=False).graph
        assert "DequantizeLinear" in {node.op_type for node in graph.node}
    page = (bundle / "report.html").read_text("utf-8")
    assert "layers are in INT8" in page and "linear layers are in INT4" in page


@pytest.mark.slow
def test_a_pipeline_that_is_given_a_picture(tmp_path: Path) -> None:
    """It is judged with the recipe's picture, and draws with any other."""
    open_pipeline("stable_diffusion_xl_img2img").save_pretrained(tmp_path / "model")
    Image.linear_gradient("L").resize((32, 32)).convert("RGB").save(tmp_path / "grey.png")
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    call = '[call]\nnum_inference_steps = 4\nstrength = 0.8\nimage = "grey.png"\n'
    (tmp_path / "tiny.toml").write_text(re.sub(r"\[call\]\n(\w+ = \d+\n)+", call, RECIPE))
    done = compile_here("tiny.toml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    drawn = {}
    for name in ("grey", "red"):
        options = ("--prompt", "a circle", "--seed", "1", "--image", f"{name}.png", "-o", f"{name}-drawn.png")
        done = call_cli("run", "artifacts/tiny", *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        drawn[name] = np.asarray(Image.open(tmp_path / f"{name}-drawn.png"))
    assert (drawn["grey"] != drawn["red"]).any()
    done = call_cli("run", "artifacts/tiny", "--prompt", "a circle", "--seed", "1", cwd=tmp_path)
    assert done.returncode == 2 and "image is missing" in done.stderr


@pytest.mark.slow
def test_adapters_are_set_by_a_run(place: Path) -> None:
    """The report judges the bundle as it is without them."""
    text = RECIPE[: RECIPE.index("[gate]")].replace('"tiny"', '"slots"')
    text += '[adapters]\nrank = 4\nlayers = ["unet.*.attn1.to_*"]\n[[targets]]\nengine = "onnxruntime"\n'
    (place / "slots.toml").write_text(text + '[[targets]]\nengine = "openvino"\nprecision = "int4"\n')
    done = call_cli("compile", "slots.toml", "--dry-run", "--set", 'adapters.layers=["vae.*"]', cwd=place)
    assert done.returncode == 2 and "'vae.*' fits no linear layer of a denoiser" in done.stderr
    done = compile_here("slots.toml", cwd=place)
    assert done.returncode == 0, done.stderr
    bundle = str(place / "artifacts" / "slots")
    layers = json.loads((place / "artifacts" / "slots" / "manifest.json").read_text())["adapters"]["layers"]
    assert f"adapters     rank 4 in {len(layers)} layers" in call_cli("inspect", bundle, cwd=place).stdout
    rng, weights = np.random.default_rng(0), load_file(place / "model/unet/diffusion_pytorch_model.safetensors")
    factors = {}
    for layer in layers:
        outputs, inputs = weights[layer.removeprefix("unet.") + ".weight"].shape
        factors[f"{layer}.lora_A.weight"] = torch.from_numpy(rng.standard_normal((2, inputs), np.float32))
        factors[f"{layer}.lora_B.weight"] = torch.from_numpy(rng.standard_normal((outputs, 2), np.float32))
    save_file(factors, place / "style.safetensors")
    pictures = {}
    for target in ("onnxruntime", "openvino"):
        for name, options in {"plain": (), "adapted": ("--adapter", "style.safetensors:0.3")}.items():
            drawn = ("run", bundle, "--prompt", "a star", "--seed", "3", "--target", target, "-o", f"{name}.png")
            done = call_cli(*drawn, *options, cwd=place)
            assert done.returncode == 0, done.stderr
            pictures[target, name] = np.asarray(Image.open(place / f"{name}.png")).astype(int)
        assert np.abs(pictures[target, "plain"] - pictures[target, "adapted"]).max() > 3
    far = [np.abs(pictures["openvino", name] - pictures["onnxruntime", name]).mean() for name in ("plain", "adapted")]
    assert max(far) < 8  # of 255: by 4 bits, and no more with adapters than without
    done = call_cli("run", bundle, "--prompt", "a star", "--adapter", "none.safetensors", cwd=place)
    assert done.returncode != 0 and "none.safetensors" in done.stderr and "Traceback" not in done.stderr
