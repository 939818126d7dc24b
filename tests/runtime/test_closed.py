"""A closed family in the pipeline: conditioning comes from a table, and other prompts are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
from bundles import list_files
from click.testing import CliRunner
from fakes import LENGTH, WIDTH, Fakes, spec, write_fake
from safetensors.numpy import save_file

from slipcast.cli.main import cli
from slipcast.errors import ArtifactError, RequestError
from slipcast.run.pipeline import load
from slipcast.run.tokenizer import PromptTokenizer

RED, BLUE, TABLE = "a red circle", "a small blue star", "prompts.safetensors"
PROMPTS = ("", RED, BLUE)


def _closed(root: Path, **changes: Any) -> Path:
    """The fake bundle without its text encoder; `changes` replace keys of the record of its prompts."""
    write_fake(root)
    ids = PromptTokenizer(root / "tokenizer.json", LENGTH, 655)(PROMPTS)
    save_file({"context": fakes.encode({"input_ids": ids})["hidden"]}, root / TABLE)
    for file in (root / "tokenizer.json", *root.glob("text_encoder.*")):
        file.unlink()
    record = {"table": TABLE, "prompts": PROMPTS, "outputs": [spec("context", LENGTH, WIDTH)]} | changes
    document = json.loads((root / "manifest.json").read_text())
    for holder in (document, *document["targets"]):
        del holder["components"]["text_encoder"]
    return _rewrite(root, document | {"text": [], "prompts": record, "requires": ["closed_family"]})


def _rewrite(root: Path, document: dict[str, Any]) -> Path:
    (root / "manifest.json").write_text(json.dumps(document | {"files": list_files(root)}))
    return root


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return fakes.install(monkeypatch)


@pytest.mark.parametrize("negative", [None, "", RED])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_same_pictures_without_an_encoder(
    tmp_path: Path, engines: Fakes, negative: str | None, scale: float
) -> None:
    request: Any = {"negative_prompt": negative, "guidance_scale": scale, "seed": 3, "output_type": "np"}
    prompts = [BLUE, RED, BLUE]
    expected = load(write_fake(tmp_path / "open"))(prompts, **request).images
    engines.opened.clear()
    pipe = load(_closed(tmp_path / "closed"))
    np.testing.assert_array_equal(pipe(prompts, **request).images, expected)
    assert {name for name, _ in engines.opened} == {"denoiser", "vae_decoder"}


def test_other_prompts_are_refused_with_the_nearest(tmp_path: Path, engines: Fakes) -> None:
    pipe = load(_closed(tmp_path / "b"))
    with pytest.raises(RequestError, match=r"prompt is not of .* closed family") as caught:
        pipe([RED, "a small blue square"])
    assert caught.value.got == "'a small blue square'"
    assert f"one of 2 prompts, the nearest: {BLUE!r}" in str(caught.value)
    with pytest.raises(RequestError, match=f"one of 2 prompts, such as {RED!r}"):
        pipe("0123456789")
    with pytest.raises(RequestError, match="negative_prompt is not of") as caught:
        pipe(RED, negative_prompt="a blue star")
    assert f"{BLUE!r}, or none" in str(caught.value)
    with pytest.raises(RequestError, match="prompt is not usable"):
        pipe()
    assert engines.calls == []


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"context": np.zeros((2, LENGTH, WIDTH), np.float32)}, "not the table"),
        ({"context": np.zeros((3, LENGTH, WIDTH), np.float64)}, "not the table"),
        ({"context": np.zeros((3, LENGTH, WIDTH + 1), np.float32)}, "not the table"),
        ({"text": np.zeros((3, LENGTH, WIDTH), np.float32)}, "not the table"),
        ({"context": np.full((3, LENGTH, WIDTH), np.nan, np.float32)}, "NaN"),
    ],
)
def test_a_table_that_is_not_the_manifests(tmp_path: Path, engines: Fakes, table: dict[str, Any], says: str) -> None:
    root = _closed(tmp_path / "b")
    save_file(table, root / TABLE)
    with pytest.raises(ArtifactError, match=says):
        load(_rewrite(root, json.loads((root / "manifest.json").read_text())))


def test_a_damaged_table_is_found_before_it_is_read(tmp_path: Path, engines: Fakes) -> None:
    root = _closed(tmp_path / "b")
    data = bytearray((root / TABLE).read_bytes())
    data[-1] ^= 1
    (root / TABLE).write_bytes(data)
    with pytest.raises(ArtifactError, match=f"{TABLE}: content differs"):
        load(root)


@pytest.mark.parametrize(
    "output",
    [
        spec("context", LENGTH, WIDTH + 1),
        spec("context", LENGTH * WIDTH),
        spec("context", LENGTH, WIDTH, dtype="float16"),
        spec("other", LENGTH, WIDTH),
    ],
)
def test_row_14_a_table_that_the_denoiser_cannot_take(tmp_path: Path, engines: Fakes, output: Any) -> None:
    with pytest.raises(ArtifactError, match=r"components\.denoiser"):
        load(_closed(tmp_path / "b", outputs=[output]))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"requires": []}, "closed_family has to be named"),
        ({"prompts": None}, "closed_family has to be named"),
        ({"text": [fakes.document(Path("nowhere"))["text"][0] | {"tokenizer": TABLE}]}, "not both"),
    ],
)
def test_manifests_that_contradict_themselves(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    root = _closed(tmp_path / "b")
    with pytest.raises(ArtifactError, match=says):
        load(_rewrite(root, json.loads((root / "manifest.json").read_text()) | changes))


@pytest.mark.parametrize(("prompts", "says"), [(["", RED, RED], "listed twice"), ([RED, BLUE, "x"], "empty prompt")])
def test_lists_that_cannot_be_used(tmp_path: Path, prompts: list[str], says: str) -> None:
    with pytest.raises(ArtifactError, match=says):
        load(_closed(tmp_path / "b", prompts=prompts))


def test_the_command_line(tmp_path: Path, engines: Fakes) -> None:
    root = str(_closed(tmp_path / "b"))
    shown = CliRunner().invoke(cli, ["inspect", root])
    assert "prompts      2 and the empty one, 0.0 MB: no text encoder" in shown.output
    missing = CliRunner().invoke(cli, ["run", root, "-o", str(tmp_path / "a.png")])
    assert (missing.exit_code, "--prompt is missing" in missing.output) == (2, True)
    drawn = CliRunner().invoke(cli, ["run", root, "--prompt", RED, "-o", str(tmp_path / "a.png")])
    assert drawn.exit_code == 0, drawn.output
