"""The evidence: report.json for programs and report.html for people, one self-contained file."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tomli_w
from PIL import Image

from slipcast.bundle.profiles import open_profile_file
from slipcast_compiler.export.graphs import Graphs
from slipcast_compiler.graph.cost import cost
from slipcast_compiler.host.cache import TOOLS
from slipcast_compiler.host.closure import versions
from slipcast_compiler.judge.evaluate import Judged, count_alarms
from slipcast_compiler.judge.gate import GateRow
from slipcast_compiler.judge.host_notes import host_notes
from slipcast_compiler.judge.originals import Originals
from slipcast_compiler.model import original
from slipcast_compiler.pages.page import render
from slipcast_compiler.pages.profile import figures, mask_map
from slipcast_compiler.pages.record import Gated, finite, typed_record
from slipcast_compiler.pages.search import figures as search_figures
from slipcast_compiler.recipe.passes import PassesTable
from slipcast_compiler.recipe.recipe import Recipe
from slipcast_compiler.recipe.sampling import SamplingTable

SHOWN_PICTURES = 8
ROW_WIDTH = 960  # CSS pixels for the pictures of one prompt; the page is bounded too, to about 10 MB
PICTURE_WIDTHS = (128, 256)  # narrowest and widest column of pictures
SHOWN_STRANGERS = 4  # of the pictures of prompts out of the family
SHOWN_PROMPTS = 12
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


@dataclass(frozen=True)
class Evidence:
    """All that a compile found. `fields`: the manifest's; `casts`: by target, what stays in fp32; `searched` and
    `exits`: what a search and early exit found, if they were asked for; `seconds`: by stage."""

    recipe: Recipe
    graphs: Graphs
    fields: Mapping[str, Any]
    originals: Originals
    judged: Judged
    casts: Mapping[str, Any]
    searched: dict[str, Any] | None
    exits: dict[str, Any] | None
    seconds: Mapping[str, float]


def make_record(evidence: Evidence) -> dict[str, Any]:
    """What report.json holds; plain JSON."""
    graphs, fields, judged = evidence.graphs, evidence.fields, evidence.judged
    held_out = len(evidence.originals.bf16)
    return {
        "name": graphs.name,
        "compiled_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "base_model": fields["base_model"],
        "source_sha256": fields["source_sha256"],
        "pipeline": graphs.original.checkpoint.index["_class_name"],
        "not_compiled": list(fields["not_compiled"]),
        "components": {name: component.model_dump(mode="json") for name, component in fields["components"].items()},
        "family": graphs.family and _family(evidence),
        "targets": [target.model_dump(mode="json") | {"id": target.id} for target in fields["targets"]],
        "gate": {target: [dataclasses.asdict(row) for row in rows] for target, rows in judged.gates.items()},
        "passed": _verdict(judged.gates),
        "not_run": dict(judged.not_run),
        "host_notes": host_notes(fields["targets"]),
        "stages_s": dict(evidence.seconds),
        "recipe": resolve(evidence.recipe, graphs),
        "sampling": fields["sampling"].model_dump(mode="json", exclude_none=True),
        "reference": graphs.reference.model_dump(mode="json", exclude_none=True),
        "original": original.drawn_by(graphs.reference, graphs.family is not None),
        "tools": {tool: found for tool, found in versions(TOOLS).items() if tool in TOOLS},
        "passes": {name: found for name, found in graphs.reports.items() if name in PassesTable.model_fields},
        "mixed_precision": evidence.casts,
        "search": evidence.searched,
        "timesteps": graphs.reports.get("timesteps"),
        "early_exit": evidence.exits,
        "cut": graphs.reports.get("cut"),
        "caching": graphs.reports.get("caching"),
        "guard": count_alarms(fields["guard"], judged.runs, held_out),
        "cost": cost(graphs.components["denoiser"] / "denoiser.onnx"),
    }


def _family(evidence: Evidence) -> dict[str, Any]:
    """The prompts, as the page shows them, and what a closed family's bundle does without."""
    graphs, prompts, held_out = evidence.graphs, evidence.originals.prompts, len(evidence.originals.bf16)
    assert graphs.family
    encoders = [text.component for text in graphs.original.checkpoint.architecture.text]
    return {
        **evidence.fields["family"].model_dump(mode="json"),
        "calibration_examples": list(graphs.family.calibration[:SHOWN_PROMPTS]),
        "held_out_prompts": list(prompts[:held_out]),
        "out_of_family_prompts": list(prompts[held_out:]),
        "not_shipped": [name for name in encoders if name not in graphs.components],
        "prompt_table_bytes": graphs.prompts.stat().st_size if graphs.prompts else 0,
    }


