"""From which change on an image is finished: measured on calibration prompts, so that stopping costs what it may."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slipcast.denoiser import Guided, final_scale, initial_scale
from slipcast.early_exit import change
from slipcast.progress import Advance
from slipcast.samplers import Array, sample
from slipcast_compiler.cache import Cache
from slipcast_compiler.isolate import run_isolated
from slipcast_compiler.plan import Plan, Prompts
from slipcast_compiler.quiet import quiet
from slipcast_compiler.rewrite import Rewrite
from slipcast_compiler.timesteps import bind

logger = logging.getLogger("slipcast")

Curves = npt.NDArray[np.float64]  # [images, evaluations]

REPORT = "early_exit.json"


def choose_exit(plan: Plan, rewrite: Rewrite, cache: Cache, advance: Advance) -> tuple[Plan, dict[str, Any]]:
    """The plan with a threshold for slipcast.early_exit, as the recipe's [early_exit] asks; and what it gains.

    None, with a warning, where no evaluation could be left out at that error.
    """
    table = plan.recipe.early_exit
    assert table
    prompts = plan.family.calibration[: table.prompts] if plan.family else (None,) * table.prompts
    inputs = {
        "checkpoint": plan.checkpoint.sha256, "rewrite": rewrite.digest, "size": plan.size, "prompts": prompts,
        "sampling": plan.sampling.model_dump(mode="json"),
    }  # fmt: skip

    def build(folder: Path) -> None:
        curves = run_isolated(_measure, plan, rewrite, prompts, advance=advance).result
        (folder / REPORT).write_text(json.dumps(curves, allow_nan=False))

    curves = json.loads((cache.get("early_exit", inputs, build) / REPORT).read_text())
    found = choose_threshold(np.array(curves["changes"]), np.array(curves["errors"]), table.max_error)
    if found["threshold"] is None:
        logger.warning(
            "early_exit: no evaluation can be left out at an error of %g: the bundle takes all %d steps",
            table.max_error, plan.sampling.steps,
        )  # fmt: skip
    report = {"max_error": table.max_error, "prompts": len(prompts), **found}
    return dataclasses.replace(
        plan, sampling=plan.sampling.model_copy(update={"early_exit": found["threshold"]})
    ), report


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


def _measure(plan: Plan, rewrite: Rewrite, prompts: Prompts, advance: Advance) -> dict[str, Any]:
    """Runs in a process of its own: changes between clean images, and how far each is from the end, [images, k]."""
    import torch

    settings, schedule = plan.sampling, plan.sampling.lay()
    with quiet(), torch.no_grad():
        evaluate, start = bind(plan, rewrite, prompts)
        guided = Guided(settings.noise, schedule, evaluate, settings.guidance())
        clean: list[npt.NDArray[np.float32]] = []

        def denoise(x: Array, sigma: float) -> Array:
            denoised = guided(x, sigma)
            clean.append(denoised.numpy())
            return denoised

        generators = [torch.Generator().manual_seed(len(prompts) + i) for i in range(len(prompts))]

        def noise() -> Array:
            return torch.cat([torch.randn((1, *plan.image.latent_shape), generator=each) for each in generators])

        x = start * initial_scale(settings.noise, schedule, settings.sampler)
        for step, each in enumerate(
            sample(settings.sampler, denoise, x, schedule.sigmas, noise=noise, eta=settings.eta)
        ):
            advance(step + 1, settings.steps)
            x = each
        end = (x * final_scale(settings.noise, schedule)).numpy()
    return {
        "changes": np.stack([change(now, before) for before, now in itertools.pairwise(clean)], 1).tolist(),
        "errors": np.stack([change(end, now) for now in clean[1:]], 1).tolist(),
    }
