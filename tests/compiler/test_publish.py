"""Publishing: all or nothing, and never over what is not a bundle."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from slipcast.bundle.manifest import MANIFEST_NAME
from slipcast.errors import RecipeError, ResourceError
from slipcast_compiler.host import publish as publishing
from slipcast_compiler.host.publish import check_output, publish, workspace


def test_staging_disappears_unless_published(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "bundle"
    with workspace(output) as folder:
        (folder / "a").write_text("a")
    assert list(output.parent.iterdir()) == []
    with workspace(output) as folder:
        (folder / MANIFEST_NAME).write_text("1")
        publish(folder, output)
    assert [p.name for p in output.parent.iterdir()] == ["bundle"]
    assert output.stat().st_mode & 0o777 == 0o755


def test_an_old_bundle_is_replaced_whole(tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    for generation in ("1", "2"):
        with workspace(output) as folder:
            (folder / MANIFEST_NAME).write_text(generation)
            (folder / f"only-in-{generation}").write_text("")
            publish(folder, output)
    assert sorted(p.name for p in output.iterdir()) == [MANIFEST_NAME, "only-in-2"]
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_a_failing_sync_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "bundle"
    output.mkdir()
    (output / MANIFEST_NAME).write_text("old")

    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with workspace(output) as folder:
        (folder / MANIFEST_NAME).write_text("new")
        with pytest.raises(OSError, match="Input/output"):
            publish(folder, output)
    assert (output / MANIFEST_NAME).read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_what_is_not_a_bundle_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("photos", "file", "link"):
        with pytest.raises(RecipeError, match="is not a bundle"):
            check_output(tmp_path / name)
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")
    check_output(tmp_path / "new")


def test_a_failing_rename_leaves_the_old_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system cannot swap two directories at once, and the second of the renames instead of it fails."""
    monkeypatch.setattr(publishing.ctypes, "CDLL", lambda *_, **__: None)
    output, new = tmp_path / "bundle", tmp_path / "new"
    for folder, text in ((output, "old"), (new, "new")):
        folder.mkdir()
        (folder / MANIFEST_NAME).write_text(text)
    rename = os.replace

    def fail(source: Path, target: Path) -> None:
        if Path(source) == new:
            raise OSError(5, "Input/output error")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="Input/output"):
            publish(new, output)
    assert (output / MANIFEST_NAME).read_text() == "old"
    publish(new, output)
    assert (output / MANIFEST_NAME).read_text() == "new"


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_an_old_bundle_is_swapped_in_one_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, new = tmp_path / "bundle", tmp_path / "new"
    for folder in (output, new):
        folder.mkdir()
        (folder / MANIFEST_NAME).write_text(folder.name)
    monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("a rename of its own"))
    publish(new, output)
    assert (output / MANIFEST_NAME).read_text() == "new"
    assert (new / MANIFEST_NAME).read_text() == "bundle"


@pytest.mark.parametrize("place", ["file/x", "file/x/y", "/proc/nothing/x", "/proc/x", "link/x"])
def test_a_place_that_cannot_be_made_is_refused_early(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(RecipeError, match="cannot be made"):
        check_output(tmp_path / place)


def test_looking_leaves_nothing_behind(tmp_path: Path) -> None:
    check_output(tmp_path / "deep" / "bundle")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["mkdir", "mkdtemp"])
def test_a_place_that_can_no_longer_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publishing, "check_output", lambda *_: None)
    monkeypatch.setattr(*((Path, call) if call == "mkdir" else (publishing.tempfile, call)), full)
    with pytest.raises(ResourceError, match="No space left"), workspace(tmp_path / "bundle"):
        pass
