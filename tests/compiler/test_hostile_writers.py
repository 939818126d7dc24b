"""Two writers of one bundle (row 43 of the faults): they take turns, or the second is refused; no update is lost."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from test_add_target import add, bundle

from slipcast.bundle.manifest import MANIFEST_NAME
from slipcast.bundle.reader import check_digests, open_bundle
from slipcast.errors import ArtifactError, CheckFailed
from slipcast_compiler import add_target
from slipcast_compiler.host import publish as publishing
from slipcast_compiler.host.publish import publish, workspace

__all__ = ["bundle"]  # the fixture

HOLD = """
import sys, time
from pathlib import Path
from slipcast_compiler.host.publish import workspace
with workspace(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def make(output: Path, text: str) -> None:
    with workspace(output) as folder:
        (folder / MANIFEST_NAME).write_text(text)
        publish(folder, output)


def hold(output: Path, seconds: float) -> subprocess.Popen[str]:
    """Another process that has the output's lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, output, str(seconds)], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def locks_that_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "_lock", lambda place: contextlib.nullcontext())


def test_two_builds_at_once_both_leave_their_target(bundle: Path) -> None:
    failures: list[BaseException] = []

    def build(wanted: str) -> None:
        try:
            add(bundle, wanted)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=build, args=(wanted,)) for wanted in ("openvino:fp32", "onnxruntime-gpu:fp32")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    found = open_bundle(bundle)
    check_digests(found)
    assert {target.engine for target in found.manifest.targets} == {"onnxruntime", "openvino", "onnxruntime-gpu"}
    assert {path.name for path in bundle.parent.iterdir()} == {"bundle", "cache"}


def test_who_waits_is_told_for_whom(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = hold(tmp_path / "b", 1.0)
    with caplog.at_level(logging.WARNING):
        make(tmp_path / "b", "second")
    assert f"is being written to by process {other.pid}" in caplog.text
    assert other.wait(10) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_killed_writer_blocks_nobody_and_its_leavings_go(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = hold(tmp_path / "b", 60)
    os.kill(other.pid, signal.SIGKILL)
    other.wait(10)
    assert len(list(tmp_path.glob(".b.*"))) == 2  # its lock and its workspace
    begin = time.monotonic()
    make(tmp_path / "b", "next")
    assert time.monotonic() - begin < 5
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert caplog.text == ""


@pytest.mark.usefixtures("locks_that_lie")
class TestWhereLocksLie:
    def test_an_update_in_the_meantime_is_not_lost(self, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        compare = add_target._compare

        def meanwhile(*arguments: Any) -> Any:
            monkeypatch.setattr(add_target, "_compare", compare)
            thread = threading.Thread(target=add, args=(bundle, "onnxruntime-gpu:fp32"))
            thread.start()
            thread.join()
            return compare(*arguments)

        monkeypatch.setattr(add_target, "_compare", meanwhile)
        # The other's workspace would be taken for a killed run's.
        monkeypatch.setattr(Path, "glob", lambda *_: iter(()))
        with pytest.raises(CheckFailed, match="changed by another process(.|\n)*run the same command again") as caught:
            add(bundle, "openvino:fp32")
        assert caught.value.exit_code == 1
        engines = [target["engine"] for target in json.loads((bundle / MANIFEST_NAME).read_text())["targets"]]
        assert sorted(engines) == ["onnxruntime", "onnxruntime-gpu"]
        check_digests(open_bundle(bundle))
        assert {path.name for path in bundle.parent.iterdir()} == {"bundle", "cache"}
        add(bundle, "openvino:fp32")
        assert len(open_bundle(bundle).manifest.targets) == 3

    def test_a_first_publication_in_the_meantime(self, tmp_path: Path) -> None:
        output = tmp_path / "b"
        with workspace(output) as folder:
            (folder / MANIFEST_NAME).write_text("mine")
            output.mkdir()
            (output / MANIFEST_NAME).write_text("theirs")
            with pytest.raises(CheckFailed, match="nothing there(.|\n)*index"):
                publish(folder, output)
        assert (output / MANIFEST_NAME).read_text() == "theirs"
        assert [path.name for path in tmp_path.iterdir()] == ["b"]

    def test_one_in_the_very_last_moment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        output, exists = tmp_path / "b", Path.exists
        with workspace(output) as folder:
            (folder / MANIFEST_NAME).write_text("mine")

            def look(path: Path) -> bool:
                found = exists(path)
                if path == output and not found and (folder / MANIFEST_NAME).is_file() and looked:
                    output.mkdir()
                    (output / MANIFEST_NAME).write_text("theirs")
                looked.append(path)
                return found

            looked: list[Path] = []
            monkeypatch.setattr(Path, "exists", look)
            with pytest.raises(CheckFailed, match="changed by another process"):
                publish(folder, output)
        assert (output / MANIFEST_NAME).read_text() == "theirs"


def test_what_is_copied_is_what_was_verified(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new manifest would vouch for it."""
    copy = add_target.shutil.copyfile

    def swap(source: Path, target: Path) -> Any:
        if source.suffix == ".data":
            source.write_bytes(b"\1" * source.stat().st_size)
        return copy(source, target)

    monkeypatch.setattr(add_target.shutil, "copyfile", swap)
    with pytest.raises(ArtifactError, match=r"denoiser\.onnx\.data: content differs"):
        add(bundle, "openvino:fp32")
