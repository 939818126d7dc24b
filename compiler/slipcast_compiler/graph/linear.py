"""Linear layers in an ONNX graph: products with a constant."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import helper

from slipcast_compiler.graph.qdq import layer_of, read_by


@dataclass(frozen=True)
class Linear:
    """A product with a constant: its node, the `weight` that it reads, and whether that is [out, in]."""

    node: str
    weight: str
    inputs: int
    outputs: int
    turned: bool


def linear_layers(graph: Any) -> dict[str, list[Linear]]:
    """By layer, as qdq.layers_of calls them, the products with its weight: a matrix in fp32 that nothing else reads."""
    kind = onnx.TensorProto.FLOAT
    read = Counter(name for node in graph.node for name in read_by(node))
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer if tensor.data_type == kind}
    found: dict[str, list[Linear]] = {}
    for node in graph.node:
        weight = node.input[1] if len(node.input) > 1 else ""
        if len(shapes.get(weight, ())) != 2 or node.input[0] in shapes or not node.name:
            continue
        settings = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        if node.op_type == "Gemm" and not settings.pop("transA", 0):
            turned = bool(settings.pop("transB", 0))
            if any(value != 1 for value in settings.values()):  # alpha and beta
                continue
        elif node.op_type == "MatMul":
            turned = False
        else:
            continue
        outputs, inputs = shapes[weight] if turned else shapes[weight][::-1]
        found.setdefault(layer_of(weight), []).append(Linear(node.name, weight, inputs, outputs, turned))
    return {layer: each for layer, each in found.items() if _alone(each, read)}


def _alone(linears: list[Linear], read: Counter[str]) -> bool:
    """Whether nothing but these products reads their weight, and all in one way."""
    return len({(each.weight, each.turned) for each in linears}) == 1 and len(linears) == read[linears[0].weight]
