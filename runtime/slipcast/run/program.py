"""Run a captured program: values from sources, through calls of components, to what the pipeline returned. No torch."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from slipcast.bundle.manifest import Target
from slipcast.bundle.program import IMAGES, Loop, rows_of_image
from slipcast.bundle.program_manifest import ProgramManifest
from slipcast.bundle.reader import ProgramBundle
from slipcast.bundle.records import GuardPolicy
from slipcast.bundle.sources import PromptSource, TableSource
from slipcast.engines import Array, Engine, Instrument, as_it_is
from slipcast.run.adapters import Adapters
from slipcast.run.base import BasePipeline, PipelineOutput
from slipcast.run.calls import Calls, Together
from slipcast.run.guard import Verdict, choose_policy
from slipcast.run.pictures import as_levels, as_pil
from slipcast.run.program_guard import GuardedProgram
from slipcast.run.program_request import ProgramOutputType, ProgramRequest, check_program_request, for_strangers
from slipcast.run.prompt_table import ClosedTable
from slipcast.run.residency import InUse
from slipcast.run.sampled import Sampled
from slipcast.run.tokenizer import OnLongPrompt
from slipcast.run.values import Values
from slipcast.run.variants import Ready, read_variants

logger = logging.getLogger("slipcast")

LARGE = 2**28  # bytes of weights
OnProgramStep = Callable[["ProgramPipeline", int, int], None]


class ProgramPipeline(BasePipeline):
    """A bundle of a captured program, ready to run on one target; see also BasePipeline.

    `residency` and `instrument`: see load. `residency.use(component)` is a component's engine for a `with` block.
    """

    bundle: ProgramBundle
    manifest: ProgramManifest

    def __init__(
        self, bundle: ProgramBundle, target: Target, residency: str = "all", instrument: Instrument = as_it_is
    ) -> None:
        super().__init__(bundle, target, instrument)
        self.program = self.manifest.program
        self._variants = read_variants(bundle)
        self._adapters, self._adapted = Adapters(self.manifest), dict[str, tuple[str, dict[str, Array]]]()
        closed = self.program.closed
        self._closed = ClosedTable(bundle.path(closed.table), self.program) if closed else None
        guard = self.manifest.guard
        self._guard = GuardedProgram(bundle, guard, self._variants) if guard else None
        self._unspecialised = self.manifest.unspecialised
        replaced = guard.fallback.components if guard and guard.fallback else {}
        self._stand_ins = {plain: (name, dict[str, Array]()) for plain, name in replaced.items()}
        # What only other variants call is opened when one of them is first asked for.
        own = {call.component for call in self.program.every_call}
        self._together = self._find_together()
        self._open_engines(residency, self.manifest.components.keys() - own)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        seed: int | Sequence[int] | None = None,
        num_images_per_prompt: int = 1,
        output_type: ProgramOutputType = "pil",
        on_long_prompt: OnLongPrompt = "warn",
        guard: GuardPolicy | None = None,
        callback_on_step_end: OnProgramStep | None = None,
        **arguments: Any,
    ) -> PipelineOutput:
        """Run the program for each image; `arguments` are the pipeline's, as `slipcast inspect` lists them.

        Texts (`prompt`, `negative_prompt`, ...) are strings or lists of them, one for each prompt. Pictures (`image`,
        ...) are PIL images, which are resized, or arrays [h, w, c] or [1, c, h, w] in [0, 1]; all images are given the
        same. What is fixed in the bundle can be asked for as it is; what it lists (`num_inference_steps=8`) chooses,
        and what is not given then is the first that goes with it. `seed`: image i gets seed + i, or the i-th of a list;
        its noise is that of `torch.Generator("cpu")` with this seed, whatever else is drawn.

        Images advance together, call by call, and what they share is computed once.
        `guard`: what becomes of prompts out of the family, "warn", "refuse" or, where the bundle has what draws them,
        "fallback", in place of the bundle's own policy. By "fallback" strangers are drawn after the others, by the
        unspecialised pipeline at its own steps, and the callback sees one group after the other.
        `callback_on_step_end(pipeline, step, steps)` is called when all have ended a step, counted from 0, and may
        raise `slipcast.Cancelled` to stop. Where the bundle has early exit, `steps[i]` says how many image i took.
        Calls from several threads take turns.

        Returns `images` as the bundle's output is: of "image" PIL images, or float32 [n, h, w, c] in [0, 1]; of
        "frames" a list of PIL images each, or [n, frames, h, w, c], and `sounds` where they have any; of
        "audio" a list of float32 [channels, samples]; of "array" a list of arrays. Where a seed makes several,
        they come one after another; where they differ in size, in a list.

        Raises RequestError (a ValueError) with what is legal before any engine runs, or for a prompt that a guard
        refuses; NumericalError, with the component, where a call yields NaN or infinity.
        """
        policy = choose_policy(self.manifest.guard, guard)
        request = check_program_request(
            self.program,
            arguments if prompt is None else {"prompt": prompt, **arguments},
            seed=seed,
            num_images_per_prompt=num_images_per_prompt,
            output_type=output_type,
            on_long_prompt=on_long_prompt,
        )
        with self._turn():
            return self._run(replace(request, guard=policy), callback_on_step_end)

    def load_adapter(self, name: str, path: str | os.PathLike[str], *, component: str | None = None) -> None:
        """Read a LoRA from a .safetensors file, to be set by `set_adapters`.

        By diffusers' and peft's names for layers, or kohya's of the same; alpha is the file's, or of peft's config
        beside it. `component`: whose layers it changes, such as "transformer_2", where names do not say, and several
        have them. For bundles that were compiled with `[adapters]`. RequestError, with the nearest names, for layers
        that have no slot, for a larger rank, and for DoRA, LoKr and LoHa; ArtifactError for a damaged file, or NaN.
        """
        with self._one_call_at_a_time:
            self._adapters.load(name, Path(path), component)

    def unload_adapter(self, name: str) -> None:
        """Forget a LoRA; RequestError where it was not loaded. One that is set is drawn with until others are."""
        with self._one_call_at_a_time:
            self._adapters.unload(name)

    def set_adapters(self, scales: Mapping[str, float]) -> None:
        """Draw with these adapters from the next call on, each scaled by its number, and with no others.

        From one to another, what changes are arrays. From none to some, engines that read them are opened by the next
        call, in place of the plain ones; without any, `{}`, those are opened again, and draw as if there had never been
        one. Threads that share a pipeline share what is set. RequestError for names that were not loaded, and where
        their ranks together are more than the slots have.
        """
        with self._one_call_at_a_time:
            self._adapted = self._adapters.chosen(scales)

    def _find_together(self) -> dict[str, Together]:
        """By component that takes several images in a call, how. On a CPU one keeps a large model busy, and takes the
        least memory."""
        if IMAGES not in self.program.sizes:
            return {}
        most, found = self.program.sizes[IMAGES].maximum, dict[str, Together]()
        listed = {entry.path: entry.size for entry in self.manifest.files}
        for name, contract in self.manifest.components.items():
            takers = [name, *(each[name] for each in self.manifest.stand_ins.values() if name in each)]
            engines = [self._target.components[each] for each in takers]
            size = max(listed[files.weights or files.model] for files in engines)
            large = size > LARGE and self._target.device == "cpu"
            inputs, outputs = (
                {spec.name: rows for spec in specs if (rows := rows_of_image(spec.shape))}
                for specs in (contract.inputs, contract.outputs)
            )
            if inputs and outputs:
                found[name] = Together(frozenset(inputs), outputs, 1 if large else most)
        return found

    def _open(self, component: str, precision: str | None = None, target: Target | None = None) -> Engine:
        return super()._open(component, "fp32" if component in self.manifest.exact else precision, target)

    def _run(self, request: ProgramRequest, callback: OnProgramStep | None) -> PipelineOutput:
        clock, seconds = time.perf_counter(), dict[str, float]()
        met: tuple[Verdict, ...] = ()
        try:
            drawn = self._draw(request, seconds, callback)
        except _StrangersMetError as error:
            met = error.verdicts
        if met:
            drawn = self._draw_apart(request, met, seconds, callback)
        found = self._finish([array for image in drawn for array in image.results], request.output_type)
        seconds["total"] = time.perf_counter() - clock
        variant = self._variants[request.variant].variant
        sounds = _sounds([image.sound for image in drawn if image.sound is not None])
        return PipelineOutput(
            found, request.seeds, self.target, seconds,
            guard=tuple(image.verdict for image in drawn if image.verdict), steps=tuple(image.steps for image in drawn),
            kind=self.program.output, rate=variant.rate, sounds=tuple(sounds),
            sound_rate=variant.sound.rate if variant.sound else None,
        )  # fmt: skip

    def _draw_apart(
        self, request: ProgramRequest, verdicts: Sequence[Verdict], seconds: dict[str, float],
        callback: OnProgramStep | None,
    ) -> list[_Drawn]:  # fmt: skip
        """The family's, and then, unspecialised, what its strangers asked for."""
        found: dict[int, _Drawn] = {}
        others = for_strangers(request, self._unspecialised[request.variant].loop)
        for asked, strange in ((request, False), (others, True)):
            images = [image for image, verdict in enumerate(verdicts) if verdict.fallback == strange]
            if images:
                found |= zip(images, self._draw(asked.only(images), seconds, callback, strange), strict=True)
        return [replace(found[image], verdict=verdict) for image, verdict in enumerate(verdicts)]

    def _draw(
        self, request: ProgramRequest, seconds: dict[str, float], callback: OnProgramStep | None,
        strange: bool | None = None,
    ) -> list[_Drawn]:  # fmt: skip
        """All images of a request, by the specialised pipeline; or, of strangers, by what is there for them. `strange`:
        whether they are, where that is known; else the guard is asked."""
        ready, images = self._variants[request.variant], len(request.seeds)
        values, loop = self._enter_sources(request, ready), ready.variant.loop
        loop = self._unspecialised[request.variant].loop if strange else loop
        sampled = self._sampled(loop, request, ready, bool(strange)) if loop else None
        ends = {place: step for step, place in enumerate(ready.variant.steps)}
        steps = len(ends)
        taken: tuple[int, ...] = (steps,) * images
        verdicts: tuple[Verdict, ...] = ()
        for plain, name in self._adapters.components.items():
            self.residency.free(plain if self._adapted else name)
        with InUse(self.residency) as engines:
            replaced = self._stand_ins if strange else self._adapted
            calls = Calls(values, ready.depends, engines, seconds, self._together, replaced)
            for place, call in enumerate(ready.variant.calls):
                if sampled and sampled.loop.at == place:
                    taken = self._take_steps(sampled, calls, images, callback)
                rows = ready.rows[place] | (sampled.before(call) if sampled else {})
                calls(call, rows, f"call {place + 1} of {len(ready.variant.calls)}")
                if self._guard and strange is None:
                    verdicts += self._guard.after(call, values, request.variant, request.texts, request.guard)
                    if any(verdict.fallback for verdict in verdicts):
                        raise _StrangersMetError(verdicts)
                values.drop(ready.droppable[place])
                if ready.last_call[call.component] == place:
                    calls.done(call.component)
                if callback and place in ends:
                    callback(self, ends[place], steps)
            if sampled and sampled.loop.at == len(ready.variant.calls):
                taken = self._take_steps(sampled, calls, images, callback)
        results, sound = ready.variant.results, ready.variant.sound
        return [
            _Drawn(
                [values.get(value, image) for value in results],
                values.get(sound.value, image) if sound else None,
                taken[image],
                verdicts[image] if verdicts else None,
            )
            for image in range(images)
        ]

    def _sampled(self, loop: Loop, request: ProgramRequest, ready: Ready, strange: bool) -> Sampled:
        # Thresholds and masks are of these steps: between others, images and features change more or less.
        own = len(request.schedule.timesteps) == loop.sampling.steps and not strange
        threshold = self._target.early_exit if own else None
        mask = loop.shallow.mask if own and loop.shallow else ()
        contracts = self.manifest.components
        rows = ready.loop_rows, ready.unguided_rows
        return Sampled(loop, request.schedule, request.guidance, contracts, *rows, threshold, mask)

    def _take_steps(
        self, sampled: Sampled, calls: Calls, images: int, callback: OnProgramStep | None
    ) -> tuple[int, ...]:
        """How many each image took."""

        def ended(step: int) -> None:
            if callback:
                callback(self, step, len(sampled.schedule.timesteps))

        taken = sampled.run(calls, images, ended)
        loop = sampled.loop
        others = *(loop.shallow_calls if loop.shallow else ()), *loop.unguided
        for component in dict.fromkeys(call.component for call in (*loop.calls, *others)):
            calls.done(component)
        return taken

    def _enter_sources(self, request: ProgramRequest, ready: Ready) -> Values:
        """The values that texts and pictures become; noise is drawn when it is first read."""
        sealed = self._target.device != "cpu"
        values = Values(ready.variant, ready.depends, request.texts, request.seeds, sealed=sealed)
        # All texts are cut into tokens, and refused where they do not fit, before the first engine runs.
        tokens = ready.texts(request.texts, request.on_long_prompt)
        for source in ready.variant.sources:
            if isinstance(source, TableSource):
                assert self._closed
                for image in values.images(source.value):
                    text = request.texts[image][source.argument] if source.argument else ""
                    values.put(source.value, image, self._closed(source, text))
            elif isinstance(source, PromptSource):
                for image in values.images(source.value):
                    text = request.texts[image][source.argument] if source.argument else ""
                    values.put(source.value, image, tokens[source.value][text])
            elif source.value in request.pictures:
                values.put(source.value, 0, request.pictures[source.value])
        return values

    def _finish(self, results: list[Array], output_type: ProgramOutputType) -> Any:
        """The results as they are asked for; see __call__."""
        if self.program.output == "array":
            return results
        if self.program.output == "audio":
            return _sounds(results)
        levels = as_levels(results)
        if output_type == "pil":
            return [as_pil(each) for each in levels]
        return np.stack(levels) if len({each.shape for each in levels}) == 1 else levels


class _StrangersMetError(Exception):
    """There are prompts that another pipeline is there for; what was found of all."""

    def __init__(self, verdicts: tuple[Verdict, ...]) -> None:
        super().__init__()
        self.verdicts = verdicts


@dataclass(frozen=True)
class _Drawn:
    """What came of an image: its results, its sound, how many steps it took, and what the guard found."""

    results: list[Array]
    sound: Array | None
    steps: int
    verdict: Verdict | None


def _sounds(arrays: Sequence[Array]) -> list[Any]:
    """Of [n, channels, samples] or [n, samples], each of the n as [channels, samples]."""
    return [np.atleast_2d(one) for many in arrays for one in many]
