"""One call finds the layers of which nothing can be removed, whatever their structure says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import MochiTransformer3DModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import nn

from compiler.passes.joint import flux, inputs, stable_diffusion_3
from slipcast_compiler.model.layers import layers_of
from slipcast_compiler.model.rewrite import UNCHANGED, Denoiser
from slipcast_compiler.passes.trial import tried_layers


class AllHeads:
    """A processor that wants all heads there."""

    def __call__(self, attention: Any, x: torch.Tensor, **_: Any) -> torch.Tensor:
        values: torch.Tensor = attention.to_v(x).reshape(*x.shape)
        return attention.to_out[0](values)


class Mixed:
    """A processor in which heads depend on one another, which neither shapes nor parameters show."""

    def __call__(self, attention: Any, x: torch.Tensor, **_: Any) -> torch.Tensor:
        values: torch.Tensor = attention.to_v(x).unflatten(-1, (attention.heads, -1))
        return attention.to_out[0]((values - values.mean(-2, keepdim=True)).flatten(-2))


class Blocks(nn.Module):
    def __init__(self, *processors: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.ModuleList([Attention(16, heads=4, dim_head=4, processor=each), FeedForward(16, activation_fn="gelu")])
            for each in processors
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for attention, feed_forward in self.blocks:
            x = x + attention(x)
            x = x + feed_forward(x)
        return x


@pytest.mark.parametrize(
    ("processor", "why"),
    [(AllHeads(), "it does not run"), (Mixed(), "removing a unit is not masking it: a relative error of 0.")],
)
def test_a_layer_that_is_not_what_it_seems(processor: Any, why: str) -> None:
    module, x = Blocks(AttnProcessor2_0(), processor, AttnProcessor2_0()), torch.randn(2, 5, 16)
    assert layers_of(module).unknown_attention == {}
    found = tried_layers(module, lambda smaller: smaller(x))
    assert [layer.name for layer in found.attention] == ["blocks.0.0", "blocks.2.0"]
    assert list(found.unknown_attention) == ["blocks.1.0"] and why in found.unknown_attention["blocks.1.0"]
    assert found.feed_forward == layers_of(module).feed_forward
    assert Denoiser(module, {}, UNCHANGED, found).layers == found


def test_on_the_meta_device_it_is_tried_that_it_runs() -> None:
    module = Blocks(AttnProcessor2_0(), AllHeads(), Mixed()).to("meta")
    found = tried_layers(module, lambda smaller: smaller(torch.empty(2, 5, 16, device="meta")))
    assert list(found.unknown_attention) == ["blocks.1.0"]


def test_a_model_that_knows_the_number_of_heads_outside_of_attention() -> None:
    """Mochi learns the frequencies of positions for each head, as a parameter of its own."""
    torch.manual_seed(0)
    module = MochiTransformer3DModel(
        num_attention_heads=4, attention_head_dim=8, num_layers=1, pooled_projection_dim=16, in_channels=4,
        text_embed_dim=16, time_embed_dim=4, max_sequence_length=8,
    ).eval()  # fmt: skip
    given = {
        "hidden_states": torch.randn(1, 4, 2, 8, 8), "encoder_hidden_states": torch.randn(1, 8, 16),
        "timestep": torch.rand(1), "encoder_attention_mask": torch.ones(1, 8, dtype=torch.bool),
    }  # fmt: skip
    found = tried_layers(module, lambda smaller: smaller(**given)[0])
    assert [layer.name for layer in layers_of(module).attention] == ["transformer_blocks.0.attn1"]
    assert "it does not run (The size of tensor" in found.unknown_attention["transformer_blocks.0.attn1"]
    assert found.attention == () and found.feed_forward == layers_of(module).feed_forward


def test_joint_attention_runs_with_fewer_heads() -> None:
    module, given = stable_diffusion_3().to("meta"), inputs("stable_diffusion_3", 0, device="meta")
    assert tried_layers(module, lambda smaller: smaller(**given)[0]) == layers_of(module)


def test_projections_that_diffusers_has_fused() -> None:
    """Which it keeps beside those that they were made of."""
    module, given = flux(), inputs("flux", 0)
    for attention in [each for each in module.modules() if hasattr(each, "fuse_projections")]:
        attention.fuse_projections()
    found = tried_layers(module, lambda smaller: smaller(**given)[0])
    assert found == layers_of(module) and len(found.attention) == 3
    assert {place.linear.rpartition(".")[2] for place in found.attention[0].rows} >= {"to_qkv", "to_added_qkv"}
    cross = Blocks(AttnProcessor2_0())
    cross.blocks[0][0] = Attention(16, cross_attention_dim=16, heads=4, dim_head=4)
    cross.blocks[0][0].fuse_projections()
    (layer,) = layers_of(cross).attention
    assert [(place.linear.rpartition(".")[2], place.start) for place in layer.rows if place.start] == [("to_kv", 16)]


def test_an_evaluation_that_fails_as_it_is_is_the_callers() -> None:
    def fail(_: nn.Module) -> torch.Tensor:
        raise ValueError("no such file")

    with pytest.raises(ValueError, match="no such file"):
        tried_layers(Blocks(AttnProcessor2_0()), fail)
