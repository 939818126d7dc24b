"""What was exported as a bundle in fp32 for ONNX Runtime, which any machine can draw with while it compiles."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from slipcast.bundle.manifest import Caching
from slipcast_compiler.engines import build_target, exported_sources
from slipcast_compiler.engines.package import describe
from slipcast_compiler.engines.pool import Pool
from slipcast_compiler.export.guard import write_guard
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.publish import write_manifest
from slipcast_compiler.plan import Plan
from slipcast_compiler.recipe.recipe import TargetTable


def write_portable(
    plan: Plan,
    exported: Mapping[str, Path],
    prompts: Path | None,
    folder: Path,
    cache: Cache,
    staged: Path | None = None,
    caching: Caching | None = None,
    guard: Path | None = None,
) -> str:
    """Write the bundle to `folder`, and return its target's id. `prompts`, `staged`, `caching`: see package.describe;
    `guard`: see guard.cached_guard."""
    sources, pool = exported_sources(exported), Pool(folder)
    target = build_target(TargetTable(engine="onnxruntime"), sources, plan.image, pool, cache, lambda done, total: None)
    fields = describe(plan, dict(exported), prompts, folder, staged, caching)
    fields |= write_guard(plan, guard, folder, fields["requires"]) if guard else {}
    write_manifest(folder, {**fields, "targets": (target,)})
    return target.id
