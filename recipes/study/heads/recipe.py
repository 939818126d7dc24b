"""The study's recipe: families, masks and ratios to compare, and the prompts and seeds to compare them on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from slipcast.bundle.validation import Strict, problems
from slipcast_compiler.passes import PASSES
from slipcast_compiler.recipe.passes import HeadCriterion, PruneHeads, Recover
from slipcast_compiler.recipe.reading import parse_toml, read_text, refusal
from slipcast_compiler.recipe.recipe import FamilyTable, ModelTable, ProfileTable
from slipcast_compiler.recipe.sampling import SamplingTable
from slipcast_compiler.recipe.seeds import GATE
from slipcast_compiler.recipe.values import AsTuple, Texts

GENERIC = "generic"


Ratio = Annotated[float, Field(gt=0, lt=1)]
Ratios = Annotated[tuple[Ratio, ...], AsTuple, Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=GATE.size)]  # calibration has others
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,39}$")]


class MaskTable(Strict):
    """One way to choose heads. `calibration`: on what it is measured, each a mask of its own; none for weights alone.

    Always judged on held-out prompts of the family; on out_of_family and paraphrases where it says so.
    """

    criterion: HeadCriterion
    correct: bool = False
    calibration: Annotated[tuple[Literal["family", "generic"], ...], AsTuple] = ()
    out_of_family: bool = False
    paraphrases: bool = False

    @model_validator(mode="after")
    def _calibrated(self) -> Self:
        measured = PASSES["prune_heads"].needs_profile(PruneHeads(criterion=self.criterion, correct=self.correct))
        if measured != bool(self.calibration):
            what = "needs a calibration: family, generic or both" if measured else "reads weights alone: no calibration"
            raise ValueError(f"{self.criterion} {what}")
        if len(set(self.calibration)) < len(self.calibration):
            raise ValueError("a calibration is given twice")
        return self


class RecoverTable(Strict):
    """`ratios` at which the family's leave_one_out masks, corrected, are recovered; the rest is of [passes.recover]."""

    ratios: Ratios
    steps: Annotated[int, Field(ge=1)]
    batch: Annotated[int, Field(ge=1)] = Recover().batch
    learning_rate: Annotated[float, Field(gt=0)] = Recover().learning_rate


class StudyRecipe(Strict):
    """`images`: held-out prompts of each family. `seeds`: each is a calibration (prompts and noise) of its own, a
    random mask of its own, and the noise of the pictures: image i has seed + i."""

    name: Name
    model: ModelTable
    scorer: Annotated[str, Field(min_length=1)]
    sampling: SamplingTable = SamplingTable()
    profile: ProfileTable = ProfileTable()
    images: Annotated[int, Field(ge=1)] = 8
    seeds: Annotated[tuple[Seed, ...], AsTuple, Field(min_length=1)]
    ratios: Ratios
    floor: Annotated[int, Field(ge=1)] = 1
    families: Annotated[dict[Name, FamilyTable], Field(min_length=1)]
    generic: FamilyTable
    out_of_family: Annotated[Texts, Field(min_length=1)]
    paraphrases: Annotated[dict[str, Texts], Field(default_factory=dict)]
    masks: Annotated[tuple[MaskTable, ...], AsTuple, Field(min_length=1)]
    recover: RecoverTable | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if GENERIC in self.families:
            raise ValueError(f"families.{GENERIC}: the name is that of the other calibration")
        if unknown := sorted(set(self.paraphrases) - set(self.families)):
            raise ValueError(f"paraphrases of unknown families: {', '.join(unknown)}")
        if any(mask.paraphrases for mask in self.masks) and set(self.paraphrases) != set(self.families):
            raise ValueError("a mask is judged on paraphrases, which not every family has")
        kinds = [(mask.criterion, mask.correct) for mask in self.masks]
        if len(set(kinds)) < len(kinds):
            raise ValueError("two masks with the same criterion and correction")
        for name, values in (("ratios", self.ratios), ("seeds", self.seeds)):
            if list(values) != sorted(set(values)):
                raise ValueError(f"{name} have to rise")
        if self.recover and list(self.recover.ratios) != sorted(set(self.recover.ratios)):
            raise ValueError("recover.ratios have to rise")
        return self


def read_study(path: Path) -> StudyRecipe:
    """Read and validate; RecipeError with all problems at once, each as file:line: key: problem."""
    return parse_study(read_text(path, "recipes/study/heads.toml in the repository is one"), str(path))


def parse_study(text: str, name: str) -> StudyRecipe:
    """As read_study, from text; `name` stands for the file in messages."""
    document = parse_toml(text, name)
    try:
        return StudyRecipe.model_validate(document)
    except ValidationError as error:
        raise refusal(list(problems(error, StudyRecipe)), text, name) from None
