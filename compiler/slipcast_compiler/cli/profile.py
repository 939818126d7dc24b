"""`slipcast profile`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from slipcast.cli.common import emit, json_option
from slipcast_compiler.cli.options import cache_option, recipe_argument, set_option

if TYPE_CHECKING:
    from slipcast_compiler.recipe.recipe import Recipe


@click.command("profile")
@recipe_argument
@click.option("-o", "--output", type=click.Path(path_type=Path), help="[default: artifacts/profiles/NAME]")
@set_option
@cache_option
@json_option
def profile_command(recipe: Path, output: Path | None, overrides: tuple[str, ...], cache: Path, as_json: bool) -> None:
    """Measure what the denoiser does on calibration prompts, which passes choose by; `slipcast inspect` shows it."""
    from slipcast.bundle.profiles import RECORD_NAME, summarise
    from slipcast.progress import Stages
    from slipcast_compiler.host.cache import Cache
    from slipcast_compiler.host.publish import check_output
    from slipcast_compiler.pages.profile import publish
    from slipcast_compiler.plan import is_captured, make_plan
    from slipcast_compiler.profile.profile import make_profile
    from slipcast_compiler.recipe.reading import read_recipe

    parsed = read_recipe(recipe, overrides)
    output = output or Path("artifacts/profiles") / parsed.name
    if is_captured(parsed, recipe.parent):
        _profile_program(parsed, recipe.parent, output, cache, as_json)
        return
    check_output(output, RECORD_NAME)
    plan = make_plan(parsed, recipe.parent)
    with Stages().stage("profile") as advance:
        made = make_profile(plan.task.calibration, parsed.profile, parsed.name, Cache(cache), advance)
    publish(made.file, output)
    emit({"output": str(output), **summarise(made.file)}, _look_at(output), as_json)


def _profile_program(recipe: Recipe, folder: Path, output: Path, cache: Path, as_json: bool) -> None:
    """Of a pipeline that is captured: a profile of each of its denoisers."""
    from slipcast.bundle.profiles import RECORD_NAME, summarise
    from slipcast.progress import Stages
    from slipcast_compiler.host.cache import Cache
    from slipcast_compiler.host.publish import check_output
    from slipcast_compiler.model.digests import digest
    from slipcast_compiler.pages.profile import publish
    from slipcast_compiler.plan_program import make_program_plan
    from slipcast_compiler.profile.program import make_program_profiles

    plan = make_program_plan(recipe, folder, profiled=True)
    several = len(plan.known) > 1
    outputs = {name: output.with_name(f"{output.name}-{name}") if several else output for name in plan.known}
    for each in outputs.values():
        check_output(each, RECORD_NAME)
    given = plan.given(digest(plan.checkpoint.root, recipe.model.pipeline))
    with Stages().stage("profile") as advance:
        names = recipe.name, plan.checkpoint.name
        made = make_program_profiles(plan.profiling, given, recipe.profile, names, Cache(cache), advance)
    for name, profile in made.items():
        publish(profile.file, outputs[name])
    told = [{"output": str(outputs[name]), **summarise(profile.file)} for name, profile in made.items()]
    text = "\n".join(map(_look_at, outputs.values()))
    emit({"profiles": told} if several else told[0], text, as_json)


def _look_at(output: Path) -> str:
    return f"{output}: look at {output / 'profile.html'}, or at `slipcast inspect {output}`"
