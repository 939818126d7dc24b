"""The compiler's commands; the `slipcast` command finds them through the entry-point group slipcast.commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from slipcast.cli.main import bundle_argument, emit, json_option
from slipcast_compiler.bench.peers import PEERS


@click.command("compile")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Bundle to make.  [default: artifacts/NAME]")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe; repeatable."
)
@click.option("--dry-run", is_flag=True, help="Say what would be done and needed, and stop.")
@click.option(
    "--cache", type=click.Path(path_type=Path), default=Path("artifacts/cache"), show_default=True, help="Build cache."
)
@json_option
def compile_command(
    recipe: Path, output: Path | None, overrides: tuple[str, ...], dry_run: bool, cache: Path, as_json: bool
) -> None:
    """Compile a checkpoint for a prompt family into a bundle."""
    from slipcast_compiler.host.publish import check_output
    from slipcast_compiler.plan import make_plan
    from slipcast_compiler.recipe.reading import read_recipe

    parsed = read_recipe(recipe, overrides)
    output = output or Path("artifacts") / parsed.name
    check_output(output)
    plan = make_plan(parsed, recipe.parent)
    if dry_run:
        summary = plan.summary() | {"output": str(output)}
        emit(summary, _plan_text(summary), as_json)
        return
    from slipcast.progress import Stages
    from slipcast_compiler.compile import compile_plan
    from slipcast_compiler.host.cache import Cache

    made = compile_plan(plan, output, Cache(cache), Stages())
    lines = [f"{output}: {len(made.manifest.files)} files, {sum(f.size for f in made.manifest.files) / 1e6:.1f} MB"]
    for target in made.manifest.targets:
        quality, speed = target.quality, target.performance
        if not quality or not speed:
            lines.append(f"  {target.id}: not run here, not judged: {made.record['not_run'][target.id]}")
            continue
        lines.append(
            f"  {target.id}: {speed.latency_bundle_s:.3f} s per image (original {speed.latency_full_s:.3f} s), "
            f"PSNR {quality.psnr_worst:.1f} dB on the worst of {quality.images}"
        )
    lines += [f"  {name}: {note}" for name, note in made.record["host_notes"].items()]
    lines.append(f"look at {output / 'report.html'}; make pictures with `slipcast run {output}`")
    emit({"output": str(output), **made.record}, "\n".join(lines), as_json)


@click.command("build")
@bundle_argument
@click.option("--target", "wanted", required=True, metavar="ENGINE[:PRECISION]", help="Such as tensorrt-rtx:fp16.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A key of a recipe's target, such as max_images=8."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Bundle to make.  [default: BUNDLE itself]")
@click.option("--images", type=click.IntRange(1), default=4, show_default=True, help="Pictures to compare, if it runs.")
@click.option("--replace", is_flag=True, help="Build a target again that the bundle has.")
@click.option(
    "--cache", type=click.Path(path_type=Path), default=Path("artifacts/cache"), show_default=True, help="Build cache."
)
@json_option
def build_command(
    bundle: Path, wanted: str, overrides: tuple[str, ...], output: Path | None, images: int, replace: bool,
    cache: Path, as_json: bool,
) -> None:  # fmt: skip
    """Add a target to a published bundle, from the ONNX in it: neither torch nor the checkpoint is needed.

    What can run here is compared with the target whose graphs it was built from.
    """
    from slipcast.progress import Stages
    from slipcast_compiler.add_target import add_target
    from slipcast_compiler.host.cache import Cache
    from slipcast_compiler.recipe.reading import parse_target

    table = parse_target(wanted, overrides)
    made = add_target(bundle, table, output or bundle, Cache(cache), Stages(), images, replace)
    found, size = made.target.addition, sum(file.size for file in made.manifest.files) / 1e6
    text = f"{made.output}: {made.target.id} added, {len(made.manifest.files)} files, {size:.1f} MB"
    if found:
        text += (
            f"\n  {found.latency_s:.3f} s per image ({found.against}: {found.latency_against_s:.3f} s), "
            f"PSNR {found.psnr_worst:.1f} dB against it on the worst of {found.images}"
        )
    else:
        text += f"\n  not run here, not compared: {made.not_run}"
    emit({"output": str(made.output), "target": made.target.id, "not_run": made.not_run,
          "addition": found and found.model_dump(mode="json")}, text, as_json)  # fmt: skip


@click.command("profile")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="[default: artifacts/profiles/NAME]")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe; repeatable."
)
@click.option(
    "--cache", type=click.Path(path_type=Path), default=Path("artifacts/cache"), show_default=True, help="Build cache."
)
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
        made = make_profile(plan, Cache(cache), advance)
    publish(made.file, output)
    text = f"{output}: look at {output / 'profile.html'}, or at `slipcast inspect {output}`"
    emit({"output": str(output), **summarise(made.file)}, text, as_json)


@click.command("init")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("prompts", type=click.Path(path_type=Path), required=False)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Recipe to write.  [default: NAME.toml]")
@json_option
def init_command(model: Path, prompts: Path | None, output: Path | None, as_json: bool) -> None:
    """Write a commented recipe for a model directory and, unless it is unconditional, a file with one prompt a line."""
    from slipcast_compiler.init import write_recipe

    written = write_recipe(model, prompts, output)
    emit({"recipe": str(written)}, f"{written} written; next: slipcast compile {written} --dry-run", as_json)


@click.command("study")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder.  [default: artifacts/study, or the JSON's]"
)
@click.option("--dry-run", is_flag=True, help="Say what would be compared and about how long it takes, and stop.")
@click.option(
    "--cache", type=click.Path(path_type=Path), default=Path("artifacts/cache"), show_default=True, help="Build cache."
)
@json_option
def study_command(recipe: Path, output: Path | None, dry_run: bool, cache: Path, as_json: bool) -> None:
    """Compare ways to choose attention heads, over prompt families and ratios.

    RECIPE is a study's recipe; or the JSON of a study that was made, whose report is then written again. A study that
    was killed goes on where it was.
    """
    from slipcast.progress import Stages
    from slipcast_compiler.host.cache import Cache
    from slipcast_compiler.study import run
    from slipcast_compiler.study.cases import make_study
    from slipcast_compiler.study.recipe import read_study

    if recipe.suffix == ".json":
        document, output = run.read(recipe), output or recipe.parent
    else:
        output = output or Path("artifacts/study")
        study = make_study(read_study(recipe), recipe.parent)
        if dry_run:
            summary = run.estimate(study)
            emit(summary, run.describe(summary), as_json)
            return
        document = run.run_study(study, recipe, output, Cache(cache), Stages())
    files = [str(file) for file in run.write(document, output)]
    emit({"files": files}, "\n".join(files), as_json)


@click.command("bench", epilog="Peers: " + ", ".join(PEERS) + ", or the path of another bundle.")
@bundle_argument
@click.option("--against", default="", metavar="A,B,...", help="Peers, as named below.  [default: the bundle alone]")
@click.option("--model", type=click.Path(path_type=Path), help="The checkpoint.  [default: the one in the manifest]")
@click.option("--target", default="auto", show_default=True, help="An engine or target id of the bundle.")
@click.option("--images", type=click.IntRange(1), default=8, show_default=True, help="Pictures of each side.")
@click.option("--batch", default="1", show_default=True, metavar="N,N,...", help="Also so many pictures at once.")
@click.option("--steps", type=int, help="Sampling steps of all sides but ddim50 and ddpm1000.  [default: the bundle's]")
@click.option("--make-venvs", is_flag=True, help="Make environments for peers that need libraries of their own.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="[default: artifacts/bench/NAME-DATE.json]")
@json_option
def bench_command(
    bundle: Path,
    against: str,
    model: Path | None,
    target: str,
    images: int,
    batch: str,
    steps: int | None,
    make_venvs: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Compare a bundle with what else could make its pictures here.

    Every side runs in a process of its own, with the same threads, prompts, seeds and sampling, image by image in turn.
    A peer that is not installed is named with its install command; where all are missing, the exit code is 3.
    """
    from slipcast.progress import Stages
    from slipcast_compiler.bench.plan import Options
    from slipcast_compiler.bench.run import run_bench
    from slipcast_compiler.bench.table import render_table

    peers = tuple(dict.fromkeys(name.strip() for name in against.split(",") if name.strip()))
    options = Options(peers, model, target, images, _batches(batch), steps)
    document = run_bench(bundle, options, output, make_venvs, Stages())
    files = [file for file in document["files"].values() if file]
    emit(document, "\n".join([render_table(document), *files]), as_json)


