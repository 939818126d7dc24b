"""What the compile of a captured pipeline will do, before it does it: any pipeline, with no code for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from slipcast.bundle.program import NUMBERS
from slipcast.bundle.sampling import Sampling
from slipcast.errors import RecipeError
from slipcast.run.residency import Policy
from slipcast.timing.memory import available_mb
from slipcast_compiler.capture.arguments import describe_arguments
from slipcast_compiler.capture.blocks import parameters_of
from slipcast_compiler.capture.call import make_call, pictures_from
from slipcast_compiler.capture.find import Found, Wanted, find_each
from slipcast_compiler.capture.fitting import with_pictures
from slipcast_compiler.capture.given import given_to
from slipcast_compiler.capture.listed import combinations
from slipcast_compiler.capture.lora import with_adapters
from slipcast_compiler.capture.parts import denoisers_of, describe_parts, live_bytes
from slipcast_compiler.capture.program import Ref
from slipcast_compiler.capture.record import capture, find_scheduler
from slipcast_compiler.capture.summary import describe_layers, module_of, summarise
from slipcast_compiler.estimate_program import (
    Needs,
    Specialised,
    add_rewriting,
    check_rewriting_fits,
    choose_policies,
    choose_precision,
    estimate,
)
from slipcast_compiler.export.program import check_program
from slipcast_compiler.export.streamed import open_streamed
from slipcast_compiler.judge.asked import Asked, Calls
from slipcast_compiler.judge.elsewhere import OriginalsRecord, read_record
from slipcast_compiler.judge.judges import check_judges
from slipcast_compiler.model.checkpoint import Checkpoint, locate
from slipcast_compiler.model.digests import digest, digests
from slipcast_compiler.model.links import plainly_named
from slipcast_compiler.model.original import Images, Precision, calibration_images
from slipcast_compiler.passes.apply import needs_profile
from slipcast_compiler.passes.known import Known, check_calibration, check_passes, describe_passes, known_layers
from slipcast_compiler.passes.program import ProgramTask, recovering_bytes
from slipcast_compiler.passes.recover import check_split
from slipcast_compiler.plan import check_guard, check_targets, guarded_prompts
from slipcast_compiler.plan_checks import check_adapters, check_guarded, check_sources, check_tables
from slipcast_compiler.plan_steps import Steps
from slipcast_compiler.profile.profile import MIN_SAMPLES, calibration_prompts, count_samples
from slipcast_compiler.profile.program import ProgramCalibration, measuring_bytes
from slipcast_compiler.recipe.family import Family, expand
from slipcast_compiler.recipe.recipe import Recipe
from slipcast_compiler.recipe.search import PROFILED, SHARE, SearchTable
from slipcast_compiler.recipe.targets import QUANTIZED, check_one_image
from slipcast_compiler.schedule.skips import check_skips


@dataclass(frozen=True)
class ProgramPlan:
    """A recipe for a pipeline that is captured, with paths relative to `folder`.

    `call`: its arguments, with the number of steps in any case; `calls`: the combinations of what it lists, of which
    the first is the default; `summary`: what `slipcast capture` says of that one; `parts`: those of the bundle, as
    PartRecord has them; `asked`: what the bundle is judged on; `precision`: in what the pipeline itself draws that
    here, if it does; `whole`: the program is compared with it with all weights; `drawn`: what another machine drew, in
    its place; `policies`: by target, how its engines stay loaded where it is judged; `arguments`: those of a run, see
    describe_arguments; `samplings`: by call, what the recipe asks for in place of the pipeline's own `steps`; `known`:
    by denoiser, what passes can rewrite, where any is on or may be turned on by a search, which `profilable` says;
    `cacheable`: it may turn feature caching on; `wanted`: what else is captured.
    """

    recipe: Recipe
    folder: Path
    checkpoint: Checkpoint
    call: Mapping[str, Any]
    calls: Calls
    family: Family | None
    summary: Mapping[str, Any]
    parts: Mapping[str, Any]
    needs: Needs
    asked: Asked
    precision: Precision | None
    whole: bool
    drawn: OriginalsRecord | None
    policies: Mapping[str, Policy]
    arguments: Mapping[str, Any]
    steps: Steps
    samplings: tuple[Sampling, ...]
    known: Known
    profilable: bool
    cacheable: bool
    wanted: Wanted

    @property
    def captions(self) -> tuple[str, ...]:
        """The family's prompts, for retrieval."""
        return self.family.calibration + self.family.held_out if self.family else ()

    @property
    def closed_prompts(self) -> tuple[str, ...]:
        """All prompts that the bundle takes; none of an open family, which takes any."""
        if not (self.family and self.family.closed):
            return ()
        return tuple(dict.fromkeys((*self.family.calibration, *self.family.held_out)))

    @property
    def guarded_prompts(self) -> tuple[str, ...]:
        """As Plan's."""
        return guarded_prompts(self.family)

    def given(self, source: str) -> dict[str, Any]:
        """What the pipeline is, for the cache's keys; `source`: the digest of its files."""
        files = digests(self.call)
        return {"source": source, "pipeline": self.recipe.model.pipeline, "calls": self.calls, "files": files}

    @property
    def profiling(self) -> ProgramCalibration:
        """What the denoisers are measured on."""
        prompts, seeds = calibration_prompts(self.family, self.recipe.profile)
        root, pipeline = self.checkpoint.root, self.recipe.model.pipeline
        return ProgramCalibration(root, pipeline, self.calls, tuple(self.known), prompts, seeds)

    def tasks(self, source: str) -> tuple[ProgramTask, ...]:
        """What passes rewrite; `source`: as in given."""
        given, target = self.given(source), self.recipe.targets[0]
        return tuple(ProgramTask(self.profiling, name, target, given, self.known) for name in self.known)

    def calibration(self, count: int) -> Images:
        """So many images of calibration prompts."""
        return calibration_images(self.family.calibration if self.family else (None,), count)

    @property
    def told(self) -> dict[str, Any]:
        """What a dry run says; plain JSON."""
        family = self.family
        return {
            "name": self.recipe.name,
            "model": self.checkpoint.name,
            "family": family and {"calibration": len(family.calibration), "held_out": len(family.held_out)},
            "judged_on": len(self.asked.drawing(None).prompts),
            "out_of_family": len(self.asked.strangers),
            "call": dict(self.call),
            "variants": len(self.calls),
            "parts": dict(self.parts),
            "arguments": dict(self.arguments),
            "refused": None,
            "passes": describe_passes(self.recipe.passes, self.known),
            "sampling": self.samplings[0].model_dump(mode="json", exclude_none=True) if self.samplings else None,
            "targets": [table.name for table in self.recipe.targets],
            "original_precision": self.drawn.precision if self.drawn else self.precision,
            "original_machine": self.drawn and self.drawn.machine,
            "disk_bytes": dict(self.needs.disk),
            "memory_bytes": self.needs.memory(self.precision, self.policies),
            "in_turn": [name for name, policy in self.policies.items() if policy == "sequential"],
            **self.summary,
        }


