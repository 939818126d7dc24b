"""What a bundle's own report says: what others go by, and what people read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slipcast.bundle.manifest import Manifest
from slipcast.bundle.quality import Comparison, Quality
from slipcast.bundle.reader import Bundle, ProgramBundle
from slipcast.bundle.records import BaseManifest
from slipcast.bundle.validation import parse_json

REPORT = "report.json"
USUAL_PROMPT = "a photograph"  # for a bundle without a report


def report_files(manifest: BaseManifest) -> list[str]:
    """To be verified before prompts are read from it."""
    return [entry.path for entry in manifest.files if entry.path == REPORT]


def held_out_prompts(bundle: Bundle | ProgramBundle) -> list[str]:
    """The prompts that the bundle was judged on; another that it takes where none is known, and none where it takes
    no text. Its report, if it has one, has to be verified already."""
    return _prompts(bundle, "held_out_prompts")


def calibration_prompts(bundle: Bundle | ProgramBundle) -> list[str]:
    """As held_out_prompts, some of those that the bundle was made with."""
    return _prompts(bundle, "calibration_examples")


def _prompts(bundle: Bundle | ProgramBundle, kind: str) -> list[str]:
    manifest = bundle.manifest
    if not manifest.takes_prompt:
        return []
    closed = manifest.prompts if isinstance(manifest, Manifest) else manifest.program.closed
    usual = next(prompt for prompt in closed.prompts if prompt) if closed else USUAL_PROMPT
    record: Any = {}
    if report_files(manifest):
        record = parse_json(bundle.file(REPORT).read_bytes(), REPORT)
    return list(map(str, (record.get("family") or {}).get(kind) or [usual]))


def render_evidence(manifest: BaseManifest, record: Any, page: Path) -> str:
    """The text of what the bundle's targets were judged to be. `record`: what report.json holds."""
    lines = [manifest.name + (": unjudged, the original was not drawn" if manifest.unjudged else "")]
    if isinstance(record, dict) and isinstance(search := record.get("search"), dict):
        lines.append(f"  found by search: {search.get('arguments') or 'the recipe as it is'}")
    for target in manifest.targets:
        quality, speed = target.quality, target.performance
        other = quality and quality.out_of_family
        if found := target.addition:
            lines.append(
                f"  {target.id}: added later; against {found.against} PSNR worst {found.psnr_worst:.1f} dB, "
                f"{found.images} images, {found.latency_s:.3f} s per image ({found.latency_against_s:.3f} s)"
            )
        elif not quality:
            why = "" if speed or manifest.unjudged else ": the machine that built it could not run it"
            lines.append(f"  {target.id}: not judged{why}")
        if quality and speed:
            lines += [
                f"  {target.id}: CLIP {_change(quality)}, "
                f"PSNR worst {_number(quality.psnr_worst, 1)} dB, SSIM worst {_number(quality.ssim_worst, 4)}, "
                f"{quality.images} images",
                *(f"    {label} {text}" for label, text in _means(quality).items()),
                *([f"    out of the family: CLIP {_change(other)}, {other.images} images"] if other else []),
            ]
        if speed:
            lines.append(
                f"    {speed.latency_bundle_s:.3f} s per image{_original(speed.latency_full_s, '.3f', 's')}, "
                f"{speed.peak_memory_bundle_mb:.0f} MB{_original(speed.peak_memory_full_mb, '.0f', 'MB')}"
                + (", engines opened one after the other" if speed.residency == "sequential" else "")
            )
    return "\n".join([*lines, f"pictures and the rest: {page}"])


def _original(value: float | None, form: str, unit: str) -> str:
    """What stands behind a figure of the bundle's; nothing where the original's was not measured beside it."""
    return "" if value is None else f" (original {value:{form}} {unit})"


def _number(value: float | None, digits: int) -> str:
    return "not run" if value is None else f"{value:.{digits}f}"


def _change(found: Comparison) -> str:
    """The change of the mean CLIP score with its 95 % interval."""
    if found.clip_delta_mean is None:
        return "not run"
    low, high = found.intervals.get("clip_delta_mean", (None, None))
    return f"{found.clip_delta_mean:+.2%}" + ("" if low is None else f" ({low:+.2%} to {high:+.2%})")


def _means(quality: Quality) -> dict[str, str]:
    """The means that are not in the first line, with their 95 % intervals and what they have to be held against."""
    floor, found = quality.noise_floor.get("precision"), {}
    for metric, label, digits, beside, other in (
        ("psnr_mean", "PSNR", 1, "noise floor", floor),
        ("ssim_mean", "SSIM", 4, "noise floor", floor),
        ("flip_mean", "FLIP", 4, "noise floor", floor),
        ("lpips_mean", "LPIPS", 4, "noise floor", floor),
        ("retrieval_precision", "retrieval precision", 3, "original", quality.original),
    ):
        value, against = getattr(quality, metric), getattr(other, metric, None)
        text = _number(value, digits)
        if ends := quality.intervals.get(metric):
            text += f" ({ends[0]:.{digits}f} to {ends[1]:.{digits}f})"
        found[label] = text if against is None else f"{text}, {beside} {against:.{digits}f}"
    return found
