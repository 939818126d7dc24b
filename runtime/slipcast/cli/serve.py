"""`slipcast serve`: bundles behind HTTP."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from slipcast.cli.common import residency_option, target_option, unlisted_option

GRACE_S = 5  # for answers, once the server is told to end
CONNECTIONS = 256  # beside those that wait for pictures


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen; 0.0.0.0 for all networks.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 for any free one.")
@click.option("--queue", type=click.IntRange(1, 100_000), default=64, show_default=True, help="Requests that may wait.")
@click.option(
    "--together",
    type=click.IntRange(1, 64),
    default=8,
    show_default=True,
    help="Images of one call, of requests that ask for the same but for texts and seeds.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0.1, 86_400),
    default=600.0,
    show_default=True,
    help="Seconds from a request to its pictures.",
)
@click.option("--api-key", "keys", multiple=True, envvar="SLIPCAST_API_KEYS", help="Clients have to send one of them.")
@target_option
@residency_option
@unlisted_option
def serve(
    bundles: tuple[Path, ...], host: str, port: int, queue: int, together: int, timeout: float, keys: tuple[str, ...],
    target: str, residency: str, allow_unlisted: bool,
) -> None:  # fmt: skip
    """Draw for others: OpenAI's images API, and a page, for one bundle or several.

    Clients call a bundle by its name, which `slipcast inspect` shows first; the first one given is the default. Keys
    are best given in SLIPCAST_API_KEYS, with spaces between them.
    """
    from slipcast.errors import HostError
    from slipcast.progress import Stages
    from slipcast.run.load import load

    try:
        import uvicorn

        from slipcast.serve.app import Settings, make_app
    except ImportError as error:
        raise HostError("the server is not installed", got=error, hint="pip install 'slipcast[serve]'") from None
    if not all(map(str.strip, keys)) or (not keys and "SLIPCAST_API_KEYS" in os.environ):
        raise click.UsageError("an API key is empty: whoever asks would be let in")
    names = _names(bundles, allow_unlisted)
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise HostError(f"cannot listen on {host}, port {port}", got=error.strerror, hint="another --port") from None
    pipes: dict[str, Any] = {}
    for name, bundle in names.items():
        with Stages().stage(f"load {bundle}"):
            pipes[name] = load(bundle, target=target, residency=residency, allow_unlisted=allow_unlisted)
    app = make_app(pipes, Settings(queue, together, timeout, keys))

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            # In a thread, as the handler of a signal may have interrupted who holds a lock.
            threading.Thread(target=app.state.stop).start()
            super().handle_exit(sig, frame)

    shown = f"[{host}]" if ":" in host else host
    click.echo(f"serving {', '.join(pipes)} on http://{shown}:{listening.getsockname()[1]}", err=True)
    config = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=GRACE_S, limit_concurrency=queue + CONNECTIONS
    )
    Server(config).run(sockets=[listening])


def _names(bundles: Sequence[Path], allow_unlisted: bool) -> dict[str, Path]:
    """By name, the bundles that can be served, before any is loaded; RequestError for others."""
    from slipcast.bundle.reader import ProgramBundle, open_any_bundle
    from slipcast.errors import RequestError

    names: dict[str, Path] = {}
    for bundle in bundles:
        opened = open_any_bundle(bundle, allow_unlisted=allow_unlisted)
        if (name := opened.manifest.name) in names:
            raise RequestError(f"{bundle}: another bundle is called {name!r} too", expected="names that differ")
        if isinstance(opened, ProgramBundle):
            program = opened.manifest.program
            pictures = [argument for variant in program.every for argument in variant.images]
            if pictures or program.output != "image":
                got = f"one that is given {pictures[0]}" if pictures else f"one that gives {program.output}"
                expected = "a bundle that draws pictures of texts"
                raise RequestError(f"{bundle} cannot be served", expected=expected, got=got)
        names[name] = bundle
    return names
