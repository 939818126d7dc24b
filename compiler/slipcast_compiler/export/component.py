"""Export a component to ONNX without ever holding its weights.

The module is built on torch's meta device and traced there with torch.export; the ONNX graph then gets its weights as
lazy tensors, which are read from safetensors, converted and written to the external data one at a time. Peak memory is
the graph plus the largest tensor, so a model that does not fit into memory can be exported.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch
from onnxscript.optimizer import optimize
from torch.export import Dim

from slipcast.bundle.manifest import Component, TensorSpec
from slipcast.errors import ArtifactError
from slipcast_compiler.graph.tidy import tidy
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.quiet import quiet
from slipcast_compiler.model.architectures import ComponentSource
from slipcast_compiler.model.checkpoint import Checkpoint, Weight, empty_module, find_weight
from slipcast_compiler.model.original import Original
from slipcast_compiler.model.rewrite import UNCHANGED, Rewrite, fit

# The first opset with Attention as one operator; with GroupNormalization (21) it halves the number of nodes.
OPSET = 23
# Example sizes for free dimensions while tracing: two different ones where two could be mistaken for each other. The
# upper bound of 63 for the batch only keeps a memory-layout choice in diffusers (for 64 images and more) out of the
# trace; the graph that results takes any batch.
FREE = {"batch": (2, 63), "tile_height": (16, 1024), "tile_width": (24, 1024)}


def write_component(
    checkpoint: Checkpoint, name: str, sizes: Mapping[str, int], out: Path, rewrite: Rewrite = UNCHANGED
) -> Component:
    """Write out/NAME.onnx and out/NAME.onnx.data in fp32, the graph of trace_component; and return its contract.

    Raises ArtifactError where a tensor of the checkpoint is not finite.
    """
    model = trace_component(checkpoint, name, sizes, rewrite)
    ir.save(model, out / f"{name}.onnx", external_data=f"{name}.onnx.data")
    return contract_of(model)


def trace_component(
    checkpoint: Checkpoint, name: str, sizes: Mapping[str, int], rewrite: Rewrite = UNCHANGED
) -> ir.Model:
    """A component's graph, whose weights are read when they are asked for; `sizes` are the dimensions that are known.

    `rewrite` holds tensors in place of the checkpoint's, and gives the module their structure.
    Raises ArtifactError where a parameter of the module has no tensor in the checkpoint, or one of another shape.
    """
    source = checkpoint.architecture.components[name]
    module = empty_module(checkpoint, source.folder)
    fit(module, rewrite.shapes())
    # No checkpoint holds the buffers that a constructor computes.
    buffers = {f"model.{name}": buffer.clone() for name, buffer in module.named_buffers()}
    model = _trace(module.to("meta"), source, sizes)
    weights = checkpoint.weights(source.folder) | rewrite.weights()
    _attach_weights(model.graph, weights, f"{checkpoint.name}/{source.folder}", buffers)
    settle(model)
    _name_dimensions(model, source, sizes)
    return model


def settle(model: ir.Model) -> None:
    """Bring a traced graph whose weights are lazy into the form that engines read best, without the tracer's notes."""
    _transpose_weights(model.graph)
    with quiet(), _small_numbers_hidden(model.graph):
        optimize(model)
    tidy(model.graph)
    _strip(model)


def contract_of(model: ir.Model) -> Component:
    """What every engine of a graph takes and returns."""
    return Component(inputs=_specs(model.graph.inputs), outputs=_specs(model.graph.outputs))


def export_component(original: Original, name: str, cache: Cache, rewrite: Rewrite = UNCHANGED) -> Path:
    """The cache's directory with NAME.onnx, NAME.onnx.data and NAME.json, the component's contract.

    `rewrite` is the denoiser's; other components take no part of it.
    """
    rewrite = rewrite if name == "denoiser" else UNCHANGED
    checkpoint, sizes = original.checkpoint, dict(original.sizes)

    def make(folder: Path) -> None:
        contract = write_component(checkpoint, name, sizes, folder, rewrite)
        (folder / f"{name}.json").write_text(contract.model_dump_json())

    inputs = {"checkpoint": checkpoint.sha256, "component": name, "sizes": sizes, "rewrite": rewrite.digest}
    return cache.get("export", inputs, make)


class _Call(torch.nn.Module):  # type: ignore[misc]
    """A module whose forward is the architecture's way to call the component."""

    def __init__(self, model: torch.nn.Module, source: ComponentSource) -> None:
        super().__init__()
        self.model, self._call = model, source.call

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self._call(self.model, *inputs)


def _trace(module: torch.nn.Module, source: ComponentSource, sizes: Mapping[str, int]) -> ir.Model:
    free = {name: Dim(name, min=1 if name == "batch" else 4, max=high) for name, (_, high) in FREE.items()}
    examples, dynamic = [], []
    for spec in source.inputs:
        shape = [d if isinstance(d, int) else sizes.get(d) or FREE[d][0] for d in spec.shape]
        examples.append(torch.zeros(shape, dtype=getattr(torch, spec.dtype), device="meta"))
        dynamic.append({i: free[d] for i, d in enumerate(spec.shape) if isinstance(d, str) and d not in sizes})
    with torch.no_grad(), quiet():
        program = torch.export.export(_Call(module, source), tuple(examples), dynamic_shapes=(tuple(dynamic),))
        exported = torch.onnx.export(
            program, dynamo=True, optimize=False, opset_version=OPSET, verbose=False,
            input_names=[spec.name for spec in source.inputs], output_names=list(source.outputs),
        )  # fmt: skip
    assert exported is not None
    return exported.model


