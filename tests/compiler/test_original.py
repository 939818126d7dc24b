"""The original is diffusers' own pipeline; where it lacks a schedule, its modules under our samplers are as good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from slipcast.bundle.manifest import ImageGeometry, Sampling
from slipcast.sampling.samplers import SAMPLERS
from slipcast.sampling.schedules import SCHEDULES
from slipcast_compiler.model import original
from slipcast_compiler.model.checkpoint import Checkpoint
from slipcast_compiler.model.original import Drawing, Original
from slipcast_compiler.model.scheduler import read_process, usual_schedule, with_options

SHAPES = Path("recipes/models/shapes").resolve()
NOISE = Checkpoint(SHAPES, "shapes").process


def _sampling(sampler: str, schedule: str, **settings: Any) -> Sampling:
    return Sampling(sampler=sampler, schedule=schedule, steps=5, guidance_scale=4.0, noise=NOISE, **settings)


def _draw(checkpoint: Checkpoint, size: int, sampling: Sampling, prompt: str | None, seed: int) -> Any:
    """One picture, as a compile has it drawn."""
    factor = checkpoint.factor
    image = ImageGeometry(width=size, height=size, channels=4, factor=factor, tile=size // factor, overlap=2)
    drawing = Drawing(Original(checkpoint, image, {}, {}), sampling, (prompt,), (seed,))
    return original.make_images(drawing, "float32", False, lambda *_: None)["images"]


PAIRS = [(sampler, schedule) for sampler, schedules in original.SCHEDULERS.items() for schedule in schedules]


@pytest.fixture(scope="module")
def loaded() -> Any:
    return original.load_pipeline(Checkpoint(SHAPES, "shapes"), torch.float32)


@pytest.fixture
def pipe(loaded: Any) -> Any:
    """With the checkpoint's scheduler, from whose config the others are made."""
    loaded.scheduler = diffusers.DDIMScheduler.from_pretrained(SHAPES / "scheduler")
    return loaded


TWICE = "heun", "dpm2"  # evaluate twice a step


@pytest.mark.parametrize(
    ("sampler", "schedule"),
    [pytest.param(*pair, marks=[pytest.mark.slow] if pair[0] in TWICE else []) for pair in PAIRS],
    ids=lambda name: name,
)
def test_both_ways_agree(sampler: str, schedule: str, pipe: Any) -> None:
    """For every pair that the reference pictures may be drawn with by diffusers itself."""
    settings = {"guidance_rescale": 0.7} if schedule == "karras" else {"eta": 0.5} if sampler == "ddim" else {}
    sampling = _sampling(sampler, schedule, **settings)
    original.choose_scheduler(pipe, sampling)
    pictures = []
    for draw in (original._with_diffusers, original._with_our_sampler):
        generator = torch.Generator("cpu").manual_seed(3)
        noise = torch.randn((1, 4, 16, 16), generator=generator)
        with torch.no_grad():
            pictures.append(draw(pipe, sampling, ["a red ring on white"], noise, [generator]))
    assert pictures[0].std() > 0.02
    assert np.abs(pictures[0] - pictures[1]).max() < 2e-3


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of pixels, with the config of diffusers' DDPMScheduler, which clips."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=16, layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("pixels")
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("sampler", "keys"),
    [
        ("ddpm", {}),
        ("ddpm", {"variance_type": "fixed_large"}),
        ("ddim", {}),
        ("ddim", {"clip_sample": False}),
        ("dpmpp_2m", {}),
    ],
    ids=str,
)
def test_unconditional_pictures_are_those_of_diffusers(sampler: str, keys: dict[str, Any], pixels: Path) -> None:
    """The original's are drawn by diffusers' own pipeline, and our sampler gives the same."""
    pipe = diffusers.DDPMPipeline.from_pretrained(pixels)
    config = {**pipe.scheduler.config, **keys}
    pipe.scheduler.register_to_config(**keys)
    noise = read_process(config, sampler, False)
    sampling = Sampling(
        sampler=with_options(config, sampler), schedule=usual_schedule(config, sampler), steps=8, guidance_scale=1.0,
        noise=noise,
    )  # fmt: skip
    name, settings = original.scheduler_for(sampling) or ("", {})
    scheduler = getattr(diffusers, name).from_config(config, **settings)
    kind = getattr(diffusers, original.UNCONDITIONAL[sampler])
    own = kind(pipe.unet, scheduler)
    own.set_progress_bar_config(disable=True)
    theirs = own(generator=torch.Generator("cpu").manual_seed(5), num_inference_steps=8, output_type="np").images
    original.choose_scheduler(pipe, sampling)
    drawn = original.draw(pipe, sampling, (16, 16), [None], [5])
    assert np.abs(drawn - theirs).max() < 1e-5
    generators = [torch.Generator("cpu").manual_seed(5)]
    start = torch.randn((1, 3, 16, 16), generator=generators[0])
    with torch.no_grad():
        ours = original._with_our_sampler(pipe, sampling, None, start, generators)
    assert np.abs(ours - theirs).max() < 1e-4
    assert original.drawn_by(sampling, False).startswith(f"diffusers' {original.UNCONDITIONAL[sampler]}")


def test_reduced_precision_begins_from_the_same_noise(pixels: Path) -> None:
    checkpoint = Checkpoint(pixels, "m")
    noise = read_process(checkpoint.scheduler, "ddpm", False)
    sampling = Sampling(sampler="ddpm", schedule="leading", steps=4, guidance_scale=1.0, noise=noise)
    full, half = (
        original.draw(original.open_pipeline(checkpoint.root, sampling, dtype), sampling, (16, 16), [None], [5])
        for dtype in ("float32", "bfloat16")
    )
    assert 0 < np.abs(full - half).max() < 0.1


def test_what_stands_in_is_said(pixels: Path) -> None:
    noise = read_process(Checkpoint(pixels, "m").scheduler, "euler", False)
    sampling = Sampling(sampler="euler", schedule="leading", steps=4, guidance_scale=1.0, noise=noise)
    assert "slipcast's sampler" in original.drawn_by(sampling, False)
    assert original.drawn_by(_sampling("euler", "leading"), True) == "diffusers' pipeline with EulerDiscreteScheduler"


@pytest.mark.parametrize("sampling", [_sampling("dpmpp_sde", "karras"), _sampling("dpmpp_3m_sde", "leading")])
def test_what_diffusers_lacks_is_drawn_all_the_same(sampling: Sampling) -> None:
    assert not original.has_scheduler(sampling)
    checkpoint = Checkpoint(SHAPES, "shapes")
    assert _draw(checkpoint, 64, sampling, "a red ring on white", 3).std() > 0.02


def test_tables_name_what_the_runtime_knows() -> None:
    assert set(original.SCHEDULERS) < set(SAMPLERS)
    assert {each for schedules in original.SCHEDULERS.values() for each in schedules} < set(SCHEDULES)
    assert not original.has_scheduler(_sampling("euler", "ays_sd15"))
