"""A pipeline from its configs alone: modules on torch's meta device, so that no weight is read."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slipcast.errors import ArtifactError, HostError, RecipeError, SlipcastError
from slipcast_compiler.capture.blocks import is_of_blocks, open_blocks
from slipcast_compiler.capture.shapes import META, is_pure, run_on_meta
from slipcast_compiler.host.quiet import quiet
from slipcast_compiler.model.configs import INDEXES, index_file, read_index

LARGE = 1 << 20  # numbers
LIBRARIES = ("diffusers", "transformers")
# Arguments of constructors for what judges or marks a picture that is made already. Code that reads pictures is no part
# of a program, and of bundles of described models these are no part either.
LEFT_OUT = {"safety_checker": None, "watermarker": None, "requires_safety_checker": False, "add_watermarker": False}


def open_without_weights(root: Path, pipeline: str | None = None) -> Any:
    """The pipeline of a diffusers directory; `pipeline`: a class in place of the one that model_index.json names, of
    diffusers, or of the user's own module ("package.module:Class"), in which components' classes are looked for too.

    RecipeError for code that comes with a checkpoint, which never runs; ArtifactError where a part cannot be made.
    """
    return open_parts(root, pipeline, _empty)


def open_parts(root: Path, pipeline: str | None, make: Callable[[Any, Path], nn.Module]) -> Any:
    """The same pipeline of modules that make(class, folder) makes."""
    index = read_index(root)
    with quiet():
        kind = find_pipeline(pipeline or str(index.get("_class_name")))
        if is_of_blocks(kind):
            return open_blocks(root, kind, partial(_part, root, kind=kind, make=make))
        parts: dict[str, Any] = left_out(kind)
        named = {name: given for name, given in index.items() if name[0] != "_" and name not in parts}
        parts |= {name: _part(root, name, given, kind, make) for name, given in named.items()}
    expected = inspect.signature(kind.__init__).parameters
    try:
        with quiet():
            pipe = kind(**{name: part for name, part in parts.items() if name in expected})
    except Exception as error:  # whatever its constructor thinks of its parts
        raise _unusable(f"{root}: {kind.__name__} cannot be made of its parts", error) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def open_with_weights(root: Path, pipeline: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """The same pipeline with its weights, for inference. HostError where they cannot be loaded."""
    kind = find_pipeline(pipeline or str(read_index(root).get("_class_name")))
    given = {"torch_dtype": dtype, "local_files_only": True, "use_safetensors": True}
    try:
        with quiet():
            if is_of_blocks(kind) or index_file(root).name == INDEXES[1]:  # which no other pipeline's loader reads
                return open_parts(root, pipeline, lambda part, folder: part.from_pretrained(folder, **given).eval())
            pipe = kind.from_pretrained(root, **given, **left_out(kind))
    except Exception as error:  # of diffusers, transformers, safetensors: each has its own
        raise HostError(f"{root}: its weights cannot be loaded", got=error) from error
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.eval()
    return pipe


def left_out(kind: Any) -> dict[str, Any]:
    """The arguments of a pipeline's constructor that leave out what it can do without; see LEFT_OUT."""
    optional, parameters = getattr(kind, "_optional_components", ()), inspect.signature(kind.__init__).parameters
    return {
        name: without
        for name, without in LEFT_OUT.items()
        if name in parameters and (without is not None or name in optional)
    }


def find_pipeline(name: str) -> Any:
    """A pipeline's class by its name in diffusers, or as "package.module:Class"."""
    module, _, own = name.rpartition(":")
    try:
        found = getattr(importlib.import_module(module or "diffusers"), own, None)
    except ImportError as error:
        raise RecipeError(f"model.pipeline: {module} cannot be imported", got=str(error)) from None
    if not inspect.isclass(found) or not hasattr(found, "set_progress_bar_config"):
        raise RecipeError(
            f"there is no pipeline {name}",
            expected="a class of diffusers, or package.module:Class",
            got=name,
            hint="pip install --upgrade diffusers, if it is newer than the one that is installed",
        )
    return found


def _part(root: Path, name: str, given: Any, kind: Any, make: Callable[[Any, Path], nn.Module]) -> Any:
    """A component, or a plain value of the pipeline's config."""
    if not (isinstance(given, list) and len(given) == 2):
        return given
    library, class_name = given
    if not class_name:
        return None
    found = _class_of(str(library), str(class_name), kind)
    if found is None and library in LIBRARIES:
        raise RecipeError(
            f"{root}: component {name} is of a class that the installed {library} does not have",
            expected=f"a class of {library}",
            got=class_name,
            hint=f"install the version of {library} that the checkpoint was made with, or a newer one",
        )
    if found is None:
        raise RecipeError(
            f"{root}: component {name} needs code that comes with the checkpoint, which never runs",
            expected="a class of diffusers or transformers",
            got=f"{library}.{class_name}",
        )
    try:
        if issubclass(found, nn.Module):
            return make(found, root / name)
        trust = {"trust_remote_code": False} if library == "transformers" else {}  # it would ask the user
        return found.from_pretrained(root / name, local_files_only=True, **trust)
    except SlipcastError:
        raise
    except Exception as error:  # every library has errors of its own for a missing file, or one that it cannot read
        raise _unusable(f"{root / name}: no {class_name} can be made of it", error) from error


def _class_of(library: str, name: str, kind: Any) -> Any:
    """In diffusers a component may be of a pipeline's own folder, which the index calls by its last name; where the
    pipeline is of the user's own module, so may they be."""
    if library in LIBRARIES:
        return getattr(importlib.import_module(library), name, None)
    own = sys.modules[kind.__module__]
    if kind.__module__.partition(".")[0] != "diffusers" and hasattr(own, name):
        return getattr(own, name)
    pipelines = importlib.import_module("diffusers.pipelines")
    return getattr(getattr(pipelines, library, None), name, None) if library.isidentifier() else None


def _empty(found: Any, folder: Path) -> nn.Module:
    """A module for inference, without weights."""
    with without_weights():
        if hasattr(found, "config_class"):  # of transformers
            config = found.config_class.from_pretrained(folder, local_files_only=True)
            module = found._from_config(config, dtype=torch.float32)
        else:
            module = found.from_config(found.load_config(folder, local_files_only=True))
    return module.eval()


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Within it, modules are made with parameters on the meta device, and with the buffers that constructors compute,
    but for large tables of floats, such as sines of positions: their numbers are zero, and take no memory."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False), _LargeAsZeros():
        yield


class _LargeAsZeros(TorchDispatchMode):  # type: ignore[misc]
    """What is computed from many floats is computed for its shape."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        moves = torch.device(kwargs.get("device") or "cpu") == META  # a weight, which goes there
        if not moves and is_pure(func) and any(map(_is_large, tree_leaves((args, kwargs)))):
            return run_on_meta(func, args, kwargs)
        return func(*args, **kwargs)


def _is_large(value: Any) -> bool:
    there = isinstance(value, torch.Tensor) and not value.is_meta and value.is_floating_point()
    return there and value.numel() > LARGE


def _unusable(what: str, error: Exception) -> ArtifactError:
    return ArtifactError(what, got=f"{type(error).__name__}: {error}".splitlines()[0])
