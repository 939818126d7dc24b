"""Reading checkpoints: what is found, under which name, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from slipcast.errors import ArtifactError, RecipeError
from slipcast_compiler.model.checkpoint import Checkpoint, find_weight, open_checkpoint, read_tokenizer
from slipcast_compiler.recipe.recipe import ModelTable

SHAPES = Path("recipes/models/shapes")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHAPES, tmp_path / "shapes"))


def test_the_reference_model() -> None:
    checkpoint = Checkpoint(SHAPES, "shapes")
    assert checkpoint.factor == 4
    assert checkpoint.sizes == {"latent_channels": 4, "text_width": 128, "text_length": 32}
    assert checkpoint.process.beta_schedule == "scaled_linear"
    assert checkpoint.not_compiled == ()
    assert sum(np.prod(w.entry.shape) for w in checkpoint.weights("unet").values()) == pytest.approx(11.2e6, rel=0.01)
    tokenizer = read_tokenizer(checkpoint, "tokenizer")
    assert (tokenizer.length, tokenizer.pad_token_id) == (32, 655)


def test_safety_checker_is_named_as_left_out(copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (copy / "model_index.json").write_text(json.dumps(index))
    assert Checkpoint(copy, "shapes").not_compiled == ("safety_checker",)


def test_older_configs_lack_keys(copy: Path) -> None:
    file = copy / "vae" / "config.json"
    config = json.loads(file.read_text())
    del config["scaling_factor"]
    file.write_text(json.dumps(config))
    assert Checkpoint(copy, "m").config("vae")["scaling_factor"] == 0.18215  # the default of AutoencoderKL


def test_special_tokens_map_decides_on_padding(copy: Path) -> None:
    """Stable Diffusion 2 pads with "!", and says so in a file of its own."""
    folder = copy / "tokenizer"
    (folder / "tokenizer.json").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))
    tokenizer = read_tokenizer(Checkpoint(copy, "m"), "tokenizer")
    assert tokenizer.pad_token_id == json.loads(tokenizer.data)["model"]["vocab"]["!"]


@pytest.mark.parametrize("missing", ["vocab.json", ""])
def test_a_tokenizer_that_is_not_whole(copy: Path, missing: str) -> None:
    (copy / "tokenizer" / "tokenizer.json").unlink()
    if missing == "vocab.json":
        (copy / "tokenizer" / missing).unlink()
    else:
        shutil.rmtree(copy / "tokenizer")
    with pytest.raises(ArtifactError, match="tokenizer"):
        read_tokenizer(Checkpoint(copy, "m"), "tokenizer")


def test_hash_sees_every_file_that_matters(copy: Path) -> None:
    before = Checkpoint(copy, "shapes").sha256
    assert before == Checkpoint(SHAPES, "elsewhere").sha256
    (copy / "README.md").write_text("not part of the model")
    assert Checkpoint(copy, "shapes").sha256 == before
    for name in ("vae/config.json", "tokenizer/vocab.json", "scheduler/scheduler_config.json"):
        original = (copy / name).read_bytes()
        (copy / name).write_bytes(original + b" ")
        assert Checkpoint(copy, "shapes").sha256 != before, name
        (copy / name).write_bytes(original)


def test_which_weight_files(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, "m")
    (tmp_path / "unet").mkdir()
    with pytest.raises(ArtifactError, match="no weights"):
        checkpoint.weight_files("unet")
    for name in ("model.fp16.safetensors", "model.non_ema.safetensors", "model.safetensors"):
        (tmp_path / "unet" / name).touch()
        expected = "model.fp16.safetensors" if name != "model.safetensors" else "model.safetensors"
        assert [f.name for f in checkpoint.weight_files("unet")] == [expected]
    for name in ("model-1.safetensors", "model-2.safetensors"):
        (tmp_path / "unet" / name).touch()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}
    (tmp_path / "unet" / "model.safetensors.index.json").write_text(json.dumps(index))
    shards = ["model-1.safetensors", "model-2.safetensors"]
    assert [f.name for f in checkpoint.weight_files("unet")] == shards  # as diffusers
    (tmp_path / "model_index.json").write_text(json.dumps({"unet": ["transformers", "CLIPTextModel"]}))
    assert [f.name for f in checkpoint.weight_files("unet")] == ["model.safetensors"]  # as transformers
    (tmp_path / "unet" / "model.safetensors").unlink()
    assert [f.name for f in checkpoint.weight_files("unet")] == shards


@pytest.mark.parametrize("name", ["../secret.safetensors", "/secret.safetensors"])
def test_shards_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ArtifactError, match="secret"):
        Checkpoint(tmp_path, "m").weight_files("unet")


def test_names_of_older_checkpoints(tmp_path: Path) -> None:
    names = ["text_model.encoder.w", "mid.attentions.0.query.weight", "mid.attentions.0.proj_attn.bias"]
    (tmp_path / "c").mkdir()
    save_file({name: np.zeros(1, np.float32) for name in names}, tmp_path / "c" / "m.safetensors")
    weights = Checkpoint(tmp_path, "m").weights("c")
    assert find_weight("encoder.w", weights) is weights["text_model.encoder.w"]
    assert find_weight("text_model.encoder.w", weights) is weights["text_model.encoder.w"]
    assert find_weight("mid.attentions.0.to_q.weight", weights) is weights["mid.attentions.0.query.weight"]
    assert find_weight("mid.attentions.0.to_out.0.bias", weights) is weights["mid.attentions.0.proj_attn.bias"]
    assert find_weight("mid.attentions.0.to_k.weight", weights) is None


def test_where_a_model_comes_from(tmp_path: Path) -> None:
    assert open_checkpoint(ModelTable(path="models/shapes"), Path("recipes")).root == SHAPES.resolve()
    with pytest.raises(RecipeError, match="does not exist"):
        open_checkpoint(ModelTable(path="./nothing/here"), tmp_path)
    with pytest.raises(RecipeError, match=r"needs model\.revision"):
        open_checkpoint(ModelTable(path="someone/model"), tmp_path)


def test_a_pipeline_that_is_not_known(copy: Path) -> None:
    (copy / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    with pytest.raises(RecipeError, match="KandinskyPipeline") as caught:
        Checkpoint(copy, "m").architecture  # noqa: B018
    assert "StableDiffusionPipeline" in str(caught.value)
    with pytest.raises(ArtifactError, match="not found"):
        Checkpoint(copy / "unet", "m").index  # noqa: B018
