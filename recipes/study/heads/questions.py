"""The report's answers in words and tables, question by question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from heads import plots
from heads.answers import (
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
from heads.cases import OUT, held_out, paraphrases
from heads.recipe import GENERIC

Tolerance = dict[str, Any]


def how_many(data: Data) -> str:
    """H1: the largest ratio within the limit, training-free and after recovery."""
    rows, best = [], []
    for family in data.families:
        own = [mask for mask in data.masks if mask.calibration in (family, GENERIC, None)]
        found = {mask: tolerance(data, mask, held_out(family)) for mask in own if not mask.recovered}
        rows += [[family, mask.title, mask.calibration or "none", *_cells(each)] for mask, each in found.items()]
        best.append(_best(family, {mask: each for mask, each in found.items() if each and mask.calibration == family}))
    floors = ", ".join(f"{family} {_floor(data, family)}" for family in data.families)
    head = ["family", "mask", "calibrated on", "ratio", "sure", "CLIP change there", "PSNR there, dB"]
    return f"""## H1: how many heads can go?

The largest ratio of those tried, with all below it, at which the mean CLIP score on held-out prompts drops by at most
{LIMIT:.0%}. Of the masks that were calibrated on the family the best one, chosen on these very prompts, which flatters
it; *sure* is as far as the interval's lower end keeps the limit too. Training-free:

{chr(10).join(best)}

The unpruned model's own mean score is from seed to seed off its mean by up to: {floors}.

{table(head, rows)}{_recovered(data)}"""


def _best(family: str, found: dict[Mask, Tolerance]) -> str:
    if not found:
        return f"- **{family}**: none of the ratios."
    mask, top = max(found.items(), key=lambda each: (each[1]["ratio"], each[1]["psnr"]["value"]))
    return (
        f"- **{family}**: {top['ratio']:.0%} of the heads, by {mask.title} (CLIP {cell(top['change'])}, PSNR "
        f"{top['psnr']['value']:.1f} dB; sure: {_share(top['sure'])})."
    )


def _floor(data: Data, family: str) -> str:
    found = noise_floor(data, held_out(family))
    return "not known" if found is None else f"{found:.1%}"


def _recovered(data: Data) -> str:
    rows, most = [], []
    for family in data.families:
        for mask in (mask for mask in data.masks if mask.recovered and mask.calibration == family):
            top = tolerance(data, mask, held_out(family))
            most.append(f"{family} {top['ratio']:.0%} (sure: {_share(top['sure'])})" if top else f"{family} none")
            for ratio in data.ratios(mask):
                scores, name = change(data, mask, ratio, held_out(family)), held_out(family)
                kept = ["no", "yes", "sure"][(scores["value"] >= -LIMIT) + (scores["low"] >= -LIMIT)]
                psnr = cell(distance(data, mask, ratio, name), ".1f")
                rows.append([family, f"{ratio:.0%}", kept, cell(scores), psnr, *_unrecovered(data, mask, ratio, name)])
    if not rows:
        return ""
    head = [
        "family",
        "ratio",
        f"within {LIMIT:.0%}",
        "CLIP change",
        "PSNR, dB",
        "CLIP change before",
        "PSNR before, dB",
    ]
    said = f"""

After recovery, of the family's leave_one_out masks with correction, the largest of the ratios that were tried with it:
{", ".join(most)}.

{table(head, rows)}"""
    if all(row[3:5] == row[5:7] for row in rows):
        said += "\n\nRecovery changed nothing: no step was better, on its validation prompts, than no step."
    return said


def _unrecovered(data: Data, mask: Mask, ratio: float, name: str) -> list[str]:
    before = Mask(mask.criterion, mask.correct, mask.calibration)
    if ratio not in data.ratios(before):
        return ["not run", "not run"]
    return [cell(change(data, before, ratio, name)), cell(distance(data, before, ratio, name), ".1f")]


def which_heads(data: Data) -> str:
    """Q1: the family's masks against generic ones; "" where there are none to compare."""
    kinds = list(dict.fromkeys((a.criterion, a.correct) for f in data.families for a, _ in plots.pairs(data, f)))
    said, rows, alike = [], [], []
    for criterion, correct in kinds:
        name, ratios = Mask(criterion, correct).title, data.ratios(Mask(criterion, correct, GENERIC))
        scores, distances = (which(data, data.families, criterion, correct, ratios, m) for m in ("clip", "psnr"))
        said.append(
            f"- **{name}**: in CLIP score {verdict(scores, '+.2%', 'the family masks are better', 'they are worse')}; "
            f"in PSNR, dB, {verdict(distances, '+.2f', 'they are nearer to the unpruned model', 'they are farther')}."
        )
        for family in data.families:
            scores, distances = (which(data, [family], criterion, correct, ratios, m) for m in ("clip", "psnr"))
            rows.append([name, family, cell(scores, "+.2%"), cell(distances, "+.2f")])
            alike.append([name, family, *_alike(data, criterion, correct, family)])
    if not kinds:
        return ""
    return f"""## Q1: does the family decide which heads go?

Masks calibrated on the family minus masks calibrated on generic prompts: same criterion, same ratio, same held-out
prompts of the family, same noise. Above zero the family's mask is better. Over all families and ratios:

{chr(10).join(said)}

{table(["mask", "family", "CLIP, mean over ratios", "PSNR, dB, mean over ratios"], rows)}

How alike the two are: rank correlation of the heads' importance, and at the middle ratio the share of heads that both
remove of those that either does. In parentheses the same between two calibrations on the *same* family with other
prompts and noise, above which no agreement can be expected.

{table(["mask", "family", "rank correlation", "overlap"], alike)}"""


