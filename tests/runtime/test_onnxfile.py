"""onnxfile.py against models written with the onnx package, good ones and doctored ones."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundles import add_model, save_external
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from slipcast.bundle.onnxfile import MESSAGES, SINGULAR, check_external_data
from slipcast.errors import ArtifactError

LISTED = {"sub/model.onnx": 1000, "sub/model.data": 1000, "sub/deep/other.data": 500, "top.data": 1000}


def external(name: str = "b", **entries: object) -> TensorProto:
    """A tensor whose weights lie elsewhere."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def with_initializer(tensor: TensorProto) -> onnx.ModelProto:
    model = add_model()
    del model.graph.initializer[:]
    model.graph.initializer.append(tensor)
    return model


def check(model: onnx.ModelProto | bytes, tmp_path: Path) -> frozenset[str]:
    path = tmp_path / "sub" / "model.onnx"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return check_external_data(path, tmp_path, LISTED)


def refusal(model: onnx.ModelProto | bytes, tmp_path: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        check(model, tmp_path)
    assert "sub/model.onnx" in str(caught.value)
    assert caught.value.expected is not None
    assert caught.value.got is not None
    assert caught.value.hint
    return str(caught.value)


# --- what is accepted ------------------------------------------------------------------------------------------------


def test_models_as_onnx_writes_them(tmp_path: Path):
    save_external(add_model(), tmp_path / "model.onnx")
    listed = {"model.data": (tmp_path / "model.data").stat().st_size}
    assert check_external_data(tmp_path / "model.onnx", tmp_path, listed) == {"model.data"}
    assert check(add_model(), tmp_path) == frozenset()


@pytest.mark.parametrize(
    "entries",
    [
        {"location": "model.data"},
        {"location": "model.data", "offset": 0, "length": 1000},
        {"location": "model.data", "offset": 1000, "length": 0},
        {"location": "model.data", "offset": 990, "length": 10, "checksum": "0" * 40},
        {"location": "deep/other.data", "length": 500},
    ],
)
def test_external_data_inside_a_listed_file(entries: dict[str, object], tmp_path: Path):
    assert check(with_initializer(external(**entries)), tmp_path) == {"sub/" + str(entries["location"])}


# --- row 8 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "location",
    [
        "/etc/passwd", "../top.data", "deep/../model.data", "./model.data", "deep//other.data", "..", ".", "", "/",
        "C:\\model.data", "deep\\other.data", "\\\\host\\share", "model.data\0", "Model.data", "unlisted.data",
        "top.data", "sub/model.data", "*/_ORT_MEM_ADDR_/*", "file:///etc/passwd", "model.dat", "\u202emodel.data",
    ],
)  # fmt: skip
def test_row_08_bad_location(location: str, tmp_path: Path):
    message = refusal(with_initializer(external(location=location, offset=0, length=4)), tmp_path)
    assert "tensor 'b'" in message
    assert "location" in message or "not in the bundle" in message


def test_row_08_location_that_is_not_text(tmp_path: Path):
    data = (
        with_initializer(external(location="model.data")).SerializeToString().replace(b"model.data", b"model.dat\xff")
    )
    assert "refused location" in refusal(data, tmp_path)


@pytest.mark.parametrize(
    ("offset", "length", "words"),
    [
        (-1, 4, "bad offset"),
        (0, -4, "bad length"),
        ("x", 4, "bad offset"),
        ("", 4, "bad offset"),
        (0, "", "bad length"),
        (" 0", 4, "bad offset"),
        ("+1", 4, "bad offset"),
        ("1_0", 4, "bad offset"),
        ("0x10", 4, "bad offset"),
        ("1e2", 4, "bad offset"),
        ("1.0", 4, "bad offset"),
        ("\u0661", 4, "bad offset"),
        ("1\0", 4, "bad offset"),
        ("9" * 20, 4, "bad offset"),
        (0, "9" * 5000, "bad length"),
        (0, 1001, "outside"),
        (1001, 0, "outside"),
        (1001, None, "outside"),
        (997, 4, "outside"),
        (2**63, 2**63, "outside"),
        (2**63 - 1, 1, "outside"),
    ],
)
def test_row_08_bad_offset_or_length(offset: object, length: object, words: str, tmp_path: Path):
    entries = {"offset": offset, **({} if length is None else {"length": length})}
    assert words in refusal(with_initializer(external(location="model.data", **entries)), tmp_path)


