"""Capture the tests' tiny pipelines, roll their loops, replay each on another prompt, seed and picture, and make a
bundle of each, which is compared with the pipeline on those.

    python recipes/bench/pipelines.py [NAMES] -o recipes/bench/captures/tiny.json

Each runs in a process of its own. A pipeline whose program is of one prompt length is replayed on a prompt of that
length, and the table says what comes of another length; where it is of any length, the table says of how many tokens.
Kolors needs sentencepiece installed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from slipcast.errors import SlipcastError
from slipcast.progress import Advance
from slipcast_compiler.host.isolate import run_isolated
from slipcast_compiler.host.machine import this_machine

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "capture"))
from bundling import compare_bundle
from tiny import PIPELINES, call_of, open_pipeline

ONE, SAME_LENGTH, OTHER = (
    "a small red circle on white",
    "the large blue star on black",
    "a large blue star on a black background",
)
SHORTER = "red"
COLUMNS = ("pipeline", "loop", "guidance", "replay's error", "other lengths", "a run chooses", "bundle", "other steps")


def examine(name: str, _: Advance) -> dict[str, Any]:
    """Runs in a process of its own: a row of the table."""
    from slipcast_compiler.capture.find import find_for
    from slipcast_compiler.capture.record import capture
    from slipcast_compiler.capture.roll import roll
    from slipcast_compiler.capture.verify import verify
    from slipcast_compiler.host.quiet import quiet

    with quiet():
        pipe = open_pipeline(name)
        try:
            (found,) = find_for(pipe, [lambda prompt: call_of(name, prompt, 1)])
            program, chosen, why_not = found.program, found.loop.free if found.loop else (), found.why_not
        except SlipcastError:  # of which the bundle says more
            program, chosen, why_not = capture(pipe, call_of(name, ONE, 1)), (), ""
        loop = roll(program)
        other = verify(program, pipe, call_of(name, OTHER, 7), call_of(name, OTHER, 7))
        same = other
        if not other.holds:
            same = verify(program, pipe, call_of(name, SAME_LENGTH, 7), call_of(name, SAME_LENGTH, 7))
        try:
            bundle: Any = compare_bundle(pipe, name, (OTHER, SHORTER) if program.lengths else (OTHER,), 7)
        except SlipcastError as error:
            bundle = " ".join(f"refused: {error.message}: {error.got or ''}".split())
    phases = loop.phases if loop else ()
    return {
        "class": type(pipe).__name__,
        "loop": [{"steps": len(phase.steps), "events": len(phase.steps[0].events)} for phase in phases],
        "carried": loop and loop.carried,
        "guidance": [phase.guidance or f"none: {phase.ending}" for phase in phases],
        "error": same.error,
        "difference": same.difference,
        "other_length": None if other.holds else other.difference,
        "lengths": {length.name: [length.minimum, length.maximum] for length in program.lengths},
        "chosen": list(chosen),
        "why_not": why_not,
        "bundle": bundle,
        "guards": sorted({f"{guard.operator} at {guard.where}" for guard in program.guards}),
    }


def row(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    """What the table says of a pipeline."""
    if "refused" in found:
        return name, "refused", "", "", found["refused"], "", "", ""
    loop = " + ".join(f"{phase['steps']} x {phase['events']}" for phase in found["loop"]) or "none"
    loop += "" if found["carried"] else ", and more between steps"
    error = "not comparable" if found["error"] is None else f"{found['error']:.2g}"
    ranges = ", ".join(f"{least} to {most}" for least, most in found["lengths"].values()) or "the same"
    guidance, lengths = ", ".join(dict.fromkeys(found["guidance"])), found["other_length"] or ranges
    bundle, chosen = found["bundle"], ", ".join(found["chosen"]) or found["why_not"]
    decibels = (
        [bundle, ""] if isinstance(bundle, str) else [_decibels(bundle.get(key)) for key in ("psnr", "psnr_steps")]
    )
    return name, loop, guidance, error, lengths, chosen, *decibels


def _decibels(number: float | None) -> str:
    return "" if number is None else f"{number:.0f} dB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(PIPELINES))
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    found: dict[str, Any] = {}
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name in given.names:
        try:
            found[name] = run_isolated(examine, name).result
        except SlipcastError as error:
            found[name] = {"refused": " ".join(f"{error.message} {error.got or ''}".split())}
        print(f"| {' | '.join(row(name, found[name]))} |", flush=True)
    if given.output:
        machine = this_machine().model_dump()
        document = {"command": f"python recipes/bench/pipelines.py -o {given.output}", "machine": machine}
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(document | {"pipelines": found}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