def _alike(data: Data, criterion: str, correct: bool, family: str) -> list[str]:
    other = agreement(data, criterion, correct, family, GENERIC)
    same = agreement(data, criterion, correct, family, family)
    assert other
    return [f"{other[key]:.3f}" + (f" ({same[key]:.3f})" if same else "") for key in ("spearman", "jaccard")]


def range_of_use(data: Data) -> str:
    """Q2: prompts of the family against others, and families against each other."""
    judged = [mask for mask in data.masks if data.has(mask, OUT) and not mask.recovered]
    if not judged:
        return ""
    ratios = data.ratios(judged[0])
    said, inside = [], []
    for family in data.families:
        for mask in (mask for mask in judged if mask.calibration in (family, GENERIC)):
            places = (mask, held_out(family)), (mask, OUT)
            overall = contrast(data, *places, ratios)
            words = verdict(overall, "+.2%", "prompts of the family lose less", "prompts of the family lose more")
            said.append(f"- **{family}**, {mask.title} calibrated on {mask.calibration}: {words}.")
            cells = [cell(contrast(data, *places, [ratio])) for ratio in ratios]
            inside.append([f"{mask.title}, {mask.calibration}", family, *cells])
    shown = [f"{ratio:.0%}" for ratio in ratios]
    return f"""## Q2: does the family decide how many may go?

CLIP change on held-out prompts of the family minus that on prompts out of the family, for the same masks: above zero,
prompts of the family tolerate more. A mask that was calibrated on generic prompts is the control: where it shows the
same, it is the prompts that bear more, not the mask that fits them. Over all ratios:

{chr(10).join(said)}

{table(["mask, calibrated on", "family", *shown], inside)}{_between(data, judged, ratios)}"""


def _between(data: Data, judged: Sequence[Mask], ratios: Sequence[float]) -> str:
    kinds = dict.fromkeys((m.criterion, m.correct) for m in judged if m.calibration in data.families)
    rows = []
    for kind in kinds:
        for i, a in enumerate(data.families):
            for b in data.families[i + 1 :]:
                places = (Mask(*kind, a), held_out(a)), (Mask(*kind, b), held_out(b))
                cells = [cell(contrast(data, *places, [ratio])) for ratio in ratios]
                rows.append([Mask(*kind).title, f"{a} - {b}", *cells])
    if not rows:
        return ""
    head = ["mask", "families", *(f"{ratio:.0%}" for ratio in ratios)]
    return f"\n\nHeld-out prompts of one family minus those of another, each with its own masks:\n\n{table(head, rows)}"


def wording(data: Data) -> str:
    """H3: paraphrases at the ratio of H1; "" where none were judged."""
    rows = []
    for mask in data.masks:
        for family in data.families:
            if mask.calibration != family or not data.has(mask, paraphrases(family)):
                continue
            if not (found := tolerance(data, mask, held_out(family))):
                rows.append([mask.title, family, "none", "", ""])
                continue
            shares = [passing(data, mask, found["ratio"], name) for name in (paraphrases(family), held_out(family))]
            cells = [f"{each['kept']} of {each['total']}: {cell(each, '.0%')}" for each in shares]
            rows.append([mask.title, family, f"{found['ratio']:.0%}", *cells])
    if not rows:
        return ""
    head = ["mask", "family", "ratio", "paraphrases that pass", "held-out prompts that pass"]
    return f"""## H3: do paraphrases hold?

How many prompts lose at most {LIMIT:.0%} each, mean over seeds, at the ratio of H1, with Wilson's interval: scenes of
the family in words that its templates do not have, beside held-out prompts in the family's own words.

{table(head, rows)}"""


def verdict(found: Interval, form: str, above: str, below: str) -> str:
    """A difference in words; an interval with zero in it is no effect."""
    if found["low"] <= 0 <= found["high"]:
        return f"no effect ({cell(found, form)})"
    return f"{above if found['value'] > 0 else below} ({cell(found, form)})"


def cell(found: Interval, form: str = "+.1%") -> str:
    """The value with its interval."""
    return f"{format(found['value'], form)} [{format(found['low'], form)}, {format(found['high'], form)}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(found: Tolerance | None) -> list[str]:
    if found is None:
        return ["none", "none", "", ""]
    return [f"{found['ratio']:.0%}", _share(found["sure"]), cell(found["change"]), cell(found["psnr"], ".1f")]


def _share(ratio: float | None) -> str:
    return "none" if ratio is None else f"{ratio:.0%}"
