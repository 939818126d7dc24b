"""A checkpoint: a diffusers directory, read without loading it."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from slipcast.bundle.tensorfile import TensorEntry, read_header, read_tensor
from slipcast.errors import ArtifactError, HostError, RecipeError
from slipcast.sampling.schedules import NoiseProcess
from slipcast_compiler.host.quiet import quiet
from slipcast_compiler.model.architectures import Architecture, architecture
from slipcast_compiler.model.configs import index_file, read_index, read_json
from slipcast_compiler.model.library import library_class
from slipcast_compiler.model.links import check_variant, linked
from slipcast_compiler.model.single_file import convert
from slipcast_compiler.model.weight_files import WeightFiles, find_weight_files, is_weights, variants_of
from slipcast_compiler.recipe.recipe import ModelTable

# Names that published checkpoints use for parameters which the libraries of today call otherwise.
RENAMES: tuple[tuple[str, str], ...] = (
    (r"^", "text_model."),  # CLIP text encoders up to transformers 4; version 5 has dropped the prefix
    (r"\.to_q\.", ".query."),  # the attention of autoencoders before diffusers 0.18
    (r"\.to_k\.", ".key."),
    (r"\.to_v\.", ".value."),
    (r"\.to_out\.0\.", ".proj_attn."),
)
Found = TypeVar("Found")
_FEW_STEP_EULER = {"EulerDiscreteScheduler": "euler", "EulerAncestralDiscreteScheduler": "euler_ancestral"}


@dataclass(frozen=True)
class Weight:
    """One tensor of a checkpoint, not yet read."""

    file: Path
    entry: TensorEntry

    def read(self) -> npt.NDArray[Any]:
        """float32 for floating-point tensors; ArtifactError where it is not finite."""
        array = read_tensor(self.file, self.entry)
        return array.astype(np.float32) if np.issubdtype(array.dtype, np.floating) else array


@dataclass(frozen=True)
class Checkpoint:
    """`name` is what the recipe called it; `root` the directory it was found in; `variant` the weights it prefers."""

    root: Path
    name: str
    variant: str | None = None

    @cached_property
    def index(self) -> dict[str, Any]:
        """See read_index."""
        return read_index(self.root)

    @cached_property
    def architecture(self) -> Architecture:
        """What is known of this class of pipelines."""
        return architecture(str(self.index.get("_class_name", "?")))

    @cached_property
    def process(self) -> NoiseProcess:
        """The noise process the denoiser was trained on, from the scheduler's config."""
        return NoiseProcess.from_scheduler_config(self.scheduler)

    @property
    def few_step_sampler(self) -> str | None:
        """The sampler of a checkpoint that was distilled to few steps without guidance; None if it was not, it seems.

        LCM is published with a scheduler of its own, Turbo and Lightning with Euler's on trailing timesteps. Other
        models are on trailing timesteps for their zero terminal SNR, and say so.
        """
        name, euler = self.scheduler.get("_class_name"), _FEW_STEP_EULER
        if name == "LCMScheduler":
            return "lcm"
        config = self.scheduler
        distilled = config.get("timestep_spacing") == "trailing" and not config.get("rescale_betas_zero_snr")
        return euler.get(str(name)) if distilled and config.get("prediction_type", "epsilon") == "epsilon" else None

    @cached_property
    def scheduler(self) -> dict[str, Any]:
        """scheduler_config.json."""
        return read_json(self.root / "scheduler" / "scheduler_config.json")

    @cached_property
    def factor(self) -> int:
        """Pixels per latent cell."""
        if "vae_decoder" not in self.architecture.components:
            return 1
        return int(2 ** (len(self.config("vae")["block_out_channels"]) - 1))

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The dimensions that the configs fix."""
        return {name: int(self.config(folder)[key]) for name, (folder, key) in self.architecture.sizes.items()}

    @cached_property
    def native_size(self) -> tuple[int, int]:
        """(width, height) in pixels that the denoiser was trained for."""
        config = self.config(self.architecture.components["denoiser"].folder)
        sample = config["sample_size"] or 64
        rows, columns = (sample, sample) if isinstance(sample, int) else sample
        if self.architecture.text and isinstance(sample, int) and sample < 64 and _is_old(config):
            rows = columns = 64  # as diffusers' pipeline has it: the default of then was too small for these models
        return columns * self.factor, rows * self.factor

    @property
    def not_compiled(self) -> tuple[str, ...]:
        """Parts that this checkpoint has and a bundle leaves out."""
        return tuple(part for part in self.architecture.not_compiled if (self.index.get(part) or [None])[0])

    def __reduce__(self) -> tuple[Any, ...]:
        """Without what was read so far, some of which (code of the architecture) cannot go to another process."""
        return Checkpoint, (self.root, self.name, self.variant)

    def config(self, folder: str) -> dict[str, Any]:
        """config.json of a component's folder, completed by its class's defaults: older files lack newer keys."""
        given = read_json(self.root / folder / "config.json")
        library, name = self.class_of(folder)
        kind = library_class(library, name)
        if library == "transformers":
            return dict(kind.config_class.from_dict(given).to_dict())
        parameters = inspect.signature(kind.__init__).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty} | given

    def class_of(self, folder: str) -> tuple[str, str]:
        """(library, class name) of a component, from model_index.json."""
        entry = self.index.get(folder)
        library, name = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        if library not in ("diffusers", "transformers"):
            raise RecipeError(
                f"{self.name}: component {folder} needs code of its own",
                expected="a class of diffusers or transformers", got=f"{library}.{name}",
            )  # fmt: skip
        return library, str(name)

    def weights(self, folder: str) -> dict[str, Weight]:
        """All tensors of a component by their name in the checkpoint."""
        return {
            name: Weight(file, entry)
            for file in self.weight_files(folder)
            for name, entry in read_header(file).items()
        }  # fmt: skip

    def weight_files(self, folder: str) -> list[Path]:
        """The safetensors files of a component: see model/weight_files.py."""
        return list(self.chosen_weights(folder).files)

    def chosen_weights(self, folder: str) -> WeightFiles:
        """The variant of a component's weights that is taken."""
        library = self.class_of(folder)[0] if index_file(self.root).exists() else ""
        return find_weight_files(self.root / folder, library, self.variant, read_json)

    @cached_property
    def files(self) -> list[Path]:
        """All files that a bundle depends on."""
        weighty = {source.folder for source in self.architecture.components.values()}
        files = [index_file(self.root)]
        for folder in weighty | {text.tokenizer for text in self.architecture.text} | {"scheduler"}:
            inside = [file for file in (self.root / folder).rglob("*") if file.is_file()]
            if folder in weighty:
                chosen = self.chosen_weights(folder)
                taken = {*chosen.files, *([chosen.index] if chosen.index else [])}
                inside = [file for file in inside if file in taken or not is_weights(file)]
            files += inside
        return sorted(files)

    @contextmanager
    def as_diffusers(self) -> Iterator[Path]:
        """A directory of links for diffusers to load, which has no weights but those that are taken, and no pickles."""
        folders = {source.folder for source in self.architecture.components.values()}
        folders |= {text.tokenizer for text in self.architecture.text} | {"scheduler"}
        with linked(self.root, folders, self.variant) as root:
            yield root

    @cached_property
    def sha256(self) -> str:
        """Over names and contents of all files that a bundle depends on."""
        total = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            total.update(f"{file.relative_to(self.root).as_posix()}\0{digest}\n".encode())
        return total.hexdigest()


