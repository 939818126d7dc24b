"""What the benchmark's page draws."""

from __future__ import annotations

from markupsafe import Markup

from slipcast_compiler.bench.document import BenchDocument, Interval, Quality, evaluating_s
from slipcast_compiler.bench.plan import BUNDLE
from slipcast_compiler.pages.charts import Axis, Bar, Dot, Line, Piece, bars, line_plot
from slipcast_compiler.pages.charts import scatter as scattered


def scatter(document: BenchDocument) -> Markup | None:
    """Seconds per image (logarithmic) against quality: PSNR, or the change of the CLIP score where no side has one."""
    for metric, label in (("psnr_mean", "PSNR to the original, dB"), ("clip_delta_mean", "CLIP change")):
        points = [
            (name, side.seconds.median, found.value)
            for name, side in document.sides.items()
            if (found := _quality(side.quality, metric))
        ]
        if points:
            dots = [Dot(s, value, _kind(name), label=f"{name} ({s:.3g} s)") for name, s, value in points]
            x = Axis(
                [s for _, s, _ in points],
                label=f"{label} (up is closer), against seconds per image (left is faster)",
                log=True,
                margin=0.1,
            )
            return scattered(dots, x, Axis([value for *_, value in points]), "latency against quality")
    return None


def memory(document: BenchDocument) -> Markup:
    """Peak memory by side."""
    rows = [
        Bar(name, [Piece(side.peak_memory_mb, _kind(name))], f"{side.peak_memory_mb:.0f} MB")
        for name, side in document.sides.items()
    ]
    return bars(rows, "peak memory")


def component_names(document: BenchDocument) -> list[str]:
    """Of all sides that tell the time of theirs; their order is that of colours."""
    return list(dict.fromkeys(part for side in document.sides.values() for part in side.components_s or ()))


def components(document: BenchDocument) -> Markup | None:
    """Seconds per image by component, of the sides that tell."""
    names, rows = component_names(document), []
    for name, side in document.sides.items():
        if not (parts := side.components_s):
            continue
        pieces = [
            Piece(parts[part], f"series-{number}", f"{part}: {parts[part]:.4f} s")
            for number, part in enumerate(names)
            if part in parts
        ]
        steps = side.about["steps"]
        assert isinstance(steps, int)
        rows.append(Bar(name, pieces, f"{evaluating_s(parts) / max(steps, 1) * 1e3:.1f} ms a step"))
    return bars(rows, "time by component") if rows else None


def break_even(document: BenchDocument) -> Markup | None:
    """Seconds spent after n images: the bundle begins with its compile, peers with nothing, as the counts have it."""
    counts = [count for count in document.break_even.values() if count]
    if not counts:
        return None
    # A peer that is hardly slower pays back so late that all other crossings would be in the corner.
    most = 1.3 * max(count for count in counts if count <= 5 * min(counts))
    # A peer that is far slower would press all others into the ground.
    top = 1.15 * (document.compile_s + most * document.bundle.seconds.median)
    lines = []
    for name, side in document.sides.items():
        begin = document.compile_s if name == BUNDLE else 0.0
        slope = max(side.seconds.median, 1e-6)
        end = min(most, (top - begin) / slope)
        if end > 0:
            lines.append(Line(name, [(0.0, begin), (end, begin + slope * end)], kind=_kind(name)))
    x = Axis([0, most], label="images made", ticks=[0, most / 2, most], form="{:.0f}".format)
    return line_plot(lines, x, Axis([0, top]), "seconds spent, against images made")


def _kind(name: str) -> str:
    return "own" if name == BUNDLE else "other"


def _quality(found: Quality | None, metric: str) -> Interval | None:
    value: Interval | None = getattr(found, metric, None)
    return value
