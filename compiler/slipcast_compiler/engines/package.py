"""What the manifest says of a bundle besides its targets, with the tokenizers and tables that it names."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

import slipcast
from slipcast.bundle.manifest import (
    SCHEMA_VERSION,
    Caching,
    Component,
    ComponentName,
    FamilyRecord,
    TextInput,
)
from slipcast_compiler.export.parts import write_step_table
from slipcast_compiler.export.prompts import describe_prompts
from slipcast_compiler.model.checkpoint import tokenizer_file
from slipcast_compiler.plan import Plan


def describe(
    plan: Plan,
    exported: dict[str, Path],
    prompts: Path | None,
    folder: Path,
    staged: Path | None = None,
    caching: Caching | None = None,
) -> dict[str, Any]:
    """The manifest's fields that do not depend on targets; writes the tokenizers and tables they name.

    `prompts`: a closed family's table, in place of tokenizers and text encoders. `staged`: where the parts of the
    staged denoiser are, if the exported one was cut again since, with `caching`.
    """
    components = {
        name: Component.model_validate_json((source / f"{name}.json").read_text()) for name, source in exported.items()
    }
    closed, family = prompts and describe_prompts(plan, prompts), plan.family
    if prompts and closed:
        shutil.copyfile(prompts, folder / closed.table)
    named = {"cut": plan.recipe.cut, "caching": caching, "closed_family": closed}
    stages = staged or exported["denoiser"]
    return {
        "schema_version": ".".join(map(str, SCHEMA_VERSION)), "slipcast_version": slipcast.__version__,
        "name": plan.recipe.name,
        "base_model": plan.checkpoint.name, "source_sha256": plan.checkpoint.sha256,
        "family": family and FamilyRecord(
            name=family.name, hash=family.hash, closed=family.closed, calibration=len(family.calibration),
            held_out=len(family.held_out),
        ),
        "components": components, "text": () if prompts else _texts(plan, folder), "prompts": closed,
        "image": plan.image, "sampling": plan.sampling, "reference": plan.reference,
        "requires": (*plan.sampling.requires, *(name for name, record in named.items() if record)),
        "not_compiled": plan.checkpoint.not_compiled,
        "caching": caching,
        **(write_step_table(stages, plan.sampling, folder) if plan.recipe.cut else {}),
    }  # fmt: skip


def _texts(plan: Plan, folder: Path) -> tuple[TextInput, ...]:
    """How prompts become conditioning; writes the tokenizers."""
    texts = []
    for text in plan.checkpoint.architecture.text:
        data, _, pad = tokenizer_file(plan.checkpoint, text.tokenizer)
        (folder / f"{text.tokenizer}.json").write_bytes(data)
        texts.append(
            TextInput(
                component=cast(ComponentName, text.component),
                tokenizer=f"{text.tokenizer}.json",
                max_length=plan.sizes["text_length"],
                pad_token_id=pad,
                outputs=dict(text.outputs),
            )
        )
    return tuple(texts)
