"""What a recipe leaves open, as its checkpoint decides it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slipcast.errors import RecipeError
from slipcast_compiler.estimate import summarise
from slipcast_compiler.model.checkpoint import Checkpoint
from slipcast_compiler.plan import Plan, make_plan
from slipcast_compiler.recipe.reading import parse_recipe

SHAPES = Path("recipes/models/shapes").resolve()
EULER = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": False}


def planned(folder: Path, recipe: str = "", **scheduler: Any) -> Plan:
    """A plan for the reference model under another scheduler's config."""
    model = folder / "model"
    model.mkdir(exist_ok=True)
    for part in SHAPES.iterdir():
        if part.name != "scheduler":
            (model / part.name).symlink_to(part)
    (model / "scheduler").mkdir()
    config = json.loads((SHAPES / "scheduler/scheduler_config.json").read_text()) | scheduler
    (model / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    text = (
        'name = "x"\nmodel.path = "model"\nfamily.prompts = ["a red circle", "a blue star"]\n'
        'targets = [{ engine = "onnxruntime" }]\n'
    )
    return make_plan(parse_recipe(text + recipe, "x.toml"), folder)


@pytest.mark.parametrize(
    ("scheduler", "found"),
    [
        ({"_class_name": "LCMScheduler"}, ("lcm", "lcm")),
        ({"_class_name": "EulerDiscreteScheduler", **EULER}, ("euler", "trailing")),  # as sd-turbo, SDXL-Lightning
        ({"_class_name": "EulerAncestralDiscreteScheduler", **EULER}, ("euler_ancestral", "trailing")),  # sdxl-turbo
    ],
)
def test_few_step_checkpoints(scheduler: dict[str, Any], found: tuple[str, str], tmp_path: Path) -> None:
    plan = planned(tmp_path, **scheduler)
    sampling = plan.sampling
    assert (sampling.sampler, sampling.schedule, sampling.steps, sampling.guidance_scale) == (*found, 4, 1.0)
    assert plan.reference == sampling
    assert summarise(plan)["few_step"]


@pytest.mark.parametrize(
    "scheduler",
    [
        {},
        {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"},  # as SDXL
        {"_class_name": "EulerDiscreteScheduler", **EULER, "rescale_betas_zero_snr": True},
        {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"},
    ],
    ids=["ddim", "sdxl", "zero_snr", "trailing_ddim"],
)  # fmt: skip
def test_other_checkpoints(scheduler: dict[str, Any], tmp_path: Path) -> None:
    plan = planned(tmp_path, **scheduler)
    sampling = plan.sampling
    assert (sampling.sampler, sampling.steps, sampling.guidance_scale) == ("dpmpp_2m", 20, 5.0)
    assert not summarise(plan)["few_step"]


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("sampling.guidance_interval = [0.3, 5.0]", "guidance_interval: there is no guidance.*distilled"),
        ("sampling.guidance_reuse = 1", "guidance_reuse: there is no guidance"),
        ("sampling.guidance_rescale = 0.5", "guidance_rescale: there is no guidance.*distilled"),
        ("timesteps.method = 'dp'", r"\[timesteps\].*knows no other timesteps"),
        ("early_exit = {}", r"\[early_exit\].*takes all of them"),
    ],
)
def test_what_few_steps_have_no_use_for(recipe: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=says):
        planned(tmp_path, recipe, _class_name="LCMScheduler")


def test_guidance_may_be_asked_for_all_the_same(tmp_path: Path) -> None:
    recipe = "sampling.guidance_scale = 2.0\nsampling.guidance_reuse = 1\nsampling.steps = 8"
    sampling = planned(tmp_path, recipe, _class_name="LCMScheduler").sampling
    assert (sampling.guidance_scale, sampling.guidance_reuse, sampling.steps) == (2.0, 1, 8)


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("sampling.guidance_scale = 1.0\nsampling.guidance_reuse = 1", "there is no guidance to leave out\n"),
        ("sampling.guidance_scale = 1.0\nsampling.guidance_rescale = 0.5", "there is no guidance to rescale\n"),
        ("sampling.steps = 2\nearly_exit = {}", r"\[early_exit\]: of 2 steps none can be left out"),
        ("sampling.sampler = 'euler_ancestral'\ntimesteps = {}", "draws noise"),
        ("sampling.sampler = 'ddim'\nsampling.eta = 0.5\ntimesteps = {}", "draws noise"),
        ("sampling.sampler = 'dpm2'\ntimesteps = {}", "between its levels"),
        ("sampling.steps = 30\ntimesteps.fine_steps = 30", "fine_steps is no finer"),
        ("sampling.sampler = 'ddim'\nsampling.eta = 0.5\nreference = { sampler = 'euler', eta = 0.5 }", "eta belongs"),
    ],
)  # fmt: skip
def test_contradictions(recipe: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=says):
        planned(tmp_path, recipe)


def test_the_reference_is_plain(tmp_path: Path) -> None:
    """Whatever the bundle leaves out, the original that it is judged against does not."""
    recipe = "sampling = { steps = 6, guidance_interval = [0.3, 5.0], guidance_reuse = 1 }\nreference.steps = 20"
    plan = planned(tmp_path, recipe)
    assert plan.sampling.requires == ("guidance_interval", "guidance_reuse")
    assert (plan.sampling.steps, plan.reference.steps) == (6, 20)
    assert plan.reference.requires == ()
    assert plan.reference.sampler == plan.sampling.sampler
    assert summarise(plan)["reference"]["steps"] == 20


@pytest.mark.parametrize("config", [{"steps_offset": 0}, {"steps_offset": 1}, {}], ids=str)
def test_the_offset_is_what_diffusers_pipeline_makes_it(config: dict[str, Any], tmp_path: Path) -> None:
    plan = planned(tmp_path, "sampling.sampler = 'ddim'", steps_offset=config.get("steps_offset"))
    assert plan.sampling.noise.steps_offset == 1
    assert plan.sampling.lay(4).timesteps == (751, 501, 251, 1)


def test_a_sampler_has_the_options_of_the_config(tmp_path: Path) -> None:
    plan = planned(tmp_path, _class_name="DPMSolverMultistepScheduler", solver_type="heun", use_lu_lambdas=True)
    assert (plan.sampling.sampler, plan.sampling.schedule) == ("dpmpp_2m+solver_type=heun", "lu")


def test_a_key_that_is_not_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"scheduler_config\.json: solver_order"):
        planned(tmp_path, _class_name="DPMSolverMultistepScheduler", solver_order=3)


@pytest.mark.parametrize(
    ("version", "sample_size", "size"),
    [("0.6.0", 32, 256), ("0.8.1", 32, 256), ("0.9.0", 32, 128), ("0.6.0", 96, 384), (None, 32, 128)],
)
def test_the_size_that_diffusers_takes(version: str | None, sample_size: int, size: int, tmp_path: Path) -> None:
    """Configs of diffusers before 0.9 have sample_size 32 where their models are of 64; latents are a quarter here."""
    (tmp_path / "model").mkdir()
    for part in SHAPES.iterdir():
        (tmp_path / "model" / part.name).symlink_to(part)
    (tmp_path / "model" / "unet").unlink()
    (tmp_path / "model" / "unet").mkdir()
    config = json.loads((SHAPES / "unet/config.json").read_text()) | {"sample_size": sample_size}
    del config["_diffusers_version"]
    (tmp_path / "model/unet/config.json").write_text(
        json.dumps(config | ({"_diffusers_version": version} if version else {}))
    )
    assert Checkpoint(tmp_path / "model", "m").native_size == (size, size)
