"""The manifest: the typed, versioned index of a bundle. This module owns the format.

Readers are strict: unknown keys, wrong types, duplicate keys and paths that leave the bundle are refused. A newer
minor version loads with a warning and without the keys this version does not know; a newer major version is refused.

There are two kinds of bundle: `Manifest` is that of one sampling loop, with our samplers; `ProgramManifest`, that of a
captured program.
"""

from __future__ import annotations

import json
import warnings
from typing import Annotated, Any, Final, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from slipcast.bundle.names import ComponentName, Count, Name, Positive, Sha256
from slipcast.bundle.program import PROGRAM, TILED
from slipcast.bundle.program_manifest import ProgramManifest
from slipcast.bundle.quality import Comparison, Metrics, Performance, Quality
from slipcast.bundle.records import (
    FORMATS,
    MANIFEST_NAME,
    Addition,
    BaseGuard,
    BaseManifest,
    Built,
    Component,
    EngineFiles,
    FamilyRecord,
    FileEntry,
    GuardPolicy,
    HeadMask,
    LowRankLayer,
    Target,
    TensorSpec,
    architectures,
)
from slipcast.bundle.sampling import Sampling
from slipcast.bundle.tiles import SMALLEST_TILE, TiledAxis, Tiling
from slipcast.bundle.validation import UNKNOWN_KEY, BundlePath, Strict, dotted, parse_json, problems
from slipcast.errors import ArtifactError, RequestError

__all__ = [
    "EMBEDDINGS", "FALLBACK", "FORMATS", "MANIFEST_NAME", "SCHEMA_VERSION", "SHALLOW",
    "Addition", "Built", "Caching", "ClosedPrompts", "Comparison", "Component", "ComponentName", "Count", "Cut",
    "EngineFiles", "FamilyRecord", "FileEntry", "GuardPolicy", "GuardRecord", "HeadMask", "ImageGeometry",
    "LowRankLayer", "Manifest", "Metrics", "Name", "Performance", "Positive", "ProgramManifest", "Quality", "Sampling",
    "Sha256", "Target", "TensorSpec", "TextInput", "architectures", "read_any_manifest", "read_manifest",
]  # fmt: skip

SCHEMA_VERSION = (1, 0)
FEATURES = frozenset(
    {
        "adapters",
        "caching",
        "closed_family",
        "cut",
        "early_exit",
        "guard",
        "guidance_interval",
        "guidance_reuse",
        PROGRAM,
        TILED,
    }
)  # what Manifest.requires may name
SHALLOW: Final = "denoiser_shallow"  # the component that takes features in place of computing them
FALLBACK: Final = "denoiser_fallback"  # the component that draws strangers
EMBEDDINGS = "embeddings"  # the one tensor of a guard's table
COMPONENTS = (
    "text_encoder",
    "text_encoder_2",
    "denoiser",
    SHALLOW,
    "denoiser_prompt",
    "denoiser_step",
    FALLBACK,
    "vae_decoder",
    "vae_encoder",
)  # what a Manifest may have; those of a program are called as they are there


class TextInput(Strict):
    """How a prompt becomes conditioning: tokenizer, text encoder, and which output feeds which denoiser input.

    Where several encoders feed one denoiser input, their outputs are joined along the last axis, in this order.
    """

    component: ComponentName
    tokenizer: BundlePath
    max_length: Positive
    pad_token_id: Count
    outputs: dict[Name, Name]


class ImageGeometry(Strict):
    """Sizes in pixels; `factor` pixels per latent cell; tile and overlap in latent cells."""

    width: Positive
    height: Positive
    channels: Positive
    factor: Positive
    scaling_factor: Annotated[float, Field(gt=0)] = 1.0  # latents are divided by it
    shift_factor: float = 0.0
    tile: Positive
    overlap: Count

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.width % self.factor or self.height % self.factor:
            raise ValueError(f"width and height have to be multiples of {self.factor}")
        if self.overlap >= self.tile:
            raise ValueError("overlap has to be smaller than the tile")
        return self

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[channels, height, width] of one image's latent."""
        return self.channels, self.height // self.factor, self.width // self.factor

    @property
    def tiling(self) -> Tiling:
        """Of the decoder."""
        axes = tuple(TiledAxis(input=dim, output=dim, factor=self.factor) for dim in (2, 3))
        smallest = min(self.tile, SMALLEST_TILE)
        return Tiling(input="latent", axes=axes, tile=self.tile, overlap=self.overlap, smallest=smallest)


