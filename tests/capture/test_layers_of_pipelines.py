"""Heads and neurons of all tiny pipelines' denoisers: what is removed is what was masked, whatever calls the module."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import PIPELINES, call_of, open_pipeline

from slipcast_compiler.capture.processing import call_pipeline
from slipcast_compiler.model.layers import layers_of, linear_layers
from slipcast_compiler.model.rewrite import UNCHANGED, Denoiser, Rewrite, load, write_tensors
from slipcast_compiler.passes.trial import tried_layers
from slipcast_compiler.passes.units import keep_units

NAMES = tuple(name for name in PIPELINES if name != "kolors")  # which needs sentencepiece, and has SDXL's U-Net
FAST = (
    "stable_diffusion_3", "flux", "flux_2_klein", "qwen_image", "lumina_2", "krea_2", "pixart_alpha", "sana",
    "hunyuan_dit", "aura_flow", "chroma", "ovis_image", "wan", "ltx",
)  # fmt: skip
SPANS = "its norm_q spans all heads, so that each depends on the others"
POOLED = "positional_embedding is a parameter of unknown use"
# What is left alone, and why: of attention, and of feed-forward modules.
LEFT_ALONE: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "wan": ({f"blocks.{i}.attn{j}": SPANS for i in (0, 1) for j in (1, 2)}, {}),
    "ltx": ({f"transformer_blocks.{i}.attn{j}": SPANS for i in (0, 1) for j in (1, 2)}, {}),
    "sana_sprint": ({f"transformer_blocks.{i}.attn{j}": SPANS for i in (0, 1) for j in (1, 2)}, {}),
    "hunyuan_dit": ({"time_extra_emb.pooler": POOLED}, {}),
    "deep_floyd": ({"add_embedding.pool": POOLED}, {}),
}
for name in ("wan_2_2", "wan_image", "wan_2_2_of_blocks"):
    LEFT_ALONE[name] = LEFT_ALONE["wan"]
NOTHING = ("kandinsky_2_2", "deep_floyd")  # can be removed: all blocks are of one kind
ADDED = "the text's keys and values are added to its own, without queries"


class EndError(BaseException):  # not an error of the pipeline, which is asked again then
    """Ends a pipeline at the first call of its denoiser."""


def _marked(names: Iterable[str]) -> list[Any]:
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in names]


def _denoiser(name: str) -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A pipeline's denoiser, nothing of it zero, and what it is called with first."""
    pipe, found = open_pipeline(name), list[Any]()
    module = next(part for part in (getattr(pipe, key, None) for key in ("transformer", "unet")) if part is not None)

    def hook(_: Any, args: Any, kwargs: Any) -> None:
        found.extend((args, kwargs))
        raise EndError

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad(), pytest.raises(EndError):
        call_pipeline(pipe, call_of(name, "a small red circle on white", 1))
    handle.remove()
    module, generator = copy.deepcopy(module).requires_grad_(False), torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if not parameter.any():  # as the last layer of a block is in training's beginning
            parameter.normal_(std=0.1, generator=generator)
    return module, *found


def _prediction(module: torch.nn.Module, args: Any, kwargs: Any) -> torch.Tensor:
    """The first tensor of what it returns."""
    with torch.no_grad():
        output = module(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values() if isinstance(output, Mapping) else output))
    return output


def _zero(module: torch.nn.Module, layer: Any, units: Sequence[int]) -> None:
    for place in layer.columns:
        module.get_submodule(place.linear).weight[:, place.places(units)] = 0


