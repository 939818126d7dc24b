"""Attention modules, by the names of their projections and by shapes; no class of a model is known.

A module is taken only if each of its parameters is understood, since what is not may tie heads together. Names are
those that diffusers gives; every form is tried in tests, a head masked against the same head removed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from slipcast_compiler.model.units import AttentionLayer, FeedForwardLayer, Slice, matrices, matrix_size

HEADS = ("heads", "num_heads", "n_heads")
KEY_HEADS = ("kv_heads", "num_kv_heads")
QUERIES = ("to_q", "to_query", "q_proj", "add_q_proj")
KEYS = ("to_k", "to_key", "k_proj", "add_k_proj")
VALUES = ("to_v", "to_value", "v_proj", "add_v_proj")
GATES = ("to_gate",)  # multiplies what the heads give
# One layer in place of several: queries, keys and values follow one another, then what leads to neurons, if anything.
FUSED = ("to_qkv", "to_added_qkv", "to_qkv_mlp_proj")
OUTPUTS = ("to_out", "to_out.0", "out_layer", "o_proj", "to_add_out")
# Of each head by itself. Where one spans all heads, no head is independent of the others.
HEAD_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k", "query_norm", "key_norm", "q_norm", "k_norm")
INPUT_NORMS = ("group_norm", "spatial_norm", "norm_cross")  # of what the projections read


@dataclass
class Attentions:
    """What was found: layers; perceptrons that share a projection with heads; and why modules were not taken."""

    layers: dict[str, AttentionLayer] = field(default_factory=dict)
    beside: dict[str, FeedForwardLayer] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)


class NotUnderstoodError(Exception):
    """Why an attention module is left alone."""


def find_attention(module: nn.Module) -> Attentions:
    """All attention modules of `module`, innermost first where one holds another, in the module's order."""
    found = Attentions()
    modules = dict(module.named_modules())
    for name in reversed(modules):
        inside = f"{name}." if name else ""
        known = any(each.startswith(inside) for each in (*found.layers, *found.unknown))
        if known or not _is_candidate(modules[name]):
            continue
        parent = modules[name.rpartition(".")[0]] if name else None
        try:
            layer, beside = _read(name, modules[name], parent)
        except NotUnderstoodError as reason:
            found.unknown[name] = str(reason)
        else:
            found.layers[name] = layer
            if beside:
                found.beside[beside.name] = beside
    for each in (found.layers, found.beside, found.unknown):
        _reverse(each)
    return found


def has_head_norms(module: nn.Module) -> bool:
    """Whether queries or keys are normalised before they meet."""
    return any(getattr(module, name, None) is not None for name in HEAD_NORMS)


