"""Exported graphs equal the modules they come from, and are written without ever holding the weights."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from slipcast.errors import ArtifactError
from slipcast_compiler.export.component import settle, write_component
from slipcast_compiler.model.checkpoint import Checkpoint

SHAPES = Path("recipes/models/shapes")
SIZES = {"latent_height": 16, "latent_width": 16}


def _run(folder: Path, name: str, arrays: dict[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
    result: np.ndarray[Any, Any] = session.run(None, arrays)[0]
    return result


def _error(found: np.ndarray[Any, Any], wanted: torch.Tensor) -> float:
    return float(np.linalg.norm(found - wanted.numpy()) / np.linalg.norm(wanted.numpy()))


@pytest.fixture
def exported(exported_denoiser: Callable[[str], Path]) -> Path:
    return exported_denoiser("shapes")


@pytest.mark.parametrize("batch", [1, 3, 65])
def test_denoiser(exported: Path, batch: int) -> None:
    torch.manual_seed(batch)
    x, t, text = torch.randn(batch, 4, 16, 16), torch.tensor([437.0]), torch.randn(batch, 32, 128)
    module = diffusers.UNet2DConditionModel.from_pretrained(SHAPES / "unet").eval()
    with torch.no_grad():
        wanted = module(x, t, text).sample
    found = _run(
        exported, "denoiser", {"sample": x.numpy(), "timestep": t.numpy(), "encoder_hidden_states": text.numpy()}
    )
    assert _error(found, wanted) < 1e-5


def test_text_encoder(exported: Path) -> None:
    ids = torch.randint(0, 655, (3, 32), generator=torch.Generator().manual_seed(0))
    module = transformers.CLIPTextModel.from_pretrained(SHAPES / "text_encoder", dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = module(ids).last_hidden_state
    assert _error(_run(exported, "text_encoder", {"input_ids": ids.numpy()}), wanted) < 1e-5


@pytest.mark.parametrize("shape", [(1, 4, 16, 16), (2, 4, 8, 20)])
def test_vae_decoder(exported: Path, shape: tuple[int, ...]) -> None:
    latent = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    module = diffusers.AutoencoderKL.from_pretrained(SHAPES / "vae").eval()
    with torch.no_grad():
        wanted = module.decode(latent).sample
    assert _error(_run(exported, "vae_decoder", {"latent": latent.numpy()}), wanted) < 1e-5


def test_graphs_are_small_and_tell_nothing_of_this_machine(exported: Path) -> None:
    for file in exported.glob("*.onnx"):
        content = file.read_bytes()
        assert len(content) < 300_000, file.name
        for trace in (b"stack_trace", str(Path.cwd()).encode(), b"site-packages", b".py"):
            assert trace not in content, (file.name, trace)


@pytest.mark.slow
def test_another_unet(tmp_path: Path) -> None:
    """Linear projections, heads by width and several layers, as in Stable Diffusion 2."""
    torch.manual_seed(0)
    root = Path(shutil.copytree(SHAPES, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors")))
    module = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=2, cross_attention_dim=128,
        attention_head_dim=(2, 4), norm_num_groups=8, use_linear_projection=True,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    module.to(torch.bfloat16).save_pretrained(root / "unet")
    module.to(torch.float32)
    checkpoint = Checkpoint(root, "m")
    sizes = {"latent_channels": 4, "text_width": 128, "text_length": 32, "latent_height": 8, "latent_width": 8}
    write_component(checkpoint, "denoiser", sizes, tmp_path)
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([3.5]), torch.randn(2, 32, 128)
    with torch.no_grad():
        wanted = module(x, t, text).sample
    found = _run(
        tmp_path, "denoiser", {"sample": x.numpy(), "timestep": t.numpy(), "encoder_hidden_states": text.numpy()}
    )
    assert _error(found, wanted) < 1e-5


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        pytest.param("missing", "no tensor for", marks=pytest.mark.slow),
        pytest.param("shape", "another shape", marks=pytest.mark.slow),
        ("nan", "NaN|finite"),
    ],
)
def test_wrong_weights_are_named(tmp_path: Path, damage: str, says: str) -> None:
    root = Path(shutil.copytree(SHAPES, tmp_path / "m"))
    file = root / "vae" / "diffusion_pytorch_model.safetensors"
    name = "decoder.mid_block.attentions.0.to_q.weight"
    tensors = load_file(file)
    if damage == "missing":
        del tensors[name]
    elif damage == "shape":
        tensors[name] = tensors[name][:-1].contiguous()
    else:
        tensors[name][3, 3] = float("nan")
    save_file(tensors, file)
    with pytest.raises(ArtifactError, match=says) as caught:
        write_component(Checkpoint(root, "m"), "vae_decoder", {"latent_channels": 4}, tmp_path)
    assert name in str(caught.value)
    assert caught.value.exit_code == 4


@pytest.mark.slow
def test_weights_are_never_all_in_memory(tmp_path: Path) -> None:
    """A text encoder of 1.2 GB in fp32 (zeros in a sparse file) is exported with far less memory than that."""
    root = Path(shutil.copytree(SHAPES, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors")))
    file = root / "text_encoder" / "config.json"
    config = json.loads(file.read_text()) | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    file.write_text(json.dumps(config))
    with torch.device("meta"):
        module = transformers.CLIPTextModel(transformers.CLIPTextConfig.from_dict(config))
    header, end = {}, 0
    for name, tensor in module.state_dict().items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (root / "text_encoder" / "model.safetensors").open("wb") as sparse:
        sparse.write(struct.pack("<Q", len(text)) + text)
        sparse.truncate(8 + len(text) + end)
    script = (
        "import sys; from pathlib import Path\n"
        "from slipcast_compiler.export.component import settle, write_component\n"
        "from slipcast_compiler.model.checkpoint import Checkpoint\n"
        "from slipcast.timing.memory import peak_mb\n"
        "before = peak_mb()\n"
        "write_component(Checkpoint(Path(sys.argv[1]), 'm'), 'text_encoder', {'text_length': 32}, Path(sys.argv[2]))\n"
        "print(peak_mb() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, root, tmp_path], capture_output=True, text=True, check=True)
    written = (tmp_path / "text_encoder.onnx.data").stat().st_size / 1e6
    assert written > 1200
    assert float(done.stdout) < written / 2


def test_numbers_near_0_and_1_stay() -> None:
    """The optimizer takes them for 0 and 1, and drops what adds and multiplies by them."""

    class Near(torch.nn.Module):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * 1.00001 - 1e-9) / (x + 1e-15) + 0.0

    x = torch.tensor([0.0, 1.0, 2.0])
    exported = torch.onnx.export(torch.export.export(Near(), (x,)), dynamo=True, optimize=False, verbose=False)
    assert exported is not None
    settle(exported.model)
    session = onnxruntime.InferenceSession(ir.to_proto(exported.model).SerializeToString())
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, Near()(x).numpy(), rtol=1e-7)
