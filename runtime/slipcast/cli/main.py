"""The `slipcast` command. It parses, makes one call and prints; errors become one message and an exit code.

0 ok, 1 gate or check failed, 2 usage or recipe error, 3 environment or hardware, 4 bad or untrusted artifact,
5 resources, 130 interrupted. With --json, stdout is one JSON document, also for errors; the rest goes to stderr.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click

from slipcast.errors import ArtifactError, Cancelled, HostError, ResourceError, SlipcastError

ENTRY_POINTS = "slipcast.commands"
INSTALL_COMPILER = "pip install 'slipcast[compiler]'"

json_option: Callable[[Any], Any] = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
unlisted_option: Callable[[Any], Any] = click.option(
    "--allow-unlisted", is_flag=True, help="Tolerate files that the manifest does not list."
)
bundle_argument: Callable[[Any], Any] = click.argument("bundle", type=click.Path(path_type=Path))


def emit(document: dict[str, Any], text: str, as_json: bool) -> None:
    """Print a command's result on stdout."""
    click.echo(json.dumps(document, indent=2, ensure_ascii=False) if as_json else text)


class Commands(click.Group):
    """The runtime's commands, and those that other distributions add through the entry-point group."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *(point.name for point in entry_points(group=ENTRY_POINTS))})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if found := super().get_command(ctx, cmd_name):
            return found
        for point in entry_points(group=ENTRY_POINTS, name=cmd_name):
            command: click.Command = point.load()
            return command
        return None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="slipcast", prog_name="slipcast")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def cli(debug: bool) -> None:
    """Compile diffusion pipelines for a prompt family, and run what was compiled without torch."""


@cli.command()
@bundle_argument
@click.option("--prompt", help="What to draw; not for unconditional bundles.")
@click.option("--negative-prompt", default="", help="What to stay away from.")
@click.option("--seed", type=int, help="Image i gets seed + i.  [default: random, and said]")
@click.option("--num-images", type=int, default=1, show_default=True, help="More than one make a grid.")
@click.option("--steps", type=int, help="Sampling steps.  [default: the bundle's]")
@click.option("--guidance-scale", type=float, help="[default: the bundle's]")
@click.option("--target", default="auto", show_default=True, help="An engine or target id of the bundle.")
@click.option("--residency", type=click.Choice(["all", "sequential"]), default="all", show_default=True)
@unlisted_option
@click.option("--on-long-prompt", type=click.Choice(["warn", "error"]), default="warn", show_default=True)
@click.option(
    "--guard", type=click.Choice(["warn", "refuse", "fallback"]),
    help="What becomes of a prompt out of the family.  [default: what the bundle says]",
)  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), help="A picture, or a directory for one each.")
@json_option
def run(
    bundle: Path,
    prompt: str | None,
    negative_prompt: str,
    seed: int | None,
    num_images: int,
    steps: int | None,
    guidance_scale: float | None,
    target: str,
    residency: Any,
    allow_unlisted: bool,
    on_long_prompt: Any,
    guard: Any,
    output: Path | None,
    as_json: bool,
) -> None:
    """Make images."""
    from slipcast.bundle.reader import open_bundle
    from slipcast.progress import Stages
    from slipcast.run.pipeline import load

    if output:
        _check_output(output)
    if prompt is None and open_bundle(bundle, allow_unlisted=allow_unlisted).manifest.takes_prompt:
        raise click.UsageError("--prompt is missing: this bundle draws what a text says")
    stages = Stages()
    with stages.stage("load"):
        pipe = load(bundle, target=target, residency=residency, allow_unlisted=allow_unlisted)
    usual = steps or pipe.manifest.sampling.steps  # the unspecialised denoiser may take more
    with pipe, stages.stage(f"sample on {pipe.target}") as advance:
        result = pipe(
            prompt, negative_prompt=negative_prompt, seed=seed, num_images_per_prompt=num_images,
            num_inference_steps=steps, guidance_scale=guidance_scale, on_long_prompt=on_long_prompt,
            guard=guard, callback_on_step_end=lambda _, step, __, ___: advance(step + 1, max(usual, step + 1)),
        )  # fmt: skip
    files = _save(result.images, result.seeds, output or Path(f"{pipe.manifest.name}-{result.seeds[0]}.png"))
    document = {
        "files": [str(file) for file in files], "seeds": list(result.seeds), "target": result.target,
        "seconds": {name: round(s, 4) for name, s in result.seconds.items()},
        "steps": list(result.steps), "guard": [vars(verdict) for verdict in result.guard],
    }  # fmt: skip
    emit(document, "\n".join(map(str, files)), as_json)


@cli.command("profile-run")
@bundle_argument
@click.option("--prompt", help="What to draw.  [default: a held-out prompt of the bundle's report]")
@click.option("--seed", type=int, default=0, show_default=True, help="Image i gets seed + i.")
@click.option("--num-images", type=int, default=1, show_default=True)
@click.option("--steps", type=int, help="Sampling steps.  [default: the bundle's]")
@click.option("--target", default="auto", show_default=True, help="An engine or target id of the bundle.")
@unlisted_option
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Page to write.  [default: NAME-profile.html]")
@json_option
def profile_run(
    bundle: Path, prompt: str | None, seed: int, num_images: int, steps: int | None, target: str,
    allow_unlisted: bool, output: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Show where a run spends its time and memory."""
    from slipcast.progress import Stages
    from slipcast.timing.measure import profile_run
    from slipcast.timing.page import render_page
    from slipcast.timing.table import render_table

    if output:
        if _is_directory(output):
            raise click.UsageError(f"cannot write {output}: name a page, such as {output / 'profile.html'}")
        _check_writable(output)
    document = profile_run(bundle, prompt, target, steps, num_images, seed, allow_unlisted, Stages())
    output = output or Path(f"{document['name']}-profile.html")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(render_page(document), "utf-8")
    except OSError as error:
        raise click.UsageError(f"cannot write {output}: {error}") from None
    emit(document | {"files": [str(output)]}, f"{render_table(document)}\npicture: {output}", as_json)


