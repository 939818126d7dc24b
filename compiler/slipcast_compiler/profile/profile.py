"""The profile: what a denoiser does on calibration prompts, for passes to choose by. profiling.py measures it."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipcast.bundle.profiles import (
    RECORD_NAME,
    TENSORS_NAME,
    Floats,
    ProfileFile,
    ProfileRecord,
    file_sha256,
    open_profile_file,
)
from slipcast.errors import RecipeError
from slipcast.progress import Advance
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.isolate import run_isolated
from slipcast_compiler.plan import Plan, Prompts
from slipcast_compiler.profile.measure import Job, measure

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
        "checkpoint": plan.checkpoint.sha256, "sampling": plan.measuring.model_dump(mode="json"),
        "size": list(plan.size), "prompts": list(prompts), "seeds": list(seeds),
        "options": options.model_dump(mode="json"),
    }  # fmt: skip

    def build(folder: Path) -> None:
        begin = time.perf_counter()
        job = Job(plan.checkpoint.root, plan.measuring, plan.size, prompts, seeds, options.states,
                  options.leave_one_out, options.batch)  # fmt: skip
        done = run_isolated(measure, job, folder / TENSORS_NAME, advance=advance)
        record = ProfileRecord(
            name=plan.recipe.name, base_model=plan.checkpoint.name, inputs=inputs, samples=samples, **done.result,
            tensors_sha256=file_sha256(folder / TENSORS_NAME),
            peak_memory_mb=round(done.peak_memory_mb, 1), seconds=round(time.perf_counter() - begin, 1),
        )  # fmt: skip
        (folder / RECORD_NAME).write_text(record.model_dump_json(indent=1))

    return open_profile(cache.get("profile", inputs, build))


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
