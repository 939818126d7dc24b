"""The evidence: report.json for programs and report.html for people, one self-contained file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from slipcast.bundle.profiles import open_profile_file
from slipcast_compiler.export.graphs import Graphs
from slipcast_compiler.graph.cost import cost
from slipcast_compiler.judge.evaluate import Judged, count_alarms
from slipcast_compiler.judge.originals import Originals
from slipcast_compiler.model import original
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
from slipcast_compiler.pages.profile import figures, pass_figures
from slipcast_compiler.pages.record import typed_record
from slipcast_compiler.pages.search import figures as search_figures
from slipcast_compiler.recipe.passes import PassesTable
from slipcast_compiler.recipe.recipe import Recipe
from slipcast_compiler.recipe.sampling import SamplingTable


@dataclass(frozen=True)
class Evidence:
    """All that a compile found. `fields`: the manifest's; `casts`: by target, what stays in fp32; `searched` and
    `exits`: what a search and early exit found, if they were asked for; `seconds`: by stage."""

    recipe: Recipe
    graphs: Graphs
    fields: Mapping[str, Any]
    originals: Originals
    judged: Judged
    casts: Mapping[str, Any]
    searched: dict[str, Any] | None
    exits: dict[str, Any] | None
    seconds: Mapping[str, float]


def make_record(evidence: Evidence) -> dict[str, Any]:
    """What report.json holds; plain JSON."""
    graphs, fields, judged = evidence.graphs, evidence.fields, evidence.judged
    held_out = len(evidence.originals.bf16)
    return {
        **common(fields, judged, evidence.seconds),
        "pipeline": graphs.original.checkpoint.index["_class_name"],
        "not_compiled": list(fields["not_compiled"]),
        "components": {name: component.model_dump(mode="json") for name, component in fields["components"].items()},
        "family": graphs.family and _family(evidence),
        "recipe": resolve(evidence.recipe, graphs),
        "sampling": fields["sampling"].model_dump(mode="json", exclude_none=True),
        "reference": graphs.reference.model_dump(mode="json", exclude_none=True),
        "original": original.drawn_by(graphs.reference, graphs.family is not None),
        "passes": {name: found for name, found in graphs.reports.items() if name in PassesTable.model_fields},
        "mixed_precision": evidence.casts,
        "search": evidence.searched,
        "timesteps": graphs.reports.get("timesteps"),
        "early_exit": evidence.exits,
        "cut": graphs.reports.get("cut"),
        "caching": graphs.reports.get("caching"),
        "guard": count_alarms(
            fields["guard"], {target: run.distances for target, run in judged.runs.items()}, held_out
        ),
        "cost": cost(graphs.components["denoiser"] / "denoiser.onnx"),
    }


def _family(evidence: Evidence) -> dict[str, Any]:
    """The prompts, as the page shows them, and what a closed family's bundle does without."""
    graphs, prompts, held_out = evidence.graphs, evidence.originals.prompts, len(evidence.originals.bf16)
    assert graphs.family
    encoders = [text.component for text in graphs.original.checkpoint.architecture.text]
    return {
        **evidence.fields["family"].model_dump(mode="json"),
        "calibration_examples": list(graphs.family.calibration[:SHOWN_PROMPTS]),
        "held_out_prompts": list(prompts[:held_out]),
        "out_of_family_prompts": list(prompts[held_out:]),
        "not_shipped": [name for name in encoders if name not in graphs.components],
        "prompt_table_bytes": graphs.prompts.stat().st_size if graphs.prompts else 0,
    }


def resolve(recipe: Recipe, graphs: Graphs) -> dict[str, Any]:
    """The recipe with everything that it left open as it was resolved; itself a valid recipe."""
    found = plain_recipe(recipe)
    sampling = graphs.sampling.model_dump(mode="json", exclude={"noise"}, exclude_none=True)
    if not graphs.sampling.schedule:  # an explicit list has its own length
        for given in (sampling, found["sampling"]):
            for key in {"steps", "schedule"} & set(given):
                del given[key]
    reference, image = graphs.reference, graphs.original.image
    if found.pop("timesteps", None) or found.pop("reference"):  # what it inherited was not a list that was found
        explicit = {"noise", "guidance_interval", "guidance_reuse"} | (set() if reference.schedule else {"steps"})
        found["reference"] = reference.model_dump(mode="json", exclude=explicit, exclude_none=True)
    if recipe.caching:
        found["caching"]["full_steps"] = recipe.caching.full_of(graphs.sampling.steps)
    chosen = found["sampling"] | sampling | {"width": image.width, "height": image.height}
    found["sampling"] = dict(sorted(chosen.items(), key=lambda item: list(SamplingTable.model_fields).index(item[0])))
    found["decode"] |= {"tile": image.tile, "overlap": image.overlap}
    return found


def write(folder: Path, record: dict[str, Any], evidence: Evidence) -> None:
    """Write report.json and report.html into `folder`."""
    originals, runs, profile = evidence.originals, evidence.judged.runs, evidence.graphs.profile
    typed = typed_record(record)
    write_record(folder, typed)
    natural = originals.fp32.shape[2]
    width = picture_width(natural, len(runs))
    held_out, asked = len(originals.bf16), len(originals.prompts)
    captions = [prompt or "no prompt" for prompt in originals.prompts]
    pictures = captions, originals.seeds, originals.fp32, {name: run.images for name, run in runs.items()}
    page = render(
        "report.html",
        {"shown": shown, "figure": figure},
        record=typed,
        gain=DIFFERENCE_GAIN,
        rows=picture_rows(*pictures, range(min(held_out, SHOWN_PICTURES)), width),
        strangers=picture_rows(*pictures, range(held_out, min(asked, held_out + SHOWN_STRANGERS)), width),
        width=width,
        natural=natural,
        metrics=METRICS,
        gates=gate_rows(typed),
        recipe=tomli_w.dumps(typed.recipe),
        profile=profile and figures(open_profile_file(profile)),
        search_plots=search_figures(typed.search) if typed.search else [],
        figure=figure,
        **pass_figures(typed.passes),
    )
    (folder / "report.html").write_text(page, "utf-8")
