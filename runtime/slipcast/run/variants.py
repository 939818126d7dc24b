"""The variants of a captured program, each with what its runs need: made when a bundle is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from slipcast.bundle.program import ProgramCall, Variant
from slipcast.bundle.program_manifest import NO_COLUMNS, tabled
from slipcast.bundle.reader import ProgramBundle
from slipcast.bundle.sources import PromptSource
from slipcast.bundle.tensorfile import DTYPES, read_header, read_tensor
from slipcast.engines import Array
from slipcast.errors import ArtifactError
from slipcast.run.texts import ProgramTexts
from slipcast.run.tokenizer import read_tokenizer
from slipcast.run.values import dependence, droppable


@dataclass(frozen=True)
class Ready:
    """A variant. `rows`: by call, the inputs that its row of the table gives, and `loop_rows` by call of its loop,
    `unguided_rows` by call without guidance;
    `depends`, `droppable`: see values.py; `last_call`: of each component, the place among the calls."""

    variant: Variant
    texts: ProgramTexts
    rows: list[dict[str, Array]]
    loop_rows: list[dict[str, Array]]
    unguided_rows: list[dict[str, Array]]
    depends: dict[str, frozenset[str]]
    droppable: list[tuple[str, ...]]
    last_call: dict[str, int]


def read_variants(bundle: ProgramBundle) -> tuple[Ready, ...]:
    """All of a bundle, as Program.every has them; ArtifactError where table or tokenizers are not the manifest's."""
    program = bundle.manifest.program
    columns = _read_table(bundle) if program.table else {}
    sources = (source for variant in program.every for source in variant.sources)
    files = dict.fromkeys(source.tokenizer for source in sources if isinstance(source, PromptSource))
    tokenizers = {name: read_tokenizer(bundle.file(name)) for name in files}
    return tuple(
        Ready(
            variant,
            ProgramTexts(tokenizers, variant),
            _rows(bundle, variant, variant.calls, columns),
            _rows(bundle, variant, variant.loop.calls if variant.loop else (), columns),
            _rows(bundle, variant, variant.loop.unguided if variant.loop else (), columns),
            dependence(variant),
            droppable(variant),
            {call.component: place for place, call in enumerate(variant.calls)},
        )
        for variant in program.every
    )


def _rows(
    bundle: ProgramBundle, variant: Variant, calls: Sequence[ProgramCall], columns: Mapping[str, Array]
) -> list[dict[str, Array]]:
    known, laws = bundle.manifest.components, variant.loop.columns if variant.loop else NO_COLUMNS
    return [
        {spec.name: columns[name][call.row, ...] for name, spec in tabled(call, known[call.component], laws)}
        for call in calls
    ]


def _read_table(bundle: ProgramBundle) -> dict[str, Array]:
    """The tensors that calls read; ArtifactError where the table is not the manifest's."""
    manifest, program = bundle.manifest, bundle.manifest.program
    path = bundle.path(program.table or "")
    entries = read_header(path)
    needed: dict[str, tuple[str, tuple[int | str, ...], int]] = {}
    calls = [(call, variant.loop) for variant in program.every for call in variant.every_call]
    for call, loop in calls:
        for name, spec in tabled(call, manifest.components[call.component], loop.columns if loop else NO_COLUMNS):
            rows = max(call.row or 0, needed[name][2] - 1 if name in needed else 0) + 1
            needed[name] = (spec.dtype, spec.shape, rows)
    for name, (dtype, shape, rows) in needed.items():
        entry = entries.get(name)
        fits = entry and (np.dtype(DTYPES[entry.dtype][1]).name, entry.shape[1:]) == (dtype, shape)
        if not entry or not fits or entry.shape[:1] < (rows,):
            raise ArtifactError(
                f"{program.table}: not the table of the manifest",
                expected=f"{name}, {dtype} {[f'{rows} rows or more', *shape]}",
                got=f"{entry.dtype} {list(entry.shape)}" if entry else "no such tensor",
                hint="compile the bundle again",
            )
    return {name: read_tensor(path, entries[name]) for name in needed}
