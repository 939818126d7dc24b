"""Checkpoints with numbers that are none, and weights that are pickles (rows 52 and 53 of the faults)."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from test_plan import planned

from slipcast.errors import ArtifactError, HostError, RecipeError, SlipcastError
from slipcast.progress import SilentStages
from slipcast_compiler import compile as compiling
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.judge.lpips import Lpips
from slipcast_compiler.judge.scorer import Scorer
from slipcast_compiler.judge.weights import check_weights
from slipcast_compiler.plan import Plan

SCORER = Path("recipes/models/shapes-scorer").resolve()


def spoilt(folder: Path, part: str, value: float) -> tuple[Plan, str]:
    """A plan for the reference model with one number of a component replaced; and the tensor's name."""
    plan = planned(folder)
    root = folder / "model" / part
    files = root.resolve()
    root.unlink()
    root.mkdir()
    for file in files.iterdir():
        if file.suffix != ".safetensors":
            (root / file.name).symlink_to(file)
    (source,) = files.glob("*.safetensors")
    tensors = load_file(source)
    name = sorted(tensors)[len(tensors) // 2]
    tensors[name] = tensors[name].copy()
    tensors[name].flat[-1] = value
    save_file(tensors, root / source.name)
    return plan, name


class TestNumbersThatAreNone:
    @pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_the_tensor_is_named(self, tmp_path: Path, part: str, value: float) -> None:
        plan, name = spoilt(tmp_path, part, value)
        with pytest.raises(ArtifactError) as caught:
            check_weights(plan.checkpoint, Cache(tmp_path / "cache"), lambda *_: None)
        assert caught.value.exit_code == 4
        assert f"NaN or infinity in tensor {name!r}" in str(caught.value)
        assert f"/{part}/" in str(caught.value)

    def test_before_any_work(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        plan, name = spoilt(tmp_path, "vae", np.nan)

        def never(*_: Any) -> None:
            raise AssertionError("the original was drawn")

        monkeypatch.setattr(compiling, "run_originals", never)
        with pytest.raises(ArtifactError, match=f"NaN or infinity in tensor '{name}'"):
            compiling.compile_plan(plan, tmp_path / "out", Cache(tmp_path / "cache"), SilentStages())
        assert not (tmp_path / "out").exists()

    def test_what_is_sound_is_read_once(self, tmp_path: Path) -> None:
        plan, cache, seen = planned(tmp_path), Cache(tmp_path / "cache"), []
        for _ in range(2):
            check_weights(plan.checkpoint, cache, lambda done, total: seen.append((done, total)))
        assert len(seen) == seen[0][1] > 300


class Bomb:
    """What unpickling it would do: make a file."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._trace,)


class TestPickles:
    def test_a_bomb_is_one(self, tmp_path: Path) -> None:
        pickle.loads(pickle.dumps(Bomb(tmp_path / "trace")))
        assert (tmp_path / "trace").exists()

    @pytest.mark.parametrize("beside", [False, True])
    def test_a_scorer(self, tmp_path: Path, beside: bool) -> None:
        folder = tmp_path / "clip"
        folder.mkdir()
        for file in SCORER.iterdir():
            if beside or file.suffix != ".safetensors":
                (folder / file.name).symlink_to(file)
        torch.save({"x": Bomb(tmp_path / "trace")}, folder / "pytorch_model.bin")
        if beside:
            Scorer("clip", tmp_path)
        else:
            with pytest.raises(RecipeError, match="no weights"):
                Scorer("clip", tmp_path)
        assert not (tmp_path / "trace").exists()

    def test_an_index_that_leads_to_pickles(self, tmp_path: Path) -> None:
        folder = tmp_path / "clip"
        folder.mkdir()
        for file in SCORER.iterdir():
            if file.suffix != ".safetensors":
                (folder / file.name).symlink_to(file)
        (folder / "model.safetensors.index.json").write_text(
            '{"metadata": {}, "weight_map": {"logit_scale": "pytorch_model.bin"}}'
        )
        torch.save({"logit_scale": Bomb(tmp_path / "trace")}, folder / "pytorch_model.bin")
        with pytest.raises(SlipcastError) as caught:
            Scorer("clip", tmp_path)
        assert isinstance(caught.value, (HostError, ArtifactError, RecipeError))
        assert not (tmp_path / "trace").exists()

    @pytest.mark.parametrize("which", ["alex.pth", "alexnet-owt-7be5be79.pth"])
    def test_lpips(self, tmp_path: Path, which: str) -> None:
        for name in ("alex.pth", "alexnet-owt-7be5be79.pth"):
            content: Any = OrderedDict(x=torch.zeros(1))
            torch.save(content | ({"bomb": Bomb(tmp_path / "trace")} if name == which else {}), tmp_path / name)
        with pytest.raises(RecipeError, match=f"{which} cannot be read"):
            Lpips(tmp_path)
        assert not (tmp_path / "trace").exists()
