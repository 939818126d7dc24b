"""Tiny text-to-image pipelines whose denoiser is a transformer."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerFast

from tiny.parts import (
    clip_text,
    clip_tokenizer,
    dc_autoencoder,
    flow,
    flow_autoencoder,
    gemma2_text,
    kl_autoencoder,
    qwen3_text,
    qwen3_vl_text,
    qwen25_vl_text,
    qwen_autoencoder,
    t5_text,
    umt5_text,
    word_tokenizer,
)


def stable_diffusion_3() -> Any:
    from diffusers import StableDiffusion3Pipeline

    return StableDiffusion3Pipeline(**stable_diffusion_3_parts())


def stable_diffusion_3_parts(channels: int = 4) -> dict[str, Any]:
    from diffusers import SD3Transformer2DModel

    return {
        "transformer": SD3Transformer2DModel(
            sample_size=16, patch_size=1, in_channels=channels, num_layers=2, attention_head_dim=8,
            num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=64, pooled_projection_dim=64,
            out_channels=channels,
        ),
        "scheduler": flow(), "vae": flow_autoencoder(channels),
        "text_encoder": clip_text(projection=32), "tokenizer": clip_tokenizer(),
        "text_encoder_2": clip_text(projection=32), "tokenizer_2": clip_tokenizer(),
        "text_encoder_3": t5_text(64), "tokenizer_3": word_tokenizer(),
    }  # fmt: skip


def flux() -> Any:
    from diffusers import FluxPipeline

    return FluxPipeline(**flux_parts())


def flux_parts(**other: Any) -> dict[str, Any]:
    from diffusers import FluxTransformer2DModel

    return {
        "transformer": FluxTransformer2DModel(**FLUX | {"guidance_embeds": True} | other),
        "scheduler": flow(use_dynamic_shifting=True), "vae": flow_autoencoder(),
        "text_encoder": clip_text(), "tokenizer": clip_tokenizer(),
        "text_encoder_2": t5_text(), "tokenizer_2": word_tokenizer(),
    }  # fmt: skip


FLUX: dict[str, Any] = {
    "patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8),
}  # fmt: skip


def _flux_2_parts(text_width: int, **other: Any) -> dict[str, Any]:
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel

    autoencoder = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, sample_size=32,
    )  # fmt: skip
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=text_width, axes_dims_rope=(4, 4, 4, 4), **other,
    )  # fmt: skip
    return {"vae": autoencoder, "transformer": transformer, "scheduler": flow(), "tokenizer": word_tokenizer(512)}


def flux_2_klein() -> Any:
    from diffusers import Flux2KleinPipeline

    return Flux2KleinPipeline(**_flux_2_parts(64, guidance_embeds=False), text_encoder=qwen3_text(whole=True))


def flux_2_dev() -> Any:
    from diffusers import Flux2Pipeline
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Mistral3Config(
        text_config={"model_type": "mistral", "vocab_size": 64, "num_key_value_heads": 2, **sizes},
        vision_config={"model_type": "pixtral", "image_size": 30, "patch_size": 6, **sizes},
    )
    return Flux2Pipeline(**_flux_2_parts(64), text_encoder=Mistral3ForConditionalGeneration(config))


def z_image() -> Any:
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, norm_eps=1e-5, qk_norm=True, cap_feat_dim=32, rope_theta=256.0, t_scale=1000.0,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    return ZImagePipeline(
        transformer=transformer, vae=flow_autoencoder(16), scheduler=flow(), text_encoder=qwen3_text(),
        tokenizer=word_tokenizer(64),
    )  # fmt: skip


def qwen_image() -> Any:
    from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=32, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    return QwenImagePipeline(
        transformer=transformer, vae=qwen_autoencoder(), scheduler=flow(), text_encoder=qwen25_vl_text(),
        tokenizer=word_tokenizer(256),
    )  # fmt: skip


class _Processor(PreTrainedTokenizerFast):  # type: ignore[misc]
    """Of texts and pictures, given texts alone: a chat's ids come as a batch."""

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        return [super().apply_chat_template(*args, **kwargs)]


