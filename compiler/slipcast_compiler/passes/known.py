"""What passes can do to the denoisers of a captured pipeline, told before anything takes time: no weight is read."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from torch import nn

from slipcast.errors import RecipeError
from slipcast_compiler.capture.given import Given, call_for_shapes
from slipcast_compiler.model.layers import Layers
from slipcast_compiler.model.original import Prompts
from slipcast_compiler.passes.trial import tried_layers
from slipcast_compiler.passes.units import select
from slipcast_compiler.profile.profile import MIN_SAMPLES, count_samples
from slipcast_compiler.recipe.passes import PassesTable

UNITS = {"prune_heads": "heads", "prune_ffn": "neurons"}
Known = Mapping[str, Layers]  # by denoiser


def known_layers(module: nn.Module, given: Given) -> Layers:
    """What passes can rewrite in a module that is called so: what its structure says, without layers that the call
    leaves out, and without those of which no unit can be removed."""
    hollow = copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()}).to("meta")
    called = set[str]()
    with contextlib.ExitStack() as hooks:
        for name, each in hollow.named_modules():
            hooks.callback(each.register_forward_pre_hook(lambda *_, name=name: called.add(name)).remove)
        call_for_shapes(hollow, given)
    found = tried_layers(hollow, lambda smaller: call_for_shapes(smaller, given))
    attention, feed_forward = (
        {layer.name: "it is not called" for layer in layers if not {each.linear for each in layer.columns} <= called}
        for layers in (found.attention, found.feed_forward)
    )
    return found.leave(attention, feed_forward)


def check_passes(table: PassesTable, known: Known) -> None:
    """RecipeError for what no pass could do to these denoisers."""
    for name, options in table.chosen():
        if getattr(options, "criterion", None) == "taylor":
            raise RecipeError(
                f"passes.{name}.criterion: taylor asks for the noise that an image is trained with, which a captured "
                "pipeline does not tell",
                expected="another criterion",
                got="taylor",
            )
        units = units_of(name, known)
        if name in UNITS and options.ratio > 0:
            _check_found(name, units, known)
        _check_protect(name, options, units)
    for module in known:
        for name, options in own_passes(table, module, known).chosen():
            if name in UNITS:
                zeros = {layer: np.zeros(count, np.float32) for layer, count in units_of(name, known)[module].items()}
                select(zeros, options.ratio, options.floor, options.protect, f"passes.{name}")


def check_calibration(prompts: Prompts, calls: int) -> None:
    """RecipeError where there are too few images to choose by, or fewer than calls, which draw them in turns."""
    samples = count_samples(prompts)
    if samples < MIN_SAMPLES or len(prompts) < calls:
        raise RecipeError(
            "passes choose by what is measured on calibration prompts, of which there are too few",
            expected=f"at least {MIN_SAMPLES} different ones, and one for each of the calls that are listed",
            got=f"{samples} for {calls} {'call' if calls == 1 else 'calls'}",
            hint='add prompts to the family, or raise profile.prompts; criterion = "magnitude" and correct = false '
            "ask for none",
        )


def describe_passes(table: PassesTable, known: Known) -> dict[str, Any]:
    """By pass, its options, and by denoiser of how many units it chooses; plain JSON."""
    return {
        name: {
            "options": options.model_dump(mode="json"),
            "of": {module: sum(layers.values()) for module, layers in units_of(name, known).items()},
        }
        for name, options in table.chosen()
    }


def own_passes(table: PassesTable, module: str, known: Known) -> PassesTable:
    """The passes for one of the denoisers, without those that find nothing in it; a pattern of `protect` may be for a
    layer of another."""
    changed: dict[str, Any] = {}
    for name, options in table.chosen():
        layers = units_of(name, known)[module]
        own = tuple(each for each in _protected(options) if any(fnmatchcase(layer, each) for layer in layers))
        changed[name] = (
            options.model_copy(update={"protect": own} if hasattr(options, "protect") else {}) if layers else None
        )
    return table.model_copy(update=changed)


def units_of(name: str, known: Known) -> dict[str, dict[str, int]]:
    """By denoiser and layer, how many units a pass may choose of; of linear layers one."""
    kinds: Mapping[str, str] = {"prune_heads": "attention", "prune_ffn": "feed_forward"}
    return {
        module: {layer.name: getattr(layer, "units", 1) for layer in getattr(layers, kinds.get(name, "linear"))}
        for module, layers in known.items()
    }


def _check_found(name: str, units: Mapping[str, Mapping[str, int]], known: Known) -> None:
    if any(units.values()):
        return
    left = [
        f"{module}.{layer}: {why}"
        for module, layers in known.items()
        for layer, why in _left_alone(name, layers).items()
    ]
    raise RecipeError(
        f"passes.{name}: there is no layer whose {UNITS[name]} can be removed in {' or '.join(known)}",
        expected=f"a denoiser with {UNITS[name]} that are independent of one another",
        got="; ".join(left[:3]) + (f"; and {len(left) - 3} more" if len(left) > 3 else "") or "none that is known",
        hint="leave the table out; docs/passes.md says what layers are known",
    )


def _left_alone(name: str, layers: Layers) -> Mapping[str, str]:
    return layers.unknown_attention if name == "prune_heads" else layers.unknown_feed_forward


def _protected(options: Any) -> Sequence[str]:
    """Patterns of layers that a pass is to leave; recovery leaves none."""
    patterns: Sequence[str] = getattr(options, "protect", ())
    return patterns


def _check_protect(name: str, options: Any, units: Mapping[str, Mapping[str, int]]) -> None:
    layers: Sequence[str] = [layer for own in units.values() for layer in own]
    for pattern in _protected(options):
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            raise RecipeError(f"passes.{name}.protect: no layer matches", expected=", ".join(layers), got=pattern)
