"""`slipcast cache`: what is in the build cache, and whether it is as it was written."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from slipcast.cli.common import emit, json_option
from slipcast.errors import CheckFailed, RequestError
from slipcast_compiler.cli.options import cache_option


@click.group("cache")
def cache_command() -> None:
    """Look into the build cache."""


@cache_command.command("verify")
@cache_option
@json_option
def verify_command(cache: Path, as_json: bool) -> None:
    """Hash everything. What is damaged is kept as NAME.bad-..., and built again when it is needed."""
    from slipcast.progress import Stages
    from slipcast_compiler.host.cache import Cache

    _check(cache)
    count = len(list(Cache(cache).entries()))
    with Stages().stage("verify") as advance:
        damaged = Cache(cache).verify(advance)
    lines = [f"BAD  {name}: {damage}" for name, damage in damaged.items()]
    lines.append(f"{cache}: {count} entries, {len(damaged)} damaged")
    emit({"cache": str(cache), "entries": count, "damaged": damaged}, "\n".join(lines), as_json)
    if damaged:
        sys.exit(CheckFailed.exit_code)


@cache_command.command("ls")
@cache_option
@json_option
def ls_command(cache: Path, as_json: bool) -> None:
    """Show what is there, the largest first; a file that several entries have counts once in the total."""
    from slipcast_compiler.host.cache import Cache

    _check(cache)
    entries = sorted(Cache(cache).entries(), key=lambda entry: (-entry.size, entry.path.name))
    files = {(stat.st_dev, stat.st_ino): stat.st_size for entry in entries for stat in map(Path.stat, entry.files())}
    total = sum(files.values())
    document = {
        "cache": str(cache),
        "entries": [
            {"kind": entry.kind, "name": entry.path.name, "bytes": entry.size, "age_s": round(entry.age_s)}
            for entry in entries
        ],
        "total_bytes": total,
    }
    lines = [
        f"{entry.kind:<16} {entry.size / 1e6:8.1f} MB  {_age(round(entry.age_s)):>8}  {entry.path.name}"
        for entry in entries
    ]
    lines.append(f"{len(entries)} entries, {total / 1e6:.1f} MB on the disk")
    emit(document, "\n".join(lines), as_json)


def _check(cache: Path) -> None:
    if not cache.is_dir():
        raise RequestError(
            f"{cache}: no build cache", expected="a directory that `slipcast compile` made", hint="give --cache DIR"
        )


def _age(seconds: int) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"
