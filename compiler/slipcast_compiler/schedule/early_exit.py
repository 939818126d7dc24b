"""From which change on an image is finished: measured on calibration prompts, so that stopping costs what it may.

On the engines of each target, since clean images change by their rounding too: at the last steps those of the reference
model change by about 2 % in bf16 where it is 1 to 2 % in fp32, and a threshold from fp32 stopped none in bf16.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slipcast.bundle.manifest import MANIFEST_NAME, SHALLOW, Manifest, Target
from slipcast.bundle.program import Variant
from slipcast.bundle.reader import BaseBundle, ProgramBundle, open_any_bundle, open_bundle
from slipcast.bundle.sampling import Sampling
from slipcast.engines import Array, refusal
from slipcast.progress import Advance, Stages
from slipcast.run.pipeline import Pipeline
from slipcast.run.program import ProgramPipeline
from slipcast.sampling.denoiser import Denoiser, final_scale, initial_scale, input_scale
from slipcast.sampling.early_exit import Floats, change
from slipcast.sampling.guidance import Guided
from slipcast.sampling.samplers import sample
from slipcast.sampling.schedules import Schedule
from slipcast.sampling.seeds import TorchGenerator, batch_noise
from slipcast_compiler.engines.recording import Recording, digest_given
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.isolate import run_isolated
from slipcast_compiler.model.original import Images
from slipcast_compiler.schedule.held import draws, first_latent, makers, predictions

logger = logging.getLogger("slipcast")

Curves = npt.NDArray[np.float64]  # [images, evaluations]

REPORT = "early_exit.json"


@dataclass(frozen=True)
class Measuring:
    """What thresholds are measured on: images, each by its prompt and seed. `given`: of a captured program, what its
    calls take besides, by variant; images are of the variants in turns. Empty for other bundles."""

    images: Images
    given: tuple[dict[str, Any], ...] = ()

    @property
    def inputs(self) -> dict[str, Any]:
        """For the cache's key."""
        return {"images": self.images} | ({"given": [digest_given(each) for each in self.given]} if self.given else {})


def choose_exits(
    folder: Path, targets: Sequence[Target], max_error: float, measuring: Measuring, cache: Cache, stages: Stages
) -> tuple[tuple[Target, ...], dict[str, Any]]:
    """The targets of the bundle in `folder` with a threshold for sampling.early_exit, whose mean error is at most
    `max_error`; and what it gains.

    None for those that cannot run here, and, with a warning, where no evaluation could be left out at that error.
    """
    chosen, found = list[Target](), dict[str, Any]()
    for target in targets:
        if not refusal(target):
            with stages.stage(f"early exit {target.id}") as advance:
                changes, errors = _curves(folder, target.id, measuring, cache, advance)
            found[target.id] = choose_threshold(changes, errors, max_error)
            if found[target.id]["threshold"] is None:
                logger.warning(
                    "early_exit: %s: no evaluation can be left out at an error of %g: all are made",
                    target.id,
                    max_error,
                )
        threshold = found.get(target.id, {}).get("threshold")
        chosen.append(target.model_copy(update={"early_exit": threshold}))
    return tuple(chosen), {"max_error": max_error, "prompts": len(measuring.images), "targets": found}


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


def _curves(folder: Path, target: str, measuring: Measuring, cache: Cache, advance: Advance) -> tuple[Curves, Curves]:
    """Changes between clean images, and how far each is from the end: of a target's engines, or from the cache."""
    measure = _measure_program if measuring.given else _measure

    def build(out: Path) -> None:
        curves = run_isolated(measure, folder, target, measuring, advance=advance).result
        (out / REPORT).write_text(json.dumps(curves, allow_nan=False))

    manifest = hashlib.sha256((folder / MANIFEST_NAME).read_bytes()).hexdigest()
    inputs = {"manifest": manifest, "target": target, **measuring.inputs}
    curves = json.loads((cache.get("early_exit", inputs, build) / REPORT).read_text())
    return np.array(curves["changes"]), np.array(curves["errors"])


