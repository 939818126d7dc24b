"""`slipcast init` writes a recipe that the compiler takes as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, call_cli
from slipcast.errors import RecipeError
from slipcast_compiler.init import first_name, read_first_recipe, write_recipe
from slipcast_compiler.recipe.reading import parse_recipe, read_recipe


def test_the_recipe_it_writes_can_be_compiled(tmp_path: Path) -> None:
    (tmp_path / "my prompts.txt").write_text("a red circle\na blue circle\na café\n", "utf-8")
    done = call_cli("init", str(ROOT / "recipes/models/shapes"), "my prompts.txt", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    recipe = json.loads(done.stdout)["recipe"]
    parsed = read_recipe(tmp_path / recipe)
    assert (parsed.name, parsed.sampling.width, parsed.sampling.height) == ("shapes-my-prompts", 64, 64)
    plan = call_cli("compile", recipe, "--dry-run", "--json", cwd=tmp_path)
    assert plan.returncode == 0, plan.stderr
    summary = json.loads(plan.stdout)
    assert summary["family"] == {"calibration": 2, "held_out": 1}
    assert summary["components"]["denoiser"]["parameters"] == pytest.approx(11.2e6, rel=0.01)
    assert not (tmp_path / "artifacts").exists()


def test_what_it_refuses(tmp_path: Path) -> None:
    model = ROOT / "recipes/models/shapes"
    prompts = tmp_path / "p.txt"
    with pytest.raises(RecipeError, match="no such file"):
        write_recipe(model, prompts, None)
    prompts.write_text("")
    with pytest.raises(RecipeError, match="no prompts"):
        write_recipe(model, prompts, None)
    prompts.write_text("a\nb\n")
    with pytest.raises(RecipeError, match="takes prompts"):
        write_recipe(model, None, None)
    with pytest.raises(RecipeError, match="cannot be written"):
        write_recipe(model, prompts, tmp_path / "nowhere" / "r.toml")
    (tmp_path / "r.toml").write_text("")
    with pytest.raises(RecipeError, match="exists already"):
        write_recipe(model, prompts, tmp_path / "r.toml")


@pytest.mark.parametrize(
    ("model", "prompts", "name"),
    [
        ("models--org--some-model/snapshots/0123abcd", "my prompts.txt", "some-model-my-prompts"),
        ("Café Model", "p.txt", "Cafe-Model-p"),
        ("модель", "подсказки.txt", "model-prompts"),
        ("模型", None, "model"),
        ("...", "-.txt", "model-prompts"),
        ("m" * 300, "p.txt", "m" * 100),
    ],
)
def test_the_name_is_one_that_a_recipe_may_have(model: str, prompts: str | None, name: str) -> None:
    assert first_name(Path("/models") / model, Path(prompts) if prompts else None) == name
    parse_recipe(f'name = "{name}"\nmodel.path = "m"\ntargets = [{{ engine = "onnxruntime" }}]\n', "r.toml")


@pytest.mark.parametrize(
    ("scheduler", "found"),
    [
        ({"_class_name": "LCMScheduler"}, ("lcm", 4, 1.0)),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}, ("euler", 4, 1.0)),
        ({}, ("dpmpp_2m", 20, 5.0)),
    ],
    ids=str,
)
def test_it_writes_what_a_plan_would_take(scheduler: dict[str, Any], found: tuple[Any, ...], tmp_path: Path) -> None:
    model, shapes = tmp_path / "model", ROOT / "recipes/models/shapes"
    (model / "scheduler").mkdir(parents=True)
    for part in shapes.iterdir():
        if part.name != "scheduler":
            (model / part.name).symlink_to(part)
    config = json.loads((shapes / "scheduler/scheduler_config.json").read_text()) | scheduler
    (model / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    (tmp_path / "p.txt").write_text("a red circle\na blue circle\n")
    sampling = read_recipe(write_recipe(model, tmp_path / "p.txt", tmp_path / "r.toml")).sampling
    assert (sampling.sampler, sampling.steps, sampling.guidance_scale) == found


def test_a_model_is_compiled_by_the_recipe_that_it_would_write(tmp_path: Path) -> None:
    """The recipe is left beside the bundle; another one there is not overwritten."""
    (tmp_path / "p.txt").write_text("a red circle\na blue circle\n")
    model, prompts, bundle = ROOT / "recipes/models/shapes", tmp_path / "p.txt", tmp_path / "out" / "bundle"
    recipe, file = read_first_recipe(model, prompts, bundle, ["sampling.steps=7"], False)
    assert (recipe.name, recipe.sampling.steps, file) == ("shapes-p", 7, tmp_path / "out" / "bundle.toml")
    assert (file.parent / read_recipe(file).model.path).resolve() == model.resolve()
    assert read_first_recipe(model, prompts, bundle, [], False)[1] == file  # again, such as after an interruption
    file.write_text(file.read_text() + "\n# mine\n")
    with pytest.raises(RecipeError, match="another recipe"):
        read_first_recipe(model, prompts, bundle, [], False)
    done = call_cli("compile", str(ROOT / "recipes/shapes-circles.toml"), "--prompts", str(prompts), "--dry-run")
    assert done.returncode == 2
    assert "--prompts is for a MODEL" in done.stderr
    done = call_cli("compile", str(model), "--dry-run")
    assert done.returncode == 2
    assert "takes prompts" in done.stderr
