"""tensorfile.py against files that the safetensors library wrote, and against files it should have refused."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from slipcast.bundle.tensorfile import DTYPES, TensorEntry, read_header, read_tensor
from slipcast.errors import ArtifactError


def write(path: Path, header: Any, body: bytes = b"", *, length: int | None = None) -> Path:
    """A file with this header (bytes, or an object to be written as JSON) and these bytes after it."""
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(data) if length is None else length) + data + body)
    return path


def tensor(start: int, end: int, shape: list[Any], dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def refusal(path: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        read_header(path)
    assert path.name in str(caught.value)
    assert len(str(caught.value)) < 2000
    return str(caught.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "x.safetensors"


# --- what is accepted ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64"],
)
def test_reads_what_the_library_writes(file: Path, dtype: str):
    rng = np.random.default_rng(0)
    arrays = {
        "blocks.0.attn/to_q.weight": rng.integers(0, 2, (3, 5)).astype(dtype),
        "scalar": np.ones((), dtype),
        "empty": np.zeros((0, 4), dtype),
        "é": rng.integers(0, 2, 7).astype(dtype),
    }
    save_file(arrays, file, metadata={"format": "np"})
    entries = read_header(file)
    assert set(entries) == set(arrays)
    for name, array in arrays.items():
        assert entries[name].name == name
        assert entries[name].shape == array.shape
        assert entries[name].end - entries[name].start == array.nbytes
        read = read_tensor(file, entries[name])
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read, array)


def test_reads_bf16_as_float32(file: Path):
    bits = {
        0x3F80: 1.0,
        0xC020: -2.5,
        0x4049: 3.140625,
        0x8000: -0.0,
        0x0001: 2.0**-133,
        0x7F7F: (2 - 2.0**-7) * 2.0**127,
    }
    data = np.array([*bits], "<u2").tobytes()
    write(file, {"w": tensor(0, 12, [2, 3], "BF16")}, data)
    assert list(safe_open(file, "np").keys()) == ["w"], "the library takes it too"
    entry = read_header(file)["w"]
    assert entry.dtype == "BF16"
    read = read_tensor(file, entry)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, np.array([*bits.values()], np.float32).reshape(2, 3))
    assert np.signbit(read[1, 0])


def test_types_that_numpy_lacks_are_listed_but_not_read(file: Path):
    write(file, {"w": tensor(0, 2, [2], "F8_E4M3")}, b"12")
    assert list(safe_open(file, "np").keys()) == ["w"], "the library takes it too"
    entry = read_header(file)["w"]
    assert (entry.dtype, entry.end - entry.start) == ("F8_E4M3", 2)
    with pytest.raises(ArtifactError, match="F8_E4M3"):
        read_tensor(file, entry)


def test_file_without_tensors(file: Path):
    assert read_header(write(file, b"{}")) == {}
    assert read_header(write(file, {"__metadata__": {"a": "b"}})) == {}
    assert read_header(write(file, b"{}      ")) == {}


def test_zero_size_tensors_between_others(file: Path):
    header = {"a": tensor(0, 4, [1]), "z": tensor(4, 4, [0]), "y": tensor(0, 0, [3, 0]), "b": tensor(4, 8, [1])}
    entries = read_header(write(file, header, bytes(8)))
    assert [entry.start for entry in entries.values()] == sorted(entry.start for entry in entries.values())
    assert read_tensor(file, entries["y"]).shape == (3, 0)


def test_unusual_names_and_ranks(file: Path):
    names = ["a b", "a.b", "x" * 512, "~", "ab:c"]
    header = {name: tensor(4 * i, 4 * i + 4, [1] * 32) for i, name in enumerate(names)}
    assert list(read_header(write(file, header, bytes(20)))) == names


def test_source_checkpoints_may_be_links(file: Path, tmp_path: Path):
    """Hugging Face's cache is made of links; bundles are checked for links elsewhere."""
    save_file({"a": np.ones(2)}, tmp_path / "blob")
    file.symlink_to(tmp_path / "blob")
    assert set(read_header(file)) == {"a"}


