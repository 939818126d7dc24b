"""`slipcast completion`: what a shell evaluates to complete commands and options."""

from __future__ import annotations

import click


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print shell completion; for bash: eval "$(slipcast completion bash)"."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind
    root = click.get_current_context().find_root().command
    click.echo(kind(root, {}, "slipcast", "_SLIPCAST_COMPLETE").source())
