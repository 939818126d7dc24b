"""A first recipe for a model and a list of prompts."""

from __future__ import annotations

import inspect
import json
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slipcast.errors import RecipeError
from slipcast_compiler.model.architectures import is_known
from slipcast_compiler.model.check import check_configs
from slipcast_compiler.model.checkpoint import Checkpoint
from slipcast_compiler.model.single_file import refuse_file
from slipcast_compiler.model.weight_files import PICKLES
from slipcast_compiler.plan import DEFAULT_GUIDANCE, DEFAULT_SAMPLER, DEFAULT_STEPS, FEW_STEPS
from slipcast_compiler.recipe.family import read_prompts
from slipcast_compiler.recipe.reading import parse_recipe, read_recipe
from slipcast_compiler.recipe.recipe import OWN, Recipe

HEAD = """\
# A slipcast recipe; `slipcast compile {file}` makes a bundle of it.
name = {name}

[model]
# A diffusers directory, relative to this file; or a hub id, with `revision`.
path = {model}
{family}"""
SAMPLING = """
[sampling]
sampler = "{sampler}"
steps = {steps}
guidance_scale = {guidance}
width = {width}
height = {height}
# schedule = "karras"              # default: what the checkpoint's scheduler asks for
"""
CALL = """
[call]
# Arguments of {pipeline}, fixed in the bundle; of a number a list means all of these. Its own defaults:
{arguments}
"""
EVALUATE = """
[evaluate]
images = 16                        # to judge by
"""
JUDGES = """\
# scorer = "path/to/clip"          # a CLIP directory or hub id; gate.clip_drop needs it
# lpips = "path/to/weights"        # alex.pth of the lpips package and torchvision's alexnet-*.pth
# out_of_family = ["..."]          # prompts to judge apart, without limits
"""
GATE = """
[gate]                             # limits against the original, same prompts and noise
psnr = 30.0                        # dB, on the worst image
"""
CLIP_GATE = """\
# clip_drop = 0.02                 # relative, on average; clip_drop_worst: on the worst image
"""
TARGETS = """
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
    name = first_name(model, prompts)
    output = output or Path(f"{name}.toml")
    text = first_recipe(model, prompts, output)
    try:
        with output.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RecipeError(f"{output} exists already", hint="give another name with -o") from None
    except OSError as error:
        raise RecipeError(f"{output}: cannot be written", got=error.strerror) from None
    return output


def first_recipe(model: Path, prompts: Path | None, output: Path) -> str:
    """The text of a recipe at `output`; RecipeError where model or prompts are unusable."""
    if not model.is_dir():
        refuse_file(model)
        raise RecipeError(
            f"{model}: a checkpoint in one file needs configs beside it", expected="a diffusers directory",
            got="a single file",
            hint="write the recipe for a directory of the same kind; then model.path = FILE, model.config = DIRECTORY",
        )  # fmt: skip
    checkpoint = Checkpoint(model.resolve(), str(model))
    captured = not is_known(str(checkpoint.index.get("_class_name")))
    conditional, middle = (_call if captured else _sampling)(checkpoint)
    if conditional != (prompts is not None):
        raise RecipeError(
            f"{model} takes {'prompts' if conditional else 'no prompts'}",
            expected="MODEL PROMPTS" if conditional else "MODEL alone",
        )
    if prompts:
        try:
            read_prompts(prompts)
        except FileNotFoundError:
            raise RecipeError(f"{prompts}: no such file", expected="a text file, one prompt a line") from None
    beside = output.resolve().parent
    family = FAMILY.format(prompts=_quoted(prompts, beside)) if prompts else ""
    name = json.dumps(first_name(model, prompts))
    head = HEAD.format(file=output, name=name, model=_quoted(model, beside), family=family)
    judged = (EVALUATE, GATE) if captured else (EVALUATE, JUDGES, GATE, CLIP_GATE)
    return "".join((head, middle, *judged, TARGETS))


def _sampling(checkpoint: Checkpoint) -> tuple[bool, str]:
    """Of an architecture that is described: whether it takes prompts, and its [sampling]."""
    check_configs(checkpoint)
    width, height = checkpoint.native_size
    sampler, steps, guidance = _first_sampling(checkpoint)
    table = SAMPLING.format(sampler=sampler, steps=steps, guidance=guidance, width=width, height=height)
    return bool(checkpoint.architecture.text), table


def _call(checkpoint: Checkpoint) -> tuple[bool, str]:
    """Of a pipeline that is captured: whether it takes prompts, and its [call], in comments."""
    from slipcast_compiler.capture.blocks import parameters_of
    from slipcast_compiler.capture.open import open_without_weights

    pipe = open_without_weights(checkpoint.root)
    parameters = parameters_of(pipe)
    lines = [f"# {name} = {json.dumps(value)}" for name, value in _defaults(pipe, parameters).items()]
    lines += [f"# {name} = ...  (has to be given)" for name in _missing(parameters)]
    if "negative_prompt" in parameters:
        lines.append('# negative_prompt = "blurry"       # with one here, a run may give another')
    return "prompt" in parameters, CALL.format(pipeline=type(pipe).__name__, arguments="\n".join(lines))


def _defaults(pipe: Any, parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """The arguments that a recipe may give, with their defaults, where these can be said in a word."""
    side, factor = getattr(pipe, "default_sample_size", None), getattr(pipe, "vae_scale_factor", None)
    known = side * factor if isinstance(side, int) and isinstance(factor, int) else None
    sizes = dict.fromkeys(("height", "width"), known)
    given = {name: parameter.default for name, parameter in parameters.items() if name not in OWN}
    given = {name: sizes.get(name) if value is None else value for name, value in given.items()}
    return {
        name: value
        for name, value in given.items()
        if isinstance(value, int | float | str) and not re.fullmatch(r"num_\w+_per_prompt|callback\w*|.*prompt", name)
    }


def _missing(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """Arguments without a default, but for what stands for any others."""
    empty = [
        name for name, each in parameters.items() if each.default is each.empty and each.kind is not each.VAR_KEYWORD
    ]
    return [name for name in empty if name not in OWN]


def is_model(path: Path) -> bool:
    """Whether a path is a checkpoint's, and no recipe's."""
    return path.is_dir() or (path.is_file() and path.suffix.lower() in (".safetensors", ".gguf", *PICKLES))


def read_first_recipe(
    model: Path, prompts: Path | None, bundle: Path | None, overrides: Sequence[str], dry_run: bool
) -> tuple[Recipe, Path]:
    """The first recipe for a model, and its file beside the bundle; a dry run writes none.

    RecipeError where another recipe is there.
    """
    if dry_run:
        here = Path(f"{first_name(model, prompts)}.toml")
        return parse_recipe(first_recipe(model, prompts, here), str(here), overrides), here
    folder = bundle.parent if bundle else Path("artifacts")
    file = folder / f"{bundle.name if bundle else first_name(model, prompts)}.toml"
    text = first_recipe(model, prompts, file)
    folder.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        write_recipe(model, prompts, file)
    elif file.read_text("utf-8") != text:
        raise RecipeError(
            f"{file} exists already, and is another recipe", expected="none, or the one for this model and prompts",
            hint=f"compile it with `slipcast compile {file}`, or give another place with -o",
        )  # fmt: skip
    return read_recipe(file, overrides), file


def _first_sampling(checkpoint: Checkpoint) -> tuple[str, int, float]:
    """Sampler, steps and guidance scale: what a plan takes where a recipe is silent, but for models without text."""
    if not checkpoint.architecture.text:
        return ("ddim", 50, 1.0) if checkpoint.index.get("_class_name") == "DDIMPipeline" else ("ddpm", 100, 1.0)
    if few := checkpoint.few_step_sampler:
        return few, FEW_STEPS, 1.0
    return DEFAULT_SAMPLER, DEFAULT_STEPS, DEFAULT_GUIDANCE


def first_name(model: Path, prompts: Path | None) -> str:
    """A bundle's name of a model's and a list's: ASCII, and of a snapshot from the hub not its commit."""
    folder = model.resolve()
    repository = folder.parent.parent.name
    stem = folder.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        stem = repository.split("--")[-1]
    parts = [_ascii(stem) or "model"]
    if prompts:
        parts.append(_ascii(prompts.stem) or "prompts")
    return "-".join(parts)[:100].rstrip("-.")


def _ascii(text: str) -> str:
    """What a name may hold of a text; letters lose their accents."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-._")


def _quoted(path: Path, beside: Path) -> str:
    """As TOML text, relative to the recipe's directory."""
    return json.dumps(Path(os.path.relpath(path.resolve(), beside)).as_posix(), ensure_ascii=False)
