"""The prompt family: what a bundle is made for, split into calibration and held-out prompts, and hashed."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from slipcast.errors import RecipeError
from slipcast_compiler.recipe.recipe import EvaluateTable, FamilyTable, slots_of
from slipcast_compiler.recipe.values import read_plain

logger = logging.getLogger("slipcast")

FEW_HELD_OUT = 8
MAX_BYTES = 64 << 20  # of a list of prompts
MOST_PROMPTS = 100_000


@dataclass(frozen=True)
class Family:
    """`calibration` is what passes and searches may look at; `held_out` is for the gate alone."""

    name: str
    calibration: tuple[str, ...]
    held_out: tuple[str, ...]
    closed: bool

    @property
    def ranked(self) -> tuple[str, ...]:
        """The calibration prompts by their hash: few of them are not all of one template."""
        return tuple(sorted(self.calibration, key=lambda prompt: hashlib.sha256(prompt.encode()).digest()))

    @property
    def hash(self) -> str:
        """SHA-256 over all prompts, the split and closedness."""
        record = {"calibration": self.calibration, "held_out": self.held_out, "closed": self.closed}
        return hashlib.sha256(json.dumps(record, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def expand(table: FamilyTable, name: str, folder: Path) -> Family:
    """Expand templates or read the list, drop duplicates (with a warning), and split.

    Prompts are ranked by a hash of text and seed, so the split does not depend on their order. Raises RecipeError for a
    family too small to split.
    """
    prompts = _distinct(_listed(table, folder), "the family")
    if len(prompts) < 2:
        raise RecipeError(
            "the family is too small", expected="at least two different prompts, one of them held out",
            got=f"{len(prompts)}: {', '.join(map(repr, prompts))}", hint="add prompts, or values to the slots",
        )  # fmt: skip
    ranked = sorted(prompts, key=lambda p: hashlib.sha256(f"{table.seed}:{p}".encode()).digest())
    count = min(len(prompts) - 1, max(1, round(table.held_out * len(prompts))))
    held_out = tuple(ranked[:count])
    if count < FEW_HELD_OUT:
        logger.warning("only %d of %d prompts are held out: the gate will be noisy", count, len(prompts))
    chosen = set(held_out)
    return Family(name, tuple(p for p in prompts if p not in chosen), held_out, table.closed)


def _listed(table: FamilyTable, folder: Path) -> list[str]:
    if table.templates:
        _check_count(table)
        return [
            template.format(**dict(zip(slots, values, strict=True)))
            for template in table.templates
            for slots in [sorted(set(slots_of(template)))]
            for values in itertools.product(*(table.slots[slot] for slot in slots))
        ]
    if table.prompts_file is None:
        return list(table.prompts)
    return _read("family.prompts_file", folder / table.prompts_file)


def _check_count(table: FamilyTable) -> None:
    """RecipeError where the templates would make more prompts than anybody judges, before they are made."""
    products = {
        template: math.prod(len(table.slots[slot]) for slot in set(slots_of(template))) for template in table.templates
    }
    if (count := sum(products.values())) > MOST_PROMPTS:
        largest = max(products, key=lambda template: products[template])
        raise RecipeError(
            "family.templates make too many prompts",
            expected=f"at most {MOST_PROMPTS} combinations of slots",
            got=f"{count}, of them {products[largest]} by {largest[:200]!r}",
            hint="give fewer values to the slots, or list the prompts themselves",
        )


def outside(table: EvaluateTable, family: Family, folder: Path) -> tuple[str, ...]:
    """The recipe's prompts out of the family; RecipeError where one is of the family after all."""
    name = table.out_of_family_file
    listed = list(table.out_of_family) if name is None else _read("evaluate.out_of_family_file", folder / name)
    prompts = _distinct(listed, "evaluate.out_of_family")
    if inside := [prompt for prompt in prompts if prompt in {*family.calibration, *family.held_out}]:
        raise RecipeError("evaluate.out_of_family: a prompt is of the family", expected="others", got=repr(inside[0]))
    return tuple(prompts)


def _read(key: str, file: Path) -> list[str]:
    try:
        return read_prompts(file)
    except FileNotFoundError:
        raise RecipeError(f"{key} does not exist", expected="a text file, one prompt a line", got=file) from None


def read_prompts(file: Path) -> list[str]:
    """One prompt a line; empty lines and lines that begin with # do not count. RecipeError if it is not UTF-8 text."""
    try:
        text = read_plain(file, MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise RecipeError(
            f"{file}:{line}: not UTF-8", expected="UTF-8 text", got=f"byte {error.object[error.start]:#x}"
        ) from None
    except IsADirectoryError:
        raise RecipeError(f"{file}: a directory", expected="a text file, one prompt a line") from None
    except ValueError as error:
        raise RecipeError(f"{file}: no list of prompts", expected="a text file", got=str(error)) from None
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read", expected="a text file", got=error.strerror) from None
    prompts = [line.strip() for line in text.splitlines()]
    prompts = [prompt for prompt in prompts if prompt and not prompt.startswith("#")]
    if not prompts:
        raise RecipeError(f"{file}: no prompts in it", expected="a text file, one prompt a line")
    return prompts


def _distinct(prompts: list[str], where: str) -> list[str]:
    """Without duplicates, as normalised text; an empty value of a slot leaves no double space."""
    tidy = [unicodedata.normalize("NFC", " ".join(prompt.split())) for prompt in prompts]
    distinct = list(dict.fromkeys(prompt for prompt in tidy if prompt))
    if len(distinct) < len(tidy):
        logger.warning("%d duplicate or empty prompts dropped from %s", len(tidy) - len(distinct), where)
    return distinct
