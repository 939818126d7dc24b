"""Programs that list several values of a number: a run chooses, and what is not listed is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import programs
import pytest
from fakes import Fakes
from programs import LATENT, PICTURE, write_program

import slipcast
from slipcast.bundle.manifest import read_any_manifest
from slipcast.cli.inspect import render
from slipcast.cli.program_lines import program_lines
from slipcast.errors import ArtifactError, RequestError

WIDE = (1, 3, 16, 32)


def wide_decode(arrays: Any) -> dict[str, Any]:
    return {"image": np.repeat(programs.decode(arrays)["image"], 2, 3)}


def steps(rows: list[int], decoder: str = "decoder") -> dict[str, Any]:
    """Calls, and after which of them a step is over, with a step for each row."""
    calls = programs.program()["calls"][:2]
    sample = "noise"
    for step, row in enumerate(rows):
        given = {"sample": sample, "context": "hidden", "other": "unhidden"}
        calls.append(programs.call("denoiser", given, {"prediction": f"eps{step}"}, row))
        given = {"sample": sample, "prediction": f"eps{step}"}
        calls.append(programs.call("update", given, {"sample": (sample := f"x{step}")}, row))
    calls.append(programs.call(decoder, {"latent": sample}, {"image": "image"}))
    return {"calls": calls, "steps": [3 + 2 * step for step in range(len(rows))]}


def variant(decoder: str = "decoder", rows: tuple[int, ...] = (0, 1), **fixed: Any) -> dict[str, Any]:
    whole = programs.program()
    return {
        "fixed": whole["fixed"] | {"width": 16} | fixed, "sources": whole["sources"], "results": ["image"],
        **steps(list(rows), decoder),
    }  # fmt: skip


def listing() -> dict[str, Any]:
    """The manifest's keys of a program with two numbers of steps, or a wide picture of two steps."""
    others = [
        variant(num_inference_steps=1, rows=(1,)),
        variant("decoder_2", height=24, width=32),
        variant("decoder_2", height=24, width=32, num_inference_steps=1, rows=(1,)),
    ]
    parts = programs.components()
    parts["decoder_2"] = {"inputs": [fakes.spec("latent", *LATENT)], "outputs": [fakes.spec("image", *WIDE)]}
    whole = programs.program(variants=others)
    whole["fixed"]["width"] = 16
    return {"components": parts, "program": whole}


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    found = programs.use(fakes.install(monkeypatch))
    found.functions["decoder_2"] = wide_decode
    return found


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_program(tmp_path / "bundle", **listing())


def test_a_run_chooses_and_takes_the_first_that_goes_with_it(engines: Fakes, bundle: Path) -> None:
    with slipcast.load(bundle) as pipe:
        for asked, count, shape in (
            ({}, 2, PICTURE), ({"num_inference_steps": 2}, 2, PICTURE), ({"num_inference_steps": 1.0}, 1, PICTURE),
            ({"height": 24}, 2, WIDE), ({"width": 32, "num_inference_steps": 1}, 1, WIDE),
            ({"height": 24, "width": 32, "guidance_scale": 4.5, "tiled": False}, 2, WIDE),
        ):  # fmt: skip
            engines.calls.clear()
            found = pipe("a star", seed=3, output_type="np", **asked)
            assert found.images.shape == (1, *shape[2:], 3)
            assert found.steps == (count,) and engines.count("denoiser") == count
        (timestep,) = (arrays.timestep for name, arrays in _ran(engines, pipe, num_inference_steps=1))
        assert timestep == programs.TABLE["denoiser.timestep"][1]


def _ran(engines: Fakes, pipe: Any, **asked: Any) -> list[tuple[str, Any]]:
    engines.calls.clear()
    pipe("a star", **asked)
    return [(name, arrays) for name, arrays in engines.calls if name == "denoiser"]


def test_steps_are_counted_as_they_are_chosen(engines: Fakes, bundle: Path) -> None:
    seen: list[tuple[int, int]] = []
    pipe = slipcast.load(bundle)
    pipe("a", num_inference_steps=1, callback_on_step_end=lambda _, *step: seen.append(step))
    assert seen == [(0, 1)]


