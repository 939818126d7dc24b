"""What clients send: OpenAI's images API, and our own."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MOST_IMAGES = 16
Text = Annotated[str, Field(max_length=32_000)]
Scalar = Annotated[str, Field(max_length=32_000)] | bool | int | float
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(ge=1, le=MOST_IMAGES)]
Format = Literal["png", "jpeg", "webp"]


def _size(text: str) -> str:
    if text != "auto" and not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", text):
        raise ValueError("a size is WIDTHxHEIGHT, or auto")
    return text


class Generate(BaseModel):
    """Our own form. `arguments`: of the bundle's pipeline besides, as `slipcast inspect` lists them."""

    model_config = ConfigDict(extra="forbid")
    prompt: Text | None = None
    model: Text | None = None
    n: Count = 1
    seed: Seed | None = None
    output_format: Format = "png"
    arguments: Annotated[dict[str, Scalar], Field(max_length=32)] = Field(default_factory=dict)


class ImagesRequest(BaseModel):
    """OpenAI's form, of its /v1/images/generations; `seed`, `negative_prompt`, `num_inference_steps` and
    `guidance_scale` besides, which its clients send as `extra_body`. What would change nothing may be "auto" alone."""

    model_config = ConfigDict(extra="forbid")
    prompt: Text
    model: Text | None = None
    n: Count | None = None
    size: Annotated[str, AfterValidator(_size)] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Format | None = None
    output_compression: Annotated[int, Field(ge=100, le=100)] | None = None
    quality: Literal["auto"] | None = None
    style: Literal["auto"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto"] | None = None
    stream: Literal[False] | None = None
    partial_images: Annotated[int, Field(ge=0, le=0)] | None = None
    user: Text | None = None
    seed: Seed | None = None
    negative_prompt: Text | None = None
    num_inference_steps: Annotated[int, Field(ge=1, le=10_000)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=1000)] | None = None

    def as_generate(self) -> Generate:
        """In our own form."""
        names = ("negative_prompt", "num_inference_steps", "guidance_scale")
        arguments: dict[str, Any] = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.size and self.size != "auto":
            arguments["width"], arguments["height"] = map(int, self.size.split("x"))
        return Generate(
            prompt=self.prompt, model=self.model, n=self.n or 1, seed=self.seed,
            output_format=self.output_format or "png", arguments=arguments,
        )  # fmt: skip
