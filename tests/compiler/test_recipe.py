"""FAULTS row 31: unknown keys, wrong types and contradictions, all at once, with lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from slipcast.errors import RecipeError
from slipcast_compiler.recipe.reading import key_lines, parse_recipe, read_recipe
from slipcast_compiler.recipe.recipe import slots_of

GOOD = """
name = "good"
[model]
path = "models/shapes"
[family]
templates = ["a {color} circle"]
[family.slots]
color = ["red", "blue"]
[[targets]]
engine = "onnxruntime"
"""


@pytest.mark.parametrize("file", sorted(Path("recipes").glob("*.toml")), ids=lambda file: file.stem)
def test_shipped_recipes_are_valid(file: Path) -> None:
    assert read_recipe(file).name == file.stem


def test_row_31_all_problems_at_once_with_their_lines() -> None:
    text = """name = "x y"
[model]
pth = "models/shapes"

[family]
templates = ["a {colour} circle"]
slots.color = ["red"]

[sampling]
sampler = "dpmpp_2n"
steps = "20"
guidance_scale = nan

[[targets]]
engine = "onnxruntime"
precision = "bf16"
[[targets]]
engine = "tensorrt-rxt"
"""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.toml")
    message = str(caught.value)
    for expected in (
        "r.toml:1: name", "r.toml:3: model.pth: unknown key 'pth', did you mean 'path'?",
        "r.toml:2: model.path: missing",
        "colour", "r.toml:10: sampling.sampler", "r.toml:11: sampling.steps", "r.toml:12: sampling.guidance_scale",
        "onnxruntime offers fp32, int8, int4, not bf16", "r.toml:18: targets[1].engine",
    ):  # fmt: skip
        assert expected in message, message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("[gate]\nclip_drop = 0.02\n", "gate.clip_drop needs evaluate.scorer"),
        ("[gate]\nclip_drop_worst = 0.1\n", "gate.clip_drop_worst needs evaluate.scorer"),
        ("[gate]\nretrieval_drop = 0.1\n", "gate.retrieval_drop needs evaluate.scorer"),
        ("[gate]\nlpips = 0.05\n", "gate.lpips needs evaluate.lpips"),
        ('[evaluate]\nout_of_family = ["x"]\nout_of_family_file = "y"\n', "at most one of out_of_family"),
        ("[sampling]\nsteps = 3\ntimesteps = [999.0, 500.0, 1.0]\n", "steps contradicts timesteps"),
        ('[sampling]\nschedule = "karras"\nsigmas = [14.0, 1.0, 0.0]\n', "at most one of schedule"),
        ("[sampling]\neta = 0.5\n", "eta belongs to the sampler ddim"),
        ("[sampling]\nguidance_interval = [5.0, 0.3]\n", "rising"),
        ("[sampling]\nguidance_interval = [0.3]\n", "at least 2 items"),
        ("[sampling]\nsigmas = [14.0, 1.0, 0.0]\n[timesteps]\n", "give one of them"),
        ("[reference]\nguidance_reuse = 2\n", "unknown key 'guidance_reuse'"),
        ("[timesteps]\nmethod = 'guess'\n", "timesteps.method"),
        ("[decode]\ntile = 16\noverlap = 12\n", "overlap"),
        ('[[targets]]\nengine = "onnxruntime"\n', "two targets with the same engine, precision and GPUs"),
        ("[search]\nbudget_minutes = 10\n", "needs a limit in"),
    ],
)
def test_row_31_contradictions(change: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        parse_recipe(GOOD + change, "r.toml")


@pytest.mark.parametrize(
    ("family", "says"),
    [
        ('templates = ["a {x} b"]', "slots that are not defined: x"),
        ('prompts = ["a"]\ntemplates = ["b"]', "exactly one of"),
        ('prompts = ["a", "b"]\nslots.x = ["1"]', "slots that no template uses: x"),
        ('templates = ["a {x}"]\nslots.x = []', "slots without values: x"),
        ('templates = ["a {x"]', "'}'"),
        ('templates = ["a {0.real}"]', "not a slot name"),
        ("held_out = 1.0\nprompts = ['a', 'b']", "less than 1"),
    ],
)
def test_row_31_family_tables(family: str, says: str) -> None:
    text = GOOD.replace('templates = ["a {color} circle"]\n[family.slots]\ncolor = ["red", "blue"]', family)
    with pytest.raises(RecipeError, match=says):
        parse_recipe(text, "r.toml")


def test_overrides_are_toml_values_and_are_named_in_errors() -> None:
    recipe = parse_recipe(GOOD, "r.toml", ["sampling.steps=7", "name=other", "targets.0.engine=openvino"])
    assert (recipe.sampling.steps, recipe.name, recipe.targets[0].engine) == (7, "other", "openvino")
    with pytest.raises(RecipeError, match=r"--set sampling\.steps=no"):
        parse_recipe(GOOD, "r.toml", ["sampling.steps=no"])
    for nonsense in ("steps", "=3", "targets.9.engine=openvino", "name.x=1"):
        with pytest.raises(RecipeError, match="--set"):
            parse_recipe(GOOD, "r.toml", [nonsense])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[sampling]\nsteps = 8\nguidance_interval = [0.3, 5.0]\nguidance_reuse = 1", {"steps": 8}),
        ("[sampling]\nsteps = 8\nschedule = 'karras'\n[reference]\nsteps = 50", {"steps": 50, "schedule": "karras"}),
        ("[sampling]\nsigmas = [9.0, 1.0, 0.0]\n[reference]\nguidance_scale = 3.0",
         {"sigmas": (9.0, 1.0, 0.0), "guidance_scale": 3.0}),
        ("[sampling]\nsigmas = [9.0, 1.0, 0.0]\n[reference]\nsteps = 50", {"steps": 50}),
        ("[sampling]\nsteps = 8\nschedule = 'beta'\n[reference]\ntimesteps = [9.0, 1.0]", {"timesteps": (9.0, 1.0)}),
        ("[sampling]\nsampler = 'ddim'\neta = 0.5\n[reference]\nsampler = 'euler'", {"sampler": "euler"}),
    ],
)  # fmt: skip
def test_what_the_original_is_asked_for(text: str, expected: dict[str, object]) -> None:
    asked = parse_recipe(f"{GOOD}{text}\n", "r.toml").asked_of_original()
    assert asked.model_dump(exclude_none=True) == expected


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe"):
        read_recipe(tmp_path / "absent.toml")
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(tmp_path / "latin.toml")
    with pytest.raises(RecipeError, match="line 2"):
        parse_recipe("\nname = ?\n", "r.toml")


def test_lines_of_keys_in_every_notation() -> None:
    lines = key_lines(
        '# note\na.b = 1\n\n[c]\nd = [\n  1,\n  2,\n]\ne = { f = 1 }\n[[g]]\nh = """\nx\n"""\n[[g]]\nh = 2\n'
    )
    assert lines[("a", "b")] == 2
    assert lines[("c",)] == 4
    assert lines[("c", "d")] == 5
    assert lines[("c", "e", "f")] == 9
    assert lines[("g", 0, "h")] == 11
    assert lines[("g", 1, "h")] == 15


def test_slots() -> None:
    assert slots_of("a {size} {color} thing, {{literal}}") == ["size", "color"]
