"""The evidence of a captured program: report.json and report.html, with what the pipeline does."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import tomli_w

from slipcast.bundle.program import NUMBERS, Output, Program
from slipcast_compiler.capture.parts import when
from slipcast_compiler.capture.verify import LIMIT
from slipcast_compiler.engines.programs import ProgramGraphs
from slipcast_compiler.export.closed import PROMPT_TABLE
from slipcast_compiler.judge.captured import PipelineOriginals, VariantOriginals
from slipcast_compiler.judge.evaluate import count_alarms
from slipcast_compiler.judge.programs import ProgramJudged, as_pictures
from slipcast_compiler.pages.evidence import (
    DIFFERENCE_GAIN,
    METRICS,
    SHOWN_PICTURES,
    SHOWN_PROMPTS,
    SHOWN_STRANGERS,
    common,
    figure,
    gate_rows,
    picture_rows,
    picture_width,
    plain_recipe,
    shown,
    write_record,
)
from slipcast_compiler.pages.page import render
from slipcast_compiler.pages.profile import pass_figures
from slipcast_compiler.pages.record import ProgramRecord, typed_program_record
from slipcast_compiler.pages.search import figures as search_figures
from slipcast_compiler.precision.quantize import read_report
from slipcast_compiler.recipe.family import Family
from slipcast_compiler.recipe.recipe import Recipe


@dataclass(frozen=True)
class ProgramEvidence:
    """All that a compile found. `call`: with what the recipe left open; `capture`, `parts`: what the plan found;
    `verified`: the error of the replay, and with which weights; `fields`: the manifest's; `graphs`: what it is built
    from; `passes`: what each reports; `searched`: what a search found, `reports`, what was found of timesteps and
    caching, and `exits`, of early exit, if they were asked for; `why_not`: a run cannot choose its steps, if it cannot;
    `seconds`: by stage."""

    recipe: Recipe
    call: Mapping[str, Any]
    family: Family | None
    capture: Mapping[str, Any]
    parts: Mapping[str, Any]
    verified: Mapping[str, Any]
    fields: Mapping[str, Any]
    originals: PipelineOriginals
    judged: ProgramJudged
    graphs: ProgramGraphs
    passes: Mapping[str, Any]
    searched: dict[str, Any] | None
    reports: Mapping[str, dict[str, Any]]
    exits: dict[str, Any] | None
    why_not: str
    seconds: Mapping[str, float]

    @property
    def program(self) -> Program:
        """The manifest's."""
        program: Program = self.fields["program"]
        return program


def make_program_record(evidence: ProgramEvidence) -> dict[str, Any]:
    """What report.json holds; plain JSON."""
    program, originals = evidence.program, evidence.originals
    return {
        **common(evidence.fields, evidence.judged, evidence.seconds),
        "pipeline": program.pipeline,
        "family": evidence.family
        and {
            **evidence.fields["family"].model_dump(mode="json"),
            "calibration_examples": list(evidence.family.calibration[:SHOWN_PROMPTS]),
            "held_out_prompts": list(dict.fromkeys(prompt for each in originals.variants for prompt in each.prompts)),
            "out_of_family_prompts": list(originals.outside.prompts) if originals.outside else [],
            **_not_shipped(evidence.graphs),
        },
        "recipe": _resolve(evidence),
        "original": f"diffusers' {program.pipeline}" if not evidence.recipe.model.pipeline else program.pipeline,
        "capture": dict(evidence.capture),
        "parts": dict(evidence.parts),
        "original_precision": originals.precision,
        "original_machine": originals.machine,
        "verified": evidence.verified["error"],
        "verified_with": evidence.verified["weights"],
        "limit": LIMIT,
        "texts": list(program.arguments),
        "pictures": list(program.images),
        "fixed": {name: value for name, value in program.fixed.items() if name not in program.listed},
        "listed": {name: list(values) for name, values in program.listed.items()},
        "variants": [_variant(evidence, place) for place in range(len(originals.variants))],
        "sampling": program.loop and program.loop.sampling.model_dump(mode="json", exclude_none=True),
        "free": list(program.loop.free) if program.loop else [],
        "not_free": evidence.why_not,
        "passes": dict(evidence.passes),
        "search": evidence.searched,
        "timesteps": evidence.reports.get("timesteps"),
        "caching": evidence.reports.get("caching"),
        "early_exit": evidence.exits,
        "guard": _guard(evidence),
        "quantized": {
            precision: {name: read_report(each) for name, each in made.items()}
            for precision, made in evidence.graphs.quantized.items()
        },
        "mixed_precision": dict(evidence.graphs.casts),
        "gives": program.output,
    }


def _variant(evidence: ProgramEvidence, place: int) -> dict[str, Any]:
    """What was judged of a variant."""
    program, originals = evidence.program, evidence.originals
    original, timed = originals.variants[place], originals.timed
    found = {}
    for target, judged in evidence.judged.variants.items():
        run, metrics = judged[place]
        found[target] = {"latency_s": round(run.latency_s, 4), **metrics.model_dump(exclude_none=True)}
    return {
        "chosen": {name: program.every[place].fixed[name] for name in program.listed},
        "images": len(original.seeds),
        "latency_original_s": round(original.run.latency_s, 4) if timed and original.run else None,
        "targets": found,
    }


