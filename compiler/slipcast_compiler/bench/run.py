"""`slipcast bench`, from the options to the files."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

from slipcast.bundle.reader import ProgramBundle, open_any_bundle
from slipcast.errors import RequestError
from slipcast.progress import Stages
from slipcast_compiler.bench.document import BenchDocument
from slipcast_compiler.bench.measure import measure
from slipcast_compiler.bench.peaks import measure_peaks
from slipcast_compiler.bench.plan import Options, check_names, make_plan, venvs, wanted_venvs
from slipcast_compiler.bench.plan_program import plan_program
from slipcast_compiler.bench.summary import make_document
from slipcast_compiler.bench.venvs import VENVS, make
from slipcast_compiler.host.isolate import run_isolated
from slipcast_compiler.host.machine import load_average


def run_bench(bundle: Path, options: Options, output: Path | None, make_venvs: bool, stages: Stages) -> dict[str, Any]:
    """Measure, and write the document and its page: the document as plain JSON, with the paths of both."""
    load_before = load_average()
    if output:
        _check(output)
    if make_venvs:
        open_any_bundle(bundle)  # environments take minutes: what is wrong is said before
        check_names(options.against)
        for name in wanted_venvs(options):
            with stages.stage(f"environment {name}"):
                make(VENVS[name], venvs(options) / name)
    captured = isinstance(open_any_bundle(bundle), ProgramBundle)
    plan = plan_program(bundle, options) if captured else make_plan(bundle, options)
    peaks = None
    if find_spec("torch"):
        with stages.stage("peaks of the host"):
            peaks = run_isolated(measure_peaks).result
    document = make_document(plan, measure(plan, stages), load_before, peaks)
    output = output or _default_output(options.folder, plan.bundle.manifest.name)
    return write(document, output, bundle / "report.html", stages).plain()


def write(document: BenchDocument, output: Path, report: Path, stages: Stages) -> BenchDocument:
    """The JSON at `output` and the page beside it: the document with the paths of both under `files`.

    The page is left out, and said to be, on a host without jinja2. It links to the bundle's; not the other way round,
    since a bundle is sealed: what it does not list is refused.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document.plain(), indent=2, ensure_ascii=False, allow_nan=False)
    output.write_text(text + "\n", "utf-8")
    page: Path | None = output.with_suffix(".html")
    try:
        from slipcast_compiler.bench.pages import render_page
    except ModuleNotFoundError:
        stages.say("no page: it needs jinja2; pip install 'slipcast[compiler]'")
        page = None
    else:
        link = quote(Path(os.path.relpath(report, output.parent)).as_posix()) if report.is_file() else None
        output.with_suffix(".html").write_text(render_page(document, link), "utf-8")
    files = {"json": str(output), "html": page and str(page)}
    return document.model_copy(update={"files": files})


def _check(output: Path) -> None:
    """Refuse before the work what could not be written after it."""
    if output.suffix == ".html":
        raise RequestError(f"-o {output}: the page gets this name", expected="a name for the JSON", got=output.name)
    nearest = next(path for path in (output, *output.absolute().parents) if path.exists())
    if output.is_dir() or not os.access(nearest, os.W_OK):
        raise RequestError(f"-o {output}: cannot be written", expected="a file in a folder of yours", got=str(nearest))


def _default_output(folder: Path, name: str) -> Path:
    return folder / "bench" / f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
