"""ONNX Runtime runs ONNX graphs themselves; what it optimises depends on the host and is done on loading."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from slipcast.bundle.manifest import EngineFiles
from slipcast.bundle.onnxfile import external_files
from slipcast_compiler.engines.needs import need_graph_libraries
from slipcast_compiler.host.files import link


def build(model: Path, precision: str, out: Path, fp32: Collection[str] = ()) -> EngineFiles:
    """For the CPU: the graph, with attention in slices, and its weights, linked; what is quantised is so in the graph,
    the rest is fp32."""
    need_graph_libraries()
    from slipcast_compiler.graph.slices import write_slices

    assert precision != "fp16"  # which the CPU has no kernels for
    files = build_for_gpu(model, precision, out, fp32)
    write_slices(model, out / model.name)
    return files


def build_for_gpu(model: Path, precision: str, out: Path, fp32: Collection[str] = ()) -> EngineFiles:
    """The graph and its weights, linked: what is quantised is so in the graph, the rest is fp32; or cast it to fp16,
    all but the nodes `fp32`."""
    if precision == "fp16":
        need_graph_libraries()
        from slipcast_compiler.graph.casting import cast_graph

        cast_graph(model, precision, out / model.name, fp32)
        data = out / f"{model.name}.data"
        return EngineFiles(model=model.name, weights=data.name if data.is_file() else None)
    assert precision in ("fp32", "int8", "int4"), precision
    files = external_files(model)  # a part may have none; others have their weights in one that they share
    assert len(files) < 2, files
    for name in (model.name, *files):
        link(model.with_name(name), out / name)
    return EngineFiles(model=model.name, weights=next(iter(files), None))
