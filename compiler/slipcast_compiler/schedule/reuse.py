"""What it costs to take features from an earlier step, along the trajectories of a bundle whose steps are all full;
imports nothing that the runtime does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from slipcast.bundle.manifest import SHALLOW, Manifest
from slipcast.bundle.reader import open_bundle
from slipcast.bundle.sampling import Sampling
from slipcast.engines import Array, Engine
from slipcast.progress import Advance
from slipcast.run.pipeline import Pipeline
from slipcast.sampling.denoiser import PREDICTIONS
from slipcast.sampling.guidance import guide
from slipcast_compiler.engines.recording import Evaluation, Images, Recording

Floats = npt.NDArray[np.float32]


def measure_reuse(root: Path, images: Images, longest: int, advance: Advance) -> list[list[float | None]]:
    """[i][j]: by how much the latent after step j is off, where that step has the features of step i, i < j.

    In an Euler step of that length: (1 - sigma' / sigma) times the error of D(x, sigma), guided, relative to the
    latents at the end, by RMS; the mean over images, each image by its prompt and seed. None where step i had one
    branch and step j has two, and for more than `longest` steps in between.
    """
    bundle = open_bundle(root)
    totals: npt.NDArray[np.float64] | None = None
    recording = Recording(("denoiser",))
    with Pipeline(bundle, bundle.manifest.targets[0], instrument=recording) as pipe:
        for k, (prompt, seed) in enumerate(images):
            advance(k, len(images))
            recording.calls.clear()
            latents = pipe(prompt, seed=seed, output_type="latent", guard="warn").images
            with pipe.residency.use(SHALLOW) as shallow:
                evaluations = recording.evaluations("denoiser")
                errors = _errors(bundle.manifest, evaluations, shallow, longest) / rms(latents)
            totals = errors if totals is None else totals + errors
    assert totals is not None
    return listed(totals / len(images))


def listed(errors: npt.NDArray[np.float64]) -> list[list[float | None]]:
    """As JSON has them: None for what is infinite."""
    return [[float(error) if np.isfinite(error) else None for error in row] for row in errors]


def _errors(
    manifest: Manifest, evaluations: Sequence[Evaluation], shallow: Engine, longest: int
) -> npt.NDArray[np.float64]:
    """[i, j], of one image; infinite where there are none."""
    assert manifest.caching
    features = [spec.name for spec in manifest.caching.features]

    def again(i: int, j: int) -> Floats | None:
        before, now = evaluations[i], evaluations[j]
        if len(before["sample"]) < (rows := len(now["sample"])):
            return None
        inputs = {spec.name: now[spec.name] for spec in shallow.inputs if spec.name not in features}
        given = {name: before[name][-rows:] for name in features}
        return _guided(manifest, shallow({**inputs, **given})["prediction"])

    exact = [_guided(manifest, each["prediction"]) for each in evaluations]
    return errors_of(manifest.sampling, exact, again, longest)


def errors_of(
    sampling: Sampling, exact: Sequence[Floats], again: Callable[[int, int], Floats | None], longest: int
) -> npt.NDArray[np.float64]:
    """[i, j]: see measure_reuse; in latents, not relative. exact[j]: what the model gave at step j; again(i, j): what
    it gives there with the features of step i, None where it cannot have them."""
    schedule, prediction = sampling.lay(), sampling.noise.prediction
    errors = np.full((len(exact),) * 2, np.inf)
    for j, right in enumerate(exact):
        sigma = schedule.sigmas[j]
        for i in range(max(0, j - longest), j):
            if (output := again(i, j)) is not None:
                # D is linear in the output, so that its error is D of the output's.
                error = PREDICTIONS[prediction](np.zeros_like(output), output - right, sigma)
                errors[i, j] = (1 - schedule.sigmas[j + 1] / sigma) * rms(error)
    return errors


def _guided(manifest: Manifest, output: Array) -> Floats:
    """Of one image: of its two rows, the unconditional one first, or of the conditional one alone."""
    settings = manifest.sampling
    if len(output) == 1:
        return np.asarray(output, np.float32)
    guided: Floats = guide(output[1:], output[:1], settings.guidance_scale, settings.guidance_rescale)
    return guided


def rms(values: Array) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
