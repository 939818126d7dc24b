"""A call's arguments, checked before any engine runs, each refused by name with what is legal."""

from __future__ import annotations

import dataclasses
import numbers
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from slipcast.bundle.manifest import FALLBACK, GuardPolicy, ImageGeometry, Manifest, Sampling, Target
from slipcast.errors import RequestError
from slipcast.run.guard import choose_policy
from slipcast.run.prompt_table import PromptTable
from slipcast.run.step_table import evaluated_timesteps, told
from slipcast.run.tokenizer import OnLongPrompt, check_prompts
from slipcast.sampling.schedules import Schedule

Floats = npt.NDArray[np.float32]
OutputType = Literal["pil", "np", "latent"]


@dataclass(frozen=True)
class Request:
    """A call's arguments, checked and resolved, before any engine runs: what a denoiser is to do.

    `fallback`: the same for the bundle's unspecialised denoiser, sampled as the original, where there is one.
    """

    prompts: list[str]
    negative: list[str]
    seeds: tuple[int, ...]
    schedule: Schedule
    guidance_scale: float
    latents: Floats | None
    output_type: OutputType
    on_long_prompt: OnLongPrompt
    sampling: Sampling
    component: Literal["denoiser", "denoiser_fallback"] = "denoiser"
    guard: GuardPolicy = "warn"
    fallback: Request | None = None

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1.0 and bool(self.prompts)

    def only(self, images: Sequence[int]) -> Request:
        """The same for some of the images."""
        prompts, negative = ([texts[i] for i in images] if texts else [] for texts in (self.prompts, self.negative))
        return dataclasses.replace(
            self,
            prompts=prompts,
            negative=negative,
            seeds=tuple(self.seeds[i] for i in images),
            latents=None if self.latents is None else self.latents[list(images)],
        )


def check_request(
    manifest: Manifest,
    target: Target,
    closed: PromptTable | None,
    *,
    prompt: str | Sequence[str] | None,
    negative_prompt: str | Sequence[str] | None,
    seed: int | Sequence[int] | None,
    num_images_per_prompt: int,
    num_inference_steps: int | None,
    guidance_scale: float | None,
    width: int | None,
    height: int | None,
    latents: Floats | None,
    output_type: OutputType,
    on_long_prompt: OnLongPrompt,
    guard: GuardPolicy | None,
) -> Request:
    """The arguments of Pipeline.__call__, resolved. RequestError with the legal range for the first that is not."""
    check_integer("num_images_per_prompt", num_images_per_prompt, 1, 4096)
    _check_size(manifest.image, width, height)
    for name, value, legal in (
        ("output_type", output_type, ("pil", "np", "latent")),
        ("on_long_prompt", on_long_prompt, ("warn", "error")),
    ):
        if value not in legal:
            raise RequestError(f"{name} is not usable", expected=" or ".join(legal), got=repr(value))
    prompts: list[str] = []
    if manifest.takes_prompt:
        prompts = [text for text in check_prompts("prompt", cast(Any, prompt)) for _ in range(num_images_per_prompt)]
    elif prompt is not None or negative_prompt:
        raise RequestError(
            "this bundle is unconditional: it takes no prompt",
            expected="None",
            got=repr(prompt or negative_prompt)[:200],
        )
    count = len(prompts) or num_images_per_prompt
    if target.built:
        check_integer(f"the number of images in one call of {target.id}", count, 1, target.built.max_images)
    negative = check_prompts("negative_prompt", "" if negative_prompt is None else negative_prompt)
    if closed:
        closed.check("prompt", prompts)
        closed.check("negative_prompt", negative)
    if len(negative) == 1:
        negative *= count
    elif len(negative) * num_images_per_prompt == count:
        negative = [text for text in negative for _ in range(num_images_per_prompt)]
    else:
        raise RequestError(
            "negative_prompt does not go with prompt",
            expected="one text, or as many as prompts",
            got=str(len(negative)),
        )
    settings = manifest.sampling
    scale = settings.guidance_scale if guidance_scale is None else guidance_scale
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real) or not 0 <= scale <= 1000:
        raise RequestError("guidance_scale is not usable", expected="a number from 0 to 1000", got=repr(scale))
    if latents is not None:
        latents = check_latents("latents", latents, (count, *manifest.image.latent_shape))
        if not np.isfinite(latents).all():
            raise RequestError("latents are not usable", expected="finite numbers", got="NaN or infinity")
    schedule, seeds = _lay(manifest, num_inference_steps), choose_seeds(seed, count)
    policy = choose_policy(manifest.guard, guard)
    request = Request(
        prompts, negative, seeds, schedule, float(scale), latents, output_type, on_long_prompt, settings, guard=policy
    )
    if policy == "fallback":
        request = dataclasses.replace(
            request, fallback=_unspecialised(request, manifest, num_inference_steps, guidance_scale)
        )
    return request


