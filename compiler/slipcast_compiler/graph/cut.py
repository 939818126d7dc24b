"""Binding times: cut a denoiser's graph by when its inputs become known (partial evaluation).

Every value is bound at the join of its inputs' binding times. What is bound before the latent leaves the sampling loop:

- `step`: depends on the timestep alone; evaluated when compiling, one row per timestep of the schedule;
- `prompt`: depends on the prompt alone; evaluated once per prompt;
- `prompt+step`: mixes both (transformers modulated by timestep and pooled text); once per prompt and timestep;
- `denoise`: the rest, evaluated at every step.

The cut is exact: each part consists of the graph's own nodes, and what a node computes does not change.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import networkx
import onnx_ir as ir

from slipcast.bundle.program import IMAGES
from slipcast_compiler.graph.broadcast import ELEMENTWISE, broadcast_late


class Binding(enum.Flag):
    """When a value is known. The join of two is `|`; LATENT absorbs the others."""

    CONSTANT = 0
    STEP = enum.auto()
    PROMPT = enum.auto()
    LATENT = enum.auto()


# Every other input is known with the prompt.
INPUTS = {"sample": Binding.LATENT, "timestep": Binding.STEP, "guidance": Binding.STEP}
EARLY = {Binding.STEP: "step", Binding.PROMPT: "prompt", Binding.STEP | Binding.PROMPT: "prompt+step"}

# Nodes that may be evaluated in the loop, although they are bound before it, where less crosses into it then.
CHEAP = ELEMENTWISE | {
    "Concat", "Expand", "Flatten", "Gather", "Pad", "Reshape", "Resize", "Shape", "Slice", "Split", "Squeeze", "Tile",
    "Transpose", "Unsqueeze",
}  # fmt: skip
NODE_BYTES = 16 << 10  # what evaluating one more node in the loop costs, in bytes that cross into it
UNKNOWN = 1 << 40  # of what had better not cross
BATCH = 2  # the free dimension when bytes are counted: one image with guidance


@dataclass(frozen=True)
class Parts:
    """Graphs by part ("step", "prompt", "prompt+step", "denoise"); a part without nodes is absent.

    An input of a graph is an input of the original, or an output of an earlier part under the same name. Outputs of
    `step` have a batch of 1, and broadcast. `nodes` and `parameters` count the original. `telling`: of what
    crosses, what says how many images there are, and could not be kept from it.
    """

    graphs: Mapping[str, ir.Model]
    nodes: int
    parameters: int
    telling: frozenset[str] = frozenset()


def cut(model: ir.Model, early: Collection[Binding] = tuple(EARLY), inputs: Mapping[str, Binding] = INPUTS) -> Parts:
    """Cut a denoiser as it was exported; what is bound neither `early` nor later than that stays in the loop.

    `inputs`: when those that are not known with the prompt are. The model is rewritten on the way (see broadcast_late).
    """
    graph, nodes, parameters = model.graph, len(model.graph), count_parameters(model.graph)
    broadcast_late(model)
    bound = {v: b if b in early or b == Binding.CONSTANT else Binding.LATENT for v, b in bind(graph, inputs).items()}
    late = {node for node in graph if bound[node.outputs[0]] == Binding.LATENT or _gives(node)}
    into_loop = _cut(graph, bound, set(EARLY), late)
    mixed = {node for node in _needed(into_loop) if bound[node.outputs[0]] == Binding.STEP | Binding.PROMPT}
    into_mixed = _cut(graph, bound, {Binding.STEP, Binding.PROMPT}, mixed)
    graphs = {}
    for binding, name in EARLY.items():
        wanted = [v for v in into_loop | into_mixed if bound[v] == binding and not v.is_graph_input()]
        if wanted:
            given = into_mixed if name == "prompt+step" else graph.inputs
            graphs[name] = extract(model, given, wanted)
    latent = {value for value in graph.inputs if bound[value] == Binding.LATENT}  # or not to be taken out
    graphs["denoise"] = extract(model, latent | into_loop, graph.outputs)
    telling = {str(value.name) for value in tell_images(graph) & (into_loop | into_mixed)}
    return Parts(graphs, nodes, parameters, frozenset(telling))


def bind(graph: ir.Graph, inputs: Mapping[str, Binding] = INPUTS) -> dict[ir.Value, Binding]:
    """The binding time of every value; see cut."""
    bound = dict.fromkeys(graph.initializers.values(), Binding.CONSTANT)
    bound |= {value: inputs.get(str(value.name), Binding.PROMPT) for value in graph.inputs}
    for node in graph:
        assert not any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()), node.op_type
        join = Binding.CONSTANT
        for value in node.inputs:
            join |= bound[value] if value is not None else join
        bound |= dict.fromkeys(node.outputs, Binding.LATENT if Binding.LATENT in join else join)
    return bound


def _cut(
    graph: ir.Graph, bound: Mapping[ir.Value, Binding], early: Collection[Binding], late: Collection[ir.Node]
) -> set[ir.Value]:
    """The values that cross from nodes bound `early` into the `late` ones, so that the least is carried.

    A minimum cut between what has to be evaluated outside (all but CHEAP nodes) and what has to be inside: a value
    that crosses costs its bytes, once, and a cheap node that is evaluated inside costs NODE_BYTES. Of cuts that cost
    the same, the one that leaves the least inside.
    """
    network, telling = networkx.DiGraph(), tell_images(graph)
    network.add_nodes_from(("outside", "inside"))
    for value in values_of(graph):
        if bound[value] not in early or (origin := value.producer()) in late:
            continue
        network.add_edge(origin or "outside", value, capacity=UNKNOWN if value in telling else bytes_of(value))
        if origin:
            network.add_edge("outside", origin, **({"capacity": NODE_BYTES} if origin.op_type in CHEAP else {}))
        for consumer in value.consumers():
            network.add_edge(value, "inside" if consumer in late else consumer)  # no capacity: cannot be cut
    _, (_, inside) = networkx.minimum_cut(network, "outside", "inside")
    return {v for v in inside if isinstance(v, ir.Value) and (v.producer() or "outside") not in inside}


def values_of(graph: ir.Graph) -> Iterable[ir.Value]:
    """Every value that is not an initialiser, in the order of evaluation."""
    return [*graph.inputs, *(output for node in graph for output in node.outputs)]


def bytes_of(value: ir.Value) -> int:
    """The size of a value for BATCH images. One whose size is not known had better not cross."""
    if value.shape is None or value.dtype is None:
        return UNKNOWN
    shape = value.shape.evaluate(dict.fromkeys(value.shape.free_symbols(), BATCH))
    return int(math.prod(shape.numpy()) * value.dtype.itemsize) if shape.is_static() else UNKNOWN


def tell_images(graph: ir.Graph) -> set[ir.Value]:
    """The values that say how many images there are, and have no rows of them: what they are before the loop, for each
    prompt, says nothing of a call within it."""
    found = set[ir.Value]()
    for node in graph:
        if node.op_type == "Shape" and (value := node.inputs[0]) is not None:
            begin, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(value.shape or ()))
            if value.shape is None or counts_images(value.shape[begin:end]):
                found.update(node.outputs)
        elif found.intersection(node.inputs):
            found.update(each for each in node.outputs if each.shape is None or not counts_images(each.shape))
    return found


def counts_images(sizes: Iterable[int | ir.SymbolicDim]) -> bool:
    """Whether any of these follows from how many images a call is of."""
    return any(not isinstance(size, int) and size.value is not None and IMAGES in size.value for size in sizes)


def _gives(node: ir.Node) -> bool:
    """Whether it makes what the graph returns, which the loop has to return whenever it is known."""
    return any(value.is_graph_output() for value in node.outputs)


def _needed(values: Iterable[ir.Value]) -> set[ir.Node]:
    """The nodes that the values are computed by."""
    needed, waiting = set[ir.Node](), [value.producer() for value in values]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in needed:
            needed.add(node)
            waiting += [value.producer() for value in node.inputs if value is not None]
    return needed


def extract(model: ir.Model, inputs: Collection[ir.Value], outputs: Collection[ir.Value]) -> ir.Model:
    """A model of its own, with the inputs that it needs. Weights are shared with the original, not copied."""
    values = values_of(model.graph)
    extracted = ir.convenience.extract(
        model.graph, [value for value in values if value in inputs], [value for value in values if value in outputs]
    )
    for value in list(extracted.inputs):
        if not value.uses():
            extracted.inputs.remove(value)
    return ir.Model(extracted, ir_version=model.ir_version, producer_name=model.producer_name)


def count_parts(parts: Parts) -> dict[str, Any]:
    """Nodes and parameters by part, against the `original`'s, and the tensors that cross; bytes for BATCH images."""
    counted = {
        name: {"nodes": len(model.graph), "parameters": count_parameters(model.graph)}
        for name, model in parts.graphs.items()
    }
    takers = {name: {value.name for value in model.graph.inputs} for name, model in parts.graphs.items()}
    crossings = [
        {
            "name": value.name, "shape": [d if isinstance(d, int) else d.value for d in value.shape],
            "bytes": bytes_of(value), "from": name, "to": [to for to, taken in takers.items() if value.name in taken],
        }
        for name, model in parts.graphs.items() if name != "denoise" for value in model.graph.outputs
    ]  # fmt: skip
    original = {"nodes": parts.nodes, "parameters": parts.parameters}
    return {"original": original, "parts": counted, "crossings": crossings}


def count_parameters(graph: ir.Graph) -> int:
    """The number of elements of all floating-point weights."""
    weights = [value.const_value for value in graph.initializers.values()]
    return sum(weight.size for weight in weights if weight is not None and weight.dtype.is_floating_point())
