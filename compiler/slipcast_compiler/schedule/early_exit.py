"""From which change on an image is finished: measured on calibration prompts, so that stopping costs what it may.

On the engines of each target, since clean images change by their rounding too: at the last steps those of the reference
model change by about 2 % in bf16 where it is 1 to 2 % in fp32, and a threshold from fp32 stopped none in bf16.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slipcast.bundle.manifest import MANIFEST_NAME, SHALLOW, Manifest, Target
from slipcast.bundle.reader import open_bundle
from slipcast.engines import Array, refusal
from slipcast.progress import Advance, Stages
from slipcast.run.pipeline import Pipeline
from slipcast.sampling.denoiser import final_scale, initial_scale
from slipcast.sampling.early_exit import Floats, change
from slipcast.sampling.guidance import Guided
from slipcast.sampling.samplers import sample
from slipcast.sampling.seeds import TorchGenerator, batch_noise
from slipcast_compiler.engines.recording import Recording
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.isolate import run_isolated
from slipcast_compiler.model.original import Images
from slipcast_compiler.recipe.sampling import EarlyExitTable

logger = logging.getLogger("slipcast")

Curves = npt.NDArray[np.float64]  # [images, evaluations]

REPORT = "early_exit.json"


def choose_exits(
    folder: Path, targets: Sequence[Target], table: EarlyExitTable, images: Images, cache: Cache, stages: Stages
) -> tuple[list[Target], dict[str, Any]]:
    """The targets of the bundle in `folder` with a threshold for sampling.early_exit, as [early_exit] in the recipe
    asks; and what it gains.

    None for those that cannot run here, and, with a warning, where no evaluation could be left out at that error.
    """
    chosen, found = list[Target](), dict[str, Any]()
    for target in targets:
        if not refusal(target):
            with stages.stage(f"early exit {target.id}") as advance:
                changes, errors = _curves(folder, target.id, images, cache, advance)
            found[target.id] = choose_threshold(changes, errors, table.max_error)
            if found[target.id]["threshold"] is None:
                logger.warning(
                    "early_exit: %s: no evaluation can be left out at an error of %g: all are made",
                    target.id,
                    table.max_error,
                )
        threshold = found.get(target.id, {}).get("threshold")
        chosen.append(target.model_copy(update={"early_exit": threshold}))
    return chosen, {"max_error": table.max_error, "prompts": len(images), "targets": found}


def choose_threshold(changes: Curves, errors: Curves, max_error: float) -> dict[str, Any]:
    """The largest threshold up to which the mean error is at most `max_error`.

    changes[n, k]: from evaluation k to k + 1, of image n. errors[n, k]: of taking evaluation k + 1 for the result.
    """
    images, last = np.arange(len(changes)), changes.shape[1] - 1
    best: dict[str, Any] = {"threshold": None, "evaluations": float(last + 2), "error": 0.0}
    for threshold in np.unique(changes):
        stops = changes <= threshold
        at = np.where(stops.any(axis=1), stops.argmax(axis=1), last)
        error = float(np.where(stops.any(axis=1), errors[images, at], 0.0).mean())
        if error > max_error:
            break
        if (evaluations := float(at.mean()) + 2) < last + 2:
            best = {"threshold": float(threshold), "evaluations": evaluations, "error": error}
    return best | {"all_evaluations": last + 2}


def _curves(folder: Path, target: str, images: Images, cache: Cache, advance: Advance) -> tuple[Curves, Curves]:
    """Changes between clean images, and how far each is from the end: of a target's engines, or from the cache."""

    def build(out: Path) -> None:
        curves = run_isolated(_measure, folder, target, images, advance=advance).result
        (out / REPORT).write_text(json.dumps(curves, allow_nan=False))

    manifest = hashlib.sha256((folder / MANIFEST_NAME).read_bytes()).hexdigest()
    inputs = {"manifest": manifest, "target": target, "images": images}
    curves = json.loads((cache.get("early_exit", inputs, build) / REPORT).read_text())
    return np.array(curves["changes"]), np.array(curves["errors"])


def _measure(root: Path, target: str, images: Images, advance: Advance) -> dict[str, Any]:
    """Runs in a process of its own: changes between clean images, and how far each is from the end, [images, k]."""
    bundle, recording = open_bundle(root), Recording(("denoiser", SHALLOW))
    chosen = next(each for each in bundle.manifest.targets if each.id == target)
    changes, errors = list[list[float]](), list[list[float]]()
    with Pipeline(bundle, chosen.model_copy(update={"early_exit": None}), instrument=recording) as pipe:
        for i, (prompt, seed) in enumerate(images):
            advance(i, len(images))
            recording.calls.clear()
            end = pipe(prompt, seed=seed, output_type="latent", guard="warn").images
            clean, _ = replay(bundle.manifest, seed, [arrays["prediction"] for _, arrays in recording.calls])
            changes.append([float(change(now, before)[0]) for before, now in itertools.pairwise(clean)])
            errors.append([float(change(end, now)[0]) for now in clean[1:]])
    return {"changes": changes, "errors": errors}


def replay(manifest: Manifest, seed: int, predictions: Sequence[Array]) -> tuple[list[Floats], Floats]:
    """The clean images D(x, sigma) of a seed's run, and the latent at its end, from what its denoiser gave.

    predictions[k]: of evaluation k, float32 [1 or 2, c, h, w], unconditional rows first. The same arithmetic in the
    same order, so that bits are those of the run.
    """
    settings, given, clean = manifest.sampling, iter(predictions), list[Floats]()
    schedule, noise = settings.lay(), partial(batch_noise, [TorchGenerator(seed)], manifest.image.latent_shape)

    def evaluate(x: Floats, timestep: float, both: bool) -> tuple[Array, Array | None]:
        rows = next(given)
        return rows[-1:], rows[:1] if both else None

    def denoise(x: Floats, sigma: float) -> Floats:
        clean.append(guided(x, sigma))
        return clean[-1].copy()

    guidance = settings.guidance(settings.guidance_scale if manifest.takes_prompt else 1.0)
    guided = Guided(settings.noise, schedule, evaluate, guidance)
    x: Floats = noise() * initial_scale(settings.noise, schedule, settings.sampler)
    for latent in sample(settings.sampler, denoise, x, schedule.sigmas, noise=noise, eta=settings.eta):
        x = latent
    return clean, x * final_scale(settings.noise, schedule)