def _guard(evidence: ProgramEvidence) -> dict[str, Any] | None:
    """What it said of prompts that pictures were judged on."""
    judged, originals = evidence.judged, evidence.originals
    distances = {
        target: [distance for run, _ in runs for distance in run.distances]
        + list(judged.outside[target].distances if target in judged.outside else ())
        for target, runs in judged.variants.items()
    }
    held_out = sum(len(each.seeds) for each in originals.variants)
    return count_alarms(evidence.fields["guard"], distances, held_out)


def _not_shipped(graphs: ProgramGraphs) -> dict[str, Any]:
    """What a closed family's bundle does without, and how large the table in its place is."""
    if not graphs.closed:
        return {}
    left = [name for name in replace(graphs, closed=None).contracts if name not in graphs.contracts]
    return {"not_shipped": left, "prompt_table_bytes": (graphs.closed[1] / PROMPT_TABLE).stat().st_size}


def write_program_report(folder: Path, record: dict[str, Any], evidence: ProgramEvidence) -> None:
    """Write report.json and report.html into `folder`."""
    typed = typed_program_record(record)
    write_record(folder, typed)
    runs, natural = evidence.judged.runs, 1
    if typed.gives not in NUMBERS and (original := evidence.originals.variants[0].run):
        natural = original.images.shape[-1]
    width = picture_width(natural, len(runs))
    page = render(
        "program.html",
        {"shown": shown, "figure": figure},
        record=typed,
        gain=DIFFERENCE_GAIN,
        rows=_rows(evidence, width),
        strangers=_strangers(evidence, width),
        width=width,
        natural=natural,
        metrics=_measured(typed),
        gates=_asked(gate_rows(typed)),
        when={name: when(name) for name in typed.parts},
        recipe=tomli_w.dumps(typed.recipe),
        search_plots=search_figures(typed.search) if typed.search else [],
        figure=figure,
        **pass_figures(typed.passes),
    )
    (folder / "report.html").write_text(page, "utf-8")


def _resolve(evidence: ProgramEvidence) -> dict[str, Any]:
    """The recipe with the whole call, without tables that are not for a captured pipeline; itself a valid recipe."""
    recipe = evidence.recipe
    found = {name: table for name, table in plain_recipe(recipe).items() if name in recipe.model_fields_set}
    if "profile" in found:
        found["profile"].pop("batch")  # images of a captured pipeline are drawn one by one
    call: dict[str, Any] = json.loads(json.dumps(dict(evidence.call)))
    return {**found, "call": call}


def _rows(evidence: ProgramEvidence, width: int) -> list[dict[str, Any]]:
    """The first pictures of each variant; of sounds and arrays none, and none where there are no originals."""
    if (program := evidence.program).output in NUMBERS or not evidence.originals.precision:
        return []
    originals = evidence.originals.variants
    shown = list(islice(_in_turns([len(each.seeds) for each in originals]), SHOWN_PICTURES))
    chosen = [", ".join(f"{name} {each.fixed[name]}" for name in program.listed) for each in program.every]
    images = [_Shown(originals[place], at, chosen[place]) for place, at in shown]
    runs = {
        target: [judged[place][0].images[at] for place, at in shown]
        for target, judged in evidence.judged.variants.items()
    }
    return _picture_rows(images, runs, program.output, width)


def _strangers(evidence: ProgramEvidence, width: int) -> list[dict[str, Any]]:
    """The first pictures of prompts out of the family."""
    if evidence.program.output in NUMBERS or not (outside := evidence.originals.outside) or not outside.run:
        return []
    images = [_Shown(outside, at, "") for at in range(min(len(outside.seeds), SHOWN_STRANGERS))]
    runs = {target: list(run.images[: len(images)]) for target, run in evidence.judged.outside.items()}
    return _picture_rows(images, runs, evidence.program.output, width)


@dataclass(frozen=True)
class _Shown:
    """An image of the pipeline's that is shown, with what its caption says besides the prompt."""

    original: VariantOriginals
    at: int
    chosen: str


def _picture_rows(
    images: Sequence[_Shown], runs: Mapping[str, Sequence[Any]], output: Output, width: int
) -> list[dict[str, Any]]:
    """`runs`: by target, its results for these; of a video its first frame and its last are shown."""
    frames = {", first frame": 0, ", last frame": -1} if output == "frames" else {"": ...}
    captions, seeds, pictures, found = [], [], list[Any](), {name: list[Any]() for name in runs}
    for place, image in enumerate(images):
        original, at = image.original, image.at
        for name, frame in frames.items():
            captions.append(", ".join(filter(None, [original.prompts[at] or "no prompt", image.chosen])) + name)
            seeds.append(original.seeds[at])
            pictures.append(as_pictures(original.laid(output)[at][frame])[0])
            for target, results in runs.items():
                found[target].append(as_pictures(results[place][frame])[0])
    return picture_rows(captions, seeds, pictures, found, range(len(captions)), width)


def _in_turns(counts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(variant, image): the first image of each variant, then the second."""
    for at in range(max(counts)):
        yield from ((place, at) for place, count in enumerate(counts) if at < count)


def _measured(record: ProgramRecord) -> dict[str, str]:
    """The metrics that were run."""
    qualities = [target["quality"] for target in record.targets if target["quality"]]
    return {key: label for key, label in METRICS.items() if any(each[key] is not None for each in qualities)}


def _asked(gates: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Without the rows of what was neither run nor asked for."""
    nothing = ("not run", "none")
    return {target: [row for row in rows if (row["value"], row["limit"]) != nothing] for target, rows in gates.items()}