def count_of(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """The first of these attributes that is a number."""
    return next((value for name in names if type(value := getattr(module, name, None)) is int), None)


def set_heads(module: nn.Module, layer: AttentionLayer, heads: int) -> None:
    """Tell an attention module that it has so many of `layer`'s heads left."""
    if heads == layer.heads:
        return
    width = heads * layer.head_dim
    counts = dict.fromkeys(HEADS, heads * layer.group) | dict.fromkeys(KEY_HEADS, heads)
    for name, count in (counts | {"inner_dim": width * layer.group, "inner_kv_dim": width}).items():
        if type(getattr(module, name, None)) is int:
            setattr(module, name, count)


def _is_candidate(module: nn.Module) -> bool:
    return count_of(module, HEADS) is not None and bool(matrices(module) or list(module.parameters(recurse=False)))


def _read(name: str, module: Any, parent: nn.Module | None) -> tuple[AttentionLayer, FeedForwardLayer | None]:
    """The layer, and the perceptron that shares its output projection; NotUnderstoodError says what is in the way."""
    sizes, heads = matrices(module), count_of(module, HEADS)
    assert heads is not None
    queries, keys, values, gates, fused, outputs = (
        [each for each in names if each in sizes] for names in (QUERIES, KEYS, VALUES, GATES, FUSED, OUTPUTS)
    )
    if "add_k_proj" in keys and "add_q_proj" not in queries:
        raise NotUnderstoodError("the text's keys and values are added to its own, without queries")
    width, units = _width(module, sizes, queries, keys, fused, heads)
    head_dim, group = width // heads, heads // units

    def rows_of(names: list[str], part: int) -> list[Slice]:
        """Of separate layers, and the part of fused ones that is theirs."""
        own = [Slice(f"{name}.{each}", _share(sizes[each][0], units, each)) for each in names]
        return own + [Slice(f"{name}.{each}", head_dim, part * width) for each in fused]

    values_rows = rows_of(values, 2)
    rows = (*rows_of(queries, 0), *rows_of(keys, 1), *values_rows, *rows_of(gates, 0)[: len(gates)])
    _check_parameters(module, {*queries, *keys, *values, *gates, *fused, *outputs}, head_dim)
    columns, beside = [], None
    for each in outputs:
        used = width if fused and sizes[each][1] > width else sizes[each][1]
        columns.append(Slice(f"{name}.{each}", _share(used, units, each)))
        if sizes[each][1] > used:
            up = (fused[0], sizes[fused[0]][0] - 3 * width, 3 * width)
            beside = _beside(name, up, each, sizes[each][1] - used, used)
    if any(sizes[each][0] != 3 * width for each in fused) and not beside:
        raise NotUnderstoodError(f"{', '.join(fused)}: more rows than queries, keys and values have, or fewer")
    if not any(each != "to_add_out" for each in outputs):
        beside, output = _single_stream(name.rpartition(".")[0], parent, width)
        columns.append(Slice(output, width // units))
    if any(place.size != value.size * group for place in columns for value in values_rows):
        raise NotUnderstoodError("its outputs are of another width than its values")
    cross = bool(getattr(module, "is_cross_attention", False))
    return AttentionLayer(name, units, head_dim, rows, tuple(values_rows), tuple(columns), group, cross), beside


def _width(
    module: Any, sizes: dict[str, tuple[int, int]], queries: list[str], keys: list[str], fused: list[str], heads: int
) -> tuple[int, int]:  # fmt: skip
    """(columns of all query heads together, heads that can be removed)."""
    if queries:
        width = sizes[queries[0]][0]
        head_dim = _share(width, heads, queries[0])
        units = _share(sizes[keys[0]][0], head_dim, keys[0]) if keys else heads
        if heads % units:
            raise NotUnderstoodError(f"{heads} query heads do not share {units} key heads evenly")
        return width, units
    inner = count_of(module, ("inner_dim",))
    if fused and inner and sizes[fused[0]][0] >= 3 * inner:
        _share(inner, heads, fused[0])
        return inner, heads
    raise NotUnderstoodError(f"no projection of queries among {', '.join(sizes) or 'its parameters'}")


def _single_stream(name: str, parent: nn.Module | None, width: int) -> tuple[FeedForwardLayer | None, str]:
    """A block whose one output projection reads heads and then neurons: (the neurons, the projection's name)."""
    sizes = {each: size for each, layer in parent.named_children() if (size := matrix_size(layer))} if parent else {}
    downs = [each for each, (_, columns) in sizes.items() if columns >= width and each.startswith("proj_out")]
    if len(downs) != 1:
        raise NotUnderstoodError("no output projection, in it or beside it")
    (down,) = downs
    neurons = sizes[down][1] - width
    ups = [each for each, (rows, _) in sizes.items() if neurons and rows in (neurons, 2 * neurons) and each != down]
    if neurons and len(ups) != 1:
        raise NotUnderstoodError(
            f"{down} beside it reads {neurons} columns more than heads give, and what they are is open"
        )
    prefix = f"{name}." if name else ""
    beside = _beside(name, (ups[0], sizes[ups[0]][0], 0), down, neurons, width) if neurons else None
    return beside, f"{prefix}{down}"


def _beside(name: str, up: tuple[str, int, int], down: str, neurons: int, start: int) -> FeedForwardLayer:
    """`up`: the linear layer, its rows for neurons and their gates, and where they start."""
    linear, count, first = up
    if count not in (neurons, 2 * neurons):
        raise NotUnderstoodError(f"{linear} has {count} rows for {neurons} neurons")
    prefix = f"{name}." if name else ""
    rows = tuple(Slice(f"{prefix}{linear}", 1, first + i * neurons) for i in range(count // neurons))
    return FeedForwardLayer(name, neurons, rows, (Slice(f"{prefix}{down}", 1, start),))


def _check_parameters(module: nn.Module, understood: set[str], head_dim: int) -> None:
    """Every parameter belongs to a projection, or to a norm that does not tie heads together."""
    for name in HEAD_NORMS:
        norm: Any = getattr(module, name, None)
        if norm is None or isinstance(norm, nn.Identity):
            continue
        size = next((parameter.numel() for parameter in norm.parameters()), None) or _normalised(norm)
        if size is None:
            raise NotUnderstoodError(f"what its {name} is a norm of cannot be seen")
        if size != head_dim:
            raise NotUnderstoodError(f"its {name} spans all heads, so that each depends on the others")
    known = (*understood, *HEAD_NORMS, *INPUT_NORMS)
    for name, _ in module.named_parameters():
        if not any(name.startswith(f"{each}.") for each in known):
            raise NotUnderstoodError(f"{name} is a parameter of unknown use")


def _normalised(norm: Any) -> int | None:
    """The length that a norm without weights is taken over."""
    shape = getattr(norm, "normalized_shape", None) or getattr(norm, "dim", None)
    return int(shape[-1]) if isinstance(shape, tuple | list) and shape else None


def _share(total: int, parts: int, name: str) -> int:
    if not parts or total % parts:
        raise NotUnderstoodError(f"{name}: {total} rows or columns are not {parts} equal parts")
    return total // parts


def _reverse(found: dict[str, Any]) -> None:
    items = list(found.items())[::-1]
    found.clear()
    found.update(items)
