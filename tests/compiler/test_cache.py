"""FAULTS rows 28 and 29: damaged entries are kept aside and rebuilt; everything that matters is in the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from slipcast_compiler.host import cache as module
from slipcast_compiler.host.cache import Cache


def _writer(text: str, calls: list[str]):  # type: ignore[no-untyped-def]
    def build(folder: Path) -> None:
        calls.append(text)
        (folder / "x.txt").write_text(text)

    return build


def test_built_once_per_input(tmp_path: Path) -> None:
    cache, calls = Cache(tmp_path / "cache"), []
    first = cache.get("stage", {"a": 1}, _writer("one", calls))
    assert cache.get("stage", {"a": 1}, _writer("one", calls)) == first
    assert calls == ["one"]
    assert (first / "x.txt").read_text() == "one"


def test_row_29_everything_is_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, calls = Cache(tmp_path), []
    entries = {
        cache.get(kind, inputs, _writer("", calls))
        for kind, inputs in (("a", {"x": 1}), ("a", {"x": 2}), ("b", {"x": 1}))
    }
    versions = module.tool_versions()
    for tool in versions:
        monkeypatch.setattr(module, "tool_versions", lambda tool=tool: {**versions, tool: "another"})
        entries.add(cache.get("a", {"x": 1}, _writer("", calls)))
    assert len(entries) == len(calls) == 3 + len(versions)


@pytest.mark.parametrize("damage", ["", "changed", None])
def test_row_28_damaged_entry_is_kept_and_rebuilt(
    tmp_path: Path, damage: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    cache, calls = Cache(tmp_path), []
    entry = cache.get("stage", {}, _writer("good", calls))
    if damage is None:
        (entry / "entry.json").unlink()
    else:
        (entry / "x.txt").write_text(damage)
    assert (cache.get("stage", {}, _writer("good", calls)) / "x.txt").read_text() == "good"
    assert len(calls) == 2
    assert "damaged" in caplog.text
    assert list(tmp_path.glob("*.bad-*"))


def test_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        Cache(tmp_path).get("stage", {}, fail)
    assert list(tmp_path.iterdir()) == []
