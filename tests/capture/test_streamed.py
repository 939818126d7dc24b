"""Weights that are read when they are written: the same as if all were loaded, and one at a time."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import PIPELINES, call_of
from torch import nn

from slipcast.errors import ArtifactError, RecipeError
from slipcast.progress import silent
from slipcast_compiler.capture.find import find_for
from slipcast_compiler.capture.open import open_with_weights
from slipcast_compiler.capture.record import capture
from slipcast_compiler.capture.verify import verify
from slipcast_compiler.export.program import export_program
from slipcast_compiler.export.standin import open_at_random
from slipcast_compiler.export.streamed import NOTHING, Streamed, Weights, open_streamed
from slipcast_compiler.model.links import plainly_named
from slipcast_compiler.model.unread import Unread

ONE, OTHER = "a small red circle on white", "a large blue star on a black background"
FAST = ("stable_diffusion_xl", "flux", "wan_2_2")
# their components' classes are those of the tests, which diffusers does not load
OWN = ("kolors", "qwen_image_2_1")
SAVED = [name for name in PIPELINES if name not in OWN]


def save(name: str, folder: Path) -> Path:
    """As large models are published: in bf16, and in shards."""
    torch.manual_seed(0)
    PIPELINES[name].make().to(torch.bfloat16).save_pretrained(str(folder), max_shard_size="100KB")
    return folder


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}


def compare(root: Path) -> Streamed:
    """Streamed weights against those that are loaded."""
    loaded, streamed = open_with_weights(root), open_streamed(root)
    modules = {name: each for name, each in loaded.components.items() if isinstance(each, nn.Module)}
    for name, module in modules.items():
        wanted, found = tensors_of(module), tensors_of(streamed.pipe.components[name])
        assert found.keys() == wanted.keys()
        tied = {(a, b) for a in wanted for b in wanted if wanted[a] is wanted[b]}
        assert tied == {(a, b) for a in found for b in found if found[a] is found[b]}
        for path, tensor in wanted.items():
            weight = streamed.weights.get(f"{name}.{path}", found[path])
            assert isinstance(weight, Unread) or path not in dict(module.named_parameters()), path
            numbers = weight.read() if isinstance(weight, Unread) else weight
            assert numbers is not None and numbers.dtype == tensor.dtype
            torch.testing.assert_close(numbers, tensor.detach(), rtol=0, atol=0)
    return streamed


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in SAVED]
)
def test_streamed_weights_are_those_that_are_loaded(name: str, tmp_path: Path) -> None:
    compare(save(name, tmp_path))


def exported(name: str, pipe: Any, weights: Weights, folder: Path) -> dict[str, bytes]:
    """By name, the files."""
    folder.mkdir()
    found = find_for(pipe, [lambda prompt: call_of(name, prompt, 1)])
    export_program(found, pipe, folder, silent, weights)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "stable_diffusion_3", "sana"])
def test_an_export_is_the_same_bit_for_bit(name: str, tmp_path: Path) -> None:
    root = save(name, tmp_path / "model")
    wanted = exported(name, open_with_weights(root), NOTHING, tmp_path / "loaded")
    streamed = open_streamed(root)
    assert exported(name, streamed.pipe, streamed.weights, tmp_path / "streamed") == wanted


def test_an_export_reads_one_weight_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And none before it is written."""
    streamed, alive, most, usual = open_streamed(save("ddpm", tmp_path / "model")), set[int](), [0], Unread.read
    total = sum(weight.numel() for weight in streamed.weights.values() if weight is not None)

    def read(self: Unread) -> torch.Tensor:
        numbers = usual(self)
        size = numbers.numel()
        alive.add(key := id(numbers))
        weakref.finalize(numbers, alive.discard, key)
        most[0] = max(most[0], len(alive))
        read_sizes.append(size)
        return numbers

    read_sizes: list[int] = []
    monkeypatch.setattr(Unread, "read", read)
    exported("ddpm", streamed.pipe, streamed.weights, tmp_path / "out")
    assert most[0] <= 3  # of one weight: in its file's dtype, and as what is written
    assert sum(read_sizes) >= total


def test_names_of_old_checkpoints(tmp_path: Path) -> None:
    """The attention of autoencoders had others; encoders of texts had a prefix."""
    root = save("stable_diffusion", tmp_path)
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    file = root / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for name in list(tensors):
        for new, before in old.items():
            if new in name:
                tensors[name.replace(new, before)] = tensors.pop(name)
    assert any(".query." in name for name in tensors)
    save_file(tensors, file, {"format": "pt"})
    file = root / "text_encoder" / "model.safetensors"
    prefixed = {f"text_model.{name.removeprefix('text_model.')}": each for name, each in load_file(file).items()}
    save_file(prefixed, file, {"format": "pt"})
    assert compare(root).weights["vae.decoder.mid_block.attentions.0.to_q.weight"] is not None


def test_large_buffers_are_streamed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as SD3's positions, which its checkpoint has."""
    monkeypatch.setattr("slipcast_compiler.export.streamed.LARGE", 10)
    root = save("stable_diffusion_3", tmp_path)
    assert isinstance(compare(root).weights["transformer.pos_embed.pos_embed"], Unread)
    wanted = open_with_weights(root).transformer.pos_embed.pos_embed
    torch.testing.assert_close(open_at_random(root).transformer.pos_embed.pos_embed, wanted, rtol=0, atol=0)


