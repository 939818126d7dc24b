"""recipes/models/sd15_shaped.py, in a tiny size: what it writes is a checkpoint to us and to diffusers."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import ROOT
from slipcast_compiler.model import original
from slipcast_compiler.model.checkpoint import Checkpoint, find_weight, read_tokenizer
from slipcast_compiler.plan import make_plan
from slipcast_compiler.recipe.reading import parse_recipe, read_recipe

RECIPE = ROOT / "recipes" / "sd15-shaped.toml"


def _generator() -> Any:
    spec = importlib.util.spec_from_file_location("sd15_shaped", ROOT / "recipes" / "models" / "sd15_shaped.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATOR = _generator()
TINY = {
    "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2},
    "unet": {"block_out_channels": [32, 32, 32, 32], "cross_attention_dim": 32, "layers_per_block": 1},
    "vae": {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("models") / "sd15-shaped"
    GENERATOR.write_checkpoint(out, {name: GENERATOR.SD15[name] | sizes for name, sizes in TINY.items()})
    return out


def test_it_has_the_published_sizes() -> None:
    counts = {
        folder: sum(math.prod(shape) for shape in GENERATOR._parameters(folder, config).values())
        for folder, config in GENERATOR.SD15.items()
    }
    assert counts == {"text_encoder": 123_060_480, "unet": 859_520_964, "vae": 83_653_863}


def test_the_recipe_plans_it_at_both_sizes(tiny: Path) -> None:
    text = RECIPE.read_text("utf-8").replace("../artifacts/models/sd15-shaped", str(tiny))
    for size in (256, 512):
        plan = make_plan(parse_recipe(text, "r", [f"sampling.width={size}", f"sampling.height={size}"]), tiny)
        assert plan.original.size == (size, size)
        assert plan.original.sizes["text_length"] == 77
        assert plan.checkpoint.native_size == (512, 512)
        assert (plan.sampling.sampler, plan.sampling.schedule) == ("pndm", "leading")
        assert original.has_scheduler(plan.sampling)
    assert read_recipe(RECIPE).model.path == "../artifacts/models/sd15-shaped"


def test_every_weight_is_there_finite_and_spread(tiny: Path) -> None:
    checkpoint = Checkpoint(tiny, "tiny")
    for folder in GENERATOR.MODULES:
        for name, weight in checkpoint.weights(folder).items():
            assert weight.entry.dtype == "F16"
            values = weight.read()
            assert len(values.shape) == 1 or values.std() > 0, name
    tokenizer = read_tokenizer(checkpoint, "tokenizer")
    assert {tokenizer.length, tokenizer.pad_token_id} == {77, 655}


def test_diffusers_draws_finite_pictures_with_it(tiny: Path) -> None:
    text = RECIPE.read_text("utf-8").replace("../artifacts/models/sd15-shaped", str(tiny))
    plan = make_plan(parse_recipe(text, "r", ["sampling.width=64", "sampling.height=64", "sampling.steps=2"]), tiny)
    pipe = original.open_pipeline(tiny, plan.sampling, "float32")
    first, second = original.draw(pipe, plan.sampling, plan.original.size, ["a red circle", "a blue square"], [1, 1])
    assert np.isfinite(first).all() and first.std() > 0
    assert np.abs(first - second).max() > 0  # the prompt matters
    # Libraries begin at random where they miss a name: what they hold has to be what the files hold.
    weights = Checkpoint(tiny, "tiny").weights("text_encoder")
    for name, parameter in pipe.text_encoder.named_parameters():
        found = find_weight(name, weights)
        assert found and (parameter.detach().numpy() == found.read()).all()


def test_the_same_seed_gives_the_same_weights(tiny: Path, tmp_path: Path) -> None:
    config = json.loads((tiny / "vae" / "config.json").read_text())
    parameters = GENERATOR._parameters("vae", config)
    files = [tmp_path / name for name in ("same", "other")]
    for seed, file in enumerate(files):
        GENERATOR._write_weights(file, parameters, seed)
    written = (tiny / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert [file.read_bytes() == written for file in files] == [True, False]
