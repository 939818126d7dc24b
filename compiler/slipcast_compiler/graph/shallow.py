"""Feature caching as a cut: a denoiser's graph, cut where a slowly changing feature crosses into what is still cheap.

A feature that is taken from an earlier step has one more, approximate, binding time: `cached`. What depends on the
latent by it alone leaves the step; what is left is the shallow denoiser. In a U-Net, whose skip connections reach the
last blocks directly, that is its outermost part (DeepCache: Ma et al., arXiv 2312.00858).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

import onnx_ir as ir

from slipcast.errors import RecipeError
from slipcast_compiler.graph.cost import multiply_adds
from slipcast_compiler.graph.cut import bytes_of, extract

PARAMETER = re.compile(r"model\.(.+)\.(?:weight|bias)(?:\.T)?")  # what exported weights are called: see export.py


@dataclass(frozen=True)
class FeatureCut:
    """The value that crosses, and the share of the denoiser's multiply-adds that is left."""

    feature: ir.Value
    share: float


def find_cut(graph: ir.Graph, ceiling: float, latent: str = "sample") -> FeatureCut:
    """The single value that leaves most to the shallow graph within `ceiling`: what it computes is not out of date.

    Of cuts that leave as much, the one that carries the fewest bytes, and then the one that leaves the fewest nodes.
    The shallow graph has to depend on the latent: what is left behind a cut without skip connections around it would
    only repeat what it gave. `latent`: the input that has it. RecipeError where there is none.
    """
    costs = {node: multiply_adds(node) for node in graph}
    total = sum(costs.values())
    sample = next(value for value in graph.inputs if value.name == latent)
    best: tuple[tuple[int, int, int], ir.Value] | None = None
    for value in _latent(graph, sample):
        left = _left(graph, value, costs, ceiling * total)
        if left is None or not any(node in left and node.op_type != "Shape" for node, _ in sample.uses()):
            continue
        rank = -sum(costs[node] for node in left), bytes_of(value), len(left)
        if best is None or rank < best[0]:
            best = rank, value
    if best is None:
        raise RecipeError(
            "[caching]: the denoiser has no place where one feature crosses, with skip connections around it",
            expected=f"a cut that leaves at most {ceiling:.0%} of its multiply-adds", got="none",
            hint="give a larger caching.share, or leave [caching] out: it is for U-Nets",
        )  # fmt: skip
    return FeatureCut(best[1], -best[0][0] / total)


def full_model(model: ir.Model, feature: ir.Value) -> ir.Model:
    """The denoiser, which gives the feature besides."""
    return extract(model, model.graph.inputs, [*model.graph.outputs, feature])


def shallow_model(model: ir.Model, feature: str) -> ir.Model:
    """What is left of the full model where the feature is given."""
    value = next(output for output in model.graph.outputs if output.name == feature)
    outputs = [output for output in model.graph.outputs if output is not value]
    return extract(model, [*model.graph.inputs, value], outputs)


def place(feature: ir.Value) -> str:
    """The module whose weights were the last on the way to the feature, to tell people where it is."""
    node = feature.producer()
    while node is not None:
        for value in node.inputs:
            if value is not None and value.is_initializer() and (found := PARAMETER.fullmatch(str(value.name))):
                return found[1]
        node = next((v.producer() for v in node.inputs if v is not None and v.producer() is not None), None)
    return ""


def _latent(graph: ir.Graph, sample: ir.Value) -> list[ir.Value]:
    """Float tensors of a batch that depend on the latent, in the order of evaluation, but for the graph's outputs."""
    late, found = {sample}, []
    for node in graph:
        if not any(value in late for value in node.inputs):
            continue
        late.update(node.outputs)
        found += [v for v in node.outputs if v not in graph.outputs and v.dtype == ir.DataType.FLOAT and _batched(v)]
    return found


def _batched(value: ir.Value) -> bool:
    """Whether no dimension is free, but for the first."""
    sizes = list(value.shape or ())
    return len(sizes) > 1 and all(isinstance(size, int) for size in sizes[1:])


def _left(graph: ir.Graph, given: ir.Value, costs: dict[ir.Node, int], most: float) -> Collection[ir.Node] | None:
    """The nodes that are still needed where a value is given; None where they cost more than `most`."""
    needed, waiting, cost = set[ir.Node](), [value.producer() for value in graph.outputs], 0
    while waiting:
        node = waiting.pop()
        if node is None or node in needed:
            continue
        needed.add(node)
        if (cost := cost + costs[node]) > most:
            return None
        waiting += [value.producer() for value in node.inputs if value is not None and value is not given]
    return needed
