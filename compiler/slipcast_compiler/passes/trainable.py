"""What training adds to a denoiser's layers while it lasts: low-rank changes of weights, and rounding to 8 bits."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from slipcast_compiler.model.layers import linear_layers

LORA_RANK = 16


class LowRankChange(nn.Module):  # type: ignore[misc]
    """W + B A, with B = 0 to begin with (LoRA, arXiv 2106.09685)."""

    def __init__(self, weight: torch.Tensor, generator: torch.Generator) -> None:
        super().__init__()
        outputs, inputs = weight.shape[:2]
        rank = min(LORA_RANK, outputs, inputs)
        down = torch.randn(rank, inputs, generator=generator) / inputs**0.5
        self.down = nn.Parameter(down.to(weight))
        self.up = nn.Parameter(weight.new_zeros(outputs, rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + (self.up @ self.down).reshape(weight.shape)


class RoundedWeight(nn.Module):  # type: ignore[misc]
    """To int8 with one scale an output channel, symmetric; gradients pass straight through."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        largest = weight.detach().flatten(1).abs().amax(1)
        scale = largest.clamp_min(torch.finfo(weight.dtype).tiny * 128) / 127
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -127, 127)


def round_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A forward pre-hook: the input to uint8 with one scale and zero point, from its own range."""
    x = args[0]
    low, high = x.detach().amin().clamp_max(0), x.detach().amax().clamp_min(0)
    scale = ((high - low) / 255).clamp_min(torch.finfo(x.dtype).tiny * 256)
    zero = (-low / scale).round().clamp(0, 255).to(torch.int32)
    return (torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255), *args[1:])


def prepare(module: nn.Module, lora: bool, fake_quant: bool, seed: int) -> list[nn.Parameter]:
    """Add to every layer what is asked for; returns the parameters to train."""
    module.requires_grad_(not lora)
    generator = torch.Generator("cpu").manual_seed(seed)
    changes = []
    for layer in linear_layers(module) if lora else ():
        owner = module.get_submodule(layer.name)
        change = LowRankChange(owner.weight, generator)
        changes += [change.up, change.down]
        parametrize.register_parametrization(owner, "weight", change)
    if fake_quant:
        for owner in [each for each in module.modules() if isinstance(each, nn.Linear | nn.Conv2d)]:
            parametrize.register_parametrization(owner, "weight", RoundedWeight())
            owner.register_forward_pre_hook(round_input)
    return changes or list(module.parameters())


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters under the names they had before `prepare`, with low-rank changes merged and nothing rounded."""
    found = {}
    for name, owner in module.named_modules():
        if isinstance(owner, parametrize.ParametrizationList | LowRankChange):
            continue
        for kind, parameter in owner.named_parameters(recurse=False):
            found[f"{name}.{kind}"] = parameter
        if parametrize.is_parametrized(owner, "weight"):
            chain = cast(Any, owner).parametrizations.weight
            value = chain.original
            for change in chain:
                value = change(value) if isinstance(change, LowRankChange) else value
            found[f"{name}.weight"] = value
    return {name: value.detach().cpu().clone() for name, value in found.items()}
