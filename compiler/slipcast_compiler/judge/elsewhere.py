"""Originals that another machine drew, such as one with a GPU, for a compile where the pipeline itself does not fit."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slipcast.bundle.names import Sha256
from slipcast.bundle.validation import Line, Strict
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

logger = logging.getLogger("slipcast")

DRAWING = ("torch", "diffusers", "transformers")  # tools that pictures may depend on
RECORD, FAMILY, OUTSIDE = "originals.json", "family", "outside"


class OriginalsRecord(Strict):
    """originals.json. `asked`: what was to be drawn; `source_sha256`: of the pipeline's files; `machine`: in words;
    `tools`: versions; `files`: SHA-256 of the others in the directory."""

    asked: dict[str, Any]
    source_sha256: Sha256
    precision: Precision
    machine: Line
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
        tools=_tools(), files=_files(folder),
    )  # fmt: skip
    (folder / RECORD).write_text(record.model_dump_json(indent=2) + "\n", "utf-8")
    return record


def read_record(folder: Path, asked: Asked, source: str) -> OriginalsRecord:
    """What the directory says of itself; `source`: as in write_originals. RecipeError where it is none, is damaged, or
    has pictures of others; a warning where they are of other versions of the tools."""
    hint = "draw them again: slipcast originals RECIPE -o DIRECTORY"
    try:
        record = OriginalsRecord.model_validate_json((folder / RECORD).read_bytes())
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"evaluate.originals: {folder} was not written by `slipcast originals`",
            expected=f"a directory with {RECORD}", got=str(error).splitlines()[0], hint=hint,
        ) from None  # fmt: skip
    found = _files(folder)
    if wrong := [name for name, sha256 in record.files.items() if found.get(name) != sha256]:
        raise RecipeError(f"evaluate.originals: {folder / wrong[0]} is not the file that was written", hint=hint)
    for name, wanted in _plain(asked).items():
        if record.asked.get(name) != wanted:
            raise RecipeError(
                f"evaluate.originals: {folder} has pictures of other {name}",
                expected=json.dumps(wanted)[:300], got=json.dumps(record.asked.get(name))[:300], hint=hint,
            )  # fmt: skip
    if record.source_sha256 != source:
        raise RecipeError(
            f"evaluate.originals: {folder} was drawn by another checkpoint",
            expected=f"the digest {source}", got=record.source_sha256,
            hint="the same files have to be on both machines, those of all variants too",
        )  # fmt: skip
    if other := {tool: version for tool, version in _tools().items() if record.tools.get(tool) != version}:
        theirs = ", ".join(f"{tool} {record.tools.get(tool)}, here {version}" for tool, version in other.items())
        logger.warning("%s was drawn with other versions: %s", folder, theirs)
    return record


def load_originals(folder: Path, asked: Asked, record: OriginalsRecord) -> PipelineOriginals:
    """What write_originals left, as read_record has seen it. RecipeError where it is not as many pictures."""
    outside = asked.outside(record.precision)
    try:
        strangers = load_drawn(outside, folder / OUTSIDE) if outside else (None,)
        drawn = PipelineOriginals(
            load_drawn(asked.drawing(record.precision), folder / FAMILY), strangers[0], record.precision, record.machine
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RecipeError(
            f"evaluate.originals: {folder} cannot be read", got=f"{type(error).__name__}: {error}"
        ) from None
    for each in drawn.every:
        images = each.run.images if each.run else np.zeros(0, np.float32)
        if len(images) != len(each.seeds) or images.dtype != np.float32 or not np.isfinite(images).all():
            raise RecipeError(
                f"evaluate.originals: {folder} does not have a picture for each seed",
                expected=f"{len(each.seeds)}, float32, of finite numbers", got=f"{images.dtype} {list(images.shape)}",
            )  # fmt: skip
    return drawn


def _tools() -> dict[str, str]:
    return {tool: found for tool, found in versions(TOOLS).items() if tool in DRAWING}


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
