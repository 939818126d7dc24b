"""OpenVINO's intermediate representation: .xml and .bin."""

from __future__ import annotations

import hashlib
import mmap
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from slipcast.manifest import EngineFiles
from slipcast.onnxfile import external_files
from slipcast_compiler.build.needs import need_graph_libraries


def build(model: Path, precision: str, out: Path) -> EngineFiles:
    """Convert a graph. But for fp32, its fp32 weights are kept in fp16, which halves the file; the host rounds them
    further. What is int8 stays so. A graph that has its weights in another's file is given that one's .bin."""
    target = out / f"{model.stem}.xml"
    _convert(model, precision, target)
    owners = [model.with_name(name.removesuffix(".data")) for name in external_files(model)]
    if owners and owners[0] != model:
        with tempfile.TemporaryDirectory(prefix=".owner-", dir=out) as scratch:
            owner = Path(scratch) / f"{owners[0].stem}.xml"
            _convert(owners[0], precision, owner)
            if share_weights(target, owner):
                target.with_suffix(".bin").unlink()
                weights = owner.with_suffix(".bin").rename(out / f"{owner.stem}.bin")
                return EngineFiles(model=target.name, weights=weights.name)
    return EngineFiles(model=target.name, weights=target.with_suffix(".bin").name)


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


def _convert(model: Path, precision: str, target: Path) -> None:
    from slipcast.engines.openvino import openvino

    with tempfile.TemporaryDirectory(prefix=".convert-", dir=target.parent) as scratch:
        if precision == "int8":
            need_graph_libraries()
            from slipcast_compiler.passes.sdpa import spelled_out

            model = spelled_out(model, Path(scratch))
        openvino.save_model(openvino.Core().read_model(model), target, compress_to_fp16=precision != "fp32")


def _constants(tree: ElementTree.ElementTree[Any], graph: Path) -> Iterator[tuple[ElementTree.Element, bytes]]:
    """Where a graph says that a constant lies, and the digest of what lies there."""
    with graph.with_suffix(".bin").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for data in tree.iter("data"):
            if data.get("offset") is not None:
                begin, size = int(data.get("offset", "")), int(data.get("size", ""))
                yield data, hashlib.sha256(content[begin : begin + size]).digest()
