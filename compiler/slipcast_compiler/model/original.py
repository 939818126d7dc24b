"""The original: the checkpoint as diffusers runs it, which a bundle is compared with."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slipcast.bundle.manifest import ImageGeometry, Sampling
from slipcast.errors import ArtifactError
from slipcast.progress import Advance
from slipcast.sampling.denoiser import final_scale, initial_scale
from slipcast.sampling.guidance import Evaluate, Guided
from slipcast.sampling.samplers import sample
from slipcast_compiler.host.quiet import quiet
from slipcast_compiler.model.checkpoint import Checkpoint, Tokenizer, library_class

Prompts = tuple[str, ...] | tuple[None, ...]  # None for each image of an unconditional model
Images = tuple[tuple[str | None, int], ...]  # prompt and seed of each

_SPACED = ("leading", "linspace", "trailing")
_ALL = (*_SPACED, "karras", "exponential", "beta")
# sampler -> diffusers' scheduler, its settings, and the schedules with which it gives the pictures of ours. Where
# diffusers ignores a schedule, or steps by T // n instead of to the next timestep, it is not in the list. Two samplers
# are left out: DPMSolverSDEScheduler draws its noise from a Brownian tree, so no seed gives its pictures; and the third
# order of sde-dpmsolver++ has a wrong sign (as of 0.42).
SCHEDULERS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "ddpm": ("DDPMScheduler", {"variance_type": "fixed_small", "clip_sample": False}, _SPACED),
    "ddim": ("DDIMScheduler", {"clip_sample": False}, ("leading",)),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}, ("leading",)),
    "euler": ("EulerDiscreteScheduler", {}, _ALL),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}, _SPACED),
    "heun": ("HeunDiscreteScheduler", {}, _ALL),
    "dpm2": ("KDPM2DiscreteScheduler", {}, _ALL),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}, _ALL),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}, _ALL),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh2"}, _ALL),
    "deis": ("DEISMultistepScheduler", {"solver_order": 2}, _ALL),
    "lcm": ("LCMScheduler", {}, ("lcm",)),
}
_NONE = dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), False)
# schedule -> the scheduler settings that choose it.
SCHEDULES: dict[str, dict[str, Any]] = {
    "leading": {**_NONE, "timestep_spacing": "leading"},
    "linspace": {**_NONE, "timestep_spacing": "linspace"},
    "trailing": {**_NONE, "timestep_spacing": "trailing"},
    "karras": {**_NONE, "use_karras_sigmas": True},
    "exponential": {**_NONE, "use_exponential_sigmas": True},
    "beta": {**_NONE, "use_beta_sigmas": True},
    "lcm": {},
}


@dataclass(frozen=True)
class Original:
    """A checkpoint at the size it is compiled for. `sizes`: the dimensions that are known, by name (see
    Architecture.sizes); `tokenizers`: by folder."""

    checkpoint: Checkpoint
    image: ImageGeometry
    sizes: Mapping[str, int]
    tokenizers: Mapping[str, Tokenizer]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.image.width, self.image.height


@dataclass(frozen=True)
class Drawing:
    """Images of the original: image i is of prompt i (None where it takes none) and of seed i."""

    original: Original
    sampling: Sampling
    prompts: Prompts
    seeds: tuple[int, ...]

    @property
    def inputs(self) -> dict[str, Any]:
        """All that they depend on; plain JSON, for the cache's keys."""
        return {
            "checkpoint": self.original.checkpoint.sha256,
            "sampling": self.sampling.model_dump(mode="json"),
            "size": list(self.original.size),
            "prompts": list(self.prompts),
            "seeds": list(self.seeds),
        }

    @property
    def images(self) -> Images:
        """Prompt and seed of each."""
        return tuple(zip(self.prompts, self.seeds, strict=True))

    @property
    def guided(self) -> bool:
        """Whether an image has two rows in the denoiser's batch."""
        return self.prompts[0] is not None and self.sampling.guidance_scale > 1

    def open(self, dtype: str = "float32") -> Any:
        """The pipeline in diffusers that draws them."""
        return open_pipeline(self.original.checkpoint.root, self.sampling, dtype)


