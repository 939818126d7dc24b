"""Calls within the stated ranges that failed, and calls that failed without being told why (row 56 of the faults)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
from fakes import LATENT, Fakes, write_fake
from test_pipeline import edit

from slipcast.bundle.manifest import Sampling
from slipcast.errors import ArtifactError, RequestError, ResourceError
from slipcast.run.pipeline import Pipeline, load
from slipcast.run.request import _most_steps
from slipcast.sampling.samplers import SAMPLERS
from slipcast.sampling.schedules import SCHEDULES

PROMPT = "a red circle"


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return fakes.install(monkeypatch)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake(tmp_path_factory.mktemp("fake") / "bundle")


@pytest.fixture
def pipe(root: Path, engines: Fakes) -> Pipeline:
    return load(root)


class TestSteps:
    def test_every_number_in_the_stated_range_can_be_laid(self, pipe: Pipeline) -> None:
        settings = pipe.manifest.sampling
        most = _most_steps(settings)
        assert most == 998
        for steps in range(1, most + 1):
            assert len(settings.lay(steps).timesteps) == steps
        with pytest.raises(RequestError, match="an integer from 1 to 998\n.*999"):
            pipe(PROMPT, num_inference_steps=999)

    @pytest.mark.parametrize("schedule", ["leading", "linspace", "trailing", "karras", "exponential", "lcm"])
    def test_of_every_schedule(self, pipe: Pipeline, schedule: str) -> None:
        assert schedule in SCHEDULES
        for sampler in SAMPLERS:
            settings: Sampling = pipe.manifest.sampling.model_copy(update={"schedule": schedule, "sampler": sampler})
            most = _most_steps(settings)
            for steps in {*range(1, most + 1, 37), most}:
                settings.lay(steps)
            if most < settings.noise.num_train_timesteps:
                with pytest.raises(RequestError):
                    settings.lay(most + 1)

    def test_the_largest_number_runs(self, pipe: Pipeline) -> None:
        assert pipe(PROMPT, seed=1, num_inference_steps=998, output_type="latent").steps == (998,)


@pytest.mark.parametrize(
    "latents",
    [
        [[1.0], [1.0, 2.0]],
        [np.zeros(LATENT, np.float32), np.zeros((2, 2), np.float32)],
        "latents",
        {"a": 1},
        object(),
        [None],
    ],
    ids=["ragged", "of two shapes", "text", "dict", "object", "none"],
)
def test_latents_that_are_no_array(pipe: Pipeline, engines: Fakes, latents: Any) -> None:
    with pytest.raises(RequestError, match=r"latents are not usable\n  expected: float32 \[1, 4, 8, 8\]\n  got: "):
        pipe(PROMPT, latents=latents)
    assert engines.calls == []


class TestCallbacks:
    def test_one_that_closes_the_pipeline(self, pipe: Pipeline, engines: Fakes) -> None:
        expected = pipe(PROMPT, seed=1, output_type="np").images
        steps = []

        def close(pipeline: Pipeline, step: int, _: float, __: Any) -> None:
            steps.append(step)
            pipeline.close()
            assert len(engines.open_now) == 3  # the call needs them

        out = pipe(PROMPT, seed=1, output_type="np", callback_on_step_end=close)
        np.testing.assert_array_equal(out.images, expected)
        assert steps == list(range(6))
        assert engines.open_now == []
        np.testing.assert_array_equal(pipe(PROMPT, seed=1, output_type="np").images, expected)  # and is usable still

    def test_one_that_closes_and_fails(self, pipe: Pipeline, engines: Fakes) -> None:
        def fail(pipeline: Pipeline, *_: Any) -> None:
            pipeline.close()
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            pipe(PROMPT, seed=1, callback_on_step_end=fail)
        assert engines.open_now == []

    def test_one_that_draws_and_closes(self, pipe: Pipeline, engines: Fakes) -> None:
        def draw(pipeline: Pipeline, step: int, *_: Any) -> None:
            if step == 0:
                pipeline(PROMPT, seed=2, num_inference_steps=1)
                pipeline.close()

        pipe(PROMPT, seed=1, callback_on_step_end=draw)
        assert engines.open_now == []


class TestLongTexts:
    TEXT = "word " * 200_000

    def test_a_warning_does_not_repeat_them_whole(self, pipe: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            pipe(self.TEXT, seed=1, num_inference_steps=1)
        assert "dropped: 'ord word" in caplog.text
        assert len(caplog.text) < 1000

    def test_nor_does_an_error(self, pipe: Pipeline) -> None:
        refused: list[dict[str, Any]] = [
            {"prompt": self.TEXT, "on_long_prompt": "error"},
            {"prompt": [self.TEXT, 1]},
            {"prompt": {"a": self.TEXT}},
            {"prompt": self.TEXT + "\udcff"},
        ]
        for arguments in refused:
            with pytest.raises(RequestError) as caught:
                pipe(**arguments)
            assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("factor", [0.0, -0.5])
def test_a_scaling_factor_that_nothing_can_be_divided_by(
    root: Path, tmp_path: Path, engines: Fakes, factor: float
) -> None:
    with pytest.raises(ArtifactError, match=r"image\.scaling_factor: input should be greater than 0"):
        load(edit(root, tmp_path / "b", image={"scaling_factor": factor}))


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("std::bad_alloc"), RuntimeError("can't start new thread"), OSError(12, "x")]
)
@pytest.mark.parametrize("component", ["text_encoder", "denoiser"])
def test_memory_that_runs_out_is_5_and_names_the_next_policy(
    pipe: Pipeline, engines: Fakes, component: str, error: Exception
) -> None:
    def fail(_: Any) -> Any:
        raise error

    kept = engines.functions[component]
    engines.functions[component] = fail
    with pytest.raises(ResourceError, match=r'memory ran out: making images(.|\n)*residency="sequential"') as caught:
        pipe(PROMPT, seed=1)
    assert caught.value.exit_code == 5
    engines.functions[component] = kept
    assert len(pipe(PROMPT, seed=1).images) == 1