@cli.command()
@bundle_argument
@unlisted_option
@json_option
def inspect(bundle: Path, allow_unlisted: bool, as_json: bool) -> None:
    """Show what a bundle holds, without hashing its files; or what a profile says."""
    from slipcast.bundle.profiles import is_profile, open_profile_file, render_summary, summarise
    from slipcast.bundle.reader import open_bundle
    from slipcast.cli.inspect import describe

    if is_profile(bundle):
        summary = summarise(open_profile_file(bundle))
        emit(summary, render_summary(summary), as_json)
        return
    manifest = open_bundle(bundle, allow_unlisted=allow_unlisted).manifest
    emit(manifest.model_dump(mode="json"), describe(manifest), as_json)


@cli.command()
@bundle_argument
@unlisted_option
@json_option
def verify(bundle: Path, allow_unlisted: bool, as_json: bool) -> None:
    """Check every file of a bundle against its manifest."""
    from slipcast.bundle.reader import check_digests, open_bundle
    from slipcast.progress import Stages

    opened = open_bundle(bundle, allow_unlisted=allow_unlisted)
    with Stages().stage("verify") as advance:
        check_digests(opened, "all", advance)
    count, size = len(opened.manifest.files), sum(entry.size for entry in opened.manifest.files)
    emit({"ok": True, "files": count, "bytes": size}, f"ok: {count} files, {size / 1e6:.1f} MB", as_json)


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@json_option
def doctor(bundle: Path | None, as_json: bool) -> None:
    """Tell what this machine can run, and which targets of a bundle."""
    from slipcast.cli.doctor import examine

    findings = examine(bundle)
    width = max(len(finding.name) for finding in findings)
    lines = [f"{'ok ' if f.ok else 'BAD'}  {f.name:<{width}}  {f.detail}" for f in findings]
    bad = [f"{finding.name}: {finding.detail}" for finding in findings if not finding.ok]
    emit({"ok": not bad, "findings": [vars(f) for f in findings]}, "\n".join(lines), as_json)
    if bad:
        sys.exit(HostError.exit_code)