def qwen_image_2_1() -> Any:
    from diffusers import AutoencoderKLQwenImage21, QwenImage21Pipeline, QwenImage21Transformer2DModel

    transformer = QwenImage21Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, context_in_dim=32,
        axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    autoencoder = AutoencoderKLQwenImage21(
        base_dim=8, decoder_base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 2, 2], num_res_blocks=1,
        latents_mean=[0.1] * 4, latents_std=[0.9] * 4,
    )  # fmt: skip
    processor = word_tokenizer(256, _Processor)
    processor.tokenizer = word_tokenizer(256)
    return QwenImage21Pipeline(
        transformer=transformer, vae=autoencoder, scheduler=flow(), text_encoder=qwen3_vl_text(whole=True),
        processor=processor,
    )  # fmt: skip


def krea_2() -> Any:
    from diffusers import Krea2Pipeline, Krea2Transformer2DModel

    transformer = Krea2Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, timestep_embed_dim=8, text_hidden_dim=32, num_text_layers=3, text_num_attention_heads=2,
        text_num_key_value_heads=1, text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    return Krea2Pipeline(
        transformer=transformer, vae=qwen_autoencoder(), scheduler=flow(use_dynamic_shifting=True),
        text_encoder=qwen3_vl_text(), tokenizer=word_tokenizer(256), text_encoder_select_layers=(0, 1, 2),
    )  # fmt: skip


def _sana_parts(**other: Any) -> dict[str, Any]:
    from diffusers import SanaTransformer2DModel

    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8, sample_size=16,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=32, **other,
    )  # fmt: skip
    text = {"text_encoder": gemma2_text(), "tokenizer": word_tokenizer(300)}
    return {"transformer": transformer, "vae": dc_autoencoder(), **text}


def sana() -> Any:
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline

    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, final_sigmas_type="zero"
    )
    return SanaPipeline(**_sana_parts(), scheduler=scheduler)


def sana_sprint() -> Any:
    from diffusers import SanaSprintPipeline, SCMScheduler

    return SanaSprintPipeline(
        **_sana_parts(qk_norm="rms_norm_across_heads", guidance_embeds=True), scheduler=SCMScheduler()
    )


def _pixart_parts() -> dict[str, Any]:
    from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, in_channels=4,
        caption_channels=32, cross_attention_dim=24, out_channels=8, use_additional_conditions=False,
    )  # fmt: skip
    text = {"text_encoder": t5_text(), "tokenizer": word_tokenizer()}
    return {"transformer": transformer, "vae": kl_autoencoder(), "scheduler": DPMSolverMultistepScheduler(), **text}


def pixart_alpha() -> Any:
    from diffusers import PixArtAlphaPipeline

    return PixArtAlphaPipeline(**_pixart_parts())


def pixart_sigma() -> Any:
    from diffusers import PixArtSigmaPipeline

    return PixArtSigmaPipeline(**_pixart_parts())


def lumina_2() -> Any:
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

    transformer = Lumina2Transformer2DModel(
        sample_size=16, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=1, num_attention_heads=4,
        num_kv_heads=2, multiple_of=16, axes_dim_rope=(4, 2, 2), cap_feat_dim=32,
    )  # fmt: skip
    return Lumina2Pipeline(
        transformer=transformer, vae=flow_autoencoder(), scheduler=flow(), text_encoder=gemma2_text(),
        tokenizer=word_tokenizer(256),
    )  # fmt: skip


def aura_flow() -> Any:
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel

    transformer = AuraFlowTransformer2DModel(
        sample_size=16, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=32, pos_embed_max_size=256,
    )  # fmt: skip
    return AuraFlowPipeline(
        transformer=transformer, vae=kl_autoencoder(), scheduler=flow(), text_encoder=umt5_text(),
        tokenizer=word_tokenizer(),
    )  # fmt: skip


def chroma() -> Any:
    from diffusers import ChromaPipeline, ChromaTransformer2DModel

    transformer = ChromaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 4, 8), approximator_hidden_dim=32, approximator_layers=1,
        approximator_num_channels=16,
    )  # fmt: skip
    return ChromaPipeline(
        transformer=transformer, vae=flow_autoencoder(), scheduler=flow(), text_encoder=t5_text(),
        tokenizer=word_tokenizer(),
    )  # fmt: skip


