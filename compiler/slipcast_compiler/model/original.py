"""The original: the checkpoint as diffusers runs it, which a bundle is compared with."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np

from slipcast.bundle.manifest import ImageGeometry, Sampling
from slipcast.errors import ArtifactError
from slipcast.progress import Advance
from slipcast.sampling.denoiser import final_scale, initial_scale
from slipcast.sampling.guidance import Evaluate, Guided
from slipcast.sampling.samplers import base_name, sample
from slipcast_compiler.host.quiet import quiet
from slipcast_compiler.model.checkpoint import Checkpoint, Tokenizer
from slipcast_compiler.model.library import library_class
from slipcast_compiler.model.scheduler import CLASSES, settings_for
from slipcast_compiler.recipe.seeds import CALIBRATION

Precision = Literal["fp32", "bf16"]  # in what an original is run
Image = tuple[str | None, int]  # prompt, seed
Prompts = tuple[str, ...] | tuple[None, ...]  # None for each image of an unconditional model
Images = tuple[Image, ...]  # prompt and seed of each

_SPACED = ("leading", "linspace", "trailing")
_ALL = (*_SPACED, "karras", "exponential", "beta")
# sampler -> the schedules with which diffusers' scheduler gives the pictures of ours. Where diffusers ignores a
# schedule, or steps by T // n instead of to the next timestep, it is not in the list. Two samplers are left out:
# DPMSolverSDEScheduler draws its noise from a Brownian tree, so no seed gives its pictures; and the third order of
# sde-dpmsolver++ has a wrong sign (as of 0.42).
SCHEDULERS: dict[str, tuple[str, ...]] = {
    "ddpm": _SPACED,
    "ddim": ("leading",),
    "pndm": ("leading",),
    "euler": _ALL,
    "euler_ancestral": _SPACED,
    "heun": _ALL,
    "dpm2": _ALL,
    "dpmpp_2m": (*_ALL, "lu"),
    "dpmpp_2m_sde": (*_ALL, "lu"),
    "unipc": _ALL,
    "deis": _ALL,
    "lcm": ("lcm",),
}
_STRIDING = ("ddim", "pndm")
# sampler -> diffusers' pipeline for models without text that its scheduler can be run in: these neither scale what the
# model reads, nor the first noise.
NOT_LOADED = ("safety_checker", "feature_extractor", "image_encoder")
UNCONDITIONAL = {
    "ddpm": "DDPMPipeline",
    "ddim": "DDIMPipeline",
    "dpmpp_2m": "DDPMPipeline",
    "dpmpp_2m_sde": "DDPMPipeline",
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
        return open_pipeline(self.original.checkpoint, self.sampling, dtype)


def calibration_images(texts: Prompts, count: int) -> Images:
    """So many images to measure on: of these prompts, again from the first after the last."""
    return tuple((texts[i % len(texts)], seed) for i, seed in enumerate(CALIBRATION.take(count)))


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


def open_pipeline(model: Checkpoint | Path, sampling: Sampling, dtype: str) -> Any:
    """The checkpoint's pipeline in diffusers, in `dtype` (float32 or bfloat16), with the scheduler for `sampling`."""
    import torch

    checkpoint = Checkpoint(model, str(model)) if isinstance(model, Path) else model
    pipe = load_pipeline(checkpoint, getattr(torch, dtype))
    choose_scheduler(pipe, sampling)
    return pipe


def draw(
    pipe: Any, sampling: Sampling, size: tuple[int, int], prompts: Sequence[str | None], seeds: Sequence[int]
) -> Any:
    """One image per prompt and seed, all in one batch: float32 [n, h, w, c] in [0, 1]; size is (width, height)."""
    import torch

    text = [prompt for prompt in prompts if prompt is not None] or None
    with torch.no_grad():
        if text is None and has_pipeline(sampling, False):
            return _unconditional(pipe, sampling, size, seeds).astype(np.float32)
        noise, generators = draw_noise(pipe, size, seeds)
        run = _with_diffusers if has_pipeline(sampling, text is not None) else _with_our_sampler
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
    base, noise = base_name(sampling.sampler), sampling.noise
    known = sampling.schedule in SCHEDULERS.get(base, ())
    # To t - T // n, or to the next timestep: the same where n divides T.
    known |= base in _STRIDING and sampling.schedule == "trailing" and noise.num_train_timesteps % sampling.steps == 0
    flow = noise.is_flow
    return known and not flow and not sampling.requires  # its pipelines guide every step


