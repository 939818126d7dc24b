"""`slipcast report`: the evidence that a bundle carries."""

from __future__ import annotations

from pathlib import Path

import click

from slipcast.cli.common import bundle_argument, emit, json_option, unlisted_option
from slipcast.errors import ArtifactError


@click.command()
@bundle_argument
@unlisted_option
@json_option
def report(bundle: Path, allow_unlisted: bool, as_json: bool) -> None:
    """Show the evidence that a bundle carries."""
    from slipcast.bundle.evidence import render_evidence
    from slipcast.bundle.reader import open_any_bundle
    from slipcast.bundle.validation import parse_json

    opened = open_any_bundle(
        bundle,
        allow_unlisted=allow_unlisted,
        files=lambda manifest: [f.path for f in manifest.files if f.path.startswith("report.")],
    )
    try:
        record = parse_json(opened.file("report.json").read_bytes(), "report.json")
    except ArtifactError as error:
        raise ArtifactError(f"{bundle}: holds no report", hint="compile the bundle again") from error
    emit(record, render_evidence(opened.manifest, record, opened.path("report.html")), as_json)
