"""Tiny pipelines of videos, and of sounds."""

from __future__ import annotations

from typing import Any

from tiny.parts import clip_text, clip_tokenizer, flow, qwen25_vl_text, t5_text, umt5_text, word_tokenizer


def _wan_transformer(in_channels: int = 16, **other: Any) -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=in_channels, out_channels=16,
        text_dim=32, freq_dim=256, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32, **other,
    )  # fmt: skip


def wan(**other: Any) -> Any:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline

    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    scheduler = UniPCMultistepScheduler(flow_shift=3.0, prediction_type="flow_prediction", use_flow_sigmas=True)
    return WanPipeline(
        transformer=_wan_transformer(), vae=vae, scheduler=scheduler, text_encoder=umt5_text(),
        tokenizer=word_tokenizer(), **other,
    )  # fmt: skip


def wan_image() -> Any:
    """Given a picture, which an image encoder reads too, of another size."""
    from diffusers import AutoencoderKLWan, WanImageToVideoPipeline
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=4, projection_dim=4, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        image_size=24, patch_size=4,
    )  # fmt: skip
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    return WanImageToVideoPipeline(
        transformer=_wan_transformer(in_channels=36, image_dim=4), vae=vae, scheduler=flow(),
        tokenizer=word_tokenizer(), text_encoder=umt5_text(), image_encoder=CLIPVisionModel(config),
        image_processor=CLIPImageProcessor(crop_size=24, size={"shortest_edge": 28}),
    )  # fmt: skip


def wan_2_2() -> Any:
    """Two denoisers: one for the noisy steps, one for the others."""
    return wan(transformer_2=_wan_transformer(), boundary_ratio=0.875)


def ltx() -> Any:
    from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel

    transformer = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32,
        num_layers=2, caption_channels=32,
    )  # fmt: skip
    widths, ones, scaled = (8, 8, 8, 8), (1, 1, 1, 1, 1), (True, True, False, False)
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=widths, decoder_block_out_channels=widths, layers_per_block=ones,
        decoder_layers_per_block=ones, spatio_temporal_scaling=scaled, decoder_spatio_temporal_scaling=scaled,
        patch_size=1, patch_size_t=1,
    )  # fmt: skip
    return LTXPipeline(
        transformer=transformer, vae=vae, scheduler=flow(), text_encoder=t5_text(), tokenizer=word_tokenizer(128)
    )


def cogvideox() -> Any:
    """Of another size than its positions are for: its denoiser then makes them in a way that no tracer can follow."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=32,
        num_layers=1, sample_width=4, sample_height=4, sample_frames=9, max_text_seq_length=16,
    )  # fmt: skip
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
    )  # fmt: skip
    return CogVideoXPipeline(
        transformer=transformer, vae=vae, scheduler=CogVideoXDDIMScheduler(), text_encoder=t5_text(),
        tokenizer=word_tokenizer(),
    )  # fmt: skip


def kandinsky_5_video() -> Any:
    """It writes each step's result into a part of its latents."""
    from diffusers import AutoencoderKLHunyuanVideo, Kandinsky5T2VPipeline, Kandinsky5Transformer3DModel

    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=32, in_text_dim2=32, time_dim=16, model_dim=16, ff_dim=32,
        num_text_blocks=1, num_visual_blocks=2, axes_dims=(2, 2, 4), visual_cond=True,
    )  # fmt: skip
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip
    return Kandinsky5T2VPipeline(
        transformer=transformer, vae=vae, scheduler=flow(shift=7.0), text_encoder=qwen25_vl_text(),
        tokenizer=word_tokenizer(512), text_encoder_2=clip_text(length=77), tokenizer_2=clip_tokenizer(77),
    )  # fmt: skip


def stable_audio(scheduler: str = "CosineDPMSolverMultistepScheduler") -> Any:
    import diffusers
    from diffusers import (
        AutoencoderOobleck,
        StableAudioDiTModel,
        StableAudioPipeline,
        StableAudioProjectionModel,
    )

    transformer = StableAudioDiTModel(
        sample_size=4, in_channels=3, num_layers=2, attention_head_dim=4, num_attention_heads=4,
        num_key_value_attention_heads=2, out_channels=3, cross_attention_dim=4, time_proj_dim=8,
        global_states_input_dim=8, cross_attention_input_dim=4,
    )  # fmt: skip
    vae = AutoencoderOobleck(
        encoder_hidden_size=6, downsampling_ratios=[1, 2], decoder_channels=3, decoder_input_channels=3,
        channel_multiples=[2, 4], sampling_rate=4,
    )  # fmt: skip
    projection = StableAudioProjectionModel(text_encoder_dim=32, conditioning_dim=4, min_value=0, max_value=32)
    return StableAudioPipeline(
        transformer=transformer, vae=vae, text_encoder=t5_text(), tokenizer=word_tokenizer(),
        projection_model=projection,
        scheduler=getattr(diffusers, scheduler)(prediction_type="v_prediction", sigma_data=1.0),
    )  # fmt: skip


def stable_audio_edm() -> Any:
    """With a scheduler that draws no noise of its own."""
    return stable_audio("EDMDPMSolverMultistepScheduler")
