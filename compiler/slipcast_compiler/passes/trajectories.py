"""What the original denoiser predicts on its own trajectories: the data that a rewritten one is trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from slipcast.bundle.sampling import Sampling
from slipcast.errors import NumericalError
from slipcast.sampling.guidance import guide
from slipcast_compiler.model.original import Drawing, Image, draw_noise, sample_latents
from slipcast_compiler.profile.observe import first_bad


@dataclass(frozen=True)
class States:
    """Points x_t of trajectories with the teacher's predictions; rows: unconditional and conditional, or one."""

    sample: torch.Tensor  # float32 [n, c, h, w], scaled as the denoiser reads it
    timestep: torch.Tensor  # float32 [n]
    prediction: torch.Tensor  # float32 [n, rows, c, h, w]
    text: torch.Tensor  # float32 [images, rows, tokens, width], or [images, rows, 0, 0] without a prompt
    image: torch.Tensor  # int64 [n], into text

    def __len__(self) -> int:
        return len(self.sample)

    def to(self, device: str) -> States:
        """On that device."""
        return States(*(getattr(self, field.name).to(device) for field in fields(self)))

    def predict(self, module: Any, chosen: torch.Tensor) -> torch.Tensor:
        """What `module` predicts for the states `chosen`, int64 [k]: float32 [k, rows, c, h, w]."""
        rows = self.prediction.shape[1]
        x, t = (value[chosen].repeat_interleave(rows, 0) for value in (self.sample, self.timestep))
        text = self.text[self.image[chosen]].flatten(0, 1)
        conditioning = {"encoder_hidden_states": text} if text.numel() else {}
        output: torch.Tensor = module(x, t, return_dict=False, **conditioning)[0]
        return output.unflatten(0, (len(chosen), rows))


@dataclass(frozen=True)
class GuidedStates:
    """Points (see context.py) of a student, a module that is called as the denoiser is."""

    states: States
    student: Any
    sampling: Sampling

    @property
    def at_once(self) -> int:
        """See Points."""
        return len(self)

    def __len__(self) -> int:
        return len(self.states)

    def found(self, chosen: torch.Tensor) -> torch.Tensor:
        """See Points."""
        return self._guided(self.states.predict(self.student, chosen))

    def wanted(self, chosen: torch.Tensor) -> torch.Tensor:
        """See Points."""
        return self._guided(self.states.prediction[chosen])

    def _guided(self, prediction: torch.Tensor) -> torch.Tensor:
        """[k, rows, ...] -> [k, ...]."""
        if prediction.shape[1] == 1:
            return prediction[:, 0]
        unconditional, conditional = prediction.unbind(1)
        scale, rescale = self.sampling.guidance_scale, self.sampling.guidance_rescale
        guided: torch.Tensor = guide(conditional, unconditional, scale, rescale)
        return guided


def record(pipe: Any, drawing: Drawing, batch: int, images: Sequence[Image], advance: Callable[[int], None]) -> States:
    """All states of the images' trajectories, which are drawn in batches; `advance(n)` is called after each evaluation
    of n images.

    NumericalError names the layer that is the first to give NaN or infinity.
    """
    parts = [_record(pipe, drawing, images[i : i + batch], i, advance) for i in range(0, len(images), batch)]
    return States(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(States)))


def _record(pipe: Any, drawing: Drawing, images: Sequence[Image], first: int, advance: Callable[[int], None]) -> States:
    """The states of images in one batch, which are number `first` and following of all."""
    count = len(images)
    samples, timesteps, predictions = [], [], []
    texts: list[torch.Tensor] = []

    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if not torch.isfinite(output[0]).all():
            raise NumericalError(
                f"{first_bad(module, args, kwargs) or 'the denoiser'}: NaN or infinity in its output",
                expected="finite numbers", got=f"at timestep {float(args[1]):g} of the original's own trajectory",
            )  # fmt: skip
        samples.append(args[0][:count])
        timesteps.append(args[1].float().expand(count))
        predictions.append(output[0].unflatten(0, (-1, count)).transpose(0, 1))  # all unconditional rows come first
        if not texts:
            text = kwargs.get("encoder_hidden_states", output[0].new_zeros(len(output[0]), 0, 0))
            texts.append(text.unflatten(0, (-1, count)).transpose(0, 1))
        advance(count)

    handle = pipe.unet.register_forward_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad():
            noise, generators = draw_noise(pipe, drawing.original.size, [seed for _, seed in images])
            prompts = [prompt for prompt, _ in images if prompt is not None] or None
            sample_latents(pipe, drawing.sampling, prompts, noise, generators)
    finally:
        handle.remove()
    image = torch.arange(first, first + count).repeat(len(samples))
    return States(torch.cat(samples), torch.cat(timesteps), torch.cat(predictions), texts[0], image)
