"""A denoiser that was cut, as a bundle has it, beside the whole one: the table, the packed row, and what ships."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slipcast.bundle.manifest import Component, Sampling
from slipcast.engines.onnxruntime import open_engine
from slipcast.run.step_table import read_step_table
from slipcast.sampling.schedules import NoiseProcess
from slipcast_compiler.export.parts import STEP_TABLE, export_parts, write_step_table
from slipcast_compiler.host.cache import Cache

SAMPLING = Sampling(
    sampler="heun", schedule="leading", steps=3, guidance_scale=1.0, noise=NoiseProcess(prediction="epsilon")
)


@pytest.fixture(scope="module", params=["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def exported(request: pytest.FixtureRequest, exported_denoiser: Callable[[str], Path]) -> Path:
    return exported_denoiser(request.param)


def _run(file: Path, arrays: dict[str, Any]) -> dict[str, Any]:
    with open_engine(file, None, "fp32") as engine:
        return engine({spec.name: arrays[spec.name] for spec in engine.inputs})


def test_table_and_parts_make_what_the_whole_makes(exported: Path, tmp_path: Path) -> None:
    parts = export_parts(exported, False, Cache(tmp_path / "cache"))
    assert list(parts) == ["denoiser", "denoiser_prompt"]
    recorded = write_step_table(parts["denoiser"], SAMPLING, tmp_path)
    rows = read_step_table(tmp_path / STEP_TABLE, recorded)
    assert len(rows) >= 3
    contract = Component.model_validate_json((parts["denoiser"] / "denoiser.json").read_text())
    assert [spec.name for spec in contract.inputs][-1] == "row"
    with open_engine(exported / "denoiser.onnx", None, "fp32") as whole:
        random = np.random.default_rng(0)
        arrays: dict[str, Any] = {
            spec.name: random.standard_normal([d if isinstance(d, int) else 2 for d in spec.shape], np.float32)
            for spec in whole.inputs
        }
        arrays |= _run(parts["denoiser_prompt"] / "denoiser_prompt.onnx", arrays)
        predictions = []
        for timestep, row in rows.items():
            arrays["timestep"] = np.array([timestep], np.float32)
            wanted = whole({spec.name: arrays[spec.name] for spec in whole.inputs})["prediction"]
            found = _run(parts["denoiser"] / "denoiser.onnx", arrays | row)["prediction"]
            assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)
            predictions.append(found)
    assert np.linalg.norm(predictions[0] - predictions[1]) > 1e-4 * np.linalg.norm(predictions[0])


def test_general_ships_what_makes_rows(exported: Path, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    parts = export_parts(exported, True, cache)
    assert list(parts) == ["denoiser", "denoiser_prompt", "denoiser_step"]
    assert export_parts(exported, False, cache)["denoiser"] == parts["denoiser"]  # the same work
    recorded = write_step_table(parts["denoiser"], SAMPLING, tmp_path)
    for timestep, row in read_step_table(tmp_path / STEP_TABLE, recorded).items():
        made = _run(parts["denoiser_step"] / "denoiser_step.onnx", {"timestep": np.array([timestep], np.float32)})
        assert made.keys() == row.keys()
        np.testing.assert_array_equal(made["row"], row["row"])
