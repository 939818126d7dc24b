"""A small checkpoint with random weights, and what a profile of it says."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from slipcast_compiler.model.layers import attention_layers, feed_forward_layers, linear_layers
from slipcast_compiler.model.rewrite import TENSORS, UNCHANGED, Denoiser, Rewrite
from slipcast_compiler.passes import Context
from slipcast_compiler.passes.apply import REPORT, _run
from slipcast_compiler.plan import Plan, make_plan
from slipcast_compiler.recipe.passes import PassesTable
from slipcast_compiler.recipe.reading import parse_recipe

SHAPES = Path("recipes/models/shapes")
RECIPE = """
name = "tiny"
model.path = "tiny"
sampling = {sampler = "ddim", steps = 2, guidance_scale = 1.5, width = 32, height = 32}
profile = {prompts = 24, batch = 24}
targets = [{engine = "onnxruntime"}]

[family]
templates = ["a {color} {shape} on a {background} background"]
slots.color = ["red", "green", "blue", "yellow"]
slots.shape = ["circle", "square", "star"]
slots.background = ["white", "black", "navy"]
"""


class Measured:
    """What passes read of a profile, computed from activations on random inputs."""

    digest = "0" * 64

    def __init__(self, module: torch.nn.Module) -> None:
        self.inputs: dict[str, torch.Tensor] = {}
        self._heads = {layer.name: layer.heads for layer in attention_layers(module)}
        self._neurons = {layer.name: layer.neurons for layer in feed_forward_layers(module)}
        for layer in linear_layers(module):
            module.get_submodule(layer.name).register_forward_pre_hook(self._hook(layer.name, layer.convolution))
        with torch.no_grad():
            module(*example(seed=5, batch=8))

    def _hook(self, name: str, convolution: bool) -> Callable[..., None]:
        def hook(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self.inputs[name] = (args[0].movedim(1, -1) if convolution else args[0]).flatten(0, -2).double()

        return hook

    def second_moment(self, name: str) -> np.ndarray[Any, Any]:
        z = self.inputs[name]
        moment: np.ndarray[Any, Any] = (z.T @ z / len(z)).float().numpy()
        return moment

    def heads(self, criterion: str) -> dict[str, np.ndarray[Any, Any]]:
        return {name: np.arange(count, dtype=np.float32) for name, count in self._heads.items()}

    def neurons(self, criterion: str) -> dict[str, np.ndarray[Any, Any]]:
        return {name: np.arange(count, dtype=np.float32) for name, count in self._neurons.items()}


def example(seed: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """sample, timestep and text."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, 4, 8, 8, generator=generator),
        torch.tensor([437.0]),
        torch.randn(batch, 32, 128, generator=generator),
    )


def write_tiny(folder: Path) -> Path:
    """A pipeline's directory: the shapes model's, with a small U-Net of random weights."""
    root = folder / "tiny"
    shutil.copytree(SHAPES, root, ignore=shutil.ignore_patterns("unet"))
    torch.manual_seed(0)
    diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=128, attention_head_dim=4,
        norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).save_pretrained(root / "unet")  # fmt: skip
    return root


def tiny_plan(folder: Path, *overrides: str) -> Plan:
    """A plan for it, written to `folder` where it is not there yet."""
    if not (folder / "tiny").exists():
        write_tiny(folder)
    return make_plan(parse_recipe(RECIPE, "recipe", overrides), folder)


def load(plan: Plan, rewrite: Rewrite = UNCHANGED) -> Any:
    """The denoiser in torch, rewritten."""
    module = diffusers.UNet2DConditionModel.from_pretrained(plan.checkpoint.root / "unet").eval()
    return Denoiser.of(plan.checkpoint, rewrite).load(module).requires_grad_(False)


class Bench:
    """Runs passes on the tiny checkpoint as a compile does."""

    def __init__(self, plan: Plan, root: Path) -> None:
        self.plan, self.task, self.root, self.progress = plan, plan.task, root, list[tuple[int, int]]()
        self.measured = Measured(load(plan))

    @property
    def context(self) -> Context:
        profile: Any = self.measured
        return Context(self.task, profile, lambda done, total: self.progress.append((done, total)))

    @property
    def denoiser(self) -> Denoiser:
        return Denoiser.of(self.plan.checkpoint, UNCHANGED)

    def run(self, name: str, before: Rewrite = UNCHANGED, **options: Any) -> tuple[Rewrite, Any]:
        """(what the cache would hold, the pass's report)."""
        out = Path(tempfile.mkdtemp(dir=self.root))
        chosen = PassesTable.model_validate({name: options}).chosen()[0][1]
        _run(name, chosen, self.context, before, out, self.context.advance)
        written = Rewrite(out / TENSORS) if (out / TENSORS).exists() else before
        return written, json.loads((out / REPORT).read_text())

    def load(self, rewrite: Rewrite = UNCHANGED) -> Any:
        """The rewritten denoiser in torch."""
        return load(self.plan, rewrite)
