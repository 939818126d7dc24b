"""Parts for several images at once: operators that are mapped over them, and which denoisers are taken so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import PIPELINES, call_of, open_pipeline

from slipcast.errors import RecipeError
from slipcast_compiler.capture.find import find_for
from slipcast_compiler.capture.replay import modules_of
from slipcast_compiler.export import mapped
from slipcast_compiler.export.batched import parts_in_batches
from slipcast_compiler.host.quiet import quiet

ATEN = torch.ops.aten
# operator -> what it is given besides one image's tensor [2, 4, 6], or two of them
ONE: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (ATEN.neg.default, (), {}), (ATEN.mul.Tensor, (2.5,), {}), (ATEN.pow.Tensor_Scalar, (2,), {}),
    (ATEN.clamp.default, (-0.5, 0.5), {}), (ATEN._to_copy.default, (), {"dtype": torch.float64}),
    (ATEN.chunk.default, (2,), {}), (ATEN.chunk.default, (2, 1), {}), (ATEN.split.Tensor, (3, -1), {}),
    (ATEN.split_with_sizes.default, ([1, 3], 1), {}), (ATEN.select.int, (0, 1), {}), (ATEN.select.int, (-1, 2), {}),
    (ATEN.slice.Tensor, (2, 1, 4), {}), (ATEN.slice.Tensor, (), {"end": 1}), (ATEN.unbind.int, (), {}),
    (ATEN.unsqueeze.default, (0,), {}), (ATEN.unsqueeze.default, (-1,), {}), (ATEN.unsqueeze.default, (3,), {}),
    (ATEN.transpose.int, (0, 2), {}), (ATEN.transpose.int, (-1, 0), {}), (ATEN.permute.default, ([2, 0, 1],), {}),
    (ATEN.permute.default, ([-1, 0, -2],), {}), (ATEN.flip.default, ([0, 2],), {}),
    (ATEN.mean.dim, ([1, 2], True), {}), (ATEN.mean.dim, ([0],), {}), (ATEN.sum.dim_IntList, ([-1],), {}),
    (ATEN.std.correction, ([1, 2],), {"keepdim": True}), (ATEN.var.correction, ([0],), {}),
    (ATEN.linalg_vector_norm.default, (2, [-1], True), {}), (ATEN.amax.default, ([1],), {}),
    (ATEN.softmax.int, (1,), {}), (ATEN.view.default, ([8, 6],), {}), (ATEN.view.default, ([2, -1],), {}),
    (ATEN.reshape.default, ([4, 12],), {}), (ATEN.expand.default, ([3, 2, 4, 6],), {}),
    (ATEN.flatten.using_ints, (0, 1), {}), (ATEN.flatten.using_ints, (), {}), (ATEN.clone.default, (), {}),
    (ATEN.clone.default, (), {"memory_format": torch.contiguous_format}),
    (ATEN.zeros_like.default, (), {}), (ATEN.unflatten.int, (1, [2, 2]), {}), (ATEN.gelu.default, (), {}),
]  # fmt: skip
# of one image's tensors a and b [2, 4, 6], c [4, 6] and d []; and e [4, 6], which all share
SEVERAL: list[tuple[Any, Callable[..., Any]]] = [
    (ATEN.add.Tensor, lambda a, b, c, d, e: (a, b)), (ATEN.sub.Tensor, lambda a, b, c, d, e: (a, c)),
    (ATEN.div.Tensor, lambda a, b, c, d, e: (d, a)), (ATEN.mul.Tensor, lambda a, b, c, d, e: (e, a)),
    (ATEN.mul.Tensor, lambda a, b, c, d, e: (d, e)), (ATEN.where.self, lambda a, b, c, d, e: (c > 0, a, e)),
    (ATEN.cat.default, lambda a, b, c, d, e: ([a, b],)), (ATEN.cat.default, lambda a, b, c, d, e: ([a, b], 1)),
    (ATEN.cat.default, lambda a, b, c, d, e: ([c, e, c], -1)), (ATEN.stack.default, lambda a, b, c, d, e: ([c, e],)),
    (ATEN.stack.default, lambda a, b, c, d, e: ([a, b], 2)), (ATEN.stack.default, lambda a, b, c, d, e: ([d, d],)),
]  # fmt: skip
# pipelines whose denoiser takes one image at a time -> why
ALONE = {
    "perturbed_attention": "the pipeline changes its modules for the call",
    "animate_diff": "frames are rows",
    "lumina_2": "a mask decides sizes", "hunyuan_image": "the same",
    "kandinsky_5": "position embeddings have as many rows", "kandinsky_5_video": "the same",
    "qwen_image_2_1": "it puts rows in places of a mask",
    "z_image": "a list of tensors, one for each image", "z_image_guided": "the same", "z_image_of_blocks": "the same",
}  # fmt: skip


def compare(function: Any, arguments: Callable[..., Any], kwargs: dict[str, Any]) -> None:
    """`arguments(a, b, c, d, e)`: what it is given of one image."""
    generator = torch.Generator().manual_seed(0)
    own = [torch.randn(3, *shape, generator=generator) for shape in ((2, 4, 6), (2, 4, 6), (4, 6), ())]
    shared = torch.randn(4, 6, generator=generator)
    given = arguments(*own, shared)
    flat = [each for value in given for each in (value if isinstance(value, list) else [value])]
    ids = {id(each) for each in flat if isinstance(each, torch.Tensor) and each is not shared}
    found = mapped.apply(function, given, kwargs, 3, lambda each: id(each) in ids)
    for image in range(3):
        wanted = function(*arguments(*(each[image] for each in own), shared), **kwargs)
        pairs = zip(found, wanted, strict=True) if isinstance(wanted, list | tuple) else [(found, wanted)]
        for mine, theirs in pairs:
            torch.testing.assert_close(mine[image], theirs)


@pytest.mark.parametrize(("function", "rest", "kwargs"), ONE, ids=lambda each: str(each))
def test_an_operator_of_one_tensor(function: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    compare(function, lambda a, b, c, d, e: (a, *rest), kwargs)


@pytest.mark.parametrize(("function", "arguments"), SEVERAL)
def test_an_operator_of_several(function: Any, arguments: Callable[..., Any]) -> None:
    compare(function, arguments, {})


@pytest.mark.parametrize(
    ("function", "rest"),
    [
        (ATEN.mean.default, ()), (ATEN.sum.default, ()), (ATEN.squeeze.default, ()), (ATEN.roll.default, ([1], [0])),
        (ATEN.linalg_vector_norm.default, ()), (ATEN.norm.Scalar, (2,)), (ATEN.amax.default, ()),
        (ATEN.amin.default, ([], True)), (ATEN.mean.dim, ([], True)), (ATEN.expand.default, ([3, -1, -1, -1],)),
    ],
)  # fmt: skip
def test_what_sees_all_images_is_refused(function: Any, rest: tuple[Any, ...]) -> None:
    with pytest.raises(RecipeError):
        compare(function, lambda a, b, c, d, e: (a, *rest), {})


def in_batches(pipe: Any, name: str) -> set[str]:
    with quiet():
        found = find_for(pipe, [lambda prompt: call_of(name, prompt, 1)])
    return {part.partition("_")[0] for part in parts_in_batches(found, modules_of(pipe))}


@pytest.mark.parametrize("name", ["stable_diffusion", "flux", pytest.param("wan", marks=pytest.mark.slow)])
def test_a_denoiser_takes_several_images(name: str) -> None:
    assert "denoiser" in in_batches(open_pipeline(name), name)


def test_a_model_whose_rows_see_each_other_takes_one() -> None:
    """Its numbers tell, not its code."""
    pipe = open_pipeline("stable_diffusion")
    unet = pipe.unet
    forward = unet.forward
    unet.forward = lambda sample, *args, **kwargs: forward(
        sample + 0.1 * sample.mean(dim=0, keepdim=True), *args, **kwargs
    )
    assert "denoiser" not in in_batches(pipe, "stable_diffusion")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PIPELINES if name != "kolors"])
def test_which_denoisers_take_several_images(name: str) -> None:
    assert ("denoiser" in in_batches(open_pipeline(name), name)) == (name not in ALONE)
