"""report.json: its format. What a pass or a stage tells is its own; the rest is typed here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field

from slipcast.bundle.program import Output
from slipcast.bundle.validation import Strict
from slipcast_compiler.pages.search import SearchRecord

Told = dict[str, Any]  # plain JSON, as whoever tells it has it


class Gated(Strict):
    """One limit on one target. `value` may be NaN, `value` and `floor` are None where the metric was not run, `passed`
    where nothing was asked."""

    model_config = ConfigDict(allow_inf_nan=True)

    metric: str
    limit: float | None
    value: float | None
    floor: float | None
    passed: bool | None


class FamilyRecord(Strict):
    """The family as the manifest has it, with prompts; `not_shipped`: encoders that a closed family does without."""

    model_config = ConfigDict(extra="allow")  # the manifest's fields are the manifest's

    calibration_examples: tuple[str, ...] = ()
    held_out_prompts: tuple[str, ...]
    out_of_family_prompts: tuple[str, ...] = ()
    not_shipped: tuple[str, ...] = ()
    prompt_table_bytes: int = 0


class BaseRecord(Strict):
    """What every report says. Targets are the manifest's; `recipe` is the resolved one, `original` what drew the
    pictures that the bundle is judged by, in `original_precision`, on `original_machine` where that was another one;
    without a precision nothing was drawn. By target: `gate`, `not_run`, `host_notes`."""

    name: str
    compiled_at: str
    base_model: str
    source_sha256: str
    pipeline: str
    family: FamilyRecord | None
    targets: tuple[Told, ...]
    gate: dict[str, tuple[Gated, ...]]
    passed: bool | None
    not_run: dict[str, str]
    host_notes: dict[str, str] = Field(default_factory=dict)
    stages_s: dict[str, float]
    recipe: Told
    original: str
    original_precision: Literal["fp32", "bf16"] | None = "fp32"
    original_machine: str | None = None
    search: SearchRecord | None = None
    tools: dict[str, str]

    def plain(self) -> dict[str, Any]:
        """As it is written: plain JSON, but for numbers that are not finite."""
        plain: dict[str, Any] = _listed(self.model_dump() | {"search": self.search and self.search.plain()})
        return plain


class Record(BaseRecord):
    """Everything that the report shows but pictures. Components, sampling and reference are the manifest's too. By
    target: `mixed_precision`."""

    not_compiled: tuple[str, ...]
    components: dict[str, Told]
    sampling: Told
    reference: Told
    passes: dict[str, Told]
    mixed_precision: dict[str, Told]
    timesteps: Told | None
    early_exit: Told | None
    cut: Told | None
    caching: Told | None
    guard: Told | None
    cost: dict[str, int] | None = None


class PartRecord(Strict):
    """A part of a captured program, which is one component of the bundle: the `modules` that it calls, in order, with
    their `parameters`, so many of which are of `linear` layers, and how many `operators` are between them. `uses`: how
    often a picture takes it, each in so many `tiles`; `constants`: how many of its inputs are of the table, and differ
    from use to use; `reads`: how many others follow noise, pictures and texts."""

    modules: tuple[str, ...]
    parameters: int
    linear: int
    operators: int
    uses: int
    tiles: int = 1
    constants: int
    reads: dict[str, int]


class VariantRecord(Strict):
    """What was judged of a variant: `chosen`, of what is listed, on so many `images`, and by target its seconds for one
    and its metrics."""

    chosen: Told
    images: int
    latency_original_s: float | None
    targets: dict[str, Told]


class ProgramRecord(BaseRecord):
    """The same of a captured program. `capture`: what `slipcast capture` says of it; `verified`: the relative L2
    error of its replay for another prompt and seed, `verified_with` the weights that it was replayed with, or
    functions in the places of modules, and `limit` what it may be. `texts`, `pictures`, `listed`, `fixed`: the
    arguments that a run takes, those of which it may take one of some values, and those that it cannot change.
    `variants`: of each combination of what is listed, the first of which is the default. `sampling`: of slipcast's
    samplers, where they take its steps, and `free`, the arguments by which a run chooses them; else `not_free` says
    why. `passes`: what each reports, of all denoisers; `quantized`: by precision and component; `mixed_precision`,
    by target, as Record's."""

    capture: Told
    parts: dict[str, PartRecord]
    verified: float
    verified_with: Literal["checkpoint", "functions"]
    limit: float
    texts: tuple[str, ...]
    pictures: tuple[str, ...]
    fixed: Told
    listed: dict[str, tuple[Any, ...]]
    variants: tuple[VariantRecord, ...]
    sampling: Told | None
    free: tuple[str, ...]
    not_free: str
    passes: dict[str, Told] = Field(default_factory=dict)
    timesteps: Told | None = None
    caching: Told | None = None
    early_exit: Told | None = None
    guard: Told | None = None
    quantized: dict[str, dict[str, Told]]
    mixed_precision: dict[str, Told]
    gives: Output


def typed_record(plain: Mapping[str, Any]) -> Record:
    """From plain JSON, which has lists for tuples."""
    return Record.model_validate(plain, strict=False)


def typed_program_record(plain: Mapping[str, Any]) -> ProgramRecord:
    """The same of a captured program's."""
    return ProgramRecord.model_validate(plain, strict=False)


def finite(value: Any) -> Any:
    """The same with "NaN" for what is not a number, which JSON does not have; null means "not run"."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return "NaN" if isinstance(value, float) and not math.isfinite(value) else value


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(inner) for key, inner in value.items()}
    return [_listed(inner) for inner in value] if isinstance(value, list | tuple) else value
