"""The recipe: one TOML file that says everything about a compile. Typed, frozen, validated once; see reading.py."""

from __future__ import annotations

from collections.abc import Iterator, Set
from string import Formatter
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from slipcast.bundle.validation import Strict
from slipcast.engines import ENGINES
from slipcast_compiler.recipe.passes import AdaptersTable, PassesTable, Quantize, QuantizeInt4
from slipcast_compiler.recipe.sampling import (
    CachingTable,
    CutTable,
    EarlyExitTable,
    ReferenceTable,
    SamplingTable,
    TimestepsTable,
)
from slipcast_compiler.recipe.search import SearchTable
from slipcast_compiler.recipe.targets import TargetTable
from slipcast_compiler.recipe.values import AsTuple, Images, Texts

Slots = Annotated[dict[str, Texts], Field(default_factory=dict)]


class ModelTable(Strict):
    """A diffusers directory or a .safetensors file (relative to the recipe), or a hub id with a revision."""

    # the directory, the file, or the hub id
    path: Annotated[str, Field(min_length=1)]
    # of a hub id: a commit, a tag or a branch
    revision: str | None = None
    # of a file: a diffusers directory of the same kind of model, for its configs and tokenizer
    config: Annotated[str, Field(min_length=1)] | None = None
    # of the weights, such as "fp16"; without, the plain files of each component, or else those that it has
    variant: Annotated[str, Field(min_length=1)] | None = None
    # a class in place of the checkpoint's own, which is captured: of diffusers, or package.module:Class
    pipeline: Annotated[str, Field(min_length=1)] | None = None


class LoraTable(Strict):
    """A LoRA, added to the weights before anything else: a .safetensors file (relative to the recipe), or a hub id with
    a revision and a file."""

    # the file, or the hub id
    path: Annotated[str, Field(min_length=1)]
    # of a hub id: a commit, a tag or a branch
    revision: str | None = None
    # of a hub id: which of its files
    file: Annotated[str, Field(min_length=1)] | None = None
    # by how much it counts; below 0 it is taken away
    scale: Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)] = 1.0


class FamilyTable(Strict):
    """The prompt family: templates with slots, a list, or a file with one prompt a line."""

    # with {slots} in braces
    templates: Texts = ()
    # for each slot of the templates, its values; all combinations are taken
    slots: Slots
    # a list of them, in place of templates
    prompts: Texts = ()
    # one prompt a line; empty lines and lines that begin with # do not count
    prompts_file: str | None = None
    # whether no other prompts will ever be asked for
    closed: bool = False
    # the share that the gate is measured on
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2
    # another one, another split
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("templates", "prompts", "prompts_file") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of templates, prompts and prompts_file; given: {', '.join(given) or 'none'}"
            )
        wanted = {slot for template in self.templates for slot in slots_of(template)}
        if missing := sorted(wanted - set(self.slots)):
            raise ValueError(f"templates use slots that are not defined: {', '.join(missing)}")
        if unused := sorted(set(self.slots) - wanted):
            raise ValueError(f"slots that no template uses: {', '.join(unused)}")
        if empty := sorted(name for name, values in self.slots.items() if not values):
            raise ValueError(f"slots without values: {', '.join(empty)}")
        return self


class DecodeTable(Strict):
    """Tiled decode: latents larger than the tile are decoded in overlapping tiles. In latent cells. Of a captured
    pipeline only where this table is there, if an empty one; else its latents are decoded whole."""

    # the side of a tile
    tile: Annotated[int, Field(ge=4, le=16_384)] = 64
    # of neighbours, at most half the tile
    overlap: Annotated[int, Field(ge=0)] = 16

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.overlap * 2 > self.tile:
            raise ValueError("overlap may be at most half the tile")
        return self


class ProfileTable(Strict):
    """What is measured on calibration prompts, and on how much of it."""

    # how many calibration prompts
    prompts: Images = 16
    seeds: Annotated[int, Field(ge=1, le=1000)] = 1  # images of each prompt
    states: Images = 16  # points of the trajectories for taylor and leave_one_out, the dear part
    # Each head by itself, or all at once by random projections; auto: exact where the model is small.
    leave_one_out: Literal["auto", "exact", "projected"] = "auto"
    batch: Annotated[int, Field(ge=1, le=1024)] = 4  # images at once: speed against memory
    seed: Annotated[int, Field(ge=0, lt=1000)] = 0  # another one, other noise
    # whose trajectories; of a captured pipeline those that INT8, INT4 and casts are measured on
    sampling: Literal["bundle", "reference"] = "bundle"


