"""The profile: every figure is compared with the same one taken the long way."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from conftest import call_cli, in_process, run_cli
from slipcast.bundle.profiles import (
    ProfileFile,
    is_profile,
    open_profile_file,
    render_summary,
    sparkline,
    summarise,
)
from slipcast.errors import ArtifactError, NumericalError, RecipeError
from slipcast.sampling.samplers import SAMPLERS
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.model import original
from slipcast_compiler.model.layers import attention_layers, feed_forward_layers, linear_layers
from slipcast_compiler.pages.profile import curves, figures, publish, ranked, render_page
from slipcast_compiler.plan import Plan, make_plan
from slipcast_compiler.profile import importance
from slipcast_compiler.profile import profile as profiles
from slipcast_compiler.profile.layers import PERCENTILE
from slipcast_compiler.profile.measure import chosen_states, evaluated_sigmas, measure
from slipcast_compiler.profile.observe import Observer, blocks
from slipcast_compiler.profile.profile import Profile, make_profile, open_profile, rank_correlations
from slipcast_compiler.profile.streaming import CAPACITY, Inputs, Reservoir
from slipcast_compiler.recipe.reading import parse_recipe, read_recipe

ROOT = Path(__file__).parents[2]
TINY = ("profile.prompts=4", "profile.states=2", "profile.batch=3", "sampling.steps=3")
ATTENTION = "up_blocks.1.attentions.1.transformer_blocks.0.attn2"
FEED_FORWARD = "down_blocks.1.attentions.0.transformer_blocks.0.ff"


def _plan(*overrides: str) -> Plan:
    recipe = read_recipe(ROOT / "recipes/shapes-circles.toml", (*TINY, "profile.leave_one_out='projected'", *overrides))
    return make_plan(recipe, ROOT / "recipes")


def _profiled(cache: Cache, *overrides: str, advance: Any = lambda *_: None) -> Profile:
    return _profile_of(_plan(*overrides), cache, advance)


def _profile_of(plan: Plan, cache: Cache, advance: Any = lambda *_: None) -> Profile:
    """As a compile has it made, but for the process of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiles, "run_isolated", in_process)
        return make_profile(plan.task.calibration, plan.recipe.profile, plan.recipe.name, cache, advance)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def profile(cache: Cache) -> Profile:
    return _profiled(cache)


@dataclasses.dataclass
class Captured:
    """The same run again, with everything kept: inputs of layers, outputs of blocks, predictions, states."""

    pipe: Any
    inputs: dict[str, list[torch.Tensor]]
    outputs: dict[str, list[list[torch.Tensor]]]  # by block, of each batch
    predictions: list[list[torch.Tensor]]
    timesteps: list[float]
    observer: Observer
    clean: torch.Tensor


@pytest.fixture(scope="module")
def captured() -> Captured:
    plan = _plan()
    pipe = original.open_pipeline(plan.checkpoint.root, plan.sampling, "float32")
    module = pipe.unet.requires_grad_(False)
    prompts, seeds = plan.task.calibration.prompts, plan.task.calibration.seeds
    inputs: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in linear_layers(module)}
    outputs: dict[str, list[list[torch.Tensor]]] = {name: [] for name, _ in blocks(module)}
    predictions: list[list[torch.Tensor]] = []
    timesteps: list[float] = []
    for name, kept in inputs.items():
        module.get_submodule(name).register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0].clone()))
    for name, block in blocks(module):
        block.register_forward_hook(
            lambda _, __, out, name=name: outputs[name][-1].append(out if torch.is_tensor(out) else out[0])
        )
    module.register_forward_hook(lambda _, args, out: predictions[-1].append(out[0]))
    module.register_forward_hook(lambda _, args, out: timesteps.append(float(args[1])))
    sigmas = evaluated_sigmas(plan.sampling)
    observer = Observer(module, len(sigmas), True, chosen_states(4, len(sigmas), 2), lambda _: None)
    clean = []
    with torch.no_grad(), observer.watching():
        for first, count in ((0, 3), (3, 1)):
            for kept in (*outputs.values(), predictions):
                kept.append([])
            observer.begin(first, count)
            noise, generators = original.draw_noise(pipe, plan.original.size, seeds[first : first + count])
            text = [str(prompt) for prompt in prompts[first : first + count]]
            clean.append(original.sample_latents(pipe, plan.sampling, text, noise, generators))
    for layer in module.modules():
        layer._forward_hooks.clear()
        layer._forward_pre_hooks.clear()
    return Captured(pipe, inputs, outputs, predictions, timesteps[: len(sigmas)], observer, torch.cat(clean))


