"""A tiny checkpoint with random weights, and what is done to its files: the layouts that people have."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SHAPES = Path("recipes/models/shapes").resolve()
UNET, VAE, TEXT = "unet", "vae", "text_encoder"
STEM = {UNET: "diffusion_pytorch_model", VAE: "diffusion_pytorch_model", TEXT: "model"}
UNET_CONFIG: dict[str, Any] = {
    "sample_size": 16, "layers_per_block": 1, "block_out_channels": (32, 64), "norm_num_groups": 8,
    "cross_attention_dim": 32, "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip


def make_tiny(folder: Path, **unet: Any) -> Path:
    """A StableDiffusionPipeline of some 300,000 parameters, 32 pixels."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(SHAPES / "tokenizer")
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2,
            vocab_size=len(tokenizer), max_position_embeddings=32, bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 32), norm_num_groups=8, latent_channels=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(
        vae, text, tokenizer, diffusers.UNet2DConditionModel(**{**UNET_CONFIG, **unet}), scheduler, None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


def edit(folder: Path, file: str, drop: tuple[str, ...] = (), **keys: Any) -> None:
    """Change keys of a JSON file; Infinity is written as Python's json does."""
    path = folder / file
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop} | keys
    path.write_text(json.dumps(config, indent=2))


def rename(folder: Path, component: str, variant: str) -> None:
    """The plain weights become those of a variant."""
    plain = folder / component / f"{STEM[component]}.safetensors"
    plain.rename(plain.with_name(f"{STEM[component]}.{variant}.safetensors"))


def cast(folder: Path, component: str, dtype: torch.dtype) -> None:
    """The weights in another dtype."""
    file = folder / component / f"{STEM[component]}.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def add_other(folder: Path, component: str, variant: str) -> None:
    """Other weights beside the plain ones."""
    file = folder / component / f"{STEM[component]}.safetensors"
    changed = {name: tensor * 0.5 for name, tensor in load_file(file).items()}
    save_file(changed, file.with_name(f"{STEM[component]}.{variant}.safetensors"), metadata={"format": "pt"})


def shard(folder: Path, component: str, variant: str = "", keep: bool = False) -> None:
    """Two shards and their index in place of the whole file, or, to keep it, beside it and with other weights."""
    stem, dot = STEM[component], f".{variant}" if variant else ""
    file = folder / component / f"{stem}.safetensors"
    tensors = load_file(file)
    names = sorted(tensors)
    halves = {1: names[::2], 2: names[1::2]}
    weight_map = {}
    for number, part in halves.items():
        name = f"{stem}{dot}-0000{number}-of-00002.safetensors"
        scaled = {each: tensors[each] * (0.5 if keep else 1.0) for each in part}
        save_file(scaled, file.with_name(name), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (file.parent / f"{stem}.safetensors.index{dot}.json").write_text(json.dumps(index))
    if not keep:
        file.unlink()


def as_links(folder: Path) -> None:
    """As a snapshot of the hub: every file a link into a folder of blobs with other names."""
    blobs = folder.with_name(folder.name + "-blobs")
    blobs.mkdir()
    for number, file in enumerate(sorted(file for file in folder.rglob("*") if file.is_file())):
        blob = blobs / f"{number:064x}"
        shutil.move(file, blob)
        file.symlink_to(blob)


def pickle_only(folder: Path, component: str) -> None:
    """Weights that only a pickle holds."""
    file = folder / component / f"{STEM[component]}.safetensors"
    torch.save(load_file(file), file.with_name("pytorch_model.bin"))
    file.unlink()


def with_old_names(folder: Path) -> None:
    """The attention of the autoencoder, and the text encoder's prefix, as they were called years ago."""
    file = folder / VAE / f"{STEM[VAE]}.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in load_file(file).items():
        for now, then in old.items():
            name = name.replace(f".{now}.", f".{then}.")
        renamed[name] = tensor
    save_file(renamed, file, metadata={"format": "pt"})
    file = folder / TEXT / f"{STEM[TEXT]}.safetensors"
    prefixed = {
        name if name.startswith("text_model.") else f"text_model.{name}": tensor
        for name, tensor in load_file(file).items()
    }
    save_file(prefixed, file, metadata={"format": "pt"})


_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_ENDS = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2", "conv_norm_out": "out.0",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
}  # fmt: skip
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _ldm_unet(name: str) -> str:
    """As the training code of latent diffusion has it, for UNET_CONFIG."""
    for now, then in _RESNET.items():
        name = re.sub(rf"(resnets\.\d+)\.{now}\.", rf"\1.{then}.", name)
    for now, then in _ENDS.items():
        if name.startswith(f"{now}."):
            return then + name.removeprefix(now)
    block, _, rest = name.partition(".")
    parts = rest.split(".")
    if block == "mid_block":
        kind, number, *tail = parts
        return ".".join(["middle_block", str(1 if kind == "attentions" else 2 * int(number)), *tail])
    level, kind, number, *tail = parts
    place = 2 * int(level) + int(number)  # one layer and one change of size a level
    if kind == "downsamplers":
        return ".".join(["input_blocks", str(2 * int(level) + 2), "0.op", *tail[1:]])
    if kind == "upsamplers":
        return ".".join(["output_blocks", str(2 * int(level) + 1), "1", *tail])
    first = "input_blocks" if block == "down_blocks" else "output_blocks"
    return ".".join([first, str(place + (block == "down_blocks")), str(int(kind == "attentions")), *tail])


def _ldm_vae(name: str) -> str:
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0.", "mid.attn_1.")
    for now, then in _ATTENTION.items():
        name = name.replace(f"attn_1.{now}.", f"attn_1.{then}.")
    name = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda found: f"up.{1 - int(found[1])}.block.", name)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{1 - int(found[1])}.upsample", name)


def write_single_file(folder: Path, out: Path) -> None:
    """All weights of make_tiny's checkpoint in one file, under the names that such files have."""
    tensors = {}
    for name, tensor in load_file(folder / UNET / f"{STEM[UNET]}.safetensors").items():
        tensors[f"model.diffusion_model.{_ldm_unet(name)}"] = tensor
    for name, tensor in load_file(folder / VAE / f"{STEM[VAE]}.safetensors").items():
        old = _ldm_vae(name)
        linear = "attn_1" in old and old.endswith("weight") and tensor.ndim == 2
        tensors[f"first_stage_model.{old}"] = tensor[:, :, None, None] if linear else tensor
    for name, tensor in load_file(folder / TEXT / f"{STEM[TEXT]}.safetensors").items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out, metadata={"format": "pt"})


def without_weights(folder: Path, out: Path) -> Path:
    """The configs and the tokenizer alone."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors"))
    return out


Change = Callable[[Path], None]


def nan_in(folder: Path, component: str) -> None:
    """One number of one tensor is not one."""
    file = folder / component / f"{STEM[component]}.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] = float(np.nan)
    save_file(tensors, file, metadata={"format": "pt"})
