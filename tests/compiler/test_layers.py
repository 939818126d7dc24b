"""What is a layer and what is none, on modules made for it; tests/capture/test_layers_of_pipelines.py has models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import nn

from slipcast_compiler.model.layers import layers_of
from slipcast_compiler.model.rewrite import fit
from slipcast_compiler.model.units import Factors, Slice, matrix_size


class Perceptron(nn.Module):
    """Of two layers and what is between them."""

    def __init__(self, between: Any, hidden: int = 24, read: int | None = None) -> None:
        super().__init__()
        self.inner, self.outer, self.between = nn.Linear(8, hidden), nn.Linear(read or hidden, 8), between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outer: torch.Tensor = self.outer(self.between(self.inner(x)))
        return outer


class Conditioned(Perceptron):
    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * scale


class Parted(nn.Module):
    """Gates that lie beside their neurons, not behind them all."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., ::2] * x[..., 1::2].sigmoid()


class Halves(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return first * second.sigmoid()


class Normalised(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:])


def _blocks(*modules: nn.Module) -> nn.Module:
    root = nn.Module()
    root.blocks = nn.ModuleList(modules)
    return root


def test_a_perceptron_without_a_gate_and_with_one() -> None:
    found = layers_of(_blocks(Perceptron(nn.GELU()), Perceptron(Halves(), 48, 24), nn.Sequential(
        nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8))))  # fmt: skip
    assert [(layer.name, layer.neurons, layer.gated) for layer in found.feed_forward] == [
        ("blocks.0", 24, False), ("blocks.1", 24, True), ("blocks.2", 16, False),
    ]  # fmt: skip
    assert found.feed_forward[1].rows == (Slice("blocks.1.inner", 1), Slice("blocks.1.inner", 1, 24))
    assert found.unknown_feed_forward == {}


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (Perceptron(Normalised()), "removing a neuron changes the others"),
        (Perceptron(Parted(), 48, 24), "removing a neuron changes the others"),
        (Perceptron(nn.LayerNorm(24)), "between.weight is a parameter of unknown use"),
        (Conditioned(nn.GELU()), "it does not run by itself at another size"),
    ],
)
def test_a_perceptron_whose_neurons_are_not_apart(module: nn.Module, why: str) -> None:
    found = layers_of(_blocks(module))
    assert found.feed_forward == () and list(found.unknown_feed_forward) == ["blocks.0"]
    assert why in found.unknown_feed_forward["blocks.0"]


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 12)),  # to another width: an embedding
        nn.Sequential(nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 8, 1)),  # mixes pixels
        Factors(nn.Linear(8, 4, bias=False), nn.Linear(4, 8)),  # one layer, factorised
    ],
)
def test_what_is_no_perceptron_is_not_spoken_of(module: nn.Module) -> None:
    found = layers_of(_blocks(module))
    assert found.feed_forward == () and found.unknown_feed_forward == {}


def test_trying_a_perceptron_leaves_it_as_it_was() -> None:
    """No hook of it is called, no random number of the process drawn, and no parameter touched."""
    module, called = Perceptron(nn.GELU()), list[int]()
    module.between.register_forward_hook(lambda *_: called.append(1))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    assert len(layers_of(_blocks(module)).feed_forward) == 1
    assert torch.equal(torch.rand(1), wanted) and not called
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"qk_norm": "layer_norm_across_heads", "kv_heads": 4}, "its norm_q spans all heads"),
        ({"qk_norm": "l2"}, "what its norm_q is a norm of cannot be seen"),
        ({"added_kv_proj_dim": 16}, "the text's keys and values are added to its own, without queries"),
    ],
)
def test_attention_that_is_left_alone(changed: dict[str, Any], why: str) -> None:
    found = layers_of(_blocks(Attention(16, heads=4, dim_head=4, **changed)))
    assert found.attention == () and why in found.unknown_attention["blocks.0"]


def test_attention_with_a_parameter_of_its_own_is_left_alone() -> None:
    module = Attention(16, heads=4, dim_head=4)
    module.register_parameter("temperature", nn.Parameter(torch.ones(4)))
    assert layers_of(_blocks(module)).unknown_attention == {"blocks.0": "temperature is a parameter of unknown use"}
    assert list(layers_of(_blocks(nn.MultiheadAttention(16, 4))).unknown_attention) == ["blocks.0"]


def test_shared_key_heads_are_one_with_their_queries() -> None:
    (layer,) = layers_of(_blocks(Attention(16, heads=6, kv_heads=2, dim_head=4, bias=True))).attention
    assert (layer.heads, layer.group, layer.head_dim) == (2, 3, 4)
    sizes = {place.linear.rpartition(".")[2]: place.size for place in layer.rows}
    assert sizes == {"to_q": 12, "to_k": 4, "to_v": 4} and layer.columns == (Slice("blocks.0.to_out.0", 12),)
    (uneven,) = layers_of(_blocks(Attention(16, heads=6, kv_heads=4, dim_head=4))).unknown_attention.values()
    assert uneven == "its query heads: 6 rows or columns are not 4 equal parts"


def test_a_perceptron_beside_attention_is_none_of_its_layers() -> None:
    block = nn.Module()
    block.attention, block.ff = Attention(16, heads=4, dim_head=4), FeedForward(16)
    found = layers_of(_blocks(block))
    assert [layer.name for layer in (*found.attention, *found.feed_forward)] == ["blocks.0.attention", "blocks.0.ff"]


def test_fit_counts_heads_and_neurons_of_one_projection() -> None:
    """rows = 3 x 4 x heads + 2 x neurons, columns = 4 x heads + neurons: both are found from the two."""
    module = nn.Module()
    module.heads, module.head_dim, module.inner_dim, module.mlp_hidden_dim = 4, 4, 16, 40
    module.to_qkv_mlp_proj, module.to_out = nn.Linear(16, 48 + 80), nn.Linear(16 + 40, 16)
    root = _blocks(module)

    def units() -> list[int]:
        found = layers_of(root)
        return [layer.units for layer in (*found.attention, *found.feed_forward)]

    assert units() == [4, 40]
    for heads, neurons in ((3, 40), (4, 24), (2, 9)):
        fit(root, {
            "blocks.0.to_qkv_mlp_proj.weight": (12 * heads + 2 * neurons, 16),
            "blocks.0.to_out.weight": (16, 4 * heads + neurons),
        })  # fmt: skip
        assert (module.heads, module.inner_dim, module.mlp_hidden_dim) == (heads, 4 * heads, neurons)
        assert units() == [heads, neurons]


def test_a_factorised_layer_is_as_large_as_what_it_stands_for() -> None:
    layer = Factors(nn.Linear(8, 4, bias=False), nn.Linear(4, 12))
    assert matrix_size(layer) == (12, 8) and layer.weight is layer[1].weight
    assert matrix_size(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 12))) is None