def make_program_plan(recipe: Recipe, folder: Path, profiled: bool = False) -> ProgramPlan:
    """Capture the pipeline of a recipe, without reading its weights (seconds for each combination of what it lists).
    `profiled`: whether its denoisers are to be measured in any case.

    RecipeError for what a program, or a runtime, cannot do; HostError where an engine is not installed; ArtifactError
    where weights do not go with their config; ResourceError where this machine has too little memory.
    """
    for target in recipe.targets:
        check_one_image(target)
    check_targets(recipe.targets)
    checkpoint, pipe, call, calls = open_call(recipe, folder)
    wanted = Wanted(_may_leave_guidance(recipe, len(calls)))
    if "decode" in recipe.model_fields_set:
        wanted = replace(wanted, tile=recipe.decode.tile, overlap=recipe.decode.overlap)
    variants = find_each(pipe, calls, wanted)
    check_program(variants, pipe)
    check_sources(variants[0], checkpoint.name, recipe)
    family = expand(recipe.family, recipe.name, folder) if recipe.family else None
    summary = summarise(variants[0].program, pipe)
    parts, arguments = describe_parts(variants, pipe), describe_arguments(pipe, variants, calls)
    modules = [each for each in pipe.components.values() if isinstance(each, nn.Module)]
    together = [[part.name for part in found.cut.parts] for found in variants]
    closed, available = bool(family and family.closed), available_mb() * 1e6
    specialised = _specialised(recipe) if recipe.guard and recipe.guard.policy == "fallback" else None
    needs = estimate(
        modules, parts, together, live_bytes(variants), recipe.targets, recipe.int4_options, closed, specialised
    )
    table = recipe.evaluate
    precision = None if table.original or table.originals else choose_precision(needs.original, available)
    whole = not table.original and needs.original["fp32"] <= available
    policies = choose_policies(needs, available)
    known: Known = {}
    profilable = _may_rewrite(recipe, variants, calls, family)
    if profilable:
        turnable, needed = _plan_passes(recipe, variants, pipe, calls, family, needs, True)
        if profilable := needed.rewriting <= available:  # else a search does without
            known, needs = turnable, needed
    if not profilable and (profiled or recipe.passes.chosen()):
        known, needs = _plan_passes(recipe, variants, pipe, calls, family, needs, profiled)
        check_rewriting_fits(needs, available)
    if known:
        for name in known.keys() & summary["components"].keys():
            summary["components"][name]["layers"] = describe_layers(known[name])
    steps = _steps(variants, pipe, checkpoint)
    samplings = steps.samplings(recipe)
    if recipe.caching:  # captured again, as all that components do inside is not kept of captures that are made one
        check_skips(capture(pipe, variants[0].call), recipe.caching.share)
    cacheable = recipe.search is not None and _is_cacheable(
        recipe.search, variants, pipe, recipe.sampling.guidance_interval
    )
    if recipe.guard:
        check_guard(recipe.guard, guarded_prompts(family))
        check_guarded(recipe.guard, variants, recipe.adapters)
    if recipe.adapters:
        check_adapters(recipe.adapters, variants, pipe)
    sizes = None if arguments["gives"] in NUMBERS else _sizes(variants)
    strangers = check_judges(table, family, sizes, folder)
    if sizes is None and recipe.gate.ssim is not None:
        raise RecipeError(
            "gate.ssim is for pictures, and this pipeline gives none", expected="gate.psnr, which alone is run",
            got=recipe.gate.ssim,
        )  # fmt: skip
    asked = Asked(checkpoint.root, recipe.model.pipeline, calls, family, strangers, table)
    drawn = None
    if table.originals:
        drawn = read_record(folder / table.originals, asked, digest(checkpoint.root, recipe.model.pipeline))
    return ProgramPlan(
        recipe, folder, checkpoint, call, calls, family, summary, parts, needs, asked, precision, whole, drawn,
        policies, arguments, steps, samplings, known, profilable,
        cacheable, wanted,
    )  # fmt: skip


