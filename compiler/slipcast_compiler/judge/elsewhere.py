"""Originals that another machine drew, such as one with a GPU, for a compile where the pipeline itself does not fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slipcast.bundle.names import Sha256
from slipcast.bundle.validation import Strict
from slipcast.errors import RecipeError
from slipcast.progress import Advance
from slipcast_compiler.host.cache import TOOLS
from slipcast_compiler.host.closure import versions
from slipcast_compiler.host.isolate import run_isolated
from slipcast_compiler.host.machine import this_machine
from slipcast_compiler.judge.asked import Asked
from slipcast_compiler.judge.captured import PipelineOriginals, draw, load_drawn, save_drawn
from slipcast_compiler.model.digests import digests
from slipcast_compiler.model.original import Precision

RECORD, FAMILY, OUTSIDE = "originals.json", "family", "outside"


class OriginalsRecord(Strict):
    """originals.json. `asked`: what was to be drawn; `source_sha256`: of the pipeline's files; `machine`: in words;
    `tools`: versions; `files`: SHA-256 of the others in the directory."""

    asked: dict[str, Any]
    source_sha256: Sha256
    precision: Precision
    machine: str
    tools: dict[str, str]
    files: dict[str, Sha256]


def write_originals(
    asked: Asked, precision: Precision, source: str, gpu: str | None, folder: Path, advance: Advance
) -> OriginalsRecord:
    """Draw, in processes of their own, into an empty directory; `source`: the digest of the pipeline's files; `gpu`:
    the name of the one that draws, if one does."""
    device = "cuda" if gpu else "cpu"
    for name, each in ((FAMILY, asked.drawing(precision, device)), (OUTSIDE, asked.outside(precision, device))):
        if each:
            (folder / name).mkdir()
            save_drawn(run_isolated(draw, each, advance=advance), folder / name)
    record = OriginalsRecord(
        asked=_plain(asked), source_sha256=source, precision=precision, machine=gpu or this_machine().processor,
        tools={tool: found for tool, found in versions(TOOLS).items() if tool in TOOLS}, files=_files(folder),
    )  # fmt: skip
    (folder / RECORD).write_text(record.model_dump_json(indent=2) + "\n", "utf-8")
    return record


def read_record(folder: Path, asked: Asked) -> OriginalsRecord:
    """What the directory says of itself; RecipeError where it is none, is damaged, or has pictures of others."""
    hint = "draw them again: slipcast originals RECIPE -o DIRECTORY"
    try:
        record = OriginalsRecord.model_validate_json((folder / RECORD).read_bytes())
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"evaluate.originals: {folder} was not written by `slipcast originals`",
            expected=f"a directory with {RECORD}", got=str(error).splitlines()[0], hint=hint,
        ) from None  # fmt: skip
    if (found := _files(folder)) != record.files:
        wrong = next(name for name in sorted({*found, *record.files}) if found.get(name) != record.files.get(name))
        raise RecipeError(f"evaluate.originals: {folder / wrong} is not the file that was written", hint=hint)
    for name, wanted in _plain(asked).items():
        if record.asked.get(name) != wanted:
            raise RecipeError(
                f"evaluate.originals: {folder} has pictures of other {name}",
                expected=json.dumps(wanted)[:300], got=json.dumps(record.asked.get(name))[:300], hint=hint,
            )  # fmt: skip
    return record


def load_originals(folder: Path, asked: Asked, source: str) -> PipelineOriginals:
    """What write_originals left; RecipeError as read_record, and where it was drawn of other weights."""
    record = read_record(folder, asked)
    if record.source_sha256 != source:
        raise RecipeError(
            f"evaluate.originals: {folder} was drawn by another checkpoint",
            expected=f"the digest {source}", got=record.source_sha256,
            hint="the same files have to be on both machines, those of all variants too",
        )  # fmt: skip
    outside = asked.outside(record.precision)
    strangers = load_drawn(outside, folder / OUTSIDE) if outside else (None,)
    drawn = load_drawn(asked.drawing(record.precision), folder / FAMILY)
    return PipelineOriginals(drawn, strangers[0], record.precision, record.machine)


def _plain(asked: Asked) -> dict[str, Any]:
    """What is to be drawn, by the words of an error; plain JSON, the same on every machine."""
    drawing, outside = asked.drawing(None), asked.outside(None)
    return {
        "pipelines": drawing.pipeline,
        "calls": [_without_paths(call) for call in drawing.calls],
        "prompts": list(drawing.prompts),
        "seeds": list(drawing.seeds),
        "prompts out of the family": [list(outside.prompts), list(outside.seeds)] if outside else None,
    }


def _without_paths(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call with the digests of pictures in place of their files."""
    found = digests(call)

    def named(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [found.get(f"{name}[{at}]", each) for at, each in enumerate(value)]
        return found.get(f"{name}[0]", value)

    named_call: dict[str, Any] = json.loads(json.dumps({name: named(name, value) for name, value in call.items()}))
    return named_call


def _files(folder: Path) -> dict[str, str]:
    files = sorted(each for each in folder.rglob("*") if each.is_file() and each != folder / RECORD)
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