def test_row_08_external_without_location(tmp_path: Path):
    assert "refused location" in refusal(with_initializer(external(offset=4)), tmp_path)
    assert "refused location" in refusal(with_initializer(external()), tmp_path)
    said_twice = external().SerializeToString() + b"\x70\x00"
    assert "refused location" in refusal(_model_with_tensor_bytes(said_twice), tmp_path)


def test_row_08_location_counts_whatever_the_data_location_says(tmp_path: Path):
    tensor = external(location="../top.data")
    tensor.data_location = TensorProto.DEFAULT
    assert "refused location" in refusal(with_initializer(tensor), tmp_path)


@pytest.mark.parametrize("key", ["location", "offset", "length"])
def test_row_08_key_twice(key: str, tmp_path: Path):
    tensor = external(location="model.data", offset="0", length="4")
    tensor.external_data.add(key=key, value="model.data" if key == "location" else "0")
    assert "twice" in refusal(with_initializer(tensor), tmp_path)


def _node(**attributes: object) -> onnx.NodeProto:
    return helper.make_node("Any", ["x"], ["y"], **attributes)


def _graph(tensor: TensorProto) -> onnx.GraphProto:
    return helper.make_graph([], "inner", [], [], [tensor])


def _sparse(tensor: TensorProto, *, indices: bool) -> onnx.SparseTensorProto:
    other = numpy_helper.from_array(np.zeros(4, np.int64))
    return onnx.SparseTensorProto(values=other if indices else tensor, indices=tensor if indices else other, dims=[8])


def _in_function(model: onnx.ModelProto, tensor: TensorProto, *, default: bool) -> None:
    function = model.functions.add(name="f", domain="d")
    if default:
        function.attribute_proto.append(helper.make_attribute("a", tensor))
    else:
        function.node.append(_node(a=tensor))


# Every place of a model that a tensor can hide in.
PLACES: dict[str, Callable[[onnx.ModelProto, TensorProto], object]] = {
    "initializer": lambda m, t: m.graph.initializer.append(t),
    "sparse values": lambda m, t: m.graph.sparse_initializer.append(_sparse(t, indices=False)),
    "sparse indices": lambda m, t: m.graph.sparse_initializer.append(_sparse(t, indices=True)),
    "attribute": lambda m, t: m.graph.node.append(_node(a=t)),
    "attribute list": lambda m, t: m.graph.node.append(_node(a=[numpy_helper.from_array(np.ones(2)), t])),
    "sparse attribute": lambda m, t: m.graph.node.append(_node(a=_sparse(t, indices=False))),
    "sparse attribute list": lambda m, t: m.graph.node.append(_node(a=[_sparse(t, indices=True)] * 2)),
    "subgraph": lambda m, t: m.graph.node.append(_node(a=_graph(t))),
    "subgraph list": lambda m, t: m.graph.node.append(_node(a=[_graph(t), _graph(t)])),
    "subgraph of a subgraph": lambda m, t: m.graph.node.append(
        _node(a=helper.make_graph([_node(b=_graph(t))], "outer", [], []))
    ),
    "function": lambda m, t: _in_function(m, t, default=False),
    "function default": lambda m, t: _in_function(m, t, default=True),
    "training": lambda m, t: m.training_info.add().algorithm.CopyFrom(_graph(t)),
    "training start": lambda m, t: m.training_info.add().initialization.CopyFrom(_graph(t)),
}


