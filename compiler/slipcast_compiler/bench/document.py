"""The benchmark's one JSON document: its format, and nothing of how it is measured, shown or written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue

from slipcast.bundle.validation import Strict
from slipcast_compiler.bench.peaks import Peaks
from slipcast_compiler.bench.plan import BUNDLE
from slipcast_compiler.host.machine import Machine, Processor

NEW = ("cpu", "peaks")  # what documents of before do not say of their host
SCHEMA: Literal["slipcast-bench/1"] = "slipcast-bench/1"

DENOISER = "denoiser"
# What evaluates the model: of a captured pipeline several may, and there may be a shallow one.
EVALUATING = re.compile(r"denoiser(_\d+)?(_shallow)?")


def evaluating_s(components_s: Mapping[str, float]) -> float:
    """Seconds of an image in what evaluates the model."""
    return sum(seconds for name, seconds in components_s.items() if EVALUATING.fullmatch(name))


class Spread(Strict):
    """Of several images."""

    median: float
    min: float
    max: float


class Seconds(Spread):
    """Of each image, one at a time."""

    all: tuple[float, ...]


class Ratios(Spread):
    """Peer / bundle, pair by pair."""

    pairs: int


class Interval(Strict):
    """A mean and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


class Quality(Strict):
    """Against the original's pictures of the same prompts and noise; None for what was not run."""

    psnr_mean: Interval | None
    ssim_mean: Interval | None
    clip_delta_mean: Interval | None


class Cost(Strict):
    """Of a bundle's denoiser on paper, for one row."""

    multiply_adds: int
    parameters: int


class FirstImage(Strict):
    """Seconds. Cold: from starting the process; warm: from the first request to a side that is loaded."""

    cold: float
    warm: float


class SideFigures(Strict):
    """What was seen of one side; keys of batches are their sizes. What was not measured is None."""

    title: str
    about: dict[str, JsonValue]
    images: int
    seconds: Seconds
    images_per_second: dict[str, float]
    first_image_s: FirstImage
    load_s: float
    warm_up_s: tuple[float, ...]
    prepare_s: float | None
    peak_memory_mb: float
    peak_memory_mb_by_batch: dict[str, float]
    gpu_memory_mb: float | None
    disk_mb: float
    components_s: dict[str, float] | None
    cost: Cost | None = None
    energy_j: Spread | None
    gpu_energy_j: Spread | None
    quality: Quality | None


class Host(Machine):
    """The machine, its load before anything was started, and what it can do at most; None in documents of before."""

    load_before: float | None
    cpu: Processor | None = None
    peaks: Peaks | None = None


class Settings(Strict):
    """What was asked of every side; `sampling` as the manifest has it, without its noise process."""

    images: int
    batches: tuple[int, ...]
    threads: int
    prompts: tuple[str | None, ...]
    seeds: tuple[int, ...]
    image: str
    sampling: dict[str, JsonValue]


class Missing(Strict):
    """Why a peer was not measured, and what installs it, where anything does."""

    reason: str
    install: str | None


class Extrapolated(Strict):
    """What a peer that was not run would take for an image, from so many evaluations of another."""

    seconds: float
    ratio: float
    evaluations: int


class BenchDocument(Strict):
    """Seconds, megabytes (1e6 bytes), joules. Ratios are of peer / bundle, by peer: above 1 the bundle is better.

    `files`: where it was written, with its page; only where a command says so.
    """

    schema_: Annotated[Literal["slipcast-bench/1"], Field(alias="schema")] = SCHEMA
    name: str
    command: str
    date: str
    source_sha256: str
    host: Host
    settings: Settings
    sides: dict[str, SideFigures]
    ratios: dict[str, Ratios]
    memory_ratios: dict[str, Ratios]
    component_ratios: dict[str, dict[str, Ratios]] = Field(default_factory=dict)
    batch_ratios: dict[str, dict[str, Ratios]]
    compile_s: float
    break_even: dict[str, int | None]
    extrapolated: dict[str, Extrapolated] = Field(default_factory=dict)
    missing: dict[str, Missing]
    failed: dict[str, str]
    quality_reference: str | None
    notes: tuple[str, ...]
    files: dict[Literal["json", "html"], str | None] | None = None

    @property
    def bundle(self) -> SideFigures:
        """The side that all others are divided by."""
        return self.sides[BUNDLE]

    def plain(self) -> dict[str, Any]:
        """As it is written: plain JSON."""
        plain = self.model_dump(mode="json", by_alias=True, exclude=None if self.files else {"files"})
        plain["host"] = {key: value for key, value in plain["host"].items() if key not in NEW or value is not None}
        return plain


def parse_document(text: str) -> BenchDocument:
    """From its JSON text; pydantic's ValidationError where it is none."""
    return BenchDocument.model_validate_json(text)


def typed_document(plain: Mapping[str, Any]) -> BenchDocument:
    """From plain JSON, which has lists for tuples."""
    return BenchDocument.model_validate(plain, strict=False)
