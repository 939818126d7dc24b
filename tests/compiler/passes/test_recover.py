"""Distillation on calibration trajectories brings a damaged denoiser back, and never sees a held-out prompt."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from compiler.passes.tiny import Bench, tiny_plan
from slipcast.errors import NumericalError, RecipeError
from slipcast_compiler.model import original
from slipcast_compiler.model.layers import attention_layers, linear_layers
from slipcast_compiler.model.rewrite import Denoiser, Rewrite
from slipcast_compiler.passes import recover
from slipcast_compiler.passes.trainable import LORA_RANK, LowRankChange, RoundedWeight, prepare, round_input, weights
from slipcast_compiler.passes.trajectories import GuidedStates, record


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("models")
    return Bench(tiny_plan(folder), folder)


@pytest.fixture(scope="module")
def damaged(bench: Bench) -> Rewrite:
    """Half of the heads are gone, and nothing made up for them."""
    rewrite, _ = bench.run("prune_heads", ratio=0.5, criterion="random", correct=False)
    return rewrite


def _held_out_error(bench: Bench, rewrite: Rewrite) -> float:
    """On trajectories of prompts that no pass has seen."""
    pipe = original.open_pipeline(bench.plan.checkpoint.root, bench.plan.sampling, "float32")
    assert bench.plan.family
    images, task = [(prompt, 7) for prompt in bench.plan.family.held_out], bench.task
    states = record(pipe, task.calibration, task.batch, images, lambda count: None)
    return recover.error(GuidedStates(states, bench.load(rewrite), bench.plan.sampling), 8)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "learning_rate"), [("full", 1e-4), ("lora", 1e-3)])
def test_the_error_falls(bench: Bench, damaged: Rewrite, method: str, learning_rate: float) -> None:
    rewrite, report = bench.run("recover", damaged, steps=30, learning_rate=learning_rate, method=method)
    assert report["error_after"] < 0.85 * report["error_before"]
    assert _held_out_error(bench, rewrite) < 0.9 * _held_out_error(bench, damaged)
    assert [a.heads for a in attention_layers(bench.load(rewrite))] == [
        a.heads for a in attention_layers(bench.load(damaged))
    ]
    done, totals = zip(*bench.progress[-20:], strict=True)
    assert done[-1] == totals[-1]
    assert list(done) == sorted(done)
    changed = {name for name, x in rewrite.weights().items() if not _same(bench, damaged, name, x.read())}
    matrices = {f"{layer.name}.weight" for layer in linear_layers(bench.load(damaged))}
    assert changed == matrices if method == "lora" else matrices < changed


def _same(bench: Bench, before: Rewrite, name: str, now: np.ndarray[Any, Any]) -> bool:
    return np.array_equal(Denoiser.of(bench.plan.checkpoint, before).weight(name), now)


def test_a_lora_is_of_low_rank(bench: Bench, damaged: Rewrite) -> None:
    rewrite, _ = bench.run("recover", damaged, steps=5, learning_rate=1e-3, method="lora")
    name = "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight"
    change = rewrite.weights()[name].read() - bench.denoiser.weight(name)
    values = np.linalg.svd(change, compute_uv=False)
    assert values[LORA_RANK - 1] > 1e-6
    assert values[LORA_RANK] < 1e-3 * values[0]


def test_the_same_seed_gives_the_same_weights(bench: Bench, damaged: Rewrite) -> None:
    first, second, other = (
        bench.run("recover", damaged, steps=4, learning_rate=1e-4, seed=seed)[0] for seed in (0, 0, 1)
    )
    assert first.digest == second.digest != other.digest


def test_the_best_weights_are_kept(bench: Bench, damaged: Rewrite) -> None:
    """Where training only does damage, nothing is changed, and it is over early."""
    untouched, report = bench.run("recover", damaged, steps=40, batch=1, learning_rate=0.1)
    assert untouched == damaged
    assert report["error_after"] == report["error_before"] < min(report["errors"][1:])
    assert report["steps"] < 40


def test_an_unchanged_denoiser_is_left_alone(bench: Bench) -> None:
    untouched, report = bench.run("recover", steps=2)
    assert untouched.file is None
    assert report["error_before"] < 1e-5


def test_held_out_prompts_are_never_read(bench: Bench, damaged: Rewrite, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = original.sample_latents

    def spy(pipe: Any, sampling: Any, prompts: Any, *rest: Any) -> Any:
        asked.extend(prompts)
        return real(pipe, sampling, prompts, *rest)

    monkeypatch.setattr("slipcast_compiler.passes.trajectories.sample_latents", spy)
    bench.run("recover", damaged, steps=1)
    training, validation = recover.split(bench.task.images)
    assert sorted(asked) == sorted(prompt or "" for prompt, _ in training + validation)
    assert set(asked) <= set(bench.plan.family.calibration)
    assert not set(asked) & set(bench.plan.family.held_out)


def test_training_and_validation_share_no_prompt(bench: Bench) -> None:
    training, validation = recover.split(tiny_plan(bench.plan.folder, "profile.seeds=3").task.images)
    assert not {prompt for prompt, _ in training} & {prompt for prompt, _ in validation}
    assert len({seed for _, seed in training + validation}) == 72
    assert [len(part) for part in (training, validation)] == [54, 18]
    with pytest.raises(RecipeError, match="too few"):
        recover.split(tiny_plan(bench.plan.folder, "profile.prompts=1").task.images)


def test_states_are_the_originals_predictions(bench: Bench) -> None:
    """On every evaluation of the sampler, in whatever batches."""
    pipe = original.open_pipeline(bench.plan.checkpoint.root, bench.plan.sampling, "float32")
    images = recover.split(bench.task.images)[0]
    states = record(pipe, bench.task.calibration, bench.task.batch, images, lambda count: None)
    assert len(states) == 2 * len(images)
    assert states.prediction.shape == (len(states), 2, 4, 8, 8)
    chosen = torch.tensor([1, 4])
    with torch.no_grad():
        again = states.predict(pipe.unet, chosen)
    assert torch.allclose(again, states.prediction[chosen], atol=1e-5)
    assert (again[:, 0] - again[:, 1]).abs().max() > 1e-3  # unconditional and conditional are told apart
    alone = record(pipe, bench.task.calibration, 1, images, lambda count: None)
    for i in range(len(images)):
        here, there = states.image == i, alone.image == i
        assert torch.allclose(states.prediction[here], alone.prediction[there], atol=1e-4)
        assert torch.allclose(states.text[i], alone.text[i], atol=1e-5)


@pytest.mark.parametrize("steps", [1, 3])
def test_row_33_a_loss_that_is_not_finite_stops_it(bench: Bench, damaged: Rewrite, steps: int) -> None:
    with pytest.raises(NumericalError, match="the loss is not finite at step 1") as caught:
        bench.run("recover", damaged, steps=steps, learning_rate=1e30)
    assert "learning_rate" in str(caught.value)


@pytest.mark.slow
def test_training_with_rounding_loses_less_to_rounding(bench: Bench) -> None:
    """What is reported is the error with everything rounded; the unchanged denoiser's own is not 0 then."""
    rewrite, report = bench.run("recover", steps=20, learning_rate=1e-5, fake_quant=True)
    assert report["error_after"] < report["error_before"]
    again = bench.run("recover", rewrite, steps=1, learning_rate=1e-12, fake_quant=True)[1]
    assert again["error_before"] == pytest.approx(report["error_after"], rel=1e-3)
    row = rewrite.weights()["mid_block.attentions.0.proj_in.weight"].read()[0]
    steps = row / (np.abs(row).max() / 127)
    assert np.abs(steps - steps.round()).max() > 0.1  # what is returned is not rounded