def _tokens(captured: Captured, name: str) -> np.ndarray[Any, Any]:
    every = []
    for x in captured.inputs[name]:
        conv = isinstance(captured.pipe.unet.get_submodule(name), torch.nn.Conv2d)
        x = x.permute(0, 2, 3, 1) if conv else x
        every.append(x.reshape(-1, x.shape[-1]).numpy().astype(np.float64))
    return np.concatenate(every)


def test_second_moments_and_ranges_are_those_of_the_activations(profile: Profile, captured: Captured) -> None:
    shared = profile.file.record.shared_inputs
    for layer in linear_layers(captured.pipe.unet):
        tokens = _tokens(captured, layer.name)
        moment, (low, high) = profile.second_moment(layer.name), profile.ranges(layer.name)
        assert moment.shape == (layer.inputs, layer.inputs) and moment.dtype == np.float32
        expected = tokens.T @ tokens / len(tokens)
        assert np.abs(moment - expected).max() < 1e-4 * np.abs(expected).max(), layer.name
        assert np.allclose(low, tokens.min(0), atol=1e-4) and np.allclose(high, tokens.max(0), atol=1e-4)
    self_attention = ATTENTION.replace("attn2", "attn1")
    assert shared[f"{self_attention}.to_k"] == shared[f"{self_attention}.to_v"] == f"{self_attention}.to_q"
    assert f"{ATTENTION}.to_q" not in shared  # the latent's, where to_k reads the text
    assert f"{self_attention}.to_out.0" not in shared


def test_tensors_of_another_time_are_not_taken_for_shared() -> None:
    first, second = (dataclasses.replace(layer, inputs=2) for layer in linear_layers(torch.nn.Sequential(
        torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))))  # fmt: skip
    inputs = Inputs()
    x = torch.ones(3, 2)
    inputs.add(first, x)
    del x  # its id is free for the next tensor
    inputs.add(second, torch.full((3, 2), 2.0))
    assert inputs.shared() == {}
    assert np.array_equal(dict(inputs.results())["second_moment/1"], np.full((2, 2), 4.0))


def test_activation_energy_is_the_norm_of_what_a_unit_adds(profile: Profile, captured: Captured) -> None:
    unet = captured.pipe.unet
    layer = next(layer for layer in attention_layers(unet) if layer.name == ATTENTION)
    weight = unet.get_submodule(layer.columns[0].linear).weight
    rows = torch.cat([x.unflatten(-1, (layer.heads, -1)) for x in captured.inputs[layer.columns[0].linear]])
    energies = [
        (rows[:, :, head] @ weight[:, head * layer.head_dim : (head + 1) * layer.head_dim].T).flatten(1).norm(dim=1)
        for head in range(layer.heads)
    ]
    expected = np.percentile(torch.stack(energies).numpy(), PERCENTILE, axis=1)
    assert np.allclose(profile.heads("activation_energy_percentile")[ATTENTION], expected, rtol=1e-3)

    down = unet.get_submodule(f"{FEED_FORWARD}.net.2").weight
    rows = torch.cat(captured.inputs[f"{FEED_FORWARD}.net.2"])
    added = (rows[:, :, 7, None] * down[:, 7]).flatten(1).norm(dim=1)
    found = profile.neurons("activation_energy_percentile")[FEED_FORWARD]
    assert found[7] == pytest.approx(np.percentile(added.numpy(), PERCENTILE), rel=1e-3)


def test_curves_over_the_steps(profile: Profile, captured: Captured) -> None:
    def change(a: torch.Tensor, b: torch.Tensor) -> list[float]:
        return [float((x - y).norm() / y.norm()) for x, y in zip(a, b, strict=True)]

    steps = profile.steps
    for name, batches in captured.outputs.items():
        for i in range(2):
            expected = np.mean([value for batch in batches for value in change(batch[i + 1], batch[i])])
            assert steps["feature_change"][name][i] == pytest.approx(expected, rel=1e-3)
    for i in range(3):
        gaps = [gap for batch in captured.predictions for gap in change(*batch[i].chunk(2))]
        assert steps["guidance_gap"][i] == pytest.approx(np.mean(gaps), rel=1e-3)
    assert steps["timesteps"].tolist() == captured.timesteps


