"""What each lever of a recipe contributes: added one by one to a plain bundle, then each left out of the full one.

    python recipes/bench/ablation.py recipes/shapes-circles-fast.toml -o recipes/bench/shapes-circles-ablation.json

Every set of levers is a bundle in artifacts/ablation, without a gate; one interleaved run of `slipcast bench` compares
them with the bundle that has all. Beside its document and page stands a plot, NAME.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from slipcast.progress import Stages
from slipcast_compiler.bench.plan import Options
from slipcast_compiler.bench.run import run_bench, write
from slipcast_compiler.compile import compile_plan
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.plan import make_plan
from slipcast_compiler.recipe.reading import read_recipe
from slipcast_compiler.recipe.recipe import GateTable, Recipe

FOLDER = Path("artifacts/ablation")
BAR, ROW, LEFT, TOP = 420, 24, 190, 34  # of the plot, in pixels
COLORS = {"added": "#0072b2", "left out": "#d55e00"}  # Okabe and Ito's

Levers = dict[str, Callable[[Recipe], Recipe]]


def _without_passes(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"passes": type(recipe.passes)()})


def _as_the_original(*keys: str) -> Callable[[Recipe], Recipe]:
    """Keys of [sampling] as they are in [reference]; where they are not there either, as if not given."""

    def off(recipe: Recipe) -> Recipe:
        given = {key: getattr(recipe.reference, key, None) for key in keys}
        defaults = {key: type(recipe.sampling).model_fields[key].default for key in keys}
        values = {key: defaults[key] if value is None else value for key, value in given.items()}
        return recipe.model_copy(update={"sampling": recipe.sampling.model_copy(update=values)})

    return off


def _without(table: str) -> Callable[[Recipe], Recipe]:
    return lambda recipe: recipe.model_copy(update={table: None})


# What takes each lever out of a recipe, in the order in which they are added.
LEVERS: Levers = {
    "cut": _without("cut"),
    "fewer steps": _as_the_original("steps"),
    "timesteps found": _without("timesteps"),
    "caching": _without("caching"),
    "guidance interval": _as_the_original("guidance_interval", "guidance_reuse"),
    "pruning": _without_passes,
}


def used_levers(recipe: Recipe) -> list[str]:
    """In the order in which they are added."""
    return [name for name, off in LEVERS.items() if off(recipe) != recipe]


def variants(recipe: Recipe) -> dict[str, Recipe]:
    """Name -> recipe, the full one last: 0-plain, 1-LEVER ... as levers are added, no-LEVER as each is left out."""
    found: dict[str, Recipe] = {}
    full = recipe.model_copy(update={"gate": GateTable(), "targets": recipe.targets[:1]})
    used = used_levers(full)

    def only(kept: list[str]) -> Recipe:
        reduced = full
        for name in used:
            reduced = reduced if name in kept else LEVERS[name](reduced)
        return reduced

    for count in range(len(used)):
        found[f"{count}-{used[count - 1] if count else 'plain'}"] = only(used[:count])
    for name in used[:-1]:  # without the last is the last but one of those above
        found[f"no-{name}"] = only([other for other in used if other != name])
    found["full"] = full
    return {name.replace(" ", "-"): each for name, each in found.items()}


def plot(document: dict[str, Any], last: str) -> str:
    """SVG: how many times faster than the plain bundle each set of levers is, the loss in CLIP score beside it. `last`:
    the lever with which it is all of them."""
    sides, ratios = document["sides"], {"bundle": 1.0}
    ratios |= {name: ratio["median"] for name, ratio in document["ratios"].items()}
    plain = next(ratio for name, ratio in ratios.items() if name.endswith("/0-plain"))
    speeds = {name: plain / ratio for name, ratio in ratios.items()}
    order = sorted(speeds, key=lambda name: (name == "bundle", Path(name).name.startswith("no-"), Path(name).name))
    order.remove("bundle")
    order.insert(sum(not Path(name).name.startswith("no-") for name in order), "bundle")
    widest, rows = max(speeds.values()), []
    for i, name in enumerate(order):
        label = Path(name).name.replace("-", " ") if name != "bundle" else f"{last}: all"
        kind = "left out" if label.startswith("no ") else "added"
        change = ((sides[name]["quality"] or {}).get("clip_delta_mean") or {}).get("value")
        note = f"{speeds[name]:.2f}x" + (f", CLIP {change:+.1%}" if change is not None else "")
        y, width = TOP + i * ROW, BAR * speeds[name] / widest
        rows.append(
            f'<text x="{LEFT - 8}" y="{y + 12}" text-anchor="end">{escape(label.lstrip("0123456789 "))}</text>'
            f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="16" fill="{COLORS[kind]}"/>'
            f'<text x="{LEFT + width + 6:.1f}" y="{y + 12}">{note}</text>'
        )
    height = TOP + ROW * len(rows) + 6
    title = "Speed against the plain bundle: levers added one by one, then each left out of all"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + BAR + 150}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="#222">'
        f'<rect width="100%" height="100%" fill="#fff"/><text x="10" y="20" font-size="13">{title}</text>'
        + "".join(rows)
        + "</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the JSON document")
    parser.add_argument("--images", type=int, default=16)
    arguments = parser.parse_args()
    stages, cache, made = Stages(), Cache(Path("artifacts/cache")), []
    plan = None
    asked = read_recipe(arguments.recipe)
    for name, recipe in variants(asked).items():
        plan = make_plan(recipe, arguments.recipe.parent)
        compile_plan(plan, FOLDER / name, cache, stages)
        made.append(FOLDER / name)
    assert plan
    *others, full = made
    checkpoint = Path(os.path.relpath(plan.checkpoint.root))
    options = Options(tuple(map(str, others)), checkpoint, images=arguments.images)
    document = run_bench(full, options, arguments.output, False, stages)
    # What makes it again, in place of the comparison's own command.
    document["command"] = shlex.join(["python", "recipes/bench/ablation.py", *sys.argv[1:]])
    write(document, arguments.output, full / "report.html", stages)
    arguments.output.with_suffix(".svg").write_text(plot(document, used_levers(asked)[-1]), "utf-8")
    print(json.dumps(document["files"]))


if __name__ == "__main__":
    main()
