"""Distillation of captured pipelines' denoisers on their own trajectories."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_rewritten_programs import DENOISERS, PROMPTS, SEEDS, remove_a_third, save, task_of

from slipcast.errors import RecipeError
from slipcast.progress import silent
from slipcast_compiler.capture.open import open_with_weights
from slipcast_compiler.capture.summary import module_of
from slipcast_compiler.model.rewrite import TENSORS, UNCHANGED, Rewrite
from slipcast_compiler.passes import Context, recover
from slipcast_compiler.passes.apply import REPORT, _run
from slipcast_compiler.passes.program import ProgramTask
from slipcast_compiler.profile.measure import Progress
from slipcast_compiler.recipe.passes import Recover

FAST = "stable_diffusion_3"


def _points(task: ProgramTask, rewrite: Rewrite, images: list[Any]) -> Any:
    prompts, seeds = zip(*images, strict=True)
    task = replace(task, calibration=replace(task.calibration, prompts=prompts, seeds=seeds))
    progress = Progress(lambda done, total: None, 0)
    return task.trajectories(task.denoiser(rewrite), [images], progress)[1][0]


@pytest.mark.parametrize(
    ("name", "method"),
    [
        (FAST, "full"),
        pytest.param("stable_diffusion_xl", "lora", marks=pytest.mark.slow),
        *(pytest.param(name, "full", marks=pytest.mark.slow) for name in DENOISERS if name != FAST),
    ],
)
def test_the_error_falls_for_other_prompts_too(name: str, method: str, tmp_path: Path) -> None:
    root, denoiser = save(name, tmp_path), DENOISERS[name][-1]
    masked, task = open_with_weights(root), task_of(root, name, denoiser)
    damaged = remove_a_third(root, name, denoiser, module_of(masked, denoiser), tmp_path)
    steps = 12 if name == FAST else 40
    options = Recover(steps=steps, batch=4, method=method, learning_rate=3e-4 if method == "full" else 1e-3)
    told: list[tuple[int, int]] = []
    context = Context(task, None, silent)
    _run("recover", options, context, damaged, tmp_path, lambda done, total: told.append((done, total)))
    report = json.loads((tmp_path / REPORT).read_text())
    assert report["error_after"] < 0.9 * report["error_before"]
    assert told[-1][0] == told[-1][1] or report["steps"] < options.steps
    others = [("a large blue star on a black background", 9), ("two rings", 11)]
    errors = [recover.error(_points(task, each, others), 4) for each in (damaged, Rewrite(tmp_path / TENSORS))]
    assert errors[1] < errors[0]


def test_an_unchanged_denoiser_is_its_teacher(tmp_path: Path) -> None:
    root = save(FAST, tmp_path)
    task = task_of(root, FAST, "transformer")
    points = _points(task, UNCHANGED, list(task.images))
    steps = len(points) // len(PROMPTS)
    assert steps > 1
    assert recover.error(points, 4) < 1e-5
    parameters = list(points.components["transformer"].requires_grad_(True).parameters())
    points.found(torch.tensor([0])).square().sum().backward()
    assert sum(each.grad is not None for each in parameters) > len(parameters) // 2
    texts = [{id(tensor) for tensor in state.given.values()} for state in points.states[:steps]]
    assert set.intersection(*texts)  # what a prompt gives is in memory once


def test_what_it_reads_is_in_the_key(tmp_path: Path) -> None:
    root = save(FAST, tmp_path)
    task = task_of(root, FAST, "transformer")
    told = recover.reads(task)
    assert sorted(told["training"] + told["validation"]) == sorted(zip(PROMPTS, SEEDS, strict=True))
    other = replace(task, calibration=replace(task.calibration, seeds=(5, 6, 7, 8)))
    assert recover.reads(other) != told


@pytest.mark.slow
def test_each_image_is_drawn_by_its_own_call(tmp_path: Path) -> None:
    """Of what call lists, whichever images are set aside."""
    root = save(FAST, tmp_path)
    task = task_of(root, FAST, "transformer")
    (call,) = task.calibration.calls
    sizes = [{**call, "height": size, "width": size} for size in (32, 48)]
    task = replace(task, calibration=replace(task.calibration, calls=tuple(sizes)))
    progress = Progress(lambda done, total: None, 0)
    parts = [[task.images[3]], [task.images[0], task.images[1]]]
    _, points = task.trajectories(task.denoiser(UNCHANGED), parts, progress)
    found = [[each.found.shape[-1] for each in part.states] for part in points]
    steps = len(found[0])
    small, large = sorted({size for part in found for size in part})
    assert found == [[large] * steps, [small] * steps + [large] * steps]
    with pytest.raises(RecipeError, match="some of what call lists would not be trained on"):
        recover.check_split(task.images, 4)
    recover.check_split(task.images, 2)
