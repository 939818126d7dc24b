"""Early exit in the pipeline: each image stops where it has stopped changing, and is what it would be alone."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
from click.testing import CliRunner
from fakes import Fakes, write_fake

from slipcast.cli.main import cli
from slipcast.errors import ArtifactError
from slipcast.run.pipeline import Pipeline, load
from slipcast.sampling.early_exit import EarlyExit, change
from slipcast.sampling.samplers import SAMPLERS

PROMPT, STEPS, SEEDS = "a red circle", 12, [3, 4, 5, 6]


def _bundle(root: Path, threshold: float | None, **sampling: Any) -> Path:
    settings = fakes.document(Path("nowhere"))["sampling"] | {"steps": STEPS, **sampling}
    if threshold is None:
        return write_fake(root, sampling=settings)
    targets = [target | {"early_exit": threshold} for target in fakes.document(Path("nowhere"))["targets"]]
    return write_fake(root, sampling=settings, targets=targets, requires=["early_exit"])


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return fakes.install(monkeypatch)


def _draw(pipe: Pipeline, seeds: list[int], **request: Any) -> Any:
    return pipe([PROMPT] * len(seeds), seed=seeds, output_type="latent", **request)


def _middle(tmp_path: Path, **sampling: Any) -> float:
    """A threshold at which some of the images stop before the end, and not all at once: found by trying."""
    for i, threshold in enumerate(np.geomspace(1e-4, 1.0, 60)):
        steps = _draw(load(_bundle(tmp_path / f"try{i}", float(threshold), **sampling)), SEEDS).steps
        if min(steps) < STEPS and len(set(steps)) > 1:
            return float(threshold)
    raise AssertionError("no threshold tells the images apart")


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun", "lcm", "euler_ancestral"])
def test_each_image_is_what_it_would_be_alone(tmp_path: Path, engines: Fakes, sampler: str) -> None:
    sampling = {"sampler": sampler, "guidance_rescale": 0.5}
    pipe = load(_bundle(tmp_path / "b", _middle(tmp_path, **sampling), **sampling))
    out = _draw(pipe, SEEDS)
    engines.calls.clear()
    for i, seed in enumerate(SEEDS):
        alone = _draw(pipe, [seed])
        np.testing.assert_array_equal(alone.images[0], out.images[i])
        assert alone.steps == (out.steps[i],)
    # Alone, nothing is evaluated after it has stopped.
    assert engines.count("denoiser") <= sum(out.steps) * SAMPLERS[sampler].evaluations
    assert sum(out.steps) < STEPS * len(SEEDS)


def test_what_has_stopped_is_not_evaluated(tmp_path: Path, engines: Fakes) -> None:
    threshold = _middle(tmp_path)
    engines.calls.clear()
    out = _draw(load(_bundle(tmp_path / "b", threshold)), SEEDS)
    rows = [len(call.sample) for name, call in engines.calls if name == "denoiser"]
    assert len(rows) == max(out.steps) and sum(rows) == 2 * sum(out.steps)


def test_an_image_stops_at_the_clean_image_of_its_last_evaluation(tmp_path: Path, engines: Fakes) -> None:
    """By hand: euler's x of each step tells D."""
    states: list[Any] = []
    full = load(_bundle(tmp_path / "full", None, sampler="euler"))
    _draw(full, [3], callback_on_step_end=lambda _, __, ___, found: states.append(found["latents"].copy()))
    sigmas = full.manifest.sampling.lay().sigmas
    # x' = x + (x - D) * (t - s) / s, so that D = x - (x' - x) * s / (t - s)
    clean = [
        x - (after - x) * s / (t - s)
        for x, after, s, t in zip(states, states[1:], sigmas[1:], sigmas[2:], strict=False)
    ]
    changes = [float(change(now, before)[0]) for before, now in itertools.pairwise(clean)]
    stop = next(i for i, found in enumerate(changes) if found <= 1.001 * min(changes))
    out = _draw(load(_bundle(tmp_path / "b", 1.001 * min(changes), sampler="euler")), [3])
    np.testing.assert_allclose(out.images[0], clean[stop + 1][0], rtol=1e-3, atol=1e-4)


def test_off_by_default_and_for_other_steps(tmp_path: Path, engines: Fakes) -> None:
    pipe = load(_bundle(tmp_path / "b", 1e9))
    assert _draw(pipe, [3]).steps == (2,)
    other = _draw(pipe, [3], num_inference_steps=5)
    plain = load(_bundle(tmp_path / "plain", None))
    assert other.steps == (5,) and _draw(plain, [3, 4]).steps == (STEPS, STEPS)
    np.testing.assert_array_equal(other.images, _draw(plain, [3], num_inference_steps=5).images)


def test_what_is_not_a_number_does_not_pass_for_finished() -> None:
    broken = EarlyExit(lambda x, sigma: x * np.float32("nan"), 1.0, 2)
    for _ in range(2):
        broken(np.ones((2, 3), np.float32), 1.0)
    assert broken.end_step() and len(broken.left) == 2


def test_a_manifest_that_does_not_say_so(tmp_path: Path) -> None:
    root = _bundle(tmp_path / "b", 0.1)
    document = json.loads((root / "manifest.json").read_text()) | {"requires": []}
    (root / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match="early_exit has to be named"):
        load(root)


def test_the_command_line(tmp_path: Path, engines: Fakes) -> None:
    root, picture = str(_bundle(tmp_path / "b", 1e9)), str(tmp_path / "a.png")
    shown = CliRunner().invoke(cli, ["run", root, "--prompt", PROMPT, "-o", picture, "--json", "--num-images", "2"])
    assert json.loads(shown.stdout)["steps"] == [2, 2]
