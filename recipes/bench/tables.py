"""Tables of docs/results.md that are not of `slipcast bench`: what the other scripts here measured."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
GPUS: dict[str, tuple[str, ...]] = {"portable": (), "SM86 and SM89": ("8.6", "8.9")}
BUILDS = {
    "shapes-circles": "the reference model",
    "sd15-shaped-int8": "the shapes of Stable Diffusion 1.5, random weights",
}
MODELS = {
    "sd15": "Stable Diffusion 1.5",
    "sdxl": "SDXL",
    "pixart": "PixArt-Sigma",
    "sd3": "SD3 Medium",
    "flux": "FLUX.1",
}

Document = dict[str, Any]


def marks(name: str) -> tuple[str, str]:
    """Between which lines of the page a table stands."""
    return f"<!-- {name}, written by recipes/bench/results.py -->\n", f"<!-- end of the {name} -->\n"


def markdown(lines: list[list[str]]) -> str:
    """A table; the first line is its head."""
    first, *rest = ["| " + " | ".join(line) + " |\n" for line in lines]
    return "".join([first, "|---" * len(lines[0]) + "|\n", *rest])


def paragraph(text: str) -> str:
    """Wrapped as the page is."""
    return textwrap.fill(text, 150, break_long_words=False, break_on_hyphens=False) + "\n"


def how(document: Document) -> str:
    """The command, as the reader may repeat it."""
    return f"```console\n$ {document['command']}\n```\n"


def cuts(file: Path = HERE / "cuts" / "published.json") -> str:
    """Nodes and parameters by binding time, a line for each model."""
    document = json.loads(file.read_text("utf-8"))
    lines = [["denoiser", "whole", "`step`", "`prompt`", "`prompt+step`", "the loop's", "left the loop"]]
    for name, found in document["denoisers"].items():
        whole, loop = found["original"], found["parts"]["denoise"]
        found_parts = [found["parts"].get(part) for part in ("step", "prompt", "prompt+step", "denoise")]
        share = 1 - loop["parameters"] / whole["parameters"]
        lines.append([MODELS[name], *(_size(each) for each in (whole, *found_parts)), f"{share:.1%}"])
    return markdown(lines) + "\n" + how(document)


def _size(part: dict[str, int] | None) -> str:
    return f"{part['nodes']} nodes, {part['parameters'] / 1e6:.1f} M" if part else ""


def denoisers(file: Path = HERE / "denoisers" / "sd15-int8.json") -> str:
    """Time of one evaluation beside what multiply-adds promise, a line for each engine."""
    document = json.loads(file.read_text("utf-8"))
    heads = ["denoiser", "s", "faster", "by multiply-adds", "file, MB", "peak MB", "error"]
    lines = [heads]
    for name, side in document["sides"].items():
        ratio = side["ratio"]
        lines.append([
            name, f"{side['seconds']['median']:.2f}",
            f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})", f"{side['paper_ratio']:.2f}",
            f"{side['file_mb']:.0f}", f"{side['peak_memory_mb']:.0f}",
            f"{side['error']:.3f}" if "error" in side else "",
        ])  # fmt: skip
    host = document["host"]
    bf16 = "" if document["computes_bf16"] else ", which has no bf16 instructions: bf16 is fp32 there"
    about = (
        f"{document['image']}, {document['rows']} rows, on OpenVINO; {host['processor']} with {host['cores']} cores"
        f"{bf16}, {document['date'][:10]}, load {host['load_before']} before."
    )
    return markdown(lines) + "\n" + paragraph(about) + "\n" + how(document)


def hygiene(file: Path = HERE / "hygiene" / "shapes-circles.json") -> str:
    """Nodes, layers and time of a denoiser's graph in its forms, a line for each target and form."""
    document = json.loads(file.read_text("utf-8"))
    lines = [["target", "graph", "nodes", "engine layers", "ms", "faster than as exported"]]
    for engine, forms in document["targets"].items():
        for form, found in forms.items():
            ratio = found["ratio"]
            lines.append([
                f"{engine} {document['precisions'][engine]}", form, str(document["nodes"][form]), str(found["layers"]),
                f"{found['seconds']['median'] * 1e3:.1f}",
                f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})",
            ])  # fmt: skip
    host = document["host"]
    about = (
        f"{document['name']}, {document['image']}, 2 rows; {host['processor']} with {host['cores']} cores, "
        f"{document['date'][:10]}, load {host['load_before']} before."
    )
    return markdown(lines) + "\n" + paragraph(about) + "\n" + how(document)


def builds(folder: Path = HERE / "builds") -> str:
    """What engines took to build: a line for each component and precision, with figures for each choice of GPUs."""
    lines = [["model", "component", "graph in", *(f"{gpus}: s, peak MB, engine MB" for gpus in GPUS)]]
    about = []
    for name in BUILDS:
        if (file := folder / f"{name}.json").is_file():
            document = json.loads(file.read_text("utf-8"))
            lines += build_lines(name, document)
            about.append(about_builds(name, document))
    return markdown(lines) + "\n" + "\n".join(about)


def build_lines(name: str, document: Document) -> list[list[str]]:
    """The cells of a recipe's lines, in the document's order."""
    figures: dict[tuple[str, str], dict[tuple[str, ...], str]] = {}
    for made in document["builds"]:
        said = f"{made['seconds']:.0f}, {made['peak_memory_mb']:.0f}, {made['engine_mb']:.1f}"
        figures.setdefault((made["component"], made["precision"]), {})[tuple(made["compute_capabilities"])] = said
    return [
        [name, f"`{component}`", "int8 and fp16" if precision == "int8" else precision, *(of[g] for g in GPUS.values())]
        for (component, precision), of in figures.items()
    ]


def about_builds(name: str, document: Document) -> str:
    """Where and how it was measured."""
    host, load = document["host"], max(made["load_before"] for made in document["builds"])
    text = (
        f"{name}: {BUILDS[name]}, {document['image']}; {document['library']} on {host['processor']} with "
        f"{host['cores']} cores and no GPU, {document['date'][:10]}, load up to {load:g} before a build. "
        f"[The document](../recipes/bench/builds/{name}.json) is by"
    )
    return paragraph(text) + f"\n```console\n$ {document['command']}\n```\n"


def adapters(file: Path = HERE / "adapters" / "shapes.json") -> str:
    """What an exchange takes, and what a picture costs with slots in use and without."""
    found = json.loads(file.read_text("utf-8"))
    lines = [["read", "exchange", "picture without", "with one", "first with one", "ratio, median of rounds"]]
    times = [f"{1000 * found[key]:.1f} ms" for key in ("read_s", "exchange_s")]
    times += [f"{found[key]:.3f} s" for key in ("plain_s", "adapted_s", "first_s")]
    lines.append([*times, f"{found['ratio']:.2f}"])
    host = found["machine"]
    said = (
        f"{found['slots']} layers with slots of rank {found['slot_rank']}, LoRAs of rank {found['rank']} in all of "
        f"them; the reference model, {found['target']}; {host['processor']} with {host['cores']} cores."
    )
    return markdown(lines) + "\n" + paragraph(said) + "\n" + how(found)


TABLES: dict[str, Callable[[], str]] = {
    "builds": builds, "cuts": cuts, "hygiene": hygiene, "denoisers": denoisers,
    "adapters": adapters,
}  # fmt: skip
