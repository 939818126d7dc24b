"""What a graph reads of its file of weights, and how it is told that this lies elsewhere: of ONNX, and of OpenVINO."""

from __future__ import annotations

import hashlib
import mmap
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from xml.etree import ElementTree

from slipcast.bundle.onnxfile import external_ranges

Range = tuple[int, int]  # offset and length


def stem_of(model: str) -> str:
    """What engines have in common that may share weights: those of denoiser.xml, denoiser_2.xml, denoiser_adapted.xml
    and denoiser_fallback.xml, not of denoiser_prompt.xml."""
    return re.sub(r"_(\d+|adapted|fallback)(?=_|$)", "", Path(model).stem) + Path(model).suffix


def ranges_of(model: Path) -> set[Range]:
    """All that the graph reads; of other formats than .onnx and .xml nothing is known."""
    if model.suffix == ".onnx":
        return {(offset, length) for _, offset, length in external_ranges(model)}
    if model.suffix == ".xml":
        found = ElementTree.parse(model).iter("data")
        return {(int(data.get("offset", "")), int(data.get("size", ""))) for data in found if data.get("offset")}
    return set()


def digest_ranges(weights: Path, ranges: Iterable[Range]) -> dict[Range, bytes]:
    """SHA-256 of each, but for those that are empty."""
    some = [(begin, size) for begin, size in ranges if size]
    if not some:  # of a graph without weights, whose file is empty
        return {}
    with weights.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return {(begin, size): hashlib.sha256(content[begin : begin + size]).digest() for begin, size in some}


def move_ranges(source: Path, target: Path, location: str, place: Callable[[int, int], int]) -> None:
    """Write the graph to `target` with its weights in the file `location` beside it; `place(offset, length)`: where a
    range of the file that they are in now lies there."""
    if source.suffix == ".onnx":
        from slipcast_compiler.graph.weights import move_weights

        move_weights(source, target, location, place)
        return
    tree = ElementTree.parse(source)
    for data in tree.iter("data"):
        if data.get("offset"):
            data.set("offset", str(place(int(data.get("offset", "")), int(data.get("size", "")))))
    tree.write(target, encoding="utf-8", xml_declaration=True)
