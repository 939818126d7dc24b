"""Load a bundle, of whichever kind."""

from __future__ import annotations

import os

from slipcast.bundle.reader import ProgramBundle, open_any_bundle
from slipcast.engines import Instrument, as_it_is
from slipcast.run.base import ready_target
from slipcast.run.pipeline import Pipeline, open_pipeline
from slipcast.run.program import ProgramPipeline


def load(
    path: str | os.PathLike[str],
    *,
    target: str = "auto",
    residency: str = "all",
    instrument: Instrument = as_it_is,
    allow_unlisted: bool = False,
) -> Pipeline | ProgramPipeline:
    """Open a bundle and verify what will be read of it; see Pipeline and ProgramPipeline for what to do with it.

    `target`: an engine ("openvino"), a target id ("openvino-cpu-bf16"), or "auto": the first of the bundle's targets
    that can run here. `residency`: "all" keeps every engine loaded, "sequential" has in memory what is in use: one
    component, both denoisers of feature caching, or what the loop of a program calls; "4GB" keeps those engines loaded
    that fit into so much, at about twice the size of their files, the largest if they can. `instrument(component,
    open)` is called whenever an engine is opened, perhaps by several threads at once, and returns what takes its place:
    `open()`, the engine itself, or something around it that records, times or lends; `open(profile=True)` has the
    engine's own profiler on. Raises ArtifactError for a damaged bundle, HostError where no target can run here.
    """
    bundle = open_any_bundle(path, allow_unlisted=allow_unlisted)
    if isinstance(bundle, ProgramBundle):
        return ProgramPipeline(bundle, ready_target(bundle, target), residency, instrument)
    return open_pipeline(bundle, target, residency, instrument)
