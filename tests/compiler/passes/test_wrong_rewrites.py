"""A rewrite that is numerically wrong misses the gate: one weight, after any pass, is enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from compiler.passes.tiny import Bench, tiny_plan
from slipcast_compiler.judge.evaluate import Judge
from slipcast_compiler.judge.gate import apply_gate, missed
from slipcast_compiler.judge.originals import Originals, Run
from slipcast_compiler.model import original
from slipcast_compiler.model.rewrite import UNCHANGED, Rewrite
from slipcast_compiler.passes import PASSES, micro
from slipcast_compiler.passes.micro import Gain
from slipcast_compiler.recipe.recipe import GateTable

PROMPTS = ("a red circle on a white background", "a blue star on a navy background")
GENTLE: dict[str, dict[str, Any]] = {
    "prune_heads": {"ratio": 0.1}, "prune_ffn": {"ratio": 0.05}, "low_rank": {"energy": 0.9999},
    "recover": {"steps": 3, "learning_rate": 1e-5},
}  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("models")
    return Bench(tiny_plan(folder), folder)


def pictures(bench: Bench, rewrite: Rewrite) -> Any:
    pipe = original.open_pipeline(bench.plan.checkpoint.root, bench.plan.sampling, "float32")
    pipe.unet = bench.load(rewrite)
    return original.draw(pipe, bench.plan.sampling, bench.plan.original.size, PROMPTS, (0, 1))


def mutated(rewrite: Rewrite, folder: Path) -> Rewrite:
    """The same, with the largest of the changed matrices out of scale, and its sign
    changed, which no normalisation undoes."""
    assert rewrite.file
    tensors = load_file(rewrite.file)
    name = max(tensors, key=lambda name: tensors[name].size)
    tensors[name] *= -30
    save_file(tensors, folder / "mutated.safetensors")
    return Rewrite(folder / "mutated.safetensors")


@pytest.mark.parametrize("name", PASSES)
def test_row_34_one_wrong_weight_misses_the_gate(
    bench: Bench, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(micro, "measure", lambda *_: Gain(2.0, 1.0, 2.0, 2.0, 2000, 1000))
    damaged, _ = bench.run("prune_heads", ratio=0.1, criterion="random", correct=False)
    sound, _ = bench.run(name, damaged if name == "recover" else UNCHANGED, **GENTLE[name])
    before = pictures(bench, UNCHANGED)
    judge = Judge(Originals(PROMPTS, (0, 1), before, before, before))
    good, bad = (
        judge(Run(pictures(bench, each), (1.0, 1.0), 0.1, 100.0, {})) for each in (sound, mutated(sound, tmp_path))
    )
    assert good.psnr_worst
    gate = GateTable(psnr=good.psnr_worst - 3)
    assert missed({"target": apply_gate(gate, good)}) == []
    (miss,) = missed({"target": apply_gate(gate, bad)})
    assert miss.startswith("target: PSNR")
