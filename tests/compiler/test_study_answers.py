"""Statistics and plots of synthetic studies whose answers are known."""

from __future__ import annotations

import itertools
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "recipes" / "study"))
from heads import plots
from heads.answers import (
    LIMIT,
    Data,
    Mask,
    agreement,
    change,
    contrast,
    interval,
    noise_floor,
    passing,
    tolerance,
    which,
    wilson,
)
from heads.cases import OUT, held_out, paraphrases
from heads.page import render
from heads.questions import verdict
from heads.recipe import GENERIC

SEEDS, RATIOS, FAMILIES = (1, 2, 3), (0.1, 0.2, 0.3, 0.4), ("narrow", "wide")
HEADS, PROMPTS = 40, 12
Drop = Callable[[str | None, str, float], float]


def make(drop: Drop, noise: float = 0.0, same_masks: bool = True) -> dict[str, Any]:
    """A document in which a mask (by calibration) costs drop(calibration, set, ratio) of the score, give or take."""
    random = np.random.default_rng(5)
    sets = [*map(held_out, FAMILIES), *map(paraphrases, FAMILIES), OUT]
    before = {name: {str(s): random.uniform(0.8, 0.95, PROMPTS).tolist() for s in SEEDS} for name in sets}
    order = {of: {s: random.permutation(HEADS) for s in SEEDS} for of in (*FAMILIES, GENERIC)}
    records = []
    for of in (*FAMILIES, GENERIC, None):
        judged = [held_out(of), paraphrases(of), OUT] if of in FAMILIES else [*map(held_out, FAMILIES), OUT]
        for ratio in RATIOS:
            for seed in SEEDS:
                gone = set((np.arange(HEADS) if same_masks or of is None else order[of][seed])[: round(ratio * HEADS)])
                bits = "".join("01"[head in gone] for head in range(HEADS))
                after = {
                    name: np.array(before[name][str(seed)]) * (1 - drop(of, name, ratio))
                    + random.normal(0, noise, PROMPTS) for name in judged
                }  # fmt: skip
                records.append({
                    "criterion": "leave_one_out" if of else "magnitude", "correct": False, "calibration": of,
                    "ratio": ratio, "seed": seed, "recovered": False, "removed": f"{int(bits, 2):010x}",
                    "sets": {n: {"clip": a.tolist(), "psnr": [50 - 40 * ratio] * PROMPTS} for n, a in after.items()},
                })  # fmt: skip
    ranks = {of: {str(s): np.argsort(order[of][s]).tolist() for s in SEEDS} for of in order}
    return {
        "name": "made", "command": "python heads.py made.toml", "date": "2026-01-01", "stages_s": {"cases": 60.0},
        "host": {"processor": "none", "cores": 2, "load_before": 0.0}, "heads": {"a": 20, "b": 20},
        "model": {"name": "models/m"}, "sampling": {"sampler": "ddim", "steps": 2, "guidance_scale": 3.0},
        "image": "16x16", "records": records, "originals": before, "sets": {name: ["p"] * PROMPTS for name in sets},
        "ranks": {"leave_one_out": ranks}, "families": {f: {"templates": ["t"], "slots": {}} for f in FAMILIES},
        "recipe": {"seeds": list(SEEDS), "profile": {"prompts": 4}, "floor": 1, "recover": None},
    }  # fmt: skip


def known(calibration: str | None, name: str, ratio: float) -> float:
    """Narrow bears twice as much as wide, and both more than what is outside; generic masks cost 0.4 % more."""
    slope = {held_out("narrow"): 0.045, held_out("wide"): 0.09, OUT: 0.2}.get(name, 0.05)
    return slope * ratio + (0.004 if calibration == GENERIC else 0.0)


@pytest.fixture(scope="module")
def data() -> Data:
    return Data(make(known))


