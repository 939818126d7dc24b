"""FAULTS rows 28 and 29: damaged entries are kept aside and rebuilt; everything that matters is in the key."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from slipcast.errors import RequestError
from slipcast_compiler.cli.cache import cache_command
from slipcast_compiler.host import cache as module
from slipcast_compiler.host.cache import RECORD, Cache, read_entry

Build = Callable[[Path], None]


def _writer(text: str, calls: list[str]) -> Build:
    def build(folder: Path) -> None:
        calls.append(text)
        (folder / "x.txt").write_text(text)

    return build


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files, as they are hashed."""
    names, digest = list[str](), module._digest

    def watched(file: Path) -> str:
        names.append(file.name)
        return digest(file)

    monkeypatch.setattr(module, "_digest", watched)
    monkeypatch.setattr(module, "_hashed", {})
    return names


def test_built_once_per_input(tmp_path: Path) -> None:
    cache, calls = Cache(tmp_path / "cache"), list[str]()
    first = cache.get("stage", {"a": 1}, _writer("one", calls))
    assert cache.get("stage", {"a": 1}, _writer("one", calls)) == first
    assert calls == ["one"]
    assert (first / "x.txt").read_text() == "one"


def test_row_29_everything_is_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, calls = Cache(tmp_path), list[str]()
    chosen = (
        ("a", {"checkpoint": "1", "seed": 1, "prompts": ["x"]}),
        ("a", {"checkpoint": "1", "seed": 2, "prompts": ["x"]}),
        ("a", {"checkpoint": "1", "seed": 1, "prompts": ["y"]}),
        ("a", {"checkpoint": "2", "seed": 1, "prompts": ["x"]}),
        ("b", {"checkpoint": "1", "seed": 1, "prompts": ["x"]}),
    )
    entries = {cache.get(kind, inputs, _writer("", calls)) for kind, inputs in chosen}
    code = module.code_of(_writer("", calls))
    for part in code:
        monkeypatch.setattr(module, "code_of", lambda *_, part=part: {**code, part: "another"})
        entries.add(cache.get(*chosen[0], _writer("", calls)))
    assert len(entries) == len(calls) == len(chosen) + len(code)


def test_modules_that_are_run_by_name_are_in_the_key(tmp_path: Path) -> None:
    cache, calls = Cache(tmp_path), list[str]()
    builds = [cache.get("a", {}, _writer("", calls), runs) for runs in ((), ("slipcast.engines.openvino",))]
    assert len({*builds}) == 2
    assert "openvino" in json.loads((builds[1] / RECORD).read_text())["code"]


