"""Write docs/results.md from the documents beside this file, which `slipcast bench` wrote, and tables.py its tables:

    python recipes/bench/results.py

NAME.json is a run, NAME-2.json a second one of the same command, of which the page says how far it agrees.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tables import TABLES, markdown, marks, paragraph

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "results.md"
BEGIN, END = "<!-- written by recipes/bench/results.py -->\n", "<!-- end of the results -->\n"
TITLES = {
    "shapes-circles": "The reference model",
    "shapes-circles-peers": "The reference model on static graphs, against peers that fix shapes",
    "shapes-circles-fast": "The same, made fast (recipes/shapes-circles-fast.toml)",
    "shapes-circles-search": "What a search of ten minutes made of it (recipes/shapes-circles-search.toml)",
    "shapes-circles-ablation": "What each lever of recipes/shapes-circles-fast.toml contributes",
    "shapes-circles-cached": "Feature caching alone (recipes/shapes-circles-cached.toml)",
    "shapes-circles-exit": "Early exit alone (recipes/shapes-circles.toml, `--set early_exit.max_error=0.02`)",
    "shapes-circles-int8": "The same, pruned, factorised and in INT8 (recipes/shapes-circles-int8.toml)",
    "flux-shaped-int4": "Weights in 4 bits (recipes/flux-shaped.toml)",
    "sd15-shaped-256": "The shapes of Stable Diffusion 1.5, random weights, 256x256",
    "sd15-shaped-512": "The shapes of Stable Diffusion 1.5, random weights, 512x512",
    "sd15-shaped-fast": "The same at 512x512, made fast (recipes/sd15-shaped-fast.toml)",
}

# What a table does not say by itself.
REMARKS = {
    "flux-shaped-int4": (
        "`bundle` is its target in INT4, `artifacts/flux-shaped` its first one, bf16 on OpenVINO: the same pipeline, "
        "with random weights. What INT4 does to pictures was seen on the reference model, by `slipcast compile "
        "recipes/shapes-circles.toml` with a target in int4: a CLIP score 0.2 % lower, 38 dB on the worst of 16."
    ),
    "shapes-circles-peers": (
        "Measured after engines on OpenVINO began to run static graphs by number of rows, on streams; the comparison "
        "above is older. The aim is 1.2 times for one picture: of these two runs one reaches it against OpenVINO GenAI "
        "with a fixed size, and one does not. The host's own peaks were 6 to 23 % lower in the second."
    ),
    "shapes-circles-search": (
        "The gate held, and barely: the mean CLIP drop on the sixteen held-out prompts, which are looked at once, is "
        "just within its limit, the interval reaches beyond it, and one picture is not told from another caption's."
    ),
    "shapes-circles-ablation": (
        "For one picture of so small a model the number of steps is what pays. Pruning shortens nothing that is bound "
        "by its number of operations; where guidance begins and ends OpenVINO prepares for another batch, which costs "
        "what the rows would: what the interval does here is good for the CLIP score. At 512x512 they pay (below)."
    ),
}

Document = dict[str, Any]


def results(folder: Path = HERE) -> str:
    """Markdown of all documents in `folder`."""
    parts = []
    for name, title in TITLES.items():
        runs = [json.loads(file.read_text("utf-8")) for file in _files(folder, name) if file.is_file()]
        if runs:
            parts.append(section(name, title, runs[0], runs[1] if len(runs) > 1 else None))
    return "\n".join(parts)


def section(name: str, title: str, document: Document, again: Document | None) -> str:
    """One comparison: what was measured, the table, where the bundle is worse, how a second run agrees, the command."""
    host, settings, sampling = document["host"], document["settings"], document["settings"]["sampling"]
    about = (
        f"{settings['image']}, {sampling['sampler']}, {sampling['steps']} steps, guidance "
        f"{sampling['guidance_scale']:g}, {settings['images']} images; {host['processor']} with {host['cores']} cores, "
        f"{document['date'][:10]}, load {host['load_before']} before. `bundle` is "
        f"{document['sides']['bundle']['title']}; its compile took {document['compile_s']:.0f} s. "
        f"[The document](../recipes/bench/{name}.json) notes:"
    )
    notes = "".join(f"- {note}\n" for note in document["notes"])
    text = [f"### {title}\n", paragraph(about), notes, table(document), paragraph(faster(document))]
    if remark := REMARKS.get(name):
        text.append(paragraph(remark))
    if (plot := HERE / f"{name}.svg").is_file():
        text.append(f"![{title}](../recipes/bench/{plot.name})\n")
    if absent := [*document["missing"], *document["failed"]]:
        text.append(paragraph(f"Not measured: {_names(absent)}."))
    return "\n".join([*text, paragraph(agreement(document, again)), f"```console\n$ {document['command']}\n```\n"])


def table(document: Document) -> str:
    """A line for each side."""
    sizes = [size for size in document["sides"]["bundle"]["images_per_second"] if size != "1"]
    scored = any(side["quality"] and side["quality"]["clip_delta_mean"] for side in document["sides"].values())
    heads = ["side", "s per image", "ratio", *(f"images/s, batch {size}" for size in sizes), "first image cold, s"]
    heads += ["peak MB (ratio)", "PSNR, dB", *(["CLIP change"] if scored else []), "break-even"]
    bundles = bool(document.get("component_ratios"))  # with others, of which the time of the denoiser is known
    heads += ["denoiser, ratio", "its multiply-adds, G (ratio)"] if bundles else []
    lines = [heads]
    for name, side in document["sides"].items():
        ratio, memory = document["ratios"].get(name), document["memory_ratios"].get(name)
        quality, even = side["quality"] or {}, document["break_even"].get(name)
        few = f" ({side['images']} images)" if side["images"] < document["settings"]["images"] else ""
        lines.append([
            f"`{name}`{few}", f"{side['seconds']['median']:.3f}",
            f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else "",
            *(_figure(side["images_per_second"].get(size), ".2f") for size in sizes),
            f"{side['first_image_s']['cold']:.1f}",
            f"{side['peak_memory_mb']:.0f}" + (f" ({memory['median']:.2f})" if memory else ""),
            _figure((quality.get("psnr_mean") or {}).get("value"), ".1f"),
            *([_figure((quality.get("clip_delta_mean") or {}).get("value"), "+.2%")] if scored else []),
            "" if not ratio else "never" if even is None else str(even),
            *(denoiser(document, name) if bundles else []),
        ])  # fmt: skip
    return markdown(lines)


def denoiser(document: Document, name: str) -> list[str]:
    """Its time beside what its multiply-adds promise, both as ratios to the bundle's."""
    own, paper = (document["sides"][side].get("cost") for side in ("bundle", name))
    ratio = document["component_ratios"].get(name, {}).get("denoiser")
    said = f"{paper['multiply_adds'] / 1e9:.2f}" if paper else "not known"
    if ratio and paper and own:
        said += f" ({paper['multiply_adds'] / own['multiply_adds']:.2f})"
    return [f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else "", said]


