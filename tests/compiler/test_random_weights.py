"""recipes/models/random_weights.py: checkpoints that libraries load, of any pipeline's configs."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import ROOT
from slipcast_compiler.capture.open import open_with_weights

sys.path.insert(0, str(ROOT / "tests" / "capture"))
from tiny import call_of, open_pipeline


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("random_weights", ROOT / "recipes" / "models" / "random_weights.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("configs") / "model"
    open_pipeline("flux_2_klein").save_pretrained(folder)  # whose autoencoder has running means
    return folder


def test_a_checkpoint_that_is_loaded(script: Any, configs: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """In several files, too; the same for the same seed, and finite."""
    monkeypatch.setattr(script, "LARGEST", 20_000)
    for name in ("one", "two"):
        script.write_checkpoint(str(configs), tmp_path / name, ["transformer.num_single_layers=2"], 0)
    one, two = (open_with_weights(tmp_path / name) for name in ("one", "two"))
    index = json.loads((tmp_path / "one/transformer/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert len(one.transformer.single_transformer_blocks) == 2
    for component in ("transformer", "vae", "text_encoder"):
        theirs = getattr(two, component).state_dict()
        for key, value in getattr(one, component).state_dict().items():
            assert torch.equal(value, theirs[key]) and value.isfinite().all(), key
    assert not any(each.any() for name, each in one.vae.named_buffers() if name.endswith("running_mean"))
    assert one(**call_of("flux_2_klein", "a red circle", seed=0)).images.isfinite().all()


@pytest.mark.parametrize(
    ("change", "problem"),
    [("transformer.layers=2", "transformer has no layers"), ("vae.sample_size=large", "large is no JSON")],
)
def test_what_cannot_be_changed(script: Any, configs: Path, tmp_path: Path, change: str, problem: str) -> None:
    with pytest.raises(SystemExit, match=problem):
        script.write_checkpoint(str(configs), tmp_path / "model", [change], 0)
