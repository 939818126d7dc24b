"""One engine for several sizes: what follows them is found, and where something else does each size has its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundling import bundle_of
from diffusers import ConfigMixin, DDIMScheduler, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from tiny import call_of, open_pipeline

import slipcast
from slipcast_compiler.capture.call import make_call
from slipcast_compiler.capture.find import find_each, find_for
from slipcast_compiler.capture.program import Affine
from slipcast_compiler.capture.sizes import find_sizes
from slipcast_compiler.recipe.targets import TargetTable

SIZES = (16, 16), (32, 24), (16, 32)  # height and width


class Mixing(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """float32 [1, 2, h, w] to the same."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.down = torch.nn.Conv2d(2, 4, 3, 2, 1)
        self.up = torch.nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        small = self.down(x)
        return self.up(torch.nn.functional.interpolate(small, size=x.shape[-2:])).tanh()


class Branching(Mixing):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (2 if x.shape[-2] > 20 else 1)


class Sized(DiffusionPipeline):  # type: ignore[misc]
    """Packs what it denoises, and unpacks it: [1, 2, h, w] to [1, h, 2 w]."""

    def __init__(self, denoiser: Mixing, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler)

    def change(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return x

    @torch.no_grad()
    def __call__(
        self, height: int = 16, width: int = 16, num_inference_steps: int = 3, generator: Any = None
    ) -> dict[str, torch.Tensor]:
        x = torch.randn(1, 2, height, width, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for time in self.scheduler.timesteps:
            x = self.scheduler.step(self.change(self.denoiser(x), height, width), time, x).prev_sample
        return {"x": x.permute(0, 2, 1, 3).reshape(1, height, 2 * width)}


class Placed(Sized):
    """Adds a constant of its size."""

    def change(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return x + torch.arange(height)[:, None] / height


def made(kind: Any = Sized, denoiser: Any = Mixing) -> Any:
    torch.manual_seed(0)
    return kind(denoiser(), DDIMScheduler())


def calls(pipe: Any, sizes: Any = SIZES, **more: Any) -> list[Any]:
    given = [{"height": height, "width": width, **more} for height, width in sizes]
    return [lambda prompt, each=each: make_call(pipe, each, prompt) for each in given]


def drawn(bundle: Path, target: str, size: tuple[int, int]) -> Any:
    with slipcast.load(bundle, target=target) as pipe:
        return pipe(seed=3, height=size[0], width=size[1], output_type="np").images[0]


@pytest.mark.parametrize("target", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)])
def test_one_engine_draws_what_each_size_draws_by_itself(target: str, tmp_path: Path) -> None:
    pipe, table = made(), TargetTable(engine=target)
    for name in ("all", "last"):
        (tmp_path / name).mkdir()
    bundle = bundle_of(pipe, "sized", calls(pipe), tmp_path / "all", table)
    with slipcast.load(bundle) as loaded:
        assert set(loaded.manifest.components) == {"start", "denoiser", "decoder"}  # samplers drive it
        inputs = {name: each.inputs[0].shape for name, each in loaded.manifest.components.items()}
        assert inputs["denoiser"] == ("images", 2, "16*denoiser_size", "8*denoiser_size_2")
        assert loaded.program.sizes["denoiser_size_2"].maximum == 4
    for size in SIZES:
        wanted = pipe(**make_call(pipe, {"height": size[0], "width": size[1]}, "", 3))["x"]
        np.testing.assert_allclose(drawn(bundle, target, size), wanted, rtol=1e-4, atol=1e-5)
    fixed = bundle_of(pipe, "sized", calls(pipe, SIZES[-1:]), tmp_path / "last", table)
    both = (drawn(each, target, SIZES[-1]) for each in (bundle, fixed))
    np.testing.assert_allclose(*both, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "denoiser"), [(Sized, Branching), pytest.param(Placed, Mixing, marks=pytest.mark.slow)]
)
def test_a_part_that_follows_a_size_otherwise_is_one_for_each(kind: Any, denoiser: Any, tmp_path: Path) -> None:
    """Only the export finds out that a component branches; a constant of another size is seen before."""
    pipe = made(kind, denoiser)
    bundle = bundle_of(pipe, "sized", calls(pipe), tmp_path)
    with slipcast.load(bundle) as loaded:
        names = {name for name in loaded.manifest.components if name.startswith("denoiser")}
        assert names == {"denoiser", "denoiser_2", "denoiser_3"}
        assert not any(name.startswith("denoiser") for name in loaded.program.sizes)
        assert "decoder_2" not in loaded.manifest.components
        weights = {target.components[name].weights for target in loaded.manifest.targets for name in names}
        assert len(weights) == 1
    for size in SIZES:
        wanted = pipe(**make_call(pipe, {"height": size[0], "width": size[1]}, "", 3))["x"]
        np.testing.assert_allclose(drawn(bundle, "auto", size), wanted, rtol=1e-4, atol=1e-5)


def test_what_is_shared_with_other_numbers_of_steps() -> None:
    pipe = made()
    given = [{"height": h, "width": w, "num_inference_steps": n} for h, w in SIZES[:2] for n in (2, 4)]
    found = find_each(pipe, given)
    (update,) = {id(part): part for each in found for part in each.cut.parts if part.name == "update"}.values()
    assert {len(rows) for _, rows in update.table} == {5}
    rows = [[use.row for use in each.cut.uses if use.part == "update"] for each in found]
    assert rows == [[0, 1], [2, 3, 4, 1]] * 2


@pytest.mark.parametrize(("name", "denoisers"), [("stable_diffusion_3", 1), ("flux", 2)])
def test_parts_of_pipelines(name: str, denoisers: int) -> None:
    """Those of FLUX are given the place of each token, a constant, whose size is another."""
    pipe = open_pipeline(name)
    sizes = [{"height": 32, "width": 32}, {"height": 64, "width": 48}]
    found = find_for(pipe, [lambda prompt, each=each: call_of(name, prompt, 1) | each for each in sizes])
    names = {part.name for each in found for part in each.cut.parts if part.name.startswith("denoiser")}
    assert len(names) == denoisers


def test_laws() -> None:
    found = find_sizes("size", [[4, 1, 7], [6, 1, 7]], [[(1, 64, 32)], [(1, 96, 64)]], [[(8,)], [(12,)]])
    assert found and [each.counts for each in found.quantities] == [(2, 3)]
    assert found.inputs == ((1, Affine("size", 32, 0), Affine("size", 32, -32)),)
    assert found.integers == (Affine("size", 2, 0), 1, 7) and found.outputs == ((Affine("size", 4, 0),),)


def test_two_quantities_and_no_law() -> None:
    shapes = [[(h, w)] for h, w in SIZES]
    found = find_sizes("size", [[h * 2] for h, _ in SIZES], shapes, [[(w + 1,)] for _, w in SIZES])
    assert found and [each.counts for each in found.quantities] == [(1, 2, 1), (2, 3, 4)]
    assert found.integers == (Affine("size", 32, 0),) and found.outputs == ((Affine("size_2", 8, 1),),)
    assert find_sizes("size", [[h * w] for h, w in SIZES], shapes, [[()]] * 3) is None  # a product of both
    assert find_sizes("size", [[1], [2]], [[(3,)], [(3,)]], [[()]] * 2) is None  # no input tells it
    assert find_sizes("size", [[]] * 2, [[(Affine("length", 1, 0), 2)], [(5, 4)]], [[()]] * 2) is None
