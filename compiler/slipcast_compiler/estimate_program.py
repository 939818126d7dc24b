"""What the compile of a captured pipeline will take, of its parts and their shapes alone: what --dry-run prints; and
whether this machine has it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from torch import nn

from slipcast.engines import ENGINES
from slipcast.errors import ResourceError
from slipcast.run.residency import Policy
from slipcast_compiler.export.slots import is_adaptable
from slipcast_compiler.host.machine import LIBRARIES_BYTES
from slipcast_compiler.model.original import Precision
from slipcast_compiler.model.units import count_parameters
from slipcast_compiler.recipe.passes import QuantizeInt4
from slipcast_compiler.recipe.targets import BYTES, TargetTable

GRAPH_BYTES = 100_000_000  # of a traced graph, and of what traces it
RUNTIME_BYTES = {"onnxruntime": 110_000_000, "openvino": 200_000_000}  # the runtime with an engine's library, resident
Specialised = Literal["rewritten", "quantized"]  # for the family, in some target
WRITTEN = 3  # copies of the largest weight: as it was read, as it is cast, and as it is written


@dataclass(frozen=True)
class Needs:
    """Bytes. `original`: of the process that draws with the pipeline itself, by precision; `export`: of the one that
    exports, where the program is not verified with all weights; `targets`: of those that draw with the bundle on this
    machine's CPU, by how engines stay loaded; `rewriting`: of those that measure and rewrite denoisers, where passes
    do. `disk`: of the published bundle, and of the cache's new entries."""

    original: Mapping[Precision, int]
    export: int
    targets: Mapping[str, Mapping[Policy, int]]
    disk: Mapping[str, int]
    rewriting: int = 0

    def memory(self, precision: Precision | None, policies: Mapping[str, Policy]) -> int:
        """Of the process that needs most; `precision`: of the pipeline itself, where it is run; `policies`: see
        choose_policies."""
        original = self.original[precision] if precision else 0
        return max(original, self.export, self.rewriting, *(self.targets[name][policies[name]] for name in policies))


def estimate(
    components: Iterable[nn.Module], parts: Mapping[str, Any], variants: Sequence[Collection[str]],
    live_bytes: tuple[int, int], tables: tuple[TargetTable, ...], int4: QuantizeInt4 | None, closed: bool = False,
    strangers: Specialised | None = None,
) -> Needs:  # fmt: skip
    """Of all of a pipeline's modules, and of its program's parts, as PartRecord has them; `variants`: those that are in
    memory at once; `live_bytes`: what values take at once beside weights, in the pipeline and in its parts; `int4`: by
    what options weights are in INT4, where a target is; `closed`: a table takes the place of parts that read texts
    alone; `strangers`: denoisers are there a second time, as they were, for those: with all else exported anew where
    they are rewritten."""
    modules = list(components)
    in_pipeline, in_parts = live_bytes
    weights = [weight.numel() for module in modules for weight in module.parameters()]
    left_out = {name for name, part in parts.items() if closed and [*part["reads"]] == ["prompt"]}

    def shipped(table: TargetTable, names: Iterable[str]) -> int:
        kept = {name: parts[name] for name in names if name not in left_out}
        return sum(table.bytes_of(name, part["parameters"], part["linear"], int4) for name, part in kept.items())

    # Of parts that call the same modules, such as those for other sizes, weights are on the disk once.
    held = {
        (name.partition("_")[0], tuple(part["modules"])): name for name, part in reversed(list(parts.items()))
    }.values()

    def stand_ins(table: TargetTable, names: Iterable[str]) -> int:
        """What draws strangers in the place of these, in half precision where the others are quantised."""
        again: list[int] = [parts[name]["parameters"] for name in names if strangers and is_adaptable(name)]
        return sum(again) * BYTES[table.half or "fp32"]

    def resident(table: TargetTable, policy: Policy) -> int:
        """Of the variant that has most, at once: the parts that are used several times stay while a picture is made."""
        several = {name for name, part in parts.items() if part["uses"] > 1}
        each = {name: shipped(table, [name]) for name in parts}
        if policy == "all":
            return max(sum(each[name] for name in names) + stand_ins(table, names) for names in variants)
        return max(
            max(
                sum(each[name] for name in names if name in several),
                stand_ins(table, [name for name in names if name in several]),
                *(each[name] for name in names),
            )
            for names in variants
        )

    engines = {table.name: shipped(table, held) + stand_ins(table, held) for table in tables}
    exported = sum(parts[name]["parameters"] for name in held) * BYTES["fp32"]
    linked = {table.name for table in tables if (table.engine, table.precision) == ("onnxruntime", "fp32")}
    return Needs(
        original=original_bytes(modules, in_pipeline),
        export=LIBRARIES_BYTES + GRAPH_BYTES + WRITTEN * max(weights, default=0) * BYTES["fp32"],
        targets={  # an engine maps its file, and has what it made of it besides
            table.name: {
                policy: RUNTIME_BYTES[table.engine] + 2 * resident(table, policy) + in_parts
                for policy in get_args(Policy)
            }
            for table in tables
            if ENGINES[table.engine].device == "cpu"
        },
        disk={
            "bundle": sum(engines.values()),
            "cache": (2 if strangers == "rewritten" else 1) * exported
            + sum(engines[name] for name in engines.keys() - linked),
        },
    )


