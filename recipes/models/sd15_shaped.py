"""A checkpoint with the shapes of Stable Diffusion 1.5 and random weights, to measure speed and memory with.

    python recipes/models/sd15_shaped.py artifacts/models/sd15-shaped

Its pictures are noise. The configs are the published ones (CLIP ViT-L text encoder, U-Net of 860 M parameters,
AutoencoderKL, PNDM); the tokenizer is the reference model's, at 77 tokens: its ids are the first of the text encoder's
49408. Weights are float16 and the same for the same seed; they are written one at a time, so memory stays small.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

Config = dict[str, Any]
TOKENIZER = Path(__file__).parent / "shapes" / "tokenizer"
MODULES = {"text_encoder": "model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}

INDEX: Config = {
    "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.6.0", "feature_extractor": [None, None],
    "safety_checker": [None, None], "requires_safety_checker": False, "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
}  # fmt: skip
SCHEDULER: Config = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "clip_sample": False, "num_train_timesteps": 1000, "set_alpha_to_one": False,
    "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
}  # fmt: skip
SD15: dict[str, Config] = {
    "text_encoder": {
        "architectures": ["CLIPTextModel"], "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 2,
        "hidden_act": "quick_gelu", "hidden_size": 768, "initializer_factor": 1.0, "initializer_range": 0.02,
        "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 77,
        "model_type": "clip_text_model", "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1,
        "projection_dim": 768, "vocab_size": 49408,
    },
    "unet": {
        "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu",
        "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False,
        "cross_attention_dim": 768, "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
        "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    },
    "vae": {
        "_class_name": "AutoencoderKL", "_diffusers_version": "0.6.0", "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4, "in_channels": 3,
        "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3, "sample_size": 512,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
}  # fmt: skip


def write_checkpoint(out: Path, configs: Mapping[str, Config] = SD15, seed: int = 0) -> None:
    """A diffusers directory at `out`, which must not exist; `configs` by folder, with the keys of SD15."""
    out.mkdir(parents=True)
    _write_json(out / "model_index.json", INDEX)
    _write_json(out / "scheduler" / "scheduler_config.json", SCHEDULER)
    shutil.copytree(TOKENIZER, out / "tokenizer")
    settings = out / "tokenizer" / "tokenizer_config.json"
    length = configs["text_encoder"]["max_position_embeddings"]
    _write_json(settings, json.loads(settings.read_text("utf-8")) | {"model_max_length": length})
    for folder, stem in MODULES.items():
        _write_json(out / folder / "config.json", configs[folder])
        _write_weights(out / folder / f"{stem}.safetensors", _parameters(folder, configs[folder]), seed)


def _parameters(folder: str, config: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes, from the module on the meta device, which holds no numbers."""
    import diffusers
    import transformers

    with torch.device("meta"):
        if folder == "text_encoder":
            module = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
            # Published checkpoints have the prefix, which version 5 of transformers has dropped.
            prefix = (
                "" if any(name.startswith("text_model.") for name, _ in module.named_parameters()) else "text_model."
            )
        else:
            module, prefix = getattr(diffusers, config["_class_name"]).from_config(config), ""
    return {prefix + name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def _write_weights(file: Path, parameters: Mapping[str, tuple[int, ...]], seed: int) -> None:
    """A safetensors file: the size of its header, the header, and the tensors in its order."""
    header, position = dict[str, Any](), 0
    for name, shape in parameters.items():
        end = position + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, shape in parameters.items():
            stream.write(_values(name, shape, seed).astype("<f2").tobytes())


def _values(name: str, shape: tuple[int, ...], seed: int) -> Any:
    """As torch begins: variance 1 / (3 fan-in), so activations stay finite; norms are the identity."""
    if len(shape) < 2:
        return np.full(shape, 0.0 if name.endswith("bias") else 1.0)
    scale = 0.02 if "embedding.weight" in name else (3 * math.prod(shape[1:])) ** -0.5  # CLIP's own for its embeddings
    # A stream for each name: no tensor depends on the order in which they are written.
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return rng.standard_normal(shape, np.float32) * np.float32(scale)


def _write_json(file: Path, content: Config) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2 or Path(sys.argv[1]).exists():
        sys.exit("usage: sd15_shaped.py OUT_DIR, which must not exist yet")
    write_checkpoint(Path(sys.argv[1]))
