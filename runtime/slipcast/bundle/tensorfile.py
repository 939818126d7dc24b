"""Read safetensors files strictly: the whole header is checked before one tensor is read. Needs numpy only.

The format: https://huggingface.co/docs/safetensors. A file is a little-endian u64 (size of the header), the header
(a JSON object), and the tensors' bytes, which have to fill the rest of the file without gaps or overlaps.
"""

from __future__ import annotations

import math
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slipcast.bundle.validation import parse_json
from slipcast.errors import ArtifactError

MAX_HEADER_BYTES = 100_000_000
MAX_RANK = 32

# Bytes per element, and numpy's name; BF16 is widened on reading, numpy has no 8-bit floats.
DTYPES: dict[str, tuple[int, str | None]] = {
    "BOOL": (1, "|b1"),
    "U8": (1, "|u1"),
    "I8": (1, "|i1"),
    "U16": (2, "<u2"),
    "I16": (2, "<i2"),
    "U32": (4, "<u4"),
    "I32": (4, "<i4"),
    "U64": (8, "<u8"),
    "I64": (8, "<i8"),
    "F16": (2, "<f2"),
    "BF16": (2, "<u2"),
    "F32": (4, "<f4"),
    "F64": (8, "<f8"),
    "C64": (8, "<c8"),
    "F8_E4M3": (1, None),
    "F8_E5M2": (1, None),
    "F8_E8M0": (1, None),
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file; `start` and `end` are byte offsets from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file by name, in the order of their bytes; ArtifactError if anything is off."""
    header, data_start, size = _header_bytes(path)
    document: dict[str, Any] = parse_json(header, f"{path} (header)", limit=MAX_HEADER_BYTES)
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _refuse(path, "bad __metadata__", expected="an object of strings")
    entries = [_entry(path, name, record, data_start) for name, record in document.items()]
    entries.sort(key=lambda entry: (entry.start, entry.end))
    position = data_start
    for entry in entries:
        # Ordered by (start, end), a zero-size tensor inside another's range comes after it and starts too early.
        if entry.start != position:
            problem = "overlaps another tensor" if entry.start < position else "leaves a gap before it"
            raise _refuse(path, f"tensor {entry.name!r} {problem}", expected=f"byte {position}", got=entry.start)
        position = entry.end
    if position != size:
        problem = "truncated" if position > size else "bytes after the last tensor"
        raise _refuse(path, problem, expected=f"{position} bytes", got=f"{size} bytes")
    return {entry.name: entry for entry in entries}


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says besides its tensors; of one whose header was read."""
    document: dict[str, Any] = parse_json(_header_bytes(path)[0], f"{path} (header)", limit=MAX_HEADER_BYTES)
    found: dict[str, str] = document.get("__metadata__", {})
    return found


def read_tensor(path: Path, entry: TensorEntry, *, allow_nonfinite: bool = False) -> np.ndarray[Any, Any]:
    """One tensor as a new little-endian array; BF16 comes as float32. NaN and infinity are an ArtifactError."""
    dtype = DTYPES[entry.dtype][1]
    if dtype is None:
        raise _refuse(path, f"tensor {entry.name!r} cannot be read", expected="a type that numpy has", got=entry.dtype)
    count = math.prod(entry.shape)
    try:
        array = np.fromfile(path, dtype=dtype, count=count, offset=entry.start)
    except OSError as error:
        raise _refuse(path, "cannot be read", got=error.strerror) from None
    if array.size != count:
        raise _refuse(path, f"tensor {entry.name!r} is cut off", expected=f"{count} elements", got=array.size)
    if entry.dtype == "BF16":  # the upper half of a float32
        array = (array.astype("<u4") << 16).view("<f4")
    if not allow_nonfinite and array.dtype.kind in "fc" and not np.isfinite(array).all():
        bad = int(count - np.isfinite(array).sum())
        raise _refuse(path, f"NaN or infinity in tensor {entry.name!r}", expected="finite numbers", got=f"{bad} others")
    return array.reshape(entry.shape)


def _header_bytes(path: Path) -> tuple[bytes, int, int]:
    """The header, where the tensors' bytes begin, and the size of the file."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise _refuse(path, "not a file")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            limit = min(MAX_HEADER_BYTES, status.st_size - 8)
            if not 2 <= length <= limit:
                raise _refuse(path, "bad header length", expected=f"2 to {max(limit, 2)} bytes", got=f"{length} bytes")
            header = file.read(length)
    except OSError as error:
        raise _refuse(path, "cannot be read", got=error.strerror) from None
    if header[:1] != b"{":  # and what begins with it is an object, or not JSON
        raise _refuse(path, "the header does not begin with '{'", got=repr(header[:8]))
    return header, 8 + length, status.st_size


def _entry(path: Path, name: str, record: Any, data_start: int) -> TensorEntry:
    if problem := _name_problem(name):
        raise _refuse(path, f"tensor name {name[:200]!r}", expected="a plain name", got=problem)
    if not isinstance(record, dict) or set(record) != {"dtype", "shape", "data_offsets"}:
        raise _refuse(path, f"tensor {name!r}: bad record", expected="dtype, shape and data_offsets")
    dtype, shape, offsets = record["dtype"], record["shape"], record["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _refuse(path, f"tensor {name!r}: unknown dtype", expected=", ".join(DTYPES), got=repr(dtype)[:200])
    # Without its zeros the shape has to be addressable too: numpy refuses a (0, 2**62, 2**62) array.
    if not _counts(shape) or len(shape) > MAX_RANK or math.prod(n or 1 for n in shape) >= 1 << 60:
        raise _refuse(path, f"tensor {name!r}: bad shape", expected=f"up to {MAX_RANK} counts", got=repr(shape)[:200])
    if not _counts(offsets) or len(offsets) != 2:
        raise _refuse(path, f"tensor {name!r}: bad data_offsets", expected="two counts", got=repr(offsets)[:200])
    start, end = offsets
    size = math.prod(shape) * DTYPES[dtype][0]
    if end - start != size:
        raise _refuse(
            path, f"tensor {name!r}: size and shape differ", expected=f"{size} bytes", got=f"{end - start} bytes"
        )
    return TensorEntry(name, dtype, tuple(shape), data_start + start, data_start + end)


def _counts(value: Any) -> bool:
    # type() rather than isinstance: JSON true is not a count, and Python's True is an int.
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _name_problem(name: str) -> str | None:
    if not 1 <= len(name) <= 512:
        return "a name has 1 to 512 characters"
    if any(ord(c) < 32 or 127 <= ord(c) < 160 for c in name):
        return "control character"
    if "\\" in name or ".." in name:
        return "backslash or '..'"
    if any(part in ("", ".") for part in name.split("/")) or name[1:2] == ":":
        return "absolute path, or an empty or '.' part"
    return None


def _refuse(path: Path, problem: str, *, expected: object = None, got: object = None) -> ArtifactError:
    hint = "get the file again from where it was made"
    return ArtifactError(f"{path}: {problem}", expected=expected, got=got, hint=hint)
