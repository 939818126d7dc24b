"""Small transformers with random weights, called with random inputs; and what is measured of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from safetensors.torch import save_file

from slipcast_compiler.model.rewrite import UNCHANGED, Denoiser, Rewrite
from slipcast_compiler.profile import importance
from slipcast_compiler.profile.layers import LayerObserver

TOKENS, WORDS = 16, 6


def stable_diffusion_3() -> torch.nn.Module:
    """Two joint blocks, of which the first has an attention of its own besides, and the last drops the text."""
    return _seeded(
        diffusers.SD3Transformer2DModel, sample_size=4, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=24, pooled_projection_dim=16,
        out_channels=4, qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip


def flux() -> torch.nn.Module:
    """One block of two streams, and two of a single one."""
    return _seeded(
        diffusers.FluxTransformer2DModel, patch_size=1, in_channels=4, num_layers=1, num_single_layers=2,
        attention_head_dim=8, num_attention_heads=4, joint_attention_dim=24, pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


def sana() -> torch.nn.Module:
    """Linear attention, and neurons that are convolved one by one."""
    return _seeded(
        diffusers.SanaTransformer2DModel, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=4,
        attention_head_dim=8, sample_size=4, num_cross_attention_heads=4, cross_attention_head_dim=8,
        cross_attention_dim=32, caption_channels=24,
    )  # fmt: skip


JOINT = {"stable_diffusion_3": stable_diffusion_3, "flux": flux}
MODELS = JOINT | {"sana": sana}


def _seeded(kind: Any, **config: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return kind(**config).eval().requires_grad_(False)


def inputs(name: str, seed: int, rows: int = 2, device: str = "cpu") -> dict[str, torch.Tensor]:
    """What the model of that name is called with."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(device)  # noqa: E731
    timestep = torch.rand(rows, generator=generator).to(device)
    found = {"encoder_hidden_states": draw(rows, WORDS, 24)}
    if name == "sana":
        return found | {"hidden_states": draw(rows, 4, 4, 4), "timestep": 1000 * timestep}
    found["pooled_projections"] = draw(rows, 16)
    if name == "stable_diffusion_3":
        return found | {"hidden_states": draw(rows, 4, 4, 4), "timestep": 1000 * timestep}
    places = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (1, 4, 4)), indexing="ij"), -1).reshape(TOKENS, 3)
    ids = {"img_ids": places.float().to(device), "txt_ids": torch.zeros(WORDS, 3, device=device)}
    return found | ids | {"hidden_states": draw(rows, TOKENS, 4), "timestep": timestep}


def predict(module: torch.nn.Module, name: str, seed: int, rows: int = 2) -> torch.Tensor:
    """What it returns for the inputs of a seed."""
    found: torch.Tensor = module(**inputs(name, seed, rows), return_dict=False)[0]
    return found


def denoiser(module: torch.nn.Module, folder: Path, rewrite: Rewrite = UNCHANGED) -> Denoiser:
    """As passes see it."""
    save_file(module.state_dict(), folder / "original.safetensors")
    return Denoiser(copy.deepcopy(module), Rewrite(folder / "original.safetensors").weights(), rewrite)


class Measured:
    """What passes read of a profile, of `STATES` calls with inputs of as many seeds, of one row each."""

    STATES = 6

    def __init__(self, module: torch.nn.Module, name: str) -> None:
        observer = LayerObserver(module)
        with torch.no_grad(), observer.watching():
            for seed in range(self.STATES):
                predict(module, name, seed)
        self._shared = observer.inputs.shared()
        self.found = observer.results() | importance.magnitude(module)

        def states(chosen: Any) -> torch.Tensor:
            return torch.cat([predict(module, name, seed, rows=1) for seed in chosen])

        def loss(seed: int) -> torch.Tensor:
            return states([seed]).square().mean()

        with torch.no_grad():
            self.found |= importance.leave_one_out(module, states, self.STATES, 4, lambda _: None)
        self.found |= importance.taylor(module, loss, self.STATES, lambda _: None)

    def second_moment(self, linear: str) -> np.ndarray[Any, Any]:
        return self.found[f"second_moment/{self._shared.get(linear, linear)}"]

    def heads(self, criterion: str) -> dict[str, np.ndarray[Any, Any]]:
        return self._group(f"head.{criterion}/")

    def neurons(self, criterion: str) -> dict[str, np.ndarray[Any, Any]]:
        return self._group(f"neuron.{criterion}/")

    def _group(self, prefix: str) -> dict[str, np.ndarray[Any, Any]]:
        return {name.removeprefix(prefix): value for name, value in self.found.items() if name.startswith(prefix)}