def replan_program(plan: ProgramPlan, recipe: Recipe) -> ProgramPlan:
    """The plan of a recipe that differs in sampling, timesteps, caching, passes and precisions alone; RecipeError where
    they contradict."""
    check_passes(recipe.passes, plan.known)
    return replace(plan, recipe=recipe, samplings=plan.steps.samplings(recipe))


def open_call(recipe: Recipe, folder: Path) -> tuple[Checkpoint, Any, dict[str, Any], Calls]:
    """The checkpoint of a recipe, its pipeline without weights, the call, and the combinations of what that lists.

    RecipeError for what a recipe of a captured pipeline cannot say.
    """
    check_tables(recipe)
    found, name = locate(recipe.model, folder)
    root = plainly_named(found, recipe.model.variant)
    if recipe.lora:
        root, name = with_adapters(recipe, folder, found, name)
    pipe = open_streamed(root, recipe.model.pipeline).pipe
    call = pictures_from(pipe, _with_steps(pipe, recipe.call), folder)
    return Checkpoint(root, name), pipe, call, combinations(pipe, call)


def _plan_passes(
    recipe: Recipe, variants: Sequence[Found], pipe: Any, calls: Sequence[Mapping[str, Any]], family: Family | None,
    needs: Needs, profiled: bool,
) -> tuple[Known, Needs]:  # fmt: skip
    """By denoiser, what passes can rewrite, and what that takes; RecipeError where one that is on could do nothing."""
    names = denoisers_of(variants)
    if not names:
        raise RecipeError(
            f"{variants[0].program.pipeline} calls no module in a loop of its scheduler's steps: there is no denoiser",
            expected="a recipe without passes",
            got=", ".join(name for name, _ in recipe.passes.chosen()) or "a profile",
        )
    given = given_to(pipe, make_call(pipe, with_pictures(pipe, calls[0])), names)
    modules = {name: module_of(pipe, name) for name in names if name in given}
    known = {name: known_layers(module, given[name]) for name, module in modules.items()}
    check_passes(recipe.passes, known)
    prompts, seeds = calibration_prompts(family, recipe.profile)
    measuring = []
    if profiled or needs_profile(recipe.passes):
        check_calibration(prompts, len(calls))
        measuring += [sum(measuring_bytes(module, given[name], recipe.profile) for name, module in modules.items())]
    if recipe.passes.recover:
        images = tuple(zip(prompts, seeds, strict=True))
        check_split(images, len(calls))
        steps = max(len(found.program.marks) for found in variants)
        measuring += [recovering_bytes(module, given[name], len(images), steps) for name, module in modules.items()]
    return known, add_rewriting(needs, modules.values(), measuring)


