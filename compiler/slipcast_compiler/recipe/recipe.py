"""The recipe: one TOML file that says everything about a compile. Typed, frozen, validated once; see reading.py."""

from __future__ import annotations

from string import Formatter
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from slipcast.bundle.manifest import architectures
from slipcast.bundle.validation import Strict
from slipcast.engines import ENGINES
from slipcast.sampling.samplers import SAMPLERS
from slipcast.sampling.schedules import SCHEDULES
from slipcast_compiler.passes import PassesTable
from slipcast_compiler.recipe.options import Texts
from slipcast_compiler.recipe.search import SearchTable

Numbers = Annotated[tuple[float, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]
Slots = Annotated[dict[str, Texts], Field(default_factory=dict)]


class ModelTable(Strict):
    """A diffusers directory (relative to the recipe), or a hub id with a revision."""

    path: Annotated[str, Field(min_length=1)]
    revision: str | None = None


class FamilyTable(Strict):
    """The prompt family: templates with slots, a list, or a file with one prompt a line."""

    templates: Texts = ()
    slots: Slots
    prompts: Texts = ()
    prompts_file: str | None = None
    closed: bool = False
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2
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


class ReferenceTable(Strict):
    """[reference]: the sampling of the original that the bundle is judged against. A named schedule, or explicit
    timesteps or sigmas. What is not given is as in [sampling]."""

    sampler: Literal[tuple(SAMPLERS)] | None = None  # type: ignore[valid-type]
    schedule: Literal[tuple(SCHEDULES)] | None = None  # type: ignore[valid-type]
    timesteps: Numbers | None = None
    sigmas: Numbers | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=1000)] | None = None
    guidance_rescale: Annotated[float, Field(ge=0, le=1)] | None = None
    eta: Annotated[float, Field(ge=0, le=1)] | None = None

    @model_validator(mode="after")
    def _one_schedule(self) -> Self:
        explicit = [name for name in ("timesteps", "sigmas") if getattr(self, name) is not None]
        if len(explicit) + (self.schedule is not None) > 1:
            raise ValueError("give at most one of schedule, timesteps and sigmas")
        if explicit and self.steps is not None:
            raise ValueError(f"steps contradicts {explicit[0]}: the list has its own length")
        return self


class SamplingTable(ReferenceTable):
    """[sampling]: what the bundle runs. `guidance_interval` (sigmas, low and high) and `guidance_reuse` (evaluations)
    say where the unconditional branch is left out: see slipcast.sampling.denoiser.Guidance. Sizes in pixels."""

    guidance_interval: Annotated[Numbers, Field(min_length=2, max_length=2)] | None = None
    guidance_reuse: Annotated[int, Field(ge=0)] = 0
    width: Annotated[int, Field(ge=8)] | None = None
    height: Annotated[int, Field(ge=8)] | None = None

    @model_validator(mode="after")
    def _nothing_idle(self) -> Self:
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"eta belongs to the sampler ddim, not to {self.sampler or 'the default one'}")
        if self.guidance_interval and not 0 <= self.guidance_interval[0] < self.guidance_interval[1]:
            raise ValueError("guidance_interval is [low, high] in sigma, rising, neither below 0")
        return self


class TimestepsTable(Strict):
    """[timesteps]: noise levels found for sampling.steps on calibration prompts, against a trajectory of `fine_steps`;
    see timesteps.py. `dp` takes that trajectory's time, `direct` starts there and takes a multiple of it."""

    method: Literal["dp", "direct"] = "direct"
    prompts: Annotated[int, Field(ge=1)] = 16
    fine_steps: Annotated[int, Field(ge=4, le=200)] = 48


class EarlyExitTable(Strict):
    """[early_exit]: images stop where their clean image has stopped changing: see slipcast.sampling.early_exit.
    `max_error`: how far the latents of calibration prompts may be from those of all steps, on the mean, as a relative
    L2 norm."""

    max_error: Annotated[float, Field(gt=0, lt=1)] = 0.02
    prompts: Annotated[int, Field(ge=1)] = 16


