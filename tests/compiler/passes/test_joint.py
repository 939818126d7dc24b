"""Passes and the profile on joint attention and single-stream blocks, whose modules are called with random inputs."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from compiler.passes.joint import JOINT, MODELS, Measured, denoiser, inputs, predict
from slipcast.progress import silent
from slipcast_compiler.model.layers import AttentionLayer, layers_of
from slipcast_compiler.model.rewrite import UNCHANGED, Denoiser, Rewrite, write_tensors
from slipcast_compiler.passes import PASSES, Context, low_rank, micro
from slipcast_compiler.passes.micro import Gain
from slipcast_compiler.passes.units import keep_units, matrix, moment_of
from slipcast_compiler.profile import importance
from slipcast_compiler.profile.layers import PERCENTILE, LayerObserver
from slipcast_compiler.recipe.passes import PassesTable


@dataclass
class Bench:
    """Runs passes on a transformer with what was measured of it."""

    name: str
    module: torch.nn.Module
    measured: Measured
    folder: Path

    def run(self, name: str, before: Rewrite = UNCHANGED, **options: Any) -> tuple[Rewrite, Any]:
        ((_, chosen),) = PassesTable.model_validate({name: options}).chosen()
        profile: Any = self.measured
        task: Any = SimpleNamespace(evaluate=lambda module: module(**inputs(self.name, 0, 1, "meta")), target=None)
        result = PASSES[name].run(self.denoiser(before), Context(task, profile, silent), chosen)
        if not result.tensors:
            return before, result.report
        file = self.folder / f"{len(list(self.folder.iterdir()))}.safetensors"
        return write_tensors(result.tensors, before, file), result.report

    def denoiser(self, rewrite: Rewrite = UNCHANGED) -> Denoiser:
        return denoiser(self.module, self.folder, rewrite)

    def load(self, rewrite: Rewrite) -> torch.nn.Module:
        return self.denoiser(rewrite).load(copy.deepcopy(self.module))

    def error(self, rewrite: Rewrite) -> float:
        """Of the prediction, relative, on the inputs that were measured."""
        modules = self.module, self.load(rewrite)
        with torch.no_grad():
            pairs = [[predict(module, self.name, seed) for module in modules] for seed in range(Measured.STATES)]
        return float(np.mean([(found - wanted).norm() / wanted.norm() for wanted, found in pairs]))


@cache
def _bench(name: str) -> tuple[torch.nn.Module, Measured]:
    return (module := MODELS[name]()), Measured(module, name)


@pytest.fixture(scope="module", params=list(MODELS))
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(request.param, *_bench(request.param), tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=list(JOINT))
def joint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(request.param, *_bench(request.param), tmp_path_factory.mktemp(request.param))


def _joint(module: torch.nn.Module) -> AttentionLayer:
    return next(layer for layer in layers_of(module).attention if len(layer.columns) == 2)


def test_a_head_of_joint_attention_is_in_both_streams(joint: Bench) -> None:
    layer = _joint(joint.module)
    assert [place.linear.rpartition(".attn.")[2] for place in layer.columns] == ["to_out.0", "to_add_out"]
    tensors = keep_units(joint.denoiser(), layer, (0, 1, 3), None)
    assert {name for name in tensors if name.endswith("weight")} == {
        f"{layer.name}.{part}.weight"
        for part in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out")
    }
    assert all(len(value) == 24 for name, value in tensors.items() if "out" not in name)


def test_leave_one_out_is_what_is_lost_by_removing_a_head(bench: Bench) -> None:
    """Against the pruned module, one head of every layer."""
    for i, layer in enumerate(layers_of(bench.module).attention):
        head = i % layer.heads
        kept = [other for other in range(layer.heads) if other != head]
        tensors = keep_units(bench.denoiser(), layer, kept, None)
        pruned = bench.load(write_tensors(tensors, UNCHANGED, bench.folder / "one.safetensors"))
        errors = []
        for seed in range(Measured.STATES):
            with torch.no_grad():
                wanted, found = (predict(module, bench.name, seed, rows=1) for module in (bench.module, pruned))
            errors.append(float((found - wanted).norm() / wanted.norm()))
        assert bench.measured.heads("leave_one_out")[layer.name][head] == pytest.approx(np.mean(errors), rel=1e-3)
        assert np.mean(errors) > 1e-5


def test_activation_energy_is_the_norm_of_what_a_head_adds_to_both_streams(joint: Bench) -> None:
    layer, module, given = _joint(joint.module), joint.module, dict[str, list[torch.Tensor]]()
    handles = [
        module.get_submodule(place.linear).register_forward_pre_hook(
            lambda _, args, name=place.linear: given.setdefault(name, []).append(args[0])
        )
        for place in layer.columns
    ]
    with torch.no_grad():
        for seed in range(Measured.STATES):
            predict(module, joint.name, seed)
    for handle in handles:
        handle.remove()
    head = 2
    squares = torch.zeros(2 * Measured.STATES)
    for place in layer.columns:
        part = slice(head * layer.head_dim, (head + 1) * layer.head_dim)
        added = torch.cat(given[place.linear])[..., part] @ module.get_submodule(place.linear).weight[:, part].T
        squares += added.flatten(1).square().sum(1)
    wanted = np.percentile(squares.sqrt().numpy(), PERCENTILE)
    assert joint.measured.heads("activation_energy_percentile")[layer.name][head] == pytest.approx(wanted, rel=1e-3)


def test_magnitude_is_the_norm_over_all_streams(joint: Bench) -> None:
    layer = _joint(joint.module)
    part = slice(layer.head_dim, 2 * layer.head_dim)
    weight = lambda name: joint.module.get_submodule(f"{layer.name}.{name}").weight  # noqa: E731
    output = torch.cat([weight("to_out.0")[:, part], weight("to_add_out")[:, part]])
    value = torch.cat([weight("to_v")[part], weight("add_v_proj")[part]], 1)
    assert joint.measured.heads("magnitude")[layer.name][1] == pytest.approx(float((output @ value).norm()), rel=1e-4)


def test_taylor_is_the_slope_of_the_loss(bench: Bench) -> None:
    module = copy.deepcopy(bench.module).double()
    call = {name: x.double() for name, x in inputs(bench.name, 0, 1).items()}
    loss = lambda _: module(**call, return_dict=False)[0].square().mean()  # noqa: E731
    found = importance.taylor(module, loss, 1, lambda _: None)
    layers = layers_of(module)
    for kind, layer in (
        *(("head", each) for each in layers.attention),
        *(("neuron", each) for each in layers.feed_forward),
    ):
        scores = found[f"{kind}.taylor/{layer.name}"]
        unit, values = int(scores.argmax()), []
        for factor in (1.01, 0.99):
            mask = torch.ones(1, layer.units)
            mask[0, unit] = factor
            with torch.no_grad(), importance.masked(module, {layer: mask}):
                values.append(float(loss(0)))
        assert scores[unit] == pytest.approx(abs(values[0] - values[1]) / 0.02, rel=0.01)


def test_every_layer_is_measured(bench: Bench) -> None:
    layers = layers_of(bench.module)
    for criterion in ("activation_energy_percentile", "taylor", "leave_one_out", "magnitude"):
        heads = {layer.name: layer.heads for layer in layers.attention}
        assert {name: len(scores) for name, scores in bench.measured.heads(criterion).items()} == heads
        if criterion != "leave_one_out":
            neurons = {layer.name: layer.neurons for layer in layers.feed_forward}
            assert {name: len(scores) for name, scores in bench.measured.neurons(criterion).items()} == neurons
    assert all(np.isfinite(value).all() for value in bench.measured.found.values())


def test_a_module_inside_another_is_observed_by_its_own_calls(bench: Bench) -> None:
    """Whatever calls it: here a loop of another module's, twice as often."""

    class Twice(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.inner = module

        def forward(self, seed: int) -> None:
            for i in (0, 1):
                predict(self.inner, bench.name, seed + i)

    observer = LayerObserver(bench.module)
    with torch.no_grad(), observer.watching():
        Twice(bench.module)(0)
        Twice(bench.module)(2)
    assert {reservoir.seen for reservoir in observer.heads.values()} == {4 * 2}
    with torch.no_grad():
        predict(bench.module, bench.name, 0)
    assert {reservoir.seen for reservoir in observer.heads.values()} == {4 * 2}  # nobody watches any more


@pytest.mark.parametrize("criterion", ["leave_one_out", "second_order", "taylor", "magnitude"])
def test_the_correction_brings_the_prediction_nearer(bench: Bench, criterion: str) -> None:
    fitted, plain = (
        bench.run("prune_heads", ratio=0.4, criterion=criterion, correct=correct)[0] for correct in (True, False)
    )
    assert fitted.shapes() == plain.shapes()
    assert bench.error(fitted) < 0.95 * bench.error(plain)


def test_the_correction_of_each_stream_is_least_squares(joint: Bench) -> None:
    layer, kept = _joint(joint.module), (0, 3)
    profile: Any = joint.measured
    tensors = keep_units(joint.denoiser(), layer, kept, profile)
    for place in layer.columns:
        moment = moment_of(profile, layer, place).astype(np.float64)
        weight = joint.module.get_submodule(place.linear).weight.numpy().astype(np.float64)
        chosen = place.places(kept)
        wanted = weight @ moment[:, chosen] @ np.linalg.inv(moment[np.ix_(chosen, chosen)])
        found = tensors[f"{place.linear}.weight"]
        assert np.linalg.norm(found - wanted) < 0.05 * np.linalg.norm(wanted)
        assert np.linalg.norm(found - weight[:, chosen]) > 0.1 * np.linalg.norm(wanted)


def test_neurons_after_heads_of_the_same_projection(bench: Bench) -> None:
    """The second moment of what a single-stream block's output reads is that of the whole block; each pass finds its
    own part of it."""
    heads, report = bench.run("prune_heads", ratio=0.4, criterion="leave_one_out")
    assert report["left_alone"] == {} and 0.5 < report["retention"] < 0.7
    fitted, report = bench.run("prune_ffn", heads, ratio=0.5, criterion="second_order")
    plain, _ = bench.run("prune_ffn", heads, ratio=0.5, criterion="second_order", correct=False)
    assert report["left_alone"] == {} and report["retention"] == pytest.approx(0.5, abs=0.1)
    assert fitted.shapes() == plain.shapes()
    before, denoisers = bench.denoiser(heads), [bench.denoiser(rewrite) for rewrite in (fitted, plain)]
    for layer in before.layers.feed_forward:
        (place,) = layer.columns
        moment = bench.measured.second_moment(place.linear)[-layer.neurons :, -layer.neurons :].astype(np.float64)
        whole, *narrow = (matrix(each, place.linear)[:, place.start :] for each in (before, *denoisers))
        if narrow[1].shape == whole.shape:
            continue
        kept = [next(i for i in range(whole.shape[1]) if np.array_equal(whole[:, i], column)) for column in narrow[1].T]
        missing = [whole.astype(np.float64) for _ in narrow]
        for each, weight in zip(missing, narrow, strict=True):
            each[:, kept] -= weight
        lost = [np.einsum("oi,ij,oj->", each, moment, each) for each in missing]
        assert lost[0] < 0.95 * lost[1], layer.name
    assert bench.error(fitted) < 0.1
    left = layers_of(bench.load(fitted))
    assert [layer.heads for layer in left.attention] == [
        layer.heads for layer in layers_of(bench.load(heads)).attention
    ]  # fmt: skip
    assert sum(layer.neurons for layer in left.feed_forward) < sum(
        layer.neurons for layer in layers_of(bench.module).feed_forward
    )


def test_factors_of_every_linear_layer(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro, "measure", lambda *_: Gain(1.5, 1.0, 1.5, 1.5, 2000, 1000))
    monkeypatch.setattr(low_rank, "WORTH", 10.0)  # so that every layer is factorised
    found = [bench.run("low_rank", energy=energy) for energy in (0.9, 0.999, 0.99999)]
    linear = {layer.name for layer in layers_of(bench.module).linear}
    assert all(set(report["layers"]) == linear for _, report in found)
    assert all(layer["kept"] for layer in found[0][1]["layers"].values())
    errors = [bench.error(rewrite) for rewrite, _ in found]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02