def make_images(drawing: Drawing, dtype: str, warm: bool, advance: Advance) -> dict[str, Any]:
    """All images, one at a time, in `dtype` (float32 or bfloat16).

    Returns images (float32 [n, h, w, 3] in [0, 1]), seconds of each, and load_s. `warm`: so that the first image takes
    no longer than others, another is begun before it. The initial noise is drawn in float32
    whatever the dtype, so that pictures of two dtypes can be compared.
    """
    with quiet():
        begin, sampling, size = time.perf_counter(), drawing.sampling, drawing.original.size
        pipe = drawing.open(dtype)
        load_s = time.perf_counter() - begin
        if warm:
            draw(pipe, _short(sampling), size, drawing.prompts[:1], drawing.seeds[:1])
        pictures, seconds = [], []
        for i, (prompt, seed) in enumerate(zip(drawing.prompts, drawing.seeds, strict=True)):
            advance(i, len(drawing.seeds))
            begin = time.perf_counter()
            pictures.append(draw(pipe, sampling, size, [prompt], [seed])[0])
            seconds.append(time.perf_counter() - begin)
        return {"images": np.stack(pictures), "seconds": seconds, "load_s": load_s}


def _short(sampling: Sampling) -> Sampling:
    """As many steps as warm a pipeline up, all of whose steps are alike; an explicit list has its own length."""
    return sampling.model_copy(update={"steps": min(sampling.steps, 2)}) if sampling.schedule else sampling


def open_pipeline(root: Path, sampling: Sampling, dtype: str) -> Any:
    """The checkpoint's pipeline in diffusers, in `dtype` (float32 or bfloat16), with the scheduler for `sampling`."""
    import torch

    pipe = _load(root, getattr(torch, dtype))
    choose_scheduler(pipe, sampling)
    return pipe


def draw(
    pipe: Any, sampling: Sampling, size: tuple[int, int], prompts: Sequence[str | None], seeds: Sequence[int]
) -> Any:
    """One image per prompt and seed, all in one batch: float32 [n, h, w, c] in [0, 1]; size is (width, height)."""
    import torch

    noise, generators = draw_noise(pipe, size, seeds)
    text = [prompt for prompt in prompts if prompt is not None] or None
    run = _with_diffusers if text is not None and has_scheduler(sampling) else _with_our_sampler
    with torch.no_grad():
        return run(pipe, sampling, text, noise, generators).astype(np.float32)


def draw_noise(pipe: Any, size: tuple[int, int], seeds: Sequence[int]) -> tuple[Any, list[Any]]:
    """Initial noise, float32 [n, c, h, w] in latent cells, and the generators it came from; size in pixels."""
    import torch

    factor = getattr(pipe, "vae_scale_factor", 1)
    shape = (1, pipe.unet.config.in_channels, size[1] // factor, size[0] // factor)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return torch.cat([torch.randn(shape, generator=generator) for generator in generators]), generators


def has_scheduler(sampling: Sampling) -> bool:
    """Whether diffusers has this sampler with this schedule and guidance; tests show that the two then agree."""
    known = sampling.sampler in SCHEDULERS and sampling.schedule in SCHEDULERS[sampling.sampler][2]
    return known and not sampling.requires  # its pipelines guide every step


def drawn_by(sampling: Sampling, conditional: bool) -> str:
    """What the reference pictures are drawn by."""
    if conditional and has_scheduler(sampling):
        return f"diffusers' pipeline with {SCHEDULERS[sampling.sampler][0]}"
    return "diffusers' modules under slipcast's sampler, as diffusers has no pipeline for this sampling"


def scheduler_for(sampling: Sampling) -> tuple[str, dict[str, Any]] | None:
    """diffusers' class for the sampler and the settings for its schedule; None where it has not both."""
    if not has_scheduler(sampling):
        return None
    name, settings, _ = SCHEDULERS[sampling.sampler]
    return name, {**settings, **SCHEDULES[sampling.schedule or ""]}


def choose_scheduler(pipe: Any, sampling: Sampling) -> None:
    """Give the pipeline the scheduler for the sampler and schedule, if diffusers has it."""
    if chosen := scheduler_for(sampling):
        name, settings = chosen
        scheduler = library_class("diffusers", name)
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **settings)


