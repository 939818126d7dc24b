"""A captured program for a closed family: what depends on texts alone is a table, in place of what computes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from slipcast.bundle.manifest import Component
from slipcast.bundle.program import Program, ProgramCall, TextArgument, Variant
from slipcast.bundle.reader import ProgramBundle, open_any_bundle
from slipcast.bundle.sources import ClosedTexts, ImageSource, NoiseSource, PromptSource, TableSource
from slipcast.progress import Advance
from slipcast.run.calls import Calls
from slipcast.run.load import load
from slipcast.run.program_request import check_program_request
from slipcast.run.residency import InUse
from slipcast.run.values import Values, dependence
from slipcast.run.variants import Ready, read_variants

PROMPT, PROMPT_TABLE = "prompt", "prompts.safetensors"


def close(record: Program, prompts: Sequence[str], contracts: Mapping[str, Component]) -> Program:
    """The program that reads the table of `tabulate`; `contracts`: of its components, as it is. Texts besides the
    prompt are fixed at what they are where a run gives none."""
    usual = {name: each.default for name, each in record.arguments.items() if each.default is not None}
    first, *others = (
        {**_close(variant, place, contracts), "fixed": variant.fixed | usual}
        for place, variant in enumerate(record.every)
    )
    rest = [variant.model_copy(update=each) for variant, each in zip(record.variants, others, strict=True)]
    closed = ClosedTexts(table=PROMPT_TABLE, prompts=tuple(prompts))
    changed = {"arguments": {PROMPT: TextArgument()}, "closed": closed, "variants": tuple(rest)}
    return Program.model_validate_json(record.model_copy(update={**first, **changed}).model_dump_json())


def tabulate(root: Path, target: str, prompts: Sequence[str], out: Path, advance: Advance) -> None:
    """Write what the bundle at `root` computes of each prompt alone, and reads after that, to out/PROMPT_TABLE.

    All prompts go through one component after the other. Runs in a process of its own.
    """
    bundle, found = open_any_bundle(root), dict[str, Any]()
    assert isinstance(bundle, ProgramBundle)
    request = check_program_request(
        bundle.manifest.program, {PROMPT: list(prompts)}, seed=0, num_images_per_prompt=1, output_type="np",
        on_long_prompt="warn",
    )  # fmt: skip
    with load(root, target=target, residency="sequential") as pipe, InUse(pipe.residency) as engines:
        for place, ready in enumerate(read_variants(bundle)):
            values = of_texts(ready, request.texts, engines, advance)
            for value, argument in _tabled(ready.variant).items():
                source = _source(value, argument, place, "float32", ())
                for image in range(len(prompts) if argument else 1):
                    found[source.name_at(image)] = np.ascontiguousarray(values.get(value, image))
    save_file(found, out / PROMPT_TABLE)


def of_texts(
    ready: Ready, texts: list[dict[str, str]], engines: InUse, advance: Advance, until: str | None = None
) -> Values:  # fmt: skip
    """What a variant computes of these texts alone; `until`: no more than this component, whose engines stay open."""
    variant, early = ready.variant, _early(ready.variant)
    values, tokens = Values(variant, ready.depends, texts, range(len(texts))), ready.texts(texts, "warn")
    for source in (each for each in variant.sources if isinstance(each, PromptSource)):
        for image in values.images(source.value):
            text = texts[image][source.argument] if source.argument else ""
            values.put(source.value, image, tokens[source.value][text])
    calls = Calls(values, ready.depends, engines, {})
    for place, call in enumerate(variant.calls):
        advance(place, len(variant.calls))
        if _is_early(call, early):
            calls(call, ready.rows[place], f"call {place + 1} of {len(variant.calls)}")
            if call.component == until:
                return values
            if ready.last_call[call.component] == place and not until:
                engines.done(call.component)
    return values


def _early(variant: Variant) -> set[str]:
    """Values that texts alone decide, and neither noise nor pictures."""
    late = {source.value for source in variant.sources if isinstance(source, NoiseSource | ImageSource)}
    early = {source.value for source in variant.sources} - late
    for call in variant.calls:
        if call.inputs and early.issuperset(call.inputs.values()):
            early.update(call.outputs.values())
    return early


def early_calls(variant: Variant) -> list[ProgramCall]:
    """The calls that texts alone decide."""
    early = _early(variant)
    return [call for call in variant.calls if _is_early(call, early)]


def _is_early(call: ProgramCall, early: set[str]) -> bool:
    return early.issuperset(call.outputs.values())


def _tabled(variant: Variant) -> dict[str, str | None]:
    """Early values that what is late reads, with the argument that they depend on."""
    early, depends = _early(variant), dependence(variant)
    calls = [
        *(call for call in variant.calls if not _is_early(call, early)),
        *((*variant.loop.calls, *variant.loop.unguided) if variant.loop else ()),
    ]
    read = [value for call in calls for value in call.inputs.values()]
    read += variant.given
    return {value: PROMPT if PROMPT in depends[value] else None for value in dict.fromkeys(read) if value in early}


def _close(variant: Variant, place: int, contracts: Mapping[str, Component]) -> dict[str, Any]:
    """Its sources, calls, steps and loop without what is tabled."""
    early = _early(variant)
    known: dict[str, tuple[str, tuple[int | str, ...]]] = {s.value: (s.dtype, s.shape) for s in variant.sources}
    for call in variant.calls:
        outputs = {spec.name: spec for spec in contracts[call.component].outputs}
        known |= {value: (outputs[name].dtype, outputs[name].shape) for name, value in call.outputs.items()}
    tabled = [_source(value, argument, place, *known[value]) for value, argument in _tabled(variant).items()]
    kept = [at for at, call in enumerate(variant.calls) if not _is_early(call, early)]
    loop = variant.loop
    return {
        "sources": (*tabled, *(source for source in variant.sources if not isinstance(source, PromptSource))),
        "calls": tuple(variant.calls[at] for at in kept),
        "steps": tuple(kept.index(step) for step in variant.steps),
        "loop": loop and loop.model_copy(update={"at": sum(at < loop.at for at in kept)}),
        "lengths": {},
    }


def _source(value: str, argument: str | None, place: int, dtype: Any, shape: tuple[int | str, ...]) -> TableSource:
    return TableSource(value=value, argument=argument, tensor=f"{place}.{value}", dtype=dtype, shape=shape)