def _attach_weights(graph: ir.Graph, weights: dict[str, Weight], where: str, buffers: dict[str, torch.Tensor]) -> None:
    """Give every parameter its lazy tensor, and drop those that the graph does not use."""
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
            continue
        if name in buffers:
            value.const_value = ir.tensor(buffers[name].numpy(), name=name)
            continue
        if not name.startswith("model."):  # a constant of the traced code, which holds its value
            continue
        parameter = name.removeprefix("model.")
        weight = find_weight(parameter, weights)
        if weight is None:
            raise ArtifactError(
                f"{where}: no tensor for parameter {parameter}", expected="a checkpoint that goes with its config.json",
                got=f"{len(weights)} tensors under other names", hint="see RENAMES in slipcast_compiler/model.py",
            )  # fmt: skip
        wanted = tuple(int(d) for d in value.const_value.shape)
        if math.prod(weight.entry.shape) != math.prod(wanted):
            raise ArtifactError(
                f"{where}: tensor {parameter} has another shape than config.json asks for",
                expected=list(wanted), got=list(weight.entry.shape),
            )  # fmt: skip
        value.const_value = _lazy(weight, wanted, value.const_value.dtype, name)


def _lazy(weight: Weight, shape: tuple[int, ...], dtype: ir.DataType, name: str) -> ir.LazyTensor:
    def read() -> ir.Tensor:
        return ir.Tensor(np.ascontiguousarray(weight.read().reshape(shape).astype(dtype.numpy())), name=name)

    return ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(shape), name=name)


@contextlib.contextmanager
def _small_numbers_hidden(graph: ir.Graph) -> Iterator[None]:
    """Within it, constants that are nearly 0 or nearly 1 are inputs of the graph.

    The optimizer of onnxscript 0.7 takes them for 0 and 1, and drops what adds or multiplies by them: a division by
    x + 1e-15 becomes one by zero.
    """
    hidden: list[tuple[ir.Value, ir.TensorProtocol]] = []
    for value in list(graph.initializers.values()):
        if value.const_value is not None and _is_nearly_idle(value.const_value):
            del graph.initializers[value.name]
            hidden.append((value, value.const_value))
    for node in [node for node in graph if node.op_type == "Constant"]:
        tensor = ir.convenience.get_const_tensor(node.outputs[0])
        if tensor is not None and _is_nearly_idle(tensor):
            value = ir.Value(name=node.outputs[0].name, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
            node.outputs[0].replace_all_uses_with(value)
            graph.remove(node, safe=True)
            hidden.append((value, tensor))
    for value, _ in hidden:
        value.const_value = None
        graph.inputs.append(value)
    try:
        yield
    finally:
        for value, tensor in hidden:
            graph.inputs.remove(value)
            if value.uses():
                value.const_value = tensor
                graph.register_initializer(value)


def _is_nearly_idle(tensor: ir.TensorProtocol) -> bool:
    if tensor.size != 1 or not tensor.dtype.is_floating_point():
        return False
    number = float(tensor.numpy().reshape(()))
    return number not in (0.0, 1.0) and any(math.isclose(number, idle, abs_tol=1e-4) for idle in (0.0, 1.0))


def _transpose_weights(graph: ir.Graph) -> None:
    """Fold Transpose(weight), which the exporter writes for every linear layer, into the order of the data."""
    for node in list(graph):
        if node.op_type != "Transpose" or (weight := node.inputs[0]) is None or weight.name not in graph.initializers:
            continue
        lazy, order, output = weight.const_value, tuple(node.attributes.get_ints("perm")), node.outputs[0]
        assert lazy is not None
        shape = ir.Shape(lazy.shape[i] for i in order)
        turned = ir.Value(name=f"{weight.name}.T", type=ir.TensorType(lazy.dtype), shape=shape)

        def read(lazy: Any = lazy, order: tuple[int, ...] = order, name: str = turned.name) -> ir.Tensor:
            return ir.Tensor(np.ascontiguousarray(lazy.numpy().transpose(order)), name=name)

        turned.const_value = ir.LazyTensor(read, dtype=lazy.dtype, shape=shape, name=turned.name)
        if turned.name in graph.initializers:
            turned = graph.initializers[turned.name]
        else:
            graph.register_initializer(turned)
        output.replace_all_uses_with(turned)
        graph.remove(node, safe=True)
        if not weight.uses():
            del graph.initializers[weight.name]


def _name_dimensions(model: ir.Model, source: ComponentSource, sizes: Mapping[str, int]) -> None:
    """Call free dimensions by their names in place of the tracer's symbols (s53)."""
    names = {}
    for value, spec in zip(model.graph.inputs, source.inputs, strict=True):
        for found, wanted in zip(value.shape, spec.shape, strict=True):
            if isinstance(wanted, str) and wanted not in sizes:
                names[str(found.value)] = wanted
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b") if names else None
    values = [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]
    for value in values:
        for i, found in enumerate(value.shape or ()):
            if pattern and isinstance(found, ir.SymbolicDim) and found.value:
                value.shape[i] = pattern.sub(lambda m: names[m.group()], found.value)


def _strip(model: ir.Model) -> None:
    """Drop the tracer's notes: they are larger than the graph, and tell paths of the machine that compiled."""
    model.graph.name, model.doc_string, model.graph.doc_string = "slipcast", None, None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        node.doc_string = None
        for value in (*node.inputs, *node.outputs):
            if value is not None:
                value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _specs(values: Any) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            name=value.name, dtype=cast(Any, str(value.dtype.numpy())),
            shape=tuple(d if isinstance(d, int) else d.value or "?" for d in value.shape),
        )
        for value in values
    )  # fmt: skip