@pytest.mark.parametrize("place", PLACES)
def test_row_08_every_place_of_a_tensor_is_looked_at(place: str, tmp_path: Path):
    good, bad = add_model(), add_model()
    PLACES[place](good, external("hidden", location="model.data"))
    PLACES[place](bad, external("hidden", location="../top.data"))
    assert check(good, tmp_path) == {"sub/model.data"}
    assert "tensor 'hidden'" in refusal(bad, tmp_path)


def test_tables_agree_with_the_onnx_package():
    """Every way from a model to a tensor is in MESSAGES, and SINGULAR says which fields occur once."""

    def leads_to_tensor(descriptor, seen=()) -> bool:
        if descriptor.name == "TensorProto":
            return True
        fields = [] if descriptor.name in seen else descriptor.fields
        return any(f.message_type and leads_to_tensor(f.message_type, (*seen, descriptor.name)) for f in fields)

    messages, singular, pending = {}, {}, [onnx.ModelProto.DESCRIPTOR]
    while pending:
        descriptor = pending.pop()
        ways = [f for f in descriptor.fields if f.message_type and leads_to_tensor(f.message_type)]
        messages[descriptor.name] = {f.number: f.message_type.name for f in ways}
        singular[descriptor.name] = {f.number for f in ways if not f.is_repeated}
        pending += [f.message_type for f in ways if f.message_type.name not in {*messages, "TensorProto"}]
    tensor = {f.number: f.message_type.name for f in TensorProto.DESCRIPTOR.fields if f.name == "external_data"}
    assert {**messages, "TensorProto": tensor} == MESSAGES
    assert {name: fields for name, fields in singular.items() if fields} == SINGULAR


# --- the wire format -------------------------------------------------------------------------------------------------


def test_row_08_halves_that_a_parser_would_merge(tmp_path: Path):
    """Protobuf merges a message that occurs twice: concatenated models are one model."""
    good = with_initializer(external(location="model.data")).SerializeToString()
    assert "not an ONNX model" in refusal(good + good, tmp_path)
    half = helper.make_attribute("a", external(location="model.data", offset=900)).SerializeToString()
    node = onnx.NodeProto(op_type="Any").SerializeToString() + b"\x2a" + _varint(2 * len(half)) + half + half
    merged = onnx.NodeProto.FromString(node)
    assert len(merged.attribute[0].t.external_data) == 4, "the attack is real"
    graph = b"\x0a" + _varint(len(node)) + node
    assert "not an ONNX model" in refusal(b"\x3a" + _varint(len(graph)) + graph, tmp_path)


def _varint(value: int) -> bytes:
    return (bytes([value & 127 | 128]) + _varint(value >> 7)) if value > 127 else bytes([value])


def _model_with_tensor_bytes(tensor: bytes) -> bytes:
    graph = b"\x2a" + _varint(len(tensor)) + tensor
    return b"\x3a" + _varint(len(graph)) + graph


def test_row_08_value_of_a_wire_type_that_parsers_skip(tmp_path: Path):
    """A second `value`, as a number: parsers skip it and use the first; reading it instead would hide the first."""
    entry = b"\x0a\x06offset\x12\x02-9" + b"\x10\x35"
    tensor = external(location="model.data").SerializeToString() + b"\x6a" + _varint(len(entry)) + entry
    parsed = onnx.ModelProto.FromString(_model_with_tensor_bytes(tensor)).graph.initializer[0]
    assert parsed.external_data[1].value == "-9", "the attack is real"
    assert "not an ONNX model" in refusal(_model_with_tensor_bytes(tensor), tmp_path)
    number = external(location="model.data").SerializeToString() + b"\x68\x05"
    assert "not an ONNX model" in refusal(_model_with_tensor_bytes(number), tmp_path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x3a",  # no length
        b"\x3a\x05ab",  # length beyond the end
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01ab",
        b"\x3a" + b"\xff" * 11,  # a number that never ends
        b"\x08" + b"\xff" * 11,
        b"\x08" + b"\x80" * 10 + b"\x01",  # a number of more than 64 bits
        b"\x38\x01",  # graph as a number
        b"\x39" + b"\x48\x00" * 4,  # graph as a number of 8 bytes
        b"\x3b\x3c",  # groups, which ONNX does not have
        b"\x3e\x00",  # no such wire types
        b"\x3f\x00",
        b"\x02\x00",  # field 0
        b"\xba\x80\x80\x80\x10\x00",  # field 7 and a bit that some parsers drop
        b"\x09abc",  # 8 bytes of which 3 are there
        b"\x0dabc",
        b"not a model at all",
    ],
)
def test_row_08_malformed_protobuf(data: bytes, tmp_path: Path):
    assert "not an ONNX model" in refusal(data, tmp_path)