class GuardTable(Strict):
    """[guard]: what becomes of prompts out of an open family: see slipcast.run.guard. `false_alarms`: the share of the
    family's own prompts that may be taken for strangers."""

    # strangers are drawn with a warning, refused, or drawn by the original's denoiser, which the bundle then has too
    policy: Literal["warn", "refuse", "fallback"] = "warn"
    false_alarms: Annotated[float, Field(gt=0, lt=1)] = 0.05


class EvaluateTable(Strict):
    """What the gate is measured on: held-out prompts, image i with `seed` + i; `scorer`: a CLIP directory, or a
    hub id with a revision, NAME/MODEL@COMMIT; `lpips`: a directory with its weights. Prompts out of the family are
    judged too, apart and without limits."""

    # one of each of the first so many held-out prompts
    images: Images = 16
    seed: Annotated[int, Field(ge=0, lt=2**27)] = 1000
    scorer: str | None = None
    lpips: str | None = None
    # prompts
    out_of_family: Texts = ()
    # one prompt a line, in place of the list
    out_of_family_file: str | None = None
    # none: the original is not drawn, and the bundle is published as unjudged
    original: Literal["none"] | None = None
    # a directory of pictures that `slipcast originals` drew on another machine
    originals: str | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        for one, other in (("out_of_family", "out_of_family_file"), ("original", "originals")):
            if getattr(self, one) and getattr(self, other):
                raise ValueError(f"give at most one of {one} and {other}")
        return self


class GateTable(Strict):
    """Quality limits, against the original model on the same prompts and noise. What is not given is not checked."""

    # the most that the mean CLIP score may fall, relative
    clip_drop: Annotated[float, Field(ge=0, le=1)] | None = None
    # the same of the worst image
    clip_drop_worst: Annotated[float, Field(ge=0)] | None = None
    # the most that the share of pictures may fall for which the scorer finds their own caption
    retrieval_drop: Annotated[float, Field(ge=0, le=1)] | None = None
    # the most, on the mean
    lpips: Annotated[float, Field(ge=0)] | None = None
    # the least, of the worst image, in dB
    psnr: Annotated[float, Field(ge=0)] | None = None
    # the least, of the worst image
    ssim: Annotated[float, Field(ge=0, le=1)] | None = None


# Arguments of a pipeline that no recipe gives, and why.
OWN = {
    "prompt": "prompts are those of the [family]",
    "generator": "noise is that of a run's seed",
    "output_type": "a bundle gives what the pipeline decodes",
    "return_dict": "a bundle has a form of its own for what it returns",
}
# limits -> the key of EvaluateTable without which they cannot be checked
NEEDS = {"clip_drop": "scorer", "clip_drop_worst": "scorer", "retrieval_drop": "scorer", "lpips": "lpips"}