@pytest.mark.parametrize("damage", ["", "changed", None])
def test_row_28_damaged_entry_is_kept_and_rebuilt(
    tmp_path: Path, damage: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    cache, calls = Cache(tmp_path), list[str]()
    entry = cache.get("stage", {}, _writer("good", calls))
    if damage is None:
        (entry / "entry.json").unlink()
    else:
        (entry / "x.txt").write_text(damage)
    assert (cache.get("stage", {}, _writer("good", calls)) / "x.txt").read_text() == "good"
    assert len(calls) == 2
    assert "damaged" in caplog.text
    assert list(tmp_path.glob("*.bad-*"))


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b"7", b'"files"', b"{}", b'{"files": null}', b'{"files": ["x.txt"]}', b"\xff\x00garbage",
     b'{"files": {"x.txt": 1}}', b'{"files": {"gone.txt": "0"}}', b"[" * 100_000],
    ids=range(12),
)  # fmt: skip
def test_a_record_of_any_content_is_damage(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    cache, calls = Cache(tmp_path), list[str]()
    entry = cache.get("stage", {}, _writer("good", calls))
    (entry / RECORD).write_bytes(content)
    assert cache.get("stage", {}, _writer("good", calls)) == entry
    assert len(calls) == 2
    assert "damaged" in caplog.text
    kept = next(tmp_path.glob("*.bad-*"))
    assert (kept / entry.name / RECORD).read_bytes() == content


def test_a_file_in_the_place_of_an_entry_is_damage(tmp_path: Path) -> None:
    cache, calls = Cache(tmp_path), list[str]()
    entry = cache.get("stage", {}, _writer("good", calls))
    shutil.rmtree(entry)
    entry.write_text("no directory")
    assert (cache.get("stage", {}, _writer("good", calls)) / "x.txt").read_text() == "good"


def test_entries_are_hashed_once_in_a_process(tmp_path: Path, hashed: list[str]) -> None:
    cache, calls = Cache(tmp_path), list[str]()
    entry = cache.get("stage", {}, _writer("good", calls))
    for _ in range(3):
        cache.get("stage", {}, _writer("good", calls))
    assert hashed == ["x.txt"]
    module._hashed.clear()  # as in another process
    for _ in range(3):
        cache.get("stage", {}, _writer("good", calls))
    assert hashed == ["x.txt", "x.txt"]

    def link(folder: Path) -> None:
        os.link(entry / "x.txt", folder / "same.txt")

    assert read_entry(cache.get("linked", {}, link)).digests == {"same.txt": module._digest(entry / "x.txt")}
    assert hashed[:-1] == ["x.txt", "x.txt"]  # and the one just above
    os.utime(entry / "x.txt", ns=(0, 0))
    cache.get("stage", {}, _writer("good", calls))
    assert hashed[3:] == ["x.txt"]
    assert calls == ["good"]


def test_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        Cache(tmp_path).get("stage", {}, fail)
    assert list(tmp_path.iterdir()) == []


def test_all_code_is_in_tool_versions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By which a search sees that its code was changed."""
    before = module.tool_versions.__wrapped__()
    assert before == module.tool_versions()
    assert set(before) == {*module.TOOLS, "slipcast"}
    monkeypatch.setattr(module.Sources, "digest", lambda self, modules: "another")
    assert module.tool_versions.__wrapped__() != before


# --- slipcast cache --------------------------------------------------------------------------------------------------


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    cache = Cache(tmp_path / "cache")
    for kind, size in (("small", 10), ("large", 1000), ("two-words", 100)):
        cache.get(kind, {}, lambda folder, size=size: (folder / "data").write_bytes(bytes(size)))  # type: ignore[misc]
    (cache.root / "timings-of-something").write_text("a file of its own")
    (cache.root / ".large-half-made").mkdir()
    return cache.root


def test_verify_names_and_keeps_what_is_damaged(filled: Path) -> None:
    run = CliRunner().invoke
    good = run(cache_command, ["verify", "--cache", str(filled), "--json"])
    assert good.exit_code == 0
    assert json.loads(good.stdout) == {"cache": str(filled), "entries": 3, "damaged": {}}
    entry, other = next(filled.glob("large-*")), next(filled.glob("small-*"))
    stat = (entry / "data").stat()
    (entry / "data").write_bytes(bytes(999) + b"!")
    os.utime(entry / "data", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # which a hit would not see
    (other / RECORD).write_text("null")
    bad = run(cache_command, ["verify", "--cache", str(filled), "--json"])
    assert bad.exit_code == 1
    assert set(json.loads(bad.stdout)["damaged"]) == {entry.name, other.name}
    assert not entry.exists()
    assert len(list(filled.glob("*.bad-*"))) == 2
    again = run(cache_command, ["verify", "--cache", str(filled)])
    assert again.exit_code == 0
    assert "1 entries, 0 damaged" in again.stdout


def test_verify_says_what_is_wrong(filled: Path) -> None:
    (next(filled.glob("large-*")) / "data").unlink()
    found = CliRunner().invoke(cache_command, ["verify", "--cache", str(filled)])
    assert found.exit_code == 1
    assert "data: No such file" in found.stdout


def test_ls_shows_the_largest_first_and_the_total_once(filled: Path) -> None:
    def link(folder: Path) -> None:
        os.link(next(filled.glob("large-*")) / "data", folder / "data")

    Cache(filled).get("linked", {}, link)
    run = CliRunner().invoke
    found = json.loads(run(cache_command, ["ls", "--cache", str(filled), "--json"]).stdout)
    assert {entry["kind"] for entry in found["entries"][:2]} == {"large", "linked"}
    assert {entry["kind"] for entry in found["entries"]} == {"large", "linked", "two-words", "small"}
    sizes = [entry["bytes"] for entry in found["entries"]]
    assert sizes == sorted(sizes, reverse=True)
    assert found["total_bytes"] == sum(sizes) - 1000
    assert all(0 <= entry["age_s"] < 60 for entry in found["entries"])
    text = run(cache_command, ["ls", "--cache", str(filled)]).stdout
    assert "two-words" in text
    assert "4 entries" in text


def test_a_cache_that_is_not_there(tmp_path: Path) -> None:
    for command in ("ls", "verify"):
        found = CliRunner().invoke(cache_command, [command, "--cache", str(tmp_path / "none")])
        assert isinstance(found.exception, RequestError)


def test_the_python_version_is_in_the_key() -> None:
    assert module.code_of(_writer("", []))["python"] == f"{sys.version_info.major}.{sys.version_info.minor}"
