"""[[targets]]: where the bundle shall run."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from slipcast.bundle.manifest import FALLBACK, architectures
from slipcast.bundle.validation import Strict
from slipcast.engines import ENGINES
from slipcast.errors import RecipeError
from slipcast_compiler.recipe.passes import QuantizeInt4
from slipcast_compiler.recipe.values import AsTuple

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}  # of one weight
INT4_BYTES = 0.5
USUAL_WIDTH = 1024  # of a linear layer, by which a branch of low rank beside it is estimated
LEAST_LINEAR = 0.1  # of a component's weights: where linear layers have less, INT4 would spoil more than it saves
QUANTIZED = ("int8", "int4")  # some components are, and the others in REST
# Keys of TargetTable -> the engines they are for.
ENGINE_KEYS = {
    "compute_capabilities": ("tensorrt-rtx",), "max_images": ("tensorrt-rtx", "tensorrt"),
    "workspace_mb": ("tensorrt-rtx", "tensorrt"), "weight_streaming": ("tensorrt-rtx", "tensorrt"),
    "hardware_compatibility": ("tensorrt",), "version_compatible": ("tensorrt",), "refit": ("tensorrt",),
}  # fmt: skip
# The components that a target in int8 has in INT8: denoisers, of which a captured program may have several.
IN_INT8 = re.compile(r"denoiser(_\d+)?")
# What a quantised target is in besides: the other components, and what is left of those that are quantised.
REST = {"onnxruntime": "fp32", "openvino": "bf16", "tensorrt-rtx": "fp16", "tensorrt": "fp16"}


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

    # see docs/targets.md
    engine: Literal[tuple(ENGINES)]  # type: ignore[valid-type]
    # what the engine offers of these
    precision: Literal["fp32", "fp16", "bf16", "int8", "int4"] = "fp32"
    compute_capabilities: Annotated[tuple[Literal["7.5", "8.0", "8.6", "8.9", "12.0", "12.1"], ...] | None, AsTuple] = (
        Field(default=None, min_length=1)
    )
    max_images: Annotated[int, Field(ge=1, le=4096)] | None = None
    workspace_mb: Annotated[int, Field(ge=1, le=1 << 24)] | None = None
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
        """The precision of what is in neither fp32 nor quantised, if anything is."""
        precision = REST[self.engine] if self.precision in QUANTIZED else self.precision
        return precision if precision in ("fp16", "bf16") else None  # type: ignore[return-value]

    @property
    def gpu(self) -> bool:
        """Whether it is for one."""
        return ENGINES[self.engine].device != "cpu"

    @property
    def takes_adapters(self) -> bool:
        """Whether its denoisers can have slots."""
        return not self.gpu and self.precision != "int8"

    def bytes_of(self, component: str, weights: int, linear: int, int4: QuantizeInt4 | None) -> int:
        """Of all weights of a component, so many of which are of linear layers, in INT4 by these options; OpenVINO
        keeps fp16 whatever it computes in but fp32."""
        if self.precision not in QUANTIZED:
            return weights * BYTES[self.precision]
        rest = weights * BYTES[REST[self.engine]]
        if self.precision == "int8":
            return weights if IN_INT8.fullmatch(component) else rest
        if not int4 or linear < LEAST_LINEAR * weights or component == FALLBACK:
            return rest
        beside = 1 / int4.group_size + 2 * int4.rank / USUAL_WIDTH  # of each weight: scales, and a branch
        return round(rest - linear * (BYTES[REST[self.engine]] * (1 - beside) - INT4_BYTES))

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


def check_one_image(table: TargetTable) -> None:
    """RecipeError for what engines of a captured pipeline cannot have."""
    if table.max_images:
        raise RecipeError(
            f"target {table.name}: max_images: engines of a captured pipeline take as many images as they are found "
            "to bear, and a run draws as many as it is asked for",
            expected="none",
            got=table.max_images,
        )
