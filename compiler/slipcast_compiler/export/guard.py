"""What a bundle needs to tell prompts out of its family: embeddings of calibration prompts, and a threshold."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from slipcast.bundle.manifest import EMBEDDINGS, FALLBACK, GuardRecord
from slipcast.bundle.onnxfile import external_files
from slipcast.bundle.tensorfile import read_header
from slipcast.progress import Advance
from slipcast.run.guard import NEIGHBOURS, Floats, embed, nearness
from slipcast_compiler.export.component import export_component
from slipcast_compiler.export.graphs import Graphs
from slipcast_compiler.export.prompts import encode, open_tokenizer
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.files import link
from slipcast_compiler.model.original import Original
from slipcast_compiler.recipe.recipe import GuardTable

TABLE = "guard.safetensors"
DISTANCES = "distances.json"


def add_guard(graphs: Graphs, table: GuardTable, prompts: tuple[str, ...], cache: Cache, advance: Advance) -> Graphs:
    """With what tells strangers by their distance to these prompts, and, by the policy fallback, what draws them."""
    original = graphs.original

    def make(out: Path) -> None:
        embeddings = embed_prompts(original, prompts, graphs.components, advance)
        save_file({EMBEDDINGS: embeddings}, out / TABLE)
        (out / DISTANCES).write_text(json.dumps(left_out(embeddings)))

    texts = original.checkpoint.architecture.text
    inputs = {
        "encoders": {text.component: graphs.components[text.component].name for text in texts},
        "prompts": prompts,
        "source": original.checkpoint.sha256,
        "text_length": original.sizes["text_length"],
        "input": _guarded_input(original),
        "neighbours": NEIGHBOURS,
    }
    strangers = {FALLBACK: _export_fallback(original, cache)} if table.policy == "fallback" else {}
    return graphs.add(strangers, guard=(table, cache.get("guard", inputs, make)))


def embed_prompts(
    original: Original, prompts: tuple[str, ...], components: Mapping[str, Path], advance: Advance
) -> Floats:
    """float32 [prompts, width], as the runtime embeds them, by encoders in fp32."""
    ids, conditioning = encode(original, prompts, components, advance)
    special = np.unique(open_tokenizer(original, original.checkpoint.architecture.text[0].tokenizer)([""]))
    return embed(ids, conditioning[_guarded_input(original)], special)


def left_out(embeddings: Floats) -> list[float]:
    """Each one's distance to all others."""
    return [nearness(np.delete(embeddings, i, axis=0), one) for i, one in enumerate(embeddings)]


def choose_threshold(distances: list[float], false_alarms: float) -> float:
    """The distance that a new prompt of the family exceeds with at most that probability, if it is as these are."""
    rank = math.ceil((len(distances) + 1) * (1 - false_alarms) - 1e-9)
    return sorted(distances)[rank - 1]


def write_guard(original: Original, table: GuardTable, made: Path, folder: Path) -> GuardRecord:
    """Put the table of embeddings into the bundle at `folder`; returns the manifest's record."""
    shutil.copyfile(made / TABLE, folder / TABLE)
    prompts, width = read_header(made / TABLE)[EMBEDDINGS].shape
    return GuardRecord(
        policy=table.policy,
        table=TABLE,
        shape=(prompts, width),
        input=_guarded_input(original),
        threshold=choose_threshold(json.loads((made / DISTANCES).read_text()), table.false_alarms),
        false_alarms=table.false_alarms,
    )


def _export_fallback(original: Original, cache: Cache) -> Path:
    """The checkpoint's denoiser as the component that draws strangers: neither rewritten, nor cut, nor in INT8."""
    source = export_component(original, "denoiser", cache)

    def make(out: Path) -> None:
        for name in external_files(source / "denoiser.onnx"):
            link(source / name, out / name)
        link(source / "denoiser.onnx", out / f"{FALLBACK}.onnx")
        shutil.copyfile(source / "denoiser.json", out / f"{FALLBACK}.json")

    return cache.get("fallback", {"source": source.name}, make)


def _guarded_input(original: Original) -> str:
    """The denoiser's input that the first text encoder gives, an embedding of each token."""
    return original.checkpoint.architecture.text[0].outputs[0][1]