def open_checkpoint(table: ModelTable, folder: Path) -> Checkpoint:
    """What locate finds; RecipeError where no component has the variant that it is to prefer."""
    root, name = locate(table, folder)
    return _with_variant(Checkpoint(root, name, table.variant))


def locate(table: ModelTable, folder: Path) -> tuple[Path, str]:
    """The directory of a checkpoint, and what it is called: a local directory or file (relative to `folder`), or else a
    hub id with a revision, which is downloaded."""
    local = folder / table.path
    if local.is_dir():
        return local.resolve(), table.path
    if local.exists():
        made = convert(local, folder / table.config if table.config else None)
        return made.resolve(), table.path
    if table.path.count("/") != 1 or table.path.startswith((".", "/")):
        raise RecipeError("model.path does not exist", expected="a diffusers directory, or a hub id", got=str(local))
    if not table.revision:
        raise RecipeError(
            f"model.path: no directory {local}; as a hub id it needs model.revision",
            expected="a commit hash or tag, so that the compile can be repeated",
        )
    from huggingface_hub import snapshot_download

    try:
        root = snapshot_download(
            table.path, revision=table.revision, allow_patterns=["*.json", "*.txt", "*.safetensors", "*.model"]
        )
    except Exception as error:  # the library raises many kinds, all of which mean that it could not be fetched
        raise HostError(
            f"{table.path}@{table.revision}: cannot be downloaded", got=str(error).splitlines()[0],
            hint="check the network and the name, or download it elsewhere and give its directory as model.path",
        ) from error  # fmt: skip
    return Path(root), f"{table.path}@{table.revision}"


