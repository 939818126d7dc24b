"""A search over the recipe of a described model: see subject.Subject.

The graphs are those that a compile would make, from the same cache: what is chosen is not made again.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slipcast.bundle.manifest import MANIFEST_NAME, Caching, Sampling, read_manifest
from slipcast.bundle.reader import Bundle
from slipcast.engines import Instrument
from slipcast.progress import SilentStages, Stages
from slipcast.run.pipeline import Pipeline
from slipcast_compiler.engines.contents import write_bundle
from slipcast_compiler.export.graphs import Graphs
from slipcast_compiler.export.parts import write_step_table
from slipcast_compiler.graphs import make_graphs
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.judge.judges import open_judges
from slipcast_compiler.judge.originals import draw_original
from slipcast_compiler.model.original import Drawing, Prompts
from slipcast_compiler.plan import Plan, replan
from slipcast_compiler.profile.profile import make_profile
from slipcast_compiler.recipe.search import PROFILED
from slipcast_compiler.recipe.seeds import SEARCH
from slipcast_compiler.recipe.targets import TargetTable
from slipcast_compiler.search.measuring import Image
from slipcast_compiler.search.subject import (
    Drawn,
    Facts,
    Overrides,
    measured_table,
    split_prompts,
    trial_of,
    turned,
)


@dataclass(frozen=True)
class GraphsVariant:
    """See measuring.Variant. `step`: where the denoiser's step graph is, with which a table is made for the schedule;
    None where it was not cut. `caching`: with a shallow denoiser, the steps that it is for."""

    folder: Path
    sampling: Sampling
    step: Path | None
    caching: Caching | None = None

    def open(self, instrument: Instrument) -> Pipeline:
        """With its sampling in place of the manifest's."""
        # Ours, and just made; only its step table is written again and again.
        manifest = read_manifest((self.folder / MANIFEST_NAME).read_bytes())
        others = [name for name in manifest.requires if not name.startswith("guidance")]
        fields: dict[str, Any] = {
            "sampling": self.sampling, "requires": (*others, *self.sampling.requires), "caching": self.caching,
        }  # fmt: skip
        if self.step:
            fields["cut"] = write_step_table(self.step, self.sampling, self.folder)
        bundle = Bundle(self.folder, manifest.model_copy(update=fields))
        return Pipeline(bundle, manifest.targets[0], instrument=instrument)


@dataclass(frozen=True)
class GraphsCandidate:
    """See subject.Candidate."""

    graphs: Graphs
    table: TargetTable

    @property
    def key(self) -> str:
        """See Candidate."""
        components = {name: folder.name for name, folder in self.graphs.components.items()}
        quantized = {
            precision: {name: each.folder.name for name, each in made.items()}
            for precision, made in self.graphs.quantized.items()
        }
        return json.dumps([components, quantized, self.table.model_dump(mode="json")], sort_keys=True)

    def build(self, folder: Path, cache: Cache) -> str:
        """See Candidate."""
        folder.mkdir()
        return write_bundle(self.graphs, self.table, folder, cache).id

    def variant(self, folder: Path) -> GraphsVariant:
        """See Candidate."""
        return GraphsVariant(folder, self.graphs.sampling, self.graphs.step, self.graphs.caching)


@dataclass(frozen=True)
class Described:
    """See subject.Subject."""

    plan: Plan

    @property
    def facts(self) -> Facts:
        """See Facts."""
        plan, checkpoint = self.plan, self.plan.checkpoint
        weights = checkpoint.weights(checkpoint.architecture.components["denoiser"].folder)
        return Facts(
            recipe=plan.recipe, sampling=plan.sampling, reference=plan.reference,
            few_step=checkpoint.few_step_sampler is not None,
            prompts=len(plan.family.calibration) if plan.family else None,
            rewritable=PROFILED, guided=plan.family is not None, cacheable=True,
            denoiser_parameters=sum(math.prod(weight.entry.shape) for weight in weights.values()),
        )  # fmt: skip

    def pins(self, engine: bool) -> Overrides:
        """The original, and the trajectories that are measured."""
        plan, given = self.plan, self.plan.recipe.reference.model_dump(exclude_none=True)
        whole = plan.reference.model_dump(mode="json", exclude_none=True)
        names = ("sampler", "schedule", "steps") if plan.reference.schedule else ("sampler", "timesteps", "sigmas")
        pins = {f"reference.{name}": whole[name] for name in names if name in whole and name not in given}
        measured = plan.recipe.passes.chosen() or plan.recipe.passes.quantize or engine
        if measured and plan.recipe.profile.sampling != "reference":
            pins["profile.sampling"] = "reference"
        return pins

    def settle(self, overrides: Overrides) -> Overrides:
        """See Subject: all levers have."""
        return overrides

    def decides(self) -> dict[str, Any]:
        """See Subject."""
        return {"checkpoint": self.plan.checkpoint.sha256, "family": self.plan.family and self.plan.family.hash}

    def profile(self, overrides: Overrides, cache: Cache, stages: Stages) -> None:
        """See Subject."""
        base = self.apply(overrides)
        with stages.stage("profile") as advance:
            make_profile(base.task.calibration, base.recipe.profile, base.recipe.name, cache, advance)

    def draw(self, overrides: Overrides, cache: Cache, stages: Stages) -> Drawn:
        """See Subject."""
        base = self.trial(overrides)
        drawings, family = drawings_of(base), base.family
        with stages.stage("search: the original") as advance:
            results, pictures = (draw_original(drawing, cache, advance) for drawing in drawings)
        judges = open_judges(base.recipe.evaluate, base.folder, family.calibration if family else ())
        reference = judges.reference(pictures, drawings[1].prompts)
        first, second = (_images(drawing.prompts, drawing.seeds) for drawing in drawings)
        return Drawn(first, tuple(results), second, lambda found: reference.sample(np.stack(found)))

    def candidate(self, overrides: Overrides, cache: Cache) -> GraphsCandidate:
        """See Subject."""
        return make_candidate(self.trial(overrides), cache)

    def apply(self, overrides: Overrides) -> Plan:
        """See Subject."""
        return replan(self.plan, turned(self.plan.recipe, overrides))

    def trial(self, overrides: Overrides) -> Plan:
        """The same for measuring: see subject.trial_of."""
        return replan(self.plan, trial_of(turned(self.plan.recipe, overrides)))


def drawings_of(plan: Plan) -> tuple[Drawing, Drawing]:
    """What the original draws: proxies, and what is judged."""
    proxies, judged = split_prompts(plan.family, plan.recipe.evaluate.images)
    seeds, count = SEARCH.take(len(proxies) + len(judged)), len(proxies)
    original, reference = plan.original, plan.reference
    return Drawing(original, reference, proxies, seeds[:count]), Drawing(original, reference, judged, seeds[count:])


def make_candidate(plan: Plan, cache: Cache) -> GraphsCandidate:
    """The graphs of a point's plan, for the first target that can run here."""
    return GraphsCandidate(make_graphs(plan, cache, SilentStages()), measured_table(plan.recipe))


def _images(prompts: Prompts, seeds: tuple[int, ...]) -> tuple[Image, ...]:
    return tuple(Image(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True))
