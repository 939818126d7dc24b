"""The text encoders of a closed family, evaluated for all of its prompts when compiling: they are not shipped.

The table holds what text encoders give, also where staging made a component `denoiser_prompt` of what the denoiser
computes of it. Tables of that one's outputs, the keys and values of all layers, would spare its weights (77 MB for
Stable Diffusion 1.5), but are 32 times larger there (7.7 MB a prompt against 0.24): more in all from 11 prompts on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from slipcast.bundle.manifest import ClosedPrompts, TensorSpec
from slipcast.bundle.tensorfile import read_header
from slipcast.engines.onnxruntime import open_engine
from slipcast.progress import Advance
from slipcast.run.tokenizer import PromptTokenizer
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.model.checkpoint import tokenizer_file
from slipcast_compiler.plan import Plan

PROMPT_TABLE = "prompts.safetensors"


def cached_prompts(plan: Plan, exported: dict[str, Path], cache: Cache, advance: Advance) -> Path:
    """The file with, for every input of the denoiser that comes from text, float32 [prompts, ...], in the order of
    `plan.closed_prompts`: evaluated in fp32 by ONNX Runtime, or from the cache."""

    def make(out: Path) -> None:
        save_file(encode(plan, plan.closed_prompts, exported, advance)[1], out / PROMPT_TABLE)

    inputs = {
        "encoders": {name: exported[name].name for name in plan.not_shipped}, "prompts": plan.closed_prompts,
        "source": plan.checkpoint.sha256, "text_length": plan.sizes["text_length"],
    }  # fmt: skip
    return cache.get("prompts", inputs, make) / PROMPT_TABLE


def encode(
    plan: Plan, prompts: Sequence[str], exported: dict[str, Path], advance: Advance
) -> tuple[npt.NDArray[np.int64], dict[str, npt.NDArray[np.float32]]]:
    """Tokens of the first tokenizer, int64 [prompts, length], and what text encoders give, float32 [prompts, ...] by
    input of the denoiser: in fp32 by ONNX Runtime."""
    texts = plan.checkpoint.architecture.text
    tokens = [tokenizer_of(plan, text.tokenizer)(prompts) for text in texts]
    parts: dict[str, list[npt.NDArray[np.float32]]] = {}
    for place, (text, ids) in enumerate(zip(texts, tokens, strict=True)):
        with open_engine(exported[text.component] / f"{text.component}.onnx", None, "fp32") as engine:
            rows = []
            for done, row in enumerate(ids):  # one by one: memory does not grow with their number
                advance(place * len(ids) + done, len(texts) * len(ids))
                rows.append(engine({"input_ids": row[None]}))
        for output, denoiser_input in text.outputs:
            parts.setdefault(denoiser_input, []).append(np.concatenate([row[output] for row in rows]))
    return tokens[0], {name: np.concatenate(found, axis=-1) for name, found in parts.items()}


def tokenizer_of(plan: Plan, folder: str) -> PromptTokenizer:
    """The checkpoint's, as the runtime has it."""
    data, _, pad = tokenizer_file(plan.checkpoint, folder)
    with tempfile.TemporaryDirectory(prefix="slipcast-tokenizer-") as name:
        file = Path(name) / "tokenizer.json"
        file.write_bytes(data)
        return PromptTokenizer(file, plan.sizes["text_length"], pad)


def describe_prompts(plan: Plan, table: Path) -> ClosedPrompts:
    """The manifest's record of a table."""
    specs = (
        TensorSpec(name=name, dtype="float32", shape=entry.shape[1:]) for name, entry in read_header(table).items()
    )
    return ClosedPrompts(table=PROMPT_TABLE, prompts=plan.closed_prompts, outputs=tuple(specs))