class DecodeTable(Strict):
    """Tiled decode: latents larger than the tile are decoded in overlapping tiles. In latent cells."""

    tile: Annotated[int, Field(ge=4)] = 64
    overlap: Annotated[int, Field(ge=0)] = 16

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.overlap * 2 > self.tile:
            raise ValueError("overlap may be at most half the tile")
        return self


class ProfileTable(Strict):
    """What is measured on calibration prompts, and on how much of it."""

    prompts: Annotated[int, Field(ge=1)] = 16
    seeds: Annotated[int, Field(ge=1, le=1000)] = 1  # images of each prompt
    states: Annotated[int, Field(ge=1)] = 16  # points of the trajectories for taylor and leave_one_out, the dear part
    # Each head by itself, or all at once by random projections; auto: exact where the model is small.
    leave_one_out: Literal["auto", "exact", "projected"] = "auto"
    batch: Annotated[int, Field(ge=1, le=1024)] = 4  # images at once: speed against memory
    seed: Annotated[int, Field(ge=0, lt=1000)] = 0  # another one, other noise
    sampling: Literal["bundle", "reference"] = "bundle"  # whose trajectories


class CutTable(Strict):
    """What does not depend on the latent leaves the loop. `general`: for timesteps other than the schedule's, too."""

    general: bool = False


class CachingTable(Strict):
    """[caching]: at some steps a shallow denoiser goes on from features of an earlier step: see slipcast.run.caching.

    `full_steps`: how many steps evaluate the whole denoiser; without, half of them. `share`: of the denoiser's
    multiply-adds, what the shallow one may have at the most.
    """

    full_steps: Annotated[int, Field(ge=1)] | None = None
    share: Annotated[float, Field(gt=0, lt=1)] = 0.2


class GuardTable(Strict):
    """[guard]: what becomes of prompts out of an open family: see slipcast.run.guard. `false_alarms`: the share of the
    family's own prompts that may be taken for strangers."""

    policy: Literal["warn", "refuse", "fallback"] = "warn"
    false_alarms: Annotated[float, Field(gt=0, lt=1)] = 0.05


class EvaluateTable(Strict):
    """What the gate is measured on: held-out prompts, image i with `seed` + i; `scorer`: a CLIP directory or hub id;
    `lpips`: a directory with its weights. Prompts out of the family are judged too, apart and without limits."""

    images: Annotated[int, Field(ge=1)] = 16
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1000
    scorer: str | None = None
    lpips: str | None = None
    out_of_family: Texts = ()
    out_of_family_file: str | None = None

    @model_validator(mode="after")
    def _one_list(self) -> Self:
        if self.out_of_family and self.out_of_family_file:
            raise ValueError("give at most one of out_of_family and out_of_family_file")
        return self


class GateTable(Strict):
    """Quality limits, against the original model on the same prompts and noise. What is not given is not checked."""

    clip_drop: Annotated[float, Field(ge=0, le=1)] | None = None
    clip_drop_worst: Annotated[float, Field(ge=0)] | None = None
    retrieval_drop: Annotated[float, Field(ge=0, le=1)] | None = None
    lpips: Annotated[float, Field(ge=0)] | None = None
    psnr: Annotated[float, Field(ge=0)] | None = None
    ssim: Annotated[float, Field(ge=0, le=1)] | None = None


# limits -> the key of EvaluateTable without which they cannot be checked
NEEDS = {"clip_drop": "scorer", "clip_drop_worst": "scorer", "retrieval_drop": "scorer", "lpips": "lpips"}