def test_states_are_points_of_the_trajectories(captured: Captured) -> None:
    states, prompts = captured.observer.states, _plan().task.calibration.prompts
    assert [(state.image, state.evaluation) for state in states] == [(0, 0), (1, 2)]
    for state in states:
        prediction = captured.predictions[0][state.evaluation]  # 3 unconditional rows, then 3 conditional ones
        without, given = prediction[state.image], prediction[state.image + 3]
        with torch.no_grad():
            found = importance.guided_prediction(captured.pipe.unet, _plan().sampling, [state])[0]
            text = captured.pipe.encode_prompt([str(prompts[state.image])], "cpu", 1, True)
        assert torch.allclose(found, without + 4.0 * (given - without), atol=1e-3)
        assert torch.allclose(state.conditioning["encoder_hidden_states"], torch.cat(text[1::-1]), atol=1e-5)
        assert state.timestep == captured.timesteps[state.evaluation]


def _leave_one_out(captured: Captured) -> dict[str, Any]:
    return importance.leave_one_out(captured.pipe.unet, _predict(captured), 2, 2, lambda _: None)


def _predict(captured: Captured) -> Any:
    unet, sampling, states = captured.pipe.unet, _plan().sampling, captured.observer.states
    return lambda chosen: importance.guided_prediction(unet, sampling, [states[i] for i in chosen])


