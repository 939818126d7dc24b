"""Noise levels that are found: on a model whose D is known, and once on the reference model, in its own process."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slipcast.bundle.manifest import Sampling
from slipcast.sampling.guidance import Guidance
from slipcast.sampling.samplers import SAMPLERS
from slipcast.sampling.schedules import NoiseProcess, from_sigmas, make_schedule
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.model.original import Drawing
from slipcast_compiler.model.rewrite import UNCHANGED
from slipcast_compiler.plan import make_plan
from slipcast_compiler.recipe.reading import parse_recipe
from slipcast_compiler.recipe.sampling import TimestepsTable
from slipcast_compiler.schedule import timesteps
from slipcast_compiler.schedule.timesteps import (
    Model,
    cheapest_path,
    choose_timesteps,
    descend,
    distance,
    from_noise,
    local_errors,
    search,
)

PROCESS = NoiseProcess(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
NOISE = np.random.default_rng(0).standard_normal((4, 2, 6, 6))
DETERMINISTIC = [name for name, each in SAMPLERS.items() if not each.stochastic and name != "dpm2"]


def known(sampler: str = "dpmpp_2m", steps: int = 5, **settings: Any) -> tuple[Model, list[int]]:
    """A model of data at -1 and 1, cell by cell, where D = tanh(x / sigma^2); and how many images each call saw."""
    sampling = Sampling(sampler=sampler, schedule="karras", steps=steps, guidance_scale=3.0, noise=PROCESS, **settings)
    seen: list[int] = []

    def evaluate(scaled: Any, timestep: float, _: float, both: bool) -> Any:
        seen.append(len(scaled))
        sigma = float(PROCESS.sigma_at(np.array([timestep]))[0])
        x = scaled * math.sqrt(1 + sigma**2)
        cond, uncond = ((x - np.tanh((x + shift) / max(sigma, 0.1) ** 2)) / sigma for shift in (0.2, 0.0))
        return cond, uncond if both else None

    return Model(sampling, evaluate, from_noise(sampling, NOISE)), seen


def test_a_remembered_run_is_the_run() -> None:
    model, seen = known()
    first = from_sigmas(PROCESS, make_schedule(PROCESS, "karras", 5).sigmas)
    lists = [first, from_sigmas(PROCESS, (*first.sigmas[:3], 0.9, 0.2, 0.0)), first, make_schedule(PROCESS, "beta", 5)]
    counts = []
    for schedule in lists:
        before = len(seen)
        states, _ = model.run(schedule, Guidance(3.0))
        fresh, _ = known()[0].run(schedule, Guidance(3.0))
        assert all(np.array_equal(a, b) for a, b in zip(states, fresh, strict=True))
        counts.append(len(seen) - before)
    assert counts == [5, 2, 2, 5]
    model.run(lists[-1], Guidance(3.0, interval=(0.5, 3.0)))  # another guidance is another run
    assert len(seen) > sum(counts)


def test_states_and_what_the_sampler_was_given_belong_together() -> None:
    model, _ = known("heun")
    schedule = make_schedule(PROCESS, "karras", 6, "heun")
    states, denoised = model.run(schedule, Guidance(1.0))
    assert len(states) == 7
    for x, sigma in zip(states[:-1], schedule.sigmas, strict=False):
        fresh, _ = known("heun")
        expected = fresh._evaluate(x / math.sqrt(1 + sigma**2), schedule.timestep(sigma), sigma, False)[0]
        np.testing.assert_allclose(denoised[sigma], x - sigma * expected)


def test_the_cheapest_path_is_that_of_trying_them_all() -> None:
    rng, last, steps = np.random.default_rng(1), 7, 4
    begin, costs = rng.random(last), np.full((last, last, last + 1), np.inf)
    for i, j in itertools.combinations(range(last + 1), 2):
        costs[: i + 1, i, j] = rng.random(i + 1)

    def cost(path: tuple[int, ...]) -> float:
        whole = begin[path[0]] + costs[path[0], path[0], path[1]]
        return float(whole + sum(costs[path[i - 1], path[i], path[i + 1]] for i in range(1, steps)))

    every = [(*inner, last) for inner in itertools.combinations(range(last), steps)]
    assert cheapest_path(begin, costs, steps) == list(min(every, key=cost))


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_local_errors_are_of_the_sampler_itself(sampler: str) -> None:
    """A step of the fine trajectory has no error, with the history it had; a longer one has."""
    model, _ = known(sampler, 8)
    fine = make_schedule(PROCESS, "karras", 8, sampler)
    states, denoised = model.run(fine, Guidance(3.0))
    costs = local_errors(sampler, states, denoised, fine.sigmas)
    again = sampler in ("pndm", "heun")  # they evaluate twice in a step, where one D is known
    assert costs[0, 0, 1] < (0.01 * costs[0, 0, 6] if again else 1e-9)
    assert np.isinf(costs[0, 3, 2]) and np.isinf(costs[4, 2, 6])
    if not again and sampler != "unipc":  # which corrects the step before
        assert max(costs[i - 1, i, i + 1] for i in range(1, 7)) < 1e-9
    assert costs[1, 2, 6] > 10 * max(costs[1, 2, 3], 1e-6)


def test_descent_finds_the_levels_of_the_least_error() -> None:
    wanted = np.log([6.0, 2.0, 0.7])

    def error(sigmas: tuple[float, ...]) -> float:
        assert list(sigmas) == sorted(sigmas, reverse=True) and sigmas[0] <= 14.0 and sigmas[-1] == 0
        return float(np.abs(np.log(sigmas[:-1]) - wanted).sum())

    least, found = descend(error, (10.0, 1.0, 0.3, 0.0), 14.0, lambda *_: None)
    assert least == error(found) < 0.5 * error((10.0, 1.0, 0.3, 0.0))
    assert descend(lambda _: 1.0, (14.0, 1.0, 0.0), 14.0, lambda *_: None) == (1.0, (14.0, 1.0, 0.0))


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler", "deis", "heun"])
def test_found_lists_are_nearer_to_the_fine_end(sampler: str) -> None:
    model, _ = known(sampler)
    found = search(model, "direct", 40, lambda *_: None)
    errors = {name: each["error"] for name, each in found["compared"].items()}
    usual = [error for name, error in errors.items() if name not in ("dp", "direct")]
    assert errors["direct"] <= min(errors.values())
    assert errors["direct"] < 0.9 * min(usual)
    if sampler == "euler":  # whose global error is near the sum of local ones; of others, a run has to tell
        assert errors["dp"] < np.median(usual)
    assert (found["error"], len(found["sigmas"]), len(found["timesteps"])) == (errors["direct"], 6, 5)
    other, _ = known(sampler)  # the error is what the bundle would have
    fine = other.run(make_schedule(PROCESS, "karras", 40, sampler), Guidance(3.0))[0][-1]
    end = other.run(from_sigmas(PROCESS, found["sigmas"], sampler), Guidance(3.0))[0][-1]
    assert distance(end - fine) == pytest.approx(found["error"])


def test_what_guidance_leaves_out_is_searched_with() -> None:
    """The fine end has guidance throughout, so leaving it out is an error that levels cannot wholly mend."""
    model, _ = known(guidance_interval=(0.5, 3.0))
    plain = search(known()[0], "dp", 40, lambda *_: None)
    assert search(model, "dp", 40, lambda *_: None)["error"] > plain["error"]


def _asked(prompts: int = 3) -> tuple[Drawing, TimestepsTable]:
    """What the stage is given of a recipe."""
    recipe = parse_recipe(
        'name = "x"\nmodel.path = "models/shapes"\n'
        'family.prompts = ["a red circle", "a blue star", "a green ring", "a pink cross"]\n'
        'targets = [{ engine = "onnxruntime" }]\n'
        f"sampling = {{ steps = 3, guidance_interval = [0.5, 50.0] }}\nreference.steps = 6\n"
        f'timesteps = {{ method = "direct", prompts = {prompts}, fine_steps = 6 }}\n',
        "x.toml",
    )
    assert recipe.timesteps
    return make_plan(recipe, Path("recipes")).drawing(recipe.timesteps.prompts), recipe.timesteps


@pytest.mark.slow
def test_the_stage_on_the_reference_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (drawing, table), cache = _asked(), Cache(tmp_path)
    assert len(drawing.prompts) == 3
    changed, found = choose_timesteps(drawing, table, UNCHANGED, cache, lambda *_: None)
    errors = {name: each["error"] for name, each in found["compared"].items()}
    assert errors["direct"] < min(error for name, error in errors.items() if name not in ("dp", "direct"))
    assert {"leading", "karras", "dp", "direct"} <= set(errors)
    assert changed.sigmas == tuple(found["sigmas"])
    assert (changed.schedule, len(changed.lay().timesteps)) == (None, 3)
    assert changed.requires == drawing.sampling.requires
    monkeypatch.setattr(timesteps, "run_isolated", None)  # it is not run again
    assert choose_timesteps(drawing, table, UNCHANGED, cache, lambda *_: None) == (changed, found)
    with pytest.raises(TypeError):
        choose_timesteps(*_asked(2), UNCHANGED, cache, lambda *_: None)


def test_images_in_parts_are_images_together(monkeypatch: pytest.MonkeyPatch) -> None:
    def bind(_: Any, prompts: list[str]) -> Any:
        rows = torch.tensor([float(len(prompt)) for prompt in prompts])[:, None]
        return lambda x, t, both: (x + rows, x - rows if both else None)

    monkeypatch.setattr(timesteps.original, "bind", bind)
    x, prompts = torch.arange(10.0).reshape(5, 2), ("a", "bb", "ccc", "dddd", "eeeee")
    for both in (False, True):
        whole, parts = (timesteps._bind(None, prompts, at_once)(x, 1.0, both) for at_once in (9, 2))
        assert torch.equal(whole[0], parts[0])
        assert (whole[1] is None) is (parts[1] is None) is not both
        assert not both or torch.equal(whole[1], parts[1])
