"""Disk and memory that run out while compiling (rows 49 and 50 of the faults): exit 5, with what is needed and free."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_add_target import bundle, state

from slipcast.cli.main import main
from slipcast.errors import ResourceError, SlipcastError
from slipcast.progress import silent
from slipcast_compiler import add_target
from slipcast_compiler.host.isolate import run_isolated

__all__ = ["bundle"]  # the fixture

ROOT = Path(__file__).resolve().parents[2]


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, dict[str, Any]]:
    """Exit code, and the error of the JSON document."""
    with pytest.raises(SystemExit) as caught:
        main([*map(str, arguments), "--json"])
    assert isinstance(caught.value.code, int)
    return caught.value.code, json.loads(capsys.readouterr().out)["error"]


def test_a_compile_asks_for_space_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("slipcast.engines.resources.shutil.disk_usage", lambda _: SimpleNamespace(free=10_000_000))
    monkeypatch.setattr("slipcast_compiler.compile.compile_plan", lambda *_: pytest.fail("it went on"))
    places = "-o", tmp_path / "out", "--cache", tmp_path / "cache"
    code, error = run(capsys, "compile", ROOT / "recipes" / "shapes-circles.toml", *places)
    assert code == 5
    assert error["message"].endswith("out and the cache: the disk is too full")
    assert float(error["expected"].split()[1]) > 100
    assert error["got"].startswith("10.0 MB free in ")
    left = [path.name.partition("-")[0] for path in tmp_path.glob("*/*")]  # what the plan has asked of the checkpoint
    assert left == ["resolved"] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [28, 122, 27])
def test_a_disk_that_fills_while_building(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def full(*_: object) -> None:
        raise OSError(number, "full", "/somewhere/file")

    before = state(bundle)
    monkeypatch.setattr(add_target.shutil, "copyfile", full)
    code, error = run(capsys, "build", bundle, "--target", "openvino:fp32", "--cache", bundle.parent / "cache")
    assert (code, error["type"]) == (5, "ResourceError")
    assert error["message"].startswith("the disk is full")
    assert "/somewhere/file" in error["hint"]
    assert state(bundle) == before
    assert {path.name for path in bundle.parent.iterdir()} <= {"bundle", "cache"}


def _fail_with(kind: str, _: Any) -> None:
    match kind:
        case "disk":
            raise OSError(28, "No space left on device", "x")
        case "memory":
            raise MemoryError
        case "torch":
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.")
        case "limit":
            resource.setrlimit(resource.RLIMIT_AS, (1 << 28, 1 << 28))
            bytearray(1 << 30)
        case _:
            raise RuntimeError("not enough patience")


@pytest.mark.parametrize("kind", ["disk", "memory", "torch", "limit"])
def test_of_a_process_apart(kind: str) -> None:
    with pytest.raises(ResourceError) as caught:
        run_isolated(_fail_with, kind, advance=silent)
    assert caught.value.exit_code == 5
    assert ("disk" if kind == "disk" else "memory") in caught.value.message


def test_other_failures_stay_what_they_are() -> None:
    with pytest.raises(SlipcastError, match="RuntimeError: not enough patience") as caught:
        run_isolated(_fail_with, "other", advance=silent)
    assert caught.value.exit_code == 1
