"""Passes on the denoisers of a captured pipeline: each is rewritten by itself, whatever calls it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import nn

from slipcast.errors import ArtifactError
from slipcast.progress import Stages
from slipcast_compiler.capture.call import make_call
from slipcast_compiler.capture.fitting import with_pictures
from slipcast_compiler.capture.given import Given, call_for_shapes, given_to, given_within
from slipcast_compiler.capture.open import open_with_weights
from slipcast_compiler.capture.program import leaves
from slipcast_compiler.capture.replay import find_module, modules_of
from slipcast_compiler.capture.summary import module_of
from slipcast_compiler.export.streamed import open_streamed
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.model.original import Image
from slipcast_compiler.model.rewrite import Denoiser, Rewrite, Rewrites
from slipcast_compiler.model.unread import Unread
from slipcast_compiler.passes.apply import Rewritten, apply_passes
from slipcast_compiler.passes.context import Points
from slipcast_compiler.passes.known import Known, own_passes
from slipcast_compiler.profile.measure import Progress
from slipcast_compiler.profile.profile import Profile
from slipcast_compiler.profile.program import FLOAT_BYTES, ProgramCalibration, programs_of
from slipcast_compiler.profile.states import Components, State, draw
from slipcast_compiler.recipe.passes import PassesTable
from slipcast_compiler.recipe.targets import TargetTable

COPIES = 6  # of a denoiser's weights, besides those that compute


@dataclass(frozen=True)
class ProgramTask:
    """A Task, of the module `name` of a pipeline, as the first of the calls calls it first. `calibration`: the images
    that it is measured on; `given`: what the pipeline is, for the cache's keys; `known`: by denoiser, what can be
    rewritten."""

    calibration: ProgramCalibration
    name: str
    target: TargetTable
    given: Mapping[str, Any]
    known: Known

    @property
    def identity(self) -> dict[str, Any]:
        """See Task."""
        layers = self.known[self.name]
        left = {**layers.unknown_attention, **layers.unknown_feed_forward}
        return {**self.given, "module": self.name, "left_alone": left}

    @property
    def sizes(self) -> dict[str, Any]:
        """See Task; they are those of the pipeline's call, which is in the identity."""
        return {}

    def denoiser(self, before: Rewrite) -> Denoiser:
        """See Task."""
        streamed, own = open_streamed(self.calibration.root, self.calibration.pipeline), f"{self.name}."
        weights = {
            key.removeprefix(own): _Weight(key, each) for key, each in streamed.weights.items() if key.startswith(own)
        }
        return Denoiser(module_of(streamed.pipe, self.name), weights, before, self.known[self.name])

    def evaluate(self, module: Any) -> None:
        """See Task."""
        pipe = open_streamed(self.calibration.root, self.calibration.pipeline).pipe
        call = make_call(pipe, with_pictures(pipe, self.calibration.calls[0]))
        call_for_shapes(module, given_to(pipe, call, (self.name,))[self.name])

    @property
    def images(self) -> tuple[Image, ...]:
        """See Task."""
        return tuple(zip(self.calibration.prompts, self.calibration.seeds, strict=True))

    @property
    def sampled(self) -> dict[str, Any]:
        """See Task; the pipeline samples as it does."""
        return {}

    def trajectories(
        self, denoiser: Denoiser, parts: Sequence[Sequence[Image]], progress: Progress
    ) -> tuple[nn.Module, list[Points]]:
        """See Task; other denoisers are the pipeline's own. CheckFailed where a step cannot be computed again."""
        pipe = open_with_weights(self.calibration.root, self.calibration.pipeline)
        modules = modules_of(pipe)
        for module in modules.values():
            module.requires_grad_(False)
        drawn = [self._draw(pipe, modules, part, progress) for part in parts]
        student = denoiser.load(find_module(modules, self.name))
        called = {name for states in drawn for state in states for name in state.evaluation.components}
        components = {name: modules[name] for name in sorted(called)}  # others need no memory any more
        return student, [DrawnStates(states, components) for states in drawn]

    def _draw(self, pipe: Any, components: Components, images: Sequence[Image], progress: Progress) -> list[State]:
        """Of every evaluation that calls the denoiser. Each image is drawn by the call that is its own."""
        places, drawn = {self.images.index(image) for image in images}, list[State]()
        for image, (program, evaluations) in enumerate(programs_of(pipe, self.calibration, places)):
            wanted = [each for each in evaluations if self.name in each.modules]
            if image == 0:
                progress.expect((len(evaluations) + 1) * len(images))
            states = draw(program, components, evaluations, wanted, lambda: progress.add(1))
            states[0].check(components)
            progress.add(1)
            drawn += states
        return drawn


