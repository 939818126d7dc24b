"""The call that is captured: a pipeline's arguments, checked against its signature."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import torch

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
    for name in known:
        if name not in call and parameters[name].default is inspect.Parameter.empty:
            call[name] = _image(name, parameters[name], call)
    if "generator" in known:
        call["generator"] = torch.Generator("cpu").manual_seed(seed)
    return call


def _image(name: str, parameter: inspect.Parameter, call: Mapping[str, Any]) -> torch.Tensor:
    """A grey picture for an argument that is one, float32 [1, 3, height, width] in [0, 1]."""
    if "image" not in name.lower() and "image" not in str(parameter.annotation).lower():
        raise RecipeError(
            f"call.{name} has to be given",
            expected=f"{name} = VALUE under [call], or --set {name}=VALUE of `slipcast capture`",
            got="nothing",
        )
    return torch.full((1, 3, call.get("height", SIDE), call.get("width", SIDE)), 0.5)
