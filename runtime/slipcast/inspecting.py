"""What `slipcast inspect` says of targets whose engines are compiled for some GPUs and shapes."""

from __future__ import annotations

from slipcast.manifest import Manifest, Target


def bound_to(target: Target) -> str:
    """What compiled engines are bound to; nothing for others."""
    if not (built := target.built):
        return ""
    gpus = (
        f"compute capability {' and '.join(built.compute_capabilities)}" if built.compute_capabilities else "Ampere on"
    )
    return f", {target.engine} {built.library_version}, {gpus}, up to {built.max_images} images at once"


def profile_lines(manifest: Manifest, target: Target) -> list[str]:
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