class Cut(Strict):
    """A denoiser whose early parts have left the sampling loop.

    `step_table`: safetensors with, for each of `rows`, the value at each of `timesteps`, in their order, along a new
    first axis. The component `denoiser_step` computes the same rows for any timestep; without it, other timesteps are
    refused. The component `denoiser_prompt` turns what the text encoders give into what the denoiser takes.
    """

    step_table: BundlePath
    timesteps: Annotated[tuple[float, ...], Field(min_length=1)]
    rows: Annotated[tuple[TensorSpec, ...], Field(min_length=1)]


class Caching(Strict):
    """A denoiser of which some evaluations are shallow: see slipcast.run.caching.

    `features`: outputs of the component `denoiser` that `denoiser_shallow` takes. `mask`: for each step of the bundle's
    schedule, whether it is a full one; a run of other steps has full ones alone. `share`: of the denoiser's
    multiply-adds, what the shallow one has.
    """

    features: Annotated[tuple[TensorSpec, ...], Field(min_length=1)]
    mask: Annotated[tuple[bool, ...], Field(min_length=1)]
    share: Annotated[float, Field(ge=0, le=1)]

    @field_validator("mask")
    @classmethod
    def _begins_in_full(cls, mask: tuple[bool, ...]) -> tuple[bool, ...]:
        if not mask[0]:
            raise ValueError("the first evaluation has no features to go on from: it has to be full")
        return mask

    @property
    def full_steps(self) -> int:
        """How many steps are full ones."""
        return sum(self.mask)


class ClosedPrompts(Strict):
    """All that a bundle of a closed family can be asked for: it has no text encoder.

    `table`: safetensors with, for each of `outputs` (what text encoders would give, by input of the denoiser), the
    value at each of `prompts`, in their order, along a new first axis. The empty negative prompt is one of them.
    """

    table: BundlePath
    prompts: Annotated[tuple[str, ...], Field(min_length=2)]
    outputs: Annotated[tuple[TensorSpec, ...], Field(min_length=1)]

    @field_validator("prompts")
    @classmethod
    def _distinct(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(prompts)) != len(prompts):
            raise ValueError("a prompt is listed twice")
        if "" not in prompts:
            raise ValueError("the empty prompt is missing")
        return prompts


class GuardRecord(BaseGuard):
    """The manifest's record of a guard. `input`: the denoiser's input that embeddings are averages of. A prompt that is
    too far away may be drawn by the component `denoiser_fallback`, too."""

    policy: GuardPolicy
    input: Name


class Manifest(BaseManifest):
    """Of a bundle that samples with slipcast's samplers.

    `reference`: how the original was sampled that quality was measured against (null: as `sampling`). `quality` and
    `performance` repeat those of the first target that was judged.

    `requires` names what a reader has to know to make the right pictures. A newer minor version may add keys that can
    be ignored; those that cannot come with a name here.
    """

    text: tuple[TextInput, ...]
    prompts: ClosedPrompts | None = None
    guard: GuardRecord | None = None
    image: ImageGeometry
    sampling: Sampling
    reference: Sampling | None = None
    cut: Cut | None = None
    caching: Caching | None = None

    @field_validator("components")
    @classmethod
    def _known_components(cls, components: dict[str, Component]) -> dict[str, Component]:
        if unknown := sorted(set(components).difference(COMPONENTS)):
            raise ValueError(f"no component is called {unknown[0]!r}, only {', '.join(COMPONENTS)}")
        if "denoiser" not in components:
            raise ValueError("no denoiser")
        return components

    @model_validator(mode="after")
    def _names_what_it_requires(self) -> Self:
        if missing := [name for name in self.sampling.requires if name not in self.requires]:
            raise ValueError(f"{missing[0]} has to be named under requires")
        for feature, present in (
            ("early_exit", any(target.early_exit for target in self.targets)),
            ("cut", self.cut is not None),
            ("caching", self.caching is not None),
            ("closed_family", self.prompts is not None),
        ):
            if (feature in self.requires) != present:
                raise ValueError(f"{feature} has to be named under requires")
        if PROGRAM in self.requires:
            raise ValueError(f"requires names {PROGRAM}, and there is none")
        if ("guard" in self.requires) != bool(self.guard and self.guard.policy != "warn"):
            raise ValueError("a guard that does more than to warn has to be named under requires")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.caching and len(self.caching.mask) != self.sampling.steps:
            raise ValueError(f"caching.mask is for {len(self.caching.mask)} steps, and sampling has another number")
        if (SHALLOW in self.components) != (self.caching is not None):
            raise ValueError(f"the component {SHALLOW} belongs to caching")
        if self.prompts and self.text:
            raise ValueError("prompts come from a table or through text encoders, not both")
        if self.guard and self.guard.input not in {name for text in self.text for name in text.outputs.values()}:
            raise ValueError(f"guard: no text encoder gives the denoiser {self.guard.input!r}")
        if (FALLBACK in self.components) != bool(self.guard and self.guard.policy == "fallback"):
            raise ValueError(f"the component {FALLBACK} belongs to a guard with the policy fallback")
        return self

    @property
    def takes_prompt(self) -> bool:
        """Whether it draws what a text says."""
        return bool(self.text or self.prompts)

    @property
    def shared_files(self) -> list[str]:
        """What is read whatever the target: tokenizers and tables."""
        tables = [self.cut.step_table] if self.cut else []
        tables += [self.prompts.table] if self.prompts else []
        tables += [self.guard.table] if self.guard else []
        return [*(text.tokenizer for text in self.text), *tables]


