"""The evidence: report.json for programs and report.html for people, one self-contained file."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import re
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from slipcast_compiler.host.cache import TOOLS, tool_versions
from slipcast_compiler.judge.evaluate import GateRow, Originals, Run
from slipcast_compiler.judge.host_notes import host_notes
from slipcast_compiler.judge.judging import Judged
from slipcast_compiler.model import original
from slipcast_compiler.pages.page import render
from slipcast_compiler.pages.profile import figures, mask_map
from slipcast_compiler.plan import Plan
from slipcast_compiler.profile.profile import Profile
from slipcast_compiler.recipe.recipe import SamplingTable
from slipcast_compiler.search import plots

SHOWN_PICTURES = 8
ROW_WIDTH = 960  # CSS pixels for the pictures of one prompt; the page is bounded too, to about 10 MB
PICTURE_WIDTHS = (128, 256)  # narrowest and widest column of pictures
SHOWN_STRANGERS = 4  # of the pictures of prompts out of the family
SHOWN_PROMPTS = 12
DIFFERENCE_GAIN = 8
FILES = ("report.json", "report.html")
METRICS = {
    "clip_score_mean": "CLIP score, mean", "clip_delta_mean": "CLIP change, mean",
    "clip_delta_worst": "CLIP change, worst", "retrieval_precision": "Retrieval precision",
    "retrieval_drop": "Retrieval drop", "lpips_mean": "LPIPS, mean", "flip_mean": "FLIP, mean",
    "ssim_mean": "SSIM, mean", "ssim_worst": "SSIM, worst", "psnr_mean": "PSNR, mean (dB)",
    "psnr_worst": "PSNR, worst (dB)",
}  # fmt: skip

Picture = npt.NDArray[np.float32]  # [h, w, 3] in [0, 1]


def make_record(plan: Plan, fields: dict[str, Any], judged: Judged, seconds: dict[str, float]) -> dict[str, Any]:
    """What report.json holds of every compile; plain JSON. What its stages found besides is for compile.py to add."""
    return {
        "name": plan.recipe.name,
        "compiled_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "base_model": fields["base_model"],
        "source_sha256": fields["source_sha256"],
        "pipeline": plan.checkpoint.index["_class_name"],
        "not_compiled": list(fields["not_compiled"]),
        "components": {name: component.model_dump(mode="json") for name, component in fields["components"].items()},
        "family": plan.family
        and {
            **fields["family"].model_dump(mode="json"),
            "calibration_examples": list(plan.family.calibration[:SHOWN_PROMPTS]),
            "held_out_prompts": list(plan.prompts),
            "out_of_family_prompts": list(plan.out_of_family),
            "not_shipped": list(plan.not_shipped),
            "prompt_table_bytes": plan.prompt_table_bytes,
        },
        "targets": [target.model_dump(mode="json") | {"id": target.id} for target in fields["targets"]],
        "gate": {target: [dataclasses.asdict(row) for row in rows] for target, rows in judged.gates.items()},
        "passed": _verdict(judged.gates),
        "not_run": dict(judged.not_run),
        "host_notes": host_notes(fields["targets"]),
        "stages_s": seconds,
        "recipe": resolve(plan),
        "sampling": fields["sampling"].model_dump(mode="json", exclude_none=True),
        "reference": plan.reference.model_dump(mode="json", exclude_none=True),
        "original": original.describe(plan.reference, plan.family is not None),
        "tools": {tool: tool_versions()[tool] for tool in TOOLS},
    }


def resolve(plan: Plan) -> dict[str, Any]:
    """The recipe with everything that it left open as the plan resolved it; itself a valid recipe."""
    recipe = plan.recipe.model_dump(mode="json", exclude_none=True)
    for table in {"family", "evaluate"} & set(recipe):
        recipe[table] = {key: value for key, value in recipe[table].items() if value not in ([], {})}
    sampling = plan.sampling.model_dump(mode="json", exclude={"noise"}, exclude_none=True)
    if not plan.sampling.schedule:  # an explicit list has its own length
        for given in (sampling, recipe["sampling"]):
            for key in {"steps", "schedule"} & set(given):
                del given[key]
    if recipe.pop("timesteps", None) or recipe.pop("reference"):  # what it inherited was not a list that was found
        explicit = {"noise", "guidance_interval", "guidance_reuse"} | (set() if plan.reference.schedule else {"steps"})
        recipe["reference"] = plan.reference.model_dump(mode="json", exclude=explicit, exclude_none=True)
    if plan.recipe.caching:
        recipe["caching"]["full_steps"] = plan.full_steps
    chosen = recipe["sampling"] | sampling | {"width": plan.image.width, "height": plan.image.height}
    recipe["sampling"] = dict(sorted(chosen.items(), key=lambda item: list(SamplingTable.model_fields).index(item[0])))
    recipe["decode"] |= {"tile": plan.image.tile, "overlap": plan.image.overlap}
    return recipe


def dump_toml(table: dict[str, Any], path: tuple[str, ...] = ()) -> str:
    """TOML of plain JSON data without null. Values come before the tables of the same table, as TOML demands."""
    own = {key: value for key, value in table.items() if not _tables(value)}
    text = "".join(f"{_toml_key(key)} = {_toml_value(value)}\n" for key, value in own.items())
    for key in (key for key in table if key not in own):
        here = (*path, _toml_key(key))
        heading = ".".join(here)
        for inner in _tables(table[key]):
            text += f"\n[[{heading}]]\n" if isinstance(table[key], list) else f"\n[{heading}]\n"
            text += dump_toml(inner, here)
    return text


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


def picture_width(natural: int, runs: int) -> int:
    """CSS pixels of one picture: whole multiples of a small one, a big one reduced, so that a row holds all runs."""
    narrowest, widest = PICTURE_WIDTHS
    room = min(max(ROW_WIDTH // (1 + 2 * runs), narrowest), widest)
    return room // natural * natural or room


def write(
    folder: Path, record: dict[str, Any], originals: Originals, runs: Mapping[str, Run], profile: Profile | None
) -> None:
    """Write report.json and report.html into `folder`."""
    (folder / "report.json").write_text(
        json.dumps(_plain(record), indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8"
    )
    natural = originals.fp32.shape[2]
    width = picture_width(natural, len(runs))
    held_out = len(originals.bf16)

    def rows(places: range) -> list[dict[str, Any]]:
        return [
            {
                "prompt": originals.prompts[i] or "no prompt",
                "seed": originals.seeds[i],
                "original": _data_url(originals.fp32[i], width),
                "runs": {name: _pair(originals.fp32[i], run.images[i], width) for name, run in runs.items()},
            }
            for i in places
        ]

    page = render(
        "report.html", {"shown": shown, "figure": figure}, record=record, run_ids=list(runs), gain=DIFFERENCE_GAIN,
        rows=rows(range(min(held_out, SHOWN_PICTURES))), width=width, natural=natural, metrics=METRICS,
        strangers=rows(range(held_out, min(len(originals.prompts), held_out + SHOWN_STRANGERS))),
        gates={target: [_gate_row(row) for row in gate] for target, gate in record["gate"].items()},
        recipe=dump_toml(record["recipe"]), profile=profile and figures(profile.file),
        search_plots=plots.figures(record["search"]) if record["search"] else [], figure=figure,
        **_passes(record["passes"]),
    )  # fmt: skip
    (folder / "report.html").write_text(page, "utf-8")


def figure(value: Any) -> str:
    """A cell of a pass's table."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _passes(reports: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of each pass's table, and the picture of the heads that are kept."""
    tables = {name: told["layers"] for name, told in reports.items() if isinstance(told.get("layers"), dict)}
    columns = {name: list(dict.fromkeys(key for row in rows.values() for key in row)) for name, rows in tables.items()}
    heads = reports.get("prune_heads")
    return {"columns": columns, "masks": heads and mask_map(heads["layers"])}


def keep(folder: Path, output: Path) -> Path:
    """Keep the report of a bundle that is not published, beside where it would have been."""
    rejected = output.with_name(f"{output.name}.rejected")
    rejected.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(folder / name, rejected / name)
    return rejected


def _verdict(gates: Mapping[str, tuple[GateRow, ...]]) -> bool | None:
    """None where no limit was set, so that nothing was checked."""
    checked = [row.passed for rows in gates.values() for row in rows if row.passed is not None]
    return all(checked) if checked else None


def _gate_row(row: dict[str, Any]) -> dict[str, Any]:
    """A gate row in the page's words: changes of the CLIP score, negative is worse, where the gate counts drops."""
    metric = row["metric"].replace("CLIP drop", "CLIP change")
    sign = 1 if metric == row["metric"] else -1
    numbers = {key: None if row[key] is None else sign * row[key] for key in ("value", "limit", "floor")}
    same = row["passed"] is False and shown(numbers["value"], metric) == shown(numbers["limit"], metric)
    texts = {key: shown(value, metric, 4 * same) for key, value in numbers.items()}
    return {**texts, "metric": metric, "passed": row["passed"]} | ({"limit": "none"} if row["limit"] is None else {})


def _plain(value: Any) -> Any:
    """The same with "NaN" for what is not a number, which JSON does not have; null means "not run"."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return "NaN" if isinstance(value, float) and not math.isfinite(value) else value


def _tables(value: Any) -> list[dict[str, Any]]:
    """The tables that a value has to be written as."""
    if isinstance(value, dict):
        return [value]
    return value if isinstance(value, list) and value and all(isinstance(item, dict) for item in value) else []


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_value(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, str | bool):  # JSON's notation is TOML's, but for one character
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if not isinstance(value, list):
        return repr(value)
    items = [_toml_value(item) for item in value]
    line = ", ".join(items)
    return f"[{line}]" if len(line) < 100 else "[\n" + "".join(f"  {item},\n" for item in items) + "]"


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
