"""Profiles of a captured pipeline's denoisers, measured while it draws calibration images: one of each denoiser.

As of others (measure.py), in two phases; but what calls the denoisers is the pipeline's own code, and what is looked at
a second time is what it gives its scheduler.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slipcast.bundle.profiles import TENSORS_NAME, Floats
from slipcast.progress import Advance
from slipcast_compiler.capture.call import PROMPT, make_call
from slipcast_compiler.capture.fitting import with_pictures
from slipcast_compiler.capture.generalise import without_insides
from slipcast_compiler.capture.given import Given, given_within
from slipcast_compiler.capture.open import open_with_weights
from slipcast_compiler.capture.program import Program
from slipcast_compiler.capture.record import capture
from slipcast_compiler.capture.replay import modules_of
from slipcast_compiler.capture.summary import module_of
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.isolate import run_isolated
from slipcast_compiler.host.quiet import quiet
from slipcast_compiler.model.layers import attention_layers, linear_layers
from slipcast_compiler.model.original import Prompts
from slipcast_compiler.profile import importance
from slipcast_compiler.profile.layers import LayerObserver
from slipcast_compiler.profile.measure import Progress, chosen_states, save_measured
from slipcast_compiler.profile.profile import Profile, enough_samples, open_profile, write_profile
from slipcast_compiler.profile.states import Components, Evaluation, State, draw, evaluations_of
from slipcast_compiler.recipe.recipe import ProfileTable

FLOAT_BYTES = 4


@dataclass(frozen=True)
class ProgramCalibration:
    """Images of a pipeline: image i of the prompt and the seed i, by the calls in turns. `denoisers`: those of its
    modules that are measured."""

    root: Path
    pipeline: str | None
    calls: tuple[Mapping[str, Any], ...]
    denoisers: tuple[str, ...]
    prompts: Prompts
    seeds: tuple[int, ...]


def make_program_profiles(
    calibration: ProgramCalibration, given: Mapping[str, Any], options: ProfileTable, names: tuple[str, str],
    cache: Cache, advance: Advance,
) -> dict[str, Profile]:  # fmt: skip
    """By denoiser, from the cache or measured; `given`: what the pipeline is, for the cache's key; `names`: of the
    recipe and of its model.

    NumericalError, naming the layer, where it comes to NaN or infinity.
    """
    samples = enough_samples(calibration.prompts)
    inputs = {
        **given,
        "denoisers": calibration.denoisers,
        "prompts": calibration.prompts,
        "seeds": calibration.seeds,
        "options": options.model_dump(mode="json", exclude={"batch", "sampling"}),  # which are not for it
    }

    def build(folder: Path) -> None:
        begin = time.perf_counter()
        done = run_isolated(measure_program, calibration, options, folder, advance=advance)
        seconds = time.perf_counter() - begin
        told = {"base_model": names[1], "inputs": inputs, "samples": samples}
        for denoiser, found in done.result.items():
            own = {"name": f"{names[0]}: {denoiser}", **told, **found}
            write_profile(folder / denoiser, own, done.peak_memory_mb, seconds)

    entry = cache.get("profile", inputs, build)
    return {name: open_profile(entry / name) for name in calibration.denoisers}


def measuring_bytes(module: nn.Module, given: Given, options: ProfileTable) -> int:
    """About what measuring a denoiser that is called so takes, besides the pipeline itself: second moments, and, where
    there are gradients, what they are computed of. No weight is read."""
    inputs = given_within(module, given, [layer.name for layer in linear_layers(module)])
    moments: int = sum(x.shape[1 if x.ndim == 4 else -1] ** 2 for x in inputs)
    graph: int = 0 if importance.is_exact(module, options.leave_one_out) else 2 * sum(x.numel() for x in inputs)
    return FLOAT_BYTES * (moments + graph)


def measure_program(
    calibration: ProgramCalibration, options: ProfileTable, out: Path, advance: Advance
) -> dict[str, dict[str, Any]]:
    """Write the tensors of each denoiser's profile to a folder of its name in `out`; returns by denoiser the fields of
    its record that only the measurement knows. Runs in a process of its own, with all weights in memory."""
    pipe = open_with_weights(calibration.root, calibration.pipeline)
    components = modules_of(pipe)
    for component in components.values():
        component.requires_grad_(False)
    modules = {name: module_of(pipe, name) for name in calibration.denoisers}
    exact = {name: importance.is_exact(module, options.leave_one_out) for name, module in modules.items()}
    observers = {name: LayerObserver(module) for name, module in modules.items()}
    progress = Progress(advance, 0)
    states = _draw_all(pipe, calibration, components, observers, options.states, progress, exact)
    told = {}
    for name, module in modules.items():
        found = observers[name].results() | importance.magnitude(module)
        found |= _leave_one_out(module, components, states[name], exact[name], progress)
        (out / name).mkdir()
        save_measured(found, out / name / TENSORS_NAME)
        told[name] = {
            "leave_one_out": "exact" if exact[name] else "projected",
            "shared_inputs": observers[name].inputs.shared(),
        }
    return told


def programs_of(
    pipe: Any, calibration: ProgramCalibration, images: Collection[int] | None = None
) -> Iterator[tuple[Program, list[Evaluation]]]:
    """Of each image, or of these, and its evaluations of the denoisers."""
    calls = [with_pictures(pipe, given) for given in calibration.calls]
    for image, (prompt, seed) in enumerate(zip(calibration.prompts, calibration.seeds, strict=True)):
        if images is not None and image not in images:
            continue
        with quiet():
            captured = capture(pipe, make_call(pipe, calls[image % len(calls)], prompt or PROMPT, seed))
        program = without_insides(captured)  # it is the modules that are called, where the observers are
        yield program, evaluations_of(program, calibration.denoisers)


def _draw_all(
    pipe: Any, calibration: ProgramCalibration, components: Components, observers: Mapping[str, LayerObserver],
    count: int, progress: Progress, exact: Mapping[str, bool],
) -> dict[str, list[State]]:  # fmt: skip
    """By denoiser, `count` states; the observers have seen all images."""
    images = len(calibration.seeds)
    states: dict[str, list[State]] = {name: [] for name in observers}
    for image, (program, evaluations) in enumerate(programs_of(pipe, calibration)):
        wanted = {}
        if image == 0:
            progress.expect(len(evaluations) * images)
        for name in observers:
            own = [each for each in evaluations if name in each.modules]
            chosen = chosen_states(images, len(own), count)
            wanted[name] = [own[place] for of, place in chosen if of == image]
            if image == 0:
                work = 2 * importance.PROBES if not exact[name] else _heads(components, name)
                progress.expect(len(chosen) * (1 + work))
        with contextlib.ExitStack() as watching:
            for observer in observers.values():
                watching.enter_context(observer.watching())
            every = {each for own in wanted.values() for each in own}
            drawn = draw(program, components, evaluations, every, lambda: progress.add(1))
        for name, own in wanted.items():
            states[name] += [state for state in drawn if state.evaluation in own]
    return states


def _heads(components: Components, name: str) -> int:
    component, _, path = name.partition(".")
    return sum(layer.heads for layer in attention_layers(components[component].get_submodule(path)))


def _leave_one_out(
    module: nn.Module, components: Components, states: Sequence[State], exact: bool, progress: Progress
) -> dict[str, Floats]:
    """As importance has it, of what the scheduler is given."""

    def predict(chosen: Sequence[int]) -> torch.Tensor:
        return torch.cat([states[i].predict(components).reshape(1, -1) for i in chosen])

    for state in states:
        state.check(components)
        progress.add(1)
    if exact:
        with torch.no_grad():
            return importance.leave_one_out(module, predict, len(states), 1, progress.add)
    advance_by = lambda count: progress.add(2 * importance.PROBES * count)  # noqa: E731
    return importance.projected_leave_one_out(module, predict, len(states), advance_by)
