"""`slipcast compile`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slipcast.cli.common import emit, json_option
from slipcast_compiler.cli.options import cache_option, set_option

if TYPE_CHECKING:
    from slipcast_compiler.compile import Compiled
    from slipcast_compiler.recipe.recipe import Recipe


@click.command("compile")
@click.argument("recipe", metavar="RECIPE|MODEL", type=click.Path(path_type=Path))
@click.option("--prompts", type=click.Path(path_type=Path), help="Of a MODEL: a file with one prompt a line.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Bundle to make.  [default: artifacts/NAME]")
@set_option
@click.option("--dry-run", is_flag=True, help="Say what would be done and needed, and stop.")
@cache_option
@json_option
def compile_command(
    recipe: Path, prompts: Path | None, output: Path | None, overrides: tuple[str, ...], dry_run: bool, cache: Path,
    as_json: bool,
) -> None:  # fmt: skip
    """Compile a checkpoint for a prompt family into a bundle.

    Of a MODEL, a diffusers directory, with --prompts: by the recipe that `slipcast init` would write, which is left
    beside the bundle.
    """
    from slipcast_compiler.estimate import summarise
    from slipcast_compiler.host.cache import Cache
    from slipcast_compiler.host.publish import check_output
    from slipcast_compiler.init import is_model, read_first_recipe
    from slipcast_compiler.plan import is_captured, make_plan
    from slipcast_compiler.recipe.reading import read_recipe

    if is_model(recipe):
        parsed, recipe = read_first_recipe(recipe, prompts, output, overrides, dry_run)
    elif prompts:
        raise click.UsageError("--prompts is for a MODEL; a recipe has a [family]")
    else:
        parsed = read_recipe(recipe, overrides)
    output = output or Path("artifacts") / parsed.name
    check_output(output)
    if is_captured(parsed, recipe.parent):
        _compile_program(parsed, recipe.parent, output, dry_run, cache, as_json)
        return
    made_before = cache.is_dir() and any(cache.iterdir())  # perhaps all of it: its space is not asked for again
    plan = make_plan(parsed, recipe.parent, None if dry_run else Cache(cache))
    summary = summarise(plan) | {"output": str(output)}  # what a search may turn is refused here
    if dry_run:
        emit(summary, _plan_text(summary), as_json)
        return
    from slipcast.engines.resources import check_space
    from slipcast.progress import Stages
    from slipcast_compiler.compile import compile_plan

    bundle, entries = summary["disk_bytes"]["bundle"], summary["disk_bytes"]["cache"]
    check_space(output, bundle + (0 if made_before else entries), f"{output} and the cache")
    _tell(compile_plan(plan, output, Cache(cache), Stages()), output, as_json)


def _compile_program(recipe: Recipe, folder: Path, output: Path, dry_run: bool, cache: Path, as_json: bool) -> None:
    """Of a pipeline that is captured."""
    from slipcast_compiler.plan_program import make_program_plan
    from slipcast_compiler.search.captured import program_space

    if recipe.model.pipeline and ":" in recipe.model.pipeline:
        sys.path.append(str(folder.resolve()))  # the user's own module may lie beside the recipe
    plan = make_program_plan(recipe, folder)
    told = program_space(plan).summary() if recipe.search else None  # what a search may turn is refused here
    if dry_run:
        summary = {**plan.told, "search": told, "output": str(output)}
        emit(summary, _program_text(summary), as_json)
        return
    from slipcast.engines.resources import check_space
    from slipcast.progress import Stages
    from slipcast_compiler.compile_program import compile_program
    from slipcast_compiler.host.cache import Cache

    made_before = cache.is_dir() and any(cache.iterdir())  # as above
    needed = plan.needs.disk["bundle"] + (0 if made_before else plan.needs.disk["cache"])
    check_space(output, needed, f"{output} and the cache")
    _tell(compile_program(plan, output, Cache(cache), Stages()), output, as_json)


def _program_text(summary: dict[str, Any]) -> str:
    from slipcast_compiler.capture.run import render_all

    family = summary["family"]
    lines = [
        f"{summary['name']}: {summary['model']} -> {summary['output']}",
        *(
            [f"  family     {family['calibration']} calibration and {family['held_out']} held-out prompts"]
            * bool(family)
        ),
        f"  judged on  {summary['judged_on']} images",
        *([f"  variants   {summary['variants']}, by what the call lists"] * (summary["variants"] > 1)),
        f"  call       {', '.join(f'{name} = {value!r}' for name, value in summary['call'].items()) or 'as it is'}",
        *(f"  pass       {line}" for line in _passes_text(summary["passes"])),
        *(f"  target     {target}" for target in summary["targets"]),
        *(_search_text(summary["search"]) if summary["search"] else []),
        *_originals_text(summary),
        *(f"  in turn    {name}: its engines do not all fit here at once" for name in summary["in_turn"]),
        *_resources_text(summary),
        "",
        render_all(summary),
    ]
    return "\n".join(lines)


def _originals_text(summary: dict[str, Any]) -> Iterator[str]:
    """What is unusual of them."""
    precision, machine = summary["original_precision"], summary["original_machine"]
    if machine:
        yield f"  originals  in {precision}, drawn on {machine}"
    elif precision == "bf16":
        yield "  originals  in bf16, in which alone they fit here"
    elif not precision:
        yield "  originals  none: the bundle is published as unjudged"


def _passes_text(passes: dict[str, Any]) -> Iterator[str]:
    """What passes choose of, or factorise; the layers are listed with the components."""
    units = {"prune_heads": "heads", "prune_ffn": "neurons", "low_rank": "linear layers"}
    for name, told in passes.items():
        options, found = told["options"], {module: count for module, count in told["of"].items() if count}
        if name == "recover":
            yield f"{name}: {options['steps']} steps, {options['method']}, of {' and '.join(found)}"
            continue
        share = f"{options['ratio']:.0%} of" if "ratio" in options else f"energy {options['energy']:g}, of"
        each = " and ".join(f"{count} in {module}" for module, count in found.items())
        yield f"{name}: {share} all {units[name]}, {each}"


def _tell(made: Compiled, output: Path, as_json: bool) -> None:
    lines = [f"{output}: {len(made.manifest.files)} files, {sum(f.size for f in made.manifest.files) / 1e6:.1f} MB"]
    for target in made.manifest.targets:
        quality, speed = target.quality, target.performance
        if not speed:
            lines.append(f"  {target.id}: not run here, not judged: {made.record['not_run'][target.id]}")
            continue
        original = "" if speed.latency_full_s is None else f" (original {speed.latency_full_s:.3f} s)"
        judged = f"PSNR {quality.psnr_worst:.1f} dB on the worst of {quality.images}" if quality else "unjudged"
        lines.append(f"  {target.id}: {speed.latency_bundle_s:.3f} s per image{original}, {judged}")
    lines += [f"  {name}: {note}" for name, note in made.record["host_notes"].items()]
    lines.append(f"look at {output / 'report.html'}; make pictures with `slipcast run {output}`")
    emit({"output": str(output), **made.record}, "\n".join(lines), as_json)


def _search_text(search: dict[str, Any]) -> list[str]:
    first = f"  search     least {search['objective']} within the gate, {search['budget_minutes']:g} minutes of trials"
    return [first, *(f"    {name:14} {', '.join(map(str, values))}" for name, values in search["values"].items())]


def _files_text(files: list[str]) -> str:
    return files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"


def _plan_text(summary: dict[str, Any]) -> str:
    sampling, family, components = summary["sampling"], summary["family"], summary["components"]
    reference, table = summary["reference"], summary["prompt_table"]
    lines = [
        f"{summary['name']}: {summary['model']} -> {summary['output']}",
        f"  family     {family['calibration']} calibration and {family['held_out']} held-out prompts",
        f"  judged on  {summary['judged_on']} images",
        f"  sampling   {sampling['sampler']}, {sampling['steps']} steps, {sampling.get('schedule', 'explicit list')}, "
        f"guidance {sampling['guidance_scale']}, {summary['image']}",
        f"  reference  {reference['sampler']}, {reference['steps']} steps, "
        f"{reference.get('schedule', 'explicit list')}, guidance {reference['guidance_scale']}",
        *(["  few steps  the checkpoint is distilled to few steps, without guidance"] * summary["few_step"]),
        *(
            f"  component  {name}: {c['parameters'] / 1e6:.1f} M parameters, {_files_text(c['files'])}"
            for name, c in components.items()
        ),
        *(f"  left out   {name}" for name in summary["not_compiled"]),
        *(f"  table      in place of {name}: {table['prompts']} prompts" for name in summary["not_shipped"]),
        *([f"             {table['bytes'] / 1e6:.1f} MB"] if table["prompts"] else []),
        *(f"  target     {target}" for target in summary["targets"]),
        *(_search_text(summary["search"]) if summary["search"] else []),
        *_resources_text(summary),
    ]
    return "\n".join(lines)


def _resources_text(summary: dict[str, Any]) -> list[str]:
    return [
        f"  disk       about {summary['disk_bytes']['bundle'] / 1e6:.0f} MB for the bundle, "
        f"{summary['disk_bytes']['cache'] / 1e6:.0f} MB for the cache",
        f"  memory     about {summary['memory_bytes'] / 1e9:.1f} GB at the most, in one process",
    ]