def _with_variant(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint; RecipeError where no component has the variant that it is to prefer."""
    folders = [source.folder for source in checkpoint.architecture.components.values()]
    found = [variants_of(checkpoint.root / folder, read_json) for folder in folders]
    check_variant(checkpoint.name, checkpoint.variant, set().union(*found))
    return checkpoint


def _is_old(config: Mapping[str, Any]) -> bool:
    """Whether a config was written by diffusers before 0.9."""
    numbers = re.match(r"(\d+)\.(\d+)", str(config.get("_diffusers_version", "")))
    return numbers is not None and (int(numbers[1]), int(numbers[2])) < (0, 9)


def find_weight(parameter: str, weights: Mapping[str, Found]) -> Found | None:
    """The tensor for a parameter, under its name or a name of older checkpoints; None where there is none."""
    candidates = [parameter, parameter.removeprefix("text_model.")]
    candidates += [re.sub(pattern, old, parameter) for pattern, old in RENAMES]
    return next((weights[name] for name in candidates if name in weights), None)


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer of a checkpoint: the content of tokenizer.json, the most tokens it gives, and the id that pads."""

    data: bytes
    length: int
    pad_token_id: int


def read_tokenizer(checkpoint: Checkpoint, folder: str) -> Tokenizer:
    """As transformers reads it, from whichever file has it; ArtifactError where it is not usable."""
    library, name = checkpoint.class_of(folder)
    try:
        with quiet():
            tokenizer = library_class(library, name).from_pretrained(checkpoint.root / folder, local_files_only=True)
        # The version 4 of transformers wraps a Python tokenizer under this name; the fast one has the same vocabulary.
        if not hasattr(tokenizer, "backend_tokenizer"):
            tokenizer = library_class(library, f"{name}Fast").from_pretrained(checkpoint.root / folder)
        data = tokenizer.backend_tokenizer.to_str().encode()
        return Tokenizer(data, int(tokenizer.model_max_length), int(tokenizer.pad_token_id))
    except Exception as error:  # a missing file, an unknown token, a broken vocabulary: each is another type
        raise ArtifactError(
            f"{checkpoint.root / folder}: not a usable tokenizer", expected=f"the files of a {name}",
            got=f"{type(error).__name__}: {error}".splitlines()[0],
        ) from error  # fmt: skip


def empty_module(checkpoint: Checkpoint, folder: str) -> Any:
    """A component's module for inference, with its parameters on torch's meta device and its buffers computed."""
    from accelerate import init_empty_weights
    from torch import float32

    library, class_name = checkpoint.class_of(folder)
    kind = library_class(library, class_name)
    with init_empty_weights(include_buffers=False):
        if library == "diffusers":
            return kind.from_config(checkpoint.config(folder)).eval()
        config = kind.config_class.from_pretrained(checkpoint.root / folder)
        return kind._from_config(config, attn_implementation="sdpa", dtype=float32).eval()
