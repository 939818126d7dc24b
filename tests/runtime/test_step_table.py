"""A parts denoiser in the pipeline: what left the loop comes from a table and from a component that runs once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
from bundles import list_files
from fakes import LENGTH, WIDTH, Fakes, spec, write_fake
from safetensors.numpy import save_file

from slipcast.bundle.manifest import read_manifest
from slipcast.errors import ArtifactError, RequestError
from slipcast.run.pipeline import Pipeline, load
from slipcast.run.step_table import evaluated_timesteps
from slipcast.sampling.samplers import SAMPLERS

PROMPT, TABLE = "a red circle", "steps.safetensors"


def _cut(root: Path, *, general: bool = False, sampling: Mapping[str, Any] | None = None, **changes: Any) -> Path:
    """The fake bundle with its denoiser in parts: the row is the timestep, the keys are the context."""
    write_fake(root)
    document = json.loads((root / "manifest.json").read_text())
    document["sampling"] |= sampling or {}
    components, row, keys = document["components"], spec("row", 1, 2), spec("keys", "b", LENGTH, WIDTH)
    components["denoiser"]["inputs"][1:] = [row, keys]
    components["denoiser_prompt"] = {"inputs": [spec("context", "b", LENGTH, WIDTH)], "outputs": [keys]}
    if general:
        components["denoiser_step"] = {"inputs": [spec("timestep", 1)], "outputs": [row]}
    for name in ("denoiser_prompt", "denoiser_step")[: 1 + general]:
        fakes.write_engines(root, name)
        for target in document["targets"]:
            target["components"][name] = fakes.engine_files(target["engine"], name)
    plain = read_manifest(json.dumps(document | {"files": list_files(root)}).encode())
    timesteps = evaluated_timesteps(plain.sampling, plain.sampling.lay())
    save_file({"row": np.array([[[t, 0]] for t in timesteps], np.float32)}, root / TABLE)
    document |= {"cut": {"step_table": TABLE, "timesteps": timesteps, "rows": [row]}, "requires": ["cut"]}
    document |= {"files": list_files(root)} | changes
    (root / "manifest.json").write_text(json.dumps(document))
    return root


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    installed = fakes.install(monkeypatch)

    def denoise(arrays: Mapping[str, Any]) -> dict[str, Any]:
        if "timestep" in arrays:
            return fakes.predict(arrays)
        assert set(arrays) == {"sample", "row", "keys"}
        return fakes.predict({"sample": arrays["sample"], "context": arrays["keys"], "timestep": arrays["row"][0]})

    installed.functions |= {
        "denoiser": denoise,
        "denoiser_prompt": lambda arrays: {"keys": arrays["context"]},
        "denoiser_step": lambda arrays: {"row": np.stack([arrays["timestep"], arrays["timestep"] * 0], 1)},
    }
    return installed


def _image(pipe: Pipeline, **arguments: Any) -> Any:
    return pipe(PROMPT, seed=3, output_type="np", **arguments).images


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_staged_makes_the_same_pictures(tmp_path: Path, engines: Fakes, sampler: str) -> None:
    """With every sampler: some evaluate the denoiser between the timesteps of their schedule."""
    document = json.loads((write_fake(tmp_path / "whole") / "manifest.json").read_text())
    sampling = document["sampling"] | {"sampler": sampler}
    whole = load(write_fake(tmp_path / "plain", sampling=sampling))
    parts = load(_cut(tmp_path / "parts", sampling={"sampler": sampler}))
    np.testing.assert_array_equal(_image(parts, guidance_scale=3.0), _image(whole, guidance_scale=3.0))
    np.testing.assert_array_equal(_image(parts, guidance_scale=1.0), _image(whole, guidance_scale=1.0))


def test_the_prompts_part_runs_once_on_distinct_prompts(tmp_path: Path, engines: Fakes) -> None:
    pipe = load(_cut(tmp_path / "b"))
    pipe([PROMPT, "a blue star", PROMPT], seed=1)
    assert engines.count("denoiser_prompt") == 1 and engines.count("denoiser") == 6
    call = next(call for name, call in engines.calls if name == "denoiser_prompt")
    assert len(call.context) == 3  # the empty negative prompt and two others
    assert {len(call.keys) for name, call in engines.calls if name == "denoiser"} == {6}


def test_other_timesteps_are_refused_with_the_legal_ones(tmp_path: Path, engines: Fakes) -> None:
    pipe = load(_cut(tmp_path / "b"))
    with pytest.raises(RequestError, match="num_inference_steps is fixed") as caught:
        pipe(PROMPT, num_inference_steps=7)
    legal = [f"{timestep:g}" for timestep in pipe.manifest.cut.timesteps] if pipe.manifest.cut else []
    assert len(legal) == 6 and all(timestep in str(caught.value) for timestep in legal)
    assert "cut.general=true" in str(caught.value)
    assert engines.calls == []


def test_a_general_bundle_computes_other_rows(tmp_path: Path, engines: Fakes) -> None:
    parts, whole = load(_cut(tmp_path / "b", general=True)), load(write_fake(tmp_path / "plain"))
    np.testing.assert_array_equal(_image(parts, num_inference_steps=7), _image(whole, num_inference_steps=7))
    asked = [float(call.timestep[0]) for name, call in engines.calls if name == "denoiser_step"]
    assert asked and not set(asked) & set(parts.manifest.cut.timesteps if parts.manifest.cut else ())
    engines.calls.clear()
    _image(parts)
    assert engines.count("denoiser_step") == 0  # these are in the table


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"row": np.zeros((5, 1, 2), np.float32)}, "not the table"),
        ({"row": np.zeros((6, 1, 2), np.float64)}, "not the table"),
        ({"rows": np.zeros((6, 1, 2), np.float32)}, "not the table"),
        ({"row": np.full((6, 1, 2), np.nan, np.float32)}, "NaN"),
    ],
)
def test_a_table_that_is_not_the_manifests(tmp_path: Path, engines: Fakes, table: dict[str, Any], says: str) -> None:
    root = _cut(tmp_path / "b")
    save_file(table, root / TABLE)
    document = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps(document | {"files": list_files(root)}))
    with pytest.raises(ArtifactError, match=says):
        load(root)


def test_a_damaged_table_is_found_before_it_is_read(tmp_path: Path, engines: Fakes) -> None:
    root = _cut(tmp_path / "b")
    data = bytearray((root / TABLE).read_bytes())
    data[-1] ^= 1
    (root / TABLE).write_bytes(data)
    with pytest.raises(ArtifactError, match=TABLE):
        load(root)


@pytest.mark.parametrize(
    ("component", "inputs"),
    [
        ("denoiser", [spec("sample", "b", *fakes.LATENT), spec("row", 1, 3), spec("keys", "b", LENGTH, WIDTH)]),
        ("denoiser", [spec("sample", "b", *fakes.LATENT), spec("row", 1, 2), spec("lost", "b", LENGTH, WIDTH)]),
        ("denoiser", [spec("row", 1, 2), spec("keys", "b", LENGTH, WIDTH)]),
        ("denoiser_prompt", [spec("sample", "b", *fakes.LATENT)]),
        ("denoiser_step", [spec("sigma", 1)]),
    ],
)
def test_parts_that_do_not_go_together_are_refused(tmp_path: Path, engines: Fakes, component: str, inputs: Any) -> None:
    root = _cut(tmp_path / "b", general=True)
    document = json.loads((root / "manifest.json").read_text())
    document["components"][component]["inputs"] = inputs
    (root / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=component):
        load(root)


def test_a_reader_that_knows_no_staging_has_to_refuse(tmp_path: Path, engines: Fakes) -> None:
    with pytest.raises(ArtifactError, match="under requires"):
        load(_cut(tmp_path / "b", requires=[]))
