"""Check where an ONNX model keeps its external data, before any ONNX library opens the model.

A model is a protobuf message; this walks its wire format (https://protobuf.dev/programming-guides/encoding/) to every
tensor, without the onnx package and without copying the weights.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from slipcast.bundle.validation import bundle_path
from slipcast.errors import ArtifactError

Buffer = bytes | mmap.mmap

# Which fields of which onnx.proto message lead to a TensorProto: {message: {field: message}}.
MESSAGES: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {13: "StringStringEntryProto"},
}
# Fields that occur once. Parsers merge what occurs twice, so that two harmless halves could make one harmful whole.
SINGULAR = {
    "ModelProto": {7},
    "TrainingInfoProto": {1, 2},
    "AttributeProto": {5, 6, 22},
    "SparseTensorProto": {1, 2},
}

_NAME, _DATA_LOCATION = 8, 14


class _MalformedError(ValueError):
    """Bytes that are not the message they should be."""


def check_external_data(model: Path, root: Path, listed: Mapping[str, int]) -> frozenset[str]:
    """Refuse external data that is not a listed file of the bundle, or lies outside of that file.

    `model` lies below `root`; `listed` gives the size in bytes of every file of the bundle by its path relative to
    `root`. Returns which of them the model reads. Raises ArtifactError that names the model, the tensor and what is
    wrong.
    """
    name = model.relative_to(root).as_posix()
    used = set()
    try:
        with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for tensor, entries in _external_tensors(data):
                used.add(_check_entries(f"{name}: tensor {tensor!r}", entries, PurePosixPath(name).parent, listed))
    except (ValueError, OSError) as error:  # mmap refuses an empty file with ValueError
        raise ArtifactError(
            f"{name}: not an ONNX model",
            expected="a protobuf message",
            got=str(error),
            hint="copy the bundle again from where it was built",
        ) from None
    return frozenset(used)


def external_files(model: Path) -> frozenset[str]:
    """The files that a model of one's own keeps weights in, by the names it has for them."""
    with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return frozenset(entries["location"] for _, entries in _external_tensors(data))


def external_ranges(model: Path) -> frozenset[tuple[str, int, int]]:
    """(file, offset, length in bytes) of every tensor that a model of one's own keeps in a file."""
    with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return frozenset(
            (entries["location"], int(entries.get("offset", 0)), int(entries["length"]))
            for _, entries in _external_tensors(data)
        )


def _check_entries(what: str, entries: dict[str, str], folder: PurePosixPath, listed: Mapping[str, int]) -> str:
    """The file that one tensor lies in, once its location, offset and length have been checked."""

    def refuse(problem: str, expected: str, got: object) -> ArtifactError:
        return ArtifactError(
            f"{what}: external data {problem}", expected=expected, got=got, hint="rebuild it with `slipcast compile`"
        )

    location = entries.get("location", "")
    try:
        path = (folder / bundle_path(location)).as_posix()
    except ValueError as error:
        raise refuse("at a refused location", "a path beside the model", f"{location[:200]!r} ({error})") from None
    if path not in listed:
        raise refuse("is not in the bundle", "a file that the manifest lists", repr(path))
    numbers = {}
    for key in ("offset", "length"):
        text = entries.get(key, "0")
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            raise refuse(f"has a bad {key}", "a count of bytes", repr(text[:200]))
        numbers[key] = int(text)
    if numbers["offset"] + numbers["length"] > listed[path]:
        got = f"offset {numbers['offset']} and length {numbers['length']}"
        raise refuse(f"lies outside of {path!r}", f"at most {listed[path]} bytes", got)
    return path


def _external_tensors(data: Buffer) -> Iterator[tuple[str, dict[str, str]]]:
    """(name, {key: value}) of every tensor that has external data or says that it has."""
    pending = [("ModelProto", 0, len(data))]
    while pending:  # a stack of our own: depth of nesting costs no recursion
        message, start, stop = pending.pop()
        if message == "TensorProto":
            name, external, entries = _tensor(data, start, stop)
            if external or entries:
                yield name, entries
            continue
        children, once = MESSAGES[message], SINGULAR.get(message, ())
        seen = set()
        for field, wire, at, end in _fields(data, start, stop):
            if field in children:
                if wire != 2 or (field in once and field in seen):
                    raise _MalformedError(f"field {field} of {message} at byte {at}")
                seen.add(field)
                pending.append((children[field], at, end))


def _tensor(data: Buffer, start: int, stop: int) -> tuple[str, bool, dict[str, str]]:
    name, external, entries = "", False, {}
    for field, wire, at, end in _fields(data, start, stop):
        if field == _NAME:
            name = data[at : min(end, at + 200)].decode("utf-8", "backslashreplace")
        elif field == _DATA_LOCATION:
            external = external or data[at:end] != b"\0"
        elif field in MESSAGES["TensorProto"]:
            # Parsers skip a known field of an unexpected wire type. Doing likewise would be easy to get subtly wrong.
            fields = list(_fields(data, at, end)) if wire == 2 else []
            if not all(kind == 2 for _, kind, _, _ in fields) or not fields:
                raise _MalformedError(f"external data of tensor {name!r} at byte {at}")
            pair = {number: data[a:b] for number, _, a, b in fields}
            key, value = (pair.get(k, b"").decode("utf-8", "backslashreplace") for k in (1, 2))
            if key in entries:
                raise _MalformedError(f"external data key {key!r} twice in tensor {name!r}")
            entries[key] = value
    return name, external, entries


def _fields(data: Buffer, at: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """(number, wire type, start, end of the value) of the fields of one message."""
    while at < stop:
        tag, at = (data[at], at + 1) if data[at] < 128 else _varint(data, at, stop)
        wire = tag & 7
        if wire == 2:
            if at < stop and data[at] < 128:
                end = at + 1 + data[at]
                at += 1
            else:
                size, at = _varint(data, at, stop)
                end = at + size
        elif wire == 0:
            end = _varint(data, at, stop)[1]
        else:
            end = at + {1: 8, 5: 4}.get(wire, stop)
        if end > stop or not 8 <= tag < 1 << 32:
            raise _MalformedError(f"field {tag >> 3} of wire type {wire} before byte {at}")
        yield tag >> 3, wire, at, end
        at = end


def _varint(data: Buffer, at: int, stop: int) -> tuple[int, int]:
    value = shift = 0
    while at < stop and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise _MalformedError(f"a number that does not end before byte {at}")
