"""Parts of a cut graph compute what the whole one does, and what is bound early has left the loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from slipcast_compiler.graph.cut import count_parts, cut
from slipcast_compiler.graph.weights import load

SHAPES = Path("recipes/models/shapes")
Arrays = dict[str, np.ndarray[Any, Any]]

# What has to be gone from each: which stages there are, and the inputs that the loop still takes.
STAGES = {
    "shapes": ["step", "prompt", "denoise"],
    "sd15": ["step", "prompt", "denoise"],
    "sdxl": ["step", "prompt", "prompt+step", "denoise"],
    "pixart": ["step", "prompt", "denoise"],
    "sd3": ["step", "prompt", "prompt+step", "denoise"],
    "flux": ["step", "prompt", "prompt+step", "denoise"],
}


class Graph:
    """An ONNX file in ONNX Runtime."""

    def __init__(self, file: Path) -> None:
        self._session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def __call__(self, arrays: Arrays) -> Arrays:
        names = [each.name for each in self._session.get_outputs()]
        given = {each.name: arrays[each.name] for each in self._session.get_inputs()}
        return dict(zip(names, self._session.run(names, given), strict=True))


class Case:
    """A denoiser, whole and parts."""

    def __init__(self, name: str, folder: Path, out: Path) -> None:
        self.name = name
        self.model = load(folder / "denoiser.onnx")
        self.cut = cut(load(folder / "denoiser.onnx"))
        for part, model in self.cut.graphs.items():
            ir.save(model, out / f"{part}.onnx", external_data=f"{part}.onnx.data")
        self.whole = Graph(folder / "denoiser.onnx")
        self.parts = {part: Graph(out / f"{part}.onnx") for part in self.cut.graphs}

    def inputs(self, batch: int) -> Arrays:
        random = np.random.default_rng(batch)
        arrays: Arrays = {}
        for value in self.model.graph.inputs:
            shape = [d if isinstance(d, int) else batch for d in value.shape or ()]
            arrays[str(value.name)] = random.standard_normal(shape, np.float32)
        arrays["timestep"][:] = 437.0
        if "encoder_attention_mask" in arrays:
            arrays["encoder_attention_mask"] = (arrays["encoder_attention_mask"] > 0).astype(np.float32)
        return arrays

    def run(self, arrays: Arrays, changed: Arrays | None = None) -> Arrays:
        """Everything that the stages compute; `changed` replaces what they would hand on."""
        values = arrays | (changed or {})
        for part in self.parts.values():
            values |= part(values) | (changed or {})
        return values


def _error(found: Arrays, wanted: Arrays) -> float:
    difference = np.linalg.norm(found["prediction"] - wanted["prediction"])
    return float(difference / np.linalg.norm(wanted["prediction"]))


LARGE = pytest.mark.slow  # half a minute to export


@pytest.fixture(scope="module", params=[pytest.param(name, marks=LARGE) if name == "sdxl" else name for name in STAGES])
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, exported_denoiser: Callable[[str], Path]
) -> Case:
    out = tmp_path_factory.mktemp("parts")
    return Case(request.param, exported_denoiser(request.param), out)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_staged_equals_whole(case: Case, batch: int) -> None:
    arrays = case.inputs(batch)
    wanted = case.whole(arrays)
    assert np.isfinite(wanted["prediction"]).all()
    assert _error(case.run(arrays), wanted) < 1e-5


def test_every_tensor_that_crosses_matters(case: Case) -> None:
    """Otherwise the equality above would not see a wrong one."""
    arrays, random = case.inputs(2), np.random.default_rng(0)
    values = case.run(arrays)
    for crossing in count_parts(case.cut)["crossings"]:
        value = values[crossing["name"]]
        noise = np.asarray(random.standard_normal(value.shape) * (1 + value.std()), value.dtype)
        assert _error(case.run(arrays, {crossing["name"]: value + noise}), values) > 1e-5, crossing


def test_what_is_bound_early_has_left_the_loop(case: Case) -> None:
    assert list(case.cut.graphs) == STAGES[case.name]
    whole, loop = case.model.graph, case.cut.graphs["denoise"].graph
    assert {value.name for value in whole.inputs} & {value.name for value in loop.inputs} == {"sample"}
    assert not {node.op_type for node in loop} & {"Shape", "Constant", "Sin", "Cos"}
    for value in case.cut.graphs["step"].graph.outputs:
        assert value.shape is not None and value.shape[0] == 1  # one row of the table serves every image of a batch


def test_weights_are_in_the_stage_that_uses_them(case: Case) -> None:
    holders: dict[str, list[str]] = {}
    for name, model in case.cut.graphs.items():
        for weight in model.graph.initializers:
            if weight.startswith("model."):  # a parameter, and not a constant of the traced code
                holders.setdefault(weight, []).append(name)
    assert holders and [names for names in holders.values() if len(names) > 1] == []
    figures = count_parts(case.cut)
    parts = figures["parts"].values()
    assert sum(part["parameters"] for part in parts) == pytest.approx(figures["original"]["parameters"], abs=64)
    assert figures["parts"]["denoise"]["parameters"] < 0.97 * figures["original"]["parameters"]
    assert figures["parts"]["denoise"]["nodes"] < 0.9 * figures["original"]["nodes"]
