"""The README's results are those of the documents that `slipcast bench` wrote, and what is slower is said to be."""

from __future__ import annotations

import json
import re
from typing import Any

from conftest import ROOT

README = (ROOT / "README.md").read_text("utf-8")
KEPT = json.loads((ROOT / "recipes" / "bench" / "shapes-circles.json").read_text("utf-8"))


def row(document: dict[str, Any], name: str) -> str:
    """A line of the README's table."""
    side = document["sides"][name]
    quality, rate = side["quality"], side["images_per_second"].get("4")
    ratio, memory = document["ratios"].get(name), document["memory_ratios"].get(name)
    even = document["break_even"].get(name)
    cells = [
        f"`{name}`" + (f" ({side['images']} images)" if side["images"] < document["settings"]["images"] else ""),
        f"{side['seconds']['median']:.3f}",
        f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else "",
        f"{rate:.2f}" if rate else "not run",
        f"{side['first_image_s']['cold']:.1f}",
        f"{side['peak_memory_mb']:.0f}" + (f" ({memory['median']:.2f})" if memory else ""),
        f"{quality['psnr_mean']['value']:.1f}" if quality["psnr_mean"] else "not run",
        f"{quality['clip_delta_mean']['value']:+.2%}",
        "" if not ratio else "never" if even is None else str(even),
    ]
    return "| " + " | ".join(cells).replace("|  |", "| |") + " |"


def test_the_table_is_the_kept_document() -> None:
    table = re.findall(r"^\| `.*$", README.split("## Benchmark")[1].split("\n## ")[0], re.MULTILINE)
    assert table == [row(KEPT, name) for name in KEPT["sides"]]
    assert KEPT["date"][:10] in README
    assert f"{KEPT['compile_s']:.0f} s" in README


def test_it_is_said_where_a_peer_is_faster() -> None:
    sentence = re.search(r"^Faster than the bundle: (.*?)\. In batches of 4: (.*?)\.", README, re.MULTILINE | re.DOTALL)
    assert sentence
    single = {name for name, ratio in KEPT["ratios"].items() if ratio["median"] < 1}
    batches = {name for name, ratios in KEPT["batch_ratios"].items() if ratios["4"]["median"] < 1}
    assert [set(re.findall(r"`([^`]+)`", part)) for part in sentence.groups()] == [single, batches]


def test_the_document_holds_no_paths_of_a_machine() -> None:
    assert not re.search(r'"/|/home/|/tmp/', json.dumps(KEPT))
    assert KEPT["missing"] == KEPT["failed"] == {}