def faster(document: Document) -> str:
    """Where the bundle loses."""
    said = [f"Faster than the bundle: {_below(document['ratios'])}."]
    for size in document["settings"]["batches"]:
        if size > 1:
            of = {name: ratios[str(size)] for name, ratios in document["batch_ratios"].items()}
            said.append(f"In batches of {size}: {_below(of)}.")
    return " ".join([*said, f"Smaller in memory: {_below(document['memory_ratios'])}."])


def agreement(document: Document, again: Document | None) -> str:
    """How far the ratios of a second run are from those of the first."""
    if again is None:
        return "One run: how well a second agrees is not known."
    apart = {
        name: abs(again["ratios"][name]["median"] / ratio["median"] - 1)
        for name, ratio in document["ratios"].items() if name in again["ratios"]
    }  # fmt: skip
    worst = max(apart, key=lambda name: apart[name])
    return f"A second run ({again['date'][:10]}) gave ratios that differ by at most {apart[worst]:.1%} (`{worst}`)."


def _files(folder: Path, name: str) -> list[Path]:
    return [folder / f"{name}.json", folder / f"{name}-2.json"]


def _below(ratios: dict[str, dict[str, float]]) -> str:
    return _names([name for name, ratio in ratios.items() if ratio["median"] < 1])


def _names(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


def _figure(value: float | None, form: str) -> str:
    if value is None:
        return "not run"
    return format(round(value, 4) + 0.0, form)  # no negative zero


def replaced(page: str) -> str:
    """The page with its results written anew."""
    for begin, end, text in ((BEGIN, END, results()), *((*marks(name), table()) for name, table in TABLES.items())):
        before, rest = page.split(begin)
        page = before + begin + "\n" + text + "\n" + rest[rest.index(end) :]
    return page


if __name__ == "__main__":
    PAGE.write_text(replaced(PAGE.read_text("utf-8")), "utf-8")
