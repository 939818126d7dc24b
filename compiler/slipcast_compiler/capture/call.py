"""The call that is captured: a pipeline's arguments, checked against its signature."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from slipcast.errors import RecipeError, RequestError
from slipcast.run.pictures import fit_picture, open_array, open_picture
from slipcast_compiler.capture.blocks import OUTPUT, is_of_blocks, is_picture, parameters_of

PROMPT = "a picture of a small thing"
STEPS = 3  # show a loop and its constants
SIDE = 512  # pixels of an image that is asked for, where the call says nothing


Sizes = Mapping[str, tuple[int, int]]  # (width, height), by the names that pictures_of gives


def make_call(pipe: Any, given: Mapping[str, Any], prompt: str = PROMPT, seed: int = 0) -> dict[str, Any]:
    """The arguments of pipe(...): those that are `given`, and what a picture takes besides.

    RecipeError for one that the pipeline does not take, or that has to be given.
    """
    parameters = parameters_of(pipe)
    known = [name for name, each in parameters.items() if each.kind is not each.VAR_KEYWORD]
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
    if is_of_blocks(pipe):
        usual[OUTPUT] = parameters[OUTPUT].default
    call = {name: value for name, value in usual.items() if name in known} | read_pictures(pipe, given)
    for name in known:
        if name not in call and parameters[name].default is inspect.Parameter.empty:
            call[name] = _image(name, parameters[name], call)
    if "generator" in known:
        call["generator"] = torch.Generator("cpu").manual_seed(seed)
    return call


def pictures_from(pipe: Any, given: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What is given, with the files of pictures found from `folder` on."""
    parameters = parameters_of(pipe)

    def found(value: Any) -> Any:
        if isinstance(value, list):
            return [found(each) for each in value]
        return str(folder / value) if isinstance(value, str) else value

    return {
        name: found(value) if name in parameters and is_picture(parameters[name]) else value
        for name, value in given.items()
    }


def read_pictures(pipe: Any, given: Mapping[str, Any], sizes: Sizes = MappingProxyType({})) -> dict[str, Any]:
    """What is given, with tensors in place of files of pictures, and of lists of them.

    `sizes`: of pictures that are neither to be as large as the call nor as they are. RecipeError for what is none.
    """
    parameters, read = parameters_of(pipe), dict(given)
    for name, value in given.items():
        if name not in parameters or not is_picture(parameters[name]):
            continue
        if isinstance(value, str):
            read[name] = _read(name, name, value, given, sizes)
        elif isinstance(value, list) and value and all(isinstance(file, str) for file in value):
            read[name] = [_read(name, f"{name}[{at}]", file, given, sizes) for at, file in enumerate(value)]
    return read


def missing_pictures(pipe: Any, call: Mapping[str, Any]) -> list[str]:
    """The arguments of a pipeline that are pictures, by their type, and that a call has not."""
    parameters = parameters_of(pipe)
    typed = [name for name, each in parameters.items() if "image" in str(each.annotation).lower()]
    return [name for name in typed if call.get(name) is None]


def pictures_of(call: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The pictures and arrays of a call by name, such as image, or, of a list, image[1]."""
    found = dict[str, torch.Tensor]()
    for name, value in call.items():
        several = {f"{name}[{at}]": each for at, each in enumerate(value)} if isinstance(value, list) else {name: value}
        found |= {key: each for key, each in several.items() if isinstance(each, torch.Tensor)}
    return found


def with_other_pictures(call: Mapping[str, Any]) -> dict[str, Any]:
    """The call with pictures that differ in all that a pipeline may read of them: the negatives of its own, upside down
    and from right to left, or noise where that is nearly the same; arrays that are no pictures, the other way round."""

    def other(value: Any) -> Any:
        if isinstance(value, list):
            return [other(each) for each in value]
        if not isinstance(value, torch.Tensor) or not value.ndim:
            return value
        if value.ndim < 3 or not value.is_floating_point() or value.min() < 0 or value.max() > 1:
            return value.flip(-1)
        turned = 1 - value.flip(-1, -2)
        if (turned - value).abs().max() > 0.1:
            return turned
        noise = torch.randint(0, 256, value.shape, generator=torch.Generator().manual_seed(0))
        return (noise / 255).to(value.dtype)

    return {name: other(value) for name, value in call.items()}


def _read(argument: str, name: str, file: str, call: Mapping[str, Any], sizes: Sizes) -> torch.Tensor:
    """A picture, float32 [1, 3, height, width] in [0, 1], of a mask [1, 1, height, width]; or an array of a .npy file.

    RecipeError for what is neither.
    """
    try:
        if file.lower().endswith(".npy"):
            return torch.from_numpy(open_array(Path(file)).astype(np.float32))
        picture = open_picture(Path(file))
        size = sizes.get(name) or (call.get("width") or picture.width, call.get("height") or picture.height)
        fitted = fit_picture(name, picture, "L" if "mask" in argument else "RGB", size)
    except RequestError as error:
        raise RecipeError(f"call.{name}: {error.message}", expected=error.expected, got=error.got) from None
    levels = np.asarray(fitted).reshape(1, size[1], size[0], -1).transpose(0, 3, 1, 2)
    return torch.from_numpy(levels.astype(np.float32) / 255)


def _image(name: str, parameter: inspect.Parameter, call: Mapping[str, Any]) -> torch.Tensor:
    """A grey picture for an argument that is one, float32 [1, 3, height, width] in [0, 1]."""
    if not is_picture(parameter):
        raise RecipeError(
            f"call.{name} has to be given",
            expected=f"{name} = VALUE under [call], or --set {name}=VALUE of `slipcast capture`",
            got="nothing",
        )
    return torch.full((1, 3, call.get("height", SIDE), call.get("width", SIDE)), 128 / 255)
