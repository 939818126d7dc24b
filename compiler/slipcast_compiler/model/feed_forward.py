"""Perceptrons of two layers, gated or not, by shapes; that neurons can be removed is tried on a small copy of each.

Between the layers there may be a convolution of every neuron by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from slipcast_compiler.model.units import FeedForwardLayer, Slice, empty_layer, is_depthwise, matrices, replace_layer

Sizes = dict[str, tuple[int, int]]
WIDTH, NEURONS, REMOVED = 3, 5, 1  # of the copy; the neuron is neither the first nor the last


@dataclass
class FeedForwards:
    """Layers, and why modules of such a form were not taken, by name."""

    layers: dict[str, FeedForwardLayer] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Form:
    """`halves`: of the first linear layer of `ups`, where one layer holds neurons and their gates."""

    ups: tuple[str, ...]
    down: str
    halves: int
    between: tuple[str, ...] = ()

    def rows(self, names: tuple[str, ...], neurons: int) -> tuple[Slice, ...]:
        return tuple(Slice(name, 1, half * neurons) for name in names for half in range(self.halves))


def find_feed_forward(module: nn.Module, attention: Iterable[str]) -> FeedForwards:
    """Those of blocks (what is below an nn.ModuleList) that neither are in `attention` modules nor hold one."""
    found, modules, attention = FeedForwards(), dict(module.named_modules()), tuple(attention)
    below: set[str] = set()
    for name, candidate in modules.items():
        parent = name.rpartition(".")[0]
        if name and (parent in below or isinstance(modules[parent], nn.ModuleList)):
            below.add(name)
        apart = not any(f"{each}.".startswith(f"{name}.") or name.startswith(f"{each}.") for each in attention)
        inside = any(name.startswith(f"{each}.") for each in found.layers)
        if name not in below or not apart or inside or isinstance(candidate, nn.ModuleList):
            continue
        sizes = matrices(candidate)
        if forms := list(_forms(candidate, sizes)):
            why = _why_not(candidate, sizes, forms)
            if isinstance(why, _Form):
                found.layers[name] = _layer(name, why, sizes)
            # What is said of a module is said of what it holds, which has the last word.
            for each in [each for each in found.unknown if name.startswith(f"{each}.")]:
                del found.unknown[each]
            if isinstance(why, str):
                found.unknown[name] = why
    return found


def set_neurons(module: nn.Module, neurons: int) -> None:
    """Tell a block whose neurons share a projection with heads that it has so many left."""
    if type(getattr(module, "mlp_hidden_dim", None)) is int:
        module.mlp_hidden_dim = neurons


def _forms(module: nn.Module, sizes: Sizes) -> Iterable[_Form]:
    """What two or three matrices may be to one another: d -> neurons (and gates) -> d.

    None where it has a convolution that mixes pixels and channels: that is no perceptron.
    """
    convolutions = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.modules.conv._ConvNd)}
    between = tuple(name for name, layer in convolutions.items() if is_depthwise(layer))
    if len(sizes) not in (2, 3) or any(layer.groups == 1 and name not in sizes for name, layer in convolutions.items()):
        return
    for down, (rows, columns) in sizes.items():
        ups = tuple(name for name in sizes if name != down)
        for halves in (1, 2) if len(ups) == 1 else (1,):
            if all(sizes[up] == (halves * columns, rows) for up in ups):
                widths = {name: convolutions[name].out_channels for name in between}
                yield _Form(ups, down, halves, tuple(name for name in between if widths[name] == halves * columns))


def _why_not(module: nn.Module, sizes: Sizes, forms: list[_Form]) -> _Form | str:
    """The form that it has, or why it has none."""
    for name, _ in module.named_parameters():
        if not any(name.startswith(f"{linear}.") for linear in (*sizes, *forms[0].between)):
            return f"{name} is a parameter of unknown use"
    why = ""
    for form in forms:
        try:
            if _neurons_are_apart(module, form):
                return form
            why = "removing a neuron changes the others"
        except Exception as error:  # whatever a module raises that was not made for these sizes
            why = why or f"it does not run by itself at another size ({' '.join(str(error).split())[:80]})"
    return why


def _neurons_are_apart(module: nn.Module, form: _Form) -> bool:
    """Whether a small copy with random weights gives the same without a neuron as with that neuron's column zero."""
    generator = torch.Generator("cpu").manual_seed(0)
    whole = _resized(module, form, NEURONS)
    for parameter in whole.parameters():
        nn.init.normal_(parameter, generator=generator)
    without = _resized(module, form, NEURONS - 1)
    kept = [neuron for neuron in range(NEURONS) if neuron != REMOVED]
    state = whole.state_dict()
    for up in (*form.ups, *form.between):
        places = [half * NEURONS + neuron for half in range(form.halves) for neuron in kept]
        state |= {name: state[name][places] for name in (f"{up}.weight", f"{up}.bias") if name in state}
    without.load_state_dict(state | {f"{form.down}.weight": state[f"{form.down}.weight"][:, kept]})
    x = torch.randn(1, 2, WIDTH, generator=generator)
    if isinstance(module.get_submodule(form.down), nn.Conv2d):
        x = x.mT[..., None]
    with torch.no_grad():
        before = whole(x)
        whole.get_submodule(form.down).weight[:, REMOVED] = 0
        masked, removed = whole(x), without(x)
    return torch.allclose(masked, removed, atol=1e-5) and not torch.allclose(before, masked, atol=1e-3)


def _resized(module: nn.Module, form: _Form, neurons: int) -> Any:
    """A copy of other sizes, of which no hook is told; the original's parameters are not copied."""
    made = copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})
    wide = dict.fromkeys((*form.ups, *form.between), (form.halves * neurons, WIDTH))
    sizes = wide | {form.down: (WIDTH, neurons)}
    for name, shape in sizes.items():
        layer: Any = module.get_submodule(name)
        bias = any(each.endswith("bias") for each, _ in layer.named_parameters())
        replace_layer(made, name, empty_layer(layer, shape, bias).to_empty(device="cpu"))
    for each in made.modules():
        each._forward_hooks.clear()
        each._forward_pre_hooks.clear()
    return made.eval()


def _layer(name: str, form: _Form, sizes: Sizes) -> FeedForwardLayer:
    neurons, prefix = sizes[form.down][1], f"{name}." if name else ""
    rows, between = (
        tuple(Slice(f"{prefix}{each.linear}", 1, each.start) for each in form.rows(names, neurons))
        for names in (form.ups, form.between)
    )
    return FeedForwardLayer(name, neurons, (*rows, *between), (Slice(f"{prefix}{form.down}", 1),), between)
