"""What is called in tiles, with norms that see the whole."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from slipcast.bundle.program import Program, ProgramCall
from slipcast.bundle.tiles import Statistics
from slipcast_compiler.export.component import contract_of
from slipcast_compiler.export.program import PROGRAM, read_record
from slipcast_compiler.graph.norms import GIVEN, TAKEN, give_statistics
from slipcast_compiler.graph.weights import load, save_sharing


def share_statistics(folder: Path) -> None:
    """Rewrite graphs, contracts and record that export_program left in `folder`, where calls in tiles have group norms.
    What is decoded whole is as before."""
    record = read_record(folder)
    names = dict.fromkeys(call.component for each in record.every for call in each.calls if call.tiles)
    found = {name: size for name in names if (size := _rewrite(folder, name))}
    if not found:
        return
    first, *others = (tuple(_sharing(call, found) for call in variant.calls) for variant in record.every)
    rest = tuple(
        variant.model_copy(update={"calls": calls}) for variant, calls in zip(record.variants, others, strict=True)
    )
    changed = record.model_copy(update={"calls": first, "variants": rest})
    (folder / PROGRAM).write_text(Program.model_validate_json(changed.model_dump_json()).model_dump_json())


def _rewrite(folder: Path, name: str) -> int:
    """How many statistics its norms have."""
    model = load(folder / f"{name}.onnx")
    if not (size := give_statistics(model.graph)):
        return 0
    with tempfile.TemporaryDirectory(prefix=".norms-", dir=folder) as made:
        save_sharing(model, Path(made) / f"{name}.onnx")
        for file in Path(made).iterdir():
            file.replace(folder / file.name)
    (folder / f"{name}.json").write_text(contract_of(model).model_dump_json())
    return size


def _sharing(call: ProgramCall, sizes: Mapping[str, int]) -> ProgramCall:
    """The call with statistics, where its component has any."""
    if not call.tiles or call.component not in sizes:
        return call
    statistics = Statistics(input=GIVEN, output=TAKEN, size=sizes[call.component])
    return call.model_copy(update={"tiles": call.tiles.model_copy(update={"statistics": statistics})})
