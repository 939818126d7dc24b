"""What the compile of a captured pipeline will take, of its parts and their shapes alone: what --dry-run prints; and
whether this machine has it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from slipcast.engines import ENGINES
from slipcast.errors import ResourceError
from slipcast_compiler.host.machine import LIBRARIES_BYTES
from slipcast_compiler.model.units import count_parameters
from slipcast_compiler.recipe.passes import QuantizeInt4
from slipcast_compiler.recipe.targets import BYTES, TargetTable

GRAPH_BYTES = 100_000_000  # of a traced graph, and of what traces it
RUNTIME_BYTES = {"onnxruntime": 110_000_000, "openvino": 200_000_000}  # the runtime with an engine's library, resident
WRITTEN = 3  # copies of the largest weight: as it was read, as it is cast, and as it is written

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Needs:
    """Bytes. `original`: of the process that draws with the pipeline itself, by precision; `export`: of the one that
    exports, where the program is not verified with all weights; `targets`: of those that draw with the bundle on this
    machine's CPU; `rewriting`: of those that measure and rewrite denoisers, where passes do. `disk`: of the published
    bundle, and of the cache's new entries."""

    original: Mapping[Precision, int]
    export: int
    targets: Mapping[str, int]
    disk: Mapping[str, int]
    rewriting: int = 0

    def memory(self, precision: Precision) -> int:
        """Of the process that needs most."""
        return max(self.original[precision], self.export, self.rewriting, *self.targets.values())


def estimate(
    components: Iterable[nn.Module], parts: Mapping[str, Any], variants: Sequence[Collection[str]], live_bytes: int,
    tables: tuple[TargetTable, ...], int4: QuantizeInt4 | None, closed: bool = False,
) -> Needs:  # fmt: skip
    """Of all of a pipeline's modules, and of its program's parts, as PartRecord has them; `variants`: those that are in
    memory at once; `live_bytes`: what values take at once, beside weights; `int4`: by what options weights
    are in INT4, where a target is; `closed`: a table takes the place of parts
    that read texts alone."""
    weights = [weight.numel() for module in components for weight in module.parameters()]
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    left_out = {name for name, part in parts.items() if closed and [*part["reads"]] == ["prompt"]}

    def shipped(table: TargetTable, names: Iterable[str]) -> int:
        kept = {name: parts[name] for name in names if name not in left_out}
        return sum(table.bytes_of(name, part["parameters"], part["linear"], int4) for name, part in kept.items())

    # Of parts that call the same modules, such as those for other sizes, weights are on the disk once.
    held = {
        (name.partition("_")[0], tuple(part["modules"])): name for name, part in reversed(list(parts.items()))
    }.values()
    resident = {table.name: max(shipped(table, names) for names in variants) for table in tables}
    engines = {table.name: shipped(table, held) for table in tables}
    linked = {table.name for table in tables if (table.engine, table.precision) == ("onnxruntime", "fp32")}
    return Needs(
        original={
            each: LIBRARIES_BYTES + (sum(weights) * BYTES["fp32"] + live_bytes) * BYTES[each] // BYTES["fp32"]
            for each in precisions
        },
        export=LIBRARIES_BYTES + GRAPH_BYTES + WRITTEN * max(weights, default=0) * BYTES["fp32"],
        targets={  # an engine maps its file, and has what it made of it besides
            table.name: RUNTIME_BYTES[table.engine] + 2 * resident[table.name] + live_bytes
            for table in tables
            if ENGINES[table.engine].device == "cpu"
        },
        disk={
            "bundle": sum(engines.values()),
            "cache": sum(parts[name]["parameters"] for name in held) * BYTES["fp32"]
            + sum(engines[name] for name in engines.keys() - linked),
        },
    )


def add_rewriting(needs: Needs, denoisers: Iterable[nn.Module], measuring: int | None) -> Needs:
    """With what passes take: the changed weights of a denoiser, and those that an earlier pass had changed.
    `measuring`: what a profile takes beside the pipeline itself; None where there is none."""
    largest = max(weight_bytes(module) for module in denoisers)
    profile = 0 if measuring is None else needs.original["fp32"] + measuring
    return replace(needs, rewriting=max(LIBRARIES_BYTES + 2 * largest, profile))


def weight_bytes(module: nn.Module) -> int:
    """Of a module in fp32."""
    return count_parameters(module) * BYTES["fp32"]


def check_rewriting_fits(needs: Needs, available: float) -> None:
    """ResourceError where passes, or the profile that they choose by, take more than `available` bytes."""
    if needs.rewriting > available:
        raise ResourceError(
            "what the passes take does not fit into memory: the pipeline is measured in fp32, with all weights loaded",
            expected=f"about {needs.rewriting / 1e9:.1f} GB",
            got=f"{available / 1e9:.1f} GB available",
            hint='compile on a machine that has it; criterion = "magnitude" and correct = false measure nothing',
        )


def choose_precision(needs: Needs, available: float) -> Precision:
    """In what the pipeline itself is run here, of `available` bytes; in bf16 where fp32 takes more than there are.

    ResourceError where both do.
    """
    for precision, needed in needs.original.items():
        if needed <= available:
            return precision
    sizes = " or ".join(f"{needed / 1e9:.1f} GB in {precision}" for precision, needed in needs.original.items())
    raise ResourceError(
        "the pipeline itself, whose pictures a bundle is judged by, does not fit into memory",
        expected=f"about {sizes}",
        got=f"{available / 1e9:.1f} GB available",
        hint="close other programs, or compile on a machine that has it; the bundle itself runs on smaller ones",
    )


def check_targets_fit(needs: Needs, available: float) -> None:
    """ResourceError where an engine does not fit into `available` bytes here, where it is judged."""
    for name, needed in needs.targets.items():
        if needed > available:
            raise ResourceError(
                f"target {name} does not fit into memory here, where it is judged",
                expected=f"about {needed / 1e9:.1f} GB",
                got=f"{available / 1e9:.1f} GB available",
                hint="another precision takes less, bf16 half of what fp32 does; or compile on a machine that has it",
            )
