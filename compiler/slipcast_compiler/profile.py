"""The profile: what a denoiser does on calibration prompts, for passes to choose by.

Two phases, in a process of their own. First the original samples every calibration prompt while observe.py measures
each evaluation; then importance.py looks at a few states of those trajectories, the ones that taylor and leave_one_out
are worth their price at.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slipcast.errors import NumericalError, RecipeError
from slipcast.manifest import Sampling
from slipcast.profiles import (
    RECORD_NAME,
    TENSORS_NAME,
    ProfileFile,
    ProfileRecord,
    file_sha256,
    open_profile_file,
)
from slipcast.progress import Advance
from slipcast.samplers import sample
from slipcast_compiler import package
from slipcast_compiler.cache import Cache
from slipcast_compiler.isolate import run_isolated
from slipcast_compiler.plan import Plan, Prompts
from slipcast_compiler.quiet import quiet

Floats = npt.NDArray[np.float32]

MIN_SAMPLES = 4  # below that many different prompts nothing may be chosen by what was measured
FEW_SAMPLES = 8
FIRST_SEED = 1 << 31
SEEDS = 10**6  # of a profile's `seed`, before those of the next

logger = logging.getLogger("slipcast")


@dataclass(frozen=True)
class Profile:
    """A profile, read as it is asked. What takes data is refused where it was taken from too few prompts."""

    folder: Path
    file: ProfileFile = dataclasses.field(repr=False)

    @property
    def digest(self) -> str:
        """SHA-256 over what went in and what came out."""
        return self.file.record.digest

    def heads(self, criterion: str) -> dict[str, Floats]:
        """Attention layer -> importance of its heads, float32 [heads], larger is more important.

        Criteria: activation_energy_percentile, taylor, leave_one_out, magnitude.
        """
        return self._importance("head", criterion)

    def neurons(self, criterion: str) -> dict[str, Floats]:
        """Feed-forward layer -> importance of its neurons, float32 [neurons]; all criteria but leave_one_out."""
        return self._importance("neuron", criterion)

    def second_moment(self, linear: str) -> Floats:
        """float32 [inputs, inputs]: the mean of x x^T over the tokens x (or pixels) that the layer was given."""
        self._check_samples()
        return self.file.read(f"second_moment/{self._measured(linear)}")

    def ranges(self, linear: str) -> tuple[Floats, Floats]:
        """Smallest and largest value of each input channel of the layer, float32 [inputs] each."""
        self._check_samples()
        low, high = self.file.read(f"range/{self._measured(linear)}")
        return low, high

    @property
    def steps(self) -> dict[str, Any]:
        """Curves over the denoiser's evaluations (of which some samplers have two a step), means over the images.

        timesteps: float32 [n]; guidance_gap: |conditional - unconditional| / |conditional| of the prediction, [n], or
        [0] without guidance; feature_change: by block, |now - before| / |before| of its output, [n - 1].
        """
        return {**self.file.group("steps"), "feature_change": self.file.group("steps.feature_change")}

    def _importance(self, kind: str, criterion: str) -> dict[str, Floats]:
        known = self.file.criteria(kind)
        if criterion not in known:
            raise RecipeError(f"no {kind} criterion {criterion!r}", expected=" or ".join(known), got=criterion)
        if criterion != "magnitude":
            self._check_samples()
        return self.file.group(f"{kind}.{criterion}")

    def _measured(self, linear: str) -> str:
        return self.file.record.shared_inputs.get(linear, linear)

    def _check_samples(self) -> None:
        if self.file.record.samples < MIN_SAMPLES:
            raise RecipeError(
                "the profile was made from too few prompts to choose by",
                expected=f"at least {MIN_SAMPLES} different calibration prompts", got=self.file.record.samples,
                hint="add prompts to the family, or raise profile.prompts",
            )  # fmt: skip


def open_profile(path: Path) -> Profile:
    """A profile's directory; ArtifactError where it is none, or damaged."""
    return Profile(path, open_profile_file(path))


def make_profile(plan: Plan, cache: Cache, advance: Advance) -> Profile:
    """Measure the plan's denoiser, or take the measurements from the cache where nothing has changed.

    Raises NumericalError, naming the layer, where it comes to NaN or infinity.
    """
    options = plan.recipe.profile
    prompts, seeds = calibration_images(plan)
    if (samples := len(set(prompts)) if plan.family else len(seeds)) < FEW_SAMPLES:
        logger.warning("the profile is made from %d calibration prompts only: what it ranks is uncertain", samples)
    inputs: dict[str, Any] = {
        "checkpoint": plan.checkpoint.sha256, "sampling": plan.sampling.model_dump(mode="json"),
        "size": list(plan.size), "prompts": list(prompts), "seeds": list(seeds),
        "options": options.model_dump(mode="json"),
    }  # fmt: skip

    def build(folder: Path) -> None:
        begin = time.perf_counter()
        job = Job(plan.checkpoint.root, plan.sampling, plan.size, prompts, seeds, options.states,
                  options.leave_one_out, options.batch)  # fmt: skip
        done = run_isolated(measure, job, folder / TENSORS_NAME, advance=advance)
        record = ProfileRecord(
            name=plan.recipe.name, base_model=plan.checkpoint.name, inputs=inputs, samples=samples, **done.result,
            tensors_sha256=file_sha256(folder / TENSORS_NAME),
            peak_memory_mb=round(done.peak_memory_mb, 1), seconds=round(time.perf_counter() - begin, 1),
        )  # fmt: skip
        (folder / RECORD_NAME).write_text(record.model_dump_json(indent=1))

    return open_profile(cache.get("profile", inputs, build))


