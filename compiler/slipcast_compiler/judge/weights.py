"""Are all numbers of a checkpoint finite? Asked before any work, since one that is not spoils every picture."""

from __future__ import annotations

from pathlib import Path

from slipcast.progress import Advance
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.model.checkpoint import Checkpoint


def check_weights(checkpoint: Checkpoint, cache: Cache, advance: Advance) -> None:
    """Read all of it, once for each content: ArtifactError, which names file and tensor, for NaN and infinity."""

    def read(out: Path) -> None:
        sources = checkpoint.architecture.components.values()
        weights = [each for source in sources for each in checkpoint.weights(source.folder).values()]
        for done, weight in enumerate(weights):
            advance(done, len(weights))
            weight.read()
        (out / "tensors").write_text(f"{len(weights)}\n")

    cache.get("weights", {"checkpoint": checkpoint.sha256}, read)
