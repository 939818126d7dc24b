"""Slipcast's runtime: load a compiled diffusion bundle and make images, without torch.

import slipcast
pipe = slipcast.load("artifacts/shapes-circles")
pipe("a red circle on a white background", seed=7).images[0].save("circle.png")
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from slipcast.errors import (
    ArtifactError,
    Cancelled,
    CheckFailed,
    HostError,
    NumericalError,
    RecipeError,
    RequestError,
    ResourceError,
    SlipcastError,
)

if TYPE_CHECKING:
    from slipcast.run.base import PipelineOutput
    from slipcast.run.load import load
    from slipcast.run.pipeline import Pipeline
    from slipcast.run.program import ProgramPipeline
    from slipcast.run.saving import save

try:
    __version__ = version("slipcast")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "ArtifactError",
    "Cancelled",
    "CheckFailed",
    "HostError",
    "NumericalError",
    "Pipeline",
    "PipelineOutput",
    "ProgramPipeline",
    "RecipeError",
    "RequestError",
    "ResourceError",
    "SlipcastError",
    "__version__",
    "load",
    "save",
]


# What makes pictures, and where it is: imported when it is asked for, since the compiler uses submodules without it.
_MODULES = {
    "Pipeline": "pipeline",
    "PipelineOutput": "base",
    "ProgramPipeline": "program",
    "load": "load",
    "save": "saving",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"slipcast.run.{_MODULES[name]}"), name)
