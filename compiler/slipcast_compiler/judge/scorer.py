"""The CLIP that says how well a picture fits a text."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slipcast.bundle.validation import parse_json
from slipcast.errors import HostError, RecipeError
from slipcast_compiler.host.quiet import quiet

Floats = npt.NDArray[np.float32]
BATCH = 16
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_HUB = re.compile(r"[\w-][\w.-]*/[\w.-]+@[\w./-]+")  # so that the same scorer judges again


class Scorer:
    """CLIP score: cosine of a picture's and a text's embeddings (Hessel et al., arXiv 2104.08718)."""

    def __init__(self, path: str, folder: Path) -> None:
        with quiet():
            self._load(path, folder)

    def _load(self, path: str, folder: Path) -> None:
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

        where = _directory(find_scorer(path, folder))
        try:
            self._model = CLIPModel.from_pretrained(where, use_safetensors=True, local_files_only=True).float().eval()
            self._tokenizer = CLIPTokenizer.from_pretrained(where, local_files_only=True)
            size = self._model.config.vision_config.image_size
            processed = (where / "preprocessor_config.json").is_file()
            # A scorer without a processor of its own takes pictures in [-1, 1], as it was trained.
            self._processor = CLIPImageProcessor.from_pretrained(where) if processed else CLIPImageProcessor(
                size={"shortest_edge": size}, crop_size={"height": size, "width": size},
                image_mean=[0.5] * 3, image_std=[0.5] * 3,
            )  # fmt: skip
        except Exception as error:  # the library raises of many types, most of them for files that are not a CLIP's
            got = f"{type(error).__name__}: {error}".splitlines()[0]
            raise HostError(f"evaluate.scorer: {where} cannot be loaded", got=got) from error

    def __call__(self, images: Floats, prompts: Sequence[str | None]) -> Floats:
        """float32 [n], image i against prompt i."""
        scores: Floats = (self.embed_pictures(images) * self.embed_texts(prompts)).sum(-1)
        return scores

    def embed_pictures(self, images: Floats) -> Floats:
        """float32 [n, d] of length 1, of pictures [n, h, w, 3] in [0, 1]."""
        import torch
        from PIL import Image

        made = []
        for batch in _batches(images):
            pictures = [Image.fromarray((image * 255).round().astype(np.uint8)) for image in batch]
            pixels = self._processor(pictures, return_tensors="pt").pixel_values
            with torch.no_grad():
                made.append(self._model.get_image_features(pixel_values=pixels))
        return _unit(made)

    def embed_texts(self, texts: Sequence[str | None]) -> Floats:
        """float32 [n, d] of length 1. Within a call, texts that the scorer cuts to the same tokens are bit-equal."""
        import torch

        length = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            [text or "" for text in texts], padding="max_length", max_length=length, truncation=True,
            return_tensors="np",
        )  # fmt: skip
        both = np.stack([tokens.input_ids, tokens.attention_mask], axis=1)
        distinct, where = np.unique(both, axis=0, return_inverse=True)
        made = []
        for batch in _batches(torch.from_numpy(distinct)):
            with torch.no_grad():
                made.append(self._model.get_text_features(input_ids=batch[:, 0], attention_mask=batch[:, 1]))
        found: Floats = _unit(made)[where.reshape(-1)]
        return found

    @cached_property
    def sha256(self) -> str:
        """Over the names and values of all weights: figures of two scorers cannot be compared."""
        return digest(self._model.state_dict())


def find_scorer(path: str, folder: Path) -> Path | str:
    """A scorer's directory (relative to `folder`), or else the hub id with its revision; RecipeError where it can be
    neither, or has no weights in safetensors: nothing is ever unpickled."""
    local = folder / path
    if local.is_dir():
        _check_weights(local)
        return local
    if not _HUB.fullmatch(path):
        raise RecipeError(
            "evaluate.scorer does not exist",
            expected="a CLIP directory, or a hub id with a revision: NAME/MODEL@COMMIT",
            got=str(local),
        )
    return path


def _check_weights(folder: Path) -> None:
    """RecipeError where it has no weights in safetensors, or an index of them leads to something else."""
    if not (known := [folder / name for name in WEIGHTS if (folder / name).is_file()]):
        found = ", ".join(sorted(file.name for file in folder.iterdir())[:20]) or "nothing"
        raise RecipeError(
            f"evaluate.scorer: {folder} has no weights",
            expected=" or ".join(WEIGHTS),
            got=found,
            hint="save it again with safe_serialization=True: pickles are not read",
        )
    if known[0].suffix == ".json":
        document = parse_json(known[0].read_bytes(), str(known[0]))
        names = set((document.get("weight_map") if isinstance(document, dict) else None) or {"": ""}.values())
        if strays := [name for name in names if not str(name).endswith(".safetensors") or "/" in str(name)]:
            raise RecipeError(f"{known[0]}: leads elsewhere", expected="*.safetensors", got=repr(strays[0])[:200])


def _directory(found: Path | str) -> Path:
    """The scorer's directory: what the hub has is downloaded, but for pickles. HostError where that fails."""
    if isinstance(found, Path):
        return found
    from huggingface_hub import snapshot_download

    name, _, revision = found.partition("@")
    try:
        root = Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.txt", "*.safetensors"]))
    except Exception as error:  # the library raises many kinds, all of which mean that it could not be fetched
        raise HostError(
            f"evaluate.scorer: {found} cannot be downloaded",
            got=str(error).splitlines()[0],
            hint="check the network and the name, or download it elsewhere and give its directory",
        ) from error
    _check_weights(root)
    return root


def digest(weights: Mapping[str, Any]) -> str:
    """SHA-256 over names and values of tensors, whatever file they came from."""
    sha256 = hashlib.sha256()
    for name in sorted(weights):
        sha256.update(name.encode() + b"\0" + weights[name].contiguous().numpy().tobytes())
    return sha256.hexdigest()


def _batches(items: Any) -> Iterator[Any]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]


def _unit(features: list[Any]) -> Floats:
    joined = np.concatenate([getattr(each, "pooler_output", each).numpy() for each in features])
    unit: Floats = joined / np.linalg.norm(joined, axis=-1, keepdims=True)
    return unit