def resolve(recipe: Recipe, graphs: Graphs) -> dict[str, Any]:
    """The recipe with everything that it left open as it was resolved; itself a valid recipe."""
    found = recipe.model_dump(mode="json", exclude_none=True)
    for table in {"family", "evaluate"} & set(found):
        found[table] = {key: value for key, value in found[table].items() if value not in ([], {})}
    sampling = graphs.sampling.model_dump(mode="json", exclude={"noise"}, exclude_none=True)
    if not graphs.sampling.schedule:  # an explicit list has its own length
        for given in (sampling, found["sampling"]):
            for key in {"steps", "schedule"} & set(given):
                del given[key]
    reference, image = graphs.reference, graphs.original.image
    if found.pop("timesteps", None) or found.pop("reference"):  # what it inherited was not a list that was found
        explicit = {"noise", "guidance_interval", "guidance_reuse"} | (set() if reference.schedule else {"steps"})
        found["reference"] = reference.model_dump(mode="json", exclude=explicit, exclude_none=True)
    if recipe.caching:
        found["caching"]["full_steps"] = recipe.caching.full_of(graphs.sampling.steps)
    chosen = found["sampling"] | sampling | {"width": image.width, "height": image.height}
    found["sampling"] = dict(sorted(chosen.items(), key=lambda item: list(SamplingTable.model_fields).index(item[0])))
    found["decode"] |= {"tile": image.tile, "overlap": image.overlap}
    return found


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


def write(folder: Path, record: dict[str, Any], evidence: Evidence) -> None:
    """Write report.json and report.html into `folder`."""
    originals, runs, profile = evidence.originals, evidence.judged.runs, evidence.graphs.profile
    typed = typed_record(record)
    text = json.dumps(finite(typed.plain()), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", "utf-8")
    natural = originals.fp32.shape[2]
    width = picture_width(natural, len(runs))
    held_out, asked = len(originals.bf16), len(originals.prompts)
    page = render(
        "report.html",
        {"shown": shown, "figure": figure},
        record=typed,
        gain=DIFFERENCE_GAIN,
        rows=_rows(evidence, range(min(held_out, SHOWN_PICTURES)), width),
        strangers=_rows(evidence, range(held_out, min(asked, held_out + SHOWN_STRANGERS)), width),
        width=width,
        natural=natural,
        metrics=METRICS,
        gates={target: [_gate_row(row) for row in gate] for target, gate in typed.gate.items()},
        recipe=tomli_w.dumps(typed.recipe),
        profile=profile and figures(open_profile_file(profile)),
        search_plots=search_figures(typed.search) if typed.search else [],
        figure=figure,
        **_passes(typed.passes),
    )
    (folder / "report.html").write_text(page, "utf-8")


def _rows(evidence: Evidence, places: range, width: int) -> list[dict[str, Any]]:
    """Of these images the original's picture, and each run's with its difference."""
    originals, runs = evidence.originals, evidence.judged.runs
    return [
        {
            "prompt": originals.prompts[i] or "no prompt",
            "seed": originals.seeds[i],
            "original": _data_url(originals.fp32[i], width),
            "runs": {name: _pair(originals.fp32[i], run.images[i], width) for name, run in runs.items()},
        }
        for i in places
    ]


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


def _gate_row(row: Gated) -> dict[str, Any]:
    """A gate row in the page's words: changes of the CLIP score, negative is worse, where the gate counts drops."""
    metric = row.metric.replace("CLIP drop", "CLIP change")
    sign = 1 if metric == row.metric else -1
    given = {"value": row.value, "limit": row.limit, "floor": row.floor}
    numbers = {key: None if number is None else sign * number for key, number in given.items()}
    same = row.passed is False and shown(numbers["value"], metric) == shown(numbers["limit"], metric)
    texts = {key: shown(value, metric, 4 * same) for key, value in numbers.items()}
    return {**texts, "metric": metric, "passed": row.passed} | ({"limit": "none"} if row.limit is None else {})


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