def publish(profile: Profile, output: Path) -> None:
    """A copy of the profile with its page, in one rename."""
    from slipcast_compiler.profile_page import render_page

    with package.staging(output, RECORD_NAME) as folder:
        for name in (RECORD_NAME, TENSORS_NAME):
            shutil.copyfile(profile.folder / name, folder / name)
        (folder / "profile.html").write_text(render_page(profile.file), encoding="utf-8")
        package.publish(folder, output, RECORD_NAME)


def calibration_images(plan: Plan) -> tuple[Prompts, tuple[int, ...]]:
    """The prompt (None where the model takes none) and the seed of each image; no seed is one of evaluate's.

    Prompts are ranked by their hash, so that few of them are not all of one template, and more are those and others.
    """
    options, evaluate = plan.recipe.profile, plan.recipe.evaluate
    chosen: Sequence[str | None] = (None,) * options.prompts
    if plan.family:
        ranked = sorted(plan.family.calibration, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
        chosen = ranked[: options.prompts]
    prompts: Any = tuple(prompt for prompt in chosen for _ in range(options.seeds))
    # torch's generator takes the low 32 bits of a seed; evaluate has two runs of images
    taken = {(evaluate.seed + i) % (1 << 32) for i in range(2 * evaluate.images)}
    free = (seed for seed in itertools.count(FIRST_SEED + options.seed * SEEDS) if seed % (1 << 32) not in taken)
    return prompts, tuple(itertools.islice(free, len(prompts)))


@dataclass(frozen=True)
class Job:
    """What the process that measures is told."""

    root: Path
    sampling: Sampling
    size: tuple[int, int]
    prompts: Prompts
    seeds: tuple[int, ...]
    states: int
    leave_one_out: str
    batch: int


def measure(job: Job, out: Path, advance: Advance) -> dict[str, Any]:
    """Write all tensors of the profile to `out`; returns the record's fields that only the measurement knows."""
    import torch
    from safetensors.numpy import save_file

    from slipcast_compiler import importance, original
    from slipcast_compiler.layers import attention_layers
    from slipcast_compiler.observe import Observer

    with quiet():
        pipe = original.open_pipeline(job.root, job.sampling, "float32")
    module = pipe.unet.requires_grad_(False).eval()
    sigmas = evaluated_sigmas(job.sampling)
    wanted = chosen_states(len(job.prompts), len(sigmas), job.states)
    exact = importance.is_exact(module, job.leave_one_out)
    heads = sum(layer.heads for layer in attention_layers(module)) if exact else 2 * importance.PROBES
    progress = _Progress(advance, len(job.prompts) * len(sigmas) + len(wanted) * (1 + heads))

    guided = job.prompts[0] is not None and job.sampling.guidance_scale > 1
    observer = Observer(module, len(sigmas), guided, wanted, progress.add)
    clean: dict[int, torch.Tensor] = {}
    kept = {image for image, _ in wanted}
    with torch.no_grad(), observer.watching():
        for first in range(0, len(job.prompts), job.batch):
            prompts, seeds = job.prompts[first : first + job.batch], job.seeds[first : first + job.batch]
            observer.begin(first, len(seeds))
            noise, generators = original.draw_noise(pipe, job.size, seeds)
            text = [prompt for prompt in prompts if prompt is not None] or None
            x = original.sample_latents(pipe, job.sampling, text, noise, generators)
            clean |= {first + i: x[i : i + 1].clone() for i in range(len(x)) if first + i in kept}

    found = observer.results() | importance.magnitude(module)
    states = observer.states
    found |= importance.taylor(module, job.sampling, states, clean, sigmas, progress.add)
    with torch.no_grad():
        if exact:
            found |= importance.leave_one_out(module, job.sampling, states, job.batch, progress.add)
        else:
            advance_by = lambda count: progress.add(count * heads)  # noqa: E731
            found |= importance.projected_leave_one_out(module, job.sampling, states, advance_by)
    _check_finite(found)
    save_file({name: np.ascontiguousarray(found[name]) for name in sorted(found)}, out)
    return {"leave_one_out": "exact" if exact else "projected", "shared_inputs": observer.inputs.shared()}


def evaluated_sigmas(sampling: Sampling) -> list[float]:
    """The sigma of each evaluation of the denoiser, in order, which depends on the sampler alone."""
    sigmas: list[float] = []

    def denoise(x: Any, sigma: float) -> Any:
        sigmas.append(sigma)
        return x

    x = np.zeros(1)
    for _ in sample(sampling.sampler, denoise, x, sampling.lay().sigmas, noise=lambda: x, eta=sampling.eta):
        pass
    return sigmas


def chosen_states(images: int, evaluations: int, count: int) -> list[tuple[int, int]]:
    """Up to `count` pairs (image, evaluation): evaluations evenly over the trajectory, images in turn."""
    count = min(count, images * evaluations)
    return [(i % images, ((2 * i + 1) * evaluations // (2 * count))) for i in range(count)]


class _Progress:
    def __init__(self, advance: Advance, total: int) -> None:
        self._advance, self._done, self._total = advance, 0, total

    def add(self, count: int) -> None:
        self._done += count
        self._advance(self._done, self._total)


def _check_finite(found: dict[str, Floats]) -> None:
    for name, values in found.items():
        if not np.isfinite(values).all():
            what, _, layer = name.partition("/")
            raise NumericalError(f"{layer}: NaN or infinity in its {what}", expected="finite numbers")
