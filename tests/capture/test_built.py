"""`slipcast build` for the bundle of a captured pipeline: a target more, from the ONNX in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bundling import bundle_of, make_bundle
from tiny import call_of, open_pipeline

import slipcast
from slipcast.bundle.program_manifest import ProgramManifest
from slipcast.bundle.reader import check_digests, open_any_bundle
from slipcast.errors import RecipeError
from slipcast.progress import Stages
from slipcast_compiler.add_target import add_target
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.recipe.reading import parse_target


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


def test_half_precision_is_measured_on_its_own_calls(tmp_path: Path) -> None:
    bundle = make_bundle(open_pipeline("stable_diffusion_3"), "stable_diffusion_3", tmp_path)
    check_added(bundle, "openvino:bf16", 25)
    (inputs,) = (bundle.parent / "cache").glob("inputs-*")
    manifest = open_any_bundle(bundle).manifest
    assert isinstance(manifest, ProgramManifest)
    assert {folder.name for folder in inputs.iterdir() if folder.is_dir()} == set(manifest.components) - manifest.exact
    with pytest.raises(RecipeError, match="has a target openvino-cpu-bf16 already"):
        add(bundle, "openvino:bf16")
    with pytest.raises(RecipeError, match="max_images: engines of a captured pipeline take one image at a time"):
        add(bundle, "tensorrt-rtx:fp16", "max_images=2")
    with pytest.raises(RecipeError, match="no portable graphs for a target in int8"):
        add(bundle, "openvino:int8")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stable_diffusion_xl_img2img", "flux_kontext", "stable_audio_edm", "animate_diff"])
def test_pictures_and_numbers(name: str, tmp_path: Path) -> None:
    """What is given besides a text is a pattern; sounds are compared by their own scale."""
    check_added(make_bundle(open_pipeline(name), name, tmp_path), "openvino:fp32", 50)


@pytest.mark.slow
def test_every_variant_is_compared(tmp_path: Path) -> None:
    name, pipe = "stable_diffusion_3", open_pipeline("stable_diffusion_3")
    calls = [lambda prompt, side=side: call_of(name, prompt, 1) | {"height": side, "width": side} for side in (32, 64)]
    bundle = bundle_of(pipe, name, calls, tmp_path)
    made = add_target(bundle, parse_target("openvino", ()), bundle, Cache(tmp_path / "cache"), Stages(), images=1)
    assert made.target.addition and made.target.addition.images == 2
