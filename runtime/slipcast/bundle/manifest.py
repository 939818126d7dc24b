"""The manifest: the typed, versioned index of a bundle. This module owns the format.

Readers are strict: unknown keys, wrong types, duplicate keys and paths that leave the bundle are refused. A newer
minor version loads with a warning and without the keys this version does not know; a newer major version is refused.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, Field, StringConstraints, ValidationError, field_validator, model_validator

from slipcast.bundle.validation import (
    UNKNOWN_KEY,
    BundleName,
    BundlePath,
    Line,
    Strict,
    colliding,
    dotted,
    parse_json,
    printable,
    problems,
)
from slipcast.errors import ArtifactError, RequestError
from slipcast.sampling.denoiser import PREDICTIONS
from slipcast.sampling.guidance import Guidance
from slipcast.sampling.samplers import SAMPLERS
from slipcast.sampling.schedules import (
    BETA_SCHEDULES,
    SPACINGS,
    NoiseProcess,
    Schedule,
    from_sigmas,
    from_timesteps,
    make_schedule,
)

SCHEMA_VERSION = (1, 0)
MANIFEST_NAME = "manifest.json"
FEATURES = frozenset(
    {"caching", "closed_family", "early_exit", "guard", "guidance_interval", "guidance_reuse", "cut"}
)  # what Manifest.requires may name
# Engine -> what its model and weights are called. An engine opens nothing else: no library has to guess a format.
FORMATS: dict[str, tuple[str, str | None]] = {
    "openvino": (".xml", ".bin"),
    "onnxruntime": (".onnx", ".data"),
    "onnxruntime-gpu": (".onnx", ".data"),
    "onnxruntime-tensorrt": (".onnx", ".data"),
    "tensorrt": (".engine", None),
    "tensorrt-rtx": (".engine", None),
}
MAX_TRAIN_TIMESTEPS = 100_000  # the table of noise levels is this long
SHALLOW: Final = "denoiser_shallow"  # the component that takes features in place of computing them
FALLBACK: Final = "denoiser_fallback"  # the component that draws strangers
EMBEDDINGS = "embeddings"  # the one tensor of a guard's table

ComponentName = Literal[
    "text_encoder",
    "text_encoder_2",
    "denoiser",
    "denoiser_shallow",
    "denoiser_prompt",
    "denoiser_step",
    "denoiser_fallback",
    "vae_decoder",
    "vae_encoder",
]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, StringConstraints(min_length=1, max_length=200), AfterValidator(printable)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
GuardPolicy = Literal["warn", "refuse", "fallback"]


class FileEntry(Strict):
    """One file of the bundle; size in bytes."""

    path: BundlePath
    size: Count
    sha256: Sha256


class TensorSpec(Strict):
    """An engine's input or output; a string in `shape` names a dimension that is free at run time."""

    name: Name
    dtype: Literal["float32", "float16", "int64", "int32"]
    shape: tuple[Positive | Name, ...]


