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
FUSED_KEYS = ("to_kv",)  # keys and values
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
            layer, beside = _Module(name, modules[name]).read(parent)
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


class _Module:
    """One attention module, read; NotUnderstoodError says what is in the way."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self._name, self._module, self._sizes = name, module, matrices(module)
        self._queries, self._keys, self._values, self._gates, self._fused, self._pairs, self._outputs = (
            [each for each in names if each in self._sizes]
            for names in (QUERIES, KEYS, VALUES, GATES, FUSED, FUSED_KEYS, OUTPUTS)
        )
        if "add_k_proj" in self._keys and "add_q_proj" not in self._queries:
            raise NotUnderstoodError("the text's keys and values are added to its own, without queries")
        heads = count_of(module, HEADS) or 0
        self._width = self._columns_of_heads()
        self._head_dim = _share(self._width, heads, "its heads")
        self._units = _share(self._sizes[self._keys[0]][0], self._head_dim, self._keys[0]) if self._keys else heads
        self._group = _share(heads, self._units, "its query heads")

    def read(self, parent: nn.Module | None) -> tuple[AttentionLayer, FeedForwardLayer | None]:
        """The layer, and the perceptron that shares its output projection, if any."""
        self._check_parameters()
        columns, beside = self._columns()
        if not any(each != "to_add_out" for each in self._outputs):
            beside, output = _single_stream(self._name.rpartition(".")[0], parent, self._width)
            columns.append(Slice(output, self._width // self._units))
        lengths = dict.fromkeys(self._fused, 3) | dict.fromkeys(self._pairs, 2)
        if any(self._sizes[each][0] != count * self._width for each, count in lengths.items()) and not beside:
            raise NotUnderstoodError(f"{', '.join(lengths)}: other rows than those of queries, keys and values")
        values = self._rows(self._values, 2)
        if any(place.size != value.size * self._group for place in columns for value in values):
            raise NotUnderstoodError("its outputs are of another width than its values")
        gates = [Slice(f"{self._name}.{each}", _share(self._sizes[each][0], self._units, each)) for each in self._gates]
        rows = (*self._rows(self._queries, 0), *self._rows(self._keys, 1), *values, *gates)
        cross = bool(getattr(self._module, "is_cross_attention", False))
        layer = AttentionLayer(
            self._name, self._units, self._head_dim, rows, tuple(values), tuple(columns), self._group, cross
        )
        return layer, beside

    def _columns_of_heads(self) -> int:
        """How many columns all query heads have together."""
        if self._queries:
            return self._sizes[self._queries[0]][0]
        width = count_of(self._module, ("inner_dim",))
        if self._fused and width and self._sizes[self._fused[0]][0] >= 3 * width:
            return width
        raise NotUnderstoodError(f"no projection of queries among {', '.join(self._sizes) or 'its parameters'}")

    def _rows(self, names: list[str], part: int) -> list[Slice]:
        """Of separate layers, and the part of fused ones: 0 of queries, 1 of keys, 2 of values."""
        prefix, width, head_dim = f"{self._name}.", self._width, self._head_dim
        rows = [Slice(prefix + each, _share(self._sizes[each][0], self._units, each)) for each in names]
        rows += [Slice(prefix + each, head_dim, part * width) for each in self._fused]
        return rows + [Slice(prefix + each, head_dim, (part - 1) * width) for each in self._pairs if part]

    def _columns(self) -> tuple[list[Slice], FeedForwardLayer | None]:
        """Of its own output projections, and the neurons that one of them reads after the heads."""
        columns, beside = [], None
        for each in self._outputs:
            count = self._sizes[each][1]
            heads = self._width if self._fused and count > self._width else count
            columns.append(Slice(f"{self._name}.{each}", _share(heads, self._units, each)))
            if count > heads:
                up = self._fused[0], self._sizes[self._fused[0]][0] - 3 * self._width, 3 * self._width
                beside = _beside(self._name, up, each, count - heads, heads)
        return columns, beside

    def _check_parameters(self) -> None:
        """Every parameter belongs to a projection, or to a norm that does not tie heads together."""
        for name in HEAD_NORMS:
            norm: Any = getattr(self._module, name, None)
            if norm is None or isinstance(norm, nn.Identity):
                continue
            size = next((parameter.numel() for parameter in norm.parameters()), None) or _normalised(norm)
            if size is None:
                raise NotUnderstoodError(f"what its {name} is a norm of cannot be seen")
            if size != self._head_dim:
                raise NotUnderstoodError(f"its {name} spans all heads, so that each depends on the others")
        own = (*self._queries, *self._keys, *self._values, *self._gates, *self._fused, *self._pairs, *self._outputs)
        known = tuple(f"{each}." for each in (*own, *HEAD_NORMS, *INPUT_NORMS))
        for name, _ in self._module.named_parameters():
            if not name.startswith(known):
                raise NotUnderstoodError(f"{name} is a parameter of unknown use")


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
