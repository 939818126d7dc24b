"""`slipcast serve`: bundles behind HTTP."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import click

from slipcast.cli.common import target_option, unlisted_option


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
@click.option(
    "--residency",
    metavar="[all|sequential|SIZE]",
    default="all",
    show_default=True,
    help="Engines that stay in memory: all, those in use, or, such as 4GB, what fits.",
)
@unlisted_option
def serve(
    bundles: tuple[Path, ...], host: str, port: int, queue: int, together: int, timeout: float, keys: tuple[str, ...],
    target: str, residency: str, allow_unlisted: bool,
) -> None:  # fmt: skip
    """Draw for others: OpenAI's images API, and a page, for one bundle or several.

    Clients call a bundle by its name, which `slipcast inspect` shows first; the first one given is the default. Keys
    are best given in SLIPCAST_API_KEYS, with spaces between them.
    """
    from slipcast.errors import HostError, RequestError
    from slipcast.progress import Stages
    from slipcast.run.load import load
    from slipcast.run.program import ProgramPipeline

    try:
        import uvicorn

        from slipcast.serve.app import Settings, make_app
    except ImportError as error:
        raise HostError("the server is not installed", got=error, hint="pip install 'slipcast[serve]'") from None
    pipes: dict[str, Any] = {}
    for bundle in bundles:
        with Stages().stage(f"load {bundle}"):
            pipe = load(bundle, target=target, residency=residency, allow_unlisted=allow_unlisted)
        name = pipe.manifest.name
        if name in pipes:
            raise RequestError(f"{bundle}: another bundle is called {name!r} too", expected="names that differ")
        if isinstance(pipe, ProgramPipeline):
            pictures = [argument for variant in pipe.program.every for argument in variant.images]
            if pictures or pipe.program.output != "image":
                got = f"one that is given {pictures[0]}" if pictures else f"one that gives {pipe.program.output}"
                raise RequestError(
                    f"{bundle} cannot be served", expected="a bundle that draws pictures of texts", got=got
                )
        pipes[name] = pipe
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise HostError(f"cannot listen on {host}, port {port}", got=error.strerror, hint="another --port") from None
    app = make_app(pipes, Settings(queue, together, timeout, keys))
    click.echo(f"serving {', '.join(pipes)} on http://{host}:{listening.getsockname()[1]}", err=True)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
    uvicorn.Server(config).run(sockets=[listening])
