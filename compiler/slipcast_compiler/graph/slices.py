"""Attention in slices: some queries at a time, where an engine has all scores of an operator in memory at once.

ONNX Runtime does, twice: 17 GB for the 16384 tokens and 8 heads of Stable Diffusion 1.5 at 1024x1024. Here its graphs
are given operators of a domain of our own in place of ONNX's, under the same names, and what they mean as functions of
the model: how many queries are taken at a time follows, in a run, from how many rows, heads and keys there are. Other
engines never have the scores at once, and lose by it (OpenVINO a seventh): `write_whole` gives the operators back.

For 2 rows of 4096 tokens, 8 heads of 40, ONNX Runtime 1.30 takes 2.2 GB and 0.89 s whole, and 0.15 GB and 0.69 s in
slices of BYTES: they stay in the cache of a core (2 cores of an AMD EPYC).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import onnx
import onnx.parser
from onnx import helper

FLOAT_BYTES = 4
BYTES = 2**26  # of the scores of a slice
SMALL = 2**20  # bytes of all scores of a row: operators with less are left as they are
PLAIN: Final = "slipcast"
MASKED: Final = "slipcast.masked"
INT8: Final = "slipcast.int8"  # with attributes that tell what is divided by what: see sdpa.simulate
SCALES = ("query_scale", "key_scale", "value_scale", "weight_scale")

_INPUTS = {MASKED: "query, key, value, mask"}  # of others: query, key, value
_ATTRIBUTES = {INT8: ", ".join(("scale", *SCALES))}  # of others: scale
_BEFORE = {
    INT8: """
    factor = Constant <value_float: float = @scale> ()
    query_scale = Constant <value_float: float = @query_scale> ()
    key_scale = Constant <value_float: float = @key_scale> ()
    value_scale = Constant <value_float: float = @value_scale> ()
    weight_scale = Constant <value_float: float = @weight_scale> ()
    signed = Constant <value = int8 {0}> ()
    unsigned = Constant <value = uint8 {0}> ()
    key_int8 = QuantizeLinear (key, key_scale, signed)
    rounded_key = DequantizeLinear (key_int8, key_scale, signed)
    turned_key = Transpose <perm = [0, 1, 3, 2]> (rounded_key)
    value_int8 = QuantizeLinear (value, value_scale, signed)
    rounded_value = DequantizeLinear (value_int8, value_scale, signed)
"""
}
_ATTEND = {
    PLAIN: "OUT = Attention <scale: float = @scale> (QUERIES, key, value)",
    MASKED: "OUT = Attention <scale: float = @scale> (QUERIES, key, value, MASKS)",
    INT8: """
    OUT_int8 = QuantizeLinear (QUERIES, query_scale, signed)
    OUT_rounded = DequantizeLinear (OUT_int8, query_scale, signed)
    OUT_products = MatMul (OUT_rounded, turned_key)
    OUT_scores = Mul (OUT_products, factor)
    OUT_weights = Softmax <axis = -1> (OUT_scores)
    OUT_weights_int8 = QuantizeLinear (OUT_weights, weight_scale, unsigned)
    OUT_rounded_weights = DequantizeLinear (OUT_weights_int8, weight_scale, unsigned)
    OUT = MatMul (OUT_rounded_weights, rounded_value)
