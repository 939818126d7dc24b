"""The study, from the recipe to the report. Everything is cached: a killed study goes on where it was."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from heads.cases import Case, Study
from heads.judge import Job, Profiles, Recovered, judge_all, time_images
from heads.page import render
from slipcast.bundle.validation import parse_json
from slipcast.errors import ArtifactError, RequestError
from slipcast.progress import Advance, Stages
from slipcast_compiler.host.cache import Cache, tool_versions
from slipcast_compiler.host.isolate import run_isolated
from slipcast_compiler.host.machine import load_average, this_machine
from slipcast_compiler.passes.apply import apply_passes
from slipcast_compiler.passes.recover import CHECKED, CHECKS, VALIDATION
from slipcast_compiler.profile.profile import Profile, make_profile
from slipcast_compiler.recipe.passes import PassesTable

SCHEMA = "slipcast-study/1"


def run_study(study: Study, path: Path, output: Path, cache: Cache, stages: Stages) -> dict[str, Any]:
    """Measure: the document, as `write` puts it into `output`, which is tried before anything is measured."""
    check_output(output)
    load_before = load_average()
    profiles: dict[tuple[str, int], Profile] = {}
    for (name, seed), plan in study.plans.items():
        with stages.stage(f"profile {name}, seed {seed}") as advance:
            profiles[name, seed] = make_profile(
                plan.task.calibration, plan.recipe.profile, plan.recipe.name, cache, advance
            )
    recovered = {case: recover(study, case, profiles, cache, stages) for case in study.cases if case.recovered}
    with stages.stage(f"{len(study.cases)} cases") as advance:
        job = Job(study, profiles, recovered, cache.root)
        found = run_isolated(judge_all, job, advance=_naming(study.cases, advance, stages))
    return {
        "schema": SCHEMA,
        "name": study.recipe.name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"python recipes/study/heads.py {_shown(path)} -o {_shown(output)}",
        "host": this_machine().model_dump() | {"load_before": load_before},
        "tools": tool_versions(),
        "model": {"name": study.plan.checkpoint.name, "sha256": study.plan.checkpoint.sha256},
        "sampling": study.plan.sampling.model_dump(mode="json", exclude={"noise"}, exclude_none=True),
        "image": "{}x{}".format(*study.plan.original.size),
        "recipe": study.recipe.model_dump(mode="json", exclude={"families", "generic", "paraphrases", "out_of_family"}),
        "families": {name: _family(study, name) for name in study.recipe.families},
        "sets": {name: list(prompts) for name, prompts in study.sets.items()},
        "stages_s": stages.seconds,
        "peak_memory_mb": round(found.peak_memory_mb, 1),
        **found.result,
    }


def recover(study: Study, case: Case, profiles: Profiles, cache: Cache, stages: Stages) -> Recovered:
    """The case's mask, and the denoiser distilled with it on the family's calibration prompts."""
    assert case.calibration
    assert study.recipe.recover
    stages.say(f"{case.title}: {case.ratio:.0%}")
    how = study.recipe.recover.model_dump(exclude={"ratios"})
    passes = PassesTable.model_validate({"prune_heads": case.options(study.recipe), "recover": how})
    key = case.calibration, case.seed
    done = apply_passes(passes, study.plans[key].task, profiles[key], cache, stages)
    return Recovered(done.rewrite, done.reports["prune_heads"]["layers"])


def estimate(study: Study) -> dict[str, Any]:
    """How much there is to do, and about how long it takes here, from the time of one batch of pictures."""
    recipe, steps = study.recipe, study.plan.sampling.steps
    images = sum(len(study.sets[name]) for case in study.cases for name in case.sets)
    images += len(recipe.seeds) * sum(map(len, study.sets.values()))
    recovered = sum(case.recovered for case in study.cases)
    summary = {
        "name": recipe.name,
        "cases": len(study.cases),
        "images": images,
        "profiles": len(study.plans),
        "recoveries": recovered,
    }
    seconds = run_isolated(time_images, study.plan).result
    heads, evaluation = _heads(study), seconds["image"] / steps
    profile = recipe.profile
    # Twice for what is observed; every state with each head left out; three evaluations' time for a gradient.
    evaluations = 2 * profile.prompts * profile.seeds * steps + profile.states * (heads + 3)
    distilled = 3 * recipe.recover.batch * recipe.recover.steps if recipe.recover else 0
    distilled += profile.prompts * steps + CHECKS * min(CHECKED, round(VALIDATION * profile.prompts) * steps)
    parts = {
        "profiles": len(study.plans) * (seconds["open"] + evaluation * evaluations),
        "recoveries": recovered * (seconds["open"] + evaluation * distilled),
        "images": images * seconds["image"],
    }
    return summary | {"seconds": {name: round(each) for name, each in parts.items()}}


def in_words(summary: Mapping[str, Any]) -> str:
    """An estimate in words."""
    seconds = summary["seconds"]
    parts = ", ".join(f"{name} {each / 60:.1f}" for name, each in seconds.items() if each)
    return (
        f"{summary['name']}: {summary['cases']} cases, {summary['images']} images, {summary['profiles']} profiles, "
        f"{summary['recoveries']} recoveries\nabout {sum(seconds.values()) / 60:.0f} minutes here, without what is "
        f"cached: {parts}"
    )


def read(file: Path) -> dict[str, Any]:
    """The document of a study that was made; ArtifactError where it is none."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read", expected="a study's JSON", got=error.strerror) from None
    document: dict[str, Any] = parse_json(data, str(file))
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        got = document.get("schema") if isinstance(document, dict) else type(document).__name__
        raise ArtifactError(f"{file}: not a study", expected=f"schema {SCHEMA}", got=got)
    return document


def write(document: Mapping[str, Any], output: Path) -> list[Path]:
    """NAME.json, and the report, which says nothing that is not in it."""
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = text.replace('{"criterion"', '\n{"criterion"') + "\n"  # a line for each case, which git can tell apart
    files = {f"{document['name']}.json": text, **render(document)}
    for name, content in files.items():
        _replace(output / name, content)
    return [output / name for name in files]


def check_output(output: Path) -> None:
    """Refuse before the work what could not be written after it."""
    nearest = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise RequestError(f"-o {output}: cannot be written", expected="a folder of yours", got=str(nearest))


def _replace(file: Path, content: str) -> None:
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=file.parent, delete=False) as made:
        made.write(content)
    os.chmod(made.name, 0o644)
    os.replace(made.name, file)


def _naming(cases: tuple[Case, ...], advance: Advance, stages: Stages) -> Advance:
    """Progress that also says which mask is being judged, whenever it is another."""
    shown: list[str] = []

    def report(done: int, total: int) -> None:
        advance(done, total)
        if done < total and (not shown or shown[-1] != cases[done].title):
            shown.append(cases[done].title)
            stages.say(f"  {shown[-1]}")

    return report


def _family(study: Study, name: str) -> dict[str, Any]:
    table = study.recipe.families[name]
    return {
        "templates": list(table.templates),
        "slots": {slot: list(values) for slot, values in table.slots.items()},
        "calibration": {
            str(seed): list(plan.family.calibration)
            for (of, seed), plan in study.plans.items()
            if of == name and plan.family
        },
    }


def _heads(study: Study) -> int:
    from slipcast_compiler.model.layers import attention_layers
    from slipcast_compiler.model.rewrite import UNCHANGED, Denoiser

    return sum(layer.heads for layer in attention_layers(Denoiser.of(study.plan.checkpoint, UNCHANGED).module))


def _shown(path: Path) -> str:
    """As it was given, without the folders of this machine."""
    return path.name if path.is_absolute() else path.as_posix()
