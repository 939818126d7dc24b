"""The call that is captured: a pipeline's arguments, checked against its signature."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from slipcast.errors import RecipeError

PROMPT = "a picture of a small thing"
STEPS = 3  # show a loop and its constants
SIDE = 512  # pixels of an image that is asked for, where the call says nothing


def make_call(pipe: Any, given: Mapping[str, Any], prompt: str = PROMPT, seed: int = 0) -> dict[str, Any]:
    """The arguments of pipe(...): those that are `given`, and what a picture takes besides.

    RecipeError for one that the pipeline does not take, or that has to be given.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    known = [name for name, each in parameters.items() if name != "self" and each.kind is not each.VAR_KEYWORD]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise RecipeError(
                f"call.{name}: {type(pipe).__name__} has no such argument",
                expected=", ".join(known),
                got=name,
                hint=f"did you mean {near[0]}?" if near else None,
            )
    usual = {"prompt": prompt, "num_inference_steps": STEPS, "output_type": "pt"}
    call = {name: value for name, value in usual.items() if name in known} | dict(given)
    for name, value in given.items():
        if isinstance(value, str) and is_picture(parameters[name]):
            call[name] = _read_picture(name, Path(value), call)
    for name in known:
        if name not in call and parameters[name].default is inspect.Parameter.empty:
            call[name] = _image(name, parameters[name], call)
    if "generator" in known:
        call["generator"] = torch.Generator("cpu").manual_seed(seed)
    return call


def pictures_from(pipe: Any, given: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What is given, with the files of pictures found from `folder` on."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    return {
        name: str(folder / value)
        if isinstance(value, str) and name in parameters and is_picture(parameters[name])
        else value
        for name, value in given.items()
    }


def is_picture(parameter: inspect.Parameter) -> bool:
    """Whether an argument of a pipeline is a picture, by its name or its type."""
    return "image" in parameter.name.lower() or "image" in str(parameter.annotation).lower()


def _read_picture(name: str, file: Path, call: Mapping[str, Any]) -> torch.Tensor:
    """float32 [1, 3, height, width] in [0, 1], of a mask [1, 1, height, width]; of the size of the call, if it has one.

    RecipeError for what is no picture.
    """
    try:
        with Image.open(file) as opened:
            picture = opened.convert("L" if "mask" in name else "RGB")
    except OSError as error:
        raise RecipeError(f"call.{name}: cannot be read", expected="the file of a picture", got=str(error)) from None
    size = call.get("width", picture.width), call.get("height", picture.height)
    array = np.asarray(picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS))
    return torch.from_numpy(array.reshape(1, size[1], size[0], -1).transpose(0, 3, 1, 2).astype(np.float32) / 255)


def _image(name: str, parameter: inspect.Parameter, call: Mapping[str, Any]) -> torch.Tensor:
    """A grey picture for an argument that is one, float32 [1, 3, height, width] in [0, 1]."""
    if not is_picture(parameter):
        raise RecipeError(
            f"call.{name} has to be given",
            expected=f"{name} = VALUE under [call], or --set {name}=VALUE of `slipcast capture`",
            got="nothing",
        )
    return torch.full((1, 3, call.get("height", SIDE), call.get("width", SIDE)), 0.5)
