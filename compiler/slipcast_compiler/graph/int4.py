"""INT4 weights in an ONNX graph: those of linear layers, in groups that share a scale, with a low-rank branch beside.

A weight is a constant of 4 bits that a DequantizeLinear of blocks (opset 21) reads before the product: ONNX Runtime and
OpenVINO both find that pair, keep the weight in 4 bits in memory, and multiply by it as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import helper

from slipcast.engines import cpu_threads
from slipcast_compiler.graph.linear import Linear, linear_layers
from slipcast_compiler.graph.qdq import Arrays, drop_unread, session
from slipcast_compiler.graph.weights import read_tensor

Floats = npt.NDArray[np.float32]

LEAST, MOST = -8, 7
CLIPS = np.linspace(1.0, 0.6, 9)  # shares of a group's largest weight that become the largest integer
BLOCK = 128  # outputs that are quantised at once, as many as fit into a cache
LEAST_GROUP = 16  # ONNX Runtime has no kernel for smaller ones
LEAST_GROUPS = 2  # of one alone OpenVINO 2026.4 makes a form that keeps it from storing all other weights in fp16


@dataclass(frozen=True)
class Packing:
    """`group`: how many inputs share a scale, where they cut the inputs evenly; `rank` of the branch, 0 for none."""

    group: int
    rank: int

    def group_of(self, inputs: int) -> int:
        """The size of groups of a layer with so many inputs: LEAST_GROUP cuts all layers evenly."""
        largest = min(self.group, inputs // LEAST_GROUPS)
        return next(size for size in (128, 64, 32, LEAST_GROUP) if size <= largest and inputs % size == 0)


@dataclass(frozen=True)
class Packed:
    """A weight in 4 bits: `integers` [in, out], `scales` [in / group, out], and the branch `down` [in, rank] and `up`
    [rank, out], where rank is not 0."""

    integers: npt.NDArray[Any]
    scales: Floats
    down: Floats
    up: Floats

    def whole(self) -> Floats:
        """The weight that all of it stands for, [in, out]."""
        inputs, outputs = self.integers.shape
        groups = self.integers.astype(np.float32).reshape(len(self.scales), -1, outputs) * self.scales[:, None]
        found: Floats = groups.reshape(inputs, outputs) + self.down @ self.up
        return found


def packable_layers(graph: Any) -> dict[str, list[Linear]]:
    """The linear layers whose inputs can be cut into groups."""
    return {
        layer: each
        for layer, each in linear_layers(graph).items()
        if all(one.inputs % LEAST_GROUP == 0 and one.inputs >= LEAST_GROUPS * LEAST_GROUP for one in each)
    }


def pack(weight: Floats, importance: Floats, packing: Packing) -> Packed:
    """A weight [in, out] in 4 bits. `importance` [in]: the mean square of each input, by which errors count.

    Each group's scale is that of the least error, of CLIPS. What is left after the largest singular values, of the
    weight times the inputs' magnitude, is quantised: the branch keeps these in full (SVDQuant, Li et al., arXiv
    2411.05007, section 4.2).
    """
    inputs, outputs = weight.shape
    group, rank = packing.group_of(inputs), min(packing.rank, inputs // 4, outputs // 4)
    by = np.sqrt(importance / max(float(importance.mean()), 1e-30)).astype(np.float32)
    by = np.maximum(by, 1e-3)  # inputs that are 0 on calibration prompts may not be so on others
    down, up = _largest(weight * by[:, None], rank)
    down /= by[:, None]
    rest = weight - down @ up
    blocks = np.array_split(rest, range(BLOCK, outputs, BLOCK), axis=1)
    counts = np.square(by).reshape(-1, group, 1)
    with ThreadPoolExecutor(cpu_threads()) as pool:
        found = list(pool.map(lambda block: _quantised(block, counts), blocks))
    integers, scales = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
    return Packed(integers, scales, down, up)


def _quantised(weight: Floats, counts: Floats) -> tuple[npt.NDArray[Any], Floats]:
    """The integers of some outputs, and the scales of their groups; `counts` [groups, group, 1]: of each input."""
    rest = weight.reshape(*counts.shape[:2], -1)
    largest = np.abs(rest).max(axis=1)
    scales: Any = np.ones_like(largest)
    least: Any = np.full_like(largest, np.inf)
    for clip in CLIPS:
        tried = np.where(largest > 0, largest * np.float32(clip / MOST), np.float32(1))
        error = (counts * np.square(_rounded(rest, tried) * tried[:, None] - rest)).sum(axis=1)
        better = error < least
        scales, least = np.where(better, tried, scales), np.where(better, error, least)
    return _rounded(rest, scales).reshape(weight.shape).astype(ml_dtypes.int4), scales


def _rounded(groups: Floats, scales: Floats) -> Floats:
    found: Floats = np.clip(np.rint(groups / scales[:, None]), LEAST, MOST)
    return found


def _largest(matrix: Floats, rank: int) -> tuple[Floats, Floats]:
    """Its largest singular values, as a product [in, rank] @ [rank, out]: found in a random subspace (Halko, Martinsson
    and Tropp, arXiv 0909.4061, algorithm 4.4), which a matrix of 4096 x 4096 wants seconds for, and all of them
    minutes."""
    if not rank:
        return np.zeros((len(matrix), 0), np.float32), np.zeros((0, matrix.shape[1]), np.float32)
    drawn = np.random.default_rng(0).standard_normal((matrix.shape[1], rank + 8)).astype(np.float32)
    basis, _ = np.linalg.qr(matrix @ drawn)
    for _ in range(2):
        basis, _ = np.linalg.qr(matrix.T @ basis)
        basis, _ = np.linalg.qr(matrix @ basis)
    left, values, right = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ left[:, :rank]) * values[:rank], right[:rank]


def importances(
    model: Path, layers: Mapping[str, list[Linear]], samples: Iterable[Arrays], work: Path
) -> dict[str, Floats]:
    """By weight, the mean square of each of its inputs, [in], over all samples. Written into `work`, where the model's
    weights lie, too."""
    proto = onnx.load(model, load_external_data=False)
    read = {node.name: node.input[0] for node in proto.graph.node if node.input}
    sums: dict[str, str] = {}
    for linear in (each for every in layers.values() for each in every):
        tensor = read[linear.node]
        if tensor not in sums:
            sums[tensor] = f"{tensor}.squares"
            proto.graph.initializer.extend(
                [
                    onnx.numpy_helper.from_array(np.array([-1, linear.inputs]), f"{tensor}.rows"),
                    onnx.numpy_helper.from_array(np.array([0]), f"{tensor}.first"),
                ]
            )
            proto.graph.node.extend(
                [
                    helper.make_node("Reshape", [tensor, f"{tensor}.rows"], [f"{tensor}.flat"]),
                    helper.make_node("Mul", [f"{tensor}.flat", f"{tensor}.flat"], [f"{tensor}.square"]),
                    helper.make_node("ReduceMean", [f"{tensor}.square", f"{tensor}.first"], [sums[tensor]], keepdims=0),
                ]
            )
    del proto.graph.output[:]
    proto.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in sums.values())
    onnx.save(proto, work / "importances.onnx")
    run, total, count = session(work / "importances.onnx", mapped=True), dict[str, Floats](), 0
    for inputs in samples:
        outputs, count = run(inputs), count + 1
        total = {name: total.get(name, np.float32(0)) + outputs[name] for name in outputs}
    found: dict[str, Floats] = {}
    for linear in (each for every in layers.values() for each in every):
        mean = total[sums[read[linear.node]]] / np.float32(count)
        found[linear.weight] = found.get(linear.weight, np.float32(0)) + mean
    return found


def pack_all(
    graph: Any, folder: Path, layers: Mapping[str, list[Linear]], importance: Mapping[str, Floats], packing: Packing,
    out: Path,
) -> list[Any]:  # fmt: skip
    """Write the weights of the layers in 4 bits to `out`, one at a time; what is returned are the TensorProtos that lie
    there. The graph's own weights lie in `folder`."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    every = {linear.weight: linear for each in layers.values() for linear in each}
    tensors, offset = [], 0
    with out.open("wb") as file:
        for name, linear in every.items():
            whole = read_tensor(constants[name], folder)
            made = pack(whole.T if linear.turned else whole, importance[name], packing)
            parts = {"int4": made.integers, "scale": made.scales}
            for part, array in (parts | ({"down": made.down, "up": made.up} if made.down.size else {})).items():
                tensor = ir.Tensor(np.ascontiguousarray(array), name=f"{name}.{part}")
                data = tensor.tobytes()
                place = ir.ExternalTensor(
                    out.name, offset, len(data), tensor.dtype, shape=tensor.shape, name=tensor.name
                )
                tensors.append(ir.to_proto(place))
                file.write(data)
                padding = -len(data) % 64
                file.write(bytes(padding))
                offset += len(data) + padding
    return tensors


