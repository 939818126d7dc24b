"""A bundle of a tiny pipeline, for ONNX Runtime in fp32, beside the pipeline itself."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import PIPELINES, call_of

import slipcast
from slipcast.progress import Stages, silent
from slipcast_compiler.capture.find import NOTHING, Wanted, find_for
from slipcast_compiler.capture.processing import call_pipeline
from slipcast_compiler.capture.program import leaves
from slipcast_compiler.capture.replay import modules_of
from slipcast_compiler.engines.programs import ProgramGraphs, write_bundle
from slipcast_compiler.export.batched import parts_in_batches
from slipcast_compiler.export.early import leave_loop
from slipcast_compiler.export.program import export_program
from slipcast_compiler.export.tiles import share_statistics
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.quiet import quiet
from slipcast_compiler.recipe.targets import TargetTable

BEST_DB = 200.0  # of equal results


def make_bundle(pipe: Any, name: str, folder: Path, *tables: TargetTable) -> Path:
    """The bundle of what a tiny pipeline does when it is called as tests call it."""
    return bundle_of(pipe, name, [lambda prompt: call_of(name, prompt, 1)], folder, *tables)


def bundle_of(
    pipe: Any, name: str, calls: Sequence[Callable[[str], dict[str, Any]]], folder: Path, *tables: TargetTable
) -> Path:
    """The bundle of pipe(**call(prompt)), with a variant of each call."""
    cache = Cache(folder / "cache")
    return write(ProgramGraphs(export_here(pipe, name, calls, cache)), name, folder, cache, *tables)


def export_here(
    pipe: Any, name: str, calls: Sequence[Callable[[str], dict[str, Any]]], cache: Cache, wanted: Wanted = NOTHING
) -> Path:
    """The entry of a cache that has the exported program."""

    def export(out: Path) -> None:
        found = find_for(pipe, calls, wanted)
        export_program(found, pipe, out, silent, batches=parts_in_batches(found, modules_of(pipe)))
        leave_loop(out)
        share_statistics(out)

    return cache.get("program", {"name": name, "wanted": asdict(wanted)}, export)


def write(graphs: ProgramGraphs, name: str, folder: Path, cache: Cache, *tables: TargetTable) -> Path:
    """The bundle of graphs of an exported program."""
    about = {"name": name.replace("_", "-"), "base_model": name, "source_sha256": "0" * 64, "family": None}
    (bundle := folder / "bundle").mkdir()
    write_bundle(graphs, tables or (TargetTable(engine="onnxruntime"),), about, bundle, cache, Stages())
    return bundle


def compare_bundle(pipe: Any, name: str, prompts: Sequence[str], seed: int) -> dict[str, float]:
    """The bundle's results for prompts and a seed that were not captured, against the pipeline's: PSNR in dB, where the
    peak is 1 for pictures, else the largest number; and relative L2 error. Of the prompt where they are farthest.
    `psnr_together`: of images of one call against each by itself. `psnr_steps`: where a run chooses their number, of
    the first prompt, in steps that were not captured."""
    with tempfile.TemporaryDirectory() as scratch, quiet():
        bundle = make_bundle(pipe, name, Path(scratch))
        with slipcast.load(bundle) as loaded:
            found = [compare(loaded, pipe, name, prompt, seed) for prompt in prompts]
            worst = min(found, key=lambda each: each["psnr"])
            worst["psnr_together"] = compare_together(loaded, name, prompts, seed)
            loop = loaded.manifest.program.loop
            if loop and loop.steps:
                chosen = {loop.steps: loop.sampling.steps + 4}
                worst["psnr_steps"] = compare(loaded, pipe, name, prompts[0], seed, **chosen)["psnr"]
    return worst


def compare_together(loaded: Any, name: str, prompts: Sequence[str], seed: int) -> float:
    """Images of one call, of two seeds for each prompt, against those of a call for each; of the worst."""
    given = {
        key: value.numpy() for key, value in call_of(name, prompts[0], seed).items() if key in PIPELINES[name].pictures
    }
    text: dict[str, Any] = {"prompt": list(prompts)} if PIPELINES[name].text else {}
    many = loaded(**text, **given, seed=seed, num_images_per_prompt=2, output_type="np")
    found, worst = iter(many.images), BEST_DB
    for place, own in enumerate(many.seeds):
        one = {"prompt": prompts[place // 2]} if PIPELINES[name].text else {}
        alone = np.asarray(loaded(**one, **given, seed=own, output_type="np").images)
        together = np.stack([np.asarray(next(found)) for _ in alone])
        worst = min(worst, distance(together, alone)["psnr"])
    return worst


def compare(loaded: Any, pipe: Any, name: str, prompt: str, seed: int, **chosen: Any) -> dict[str, float]:
    """As compare_bundle's, of one prompt; `chosen`: arguments besides."""
    call = call_of(name, prompt, seed) | chosen | {"generator": torch.Generator("cpu").manual_seed(seed)}
    given = {key: value.numpy() for key, value in call.items() if key in PIPELINES[name].pictures}
    text = {"prompt": prompt} if PIPELINES[name].text else {}
    found = np.asarray(loaded(**text, **given, **chosen, seed=seed, output_type="np").images[0])
    torch.manual_seed(seed)
    with torch.no_grad():
        result = call_pipeline(pipe, call)
    wanted = next(each for _, each in leaves(dict(result.items()) if hasattr(result, "items") else result))
    return distance(found, wanted.float().numpy())


def distance(found: Any, wanted: Any) -> dict[str, float]:
    """As compare_bundle's; pictures that have their channels last are those that have them before."""
    wanted = wanted[0] if wanted.ndim > found.ndim else wanted
    peak = float(np.abs(wanted).max())
    if wanted.ndim >= 3 and wanted.shape[-3] in (1, 3, 4) and found.shape != wanted.shape:
        wanted, peak = np.moveaxis(wanted, -3, -1), 1.0
    error = np.linalg.norm(found.astype(np.float64) - wanted)
    mean = error / np.sqrt(wanted.size)
    return {
        "psnr": BEST_DB if not error else min(BEST_DB, float(20 * np.log10(peak / mean))),
        "relative_error": float(error / np.linalg.norm(wanted)),
    }
