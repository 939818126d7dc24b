"""The benchmark on a terminal."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from slipcast_compiler.bench.document import (
    DENOISER,
    BenchDocument,
    Host,
    Interval,
    Ratios,
    evaluating_s,
    typed_document,
)
from slipcast_compiler.bench.plan import BUNDLE

WIDTH = 150  # where there is no terminal to ask


def render_table(plain: Mapping[str, Any]) -> str:
    """Tables of time, memory and quality of a document, then what is missing and what has to be known to read them."""
    document = typed_document(plain)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH
    console = Console(file=io.StringIO(), width=max(width, 100), color_system=None, highlight=False)
    console.print(_speed(document))
    console.print(_footprint(document))
    if document.component_ratios:
        console.print(_denoiser(document))
    if document.quality_reference:
        console.print(_quality(document))
    console.print(Text(_host(document.host)), soft_wrap=True)
    for name, why in document.missing.items():
        install = f"; {why.install}" if why.install else ""
        console.print(Text(f"missing  {name}: {why.reason}{install}"), soft_wrap=True)
    for name, said in document.failed.items():
        console.print(Text(f"failed   {name}: {said}"), soft_wrap=True)
    for note in document.notes:
        console.print(Text(f"note     {note}"), soft_wrap=True)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _host(host: Host) -> str:
    """What the figures were seen on, and what it can do at most."""
    line = f"host     {host.processor}, {host.cores} cores"
    if cpu := host.cpu:
        line += f", family {cpu.family} model {cpu.model} stepping {cpu.stepping}: {' '.join(cpu.flags)}"
    if best := host.peaks:
        line += f"; at most {best.fp32:g} fp32, {best.bf16:g} bf16, {best.int8:g} int8 Gop/s, {best.memory:g} GB/s"
    return line


def _speed(document: BenchDocument) -> Table:
    sizes = list(document.bundle.images_per_second)
    columns = ["s/image", "min - max", "ratio", "min - max", *(f"images/s, {size}" for size in sizes), "break-even"]
    table = _table(f"{document.name}: time, and its ratio to the bundle's", columns)
    for name, side in document.sides.items():
        seconds, ratio, even = side.seconds, document.ratios.get(name), document.break_even.get(name)
        table.add_row(
            Text(name),
            f"{seconds.median:.3f}",
            f"{seconds.min:.3f} - {seconds.max:.3f}",
            *_spread(ratio),
            *(_number(side.images_per_second.get(size)) for size in sizes),
            "" if not ratio else "never" if even is None else f"{even} images",
        )
    return table


def _footprint(document: BenchDocument) -> Table:
    columns = ["peak MB", "ratio", "GPU MB", "disk MB", "load s", "first image, cold s", "J/image", "GPU J/image"]
    table = _table("memory, disk and start", columns)
    for name, side in document.sides.items():
        ratio, joules, gpu = document.memory_ratios.get(name), side.energy_j, side.gpu_energy_j
        table.add_row(
            Text(name),
            f"{side.peak_memory_mb:.0f}",
            f"{ratio.median:.2f}" if ratio else "",
            _number(side.gpu_memory_mb),
            f"{side.disk_mb:.0f}",
            f"{side.load_s:.2f}",
            f"{side.first_image_s.cold:.2f}",
            _number(joules.median if joules else None),
            _number(gpu.median if gpu else None),
        )
    return table


def _denoiser(document: BenchDocument) -> Table:
    """Of bundles: what their denoisers take, beside what their multiply-adds promise, per evaluation of one row."""
    table = _table("the denoisers of bundles alone", ["s/image", "ratio", "min - max", "G multiply-adds", "ratio"])
    own = document.bundle.cost
    for name, side in document.sides.items():
        ratio, paper = document.component_ratios.get(name, {}).get(DENOISER), side.cost
        if name == BUNDLE or ratio:
            table.add_row(
                Text(name),
                _number(evaluating_s(side.components_s) if side.components_s else None),
                *_spread(ratio),
                _number(paper.multiply_adds / 1e9 if paper else None),
                f"{paper.multiply_adds / own.multiply_adds:.2f}" if ratio and paper and own else "",
            )
    return table


def _quality(document: BenchDocument) -> Table:
    table = _table(
        f"quality against {document.quality_reference}: mean, and its 95 % interval",
        ["images", "PSNR dB", "SSIM", "CLIP change"],
    )
    for name, side in document.sides.items():
        found = side.quality
        cells = [
            _interval(found.psnr_mean if found else None, ".1f"),
            _interval(found.ssim_mean if found else None, ".4f"),
            _interval(found.clip_delta_mean if found else None, "+.2%"),
        ]
        judged = min(side.images, document.settings.images)  # the rest was drawn again, for the pairs
        table.add_row(Text(name), str(judged), *cells)
    return table


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="", header_style="")
    table.add_column("side", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _spread(ratio: Ratios | None) -> tuple[str, str]:
    return (f"{ratio.median:.2f}", f"{ratio.min:.2f} - {ratio.max:.2f}") if ratio else ("", "")


def _number(value: float | None) -> str:
    return "not run" if value is None else f"{value:.2f}"


def _interval(found: Interval | None, form: str) -> str:
    if found is None:
        return "not run"
    return f"{found.value:{form}} [{found.low:{form}}, {found.high:{form}}]"
