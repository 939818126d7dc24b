"""What is measured of captured pipelines' denoisers, against the pipelines themselves."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_rewritten_programs import DENOISERS, given_of
from tiny import open_pipeline

from slipcast.errors import NumericalError
from slipcast.progress import silent
from slipcast_compiler.capture.call import make_call
from slipcast_compiler.capture.generalise import without_insides
from slipcast_compiler.capture.record import capture
from slipcast_compiler.capture.summary import module_of
from slipcast_compiler.model.layers import layers_of
from slipcast_compiler.profile.importance import masked
from slipcast_compiler.profile.profile import Profile, open_profile, write_profile
from slipcast_compiler.profile.program import ProgramCalibration, measure_program
from slipcast_compiler.profile.states import State, draw, evaluations_of
from slipcast_compiler.recipe.recipe import ProfileTable

FAST = "stable_diffusion_3"
PROMPTS = ("a small red circle on white", "a blue star")
NAMES = [name if name == FAST else pytest.param(name, marks=pytest.mark.slow) for name in (*DENOISERS, "z_image")]


def _denoisers(name: str) -> tuple[str, ...]:
    return DENOISERS.get(name, ("transformer",))


def _components(pipe: Any) -> dict[str, torch.nn.Module]:
    return {name: each for name, each in pipe.components.items() if isinstance(each, torch.nn.Module)}


def _states(name: str) -> tuple[Any, list[State]]:
    """Of every evaluation, in order."""
    pipe = open_pipeline(name)
    program = without_insides(capture(pipe, make_call(pipe, given_of(name), PROMPTS[0], 1)))
    evaluations = evaluations_of(program, _denoisers(name))
    return pipe, draw(program, _components(pipe), evaluations, evaluations, lambda: None)


def _given_to_scheduler(pipe: Any, name: str, step: int) -> torch.Tensor:
    """What the pipeline itself gives its scheduler."""
    found, usual = list[torch.Tensor](), pipe.scheduler.step

    @functools.wraps(usual)
    def stepped(model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(model_output.clone())
        return usual(model_output, *args, **kwargs)

    pipe.scheduler.step = stepped
    try:
        with torch.no_grad():
            pipe(**make_call(pipe, given_of(name), PROMPTS[0], 1))
    finally:
        del pipe.scheduler.step
    return found[step]


@pytest.mark.parametrize("name", NAMES)
def test_a_state_is_what_the_scheduler_is_given(name: str) -> None:
    """At every step, and without some heads at the first and the last: later ones have another latent then."""
    pipe, states = _states(name)
    components = _components(pipe)
    for step, state in enumerate(states):
        state.check(components)
        wanted = _given_to_scheduler(pipe, name, step)
        assert (state.found - wanted).norm() <= 1e-4 * wanted.norm()
    assert len(states) == len({state.evaluation.number for state in states}) > 1
    assert {module for state in states for module in state.evaluation.modules} == set(_denoisers(name))
    (first, *_), denoiser = states, min(states[0].evaluation.modules)
    module = module_of(pipe, denoiser)
    known = layers_of(module)
    layer = (*known.attention, *known.feed_forward)[0]
    mask = torch.ones(1, layer.units)
    mask[0, 0] = 0
    with masked(module, {layer: mask}), torch.no_grad():
        found, wanted = first.predict(components), _given_to_scheduler(pipe, name, 0)
    assert (found - wanted).norm() <= 1e-4 * wanted.norm()


def _profiles(name: str, folder: Path, **options: Any) -> dict[str, Profile]:
    open_pipeline(name).save_pretrained(folder / name)
    (out := folder / "profile").mkdir()
    calibration = ProgramCalibration(
        folder / name, None, (given_of(name),), _denoisers(name), PROMPTS * 2, (1, 2, 3, 4)
    )
    told = measure_program(calibration, ProfileTable(states=4, **options), out, silent)
    for denoiser, found in told.items():
        own = {"name": denoiser, "base_model": name, "inputs": {}, "samples": 4, **found}
        write_profile(out / denoiser, own, 0, 0)
    return {denoiser: open_profile(out / denoiser) for denoiser in told}


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_is_measured(name: str, tmp_path: Path) -> None:
    for denoiser, profile in _profiles(name, tmp_path).items():
        layers = layers_of(module_of(open_pipeline(name), denoiser))
        for criterion in ("leave_one_out", "activation_energy_percentile", "magnitude") if layers.attention else ():
            found = profile.heads(criterion)
            assert {each.name: each.heads for each in layers.attention} == {key: len(v) for key, v in found.items()}
            assert all((scores >= 0).all() for scores in found.values())
        assert {each.name for each in layers.feed_forward} == set(profile.neurons("activation_energy_percentile"))
        for layer in (*layers.attention, *layers.feed_forward):
            for place in layer.columns:
                moment = profile.second_moment(place.linear)
                assert np.linalg.eigvalsh(moment.astype(np.float64)).max() > 0
                np.testing.assert_allclose(moment, moment.T, rtol=1e-3, atol=1e-4)


def test_random_projections_rank_as_each_head_by_itself(tmp_path: Path) -> None:
    scores = {
        how: _profiles(FAST, tmp_path / how, leave_one_out=how)["transformer"].heads("leave_one_out")
        for how in ("exact", "projected")
    }
    pairs = [np.concatenate([found[layer] for layer in scores["exact"]]) for found in scores.values()]
    assert np.corrcoef(*pairs)[0, 1] > 0.8


def test_what_is_no_number_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = open_pipeline(FAST)
    monkeypatch.setattr(pipe.transformer, "forward", lambda *_, **__: (torch.full((2, 4, 16, 16), torch.nan),))
    with pytest.raises(NumericalError, match="transformer: NaN or infinity in what the scheduler is given"):
        _states(FAST)
