"""The original: the checkpoint as diffusers runs it, which a bundle is compared with."""

from __future__ import annotations

import importlib
import inspect
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slipcast.manifest import Sampling
from slipcast.progress import Advance
from slipcast_compiler.quiet import quiet

# sampler -> (diffusers scheduler, its settings). A sampler without one has no original to be compared with.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {"variance_type": "fixed_small", "clip_sample": False}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "dpmpp_3m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh2"}),
    "deis": ("DEISMultistepScheduler", {"solver_order": 2}),
    "lcm": ("LCMScheduler", {}),
}
# schedule -> the scheduler settings that choose it.
SCHEDULES: dict[str, dict[str, Any]] = {
    "leading": {"timestep_spacing": "leading"},
    "linspace": {"timestep_spacing": "linspace"},
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "lcm": {},
    "flow": {},
}


def make_images(
    root: Path,
    sampling: Sampling,
    size: tuple[int, int],
    prompts: Sequence[str | None],
    seeds: Sequence[int],
    dtype: str,
    advance: Advance,
) -> dict[str, Any]:
    """One image per prompt and seed, one at a time, in `dtype` (float32 or bfloat16); size is (width, height).

    Returns images (float32 [n, h, w, 3] in [0, 1]), seconds of each, and load_s. The initial noise is drawn in float32
    whatever the dtype, so that pictures of two dtypes can be compared.
    """
    with quiet():
        return _make_images(root, sampling, size, prompts, seeds, dtype, advance)


def _make_images(
    root: Path,
    sampling: Sampling,
    size: tuple[int, int],
    prompts: Sequence[str | None],
    seeds: Sequence[int],
    dtype: str,
    advance: Advance,
) -> dict[str, Any]:
    import torch
    from diffusers import DiffusionPipeline

    begin = time.perf_counter()
    pipe = DiffusionPipeline.from_pretrained(root, torch_dtype=getattr(torch, dtype), local_files_only=True)
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None
    name, settings = SCHEDULERS[sampling.sampler]
    chosen = {**settings, **SCHEDULES.get(sampling.schedule or "", {})}
    scheduler = getattr(importlib.import_module("diffusers"), name)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **chosen)
    pipe.set_progress_bar_config(disable=True)
    load_s = time.perf_counter() - begin
    explicit = {key: list(getattr(sampling, key)) for key in ("timesteps", "sigmas") if getattr(sampling, key)}
    width, height = size
    factor = getattr(pipe, "vae_scale_factor", 1)
    pictures, seconds = [], []
    for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        advance(i, len(prompts))
        generator = torch.Generator("cpu").manual_seed(seed)
        noise = torch.randn((1, pipe.unet.config.in_channels, height // factor, width // factor), generator=generator)
        begin = time.perf_counter()
        if prompt is None:
            picture = _unconditional(pipe, noise.to(pipe.dtype), sampling.steps, generator, explicit)
        else:
            picture = pipe(
                prompt, width=width, height=height, num_inference_steps=sampling.steps, generator=generator,
                latents=noise.to(pipe.dtype), guidance_scale=sampling.guidance_scale,
                guidance_rescale=sampling.guidance_rescale, eta=sampling.eta, output_type="np", **explicit,
            ).images[0]  # fmt: skip
        seconds.append(time.perf_counter() - begin)
        pictures.append(picture.astype(np.float32))
    return {"images": np.stack(pictures), "seconds": seconds, "load_s": load_s}


def _unconditional(pipe: Any, noise: Any, steps: int, generator: Any, explicit: dict[str, Any]) -> Any:
    """What DDPMPipeline does, for any scheduler: its own loop does not scale what the model reads."""
    import torch

    pipe.scheduler.set_timesteps(**(explicit or {"num_inference_steps": steps}))
    x = noise * pipe.scheduler.init_noise_sigma
    takes_generator = "generator" in inspect.signature(pipe.scheduler.step).parameters
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            output = pipe.unet(pipe.scheduler.scale_model_input(x, t), t).sample
            x = pipe.scheduler.step(output, t, x, **({"generator": generator} if takes_generator else {})).prev_sample
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().numpy()[0]