def _specialised(recipe: Recipe) -> Specialised | None:
    """In what denoisers are others for the family than they were, or may be once a search is over."""
    if recipe.passes.chosen() or recipe.search:
        return "rewritten"
    return "quantized" if any(table.precision in QUANTIZED for table in recipe.targets) else None


def _may_rewrite(
    recipe: Recipe, variants: Sequence[Found], calls: Sequence[Mapping[str, Any]], family: Family | None
) -> bool:
    """Whether a search may turn passes on, for which there are a denoiser and prompts enough."""
    search, prompts = recipe.search, calibration_prompts(family, recipe.profile)[0]
    if search is None or (search.levers and not PROFILED & set(search.levers)):
        return False
    return bool(denoisers_of(variants)) and count_samples(prompts) >= MIN_SAMPLES and len(prompts) >= len(calls)


def _may_leave_guidance(recipe: Recipe, calls: int) -> bool:
    """Whether some steps may be taken without guidance; RecipeError where they may not, and are to be."""
    search, asked = recipe.search, recipe.sampling.guidance_interval is not None
    if asked and calls > 1:
        raise RecipeError(
            "sampling.guidance_interval is for one combination of what call lists",
            expected="no lists under [call], or no guidance_interval", got=f"{calls} combinations",
        )  # fmt: skip
    usual = search is not None and not search.levers and search.objective == "latency"
    searched = usual or (search is not None and "guidance_interval" in search.levers)
    return asked or (searched and calls == 1 and not (recipe.timesteps or recipe.caching or recipe.adapters))


def _is_cacheable(search: SearchTable, variants: Sequence[Found], pipe: Any, interval: Any) -> bool:
    """Whether a search may turn feature caching on."""
    if (search.levers and "caching" not in search.levers) or len(variants) > 1 or not variants[0].loop or interval:
        return False
    try:
        check_skips(capture(pipe, variants[0].call), SHARE)
    except RecipeError:
        return False
    return True


def _steps(variants: Sequence[Found], pipe: Any, checkpoint: Checkpoint) -> Steps:
    config = checkpoint.root / "scheduler" / "scheduler_config.json"
    few_step = checkpoint.few_step_sampler if config.is_file() else None
    return Steps(tuple(variants), find_scheduler(pipe), few_step)


def _with_steps(pipe: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The call with the pipeline's own number of steps, where none is given: a capture alone is content with fewer."""
    parameter = parameters_of(pipe).get("num_inference_steps")
    usual = {"num_inference_steps": parameter.default} if parameter and isinstance(parameter.default, int) else {}
    return {**usual, **given}


def _sizes(variants: Sequence[Found]) -> list[tuple[int, int]]:
    """(width, height) of the pictures that are known to have one."""
    results = [(found.program, value) for found in variants for _, value in found.program.results]
    shapes = [program.specs[value.id][0] for program, value in results if isinstance(value, Ref)]
    return [(width, height) for *_, height, width in shapes if isinstance(height, int) and isinstance(width, int)]
