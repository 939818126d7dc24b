"""Records that every manifest is made of: files, components, engines, targets."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from slipcast.bundle.names import ComponentName, Count, Name, Positive, Sha256
from slipcast.bundle.quality import Performance, Quality
from slipcast.bundle.validation import BundleName, BundlePath, Line, Strict, colliding

MANIFEST_NAME = "manifest.json"
# Engine -> what its model and weights are called. An engine opens nothing else: no library has to guess a format.
FORMATS: dict[str, tuple[str, str | None]] = {
    "openvino": (".xml", ".bin"),
    "onnxruntime": (".onnx", ".data"),
    "onnxruntime-gpu": (".onnx", ".data"),
    "onnxruntime-tensorrt": (".onnx", ".data"),
    "tensorrt": (".engine", None),
    "tensorrt-rtx": (".engine", None),
}


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
    precision: Literal["fp32", "fp16", "bf16", "int8", "int4"]
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


GuardPolicy = Literal["warn", "refuse", "fallback"]


class BaseGuard(Strict):
    """What tells prompts out of the family. `table`: safetensors with float32 `embeddings` of this shape, [calibration
    prompts, width], each of length 1. `policy`: what becomes of a prompt whose distance is above `threshold`: it is
    drawn with a warning, or refused."""

    policy: GuardPolicy
    table: BundlePath
    shape: tuple[Positive, Positive]
    threshold: Annotated[float, Field(ge=0)]
    false_alarms: Annotated[float, Field(gt=0, lt=1)]


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


class BaseManifest(Strict):
    """What every bundle's manifest has, whatever it draws with: see Manifest."""

    schema_version: str
    requires: tuple[Name, ...] = ()
    slipcast_version: Name
    name: BundleName
    base_model: Name
    source_sha256: Sha256
    family: FamilyRecord | None
    components: dict[ComponentName, Component]
    head_retention_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    pruning_strategy: Line | None = None
    head_masks: tuple[HeadMask, ...] = ()
    ffn_retention_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    low_rank_layers: tuple[LowRankLayer, ...] = ()
    not_compiled: tuple[Line, ...] = ()
    targets: Annotated[tuple[Target, ...], Field(min_length=1)]
    quality: Quality | None = None
    performance: Performance | None = None
    unjudged: bool = False
    files: tuple[FileEntry, ...]

    @model_validator(mode="after")
    def _files_and_targets_fit(self) -> Self:
        listed = {entry.path for entry in self.files}
        if pair := colliding([MANIFEST_NAME, *(entry.path for entry in self.files)]):
            raise ValueError(f"files that collide: {pair[0]!r} and {pair[1]!r}")
        for path in [*self.shared_files, *(file for target in self.targets for file in target.files)]:
            if path not in listed:
                raise ValueError(f"{path!r} is used but not listed under files")
        for target in self.targets:
            if set(target.components) != set(self.components):
                raise ValueError(f"target {target.id}: engines for {sorted(target.components)}")
            _check_formats(target)
        if len({target.id for target in self.targets}) != len(self.targets):
            raise ValueError("two targets with the same engine, device, precision and GPUs")
        default = next((target for target in self.targets if target.quality), self.targets[0])
        if self.unjudged and default.quality:
            raise ValueError(f"unjudged, and target {default.id} has a quality")
        if (self.quality, self.performance) != (default.quality, default.performance):
            raise ValueError(f"quality and performance differ from those of the default target {default.id}")
        return self

    @property
    def shared_files(self) -> list[str]:
        """What is read whatever the target: tokenizers and tables."""
        return []

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
