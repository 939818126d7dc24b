"""Pipelines of blocks: what they run is put together from blocks, which read and write one state, and may be exchanged.

diffusers calls them modular. They are made and called otherwise than other pipelines: see Modular Diffusers in its
documentation. Here they are given the manners of the others.
"""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from slipcast.errors import ArtifactError
from slipcast_compiler.model.configs import INDEXES, index_file, read_index, read_json

SCALE, OUTPUT = "guidance_scale", "output"


def is_of_blocks(pipe: Any) -> bool:
    """Of a pipeline, or of its class."""
    return hasattr(pipe, "default_blocks_name")


def open_blocks(root: Path, kind: Any, part: Callable[[str, Any], Any]) -> Any:
    """A pipeline of blocks, of components that part(name, [library, class]) makes. Those that the directory has not are
    None: only some of the things that such a pipeline can do need them. ArtifactError where it cannot be made."""
    file, index = index_file(root), read_index(root)
    known = {"modular_config_dict" if file.name == INDEXES[1] else "config_dict": read_json(file)}
    _check_blocks(root, index)
    try:
        pipe = kind(pretrained_model_name_or_path=str(root), **known)
    except Exception as error:  # such as blocks whose code comes with the checkpoint
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ArtifactError(f"{root}: {kind.__name__} cannot be made", got=said) from error
    here = [name for name in pipe.pretrained_component_names if name in index and (root / name).is_dir()]
    pipe.update_components(**{name: part(name, index[name]) for name in here})
    return with_manners(pipe)


def with_manners(pipe: Any) -> Any:
    """The same pipeline, without progress bars; the guidance of its guiders is an argument of the call."""
    kind = type(pipe)

    def call(self: Any, **arguments: Any) -> Any:
        scales = {name: arguments.pop(name) for name in _guiders(self) if name in arguments}
        with _scaled(self, scales):
            return kind.__call__(self, **arguments)

    pipe.__class__ = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
    for block in _blocks(pipe.blocks):
        if hasattr(block, "set_progress_bar_config"):
            block.set_progress_bar_config(disable=True)
    return pipe


def parameters_of(pipe: Any, call: Mapping[str, Any] | None = None) -> dict[str, Parameter]:
    """The arguments of pipe(...) by name. A pipeline of blocks takes what its blocks read (of a call: those that it
    runs), the scale of its guidance, and `output`: the name, or names, of what it returns."""
    if not is_of_blocks(pipe):
        return {name: each for name, each in signature(type(pipe).__call__).parameters.items() if name != "self"}
    blocks, made = pipe.blocks, {each.name for each in pipe.blocks.intermediate_outputs}
    if call is not None and _chooses(blocks):
        usual = {each.name: each.default for each in blocks.inputs if each.name}
        blocks = blocks.get_execution_blocks(**usual | dict(call)) or blocks
    read = {each.name: _parameter(each, each.name in made) for each in blocks.inputs if each.name}
    guided = {name: _keyword(name, getattr(part, SCALE)) for name, part in _guiders(pipe).items()}
    return guided | read | {OUTPUT: _keyword(OUTPUT, pipe.blocks.outputs[0].name)}


def _parameter(given: Any, made: bool) -> Parameter:
    """Of what a block reads; `made`: whether another block makes it. A picture that none makes has to be given, where
    it is required. One without a type is known by its name."""
    kind = given.type_hint
    if kind is None and re.fullmatch(r"(\w+_)?images?", given.name):
        kind = Image.Image
    found = Parameter(given.name, Parameter.KEYWORD_ONLY, default=given.default, annotation=kind)
    required = given.required and not made and "image" in str(kind).lower()
    return found.replace(default=Parameter.empty) if required else found


def _keyword(name: str, default: Any) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=type(default))


def is_picture(parameter: Parameter) -> bool:
    """Whether an argument of a pipeline is a picture, by its name or its type."""
    return "image" in parameter.name.lower() or "image" in str(parameter.annotation).lower()


def _guiders(pipe: Any) -> dict[str, Any]:
    """Components that guide, by the argument for their scale: of guider_2 it is guidance_scale_2, of audio_guider
    audio_guidance_scale."""
    parts = {name: part for name, part in pipe.components.items() if not isinstance(part, nn.Module)}
    return {name.replace("guider", SCALE): part for name, part in parts.items() if hasattr(part, SCALE)}


def _check_blocks(root: Path, index: Mapping[str, Any]) -> None:
    """ArtifactError for blocks that are not diffusers' own, in whose place it would put those that it has."""
    named = index.get("_blocks_class_name")
    own = getattr(importlib.import_module("diffusers"), str(named), None)
    if index.get("auto_map") or (named and not getattr(own, "block_classes", None)):
        raise ArtifactError(
            f"{root}: its blocks cannot be made",
            expected="blocks of diffusers",
            got=str(named),
            hint="code that comes with a checkpoint never runs; model.pipeline may name a pipeline without blocks that "
            "takes its components",
        )


@contextlib.contextmanager
def _scaled(pipe: Any, scales: Mapping[str, float]) -> Iterator[None]:
    parts = _guiders(pipe)
    usual = {name: getattr(parts[name], SCALE) for name in scales}
    try:
        for name, scale in scales.items():
            setattr(parts[name], SCALE, scale)
        yield
    finally:
        for name, scale in usual.items():
            setattr(parts[name], SCALE, scale)


def _chooses(block: Any) -> bool:
    """Whether a block runs others, which a call may choose."""
    return bool(getattr(block, "sub_blocks", None)) and hasattr(block, "_get_trigger_inputs")


def _blocks(block: Any) -> Iterator[Any]:
    yield block
    for inner in getattr(block, "sub_blocks", {}).values():
        yield from _blocks(inner)