class Component(Strict):
    """What every engine of a component takes and returns, whatever the target."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


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


class Sampling(Strict):
    """The sampling schedule the bundle was made and judged with; a run may ask for other steps or guidance.

    `guidance_interval` (sigmas) and `guidance_reuse` (evaluations): see guidance.Guidance.
    """

    sampler: Name
    schedule: Name | None = None
    timesteps: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    steps: Positive
    guidance_scale: float
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    guidance_reuse: Count = 0
    eta: float = 0.0
    noise: NoiseProcess

    @field_validator("noise")
    @classmethod
    def _known_noise(cls, noise: NoiseProcess) -> NoiseProcess:
        if noise.prediction not in PREDICTIONS:
            raise ValueError(f"prediction is one of {', '.join(PREDICTIONS)}, got {noise.prediction[:100]!r}")
        if noise.beta_schedule not in BETA_SCHEDULES:
            raise ValueError(f"beta_schedule is one of {', '.join(BETA_SCHEDULES)}, got {noise.beta_schedule[:100]!r}")
        if noise.timestep_spacing not in (None, *SPACINGS):
            raise ValueError(f"timestep_spacing is one of {', '.join(SPACINGS)}, got {noise.timestep_spacing[:100]!r}")
        if not 1 <= noise.num_train_timesteps <= MAX_TRAIN_TIMESTEPS:
            raise ValueError(f"num_train_timesteps is 1 to {MAX_TRAIN_TIMESTEPS}, got {noise.num_train_timesteps}")
        return noise

    @model_validator(mode="after")
    def _eta_has_a_taker(self) -> Self:
        known = SAMPLERS.get(self.sampler)  # one of a newer runtime is refused on loading
        if self.eta and known and known.eta is None:
            raise ValueError(f"the sampler {self.sampler} takes no eta")
        return self

    @model_validator(mode="after")
    def _interval_is_one(self) -> Self:
        if self.guidance_interval and not 0 <= self.guidance_interval[0] < self.guidance_interval[1]:
            raise ValueError("guidance_interval is [low, high] in sigma, rising, neither below 0")
        return self

    @property
    def requires(self) -> tuple[str, ...]:
        """What a reader has to know, to make these pictures and no others."""
        asked = {"guidance_interval": self.guidance_interval, "guidance_reuse": self.guidance_reuse}
        return tuple(name for name, value in asked.items() if value)

    def guidance(self, scale: float | None = None) -> Guidance:
        """Its guidance, with another scale if one is given."""
        chosen = self.guidance_scale if scale is None else scale
        return Guidance(chosen, self.guidance_rescale, self.guidance_interval, self.guidance_reuse)

    def lay(self, steps: int | None = None) -> Schedule:
        """The schedule in full, with `steps` in place of its own number; RequestError where that cannot be."""
        if explicit := self.timesteps or self.sigmas:
            if steps not in (None, self.steps):
                raise RequestError(
                    "num_inference_steps is fixed in this bundle: its schedule is an explicit list",
                    expected=str(self.steps),
                    got=str(steps),
                )
            lay = from_timesteps if self.timesteps else from_sigmas
            return lay(self.noise, explicit, self.sampler)
        return make_schedule(self.noise, self.schedule or "", steps or self.steps, self.sampler)


class Metrics(Strict, allow_inf_nan=True):  # what is not a number has to reach the gate; no manifest can hold it
    """Distances between two sets of pictures of the same prompts; null means that the metric was not run.

    clip_delta is relative, (score - reference score) / reference score: negative is worse. Retrieval is the share of
    pictures for which the scorer finds their own among the family's captions; its drop is a difference of such shares,
    and negative is better. LPIPS and FLIP are 0 for equal pictures. PSNR in dB on [0, 1].
    """

    clip_score_mean: float | None = None
    clip_delta_mean: float | None = None
    clip_delta_worst: float | None = None
    retrieval_precision: float | None = None
    retrieval_drop: float | None = None
    lpips_mean: float | None = None
    flip_mean: float | None = None
    ssim_mean: float | None = None
    ssim_worst: float | None = None
    psnr_mean: float | None = None
    psnr_worst: float | None = None


class Comparison(Metrics):
    """The bundle against the original on `images` prompts.

    `original`: what can be said of the original alone. `intervals`: metric -> 95 % bootstrap interval over the images.
    """

    images: Positive
    original: Metrics = Metrics()
    intervals: dict[Name, tuple[float, float]] = Field(default_factory=dict)


class Quality(Comparison):
    """The comparison on held-out prompts, with the noise floors no difference below which counts.

    `precision`: the unchanged model in bf16 against fp32. `seed`: the unchanged model with another seed. The digests
    are those of the weights that judged, the captions the number that retrieval chose from.
    """

    noise_floor: dict[Literal["precision", "seed"], Metrics]
    out_of_family: Comparison | None = None
    scorer_sha256: Sha256 | None = None
    lpips_sha256: Sha256 | None = None
    retrieval_captions: Count = 0


class Performance(Strict):
    """One image, whole pipeline, on the machine that compiled, after one that is not counted. Medians.

    Memory: peak resident megabytes (1e6 bytes) of the process; by component, what opening and running it adds.
    """

    peak_memory_full_mb: float
    peak_memory_bundle_mb: float
    latency_full_s: float
    latency_bundle_s: float
    load_s: float
    components_memory_mb: dict[str, float] = Field(default_factory=dict)
    components_s: dict[str, float] = Field(default_factory=dict)


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


class GuardRecord(Strict):
    """The manifest's record of a guard.

    `table`: safetensors with float32 `embeddings` of this shape, [calibration prompts, width], each of length 1.
    `input`: the denoiser's input that they are averages of. `policy`: what becomes of a prompt whose distance is above
    `threshold`: it is drawn with a warning, refused, or drawn by the component `denoiser_fallback`.
    """

    policy: GuardPolicy
    table: BundlePath
    shape: tuple[Positive, Positive]
    input: Name
    threshold: Annotated[float, Field(ge=0)]
    false_alarms: Annotated[float, Field(gt=0, lt=1)]


class EngineFiles(Strict):
    """The files of one engine; `weights` where the format keeps them apart."""

    model: BundlePath
    weights: BundlePath | None = None


class Built(Strict):
    """What compiled engines are bound to: this version of their library, GPUs with these compute capabilities, as
    "8.9" (none: all from Ampere on), and at the most so many images in one call.

    `version_compatible`: later versions of the library run them too. `profiles`: by component, the least, the usual and
    the largest size of each dimension that is free in its graph.
    """

    library_version: Name
    version_compatible: bool = False
    compute_capabilities: tuple[Name, ...] = ()
    max_images: Positive
    profiles: dict[ComponentName, dict[Name, tuple[Positive, Positive, Positive]]] = Field(default_factory=dict)


class Addition(Strict):
    """How a target that was added to a published bundle compares with the bundle's target `against`, of which it was
    built: pictures of the same prompts and noise, PSNR in dB on [0, 1], median seconds of one image."""

    against: Name
    images: Positive
    psnr_mean: float
    psnr_worst: float
    latency_s: float
    latency_against_s: float


class Target(Strict):
    """Where the bundle can run, with the evidence for it: none if the machine that built it could not run it.

    `quality` is measured against the original, `addition` against another target, where the original was not at hand.
    `early_exit`: a threshold for early_exit.EarlyExit, of the target, since clean images change by its rounding too.
    """

    engine: Name
    device: Name
    precision: Literal["fp32", "fp16", "bf16", "int8"]
    components: dict[ComponentName, EngineFiles]
    built: Built | None = None
    early_exit: Annotated[float, Field(gt=0)] | None = None
    quality: Quality | None = None
    performance: Performance | None = None
    addition: Addition | None = None

    @property
    def id(self) -> str:
        """For example openvino-cpu-bf16; with the GPUs it was built for, tensorrt-rtx-cuda-fp16-sm86-sm89."""
        bound = architectures(self.built.compute_capabilities) if self.built else ""
        return f"{self.engine}-{self.device}-{self.precision}{bound}"

    @property
    def files(self) -> list[str]:
        """Those that its engines are read from."""
        return [file for engine in self.components.values() for file in (engine.model, engine.weights) if file]


class FamilyRecord(Strict):
    """The prompt family the bundle was made for; counts of prompts."""

    name: Name
    hash: Sha256
    closed: bool
    calibration: Count
    held_out: Count


class HeadMask(Strict):
    """An attention layer of the checkpoint: how many heads it had, and which of them are in the bundle."""

    layer: Name
    heads: Positive
    kept: tuple[Count, ...]


class LowRankLayer(Strict):
    """A factorised layer; `speedup`: its time before / after, alone in the first target's engine."""

    layer: Name
    rank: Positive
    energy_retained: float
    speedup: float | None = None


