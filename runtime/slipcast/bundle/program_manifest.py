"""The manifest of a captured program's bundle: its program, and that it goes with the components that are called."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Self

from pydantic import Field, model_validator

from slipcast.bundle.driving import Column
from slipcast.bundle.names import ComponentName, Name
from slipcast.bundle.program import IMAGES, PROGRAM, TILED, Loop, Program, ProgramCall, Variant, rows_of_image
from slipcast.bundle.records import BaseGuard, BaseManifest, Component, TensorSpec
from slipcast.bundle.sampling import Sampling
from slipcast.bundle.sources import PromptSource, Shape
from slipcast.bundle.tiles import Tiling
from slipcast.bundle.validation import Strict

NO_COLUMNS: Mapping[str, Column] = MappingProxyType({})
NOTHING: Mapping[str, str] = MappingProxyType({})
CHANNELS = (1, 3, 4)  # of pictures: grey, red, green and blue, and what is transparent


class AdaptersRecord(Strict):
    """Slots for adapters of low rank (LoRA, Hu et al., arXiv 2106.09685), which a run sets. `layers`: those that have
    one, called as modules of the pipeline. `components`: by component that has such layers, the one that takes its
    place while adapters are set: it reads besides `down_i`, float32 [inputs, rank], and `up_i`, float32 [rank,
    outputs], of each that it has, by its place among `layers`, and adds their product to what the layer gives."""

    rank: Annotated[int, Field(ge=1, le=1024)]
    layers: Annotated[tuple[Name, ...], Field(min_length=1)]
    components: Annotated[dict[ComponentName, ComponentName], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        for what, names in (("layers", self.layers), ("components", tuple(self.components.values()))):
            if twice := [name for at, name in enumerate(names) if name in names[:at]]:
                raise ValueError(f"{what}: {twice[0]!r} is there twice")
        return self


class Unspecialised(Strict):
    """What draws strangers by the policy fallback: the pipeline as it was before it was made for the family.
    `components`: by component that was changed, the one that takes its place. `samplings`: by variant, the pipeline's
    own steps, where slipcast's samplers take them."""

    components: dict[ComponentName, ComponentName] = Field(default_factory=dict)
    samplings: tuple[Sampling, ...] = ()


class ProgramGuard(BaseGuard):
    """A guard by what a component gives of texts alone: averages of its `output` over the tokens that are words, where
    its input `words` has as many; without `words`, over all. `fallback`: what draws strangers, by that policy."""

    component: ComponentName
    output: Name
    words: Name | None = None
    fallback: Unspecialised | None = None

    @model_validator(mode="after")
    def _a_policy_has_what_it_needs(self) -> Self:
        if (self.policy == "fallback") != bool(self.fallback):
            raise ValueError("guard: the policy fallback, and what draws strangers, belong together")
        return self


