"""Tiny pipelines whose denoiser is a U-Net, or a transformer without text."""

from __future__ import annotations

from typing import Any

import torch

from tiny.parts import clip_text, clip_tokenizer, ddim, kl_autoencoder, t5_text, unet, vq_autoencoder, word_tokenizer

SIZE_AND_CROP = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "use_linear_projection": True}
PLAIN: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def stable_diffusion(**other: Any) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(**_stable_diffusion_parts() | PLAIN | other)


def _stable_diffusion_parts() -> dict[str, Any]:
    return {
        "vae": kl_autoencoder(),
        "text_encoder": clip_text(),
        "tokenizer": clip_tokenizer(),
        "unet": unet(),
        "scheduler": ddim(),
    }


def perturbed_attention() -> Any:
    """It has other attention processors in its denoiser for the time of a call."""
    from diffusers import StableDiffusionPAGPipeline

    return StableDiffusionPAGPipeline(**_stable_diffusion_parts() | PLAIN)


def stable_diffusion_img2img() -> Any:
    from diffusers import StableDiffusionImg2ImgPipeline

    return StableDiffusionImg2ImgPipeline(**_stable_diffusion_parts() | PLAIN)


def stable_diffusion_inpaint() -> Any:
    from diffusers import StableDiffusionInpaintPipeline

    return StableDiffusionInpaintPipeline(**_stable_diffusion_parts() | PLAIN | {"unet": unet(in_channels=9)})


def stable_diffusion_controlnet() -> Any:
    from diffusers import StableDiffusionControlNetPipeline

    return StableDiffusionControlNetPipeline(**_stable_diffusion_parts() | PLAIN, controlnet=controlnet())


def controlnet(**other: Any) -> Any:
    from diffusers import ControlNetModel

    return ControlNetModel(
        block_out_channels=(8, 16), layers_per_block=1, in_channels=4, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), conditioning_embedding_out_channels=(4, 8),
        **{"cross_attention_dim": 32} | other,
    )  # fmt: skip


def latent_consistency() -> Any:
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler

    scheduler = LCMScheduler(beta_schedule="scaled_linear", original_inference_steps=10)
    parts = _stable_diffusion_parts() | {"unet": unet(time_cond_proj_dim=32), "scheduler": scheduler}
    return LatentConsistencyModelPipeline(**parts | PLAIN)


def _stable_diffusion_xl_parts() -> dict[str, Any]:
    from diffusers import EulerDiscreteScheduler

    return {
        "vae": kl_autoencoder(),
        "text_encoder": clip_text(),
        "text_encoder_2": clip_text(projection=32),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(),
        "scheduler": EulerDiscreteScheduler(steps_offset=1),
        "unet": unet(cross_attention_dim=64, projection_class_embeddings_input_dim=80, **SIZE_AND_CROP),
    }


def stable_diffusion_xl() -> Any:
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline(**_stable_diffusion_xl_parts())


def stable_diffusion_xl_img2img() -> Any:
    from diffusers import StableDiffusionXLImg2ImgPipeline

    return StableDiffusionXLImg2ImgPipeline(**_stable_diffusion_xl_parts())


def stable_diffusion_xl_controlnet() -> Any:
    from diffusers import StableDiffusionXLControlNetPipeline

    control = controlnet(cross_attention_dim=64, projection_class_embeddings_input_dim=80, **SIZE_AND_CROP)
    return StableDiffusionXLControlNetPipeline(**_stable_diffusion_xl_parts(), controlnet=control)


