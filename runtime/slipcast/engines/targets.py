"""Which of a bundle's targets runs here."""

from __future__ import annotations

import logging

from slipcast.bundle.records import BaseManifest, Target
from slipcast.engines import refusal
from slipcast.errors import HostError, RequestError

logger = logging.getLogger("slipcast")


def choose_target(manifest: BaseManifest, wanted: str = "auto") -> Target:
    """The target to run; those before it that cannot are named in a warning."""
    ids = [target.id for target in manifest.targets]
    if wanted == "auto":
        candidates = list(manifest.targets)
    else:
        candidates = [target for target in manifest.targets if wanted in (target.engine, target.id)]
        if not candidates:
            raise RequestError(f"this bundle has no target {wanted!r}", expected="auto, " + ", ".join(ids), got=wanted)
    refusals: list[str] = []
    for target in candidates:
        why_not = refusal(target)
        if why_not is None:
            for line in refusals:
                logger.warning("target %s", line)
            return target
        refusals.append(f"{target.id}: {why_not}")
    if wanted == "auto":
        raise HostError("no target of this bundle can run here", expected=", ".join(ids), hint="; ".join(refusals))
    others = [target.id for target in manifest.targets if refusal(target) is None]
    raise HostError(
        f"target {wanted} cannot run here",
        expected=f"one of {', '.join(others)}" if others else None,
        hint="; ".join(refusals),
    )