# --- row 13 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "body", "words"),
    [
        (
            b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[],"data_offsets":[1,2]}}',
            2, "duplicate",
        ),
        (b'{"a": {"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', 1, "duplicate"),
        ({"a": tensor(0, 8, [2]), "z": tensor(4, 4, [0])}, 8, "overlaps"),
        ({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, 12, "overlaps"),
        ({"a": tensor(0, 8, [2]), "b": tensor(0, 8, [2])}, 8, "overlaps"),
        ({"a": tensor(0, 4, [1]), "b": tensor(8, 12, [1])}, 12, "gap"),
        ({"a": tensor(4, 8, [1])}, 8, "gap"),
        ({"z": tensor(4, 4, [0])}, 4, "gap"),
        ({"a": tensor(0, 4, [1])}, 5, "bytes after the last tensor"),
        ({}, 1, "bytes after the last tensor"),
        ({"a": tensor(0, 4, [1])}, 3, "truncated"),
        ({"a": tensor(0, 4, [2])}, 4, "size and shape"),
        ({"a": tensor(0, 8, [1], "F16")}, 8, "size and shape"),
        ({"a": tensor(8, 4, [1])}, 8, "size and shape"),
        ({"a": tensor(0, 4, [1], "F99")}, 4, "dtype"),
        ({"a": tensor(0, 4, [1], ["F32"])}, 4, "dtype"),
        ({"a": tensor(0, 4, [1], None)}, 4, "dtype"),
        ({"a": tensor(0, 4, [-1])}, 4, "shape"),
        ({"a": tensor(0, 4, [-1, -1])}, 4, "shape"),
        ({"a": tensor(0, 4, [1.0])}, 4, "shape"),
        ({"a": tensor(0, 4, [True])}, 4, "shape"),
        ({"a": tensor(0, 4, ["1"])}, 4, "shape"),
        ({"a": tensor(0, 4, [1] * 33)}, 4, "shape"),
        ({"a": tensor(0, 0, [0, 1 << 62, 1 << 62])}, 0, "shape"),
        ({"a": {**tensor(0, 4, []), "shape": 1}}, 4, "shape"),
        ({"a": tensor(-4, 0, [1])}, 4, "data_offsets"),
        ({"a": {**tensor(0, 4, [1]), "data_offsets": [0, 4, 4]}}, 4, "data_offsets"),
        ({"a": {**tensor(0, 4, [1]), "data_offsets": [0.0, 4]}}, 4, "data_offsets"),
        ({"a": {**tensor(0, 4, [1]), "data_offsets": None}}, 4, "data_offsets"),
        ({"a": {**tensor(0, 4, [1]), "more": 1}}, 4, "bad record"),
        ({"a": {"dtype": "F32", "shape": [1]}}, 4, "bad record"),
        ({"a": 5}, 0, "bad record"),
        (b"[]", 0, "'{'"),
        (b' {"a": 1}', 0, "'{'"),
        (b"{}{}", 0, "not valid JSON"),
        (b'{"a"', 0, "not valid JSON"),
        (b'{"\xff"}', 0, "UTF-8"),
        (b'{"a":' * 50_000, 0, "nested"),
        ({"__metadata__": {"a": 1}}, 0, "__metadata__"),
        ({"__metadata__": "a"}, 0, "__metadata__"),
        ({"__metadata__": tensor(0, 4, [1])}, 4, "__metadata__"),
    ],
)  # fmt: skip
def test_row_13_bad_headers(file: Path, header: Any, body: int, words: str):
    assert words in refusal(write(file, header, bytes(body)))


@pytest.mark.parametrize(
    "name",
    [
        "",
        "../../x",
        "a/../b",
        "..",
        "/x",
        "a//b",
        "a/",
        "./a",
        "a\\b",
        "C:x",
        "a\nb",
        "a\0",
        "\x1b[31m",
        "\x9b1m",
        "x" * 513,
    ],
)
def test_row_13_bad_names(file: Path, name: str):
    assert "tensor name" in refusal(write(file, {name: tensor(0, 4, [1])}, bytes(4)))


