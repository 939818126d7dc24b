"""Load a bundle and make images: prompt -> text encoder or table -> sampling loop -> decoder -> pictures. No torch."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from slipcast.bundle.manifest import FALLBACK, SHALLOW, GuardPolicy, Manifest, Target
from slipcast.bundle.program import Output
from slipcast.bundle.reader import Bundle, check_digests, open_bundle
from slipcast.engines import Engine, Instrument, as_it_is, refusal
from slipcast.engines.resources import out_of_memory
from slipcast.errors import HostError, ResourceError
from slipcast.run.base import BasePipeline, PipelineOutput, ready_target, to_pil
from slipcast.run.caching import Features
from slipcast.run.contract import check_contract
from slipcast.run.decoding import decode_frugally
from slipcast.run.guard import Guard, Verdict
from slipcast.run.loop import Evaluator, check_finite, chosen_rows, images_at_once, timed
from slipcast.run.prompt_table import PromptTable
from slipcast.run.request import OutputType, Request, check_latents, check_request
from slipcast.run.step_table import Row, evaluated_timesteps, read_step_table
from slipcast.run.tokenizer import OnLongPrompt, PromptTokenizer
from slipcast.sampling.denoiser import final_scale, initial_scale
from slipcast.sampling.early_exit import EarlyExit
from slipcast.sampling.guidance import Guided
from slipcast.sampling.samplers import is_known, sample
from slipcast.sampling.schedules import SCHEDULES
from slipcast.sampling.seeds import TorchGenerator, batch_noise

logger = logging.getLogger("slipcast")

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int_]

OnStepEnd = Callable[["Pipeline", int, float, dict[str, Floats]], Mapping[str, Floats] | None]


class Pipeline(BasePipeline):
    """A bundle that samples with our samplers, ready to make images on one target; see also BasePipeline.

    `residency` and `instrument`: see load.
    """

    bundle: Bundle
    manifest: Manifest

    def __init__(
        self, bundle: Bundle, target: Target, residency: str = "all", instrument: Instrument = as_it_is
    ) -> None:
        check_contract(bundle.manifest)
        super().__init__(bundle, target, instrument)
        self._tokenizers = [
            PromptTokenizer(bundle.file(text.tokenizer), text.max_length, text.pad_token_id)
            for text in self.manifest.text
        ]
        cut, closed = self.manifest.cut, self.manifest.prompts
        self._prompt_table = PromptTable(bundle.path(closed.table), closed) if closed else None
        self._step_table = read_step_table(bundle.path(cut.step_table), cut) if cut else None
        self._guard = self._open_guard()
        self._open_engines(residency, rare={FALLBACK})

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        seed: int | Sequence[int] | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        width: int | None = None,
        height: int | None = None,
        latents: Floats | None = None,
        output_type: OutputType = "pil",
        on_long_prompt: OnLongPrompt = "warn",
        guard: GuardPolicy | None = None,
        callback_on_step_end: OnStepEnd | None = None,
    ) -> PipelineOutput:
        """Make images; arguments as in diffusers, defaults as the bundle was compiled.

        `seed`: image i gets seed + i, or the i-th of a list; the noise is that of `torch.Generator("cpu")` with this
        seed, whatever the batch. `latents`: unit noise, float32 [n, c, h, w], instead of the seeds' initial noise.
        `callback_on_step_end(pipeline, step, timestep, {"latents": x})` may return {"latents": ...} to go on with, or
        raise `slipcast.Cancelled` to stop; x is x0 + sigma * noise (not scaled), float32. Calls from several threads
        take turns. `guard`: what becomes of prompts out of the family, in place of the bundle's own policy; with
        "fallback" they are drawn after the others, and the callback sees the two groups one after the other.

        Raises RequestError (a ValueError) with the legal range before any engine runs, or for a prompt that a guard
        refuses; NumericalError where a step or the decoder yields NaN or infinity.
        """
        request = check_request(
            self.manifest,
            self._target,
            self._prompt_table,
            prompt=prompt,
            negative_prompt=negative_prompt,
            seed=seed,
            num_images_per_prompt=num_images_per_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            width=width,
            height=height,
            latents=latents,
            output_type=output_type,
            on_long_prompt=on_long_prompt,
            guard=guard,
        )
        with self._turn():
            return self._run(request, callback_on_step_end)

    def _open_guard(self) -> Guard | None:
        if not (record := self.manifest.guard):
            return None
        return Guard(self.bundle.path(record.table), record, special=np.unique(self._tokenizers[0]([""])))

    def _run(self, request: Request, callback: OnStepEnd | None) -> PipelineOutput:
        clock, seconds = time.perf_counter(), dict[str, float]()
        conditioning, verdicts = self._encode(request, seconds)
        strangers = [i for i, verdict in enumerate(verdicts) if verdict.fallback]
        if not strangers:
            latents, steps = self._denoise(request, conditioning, callback, seconds)
        else:
            latents, steps = self._denoise_apart(request, strangers, conditioning, callback, seconds)
        images: Any = latents
        if request.output_type != "latent":
            pictures = self._decode(latents, seconds)
            images = pictures if request.output_type == "np" else [to_pil(picture) for picture in pictures]
        seconds["total"] = time.perf_counter() - clock
        kind: Output = "array" if request.output_type == "latent" else "image"
        return PipelineOutput(images, request.seeds, self.target, seconds, tuple(verdicts), tuple(steps.tolist()), kind)

    def _denoise_apart(
        self,
        request: Request,
        strangers: list[int],
        conditioning: dict[str, Floats],
        callback: OnStepEnd | None,
        seconds: dict[str, float],
    ) -> tuple[Floats, Indices]:
        """As _denoise, with each image by the denoiser that it belongs to."""
        assert request.fallback
        family = [i for i in range(len(request.seeds)) if i not in strangers]
        count = len(request.seeds)
        latents, steps = np.empty((count, *self.manifest.image.latent_shape), np.float32), np.zeros(count, int)
        for each, images in ((request, family), (request.fallback, strangers)):
            if images:
                rows = {k: chosen_rows(v, len(request.seeds), images, both=True) for k, v in conditioning.items()}
                latents[images], steps[images] = self._denoise(each.only(images), rows, callback, seconds)
        return latents, steps

    def _encode(self, request: Request, seconds: dict[str, float]) -> tuple[dict[str, Floats], list[Verdict]]:
        """Denoiser inputs that depend on the prompt, unconditional rows first where guided; and what the guard says.

        RequestError where it refuses a prompt.
        """
        guided = request.guided or bool(request.fallback and request.fallback.guided)
        texts = [*request.negative, *request.prompts] if guided else request.prompts
        distinct = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        places = [distinct[text] for text in texts]
        if self._prompt_table:
            ready = self._prompt_table(list(distinct))
        else:
            tokens, ready = self._encode_texts(list(distinct), request.on_long_prompt, seconds)
        verdicts: list[Verdict] = []
        if self._guard and self.manifest.guard:
            asked = list(dict.fromkeys(request.prompts))
            rows, hidden = [distinct[prompt] for prompt in asked], ready[self.manifest.guard.input]
            found = self._guard.judge(asked, tokens[0][rows], hidden[rows], request.guard)
            verdicts = [found[asked.index(prompt)] for prompt in request.prompts]
        if prompt_part := self.manifest.components.get("denoiser_prompt"):
            with self.residency.use("denoiser_prompt") as engine:
                given = {spec.name: ready[spec.name] for spec in prompt_part.inputs}
                ready |= timed(engine, given, seconds, "denoiser_prompt")
        return {name: values[places] for name, values in ready.items()}, verdicts

    def _encode_texts(
        self, texts: list[str], on_long_prompt: OnLongPrompt, seconds: dict[str, float]
    ) -> tuple[list[npt.NDArray[np.int64]], dict[str, Floats]]:
        """Tokens by each tokenizer, and what the text encoders give for them, by input of the denoiser."""
        # All prompts are cut into tokens, and refused where too long, before the first encoder runs.
        tokens = [tokenizer(texts, on_long_prompt) for tokenizer in self._tokenizers]
        parts: dict[str, list[Floats]] = {}
        for text, ids in zip(self.manifest.text, tokens, strict=True):
            with self.residency.use(text.component) as encoder:
                outputs = timed(encoder, {"input_ids": ids}, seconds, text.component)
            for output, denoiser_input in text.outputs.items():
                parts.setdefault(denoiser_input, []).append(outputs[output])
        ready = {name: np.concatenate(each, axis=-1) if len(each) > 1 else each[0] for name, each in parts.items()}
        return tokens, ready

    def _rows(self, request: Request, seconds: dict[str, float]) -> dict[float, Row]:
        """By timestep, what was computed beforehand of it; empty where nothing was."""
        if self._step_table is None or request.component != "denoiser":
            return {}
        rows = dict(self._step_table)
        asked = evaluated_timesteps(self.manifest.sampling, request.schedule)
        if others := [timestep for timestep in asked if timestep not in rows]:
            with self.residency.use("denoiser_step") as engine:
                for timestep in others:
                    given = {"timestep": np.array([timestep], np.float32)}
                    rows[timestep] = timed(engine, given, seconds, "denoiser_step")
        return rows

    def _denoise(
        self, request: Request, conditioning: dict[str, Floats], callback: OnStepEnd | None, seconds: dict[str, float]
    ) -> tuple[Floats, Indices]:
        """The sampling loop; float32 latents [n, c, h, w] of the clean pictures, and how many steps each took."""
        settings, schedule = request.sampling, request.schedule
        generators = [TorchGenerator(seed) for seed in request.seeds]
        noise = partial(batch_noise, generators, self.manifest.image.latent_shape)
        images, rows = len(request.seeds), self._rows(request, seconds)
        # Thresholds and masks are of these steps: between others, images and features change more or less.
        own = len(schedule.timesteps) == settings.steps
        caching = self.manifest.caching if own and request.component == "denoiser" else None
        with ExitStack() as in_use:
            engines = {
                name: (in_use.enter_context(self.residency.use(name)), self.manifest.components[name])
                for name in (request.component, *([SHALLOW] if caching else []))
            }
            evaluate = Evaluator(
                engines,
                request.component,
                conditioning,
                rows,
                images=images,
                left=lambda: denoise.left,
                at_once=images_at_once(self.manifest.image, self._target.device, images),
                seconds=seconds,
                features=Features(caching, images) if caching else None,
                sealed=self._target.device != "cpu",
            )
            guidance = settings.guidance(request.guidance_scale if request.guided else 1.0)
            guided = Guided(settings.noise, schedule, evaluate, guidance)
            threshold = self._target.early_exit if own and request.component == "denoiser" else None
            denoise = EarlyExit(guided, threshold, images)
            start = noise() if request.latents is None else request.latents
            x: Floats = start * initial_scale(settings.noise, schedule, settings.sampler)
            steps = sample(settings.sampler, denoise, x, schedule.sigmas, noise=noise, eta=settings.eta)
            for step, x in enumerate(steps):
                timestep = schedule.timesteps[step]
                where = f"step {step + 1} of {len(schedule.timesteps)} (timestep {timestep:g})"
                check_finite(x, f"latents are not finite after {where}")
                if callback:
                    changed = callback(self, step, timestep, {"latents": x})
                    if changed and "latents" in changed:
                        x[...] = check_latents("latents from callback_on_step_end", changed["latents"], x.shape)
                    check_finite(x, f"latents are not finite after callback_on_step_end at {where}")
                if not denoise.end_step():
                    break
        return denoise.results(x * final_scale(settings.noise, schedule)), denoise.steps

    def _decode(self, latents: Floats, seconds: dict[str, float]) -> Floats:
        """float32 [n, height, width, channels] in [0, 1]."""
        pictures = latents
        if "vae_decoder" in self.manifest.components:
            image = self.manifest.image
            scaled = cast(Floats, latents / image.scaling_factor + image.shift_factor)
            with self.residency.use("vae_decoder") as decoder:
                # One by one: memory does not grow with their number, and each is what it would be alone.
                pictures = np.concatenate([self._decode_one(decoder, one[None], seconds) for one in scaled])
        levels: Floats = np.clip(pictures * 0.5 + 0.5, 0, 1).transpose(0, 2, 3, 1)
        return levels

    def _decode_one(self, decoder: Engine, latent: Floats, seconds: dict[str, float]) -> Floats:
        tiling, free = self.manifest.image.tiling, partial(self.residency.free_others, "vae_decoder")

        def decode(engine: Engine, tile: Floats) -> Floats:
            picture: Floats = timed(engine, {"latent": tile}, seconds, "vae_decoder")["image"]
            return picture

        try:
            picture = decode_frugally(partial(decode, decoder), latent, tiling, free)
        except Exception as error:
            if not out_of_memory(error):
                raise
            with self._decoder_on_cpu(error) as other:
                picture = decode_frugally(partial(decode, other), latent, tiling, free)
        # Not where the precision was compiled into the engine.
        if not np.isfinite(picture).all() and self._target.precision != "fp32" and not self._target.built:
            # Decoders of some published checkpoints overflow in half precision; the picture is worth a second try.
            logger.warning("the decoder overflowed in %s: decoding again in fp32", self._target.precision)
            with self._open("vae_decoder", "fp32") as full:
                picture = decode_frugally(partial(decode, full), latent, tiling, free)
        check_finite(picture, "the decoder's picture is not finite")
        return picture

    def _decoder_on_cpu(self, error: Exception) -> Engine:
        """The decoder of a target that runs on the CPU, in place of one for which a GPU has too little memory."""
        for target in self.manifest.targets if self._target.device != "cpu" else ():
            if target.device == "cpu" and refusal(target) is None:
                logger.warning("memory ran out while decoding: trying again on the CPU, by %s", target.id)
                files = target.components["vae_decoder"]
                check_digests(self.bundle, [file for file in (files.model, files.weights) if file])
                return self._open("vae_decoder", target=target)
        raise ResourceError(
            "memory ran out while decoding, in the smallest tiles too",
            got=str(error) or type(error).__name__,
            hint='close other programs, or keep less in memory: residency="sequential"',
        ) from error


def load(
    path: str | os.PathLike[str],
    *,
    target: str = "auto",
    residency: str = "all",
    instrument: Instrument = as_it_is,
    allow_unlisted: bool = False,
) -> Pipeline:
    """As slipcast.load; RequestError where the bundle is that of a captured program."""
    return open_pipeline(open_bundle(path, allow_unlisted=allow_unlisted), target, residency, instrument)


def open_pipeline(bundle: Bundle, target: str, residency: str, instrument: Instrument) -> Pipeline:
    """The pipeline of an opened bundle; arguments as of load. HostError where this runtime lacks its sampler."""
    sampling = bundle.manifest.sampling
    if not is_known(sampling.sampler):
        raise HostError(f"this runtime does not know the sampler {sampling.sampler!r}", hint="pip install -U slipcast")
    if sampling.schedule not in (None, *SCHEDULES):
        raise HostError(
            f"this runtime does not know the schedule {sampling.schedule!r}", hint="pip install -U slipcast"
        )
    return Pipeline(bundle, ready_target(bundle, target), residency, instrument)
