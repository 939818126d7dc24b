"""Measure a profile, in two phases.

First the original samples every calibration prompt while observe.py measures each evaluation; then importance.py looks
at a few states of those trajectories, the ones that taylor and leave_one_out are worth their price at.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slipcast.bundle.manifest import Sampling
from slipcast.bundle.profiles import Floats
from slipcast.errors import NumericalError
from slipcast.progress import Advance
from slipcast.sampling.samplers import sample
from slipcast_compiler.host.quiet import quiet
from slipcast_compiler.model.original import Drawing
from slipcast_compiler.recipe.recipe import ProfileTable


def measure(drawing: Drawing, options: ProfileTable, out: Path, advance: Advance) -> dict[str, Any]:
    """Write all tensors of the profile to `out`; returns the record's fields that only the measurement knows."""
    import torch

    from slipcast_compiler.model import original
    from slipcast_compiler.model.layers import attention_layers
    from slipcast_compiler.profile import importance
    from slipcast_compiler.profile.observe import Observer

    with quiet():
        pipe = drawing.open()
    sampling, size = drawing.sampling, drawing.original.size
    module = pipe.unet.requires_grad_(False).eval()
    sigmas = evaluated_sigmas(sampling)
    wanted = chosen_states(len(drawing.seeds), len(sigmas), options.states)
    exact = importance.is_exact(module, options.leave_one_out)
    heads = sum(layer.heads for layer in attention_layers(module)) if exact else 2 * importance.PROBES
    progress = Progress(advance, len(drawing.seeds) * len(sigmas) + len(wanted) * (1 + heads))

    observer = Observer(module, len(sigmas), drawing.guided, wanted, progress.add)
    clean: dict[int, torch.Tensor] = {}
    kept = {image for image, _ in wanted}
    with torch.no_grad(), observer.watching():
        for first in range(0, len(drawing.seeds), options.batch):
            part = slice(first, first + options.batch)
            prompts, seeds = drawing.prompts[part], drawing.seeds[part]
            observer.begin(first, len(seeds))
            noise, generators = original.draw_noise(pipe, size, seeds)
            text = [prompt for prompt in prompts if prompt is not None] or None
            x = original.sample_latents(pipe, sampling, text, noise, generators)
            clean |= {first + i: x[i : i + 1].clone() for i in range(len(x)) if first + i in kept}

    found = observer.results() | importance.magnitude(module)
    states = observer.states

    def loss(i: int) -> torch.Tensor:
        sigma = sigmas[states[i].evaluation]
        return importance.denoising_loss(module, sampling, states[i], clean[states[i].image], sigma, seed=i)

    def predict(chosen: Sequence[int]) -> torch.Tensor:
        return importance.guided_prediction(module, sampling, [states[i] for i in chosen])

    found |= importance.taylor(module, loss, len(states), progress.add)
    with torch.no_grad():
        if exact:
            found |= importance.leave_one_out(module, predict, len(states), options.batch, progress.add)
        else:
            advance_by = lambda count: progress.add(count * heads)  # noqa: E731
            found |= importance.projected_leave_one_out(module, predict, len(states), advance_by)
    save_measured(found, out)
    return {"leave_one_out": "exact" if exact else "projected", "shared_inputs": observer.layers.inputs.shared()}


def evaluated_sigmas(sampling: Sampling) -> list[float]:
    """The sigma of each evaluation of the denoiser, in order, which depends on the sampler alone."""
    sigmas: list[float] = []

    def denoise(x: Any, sigma: float) -> Any:
        sigmas.append(sigma)
        return x

    x = np.zeros(1)
    for _ in sample(sampling.sampler, denoise, x, sampling.lay().sigmas, noise=lambda: x, eta=sampling.eta):
        pass
    return sigmas


def chosen_states(images: int, evaluations: int, count: int) -> list[tuple[int, int]]:
    """Up to `count` pairs (image, evaluation): evaluations evenly over the trajectory, images in turn."""
    count = min(count, images * evaluations)
    return [(i % images, ((2 * i + 1) * evaluations // (2 * count))) for i in range(count)]


class Progress:
    """Of work that is done in parts."""

    def __init__(self, advance: Advance, total: int) -> None:
        self._advance, self._done, self._total = advance, 0, total

    def expect(self, count: int) -> None:
        """So many parts more than was known."""
        self._total += count

    def add(self, count: int) -> None:
        """So many parts more."""
        self._done += count
        self._advance(self._done, self._total)


def save_measured(found: dict[str, Floats], out: Path) -> None:
    """Write the tensors of a profile. NumericalError names a layer where one is not finite."""
    from safetensors.numpy import save_file

    for name, values in found.items():
        if not np.isfinite(values).all():
            what, _, layer = name.partition("/")
            raise NumericalError(f"{layer}: NaN or infinity in its {what}", expected="finite numbers")
    save_file({name: np.ascontiguousarray(found[name]) for name in sorted(found)}, out)
