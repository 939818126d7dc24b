"""The whole compile, as a user runs it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch

from conftest import FEW, call_cli, compile_here
from slipcast.bundle.reader import open_bundle


def test_the_bundle_is_as_good_as_the_original(shapes_bundle: Path) -> None:
    manifest = open_bundle(shapes_bundle, files="all").manifest
    by_id = {target.id: target.quality for target in manifest.targets}
    exact, fast = by_id["onnxruntime-cpu-fp32"], by_id["openvino-cpu-bf16"]
    assert exact
    assert fast
    assert exact.images == 5
    assert exact.psnr_worst >= 45
    floor = exact.noise_floor["precision"].psnr_worst
    assert floor
    assert fast.psnr_worst > floor - 6  # no worse than the noise of the number format itself, within a factor of two
    assert fast.clip_delta_mean > -0.02
    assert fast.lpips_mean is None
    assert fast.flip_mean and fast.flip_mean < 2 * (exact.noise_floor["precision"].flip_mean or 0)
    assert fast.retrieval_precision and fast.original.retrieval_precision and fast.retrieval_captions == 64
    low, high = fast.intervals["clip_delta_mean"]
    assert low <= fast.clip_delta_mean <= high
    assert fast.out_of_family and fast.out_of_family.images == 2
    assert fast.scorer_sha256 == exact.scorer_sha256 is not None


def test_the_manifest_says_where_it_comes_from(shapes_bundle: Path) -> None:
    manifest = open_bundle(shapes_bundle).manifest
    assert manifest.family
    assert (manifest.family.calibration, manifest.family.held_out) == (64, 16)
    assert manifest.quality == manifest.targets[0].quality
    assert manifest.performance
    assert 0 < manifest.performance.peak_memory_bundle_mb < manifest.performance.peak_memory_full_mb
    assert set(manifest.performance.components_s) == {"text_encoder", "denoiser_prompt", "denoiser", "vae_decoder"}
    assert (manifest.head_retention_ratio, manifest.low_rank_layers, manifest.not_compiled) == (1.0, (), ())
    leaks = [f.name for f in shapes_bundle.rglob("*") if f.is_file() and str(Path.cwd()).encode() in f.read_bytes()]
    assert leaks == []


def test_the_report_holds_the_stages(shapes_bundle: Path) -> None:
    record = json.loads((shapes_bundle / "report.json").read_text())
    assert {"originals", "export denoiser", "build openvino-bf16", "evaluate openvino-cpu-bf16"} <= set(
        record["stages_s"]
    )
    assert record["passed"] is True
    casts = record["mixed_precision"]["openvino-bf16"]
    assert casts.keys() == record["components"].keys()
    assert all(0 < of["error"] < of["limit"] == 0.03 and not of["fp32"] for of in casts.values())


def test_dry_run_touches_nothing(workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "recipes").symlink_to(workspace / "recipes")
    done = call_cli("compile", "recipes/shapes-circles.toml", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in (
        "64 calibration and 16 held-out",
        "denoiser: 11.2 M",
        "openvino-cpu-bf16",
        "MB for the bundle",
        "GB at the most",
    ):
        assert part in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["recipes"]


def test_row_34_a_missed_gate_writes_the_report_and_publishes_nothing(shapes_bundle: Path, workspace: Path) -> None:
    artifacts = workspace / "artifacts"
    before = {p.name for p in artifacts.iterdir()}
    done = call_cli(
        "compile",
        "recipes/shapes-circles.toml",
        *FEW,
        "-o",
        "artifacts/strict",
        "--set",
        "gate.psnr=90",
        "--json",
        cwd=workspace,
    )
    assert done.returncode == 1, done.stderr
    assert "openvino-cpu-bf16: PSNR" in json.loads(done.stdout)["error"]["message"]
    assert "Traceback" not in done.stderr
    assert not (artifacts / "strict").exists()
    assert "The gate was missed" in (artifacts / "strict.rejected" / "report.html").read_text()
    assert {p.name for p in artifacts.iterdir()} == {*before, "strict.rejected"} >= {"cache", "shapes-circles"}


def test_row_31_errors_of_the_recipe(tmp_path: Path, workspace: Path) -> None:
    (tmp_path / "bad.toml").write_text('name = "a b"\nsteps = 3\n')
    done = call_cli("compile", "bad.toml", cwd=tmp_path)
    assert done.returncode == 2
    assert "bad.toml:1: name" in done.stderr
    assert "bad.toml:2: steps: unknown key" in done.stderr
    done = call_cli("compile", "recipes/shapes-circles.toml", "--set", "sampling.width=60", cwd=workspace)
    assert (done.returncode, "a multiple of 16" in done.stderr) == (2, True)


def test_an_output_that_is_not_a_bundle_is_not_replaced(workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    done = call_cli("compile", "recipes/shapes-circles.toml", "-o", str(tmp_path), cwd=workspace)
    assert done.returncode == 2
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unconditional pixel model with random weights, and a recipe for it."""
    folder = tmp_path_factory.mktemp("pixels")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=16, layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(folder / "model")
    (folder / "pixels.toml").write_text(
        'name = "pixels"\nmodel.path = "model"\nsampling = { sampler = "ddpm", steps = 6, guidance_scale = 1.0 }\n'
        "evaluate.images = 2\ngate.psnr = 45.0\n[[targets]]\nengine = 'onnxruntime'\n"
    )
    return folder


@pytest.mark.slow  # a compile and a bench
def test_an_unconditional_model(pixels: Path) -> None:
    done = compile_here("pixels.toml", cwd=pixels)
    assert done.returncode == 0, done.stderr
    assert open_bundle(pixels / "artifacts" / "pixels").manifest.family is None
    run = call_cli("run", "artifacts/pixels", "--seed", "1", "-o", "a.png", cwd=pixels)
    assert run.returncode == 0, run.stderr
    asked = call_cli("run", "artifacts/pixels", "--prompt", "a cat", "-o", "b.png", cwd=pixels)
    assert (asked.returncode, "takes no prompt" in asked.stderr) == (2, True)
    bench = call_cli(
        "bench", "artifacts/pixels", "--model", "model", "--against", "diffusers", "--images", "2", "--batch", "2",
        "--json", cwd=pixels,
    )  # fmt: skip
    assert bench.returncode == 0, bench.stderr
    sides = json.loads(bench.stdout)["sides"]
    assert sides["bundle"]["quality"]["psnr_mean"]["low"] > 45
    assert set(sides["diffusers"]["images_per_second"]) == {"1", "2"}
    shutil.copyfile(pixels / "pixels.toml", pixels / "with-family.toml")
    with (pixels / "with-family.toml").open("a") as recipe:
        recipe.write('[family]\nprompts = ["a", "b"]\n')
    done = call_cli("compile", "with-family.toml", cwd=pixels)
    assert (done.returncode, "takes no prompts" in done.stderr) == (2, True)


def test_a_prompt_model_without_family(workspace: Path, tmp_path: Path) -> None:
    model = (workspace / "recipes/models/shapes").resolve()
    (tmp_path / "r.toml").write_text(f"name = 'r'\nmodel.path = '{model}'\n[[targets]]\nengine = 'onnxruntime'\n")
    done = call_cli("compile", "r.toml", cwd=tmp_path)
    assert (done.returncode, "takes a prompt" in done.stderr) == (2, True)
