"""`slipcast inspect`: what a bundle holds, or what a profile says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from slipcast.cli.common import bundle_argument, emit, json_option, unlisted_option

if TYPE_CHECKING:
    from slipcast.bundle.manifest import Manifest, Target
    from slipcast.bundle.records import BaseGuard, BaseManifest

SHOWN_LAYERS = 8


@click.command()
@bundle_argument
@unlisted_option
@json_option
def inspect(bundle: Path, allow_unlisted: bool, as_json: bool) -> None:
    """Show what a bundle holds, without hashing its files; or what a profile says."""
    from slipcast.bundle.profiles import is_profile, open_profile_file, render_summary, summarise
    from slipcast.bundle.reader import ProgramBundle, open_any_bundle
    from slipcast.cli.program_lines import program_lines

    if is_profile(bundle):
        summary = summarise(open_profile_file(bundle))
        emit(summary, render_summary(summary), as_json)
        return
    opened = open_any_bundle(bundle, allow_unlisted=allow_unlisted)
    if isinstance(opened, ProgramBundle):
        text = render(opened.manifest, program_lines(opened.manifest), guard_lines(opened.manifest.guard))
    else:
        text = render_manifest(opened.manifest)
    emit(opened.manifest.model_dump(mode="json"), text, as_json)


def render_manifest(manifest: Manifest) -> str:
    """The text of a bundle's manifest, for people."""
    sampling, image = manifest.sampling, manifest.image
    schedule = sampling.schedule or "explicit list"
    latent = f"{image.channels}x{image.height // image.factor}x{image.width // image.factor}"
    lines = [
        f"  image        {image.width}x{image.height}, latent {latent}",
        f"  sampling     {sampling.sampler}, {sampling.steps} steps, {schedule}, guidance {sampling.guidance_scale:g}",
        *caching_lines(manifest),
    ]
    sizes, after = {entry.path: entry.size for entry in manifest.files}, []
    if closed := manifest.prompts:
        size = sizes[closed.table] / 1e6
        after.append(f"  prompts      {len(closed.prompts) - 1} and the empty one, {size:.1f} MB: no text encoder")
    return render(manifest, lines, [*after, *guard_lines(manifest.guard)])


def guard_lines(guard: BaseGuard | None) -> list[str]:
    """What becomes of prompts out of the family."""
    if not guard:
        return []
    lines = [f"  guard        {guard.policy} beyond a distance of {guard.threshold:.3g}, {guard.shape[0]} prompts"]
    if fallback := getattr(guard, "fallback", None):  # of a captured program's
        names = ", ".join(fallback.components.values()) or "the same components"
        steps = [f", {each.sampler} in {each.steps} steps" for each in fallback.samplings[:1]]
        lines.append(f"  strangers    by {names}{''.join(steps)}")
    return lines


def render(manifest: BaseManifest, drawing: Sequence[str], after: Sequence[str] = ()) -> str:
    """The text of any manifest, with lines that say how it draws, and others after its components."""
    lines = [
        f"{manifest.name}  (schema {manifest.schema_version}, slipcast {manifest.slipcast_version})",
        f"  base model   {manifest.base_model}  {manifest.source_sha256[:16]}",
    ]
    if family := manifest.family:
        kind, prompts = "closed" if family.closed else "open", f"{family.calibration} + {family.held_out} prompts"
        lines.append(f"  family       {family.name}, {kind}, {prompts}  {family.hash[:16]}")
    lines += [
        *drawing,
        *removed_lines(manifest),
        f"  left out     {', '.join(manifest.not_compiled) or 'nothing'}",
    ]
    # Of a captured program's: what takes others' places has their inputs, and slots.
    stand_ins: dict[str, dict[str, str]] = getattr(manifest, "stand_ins", {})
    taken = {plain: why for why, each in stand_ins.items() for plain in each}
    for name, component in manifest.components.items():
        if any(name in each.values() for each in stand_ins.values()):
            continue
        lines.append(f"  {name}{STAND_INS[taken[name]] if name in taken else ''}")
        for arrow, specs in (("<-", component.inputs), ("->", component.outputs)):
            lines += [f"    {arrow} {s.name} {s.dtype}[{', '.join(map(str, s.shape))}]" for s in specs]
    lines += after
    sizes = {entry.path: entry.size for entry in manifest.files}
    for target in manifest.targets:
        size = sum(sizes[path] for path in set(target.files)) / 1e6
        lines.append(f"  target {target.id}  {size:.1f} MB{bound_to(target)}")
        if target.early_exit:
            lines.append(f"    early exit where a clean image changes by {target.early_exit:.3g} or less")
        lines += [f"    {line}" for line in profile_lines(manifest, target)]
    lines.append(f"  {len(sizes)} files, {sum(sizes.values()) / 1e6:.1f} MB")
    return "\n".join(lines)


