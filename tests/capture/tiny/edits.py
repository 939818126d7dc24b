"""Tiny pipelines that are given images."""

from __future__ import annotations

from typing import Any

from tiny.transformers import FLUX, flux_parts, stable_diffusion_3_parts


def _of(name: str, parts: dict[str, Any]) -> Any:
    import diffusers

    return getattr(diffusers, name)(**parts)


def stable_diffusion_3_img2img() -> Any:
    return _of("StableDiffusion3Img2ImgPipeline", stable_diffusion_3_parts())


def stable_diffusion_3_inpaint() -> Any:
    return _of("StableDiffusion3InpaintPipeline", stable_diffusion_3_parts(channels=16))


def flux_img2img() -> Any:
    return _of("FluxImg2ImgPipeline", flux_parts())


def flux_inpaint() -> Any:
    return _of("FluxInpaintPipeline", flux_parts())


def flux_kontext() -> Any:
    return _of("FluxKontextPipeline", flux_parts())


def flux_fill() -> Any:
    """Its latent of 16 channels has the masked image's 16 and the mask's 4 times 2 x 2 beside it."""
    return _of("FluxFillPipeline", flux_parts(in_channels=16 + 16 + 16, out_channels=16))


def flux_controlnet() -> Any:
    from diffusers import FluxControlNetModel

    return _of("FluxControlNetPipeline", flux_parts() | {"controlnet": FluxControlNetModel(**FLUX)})
