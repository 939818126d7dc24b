"""What a compile will take, from the checkpoint's headers alone: what --dry-run prints."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from slipcast.bundle.manifest import FALLBACK
from slipcast.engines import ENGINES
from slipcast_compiler.host.machine import LIBRARIES_BYTES
from slipcast_compiler.plan import Plan
from slipcast_compiler.recipe.targets import BYTES, TargetTable
from slipcast_compiler.search.described import Described
from slipcast_compiler.search.space import Space


def summarise(plan: Plan) -> dict[str, Any]:
    """The plan in full, for people and programs; plain JSON. RecipeError where a search has nothing to choose from."""
    parameters, family = count_parameters(plan), plan.family
    image, checkpoint = plan.original.image, plan.checkpoint
    return {
        "name": plan.recipe.name,
        "model": checkpoint.name,
        "family": {
            "calibration": len(family.calibration) if family else 0,
            "held_out": len(family.held_out) if family else 0,
        },
        "sampling": plan.sampling.model_dump(mode="json", exclude={"noise"}, exclude_none=True),
        "reference": plan.reference.model_dump(mode="json", exclude={"noise"}, exclude_none=True),
        "few_step": checkpoint.few_step_sampler is not None,
        "image": f"{image.width}x{image.height}",
        "components": {
            name: {"parameters": count, "files": weight_names(plan, name)} for name, count in parameters.items()
        },
        "not_compiled": list(checkpoint.not_compiled),
        "not_shipped": list(plan.not_shipped),
        "prompt_table": {"prompts": len(plan.closed_prompts), "bytes": prompt_table_bytes(plan)},
        "targets": [f"{t.engine}-{ENGINES[t.engine].device}-{t.precision}" for t in plan.recipe.targets],
        "search": Space(Described(plan)).summary() if plan.recipe.search else None,
        "judged_on": len(plan.held_out),
        "out_of_family": len(plan.out_of_family),
        "disk_bytes": {"bundle": bundle_bytes(plan, parameters), "cache": cache_bytes(plan, parameters)},
        "memory_bytes": memory_bytes(parameters),
    }


def weight_names(plan: Plan, component: str) -> list[str]:
    """The files that a component's weights are in, relative to the checkpoint."""
    components = plan.checkpoint.architecture.components
    folder = components["denoiser" if component == FALLBACK else component].folder
    return [file.relative_to(plan.checkpoint.root).as_posix() for file in plan.checkpoint.weight_files(folder)]


def count_parameters(plan: Plan) -> dict[str, int]:
    """By component, with what draws strangers beside the denoiser."""
    checkpoint = plan.checkpoint
    parameters = {
        name: sum(math.prod(weight.entry.shape) for weight in checkpoint.weights(source.folder).values())
        for name, source in checkpoint.architecture.components.items()
    }
    guard = plan.recipe.guard
    return parameters | ({FALLBACK: parameters["denoiser"]} if guard and guard.policy == "fallback" else {})


def engine_bytes(plan: Plan, parameters: dict[str, int], tables: Iterable[TargetTable]) -> int:
    """Of the engines of targets, for what is shipped."""
    shipped = {name: count for name, count in parameters.items() if name not in plan.not_shipped}
    linear = {name: count_linear(plan, name) for name in shipped}
    return sum(
        table.bytes_of(name, count, linear[name], plan.recipe.int4_options)
        for table in tables
        for name, count in shipped.items()
    )


def count_linear(plan: Plan, component: str) -> int:
    """Of a component's parameters, those that are matrices, and not tables of embeddings."""
    components = plan.checkpoint.architecture.components
    weights = plan.checkpoint.weights(components["denoiser" if component == FALLBACK else component].folder)
    return sum(
        math.prod(weight.entry.shape)
        for name, weight in weights.items()
        if len(weight.entry.shape) == 2 and not name.endswith("_embedding.weight")
    )


def prompt_table_bytes(plan: Plan) -> int:
    """Of the table for a closed family's prompts, without the header."""
    texts, denoiser = plan.checkpoint.architecture.text, plan.checkpoint.architecture.components["denoiser"]
    names = {name for text in texts for _, name in text.outputs}
    row = sum(
        math.prod(d if isinstance(d, int) else plan.original.sizes[d] for d in given.shape[1:])
        for given in denoiser.inputs
        if given.name in names
    )
    return len(plan.closed_prompts) * row * BYTES["fp32"]


def bundle_bytes(plan: Plan, parameters: dict[str, int]) -> int:
    """Of the published bundle, without its report."""
    return engine_bytes(plan, parameters, plan.recipe.targets) + prompt_table_bytes(plan)


def cache_bytes(plan: Plan, parameters: dict[str, int]) -> int:
    """Of the cache's new entries: the exported weights once in fp32, and the engines that are not those files."""
    exported = sum(parameters.values()) * BYTES["fp32"]
    tables = [each for each in plan.recipe.targets if (each.engine, each.precision) != ("onnxruntime", "fp32")]
    return exported + engine_bytes(plan, parameters, tables) + prompt_table_bytes(plan)


def memory_bytes(parameters: dict[str, int]) -> int:
    """Of the process that needs most: the one that exports, or that draws with the original, both in fp32."""
    return LIBRARIES_BYTES + sum(parameters.values()) * BYTES["fp32"] * 2
