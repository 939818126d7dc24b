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
from pathlib import Path

from slipcast.progress import Stages
from slipcast_compiler.bench.document import BenchDocument, typed_document
from slipcast_compiler.bench.plan import Options
from slipcast_compiler.bench.run import run_bench, write
from slipcast_compiler.compile import compile_plan
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.pages.charts import Bar, Piece, bars
from slipcast_compiler.pages.svg import as_file
from slipcast_compiler.plan import make_plan
from slipcast_compiler.recipe.reading import read_recipe
from slipcast_compiler.recipe.recipe import GateTable, Recipe

FOLDER = Path("artifacts/ablation")

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


def plot(document: BenchDocument, last: str) -> str:
    """SVG: how many times faster than the plain bundle each set of levers is, the loss in CLIP score beside it. `last`:
    the lever with which it is all of them."""
    ratios = {"bundle": 1.0} | {name: ratio.median for name, ratio in document.ratios.items()}
    plain = next(ratio for name, ratio in ratios.items() if name.endswith("/0-plain"))

    def without(name: str) -> bool:
        return Path(name).name.startswith("no-")

    def row(name: str) -> Bar:
        title = f"{last}: all" if name == "bundle" else Path(name).name.replace("-", " ").lstrip("0123456789 ")
        quality, speed = document.sides[name].quality, plain / ratios[name]
        change = quality.clip_delta_mean if quality else None
        note = f"{speed:.2f}x" + (f", CLIP {change.value:+.1%}" if change else "")
        return Bar(title, [Piece(speed, "series-1" if without(name) else "series-0")], note)

    # Added one by one, up to the bundle, which has all; then each left out of it.
    order = sorted(ratios, key=lambda name: (without(name), name == "bundle", Path(name).name))
    title = "Speed against the plain bundle: levers added one by one, then each left out of all"
    return as_file(bars([row(name) for name in order], title, shown=True))


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
    document = typed_document(run_bench(full, options, arguments.output, False, stages))
    # What makes it again, in place of the comparison's own command.
    command = shlex.join(["python", "recipes/bench/ablation.py", *sys.argv[1:]])
    document = write(document.model_copy(update={"command": command}), arguments.output, full / "report.html", stages)
    arguments.output.with_suffix(".svg").write_text(plot(document, used_levers(asked)[-1]), "utf-8")
    print(json.dumps(document.files))


if __name__ == "__main__":
    main()
