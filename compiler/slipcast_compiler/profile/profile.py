"""The profile: what a denoiser does on calibration prompts, for passes to choose by. profiling.py measures it."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slipcast.bundle.manifest import Sampling
from slipcast.bundle.profiles import (
    KINDS,
    RECORD_NAME,
    TENSORS_NAME,
    Floats,
    ProfileFile,
    ProfileRecord,
    file_sha256,
    open_profile_file,
)
from slipcast.bundle.tensorfile import read_header
from slipcast.errors import RecipeError
from slipcast.progress import Advance
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.isolate import run_isolated
from slipcast_compiler.model.original import Drawing, Original, Prompts
from slipcast_compiler.profile.measure import measure
from slipcast_compiler.recipe.family import Family
from slipcast_compiler.recipe.recipe import ProfileTable
from slipcast_compiler.recipe.seeds import PROFILE

MIN_SAMPLES = 4  # below that many different prompts nothing may be chosen by what was measured
FEW_SAMPLES = 8
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


def make_profile(drawing: Drawing, options: ProfileTable, name: str, cache: Cache, advance: Advance) -> Profile:
    """Measure the denoiser while it draws, or take the measurements from the cache where nothing has changed.

    `name`: what the record is called. Raises NumericalError, naming the layer, where it comes to NaN or infinity.
    """
    samples = enough_samples(drawing.prompts)
    inputs: dict[str, Any] = drawing.inputs | {"options": options.model_dump(mode="json")}

    def build(folder: Path) -> None:
        begin = time.perf_counter()
        done = run_isolated(measure, drawing, options, folder / TENSORS_NAME, advance=advance)
        told = {"name": name, "base_model": drawing.original.checkpoint.name, "inputs": inputs, "samples": samples}
        write_profile(folder, {**told, **done.result}, done.peak_memory_mb, time.perf_counter() - begin)

    return open_profile(cache.get("profile", inputs, build))


def write_profile(folder: Path, told: Mapping[str, Any], peak_memory_mb: float, seconds: float) -> None:
    """Write the record of a folder's tensors; `told`: the fields that only the measurement knows."""
    record = ProfileRecord(
        **told,
        rank_correlations={},
        tensors_sha256=file_sha256(folder / TENSORS_NAME),
        peak_memory_mb=round(peak_memory_mb, 1),
        seconds=round(seconds, 1),
    )
    measured = ProfileFile(folder, record, read_header(folder / TENSORS_NAME))
    ranked = {kind: rank_correlations(measured.pooled(kind)) for kind in KINDS}
    (folder / RECORD_NAME).write_text(record.model_copy(update={"rank_correlations": ranked}).model_dump_json(indent=1))


def rank_correlations(pooled: Mapping[str, Floats]) -> dict[str, float]:
    """Spearman's, of every two criteria: 1 where both order alike, 0 also where one of them is constant."""
    from scipy.stats import spearmanr

    def correlation(a: Floats, b: Floats) -> float:
        return round(float(spearmanr(a, b).statistic), 4) if np.ptp(a) and np.ptp(b) else 0.0

    names = list(pooled)
    return {f"{a} {b}": correlation(pooled[a], pooled[b]) for i, a in enumerate(names) for b in names[:i]}


def calibration_drawing(
    original: Original, sampling: Sampling, family: Family | None, options: ProfileTable
) -> Drawing:
    """The images that a profile is made of."""
    return Drawing(original, sampling, *calibration_prompts(family, options))


def calibration_prompts(family: Family | None, options: ProfileTable) -> tuple[Prompts, tuple[int, ...]]:
    """Their prompts and seeds.

    Prompts are ranked by their hash, so that few of them are not all of one template, and more are those and others.
    """
    chosen: Sequence[str | None] = family.ranked[: options.prompts] if family else (None,) * options.prompts
    prompts: Any = tuple(prompt for prompt in chosen for _ in range(options.seeds))
    return prompts, PROFILE.take(len(prompts), options.seed * SEEDS)


def count_samples(prompts: Prompts) -> int:
    """How many different prompts there are; without any, images."""
    return len(set(prompts)) if prompts[0] is not None else len(prompts)


def enough_samples(prompts: Prompts) -> int:
    """The same; the user is told where that is few."""
    samples = count_samples(prompts)
    if samples < FEW_SAMPLES:
        logger.warning("the profile is made from %d calibration prompts only: what it ranks is uncertain", samples)
    return samples
