"""What every report shows: pictures side by side, the gate, metrics, and how they are printed."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from slipcast_compiler.host.cache import TOOLS
from slipcast_compiler.host.closure import versions
from slipcast_compiler.judge.evaluate import Judged
from slipcast_compiler.judge.gate import GateRow
from slipcast_compiler.judge.host_notes import host_notes
from slipcast_compiler.pages.record import BaseRecord, Gated, finite
from slipcast_compiler.recipe.recipe import Recipe

SHOWN_PICTURES = 8
SHOWN_STRANGERS = 4  # of the pictures of prompts out of the family
SHOWN_PROMPTS = 12
ROW_WIDTH = 960  # CSS pixels for the pictures of one prompt; the page is bounded too, to about 10 MB
PICTURE_WIDTHS = (128, 256)  # narrowest and widest column of pictures
DIFFERENCE_GAIN = 8
FILES = ("report.json", "report.html")
METRICS = {
    "clip_score_mean": "CLIP score, mean",
    "clip_delta_mean": "CLIP change, mean",
    "clip_delta_worst": "CLIP change, worst",
    "retrieval_precision": "Retrieval precision",
    "retrieval_drop": "Retrieval drop",
    "lpips_mean": "LPIPS, mean",
    "flip_mean": "FLIP, mean",
    "ssim_mean": "SSIM, mean",
    "ssim_worst": "SSIM, worst",
    "psnr_mean": "PSNR, mean (dB)",
    "psnr_worst": "PSNR, worst (dB)",
}

Picture = npt.NDArray[np.float32]  # [h, w, 3] in [0, 1]
Pictures = npt.NDArray[np.float32] | Sequence[Picture]  # of one size, [n, h, w, 3], or of several


def common(fields: Mapping[str, Any], judged: Judged, seconds: Mapping[str, float]) -> dict[str, Any]:
    """What every record says of the manifest's fields, of what was judged, and of the stages; plain JSON."""
    return {
        "name": fields["name"],
        "compiled_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "base_model": fields["base_model"],
        "source_sha256": fields["source_sha256"],
        "targets": [target.model_dump(mode="json") | {"id": target.id} for target in fields["targets"]],
        "gate": {target: [dataclasses.asdict(row) for row in rows] for target, rows in judged.gates.items()},
        "passed": verdict(judged.gates),
        "not_run": dict(judged.not_run),
        "host_notes": host_notes(fields["targets"]),
        "stages_s": dict(seconds),
        "tools": {tool: found for tool, found in versions(TOOLS).items() if tool in TOOLS},
    }


def plain_recipe(recipe: Recipe) -> dict[str, Any]:
    """A recipe as TOML can have it, without empty lists of prompts."""
    found = recipe.model_dump(mode="json", exclude_none=True)
    for table in {"family", "evaluate"} & set(found):
        found[table] = {key: value for key, value in found[table].items() if value not in ([], {})}
    return found


def verdict(gates: Mapping[str, tuple[GateRow, ...]]) -> bool | None:
    """None where no limit was set, so that nothing was checked."""
    checked = [row.passed for rows in gates.values() for row in rows if row.passed is not None]
    return all(checked) if checked else None


def write_record(folder: Path, record: BaseRecord) -> None:
    """Write report.json into `folder`."""
    text = json.dumps(finite(record.plain()), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", "utf-8")


def keep(folder: Path, output: Path) -> Path:
    """Keep the report of a bundle that is not published, beside where it would have been."""
    rejected = output.with_name(f"{output.name}.rejected")
    rejected.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(folder / name, rejected / name)
    return rejected


def shown(value: float | None, metric: str, more: int = 0) -> str:
    """A metric as the page prints it, with `more` digits than usual; never a negative zero."""
    if value is None:
        return "not run"
    if not math.isfinite(value):
        return "not a number"
    change, share = metric.startswith("CLIP change"), metric.startswith("Retrieval")
    digits = (2 if change else 1 if share or metric.startswith("PSNR") else 4) + more
    rounded = round(value * 100 if change or share else value, digits) or 0.0
    return f"{rounded:{'+' if change and rounded else ''}.{digits}f}{' %' if change or share else ''}"


def figure(value: Any) -> str:
    """A cell of a table."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def gate_rows(record: BaseRecord) -> dict[str, list[dict[str, Any]]]:
    """By target, the rows of its gate in the page's words."""
    return {target: [_gate_row(row) for row in rows] for target, rows in record.gate.items()}


def _gate_row(row: Gated) -> dict[str, Any]:
    """Changes of the CLIP score, negative is worse, where the gate counts drops."""
    metric = row.metric.replace("CLIP drop", "CLIP change")
    sign = 1 if metric == row.metric else -1
    given = {"value": row.value, "limit": row.limit, "floor": row.floor}
    numbers = {key: None if number is None else sign * number for key, number in given.items()}
    same = row.passed is False and shown(numbers["value"], metric) == shown(numbers["limit"], metric)
    texts = {key: shown(value, metric, 4 * same) for key, value in numbers.items()}
    return {**texts, "metric": metric, "passed": row.passed} | ({"limit": "none"} if row.limit is None else {})


def picture_width(natural: int, runs: int) -> int:
    """CSS pixels of one picture: whole multiples of a small one, a big one reduced, so that a row holds all runs."""
    narrowest, widest = PICTURE_WIDTHS
    room = min(max(ROW_WIDTH // (1 + 2 * runs), narrowest), widest)
    return room // natural * natural or room


def picture_rows(
    captions: Sequence[str], seeds: Sequence[int], originals: Pictures, runs: Mapping[str, Pictures],
    places: Iterable[int], width: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Of these images the original's picture, and each run's with its difference."""
    return [
        {
            "prompt": captions[i],
            "seed": seeds[i],
            "original": _data_url(originals[i], width),
            "runs": {name: _pair(originals[i], found[i], width) for name, found in runs.items()},
        }
        for i in places
    ]


def _pair(reference: Picture, found: Picture, width: int) -> dict[str, str]:
    found = np.nan_to_num(found, posinf=1.0)  # a picture that is not finite is black, as a viewer would show it
    difference = np.clip(np.abs(found - reference) * DIFFERENCE_GAIN, 0, 1)
    return {"image": _data_url(found, width), "difference": _data_url(difference, width)}


def _data_url(pixels: Picture, width: int) -> str:
    """PNG, reduced to `width` if it is wider; the browser enlarges."""
    picture = Image.fromarray((pixels * 255).round().astype(np.uint8))
    if picture.width > width:
        height = max(1, round(picture.height * width / picture.width))
        picture = picture.resize((width, height), Image.Resampling.BOX)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