def _measure(root: Path, target: str, measuring: Measuring, advance: Advance) -> dict[str, Any]:
    """Runs in a process of its own: changes between clean images, and how far each is from the end, [images, k]."""
    bundle, recording = open_bundle(root), Recording(("denoiser", SHALLOW))
    found = []
    with Pipeline(bundle, _without_exit(bundle, target), instrument=recording) as pipe:
        for i, (prompt, seed) in enumerate(measuring.images):
            advance(i, len(measuring.images))
            recording.calls.clear()
            pipe(prompt, seed=seed, output_type="latent", guard="warn")
            found.append(replay(bundle.manifest, seed, [arrays["prediction"] for _, arrays in recording.calls]))
    return _compared(found)


def _measure_program(root: Path, target: str, measuring: Measuring, advance: Advance) -> dict[str, Any]:
    """The same of a captured program."""
    bundle = open_any_bundle(root)
    assert isinstance(bundle, ProgramBundle)
    program = bundle.manifest.program
    recording, found = Recording({name for variant in program.every for name in makers(variant)}), []
    # One engine after the other: what does not fit at once was not refused.
    with ProgramPipeline(bundle, _without_exit(bundle, target), "sequential", recording) as pipe:
        for i, (prompt, seed) in enumerate(measuring.images):
            advance(i, len(measuring.images))
            recording.calls.clear()
            place = i % len(program.every)
            pipe(prompt, seed=seed, output_type="np", guard="warn", **measuring.given[place])
            found.append(replay_program(program.every[place], seed, recording))
    return _compared(found)


def _without_exit(bundle: BaseBundle, target: str) -> Target:
    chosen = next(each for each in bundle.manifest.targets if each.id == target)
    return chosen.model_copy(update={"early_exit": None})


def _compared(runs: Iterable[tuple[list[Floats], Floats]]) -> dict[str, Any]:
    """Of runs' clean images and ends."""
    found: dict[str, Any] = {"changes": [], "errors": []}
    for clean, end in runs:
        found["changes"].append([float(change(now, before)[0]) for before, now in itertools.pairwise(clean)])
        found["errors"].append([float(change(end, now)[0]) for now in clean[1:]])
    return found


def replay(manifest: Manifest, seed: int, predictions: Sequence[Array]) -> tuple[list[Floats], Floats]:
    """The clean images D(x, sigma) of a seed's run, and the latent at its end, from what its denoiser gave.

    predictions[k]: of evaluation k, float32 [1 or 2, c, h, w], unconditional rows first. The same arithmetic in the
    same order, so that bits are those of the run.
    """
    settings, given = manifest.sampling, iter(predictions)
    schedule, noise = settings.lay(), partial(batch_noise, [TorchGenerator(seed)], manifest.image.latent_shape)

    def evaluate(x: Floats, timestep: float, both: bool) -> tuple[Array, Array | None]:
        rows = next(given)
        return rows[-1:], rows[:1] if both else None

    guidance = settings.guidance(settings.guidance_scale if manifest.takes_prompt else 1.0)
    guided = Guided(settings.noise, schedule, evaluate, guidance)
    start: Floats = noise() * initial_scale(settings.noise, schedule, settings.sampler)
    return _follow(settings, schedule, guided, start, noise)


def replay_program(variant: Variant, seed: int, recording: Recording) -> tuple[list[Floats], Floats]:
    """The same of a captured program's run, float32 [1, *latent] each, from what its `makers` gave."""
    loop = variant.loop
    assert loop
    settings, schedule = loop.sampling, loop.sampling.lay()
    drawn = draws(variant, seed)
    first = first_latent(variant, drawn, recording)
    start: Floats = first[None] / input_scale(settings.noise.prediction, schedule.sigmas[0]) if loop.vp else first[None]
    outputs: Any = iter(predictions(variant, recording))
    denoise = Denoiser(settings.noise, schedule, lambda scaled, timestep: next(outputs)[None])

    def noise() -> Floats:
        return np.asarray(drawn.more(start.shape[1:])[None], np.float32)

    return _follow(settings, schedule, denoise, start, noise)


def _follow(
    settings: Sampling, schedule: Schedule, denoise: Callable[[Floats, float], Floats], x: Floats,
    noise: Callable[[], Floats],
) -> tuple[list[Floats], Floats]:  # fmt: skip
    """The clean images of a trajectory from x, and its end."""
    clean = list[Floats]()

    def remembered(x: Floats, sigma: float) -> Floats:
        clean.append(denoise(x, sigma))
        return clean[-1].copy()

    for latent in sample(settings.sampler, remembered, x, schedule.sigmas, noise=noise, eta=settings.eta):
        x = latent
    return clean, x * final_scale(settings.noise, schedule)
