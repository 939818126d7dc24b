"""The text encoders of a closed family, evaluated for all of its prompts when compiling: they are not shipped.

The table holds what text encoders give, also where a cut made a component `denoiser_prompt` of what the denoiser
computes of it. Tables of that one's outputs, the keys and values of all layers, would spare its weights (77 MB for
Stable Diffusion 1.5), but are 32 times larger there (7.7 MB a prompt against 0.24): more in all from 11 prompts on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from slipcast.bundle.manifest import ClosedPrompts, TensorSpec
from slipcast.bundle.tensorfile import read_header
from slipcast.engines.onnxruntime import open_engine
from slipcast.progress import Advance
from slipcast.run.tokenizer import PromptTokenizer
from slipcast_compiler.export.graphs import Graphs
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.model.original import Original

PROMPT_TABLE = "prompts.safetensors"


def tabulate_prompts(graphs: Graphs, prompts: tuple[str, ...], cache: Cache, advance: Advance) -> Graphs:
    """With a table of these prompts, all that the bundle takes, in place of the text encoders.

    It has, for every input of the denoiser that comes from text, float32 [prompts, ...]: evaluated in fp32 by ONNX
    Runtime, or from the cache.
    """
    original = graphs.original
    encoders = tuple(text.component for text in original.checkpoint.architecture.text)

    def make(out: Path) -> None:
        save_file(encode(original, prompts, graphs.components, advance)[1], out / PROMPT_TABLE)

    inputs = {
        "encoders": {name: graphs.components[name].name for name in encoders},
        "prompts": prompts,
        "source": original.checkpoint.sha256,
        "text_length": original.sizes["text_length"],
    }
    return graphs.without(encoders).add(prompts=cache.get("prompts", inputs, make) / PROMPT_TABLE, closed=prompts)


def encode(
    original: Original, prompts: Sequence[str], components: Mapping[str, Path], advance: Advance
) -> tuple[npt.NDArray[np.int64], dict[str, npt.NDArray[np.float32]]]:
    """Tokens of the first tokenizer, int64 [prompts, length], and what text encoders give, float32 [prompts, ...] by
    input of the denoiser: in fp32 by ONNX Runtime."""
    texts = original.checkpoint.architecture.text
    tokens = [open_tokenizer(original, text.tokenizer)(prompts) for text in texts]
    parts: dict[str, list[npt.NDArray[np.float32]]] = {}
    for place, (text, ids) in enumerate(zip(texts, tokens, strict=True)):
        with open_engine(components[text.component] / f"{text.component}.onnx", None, "fp32") as engine:
            rows = []
            for done, row in enumerate(ids):  # one by one: memory does not grow with their number
                advance(place * len(ids) + done, len(texts) * len(ids))
                rows.append(engine({"input_ids": row[None]}))
        for output, denoiser_input in text.outputs:
            parts.setdefault(denoiser_input, []).append(np.concatenate([row[output] for row in rows]))
    return tokens[0], {name: np.concatenate(found, axis=-1) for name, found in parts.items()}


def open_tokenizer(original: Original, folder: str) -> PromptTokenizer:
    """The checkpoint's, as the runtime has it."""
    found = original.tokenizers[folder]
    with tempfile.TemporaryDirectory(prefix="slipcast-tokenizer-") as name:
        file = Path(name) / "tokenizer.json"
        file.write_bytes(found.data)
        return PromptTokenizer(file, original.sizes["text_length"], found.pad_token_id)


def prompts_record(prompts: tuple[str, ...], table: Path) -> ClosedPrompts:
    """The manifest's record of a table."""
    specs = (
        TensorSpec(name=name, dtype="float32", shape=entry.shape[1:]) for name, entry in read_header(table).items()
    )
    return ClosedPrompts(table=PROMPT_TABLE, prompts=prompts, outputs=tuple(specs))
