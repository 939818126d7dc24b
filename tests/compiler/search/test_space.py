"""Which levers there are for a recipe, and what their points are as overrides."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from explored import RECIPE, planned
from keys import Keys, keys  # noqa: F401 - a fixture

from slipcast.errors import RecipeError
from slipcast.progress import SilentStages
from slipcast_compiler.graphs import make_graphs
from slipcast_compiler.plan import Plan, make_plan
from slipcast_compiler.recipe.reading import parse_recipe, read_recipe
from slipcast_compiler.recipe.search import LEVERS as RECIPE_LEVERS
from slipcast_compiler.search import levers
from slipcast_compiler.search.described import Described, make_candidate
from slipcast_compiler.search.levers import LEVERS
from slipcast_compiler.search.space import Space, as_arguments

SHAPES = Path("recipes/models/shapes").resolve()
INT8 = ("targets=[{engine='openvino', precision='int8'}]", "passes.quantize.max_error=0.05")
FEW_STEPS = """
name = "x"
model.path = "model"
family.prompts = ["a red circle", "a blue star"]
targets = [{ engine = "onnxruntime" }]
gate.psnr = 20.0
search.budget_minutes = 1
"""


@pytest.fixture(autouse=True)
def _checkpoints_are_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each plan takes a second to look; there are many of the same one here."""
    monkeypatch.setattr("slipcast_compiler.plan.check_components", lambda original: None)


