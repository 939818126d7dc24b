"""What the compile of a captured pipeline will do, before it does it: any pipeline, with no code for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipcast.errors import RecipeError
from slipcast_compiler.capture.find import find
from slipcast_compiler.capture.open import open_without_weights
from slipcast_compiler.capture.summary import summarise
from slipcast_compiler.judge.captured import PipelineDrawing
from slipcast_compiler.model.architectures import is_known
from slipcast_compiler.model.checkpoint import Checkpoint, locate
from slipcast_compiler.model.original import Prompts
from slipcast_compiler.plan import check_targets
from slipcast_compiler.recipe.family import Family, expand
from slipcast_compiler.recipe.recipe import Recipe
from slipcast_compiler.recipe.seeds import GATE
from slipcast_compiler.recipe.targets import TargetTable

# What a recipe may say of a captured pipeline; every other table belongs to what is not captured yet.
TABLES = frozenset({"name", "model", "call", "family", "evaluate", "gate", "targets"})
PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class ProgramPlan:
    """A recipe for a pipeline that is captured. `summary`: what `slipcast capture` says of it, and its parts."""

    recipe: Recipe
    folder: Path
    checkpoint: Checkpoint
    family: Family | None
    summary: Mapping[str, Any]

    @property
    def drawing(self) -> PipelineDrawing:
        """What the bundle is judged on: held-out prompts, one image each."""
        table, family = self.recipe.evaluate, self.family
        prompts: Prompts = family.held_out[: table.images] if family else (None,) * table.images
        seeds = GATE.take(len(prompts), table.seed)
        return PipelineDrawing(self.checkpoint.root, self.recipe.model.pipeline, self.recipe.call, prompts, seeds)


def is_captured(recipe: Recipe, folder: Path) -> bool:
    """Whether a recipe is for a pipeline that is captured: of its own, with a [call], or one that nothing describes."""
    if recipe.model.pipeline or recipe.call:
        return True
    root, _ = locate(recipe.model, folder)
    return root.is_dir() and not is_known(str(Checkpoint(root, "").index.get("_class_name")))


def make_program_plan(recipe: Recipe, folder: Path) -> ProgramPlan:
    """Capture the pipeline of a recipe, from its configs alone (seconds).

    RecipeError for what a program, or a runtime, cannot do; HostError where an engine is not installed.
    """
    _check_tables(recipe)
    _check_precisions(recipe.targets)
    check_targets(recipe.targets)
    root, name = locate(recipe.model, folder)
    checkpoint = Checkpoint(root, name, recipe.model.variant)
    pipe = open_without_weights(root, recipe.model.pipeline)
    found = find(pipe, recipe.call)
    prompted = any(template.argument == "prompt" for template in found.templates.values())
    if prompted != bool(recipe.family):
        raise RecipeError(
            f"{name} takes {'a prompt' if prompted else 'no prompts'}",
            expected="a [family]" if prompted else "a recipe without [family]",
        )
    family = expand(recipe.family, recipe.name, folder) if recipe.family else None
    summary = summarise(found.program, pipe)
    summary["parts"] = {
        part.name: {"events": len(part.events), "uses": sum(use.part == part.name for use in found.cut.uses)}
        for part in found.cut.parts
    }
    return ProgramPlan(recipe, folder, checkpoint, family, summary)


def _check_tables(recipe: Recipe) -> None:
    if others := sorted(recipe.model_fields_set - TABLES):
        raise RecipeError(
            f"[{others[0]}] is not for a captured pipeline yet",
            expected=", ".join(sorted(TABLES)),
            got=", ".join(others),
            hint="what the pipeline is called with goes under [call], by the names of its own arguments",
        )
    if recipe.family and recipe.family.closed:
        raise RecipeError("family.closed is not for a captured pipeline yet", expected="an open family", got="closed")
    for name in ("out_of_family", "out_of_family_file"):
        if getattr(recipe.evaluate, name):
            raise RecipeError(f"evaluate.{name} is not for a captured pipeline yet", expected="none", got="some")
    if "prompt" in recipe.call:
        raise RecipeError("call.prompt: prompts are those of the [family]", expected="none", got=recipe.call["prompt"])
    if recipe.call.get("num_images_per_prompt", 1) != 1:
        raise RecipeError(
            "call.num_images_per_prompt: a program draws one image; a run draws as many as it is asked for, one by one",
            expected=1,
            got=recipe.call["num_images_per_prompt"],
        )


def _check_precisions(tables: tuple[TargetTable, ...]) -> None:
    for table in tables:
        if table.precision not in PRECISIONS or "tensorrt" in table.engine:
            raise RecipeError(
                f"target {table.name} is not for a captured pipeline yet",
                expected="openvino, onnxruntime or onnxruntime-gpu, in fp32, bf16 or fp16",
                got=table.name,
            )
