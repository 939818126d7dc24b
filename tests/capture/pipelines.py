"""Tiny diffusers pipelines with random weights, built from diffusers' classes; and what they are called with."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

TOKENIZER = Path(__file__).parents[2] / "recipes" / "models" / "shapes" / "tokenizer"
WORDS = (
    "a",
    "an",
    "the",
    "of",
    "on",
    "large",
    "small",
    "red",
    "blue",
    "circle",
    "star",
    "white",
    "black",
    "background",
)


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=32)


def word_tokenizer(length: int = 16) -> Any:
    """In place of T5's and others': a word is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=length, **special)


def clip_text(width: int = 32, projection: int | None = None) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=1024, hidden_size=width, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2,
        max_position_embeddings=32, projection_dim=projection or width, eos_token_id=1, bos_token_id=0,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5_text(width: int = 32) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=64, d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4))


def kl_autoencoder(channels: int = 4, **other: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16), latent_channels=channels, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **other,
    )  # fmt: skip


def unet(**other: Any) -> Any:
    from diffusers import UNet2DConditionModel

    given = {
        "block_out_channels": (8, 16), "layers_per_block": 1, "sample_size": 16, "in_channels": 4, "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 32,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "norm_num_groups": 4, "attention_head_dim": 4,
    }  # fmt: skip
    return UNet2DConditionModel(**given | other)


def stable_diffusion() -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    scheduler = DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1, clip_sample=False, set_alpha_to_one=False)
    return StableDiffusionPipeline(
        vae=kl_autoencoder(), text_encoder=clip_text(), tokenizer=clip_tokenizer(), unet=unet(), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    return StableDiffusionXLPipeline(
        vae=kl_autoencoder(), text_encoder=clip_text(), text_encoder_2=clip_text(projection=32),
        tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer(), scheduler=EulerDiscreteScheduler(steps_offset=1),
        unet=unet(
            cross_attention_dim=64, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=80, use_linear_projection=True,
        ),
    )  # fmt: skip


def stable_diffusion_3() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=64, pooled_projection_dim=64, out_channels=4,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=kl_autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06),
        text_encoder=clip_text(projection=32), tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text(projection=32), tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_text(64), tokenizer_3=word_tokenizer(),
    )  # fmt: skip


def flux() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )  # fmt: skip
    return FluxPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=kl_autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06),
        text_encoder=clip_text(), tokenizer=clip_tokenizer(), text_encoder_2=t5_text(), tokenizer_2=word_tokenizer(),
    )  # fmt: skip


def pixart_sigma() -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, in_channels=4,
        caption_channels=32, cross_attention_dim=24, out_channels=8, use_additional_conditions=False,
    )  # fmt: skip
    return PixArtSigmaPipeline(
        transformer=transformer, vae=kl_autoencoder(), scheduler=DPMSolverMultistepScheduler(),
        text_encoder=t5_text(), tokenizer=word_tokenizer(),
    )  # fmt: skip


def wan() -> Any:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=32, freq_dim=256, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    text = UMT5EncoderModel(UMT5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4))
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    scheduler = UniPCMultistepScheduler(flow_shift=3.0, prediction_type="flow_prediction", use_flow_sigmas=True)
    return WanPipeline(
        transformer=transformer, vae=vae, scheduler=scheduler, text_encoder=text, tokenizer=word_tokenizer()
    )


def z_image() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, norm_eps=1e-5, qk_norm=True, cap_feat_dim=16, rope_theta=256.0, t_scale=1000.0,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    text = Qwen3Model(
        Qwen3Config(
            hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            vocab_size=64, head_dim=8,
        )
    )  # fmt: skip
    tokenizer = word_tokenizer(64)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return ZImagePipeline(
        transformer=transformer, vae=kl_autoencoder(16, use_quant_conv=False, use_post_quant_conv=False,
        shift_factor=0.1), scheduler=FlowMatchEulerDiscreteScheduler(), text_encoder=text, tokenizer=tokenizer,
    )  # fmt: skip


IMAGE = {"num_inference_steps": 3, "height": 32, "width": 32, "output_type": "pt"}
# name -> the pipeline, and its call besides prompt and generator
PIPELINES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "stable_diffusion": (stable_diffusion, IMAGE),
    "stable_diffusion_xl": (stable_diffusion_xl, IMAGE),
    "stable_diffusion_3": (stable_diffusion_3, IMAGE),
    "flux": (flux, IMAGE | {"max_sequence_length": 16}),
    "pixart_sigma": (pixart_sigma, IMAGE | {"max_sequence_length": 16, "use_resolution_binning": False}),
    "z_image": (z_image, IMAGE),
    "wan": (wan, IMAGE | {"num_frames": 5, "max_sequence_length": 16}),
}


@cache
def open_pipeline(name: str) -> Any:
    torch.manual_seed(0)
    pipe = PIPELINES[name][0]()
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_of(name: str, prompt: str, seed: int) -> dict[str, Any]:
    return {"prompt": prompt, "generator": torch.Generator("cpu").manual_seed(seed), **PIPELINES[name][1]}