def _unspecialised(request: Request, manifest: Manifest, steps: int | None, scale: float | None) -> Request:
    """What is asked for, of the denoiser that was not specialised: the original's sampling is its default."""
    settings = manifest.reference or manifest.sampling
    return dataclasses.replace(
        request,
        component=FALLBACK,
        sampling=settings,
        schedule=lay_steps(settings, steps),
        guidance_scale=settings.guidance_scale if scale is None else request.guidance_scale,
    )


def _check_size(image: ImageGeometry, width: int | None, height: int | None) -> None:
    for name, asked, built in (("width", width, image.width), ("height", height, image.height)):
        if asked is not None and asked != built:
            raise RequestError(
                f"{name} is fixed in this bundle",
                expected=str(built),
                got=repr(asked),
                hint=f"compile a bundle with --set sampling.{name}={asked!r}",
            )


def _lay(manifest: Manifest, steps: int | None) -> Schedule:
    settings, cut = manifest.sampling, manifest.cut
    schedule = lay_steps(settings, steps)
    if cut and "denoiser_step" not in manifest.components:
        known = [told(timestep) for timestep in cut.timesteps]
        asked = evaluated_timesteps(settings, schedule)
        if others := [f"{timestep:g}" for timestep in asked if timestep not in known]:
            raise RequestError(
                f"num_inference_steps is fixed in this bundle: {settings.steps}",
                expected="timesteps " + ", ".join(f"{timestep:g}" for timestep in known),
                got=", ".join(others),
                hint="compile a bundle with --set cut.general=true",
            )
    return schedule


def lay_steps(settings: Sampling, steps: int | None) -> Schedule:
    """The schedule; RequestError with the numbers of steps that it can have, where this is none of them."""
    if steps is None or settings.timesteps or settings.sigmas:
        return settings.lay(steps)
    high = settings.noise.num_train_timesteps
    if isinstance(steps, (int, np.integer)) and not isinstance(steps, bool) and 1 <= steps <= high:
        try:
            return settings.lay(steps)
        except RequestError:
            pass
    check_integer("num_inference_steps", steps, 1, _most_steps(settings))
    return settings.lay(steps)


@cache
def _most_steps(settings: Sampling) -> int:
    """The largest number up to which every number of steps can be laid. By bisection: steps only grow narrower."""

    def fits(steps: int) -> bool:
        try:
            settings.lay(steps)
        except RequestError:
            return False
        return True

    low, high = 0, settings.noise.num_train_timesteps + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def check_latents(name: str, latents: object, shape: tuple[int, ...]) -> Floats:
    """RequestError where they are not float32 of this shape."""
    try:
        found: Floats = np.asarray(latents)
    except (ValueError, TypeError, RuntimeError) as error:  # rows of several lengths; or what cannot be an array
        raise RequestError(
            f"{name} are not usable", expected=f"float32 {list(shape)}", got=str(error).splitlines()[0][:200]
        ) from None
    if found.shape != shape or found.dtype != np.float32:
        raise RequestError(
            f"{name} are not usable", expected=f"float32 {list(shape)}", got=f"{found.dtype} {list(found.shape)}"
        )
    return found


def check_integer(name: str, value: object, low: int, high: int) -> None:
    """RequestError, with the legal range, where it is none of `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise RequestError(f"{name} is not usable", expected=f"an integer from {low} to {high}", got=repr(value))


def choose_seeds(seed: int | Sequence[int] | None, count: int) -> tuple[int, ...]:
    """One for each of `count` images: seed + i, those of a list, or from a random one on. RequestError for others."""
    if seed is None:
        seed = secrets.randbits(32)
    if isinstance(seed, (list, tuple)):
        if len(seed) != count:
            raise RequestError(
                "seed does not go with the images asked for", expected=f"{count} seeds", got=str(len(seed))
            )
        seeds = tuple(seed)
    else:
        check_integer("seed", seed, 0, 2**64 - count)
        seeds = tuple(int(cast(int, seed)) + i for i in range(count))
    for each in seeds:
        check_integer("seed", each, 0, 2**64 - 1)
    return seeds
