"""Operators that the exporter stops at, in other forms; and those that it does not know, told before it is asked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slipcast.errors import RecipeError
from slipcast_compiler.capture.program import Call, Op, Program, Ref
from slipcast_compiler.export.component import OPSET
from slipcast_compiler.export.forms import as_known
from slipcast_compiler.export.operators import check_operators
from slipcast_compiler.graph.tidy import tidy
from slipcast_compiler.host.quiet import quiet

ATEN = torch.ops.aten


class Attention(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(5, 5).triu(1) - 1
        return torch.nn.functional.scaled_dot_product_attention(x, x.sin(), x.cos(), attn_mask=mask, scale=0.3)


class SharedKeys(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        key = x[:1].sin()
        return torch.nn.functional.scaled_dot_product_attention(x, key, key.cos())


class Clamped(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.clamp(x, min=1, max=1.5)


class Copied(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        into = torch.zeros(1, 4, 4)
        into[:, 1:] = x.to(torch.float64)
        return into


class Put(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_strided_scatter(x * 2, x[:2, 1:3].sin(), (2, 2), (4, 1), 5)


class Chosen(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        high, row = x > 1, x[:1] > 0.5
        return torch.where(row, high, ~row).masked_fill(x > 1.9, False) * x


class Nearest(torch.nn.Module):
    """As a pipeline's own code, which is recorded below the dispatcher, and as a module's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        operators = ATEN._upsample_nearest_exact1d, ATEN._upsample_nearest_exact2d, ATEN._upsample_nearest_exact3d
        x = operators[x.ndim - 3].default(x, [7, 3, 5][: x.ndim - 2])
        x = torch.nn.functional.interpolate(x, size=[5, 6, 9][: x.ndim - 2], mode="nearest-exact")
        return torch.nn.functional.interpolate(x, scale_factor=1.5, mode="nearest-exact")


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (Attention(), (2, 5, 8)),
        (SharedKeys(), (3, 2, 5, 8)),
        (Clamped(), (3, 4)),
        (Copied(), (3, 4)),
        (Chosen(), (3, 4)),
        (Put(), (3, 4)),
        (Nearest(), (1, 2, 4)),
        (Nearest(), (1, 2, 4, 4)),
        (Nearest(), (1, 2, 3, 4, 4)),
    ],
)
def test_another_form_is_the_same_and_has_one_in_onnx(module: torch.nn.Module, shape: Any) -> None:
    import onnxruntime

    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2
    with quiet(), torch.no_grad():
        exported = torch.onnx.export(
            as_known(torch.export.export(module, (x,))), dynamo=True, optimize=False, opset_version=OPSET, verbose=False
        )
    assert exported is not None
    tidy(exported.model.graph)
    session = onnxruntime.InferenceSession(exported.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), module(x), rtol=1e-5, atol=1e-5)


def _part(*events: Any) -> Any:
    return SimpleNamespace(name="denoiser", events=events)


def test_an_operator_without_a_form_is_told_with_its_line() -> None:
    known = Op(ATEN.add.Tensor, (Ref(0), 1), {}, (1,))
    written = Op(ATEN.add_.Tensor, (Ref(0), 1), {}, (2,))
    unknown = Op(ATEN.kthvalue.default, (Ref(0), 1), {}, (3, 4), "mine.py:7")
    check_operators([_part(known, written)])
    inside = Program("", (), (known, unknown), (), (), {}, (), {})
    for events in ((known, unknown), (Call("unet", (), {}, (), inside=inside),)):
        with pytest.raises(RecipeError, match="denoiser cannot be exported") as refused:
            check_operators([_part(*events)])
        assert refused.value.got == "aten.kthvalue.default at mine.py:7"
