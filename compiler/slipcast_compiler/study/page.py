"""The study's report in Markdown, with its plots: every sentence and figure is made from the document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slipcast_compiler.study import plots
from slipcast_compiler.study.answers import (
    LIMIT,
    Data,
    Interval,
    Mask,
    agreement,
    change,
    contrast,
    distance,
    noise_floor,
    passing,
    tolerance,
    which,
)
from slipcast_compiler.study.cases import OUT, held_out, paraphrases
from slipcast_compiler.study.recipe import GENERIC

REFERENCE = Mask("leave_one_out")


def render(document: Mapping[str, Any]) -> dict[str, str]:
    """File name -> content: NAME.md and NAME-PLOT.svg."""
    data, name = Data(document), document["name"]
    drawn = plots.draw_all(data)
    sections = [
        _title(data), _how_many(data), _plots(name, drawn, "clip", "psnr"), _which(data), _plots(name, drawn, "which"),
        _narrow(data), _plots(name, drawn, "many", "contrast"), _wording(data), _method(data),
    ]  # fmt: skip
    files = {f"{name}-{plot}.svg": svg for plot, svg in drawn.items()}
    return {f"{name}.md": "\n\n".join(filter(None, sections)) + "\n", **files}


def verdict(found: Interval, form: str, better: str, worse: str) -> str:
    """A difference in words; an interval with zero in it is no effect."""
    shown = cell(found, form)
    if found["low"] <= 0 <= found["high"]:
        return f"no effect can be seen ({shown})"
    return f"{better if found['value'] > 0 else worse} ({shown})"


def cell(found: Interval, form: str = "+.1%") -> str:
    """The value with its interval."""
    return f"{format(found['value'], form)} [{format(found['low'], form)}, {format(found['high'], form)}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; all columns but the first are figures."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _title(data: Data) -> str:
    d = data.document
    host, sampling = d["host"], d["sampling"]
    return (
        f"# Study: {d['name']}\n\n"
        "Does a prompt family decide *which* attention heads can go, and does it decide *how many*? Made from "
        f"[{d['name']}.json]({d['name']}.json) by `slipcast study`; nothing here was written by hand.\n\n"
        f"`{d['command']}`, {d['date'][:10]}, {host['processor']} with {host['cores']} cores "
        f"(load before: {host['load_before']}), {sum(d['stages_s'].values()) / 60:.0f} minutes in this run. "
        f"Model: {d['model']['name']}, {sum(d['heads'].values())} heads in {len(d['heads'])} layers; "
        f"{sampling['sampler']}, {sampling['steps']} steps, guidance {sampling['guidance_scale']}, {d['image']}.\n\n"
        f"Figures are changes against the unpruned model on the same prompts and noise, over {len(data.seeds)} seeds, "
        "with intervals of 95 % in brackets. *No effect* means that the interval contains zero. There are many intervals: "
        "about one in twenty excludes zero by chance alone."
    )


def _how_many(data: Data) -> str:
    rows, best = [], []
    for family in data.families:
        own = [mask for mask in data.masks if mask.calibration in (family, GENERIC, None)]
        found = {mask: tolerance(data, mask, held_out(family)) for mask in own if data.has(mask, held_out(family))}
        rows += [[family, mask.title, mask.calibration or "none", *_tolerated(each)] for mask, each in found.items()]
        for kind, after in (("training-free", False), ("after recovery", True)):
            said = [(m, t) for m, t in found.items() if t and m.recovered == after and m.calibration == family]
            if said:
                mask, top = max(said, key=lambda each: (each[1]["ratio"], each[1]["psnr"]["value"]))
                best.append(
                    f"- **{family}**, {kind}: {top['ratio']:.0%} of the heads, by {mask.title} (CLIP "
                    f"{cell(top['change'])}, PSNR {top['psnr']['value']:.1f} dB; sure up to {_share(top['sure'])})."
                )
            elif any(m.recovered == after and m.calibration == family for m in found):
                best.append(f"- **{family}**, {kind}: not one of the ratios.")
    floors = ", ".join(f"{family} {noise_floor(data, held_out(family)):.1%}" for family in data.families)
    recovered = "; ".join(
        f"{mask.title} at {r:.0%} on {family}: CLIP {cell(change(data, mask, r, held_out(family)))}, PSNR "
        f"{distance(data, mask, r, held_out(family))['value']:.1f} dB"
        for family in data.families for mask in data.masks if mask.recovered and mask.calibration == family
        for r in data.ratios(mask)
    )  # fmt: skip
    return "\n\n".join([
        "## H1: how many heads can go",
        f"The largest ratio, with all below it, whose mean CLIP score on held-out prompts drops by at most {LIMIT:.0%}. "
        "The best of the masks that were calibrated on the family, chosen on these very prompts, which flatters it; *sure* "
        "is where the interval's lower end keeps the limit too:",
        "\n".join(best),
        f"With other noise the unpruned model's own mean score moves by up to: {floors}.",
        *([f"All that was recovered: {recovered}."] if recovered else []),
        table(["family", "mask", "calibrated on", "ratio", "sure", "CLIP change there", "PSNR there, dB"], rows),
    ])  # fmt: skip


def _tolerated(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return ["none", "none", "", ""]
    return [f"{found['ratio']:.0%}", _share(found["sure"]), cell(found["change"]), cell(found["psnr"], ".1f")]


def _share(ratio: float | None) -> str:
    return "none" if ratio is None else f"{ratio:.0%}"


def _which(data: Data) -> str:
    kinds = list(dict.fromkeys((a.criterion, a.correct) for f in data.families for a, _ in plots.pairs(data, f)))
    if not kinds:
        return ""
    said, rows, alike = [], [], []
    for criterion, correct in kinds:
        title = Mask(criterion, correct).title
        overall = [
            which(data, data.families, criterion, correct, data.ratios(Mask(criterion, correct, GENERIC)), metric)
            for metric in ("clip", "psnr")
        ]
        said.append(
            f"- **{title}**, all families and ratios: in CLIP score "
            f"{verdict(overall[0], '+.2%', 'the family masks are better', 'the family masks are worse')}; in PSNR "
            f"{verdict(overall[1], '+.2f', 'they are nearer to the unpruned model', 'they are farther from it')}, dB."
        )
        for family in data.families:
            a, b = Mask(criterion, correct, family), Mask(criterion, correct, GENERIC)
            gaps = [which(data, [family], criterion, correct, data.ratios(a), metric) for metric in ("clip", "psnr")]
            rows.append([title, family, cell(gaps[0], "+.2%"), cell(gaps[1], "+.2f")])
            same, other = (
                agreement(data, criterion, correct, family, family),
                agreement(data, criterion, correct, family, GENERIC),
            )
            assert other
            alike.append(
                [
                    title,
                    family,
                    *(
                        f"{other[k]:.3f} ({same[k]:.3f})" if same else f"{other[k]:.3f}"
                        for k in ("spearman", "jaccard")
                    ),
                ]
            )
    return "\n\n".join([
        "## Q1: does the family decide which heads go?",
        "Masks calibrated on the family minus masks calibrated on generic prompts: same criterion, same ratio, same held-out "
        "prompts of the family, same noise. Above zero the family's mask is better.",
        "\n".join(said),
        table(["mask", "family", "CLIP, mean over ratios", "PSNR, dB, mean over ratios"], rows),
        "How alike the two are: rank correlation of the heads' importance, and the share of heads that both remove of those "
        "that either does, at the middle ratio. In parentheses the same between two calibrations on the *same* family with "
        "other prompts and noise: no agreement can be expected to be above it.",
        table(["mask", "family", "rank correlation", "overlap"], alike),
    ])  # fmt: skip


def _narrow(data: Data) -> str:
    judged = [m for m in data.masks if data.has(m, OUT) and not m.recovered and m.calibration]
    if not judged:
        return ""
    inside = []
    for family in data.families:
        for mask in judged:
            if mask.calibration in (family, GENERIC) and data.has(mask, held_out(family)):
                places = (mask, held_out(family)), (mask, OUT)
                each = [cell(contrast(data, *places, [r])) for r in data.ratios(mask)]
                inside.append([f"{mask.title}, {mask.calibration}", family, *each])
    ratios = [f"{r:.0%}" for r in data.ratios(judged[0])]
    said = [
        _in_words(data, mask, family)
        for family in data.families
        for mask in judged
        if mask.calibration in (family, GENERIC)
    ]
    between = [
        [Mask(c, k).title, f"{a} - {b}", *(cell(contrast(data, (Mask(c, k, a), held_out(a)), (Mask(c, k, b), held_out(b)), [r])) for r in data.ratios(Mask(c, k, a)))]
        for c, k in dict.fromkeys((m.criterion, m.correct) for m in judged if m.calibration != GENERIC)
        for i, a in enumerate(data.families) for b in data.families[i + 1:]
    ]  # fmt: skip
    return "\n\n".join([
        "## Q2: does the family decide how many may go?",
        "CLIP change on held-out prompts of the family minus that on prompts out of the family, for the same masks: above "
        "zero, prompts of the family tolerate more. A mask that was calibrated on generic prompts is the control: where it "
        "shows the same, it is the prompts that are easier, not the mask that fits them. Over all ratios:",
        "\n".join(said),
        table(["mask, calibrated on", "family", *ratios], inside),
        *(["One family's held-out prompts against another's, each with its own masks:",
           table(["mask", "families", *ratios], between)] if between else []),
    ])  # fmt: skip


def _in_words(data: Data, mask: Mask, family: str) -> str:
    found = contrast(data, (mask, held_out(family)), (mask, OUT), data.ratios(mask))
    words = verdict(found, "+.2%", "prompts of the family lose less", "prompts of the family lose more")
    return f"- **{family}**, {mask.title} calibrated on {mask.calibration}: {words}."


def _wording(data: Data) -> str:
    rows = []
    for mask in data.masks:
        for family in data.families:
            if mask.calibration == family and data.has(mask, paraphrases(family)):
                found = tolerance(data, mask, held_out(family))
                if not found:
                    rows.append([mask.title, family, "none", "", ""])
                    continue
                each = [passing(data, mask, found["ratio"], [name]) for name in (paraphrases(family), held_out(family))]
                rows.append([mask.title, family, f"{found['ratio']:.0%}", *(
                    f"{p['kept']} of {p['total']}: {cell(p, '.0%')}" for p in each
                )])  # fmt: skip
    if not rows:
        return ""
    return "\n\n".join([
        "## H3: do paraphrases hold?",
        "Share of prompts that lose at most "
        f"{LIMIT:.0%} each (mean over seeds) at the ratio of H1, with Wilson's interval; paraphrases, worded as no "
        "calibration prompt is, beside the held-out prompts in the family's own words.",
        table(["mask", "family", "ratio", "paraphrases that pass", "held-out prompts that pass"], rows),
    ])  # fmt: skip


def _plots(name: str, drawn: Mapping[str, str], *wanted: str) -> str:
    return "\n\n".join(f"![{plot}]({name}-{plot}.svg)" for plot in wanted if plot in drawn)


def _method(data: Data) -> str:
    d = data.document
    recipe = d["recipe"]
    sizes = ", ".join(f"{name} {len(prompts)}" for name, prompts in d["sets"].items())
    families = "\n".join(
        f"- **{name}**: " + "; ".join(f"`{t}`" for t in family["templates"])
        + "".join(f"; {slot}: {', '.join(v or '(none)' for v in values)}" for slot, values in family["slots"].items())
        for name, family in d["families"].items()
    )  # fmt: skip
    return "\n\n".join([
        "## How it was done, and what it cannot say",
        f"Families:\n\n{families}",
        f"Prompts judged: {sizes}. None of them, of whatever set, was in any calibration. A seed is a calibration of its own "
        f"({recipe['profile']['prompts']} prompts and noise, {recipe['profile']['states']} states for leave_one_out and "
        "taylor), a random mask of its own, and the noise of the pictures. At one ratio every mask removes the same number of "
        f"heads, and leaves {recipe['floor']} in every layer. Intervals: bootstrap over prompts and seeds, resampled "
        "each for itself (Owen, 2007).",
        "One small model, one scorer of the same vocabulary, few seeds: with so few, the spread between calibrations is "
        "known roughly, and intervals are rather too narrow for it. CLIP alone hides damage, so PSNR stands beside it. "
        "Prompts out of the family hold two things each and are harder for this model even unpruned.",
    ])  # fmt: skip
