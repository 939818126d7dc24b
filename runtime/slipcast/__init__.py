"""Slipcast's runtime: load a compiled diffusion bundle and make images, without torch.

import slipcast
pipe = slipcast.load("artifacts/shapes-circles")
pipe("a red circle on a white background", seed=7).images[0].save("circle.png")
"""

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
    from slipcast.run.pipeline import Pipeline, PipelineOutput, load

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
    "RecipeError",
    "RequestError",
    "ResourceError",
    "SlipcastError",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    """What makes pictures is imported when it is asked for: the compiler uses submodules without it."""
    if name not in ("Pipeline", "PipelineOutput", "load"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from slipcast.run import pipeline

    return getattr(pipeline, name)