def test_fixed_width_fields_are_stepped_over(tmp_path: Path):
    data = (
        b"\x41" + b"\xff" * 8 + b"\x45" + b"\xff" * 4 + with_initializer(external(location="../x")).SerializeToString()
    )
    assert "refused location" in refusal(data, tmp_path)


def test_missing_model(tmp_path: Path):
    with pytest.raises(ArtifactError, match="No such file"):
        check_external_data(tmp_path / "model.onnx", tmp_path, {})


def test_deep_nesting_costs_no_recursion(tmp_path: Path):
    graph = _graph(external(location="../top.data")).SerializeToString()
    for _ in range(3000):
        graph = b"\x32" + _varint(len(graph)) + graph  # AttributeProto.g
        graph = b"\x2a" + _varint(len(graph)) + graph  # NodeProto.attribute
        graph = b"\x0a" + _varint(len(graph)) + graph  # GraphProto.node
    assert "refused location" in refusal(b"\x3a" + _varint(len(graph)) + graph, tmp_path)


# --- speed and fuzzing -----------------------------------------------------------------------------------------------


def test_a_large_model_is_checked_fast_and_not_copied(tmp_path: Path):
    """3000 nodes take about 30 ms on a 2024 server core; the limit allows for a busy machine."""
    weights = numpy_helper.from_array(np.zeros(8 << 20, np.float32), "raw")
    nodes = [
        helper.make_node(
            "Conv", [f"/down/{i}/x", f"w{i}"], [f"/down/{i + 1}/x"], f"/down/{i}", group=1, pads=[1, 1, 1, 1]
        )
        for i in range(3000)
    ]
    tensors = [external(f"w{i}", location="model.data", offset=i % 900, length=10) for i in range(1500)]
    model = helper.make_model(helper.make_graph(nodes, "g", [], [], [weights, *tensors]))
    check(model, tmp_path)
    path = tmp_path / "sub" / "model.onnx"

    def seconds() -> float:
        start = time.perf_counter()
        check_external_data(path, tmp_path, LISTED)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.15
    tracemalloc.start()
    check_external_data(path, tmp_path, LISTED)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20, "of 32 MiB of weights in the model"


def _fuzz_base() -> bytes:
    model = add_model()
    for place in PLACES.values():
        place(model, external(location="model.data", offset=3, length=4))
    return model.SerializeToString()


GOOD_BYTES = _fuzz_base()
fuzzing = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@fuzzing
@given(flips=st.lists(st.tuples(st.integers(0, len(GOOD_BYTES) - 1), st.integers(0, 255)), max_size=6))
def test_row_08_flipped_bytes_never_raise_anything_else(flips: list[tuple[int, int]], tmp_path: Path):
    data = bytearray(GOOD_BYTES)
    for position, value in flips:
        data[position] = value
    try:
        assert check(bytes(data), tmp_path) <= set(LISTED)
    except ArtifactError as error:
        str(error).encode()


@fuzzing
@given(data=st.binary(max_size=80))
def test_row_08_random_bytes_never_raise_anything_else(data: bytes, tmp_path: Path):
    for content in (data, _model_with_tensor_bytes(data)):
        try:
            check(content, tmp_path)
        except ArtifactError as error:
            str(error).encode()
