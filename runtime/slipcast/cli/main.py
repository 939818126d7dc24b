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
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any, NoReturn

import click

from slipcast.cli.completion import completion
from slipcast.cli.doctor import doctor
from slipcast.cli.inspect import inspect
from slipcast.cli.profile_run import profile_run
from slipcast.cli.report import report
from slipcast.cli.run import run
from slipcast.cli.serve import serve
from slipcast.cli.verify import verify
from slipcast.errors import Cancelled, HostError, SlipcastError

ENTRY_POINTS = "slipcast.commands"
INSTALL_COMPILER = "pip install 'slipcast[compiler]'"


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


for command in (run, serve, profile_run, inspect, verify, doctor, report, completion):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments  # wherever it stands
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Shown("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
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
        _tell(error, debug, arguments)
    except ModuleNotFoundError as error:
        _explain(debug)
        click.echo(
            f"error: this command needs {error.name}, which is not installed\n  next:     {INSTALL_COMPILER}", err=True
        )
        _fail(HostError.exit_code, f"{error.name} is not installed", {"hint": INSTALL_COMPILER}, arguments)
    except Exception as error:
        from slipcast.engines.resources import as_resource_error

        if lack := as_resource_error(error, type(error).__name__):
            _tell(lack, debug, arguments)
        _explain(debug)  # ours to mend; the user gets one message all the same
        message, hint = f"{type(error).__name__}: {error}", "run `slipcast --debug ...` and report it"
        _say(f"error: {message}\n  next:     {hint}")
        _fail(SlipcastError.exit_code, message, {"type": type(error).__name__, "hint": hint}, arguments)


class _Shown(logging.Formatter):
    """Lines of the log, which repeat what bundles and prompts say."""

    def format(self, record: logging.LogRecord) -> str:
        from slipcast.bundle.validation import shown

        return shown(super().format(record))


def _say(text: str) -> None:
    """On stderr, whoever wrote the text."""
    from slipcast.bundle.validation import shown

    click.echo(shown(text), err=True)


def _tell(error: SlipcastError, debug: bool, arguments: Sequence[str]) -> NoReturn:
    """The error's message, and its exit code."""
    _explain(debug)
    _say(f"error: {error}")
    details = {"expected": _text(error.expected), "got": _text(error.got), "hint": error.hint}
    _fail(error.exit_code, error.message, {"type": type(error).__name__, **details}, arguments)


def _terminated(signum: int, frame: object) -> None:
    """What is asked to stop stops as if by Ctrl-C: at a safe point, leaving nothing half-written."""
    raise KeyboardInterrupt


def _explain(debug: bool) -> None:
    if debug:
        traceback.print_exc()


def _fail(code: int, message: str, details: dict[str, Any], arguments: Sequence[str]) -> NoReturn:
    try:
        if "--json" in arguments:
            click.echo(json.dumps({"error": {"message": message, **details}, "exit_code": code}, indent=2))  # ASCII
        sys.stdout.flush()
    except OSError:  # full or closed: said on stderr already; let the flush at exit find a place
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(code)


def _text(value: object) -> str | None:
    return None if value is None else str(value)


if __name__ == "__main__":
    main()
