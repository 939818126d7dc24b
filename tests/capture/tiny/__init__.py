"""Tiny diffusers pipelines with random weights, built from diffusers' classes; and what they are called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from tiny import blocks, edits, frames, transformers, unets

SIDE = 32  # pixels


@dataclass(frozen=True)
class Tiny:
    """A pipeline. `call`: its arguments but for prompt, generator and pictures; `pictures`: arguments that are tensors,
    drawn by the seed, with their shapes; `text`: whether it takes a prompt."""

    make: Callable[[], Any]
    call: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, tuple[int, ...]] = field(default_factory=dict)
    text: bool = True


STEPS: dict[str, Any] = {"num_inference_steps": 3, "output_type": "pt"}
SIZE = STEPS | {"height": SIDE, "width": SIDE}
SHORT = SIZE | {"max_sequence_length": 16}
PART = {"strength": 0.8, "num_inference_steps": 4}  # of the steps, four fifths: three
PICTURE, MASK, EMBEDDING = (1, 3, SIDE, SIDE), (1, 1, SIDE, SIDE), (1, 32)
ORIGINAL = {"image": PICTURE}
MASKED = {"image": PICTURE, "mask_image": MASK}
IMAGES, VIDEOS = {"output": "images"}, {"output": "videos"}
FREE = {"use_resolution_binning": False}

PIPELINES: dict[str, Tiny] = {
    "stable_diffusion": Tiny(unets.stable_diffusion, SIZE),
    "stable_diffusion_img2img": Tiny(unets.stable_diffusion_img2img, STEPS | PART, ORIGINAL),
    "stable_diffusion_inpaint": Tiny(unets.stable_diffusion_inpaint, SIZE, MASKED),
    "perturbed_attention": Tiny(unets.perturbed_attention, SIZE),
    "stable_diffusion_controlnet": Tiny(unets.stable_diffusion_controlnet, SIZE, ORIGINAL),
    "latent_consistency": Tiny(unets.latent_consistency, SIZE),
    "stable_diffusion_xl": Tiny(unets.stable_diffusion_xl, SIZE),
    "stable_diffusion_xl_img2img": Tiny(unets.stable_diffusion_xl_img2img, STEPS | PART, ORIGINAL),
    "stable_diffusion_xl_controlnet": Tiny(unets.stable_diffusion_xl_controlnet, SIZE, ORIGINAL),
    "kolors": Tiny(unets.kolors, SHORT),
    "kandinsky_2_2": Tiny(
        unets.kandinsky_2_2,
        SIZE | {"height": 64, "width": 64},
        {"image_embeds": EMBEDDING, "negative_image_embeds": EMBEDDING},
        text=False,
    ),
    "kandinsky_3": Tiny(unets.kandinsky_3, SIZE),
    "deep_floyd": Tiny(unets.deep_floyd, STEPS | {"clean_caption": False}),
    "ddpm": Tiny(unets.ddpm, STEPS, text=False),
    "ddim": Tiny(unets.ddim_unconditional, STEPS, text=False),
    "class_transformer": Tiny(unets.class_transformer, STEPS | {"class_labels": [5]}, text=False),
    "animate_diff": Tiny(unets.animate_diff, SIZE | {"num_frames": 2}),
    "stable_diffusion_3": Tiny(transformers.stable_diffusion_3, SIZE),
    "stable_diffusion_3_img2img": Tiny(edits.stable_diffusion_3_img2img, SIZE | PART, ORIGINAL),
    "stable_diffusion_3_inpaint": Tiny(edits.stable_diffusion_3_inpaint, SIZE | PART, MASKED),
    "flux": Tiny(transformers.flux, SHORT),
    "flux_img2img": Tiny(edits.flux_img2img, SHORT | PART, ORIGINAL),
    "flux_inpaint": Tiny(edits.flux_inpaint, SHORT | PART, MASKED),
    "flux_kontext": Tiny(edits.flux_kontext, SHORT | {"max_area": SIDE * SIDE, "_auto_resize": False}, ORIGINAL),
    "flux_fill": Tiny(edits.flux_fill, SHORT, MASKED),
    "flux_controlnet": Tiny(edits.flux_controlnet, SHORT, {"control_image": PICTURE}),
    "flux_2_klein": Tiny(transformers.flux_2_klein, SIZE | {"text_encoder_out_layers": (1, 2)}),
    "flux_2_klein_edit": Tiny(
        transformers.flux_2_klein, STEPS | {"text_encoder_out_layers": (1, 2)}, {"image": (1, 3, 64, 80)}
    ),
    "flux_2_dev": Tiny(transformers.flux_2_dev, SIZE | {"text_encoder_out_layers": (1, 2)}),
    "z_image": Tiny(transformers.z_image, SIZE),
    "z_image_guided": Tiny(transformers.z_image, SIZE | {"negative_prompt": "white", "guidance_scale": 3.0}),
    "qwen_image": Tiny(transformers.qwen_image, SIZE | {"negative_prompt": "white", "true_cfg_scale": 4.0}),
    "qwen_image_2_1": Tiny(transformers.qwen_image_2_1, SIZE | {"negative_prompt": "white", "true_cfg_scale": 4.0}),
    "krea_2": Tiny(transformers.krea_2, SHORT),
    "sana": Tiny(transformers.sana, SHORT | FREE),
    "sana_sprint": Tiny(transformers.sana_sprint, SHORT | FREE | {"num_inference_steps": 2}),
    "pixart_alpha": Tiny(transformers.pixart_alpha, SHORT | FREE),
    "pixart_sigma": Tiny(transformers.pixart_sigma, SHORT | FREE),
    "lumina_2": Tiny(transformers.lumina_2, SIZE | {"max_sequence_length": 64}),
    "aura_flow": Tiny(transformers.aura_flow, SHORT),
    "chroma": Tiny(transformers.chroma, SHORT),
    "hunyuan_dit": Tiny(transformers.hunyuan_dit, SIZE | FREE | {"height": 64, "width": 64}),
    "hunyuan_image": Tiny(transformers.hunyuan_image, SIZE),
    "cogview_4": Tiny(transformers.cogview_4, SIZE | {"max_sequence_length": 64}),
    "kandinsky_5": Tiny(transformers.kandinsky_5, SIZE | {"height": 64, "width": 64}),
    "bria": Tiny(transformers.bria, SHORT),
    "ovis_image": Tiny(transformers.ovis_image, SIZE),
    "wan": Tiny(frames.wan, SHORT | {"num_frames": 5}),
    "wan_image": Tiny(frames.wan_image, SHORT | {"num_frames": 5}, ORIGINAL),
    "wan_2_2": Tiny(frames.wan_2_2, SHORT | {"num_frames": 5, "num_inference_steps": 6}),
    "ltx": Tiny(frames.ltx, SHORT | {"num_frames": 9}),
    "cogvideox": Tiny(frames.cogvideox, SHORT | {"height": 16, "width": 16, "num_frames": 8}),
    "kandinsky_5_video": Tiny(frames.kandinsky_5_video, SIZE | {"num_frames": 5}),
    "flux_of_blocks": Tiny(blocks.of_blocks("FluxModularPipeline", transformers.flux), SHORT | IMAGES),
    "flux_img2img_of_blocks": Tiny(
        blocks.of_blocks("FluxModularPipeline", transformers.flux), SHORT | PART | IMAGES, ORIGINAL
    ),
    "flux_kontext_of_blocks": Tiny(
        blocks.of_blocks("FluxKontextModularPipeline", edits.flux_kontext),
        SHORT | IMAGES | {"max_area": SIDE * SIDE, "_auto_resize": False},
        ORIGINAL,
    ),
    "stable_diffusion_xl_of_blocks": Tiny(
        blocks.of_blocks("StableDiffusionXLModularPipeline", unets.stable_diffusion_xl), SIZE | IMAGES
    ),
    "z_image_of_blocks": Tiny(blocks.of_blocks("ZImageModularPipeline", transformers.z_image), SIZE | IMAGES),
    "wan_2_2_of_blocks": Tiny(
        blocks.of_blocks("Wan22ModularPipeline", frames.wan_2_2),
        SHORT | VIDEOS | {"num_frames": 5, "num_inference_steps": 6},
    ),
    "stable_audio": Tiny(frames.stable_audio, STEPS | {"audio_end_in_s": 1.0}),
    "stable_audio_edm": Tiny(frames.stable_audio_edm, STEPS | {"audio_end_in_s": 1.0}),
}
# Those whose shapes, or what they cut, follow the number of a prompt's words: one capture is of one length.
LENGTHS = (
    "wan", "wan_image", "wan_2_2", "kandinsky_3", "kandinsky_5", "kandinsky_5_video", "cogview_4", "qwen_image",
    "qwen_image_2_1", "lumina_2", "z_image", "z_image_guided", "bria", "z_image_of_blocks", "wan_2_2_of_blocks",
)  # fmt: skip


@cache
def open_pipeline(name: str) -> Any:
    torch.manual_seed(0)
    pipe = PIPELINES[name].make()
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_of(name: str, prompt: str, seed: int) -> dict[str, Any]:
    tiny, generator = PIPELINES[name], torch.Generator("cpu").manual_seed(seed)
    pictures = {each: torch.rand(shape, generator=generator) for each, shape in tiny.pictures.items()}
    pictures = {each: (rand * 255).round() / 255 if rand.ndim == 4 else rand for each, rand in pictures.items()}
    if "mask_image" in pictures:
        pictures["mask_image"] = (pictures["mask_image"] > 0.5).float()
    text = {"prompt": prompt} if tiny.text else {}
    return tiny.call | text | pictures | {"generator": generator}
