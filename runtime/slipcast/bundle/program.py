"""The record of a captured program: where values enter, which components are called, and what comes out.

A program is a list of calls in the order in which they run. Its values have names; each is made once, by a source or by
a call, and read by calls after that. Nothing in it says which model it is: what is between the components of a pipeline
lies within the components of the program.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from slipcast.bundle.driving import Column
from slipcast.bundle.names import ComponentName, Count, Name, Positive
from slipcast.bundle.sampling import Sampling
from slipcast.bundle.sources import ArgumentName, ClosedTexts, ImageSource, PromptSource, Source, TableSource
from slipcast.bundle.tiles import Tiling
from slipcast.bundle.validation import BundlePath, Strict

PROGRAM = "program"  # the key of the manifest, and what is named under requires
IMAGES = "images"  # what dimensions follow that count the rows of all images in a call
_ROWS = re.compile(r"(?:(?P<rows>[1-9]\d{0,3})\*)?" + IMAGES)
TILED = "tiled_decode"  # named there too
RUN_ARGUMENTS = ("seed", "num_images_per_prompt", "output_type", "on_long_prompt", "guard", "callback_on_step_end")

Fixed = int | float | str | bool
Output = Literal["image", "frames", "audio", "array"]
NUMBERS = ("audio", "array")  # of these, what is no picture
Rate = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]


def rows_of_image(shape: Sequence[int | str]) -> int:
    """How many rows each image has of an array, which a call takes for several; 0 where it takes one for all."""
    found = _ROWS.fullmatch(str(shape[0])) if shape else None
    return int(found["rows"] or 1) if found else 0


class TextArgument(Strict):
    """A text that a run takes; `default`, or the text of the argument `same_as`, where none is given.

    With neither it has to be given.
    """

    default: str | None = None
    same_as: ArgumentName | None = None

    @model_validator(mode="after")
    def _one_default(self) -> Self:
        if self.default is not None and self.same_as is not None:
            raise ValueError("either default or same_as, not both")
        return self


class LengthRange(Strict):
    """How many tokens a text may have."""

    minimum: Positive
    maximum: Positive

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.minimum > self.maximum:
            raise ValueError("minimum is above maximum")
        return self


class ProgramCall(Strict):
    """`inputs`: the engine's input -> the value that it is given; `outputs`: the engine's output -> the value that it
    becomes. `row`: of the table, whose tensors "<component>.<input>" give the inputs that are not in `inputs`.
    `tiles`: of a call with one output."""

    component: ComponentName
    inputs: dict[Name, Name]
    outputs: Annotated[dict[Name, Name], Field(min_length=1)]
    row: Count | None = None
    tiles: Tiling | None = None

    @model_validator(mode="after")
    def _tiles_are_of_a_value(self) -> Self:
        if self.tiles and (self.tiles.input not in self.inputs or len(self.outputs) > 1):
            raise ValueError(f"tiles: {self.tiles.input!r} has to be a value, and the output one")
        if self.tiles and self.tiles.statistics and self.tiles.statistics.input in self.inputs:
            raise ValueError(f"tiles: {self.tiles.statistics.input!r} is no value")
        return self


class Shallow(Strict):
    """Feature caching: at some steps `call` stands in the place of the loop's call that makes the prediction.

    It reads features, which that one gives besides, of the last step that had it. `mask`: for each step of the bundle's
    schedule, whether it is a full one; a run of other steps has full ones alone. `share`: of the whole component's
    multiply-adds, what this one has.
    """

    call: ProgramCall
    mask: Annotated[tuple[bool, ...], Field(min_length=1)]
    share: Annotated[float, Field(ge=0, le=1)]

    @field_validator("mask")
    @classmethod
    def _begins_in_full(cls, mask: tuple[bool, ...]) -> tuple[bool, ...]:
        if not mask[0]:
            raise ValueError("the first evaluation has no features to go on from: it has to be full")
        return mask


class Loop(Strict):
    """Steps of one of slipcast's samplers, before the call with index `at`, or after the last one.

    They lead from the value `sample` to `result`. An evaluation of the model is `calls`, which read the latent as
    `sample` and make `output`; `vp`: whether in variance-preserving coordinates. `columns`: by "<component>.<input>",
    of these calls and of those before the loop, what is neither a value nor of the table; a row of which is the same at
    all steps. `sampling`: the bundle's;
    `steps` and `guidance`: the arguments by which a run asks for another number of steps, and for another guidance.
    `unguided`: an evaluation in place of `calls`, at noise levels outside of the sampling's guidance_interval.
    """

    at: Count
    calls: Annotated[tuple[ProgramCall, ...], Field(min_length=1)]
    sample: Name
    output: Name
    result: Name
    vp: bool
    columns: dict[Name, Column] = Field(default_factory=dict)
    sampling: Sampling
    steps: ArgumentName | None = None
    guidance: ArgumentName | None = None
    shallow: Shallow | None = None
    unguided: tuple[ProgramCall, ...] = ()

    @model_validator(mode="after")
    def _guidance_has_an_interval(self) -> Self:
        if self.sampling.guidance_interval and not self.unguided:
            raise ValueError("sampling.guidance_interval: there is no evaluation without guidance")
        if self.unguided and self.shallow:
            raise ValueError("shallow and unguided are not for one loop")
        if self.sampling.guidance_reuse or self.sampling.guidance_rescale:
            raise ValueError("sampling: guidance lies within the calls, of which nothing is taken again")
        return self

    @model_validator(mode="after")
    def _shallow_stands_for_a_call(self) -> Self:
        if not self.shallow:
            return self
        if len(self.shallow.mask) != self.sampling.steps:
            raise ValueError(f"shallow.mask is for {len(self.shallow.mask)} steps, and sampling has another number")
        if tuple(self.shallow.call.outputs.values()) != (self.output,):
            raise ValueError("shallow.call has to make the output, and nothing else")
        inside = {value for call in self.calls for value in call.outputs.values()}
        if not inside.intersection(self.shallow.call.inputs.values()):
            raise ValueError("shallow.call reads no feature, which a call of the loop would make")
        return self

    @property
    def shallow_calls(self) -> tuple[ProgramCall, ...]:
        """An evaluation of the model at a step that is not a full one."""
        assert self.shallow
        whole = [call for call in self.calls if self.output not in call.outputs.values()]
        return *whole, self.shallow.call

    @property
    def exact(self) -> frozenset[str]:
        """Components that compute of the step alone: in fp32 whatever the target, as bf16 has too few timesteps."""
        return frozenset(call.component for call in (*self.calls, *self.unguided) if not call.inputs)

    @property
    def free(self) -> tuple[str, ...]:
        """The arguments by which a run chooses; a list of noise levels has its own number of steps."""
        listed = self.sampling.timesteps or self.sampling.sigmas
        return tuple(name for name in (None if listed else self.steps, self.guidance) if name)


class Soundtrack(Strict):
    """The sound of a video: a value, float32 [n, channels, samples] or [n, samples], and samples a second."""

    value: Name
    rate: Rate


class Variant(Strict):
    """A pipeline's call for one choice of what a bundle lists.

    `fixed`: what the call had besides texts and pictures. `lengths`: how many tokens texts may have, by the names
    that shapes of sources have. `sources`: where values enter: one of four kinds. `steps`: a step is over after the
    call with this index. `results`: see Program's `output`. `rate`: how many frames, or samples of a sound, a
    second has; a sound has one, a video where the pipeline says so. `sound`: of videos that have one. `loop`: the
    steps, where slipcast's samplers take them; else they are among the calls.
    """

    fixed: dict[ArgumentName, Fixed] = Field(default_factory=dict)
    lengths: dict[Name, LengthRange] = Field(default_factory=dict)
    sources: tuple[Source, ...]
    calls: Annotated[tuple[ProgramCall, ...], Field(min_length=1)]
    steps: tuple[Count, ...] = ()
    results: Annotated[tuple[Name, ...], Field(min_length=1)]
    rate: Rate | None = None
    sound: Soundtrack | None = None
    loop: Loop | None = None

    @property
    def given(self) -> tuple[Name, ...]:
        """The values that a run gives: its results, and their sound."""
        return (*self.results, self.sound.value) if self.sound else self.results

    @property
    def every_call(self) -> tuple[ProgramCall, ...]:
        """All calls, those of the loop once, in the order in which they run; what is shallow, or without guidance,
        after what is whole."""
        if not self.loop:
            return self.calls
        shallow = [self.loop.shallow.call] if self.loop.shallow else []
        inside = *self.loop.calls, *shallow, *self.loop.unguided
        return (*self.calls[: self.loop.at], *inside, *self.calls[self.loop.at :])

    @property
    def usual_steps(self) -> int:
        """How many steps it takes, where a run asks for no other number."""
        return self.loop.sampling.steps if self.loop else len(self.steps)

    @property
    def images(self) -> dict[str, tuple[ImageSource, ...]]:
        """By argument, the sources that read it: one, or those of a list, in its order. All have to be given."""
        found: dict[str, tuple[ImageSource, ...]] = {}
        for source in self.sources:
            if isinstance(source, ImageSource):
                found[source.argument] = (*found.get(source.argument, ()), source)
        return {name: tuple(sorted(each, key=lambda source: source.place or 0)) for name, each in found.items()}

    @model_validator(mode="after")
    def _lists_are_whole(self) -> Self:
        for name, sources in self.images.items():
            places = [source.place for source in sources]
            if places not in ([None] * len(places), list(range(len(places)))):
                raise ValueError(f"sources: {name} is a list of which places are missing, or twice")
        return self

    @model_validator(mode="after")
    def _values_flow(self) -> Self:
        made = set[str]()
        for value in (source.value for source in self.sources):
            _make(value, made, "sources")
        loop = self.loop
        if loop and loop.at > len(self.calls):
            raise ValueError(f"loop.at is {loop.at}, and there are {len(self.calls)} calls")
        for place, call in enumerate(self.calls):
            if loop and loop.at == place:
                _flow_through(loop, made)
            _flow(call, made, f"calls[{place}]")
        if loop and loop.at == len(self.calls):
            _flow_through(loop, made)
        if unmade := [name for name in self.given if name not in made]:
            raise ValueError(f"results: nothing makes {unmade[0]!r}")
        return self

    @model_validator(mode="after")
    def _a_loop_has_the_steps(self) -> Self:
        if self.loop and self.steps:
            raise ValueError("steps are among the calls, and in the loop")
        if self.loop and (twice := [name for name in self.loop.free if name in self.fixed]):
            raise ValueError(f"{twice[0]} is fixed, and a run chooses it")
        return self

    @model_validator(mode="after")
    def _steps_rise(self) -> Self:
        if list(self.steps) != sorted(set(self.steps)) or any(step >= len(self.calls) for step in self.steps):
            raise ValueError(f"steps are indices of calls, rising, below {len(self.calls)}")
        return self

    @model_validator(mode="after")
    def _lengths_are_known(self) -> Self:
        prompts = [source for source in self.sources if isinstance(source, PromptSource)]
        named = {name for source in prompts for name in (source.shape[1], source.length) if isinstance(name, str)}
        if unknown := sorted(named.difference(self.lengths)):
            raise ValueError(f"sources have {unknown[0]!r} tokens, which is not listed under lengths")
        return self


class Program(Variant):
    """A pipeline's call, as it was captured: by itself, that for the defaults.

    `pipeline`: the class that it was captured of, to be shown alone. `arguments`: texts that a run takes, by name.
    `table`: safetensors, each of its tensors [rows, *shape of the input]. `output`: what results are: for "image"
    float32 [n, channels, height, width] in [0, 1], for "frames" [n, frames, channels, height, width] likewise, for
    "audio" float32 [n, channels, samples] or [n, samples], for "array" any. `sizes`: what free dimensions of components
    follow besides `lengths`, by the names that their shapes have, such as "8*decoder_size", and how many images a call
    may be of, whose rows a first dimension such as "2*images" counts. `variants`: the call for other values of what is
    fixed, of which a run may ask: each has the same names under `fixed`.
    """

    pipeline: Name
    arguments: dict[ArgumentName, TextArgument] = Field(default_factory=dict)
    table: BundlePath | None = None
    output: Output = "image"
    closed: ClosedTexts | None = None
    sizes: dict[Name, LengthRange] = Field(default_factory=dict)
    variants: tuple[Variant, ...] = ()

    @property
    def every(self) -> tuple[Variant, ...]:
        """All variants; the first is the default, the program itself."""
        return self, *self.variants

    @property
    def exact(self) -> frozenset[str]:
        """Of all loops, see there."""
        return frozenset[str]().union(*(variant.loop.exact for variant in self.every if variant.loop))

    @property
    def listed(self) -> dict[str, tuple[Fixed, ...]]:
        """By name of a fixed argument that has several values, these, in order."""
        values = {name: tuple(dict.fromkeys(each.fixed[name] for each in self.every)) for name in self.fixed}
        return {name: each for name, each in values.items() if len(each) > 1}

    @model_validator(mode="after")
    def _a_table_is_closed(self) -> Self:
        if not self.closed and any(isinstance(each, TableSource) for variant in self.every for each in variant.sources):
            raise ValueError("sources read the table of a closed family, and there is none")
        return self

    @model_validator(mode="after")
    def _sounds_have_a_rate(self) -> Self:
        if self.output == "audio" and any(variant.rate is None for variant in self.every):
            raise ValueError("output is audio, and rate says nothing")
        if self.output != "frames" and any(variant.sound for variant in self.every):
            raise ValueError(f"output is {self.output}, and has a sound of its own")
        return self

    @model_validator(mode="after")
    def _rows_are_of_a_table(self) -> Self:
        for variant in self.every:
            for place, call in enumerate(variant.every_call):
                if call.row is not None and self.table is None:
                    raise ValueError(f"calls[{place}] reads row {call.row} of a table, and there is none")
        return self

    @model_validator(mode="after")
    def _variants_differ(self) -> Self:
        seen: list[dict[str, Fixed]] = []
        for place, variant in enumerate(self.every):
            where = f"variants[{place - 1}].fixed"
            if set(variant.fixed) != set(self.fixed):
                raise ValueError(f"{where} has other names than the program's: {sorted(variant.fixed)}")
            if variant.fixed in seen:
                raise ValueError(f"{where} is another's")
            seen.append(variant.fixed)
        return self

    @model_validator(mode="after")
    def _arguments_are_known(self) -> Self:
        pictures = dict.fromkeys(name for variant in self.every for name in variant.images)
        named = [*RUN_ARGUMENTS, *self.arguments, *self.fixed, *pictures]
        if twice := sorted({name for name in named if named.count(name) > 1}):
            raise ValueError(f"the argument {twice[0]!r} means two things, or one of every run's")
        of_text = PromptSource | TableSource
        prompts = (source for variant in self.every for source in variant.sources if isinstance(source, of_text))
        if unknown := sorted({each.argument for each in prompts if each.argument}.difference(self.arguments)):
            raise ValueError(f"sources read the argument {unknown[0]!r}, which is not listed under arguments")
        for name, argument in self.arguments.items():
            other = argument.same_as
            if other is not None and (other not in self.arguments or self.arguments[other].same_as is not None):
                raise ValueError(f"arguments.{name}.same_as: {other!r} is no argument with a text of its own")
        return self


def _flow(call: ProgramCall, made: set[str], where: str) -> None:
    """ValueError where a call reads what nothing before it makes, or makes what is there already."""
    for name in call.inputs.values():
        if name not in made:
            raise ValueError(f"{where} reads {name!r}, which nothing before it makes")
    for name in call.outputs.values():
        _make(name, made, where)


def _flow_through(loop: Loop, made: set[str]) -> None:
    """The same of a loop, of which its result alone is seen."""
    if loop.sample not in made:
        raise ValueError(f"loop.sample is {loop.sample!r}, which nothing before it makes")
    inside = set(made)
    for place, call in enumerate(loop.calls):
        _flow(call, inside, f"loop.calls[{place}]")
    for value in loop.shallow.call.inputs.values() if loop.shallow else ():
        if value not in inside:
            raise ValueError(f"loop.shallow.call reads {value!r}, which nothing before it makes")
    if loop.output not in inside - made:
        raise ValueError(f"loop.output is {loop.output!r}, which none of its calls makes")
    plain = set(made)
    for place, call in enumerate(loop.unguided):
        _flow(call, plain, f"loop.unguided[{place}]")
    if loop.unguided and loop.output not in plain - made:
        raise ValueError(f"loop.output is {loop.output!r}, which none of its calls without guidance makes")
    _make(loop.result, made, "loop")


def _make(value: str, made: set[str], where: str) -> None:
    if value in made:
        raise ValueError(f"{where}: the value {value!r} is made twice")
    made.add(value)
