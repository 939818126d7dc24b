"""What `slipcast inspect` says of feature caching, and of targets with engines for some GPUs and shapes."""

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
