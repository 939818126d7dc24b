"""A search over the recipe of a captured pipeline: what it may turn, points by `--set`, and the whole way."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from conftest import ROOT, call_cli
from slipcast.bundle.program_manifest import ProgramManifest
from slipcast.bundle.reader import open_any_bundle
from slipcast.errors import RecipeError, ResourceError
from slipcast_compiler.plan_program import ProgramPlan, make_program_plan
from slipcast_compiler.recipe.reading import parse_recipe, read_recipe
from slipcast_compiler.recipe.search import LEVERS
from slipcast_compiler.search.captured import Captured, program_space
from slipcast_compiler.search.space import as_arguments

sys.path.insert(0, str(ROOT / "tests" / "capture"))
from tiny import open_pipeline

RECIPE = """\
name = "tiny"
model.path = "model"
call = { num_inference_steps = 6, height = 32, width = 32 }
evaluate.images = 2
gate.psnr = 8.0
[family]
prompts = ["a red circle", "a blue star", "a small white circle", "the background", "two stars", "a green circle"]
held_out = 0.3
[profile]
prompts = 4
states = 2
[search]
budget_minutes = 0.5
[[targets]]
engine = "openvino"
"""


def planned(folder: Path, name: str, *overrides: str) -> ProgramPlan:
    """The plan of a tiny pipeline, whose recipe lies beside it."""
    if not (folder / "model").exists():
        open_pipeline(name).save_pretrained(folder / "model")
        (folder / "tiny.toml").write_text(RECIPE)
    return make_program_plan(parse_recipe(RECIPE, "recipe", overrides), folder)


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> ProgramPlan:
    """A U-Net of noise levels above 1."""
    return planned(tmp_path_factory.mktemp("xl"), "stable_diffusion_xl")


def moved(plan: ProgramPlan) -> list[dict[str, Any]]:
    """The last value of each dimension, the others as they are in the recipe."""
    space = program_space(plan)
    return [space.own | {name: each.values[-1]} for name, each in space.dimensions.items()]


def test_a_unet_has_all_levers(xl: ProgramPlan) -> None:
    space = program_space(xl)
    assert space.levers == LEVERS
    assert space.dimensions["steps"].own == 6 and space.dimensions["steps"].values == (3, 4, 5, 6)
    assert space.dimensions["sampler"].own == "euler"
    assert space.overrides(space.own) == space.pins == {"profile.sampling": "reference"}


def test_a_point_by_set_is_the_point(xl: ProgramPlan) -> None:
    subject, space = Captured(xl, ""), program_space(xl)
    for point in moved(xl):
        overrides = space.overrides(point)
        words = shlex.split(as_arguments(overrides))
        by_hand, tried = read_recipe(xl.folder / "tiny.toml", words[1::2]), subject.apply(overrides)
        assert tried.recipe.search is None
        assert tried.recipe == by_hand.model_copy(update={"search": None}), overrides
        assert tried.samplings == xl.steps.samplings(by_hand)
        assert tried.recipe.model_fields_set <= by_hand.model_fields_set  # no table that a captured one may not have
    fewer = subject.apply({"sampling.steps": 3})
    assert [each.steps for each in fewer.samplings] == [3] and fewer.samplings[0].sampler == xl.steps.own.sampler  # type: ignore[union-attr]


def test_a_transformer_of_flow_matching(tmp_path: Path) -> None:
    space = program_space(planned(tmp_path, "stable_diffusion_3"))
    assert "caching" not in space.dimensions  # it has no skip connections
    assert set(space.dimensions["timesteps"].values) == {"flow", "flow_uniform", "karras", "dp", "direct"}
    assert {"heads", "ffn", "energy"} <= set(space.dimensions)


def test_steps_of_the_scheduler_stay(xl: ProgramPlan) -> None:
    found = replace(xl.steps.variants[0], loop=None, why_not="its steps are its own")
    own = replace(xl, steps=replace(xl.steps, variants=(found,)), cacheable=False)
    space = program_space(own)
    assert space.levers == ("heads", "ffn", "low_rank", "precision")
    with pytest.raises(RecipeError, match="its steps are its own"):
        Captured(own, "").apply({"sampling.steps": 3})


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ('search.levers=["guidance_interval"]', "call.guidance_scale=1.0"),
            "guidance_interval: this recipe .* no use",
        ),
        (("profile.prompts=3", 'search.levers=["low_rank"]'), "low_rank: this recipe .* no use for it"),
        (('family.prompts=["a", "b", "c", "d"]', 'search.levers=["heads"]'), "heads: this recipe .* no use for it"),
        (('search.levers=["steps"]', "call.num_inference_steps=3"), "nothing to choose between"),
    ],
)
def test_what_has_nothing_to_turn_is_refused(xl: ProgramPlan, overrides: tuple[str, ...], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        program_space(planned(xl.folder, "stable_diffusion_xl", *overrides))


def test_what_cannot_be_measured_is_refused(xl: ProgramPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError, match="in memory up to 3 times"):
        program_space(replace(xl, policies={"openvino-fp32": "sequential"}))
    monkeypatch.setattr("slipcast_compiler.search.captured.available_mb", lambda: 1.0)
    with pytest.raises(ResourceError, match="0.0 GB available"):
        program_space(xl)
    program_space(replace(xl, policies={}, needs=replace(xl.needs, targets={})))  # a GPU's engines are not in memory
    recipe = xl.recipe.model_copy(update={"evaluate": xl.recipe.evaluate.model_copy(update={"originals": "drawn"})})
    with pytest.raises(RecipeError, match="evaluate.originals are of held-out ones"):
        program_space(replace(xl, recipe=recipe))


@pytest.mark.slow  # a search of half a minute, and two compiles
def test_what_is_found_is_compiled(tmp_path: Path) -> None:
    """Of two sizes and a closed family, with stages that points share and stages that they do not."""
    planned(tmp_path, "stable_diffusion_xl")
    listed = ("--set", "call.height=[32, 64]", "--set", "call.width=[32, 64]", "--set", "family.closed=true")
    levers = ("--set", 'search.levers=["steps", "sampler", "precision"]')
    shown = call_cli("compile", "tiny.toml", *listed, *levers, "--dry-run", "--json", cwd=tmp_path)
    assert list(json.loads(shown.stdout)["search"]["values"]) == ["sampler", "steps", "precision"]
    done = call_cli("compile", "tiny.toml", *listed, *levers, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    found = record["search"]
    assert len(found["trials"]) >= 3
    sound = [trial for trial in found["trials"] if "error" not in trial]
    assert 0.4 < sound[0]["ratio"] < 2.5  # the recipe against itself
    assert sound[0]["distance"] < 1e-3  # which is the pipeline, in fp32
    chosen = next(trial for trial in sound if trial["number"] == found["chosen"])
    assert chosen["holds"] and chosen["bounds"]["psnr_worst"] >= 8.0
    manifest = open_any_bundle(tmp_path / "artifacts" / "tiny").manifest
    assert isinstance(manifest, ProgramManifest) and manifest.program.loop
    by_hand = read_recipe(tmp_path / "tiny.toml", shlex.split(found["arguments"])[1::2])
    assert manifest.program.loop.sampling.steps == (by_hand.sampling.steps or 6)
    assert manifest.targets[0].precision == by_hand.targets[0].precision
    assert "search" not in record["recipe"]
    page = (tmp_path / "artifacts" / "tiny" / "report.html").read_text()
    assert '<code id="chosen">' in page and page.count("<circle") >= len(found["front"])
    check_again = parse_recipe(tomli_w.dumps(record["recipe"]), "recipe")
    assert make_program_plan(check_again, tmp_path).recipe.call == by_hand.call | record["recipe"]["call"]
    # The same command takes what was found from the journal, and what was made from the cache.
    again = call_cli("compile", "tiny.toml", *listed, *levers, cwd=tmp_path)
    assert again.returncode == 0 and "choose by search" not in again.stderr, again.stderr
