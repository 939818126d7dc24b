"""`slipcast bench`, from the options to the files."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from slipcast.bundle.reader import open_bundle
from slipcast.errors import RequestError
from slipcast.progress import Stages
from slipcast_compiler.bench.document import load_average, make_document
from slipcast_compiler.bench.measure import measure
from slipcast_compiler.bench.plan import Options, check_names, make_plan, venvs, wanted_venvs
from slipcast_compiler.bench.venvs import VENVS, make


def run_bench(bundle: Path, options: Options, output: Path | None, make_venvs: bool, stages: Stages) -> dict[str, Any]:
    """Measure, and write the document and its page: the document, with the paths of both under `files`."""
    load_before = load_average()
    if output:
        _check(output)
    if make_venvs:
        open_bundle(bundle)  # environments take minutes: what is wrong is said before
        check_names(options.against)
        for name in wanted_venvs(options):
            with stages.stage(f"environment {name}"):
                make(VENVS[name], venvs(options) / name)
    plan = make_plan(bundle, options)
    document = make_document(plan, measure(plan, stages), load_before)
    output = output or _default_output(options.folder, plan.bundle.manifest.name)
    return document | {"files": write(document, output, bundle / "report.html", stages)}


def write(document: dict[str, Any], output: Path, report: Path, stages: Stages) -> dict[str, str | None]:
    """The JSON at `output` and the page beside it, which is left out, and said to be, on a host without jinja2.

    The page links to the bundle's; not the other way round, since a bundle is sealed: what it does not list is refused.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
    try:
        from slipcast_compiler.bench.pages import render_page
    except ModuleNotFoundError:
        stages.say("no page: it needs jinja2; pip install 'slipcast[compiler]'")
        return {"json": str(output), "html": None}
    page = output.with_suffix(".html")
    link = quote(Path(os.path.relpath(report, page.parent)).as_posix()) if report.is_file() else None
    page.write_text(render_page(document, link), "utf-8")
    return {"json": str(output), "html": str(page)}


def _check(output: Path) -> None:
    """Refuse before the work what could not be written after it."""
    if output.suffix == ".html":
        raise RequestError(f"-o {output}: the page gets this name", expected="a name for the JSON", got=output.name)
    nearest = next(path for path in (output, *output.absolute().parents) if path.exists())
    if output.is_dir() or not os.access(nearest, os.W_OK):
        raise RequestError(f"-o {output}: cannot be written", expected="a file in a folder of yours", got=str(nearest))


def _default_output(folder: Path, name: str) -> Path:
    return folder / "bench" / f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
