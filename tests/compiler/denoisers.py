"""Denoisers of every architecture with random weights, exported as a compile would: for tests that need no checkpoint.

Their configs are small, with the structure of the published ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch

from slipcast_compiler.architectures import Architecture, ComponentSource, Input
from slipcast_compiler.export import export_component
from slipcast_compiler.model import Checkpoint

SIZE, TEXT = 8, 6  # the latent's height and width, and the prompt's length in tokens


@dataclass(frozen=True)
class Denoiser:
    """A module's class and config, its inputs beside sample and timestep, and how it is called."""

    kind: str
    config: dict[str, Any]
    conditioning: tuple[Input, ...]
    call: Callable[..., Any]
    sample: tuple[int, ...] = (4, SIZE, SIZE)


@dataclass(frozen=True)
class _Checkpoint(Checkpoint):
    """A checkpoint of one denoiser."""

    entry: Architecture

    @cached_property
    def architecture(self) -> Architecture:
        return self.entry


def export_denoiser(denoiser: Denoiser, folder: Path, seed: int = 0) -> Path:
    """The ONNX file of the denoiser with random weights drawn from `seed`."""
    torch.manual_seed(seed)
    module = getattr(diffusers, denoiser.kind)(**denoiser.config)
    for parameter in module.parameters():  # some start as zero or one, which would hide mistakes
        parameter.data += 0.02 * torch.randn_like(parameter)
    module.save_pretrained(folder / "denoiser")
    (folder / "model_index.json").write_text(json.dumps({"denoiser": ["diffusers", denoiser.kind]}))
    inputs = (
        Input("sample", "float32", ("batch", *denoiser.sample)), Input("timestep", "float32", (1,)),
        *denoiser.conditioning,
    )  # fmt: skip
    source = ComponentSource("denoiser", inputs, ("prediction",), denoiser.call)
    export_component(
        _Checkpoint(folder, denoiser.kind, Architecture({"denoiser": source}, (), {})), "denoiser", {}, folder
    )
    return folder / "denoiser.onnx"


def _text(width: int, *more: Input) -> tuple[Input, ...]:
    return Input("encoder_hidden_states", "float32", ("batch", TEXT, width)), *more


def _sdxl(model: Any, sample: Any, timestep: Any, text: Any, pooled: Any, ids: Any) -> Any:
    added = {"text_embeds": pooled, "time_ids": ids}
    return model(sample, timestep, text, added_cond_kwargs=added, return_dict=False)[0]


def _pixart(model: Any, sample: Any, timestep: Any, text: Any, mask: Any) -> Any:
    added = {"resolution": None, "aspect_ratio": None}
    return model(
        sample, encoder_hidden_states=text, timestep=timestep.expand(sample.shape[0]), encoder_attention_mask=mask,
        added_cond_kwargs=added, return_dict=False,
    )[0]  # fmt: skip


def _sd3(model: Any, sample: Any, timestep: Any, text: Any, pooled: Any) -> Any:
    return model(
        sample, encoder_hidden_states=text, pooled_projections=pooled, timestep=timestep, return_dict=False
    )[0]  # fmt: skip


def _flux(model: Any, sample: Any, timestep: Any, guidance: Any, text: Any, pooled: Any) -> Any:
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()
    return model(
        sample, encoder_hidden_states=text, pooled_projections=pooled, timestep=timestep, guidance=guidance,
        img_ids=places, txt_ids=torch.zeros(TEXT, 3), return_dict=False,
    )[0]  # fmt: skip


_UNET: dict[str, Any] = {
    "sample_size": SIZE, "block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1,
}  # fmt: skip
DENOISERS: dict[str, Denoiser] = {
    "sd15": Denoiser(
        "UNet2DConditionModel",
        {
            **_UNET, "cross_attention_dim": 24, "attention_head_dim": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        _text(24),
        lambda model, sample, timestep, text: model(sample, timestep, text, return_dict=False)[0],
    ),
    "sdxl": Denoiser(
        "UNet2DConditionModel",
        {
            **_UNET, "cross_attention_dim": 24, "attention_head_dim": (2, 4), "use_linear_projection": True,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 12 + 6 * 8, "transformer_layers_per_block": (1, 2),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        },
        _text(24, Input("text_embeds", "float32", ("batch", 12)), Input("time_ids", "float32", ("batch", 6))),
        _sdxl,
    ),
    "pixart": Denoiser(
        "PixArtTransformer2DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "cross_attention_dim": 16,
            "caption_channels": 20, "sample_size": SIZE, "out_channels": 8,
        },
        _text(20, Input("encoder_attention_mask", "float32", ("batch", TEXT))),
        _pixart,
    ),
    "sd3": Denoiser(
        "SD3Transformer2DModel",
        {
            "sample_size": SIZE, "in_channels": 4, "num_layers": 3, "attention_head_dim": 8, "num_attention_heads": 2,
            "joint_attention_dim": 20, "caption_projection_dim": 16, "pooled_projection_dim": 12, "out_channels": 4,
            "pos_embed_max_size": 12, "dual_attention_layers": (0,), "qk_norm": "rms_norm",
        },
        _text(20, Input("pooled_projections", "float32", ("batch", 12))),
        _sd3,
    ),
    "flux": Denoiser(
        "FluxTransformer2DModel",
        {
            "in_channels": 4, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 8,
            "num_attention_heads": 2, "joint_attention_dim": 20, "pooled_projection_dim": 12, "guidance_embeds": True,
            "axes_dims_rope": (2, 2, 4),
        },
        (Input("guidance", "float32", (1,)), *_text(20, Input("pooled_projections", "float32", ("batch", 12)))),
        _flux, (SIZE * SIZE, 4),
    ),
}  # fmt: skip
