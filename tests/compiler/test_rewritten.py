"""A captured pipeline compiled with passes over its denoisers, from recipe to picture; and what is refused."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention import FeedForward

import slipcast
from conftest import ROOT, call_cli, compile_here
from slipcast.bundle.reader import ProgramBundle, open_any_bundle
from slipcast.errors import RecipeError, ResourceError
from slipcast_compiler.capture.open import open_with_weights
from slipcast_compiler.estimate_program import check_rewriting_fits
from slipcast_compiler.model.layers import layers_of
from slipcast_compiler.model.rewrite import TENSORS, Rewrite, load
from slipcast_compiler.passes.known import check_passes, known_layers, own_passes
from slipcast_compiler.plan_program import ProgramPlan, make_program_plan
from slipcast_compiler.recipe.reading import parse_recipe

sys.path.insert(0, str(ROOT / "tests" / "capture"))
from test_rewritten_programs import save

RECIPE = """\
name = "tiny"
[model]
path = "stable_diffusion_3"
[call]
num_inference_steps = 2
height = 32
width = 32
[family]
prompts = ["a red circle", "a blue star", "a small white circle", "the background", "a green square", "one star"]
held_out = 0.2
[profile]
states = 4
[passes.prune_heads]
ratio = 0.3
[passes.prune_ffn]
ratio = 0.3
[passes.low_rank]
energy = 0.99
keep = "smaller"
[passes.recover]
steps = 20
learning_rate = 1e-5
batch = 2
[[targets]]
engine = "onnxruntime"
[[targets]]
engine = "openvino"
precision = "bf16"
"""
PROMPT = "a large star on white"
LAYER = "transformer.transformer_blocks.1.attn"


@dataclass(frozen=True)
class Made:
    """Where a tiny pipeline and its recipe lie, and what the compile said."""

    folder: Path
    said: str

    @property
    def bundle(self) -> Path:
        return self.folder / "artifacts" / "tiny"

    @property
    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.bundle / "report.json").read_text("utf-8"))
        return found

    @property
    def manifest(self) -> Any:
        opened = open_any_bundle(self.bundle)
        assert isinstance(opened, ProgramBundle)
        return opened.manifest


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion 3 with its recipe."""
    folder = tmp_path_factory.mktemp("rewritten")
    save("stable_diffusion_3", folder)
    (folder / "tiny.toml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def made(place: Path) -> Made:
    """It is compiled once for all tests."""
    done = compile_here("tiny.toml", cwd=place)
    assert done.returncode == 0, done.stderr
    return Made(place, done.stderr)


@pytest.mark.slow
def test_the_bundle_draws_what_the_rewritten_pipeline_draws(made: Made) -> None:
    """Of the tensors that the last pass left in the cache."""
    options: dict[str, Any] = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np"}
    cache = made.folder / "artifacts" / "cache"
    told = {entry: json.loads((entry / "entry.json").read_text())["inputs"] for entry in cache.glob("pass-*")}
    (last,) = [entry for entry, inputs in told.items() if inputs["pass"] == "recover"]
    pictures = []
    for rewritten in (True, False):
        pipe = open_with_weights(made.folder / "stable_diffusion_3")
        if rewritten:
            load(pipe.transformer, Rewrite(last / TENSORS).weights())
        pictures.append(pipe(PROMPT, generator=torch.Generator("cpu").manual_seed(3), **options).images[0])
    errors = {}
    for target in ("onnxruntime-cpu-fp32", "openvino-cpu-bf16"):
        with slipcast.load(made.bundle, target=target) as bundle:
            found = bundle(PROMPT, seed=3, output_type="np").images[0]
        errors[target] = [float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted)) for wanted in pictures]
    assert errors["onnxruntime-cpu-fp32"][0] < 1e-4 and errors["onnxruntime-cpu-fp32"][1] > 1e-3, errors
    assert errors["openvino-cpu-bf16"][0] < 2e-2, errors


@pytest.mark.slow
def test_what_report_and_manifest_say(made: Made) -> None:
    passes, manifest = made.record["passes"], made.manifest
    assert list(passes) == ["prune_heads", "prune_ffn", "low_rank", "recover"]
    kept = {mask.layer: mask.kept for mask in manifest.head_masks}
    assert sum(map(len, kept.values())) == 6 and kept[LAYER] == tuple(passes["prune_heads"]["layers"][LAYER]["kept"])
    assert manifest.head_retention_ratio == passes["prune_heads"]["retention"] == 0.75
    assert 0.6 < manifest.ffn_retention_ratio == passes["prune_ffn"]["retention"] < 0.85
    assert manifest.pruning_strategy == "leave_one_out" and manifest.low_rank_layers
    chain = [passes[name]["parameters"] for name in passes]
    assert all(before > after for before, after in chain[:-1]) and len(set(chain[-1])) == 1
    recovered = passes["recover"]["recovered"]["transformer"]
    assert recovered["error_after"] < recovered["error_before"] and recovered["steps"] <= 20
    assert [after for _, after in chain[:-1]] == [before for before, _ in chain[1:]]
    assert made.record["parts"]["denoiser"]["parameters"] == chain[-1][1]
    assert made.record["recipe"]["passes"]["prune_heads"]["ratio"] == 0.3
    told = call_cli("inspect", str(made.bundle), cwd=made.folder).stdout
    assert re.search(r"heads kept +75%", told) and re.search(r"neurons kept +\d\d%", told)
    page = re.sub(r"<[^>]*>|\s+", " ", (made.bundle / "report.html").read_text("utf-8"))
    for text in (
        "scheduler is given by transformer",
        "75.0 % of all heads are kept",
        f"{chain[0][0]:,} parameters before, {chain[0][1]:,} after",
        "rank",
    ):
        assert text in page, text