@pytest.mark.parametrize("length", [0, 1, None, 100_000_001, 1 << 63, (1 << 64) - 1])
def test_row_13_header_length_that_does_not_fit(file: Path, length: int | None):
    header = json.dumps({"a": tensor(0, 4, [1])}).encode()
    length = len(header) + 5 if length is None else length  # one byte more than there is
    assert "header length" in refusal(write(file, header, bytes(4), length=length))


def test_row_13_header_of_more_than_100_megabytes_is_not_read(file: Path):
    write(file, b"{", length=100_000_001)
    os.truncate(file, 200_000_000)
    assert "header length" in refusal(file)


def test_header_above_the_limit_of_other_json_is_read(file: Path):
    """Headers of large checkpoints may be larger than a manifest may be."""
    assert read_header(write(file, b"{}" + b" " * (17 << 20))) == {}


def test_not_a_file(file: Path, tmp_path: Path):
    assert "No such file" in refusal(file)
    assert "not a file" in refusal(tmp_path)
    os.mkfifo(file)
    assert "not a file" in refusal(file)
    file.unlink()
    file.write_bytes(b"123")
    assert "header length" in refusal(file)


@pytest.mark.parametrize("dtype", ["F16", "F32", "F64", "C64", "BF16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_row_13_nan_where_none_may_be(file: Path, dtype: str, value: float):
    array = np.array([1, 2, 3, 1, value, 2], np.float32)
    data = array.view("<u2")[1::2] if dtype == "BF16" else array.astype(DTYPES[dtype][1])
    half = data.nbytes // 2
    write(file, {"good": tensor(0, half, [3], dtype), "bad": tensor(half, 2 * half, [3], dtype)}, data.tobytes())
    entries = read_header(file)
    read_tensor(file, entries["good"])
    with pytest.raises(ArtifactError, match=r"'bad'[^$]*1 others") as caught:
        read_tensor(file, entries["bad"])
    assert file.name in str(caught.value)
    assert not np.isfinite(read_tensor(file, entries["bad"], allow_nonfinite=True)).all()


def test_file_that_shrank_since_its_header_was_read(file: Path):
    save_file({"a": np.ones(100)}, file)
    entry = read_header(file)["a"]
    os.truncate(file, entry.start + 50)
    with pytest.raises(ArtifactError, match="cut off"):
        read_tensor(file, entry)
    file.unlink()
    with pytest.raises(ArtifactError, match="No such file"):
        read_tensor(file, TensorEntry("a", "F32", (1,), 0, 4))


# --- fuzzing ---------------------------------------------------------------------------------------------------------

fuzzing = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def check(file: Path) -> None:
    """Whatever the bytes, the answer is ArtifactError or tensors that can be read."""
    try:
        for entry in read_header(file).values():
            read_tensor(file, entry, allow_nonfinite=True)
    except ArtifactError as error:
        str(error).encode()


@fuzzing
@given(data=st.data())
def test_row_13_flipped_bytes_never_raise_anything_else(file: Path, data: st.DataObject):
    save_file({"a": np.ones((2, 3), np.float32), "b.c": np.zeros(0), "d": np.arange(4)}, file)
    content = bytearray(file.read_bytes())
    for position, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(content) - 50), st.integers(0, 255)), max_size=6)
    ):
        content[position] = value
    file.write_bytes(content)
    check(file)


@fuzzing
@given(header=st.binary(max_size=60), body=st.binary(max_size=20), skew=st.integers(-2, 2))
def test_row_13_random_bytes_never_raise_anything_else(file: Path, header: bytes, body: bytes, skew: int):
    check(write(file, b"{" + header, body, length=max(0, len(header) + 1 + skew)))


_VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.integers(), max_size=3)
)


@fuzzing
@given(
    record=st.fixed_dictionaries(
        {"dtype": st.sampled_from(["F32", "U8", "F8_E4M3"]) | _VALUES, "shape": _VALUES, "data_offsets": _VALUES}
    )
)
def test_row_13_random_records_never_raise_anything_else(file: Path, record: dict[str, Any]):
    check(write(file, {"a": record}, bytes(4)))
