"""Check an OpenVINO graph (.xml) before the library opens it: that it is one, and where it reads its weights.

OpenVINO guesses a file's format, so that an ONNX model called .xml would be read as ONNX, with external data that
nobody has looked at. What passes here begins as XML does, which no other format it knows can, and is a `net`.
"""

from __future__ import annotations

from typing import Any
from xml.parsers import expat

from slipcast.errors import ArtifactError

MAX_BYTES = 1 << 26  # read in two seconds; a U-Net of Stable Diffusion XL has 10 MB


def check_ir(data: bytes, name: str, weights: str | None, size: int) -> None:
    """Refuse what is no OpenVINO graph, or reads beyond `weights`, the file of `size` bytes that belongs to it."""
    if not data.startswith(b"<"):
        raise _refuse(name, "text that begins with '<'", repr(data[:16]))
    if len(data) > MAX_BYTES:
        raise _refuse(name, f"at most {MAX_BYTES} bytes", f"{len(data)} bytes")
    parser = expat.ParserCreate("utf-8")  # whatever the file says: OpenVINO does not ask it either

    def first(tag: str, attributes: dict[str, str]) -> None:
        if tag != "net":
            raise _refuse(name, "a <net>", f"a <{tag[:100]}>")
        parser.StartElementHandler = begin

    def begin(tag: str, attributes: dict[str, str]) -> None:
        if tag == "data" and "offset" in attributes:
            _check_range(name, attributes, weights, size)

    def no_declaration(*_: Any) -> None:
        raise _refuse(name, "no DOCTYPE and no entities", "a declaration of them")

    parser.StartElementHandler = first
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = no_declaration
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise _refuse(name, "well-formed XML", str(error)) from None


def _check_range(name: str, attributes: dict[str, str], weights: str | None, size: int) -> None:
    begin, length = (attributes.get(key, "") for key in ("offset", "size"))
    if not all(text.isascii() and text.isdigit() and len(text) < 20 for text in (begin, length)):
        raise _refuse(name, "offsets and sizes in bytes", f"offset {begin[:40]!r}, size {length[:40]!r}")
    if int(begin) + int(length) > size:
        raise _refuse(name, f"weights within the {size} bytes of {weights}", f"offset {begin}, size {length}")


def _refuse(name: str, expected: str, got: str) -> ArtifactError:
    hint = "rebuild it with `slipcast compile`"
    return ArtifactError(f"{name}: not an OpenVINO graph", expected=expected, got=got, hint=hint)