class Manifest(Strict):
    """See the module's docstring. `reference`: how the original was sampled that quality was measured against (null: as
    `sampling`). `quality` and `performance` repeat those of the first target that was judged.

    `requires` names what a reader has to know to make the right pictures. A newer minor version may add keys that can
    be ignored; those that cannot come with a name here.
    """

    schema_version: str
    requires: tuple[Name, ...] = ()
    slipcast_version: Name
    name: BundleName
    base_model: Name
    source_sha256: Sha256
    family: FamilyRecord | None
    components: dict[ComponentName, Component]
    text: tuple[TextInput, ...]
    prompts: ClosedPrompts | None = None
    guard: GuardRecord | None = None
    image: ImageGeometry
    sampling: Sampling
    reference: Sampling | None = None
    head_retention_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    pruning_strategy: Line | None = None
    head_masks: tuple[HeadMask, ...] = ()
    ffn_retention_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    low_rank_layers: tuple[LowRankLayer, ...] = ()
    not_compiled: tuple[Line, ...] = ()
    cut: Cut | None = None
    caching: Caching | None = None
    targets: Annotated[tuple[Target, ...], Field(min_length=1)]
    quality: Quality | None = None
    performance: Performance | None = None
    files: tuple[FileEntry, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        listed = {entry.path for entry in self.files}
        if pair := colliding([MANIFEST_NAME, *(entry.path for entry in self.files)]):
            raise ValueError(f"files that collide: {pair[0]!r} and {pair[1]!r}")
        for path in self._referenced():
            if path not in listed:
                raise ValueError(f"{path!r} is used but not listed under files")
        if missing := [name for name in self.sampling.requires if name not in self.requires]:
            raise ValueError(f"{missing[0]} has to be named under requires")
        if ("early_exit" in self.requires) != any(target.early_exit for target in self.targets):
            raise ValueError("early_exit has to be named under requires")
        if ("cut" in self.requires) != (self.cut is not None):
            raise ValueError("cut has to be named under requires")
        if ("caching" in self.requires) != (self.caching is not None):
            raise ValueError("caching has to be named under requires")
        if self.caching and len(self.caching.mask) != self.sampling.steps:
            raise ValueError(f"caching.mask is for {len(self.caching.mask)} steps, and sampling has another number")
        if (SHALLOW in self.components) != (self.caching is not None):
            raise ValueError(f"the component {SHALLOW} belongs to caching")
        if ("closed_family" in self.requires) != (self.prompts is not None):
            raise ValueError("closed_family has to be named under requires")
        if self.prompts and self.text:
            raise ValueError("prompts come from a table or through text encoders, not both")
        if self.guard and self.guard.input not in {name for text in self.text for name in text.outputs.values()}:
            raise ValueError(f"guard: no text encoder gives the denoiser {self.guard.input!r}")
        if ("guard" in self.requires) != bool(self.guard and self.guard.policy != "warn"):
            raise ValueError("a guard that does more than to warn has to be named under requires")
        if (FALLBACK in self.components) != bool(self.guard and self.guard.policy == "fallback"):
            raise ValueError(f"the component {FALLBACK} belongs to a guard with the policy fallback")
        if "denoiser" not in self.components:
            raise ValueError("components: no denoiser")
        for target in self.targets:
            if set(target.components) != set(self.components):
                raise ValueError(f"target {target.id}: engines for {sorted(target.components)}")
            _check_formats(target)
        if len({target.id for target in self.targets}) != len(self.targets):
            raise ValueError("two targets with the same engine, device, precision and GPUs")
        default = next((target for target in self.targets if target.quality), self.targets[0])
        if (self.quality, self.performance) != (default.quality, default.performance):
            raise ValueError(f"quality and performance differ from those of the default target {default.id}")
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

    def _referenced(self) -> list[str]:
        paths = self.shared_files
        for target in self.targets:
            paths += target.files
        return paths

    def to_json(self) -> bytes:
        """The bytes of manifest.json."""
        return (json.dumps(self.model_dump(mode="json"), indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


def _check_formats(target: Target) -> None:
    """ValueError where a file is not called what its engine opens."""
    model, weights = FORMATS.get(target.engine, (None, None))
    for files in target.components.values() if model else ():
        wanted = {files.model: model, **({files.weights: weights} if files.weights else {})}
        for path, suffix in wanted.items():
            if suffix is None or not path.endswith(suffix):
                raise ValueError(
                    f"target {target.id}: {path!r} is no file of this engine: {suffix or 'none of weights'}"
                )


def architectures(compute_capabilities: Iterable[str]) -> str:
    """What the names of targets end with that are built for these: "-sm86-sm89" for 8.6 and 8.9."""
    return "".join(f"-sm{capability.replace('.', '')}" for capability in compute_capabilities)


def read_manifest(data: bytes) -> Manifest:
    """Parse and validate manifest.json; ArtifactError for anything that is not exactly right."""
    document = parse_json(data, MANIFEST_NAME)
    if not isinstance(document, dict):
        raise ArtifactError(f"{MANIFEST_NAME}: not an object", got=type(document).__name__)
    newer = _check_version(document.get("schema_version"))
    _check_features(document.get("requires"))
    try:
        return _validate(document)
    except ValidationError as error:
        unknown = [item["loc"] for item in error.errors() if item["type"] in UNKNOWN_KEY]
        if newer and unknown:
            for location in unknown:
                _remove(document, location)
            try:
                return _validate(document)
            except ValidationError as remaining:
                error = remaining
        lines = [f"{dotted(where)}: {what}" for where, what in problems(error, Manifest)]
        raise ArtifactError(
            f"{MANIFEST_NAME} is not valid:\n  " + "\n  ".join(lines[:20]),
            hint="rebuild the bundle with `slipcast compile`; manifests are not edited by hand",
        ) from None


def _validate(document: dict[str, Any]) -> Manifest:
    # Validated as JSON, not as Python objects, so that arrays become tuples also in strict mode.
    return Manifest.model_validate_json(json.dumps(document))


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
        document = document[part]
    del document[location[-1]]