# Keys of TargetTable -> the engines they are for.
ENGINE_KEYS = {
    "compute_capabilities": ("tensorrt-rtx",), "max_images": ("tensorrt-rtx", "tensorrt"),
    "workspace_mb": ("tensorrt-rtx", "tensorrt"), "weight_streaming": ("tensorrt-rtx", "tensorrt"),
    "hardware_compatibility": ("tensorrt",), "version_compatible": ("tensorrt",), "refit": ("tensorrt",),
}  # fmt: skip
# What a target in int8 is in besides: the other components, and what is left of the denoiser.
REST = {"onnxruntime": "fp32", "openvino": "bf16", "tensorrt-rtx": "fp16", "tensorrt": "fp16"}


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class TargetTable(Strict):
    """Where the bundle shall run.

    `compute_capabilities`: the GPUs that engines are built for; without, they are portable (Ampere and later).
    `max_images`: how many one call may ask for. `workspace_mb`: what a layer may use besides. `weight_streaming`:
    weights may stay on the host where the GPU's memory is short. `hardware_compatibility`: GPUs of the same compute
    capability as the one that is here, or all from Ampere on, and not this model alone. `version_compatible`: later
    versions of the library run the engines too, which may be slower, and bring code for the host. `refit`: weights can
    be replaced in the engines. `max_cast_error`: by how much an output of any component may be off where it is cast to
    fp16 or bf16, as a relative L2 norm; what does most damage stays in fp32 until it holds.
    """

    engine: Literal[tuple(ENGINES)]  # type: ignore[valid-type]
    precision: Literal["fp32", "fp16", "bf16", "int8"] = "fp32"
    compute_capabilities: Annotated[
        tuple[Literal["7.5", "8.0", "8.6", "8.9", "12.0", "12.1"], ...] | None, BeforeValidator(_as_tuple)
    ] = Field(default=None, min_length=1)
    max_images: Annotated[int, Field(ge=1, le=4096)] | None = None
    workspace_mb: Annotated[int, Field(ge=1)] | None = None
    hardware_compatibility: Literal["ampere_plus", "same_compute_capability"] | None = None
    weight_streaming: bool | None = None
    version_compatible: bool | None = None
    refit: bool | None = None
    max_cast_error: Annotated[float, Field(gt=0)] | None = None

    @property
    def name(self) -> str:
        """Of its directory in a bundle: tensorrt-rtx-fp16-sm86-sm89."""
        return f"{self.engine}-{self.precision}{architectures(self.compute_capabilities or ())}"

    @property
    def half(self) -> Literal["fp16", "bf16"] | None:
        """The precision of what is in neither fp32 nor int8, if anything is."""
        precision = REST[self.engine] if self.precision == "int8" else self.precision
        return precision if precision in ("fp16", "bf16") else None  # type: ignore[return-value]

    @model_validator(mode="after")
    def _engine_has_precision(self) -> Self:
        offered = ENGINES[self.engine].precisions
        if self.precision not in offered:
            raise ValueError(f"{self.engine} offers {', '.join(offered)}, not {self.precision}")
        return self

    @model_validator(mode="after")
    def _engine_has_keys(self) -> Self:
        given = [key for key in ENGINE_KEYS if getattr(self, key) is not None]
        if wrong := [key for key in given if self.engine not in ENGINE_KEYS[key]]:
            raise ValueError(f"{', '.join(wrong)}: not for {self.engine}")
        if self.max_cast_error and not self.half:
            raise ValueError(f"max_cast_error: nothing of {self.engine} in {self.precision} is in half precision")
        return self


class Recipe(Strict):
    """See the module's docstring."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    model: ModelTable
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
    search: SearchTable | None = None
    guard: GuardTable | None = None
    evaluate: EvaluateTable = EvaluateTable()
    gate: GateTable = GateTable()
    targets: Annotated[
        tuple[TargetTable, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v), Field(min_length=1)
    ]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for limit, needed in NEEDS.items():
            if getattr(self.gate, limit) is not None and getattr(self.evaluate, needed) is None:
                raise ValueError(f"gate.{limit} needs evaluate.{needed}")
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
        if self.caching and self.passes.quantize:
            raise ValueError("[caching] does not go with [passes.quantize]: there is no shallow denoiser in INT8")
        wanted = any(target.precision == "int8" for target in self.targets)
        if problem := int8_contradiction(wanted, self.passes.quantize is not None):
            raise ValueError(problem)
        return self

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


def int8_contradiction(target: bool, table: bool) -> str | None:
    """What is wrong with a target in int8 and [passes.quantize], one without the other."""
    if target == table:
        return None
    return "a target in int8 needs [passes.quantize]" if target else "no target has precision int8: [passes.quantize]"