def original_bytes(modules: Sequence[nn.Module], live_bytes: int = 0) -> dict[Precision, int]:
    """Of the process that draws with a pipeline of these modules; `live_bytes`: as estimate, in fp32."""
    whole = sum(map(weight_bytes, modules)) + live_bytes
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    return {each: LIBRARIES_BYTES + whole * BYTES[each] // BYTES["fp32"] for each in precisions}


def add_rewriting(needs: Needs, denoisers: Iterable[nn.Module], measuring: Iterable[int]) -> Needs:
    """With what passes take: the changed weights of a denoiser, and those that an earlier pass had changed.
    `measuring`: what each process that draws with the whole pipeline, for a profile or for recovery, takes beside it.
    """
    largest = max(weight_bytes(module) for module in denoisers)
    drawing = [needs.original["fp32"] + each for each in measuring]
    return replace(needs, rewriting=max([LIBRARIES_BYTES + 2 * largest, *drawing]))


def weight_bytes(module: nn.Module) -> int:
    """Of a module in fp32."""
    return count_parameters(module) * BYTES["fp32"]


def check_rewriting_fits(needs: Needs, available: float) -> None:
    """ResourceError where passes, or the profile that they choose by, take more than `available` bytes."""
    if needs.rewriting > available:
        raise ResourceError(
            "what the passes take does not fit into memory: they draw with the pipeline in fp32, all weights loaded",
            expected=f"about {needs.rewriting / 1e9:.1f} GB",
            got=f"{available / 1e9:.1f} GB available",
            hint='compile on a machine that has it; criterion = "magnitude" and correct = false measure nothing, if '
            "there is no passes.recover",
        )


def choose_precision(original: Mapping[Precision, int], available: float) -> Precision:
    """In what the pipeline itself is run here, of `available` bytes; in bf16 where fp32 takes more than there are.
    `original`: as Needs has it.

    ResourceError where both do.
    """
    for precision, needed in original.items():
        if needed <= available:
            return precision
    sizes = " or ".join(f"{needed / 1e9:.1f} GB in {precision}" for precision, needed in original.items())
    raise ResourceError(
        "the pipeline itself, whose pictures a bundle is judged by, does not fit into memory",
        expected=f"about {sizes}",
        got=f"{available / 1e9:.1f} GB available",
        hint="close other programs; or let a larger machine draw what the bundle is judged by (`slipcast originals`), "
        'or publish it unjudged (evaluate.original = "none")',
    )


def choose_policies(needs: Needs, available: float) -> dict[str, Policy]:
    """How the engines of each target stay loaded where it is judged, of `available` bytes; ResourceError where even one
    after the other does not fit."""
    chosen: dict[str, Policy] = {}
    for name, targets in needs.targets.items():
        if not (fitting := [policy for policy, needed in targets.items() if needed <= available]):
            raise ResourceError(
                f"target {name} does not fit into memory here, where it is judged, one engine after the other",
                expected=f"about {min(targets.values()) / 1e9:.1f} GB",
                got=f"{available / 1e9:.1f} GB available",
                hint="another precision takes less, bf16 half of what fp32 does, and int4 a seventh; or compile on a "
                "machine that has it",
            )
        chosen[name] = fitting[0]
    return chosen
