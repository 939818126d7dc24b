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
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slipcast.bundle.manifest import MANIFEST_NAME, Target
from slipcast.bundle.reader import open_bundle
from slipcast.progress import Advance, Stages
from slipcast.run.pipeline import Pipeline
from slipcast.sampling.denoiser import Guided
from slipcast.sampling.early_exit import EarlyExit, Floats, change
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.isolate import run_isolated
from slipcast_compiler.judge.evaluate import not_runnable
from slipcast_compiler.plan import Plan, Prompts

logger = logging.getLogger("slipcast")

Curves = npt.NDArray[np.float64]  # [images, evaluations]

REPORT = "early_exit.json"


def choose_exits(
    plan: Plan, folder: Path, targets: Sequence[Target], cache: Cache, stages: Stages
) -> tuple[list[Target], dict[str, Any]]:
    """The targets of the bundle in `folder` with a threshold for sampling.early_exit, as [early_exit] in the recipe
    asks; and what it gains.

    None for those that cannot run here, and, with a warning, where no evaluation could be left out at that error.
    """
    table = plan.recipe.early_exit
    assert table
    prompts = plan.family.calibration[: table.prompts] if plan.family else (None,) * table.prompts
    manifest = hashlib.sha256((folder / MANIFEST_NAME).read_bytes()).hexdigest()
    chosen, found, not_run = list[Target](), dict[str, Any](), not_runnable(targets)
    for target in targets:
        if target.id not in not_run:
            with stages.stage(f"early exit {target.id}") as advance:
                found[target.id] = _choose(folder, manifest, target.id, prompts, table.max_error, cache, advance)
        threshold = found.get(target.id, {}).get("threshold")
        chosen.append(target.model_copy(update={"early_exit": threshold}))
    return chosen, {"max_error": table.max_error, "prompts": len(prompts), "targets": found}


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


def _choose(
    folder: Path, manifest: str, target: str, prompts: Prompts, max_error: float, cache: Cache, advance: Advance
) -> dict[str, Any]:
    def build(out: Path) -> None:
        curves = run_isolated(_measure, folder, target, prompts, advance=advance).result
        (out / REPORT).write_text(json.dumps(curves, allow_nan=False))

    inputs = {"manifest": manifest, "target": target, "prompts": prompts}
    curves = json.loads((cache.get("early_exit", inputs, build) / REPORT).read_text())
    found = choose_threshold(np.array(curves["changes"]), np.array(curves["errors"]), max_error)
    if found["threshold"] is None:
        logger.warning(
            "early_exit: %s: no evaluation can be left out at an error of %g: all are made", target, max_error
        )
    return found


def _measure(root: Path, target: str, prompts: Prompts, advance: Advance) -> dict[str, Any]:
    """Runs in a process of its own: changes between clean images, and how far each is from the end, [images, k]."""
    bundle, changes, errors = open_bundle(root), list[list[float]](), list[list[float]]()
    with _Watching(bundle, next(each for each in bundle.manifest.targets if each.id == target)) as pipe:
        for i, prompt in enumerate(prompts):
            advance(i, len(prompts))
            end = pipe(prompt, seed=i, output_type="latent", guard="warn").images
            clean = pipe.watched.clean
            changes.append([float(change(now, before)[0]) for before, now in itertools.pairwise(clean)])
            errors.append([float(change(end, now)[0]) for now in clean[1:]])
    return {"changes": changes, "errors": errors}


class _Watching(Pipeline):
    """A pipeline that stops no image; `watched`: of the last one."""

    watched: _Watched

    def _watch(self, guided: Guided, threshold: float | None, images: int) -> EarlyExit:
        self.watched = _Watched(guided, None, images)
        return self.watched


class _Watched(EarlyExit):
    """`clean`: every clean image that the denoiser expected."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.clean: list[Floats] = []

    def __call__(self, x: Floats, sigma: float) -> Floats:
        denoised = super().__call__(x, sigma)
        self.clean.append(denoised.copy())
        return denoised
