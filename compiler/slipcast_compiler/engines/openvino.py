"""OpenVINO's intermediate representation: .xml and .bin."""

from __future__ import annotations

import hashlib
import mmap
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from slipcast.bundle.manifest import EngineFiles
from slipcast.bundle.onnxfile import external_ranges
from slipcast_compiler.engines.needs import need_graph_libraries


def build(model: Path, precision: str, out: Path, fp32: Collection[str] = ()) -> EngineFiles:
    """Convert a graph. But for fp32, its fp32 weights are kept in fp16, which halves the file; the host rounds them
    further. What is quantised stays so, and so do the nodes `fp32`. A graph that has its weights in another's file is
    given that one's .bin."""
    target = out / f"{model.stem}.xml"
    _convert(model, precision, target, fp32)
    if owner_model := _owner(model):
        with tempfile.TemporaryDirectory(prefix=".owner-", dir=out) as scratch:
            owner = Path(scratch) / f"{owner_model.stem}.xml"
            _convert(owner_model, precision, owner, fp32)
            if share_weights(target, owner):
                target.with_suffix(".bin").unlink()
                weights = owner.with_suffix(".bin").rename(out / f"{owner.stem}.bin")
                return EngineFiles(model=target.name, weights=weights.name)
    return EngineFiles(model=target.name, weights=target.with_suffix(".bin").name)


def _owner(model: Path) -> Path | None:
    """The graph beside it that has all of its weights, in a file that is called after that graph."""
    read = external_ranges(model)
    for name in sorted({name for name, _, _ in read}):
        other = model.with_name(name.removesuffix(".data"))
        if other != model and other.is_file() and read <= external_ranges(other):
            return other
    return None


def share_weights(graph: Path, owner: Path) -> bool:
    """Point a graph's constants at those of the owner's .bin that are the same, where all of them are there."""
    tree = ElementTree.parse(graph)
    held = {content: data.get("offset", "") for data, content in _constants(ElementTree.parse(owner), owner)}
    for data, content in _constants(tree, graph):
        if content not in held:
            return False
        data.set("offset", held[content])
    tree.write(graph, encoding="utf-8", xml_declaration=True)
    return True


def keep_fp32(graph: Path, model: Path, nodes: Collection[str]) -> None:
    """Mark the layers that nodes of the ONNX graph became, with their weights, so that no hint of another precision is
    for them.

    Those are the layers on the way from the tensors that the nodes read to those that they give, which have ONNX's
    names. The mark is what OpenVINO's own transformations set (DisableFP16Compression). A sum that a convolution is
    fused with is marked besides: in two precisions, OpenVINO 2026.4 compiles them and fails when they run.
    """
    import onnx

    everything = onnx.load(model, load_external_data=False).graph.node
    chosen = [node for node in everything if node.name in nodes]
    convolved = {node.output[0] for node in chosen if node.op_type == "Conv"}
    chosen += [node for node in everything if node.op_type == "Add" and convolved & {*node.input}]
    given, read = ({name for node in chosen for name in getattr(node, kind)} for kind in ("output", "input"))
    tree = ElementTree.parse(graph)
    layers = {layer.get("id"): layer for layer in tree.iter("layer")}
    names = {
        place: {name for port in layer.iterfind("output/port[@names]") for name in port.get("names", "").split(",")}
        for place, layer in layers.items()
    }
    weights = {place for place, layer in layers.items() if layer.get("type") == "Const"}
    ends = {place for place in layers if names[place] & read} - weights
    before: dict[str | None, list[str | None]] = {}
    for edge in tree.iter("edge"):
        before.setdefault(edge.get("to-layer"), []).append(edge.get("from-layer"))
    waiting, seen = [place for place in layers if names[place] & given], set[str | None]()
    while waiting:
        if (place := waiting.pop()) not in seen:
            seen.add(place)
            _mark(layers[place])
            waiting += [other for other in before.get(place, ()) if other not in ends]
    tree.write(graph, encoding="utf-8", xml_declaration=True)


def _mark(layer: ElementTree.Element) -> None:
    marks = layer.find("rt_info")
    if marks is None:
        marks = ElementTree.Element("rt_info")
        layer.insert(0 if layer.find("data") is None else 1, marks)  # the order that the format has
    ElementTree.SubElement(marks, "attribute", name="precise", version="0")


def _convert(model: Path, precision: str, target: Path, fp32: Collection[str]) -> None:
    from slipcast.engines.openvino import openvino

    with tempfile.TemporaryDirectory(prefix=".convert-", dir=target.parent) as scratch:
        source = model
        if precision == "int8":
            need_graph_libraries()
            from slipcast_compiler.graph.sdpa import spelled_out

            source = spelled_out(model, Path(scratch))
        graph = openvino.Core().read_model(source)
        if fp32:  # marks can be set in a file alone; what has them when it is saved keeps its weights, too
            marked = Path(scratch) / "marked.xml"
            openvino.save_model(graph, marked, compress_to_fp16=False)
            keep_fp32(marked, model, fp32)
            graph = openvino.Core().read_model(marked)
        openvino.save_model(graph, target, compress_to_fp16=precision != "fp32")


def _constants(tree: ElementTree.ElementTree[Any], graph: Path) -> Iterator[tuple[ElementTree.Element, bytes]]:
    """Where a graph says that a constant lies, and the digest of what lies there."""
    with graph.with_suffix(".bin").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for data in tree.iter("data"):
            if data.get("offset") is not None:
                begin, size = int(data.get("offset", "")), int(data.get("size", ""))
                yield data, hashlib.sha256(content[begin : begin + size]).digest()