@pytest.mark.slow
def test_the_profile_is_that_of_the_calibration_prompts(made: Made) -> None:
    """It was measured once, and `slipcast profile` shows it."""
    done = call_cli("profile", "tiny.toml", "--json", cwd=made.folder)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["samples"] == 5 and summary["leave_one_out"] == "exact" and summary["steps"] is None
    assert len(list((made.folder / "artifacts" / "cache").glob("profile-*"))) == 1
    pipe = open_with_weights(made.folder / "stable_diffusion_3")
    layers = layers_of(pipe.transformer)
    for kind, known, criteria in (
        ("heads", layers.attention, {"leave_one_out", "magnitude", "activation_energy_percentile"}),
        ("neurons", layers.feed_forward, {"magnitude", "activation_energy_percentile"}),
    ):
        assert summary[kind]["count"] == sum(layer.units for layer in known)
        assert {name: set(found) for name, found in summary[kind]["quantiles"].items()} == {
            criterion: {layer.name for layer in known} for criterion in criteria
        }
    assert "by 1 call of the pipeline" in call_cli("inspect", summary["output"], cwd=made.folder).stdout


@pytest.fixture(scope="module")
def plan(place: Path) -> ProgramPlan:
    return make_program_plan(parse_recipe(RECIPE, "recipe"), place)


REFUSED = {
    "taylor": ('prune_heads.criterion="taylor"', "passes.prune_heads.criterion: taylor asks for the noise"),
    "ratio": ("prune_heads.ratio=0.9", "passes.prune_heads.ratio cannot be reached"),
    "pattern": ('low_rank.protect=["unet.*"]', "passes.low_rank.protect: no layer matches"),
}


@pytest.mark.parametrize(("override", "said"), REFUSED.values(), ids=REFUSED)
def test_passes_that_cannot_be(override: str, said: str, plan: ProgramPlan) -> None:
    table = parse_recipe(RECIPE, "recipe", [f"passes.{override}"]).passes
    with pytest.raises(RecipeError, match=re.escape(said)):
        check_passes(table, plan.known)


def test_a_pass_that_finds_nothing(plan: ProgramPlan) -> None:
    """It says what was left alone, and why; in one denoiser of several that is nothing to be refused for."""
    table, layers = parse_recipe(RECIPE, "recipe").passes, plan.known["transformer"]
    spans = "its norm_q spans all heads, so that each depends on the others"
    none = layers.leave({layer.name: spans for layer in layers.attention}, {})
    with pytest.raises(RecipeError, match="no layer whose heads can be removed in transformer") as caught:
        check_passes(table, {"transformer": none})
    assert f"transformer.transformer_blocks.0.attn: {spans}" in str(caught.value.got)
    both = {"transformer": none, "transformer_2": layers}
    check_passes(table, both)
    assert own_passes(table, "transformer", both).prune_heads is None
    assert own_passes(table, "transformer_2", both).prune_heads == table.prune_heads


def test_a_pattern_is_for_whichever_denoiser_has_the_layer(plan: ProgramPlan) -> None:
    table = parse_recipe(RECIPE, "recipe", ['passes.prune_heads.protect=["transformer_blocks.1.*"]']).passes
    layers = plan.known["transformer"]
    known = {"one": layers, "other": layers.leave({"transformer_blocks.1.attn": "for this test"}, {})}
    assert own_passes(table, "one", known).prune_heads.protect == ("transformer_blocks.1.*",)  # type: ignore[union-attr]
    assert own_passes(table, "other", known).prune_heads.protect == ()  # type: ignore[union-attr]