def kolors() -> Any:
    from diffusers import EulerDiscreteScheduler, KolorsPipeline
    from diffusers.pipelines.kolors import ChatGLMModel
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig
    from transformers import PreTrainedTokenizerFast

    class WithPositions(PreTrainedTokenizerFast):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            made = super().__call__(*args, **kwargs)
            made["position_ids"] = (made["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            return made

    text = ChatGLMModel(
        ChatGLMConfig(
            num_layers=2, padded_vocab_size=64, hidden_size=32, ffn_hidden_size=32, kv_channels=8, seq_length=64,
            num_attention_heads=4, multi_query_attention=True, multi_query_group_num=2, add_qkv_bias=True,
            original_rope=True,
        ),
        empty_init=False,
    )  # fmt: skip
    for parameter in text.parameters():  # some are left as they are in memory
        torch.nn.init.normal_(parameter, std=0.2)
    return KolorsPipeline(
        vae=kl_autoencoder(), text_encoder=text, tokenizer=word_tokenizer(16, WithPositions),
        scheduler=EulerDiscreteScheduler(steps_offset=1, timestep_spacing="leading"),
        unet=unet(cross_attention_dim=32, projection_class_embeddings_input_dim=80, **SIZE_AND_CROP),
    )  # fmt: skip


def deep_floyd() -> Any:
    """Of pixels; its scheduler is told the variance by the denoiser."""
    from diffusers import DDPMScheduler, IFPipeline

    denoiser = unet(
        sample_size=16, in_channels=3, out_channels=6, encoder_hid_dim=32, addition_embed_type="text",
        addition_embed_type_num_heads=2, cross_attention_norm="group_norm", resnet_time_scale_shift="scale_shift",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), act_fn="gelu",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", attention_head_dim=8,
    )  # fmt: skip
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=True, prediction_type="epsilon"
    )
    return IFPipeline(
        tokenizer=word_tokenizer(77), text_encoder=t5_text(), unet=denoiser, scheduler=scheduler, watermarker=None,
        **PLAIN,
    )  # fmt: skip


def kandinsky_2_2() -> Any:
    """The decoder alone, which is given an image's embedding."""
    from diffusers import KandinskyV22Pipeline

    denoiser = unet(
        out_channels=8, addition_embed_type="image", encoder_hid_dim=32, encoder_hid_dim_type="image_proj",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", resnet_time_scale_shift="scale_shift",
        block_out_channels=(32, 64), norm_num_groups=32,
    )  # fmt: skip
    return KandinskyV22Pipeline(unet=denoiser, scheduler=ddim(), movq=vq_autoencoder())


def kandinsky_3() -> Any:
    from diffusers import DDPMScheduler, Kandinsky3Pipeline, Kandinsky3UNet

    denoiser = Kandinsky3UNet(
        time_embedding_dim=4, groups=2, attention_head_dim=4, layers_per_block=3, block_out_channels=(32, 64),
        cross_attention_dim=4, encoder_hid_dim=32,
    )  # fmt: skip
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", steps_offset=1)
    return Kandinsky3Pipeline(
        unet=denoiser, scheduler=scheduler, movq=vq_autoencoder(), text_encoder=t5_text(), tokenizer=word_tokenizer()
    )


def unconditional(name: str) -> Any:
    """DDPM's pipeline or DDIM's, of pixels."""
    import diffusers

    denoiser = diffusers.UNet2DModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    scheduler = getattr(diffusers, f"{name}Scheduler")()
    return getattr(diffusers, f"{name}Pipeline")(unet=denoiser, scheduler=scheduler)


def ddpm() -> Any:
    return unconditional("DDPM")


def ddim_unconditional() -> Any:
    return unconditional("DDIM")


def class_transformer() -> Any:
    """Of classes, not of texts."""
    from diffusers import DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        sample_size=16, num_layers=2, patch_size=4, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=8, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero", norm_elementwise_affine=False,
    )  # fmt: skip
    return DiTPipeline(transformer=transformer, vae=kl_autoencoder(), scheduler=ddim())


def animate_diff() -> Any:
    from diffusers import AnimateDiffPipeline, MotionAdapter

    adapter = MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=4
    )
    return AnimateDiffPipeline(**_stable_diffusion_parts(), motion_adapter=adapter)
