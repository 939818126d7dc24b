"""Time and size of one linear layer, alone, in a target's engine: as it is, and as the product of two smaller ones.

What a layer costs alone is not quite what it costs in its graph: here its weights are in the cache already.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from slipcast.bundle.manifest import Component, TensorSpec

if TYPE_CHECKING:
    from slipcast.engines import Engine
    from slipcast_compiler.model.layers import LinearLayer
    from slipcast_compiler.recipe.targets import TargetTable

Floats = npt.NDArray[np.float32]
PAIRS = 21
SAMPLE_S = 2e-3  # one sample of a pair takes about this long, far above what a clock and a call cost


@dataclass(frozen=True)
class Gain:
    """Medians over interleaved pairs; `speedup` is the median of the pairs' own ratios, before / after, of which a
    quarter are at most `speedup_low`."""

    seconds_before: float
    seconds_after: float
    speedup: float
    speedup_low: float
    bytes_before: int
    bytes_after: int

    def record(self) -> dict[str, Any]:
        """For a report."""
        return asdict(self)


def input_shapes(module: Any, evaluate: Callable[[Any], None]) -> dict[str, tuple[int, ...]]:
    """The shape of every linear layer's input while `evaluate` calls the module: a convolution's has four dimensions,
    all others have three at the most.

    Layers that it does not call are not in it, those included whose weights alone are read.
    """
    from slipcast_compiler.model.layers import linear_layers

    found: dict[str, tuple[int, ...]] = {}

    def hook_for(layer: LinearLayer) -> Any:
        def hook(_: Any, args: tuple[Any, ...]) -> None:
            x = args[0]
            found[layer.name] = tuple(x.shape if layer.convolution or x.ndim < 4 else x.flatten(1, -2).shape)

        return hook

    handles = [
        module.get_submodule(layer.name).register_forward_pre_hook(hook_for(layer)) for layer in linear_layers(module)
    ]
    try:
        evaluate(module)
    finally:
        for handle in handles:
            handle.remove()
    return found


def measure(target: TargetTable, shape: Sequence[int], before: Sequence[Floats], after: Sequence[Floats]) -> Gain:
    """A layer that is given float32 input of `shape` as two chains of matrices, each [out, in]; with a bias.

    Four dimensions mean a 1x1 convolution. The batch stays free, as it is in a bundle.
    """
    from slipcast.engines import open_engine
    from slipcast_compiler.engines import BUILDERS

    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    engines, sizes = [], []
    with TemporaryDirectory() as folder:
        for name, chain in (("before", before), ("after", after)):
            out = Path(folder, name)
            out.mkdir()
            contract = _write(out / "layer.onnx", shape, chain)
            built = out / "built"
            built.mkdir()
            files = BUILDERS[target.engine](out / "layer.onnx", target.precision, built)
            weights = built / files.weights if files.weights else None
            engines.append(open_engine(target.engine, built / files.model, weights, target.precision, contract))
            sizes.append(sum(file.stat().st_size for file in built.iterdir()))
        with engines[0] as first, engines[1] as second:
            pairs = _time(first, second, {"x": x})
    seconds_before, seconds_after = (statistics.median(side) for side in zip(*pairs, strict=True))
    low, speedup, _ = statistics.quantiles([a / b for a, b in pairs])
    return Gain(seconds_before, seconds_after, speedup, low, *sizes)


def _time(first: Engine, second: Engine, arrays: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Seconds per call of both, in pairs taken in turn, so that what else the machine does falls on both."""

    def seconds(engine: Engine, times: int) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            engine(arrays)
        return (time.perf_counter() - begin) / times

    for engine in (first, second):
        engine(arrays)
    times = max(1, round(SAMPLE_S / seconds(first, 3)))
    return [(seconds(first, times), seconds(second, times)) for _ in range(PAIRS)]


def _write(model: Path, shape: Sequence[int], chain: Sequence[Floats]) -> Component:
    """An ONNX model of the chain, its weights beside it, and its contract."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from slipcast_compiler.export.component import OPSET

    convolution = len(shape) == 4
    nodes, constants, last = [], [], "x"
    for i, weight in enumerate(chain):
        matrix = weight[:, :, None, None] if convolution else np.ascontiguousarray(weight.T)
        constants.append(numpy_helper.from_array(matrix, f"w{i}"))
        nodes.append(helper.make_node("Conv" if convolution else "MatMul", [last, f"w{i}"], [f"h{i}"]))
        last = f"h{i}"
    outputs = len(chain[-1])
    bias = np.ones((outputs, 1, 1) if convolution else outputs, np.float32)  # one of zeros would be optimised away
    constants.append(numpy_helper.from_array(bias, "bias"))
    nodes.append(helper.make_node("Add", [last, "bias"], ["y"]))
    result = [*shape[:1], outputs, *shape[2:]] if convolution else [*shape[:-1], outputs]
    named: dict[str, list[int | str]] = {"x": ["batch", *shape[1:]], "y": ["batch", *result[1:]]}
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, named[name]) for name in ("x", "y"))
    graph = helper.make_graph(nodes, "layer", [x], [y], constants)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.save_model(proto, model, save_as_external_data=True, location=f"{model.name}.data", size_threshold=0)
    specs = {name: TensorSpec(name=name, dtype="float32", shape=tuple(dims)) for name, dims in named.items()}
    return Component(inputs=(specs["x"],), outputs=(specs["y"],))