STAND_INS = {"adapters": " (and with slots)", "guard.fallback": " (and as it was, for strangers)"}


def removed_lines(manifest: BaseManifest) -> list[str]:
    """What passes left of the denoisers: heads, with the layers that lost some; neurons; and factorised layers."""
    lost = [
        f"{mask.layer} {len(mask.kept)} of {mask.heads}" for mask in manifest.head_masks if len(mask.kept) < mask.heads
    ]
    more = f" and {len(lost) - SHOWN_LAYERS} layers more" if len(lost) > SHOWN_LAYERS else ""
    layers = f": {', '.join(lost[:SHOWN_LAYERS])}{more}" if lost else ""
    lines = [f"  heads kept   {manifest.head_retention_ratio:.0%}{layers}"]
    if manifest.ffn_retention_ratio < 1:
        lines.append(f"  neurons kept {manifest.ffn_retention_ratio:.0%}")
    if factorised := manifest.low_rank_layers:
        ranks = [layer.rank for layer in factorised]
        lines.append(f"  factorised   {len(factorised)} layers, to ranks of {min(ranks)} to {max(ranks)}")
    return lines


def bound_to(target: Target) -> str:
    """What compiled engines are bound to; nothing for others."""
    if not (built := target.built):
        return ""
    gpus = (
        f"compute capability {' and '.join(built.compute_capabilities)}" if built.compute_capabilities else "Ampere on"
    )
    later = " and later" if built.version_compatible else ""
    return f", {target.engine} {built.library_version}{later}, {gpus}, up to {built.max_images} images at once"


def caching_lines(manifest: Manifest) -> list[str]:
    """Which steps evaluate the whole denoiser (F) and which the shallow one (s), and what crosses; nothing without."""
    if not (record := manifest.caching):
        return []
    mask = "".join("F" if full else "s" for full in record.mask)
    features = ", ".join(f"{spec.name} {spec.dtype}[{', '.join(map(str, spec.shape))}]" for spec in record.features)
    return [
        f"  caching      {record.full_steps} of {len(mask)} steps in full: {mask}",
        f"               the others from {features}, with {record.share:.1%} of the multiply-adds",
    ]


def profile_lines(manifest: BaseManifest, target: Target) -> list[str]:
    """By component, the precision of the graph that its engine was built from, and the sizes that dimensions free in it
    may have: least to most, with the one that it is fastest at."""
    if not target.built:
        return []
    lines = []
    for name, profile in target.built.profiles.items():
        quantised = "int8 and fp16" if name == "denoiser" else "fp16"
        precision = quantised if target.precision == "int8" else target.precision
        free = dict.fromkeys(size for spec in manifest.components[name].inputs for size in spec.shape)
        sizes = [f"{size} {_range(*profile[size])}" for size in free if isinstance(size, str) and size in profile]
        lines.append(", ".join([f"{name}: graph in {precision}", *sizes]))
    return lines


def _range(least: int, usual: int, most: int) -> str:
    return str(least) if least == most else f"{least} to {most}, usually {usual}"
