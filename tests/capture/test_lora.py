"""LoRAs in recipes: the weights that diffusers fuses, whatever form they were published in; what is none is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import open_pipeline

from slipcast.errors import ArtifactError, RecipeError
from slipcast_compiler.capture import lora
from slipcast_compiler.capture.lora import with_adapters
from slipcast_compiler.capture.open import open_with_weights
from slipcast_compiler.recipe.recipe import LoraTable, ModelTable, Recipe

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
# By pipeline, what is adapted in each component: layers of every kind, linear and convolutions.
TARGETS: dict[str, dict[str, list[str]]] = {
    "stable_diffusion": {"unet": [*ATTENTION, "conv1", "proj_in"], "text_encoder": TEXT},
    "stable_diffusion_xl": {"unet": ATTENTION, "text_encoder_2": ["q_proj", "v_proj"]},
    "stable_diffusion_3": {"transformer": [*ATTENTION, "proj_out"]},
    "flux": {"transformer": [*ATTENTION, "proj_mlp", "linear"]},
    "wan": {"transformer": ATTENTION},
    "qwen_image": {"transformer": ATTENTION},
}


@pytest.fixture(autouse=True)
def _kept_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "CONVERTED", tmp_path / "made")


def _save(name: str, out: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline, in out/"model", and a LoRA for it, in out/"style.safetensors"."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(seed)
    pipe = copy.deepcopy(open_pipeline(name))
    if not (out / "model").exists():
        pipe.to(dtype).save_pretrained(out / "model")
    layers = {}
    for component, targets in TARGETS[name].items():
        module = getattr(pipe, component)
        module.add_adapter(LoraConfig(r=3, lora_alpha=3, target_modules=targets, init_lora_weights=False))
        layers[f"{component}_lora_layers"] = get_peft_model_state_dict(module)
    type(pipe).save_lora_weights(out, weight_name="style.safetensors", **layers)
    return pipe


def _fused(folder: Path, *loras: LoraTable) -> Path:
    recipe = Recipe.model_construct(model=ModelTable(path="model"), lora=loras)
    return with_adapters(recipe, folder, (folder / "model").resolve(), "model")[0]


@pytest.mark.parametrize("name", TARGETS)
def test_the_weights_are_those_that_diffusers_fuses(name: str, tmp_path: Path) -> None:
    _save(name, tmp_path)
    root = _fused(tmp_path, LoraTable(path="style.safetensors", scale=0.7))
    wanted, plain = open_with_weights(tmp_path / "model"), open_with_weights(tmp_path / "model")
    wanted.load_lora_weights(tmp_path, weight_name="style.safetensors")
    wanted.fuse_lora(components=list(TARGETS[name]), lora_scale=0.7)
    wanted.unload_lora_weights()
    found = open_with_weights(root)
    for component in (each for each, part in found.components.items() if isinstance(part, torch.nn.Module)):
        theirs, before = getattr(wanted, component).state_dict(), getattr(plain, component).state_dict()
        changed = 0
        for key, value in getattr(found, component).state_dict().items():
            torch.testing.assert_close(value, theirs[key], rtol=1e-5, atol=1e-6, msg=f"{component} {key}")
            changed += not torch.equal(value, before[key])
        assert bool(changed) == (component in TARGETS[name])
    untouched = next(file for file in (root / "vae").iterdir() if file.suffix == ".safetensors")
    assert untouched.is_symlink()


def test_two_are_added_and_what_is_taken_away_again_is_gone(tmp_path: Path) -> None:
    _save("flux", tmp_path, seed=0)
    (tmp_path / "style.safetensors").rename(tmp_path / "first.safetensors")
    _save("flux", tmp_path, seed=1)
    first, style = LoraTable(path="first.safetensors"), LoraTable(path="style.safetensors", scale=0.5)
    both, one, other = _fused(tmp_path, first, style), _fused(tmp_path, first), _fused(tmp_path, style)
    none = _fused(tmp_path, first, first.model_copy(update={"scale": -1.0}))
    file = "transformer/diffusion_pytorch_model.safetensors"
    weights = {root: load_file(root / file) for root in (both, one, other, none, tmp_path / "model")}
    for name, plain in weights[tmp_path / "model"].items():
        summed = weights[one][name] + weights[other][name] - plain
        torch.testing.assert_close(weights[both][name], summed, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(weights[none][name], plain, rtol=1e-6, atol=1e-7)


def test_files_of_kohya(tmp_path: Path) -> None:
    from diffusers.utils import convert_state_dict_to_kohya

    _save("stable_diffusion", tmp_path)
    own = load_file(tmp_path / "style.safetensors")
    renamed = {name.replace("text_encoder.", "text_encoder.text_model."): value for name, value in own.items()}
    save_file(convert_state_dict_to_kohya(renamed), tmp_path / "kohya.safetensors")
    roots = [_fused(tmp_path, LoraTable(path=f"{name}.safetensors")) for name in ("style", "kohya")]
    found, wanted = (load_file(root / "text_encoder" / "model.safetensors") for root in reversed(roots))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_keep_their_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    _save("stable_diffusion_3", tmp_path, dtype=dtype)
    root = _fused(tmp_path, LoraTable(path="style.safetensors"))
    pipe = open_with_weights(tmp_path / "model")
    pipe.load_lora_weights(tmp_path, weight_name="style.safetensors")
    pipe.fuse_lora(components=["transformer"])
    pipe.unload_lora_weights()
    found = load_file(root / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, value in pipe.transformer.state_dict().items():
        assert found[name].dtype == dtype
        torch.testing.assert_close(found[name], value.to(dtype), rtol=0, atol=0)


def _spoil(file: Path, kind: str) -> None:
    tensors = load_file(file)
    first = next(name for name in tensors if ".0." in name and name.endswith("lora_A.weight"))
    if kind == "another model":
        tensors = {name.replace("attn", "attention_of_others"): value for name, value in tensors.items()}
    elif kind == "one layer too many":
        for end in ("A", "B"):
            like = first.replace("lora_A", f"lora_{end}")
            tensors[like.replace(".0.", ".77.", 1)] = tensors[like].clone()
    elif kind == "DoRA":
        tensors[first.replace("lora_A.weight", "lora_magnitude_vector")] = torch.ones(3)
    elif kind == "not a LoRA":
        tensors = {"transformer.proj_out.weight": torch.ones(3, 3)}
    elif kind == "NaN":
        tensors[first][0, 0] = float("nan")
    elif kind == "other sizes":
        tensors = {name: torch.cat([value] * 2, -1) if "lora_A" in name else value for name, value in tensors.items()}
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("another model", "cannot load it|nothing takes"),
        ("one layer too many", "nothing takes 1"),
        ("DoRA", "another kind"),
        ("not a LoRA", "not a LoRA"),
        ("NaN", "NaN"),
        ("other sizes", "cannot be added"),
    ],
)
def test_what_does_not_fit_is_told(kind: str, told: str, tmp_path: Path) -> None:
    _save("flux", tmp_path)
    _spoil(tmp_path / "style.safetensors", kind)
    with pytest.raises((RecipeError, ArtifactError), match=told):
        _fused(tmp_path, LoraTable(path="style.safetensors"))
    assert not list((tmp_path / "made").glob("*"))


@pytest.mark.parametrize("path", ["style.bin", "nowhere.safetensors"])
def test_pickles_and_files_that_are_not_there(path: str, tmp_path: Path) -> None:
    (tmp_path / "style.bin").write_bytes(b"x")
    with pytest.raises(RecipeError, match="never loaded" if path == "style.bin" else "does not exist"):
        _fused(tmp_path, LoraTable(path=path))


@pytest.mark.slow
def test_a_bundle_draws_with_it(tmp_path: Path) -> None:
    """The recipe's way, to the picture: against diffusers with the adapter loaded, not fused."""
    import slipcast
    from conftest import compile_here
    from slipcast_compiler.judge.metrics import psnr

    _save("stable_diffusion_xl", tmp_path)
    recipe = """
name = "styled"
[model]
path = "model"
[[lora]]
path = "style.safetensors"
scale = 0.6
[call]
height = 32
width = 32
num_inference_steps = 3
[family]
prompts = ["a red circle", "a large blue star", "a small green square"]
[evaluate]
images = 1
[[targets]]
engine = "onnxruntime"
precision = "fp32"
"""
    (tmp_path / "styled.toml").write_text(recipe)
    done = compile_here("styled.toml", "-o", "bundle", "--cache", str(tmp_path / "cache"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    pipe = open_with_weights(tmp_path / "model")
    pipe.load_lora_weights(tmp_path, weight_name="style.safetensors", adapter_name="style")
    pipe.set_adapters("style", 0.6)
    asked: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 3, "output_type": "np"}
    wanted = pipe("a small star", generator=torch.Generator("cpu").manual_seed(5), **asked).images[0]
    with slipcast.load(tmp_path / "bundle") as bundle:
        assert "style.safetensors (scale 0.6" in bundle.manifest.base_model
        found = bundle("a small star", seed=5, output_type="np").images[0]
    assert psnr(found, wanted) > 60