def distilled(folder: Path, scheduler: str) -> Plan:
    """The reference model under the scheduler's config of one that was distilled to few steps."""
    model = folder / "model"
    (model / "scheduler").mkdir(parents=True)
    for part in SHAPES.iterdir():
        if part.name != "scheduler":
            (model / part.name).symlink_to(part)
    config = json.loads((SHAPES / "scheduler/scheduler_config.json").read_text())
    config |= {"_class_name": scheduler, "timestep_spacing": "trailing", "rescale_betas_zero_snr": False}
    (model / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    return make_plan(parse_recipe(FEW_STEPS, "x.toml"), folder)


def moved(plan: Plan) -> list[tuple[str, dict[str, Any]]]:
    """Every value of every dimension, the others as they are in the recipe."""
    space = Space(Described(plan))
    return [
        (name, space.own | {name: value})
        for name, each in space.dimensions.items() for value in each.values if value != each.own
    ]  # fmt: skip


def test_every_lever_applies_to_the_shipped_recipe_in_fp32() -> None:
    space = Space(Described(planned("targets=[{engine='openvino', precision='fp32'}]")))
    assert space.dimensions["precision"].values == ("fp32", "bf16")
    assert space.levers == tuple(LEVERS)
    assert all(len(each.values) > 1 and each.own in each.values for each in space.dimensions.values())
    assert space.dimensions["steps"].values[0] == 3 and space.dimensions["steps"].own == 6


def test_the_recipe_is_the_point_without_overrides() -> None:
    plan = planned()
    space = Space(Described(plan))
    assert space.overrides(space.own) == space.pins
    same = Described(plan).apply(space.pins)
    assert (same.sampling, same.reference, same.recipe.passes) == (plan.sampling, plan.reference, plan.recipe.passes)
    assert same.recipe.search is None


@pytest.mark.parametrize("recipe", [RECIPE, Path("recipes/shapes-circles.toml")])
def test_a_point_by_set_is_the_point(recipe: Path) -> None:
    plan = make_plan(read_recipe(recipe, ["search.budget_minutes=1"]), recipe.parent)
    space = Space(Described(plan))
    for name, point in moved(plan):
        words = shlex.split(as_arguments(space.overrides(point)))
        assert words[::2] == ["--set"] * (len(words) // 2)
        by_hand = make_plan(read_recipe(recipe, words[1::2]), recipe.parent)
        tried = Described(plan).apply(space.overrides(point))
        assert tried.recipe == by_hand.recipe, name
        assert (tried.sampling, tried.reference) == (by_hand.sampling, by_hand.reference)
        assert tried.reference == plan.reference  # which the trial is judged against
        assert tried.recipe != Described(plan).apply(space.pins).recipe


def test_engines_are_shared_by_points_that_differ_in_sampling(keys: Keys) -> None:  # noqa: F811
    plan = planned("targets=[{engine='openvino', precision='fp32'}]", "sampling.guidance_interval=[1.0, 20.0]")
    space = Space(Described(plan))

    def engines(point: dict[str, Any]) -> str:
        return make_candidate(Described(plan).trial(space.overrides(point)), keys).key

    own = engines(space.own)
    deciding = {
        dimension for name in LEVERS if LEVERS[name].engine for dimension in LEVERS[name].dimensions(space.facts)
    }
    assert deciding == {"caching", "heads", "ffn", "energy", "precision"}
    for name, point in moved(plan):
        if point["caching"] and point["sampler"] == "pndm":
            continue
        assert (engines(point) != own) == (name in deciding), name
        assert engines(space.own | space.engine(point)) == engines(point)
        assert space.is_dear(point) == (point["timesteps"] in ("dp", "direct") or point["caching"])


@pytest.mark.parametrize("more", [(), ("caching.full_steps=3",), ("timesteps.method='dp'",), INT8])
def test_a_compile_finds_all_that_its_trial_has_made(keys: Keys, more: tuple[str, ...]) -> None:  # noqa: F811
    """Of the recipe's own point, and of another: the same stages, under the same keys."""
    plan = planned(*more)
    space = Space(Described(plan))
    for point in (space.own, space.own | {"heads": 0.15, "steps": 5}):
        trial = make_graphs(Described(plan).trial(space.overrides(point)), keys, SilentStages())
        made = set(keys.asked)
        compiled = make_graphs(Described(plan).apply(space.overrides(point)), keys, SilentStages())
        assert set(keys.asked) == made
        assert trial.components == compiled.components
        assert compiled.sampling == trial.sampling and compiled.caching == trial.caching
    assert {name.rpartition("-")[0] for name in made} >= {"profile", "pass", "export", "parts"}


def test_the_recipe_has_the_names_of_all_levers() -> None:
    assert tuple(LEVERS) == RECIPE_LEVERS


def test_levers_that_are_named_are_turned_and_no_others() -> None:
    space = Space(Described(planned('search.levers=["heads", "steps"]')))
    assert list(space.dimensions) == ["steps", "heads"]
    assert Space(Described(planned('search.objective="memory"'))).levers == ("heads", "ffn", "low_rank")


def test_caching_where_no_step_can_be_shallow_is_a_contradiction() -> None:
    plan = planned("sampling.steps=2", "reference.steps=20")
    space = Space(Described(plan))
    Described(plan).apply(space.overrides(space.own | {"caching": True}))
    with pytest.raises(RecipeError, match="more often than once a step"):
        Described(plan).apply(space.overrides(space.own | {"caching": True, "sampler": "pndm"}))


def test_caching_that_the_recipe_asks_for_stays() -> None:
    plan = planned("caching.full_steps=3", 'search.levers=["steps", "sampler", "caching"]')
    space = Space(Described(plan))
    assert space.dimensions["caching"].values == (True,)
    for name, point in moved(plan):
        if name != "steps" and point["sampler"] != "pndm":  # with which it cannot be
            caching = Described(plan).apply(space.overrides(point)).recipe.caching
            assert caching and caching.full_steps == 3


def test_values_of_the_recipe_are_among_those_that_are_tried() -> None:
    plan = planned("passes.prune_heads.ratio=0.33", "sampling.steps=9", "sampling.schedule=beta")
    space = Space(Described(plan))
    own = {name: space.own[name] for name in ("heads", "steps", "timesteps")}
    assert own == {"heads": 0.33, "steps": 9, "timesteps": "beta"}


def test_lists_that_are_given_or_looked_for_stay() -> None:
    listed = Space(Described(planned("sampling={sampler='euler', sigmas=[14.0, 3.0, 1.0, 0.0], guidance_scale=4.0}")))
    assert not {"steps", "timesteps"} & set(listed.dimensions)
    found = Space(Described(planned("timesteps.method=dp")))
    assert found.dimensions["timesteps"].values == ("dp", "direct")


@pytest.mark.parametrize("scheduler", ["LCMScheduler", "EulerDiscreteScheduler"])
def test_few_step_checkpoints_have_fewer_levers(scheduler: str, tmp_path: Path) -> None:
    plan = distilled(tmp_path, scheduler)
    space = Space(Described(plan))
    assert not {"sampler", "timesteps", "guidance_low", "guidance_high"} & set(space.dimensions)
    assert space.dimensions["steps"].values == (1, 2, 3, 4)
    assert "heads" not in space.dimensions  # two prompts are too few to choose by
    table = plan.recipe.search
    assert table
    for lever in ("sampler", "timesteps", "guidance_interval", "caching", "heads"):
        recipe = plan.recipe.model_copy(update={"search": table.model_copy(update={"levers": (lever,)})})
        with pytest.raises(RecipeError, match=f"{lever}: this recipe and its checkpoint have no use for it"):
            Space(Described(dataclasses.replace(plan, recipe=recipe)))


def test_int8_is_for_large_models_and_brings_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "precision" not in Space(Described(planned())).dimensions
    monkeypatch.setattr(levers, "LARGE", 10_000_000)
    plan = planned()
    space = Space(Described(plan))
    assert space.dimensions["precision"].values == ("bf16", "int8")
    tried = Described(plan).apply(space.overrides(space.own | {"precision": "int8"}))
    assert tried.recipe.targets[0].precision == "int8" and tried.recipe.passes.quantize
    quantised = planned("targets=[{engine='openvino', precision='int8'}]", "passes.quantize.max_error=0.05")
    assert "precision" not in Space(Described(quantised)).dimensions


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ('search.levers=["heds"]', "search.levers.*'sampler'.*'precision'"),
        ("search.budget_minutes=0", "search.budget_minutes.*greater than 0"),
        ("search.budget_minutes=-3", "search.budget_minutes.*greater than 0"),
        ('search.objective="speed"', "search.objective.*'latency' or 'memory'"),
        ("search.budget=3", "did you mean 'budget_minutes'"),
        ("gate={}", r"\[search\] needs a limit in \[gate\]"),
    ],
)
def test_wrong_input(override: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        planned(override)


def test_nothing_to_choose_between() -> None:
    with pytest.raises(RecipeError, match="nothing to choose between"):
        Space(Described(planned('search.levers=["steps"]', "sampling.steps=3", "reference.steps=3")))


def test_overrides_are_plain_json() -> None:
    plan = planned()
    for _, point in moved(plan):
        overrides = Space(Described(plan)).overrides(point)
        assert json.loads(json.dumps(overrides)) == overrides
