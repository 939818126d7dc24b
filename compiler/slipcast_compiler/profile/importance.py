"""How much a denoiser needs each attention head and each feed-forward neuron: the criteria that look at its output.

All of them work by masks: factors, one of each head or neuron, on the input of the linear layer that sums them up. A
mask of 0 removes one exactly as taking its columns out of the layer would.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from slipcast.bundle.manifest import Sampling
from slipcast.sampling.denoiser import Denoiser
from slipcast.sampling.guidance import guide
from slipcast.sampling.schedules import NoiseProcess
from slipcast_compiler.model.layers import AttentionLayer, FeedForwardLayer, attention_layers, feed_forward_layers
from slipcast_compiler.profile.observe import State, relative

Floats = npt.NDArray[np.float32]
Masks = dict[str, torch.Tensor]  # linear layer -> [rows or 1, units]

PROBES = 4  # random projections of each state; 16 states then give each head's energy within 18 % (one sigma)
# Heads times the denoiser's parameters, up to which each head is tried by itself: the reference model is at 1.8e9 and
# takes a minute; Stable Diffusion 1.5 is at 2.2e11, and would take hours.
EXACT_WORK = 10**10


@contextlib.contextmanager
def masked(module: nn.Module, masks: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Within it, the inputs of the linear layers named are multiplied by their masks, [rows or 1, units]."""

    def hook_for(mask: torch.Tensor) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0]
            factors = mask.repeat_interleave(x.shape[-1] // mask.shape[1], dim=1)
            return (x * factors[:, None], *args[1:])

        return hook

    handles = [module.get_submodule(name).register_forward_pre_hook(hook_for(mask)) for name, mask in masks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def taylor(
    module: nn.Module, sampling: Sampling, states: Sequence[State], clean: Mapping[int, torch.Tensor],
    sigmas: Sequence[float], advance: Callable[[int], None],
) -> dict[str, Floats]:  # fmt: skip
    """|dL/dm|, the first-order estimate of the loss's change without it (Michel et al., arXiv 1905.10650).

    L is the denoising loss: the mean squared error of the noise that is predicted in a reference latent `clean[image]`
    [1, c, h, w] noised to the state's sigma. Returns head.taylor/LAYER and neuron.taylor/LAYER, means over states.
    """
    heads, neurons = _head_masks(module), _neuron_masks(module)
    names = {**heads, **neurons}
    totals = {linear: np.zeros(mask.shape[1]) for linear, mask in names.items()}
    for i, state in enumerate(states):
        masks = {linear: mask.clone().requires_grad_() for linear, mask in names.items()}
        with torch.enable_grad(), masked(module, masks):
            loss = denoising_loss(module, sampling, state, clean[state.image], sigmas[state.evaluation], seed=i)
            slopes = torch.autograd.grad(loss, list(masks.values()))
        for total, slope in zip(totals.values(), slopes, strict=True):
            total += slope.abs()[0].double().numpy()
        advance(1)
    return _named(module, "taylor", {linear: total / len(states) for linear, total in totals.items()})


def denoising_loss(
    module: nn.Module, sampling: Sampling, state: State, clean: torch.Tensor, sigma: float, seed: int
) -> torch.Tensor:
    """Mean of |(D(x) - x0) / sigma|^2 for x = x0 noised to sigma: the error of eps, or of the velocity of a flow."""
    process = _without_clipping(sampling.noise)
    noise = torch.randn(clean.shape, generator=torch.Generator("cpu").manual_seed(seed))
    x = clean + sigma * noise if process.prediction != "flow" else (1 - sigma) * clean + sigma * noise
    conditioning = {name: value[-1:] for name, value in state.conditioning.items()}  # the prompt's, not the empty one's

    def predict(scaled: torch.Tensor, timestep: float) -> torch.Tensor:
        output: torch.Tensor = module(scaled, torch.tensor(timestep), return_dict=False, **conditioning)[0]
        return output

    denoised = Denoiser(process, sampling.lay(), predict)(x, sigma)
    loss: torch.Tensor = ((denoised - clean) / sigma).square().mean()
    return loss


def leave_one_out(
    module: nn.Module, sampling: Sampling, states: Sequence[State], batch: int, advance: Callable[[int], None]
) -> dict[str, Floats]:
    """The relative L2 error of the guided prediction without a head, mean over states: head.leave_one_out/LAYER."""
    masks = _head_masks(module)
    totals = {linear: np.zeros(mask.shape[1]) for linear, mask in masks.items()}
    for first in range(0, len(states), batch):
        chosen = states[first : first + batch]
        whole = guided_prediction(module, sampling, chosen)
        for linear, mask in masks.items():
            for head in range(mask.shape[1]):
                without = mask.clone()
                without[0, head] = 0
                with masked(module, {linear: without}):
                    found = guided_prediction(module, sampling, chosen)
                totals[linear][head] += float(relative(found, whole).double().sum())
                advance(len(chosen))
    return _named(module, "leave_one_out", {linear: total / len(states) for linear, total in totals.items()})


def projected_leave_one_out(
    module: nn.Module, sampling: Sampling, states: Sequence[State], advance: Callable[[int], None]
) -> dict[str, Floats]:
    """An estimate of leave_one_out for all heads at once, to first order in what a head contributes.

    Without head h the guided prediction changes by J_h = dg/dm_h. For v ~ N(0, 1) the mean of (v . J_h)^2 is |J_h|^2
    (Hutchinson's estimator), and one backward pass gives v . J_h of every head. On the reference model (8 states) it
    ranks heads as leave_one_out does at 0.994 in a 25th of the time; leave_one_out agrees with itself on the other half
    of the states at 0.979, so more states are worth more than exactness.
    """
    masks = _head_masks(module)
    totals = {linear: np.zeros(mask.shape[1]) for linear, mask in masks.items()}
    for i, state in enumerate(states):
        generator = torch.Generator("cpu").manual_seed(i)
        graded = {linear: mask.clone().requires_grad_() for linear, mask in masks.items()}
        with torch.enable_grad(), masked(module, graded):
            guided = guided_prediction(module, sampling, [state])
        energies = {linear: torch.zeros(mask.shape[1], dtype=torch.float64) for linear, mask in masks.items()}
        for _ in range(PROBES):
            probe = torch.randn(guided.shape, generator=generator)
            slopes = torch.autograd.grad(guided, list(graded.values()), probe, retain_graph=True)
            for energy, slope in zip(energies.values(), slopes, strict=True):
                energy += slope[0].double().square() / PROBES
        size = float(guided.detach().double().norm())
        for linear, energy in energies.items():
            totals[linear] += energy.sqrt().numpy() / size
        advance(1)
    return _named(module, "leave_one_out", {linear: total / len(states) for linear, total in totals.items()})


def guided_prediction(module: nn.Module, sampling: Sampling, states: Sequence[State]) -> torch.Tensor:
    """What the denoiser predicts for the states, with guidance where they have two rows: [states, c, h, w]."""
    rows = len(next(iter(states[0].conditioning.values()), states[0].sample))
    x = torch.cat([state.sample for state in states] * rows)
    timesteps = torch.tensor([state.timestep for state in states] * rows)
    conditioning = {
        name: torch.cat([state.conditioning[name][row : row + 1] for row in range(rows) for state in states])
        for name in states[0].conditioning
    }
    output: torch.Tensor = module(x, timesteps, return_dict=False, **conditioning)[0]
    if rows == 1:
        return output
    unconditional, conditional = output.chunk(2)
    guided: torch.Tensor = guide(conditional, unconditional, sampling.guidance_scale, sampling.guidance_rescale)
    return guided


def magnitude(module: nn.Module) -> dict[str, Floats]:
    """From the weights alone: |W_O W_V| of a head (Frobenius), |up| |down| of a neuron, its gate's row counted in."""
    found = {}
    for attention in attention_layers(module):
        value = _weight(module, attention.projections[2]).unflatten(0, (attention.heads, attention.head_dim))
        output = _weight(module, attention.output).unflatten(1, (attention.heads, attention.head_dim)).movedim(1, 0)
        # |W_O W_V|^2 = tr(W_O^T W_O W_V W_V^T), of which neither factor is larger than a head
        squares = ((output.mT @ output) * (value @ value.mT)).sum((1, 2))
        found[f"head.magnitude/{attention.name}"] = squares.clamp_min(0).sqrt().numpy()
    for layer in feed_forward_layers(module):
        up = _weight(module, layer.up).unflatten(0, (-1, layer.neurons)).square().sum((0, 2)).sqrt()
        found[f"neuron.magnitude/{layer.name}"] = (up * _weight(module, layer.down).norm(dim=0)).numpy()
    return found


def is_exact(module: nn.Module, asked: str) -> bool:
    """Whether leave_one_out tries each head by itself; see EXACT_WORK."""
    heads = sum(layer.heads for layer in attention_layers(module))
    parameters = sum(math.prod(parameter.shape) for parameter in module.parameters())
    return heads * parameters <= EXACT_WORK if asked == "auto" else asked == "exact"


def _weight(module: nn.Module, linear: str) -> torch.Tensor:
    weight: torch.Tensor = module.get_submodule(linear).weight.detach()
    return weight


def _head_masks(module: nn.Module) -> Masks:
    return {layer.output: torch.ones(1, layer.heads) for layer in attention_layers(module)}


def _neuron_masks(module: nn.Module) -> Masks:
    return {layer.down: torch.ones(1, layer.neurons) for layer in feed_forward_layers(module)}


def _named(module: nn.Module, criterion: str, scores: Mapping[str, Any]) -> dict[str, Floats]:
    """Scores by linear layer as tensors of the profile."""
    layers: list[tuple[str, AttentionLayer | FeedForwardLayer, str]] = [
        *(("head", layer, layer.output) for layer in attention_layers(module)),
        *(("neuron", layer, layer.down) for layer in feed_forward_layers(module)),
    ]
    return {
        f"{kind}.{criterion}/{layer.name}": scores[linear].astype(np.float32)
        for kind, layer, linear in layers if linear in scores
    }  # fmt: skip


def _without_clipping(process: NoiseProcess) -> NoiseProcess:
    """Where D is clipped there is no gradient."""
    return dataclasses.replace(process, clip_sample=None)
