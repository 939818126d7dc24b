"""`slipcast verify`: every file of a bundle against its manifest."""

from __future__ import annotations

from pathlib import Path

import click

from slipcast.cli.common import bundle_argument, emit, json_option, unlisted_option


@click.command()
@bundle_argument
@unlisted_option
@json_option
def verify(bundle: Path, allow_unlisted: bool, as_json: bool) -> None:
    """Check every file of a bundle against its manifest."""
    from slipcast.bundle.reader import check_digests, open_any_bundle
    from slipcast.progress import Stages

    opened = open_any_bundle(bundle, allow_unlisted=allow_unlisted)
    with Stages().stage("verify") as advance:
        check_digests(opened, "all", advance)
    count, size = len(opened.manifest.files), sum(entry.size for entry in opened.manifest.files)
    emit({"ok": True, "files": count, "bytes": size}, f"ok: {count} files, {size / 1e6:.1f} MB", as_json)
