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


PAIRS = [(sampler, schedule) for sampler, (_, _, schedules) in original.SCHEDULERS.items() for schedule in schedules]


@pytest.fixture(scope="module")
def loaded() -> Any:
    return original._load(SHAPES, torch.float32)


@pytest.fixture
def pipe(loaded: Any) -> Any:
    """With the checkpoint's scheduler, from whose config the others are made."""
    loaded.scheduler = diffusers.DDIMScheduler.from_pretrained(SHAPES / "scheduler")
    return loaded


@pytest.mark.parametrize(("sampler", "schedule"), PAIRS, ids=lambda name: name)
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


def test_unconditional_pictures_are_those_of_diffusers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=16, layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    pipe = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    pipe.save_pretrained(tmp_path)
    theirs = pipe(generator=torch.Generator("cpu").manual_seed(5), num_inference_steps=8, output_type="np").images
    noise = Checkpoint(tmp_path, "m").process
    assert noise.clip_sample == 1.0
    sampling = Sampling(sampler="ddpm", schedule="leading", steps=8, guidance_scale=1.0, noise=noise)
    ours = _draw(Checkpoint(tmp_path, "m"), 16, sampling, None, 5)
    assert np.abs(ours - theirs).max() < 2e-3


@pytest.mark.parametrize("sampling", [_sampling("dpmpp_sde", "karras"), _sampling("dpmpp_3m_sde", "leading")])
def test_what_diffusers_lacks_is_drawn_all_the_same(sampling: Sampling) -> None:
    assert not original.has_scheduler(sampling)
    checkpoint = Checkpoint(SHAPES, "shapes")
    assert _draw(checkpoint, 64, sampling, "a red ring on white", 3).std() > 0.02


def test_tables_name_what_the_runtime_knows() -> None:
    assert set(original.SCHEDULERS) < set(SAMPLERS)
    assert set(original.SCHEDULES) < set(SCHEDULES)
    assert not original.has_scheduler(_sampling("euler", "ays_sd15"))
