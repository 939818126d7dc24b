"""INT8 for scaled dot-product attention: both of its products, in the graph that OpenVINO is given.

In a quantised graph attention stays one operator, which other engines run best: ONNX Runtime is no faster in INT8, and
needs 8.2 GB in place of 3.2 for it at the sizes below. The operator carries what its inputs and weights are divided by,
and build/openvino.py has it spelled out. OpenVINO then computes it in one kernel: 70 ms in place of 110 ms for 4096
tokens, 2 rows and 8 heads of 40. Wanted for that are signed integers about zero; with unsigned ones about 128 it falls
back to bf16. For the U-Net of Stable Diffusion 1.5 at 512x512 it is 1.31 s in place of 1.53 s; attention over 256
tokens or fewer gains nothing (all of 2 cores of an AMD EPYC, openvino 2026.4).

The weights of attention, which add up to 1, are divided by the largest that was seen: what is less than a 510th of it
is lost. Of the reference model's attention layers none loses more than 0.5 % of the sum so, and INT8 in all of them
takes the error of the guided prediction from 0.026 to 0.029; where it is more than a recipe allows, the search for
layers to keep finds it (passes/quantize.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from slipcast_compiler.graph import qdq, slices

Arrays = dict[str, npt.NDArray[Any]]

TOKENS = 1024  # attention over fewer gains nothing
INPUTS = ("query", "key", "value")
SCALES = "slipcast.int8"  # of an operator's metadata: what its INPUTS and weights are divided by
CHUNK = 256  # queries


def attentions_of(graph: Any) -> dict[str, str]:
    """Attention that may gain from INT8 -> its node. It is named after its module: ...attn1.sdpa."""
    sizes = _sizes(graph)
    layers = {node: layer for layer, nodes in qdq.layers_of(graph).items() for node in nodes}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def plain(node: Any) -> bool:
        queries, keys = (sizes.get(name, []) for name in node.input[:2])
        masked = any(node.input[3:]) or any(a.i for a in node.attribute if a.name == "is_causal")
        capped = any(a.f for a in node.attribute if a.name == "softcap")
        return len(queries) == len(keys) == 4 and keys[2] >= TOKENS and not masked and not capped

    def name_of(node: Any) -> str:
        after = readers.get(node.output[0], [])
        while len(after) == 1 and after[0].name not in layers:
            after = readers.get(after[0].output[0], [])
        return f"{layers[after[0].name].partition('.to_out')[0]}.sdpa" if len(after) == 1 else str(node.name)

    return {name_of(node): node.name for node in graph.node if node.op_type == "Attention" and plain(node)}


def scales_of(
    graph: Any, nodes: Iterable[str], run: Callable[[Mapping[str, Any]], Arrays], samples: Iterable[Arrays]
) -> dict[str, list[float]]:
    """Node -> what its query, key, value and weights are divided by, so that all that was seen fits 8 bits.

    `run` gives the tensors that the nodes read; the weights are computed from them, CHUNK queries at a time.
    """
    chosen = {node.name: node for node in graph.node if node.name in set(nodes)}
    peaks = {name: np.zeros(4) for name in chosen}
    for inputs in samples:
        outputs = run(inputs)
        for name, node in chosen.items():
            q, k, v = (outputs[each] for each in node.input[:3])
            seen = [*(float(np.abs(each).max()) for each in (q, k, v)), _peak_weight(q, k, _scale(node, q.shape[-1]))]
            peaks[name] = np.maximum(peaks[name], seen)
    return {name: (np.maximum(peak, 1e-9) / (127, 127, 127, 255)).tolist() for name, peak in peaks.items()}


def _peak_weight(q: npt.NDArray[Any], k: npt.NDArray[Any], scale: float) -> float:
    """The largest of softmax(scale * q k^T)."""
    import torch

    keys, most = torch.from_numpy(k).transpose(-1, -2), 0.0
    for queries in torch.from_numpy(q).split(CHUNK, dim=2):
        scores = (queries * scale) @ keys
        most = max(most, float((scores.amax(-1) - scores.logsumexp(-1)).max().exp()))
    return most


def annotate(model: Any, scales: Mapping[str, list[float]]) -> None:
    """Note the scales on the nodes."""
    for node in model.graph.node:
        if node.name in scales:
            noted = node.metadata_props.add()
            noted.key, noted.value = SCALES, json.dumps(scales[node.name])


def simulate(model: Any, scales: Mapping[str, list[float]]) -> None:
    """Those attention nodes with quantisation before each product, simulated in fp32, in slices; in place."""
    sizes = _sizes(model.graph)
    for node in model.graph.node:
        if node.name in scales:
            factor = _scale(node, sizes[node.input[0]][-1])
            del node.attribute[:]
            named = {"scale": factor, **dict(zip(slices.SCALES, scales[node.name], strict=True))}
            node.attribute.extend(helper.make_attribute(name, value) for name, value in named.items())
            slices.replace(model, node, slices.INT8)


def spelled_out(model: Path, folder: Path) -> Path:
    """The graph with attention that has scales spelled out, written to `folder`; or the very one where none has."""
    proto = onnx.load(model, load_external_data=False)
    noted = {n.name: json.loads(p.value) for n in proto.graph.node for p in n.metadata_props if p.key == SCALES}
    if not noted:
        return model
    spell_out(proto.graph, noted)
    qdq.save(proto, folder / model.name, model.parent)
    return folder / model.name


def spell_out(graph: Any, scales: Mapping[str, list[float]]) -> None:
    """Write those attention nodes as products and softmax, with quantisation before each product, in place."""
    sizes = _sizes(graph)
    nodes: list[Any] = []

    def constant(name: str, value: Any) -> str:
        graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def add(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], f"{output}.node", **attributes))
        return output

    def quantised(tensor: str, name: str, scale: float, zero: Any) -> str:
        by = [constant(f"{name}.scale", np.float32(scale)), constant(f"{name}.zero", zero)]
        return add("DequantizeLinear", [add("QuantizeLinear", [tensor, *by], f"{name}.int8"), *by], f"{name}.rounded")

    for node in graph.node:
        if node.name not in scales:
            nodes.append(node)
            continue
        name = node.name
        q, k, v = (
            quantised(tensor, f"{name}.{role}", scale, np.int8(0))
            for role, tensor, scale in zip(INPUTS, node.input, scales[name], strict=False)
        )
        turned = add("Transpose", [k], f"{name}.turned", perm=[0, 1, 3, 2])
        scale = constant(f"{name}.scale", np.float32(_scale(node, sizes[node.input[0]][-1])))
        scores = add("Mul", [add("MatMul", [q, turned], f"{name}.products"), scale], f"{name}.scores")
        weights = add("Softmax", [scores], f"{name}.weights", axis=-1)
        add("MatMul", [quantised(weights, f"{name}.weight", scales[name][3], np.uint8(0)), v], node.output[0])
    kept = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)


def _sizes(graph: Any) -> dict[str, list[int]]:
    """The dimensions of every tensor, those that are free being 0."""
    return {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.value_info)}


def _scale(node: Any, width: int) -> float:
    """What the scores are multiplied by."""
    return next((a.f for a in node.attribute if a.name == "scale" and a.f), float(width**-0.5))