def read_any_manifest(data: bytes) -> Manifest | ProgramManifest:
    """Parse and validate manifest.json; ArtifactError for anything that is not exactly right."""
    document = parse_json(data, MANIFEST_NAME)
    if not isinstance(document, dict):
        raise ArtifactError(f"{MANIFEST_NAME}: not an object", got=type(document).__name__)
    newer = _check_version(document.get("schema_version"))
    _check_features(document.get("requires"))
    kind: type[Manifest | ProgramManifest] = ProgramManifest if PROGRAM in document else Manifest
    try:
        return _validate(kind, document)
    except ValidationError as error:
        unknown = [item["loc"] for item in error.errors() if item["type"] in UNKNOWN_KEY]
        if newer and unknown:
            for location in unknown:
                _remove(document, location)
            try:
                return _validate(kind, document)
            except ValidationError as remaining:
                error = remaining
        lines = [f"{dotted(where)}: {what}" for where, what in problems(error, kind)]
        raise ArtifactError(
            f"{MANIFEST_NAME} is not valid:\n  " + "\n  ".join(lines[:20]),
            hint="rebuild the bundle with `slipcast compile`; manifests are not edited by hand",
        ) from None


def read_manifest(data: bytes) -> Manifest:
    """As read_any_manifest; RequestError where it is that of a captured program."""
    manifest = read_any_manifest(data)
    if isinstance(manifest, ProgramManifest):
        raise not_sampled(manifest)
    return manifest


def not_sampled(manifest: ProgramManifest) -> RequestError:
    """What to say where only a bundle with a sampling loop of ours will do."""
    return RequestError(
        f"{manifest.name}: this needs a bundle that samples with slipcast's samplers",
        expected="a bundle with a sampling schedule",
        got=f"a captured program of {manifest.program.pipeline}",
        hint="such bundles are for slipcast.load, `slipcast run`, profile-run, inspect, verify, report and doctor",
    )


def _validate(kind: type[Manifest | ProgramManifest], document: dict[str, Any]) -> Manifest | ProgramManifest:
    # Validated as JSON, not as Python objects, so that arrays become tuples also in strict mode.
    return kind.model_validate_json(json.dumps(document))


def _check_version(version: object) -> bool:
    """Whether the manifest is of a newer minor version."""
    parts = version.split(".") if isinstance(version, str) else []
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and len(part) < 6 for part in parts):
        raise ArtifactError(f"{MANIFEST_NAME}: schema_version", expected="MAJOR.MINOR", got=repr(version))
    major, minor = map(int, parts)
    supported = ".".join(map(str, SCHEMA_VERSION))
    if major != SCHEMA_VERSION[0]:
        need = "a newer" if major > SCHEMA_VERSION[0] else "an older"
        raise ArtifactError(
            f"{MANIFEST_NAME}: needs {need} runtime",
            expected=f"schema {supported}",
            got=f"schema {version}",
            hint="pip install --upgrade slipcast" if major > SCHEMA_VERSION[0] else "compile the bundle again",
        )
    if minor > SCHEMA_VERSION[1]:
        warnings.warn(
            f"{MANIFEST_NAME} has schema {version}, this runtime knows {supported}: newer keys are ignored",
            stacklevel=4,
        )
        return True
    return False


def _check_features(requires: object) -> None:
    for name in requires if isinstance(requires, list) else []:
        if isinstance(name, str) and name not in FEATURES:
            raise ArtifactError(
                f"{MANIFEST_NAME}: needs a newer runtime",
                expected=f"features {sorted(FEATURES) or 'none'}",
                got=repr(name[:100]),
                hint="pip install --upgrade slipcast",
            )


def _remove(document: Any, location: tuple[str | int, ...]) -> None:
    for part in location[:-1]:
        if isinstance(part, int) or part in document:  # pydantic puts the kind of a source on the way to its keys
            document = document[part]
    del document[location[-1]]