class Half(torch.nn.Module):
    """Of its two perceptrons it calls one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(FeedForward(8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> Any:
        return self.blocks[0](x)


def test_a_layer_that_is_not_called_is_left_alone() -> None:
    module, given = Half(), ((torch.empty(1, 3, 8, device="meta"),), dict[str, Any]())
    assert [layer.name for layer in layers_of(module).feed_forward] == ["blocks.0", "blocks.1"]
    assert known_layers(module, given) == layers_of(module).leave({}, {"blocks.1": "it is not called"})


DRY = {
    "few": ('family.prompts=["a red circle", "a blue star", "a green square"]', "at least 4 different ones"),
    "batch": ("profile.batch=4", "profile.batch is not for a captured pipeline"),
}


@pytest.mark.parametrize(("override", "said"), DRY.values(), ids=DRY)
def test_what_a_dry_run_refuses(override: str, said: str, place: Path) -> None:
    done = call_cli("compile", "tiny.toml", "--dry-run", "--set", override, cwd=place)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert said in done.stderr


def test_what_a_dry_run_says(place: Path) -> None:
    done = call_cli("compile", "tiny.toml", "--dry-run", cwd=place)
    assert done.returncode == 0, done.stderr
    for text in (
        r"pass +prune_heads: 30% of all heads, 8 in transformer",
        r"pass +prune_ffn: 30% of all neurons, 384 in transformer",
        r"pass +low_rank: energy 0.99, of all linear layers, 33 in transformer",
        r"8 heads in 2 attention layers",
    ):
        assert re.search(text, done.stdout), text


def test_memory_for_the_profile_is_asked_for(place: Path, plan: ProgramPlan) -> None:
    """A profile takes the whole pipeline, and what is measured; weights alone do not."""
    assert plan.needs.rewriting > plan.needs.original["fp32"]
    check_rewriting_fits(plan.needs, plan.needs.rewriting)
    with pytest.raises(ResourceError, match="what the passes take does not fit into memory"):
        check_rewriting_fits(plan.needs, plan.needs.rewriting - 1)
    options = "passes={prune_heads={criterion='magnitude', correct=false}}"
    pruned = make_program_plan(parse_recipe(RECIPE, "recipe", [options]), place)
    assert 0 < pruned.needs.rewriting < plan.needs.original["fp32"]


@pytest.mark.slow
def test_sizes_and_a_closed_family(tmp_path: Path) -> None:
    """Heads are chosen for both sizes, of which the graph and its weights are one; a table has the texts."""
    save("stable_diffusion_xl", tmp_path)
    text = RECIPE.replace("stable_diffusion_3", "stable_diffusion_xl").replace("held_out", "closed = true\nheld_out")
    text = text.replace("height = 32\nwidth = 32", "height = [32, 64]\nwidth = [32, 48]")
    (tmp_path / "tiny.toml").write_text(
        text[: text.index("[passes.low_rank]")] + '[[targets]]\nengine = "onnxruntime"\n'
    )
    done = compile_here("tiny.toml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = Made(tmp_path, done.stderr)
    assert 0.6 < made.manifest.head_retention_ratio < 1 and made.manifest.program.closed
    assert sum(name == "denoiser" for name in made.manifest.components) == 1
    cache = tmp_path / "artifacts" / "cache"
    told = {entry: json.loads((entry / "entry.json").read_text())["inputs"] for entry in cache.glob("pass-*")}
    (last,) = [entry for entry, inputs in told.items() if inputs["pass"] == "prune_ffn"]
    pipe = open_with_weights(tmp_path / "stable_diffusion_xl")
    load(pipe.unet, Rewrite(last / TENSORS).weights())
    with slipcast.load(made.bundle) as bundle:
        for height, width in ((32, 32), (64, 48)):
            options = {"num_inference_steps": 2, "height": height, "width": width, "output_type": "np"}
            wanted = pipe("one star", generator=torch.Generator("cpu").manual_seed(3), **options).images[0]
            found = bundle("one star", seed=3, height=height, width=width, output_type="np").images[0]
            assert np.linalg.norm(found - wanted) < 1e-4 * np.linalg.norm(wanted)


@pytest.mark.slow
def test_two_denoisers(tmp_path: Path) -> None:
    """Each is profiled where it is called, and loses a share of its own; what attention is tied together stays."""
    save("wan_2_2", tmp_path)
    text = RECIPE.replace("stable_diffusion_3", "wan_2_2").replace("num_inference_steps = 2", "num_inference_steps = 4")
    text = text.replace("height = 32\n", "max_sequence_length = 16\nnum_frames = 5\nheight = 32\n")
    text = (
        text[: text.index("[passes.prune_heads]")] + text[text.index("[passes.prune_ffn]") : text.index("[[targets]]")]
    )
    text = text.replace("[passes.prune_ffn]\n", "[passes.prune_ffn]\nmultiple = 4\n")  # there are few
    (tmp_path / "tiny.toml").write_text(text + '[[targets]]\nengine = "onnxruntime"\n')
    done = call_cli("compile", "tiny.toml", "--dry-run", "--set", "passes.prune_heads={}", cwd=tmp_path)
    assert (
        done.returncode == 2 and "no layer whose heads can be removed in transformer or transformer_2" in done.stderr
    ), done.stderr
    done = compile_here("tiny.toml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = Made(tmp_path, done.stderr)
    layers = made.record["passes"]["prune_ffn"]["layers"]
    assert {name.partition(".")[0] for name in layers} == {"transformer", "transformer_2"}
    for name in ("transformer", "transformer_2"):
        counts = [(each["kept"], each["neurons"]) for layer, each in layers.items() if layer.startswith(f"{name}.")]
        kept, neurons = (sum(side) for side in zip(*counts, strict=True))
        assert 0.5 < kept / neurons < 0.9
    assert len(list((tmp_path / "artifacts" / "cache").glob("profile-*/transformer*"))) == 2
