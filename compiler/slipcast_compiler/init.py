"""A first recipe for a model and a list of prompts."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from slipcast.errors import RecipeError
from slipcast_compiler.family import read_prompts
from slipcast_compiler.model import Checkpoint

TEMPLATE = """\
# A slipcast recipe; `slipcast compile {file}` makes a bundle of it.
name = {name}

[model]
path = {model}                     # a diffusers directory, relative to this file; or a hub id, with `revision`

[family]
prompts_file = {prompts}           # one prompt a line; or prompts = [...], or templates with [family.slots]
held_out = 0.2                     # share of the prompts that only the gate may see
closed = false                     # true: no prompt but these will ever be asked for

[sampling]
sampler = "dpmpp_2m"
steps = 20
guidance_scale = {guidance}
# schedule = "karras"              # default: the spacing of the checkpoint's scheduler
width = {width}
height = {height}

[evaluate]
images = 16                        # held-out prompts to judge by
# scorer = "path/to/clip"          # a CLIP directory or hub id; gate.clip_drop needs it

[gate]                             # limits against the original, same prompts and noise
psnr = 30.0                        # dB, on the worst image
# clip_drop = 0.02                 # relative, on average

# The first target is the default one.
[[targets]]
engine = "openvino"
precision = "bf16"

[[targets]]
engine = "onnxruntime"
precision = "fp32"
"""


def write_recipe(model: Path, prompts: Path, output: Path | None) -> Path:
    """Write a recipe beside nothing else: RecipeError where the file exists, or model or prompts are unusable."""
    checkpoint = Checkpoint(model.resolve(), str(model))
    width, height = checkpoint.native_size
    try:
        read_prompts(prompts)
    except FileNotFoundError:
        raise RecipeError(f"{prompts}: no such file", expected="a text file, one prompt a line") from None
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{model.resolve().name}-{prompts.stem}").strip("-.")
    output = output or Path(f"{name}.toml")
    if output.exists():
        raise RecipeError(f"{output} exists already", hint="give another name with -o")
    beside = output.resolve().parent
    output.write_text(
        TEMPLATE.format(
            file=output, name=json.dumps(name), model=_quoted(model, beside), prompts=_quoted(prompts, beside),
            guidance=5.0 if checkpoint.architecture.text else 1.0, width=width, height=height,
        ),
        "utf-8",
    )  # fmt: skip
    return output


def _quoted(path: Path, beside: Path) -> str:
    """As TOML text, relative to the recipe's directory."""
    return json.dumps(Path(os.path.relpath(path.resolve(), beside)).as_posix(), ensure_ascii=False)