def _batches(text: str) -> tuple[int, ...]:
    sizes = [size.strip() for size in text.split(",")]
    if not all(size.isascii() and size.isdigit() and 1 <= int(size) <= 4096 for size in sizes):
        raise click.BadParameter(f"{text!r} is not a list of sizes such as 1,4", param_hint="--batch")
    return tuple(dict.fromkeys(map(int, sizes)))


def _search_text(search: dict[str, Any]) -> list[str]:
    first = f"  search     least {search['objective']} within the gate, {search['budget_minutes']:g} minutes of trials"
    return [first, *(f"    {name:14} {', '.join(map(str, values))}" for name, values in search["values"].items())]


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
        *(f"  component  {name}: {c['parameters'] / 1e6:.1f} M parameters" for name, c in components.items()),
        *(f"  left out   {name}" for name in summary["not_compiled"]),
        *(f"  table      in place of {name}: {table['prompts']} prompts" for name in summary["not_shipped"]),
        *([f"             {table['bytes'] / 1e6:.1f} MB"] if table["prompts"] else []),
        *(f"  target     {target}" for target in summary["targets"]),
        *(_search_text(summary["search"]) if summary["search"] else []),
        f"  disk       about {summary['disk_bytes']['bundle'] / 1e6:.0f} MB for the bundle, "
        f"{summary['disk_bytes']['cache'] / 1e6:.0f} MB for the cache",
        f"  memory     about {summary['memory_bytes'] / 1e9:.1f} GB at the most, while the original runs",
    ]
    return "\n".join(lines)
