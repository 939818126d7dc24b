"""The guard of a captured pipeline: the reference model, as if nothing described it."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import slipcast
from conftest import ROOT, call_cli, compile_here
from slipcast.bundle.manifest import EMBEDDINGS, read_any_manifest
from slipcast.bundle.program_manifest import ProgramManifest
from slipcast.bundle.reader import open_any_bundle
from slipcast.bundle.tensorfile import read_header, read_tensor
from slipcast.errors import ArtifactError, RequestError
from slipcast.run.program_guard import by_token

COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "pink", "cyan")
STRANGERS = ["a dog on a sofa", "two green triangles above a striped star"]
RECIPE = f"""\
name = "guarded"
model = {{ path = "{ROOT / "recipes/models/shapes"}", pipeline = "StableDiffusionPipeline" }}
call = {{ num_inference_steps = 2, guidance_scale = 4.0 }}
guard = {{ policy = "refuse", false_alarms = 0.1 }}
targets = [{{ engine = "onnxruntime" }}]
[family]
templates = ["a {{size}} {{color}} circle on a {{background}} background"]
slots = {{ size = ["small", "large"], color = {list(COLORS)}, background = ["white", "black"] }}
held_out = 0.3
[evaluate]
images = 2
out_of_family = {STRANGERS}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "guarded.toml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def bundle(place: Path) -> Path:
    done = compile_here("guarded.toml", cwd=place)
    assert done.returncode == 0, done.stderr
    return place / "artifacts" / "guarded"


