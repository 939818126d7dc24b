"""The evidence: report.json for programs and report.html for people, one self-contained file."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from slipcast_compiler.cache import TOOLS, tool_versions
from slipcast_compiler.evaluate import GateRow, Originals, Run
from slipcast_compiler.page import render
from slipcast_compiler.plan import Plan

SHOWN_PICTURES = 8
SHOWN_PROMPTS = 12
DIFFERENCE_GAIN = 8
FILES = ("report.json", "report.html")


def make_record(
    plan: Plan, fields: dict[str, Any], gates: dict[str, tuple[GateRow, ...]], seconds: dict[str, float]
) -> dict[str, Any]:
    """Everything that report.json holds; plain JSON."""
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
        },
        "targets": [target.model_dump(mode="json") | {"id": target.id} for target in fields["targets"]],
        "gate": {target: [dataclasses.asdict(row) for row in rows] for target, rows in gates.items()},
        "passed": all(row.passed is not False for rows in gates.values() for row in rows),
        "stages_s": seconds,
        "recipe": plan.recipe.model_dump(mode="json", exclude_none=True),
        "sampling": fields["sampling"].model_dump(mode="json", exclude_none=True),
        "tools": {tool: tool_versions()[tool] for tool in TOOLS},
    }


def write(folder: Path, record: dict[str, Any], originals: Originals, runs: dict[str, Run]) -> None:
    """Write report.json and report.html into `folder`."""
    (folder / "report.json").write_text(
        json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8"
    )
    rows = [
        {
            "prompt": prompt or "no prompt",
            "seed": originals.seeds[i],
            "original": _data_url(originals.fp32[i]),
            "runs": [_pair(originals.fp32[i], run.images[i]) for run in runs.values()],
        }
        for i, prompt in enumerate(originals.prompts[:SHOWN_PICTURES])
    ]
    page = render(
        "report.html", record=record, rows=rows, run_ids=list(runs), gain=DIFFERENCE_GAIN,
        recipe=json.dumps(record["recipe"], indent=2, ensure_ascii=False),
    )  # fmt: skip
    (folder / "report.html").write_text(page, "utf-8")


def keep(folder: Path, output: Path) -> Path:
    """Keep the report of a bundle that is not published, beside where it would have been."""
    rejected = output.with_name(f"{output.name}.rejected")
    rejected.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(folder / name, rejected / name)
    return rejected


def _pair(original: npt.NDArray[np.float32], found: npt.NDArray[np.float32]) -> dict[str, str]:
    difference = np.clip(np.abs(found - original) * DIFFERENCE_GAIN, 0, 1)
    return {"image": _data_url(found), "difference": _data_url(difference)}


def _data_url(picture: npt.NDArray[np.float32]) -> str:
    buffer = io.BytesIO()
    Image.fromarray((picture * 255).round().astype(np.uint8)).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
