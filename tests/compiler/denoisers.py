"""Denoisers of every architecture with random weights, exported as a compile would: for tests that need no checkpoint.

They are those of recipes/bench/cuts.py, made small.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch

from slipcast_compiler.export.component import write_component
from slipcast_compiler.model.checkpoint import Checkpoint

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "bench"))
from cuts import DENOISERS as PUBLISHED
from cuts import Denoiser, pixart_mask, write_configs

SHAPES, SHAPES_SIZES = Path("recipes/models/shapes"), {"latent_height": 16, "latent_width": 16}
SIZE, TEXT = 8, 6  # the latent's height and width, and the prompt's length in tokens


def export_denoiser(denoiser: Denoiser, folder: Path, seed: int = 0) -> Path:
    """The ONNX file of the denoiser with random weights drawn from `seed`."""
    torch.manual_seed(seed)
    module = getattr(diffusers, denoiser.kind)(**denoiser.config)
    for parameter in module.parameters():  # some start as zero or one, which would hide mistakes
        parameter.data += 0.02 * torch.randn_like(parameter)
    checkpoint = write_configs(denoiser, folder)
    module.save_pretrained(folder / "denoiser")
    write_component(checkpoint, "denoiser", {}, folder)
    return folder / "denoiser.onnx"


def export_shapes(folder: Path) -> None:
    """Every component of the reference model, for pictures of 64x64."""
    checkpoint = Checkpoint(SHAPES, "shapes")
    for name in checkpoint.architecture.components:
        contract = write_component(checkpoint, name, {**checkpoint.sizes, **SHAPES_SIZES}, folder)
        assert contract.inputs[0].shape[0] == contract.outputs[0].shape[0] == "batch"


def _small(name: str, config: dict[str, Any], **fields: Any) -> Denoiser:
    """With fewer and narrower layers, and the structure of the published one."""
    published = PUBLISHED[name]
    fields = {"tokens": TEXT, "sample": (4, SIZE, SIZE), **fields}
    return replace(published, config=published.config | config, **fields)


_UNET: dict[str, Any] = {
    "sample_size": SIZE, "block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1,
    "cross_attention_dim": 24,
}  # fmt: skip
DENOISERS: dict[str, Denoiser] = {
    "sd15": _small(
        "sd15",
        {
            **_UNET, "attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        text=24,
    ),
    "sdxl": _small(
        "sdxl",
        {
            **_UNET, "attention_head_dim": (2, 4), "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 12 + 6 * 8, "transformer_layers_per_block": (1, 2),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        },
        text=24, pooled=12,
    ),
    "pixart": _small(
        "pixart",
        {
            "sample_size": SIZE, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2,
            "cross_attention_dim": 16, "caption_channels": 20,
        },
        text=20, more=(pixart_mask(TEXT),),
    ),
    "sd3": _small(
        "sd3",
        {
            "sample_size": SIZE, "in_channels": 4, "num_layers": 3, "attention_head_dim": 8, "num_attention_heads": 2,
            "joint_attention_dim": 20, "caption_projection_dim": 16, "pooled_projection_dim": 12, "out_channels": 4,
            "pos_embed_max_size": 12, "dual_attention_layers": (0,), "qk_norm": "rms_norm",
        },
        text=20, pooled=12,
    ),
    "flux": _small(
        "flux",
        {
            "in_channels": 4, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 8,
            "num_attention_heads": 2, "joint_attention_dim": 20, "pooled_projection_dim": 12,
            "axes_dims_rope": (2, 2, 4),
        },
        text=20, pooled=12, sample=(SIZE * SIZE, 4),
    ),
}  # fmt: skip
