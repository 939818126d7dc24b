"""What a graph costs on paper is what torch counts of the module that it was exported from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import diffusers
import onnx_ir as ir
import pytest
import torch
from denoisers import DENOISERS
from onnx_ir.passes.common import ShapeInferencePass
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from slipcast_compiler.graph.cost import cost


def _write(text: str, folder: Path) -> Path:
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 23]> g {text}')
    ir.save(ShapeInferencePass()(model).model, folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("(float[batch,5,8] x, float[8,3] w) => (float[batch,5,3] y) { y = MatMul(x, w) }", 5 * 8 * 3),
        ("(float[batch,8] x, float[3,8] w) => (float[batch,3] y) { y = Gemm <transB = 1> (x, w) }", 8 * 3),
        ("(float[batch,8] x, float[8,3] w) => (float[batch,3] y) { y = Gemm (x, w) }", 8 * 3),
        (
            "(float[batch,4,6,6] x, float[8,2,3,3] w) => (float[batch,8,6,6] y) "
            "{ y = Conv <group = 2, pads = [1,1,1,1]> (x, w) }",
            8 * 36 * 2 * 9,
        ),
        (
            "(float[batch,2,9,4] q, float[batch,2,7,4] k, float[batch,2,7,3] v) => (float[batch,2,9,3] y) "
            "{ y = Attention (q, k, v) }",
            2 * 9 * 7 * (4 + 3),
        ),
        ("(float[batch,5] x) => (float[batch,5] y) { y = Tanh(x) }", 0),
    ],
)
def test_operators(text: str, wanted: int, tmp_path: Path) -> None:
    assert cost(_write(text, tmp_path)) == {"multiply_adds": wanted, "parameters": 0}


@pytest.mark.parametrize("name", ["sd15", pytest.param("sd3", marks=pytest.mark.slow)])
def test_a_denoiser(name: str, exported_denoiser: Callable[[str], Path]) -> None:
    """torch counts a multiplication and an addition apart."""
    denoiser = DENOISERS[name]
    found = cost(exported_denoiser(name) / "denoiser.onnx")
    module = getattr(diffusers, denoiser.kind)(**denoiser.config).eval()
    shapes = [tuple(1 if d == "batch" else d for d in each.shape) for each in denoiser.inputs]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        denoiser.call(module, *(torch.ones(shape) for shape in shapes))
    assert found["multiply_adds"] == pytest.approx(counter.get_total_flops() / 2, rel=1e-3)
    assert found["parameters"] == pytest.approx(sum(p.numel() for p in module.parameters()), rel=0.02)