def bria() -> Any:
    from diffusers import BriaPipeline, BriaTransformer2DModel

    transformer = BriaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=None, axes_dims_rope=[0, 4, 4],
    )  # fmt: skip
    return BriaPipeline(
        transformer=transformer, vae=flow_autoencoder(), scheduler=flow(), text_encoder=t5_text(),
        tokenizer=word_tokenizer(128),
    )  # fmt: skip


def hunyuan_dit() -> Any:
    from diffusers import DDPMScheduler, HunyuanDiT2DModel, HunyuanDiTPipeline
    from transformers import BertConfig, BertModel

    transformer = HunyuanDiT2DModel(
        sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, in_channels=4,
        cross_attention_dim=32, cross_attention_dim_t5=32, pooled_projection_dim=16, hidden_size=24,
    )  # fmt: skip
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    return HunyuanDiTPipeline(
        transformer=transformer, vae=kl_autoencoder(blocks=4), scheduler=DDPMScheduler(), safety_checker=None,
        text_encoder=BertModel(BertConfig(vocab_size=64, **sizes)), tokenizer=word_tokenizer(77),
        text_encoder_2=t5_text(), tokenizer_2=word_tokenizer(256), feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def hunyuan_image() -> Any:
    from diffusers import AutoencoderKLHunyuanImage, HunyuanImagePipeline, HunyuanImageTransformer2DModel

    transformer = HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, text_embed_dim=32, text_embed_2_dim=32, rope_axes_dim=(4, 4), guidance_embeds=True,
    )  # fmt: skip
    autoencoder = AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 64, 64, 64), layers_per_block=1,
        scaling_factor=0.48, spatial_compression_ratio=8, sample_size=128,
    )  # fmt: skip
    return HunyuanImagePipeline(
        transformer=transformer, vae=autoencoder, scheduler=flow(shift=7.0), text_encoder=qwen25_vl_text(),
        text_encoder_2=t5_text(), tokenizer=word_tokenizer(1100), tokenizer_2=word_tokenizer(128),
    )  # fmt: skip


def cogview_4() -> Any:
    from diffusers import CogView4Pipeline, CogView4Transformer2DModel
    from transformers import GlmConfig, GlmModel

    transformer = CogView4Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=4, text_embed_dim=32,
        time_embed_dim=8, condition_dim=4,
    )  # fmt: skip
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = GlmModel(GlmConfig(vocab_size=64, num_key_value_heads=2, head_dim=8, pad_token_id=0, **sizes))
    return CogView4Pipeline(
        transformer=transformer, vae=kl_autoencoder(), text_encoder=text, tokenizer=word_tokenizer(256),
        scheduler=flow(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"),
    )  # fmt: skip


def kandinsky_5() -> Any:
    from diffusers import Kandinsky5T2IPipeline, Kandinsky5Transformer3DModel

    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=32, in_text_dim2=32, time_dim=16, model_dim=16, ff_dim=32,
        num_text_blocks=1, num_visual_blocks=2, axes_dims=(2, 2, 4),
    )  # fmt: skip
    pipe = Kandinsky5T2IPipeline(
        transformer=transformer, vae=flow_autoencoder(), scheduler=flow(shift=7.0), text_encoder=qwen25_vl_text(),
        tokenizer=word_tokenizer(512), text_encoder_2=clip_text(length=77), tokenizer_2=clip_tokenizer(77),
    )  # fmt: skip
    pipe.resolutions = [(64, 64)]
    return pipe


def ovis_image() -> Any:
    from diffusers import OvisImagePipeline, OvisImageTransformer2DModel

    transformer = OvisImageTransformer2DModel(
        in_channels=16, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return OvisImagePipeline(
        transformer=transformer, vae=flow_autoencoder(), scheduler=flow(use_dynamic_shifting=True),
        text_encoder=qwen3_text(), tokenizer=word_tokenizer(512),
    )  # fmt: skip
