"""[caching] of a captured program: its denoiser in two, and the mask of steps, chosen as of any bundle."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from slipcast.bundle.manifest import SHALLOW
from slipcast.bundle.program_manifest import ProgramManifest
from slipcast.bundle.reader import open_any_bundle
from slipcast.progress import Advance
from slipcast.run.load import load
from slipcast_compiler.engines.programs import DENOISER, ProgramGraphs, Split, write_portable
from slipcast_compiler.engines.recording import Recording, digest_given
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.isolate import run_isolated
from slipcast_compiler.model.original import Images
from slipcast_compiler.recipe.sampling import CachingTable
from slipcast_compiler.schedule.caching import CUT, MEASURED, choose, export_split, longest_of
from slipcast_compiler.schedule.early_exit import replay_program
from slipcast_compiler.schedule.held import makers, predictions
from slipcast_compiler.schedule.reuse import errors_of, listed, rms


def cache_program_features(
    graphs: ProgramGraphs, images: Images, given: Mapping[str, Any], table: CachingTable, cache: Cache,
    advance: Advance,
) -> tuple[ProgramGraphs, dict[str, Any]]:  # fmt: skip
    """With a full and a shallow denoiser in place of the one, as [caching] asks, and a report of the cut and the mask.

    `images`: of calibration prompts; `given`: what calls take besides a text.
    """
    loop = graphs.record.loop
    assert loop
    whole = next(call for call in loop.calls if call.component == DENOISER)
    latent = next(name for name, value in whole.inputs.items() if value == loop.sample)
    folder = export_split(graphs.entry, table.share, cache, latent)
    cut, steps = json.loads((folder / CUT).read_text()), loop.sampling.steps
    full = table.full_of(steps)
    everything = replace(graphs, split=Split(folder, cut["feature"], cut["share"], (True,) * steps))

    def make(out: Path) -> None:
        with tempfile.TemporaryDirectory(prefix=".caching-", dir=out.parent) as name:
            target = write_portable(everything, Path(name), cache)
            arguments = Path(name), target.id, images, dict(given), longest_of(steps, full)
            found = run_isolated(measure_program_reuse, *arguments, advance=advance).result
        (out / MEASURED).write_text(json.dumps(found))

    asked = {"images": images, "given": digest_given(given), "longest": longest_of(steps, full)}
    entry = cache.get("reuse", everything.identity | asked, make)
    mask, error = choose(json.loads((entry / MEASURED).read_text()), full)
    report = {**cut, "mask": list(mask), "full_steps": full, "error": error, "images": len(images)}
    assert everything.split
    return replace(graphs, split=replace(everything.split, mask=mask)), report


def measure_program_reuse(
    root: Path, target: str, images: Images, given: Mapping[str, Any], longest: int, advance: Advance
) -> list[list[float | None]]:
    """As reuse.measure_reuse, of a captured program's bundle. Runs in a process of its own."""
    manifest = open_any_bundle(root).manifest
    assert isinstance(manifest, ProgramManifest)
    program = manifest.program
    assert program.loop
    assert program.loop.shallow
    call, found = program.loop.shallow.call, []
    (output,) = call.outputs
    features = {name for name, value in call.inputs.items() if value not in _known(manifest)}
    recording = Recording({*makers(program), DENOISER} - {SHALLOW})
    with load(root, target=target, instrument=recording) as pipe, pipe.residency.use(SHALLOW) as shallow:
        names = [spec.name for spec in shallow.inputs]

        def again(i: int, j: int) -> Any:
            before, now = (recording.evaluations(DENOISER)[place] for place in (i, j))
            return shallow({name: (before if name in features else now)[name] for name in names})[output]

        for place, (prompt, seed) in enumerate(images):
            advance(place, len(images))
            recording.calls.clear()
            pipe(prompt, seed=seed, output_type="np", **given)
            exact: Any = predictions(program, recording)
            errors = errors_of(program.loop.sampling, exact, again, longest)
            found.append(errors / rms(replay_program(program, seed, recording)[1]))
    return listed(np.mean(found, axis=0))


def _known(manifest: ProgramManifest) -> set[str]:
    """The values that the whole denoiser reads too."""
    assert manifest.program.loop
    return {value for call in manifest.program.loop.calls for value in call.inputs.values()}
