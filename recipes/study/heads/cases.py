"""What a study compares: its prompts, its calibrations, and every mask to be judged, all at the same budget."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heads.recipe import GENERIC, MaskTable, StudyRecipe
from slipcast.errors import RecipeError
from slipcast_compiler.plan import Plan, make_plan
from slipcast_compiler.recipe.family import Family, expand
from slipcast_compiler.recipe.passes import PruneHeads
from slipcast_compiler.recipe.recipe import EvaluateTable, FamilyTable, Recipe
from slipcast_compiler.recipe.targets import TargetTable

OUT = "out_of_family"


def held_out(family: str) -> str:
    """The name of the set of a family's held-out prompts."""
    return f"held_out/{family}"


def paraphrases(family: str) -> str:
    """The name of the set of a family's paraphrases."""
    return f"paraphrases/{family}"


@dataclass(frozen=True)
class Case:
    """One mask, judged on the named sets of prompts. `calibration`: a family, generic, or None for weights alone."""

    criterion: str
    correct: bool
    calibration: str | None
    ratio: float
    seed: int
    sets: tuple[str, ...]
    recovered: bool = False

    @property
    def title(self) -> str:
        """Without ratio: what is shown while it is judged."""
        how = self.criterion + ", corrected" * self.correct + ", recovered" * self.recovered
        return f"{how}, {self.calibration or 'no calibration'}, seed {self.seed}"

    def options(self, recipe: StudyRecipe) -> PruneHeads:
        """Of the pass: the random mask of a seed is its own."""
        chosen: Any = self.criterion
        return PruneHeads(
            ratio=self.ratio,
            criterion=chosen,
            correct=self.correct,
            floor=recipe.floor,
            seed=self.seed if chosen == "random" else 0,
        )


@dataclass(frozen=True)
class Study:
    """A recipe resolved: `sets` of prompts by name, and a plan for each (calibration, seed) that a mask needs."""

    recipe: StudyRecipe
    folder: Path
    plan: Plan  # for what all of them share
    sets: dict[str, tuple[str, ...]]
    plans: dict[tuple[str, int], Plan]
    cases: tuple[Case, ...]


def make_study(recipe: StudyRecipe, folder: Path) -> Study:
    """Resolve a recipe, whose paths are relative to `folder`. No prompt that is judged on is calibrated on."""
    families = {name: expand(table, name, folder) for name, table in recipe.families.items()}
    sets = _sets(recipe, families)
    gap = min((b - a for a, b in itertools.pairwise(recipe.seeds)), default=None)
    if gap is not None and gap < (longest := max(map(len, sets.values()))):
        raise RecipeError("seeds are too close: pictures would share noise", expected=f"{longest} apart", got=gap)
    judged = {prompt for prompts in sets.values() for prompt in prompts}
    cases = enumerate_cases(recipe)
    plans: dict[tuple[str, int], Plan] = {}
    for name in dict.fromkeys(case.calibration for case in cases if case.calibration):
        table = recipe.generic if name == GENERIC else recipe.families[name]
        base = make_plan(_recipe(recipe, name, table), folder)
        assert base.family
        free = [prompt for prompt in base.family.calibration if prompt not in judged]
        for number, seed in enumerate(recipe.seeds):
            plans[name, seed] = _calibrated(base, free, number)
    first = next(iter(recipe.families))
    plan = make_plan(_recipe(recipe, first, recipe.families[first]), folder)
    return Study(recipe, folder, plan, sets, plans, cases)


def enumerate_cases(recipe: StudyRecipe) -> tuple[Case, ...]:
    """Every mask at every ratio and seed. One that no family has made is judged on all of them at once."""
    found = []
    for seed in recipe.seeds:
        for mask in recipe.masks:
            for calibration in _calibrations(recipe, mask):
                sets = _judged_on(recipe, mask, calibration)
                found += [Case(mask.criterion, mask.correct, calibration, r, seed, sets) for r in recipe.ratios]
        if recipe.recover:
            for family in recipe.families:
                sets = (held_out(family), OUT)
                found += [Case("leave_one_out", True, family, r, seed, sets, True) for r in recipe.recover.ratios]
    return tuple(found)


def _calibrations(recipe: StudyRecipe, mask: MaskTable) -> list[str | None]:
    if not mask.calibration:
        return [None]
    families = list(recipe.families) if "family" in mask.calibration else []
    return [*families, *([GENERIC] if GENERIC in mask.calibration else [])]


def _judged_on(recipe: StudyRecipe, mask: MaskTable, calibration: str | None) -> tuple[str, ...]:
    families = [calibration] if calibration in recipe.families else list(recipe.families)
    sets = [held_out(str(family)) for family in families]
    if mask.out_of_family:
        sets.append(OUT)
    if mask.paraphrases:
        sets += [paraphrases(str(family)) for family in families]
    return tuple(sets)


def _sets(recipe: StudyRecipe, families: dict[str, Family]) -> dict[str, tuple[str, ...]]:
    sets = {}
    for name, family in families.items():
        if len(family.held_out) < recipe.images:
            raise RecipeError(
                f"families.{name} is too small",
                expected=f"{recipe.images} held-out prompts, as images says",
                got=len(family.held_out),
                hint="add prompts, raise held_out, or lower images",
            )
        sets[held_out(name)] = family.held_out[: recipe.images]
        members = {*family.calibration, *family.held_out}
        strangers = {OUT: recipe.out_of_family, f"paraphrases.{name}": recipe.paraphrases.get(name, ())}
        for key, prompts in strangers.items():
            if inside := [prompt for prompt in prompts if prompt in members]:
                raise RecipeError(f"{key}: a prompt is of the family {name}", expected="others", got=repr(inside[0]))
    sets[OUT] = recipe.out_of_family
    sets |= {paraphrases(name): prompts for name, prompts in recipe.paraphrases.items()}
    return sets


def _recipe(recipe: StudyRecipe, name: str, table: FamilyTable) -> Recipe:
    """A compile's recipe with this family; nothing is built, so that its target is the one that is always there."""
    return Recipe(
        name=f"{recipe.name}-{name}",
        model=recipe.model,
        family=table,
        sampling=recipe.sampling,
        profile=recipe.profile,
        evaluate=EvaluateTable(images=recipe.images, scorer=recipe.scorer),
        targets=(TargetTable(engine="onnxruntime"),),
    )


def _calibrated(base: Plan, free: Sequence[str], number: int) -> Plan:
    """The plan of one seed: some of the calibration prompts, and noise that no other seed has."""
    assert base.family
    wanted = base.recipe.profile.prompts
    ranked = sorted(free, key=lambda prompt: hashlib.sha256(f"{number}:{prompt}".encode()).digest())
    if len(ranked) < wanted:
        raise RecipeError(
            f"{base.family.name}: too few prompts are left to calibrate on",
            expected=f"{wanted}, as profile.prompts says",
            got=len(ranked),
        )
    family = dataclasses.replace(base.family, calibration=tuple(ranked[:wanted]))
    profile = base.recipe.profile.model_copy(update={"seed": base.recipe.profile.seed + number})
    return dataclasses.replace(base, family=family, recipe=base.recipe.model_copy(update={"profile": profile}))
