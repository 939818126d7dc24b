"""Weights on the disk once: graphs that refer, by offset, into a file that other graphs refer to as well.

Such a file has several names, one beside each graph. onnx and onnx_ir refuse to read weights from a file with several
names, since in a model of strangers it could be anything; graphs of the cache are our own, and `load` reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from slipcast_compiler.host.files import ALIGNED, link

INLINE = 16 << 20  # bytes of a graph's own constants that go into the graph itself


def load(path: Path) -> ir.Model:
    """A graph of our own, whose weights can be read whoever else has their file."""
    return anchor(ir.load(path), path.parent)


def anchor(model: ir.Model, folder: Path) -> ir.Model:
    """Make a graph, whose weights lie in `folder`, one that can be read from anywhere; in place."""
    for value, tensor in _placed(model):
        value.const_value = _at(tensor, folder.absolute() / tensor.location)
    return model


def read_tensor(proto: Any, folder: Path) -> Any:
    """The array of an onnx.TensorProto of our own, whose data may lie in a file in `folder`."""
    tensor = ir.from_proto(proto)
    if isinstance(tensor, ir.ExternalTensor):
        tensor = _at(tensor, folder.absolute() / tensor.location)
    return tensor.numpy()


def save_sharing(model: ir.Model, path: Path) -> None:
    """Write a graph whose weights lie in one file: that is linked beside it, and they stay in their places there.

    What lies nowhere yet goes into the graph; if it is much, or if the weights are in several files, all of them are
    written to a file of the graph's own, as ir.save does. Afterwards the model refers to what was written.
    """
    constants = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    own = sum(each.nbytes for each in constants if each is not None and not isinstance(each, ir.ExternalTensor))
    placed = _placed(model)
    files = {Path(tensor.path) for _, tensor in placed}
    if len(files) > 1 or own > INLINE:
        for value, tensor in placed:
            value.const_value = _at(tensor, Path(tensor.path).absolute())
        ir.save(model, path, external_data=f"{path.stem}.own.data")  # a name that no linked file has
        return
    for file in files:
        link(file, path.with_name(file.name))
    for value, tensor in placed:
        value.const_value = _at(tensor, Path(Path(tensor.path).name), path.parent)
    ir.save(model, path)


def save_gathered(model: ir.Model, path: Path) -> None:
    """Write a graph with its weights, wherever they lie, in one file of its own; what lies in one place is there once.
    Afterwards the model refers to what was written."""
    offsets: dict[tuple[str, int, int], int] = {}
    placed = _placed(model)
    with path.with_name(f"{path.name}.data").open("wb") as file:
        for value, tensor in placed:
            key = str(tensor.path), tensor.offset or 0, tensor.nbytes
            if key not in offsets:
                file.write(bytes(-file.tell() % ALIGNED))
                offsets[key] = file.tell()
                file.write(tensor.tobytes())
            value.const_value = _at(tensor, Path(f"{path.name}.data"), path.parent, offsets[key])
    ir.save(model, path)


def share_with(path: Path, other: Path) -> bool:
    """Have a graph read what lies in another graph's one file of weights under the same names, where that is the same;
    what else it reads becomes part of the graph, and its own file goes. False, and nothing done, if that is much."""
    model = ir.load(path)
    own = _placed(model)
    theirs = {str(value.name): tensor for value, tensor in _placed(ir.load(other))}
    shared = {str(value.name) for value, tensor in own if _is_same(tensor, theirs.get(str(value.name)))}
    rest = sum(tensor.nbytes for value, tensor in own if value.name not in shared)
    if not shared or rest > INLINE or len({theirs[name].path for name in shared}) > 1:
        return False
    files = {Path(tensor.path) for _, tensor in own}
    for value, tensor in own:
        if (name := str(value.name)) in shared:
            value.const_value = _at(theirs[name], Path(Path(theirs[name].path).name), path.parent)
        else:
            value.const_value = ir.Tensor(tensor.numpy().copy(), name=tensor.name)
    ir.save(model, path)
    for file in files:
        file.unlink()
    return True


def _is_same(one: ir.ExternalTensor, other: ir.ExternalTensor | None) -> bool:
    return (
        other is not None
        and (one.dtype, one.shape, one.nbytes) == (other.dtype, other.shape, other.nbytes)
        and np.array_equal(one.numpy().reshape(-1).view(np.uint8), other.numpy().reshape(-1).view(np.uint8))
    )


def move_weights(source: Path, target: Path, location: str, place: Callable[[int, int], int]) -> None:
    """Write the graph `source` to `target` with its weights in the file `location` beside it.

    `place(offset, length)`: where a range of the file that they are in now lies there.
    """
    model = ir.load(source)
    for value, tensor in _placed(model):
        offset = place(tensor.offset or 0, tensor.nbytes)
        value.const_value = _at(tensor, Path(location), target.parent, offset)
    ir.save(model, target)


def _placed(model: ir.Model) -> list[tuple[ir.Value, ir.ExternalTensor]]:
    """The weights that lie in files."""
    weights = [value for graph in model.graphs() for value in graph.initializers.values()]
    return [(value, value.const_value) for value in weights if isinstance(value.const_value, ir.ExternalTensor)]


def _at(tensor: ir.ExternalTensor, file: Path, folder: Path | None = None, offset: int | None = None) -> Any:
    """The tensor at its place, or another, of a file in `folder`. Without one, ir does not ask what the file is."""
    place = tensor.offset if offset is None else offset
    return ir.ExternalTensor(
        str(file), place, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=tensor.name, base_dir=folder or ""
    )