class ProgramManifest(BaseManifest):
    """Of a bundle of a captured program; what both kinds have means the same as in Manifest."""

    program: Program
    adapters: AdaptersRecord | None = None
    guard: ProgramGuard | None = None

    @model_validator(mode="after")
    def _names_what_it_requires(self) -> Self:
        early = any(target.early_exit for target in self.targets)
        shallow = any(variant.loop and variant.loop.shallow for variant in self.program.every)
        needed = {PROGRAM, *(["early_exit"] if early else []), *(["caching"] if shallow else [])}
        loops = [each.loop for each in (*self.program.every, *self.unspecialised) if each.loop]
        needed |= {name for loop in loops for name in loop.sampling.requires}
        needed |= {"adapters"} if self.adapters else set()
        needed |= {TILED for variant in self.program.every for call in variant.every_call if call.tiles}
        needed |= {"guard"} if self.guard and self.guard.policy != "warn" else set()
        if set(self.requires) != needed:
            raise ValueError(f"requires has to name {' and '.join(sorted(needed))}, and nothing else")
        if early and not all(variant.loop for variant in self.program.every):
            raise ValueError("early_exit belongs to steps that slipcast's samplers take, and program has no loop")
        return self

    @model_validator(mode="after")
    def _calls_fit_components(self) -> Self:
        for place, variant in enumerate(self.program.every):
            self._check_calls(variant, f"program.variants[{place - 1}]" if place else "program")
        called = {call.component for variant in self.program.every for call in variant.every_call}
        others = self.stand_ins
        if unused := sorted(set(self.components).difference(called, *(each.values() for each in others.values()))):
            raise ValueError(f"components.{unused[0]}: no call of the program needs it")
        for where, others_of in others.items():
            if wrong := sorted(called.intersection(others_of.values()) | others_of.keys() - called):
                raise ValueError(f"{where}.components: {wrong[0]!r} is called, where the plain one alone may be")
        replaced = self.guard.fallback.components if self.guard and self.guard.fallback else NOTHING
        for variant in self.unspecialised:
            self._check_calls(variant, "guard.fallback", replaced)
        return self

    @model_validator(mode="after")
    def _images_are_counted_by_rows(self) -> Self:
        images = self.program.sizes.get(IMAGES)
        if images and images.minimum != 1:
            raise ValueError(f"program.sizes.{IMAGES}: there may be one")
        for name, component in self.components.items():
            for spec in (*component.inputs, *component.outputs):
                first, rest = rows_of_image(spec.shape), spec.shape[1 if rows_of_image(spec.shape) else 0 :]
                if any(isinstance(size, str) and IMAGES in size for size in rest) or (first and not images):
                    raise ValueError(f"components.{name}: {spec.name} has images that nobody could count")
        return self

    @model_validator(mode="after")
    def _guard_fits_program(self) -> Self:
        if not (guard := self.guard):
            return self
        for variant in self.program.every:
            outside_loop = [call for call in variant.calls if call.component == guard.component]
            if len(outside_loop) != 1 or guard.output not in outside_loop[0].outputs:
                raise ValueError(f"guard: no variant's calls give {guard.output!r} of {guard.component!r} just once")
            self._check_guarded(guard, variant, outside_loop[0])
        return self

    def _check_guarded(self, guard: ProgramGuard, variant: Variant, call: ProgramCall) -> None:
        """ValueError where it does not look at what a prompt alone decides, or at another width than its table has."""
        of_prompts = {
            source.value: source.field
            for source in variant.sources
            if isinstance(source, PromptSource) and source.argument in ("prompt", None)
        }
        alone = set(of_prompts)
        for each in variant.calls:
            if alone.issuperset(each.inputs.values()):
                alone |= set(each.outputs.values())
        if call.outputs[guard.output] not in alone or "prompt" not in self.program.arguments:
            raise ValueError(f"guard: {guard.output!r} of {guard.component!r} does not follow from a prompt alone")
        if guard.words and of_prompts.get(call.inputs.get(guard.words, "")) != "input_ids":
            raise ValueError(f"guard: {guard.component!r} is not given the tokens of a prompt as {guard.words!r}")
        spec = next(spec for spec in self.components[guard.component].outputs if spec.name == guard.output)
        rest = spec.shape if len(spec.shape) == 2 else (*spec.shape[:-2], *spec.shape[-1:])
        width = math.prod(size for size in rest if isinstance(size, int))
        free = any(isinstance(size, str) for size in rest)
        if spec.dtype != "float32" or len(spec.shape) < 2 or free or width != guard.shape[1]:
            raise ValueError(f"guard: embeddings of {guard.shape[1]} numbers, and {_shown(spec.dtype, spec.shape)}")

    @model_validator(mode="after")
    def _slots_fit_components(self) -> Self:
        if not self.adapters:
            return self
        slots = self.slots
        for plain, name in self.adapters.components.items():
            if name not in self.components:
                raise ValueError(f"adapters.components.{plain}: no component {name!r}")
            one, other = self.components[plain], self.components[name]
            if one.outputs != other.outputs or one.inputs != other.inputs[: len(one.inputs)]:
                raise ValueError(f"components.{name}: it takes and gives other values than {plain}")
            for spec in other.inputs[len(one.inputs) :]:
                wanted = slots.get(spec.name)
                if wanted is None or (spec.dtype, spec.shape) != ("float32", wanted):
                    raise ValueError(f"components.{name}: {spec.name} is no slot of rank {self.adapters.rank}")
        return self

    @property
    def exact(self) -> frozenset[str]:
        """Components that are in fp32 whatever the target, with those that take their places."""
        plain = self.program.exact
        return plain | {each[name] for each in self.stand_ins.values() for name in plain if name in each}

    @property
    def stand_ins(self) -> dict[str, Mapping[str, str]]:
        """By what says so, by component, the one that takes its place at times."""
        found: dict[str, Mapping[str, str]] = {}
        if self.adapters:
            found["adapters"] = self.adapters.components
        if self.guard and self.guard.fallback:
            found["guard.fallback"] = self.guard.fallback.components
        return found

    @property
    def unspecialised(self) -> tuple[Variant, ...]:
        """By variant, what strangers are drawn by, whose components are those that take the others' places: at the
        pipeline's own steps, each with guidance, and in full. None, where they are drawn as others are."""
        if not (self.guard and self.guard.fallback):
            return ()
        samplings, found = self.guard.fallback.samplings, list[Variant]()
        if samplings and len(samplings) != len(self.program.every):
            raise ValueError("guard.fallback.samplings: there is one for each variant, or none at all")
        for place, variant in enumerate(self.program.every):
            loop = variant.loop
            if bool(loop) != bool(samplings):
                raise ValueError("guard.fallback.samplings: they belong to steps that slipcast's samplers take")
            if loop:
                changed = {"sampling": samplings[place], "shallow": None, "unguided": (), "calls": whole_calls(loop)}
                loop = Loop.model_validate({**dict(loop), **changed})
            found.append(variant.model_copy(update={"loop": loop}))
        return tuple(found)

    @model_validator(mode="after")
    def _strangers_are_drawn_alike(self) -> Self:
        for place, variant in enumerate(self.unspecialised):
            own = self.program.every[place].loop
            if variant.loop and own and variant.loop.sampling.noise != own.sampling.noise:
                raise ValueError("guard.fallback.samplings: the noise is another model's")
        valued = {
            (call.component, name) for each in self.program.every for call in each.every_call for name in call.inputs
        }
        for plain, name in self.guard.fallback.components.items() if self.guard and self.guard.fallback else ():
            # What is a value has the shape that it has; what else there is, such as of the table, is made for the one.
            one, other = (
                [(spec.name, spec.dtype, (plain, spec.name) in valued or spec.shape) for spec in each.inputs]
                for each in (self.components[plain], self.components[name])
            )
            if one != other:
                raise ValueError(f"components.{name}: it takes other inputs than {plain}")
        return self

    @property
    def slots(self) -> dict[str, tuple[int, int]]:
        """By input that is part of a slot, its shape; both of every layer, or ValueError."""
        if not self.adapters:
            return {}
        adapted = [self.components[name] for name in self.adapters.components.values() if name in self.components]
        specs = {spec.name: spec for component in adapted for spec in component.inputs}
        found = dict[str, tuple[int, int]]()
        for place in range(len(self.adapters.layers)):
            shapes = [specs[name].shape if name in specs else () for name in (f"down_{place}", f"up_{place}")]
            sizes = [size for shape in shapes for size in shape if isinstance(size, int)]
            if len(sizes) != 4 or {sizes[1], sizes[2]} != {self.adapters.rank}:
                raise ValueError(f"adapters.layers[{place}] has no slot of rank {self.adapters.rank}")
            found |= {f"down_{place}": (sizes[0], sizes[1]), f"up_{place}": (sizes[2], sizes[3])}
        return found

    def _check_calls(self, variant: Variant, name: str, replaced: Mapping[str, str] = NOTHING) -> None:
        known: dict[str, tuple[str, Shape]] = {source.value: (source.dtype, source.shape) for source in variant.sources}
        columns, loop = variant.loop.columns if variant.loop else {}, variant.loop
        for place, call in enumerate(variant.every_call):
            where = f"{name}.calls[{place}]"
            called = replaced.get(call.component, call.component)
            if (component := self.components.get(called)) is None:
                raise ValueError(f"{where}: no component {called!r}")
            _check_names(where, call, component, columns)
            for spec in component.inputs:
                if spec.name in call.inputs:
                    dtype, shape = known[call.inputs[spec.name]]
                    if call.tiles and spec.name == call.tiles.input:
                        shape = _of_a_tile(f"{where}: {spec.name}", shape, [axis.input for axis in call.tiles.axes])
                    _check_fit(f"{where}: {spec.name}", (dtype, shape), spec)
            outputs = {spec.name: spec for spec in component.outputs}
            known |= {value: (outputs[name].dtype, outputs[name].shape) for name, value in call.outputs.items()}
            if call.tiles:
                ((value, (dtype, shape)),) = ((value, known[value]) for value in call.outputs.values())
                _of_a_tile(f"{where}: {value}", shape, [axis.output for axis in call.tiles.axes])
                if dtype != "float32":
                    raise ValueError(f"{where}: tiles are of float32, and {value!r} is {dtype}")
                known[value] = dtype, _joined(shape, known[call.inputs[call.tiles.input]][1], call.tiles)
            if loop and loop.output in call.outputs.values():
                _check_loop(f"{name}.loop", known, loop)
        for value in variant.results:
            _check_result(f"{name}.results", value, known[value], self.program.output)
        if variant.sound:
            _check_result(f"{name}.sound", variant.sound.value, known[variant.sound.value], "audio")

    @property
    def takes_prompt(self) -> bool:
        """Whether it draws what a text says, which has to be given."""
        prompt = self.program.arguments.get("prompt")
        return prompt is not None and prompt.default is None and prompt.same_as is None

    @property
    def shared_files(self) -> list[str]:
        """What is read whatever the target: tokenizers and the table."""
        sources = (source for variant in self.program.every for source in variant.sources)
        tokenizers = [source.tokenizer for source in sources if isinstance(source, PromptSource)]
        tables = [
            self.program.table,
            self.program.closed and self.program.closed.table,
            self.guard and self.guard.table,
        ]
        return [*dict.fromkeys(tokenizers), *(table for table in tables if table)]

    def specs(self, variant: Variant) -> dict[str, TensorSpec]:
        """By value that a call of a variant makes, what it is."""
        found: dict[str, TensorSpec] = {}
        shapes = {source.value: source.shape for source in variant.sources}
        for call in variant.every_call:
            outputs = {spec.name: spec for spec in self.components[call.component].outputs}
            for name, value in call.outputs.items():
                spec = outputs[name]
                if call.tiles:
                    given = shapes.get(call.inputs[call.tiles.input], ())
                    spec = spec.model_copy(update={"shape": _joined(spec.shape, given, call.tiles)})
                found[value], shapes[value] = spec, spec.shape
                if variant.loop and value == variant.loop.output:
                    shapes[variant.loop.result] = spec.shape
        if variant.loop:
            found[variant.loop.result] = found[variant.loop.output]
        return found


