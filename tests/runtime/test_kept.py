"""Compiled graphs that stay from one process to the next: the same numbers, and nothing that others could write."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slipcast.bundle.reader import BundleFile
from slipcast.bundle.records import FileEntry
from slipcast.engines import kept
from slipcast.errors import HostError

module = pytest.importorskip("slipcast.engines.openvino")
X = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(kept.VARIABLE, str(tmp_path / "kept"))
    return tmp_path / "kept"


def _write(root: Path, factor: float = 3.0) -> tuple[BundleFile, BundleFile]:
    """x times `factor`, as files of a bundle."""
    ops = module.openvino.opset13
    x = ops.parameter([-1, 3], np.float32, name="x")
    product = ops.multiply(x, np.full((1, 3), factor, np.float32), name="z")
    for node in (x, product):
        node.output(0).get_tensor().set_names({node.get_friendly_name()})
    module.openvino.save_model(module.openvino.Model([product], [x], "times"), root / "m.xml", compress_to_fp16=False)
    files = [(root / name).read_bytes() for name in ("m.xml", "m.bin")]
    entries = [
        FileEntry(path=name, size=len(data), sha256=hashlib.sha256(data).hexdigest())
        for name, data in zip(("m.xml", "m.bin"), files, strict=True)
    ]
    return BundleFile(root, entries[0]), BundleFile(root, entries[1])


def _run(files: tuple[BundleFile, BundleFile], x: Any = X) -> Any:
    with module.OpenVinoEngine(*files, "fp32") as engine:
        return engine({"x": x})["z"]


def _compiles(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One more entry for every graph that is stored, and so was compiled."""
    counted: list[int] = []
    monkeypatch.setattr(module, "store", lambda key, make: (counted.append(1), kept.store(key, make)))
    return counted


def test_a_graph_is_compiled_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, compiled = _write(tmp_path), _compiles(monkeypatch)
    for _ in range(3):
        np.testing.assert_array_equal(_run(files), 3 * X)
    assert len(compiled) == len(list(folder.iterdir())) == 1
    np.testing.assert_array_equal(_run(files, X[:1]), 3 * X[:1])  # other shapes, another graph
    assert len(compiled) == 2


def test_other_weights_are_another_graph(folder: Path, tmp_path: Path) -> None:
    np.testing.assert_array_equal(_run(_write(tmp_path)), 3 * X)
    np.testing.assert_array_equal(_run(_write(tmp_path, 5.0)), 5 * X)
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("spoil", ["truncated", "another", "empty", "not a graph"])
def test_what_is_damaged_is_made_again(
    spoil: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, compiled = _write(tmp_path), _compiles(monkeypatch)
    _run(files)
    (file,) = folder.iterdir()
    good, junk = file.read_bytes(), b"no graph" * 8
    file.write_bytes(
        {
            "truncated": good[:-7], "another": good[:40] + b"\0" * (len(good) - 40), "empty": b"",
            "not a graph": hashlib.sha256(junk).digest() + junk,
        }[spoil]
    )  # fmt: skip
    np.testing.assert_array_equal(_run(files), 3 * X)
    assert len(compiled) == 2
    assert file.read_bytes()[:32] == hashlib.sha256(file.read_bytes()[32:]).digest()
    _run(files)
    assert len(compiled) == 2


def test_a_directory_that_others_can_write_to(folder: Path, tmp_path: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(HostError, match=r"others can write to(.|\n)*chmod 700"):
        _run(_write(tmp_path))


def test_a_directory_that_cannot_be_made(folder: Path, tmp_path: Path) -> None:
    folder.write_text("a file")
    with pytest.raises(HostError, match="cannot be used"):
        _run(_write(tmp_path))


def test_what_cannot_be_kept_is_no_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept.os, "replace", refuse)
    np.testing.assert_array_equal(_run(_write(tmp_path)), 3 * X)
    assert "No space left on device" in caplog.text
    assert not list(folder.iterdir())


def test_nothing_is_kept_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(kept.VARIABLE, raising=False)
    files = _write(tmp_path)
    before = sorted(tmp_path.iterdir())
    _run(files)
    assert sorted(tmp_path.iterdir()) == before