@cli.command()
@bundle_argument
@unlisted_option
@json_option
def report(bundle: Path, allow_unlisted: bool, as_json: bool) -> None:
    """Show the evidence that a bundle carries."""
    from slipcast.bundle.evidence import summarise
    from slipcast.bundle.reader import open_bundle
    from slipcast.bundle.validation import parse_json

    opened = open_bundle(
        bundle,
        allow_unlisted=allow_unlisted,
        files=lambda manifest: [f.path for f in manifest.files if f.path.startswith("report.")],
    )
    try:
        record = parse_json(opened.path("report.json").read_bytes(), "report.json")
    except ArtifactError as error:
        raise ArtifactError(f"{bundle}: holds no report", hint="compile the bundle again") from error
    emit(record, summarise(opened.manifest, record, opened.path("report.html")), as_json)


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print shell completion; for bash: eval "$(slipcast completion bash)"."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind
    click.echo(kind(cli, {}, "slipcast", "_SLIPCAST_COMPLETE").source())


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments  # wherever it stands
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("slipcast").setLevel(logging.INFO)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminated)
    try:
        code = cli.main(args=[a for a in arguments if a != "--debug"], prog_name="slipcast", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        _fail(error.exit_code, error.format_message(), {}, arguments)
    except (KeyboardInterrupt, click.Abort):
        hint = "; the same command goes on from the cache" if "compile" in arguments else ""
        click.echo(f"interrupted{hint}", err=True)
        _fail(Cancelled.exit_code, "interrupted", {}, arguments)
    except SlipcastError as error:
        _explain(debug)
        click.echo(f"error: {error}", err=True)
        details = {"expected": _text(error.expected), "got": _text(error.got), "hint": error.hint}
        _fail(error.exit_code, error.message, {"type": type(error).__name__, **details}, arguments)
    except ModuleNotFoundError as error:
        _explain(debug)
        click.echo(
            f"error: this command needs {error.name}, which is not installed\n  next:     {INSTALL_COMPILER}", err=True
        )
        _fail(HostError.exit_code, f"{error.name} is not installed", {"hint": INSTALL_COMPILER}, arguments)
    except Exception as error:  # ours to mend; the user gets one message all the same
        _explain(debug)
        message = f"{type(error).__name__}: {error}"
        hint = "free some memory" if isinstance(error, MemoryError) else "run `slipcast --debug ...` and report it"
        click.echo(f"error: {message}\n  next:     {hint}", err=True)
        code = ResourceError.exit_code if isinstance(error, MemoryError) else SlipcastError.exit_code
        _fail(code, message, {"type": type(error).__name__, "hint": hint}, arguments)


def _terminated(signum: int, frame: object) -> None:
    """What is asked to stop stops as if by Ctrl-C: at a safe point, leaving nothing half-written."""
    raise KeyboardInterrupt


def _explain(debug: bool) -> None:
    if debug:
        traceback.print_exc()


def _fail(code: int, message: str, details: dict[str, Any], arguments: Sequence[str]) -> None:
    try:
        if "--json" in arguments:
            click.echo(json.dumps({"error": {"message": message, **details}, "exit_code": code}, indent=2))
        sys.stdout.flush()
    except OSError:  # full or closed: said on stderr already; let the flush at exit find a place
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(code)


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _is_directory(output: Path) -> bool:
    return output.is_dir() or not output.suffix


def _check_output(output: Path) -> None:
    """Refuse before the work what could not be saved after it; what goes wrong nevertheless is met in _save."""
    from PIL import Image

    kinds = Image.registered_extensions()
    if not _is_directory(output) and kinds.get(output.suffix.lower()) not in Image.SAVE:
        raise click.UsageError(f"cannot write {output}: no picture format is called {output.suffix}; use .png")
    _check_writable(output)


def _check_writable(output: Path) -> None:
    nearest = next(path for path in (output, *output.absolute().parents) if path.exists())
    if (nearest.is_file() and nearest != output) or not os.access(nearest, os.W_OK):
        raise click.UsageError(f"cannot write {output}: {nearest} cannot be written to")


def _save(images: Sequence[Any], seeds: Sequence[int], output: Path) -> list[Path]:
    """One file, a grid of all images; or one each, named by seed, where `output` is a directory."""
    from slipcast.cli.grid import make_grid

    as_directory = _is_directory(output)
    files = [output / f"{seed}.png" for seed in seeds] if as_directory else [output]
    pictures = images if as_directory else [make_grid(images)]
    try:
        files[0].parent.mkdir(parents=True, exist_ok=True)
        for file, picture in zip(files, pictures, strict=True):
            picture.save(file)
    except (OSError, ValueError) as error:
        raise click.UsageError(f"cannot write {output}: {error}") from None
    return files


if __name__ == "__main__":
    main()