def tabled(
    call: ProgramCall, component: Component, columns: Mapping[str, Column] = NO_COLUMNS
) -> Iterator[tuple[str, TensorSpec]]:
    """(name of the table's tensor, input) for what a call reads of the table, as no value and no column gives it."""
    statistics = call.tiles and call.tiles.statistics
    for spec in component.inputs:
        if statistics and spec.name == statistics.input:
            continue
        if spec.name not in call.inputs and (name := f"{call.component}.{spec.name}") not in columns:
            yield name, spec


def _check_loop(where: str, known: dict[str, tuple[str, Shape]], loop: Loop) -> None:
    """The loop's result is known from here on; ValueError where an evaluation does not give what it reads."""
    sample, output = known[loop.sample], known[loop.output]
    if (sample[0], output[0]) != ("float32", "float32") or not _may_be_same(sample[1], output[1]):
        raise ValueError(f"{where}: sample is {_shown(*sample)}, and output {_shown(*output)}")
    known[loop.result] = output


def features_of(loop: Loop) -> set[tuple[str, str]]:
    """(component, output) of what a full evaluation gives for shallow ones alone."""
    if not loop.shallow:
        return set()
    read = {value for call in loop.calls for value in call.inputs.values()} | {loop.output}
    features = set(loop.shallow.call.inputs.values()) - read
    return {(call.component, name) for call in loop.calls for name, value in call.outputs.items() if value in features}