def test_rounded_weights_are_int8_and_gradients_pass() -> None:
    weight = torch.randn(5, 3, 1, 1, requires_grad=True)
    rounded = RoundedWeight()(weight)
    for row, original_row in zip(rounded.detach().flatten(1), weight.detach().flatten(1), strict=True):
        steps = row / (original_row.abs().max() / 127)
        assert torch.allclose(steps, steps.round(), atol=1e-3)
        assert (row - original_row).abs().max() <= original_row.abs().max() / 127 / 2 * 1.01
    rounded.sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert not RoundedWeight()(torch.zeros(2, 3)).any()


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (2.0, 3.0), (-5.0, -4.0), (0.0, 0.0)])
def test_rounded_inputs_have_256_steps_with_zero_among_them(low: float, high: float) -> None:
    x = torch.linspace(low, high, 10_000, requires_grad=True)
    (rounded,) = round_input(torch.nn.Identity(), (x,))
    step = (max(high, 0) - min(low, 0)) / 255
    assert len(rounded.unique()) <= 256
    assert (rounded - x).abs().max() <= step * 1.01 / 2 + 1e-7
    assert round_input(torch.nn.Identity(), (torch.zeros(3),))[0].tolist() == [0, 0, 0]


def test_what_is_prepared_keeps_its_names(bench: Bench) -> None:
    module = bench.load()
    before = weights(module)
    assert before.keys() == dict(module.named_parameters()).keys()
    trained = prepare(module, lora=True, fake_quant=True, seed=0)
    after = weights(module)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {p for p in module.parameters() if p.requires_grad} == set(trained)
    assert sum(isinstance(each, LowRankChange) for each in module.modules()) == len(linear_layers(bench.load()))


def test_the_cache_key_has_what_the_trajectories_depend_on(bench: Bench) -> None:
    changes = ((), ("sampling.steps=3",), ("sampling.width=64",), ("profile.prompts=3",), ("profile.seed=1",),
               ("family.seed=3",))  # fmt: skip
    found = [recover.reads(tiny_plan(bench.plan.folder, *change).task) for change in changes]
    assert all(found.count(each) == 1 for each in found)
