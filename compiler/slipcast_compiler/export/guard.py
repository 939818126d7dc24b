"""What a bundle needs to tell prompts out of its family: embeddings of calibration prompts, and a threshold."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from safetensors.numpy import save_file

from slipcast.bundle.tensorfile import read_header
from slipcast.progress import Advance
from slipcast.run.guard import EMBEDDINGS, FALLBACK, NEIGHBOURS, Floats, GuardRecord, embed, nearness
from slipcast_compiler.export.component import cached_export
from slipcast_compiler.export.prompts import encode, tokenizer_of
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.judge.evaluate import Run
from slipcast_compiler.model.rewrite import UNCHANGED
from slipcast_compiler.plan import Plan

TABLE = "guard.safetensors"
DISTANCES = "distances.json"


def cached_guard(plan: Plan, exported: dict[str, Path], cache: Cache, advance: Advance) -> Path:
    """A directory with guard.safetensors, and the distance of each of the plan's guarded prompts to the others."""

    def make(out: Path) -> None:
        embeddings = embed_prompts(plan, plan.guarded_prompts, exported, advance)
        save_file({EMBEDDINGS: embeddings}, out / TABLE)
        (out / DISTANCES).write_text(json.dumps(left_out(embeddings)))

    inputs = {
        "encoders": {text.component: exported[text.component].name for text in plan.checkpoint.architecture.text},
        "prompts": plan.guarded_prompts, "source": plan.checkpoint.sha256, "text_length": plan.sizes["text_length"],
        "input": _guarded_input(plan), "neighbours": NEIGHBOURS,
    }  # fmt: skip
    return cache.get("guard", inputs, make)


def embed_prompts(plan: Plan, prompts: tuple[str, ...], exported: dict[str, Path], advance: Advance) -> Floats:
    """float32 [prompts, width], as the runtime embeds them, by encoders in fp32."""
    ids, conditioning = encode(plan, prompts, exported, advance)
    special = np.unique(tokenizer_of(plan, plan.checkpoint.architecture.text[0].tokenizer)([""]))
    return embed(ids, conditioning[_guarded_input(plan)], special)


def left_out(embeddings: Floats) -> list[float]:
    """Each one's distance to all others."""
    return [nearness(np.delete(embeddings, i, axis=0), one) for i, one in enumerate(embeddings)]


def choose_threshold(distances: list[float], false_alarms: float) -> float:
    """The distance that a new prompt of the family exceeds with at most that probability, if it is as these are."""
    rank = math.ceil((len(distances) + 1) * (1 - false_alarms) - 1e-9)
    return sorted(distances)[rank - 1]


def write_guard(plan: Plan, made: Path, folder: Path, requires: tuple[str, ...]) -> dict[str, Any]:
    """Put the table into the bundle at `folder`; returns the manifest's fields, with what it `requires` so far."""
    table = plan.recipe.guard
    assert table
    shutil.copyfile(made / TABLE, folder / TABLE)
    prompts, width = read_header(made / TABLE)[EMBEDDINGS].shape
    record = GuardRecord(
        policy=table.policy, table=TABLE, shape=(prompts, width), input=_guarded_input(plan),
        threshold=choose_threshold(json.loads((made / DISTANCES).read_text()), table.false_alarms),
        false_alarms=table.false_alarms,
    )  # fmt: skip
    return {"guard": record, "requires": requires if table.policy == "warn" else (*requires, "guard")}


def fallbacks(plan: Plan, cache: Cache) -> dict[str, Path]:
    """What draws strangers, if anything does, as exported components are given."""
    fallback = plan.recipe.guard and plan.recipe.guard.policy == "fallback"
    return {FALLBACK: cached_fallback(plan, cache)} if fallback else {}


def cached_fallback(plan: Plan, cache: Cache) -> Path:
    """The checkpoint's denoiser as the component that draws strangers: neither rewritten, nor staged, nor in INT8."""
    source = cached_export(plan, "denoiser", cache, UNCHANGED)

    def make(out: Path) -> None:
        name = f"{FALLBACK}.onnx"
        ir.save(ir.load(source / "denoiser.onnx"), out / name, external_data=f"{name}.data")
        shutil.copyfile(source / "denoiser.json", out / f"{FALLBACK}.json")

    return cache.get("fallback", {"source": source.name}, make)


def count_alarms(plan: Plan, record: GuardRecord | None, runs: Mapping[str, Run]) -> dict[str, Any] | None:
    """What the guard said of the prompts that pictures were judged on, by target; plain JSON, for the report."""
    if not record:
        return None
    count, found = len(plan.prompts), {}
    for target, run in runs.items():
        strange = [distance > record.threshold for distance in run.distances]
        found[target] = {"held_out": sum(strange[:count]), "out_of_family": sum(strange[count:])}
    return {
        **record.model_dump(mode="json"),
        "alarms": found,
        "held_out": count,
        "out_of_family": len(plan.out_of_family),
    }


def _guarded_input(plan: Plan) -> str:
    """The denoiser's input that the first text encoder gives, an embedding of each token."""
    return plan.checkpoint.architecture.text[0].outputs[0][1]