@pytest.mark.slow
def test_strangers_are_refused_and_the_family_is_drawn(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    inside = "a small red circle on a white background"
    with slipcast.load(bundle) as pipe:
        drawn = pipe([inside, inside], seed=1, output_type="np", num_images_per_prompt=2)
        assert [verdict.in_family for verdict in drawn.guard] == [True] * 4
        for stranger in STRANGERS:
            with pytest.raises(RequestError, match="not of the family") as refused:
                pipe([inside, stranger], seed=1)
            assert 'guard="warn"' in str(refused.value.hint)
        caplog.set_level(logging.WARNING, "slipcast")
        together = pipe([STRANGERS[0], inside], seed=1, output_type="np", guard="warn")
        assert "is not of the family" in caplog.text and STRANGERS[0] in caplog.text
        assert [verdict.in_family for verdict in together.guard] == [False, True]
        # What a guard says of a prompt does not depend on what else is drawn, nor does it change a picture.
        alone = pipe(STRANGERS[0], seed=1, output_type="np", guard="warn")
        assert alone.guard[0] == together.guard[0]
        np.testing.assert_array_equal(alone.images[0], together.images[0])
        with pytest.raises(RequestError, match="guard is not usable"):
            pipe(inside, guard="fallback")


@pytest.mark.slow
def test_a_run_says_what_it_thinks(bundle: Path, tmp_path: Path) -> None:
    run = ("run", str(bundle), "--seed", "1", "-o", str(tmp_path / "x.png"), "--prompt")
    refused = call_cli(*run, STRANGERS[0])
    assert refused.returncode == 2 and "not of the family" in refused.stderr
    told = call_cli(*run, STRANGERS[0], "--guard", "warn", "--json")
    assert json.loads(told.stdout)["guard"][0]["in_family"] is False, told.stderr
    assert "guard        refuse beyond a distance of" in call_cli("inspect", str(bundle)).stdout


@pytest.mark.slow
def test_manifest_and_report_say_what_was_found(bundle: Path) -> None:
    manifest = open_any_bundle(bundle, files="all").manifest
    assert isinstance(manifest, ProgramManifest) and manifest.guard and "guard" in manifest.requires
    assert manifest.guard.words, "embeddings are averages over the words"
    entry = read_header(bundle / manifest.guard.table)[EMBEDDINGS]
    np.testing.assert_allclose(np.linalg.norm(read_tensor(bundle / manifest.guard.table, entry), axis=1), 1, atol=1e-5)
    record = json.loads((bundle / "report.json").read_text())["guard"]
    assert record["held_out"] == 2 and record["out_of_family"] == len(STRANGERS)
    assert record["alarms"]["onnxruntime-cpu-fp32"]["out_of_family"] == len(STRANGERS)
    assert "Guard: refuse where a prompt is farther than" in (bundle / "report.html").read_text("utf-8")


@pytest.mark.slow
def test_distances_are_those_of_the_model_that_is_described(bundle: Path, place: Path) -> None:
    """Its table has the same embeddings, but for the empty prompt, which guidance puts beside each in the program."""
    described = place / "described.toml"
    text = RECIPE.replace(', pipeline = "StableDiffusionPipeline"', "")
    described.write_text(text.replace("call = { num_inference_steps = 2, guidance_scale = 4.0 }", "sampling.steps = 2"))
    done = compile_here("described.toml", "-o", "described", cwd=place)
    assert done.returncode == 0, done.stderr
    tables = []
    for folder in (bundle, place / "described"):
        guard: Any = open_any_bundle(folder).manifest.guard  # type: ignore[union-attr]
        tables.append(read_tensor(folder / guard.table, read_header(folder / guard.table)[EMBEDDINGS]))
    apart = [np.linalg.norm(table[:, None] - table[None], axis=-1) for table in tables]
    assert np.corrcoef(apart[0].ravel(), apart[1].ravel())[0, 1] > 0.999


SPECIALISED = (
    'name="strangers"', 'guard.policy="fallback"', "passes.prune_heads.ratio=0.5", "sampling.steps=4",
    'passes.prune_heads.criterion="magnitude"', "passes.prune_heads.correct=false", "caching.full_steps=2",
    'targets=[{engine="onnxruntime"}, {engine="openvino", precision="bf16"}]',
)  # fmt: skip


@pytest.fixture(scope="module")
def specialised(place: Path) -> Path:
    """With fewer heads, other steps and shallow ones; and the pipeline as it is, for strangers."""
    options = [word for each in SPECIALISED for word in ("--set", each)]
    done = compile_here("guarded.toml", *options, cwd=place)
    assert done.returncode == 0, done.stderr
    return place / "artifacts" / "strangers"


@pytest.mark.slow
def test_strangers_are_drawn_by_the_pipeline_as_it_is(specialised: Path) -> None:
    """As diffusers draws them, at the steps of the call; alone, and beside others, whose pictures are their own."""
    from diffusers import StableDiffusionPipeline

    original = StableDiffusionPipeline.from_pretrained(ROOT / "recipes/models/shapes", torch_dtype=torch.float32)
    original.set_progress_bar_config(disable=True)
    inside, steps = "a small red circle on a white background", list[int]()
    with slipcast.load(specialised, target="onnxruntime-cpu-fp32") as pipe:
        both = pipe(
            [STRANGERS[0], inside, STRANGERS[1]], seed=[5, 6, 7], output_type="np",
            callback_on_step_end=lambda _, step, total: steps.append(total),
        )  # fmt: skip
        assert [verdict.fallback for verdict in both.guard] == [True, False, True]
        assert both.steps == (2, 4, 2) and steps == [4, 4, 4, 4, 2, 2]
        for at, (prompt, seed) in enumerate(((STRANGERS[0], 5), (inside, 6), (STRANGERS[1], 7))):
            alone = pipe(prompt, seed=seed, output_type="np").images[0]
            np.testing.assert_array_equal(both.images[at], alone)
            usual = pipe(prompt, seed=seed, output_type="np", guard="warn").images[0]
            assert (np.abs(usual - alone).max() == 0) == (prompt == inside)
            if prompt != inside:
                found = original(prompt, num_inference_steps=2, guidance_scale=4.0, output_type="np",
                                 generator=torch.Generator("cpu").manual_seed(seed)).images[0]  # fmt: skip
                assert 10 * np.log10(1 / np.mean((found - alone) ** 2)) > 60
        asked = pipe(STRANGERS[0], seed=5, output_type="np", num_inference_steps=3)
        assert asked.steps == (3,)


@pytest.mark.slow
def test_what_a_bundle_says_of_what_draws_strangers(specialised: Path) -> None:
    manifest = open_any_bundle(specialised, files="all").manifest
    assert isinstance(manifest, ProgramManifest) and manifest.guard and manifest.guard.fallback
    assert manifest.guard.fallback.components["denoiser"] == "denoiser_fallback"
    told = call_cli("inspect", str(specialised)).stdout
    assert "guard        fallback beyond" in told and "denoiser (and as it was, for strangers)" in told
    assert re.search(r"strangers +by .*denoiser_fallback, \w+ in 2 steps", told), told
    quality = manifest.targets[0].quality
    assert quality and quality.out_of_family and quality.out_of_family.psnr_worst > 60 > quality.psnr_worst
    document = json.loads((specialised / "manifest.json").read_text())
    own = document["guard"]["fallback"]["components"]
    for change, problem in (
        ({"components": {}}, "no call of the program needs it"),
        ({"components": {**own, "decoder": "denoiser"}}, "is called, where the plain one alone may be"),
        ({"components": {**own, "decoder": "nothing"}}, "no component 'nothing'"),
        ({"components": dict(zip(own, reversed(own.values()), strict=True))}, "the component has no|other inputs"),
        ({"samplings": []}, "belong to steps that slipcast's samplers take"),
        ({"samplings": document["guard"]["fallback"]["samplings"] * 2}, "one for each variant"),
    ):
        wrong = json.loads(json.dumps(document))
        wrong["guard"]["fallback"] |= change
        with pytest.raises(ArtifactError, match=problem):
            read_any_manifest(json.dumps(wrong).encode())


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("guard.policy='fallback'\nadapters.rank=4", "does not go with [adapters]"),
        ("guard.false_alarms=0.01", "the family is too small for a threshold"),
        ("family.closed=true", "[guard] is for an open family"),
        ("call.negative_prompt='blurry'", "[guard] would judge negative_prompt too"),
    ],
)
def test_what_cannot_be_guarded_is_refused_in_the_plan(place: Path, option: str, problem: str) -> None:
    options = [word for each in option.splitlines() for word in ("--set", each)]
    done = call_cli("compile", "guarded.toml", "--dry-run", *options, cwd=place)
    assert done.returncode == 2 and problem in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"component": "denoiser"}, {"component": "decoder"}, {"output": "out_9"}, {"words": "in_9"},
        {"policy": "fallback"}, {"shape": [32, 7]}, {},
    ],
)  # fmt: skip
def test_a_guard_that_is_not_the_programs_is_refused(bundle: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    shutil.copytree(bundle, copy := tmp_path / "copy")
    document = json.loads((copy / "manifest.json").read_text())
    document["guard"] |= change
    (copy / "manifest.json").write_text(json.dumps(document))
    done = call_cli("verify", str(copy))
    assert done.returncode == (4 if change else 0), done.stderr
    assert "guard" in done.stderr or not change


def test_tokens_of_rows_and_of_instructions() -> None:
    """Branches of guidance lie side by side; what stood before the prompt and was cut away has no tokens there."""
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    ids, hidden = by_token(array, np.array([[9, 8, 1, 2, 3]]))
    assert ids.tolist() == [1, 2, 3] and hidden.shape == (3, 8)
    np.testing.assert_array_equal(hidden[1], [*array[0, 1], *array[1, 1]])
    ids, hidden = by_token(array, np.array([[1, 2]]))
    assert ids.tolist() == [-1] * 3, "more than it has tokens, as where two encoders are joined: all are words"
    assert by_token(array[:, 0], None)[1].shape == (1, 8)
