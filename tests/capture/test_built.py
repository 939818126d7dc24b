"""`slipcast build` for the bundle of a captured pipeline: a target more, from the ONNX in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bundling import bundle_of, export_here, make_bundle, write
from tiny import call_of, open_pipeline

import slipcast
from slipcast.bundle.program_manifest import ProgramManifest
from slipcast.bundle.reader import check_digests, open_any_bundle
from slipcast.errors import RecipeError
from slipcast.progress import Stages, silent
from slipcast_compiler.add_target import add_target
from slipcast_compiler.engines.programs import ProgramGraphs, add_program_guard
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.recipe.passes import AdaptersTable
from slipcast_compiler.recipe.reading import parse_target
from slipcast_compiler.recipe.recipe import GuardTable


def add(bundle: Path, wanted: str, *overrides: str) -> Any:
    """What the command does."""
    return add_target(bundle, parse_target(wanted, overrides), bundle, Cache(bundle.parent / "cache"), Stages(), 2)


def check_added(bundle: Path, wanted: str, least: float) -> None:
    """It is there, beside the one whose graphs it has, and its pictures are those."""
    made = add(bundle, wanted)
    assert made.not_run is None and made.target.addition.against == "onnxruntime-cpu-fp32"
    assert made.target.addition.psnr_worst > least
    opened = open_any_bundle(bundle)
    check_digests(opened)
    assert [target.id for target in opened.manifest.targets] == ["onnxruntime-cpu-fp32", made.target.id]
    slipcast.load(bundle, target=made.target.id).close()


@pytest.mark.slow
def test_half_precision_is_measured_on_its_own_calls(tmp_path: Path) -> None:
    bundle = make_bundle(open_pipeline("stable_diffusion_3"), "stable_diffusion_3", tmp_path)
    check_added(bundle, "openvino:bf16", 25)
    (inputs,) = (bundle.parent / "cache").glob("inputs-*")
    manifest = open_any_bundle(bundle).manifest
    assert isinstance(manifest, ProgramManifest)
    assert {folder.name for folder in inputs.iterdir() if folder.is_dir()} == set(manifest.components) - manifest.exact
    with pytest.raises(RecipeError, match="has a target openvino-cpu-bf16 already"):
        add(bundle, "openvino:bf16")
    with pytest.raises(RecipeError, match="max_images: engines of a captured pipeline take as many images"):
        add(bundle, "tensorrt-rtx:fp16", "max_images=2")
    with pytest.raises(RecipeError, match="no portable graphs for a target in int8"):
        add(bundle, "openvino:int8")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stable_diffusion_xl_img2img", "flux_kontext", "stable_audio_edm", "animate_diff"])
def test_pictures_and_numbers(name: str, tmp_path: Path) -> None:
    """What is given besides a text is a pattern; sounds are compared by their own scale."""
    check_added(make_bundle(open_pipeline(name), name, tmp_path), "openvino:bf16", 20)


@pytest.mark.slow
def test_slots_are_cast_as_what_they_stand_for(tmp_path: Path) -> None:
    """With some of the denoiser in fp32, and a guard that refuses what it does not know."""
    cache, name = Cache(tmp_path / "cache"), "stable_diffusion_3"
    entry = export_here(open_pipeline(name), name, [lambda prompt: call_of(name, prompt, 1)], cache)
    graphs = ProgramGraphs(entry).with_slots(AdaptersTable(rank=2, layers=("*.to_q",)), {"fp32"}, cache, silent)
    prompts = tuple(f"a picture of a {color} circle" for color in ("red", "green", "blue", "pink", "gray", "white"))
    graphs = add_program_guard(graphs, GuardTable(policy="refuse", false_alarms=0.2), prompts, cache, silent)
    bundle = write(graphs, name, tmp_path, cache)
    made = add(bundle, "openvino:bf16", "max_cast_error=0.002")
    assert "denoiser_adapted" in made.target.components
    (found,) = (bundle.parent / "cache").glob("mixed-precision-*/found.json")
    assert json.loads(found.read_text())["denoiser"]["fp32"]
    with pytest.raises(RecipeError, match="has slots for adapters, and onnxruntime-gpu-fp16 can have none"):
        add(bundle, "onnxruntime-gpu:fp16")


@pytest.mark.slow
def test_every_variant_is_compared(tmp_path: Path) -> None:
    name, pipe = "stable_diffusion_3", open_pipeline("stable_diffusion_3")
    calls = [lambda prompt, side=side: call_of(name, prompt, 1) | {"height": side, "width": side} for side in (32, 64)]
    bundle = bundle_of(pipe, name, calls, tmp_path)
    made = add_target(bundle, parse_target("openvino:bf16", ()), bundle, Cache(tmp_path / "cache"), Stages(), images=1)
    assert made.target.addition and made.target.addition.images == 2
