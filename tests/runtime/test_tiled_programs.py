"""A captured program whose decoder is called tile by tile."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import programs
import pytest
from fakes import Fakes, spec
from programs import call, write_program

import slipcast
from conftest import call_cli
from slipcast.errors import ArtifactError, ResourceError

PROMPT = "a red circle"


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return programs.use(fakes.install(monkeypatch))


def tiled(tile: int, overlap: int, smallest: int) -> dict[str, Any]:
    """Changes of the manifest, with which the latents of 8 x 8 cells are decoded in tiles."""
    parts, program = programs.components(), programs.program()
    parts["decoder"] = {
        "inputs": [spec("latent", 1, 4, "height", "width")],
        "outputs": [spec("image", 1, 3, "2*height", "2*width")],
    }
    axes = [{"input": dim, "output": dim, "factor": 2} for dim in (2, 3)]
    tiles = {"input": "latent", "axes": axes, "tile": tile, "overlap": overlap, "smallest": smallest}
    decoder = {**call("decoder", {"latent": "x1"}, {"image": "image"}), "tiles": tiles}
    program["calls"] = [*program["calls"][:-1], decoder]
    sizes = {name: {"minimum": smallest, "maximum": tile} for name in ("height", "width")}
    return {"components": parts, "program": program | {"sizes": sizes}, "requires": ["program", "tiled_decode"]}


def decoded(engines: Fakes) -> list[tuple[int, ...]]:
    return [given.latent.shape[2:] for name, given in engines.calls if name == "decoder"]


def draw(path: Path) -> Any:
    with slipcast.load(path) as pipe:
        return pipe(PROMPT, seed=3, output_type="np").images


def test_tiles_of_a_decoder_that_sees_one_cell_are_the_whole(tmp_path: Path, engines: Fakes) -> None:
    whole = draw(write_program(tmp_path / "whole"))
    engines.calls.clear()
    path = write_program(tmp_path / "tiled", **tiled(5, 2, 2))
    np.testing.assert_allclose(draw(path), whole, atol=1e-6)
    assert decoded(engines) == [(5, 5)] * 4
    assert "decoder, of 5 cells a side at most, of which 2 are its neighbour's too" in call_cli(
        "inspect", str(path)
    ).stdout.replace("\n", " ")


@pytest.mark.parametrize(("smallest", "sizes"), [(2, [(5, 5), (5, 5), (2, 2)]), (5, None)])
def test_where_memory_runs_out_tiles_are_smaller(
    tmp_path: Path, engines: Fakes, smallest: int, sizes: list[tuple[int, int]] | None
) -> None:
    """Down to the smallest that the engine takes."""
    whole = draw(write_program(tmp_path / "whole"))

    def decode(arrays: Any) -> Any:
        if arrays["latent"].shape[2] > 3:
            raise RuntimeError("std::bad_alloc")
        return programs.decode(arrays)

    engines.functions["decoder"] = decode
    engines.calls.clear()
    path = write_program(tmp_path / "tiled", **tiled(5, 2, smallest))
    if sizes is None:
        with pytest.raises(ResourceError, match="bad_alloc"):
            draw(path)
        assert decoded(engines) == [(5, 5)] * 2  # the second time without other engines in memory
        return
    np.testing.assert_allclose(draw(path), whole, atol=1e-6)
    assert decoded(engines)[:3] == sizes and set(decoded(engines)[2:]) == {(2, 2)}


def with_statistics(changes: dict[str, Any]) -> dict[str, Any]:
    """The same, with a decoder that takes its mean from its input, or is given it."""
    decoder = changes["components"]["decoder"]
    decoder["inputs"].append(spec("mean", 1))
    decoder["outputs"].append(spec("taken", 1))
    changes["program"]["calls"][-1]["tiles"]["statistics"] = {"input": "mean", "output": "taken", "size": 1}
    return changes


def test_all_tiles_take_the_statistics_of_the_whole(tmp_path: Path, engines: Fakes) -> None:
    """They are those of the latent made as small as a tile; where it is one, its own."""

    def decode(arrays: Any) -> Any:
        mean = arrays["mean"] if arrays["mean"].any() else arrays["latent"].mean(keepdims=True).reshape(1)
        return programs.decode({"latent": arrays["latent"] - mean}) | {"taken": mean}

    engines.functions["decoder"] = decode
    draw(write_program(tmp_path / "whole", **with_statistics(tiled(8, 2, 2))))
    (whole,) = [given for name, given in engines.calls if name == "decoder"]
    assert not whole.mean.any()
    engines.calls.clear()
    draw(write_program(tmp_path / "tiled", **with_statistics(tiled(4, 0, 2))))
    first, *tiles = [given for name, given in engines.calls if name == "decoder"]
    assert not first.mean.any() and len(tiles) == 4
    np.testing.assert_array_equal(first.latent, whole.latent[:, :, ::2, ::2])
    for tile in tiles:
        np.testing.assert_allclose(tile.mean, first.latent.mean(), rtol=1e-5)


WRONG: dict[str, tuple[Callable[[Any], Any], str]] = {
    "not required": (lambda m: m.update(requires=["program"]), "requires has to name program and tiled_decode"),
    "input": (lambda m: tiles_of(m).update(input="picture"), "'picture' has to be a value"),
    "overlap": (lambda m: tiles_of(m).update(overlap=5), "overlap has to be smaller than the tile"),
    "smallest": (lambda m: tiles_of(m).update(smallest=6), "smallest is larger than the tile"),
    "no axes": (lambda m: tiles_of(m).update(axes=[]), "at least 1 item"),
    "one axis twice": (lambda m: tiles_of(m)["axes"][1].update(output=2), "one dimension of the output"),
    "no such axis": (lambda m: tiles_of(m)["axes"][0].update(input=4), "latent has 4 dimensions"),
    "no such output": (lambda m: tiles_of(m)["axes"][0].update(output=5), "has 4 dimensions, and tiles one more"),
    "statistics of another size": (
        lambda m: tiles_of(m).update(statistics={"input": "mean", "output": "taken", "size": 2}),
        "decoder has no 'mean' of 2 numbers",
    ),
    "statistics of the latent": (
        lambda m: tiles_of(m).update(statistics={"input": "latent", "output": "image", "size": 2}),
        "'latent' is what is cut into tiles",
    ),
    "factor": (lambda m: tiles_of(m)["axes"][0].update(factor=0), "greater than or equal to 1"),
}


def tiles_of(manifest: Any) -> Any:
    return manifest["program"]["calls"][-1]["tiles"]


@pytest.mark.parametrize(("change", "says"), WRONG.values(), ids=WRONG)
def test_what_tiles_may_not_be(change: Any, says: str, tmp_path: Path, engines: Fakes) -> None:
    path = write_program(tmp_path / "b", **tiled(5, 2, 2))
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=says):
        slipcast.load(path)


def test_a_decoder_that_gives_another_size_is_told(tmp_path: Path, engines: Fakes) -> None:
    """As a manifest with another factor than its engine's would."""
    engines.functions["decoder"] = lambda arrays: {"image": arrays["latent"][:, :3]}
    with pytest.raises(ArtifactError, match=r"decoder gives 5 cells .* where tiles say 10"):
        draw(write_program(tmp_path / "b", **tiled(5, 2, 2)))
