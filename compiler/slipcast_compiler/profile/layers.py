"""What a module's layers do while it is called, whatever calls it: running sums and samples of fixed size."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from slipcast_compiler.model.layers import AttentionLayer, FeedForwardLayer, LinearLayer, layers_of
from slipcast_compiler.model.units import Slice
from slipcast_compiler.profile.streaming import Floats, Inputs, Reservoir

PERCENTILE = 90.0  # a head that matters to one prompt or step in ten is not one to lose
Hook = Callable[[nn.Module, tuple[Any, ...]], None]


class LayerObserver:
    """Measures heads, neurons and the inputs of linear layers (`module`, in place) while `watching()` is entered.

    An evaluation is one call of the module. A sample is a row of what the layer is given in it.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module, self._layers = module, layers_of(module)
        self.inputs = Inputs()
        self.heads = {layer.name: Reservoir(layer.heads) for layer in self._layers.attention}
        self.neurons = {layer.name: Reservoir(layer.neurons) for layer in self._layers.feed_forward}
        self._energies: dict[str, list[torch.Tensor]] = {}  # of heads, in this evaluation: [rows, heads] each

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within it, every evaluation is measured."""
        with contextlib.ExitStack() as hooks:

            def listen(linear: str, hook: Hook) -> None:
                hooks.callback(self._module.get_submodule(linear).register_forward_pre_hook(hook).remove)

            for attention in self._layers.attention:
                for place in attention.columns:
                    listen(place.linear, self._head_hook(attention, place))
            for feed_forward in self._layers.feed_forward:
                for place in feed_forward.columns:
                    listen(place.linear, self._neuron_hook(feed_forward, place))
            for linear in self._layers.linear:
                listen(linear.name, self._input_hook(linear))
            hooks.callback(self._module.register_forward_hook(self._evaluated).remove)
            yield

    def results(self) -> dict[str, Floats]:
        """Tensors of the profile by name."""
        found = dict(self.inputs.results())
        for kind, reservoirs in (("head", self.heads), ("neuron", self.neurons)):
            for name, reservoir in reservoirs.items():
                if reservoir.seen:  # some checkpoints hold layers that are never run
                    found[f"{kind}.activation_energy_percentile/{name}"] = reservoir.percentile(PERCENTILE)
        return found

    def _head_hook(self, layer: AttentionLayer, place: Slice) -> Hook:
        columns = unit_columns(self._module, layer, place).movedim(1, 0)
        gram = columns.mT @ columns  # [heads, d, d]: |W z|^2 = z^T (W^T W) z

        def hook(linear: nn.Module, args: tuple[Any, ...]) -> None:
            z = unit_inputs(linear, args[0], layer, place)  # [rows, tokens, heads, d]
            energy = (torch.einsum("nthd,hde->nthe", z, gram) * z).sum((1, 3))
            self._energies.setdefault(layer.name, []).append(energy)

        return hook

    def _neuron_hook(self, layer: FeedForwardLayer, place: Slice) -> Hook:
        norms = unit_columns(self._module, layer, place)[..., 0].norm(dim=0)

        def hook(linear: nn.Module, args: tuple[Any, ...]) -> None:
            z = unit_inputs(linear, args[0], layer, place)[..., 0]
            self.neurons[layer.name].add((z.norm(dim=1) * norms).numpy())

        return hook

    def _input_hook(self, layer: LinearLayer) -> Hook:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            self.inputs.add(layer, args[0])

        return hook

    def _evaluated(self, module: nn.Module, args: Any, output: Any) -> None:
        self.inputs.end_evaluation()
        for name, energies in self._energies.items():
            # What a head adds to both streams of joint attention is one sample.
            joint = len({len(energy) for energy in energies}) == 1
            for energy in [sum(energies[1:], energies[0])] if joint else energies:
                self.heads[name].add(energy.clamp_min(0).sqrt().numpy())
        self._energies.clear()


def unit_columns(module: nn.Module, layer: AttentionLayer | FeedForwardLayer, place: Slice) -> torch.Tensor:
    """The columns of a linear layer by unit: [out, units, size]."""
    weight = module.get_submodule(place.linear).weight.detach().flatten(1)
    columns: torch.Tensor = weight[:, place.start : place.start + layer.units * place.size]
    return columns.reshape(len(weight), layer.units, place.size)


def unit_inputs(
    linear: nn.Module, x: torch.Tensor, layer: AttentionLayer | FeedForwardLayer, place: Slice
) -> torch.Tensor:
    """What a linear layer is given, [rows, ..., inputs] or [rows, inputs, h, w]: [rows, tokens, units, size]."""
    x = x.movedim(1, -1) if isinstance(linear, nn.Conv2d) else x
    own = x[..., place.start : place.start + layer.units * place.size]
    return own.reshape(len(x), -1, layer.units, place.size)