def with_int4(original: Any, chosen: Mapping[str, list[Linear]], tensors: Iterable[Any], packing: Packing) -> Any:
    """The graph, with the chosen layers reading what pack_all wrote."""
    model = onnx.ModelProto()
    model.CopyFrom(original)
    linears = {linear.node: linear for each in chosen.values() for linear in each}
    known, uses = {tensor.name: tensor for tensor in tensors}, Counter[str]()
    nodes = []
    for node in model.graph.node:
        linear = linears.get(node.name)
        if linear is None:
            nodes.append(node)
            continue
        # Of a weight that several products read, ONNX Runtime keeps 4 bits where each has a constant of its own.
        codes = [f"{linear.weight}.int4", f"{linear.weight}.scale"]
        if again := uses[linear.weight]:
            known |= {f"{name}.{again}": _renamed(known[name], f"{name}.{again}") for name in codes}
            codes = [f"{name}.{again}" for name in codes]
        uses[linear.weight] += 1
        branch = [name for part in ("down", "up") if (name := f"{linear.weight}.{part}") in known]
        nodes += _product(node, codes, branch, packing.group_of(linear.inputs))
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    model.graph.initializer.extend(known.values())
    drop_unread(model.graph)
    return model


def _renamed(tensor: Any, name: str) -> Any:
    """Another name for what lies in the same place."""
    copied = onnx.TensorProto()
    copied.CopyFrom(tensor)
    copied.name = name
    return copied


def _product(node: Any, codes: list[str], branch: list[str], group: int) -> list[Any]:
    """What takes the place of a product with a constant: the product itself has its name."""
    name, given, whole = node.name, node.input[0], f"{node.name}.dequantised"
    terms = [f"{name}.product"]
    made = [
        helper.make_node("DequantizeLinear", codes, [whole], f"{name}.dequantise", axis=0, block_size=group),
        helper.make_node("MatMul", [given, whole], terms[:1], name),
    ]
    if branch:
        terms.append(f"{name}.branch")
        made.append(helper.make_node("MatMul", [given, branch[0]], [f"{name}.inner"], f"{name}.down"))
        made.append(helper.make_node("MatMul", [f"{name}.inner", branch[1]], terms[1:], f"{name}.up"))
    terms += [bias for bias in node.input[2:3] if bias]  # of a Gemm
    # A Sum also of one term, and no Add: ONNX Runtime takes a product before a Relu, or one of matrices before an Add,
    # for something else, and would make the whole weight of its 4 bits at every call.
    made.append(helper.make_node("Sum", terms, [node.output[0]], f"{name}.sum"))
    return made
