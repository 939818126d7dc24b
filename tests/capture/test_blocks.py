"""Pipelines of blocks: opened, called and captured as others are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import PIPELINES, call_of, open_pipeline

from slipcast.errors import ArtifactError, RecipeError
from slipcast_compiler.capture.arguments import fixed_arguments
from slipcast_compiler.capture.blocks import parameters_of, with_manners
from slipcast_compiler.capture.call import make_call
from slipcast_compiler.capture.open import open_with_weights, open_without_weights
from slipcast_compiler.capture.record import capture
from slipcast_compiler.host.quiet import quiet
from slipcast_compiler.model.configs import read_index

MADE = "StableDiffusionXLModularPipeline"
SIZE = {"height": 32, "width": 32}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as the pipeline of blocks saves it."""
    root = tmp_path_factory.mktemp("blocks")
    with quiet():
        open_pipeline("stable_diffusion_xl_of_blocks").save_pretrained(str(root), overwrite_modular_index=True)
    return root


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same components, as a pipeline without blocks saves them."""
    root = tmp_path_factory.mktemp("plain")
    with quiet():
        open_pipeline("stable_diffusion_xl").save_pretrained(root)
    return root


def test_a_saved_one_is_opened_without_weights_and_with_them(saved: Path) -> None:
    opened, whole = open_without_weights(saved), open_with_weights(saved)
    assert {each.device.type for each in opened.unet.parameters()} == {"meta"}
    call = call_of("stable_diffusion_xl_of_blocks", "a red star", 3)
    with torch.no_grad():
        wanted = open_pipeline("stable_diffusion_xl_of_blocks")(**dict(call))
        call["generator"] = torch.Generator("cpu").manual_seed(3)
        assert torch.equal(whole(**call), wanted)


def test_any_directory_may_be_opened_as_one(saved: Path, plain: Path) -> None:
    programs = []
    for pipe in (open_without_weights(saved), open_without_weights(plain, MADE)):
        programs.append(capture(pipe, make_call(pipe, SIZE)))
    assert len({str([type(event) for event in program.events]) for program in programs}) == 1
    assert programs[0].pipeline == MADE


def test_one_may_be_opened_as_a_pipeline_without_blocks(saved: Path) -> None:
    """With weights, too: what a dry run opens, a compile opens."""
    name = "StableDiffusionXLPipeline"
    opened, whole = open_without_weights(saved, name), open_with_weights(saved, name)
    assert capture(opened, make_call(opened, SIZE)).pipeline == type(whole).__name__ == name
    call = [call_of("stable_diffusion_xl", "a red star", 3) for _ in range(2)]
    with torch.no_grad():
        assert torch.equal(whole(**call[0])[0], open_pipeline("stable_diffusion_xl")(**call[1])[0])


def test_its_components_may_be_left_out_where_a_call_needs_none(saved: Path, tmp_path: Path) -> None:
    for file in saved.iterdir():
        if file.name != "vae":
            (tmp_path / file.name).symlink_to(file)
    pipe = open_without_weights(tmp_path)
    assert pipe.vae is None
    latent = capture(pipe, make_call(pipe, SIZE | {"output": "latents", "output_type": "latent"}))
    assert latent.results
    with pytest.raises(RecipeError, match="cannot be captured") as refused:
        capture(pipe, make_call(pipe, SIZE))
    assert "vae" in str(refused.value.hint)


def test_guidance_is_an_argument_of_the_call() -> None:
    pipe = open_pipeline("stable_diffusion_xl_of_blocks")
    assert parameters_of(pipe)["guidance_scale"].default == pipe.guider.guidance_scale == 7.5
    assert {"guidance_scale", "guidance_scale_2"} <= parameters_of(open_pipeline("wan_2_2_of_blocks")).keys()

    def drawn(**given: float) -> torch.Tensor:
        made: torch.Tensor = pipe(**call_of("stable_diffusion_xl_of_blocks", "a red star", 3), **given)
        return made

    with torch.no_grad():
        usual, other = drawn(), drawn(guidance_scale=2.0)
        pipe.guider.guidance_scale = 2.0
        asked = drawn()
        pipe.guider.guidance_scale = 7.5
    assert not torch.equal(usual, other)
    assert torch.equal(other, asked)


def test_what_only_other_blocks_read_is_not_fixed() -> None:
    pipe = open_pipeline("flux_img2img_of_blocks")
    known = parameters_of(pipe)
    for name, runs in (("flux_of_blocks", False), ("flux_img2img_of_blocks", True)):
        call = {key: value for key, value in call_of(name, "a red star", 3).items() if key != "strength"}
        assert ("strength" in fixed_arguments(pipe, call, None)) is runs
    assert {"prompt", "strength", "output"} <= known.keys()
    assert set(PIPELINES["flux_of_blocks"].call) <= known.keys()


def test_an_argument_that_no_block_reads_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"call\.guidance_scael") as refused:
        make_call(open_pipeline("stable_diffusion_xl_of_blocks"), {"guidance_scael": 3.0})
    assert refused.value.hint == "did you mean guidance_scale?"


@pytest.mark.parametrize(
    "changed", [{}, {"_class_name": "ModularPipeline"}, {"_blocks_class_name": "SequentialPipelineBlocks"}]
)
def test_blocks_of_a_checkpoint_never_run(saved: Path, tmp_path: Path, changed: dict[str, str]) -> None:
    """Nor do others in their place."""
    index = json.loads((saved / "modular_model_index.json").read_text("utf-8"))
    index |= {"_blocks_class_name": "OwnBlocks"} | changed
    (tmp_path / "modular_model_index.json").write_text(json.dumps(index), "utf-8")
    (tmp_path / "block.py").write_text("raise SystemExit('this ran')", "utf-8")
    with pytest.raises(ArtifactError, match="its blocks cannot be made"):
        open_without_weights(tmp_path)


def test_what_blocks_make_need_not_be_given() -> None:
    """What some of them require others make; pictures are known by their type, or their name."""
    import diffusers

    for name, pictures in (
        ("WanImage2VideoModularPipeline", {"image", "last_image"}),
        ("FluxModularPipeline", {"image", "resized_image"}),
    ):
        known = parameters_of(with_manners(getattr(diffusers, name)()))
        assert {key for key, each in known.items() if "PIL" in str(each.annotation)} == pictures
        assert not {key for key, each in known.items() if each.default is each.empty} - pictures
    assert "audio_guidance_scale" in parameters_of(with_manners(diffusers.LTX2ModularPipeline()))


def test_it_stays_of_its_class() -> None:
    import diffusers

    pipe = getattr(diffusers, MADE)()
    assert isinstance(with_manners(pipe), getattr(diffusers, MADE))
    assert type(pipe).__name__ == MADE


def test_a_list_of_three_in_a_config_is_no_component(tmp_path: Path) -> None:
    made = ["diffusers", "UNet2DConditionModel", {"subfolder": "unet"}]
    entries = {"layers": [1, 2, 3], "unet": made, "vae": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps(entries), "utf-8")
    assert read_index(tmp_path) == entries | {"unet": made[:2]}
