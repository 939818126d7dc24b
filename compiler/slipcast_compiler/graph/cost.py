"""What a graph costs on paper: multiply-adds and parameters, of the operators that matrices are multiplied by."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir


def cost(model: Path) -> dict[str, int]:
    """`multiply_adds` of one evaluation of one row (with guidance an image has two), and `parameters`, of an ONNX file.

    What has no matrices (norms, activation functions, sums) is not counted: it is bound by memory, not by arithmetic.
    """
    graph = ir.load(model).graph
    count = sum(map(multiply_adds, graph))
    floating = [value for value in graph.initializers.values() if value.dtype and value.dtype.is_floating_point()]
    return {"multiply_adds": count, "parameters": sum(math.prod(_sizes(value)) for value in floating)}


def multiply_adds(node: ir.Node) -> int:
    """Of one evaluation of one row."""
    return MULTIPLY_ADDS[node.op_type](node) if node.op_type in MULTIPLY_ADDS else 0


def _sizes(value: ir.Value | None) -> list[int]:
    """The dimensions, a batch that is free being 1."""
    assert value is not None
    assert value.shape is not None, value.name
    return [size if isinstance(size, int) else 1 for size in value.shape]


def _product(node: ir.Node) -> int:
    return math.prod(_sizes(node.outputs[0])) * _sizes(node.inputs[0])[-1]


def _gemm(node: ir.Node) -> int:
    weight = _sizes(node.inputs[1])
    return math.prod(_sizes(node.outputs[0])) * weight[1 if node.attributes.get_int("transB", 0) else 0]


def _convolution(node: ir.Node) -> int:
    return math.prod(_sizes(node.outputs[0])) * math.prod(_sizes(node.inputs[1])[1:])


def _attention(node: ir.Node) -> int:
    """Query [batch, heads, rows, width], key and value [batch, heads, tokens, width], or heads and width in one."""
    query, key, value = (_sizes(each) for each in node.inputs[:3])
    if len(query) == 4:
        return query[0] * query[1] * query[2] * key[2] * (query[3] + value[3])
    return query[0] * query[1] * key[1] * (query[2] + value[2])


MULTIPLY_ADDS: dict[str, Callable[[ir.Node], int]] = {
    "MatMul": _product, "Gemm": _gemm, "Conv": _convolution, "Attention": _attention,
}  # fmt: skip