def whole_calls(loop: Loop) -> tuple[ProgramCall, ...]:
    """An evaluation that gives nothing for shallow ones."""
    features, found = features_of(loop), list[ProgramCall]()
    for call in loop.calls:
        outputs = {name: value for name, value in call.outputs.items() if (call.component, name) not in features}
        if not outputs:
            raise ValueError(f"loop: {call.component} gives nothing but what shallow evaluations read")
        found.append(call.model_copy(update={"outputs": outputs}))
    return tuple(found)


def _check_names(where: str, call: ProgramCall, component: Component, columns: Mapping[str, Column]) -> None:
    """ValueError where a call gives what its component does not take, lacks what it takes, or names no output of it."""
    _check_known(f"{where}.inputs", call.inputs, component.inputs)
    _check_known(f"{where}.outputs", call.outputs, component.outputs)
    if call.tiles and (statistics := call.tiles.statistics):
        for name, specs in ((statistics.input, component.inputs), (statistics.output, component.outputs)):
            if not any((each.name, each.dtype, each.shape) == (name, "float32", (statistics.size,)) for each in specs):
                raise ValueError(f"{where}: {call.component} has no {name!r} of {statistics.size} numbers")
    missing = [spec for _, spec in tabled(call, component, columns)]
    if missing and call.row is None:
        raise ValueError(
            f"{where}: {call.component} needs {missing[0].name!r}, which is given neither by a value nor row"
        )
    if not missing and call.row is not None:
        raise ValueError(f"{where}: {call.component} is given all by values, and needs no row")
    if free := [spec.name for spec in missing if not all(isinstance(size, int) for size in spec.shape)]:
        raise ValueError(f"{where}: {free[0]!r} has free dimensions, which no table has")