class Recipe(Strict):
    """See the module's docstring."""

    # the bundle's, and of its directory
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    model: ModelTable
    lora: Annotated[tuple[LoraTable, ...], AsTuple] = ()
    # of a captured pipeline: its arguments, by their own names
    call: Annotated[dict[str, Any], Field(default_factory=dict)]
    family: FamilyTable | None = None  # an unconditional model has none
    sampling: SamplingTable = SamplingTable()
    reference: ReferenceTable = ReferenceTable()
    timesteps: TimestepsTable | None = None
    early_exit: EarlyExitTable | None = None
    decode: DecodeTable = DecodeTable()
    profile: ProfileTable = ProfileTable()
    passes: PassesTable = PassesTable()
    cut: CutTable | None = None
    caching: CachingTable | None = None
    adapters: AdaptersTable | None = None
    search: SearchTable | None = None
    guard: GuardTable | None = None
    evaluate: EvaluateTable = EvaluateTable()
    gate: GateTable = GateTable()
    targets: Annotated[tuple[TargetTable, ...], AsTuple, Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for limit, needed in NEEDS.items():
            if getattr(self.gate, limit) is not None and getattr(self.evaluate, needed) is None:
                raise ValueError(f"gate.{limit} needs evaluate.{needed}")
        if self.evaluate.original and (limits := [*self.gate.model_dump(exclude_none=True)]):
            raise ValueError(f"gate.{limits[0]} is against the original, and evaluate.original is none")
        if self.timesteps and (self.sampling.timesteps or self.sampling.sigmas):
            raise ValueError("[timesteps] looks for what sampling.timesteps or sampling.sigmas gives: give one of them")
        if self.guard and (not self.family or self.family.closed):
            raise ValueError(
                "[guard] is for an open family: a closed one refuses all other prompts by name"
                if self.family
                else "[guard] is for a model with prompts"
            )
        names = [target.name for target in self.targets]
        if len(set(names)) < len(names):
            raise ValueError("two targets with the same engine, precision and GPUs")
        if self.search and not self.gate.model_dump(exclude_none=True):
            raise ValueError("[search] needs a limit in [gate]: without one, the fastest wins whatever its pictures")
        if self.adapters and (wrong := [t.name for t in self.targets if not t.takes_adapters]):
            raise ValueError(f"[adapters] is for CPU targets in fp32, bf16 and int4, and not for {wrong[0]}")
        if self.caching and self.passes.quantize:
            raise ValueError("[caching] does not go with [passes.quantize]: there is no shallow denoiser in INT8")
        precisions = {target.precision for target in self.targets}
        tables = {name for name in ("quantize", "quantize_int4") if getattr(self.passes, name) is not None}
        for _, problem in precision_contradictions(precisions, tables):
            raise ValueError(problem)
        return self

    @property
    def quantize_options(self) -> Quantize | None:
        """[passes.quantize], symmetric where a target on a GPU reads it."""
        options = self.passes.quantize
        if options and any(each.precision == "int8" and ENGINES[each.engine].device == "cuda" for each in self.targets):
            return options.model_copy(update={"symmetric": True})
        return options

    @property
    def int4_options(self) -> QuantizeInt4 | None:
        """[passes.quantize_int4], or its defaults, where a target is in int4."""
        wanted = any(target.precision == "int4" for target in self.targets)
        return (self.passes.quantize_int4 or QuantizeInt4()) if wanted else None

    @property
    def samples_needed(self) -> int | None:
        """How many evaluations of a component quantisation is calibrated on, if anything is quantised."""
        return max((each.samples for each in (self.quantize_options, self.int4_options) if each), default=None)

    def asked_of_original(self) -> ReferenceTable:
        """[reference], completed by [sampling]; a schedule of its own replaces that of [sampling] altogether."""
        given = self.reference.model_dump(exclude_none=True)
        rest = self.sampling.model_dump(include=set(ReferenceTable.model_fields), exclude_none=True)
        if {"timesteps", "sigmas", "schedule", "steps"} & set(given):
            taken = {"timesteps", "sigmas"} | ({"schedule", "steps"} if {"timesteps", "sigmas"} & set(given) else set())
            rest = {key: value for key, value in rest.items() if key not in taken}
        if "sampler" in given:
            rest.pop("eta", None)
        return ReferenceTable(**{**rest, **given})


def slots_of(template: str) -> list[str]:
    """Names in braces; ValueError where the braces do not match or hold anything but a name."""
    names = []
    for _, slot, spec, conversion in Formatter().parse(template):
        if slot is None:
            continue
        if not slot.isidentifier() or spec or conversion:
            raise ValueError(f"{template!r}: {{{slot}}} is not a slot name")
        names.append(slot)
    return names


def precision_contradictions(precisions: Set[str], tables: Set[str]) -> Iterator[tuple[tuple[str, ...], str]]:
    """What is wrong with the precisions of targets and the tables of [passes] for them, and where."""
    if "int8" in precisions and "quantize" not in tables:
        yield ("targets",), "a target in int8 needs [passes.quantize]"
    for name, precision in (("quantize", "int8"), ("quantize_int4", "int4")):
        if name in tables and precision not in precisions:
            yield ("passes", name), f"no target has precision {precision}: [passes.{name}]"
