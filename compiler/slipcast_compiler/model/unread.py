"""Weights of a checkpoint that are not read until they are asked for, in the form that a library gives them.

Libraries rename, cast, transpose, merge and tie what files hold, each by rules of its own, which change from release to
release. So it is their own loaders that run, on tensors that have shapes alone: those remember the operators that they
went through, and reading one runs these on what its files hold. A parameter is read by itself, and as it would be if
all were loaded.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map

from slipcast.bundle.tensorfile import TensorEntry, read_header
from slipcast.errors import ArtifactError
from slipcast_compiler.model.configs import read_json
from slipcast_compiler.model.weight_files import find_weight_files

_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


class Unread(torch.Tensor):  # type: ignore[misc]
    """A tensor on the CPU, to all who ask for its shape and dtype. Whoever asks for a number has it read."""

    @staticmethod
    def __new__(cls, like: torch.Tensor, read: Callable[[], torch.Tensor]) -> Unread:
        made: Unread = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device="cpu"
        )
        return made

    def __init__(self, like: torch.Tensor, read: Callable[[], torch.Tensor]) -> None:
        self._like, self._read = like, read

    def read(self) -> torch.Tensor:
        """Its numbers. ArtifactError where a floating-point one is NaN or infinite."""
        with torch.no_grad():
            return self._read()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            raise NotImplementedError(f"{func} writes into what is not read yet")

        def run() -> Any:
            return func(*tree_map(_number, args), **tree_map(_number, kwargs))

        if not any("Tensor" in str(each.type) for each in func._schema.returns):  # a comparison, say
            return run()
        shapes = func(*tree_map(_shape, args), **tree_map(_shape, kwargs))
        if isinstance(shapes, torch.Tensor):
            return cls(shapes, run)
        return [cls(shape, functools.partial(_one_of, run, place)) for place, shape in enumerate(shapes)]


def load_unread(kind: Any, folder: Path) -> tuple[nn.Module, set[str]]:
    """A component of a class of diffusers or transformers, with weights that are not read: in fp32, for inference; and
    the names of parameters that its checkpoint has no tensor for.

    `folder` has its weights under plain names, see links.py; ArtifactError where it has none. Of the libraries' own
    errors, whichever they have, nothing is caught.
    """
    options = {"local_files_only": True, "output_loading_info": True}
    library = "transformers" if hasattr(kind, "config_class") else "diffusers"
    chosen = find_weight_files(folder, library, None, read_json)
    if library == "transformers":  # which take what is in no file, too
        config = kind.config_class.from_pretrained(folder, local_files_only=True)
        state = open_unread(chosen.files)
        made, told = kind.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32, **options)
    else:
        with _files_unread():
            made, told = kind.from_pretrained(folder, torch_dtype=torch.float32, use_safetensors=True, **options)
    return made.eval(), {*told["missing_keys"]} & {name for name, _ in made.named_parameters(remove_duplicate=False)}


def open_unread(files: tuple[Path, ...]) -> dict[str, Unread]:
    """By name, the tensors of safetensors files."""
    return {
        name: Unread(torch.empty(entry.shape, dtype=_DTYPES[entry.dtype], device="meta"), _reader(file, entry))
        for file in files
        for name, entry in read_header(file).items()
    }


def _reader(file: Path, entry: TensorEntry) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        count = entry.end - entry.start
        raw = np.fromfile(file, np.uint8, count, offset=entry.start)
        if raw.size != count:
            raise ArtifactError(f"{file}: tensor {entry.name!r} is cut off", expected=f"{count} bytes", got=raw.size)
        dtype = _DTYPES[entry.dtype]
        tensor = torch.from_numpy(raw).view(dtype) if count else torch.empty(0, dtype=dtype)
        if dtype.is_floating_point and not bool(_comparable(tensor).isfinite().all()):
            raise ArtifactError(f"{file}: NaN or infinity in tensor {entry.name!r}", expected="finite numbers")
        return tensor.reshape(entry.shape)

    return read


def _comparable(tensor: torch.Tensor) -> torch.Tensor:
    """In a dtype that torch can compare: it knows those of eight bits for storage alone."""
    return tensor if tensor.element_size() > 1 else tensor.half()


@contextlib.contextmanager
def _files_unread() -> Iterator[None]:
    """Within it, what diffusers loads from files is not read."""
    import safetensors.torch

    usual = safetensors.torch.load_file
    safetensors.torch.load_file = lambda file, device="cpu": open_unread((Path(file),))
    try:
        yield
    finally:
        safetensors.torch.load_file = usual


def _one_of(run: Callable[[], Any], place: int) -> Any:
    return run()[place]


def _shape(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value._like if isinstance(value, Unread) else value.to("meta")
    return torch.device("meta") if isinstance(value, torch.device) else value


def _number(value: Any) -> Any:
    return value.read() if isinstance(value, Unread) else value
