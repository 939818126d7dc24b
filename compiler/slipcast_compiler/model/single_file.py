"""A checkpoint in one file, as it is often published: diffusers makes a directory of it, by configs that lie here."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from slipcast.bundle.tensorfile import read_header
from slipcast.errors import ArtifactError, RecipeError
from slipcast_compiler.host.quiet import quiet
from slipcast_compiler.model.weight_files import PICKLES, is_weights

CONVERTED = Path("artifacts/models")  # where the directories are kept, by the digest of what they were made of
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_EXPECTED = "a diffusers directory, or a .safetensors file with model.config"


def refuse_file(file: Path) -> None:
    """RecipeError for a file that is never read, or for none."""
    if not file.exists():
        raise RecipeError(f"{file}: no such file or directory", expected=_EXPECTED)
    suffix = file.suffix.lower()
    if suffix == ".gguf":
        raise RecipeError(
            f"{file}: weights in GGUF are quantised for other runtimes", expected=_EXPECTED, got="a GGUF file",
            hint="take the checkpoint that it was made of; slipcast quantises on its own",
        )  # fmt: skip
    if suffix in PICKLES:
        raise RecipeError(
            f"{file}: a pickle is never loaded", expected=_EXPECTED, got=suffix,
            hint="convert it to safetensors where you trust it",
        )  # fmt: skip
    if suffix != ".safetensors":
        raise RecipeError(f"{file}: not a checkpoint", expected=_EXPECTED, got=suffix or "a file without a suffix")


def convert(file: Path, config: Path | None) -> Path:
    """The directory that diffusers' from_single_file makes of the file, with `config`: a diffusers directory of the
    same kind of model, of which the weights are not needed. Nothing is downloaded, and no pickle is read.

    It is made once, in CONVERTED. Raises RecipeError where there is no config, ArtifactError where they do not fit.
    """
    refuse_file(file)
    if config is None:
        raise RecipeError(
            f"{file}: a checkpoint in one file holds neither configs nor a tokenizer", expected="model.config",
            got="none",
            hint="give model.config, a diffusers directory of the same kind of model; its weights are not needed",
        )  # fmt: skip
    if not (config / "model_index.json").is_file():
        raise RecipeError("model.config: no model_index.json", expected="a diffusers directory", got=str(config))
    made = CONVERTED / f"{file.stem}-{_digest(file, config)[:16]}"
    if not made.is_dir():
        CONVERTED.mkdir(parents=True, exist_ok=True)
        work = Path(mkdtemp(prefix=".making-", dir=CONVERTED))
        try:
            _convert(file, config, work)
            if not made.is_dir():  # by another compile
                work.rename(made)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return made


def _digest(file: Path, config: Path) -> str:
    total = hashlib.sha256()
    parts = [each for each in sorted(config.rglob("*")) if each.is_file() and not is_weights(each)]
    for each in (file, *parts):
        with each.open("rb") as stream:
            total.update(f"{each.name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def _convert(file: Path, config: Path, out: Path) -> None:
    dtypes = Counter(entry.dtype for entry in read_header(file).values())
    most = _DTYPES.get(dtypes.most_common(1)[0][0] if dtypes else "", "float32")
    try:
        with quiet():
            import torch
            from diffusers import StableDiffusionPipeline

            without: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
            pipe = StableDiffusionPipeline.from_single_file(
                str(file), config=str(config), local_files_only=True, torch_dtype=getattr(torch, most), **without
            )
            pipe.save_pretrained(out, safe_serialization=True)
    except Exception as error:  # whatever does not fit, it is of another type in every library
        raise ArtifactError(
            f"{file}: diffusers cannot load it with the configs of {config}",
            expected="model.config of the same kind of model", got=f"{type(error).__name__}: {error}".splitlines()[0],
        ) from error  # fmt: skip
