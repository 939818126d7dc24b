"""What holds for every pass."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from compiler.passes.tiny import RECIPE, Bench, example, tiny_plan
from conftest import in_process
from slipcast.errors import NumericalError, RecipeError
from slipcast.progress import Stages
from slipcast_compiler.export.component import write_component
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.model.rewrite import Rewrite
from slipcast_compiler.passes import PASSES, apply, micro
from slipcast_compiler.passes.apply import apply_passes, needs_profile
from slipcast_compiler.passes.micro import Gain
from slipcast_compiler.recipe.passes import PassesTable
from slipcast_compiler.recipe.reading import parse_recipe

# What each does nothing with, and what it certainly does something with.
ZERO: dict[str, dict[str, Any]] = {
    "prune_heads": {"ratio": 0.0}, "prune_ffn": {"ratio": 0.0}, "low_rank": {"energy": 1.0}, "recover": {"steps": 0},
}  # fmt: skip
STRONG: dict[str, dict[str, Any]] = {
    "prune_heads": {"ratio": 0.5}, "prune_ffn": {"ratio": 0.5}, "low_rank": {"energy": 0.6}, "recover": {"steps": 3},
}  # fmt: skip
SHRINKING = sorted(set(PASSES) - {"recover"})


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("models")
    return Bench(tiny_plan(folder), folder)


def _exported_numbers(bench: Bench, rewrite: Rewrite, folder: Path) -> int:
    """How many the exported graph has in its initialisers."""
    write_component(bench.plan.checkpoint, "denoiser", bench.plan.original.sizes, folder, rewrite)
    graph = onnx.load(folder / "denoiser.onnx", load_external_data=False).graph
    return sum(int(np.prod(tensor.dims)) for tensor in graph.initializer)


@pytest.fixture(scope="module")
def whole(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> int:
    return _exported_numbers(bench, Rewrite(), tmp_path_factory.mktemp("whole"))


@pytest.fixture(autouse=True)
def _always_a_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured is tested in test_low_rank.py."""
    monkeypatch.setattr(micro, "measure", lambda *_: Gain(2.0, 1.0, 2.0, 2.0, 2000, 1000))


def test_every_pass_is_here_and_in_the_recipe() -> None:
    assert list(ZERO) == list(STRONG) == list(PASSES)
    on_graphs = ["quantize", "quantize_int4"]  # after the export
    assert [*PASSES, *on_graphs] == list(PassesTable.model_fields)


@pytest.mark.parametrize("name", PASSES)
def test_zero_strength_is_exactly_nothing(bench: Bench, name: str) -> None:
    earlier, _ = bench.run("prune_heads", ratio=0.4, criterion="magnitude")
    for before in (Rewrite(), earlier):
        after, report = bench.run(name, before, **ZERO[name])
        assert after == before
        assert report["options"].items() >= ZERO[name].items()
        assert report.get("retention", 1.0) == 1.0


@pytest.mark.parametrize("name", PASSES)
def test_what_does_nothing_needs_no_profile(name: str) -> None:
    ((_, options),) = PassesTable.model_validate({name: ZERO[name]}).chosen()
    assert not PASSES[name].needs_profile(options)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHRINKING)
def test_the_exported_graph_shrinks(bench: Bench, whole: int, name: str, tmp_path: Path) -> None:
    rewrite, _ = bench.run(name, **STRONG[name])
    counts = [whole, _exported_numbers(bench, rewrite, tmp_path)]
    assert counts[1] < counts[0]
    parameters = [sum(p.numel() for p in bench.load(changed).parameters()) for changed in (Rewrite(), rewrite)]
    # Targets of reshapes are initialisers too, a few integers of each number of heads.
    assert counts[0] - counts[1] == pytest.approx(parameters[0] - parameters[1], abs=100)


