"""A search over the recipe of a captured pipeline: see subject.Subject.

The graphs are those that its compile would make, from the same cache: what is chosen is not made again.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from slipcast.bundle.manifest import MANIFEST_NAME, read_any_manifest
from slipcast.bundle.program import Program
from slipcast.bundle.program_manifest import ProgramManifest
from slipcast.bundle.reader import ProgramBundle
from slipcast.engines import Instrument
from slipcast.errors import RecipeError, ResourceError
from slipcast.progress import SilentStages, Stages
from slipcast.run.program import ProgramPipeline
from slipcast.timing.memory import available_mb
from slipcast_compiler.capture.parts import denoisers_of
from slipcast_compiler.engines.programs import ProgramGraphs, write_bundle
from slipcast_compiler.graphs_program import export_program, make_profiles, record_inputs, specialise
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.judge.asked import in_turns
from slipcast_compiler.judge.captured import Floats, PipelineDrawing, draw_originals
from slipcast_compiler.judge.judges import open_judges
from slipcast_compiler.judge.metrics import Samples
from slipcast_compiler.judge.programs import ResultReference, arguments_of, pool
from slipcast_compiler.model.original import Prompts
from slipcast_compiler.passes.known import units_of
from slipcast_compiler.plan_program import ProgramPlan, replan_program
from slipcast_compiler.precision.programs import measure_program_casts
from slipcast_compiler.recipe.search import PROFILED
from slipcast_compiler.recipe.seeds import SEARCH
from slipcast_compiler.recipe.targets import TargetTable
from slipcast_compiler.search.measuring import Image
from slipcast_compiler.search.space import Space
from slipcast_compiler.search.subject import Drawn, Facts, Overrides, measured_table, split_prompts, trial_of, turned

SETS = 3  # of engines, in memory at once
PASSES = {"heads": "prune_heads", "ffn": "prune_ffn", "low_rank": "low_rank"}  # by lever


@dataclass(frozen=True)
class ProgramVariant:
    """See measuring.Variant."""

    folder: Path
    program: Program

    def open(self, instrument: Instrument) -> ProgramPipeline:
        """With its program in place of the manifest's."""
        manifest = read_any_manifest((self.folder / MANIFEST_NAME).read_bytes())
        assert isinstance(manifest, ProgramManifest)
        bundle = ProgramBundle(self.folder, manifest.model_copy(update={"program": self.program}))
        return ProgramPipeline(bundle, manifest.targets[0], instrument=instrument)


@dataclass(frozen=True)
class ProgramCandidate:
    """See subject.Candidate."""

    graphs: ProgramGraphs
    table: TargetTable

    @property
    def key(self) -> str:
        """See Candidate."""
        sources = self.graphs.sources(self.table.precision).components
        identities = {name: source.identity for name, source in sources.items()}
        casts = {name: list(each["fp32"]) for name, each in self.graphs.casts.get(self.table.name, {}).items()}
        return json.dumps([identities, casts, self.table.model_dump(mode="json")], sort_keys=True)

    def build(self, folder: Path, cache: Cache) -> str:
        """See Candidate."""
        folder.mkdir()
        about = {"name": "trial", "base_model": "trial", "source_sha256": "0" * 64, "family": None}
        made = write_bundle(self.graphs, (self.table,), about, folder, cache, SilentStages())
        target: str = made["targets"][0].id
        return target

    def variant(self, folder: Path) -> ProgramVariant:
        """See Candidate."""
        return ProgramVariant(folder, self.graphs.record)