def test_the_largest_ratio_within_the_limit(data: Data) -> None:
    narrow = tolerance(data, Mask("leave_one_out", calibration="narrow"), held_out("narrow"))
    wide = tolerance(data, Mask("leave_one_out", calibration="wide"), held_out("wide"))
    assert narrow
    assert wide
    assert (narrow["ratio"], narrow["sure"], wide["ratio"]) == (0.4, 0.4, 0.2)
    assert wide["change"]["value"] == pytest.approx(-0.018)
    assert wide["psnr"]["value"] == pytest.approx(42)


def test_a_ratio_above_one_that_fails_does_not_count() -> None:
    fails = Data(make(lambda of, name, ratio: 0.05 if ratio == 0.2 else 0.0))
    mask = Mask("leave_one_out", calibration="narrow")
    found = tolerance(fails, mask, held_out("narrow"))
    assert found
    assert found["ratio"] == 0.1
    assert tolerance(Data(make(lambda of, name, ratio: 0.03)), mask, held_out("narrow")) is None


def test_sure_is_what_the_lower_end_keeps() -> None:
    noisy = Data(make(lambda of, name, ratio: 0.0 if ratio < 0.25 else 0.017, noise=0.012))
    found = tolerance(noisy, Mask("leave_one_out", calibration="wide"), held_out("wide"))
    assert found
    assert found["ratio"] >= 0.3
    assert found["sure"] == 0.2


def test_the_familys_own_mask_against_the_generic_one(data: Data) -> None:
    found = which(data, FAMILIES, "leave_one_out", False, RATIOS, "clip")
    assert found["value"] == pytest.approx(0.004)
    assert found["low"] == pytest.approx(0.004, abs=1e-4)
    assert verdict(found, "+.2%", "better", "worse").startswith("better (+0.40%")
    assert which(data, ["wide"], "leave_one_out", False, RATIOS, "psnr")["value"] == 0


def test_no_effect_is_called_so() -> None:
    noise = Data(make(lambda of, name, ratio: 0.1 * ratio, noise=0.02))
    found = which(noise, FAMILIES, "leave_one_out", False, RATIOS, "clip")
    assert found["low"] < 0 < found["high"]
    assert verdict(found, "+.2%", "better", "worse").startswith("no effect (")
    assert "- **leave_one_out**: in CLIP score no effect (" in render(noise.document)["made.md"]


def test_in_the_family_against_outside(data: Data) -> None:
    mask = Mask("leave_one_out", calibration="narrow")
    found = contrast(data, (mask, held_out("narrow")), (mask, OUT), [0.4])
    assert found["value"] == pytest.approx(0.155 * 0.4)
    between = contrast(
        data, (mask, held_out("narrow")), (Mask("leave_one_out", calibration="wide"), held_out("wide")), RATIOS
    )
    assert between["value"] == pytest.approx(0.045 * np.mean(RATIOS))
    assert verdict(contrast(data, (mask, OUT), (mask, held_out("narrow")), [0.4]), ".1%", "a", "b").startswith(
        "b (-6.2%"
    )


def test_agreement_of_masks(data: Data) -> None:
    other = agreement(data, "leave_one_out", False, "narrow", GENERIC)
    assert other
    assert other["jaccard"] == 1  # all remove the same heads in this document
    assert abs(other["spearman"]) < 0.4  # though their ranks are drawn by chance
    apart = Data(make(known, same_masks=False))
    same, other = (agreement(apart, "leave_one_out", False, "narrow", of) for of in ("narrow", GENERIC))
    assert same
    assert other
    assert other["jaccard"] < 0.6
    for of in apart.document["ranks"]["leave_one_out"].values():
        of |= {str(seed): list(range(HEADS)) for seed in SEEDS}
    same = agreement(apart, "leave_one_out", False, "narrow", "narrow")
    assert same
    assert same["spearman"] == pytest.approx(1)


def test_removed_heads_are_numbered_from_the_first(data: Data) -> None:
    assert data.removed(Mask("magnitude"), 0.1, 1) == {0, 1, 2, 3}