@pytest.mark.parametrize("name", PASSES)
def test_something_changes_and_all_of_it_is_finite(bench: Bench, name: str) -> None:
    damaged, _ = bench.run("prune_heads", ratio=0.25, criterion="random", correct=False)
    before = damaged if name == "recover" else Rewrite()
    options = {"learning_rate": 1e-5} if name == "recover" else {}
    after, _ = bench.run(name, before, **STRONG[name], **options)
    with torch.no_grad():
        first, second = (bench.load(rewrite)(*example(1)).sample for rewrite in (before, after))
    assert torch.isfinite(second).all()
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", SHRINKING)
def test_row_33_a_profile_that_is_not_a_number_is_refused_by_layer(
    bench: Bench, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = "mid_block.attentions.0"
    real = bench.measured.second_moment

    def moment(layer: str) -> Any:
        return real(layer) * (np.nan if layer.startswith(bad) else 1)

    monkeypatch.setattr(bench.measured, "second_moment", moment)
    options: Mapping[str, Any] = {} if name == "low_rank" else {"criterion": "second_order"}
    with pytest.raises(NumericalError, match=bad):
        bench.run(name, **STRONG[name], **options)


def test_row_33_an_original_that_is_not_a_number_is_refused_by_layer(tmp_path: Path) -> None:
    """recover reads it through diffusers, which checks nothing."""
    from safetensors.torch import load_file, save_file

    bench = Bench(tiny_plan(tmp_path), tmp_path)
    file = bench.plan.checkpoint.root / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["mid_block.resnets.1.conv2.weight"][0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(NumericalError, match=r"mid_block\.resnets\.1\.conv2: NaN"):
        bench.run("recover", steps=1)


@pytest.mark.parametrize("name", PASSES)
def test_an_unknown_option_is_refused_with_its_key(name: str) -> None:
    text = RECIPE + f"\n[passes.{name}]\nstrength = 1\n"
    with pytest.raises(RecipeError, match=rf"recipe:{len(text.splitlines())}: passes\.{name}\.strength"):
        parse_recipe(text, "recipe")


@pytest.mark.parametrize("name", PASSES)
def test_defaults_are_valid_and_change_something(name: str) -> None:
    ((_, options),) = PassesTable.model_validate({name: {}}).chosen()
    assert options != type(options).model_validate(ZERO[name])


def test_a_compile_runs_them_in_order_and_caches_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a profile, so with the criteria that need none."""
    monkeypatch.setattr(apply, "run_isolated", in_process)
    table = (
        'passes.prune_ffn={ratio=0.4, criterion="magnitude", correct=false}',
        'passes.prune_heads={ratio=0.4, criterion="magnitude", correct=false}',
    )
    plan = tiny_plan(tmp_path, *table)
    assert not needs_profile(plan.recipe.passes)
    assert needs_profile(tiny_plan(tmp_path, *table, "passes.low_rank={}").recipe.passes)
    cache = Cache(tmp_path / "cache")
    first, again = (apply_passes(plan.recipe.passes, plan.task, None, cache, Stages()) for _ in range(2))
    assert list(first.reports) == ["prune_heads", "prune_ffn"]
    assert first == again
    assert len(list((tmp_path / "cache").iterdir())) == 2
    fields = first.manifest_fields()
    assert fields["head_retention_ratio"] == pytest.approx(0.6, abs=0.02)
    assert fields["pruning_strategy"] == "magnitude"
    assert sum(len(mask.kept) for mask in fields["head_masks"]) == round(
        0.6 * sum(m.heads for m in fields["head_masks"])
    )
    fewer = tiny_plan(tmp_path, *table, "passes.prune_heads.ratio=0.2")
    other = apply_passes(fewer.recipe.passes, fewer.task, None, cache, Stages())
    assert len(list((tmp_path / "cache").iterdir())) == 4  # what follows a changed pass is made anew
    assert other.rewrite.digest != first.rewrite.digest
    assert other.manifest_fields()["ffn_retention_ratio"] < 1
