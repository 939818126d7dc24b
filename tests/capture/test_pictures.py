"""Pictures of a recipe are what diffusers' own processors make of the same files, and a run is given them likewise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundling import bundle_of
from diffusers import DDIMScheduler, StableDiffusionControlNetPipeline
from diffusers.utils import load_image
from PIL import Image
from test_refusals import Denoiser, Plain
from tiny import open_pipeline
from tiny.unets import controlnet

import slipcast
from slipcast.errors import RecipeError, RequestError
from slipcast_compiler.capture.call import make_call, pictures_of, with_other_pictures
from slipcast_compiler.capture.find import find
from slipcast_compiler.capture.fitting import with_pictures
from slipcast_compiler.capture.record import capture
from slipcast_compiler.capture.verify import verify
from slipcast_compiler.host.quiet import quiet

ROTATED = 6  # of EXIF: a quarter to the right
WHOLE = {"strength": 0.9, "num_inference_steps": 2}


def draw(file: Path, size: tuple[int, int], mode: str = "RGB", **options: Any) -> Path:
    levels = np.random.default_rng(0).integers(0, 255, (size[1] // 4 + 1, size[0] // 4 + 1, 4), np.uint8)
    Image.fromarray(levels, "RGBA").resize(size, Image.Resampling.BICUBIC).convert(mode).save(file, **options)
    return file


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    turned = Image.Exif()
    turned[274] = ROTATED
    return {
        "odd": draw(tmp_path / "odd.png", (45, 37)),
        "turned": draw(tmp_path / "turned.jpg", (44, 36), exif=turned),
        "clear": draw(tmp_path / "clear.png", (40, 40), "RGBA"),
        "grey": draw(tmp_path / "grey.png", (64, 32), "L"),
        "palette": draw(tmp_path / "palette.png", (32, 32), "P"),
    }


class Reading(Plain):
    """Makes of a picture what it makes of it in torch, or in numpy."""

    numpy = False

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self, image: torch.Tensor, num_inference_steps: int = 3, generator: Any = None
    ) -> Any:
        seen = torch.from_numpy(image.numpy() * 2) if self.numpy else image * 2
        return {"x": super().__call__(num_inference_steps, generator)["x"] + seen.mean(dim=(1, 2))[0, :2]}


@pytest.mark.parametrize("numpy", [False, True])
def test_a_program_is_verified_on_another_picture(numpy: bool) -> None:
    pipe = Reading(Denoiser(), DDIMScheduler())
    pipe.numpy = numpy
    picture = {"image": torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))}
    program = find(pipe, picture).program
    calls = [with_other_pictures(make_call(pipe, picture, seed=3)) for _ in range(2)]
    assert torch.equal(calls[0]["image"], 1 - picture["image"].flip(-1, -2))
    assert verify(program, pipe, *calls).holds == (not numpy)


@pytest.mark.parametrize(
    ("which", "shape"),
    [("odd", (36, 44)), ("turned", (44, 36)), ("clear", (40, 40)), ("grey", (32, 64)), ("palette", (32, 32))],
)
def test_a_picture_is_what_the_pipeline_makes_of_it(files: dict[str, Path], which: str, shape: tuple[int, int]) -> None:
    pipe = open_pipeline("stable_diffusion_img2img")
    read = with_pictures(pipe, WHOLE | {"image": str(files[which])})
    assert read["image"].shape == (1, 3, *shape)
    own = make_call(pipe, WHOLE | {"image": load_image(str(files[which]))}, "a star", 3)
    with quiet(), torch.no_grad():
        np.testing.assert_array_equal(pipe(**make_call(pipe, read, "a star", 3))[0], pipe(**own)[0])


def test_a_mask_is_as_large_as_what_is_drawn(files: dict[str, Path]) -> None:
    """Without a size, it is that of the pipeline, to which it resizes both."""
    pipe, given = open_pipeline("stable_diffusion_inpaint"), {"num_inference_steps": 2}
    names = {"image": files["odd"], "mask_image": files["grey"]}
    read = with_pictures(pipe, given | {name: str(file) for name, file in names.items()})
    assert [tuple(each.shape) for each in pictures_of(read).values()] == [(1, 3, 32, 32), (1, 1, 32, 32)]
    own = given | {"image": load_image(str(files["odd"])), "mask_image": Image.open(files["grey"])}
    with quiet(), torch.no_grad():
        found = [pipe(**make_call(pipe, each, "a star", 3))[0] for each in (read, own)]
    np.testing.assert_array_equal(*found)


def test_what_is_no_picture_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    pipe, deep = open_pipeline("stable_diffusion_img2img"), tmp_path / "deep.png"
    Image.fromarray(np.full((32, 32), 40_000, np.uint16)).save(deep)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "bad.npy").write_text("no array")
    for file, says in (
        (deep, "call.image: image is not usable\n  expected: a picture of 8 bits a channel"),
        (tmp_path / "nowhere.png", "call.image: .*nowhere.png is no picture that can be read"),
        (tmp_path / "text.png", "call.image: .*text.png is no picture that can be read"),
        (tmp_path / "bad.npy", "call.image: .*bad.npy is no array that can be read"),
    ):
        with pytest.raises(RecipeError, match=says):
            with_pictures(pipe, WHOLE | {"image": str(file)})
    with quiet(), pytest.raises(RecipeError, match="pictures that it was not given: image"):
        capture(pipe, make_call(pipe, WHOLE))


@pytest.mark.slow
def test_a_list_of_pictures(files: dict[str, Path], tmp_path: Path) -> None:
    """Two networks of control, of which each has a picture."""
    parts, networks = dict(open_pipeline("stable_diffusion_controlnet").components), [controlnet(), controlnet()]
    for weight in (each for network in networks for each in network.eval().parameters()):
        if not weight.any():  # as they are made, they do nothing
            torch.nn.init.normal_(weight, std=0.2)
    pipe = StableDiffusionControlNetPipeline(**parts | {"controlnet": networks})
    pipe.set_progress_bar_config(disable=True)
    given = {"image": [str(files["palette"]), str(files["clear"])], "height": 32, "width": 32}
    read = with_pictures(pipe, given | {"num_inference_steps": 2, "controlnet_conditioning_scale": [0.7, 0.5]})
    bundle = bundle_of(pipe, "pictures", [lambda prompt: make_call(pipe, read, prompt)], tmp_path)
    with quiet(), torch.no_grad():
        wanted = pipe(**make_call(pipe, read, "a star", 3))[0][0].numpy().transpose(1, 2, 0)
    with slipcast.load(bundle) as loaded:
        pictures = [Image.open(files[name]) for name in ("palette", "clear")]
        found = loaded("a star", image=pictures, seed=3, output_type="np").images[0]
        np.testing.assert_allclose(found, wanted, atol=1e-5)
        turned = loaded("a star", image=pictures[::-1], seed=3, output_type="np").images[0]
        assert np.abs(turned - found).max() > 1e-3
        for other in (pictures[:1], pictures[0]):
            with pytest.raises(RequestError, match="image is a list in this bundle"):
                loaded("a star", image=other, seed=3)
