"""Bundles of pipelines whose denoisers passes have rewritten: what was removed is what was masked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bundling import compare, write
from tiny import call_of, open_pipeline

import slipcast
from slipcast.progress import silent
from slipcast_compiler.capture.find import NOTHING, find_each
from slipcast_compiler.capture.open import open_with_weights
from slipcast_compiler.capture.parts import denoisers_of
from slipcast_compiler.capture.summary import module_of
from slipcast_compiler.engines.programs import ProgramGraphs
from slipcast_compiler.export.pipeline import export_pipeline
from slipcast_compiler.export.streamed import open_streamed
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.model.rewrite import UNCHANGED, Rewrite, write_tensors
from slipcast_compiler.passes.program import ProgramTask
from slipcast_compiler.passes.units import keep_units
from slipcast_compiler.profile.program import ProgramCalibration

PROMPTS = ("a small red circle on white", "a blue star", "a green square on black", "a yellow ring")
SEEDS = (1, 2, 3, 4)
OTHER = "a large blue star on a black background"
DENOISERS = {
    "stable_diffusion_3": ("transformer",),
    "stable_diffusion_xl": ("unet",),
    "stable_diffusion_xl_controlnet": ("controlnet", "unet"),
    "flux": ("transformer",),
    "wan_2_2": ("transformer", "transformer_2"),
    "qwen_image": ("transformer",),
    "sana": ("transformer",),
    "pixart_alpha": ("transformer",),
}


def save(name: str, folder: Path) -> Path:
    """A tiny pipeline's directory, no weight of its denoisers zero, as the last layers of blocks are when training
    begins."""
    open_pipeline(name).save_pretrained(folder / "zeros")
    pipe, generator = open_with_weights(folder / "zeros"), torch.Generator().manual_seed(0)
    for denoiser in DENOISERS[name]:
        for parameter in module_of(pipe, denoiser).parameters():
            if not parameter.any():
                parameter.data.normal_(std=0.1, generator=generator)
    pipe.save_pretrained(folder / name)
    return folder / name


def given_of(name: str) -> dict[str, Any]:
    """What it is called with besides a prompt."""
    return {key: value for key, value in call_of(name, "", 1).items() if key not in ("prompt", "generator")}


def task_of(root: Path, name: str, denoiser: str) -> Any:
    layers = type("Nothing", (), {"unknown_attention": {}, "unknown_feed_forward": {}})
    target: Any = None
    calibration = ProgramCalibration(root, None, (given_of(name),), (denoiser,), PROMPTS, SEEDS)
    return ProgramTask(calibration, denoiser, target, {}, {denoiser: layers})  # type: ignore[dict-item]


def remove_a_third(root: Path, name: str, denoiser: str, masked: Any, folder: Path) -> Rewrite:
    """Of the heads of every layer, and then of its neurons, as passes do; the same is zero in `masked`."""
    task, rewrite, generator = task_of(root, name, denoiser), UNCHANGED, torch.Generator().manual_seed(0)
    for kind in ("attention", "feed_forward"):
        before, tensors = task.denoiser(rewrite), {}
        originals = {layer.name: layer for layer in getattr(task.denoiser(UNCHANGED).layers, kind)}
        for layer in getattr(before.layers, kind):
            gone = torch.randperm(layer.units, generator=generator)[: -(-layer.units // 3)].tolist()
            if len(gone) < layer.units:
                kept = [unit for unit in range(layer.units) if unit not in gone]
                tensors |= keep_units(before, layer, kept, None)
                for place in originals[layer.name].columns:
                    masked.get_submodule(place.linear).weight.data[:, place.places(gone)] = 0
        if tensors:
            rewrite = write_tensors(tensors, rewrite, folder / f"{denoiser}-{kind}.safetensors")
    return rewrite


@pytest.mark.slow
@pytest.mark.parametrize("name", DENOISERS)
def test_the_bundle_is_the_masked_pipeline(name: str, tmp_path: Path) -> None:
    root = save(name, tmp_path)
    whole, masked, call = open_with_weights(root), open_with_weights(root), given_of(name)
    rewrites = {
        denoiser: remove_a_third(root, name, denoiser, module_of(masked, denoiser), tmp_path)
        for denoiser in DENOISERS[name]
    }
    assert all(rewrite.file for rewrite in rewrites.values())
    cache = Cache(tmp_path / "cache")

    def export(out: Path) -> None:
        export_pipeline(root, None, (call,), NOTHING, rewrites, True, out, silent)

    entry = cache.get("program", {}, export)
    with slipcast.load(write(ProgramGraphs(entry), name, tmp_path, cache)) as loaded:
        assert compare(loaded, masked, name, OTHER, 7)["relative_error"] < 1e-4
        assert compare(loaded, whole, name, OTHER, 7)["relative_error"] > 1e-3
    for denoiser in DENOISERS[name]:
        streamed = open_streamed(root, None, rewrites)
        parameters = [sum(p.numel() for p in module_of(pipe, denoiser).parameters()) for pipe in (streamed.pipe, whole)]
        assert parameters[0] < parameters[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", DENOISERS)
def test_denoisers_are_what_the_loop_calls(name: str) -> None:
    pipe = open_pipeline(name)
    assert denoisers_of(find_each(pipe, [given_of(name)])) == DENOISERS[name]