def has_pipeline(sampling: Sampling, conditional: bool) -> bool:
    """Whether a pipeline of diffusers draws the reference pictures."""
    return has_scheduler(sampling) and (conditional or base_name(sampling.sampler) in UNCONDITIONAL)


def drawn_by(sampling: Sampling, conditional: bool) -> str:
    """What the reference pictures are drawn by."""
    if not has_pipeline(sampling, conditional):
        return "diffusers' modules under slipcast's sampler, as diffusers has no pipeline for this sampling"
    base = base_name(sampling.sampler)
    return f"diffusers' {'pipeline' if conditional else UNCONDITIONAL[base]} with {CLASSES[base][0]}"


def scheduler_for(sampling: Sampling) -> tuple[str, dict[str, Any]] | None:
    """diffusers' class for the sampler and the settings for its schedule; None where it has not both."""
    if not has_scheduler(sampling):
        return None
    noise = sampling.noise
    # What a pipeline corrects in its scheduler's config is lost to another scheduler that is made of it, if it was
    # absent: diffusers takes it for a default.
    corrected = {"steps_offset": noise.steps_offset, "clip_sample": noise.clip_sample is not None}
    return CLASSES[base_name(sampling.sampler)][0], {**settings_for(sampling.sampler, sampling.schedule), **corrected}


def choose_scheduler(pipe: Any, sampling: Sampling) -> None:
    """Give the pipeline the scheduler for the sampler and schedule, if diffusers has it."""
    if scheduler := make_scheduler(sampling, pipe.scheduler.config):
        pipe.scheduler = scheduler


def make_scheduler(sampling: Sampling, config: Any) -> Any:
    """diffusers' scheduler for the sampling, made of a checkpoint's; None where it has none."""
    if not (chosen := scheduler_for(sampling)):
        return None
    name, settings = chosen
    return library_class("diffusers", name).from_config(config, **settings)


def load_pipeline(checkpoint: Checkpoint, dtype: Any) -> Any:
    """The checkpoint as diffusers loads it, from the files that the bundle is made of."""
    from diffusers import DiffusionPipeline

    # What is not compiled is not loaded, so that the original's memory is measured without it.
    without: dict[str, Any] = {name: None for name in NOT_LOADED if name in checkpoint.index}
    if "safety_checker" in checkpoint.index:
        without["requires_safety_checker"] = False
    with checkpoint.as_diffusers() as root:
        try:
            pipe = DiffusionPipeline.from_pretrained(
                root, torch_dtype=dtype, local_files_only=True, use_safetensors=True, **without
            )
        except Exception as error:  # whatever is wrong with a checkpoint, it is of another type in every library
            got = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ArtifactError(
                f"{checkpoint.root}: diffusers cannot load it", expected="a diffusers checkpoint", got=got
            ) from error
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


class _Reduced:
    """A denoiser that takes and returns float32 whatever it computes in: its pipeline draws noise in its dtype, and
    noise in another dtype is another picture."""

    def __init__(self, unet: Any, size: tuple[int, int]) -> None:
        import torch

        self._unet, self.dtype = unet, torch.float32
        self.config = SimpleNamespace(in_channels=unet.config.in_channels, sample_size=(size[1], size[0]))

    def __call__(self, sample: Any, timestep: Any) -> Any:
        output = self._unet(sample.to(self._unet.dtype), timestep, return_dict=False)[0]
        return SimpleNamespace(sample=output.float())


def _unconditional(pipe: Any, sampling: Sampling, size: tuple[int, int], seeds: Sequence[int]) -> Any:
    """The call of diffusers' own pipeline for the sampler, at this size."""
    import torch

    kind = library_class("diffusers", UNCONDITIONAL[base_name(sampling.sampler)])
    own = kind(unet=pipe.unet, scheduler=pipe.scheduler)
    own.unet = _Reduced(pipe.unet, size)
    own.set_progress_bar_config(disable=True)
    eta = {"eta": sampling.eta} if base_name(sampling.sampler) == "ddim" else {}
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return own(
        batch_size=len(seeds), generator=generators, num_inference_steps=sampling.steps, output_type="np", **eta
    ).images  # fmt: skip


def _with_our_sampler(pipe: Any, sampling: Sampling, prompts: list[str] | None, noise: Any, generators: Any) -> Any:
    """The original modules under slipcast's sampler: for what no pipeline of diffusers draws."""
    x = sample_latents(pipe, sampling, prompts, noise, generators)
    if hasattr(pipe, "vae"):
        x = pipe.vae.decode((x / pipe.vae.config.scaling_factor).to(pipe.dtype), return_dict=False)[0].float()
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