@dataclass
class Captured:
    """See subject.Subject. `source`: the digest of the checkpoint's files."""

    plan: ProgramPlan
    source: str
    _given: list[dict[str, Any]] = field(default_factory=list)  # by variant, what calls take besides a text

    @property
    def facts(self) -> Facts:
        """See Facts."""
        plan = self.plan
        own = plan.steps.own
        counts = {lever: units_of(name, plan.known) for lever, name in PASSES.items()}
        return Facts(
            recipe=plan.recipe,
            sampling=plan.samplings[0] if plan.samplings else own,
            reference=own,
            few_step=plan.steps.few_step is not None,
            prompts=len(plan.family.calibration) if plan.family else None,
            rewritable=[lever for lever in PROFILED if plan.profilable and any(counts[lever].values())],
            guided=all(found.loop and found.loop.unguided for found in plan.steps.variants),
            cacheable=plan.cacheable,
            denoiser_parameters=sum(
                plan.summary["components"][name]["parameters"] for name in denoisers_of(plan.steps.variants)
            ),
        )

    def pins(self, engine: bool) -> Overrides:
        """The trajectories that quantisation and half precision are measured on: the same for all points."""
        recipe = self.plan.recipe
        measured = engine or recipe.samples_needed or any(table.half for table in recipe.targets)
        return {"profile.sampling": "reference"} if measured and recipe.profile.sampling != "reference" else {}

    def settle(self, overrides: Overrides) -> Overrides:
        """See Subject: an interval that leaves out none of the steps, or does not go with another lever, is none."""
        rest = {key: value for key, value in overrides.items() if key != "sampling.guidance_interval"}
        if rest == overrides:
            return overrides
        try:
            self.apply(overrides)
        except RecipeError:
            return rest
        return overrides

    def decides(self) -> dict[str, Any]:
        """See Subject."""
        family = self.plan.family
        found = {"family": family and family.hash, "original": self.plan.precision, "wanted": asdict(self.plan.wanted)}
        return {**self.plan.given(self.source), **found}

    def profile(self, overrides: Overrides, cache: Cache, stages: Stages) -> None:
        """See Subject."""
        make_profiles(self.apply(overrides), self.source, cache, stages)

    def draw(self, overrides: Overrides, cache: Cache, stages: Stages) -> Drawn:
        """See Subject."""
        base = self.trial(overrides)
        table, family, count = base.recipe.evaluate, base.family, len(base.calls)
        proxies, judged = (in_turns(prompts, count) for prompts in split_prompts(family, table.images))
        seeds = SEARCH.take(len(proxies) + len(judged))
        with stages.stage("search: the original") as advance:
            results, pictures = (
                draw_originals(self._drawing(base, prompts, own), None, base.given(self.source), cache, advance)
                for prompts, own in ((proxies, seeds[: len(proxies)]), (judged, seeds[len(proxies) :]))
            )
        record = export_program(base, self.source, cache, stages).graphs.record
        self._given = arguments_of(record, results)
        judges = open_judges(table, base.folder, base.captions)
        references = [ResultReference(each, record.output, judges.reference) for each in pictures.variants]

        def samples(found: list[Floats]) -> Samples:
            return pool([of.sample(np.stack(found[place::count])) for place, of in enumerate(references)])

        laid = [variant.laid(record.output) for variant in results.variants]
        shown = tuple(laid[place % count][place // count] for place in range(len(proxies)))
        return Drawn(self._images(proxies, seeds), shown, self._images(judged, seeds[len(proxies) :]), samples)

    def candidate(self, overrides: Overrides, cache: Cache) -> ProgramCandidate:
        """See Subject."""
        plan = self.trial(overrides)
        exported = export_program(plan, self.source, cache, SilentStages())
        made = specialise(plan, exported, self._given, cache, SilentStages())
        graphs, table = made.graphs, measured_table(plan.recipe)
        if table.half:  # what it would spoil stays in fp32, as in the compile
            inputs = made.inputs or record_inputs(plan, graphs, self._given, cache, SilentStages())
            casts = measure_program_casts(graphs, inputs, (table,), cache, SilentStages())
            graphs = replace(graphs, casts=casts.found)
        return ProgramCandidate(graphs, table)

    def apply(self, overrides: Overrides) -> ProgramPlan:
        """See Subject."""
        return replan_program(self.plan, turned(self.plan.recipe, overrides))

    def trial(self, overrides: Overrides) -> ProgramPlan:
        """The same for measuring: see subject.trial_of."""
        return replan_program(self.plan, trial_of(turned(self.plan.recipe, overrides)))

    def _drawing(self, plan: ProgramPlan, prompts: Prompts, seeds: tuple[int, ...]) -> PipelineDrawing:
        root, pipeline = plan.checkpoint.root, plan.recipe.model.pipeline
        return PipelineDrawing(root, pipeline, plan.calls, prompts, seeds, plan.precision)

    def _images(self, prompts: Prompts, seeds: tuple[int, ...]) -> tuple[Image, ...]:
        """Of the variants in turns."""
        turns = zip(prompts, seeds, cycle(self._given), strict=False)
        return tuple(Image(prompt, seed, given) for prompt, seed, given in turns)


def program_space(plan: ProgramPlan) -> Space:
    """What a search may turn; RecipeError where it has nothing to choose from, or where it cannot be."""
    table = measured_table(plan.recipe)
    if plan.recipe.evaluate.originals:
        raise RecipeError(
            "[search] draws calibration prompts by the pipeline itself, and evaluate.originals are of held-out ones",
            expected="a machine that can draw them, and no evaluate.originals", got=plan.recipe.evaluate.originals,
        )  # fmt: skip
    taken, available = SETS * plan.needs.targets.get(table.name, {"all": 0})["all"], available_mb() * 1e6
    if plan.policies.get(table.name, "all") != "all" or taken > available:
        raise ResourceError(
            f"[search] has the engines of target {table.name} in memory up to {SETS} times: the recipe's own, those of "
            "a trial, and those whose memory is measured",
            expected=f"about {taken / 1e9:.1f} GB", got=f"{available / 1e9:.1f} GB available",
            hint="leave [search] out, or search on a machine that has it",
        )  # fmt: skip
    return Space(Captured(plan, ""))