""",
}
_PAD = {MASKED: "last = Constant <value_ints = [-2]> () all_masks = Pad (mask, pads, , last)"}
_CUT = {MASKED: "some_masks = Slice (all_masks, start, end, last)"}
_FUNCTION = """
<domain: "DOMAIN", opset_import: ["" : 23]>
Attention <ATTRIBUTES> (INPUTS) => (result)
{
    BEFORE
    one = Constant <value_ints = [1]> ()
    most = Constant <value_ints = [SCORES]> ()
    sizes = Shape <start = 0, end = 2> (query)
    queries = Shape <start = 2, end = 3> (query)
    keys = Shape <start = 2, end = 3> (key)
    of_a_query = Concat <axis = 0> (sizes, keys)
    scores = ReduceProd <keepdims = 1> (of_a_query)
    some = Div (most, scores)
    fitting = Max (some, one)
    short = Add (queries, fitting)
    up = Sub (short, one)
    slices = Div (up, fitting)
    spread = Add (queries, slices)
    spread_up = Sub (spread, one)
    rows = Div (spread_up, slices)
    is_whole = Equal (slices, one)
    result = If (is_whole) <
        then_branch = at_once () => (float whole) {
            ATTEND_WHOLE
        },
        else_branch = in_slices () => (float joined) {
            none = Constant <value_ints = [0]> ()
            axis = Constant <value_ints = [2]> ()
            padded = Mul (slices, rows)
            missing = Sub (padded, queries)
            pads = Concat <axis = 0> (none, missing)
            all_queries = Pad (query, pads, , axis)
            PAD
            always = Constant <value = bool {1}> ()
            number = Squeeze (slices)
            stacked = Loop (number, always) <
                body = slice (int64 i, bool before) => (bool after, float found) {
                    after = Identity (before)
                    start = Mul (i, rows)
                    end = Add (start, rows)
                    some_queries = Slice (all_queries, start, end, axis)
                    CUT
                    ATTEND_SOME
                }
            >
            turned = Transpose <perm = [1, 2, 0, 3, 4]> (stacked)
            width = Shape <start = 3> (value)
            shape = Concat <axis = 0> (sizes, padded, width)
            all_found = Reshape (turned, shape)
            joined = Slice (all_found, none, queries, axis)
        }
    >
}
"""


def slice_attention(model: Any) -> None:
    """Rewrite an onnx.ModelProto in place."""
    sizes = {v.name: v.type.tensor_type.shape.dim for v in (*model.graph.input, *model.graph.value_info)}
    for node in model.graph.node:
        if node.op_type == "Attention" and not node.domain and _can_be_sliced(node, sizes):
            del node.input[4 if any(node.input[3:4]) else 3 :]
            replace(model, node, MASKED if len(node.input) > 3 else PLAIN)


def replace(model: Any, node: Any, domain: str) -> None:
    """Take an attention operator of the model for one of ours."""
    node.domain = domain
    if domain not in (each.domain for each in model.functions):
        model.functions.append(_function(domain))
        model.opset_import.append(helper.make_opsetid(domain, 1))


def write_slices(source: Path, target: Path) -> None:
    """Write the graph, sliced, in place of another name for it; nothing where there is nothing to slice. The names that
    it has for files of weights stay."""
    model = onnx.load(source, load_external_data=False)
    slice_attention(model)
    if any(each.domain in (PLAIN, MASKED) for each in model.functions):
        target.unlink()
        target.write_bytes(model.SerializeToString())


def write_whole(source: Path, target: Path) -> bool:
    """Undo write_slices; False, and nothing written, where there is nothing to undo."""
    model = onnx.load(source, load_external_data=False)
    ours = {each.domain for each in model.functions} & {PLAIN, MASKED}
    for kept in (model.functions, model.opset_import):
        for each in [each for each in kept if each.domain in ours]:
            kept.remove(each)
    for node in model.graph.node:
        if node.domain in ours:
            node.ClearField("domain")
    if ours:
        target.write_bytes(model.SerializeToString())
    return bool(ours)


def scores_bytes(query: Sequence[int], keys: int, whole: bool = False) -> int:
    """What ONNX Runtime takes at most for attention in slices, or `whole`, beside what it reads and gives; in fp32.
    `query`: its shape, [rows, ..., queries, width]."""
    of_a_query = FLOAT_BYTES * math.prod(query[:-2]) * keys
    scores, small = of_a_query * query[-2], FLOAT_BYTES * math.prod(query[1:-1]) * keys <= SMALL
    if whole or small or scores <= BYTES:
        return 2 * scores
    copies = 3 * FLOAT_BYTES * math.prod(query)  # queries, padded; what slices give, as it comes and turned
    return 2 * max(BYTES, of_a_query) + copies


def _can_be_sliced(node: Any, sizes: dict[str, Any]) -> bool:
    others = {each.name: helper.get_attribute_value(each) for each in node.attribute if each.name != "scale"}
    query, key = (sizes.get(name) for name in node.input[:2])
    if any(others.values()) or len(node.output) > 1 or any(node.input[4:]) or query is None or key is None:
        return False
    mask = sizes.get(node.input[3]) if any(node.input[3:4]) else None
    if any(node.input[3:4]) and (mask is None or len(mask) < 2 or mask[-2] != query[2]):  # a row of it for each query
        return False
    known = [d.dim_value for d in (*query[1:3], *key[2:3])]
    return len(query) == len(key) == 4 and (not all(known) or FLOAT_BYTES * math.prod(known) > SMALL)


def _function(domain: str) -> Any:
    words = {
        "DOMAIN": domain,
        "ATTRIBUTES": _ATTRIBUTES.get(domain, "scale"),
        "INPUTS": _INPUTS.get(domain, "query, key, value"),
        "BEFORE": _BEFORE.get(domain, ""),
        "SCORES": str(BYTES // FLOAT_BYTES),
        "ATTEND_WHOLE": _attend(domain, "whole", "query", "mask"),
        "ATTEND_SOME": _attend(domain, "found", "some_queries", "some_masks"),
        "PAD": _PAD.get(domain, ""),
        "CUT": _CUT.get(domain, ""),
    }
    text = _FUNCTION
    for word, meant in words.items():
        text = text.replace(word, meant)
    function = onnx.parser.parse_function(text)
    pending = list(function.node)
    while pending:
        node = pending.pop()
        node.name = f"{node.op_type}.{node.output[0]}"  # which profilers tell, after a number of the function's use
        for graph in (each.g for each in node.attribute if each.HasField("g")):
            pending.extend(graph.node)
            for value in graph.output:  # the parser takes those without a shape for numbers
                if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
                    value.type.tensor_type.ClearField("shape")
    return function


def _attend(domain: str, out: str, queries: str, masks: str) -> str:
    return _ATTEND[domain].replace("OUT", out).replace("QUERIES", queries).replace("MASKS", masks)
