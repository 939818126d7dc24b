"""Changed tensors give a module its structure, its weights, and the exported graph the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from slipcast.errors import NumericalError
from slipcast_compiler.export.component import write_component
from slipcast_compiler.model.checkpoint import Checkpoint
from slipcast_compiler.model.layers import attention_layers, feed_forward_layers, linear_layers
from slipcast_compiler.model.rewrite import UNCHANGED, Denoiser, Rewrite, fit, write_tensors

SHAPES = Path("recipes/models/shapes")
SIZES = {"latent_channels": 4, "text_width": 128, "text_length": 32, "latent_height": 8, "latent_width": 8}
HERE = "down_blocks.0.attentions.0"
ATTENTION, FEED_FORWARD = f"{HERE}.transformer_blocks.0.attn1", f"{HERE}.transformer_blocks.0.ff"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    root = tmp_path_factory.mktemp("model") / "m"
    shutil.copytree(SHAPES, root, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(0)
    diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=128, attention_head_dim=4,
        norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).save_pretrained(root / "unet")  # fmt: skip
    return Checkpoint(root, "m")


@pytest.fixture(scope="module")
def rewrite(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Rewrite:
    """Two of four heads, 48 neurons, and factors in place of a linear layer with a bias, of one without, and of a 1x1
    convolution: exact factors, so that the output is known."""
    rng, d = np.random.default_rng(0), Denoiser.of(checkpoint, UNCHANGED)
    weights: dict[str, Any] = {}
    for part in ("to_q", "to_k", "to_v"):
        weights[f"{ATTENTION}.{part}.weight"] = d.weight(f"{ATTENTION}.{part}.weight")[8:24]
    weights[f"{ATTENTION}.to_out.0.weight"] = d.weight(f"{ATTENTION}.to_out.0.weight")[:, 8:24]
    for kind in ("weight", "bias"):
        up = d.weight(f"{FEED_FORWARD}.net.0.proj.{kind}")
        weights[f"{FEED_FORWARD}.net.0.proj.{kind}"] = np.concatenate([up[:48], up[128 : 128 + 48]])
    weights[f"{FEED_FORWARD}.net.2.weight"] = d.weight(f"{FEED_FORWARD}.net.2.weight")[:, :48]
    for name, bias in ((f"{HERE}.transformer_blocks.0.attn2.to_q", False), (f"{HERE}.proj_in", True)):
        shape = d.module.get_submodule(name).weight.shape
        first, second = rng.standard_normal((6, shape[1])), rng.standard_normal((shape[0], 6))
        tail = tuple(shape[2:])
        weights[f"{name}.0.weight"] = (first / 8).reshape(*first.shape, *tail)
        weights[f"{name}.1.weight"] = (second / 2).reshape(*second.shape, *tail)
        if bias:
            weights[f"{name}.1.bias"] = d.weight(f"{name}.bias")
    return write_tensors(weights, UNCHANGED, tmp_path_factory.mktemp("rewrite") / "tensors.safetensors")


def _module(checkpoint: Checkpoint) -> Any:
    return diffusers.UNet2DConditionModel.from_pretrained(checkpoint.root / "unet").eval()


def _rewritten(checkpoint: Checkpoint, rewrite: Rewrite) -> torch.nn.Module:
    return Denoiser.of(checkpoint, rewrite).load(_module(checkpoint))


def _inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(3, 4, 8, 8, generator=generator),
        torch.tensor([17.0]),
        torch.randn(3, 32, 128, generator=generator),
    )


def test_the_rewritten_module_is_the_original_with_parts_masked(checkpoint: Checkpoint, rewrite: Rewrite) -> None:
    masked, tensors = _module(checkpoint), {name: weight.read() for name, weight in rewrite.weights().items()}
    with torch.no_grad():
        gone = masked.get_submodule(f"{ATTENTION}.to_out.0").weight
        gone[:, :8], gone[:, 24:] = 0, 0
        masked.get_submodule(f"{FEED_FORWARD}.net.2").weight[:, 48:] = 0
        for name in (f"{HERE}.transformer_blocks.0.attn2.to_q", f"{HERE}.proj_in"):
            layer = masked.get_submodule(name)
            first, second = (
                tensors[f"{name}.{i}.weight"].reshape(-1, n) for i, n in ((0, layer.weight.shape[1]), (1, 6))
            )
            layer.weight.copy_(torch.from_numpy(second @ first).reshape(layer.weight.shape))
        wanted, found = masked(*_inputs()).sample, _rewritten(checkpoint, rewrite)(*_inputs()).sample
        assert torch.allclose(found, wanted, atol=1e-6, rtol=0)
        assert not torch.allclose(found, _module(checkpoint)(*_inputs()).sample, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_the_export_is_the_rewritten_module(checkpoint: Checkpoint, rewrite: Rewrite, tmp_path: Path) -> None:
    write_component(checkpoint, "denoiser", SIZES, tmp_path, rewrite)
    names = ("sample", "timestep", "encoder_hidden_states")
    session = onnxruntime.InferenceSession(tmp_path / "denoiser.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {name: x.numpy() for name, x in zip(names, _inputs(), strict=True)})[0]
    with torch.no_grad():
        wanted = _rewritten(checkpoint, rewrite)(*_inputs()).sample.numpy()
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 1e-5
    shapes = {
        tuple(sorted(i.dims)) for i in onnx.load(tmp_path / "denoiser.onnx", load_external_data=False).graph.initializer
    }
    assert {(16, 32), (32, 96), (6, 32), (1, 1, 6, 32)} <= shapes  # smaller matrices, not zeros in large ones


def test_the_structure_is_read_off_the_shapes(checkpoint: Checkpoint, rewrite: Rewrite) -> None:
    denoiser = Denoiser.of(checkpoint, rewrite)
    heads = {layer.name: (layer.heads, layer.head_dim) for layer in attention_layers(denoiser.module)}
    neurons = {layer.name: layer.neurons for layer in feed_forward_layers(denoiser.module)}
    assert heads.pop(ATTENTION) == (2, 8)
    assert set(heads.values()) == {(4, 8), (4, 16)}
    assert neurons.pop(FEED_FORWARD) == 48
    assert set(neurons.values()) == {128, 256} or set(neurons.values()) == {128}
    assert all(parameter.device.type == "meta" for parameter in denoiser.module.parameters())
    factors = [layer for layer in linear_layers(denoiser.module) if layer.name.startswith(f"{HERE}.proj_in")]
    assert [(f.inputs, f.outputs, f.convolution) for f in factors] == [(32, 6, True), (6, 32, True)]
    assert denoiser.has(f"{HERE}.proj_in.1.bias")
    assert not denoiser.has(f"{HERE}.proj_in.0.bias")


def test_weights_are_the_newest(checkpoint: Checkpoint, rewrite: Rewrite) -> None:
    changed, whole = Denoiser.of(checkpoint, rewrite), Denoiser.of(checkpoint, UNCHANGED)
    name = f"{ATTENTION}.to_q.weight"
    np.testing.assert_array_equal(changed.weight(name), whole.weight(name)[8:24])
    np.testing.assert_array_equal(changed.weight("conv_in.weight"), whole.weight("conv_in.weight"))


def test_later_passes_write_over_earlier_ones(rewrite: Rewrite, tmp_path: Path) -> None:
    """Factors stand in for the matrix they replace; what no later pass touches stays."""
    name = f"{ATTENTION}.to_q"
    later = write_tensors(
        {
            f"{name}.0.weight": np.ones((3, 32)), f"{name}.1.weight": np.ones((16, 3)),
            f"{HERE}.proj_in.1.bias": np.ones(32),
        }, rewrite, tmp_path / "later.safetensors",
    )  # fmt: skip
    shapes = later.shapes()
    assert f"{name}.weight" not in shapes
    assert shapes[f"{name}.1.weight"] == (16, 3)
    assert later.weights()[f"{HERE}.proj_in.1.bias"].read().tolist() == [1.0] * 32
    assert set(rewrite.shapes()) - {f"{name}.weight"} <= set(shapes)
    assert rewrite.digest != later.digest
    assert UNCHANGED.digest is None


def test_heads_of_factorised_projections_are_counted(checkpoint: Checkpoint, rewrite: Rewrite, tmp_path: Path) -> None:
    shapes = {**rewrite.shapes(), f"{ATTENTION}.to_q.0.weight": (3, 32), f"{ATTENTION}.to_q.1.weight": (16, 3)}
    del shapes[f"{ATTENTION}.to_q.weight"]
    module = _module(checkpoint)
    fit(module, shapes)
    assert next(layer.heads for layer in attention_layers(module) if layer.name == ATTENTION) == 2


def test_row_33_a_weight_that_is_not_a_number_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(NumericalError, match=r"conv_in\.weight"):
        write_tensors({"conv_in.weight": np.array([np.nan])}, UNCHANGED, tmp_path / "t.safetensors")
    assert list(tmp_path.iterdir()) == []