def _load(root: Path, dtype: Any) -> Any:
    from diffusers import DiffusionPipeline

    weights = list((root / "unet").glob("*.safetensors"))
    variant = "fp16" if weights and all(".fp16." in file.name for file in weights) else None
    # A safety checker is not compiled, so the original's memory is measured without it.
    parts = json.loads((root / "model_index.json").read_text())
    without = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in parts else {}
    try:
        pipe = DiffusionPipeline.from_pretrained(
            root, torch_dtype=dtype, variant=variant, local_files_only=True, use_safetensors=True, **without
        )
    except Exception as error:  # whatever is wrong with a checkpoint, it is of another type in every library
        got = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ArtifactError(f"{root}: diffusers cannot load it", expected="a diffusers checkpoint", got=got) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _with_diffusers(pipe: Any, sampling: Sampling, prompts: list[str] | None, noise: Any, generators: Any) -> Any:
    """The pipeline's own call: nothing of slipcast is in it."""
    factor = pipe.vae_scale_factor
    return pipe(
        prompts, height=noise.shape[2] * factor, width=noise.shape[3] * factor, num_inference_steps=sampling.steps,
        generator=generators, latents=noise.to(pipe.dtype), guidance_scale=sampling.guidance_scale,
        guidance_rescale=sampling.guidance_rescale, eta=sampling.eta, output_type="np",
    ).images  # fmt: skip


def _with_our_sampler(pipe: Any, sampling: Sampling, prompts: list[str] | None, noise: Any, generators: Any) -> Any:
    """The original modules under slipcast's sampler: for schedules that diffusers lacks, and for models without text,
    whose pipelines in diffusers know their own scheduler alone."""
    x = sample_latents(pipe, sampling, prompts, noise, generators)
    if hasattr(pipe, "vae"):
        config = pipe.vae.config
        shift = getattr(config, "shift_factor", None) or 0.0
        x = pipe.vae.decode((x / config.scaling_factor + shift).to(pipe.dtype), return_dict=False)[0].float()
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def sample_latents(pipe: Any, sampling: Sampling, prompts: list[str] | None, noise: Any, generators: Any) -> Any:
    """Clean latents, float32 [n, c, h, w], by the original denoiser under slipcast's sampler.

    Where guidance takes two predictions, they are one batch: all unconditional rows, then all conditional ones.
    """
    import torch

    evaluate = bind(pipe, prompts)
    process, schedule = sampling.noise, sampling.lay()
    guidance = sampling.guidance(1.0 if prompts is None else None)
    x = noise * initial_scale(process, schedule, sampling.sampler)
    steps = sample(
        sampling.sampler, Guided(process, schedule, evaluate, guidance), x, schedule.sigmas, eta=sampling.eta,
        noise=lambda: torch.cat([torch.randn((1, *noise.shape[1:]), generator=each) for each in generators]),
    )  # fmt: skip
    *_, x = steps
    return x * final_scale(process, schedule)


def bind(pipe: Any, prompts: list[str] | None) -> Evaluate:
    """The denoiser with these prompts, or as many images as x has, as Guided takes it; outputs in float32."""
    import torch

    text = {}
    if prompts is not None:
        text = {"encoder_hidden_states": torch.cat(pipe.encode_prompt(prompts, "cpu", 1, True)[1::-1])}

    def evaluate(x: Any, timestep: float, both: bool) -> Any:
        batch = torch.cat([x, x]) if both else x
        given = {name: rows[-len(batch) :] for name, rows in text.items()}
        output = pipe.unet(batch.to(pipe.dtype), torch.tensor(timestep), return_dict=False, **given)[0].float()
        return output.chunk(2)[::-1] if both else (output, None)

    return evaluate
