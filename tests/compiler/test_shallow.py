"""The cut that feature caching makes, on U-Nets of random weights: with a step's own features it changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from slipcast.bundle.manifest import Component
from slipcast.bundle.onnxfile import external_files
from slipcast.engines import Engine
from slipcast.engines import onnxruntime as portable
from slipcast.errors import RecipeError
from slipcast_compiler.engines import BUILDERS
from slipcast_compiler.export.parts import export_parts
from slipcast_compiler.graph.shallow import find_cut
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.schedule.caching import export_split

SHARES = (0.3, 0.6)


@pytest.fixture(scope="module", params=["sd15", pytest.param("sdxl", marks=pytest.mark.slow), "sd15 parts"])
def source(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, exported_denoiser: Callable[[str], Path]
) -> Path:
    name, *parts = request.param.split()
    folder = exported_denoiser(name)
    return export_parts(folder, False, Cache(tmp_path_factory.mktemp("cache")))["denoiser"] if parts else folder


def _inputs(engine: Engine, batch: int) -> dict[str, Any]:
    random = np.random.default_rng(batch)
    arrays: dict[str, Any] = {
        spec.name: random.standard_normal([d if isinstance(d, int) else batch for d in spec.shape], np.float32)
        for spec in engine.inputs
    }
    if "timestep" in arrays:
        arrays["timestep"][:] = 437.0
    return arrays


def _given(engine: Engine, arrays: dict[str, Any]) -> dict[str, Any]:
    return {spec.name: arrays[spec.name] for spec in engine.inputs}


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("batch", [1, 3])
def test_with_its_own_features_the_shallow_one_gives_what_the_whole_does(
    source: Path, tmp_path: Path, share: float, batch: int
) -> None:
    folder = export_split(source, share, Cache(tmp_path / "cache"))
    feature = json.loads((folder / "cut.json").read_text())["feature"]
    with (
        portable.open_engine(source / "denoiser.onnx", None, "fp32") as whole,
        portable.open_engine(folder / "denoiser.onnx", None, "fp32") as full,
        portable.open_engine(folder / "denoiser_shallow.onnx", None, "fp32") as shallow,
    ):
        arrays = _inputs(whole, batch)
        wanted, given = whole(arrays)["prediction"], full(_given(full, arrays))
        np.testing.assert_allclose(given["prediction"], wanted, rtol=1e-5, atol=1e-5)
        arrays[feature] = given[feature]
        found = shallow(_given(shallow, arrays))["prediction"]
        assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)
        for name in (feature, "sample"):  # otherwise the equality would not see a wrong one
            other = arrays | {name: arrays[name] + np.float32(0.5)}
            assert np.linalg.norm(shallow(_given(shallow, other))["prediction"] - wanted) > 1e-3


def test_the_most_that_is_allowed_is_left(source: Path, tmp_path: Path) -> None:
    graph = ir.load(source / "denoiser.onnx").graph
    shares = [find_cut(graph, ceiling).share for ceiling in (0.2, 0.4, 0.6, 0.8)]
    assert shares == sorted(shares) and len(set(shares)) > 2
    assert all(share <= ceiling for share, ceiling in zip(shares, (0.2, 0.4, 0.6, 0.8), strict=True))
    engines = json.loads((export_split(source, 0.6, Cache(tmp_path)) / "cut.json").read_text())["engines"]
    full, shallow = engines["denoiser"], engines["denoiser_shallow"]
    assert shallow["multiply_adds"] == pytest.approx(shares[2] * full["multiply_adds"])
    assert shallow["nodes"] < full["nodes"] and shallow["parameters"] < 0.6 * full["parameters"]


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_both_have_one_file_of_weights(source: Path, tmp_path: Path, engine: str) -> None:
    folder = export_split(source, 0.4, Cache(tmp_path / "cache"))
    assert external_files(folder / "denoiser_shallow.onnx") == {"denoiser.onnx.data"}
    built = {}
    for name in ("denoiser", "denoiser_shallow"):  # each in a place of its own, as the cache has them
        (tmp_path / name).mkdir()
        built[name] = BUILDERS[engine](folder / f"{name}.onnx", "fp32", tmp_path / name)
    weights = built["denoiser"].weights
    assert weights and built["denoiser_shallow"].weights == weights
    assert (tmp_path / "denoiser" / weights).read_bytes() == (tmp_path / "denoiser_shallow" / weights).read_bytes()
    assert len(list((tmp_path / "denoiser_shallow").iterdir())) == 2


@pytest.mark.parametrize("name", ["sd3", "pixart", "flux"])
def test_a_denoiser_without_skip_connections_is_refused(name: str, exported_denoiser: Callable[[str], Path]) -> None:
    """What is left behind a cut there would not see the latent."""
    graph = ir.load(exported_denoiser(name) / "denoiser.onnx").graph
    with pytest.raises(RecipeError, match="no place where one feature crosses"):
        find_cut(graph, 0.5)


def test_contracts_go_with_the_graphs(source: Path, tmp_path: Path) -> None:
    folder = export_split(source, 0.4, Cache(tmp_path))
    full, shallow = (
        Component.model_validate_json((folder / f"{name}.json").read_text())
        for name in ("denoiser", "denoiser_shallow")
    )
    crossing = [spec for spec in shallow.inputs if spec in full.outputs]
    assert len(crossing) == 1 and crossing[0].shape[0] == "batch"
    assert {spec.name for spec in shallow.inputs} - {crossing[0].name} <= {spec.name for spec in full.inputs}


def test_people_are_told_where_it_is(source: Path, tmp_path: Path) -> None:
    cut = json.loads((export_split(source, 0.4, Cache(tmp_path)) / "cut.json").read_text())
    assert cut["after"].startswith("up_blocks.")