def test_weights_of_a_variant_are_taken_under_plain_names(tmp_path: Path) -> None:
    """In shards, as diffusers names them, beside what must not be looked at: a pickle, and plain weights of another
    component, which are taken unless the variant is wished for."""
    root = tmp_path / "model"
    pipe = PIPELINES["stable_diffusion"].make()
    pipe.save_pretrained(root, max_shard_size="100KB", variant="fp16")
    (root / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"no pickle")
    (root / "vae" / "plain").mkdir()
    pipe.vae.save_pretrained(root / "vae" / "plain")
    (root / "vae" / "plain" / "diffusion_pytorch_model.safetensors").rename(
        root / "vae" / "diffusion_pytorch_model.safetensors"
    )
    for wish in (None, "fp16"):
        plain = plainly_named(root, wish)
        assert plain != root and plainly_named(root, wish) == plain
        assert not [file for file in plain.rglob("*") if "fp16" in file.name and file.suffix == ".json"]
        compare(plain)
        sharded = (plain / "vae" / "diffusion_pytorch_model.safetensors.index.json").exists()
        assert sharded == (wish == "fp16")
    with pytest.raises(RecipeError, match="no component of model has such weights"):
        plainly_named(root, "bf16")


def test_plain_names_are_left_as_they_are(tmp_path: Path) -> None:
    root = save("stable_diffusion", tmp_path)
    assert plainly_named(root, None) == root
    for file in (root / "vae").glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(ArtifactError, match="no weights"):
        open_streamed(root)


def test_a_weight_that_is_missing_is_refused_where_it_is_used(tmp_path: Path) -> None:
    root = save("ddpm", tmp_path / "model")
    file = root / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["conv_in.weight"]
    save_file(tensors, file, {"format": "pt"})
    streamed = open_streamed(root)
    assert streamed.weights["unet.conv_in.weight"] is None
    with pytest.raises(ArtifactError, match=r"no tensor for unet\.conv_in\.weight"):
        exported("ddpm", streamed.pipe, streamed.weights, tmp_path / "out")


def test_a_weight_of_another_shape_is_refused(tmp_path: Path) -> None:
    root = save("ddpm", tmp_path)
    config = json.loads((root / "unet" / "config.json").read_text())
    (root / "unet" / "config.json").write_text(json.dumps(config | {"out_channels": 7}))
    with pytest.raises(ArtifactError, match="no UNet2DModel can be made of it") as refused:
        open_streamed(root)
    assert "conv_out" in str(refused.value.got)


@pytest.mark.parametrize("kind", ["nan", "cut off"])
def test_a_weight_that_is_no_number_is_refused_when_it_is_read(kind: str, tmp_path: Path) -> None:
    root = save("ddpm", tmp_path)
    streamed = open_streamed(root)
    file = root / "unet" / "diffusion_pytorch_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-4000] if kind == "cut off" else content[:-4000] + b"\xff" * 4000)
    with pytest.raises(ArtifactError, match="NaN or infinity in tensor" if kind == "nan" else "is cut off"):
        for weight in streamed.weights.values():
            assert weight is not None
            weight.read()


# --- tensors that are not read ---------------------------------------------------------------------------------------


def unread(numbers: torch.Tensor) -> Unread:
    return Unread(numbers.to("meta"), lambda: numbers)


def test_what_is_done_to_an_unread_tensor_is_done_when_it_is_read() -> None:
    one, other = torch.arange(6.0).reshape(2, 3).bfloat16(), torch.ones(2, 3, dtype=torch.bfloat16)
    made = torch.cat([unread(one), unread(other)]).t().to(torch.float32).contiguous()
    first, second = made.chunk(2, dim=1)
    assert isinstance(second, Unread) and made.shape == (3, 4) and made.stride() == (4, 1) and made.device.type == "cpu"
    wanted = torch.cat([one, other]).t().float()
    np.testing.assert_array_equal(made.read(), wanted)
    np.testing.assert_array_equal(torch.stack([first, second]).read(), torch.stack(wanted.chunk(2, dim=1)))
    assert torch.equal(unread(one), unread(one.clone())) and not torch.equal(unread(one), unread(other))


def test_nothing_is_written_into_an_unread_tensor() -> None:
    with pytest.raises(NotImplementedError, match="not read yet"):
        unread(torch.ones(2)).mul_(2)


# --- random numbers in place of weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux", pytest.param("wan_2_2", marks=pytest.mark.slow)])
def test_a_pipeline_at_random_is_its_own_program(name: str, tmp_path: Path) -> None:
    root = save(name, tmp_path)
    program = (
        find_for(open_streamed(root).pipe, [lambda prompt: call_of(name, prompt, 1)])[0].program
        if name == "wan_2_2"
        else capture(open_streamed(root).pipe, call_of(name, ONE, 1))
    )
    pipe = open_at_random(root)
    verdict = verify(program, pipe, call_of(name, OTHER, 7), call_of(name, OTHER, 7))
    assert verdict.error is not None and verdict.error < 1e-5
    drawn = [pipe(**call_of(name, text, 7))[0] for text in (ONE, OTHER)]
    assert torch.isfinite(drawn[0]).all() and not torch.equal(*drawn)  # or nothing would be compared


def test_layers_at_random_take_the_memory_of_few(tmp_path: Path) -> None:
    pipe = open_at_random(save("flux", tmp_path))
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        weights = [weight for weight in pipe.components[name].parameters() if weight.ndim > 1]
        held = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in weights}
        assert sum(held.values()) < 0.75 * sum(weight.nbytes for weight in weights)
    assert pipe.transformer.x_embedder.weight.data_ptr() != pipe.text_encoder_2.shared.weight.data_ptr()
