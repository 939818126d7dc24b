"""What it takes to exchange adapters of a bundle with slots, and what pictures cost with them and without.

    python recipes/bench/adapters.py BUNDLE [--target openvino] [--rank 8] [-o DOCUMENT]

Two LoRAs with random factors, for all layers that have a slot, are written, read and set in turn. Pictures with one and
without any are drawn in turns; the first after a change from none to one, for which engines are opened and compiled, is
counted by itself. `ratio` is the median over rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import slipcast
from slipcast.run.program import ProgramPipeline
from slipcast_compiler.host.machine import this_machine

ROUNDS = 5


def write_lora(pipe: ProgramPipeline, rank: int, seed: int, file: Path) -> None:
    """Random factors, small enough for pictures to stay pictures."""
    manifest, rng = pipe.manifest, np.random.default_rng(seed)
    assert manifest.adapters
    tensors = {}
    for at, layer in enumerate(manifest.adapters.layers):
        inputs, outputs = manifest.slots[f"down_{at}"][0], manifest.slots[f"up_{at}"][1]
        tensors[f"{layer}.lora_A.weight"] = rng.standard_normal((rank, inputs), np.float32) / inputs**0.5
        tensors[f"{layer}.lora_B.weight"] = rng.standard_normal((outputs, rank), np.float32) * np.float32(0.02)
    save_file(tensors, file)


def timed(function: Any, *arguments: Any, **options: Any) -> float:
    """Seconds."""
    begin = time.perf_counter()
    function(*arguments, **options)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--target", default="auto")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    with slipcast.load(given.bundle, target=given.target) as pipe, TemporaryDirectory() as folder:
        if not isinstance(pipe, ProgramPipeline) or not pipe.manifest.adapters:
            raise SystemExit(f"{given.bundle} was not compiled with [adapters]")
        prompt = {"prompt": "a small red circle"} if pipe.manifest.takes_prompt else {}
        reading = []
        for seed, name in enumerate(("one", "two")):
            write_lora(pipe, given.rank, seed, Path(folder) / f"{name}.safetensors")
            reading.append(timed(pipe.load_adapter, name, Path(folder) / f"{name}.safetensors"))
        exchanges: list[float] = []
        pictures: dict[str, list[float]] = {"plain": [], "adapted": []}
        firsts: list[float] = []
        for turn in range(ROUNDS):
            for kind, scales in (("adapted", {("one", "two")[turn % 2]: 1.0}), ("plain", {})):
                exchanges.append(timed(pipe.set_adapters, scales))
                first = timed(pipe, **prompt, seed=turn, output_type="np")
                firsts += [first] * (kind == "adapted")
                # What was freed is opened again: the second picture of a kind is what the next ones take.
                pictures[kind].append(timed(pipe, **prompt, seed=turn, output_type="np"))
                print(f"{kind}: exchange {exchanges[-1]:.4f} s, first {first:.3f} s, then {pictures[kind][-1]:.3f} s")
        within = [timed(pipe.set_adapters, {name: 1.0}) for name in ("one", "two") * ROUNDS]
        found = {
            "slots": len(pipe.manifest.adapters.layers), "slot_rank": pipe.manifest.adapters.rank, "rank": given.rank,
            "read_s": round(statistics.median(reading), 4), "exchange_s": round(statistics.median(within), 4),
            **{f"{kind}_s": round(statistics.median(each), 4) for kind, each in pictures.items()},
            "first_s": round(statistics.median(firsts), 4),
            "ratio": round(statistics.median(map(lambda a, b: a / b, pictures["adapted"], pictures["plain"])), 3),
        }  # fmt: skip
        print(json.dumps(found, indent=1))
        if given.output:
            command = " ".join(sys.argv[1:])
            document = {
                "command": f"python recipes/bench/adapters.py {command}",
                "target": pipe.target,
                "machine": this_machine().model_dump(),
                **found,
            }
            given.output.write_text(json.dumps(document, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
