"""`slipcast init` writes a recipe that the compiler takes as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import ROOT, run_cli
from slipcast.errors import RecipeError
from slipcast_compiler.init import write_recipe
from slipcast_compiler.recipe.reading import read_recipe


def test_the_recipe_it_writes_can_be_compiled(tmp_path: Path) -> None:
    (tmp_path / "my prompts.txt").write_text("a red circle\na blue circle\na café\n", "utf-8")
    done = run_cli("init", str(ROOT / "recipes/models/shapes"), "my prompts.txt", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    recipe = json.loads(done.stdout)["recipe"]
    parsed = read_recipe(tmp_path / recipe)
    assert (parsed.name, parsed.sampling.width, parsed.sampling.height) == ("shapes-my-prompts", 64, 64)
    plan = run_cli("compile", recipe, "--dry-run", "--json", cwd=tmp_path)
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