@pytest.mark.parametrize("name", _marked(name for name in NAMES if name not in NOTHING))
def test_what_is_removed_is_what_was_masked(name: str, tmp_path: Path) -> None:
    """A third of the heads of every layer, and then of its neurons, as passes remove them."""
    module, args, kwargs = _denoiser(name)
    found, masked, generator = layers_of(module), copy.deepcopy(module), torch.Generator().manual_seed(0)
    save_file({key: value.clone().contiguous() for key, value in module.state_dict().items()}, tmp_path / "original")
    weights, rewrite = Rewrite(tmp_path / "original").weights(), UNCHANGED
    for kind in ("attention", "feed_forward"):
        denoiser, tensors = Denoiser(copy.deepcopy(module), weights, rewrite), {}
        for layer, original in zip(getattr(denoiser.layers, kind), getattr(found, kind), strict=True):
            gone = torch.randperm(layer.units, generator=generator)[: -(-layer.units // 3)].tolist()
            if len(gone) < layer.units:
                kept = [unit for unit in range(layer.units) if unit not in gone]
                tensors |= keep_units(denoiser, layer, kept, None)
                _zero(masked, original, gone)
        rewrite = write_tensors(tensors, rewrite, tmp_path / kind)
    pruned = Denoiser(copy.deepcopy(module), weights, rewrite).load(copy.deepcopy(module))
    whole, wanted, removed = (_prediction(each, args, kwargs) for each in (module, masked, pruned))
    assert (removed - wanted).norm() < 1e-5 * wanted.norm()
    assert (wanted - whole).norm() > 1e-3 * whole.norm()
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in module.parameters())
    left = layers_of(pruned)
    for before, after in ((found.attention, left.attention), (found.feed_forward, left.feed_forward)):
        assert [layer.name for layer in before] == [layer.name for layer in after]
        assert all(a.units == b.units - -(-b.units // 3) or b.units == 1 for b, a in zip(before, after, strict=True))


@pytest.mark.parametrize("name", _marked(NAMES))
def test_one_call_finds_nothing_wrong(name: str) -> None:
    module, args, kwargs = _denoiser(name)
    assert tried_layers(module, lambda smaller: _prediction(smaller, args, kwargs)) == layers_of(module)


@pytest.mark.parametrize("name", _marked(NAMES))
def test_every_linear_layer_that_is_called_may_have_factors(name: str, tmp_path: Path) -> None:
    """Exact ones here: the matrix, after one that changes nothing."""
    module, args, kwargs = _denoiser(name)
    called: list[Any] = []
    with contextlib.ExitStack() as hooks:
        for layer in linear_layers(module):
            hook = module.get_submodule(layer.name).register_forward_pre_hook
            hooks.callback(hook(lambda *_, layer=layer: called.append(layer)).remove)
        wanted = _prediction(module, args, kwargs)
    tensors = {}
    for layer in called:
        linear: Any = module.get_submodule(layer.name)
        tail = (1, 1) if layer.convolution else ()
        tensors[f"{layer.name}.0.weight"] = torch.eye(layer.inputs).reshape(layer.inputs, layer.inputs, *tail).numpy()
        tensors |= {f"{layer.name}.1.{kind}": value.numpy() for kind, value in linear.named_parameters()}
    rewrite = write_tensors(tensors, UNCHANGED, tmp_path / "factors")
    load(factorised := copy.deepcopy(module), rewrite.weights())
    found = _prediction(factorised, args, kwargs)
    assert called and (found - wanted).norm() < 1e-5 * wanted.norm()
    assert layers_of(factorised).attention == layers_of(module).attention
    assert layers_of(factorised).unknown_attention == layers_of(module).unknown_attention


@pytest.mark.parametrize("name", _marked(NAMES))
def test_what_is_left_alone_is_said(name: str) -> None:
    """Every module of heads and every perceptron of a block is either known or named."""
    module = next(part for key in ("transformer", "unet") if (part := getattr(open_pipeline(name), key, None)))
    found = layers_of(module)
    attention, feed_forward = LEFT_ALONE.get(name, ({}, {}))
    of_blocks = {place for place, why in found.unknown_attention.items() if why == ADDED}
    assert bool(of_blocks) == (name in NOTHING)
    assert {place: why for place, why in found.unknown_attention.items() if place not in of_blocks} == attention
    assert found.unknown_feed_forward == feed_forward
    assert bool(found.attention or found.feed_forward) == (name not in NOTHING)
    assert layers_of(copy.deepcopy(module).to("meta")) == found  # no weight is read
