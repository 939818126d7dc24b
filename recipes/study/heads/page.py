"""The study's report in Markdown, with its plots: every figure and finding is made from the document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from heads import plots
from heads.answers import Data
from heads.questions import how_many, range_of_use, which_heads, wording


def render(document: Mapping[str, Any]) -> dict[str, str]:
    """File name -> content: NAME.md and NAME-PLOT.svg."""
    data, name = Data(document), document["name"]
    drawn = plots.draw_all(data)

    def show(*wanted: str) -> str:
        return "\n\n".join(f"![{plot}]({name}-{plot}.svg)" for plot in wanted if plot in drawn)

    sections = [
        title(data),
        notes(data),
        how_many(data),
        show("clip", "psnr"),
        which_heads(data),
        show("which"),
        range_of_use(data),
        show("many", "contrast"),
        wording(data),
        method(data),
    ]
    files = {f"{name}-{plot}.svg": svg for plot, svg in drawn.items()}
    return {f"{name}.md": "\n\n".join(filter(None, sections)) + "\n", **files}


def title(data: Data) -> str:
    """What, where, when, and how to read it."""
    d = data.document
    host, sampling, minutes = d["host"], d["sampling"], sum(d["stages_s"].values()) / 60
    model = d["model"]["name"].rsplit("/", 1)[-1]
    return f"""# Study: {d["name"]}

Does a prompt family decide *which* attention heads can go, and does it decide *how many*?
This page is made from [{d["name"]}.json]({d["name"]}.json) by `python recipes/study/heads.py`.

`{d["command"]}`, {d["date"][:10]}, {host["processor"]} with {host["cores"]} cores (load before: {host["load_before"]}),
{minutes:.0f} minutes, without what was cached. Model: {model}, {sum(d["heads"].values())} heads in
{len(d["heads"])} layers; {sampling["sampler"]}, {sampling["steps"]} steps, guidance {sampling["guidance_scale"]}, \
{d["image"]}.

Figures are changes against the unpruned model on the same prompts and noise, over {seeds(data)}, with
intervals of 95 % in brackets. *No effect* means that the interval contains zero. There are many intervals: about one in
twenty excludes zero by chance alone."""


def notes(data: Data) -> str:
    """What was found out about the study after it was made, which whoever keeps it wrote into its document."""
    return "\n".join(f"**Note:** {note}" for note in data.document.get("notes", []))


def seeds(data: Data) -> str:
    """How many."""
    return f"{len(data.seeds)} seed" + "s" * (len(data.seeds) > 1)


def method(data: Data) -> str:
    """Families, prompts, and what the figures cannot say."""
    d = data.document
    recipe, recover = d["recipe"], d["recipe"]["recover"]
    sets = "\n".join(
        f"- `{name}`: {len(prompts)} prompts; the unpruned model's CLIP score is {data.before(name).mean():.3f}"
        for name, prompts in d["sets"].items()
    )
    families = "\n".join(
        f"- **{name}**: "
        + ", ".join(f"`{template}`" for template in family["templates"])
        + "".join(f"; {slot}: {', '.join(v or '(none)' for v in vs)}" for slot, vs in family["slots"].items())
        for name, family in d["families"].items()
    )
    return f"""## How it was done, and what it cannot say

Families:

{families}

Prompts that pictures were judged on; none of them, of whatever set, was in any calibration:

{sets}

A seed is a calibration of its own ({recipe["profile"]["prompts"]} prompts with noise, and states
of them for leave_one_out and taylor), a random mask of its own, and the noise of the pictures. At one ratio every mask
removes the same number of heads; at least {recipe["floor"]} stays in every layer. Intervals are by the bootstrap over
prompts and seeds, resampled each for itself (Owen, 2007): of {seeds(data)} the spread between calibrations is
known roughly, and intervals are rather too narrow for it.

One model and one scorer: other models may answer otherwise. A CLIP score alone hides damage, so PSNR stands beside it.
{f"Recovery is {recover['steps']} steps of distillation on calibration prompts." if recover else ""}"""
