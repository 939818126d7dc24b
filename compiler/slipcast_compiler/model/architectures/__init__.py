"""What differs between families of diffusion models, as data: components, inputs, and how a prompt reaches them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from slipcast.errors import RecipeError

Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class Input:
    """A component's input. A string in `shape` is a dimension: a key of Architecture.sizes, or free at run time."""

    name: str
    dtype: str
    shape: Shape


@dataclass(frozen=True)
class ComponentSource:
    """Where a component is in the checkpoint and how it is called.

    `call(model, *inputs)` returns the outputs as tensors, one per name in `outputs`.
    """

    folder: str
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    call: Callable[..., Any]


@dataclass(frozen=True)
class TextSource:
    """A tokenizer folder, the component it feeds, and which of that one's outputs feeds which denoiser input."""

    tokenizer: str
    component: str
    outputs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Architecture:
    """`sizes` gives dimension names a (folder, config key); `not_compiled` names parts a pipeline may hold besides."""

    components: dict[str, ComponentSource]
    text: tuple[TextSource, ...]
    sizes: dict[str, tuple[str, str]]
    not_compiled: tuple[str, ...] = ()


def is_known(pipeline_class: str) -> bool:
    """Whether a `_class_name` of model_index.json is described here; all others are captured."""
    return pipeline_class in _architectures()


def _architectures() -> dict[str, Architecture]:
    from slipcast_compiler.model.architectures.stable_diffusion import STABLE_DIFFUSION
    from slipcast_compiler.model.architectures.unconditional import UNCONDITIONAL

    return {
        "StableDiffusionPipeline": STABLE_DIFFUSION,
        "DDPMPipeline": UNCONDITIONAL,
        "DDIMPipeline": UNCONDITIONAL,
    }


def architecture(pipeline_class: str) -> Architecture:
    """The entry for a `_class_name` of model_index.json; RecipeError with the candidates."""
    architectures = _architectures()
    if pipeline_class not in architectures:
        raise RecipeError(
            f"{pipeline_class} is captured, which is for `slipcast compile` alone", expected=", ".join(architectures),
            got=pipeline_class,
        )  # fmt: skip
    return architectures[pipeline_class]