def test_leave_one_out_is_brute_force(captured: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against zeroed columns of the weight, one state at a time, and guidance written out."""
    unet, states = captured.pipe.unet, captured.observer.states
    layer = next(layer for layer in attention_layers(unet) if layer.name == ATTENTION)
    monkeypatch.setattr(importance, "attention_layers", lambda _: [layer])
    with torch.no_grad():
        found = _leave_one_out(captured)[f"head.leave_one_out/{ATTENTION}"]

        def predict(state: Any) -> torch.Tensor:
            text = state.conditioning["encoder_hidden_states"]
            assert text.shape[0] == 2 and not torch.equal(text[0], text[1])
            without, given = unet(state.sample.repeat(2, 1, 1, 1), state.timestep, text).sample
            return without + 4.0 * (given - without)

        weight = unet.get_submodule(layer.columns[0].linear).weight
        for head in (0, 5):
            errors, kept = [], weight.detach().clone()
            columns = slice(head * layer.head_dim, (head + 1) * layer.head_dim)
            for state in states:
                whole = predict(state)
                weight[:, columns] = 0
                errors.append(float((predict(state) - whole).norm() / whole.norm()))
                weight.copy_(kept)
            assert found[head] == pytest.approx(np.mean(errors), rel=1e-3)
            assert found[head] > 1e-3


@pytest.mark.slow
def test_projected_leave_one_out_ranks_as_the_exact_one(captured: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = captured.pipe.unet
    some = [layer for layer in attention_layers(unet) if "attn2" in layer.name]
    monkeypatch.setattr(importance, "attention_layers", lambda _: some)
    with torch.no_grad():
        exact = _leave_one_out(captured)
    projected = importance.projected_leave_one_out(unet, _predict(captured), 2, lambda _: None)
    assert list(exact) == list(projected)
    pooled = [np.concatenate(list(found.values())) for found in (exact, projected)]
    assert spearmanr(*pooled).statistic > 0.95
    assert 0.7 < np.median(pooled[1] / pooled[0]) < 1.4  # it is the same quantity, too


def test_taylor_is_the_slope_of_the_loss(captured: Captured) -> None:
    """Against a central difference, in float64 so that the difference has digits left."""
    unet, sampling = captured.pipe.unet, _plan().sampling
    sigmas = evaluated_sigmas(sampling)
    state = captured.observer.states[0]
    clean = captured.clean[state.image : state.image + 1]

    def loss_of(i: int) -> torch.Tensor:
        return importance.denoising_loss(unet, sampling, state, clean, sigmas[state.evaluation], seed=i)

    def loss(layer: Any, unit: int, factor: float) -> float:
        mask = torch.ones(1, layer.units)
        mask[0, unit] = factor
        with torch.no_grad(), importance.masked(unet, {layer: mask}):
            return float(loss_of(0).double())

    found = importance.taylor(unet, loss_of, 1, lambda _: None)

    layer = next(layer for layer in attention_layers(unet) if layer.name == ATTENTION)
    scores = found[f"head.taylor/{ATTENTION}"]
    head = int(scores.argmax())
    slope = (loss(layer, head, 1.1) - loss(layer, head, 0.9)) / 0.2
    assert scores[head] == pytest.approx(abs(slope), rel=0.03)
    feed_forward = feed_forward_layers(unet)[-1]
    scores = found[f"neuron.taylor/{feed_forward.name}"]
    neuron = int(scores.argmax())
    slope = (loss(feed_forward, neuron, 1.1) - loss(feed_forward, neuron, 0.9)) / 0.2
    assert scores[neuron] == pytest.approx(abs(slope), rel=0.03)


def test_the_denoising_loss_is_that_of_the_noise(captured: Captured) -> None:
    """For a model of eps: the mean squared error of its own output, at the timestep of the state."""
    sampling, state = _plan().sampling, captured.observer.states[0]
    sigma, clean = evaluated_sigmas(sampling)[state.evaluation], captured.clean[:1]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(9))
    x = (clean + sigma * noise) / np.sqrt(1 + sigma**2)
    with torch.no_grad():
        found = importance.denoising_loss(captured.pipe.unet, sampling, state, clean, sigma, seed=9)
        text = state.conditioning["encoder_hidden_states"][1:]
        predicted = captured.pipe.unet(x, state.timestep, text).sample
    assert float(found) == pytest.approx(float((predicted - noise).square().mean()), rel=1e-3)


def test_magnitude_is_the_norm_of_the_weights(profile: Profile, captured: Captured) -> None:
    unet = captured.pipe.unet
    layer = next(layer for layer in attention_layers(unet) if layer.name == ATTENTION)
    part = slice(layer.head_dim, 2 * layer.head_dim)
    product = (
        unet.get_submodule(layer.columns[0].linear).weight[:, part]
        @ unet.get_submodule(f"{ATTENTION}.to_v").weight[part]
    )
    assert profile.heads("magnitude")[ATTENTION][1] == pytest.approx(float(product.norm()), rel=1e-4)
    up, down = (unet.get_submodule(f"{FEED_FORWARD}.net.{part}").weight for part in ("0.proj", "2"))
    neurons = down.shape[1]
    expected = float(torch.cat([up[3], up[neurons + 3]]).norm() * down[:, 3].norm())
    assert profile.neurons("magnitude")[FEED_FORWARD][3] == pytest.approx(expected, rel=1e-4)


def test_every_layer_has_every_criterion(profile: Profile, captured: Captured) -> None:
    heads = {layer.name: layer.heads for layer in attention_layers(captured.pipe.unet)}
    neurons = {layer.name: layer.neurons for layer in feed_forward_layers(captured.pipe.unet)}
    for criterion in ("activation_energy_percentile", "taylor", "leave_one_out", "magnitude"):
        assert {name: len(scores) for name, scores in profile.heads(criterion).items()} == heads
        if criterion != "leave_one_out":
            assert {name: len(scores) for name, scores in profile.neurons(criterion).items()} == neurons
    for ask, kind in ((profile.heads, "head"), (profile.neurons, "neuron")):
        with pytest.raises(RecipeError, match=f"no {kind} criterion 'entropy'"):
            ask("entropy")


def test_what_is_kept_does_not_grow_with_samples(captured: Captured) -> None:
    observer, pipe, plan = captured.observer, captured.pipe, _plan()

    def size() -> int:
        reservoirs = [*observer.layers.heads.values(), *observer.layers.neurons.values()]
        states = sum(state.sample.nbytes for state in observer.states)
        return observer.layers.inputs.nbytes + sum(each.nbytes for each in reservoirs) + states

    before, seen = size(), observer.layers.heads[ATTENTION].seen
    with torch.no_grad(), observer.watching():
        for first in (100, 104):
            observer.begin(first, 4)
            noise, generators = original.draw_noise(pipe, plan.original.size, range(4))
            original.sample_latents(pipe, plan.sampling, ["a red ring"] * 4, noise, generators)
    assert observer.layers.heads[ATTENTION].seen == seen + 2 * 4 * 2 * 3  # batches, images, rows of each, steps
    assert size() == before


def test_a_reservoir_is_a_fair_sample_of_fixed_size() -> None:
    reservoir = Reservoir(1)
    values = np.arange(20 * CAPACITY, dtype=np.float32)
    for part in np.split(values[:, None], 40):
        reservoir.add(part)
    assert reservoir.seen == len(values)
    for percent in (10, 50, 90):
        assert float(reservoir.percentile(percent)[0]) == pytest.approx(
            percent / 100 * len(values), abs=0.1 * len(values)
        )
    few = Reservoir(1)
    few.add(values[:11, None])
    assert float(few.percentile(90)[0]) == 9  # exact as long as all of them are kept


def test_a_profile_is_kept_and_its_digest_tells_what_went_in(cache: Cache, profile: Profile, tmp_path: Path) -> None:
    assert _profiled(cache, advance=lambda *_: pytest.fail("measured again")).digest == profile.digest
    again = _profiled(Cache(tmp_path))
    assert again.folder != profile.folder
    assert again.digest == profile.digest  # the same to the last bit
    record = profile.file.record
    for flipped in (
        record.model_copy(update={"inputs": record.inputs | {"seeds": [1, 2, 3, 4]}}),
        record.model_copy(update={"tensors_sha256": "0" * 64}),
    ):
        assert flipped.digest != record.digest


@pytest.mark.parametrize(
    "override",
    ["profile.prompts=5", "profile.seeds=2", "profile.states=3", "profile.batch=2", "profile.leave_one_out='exact'",
     "sampling.steps=4", "sampling.guidance_scale=3.0", "sampling.width=32", "family.seed=1"],
)  # fmt: skip
def test_row_29_every_input_is_in_the_key(override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def get(_: Cache, kind: str, inputs: dict[str, Any], build: Any) -> Path:
        asked.append(inputs)
        raise InterruptedError

    monkeypatch.setattr(Cache, "get", get)
    for plan in (_plan(), _plan(override)):
        with pytest.raises(InterruptedError):
            _profile_of(plan, Cache(tmp_path))
    assert asked[0] != asked[1]


def test_row_32_nothing_is_chosen_by_too_few_prompts(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "slipcast"):
        few = _profiled(cache, "profile.prompts=3", "profile.states=1", "sampling.steps=1")
    assert "from 3 calibration prompts only" in caplog.text
    for ask in (
        lambda: few.heads("taylor"), lambda: few.neurons("taylor"),
        lambda: few.second_moment(f"{ATTENTION}.to_q"), lambda: few.ranges(f"{ATTENTION}.to_q"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=r"too few prompts(.|\n)*at least 4(.|\n)*got: +3"):
            ask()
    assert few.heads("magnitude")  # which needs none
    assert few.steps["feature_change"]["mid_block"].shape == (0,)
    assert render_page(few.file) and render_summary(summarise(few.file))


def test_row_33_nan_names_the_layer(tmp_path: Path) -> None:
    model = tmp_path / "shapes"
    shutil.copytree(ROOT / "recipes/models/shapes", model)
    unet = diffusers.UNet2DConditionModel.from_pretrained(model / "unet")
    bad = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"  # up_blocks come first in the module's order
    with torch.no_grad():
        unet.get_submodule(bad).weight[0, 0] = float("nan")
    unet.save_pretrained(model / "unet")
    plan = _plan("profile.batch=4", f"model.path='{model}'")
    with pytest.raises(NumericalError, match=rf"^{bad}: NaN or infinity in its output"):
        measure(plan.task.calibration, plan.recipe.profile, tmp_path / "out.safetensors", lambda *_: None)
    assert not (tmp_path / "out.safetensors").exists()


def test_prompts_and_seeds_are_not_those_of_the_evaluation() -> None:
    for first in (0, 1000, 2**27 - 1):
        plan = _plan("profile.prompts=1000", "profile.seeds=2", f"evaluate.seed={first}")
        drawing = plan.task.calibration
        prompts, seeds = drawing.prompts, drawing.seeds
        assert plan.family
        assert set(prompts) == set(plan.family.calibration) and len(seeds) == len(prompts) == 2 * len(set(prompts))
        evaluated = {(first + i) % 2**32 for i in range(2 * plan.recipe.evaluate.images)}
        assert len({seed % 2**32 for seed in seeds} - evaluated) == len(seeds)
    few, more = (_plan(f"profile.prompts={n}").task.calibration.prompts for n in (4, 12))
    assert more[:4] == few


def test_states_are_spread_over_the_trajectory() -> None:
    assert chosen_states(16, 20, 4) == [(0, 2), (1, 7), (2, 12), (3, 17)]
    for images, evaluations, count in ((4, 3, 2), (2, 3, 100), (3, 2, 4), (4, 2, 8), (16, 20, 16), (1, 7, 5)):
        states = chosen_states(images, evaluations, count)
        assert len(set(states)) == len(states) == min(count, images * evaluations)
        assert all(image < images and evaluation < evaluations for image, evaluation in states)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_evaluations_are_counted_for_every_sampler(sampler: str, captured: Captured) -> None:
    sampling = _plan().sampling.model_copy(update={"sampler": sampler, "schedule": "linspace"})
    calls: list[float] = []
    handle = captured.pipe.unet.register_forward_hook(lambda _, args, __: calls.append(float(args[1])))
    noise, generators = original.draw_noise(captured.pipe, (32, 32), [1])
    with torch.no_grad():
        original.sample_latents(captured.pipe, sampling, ["a red ring"], noise, generators)
    handle.remove()
    sigmas, schedule = evaluated_sigmas(sampling), sampling.lay()
    assert calls == pytest.approx([schedule.timestep(sigma) for sigma in sigmas], rel=1e-5)


@pytest.mark.slow
def test_an_unconditional_model_is_profiled_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=16, layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "m")
    text = f'name = "u"\nmodel.path = {str(tmp_path / "m")!r}\ntargets = [{{ engine = "onnxruntime" }}]\n'
    text += "[sampling]\nsampler = 'ddpm'\nsteps = 2\nguidance_scale = 1.0\n[profile]\nprompts = 5\nstates = 2\n"
    plan, cache = make_plan(parse_recipe(text, "u.toml"), tmp_path), Cache(tmp_path / "cache")
    made = make_profile(plan.task.calibration, plan.recipe.profile, "u", cache, lambda *_: None)  # in a process
    assert made.file.record.peak_memory_mb > 100
    assert made.file.record.leave_one_out == "exact"
    assert {name: len(scores) for name, scores in made.heads("leave_one_out").items()} == {
        layer.name: layer.heads for layer in attention_layers(unet)
    }
    assert made.steps["guidance_gap"].shape == (0,) and made.steps["feature_change"]["mid_block"].shape == (1,)
    assert min(scores.min() for scores in made.heads("taylor").values()) > 0
    assert "5 seeds" in render_page(made.file)


def test_a_published_profile_is_whole_or_refused(profile: Profile, tmp_path: Path) -> None:
    out = tmp_path / "profiles" / "circles"
    publish(profile.file, out)
    publish(profile.file, out)  # over itself
    assert sorted(file.name for file in out.iterdir()) == ["profile.html", "profile.json", "profile.safetensors"]
    assert is_profile(out) and open_profile(out).digest == profile.digest
    tensors = out / "profile.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    with pytest.raises(ArtifactError, match="its digest differs"):
        open_profile(out)
    (out / "profile.json").write_text("{}")
    with pytest.raises(ArtifactError, match="not a profile's record"):
        open_profile(out)
    with pytest.raises(ArtifactError, match="not a profile"):
        open_profile(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").touch()
    with pytest.raises(RecipeError, match="exists and is not a profile"):
        publish(profile.file, other)
    assert (other / "precious").exists()


def test_the_commands(tmp_path: Path, cache: Cache, profile: Profile) -> None:
    out = tmp_path / "p"
    settings = [word for each in (*TINY, "profile.leave_one_out=projected") for word in ("--set", each)]
    recipe, known = str(ROOT / "recipes/shapes-circles.toml"), ("--cache", str(cache.root))
    arguments = ("profile", recipe, "-o", str(out), *known, *settings)
    done = call_cli(*arguments, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["output"] == str(out) and document["leave_one_out"] == "projected"
    assert open_profile(out).digest == profile.digest
    assert "profile ..." in done.stderr
    shown = call_cli("inspect", str(out), "--json")
    assert {"output": str(out), **json.loads(shown.stdout)} == document
    assert f"{ATTENTION}  " in call_cli("inspect", str(out)).stdout
    assert run_cli("inspect", str(out), PYTHONPATH=str(_no_torch(tmp_path))).returncode == 0
    (out / "profile.safetensors").write_bytes(b"")
    damaged = call_cli("inspect", str(out))
    assert damaged.returncode == 4 and "its digest differs" in damaged.stderr
    (out / "profile.json").unlink()
    refused = call_cli(*arguments, cwd=tmp_path)
    assert refused.returncode == 2 and "is not a profile" in refused.stderr


def _no_torch(folder: Path) -> Path:
    (folder / "thin").mkdir()
    (folder / "thin" / "torch.py").write_text("raise ImportError('the runtime has no torch')")
    return folder / "thin"


def test_the_summary_and_the_page_show_what_was_measured(profile: Profile) -> None:
    summary = summarise(profile.file)
    scores = profile.heads("taylor")[ATTENTION]
    assert summary["heads"]["quantiles"]["taylor"][ATTENTION] == pytest.approx(
        np.quantile(scores, (0, 0.25, 0.5, 0.75, 1)), rel=1e-4
    )
    assert summary["heads"]["count"] == 160
    text = render_summary(summary)
    for shown in ("4 images of 4 prompts", ATTENTION, "guidance gap", profile.digest[:16], "rank correlation"):
        assert shown in text
    page = render_page(profile.file)
    assert page.count('class="cell"') == 4 * 160
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    drawn = figures(profile.file)
    assert drawn.heat["taylor"].count('class="cell"') == 160
    levels = ranked(profile.heads("taylor"))
    pooled = np.concatenate(list(profile.heads("taylor").values()))
    assert (np.argsort(np.concatenate(list(levels.values()))) == np.argsort(pooled, kind="stable")).all()
    assert levels[ATTENTION] == pytest.approx(
        [np.mean(pooled < score) * 160 / 159 for score in profile.heads("taylor")[ATTENTION]]
    )
    assert drawn.changes and drawn.gap
    assert [plot.count('<g class="series-') for plot in (drawn.changes, drawn.gap)] == [7, 1]


def test_figures_of_little() -> None:
    assert ranked({"a": np.array([2.0], np.float32)}) == {"a": [0.0]}
    assert curves({}, np.zeros(0, np.float32), "nothing") is None
    assert curves({"a": np.zeros(1, np.float32), "b": np.zeros(1, np.float32)}, np.zeros(1, np.float32), "flat")
    assert sparkline([]) == "" and sparkline([0.0, 1.0]) == "▁█"


def test_rank_correlations_are_made_with_the_profile(profile: Profile) -> None:
    rising = np.arange(5, dtype=np.float32)
    found = rank_correlations({"a": rising, "b": rising**3, "c": -rising, "d": np.zeros(5, np.float32)})
    assert found == {"b a": 1, "c a": -1, "c b": -1, "d a": 0, "d b": 0, "d c": 0}
    kept = profile.file.record.rank_correlations
    assert kept == {kind: rank_correlations(profile.file.pooled(kind)) for kind in ("head", "neuron")}
    assert summarise(profile.file)["heads"]["spearman"] == kept["head"]
    assert len(kept["head"]) == 6


def test_blocks_follow_the_number_in_their_names(profile: Profile, tmp_path: Path) -> None:
    names = ["steps/blocks.10", "steps/blocks.2", "steps/a"]
    entry = next(iter(profile.file.entries.values()))
    some = ProfileFile(profile.folder, open_profile_file(profile.folder).record, dict.fromkeys(names, entry))
    assert list(some.group("steps")) == ["a", "blocks.2", "blocks.10"]
