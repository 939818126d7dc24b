"""`slipcast bench`."""

from __future__ import annotations

from pathlib import Path

import click

from slipcast.cli.common import bundle_argument, emit, json_option
from slipcast_compiler.bench.peers import PEERS


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
    A captured pipeline is compared with itself in diffusers, called as it was captured. A peer that is not installed is
    named with its install command; where all are missing, the exit code is 3.
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
