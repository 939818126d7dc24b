"""Slots for adapters: beside each denoiser, the same graph in which layers add a product of low rank that a run gives.

Both read one file of weights. Without adapters the plain one draws, to the bit as if nothing were beside it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from slipcast.bundle.onnxfile import external_files
from slipcast.errors import RecipeError
from slipcast.progress import Advance
from slipcast_compiler.export.component import contract_of
from slipcast_compiler.graph.linear import Linear, linear_layers
from slipcast_compiler.graph.qdq import layer_of
from slipcast_compiler.graph.weights import load, save_sharing
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.files import link
from slipcast_compiler.host.isolate import run_isolated
from slipcast_compiler.recipe.passes import AdaptersTable


@dataclass(frozen=True)
class Slots:
    """`layers`: those that have one, in the order of their numbers; `components`: by component that has some, what its
    adapted one is called; `folders`: by precision, as Graphs.quantized has them ("" for none of these), by component,
    the cache's directory with the adapted graph and its contract."""

    rank: int
    layers: tuple[str, ...]
    components: Mapping[str, str]
    folders: Mapping[str, Mapping[str, Path]]

    def folder(self, precision: str, component: str) -> Path:
        """Of a target in a precision."""
        return self.folders.get(precision, self.folders[""])[component]


def is_adaptable(component: str) -> bool:
    """Whether it is a denoiser, or a part of one."""
    return component.partition("_")[0] == "denoiser"


def make_slots(
    sources: Mapping[str, Mapping[str, tuple[Path, str]]], table: AdaptersTable, cache: Cache, advance: Advance
) -> Slots:
    """Slots for the layers that the table names. `sources`: by precision, as in Slots, the graph of each component, and
    a hash of what it was made from."""
    plain = {name: model for name, (model, _) in sources[""].items() if is_adaptable(name)}
    found = {name: _chosen(model, table.layers) for name, model in plain.items()}
    partly = _partly(sources[""], found)
    found = {name: {layer: each[layer] for layer in each if layer not in partly} for name, each in found.items()}
    found = {name: each for name, each in found.items() if each}
    layers = tuple(dict.fromkeys(layer for each in found.values() for layer in each))
    if not layers:
        raise RecipeError(
            "adapters.layers fits no layer of the exported denoisers",
            expected="patterns such as *.attn.to_q",
            got=", ".join(table.layers),
        )
    folders: dict[str, dict[str, Path]] = {precision: {} for precision in sources}
    for done, (precision, name) in enumerate((p, n) for p in sources for n in found):
        advance(done, len(sources) * len(found))
        source, identity = sources[precision][name]
        made_from = source, found[name], layers, table.rank

        def make(out: Path, given: tuple[Path, dict[str, list[Linear]], tuple[str, ...], int] = made_from) -> None:
            run_isolated(write_adapted, *given, out)

        inputs = {"source": identity, "layers": layers, "own": sorted(found[name]), "rank": table.rank}
        folders[precision][name] = cache.get("slots", inputs, make)
    return Slots(table.rank, layers, {name: adapted(name) for name in found}, folders)


def _partly(models: Mapping[str, tuple[Path, str]], found: Mapping[str, Collection[str]]) -> set[str]:
    """Layers whose weight a graph reads in which they would have no slot: adapted here and not there, they would be
    neither one."""
    chosen, partly = {layer for each in found.values() for layer in each}, set[str]()
    for name, (model, _) in models.items():
        graph = onnx.load(model, load_external_data=False).graph
        read = {layer_of(tensor.name) for tensor in graph.initializer}
        partly |= (read & chosen) - set(found.get(name, ()))
    return partly


def adapted(component: str) -> str:
    """What takes a component's place while adapters are set."""
    return f"{component}_adapted"


def _chosen(model: Path, patterns: Collection[str]) -> dict[str, list[Linear]]:
    layers = linear_layers(onnx.load(model, load_external_data=False).graph)
    return {name: each for name, each in layers.items() if any(fnmatch.fnmatch(name, p) for p in patterns)}


def write_adapted(
    source: Path, chosen: Mapping[str, list[Linear]], layers: Sequence[str], rank: int, out: Path, _: Advance
) -> None:
    """Write NAME_adapted.onnx, which reads its weights where NAME.onnx does, and its contract into `out`."""
    model = load(source)
    places = {linear.node: (layers.index(layer), linear) for layer, each in chosen.items() for linear in each}
    factors: dict[str, ir.Value] = {}
    for node in list(model.graph):
        if node.name in places:
            place, linear = places[node.name]
            shapes = {f"down_{place}": (linear.inputs, rank), f"up_{place}": (rank, linear.outputs)}
            for name, shape in shapes.items():
                if name not in factors:
                    factors[name] = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
            _add_product(model.graph, node, *(factors[name] for name in shapes))
            del places[node.name]
    if places:
        raise AssertionError(f"{source.name} has no {next(iter(places))}")
    model.graph.inputs.extend(factors.values())
    name = adapted(source.stem)
    for file in external_files(source):  # beside the graph whose file it is, as engines look for it there
        if (owner := source.with_name(file.removesuffix(".data"))).is_file():
            link(owner, out / owner.name)
    save_sharing(model, out / f"{name}.onnx")
    (out / f"{name}.json").write_text(contract_of(model).model_dump_json())


def _add_product(graph: ir.Graph, node: ir.Node, down: ir.Value, up: ir.Value) -> None:
    """To what a product with a constant gives, of the same input."""
    plain, given = node.outputs[0], node.inputs[0]
    inner = ir.node("MatMul", [given, down], name=f"{node.name}.adapter_down")
    outer = ir.node("MatMul", [inner.outputs[0], up], name=f"{node.name}.adapter_up")
    added = ir.node("Add", [plain, outer.outputs[0]], name=f"{node.name}.adapter")
    total = added.outputs[0]
    total.shape, total.type = plain.shape, plain.type
    for user, place in plain.uses():
        if user is not added:
            user.replace_input_with(place, total)
    for place, output in enumerate(graph.outputs):
        if output is plain:
            graph.outputs[place] = total
    name = str(plain.name)
    plain.name, total.name = f"{name}.unadapted", name
    inner.outputs[0].name, outer.outputs[0].name = f"{name}.adapter_inner", f"{name}.adapter_outer"
    graph.insert_after(node, [inner, outer, added])