def _check_known(where: str, named: Mapping[str, str], specs: tuple[TensorSpec, ...]) -> None:
    if unknown := sorted(set(named).difference(spec.name for spec in specs)):
        raise ValueError(f"{where}: the component has no {unknown[0]!r}")


def _check_fit(where: str, value: tuple[str, Shape], spec: TensorSpec) -> None:
    """ValueError where a value is none that the input takes; a free dimension takes any size."""
    dtype, shape = value
    if dtype != spec.dtype or not _may_be_same(shape, spec.shape):
        raise ValueError(f"{where} takes {_shown(spec.dtype, spec.shape)}, and is given {_shown(dtype, shape)}")


def _may_be_same(one: Shape, other: Shape) -> bool:
    """Whether they are, but for free dimensions; and each has as many rows of an image."""
    pairs = zip(one, other, strict=False)
    rows = {rows_of_image(shape) or shape[0] for shape in (one, other) if shape}
    return (
        len(one) == len(other)
        and all(isinstance(a, str) or isinstance(b, str) or a == b for a, b in pairs)
        and (len(rows) < 2 or any(isinstance(each, str) for each in rows))
    )


def _of_a_tile(where: str, shape: Shape, axes: Sequence[int]) -> Shape:
    """The shape with any size along the axes; ValueError where it has not as many."""
    if len(shape) <= max(axes):
        raise ValueError(f"{where} has {len(shape)} dimensions, and tiles one more")
    return tuple("tile" if dim in axes else size for dim, size in enumerate(shape))


def _joined(shape: Shape, given: Shape, tiles: Tiling) -> Shape:
    """The shape of a tile's result as it is of all, of an input of the shape `given`; with any size, where that is."""
    found = list(shape)
    for axis in tiles.axes:
        size = given[axis.input] if axis.input < len(given) else "tiles"
        found[axis.output] = size * axis.factor if isinstance(size, int) else "tiles"
    return tuple(found)


def _check_result(where: str, value: str, found: tuple[str, Shape], output: str) -> None:
    dtype, shape = found
    ranks = {"image": (4,), "frames": (5,), "audio": (2, 3)}.get(output)
    fits = dtype == "float32" and ranks is not None and len(shape) in ranks
    if ranks and not (fits and (output == "audio" or shape[-3] in CHANNELS)):
        raise ValueError(f"{where}: {value!r} is no {output}: {_shown(dtype, shape)}")


def _shown(dtype: str, shape: Shape) -> str:
    return f"{dtype}[{', '.join(map(str, shape))}]"
