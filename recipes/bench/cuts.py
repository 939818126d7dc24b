"""What leaves the sampling loop: parameters and nodes by binding time, for denoisers of the published sizes.

    python recipes/bench/cuts.py -o recipes/bench/cuts/published.json

Graphs are exported as a compile would, from the configs alone: there are no weights, and so no limit of memory. That
what is cut computes the same is shown by tests/compiler/test_parts.py, on small denoisers of the same classes.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from slipcast.bundle.tensorfile import TensorEntry
from slipcast.progress import Advance
from slipcast_compiler.export.component import trace_component
from slipcast_compiler.graph.cut import count_parts, cut
from slipcast_compiler.host.isolate import run_isolated
from slipcast_compiler.model.architectures import Architecture, ComponentSource, Input
from slipcast_compiler.model.checkpoint import Checkpoint, Weight, empty_module

Config = dict[str, Any]


@dataclass(frozen=True)
class Denoiser:
    """A module's class and config, and how it is called; `text` and `pooled` are the widths of what a prompt gives."""

    kind: str
    config: Config
    call: Callable[..., Any]
    text: int
    pooled: int = 0
    more: tuple[Input, ...] = ()
    tokens: int = 77
    sample: tuple[int, ...] = (4, 128, 128)

    @property
    def inputs(self) -> tuple[Input, ...]:
        """In the order in which `call` takes them."""
        pooled = (Input("pooled", "float32", ("batch", self.pooled)),) if self.pooled else ()
        return (
            Input("sample", "float32", ("batch", *self.sample)), Input("timestep", "float32", (1,)),
            Input("encoder_hidden_states", "float32", ("batch", self.tokens, self.text)), *pooled, *self.more,
        )  # fmt: skip


@dataclass(frozen=True)
class OneDenoiser(Checkpoint):
    """A checkpoint of nothing but a denoiser."""

    entry: Architecture = field(kw_only=True)

    @cached_property
    def architecture(self) -> Architecture:
        return self.entry


class Zero(Weight):
    """A tensor of zeros: the exporter reads those of a few numbers, to look for constants that it can fold."""

    def read(self) -> Any:
        return np.zeros(self.entry.shape, np.float32)


class Unwritten(OneDenoiser):
    """A checkpoint whose weights are not there."""

    def weights(self, folder: str) -> dict[str, Weight]:
        """Of the right names and shapes."""
        shapes = {name: tuple(each.shape) for name, each in empty_module(self, folder).named_parameters()}
        return {name: Zero(Path(), TensorEntry(name, "F32", shape, 0, 0)) for name, shape in shapes.items()}


def write_configs(denoiser: Denoiser, folder: Path, kind: type[OneDenoiser] = OneDenoiser) -> OneDenoiser:
    """A checkpoint in `folder` without its weights."""
    (folder / "denoiser").mkdir(exist_ok=True)
    (folder / "denoiser" / "config.json").write_text(json.dumps({"_class_name": denoiser.kind, **denoiser.config}))
    (folder / "model_index.json").write_text(json.dumps({"denoiser": ["diffusers", denoiser.kind]}))
    source = ComponentSource("denoiser", denoiser.inputs, ("prediction",), denoiser.call)
    return kind(folder, denoiser.kind, entry=Architecture({"denoiser": source}, (), {}))


def _sd15(model: Any, sample: Any, timestep: Any, text: Any) -> Any:
    return model(sample, timestep, text, return_dict=False)[0]


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


def _flux(model: Any, sample: Any, timestep: Any, text: Any, pooled: Any, guidance: Any) -> Any:
    side = math.isqrt(sample.shape[1])
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()
    return model(
        sample, encoder_hidden_states=text, pooled_projections=pooled, timestep=timestep, guidance=guidance,
        img_ids=places, txt_ids=torch.zeros(text.shape[1], 3), return_dict=False,
    )[0]  # fmt: skip


def pixart_mask(tokens: int) -> Input:
    """Which tokens are the prompt's."""
    return Input("encoder_attention_mask", "float32", ("batch", tokens))


TIME_IDS = Input("time_ids", "float32", ("batch", 6))
GUIDANCE = Input("guidance", "float32", (1,))
UNET = "UNet2DConditionModel"

# The configs of runwayml/stable-diffusion-v1-5, stabilityai/stable-diffusion-xl-base-1.0,
# PixArt-alpha/PixArt-Sigma-XL-2-1024-MS, stabilityai/stable-diffusion-3-medium and black-forest-labs/FLUX.1-dev, at
# their native sizes.
DENOISERS: dict[str, Denoiser] = {
    "sd15": Denoiser(
        UNET,
        {
            "sample_size": 64, "block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768,
            "attention_head_dim": 8, "layers_per_block": 2,
            "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        },
        _sd15, 768, sample=(4, 64, 64),
    ),
    "sdxl": Denoiser(
        UNET,
        {
            "sample_size": 128, "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20], "layers_per_block": 2, "transformer_layers_per_block": [1, 2, 10],
            "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        },
        _sdxl, 2048, 1280, (TIME_IDS,),
    ),
    "pixart": Denoiser(
        "PixArtTransformer2DModel",
        {
            "sample_size": 128, "num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72,
            "cross_attention_dim": 1152, "caption_channels": 4096, "out_channels": 8, "interpolation_scale": 2,
            "use_additional_conditions": False,
        },
        _pixart, 4096, more=(pixart_mask(300),), tokens=300,
    ),
    "sd3": Denoiser(
        "SD3Transformer2DModel",
        {
            "sample_size": 128, "in_channels": 16, "out_channels": 16, "num_layers": 24, "attention_head_dim": 64,
            "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
        },
        _sd3, 4096, 2048, tokens=333, sample=(16, 128, 128),
    ),
    "flux": Denoiser(
        "FluxTransformer2DModel",
        {
            "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
            "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
            "guidance_embeds": True, "axes_dims_rope": [16, 56, 56],
        },
        _flux, 4096, 768, (GUIDANCE,), tokens=512, sample=(64 * 64, 64),
    ),
}  # fmt: skip


def as_saved(model: ir.Model) -> ir.Model:
    """As if written to a file and read again, with the weights in another file that nobody reads."""
    for name, value in model.graph.initializers.items():
        if isinstance(held := value.const_value, ir.LazyTensor):
            value.const_value = ir.ExternalTensor(
                "absent", 0, held.nbytes, held.dtype, shape=held.shape, name=name, base_dir="."
            )
    return ir.from_proto(ir.to_proto(model))


def cut_denoiser(name: str, _: Advance) -> dict[str, Any]:
    """What `describe` says of one denoiser, with the seconds it took."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_configs(DENOISERS[name], Path(folder), Unwritten)
        model = as_saved(trace_component(checkpoint, "denoiser", {}))
        traced = time.perf_counter() - begin
        found = count_parts(cut(model))
    crossing = sum(each["bytes"] for each in found.pop("crossings") if "denoise" in each["to"])
    return {
        "class": DENOISERS[name].kind, **found, "crossing_bytes": crossing, "export_s": round(traced, 1),
        "stage_s": round(time.perf_counter() - begin - traced, 1),
    }  # fmt: skip


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", choices=DENOISERS, action="append")
    given = parser.parse_args()
    given.output.parent.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in given.only or DENOISERS:
        isolated = run_isolated(cut_denoiser, name)
        found[name] = isolated.result | {"peak_memory_mb": round(isolated.peak_memory_mb)}
        print(name, json.dumps(found[name]), flush=True)
    command = f"python recipes/bench/cuts.py -o {given.output}"
    given.output.write_text(json.dumps({"command": command, "denoisers": found}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
