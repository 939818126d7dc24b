"""Row 39: memory that runs out while decoding costs time, and at last tiles, but no picture."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
from fakes import Fakes, document, write_fake

from slipcast.errors import ResourceError
from slipcast.run.decoding import out_of_memory
from slipcast.run.pipeline import Pipeline, load

PROMPT, CELLS = "a red circle", 32


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return fakes.install(monkeypatch)


@pytest.fixture
def pipe(tmp_path: Path, engines: Fakes) -> Pipeline:
    """Of latents of 32 cells in tiles of 32: whole, then in tiles of 16 and of 8."""
    return load(write_fake(tmp_path / "b", **_large()))


def _large() -> dict[str, Any]:
    wanted = document(Path("nowhere"))
    size = CELLS * fakes.FACTOR
    wanted["image"] |= {"width": size, "height": size, "tile": CELLS, "overlap": 8}
    for spec in (*wanted["components"]["denoiser"]["inputs"], *wanted["components"]["denoiser"]["outputs"]):
        spec["shape"] = ["b", 4, CELLS, CELLS] if spec["name"] in ("sample", "prediction") else spec["shape"]
    return {"image": wanted["image"], "components": wanted["components"]}


def _room_for(engines: Fakes, cells: int, loaded: int = 9, error: Exception | None = None) -> None:
    """A decoder with room for so many cells along a side, beside so many engines."""

    def decode(arrays: Any) -> Any:
        if arrays["latent"].shape[2] > cells or len(engines.open_now) > loaded:
            raise error or RuntimeError("Exception from src/inference: std::bad_alloc")
        return fakes.decode(arrays)

    engines.functions["vae_decoder"] = decode


def _draw(pipe: Pipeline) -> Any:
    return pipe(PROMPT, seed=1, output_type="np").images


def test_row_39_whole_after_freeing_others(pipe: Pipeline, engines: Fakes, caplog: pytest.LogCaptureFixture) -> None:
    expected = _draw(pipe)
    _room_for(engines, CELLS, loaded=1)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(_draw(pipe), expected)
    assert engines.open_now == ["vae_decoder"] and "without other engines" in caplog.text
    engines.functions["vae_decoder"] = fakes.decode
    np.testing.assert_array_equal(_draw(pipe), expected)  # what was freed is opened again, and stays
    assert sorted(engines.open_now) == sorted(fakes.COMPONENTS)
    pipe.close()
    assert engines.open_now == []


@pytest.mark.parametrize(("room", "sizes"), [(16, {32, 16}), (8, {32, 16, 8})])
def test_row_39_then_in_smaller_tiles(
    pipe: Pipeline, engines: Fakes, caplog: pytest.LogCaptureFixture, room: int, sizes: set[int]
) -> None:
    expected = _draw(pipe)
    _room_for(engines, room)
    engines.calls.clear()
    np.testing.assert_allclose(_draw(pipe), expected, atol=1e-6)  # this decoder sees no further than a cell
    assert {call.latent.shape[2] for name, call in engines.calls if name == "vae_decoder"} == sizes
    assert f"in tiles of {room} latent cells" in caplog.text


def test_row_39_then_it_says_so(pipe: Pipeline, engines: Fakes) -> None:
    _room_for(engines, 4)
    with pytest.raises(ResourceError, match="in the smallest tiles too") as caught:
        _draw(pipe)
    assert caught.value.exit_code == 5 and "std::bad_alloc" in str(caught.value)
    engines.functions["vae_decoder"] = fakes.decode
    assert _draw(pipe).shape == (1, 64, 64, 3)


def test_row_39_from_a_gpu_to_the_cpu(
    tmp_path: Path, engines: Fakes, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = document(Path("nowhere"))["targets"]
    targets[0] |= {"engine": "onnxruntime-gpu", "device": "cuda", "components": targets[1]["components"]}
    monkeypatch.setattr("slipcast.run.pipeline.refusal", lambda target: None)
    pipe = load(write_fake(tmp_path / "gpu", **_large(), targets=targets))
    expected = _draw(pipe)

    def decode(arrays: Any) -> Any:
        if engines.calls[-1][1].precision == "bf16":
            raise MemoryError
        return fakes.decode(arrays)

    engines.functions["vae_decoder"] = decode
    np.testing.assert_array_equal(_draw(pipe), expected)
    assert "on the CPU, by onnxruntime-cpu-fp32" in caplog.text and engines.opened[-1] == ("vae_decoder", "fp32")


def test_what_is_not_about_memory_is_not_tried_again(pipe: Pipeline, engines: Fakes) -> None:
    _room_for(engines, 4, error=RuntimeError("shapes do not fit"))
    engines.calls.clear()
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        _draw(pipe)
    assert engines.count("vae_decoder") == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("Failed to allocate memory for requested buffer of size 42"), True),
        (RuntimeError("CUDA out of memory"), True),
        (RuntimeError("the graph could not be read"), False),
        (ValueError("allocation of seats"), False),
    ],
)
def test_what_memory_errors_look_like(error: Exception, expected: bool) -> None:
    assert out_of_memory(error) == expected
