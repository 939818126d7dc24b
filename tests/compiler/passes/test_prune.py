"""prune_heads and prune_ffn: what is removed is what was chosen, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compiler.passes.tiny import Bench, example, tiny_plan
from slipcast.errors import RecipeError
from slipcast_compiler.model.layers import attention_layers, feed_forward_layers
from slipcast_compiler.model.rewrite import Denoiser
from slipcast_compiler.passes import prune_ffn
from slipcast_compiler.passes.units import columns
from slipcast_compiler.recipe.passes import PruneFFN


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("models")
    return Bench(tiny_plan(folder), folder)


def _output(module: torch.nn.Module, seed: int = 0) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = module(*example(seed)).sample
    return found


def _without(module: torch.nn.Module, layer: str, gone: np.ndarray) -> None:
    with torch.no_grad():
        module.get_submodule(layer).weight[:, gone] = 0


def test_removing_heads_is_zeroing_their_columns(bench: Bench) -> None:
    """Without the correction: the smaller module equals the whole one with those heads masked."""
    rewrite, report = bench.run("prune_heads", ratio=0.4, criterion="magnitude", correct=False)
    pruned, masked = bench.load(rewrite), bench.load()
    kept = {layer.name: layer.heads for layer in attention_layers(pruned)}
    assert len(set(kept.values())) > 1  # layers have counts of their own
    whole = attention_layers(masked)
    assert sum(kept.values()) == round(0.6 * sum(layer.heads for layer in whole))
    for layer in whole:
        gone = [head for head in range(layer.heads) if head not in report["layers"][layer.name]["kept"]]
        _without(masked, layer.columns[0].linear, columns(gone, layer.head_dim))
    assert torch.allclose(_output(pruned), _output(masked), atol=1e-6, rtol=0)
    assert not torch.allclose(_output(pruned), _output(bench.load()), atol=1e-4, rtol=0)


def test_removing_neurons_is_zeroing_their_columns(bench: Bench) -> None:
    rewrite, _ = bench.run("prune_ffn", ratio=0.4, criterion="magnitude", correct=False)
    pruned, masked, options = bench.load(rewrite), bench.load(), PruneFFN(criterion="magnitude")
    assert any(".ff.net.2.weight" in name for name in rewrite.shapes())
    for layer, left in zip(feed_forward_layers(masked), feed_forward_layers(pruned), strict=True):
        assert left.gated
        assert left.neurons % options.multiple == 0
        scores = prune_ffn._scores(bench.denoiser, bench.context, options, layer)
        _without(masked, layer.columns[0].linear, np.argsort(-scores, kind="stable")[left.neurons :])
    assert torch.allclose(_output(pruned), _output(masked), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["prune_heads", "prune_ffn"])
def test_the_correction_brings_every_layer_nearer(bench: Bench, name: str) -> None:
    """On the inputs that the moments were measured on, in the layers' own outputs."""
    plain, fitted = (
        Denoiser.of(bench.plan.checkpoint, bench.run(name, ratio=0.5, criterion="random", correct=correct)[0])
        for correct in (False, True)
    )
    whole = bench.denoiser
    layers = whole.layers.attention if name == "prune_heads" else whole.layers.feed_forward
    names = [layer.columns[0].linear for layer in layers]
    for layer in names:
        z, weight = bench.measured.inputs[layer].numpy(), whole.weight(f"{layer}.weight")
        narrow = plain.weight(f"{layer}.weight")
        if narrow.shape == weight.shape:
            continue
        kept = [next(i for i in range(weight.shape[1]) if np.array_equal(weight[:, i], column)) for column in narrow.T]
        lost = [np.square(z @ weight.T - z[:, kept] @ d.weight(f"{layer}.weight").T).sum() for d in (plain, fitted)]
        assert lost[1] < 0.95 * lost[0], layer


@pytest.mark.parametrize("criterion", ["leave_one_out", "second_order", "taylor", "magnitude", "random"])
def test_every_criterion_keeps_as_many(bench: Bench, criterion: str) -> None:
    pruned = bench.load(bench.run("prune_heads", ratio=0.25, criterion=criterion)[0])
    assert sum(layer.heads for layer in attention_layers(pruned)) == round(
        0.75 * sum(layer.heads for layer in attention_layers(bench.denoiser.module))
    )


def test_protected_layers_are_left_alone(bench: Bench) -> None:
    rewrite, _ = bench.run("prune_heads", ratio=0.25, criterion="random", protect=["*.attn2"])
    assert rewrite.shapes()
    assert not [name for name in rewrite.shapes() if ".attn2." in name]
    with pytest.raises(RecipeError, match=r"prune_heads\.protect"):
        bench.run("prune_heads", protect=["*.attn7"])


def test_the_second_pass_keeps_what_the_first_one_did(bench: Bench) -> None:
    first, _ = bench.run("prune_heads", ratio=0.4, criterion="magnitude")
    second, _ = bench.run("prune_ffn", first, ratio=0.4, criterion="second_order")
    assert second.shapes().items() > first.shapes().items()
    both = bench.load(second)
    assert [a.heads for a in attention_layers(both)] == [a.heads for a in attention_layers(bench.load(first))]
    assert torch.isfinite(_output(both)).all()