def test_paraphrases_are_counted_one_by_one() -> None:
    document = make(lambda of, name, ratio: 0.0)
    for record in document["records"]:
        if record["calibration"] == "narrow":
            scores = record["sets"][paraphrases("narrow")]["clip"]
            for i, factor in enumerate((0.97, 0.99, 0.95)):
                scores[i] *= factor
    found = passing(Data(document), Mask("leave_one_out", calibration="narrow"), 0.4, paraphrases("narrow"))
    assert (found["kept"], found["total"]) == (PROMPTS - 2, PROMPTS)


def test_wilson() -> None:
    """As statsmodels' proportion_confint has them."""
    for (kept, total), (low, high) in {(12, 12): (0.7575, 1), (7, 10): (0.3968, 0.8922), (0, 5): (0, 0.4345)}.items():
        found = wilson(kept, total)
        assert (found["low"], found["high"]) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
        assert found["value"] == kept / total


def test_intervals_cover_what_they_should() -> None:
    """Of means with effects of seeds and of prompts; resampling pictures alone would cover about half."""
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        sample = random.normal(0, 1, (10, 1)) + random.normal(0, 1, (1, 12)) + random.normal(0, 1, (10, 12))
        found = interval(lambda groups: np.asarray(groups[0][0]), [[sample]])
        assert found["value"] == pytest.approx(sample.mean())
        hits += found["low"] <= 0 <= found["high"]
    assert 0.86 < hits / 200 <= 1


def test_what_is_paired_stays_paired() -> None:
    random = np.random.default_rng(0)
    one = random.normal(0, 5, (3, 8))
    found = interval(lambda g: np.asarray(g[0][0] - g[0][1]), [[one + 1, one]])
    assert found["low"] == pytest.approx(1)
    assert found["high"] == pytest.approx(1)
    apart = interval(lambda g: np.asarray(g[0][0] - g[1][0]), [[one + 1], [one]])
    assert apart["high"] - apart["low"] > 1


def test_noise_floor(data: Data) -> None:
    means = data.before(OUT).mean(1)
    assert noise_floor(data, OUT) == pytest.approx(max(abs(means / means.mean() - 1)))
    data.document["recipe"]["seeds"] = [1]
    assert noise_floor(Data(data.document), OUT) is None
    data.document["recipe"]["seeds"] = list(SEEDS)


def test_the_report_says_what_the_statistics_do(data: Data) -> None:
    files = render(data.document)
    page = files["made.md"]
    drop = change(data, Mask("leave_one_out", calibration="wide"), 0.2, held_out("wide"))
    assert f"- **wide**: 20% of the heads, by leave_one_out (CLIP {drop['value']:+.1%}" in page
    assert f"drops by at most\n{LIMIT:.0%}" in page
    for name in files:
        assert name == "made.md" or f"({name})" in page
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert all(line.count("|") == before.count("|") for before, line in itertools.pairwise(tables)
               if "---" in line)  # fmt: skip
    assert "Note" not in page
    assert "**Note:** it rained" in render({**data.document, "notes": ["it rained"]})["made.md"]


def test_plots_are_drawings_inside_their_frames(data: Data) -> None:
    drawn = plots.draw_all(data)
    assert set(drawn) == {"clip", "psnr", "which", "many", "contrast"}
    for svg in drawn.values():
        root = ElementTree.fromstring(svg)
        width, height = float(root.get("width", "0")), float(root.get("height", "0"))
        points = [node for node in root.iter() if node.tag.endswith("circle")]
        assert len(points) >= len(FAMILIES) * len(RATIOS)
        for point in points:
            assert 0 < float(point.get("cx", "-1")) < width
            assert 0 < float(point.get("cy", "-1")) < height
        assert {family for node in root.iter() if (family := node.text) in FAMILIES} == set(FAMILIES)
