"""A first recipe for a model and a list of prompts."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from slipcast.errors import RecipeError
from slipcast_compiler.model.checkpoint import Checkpoint
from slipcast_compiler.recipe.family import read_prompts

TEMPLATE = """\
# A slipcast recipe; `slipcast compile {file}` makes a bundle of it.
name = {name}

[model]
# A diffusers directory, relative to this file; or a hub id, with `revision`.
path = {model}
{family}
[sampling]
sampler = "{sampler}"
steps = {steps}
guidance_scale = {guidance}
width = {width}
height = {height}
# schedule = "karras"              # default: what the checkpoint's scheduler asks for

[evaluate]
images = 16                        # to judge by
# scorer = "path/to/clip"          # a CLIP directory or hub id; gate.clip_drop needs it
# lpips = "path/to/weights"        # alex.pth of the lpips package and torchvision's alexnet-*.pth
# out_of_family = ["..."]          # prompts to judge apart, without limits

[gate]                             # limits against the original, same prompts and noise
psnr = 30.0                        # dB, on the worst image
# clip_drop = 0.02                 # relative, on average; clip_drop_worst: on the worst image

# The first target is the default one.
[[targets]]
engine = "openvino"
precision = "bf16"

[[targets]]
engine = "onnxruntime"
precision = "fp32"
"""
FAMILY = """
[family]
# One prompt a line; instead: prompts = [...], or templates = [...] with [family.slots].
prompts_file = {prompts}
held_out = 0.2                     # share of the prompts that only the gate may see
"""


def write_recipe(model: Path, prompts: Path | None, output: Path | None) -> Path:
    """Write a recipe, by default NAME.toml here. RecipeError where it exists, or model or prompts are unusable."""
    checkpoint = Checkpoint(model.resolve(), str(model))
    width, height = checkpoint.native_size
    conditional = bool(checkpoint.architecture.text)
    if conditional != (prompts is not None):
        raise RecipeError(
            f"{model} takes {'prompts' if conditional else 'no prompts'}",
            expected="MODEL PROMPTS" if conditional else "MODEL alone",
        )
    stem = model.resolve().name
    if prompts:
        stem += f"-{prompts.stem}"
        try:
            read_prompts(prompts)
        except FileNotFoundError:
            raise RecipeError(f"{prompts}: no such file", expected="a text file, one prompt a line") from None
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.")
    output = output or Path(f"{name}.toml")
    beside = output.resolve().parent
    text = TEMPLATE.format(
        file=output, name=json.dumps(name), model=_quoted(model, beside), width=width, height=height,
        family=FAMILY.format(prompts=_quoted(prompts, beside)) if prompts else "",
        sampler="dpmpp_2m" if conditional else "ddpm", steps=20 if conditional else 100,
        guidance=5.0 if conditional else 1.0,
    )  # fmt: skip
    try:
        with output.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RecipeError(f"{output} exists already", hint="give another name with -o") from None
    except OSError as error:
        raise RecipeError(f"{output}: cannot be written", got=error.strerror) from None
    return output


def _quoted(path: Path, beside: Path) -> str:
    """As TOML text, relative to the recipe's directory."""
    return json.dumps(Path(os.path.relpath(path.resolve(), beside)).as_posix(), ensure_ascii=False)
