"""What a bundle's own report says that others go by."""

from __future__ import annotations

from typing import Any

from slipcast.bundle import Bundle
from slipcast.manifest import Manifest
from slipcast.validation import parse_json

REPORT = "report.json"
USUAL_PROMPT = "a photograph"  # for a bundle without a report


def report_files(manifest: Manifest) -> list[str]:
    """To be verified before `held_out_prompts` reads it."""
    return [entry.path for entry in manifest.files if entry.path == REPORT]


def held_out_prompts(bundle: Bundle) -> list[str]:
    """The prompts that the bundle was judged on; another that it takes where none is known, and none where it takes
    no text. Its report, if it has one, has to be verified already."""
    manifest = bundle.manifest
    if not manifest.takes_prompt:
        return []
    closed = manifest.prompts
    usual = next(prompt for prompt in closed.prompts if prompt) if closed else USUAL_PROMPT
    record: Any = {}
    if report_files(manifest):
        record = parse_json(bundle.path(REPORT).read_bytes(), REPORT)
    return list(map(str, (record.get("family") or {}).get("held_out_prompts") or [usual]))
