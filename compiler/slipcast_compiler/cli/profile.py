"""`slipcast profile`."""

from __future__ import annotations

from pathlib import Path

import click

from slipcast.cli.common import emit, json_option
from slipcast_compiler.cli.options import cache_option, recipe_argument, set_option


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
    from slipcast_compiler.plan import make_plan
    from slipcast_compiler.profile.profile import make_profile
    from slipcast_compiler.recipe.reading import read_recipe

    parsed = read_recipe(recipe, overrides)
    output = output or Path("artifacts/profiles") / parsed.name
    check_output(output, RECORD_NAME)
    plan = make_plan(parsed, recipe.parent)
    with Stages().stage("profile") as advance:
        made = make_profile(plan.task.calibration, parsed.profile, parsed.name, Cache(cache), advance)
    publish(made.file, output)
    text = f"{output}: look at {output / 'profile.html'}, or at `slipcast inspect {output}`"
    emit({"output": str(output), **summarise(made.file)}, text, as_json)