def recovering_bytes(module: nn.Module, given: Given, images: int, steps: int) -> int:
    """About what distilling a denoiser that is called so takes, besides the pipeline itself: its weights as they were,
    at their best and now, gradients and their moments; what the gradients of one point are computed of, which is a half
    more than what its layers are given (saved tensors of a U-Net, counted; some pipelines keep more); and the points:
    at every step a latent and what became of it, of every image what it was given besides. No weight is read."""
    latent = call_for_shapes(module, given).numel()
    points: int = images * (
        2 * latent * steps + sum(x.numel() for _, x in leaves(given) if isinstance(x, torch.Tensor))
    )
    weights: int = sum(parameter.numel() for parameter in module.parameters())
    layers = [name for name, each in module.named_modules() if not next(each.children(), None)]
    inputs: int = sum(x.numel() for x in given_within(module, given, layers))
    return FLOAT_BYTES * (COPIES * weights + 2 * inputs + points)


@dataclass(frozen=True)
class DrawnStates:
    """Points (see context.py), of a student that is among the components."""

    states: Sequence[State]
    components: Components
    at_once: int = 1

    def __len__(self) -> int:
        return len(self.states)

    def found(self, chosen: torch.Tensor) -> torch.Tensor:
        """See Points."""
        return self.states[int(chosen)].predict(self.components)

    def wanted(self, chosen: torch.Tensor) -> torch.Tensor:
        """See Points."""
        return self.states[int(chosen)].found


@dataclass(frozen=True)
class _Weight:
    """A weight of a module, as passes read it; None where the checkpoint has none."""

    name: str
    weight: Unread | None

    def read(self) -> npt.NDArray[Any]:
        """float32. ArtifactError where there is none."""
        if self.weight is None:
            raise ArtifactError(
                f"the checkpoint has no tensor for {self.name}",
                expected="weights that go with the component's config.json",
                hint="download the checkpoint again, or save the pipeline again with the library's present version",
            )
        found: npt.NDArray[Any] = self.weight.read().numpy()
        return found


@dataclass(frozen=True)
class RewrittenProgram:
    """What passes changed of a pipeline, by denoiser; and what each pass reports of all of them together, whose layers
    have the denoiser's name before theirs."""

    rewrites: Rewrites
    reports: Mapping[str, Any]

    def manifest_fields(self) -> dict[str, Any]:
        """What the manifest says about the rewrites."""
        return Rewritten(reports=self.reports).manifest_fields()


def rewrite_denoisers(
    table: PassesTable, tasks: Sequence[ProgramTask], profiles: Mapping[str, Profile], cache: Cache, stages: Stages
) -> RewrittenProgram:
    """Each of the denoisers rewritten by the passes that are on."""
    done: dict[str, Rewritten] = {}
    for task in tasks:
        own, of = own_passes(table, task.name, task.known), task.name if len(tasks) > 1 else ""
        done[task.name] = apply_passes(own, task, profiles.get(task.name), cache, stages, of)
    rewrites = {name: each.rewrite for name, each in done.items() if each.rewrite.file}
    merged = {}
    for name, options in table.chosen():
        reports = {of: each.reports[name] for of, each in done.items() if name in each.reports}
        merged[name] = merge_reports(reports, options.model_dump(mode="json"))
    return RewrittenProgram(rewrites, merged)


def merge_reports(reports: Mapping[str, Mapping[str, Any]], options: Mapping[str, Any]) -> dict[str, Any]:
    """What a pass reports of several denoisers, as one report."""
    merged: dict[str, Any] = {"options": dict(options), "layers": {}}
    for name, report in reports.items():
        for key in {"layers", "left_alone", "couplings"} & report.keys():
            merged.setdefault(key, {}).update({f"{name}.{layer}": told for layer, told in report[key].items()})
        if "error_after" in report:
            own = {key: told for key, told in report.items() if key not in ("options", "parameters")}
            merged.setdefault("recovered", {})[name] = own
    every = [report["parameters"] for report in reports.values()]
    merged["parameters"] = [sum(side) for side in zip(*every, strict=True)] if every else [0, 0]
    pruned = [told for report in reports.values() if "retention" in report for told in report["layers"].values()]
    if counts := [_counts(told) for told in pruned]:
        merged["retention"] = sum(kept for kept, _ in counts) / sum(units for _, units in counts)
    return merged


def _counts(told: Mapping[str, Any]) -> tuple[int, int]:
    """Of a layer: how many of its units are kept, and how many it had."""
    kept = told["kept"]
    return (len(kept), told["heads"]) if isinstance(kept, list) else (kept, told["neurons"])