@pytest.mark.parametrize("residency", ["all", "sequential"])
def test_engines_of_others_are_opened_when_they_are_asked_for(engines: Fakes, bundle: Path, residency: Any) -> None:
    with slipcast.load(bundle, residency=residency) as pipe:
        pipe("a star")
        assert "decoder_2" not in {name for name, _ in engines.opened}
        pipe("a star", height=24)
        assert "decoder_2" in {name for name, _ in engines.opened}
        pipe("a star", height=24)
        assert len([name for name, _ in engines.opened if name == "decoder_2"]) == (1 if residency == "all" else 2)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"num_inference_steps": 3}, ["num_inference_steps is one of a few", "expected: 2 or 1", "got:      3"]),
        ({"num_inference_steps": True}, ["num_inference_steps is one of a few"]),
        ({"guidance_scale": 1.0}, ["guidance_scale is fixed", "4.5"]),
        ({"height": 24, "width": 16}, ["height and width do not go together", "height=24 with width=32"]),
        ({"depth": 24}, ["no argument 'depth'", "num_inference_steps"]),
    ],
)
def test_what_is_not_listed_is_refused_before_any_engine_runs(
    engines: Fakes, bundle: Path, asked: dict[str, Any], says: list[str]
) -> None:
    with pytest.raises(RequestError) as caught:
        slipcast.load(bundle)("a star", **asked)
    assert all(part in str(caught.value) for part in says), caught.value
    assert engines.calls == []


def test_what_inspect_says(engines: Fakes, bundle: Path) -> None:
    manifest: Any = read_any_manifest((bundle / "manifest.json").read_bytes())
    assert read_any_manifest(manifest.to_json()) == manifest
    text = render(manifest, program_lines(manifest))
    assert "listed       num_inference_steps = 2 or 1" in text
    assert "listed       height, width = 16, 16 or 24, 32" in text
    assert "fixed        guidance_scale=4.5, tiled=False" in text


def _set(key: str, value: Any) -> Callable[[Any], None]:
    return lambda m: m["program"]["variants"][0].update({key: value})


HOSTILE: dict[str, tuple[Callable[[Any], None], str]] = {
    "as another": (_set("fixed", listing()["program"]["fixed"]), "variants[0].fixed is another's"),
    "other names": (_set("fixed", {}), "variants[0].fixed has other names"),
    "no calls": (_set("calls", []), "variants[0].calls"),
    "no such component": (
        lambda m: m["program"]["variants"][1]["calls"][0].update(component="unet"),
        "program.variants[1].calls[0]: no component 'unet'",
    ),
    "a result that nothing makes": (_set("results", ["y"]), "nothing makes 'y'"),
    "a text that is no argument": (
        lambda m: m["program"]["variants"][0]["sources"][0].update(argument="prompt_2"),
        "the argument 'prompt_2', which is not listed",
    ),
    "a tokenizer that is not listed": (
        lambda m: m["program"]["variants"][0]["sources"][0].update(tokenizer="x.json"),
        "not listed",
    ),
    "variants of its own": (_set("variants", []), "unknown key 'variants'"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_manifests_that_do_not_hold_are_refused(tmp_path: Path, case: str) -> None:
    valid = json.loads((write_program(tmp_path / "b", **listing()) / "manifest.json").read_text())
    change, says = HOSTILE[case]
    change(changed := copy.deepcopy(valid))
    with pytest.raises(ArtifactError) as caught:
        read_any_manifest(json.dumps(changed).encode())
    assert says in str(caught.value)


def test_a_row_that_the_table_has_not(engines: Fakes, tmp_path: Path) -> None:
    keys = listing()
    keys["program"]["variants"][0]["calls"][2]["row"] = 2
    with pytest.raises(ArtifactError, match="not the table of the manifest"):
        slipcast.load(write_program(tmp_path / "b", **keys))
