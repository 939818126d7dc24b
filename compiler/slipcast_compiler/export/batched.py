"""A part for several images at once: its rows are those of one image, of another, and so on.

What a part computes of an image it computes of each. Modules know of rows: they are called once, with those of all
images. What is between them may not, and is mapped over images (mapped.py): where a pipeline joins the latent with
itself for guidance, each image's is joined with its own. Whether a module treats rows alike, it does not say; so it is
tried, and what is not the same as one by one stays a part for one image.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from slipcast.bundle.program import IMAGES
from slipcast.errors import RecipeError
from slipcast_compiler.capture.cut import Part
from slipcast_compiler.capture.find import Found
from slipcast_compiler.capture.parts import TOGETHER_BYTES
from slipcast_compiler.capture.program import (
    Affine,
    Call,
    Length,
    Op,
    Ref,
    Spec,
    leaves,
    measure,
    opened,
    outputs_of,
    rebuild,
    refs,
)
from slipcast_compiler.capture.replay import Values, find_module, run
from slipcast_compiler.capture.verify import relative_error
from slipcast_compiler.export import mapped
from slipcast_compiler.export.replayed import Replayed, carried

logger = logging.getLogger("slipcast")

MOST = 8  # images in a call
TRIED = 2
NO_BATCHES: Mapping[str, Part] = MappingProxyType({})
LIMIT = 1e-4  # relative, of what is the same but for the order of sums


def parts_in_batches(variants: Sequence[Found], components: Mapping[str, nn.Module]) -> dict[str, Part]:
    """By name, those that run at every step as they are for several images. `components` have weights."""
    found = dict[str, Part]()
    for name in dict.fromkeys(use.part for each in variants for use in _repeated(each)):
        part = next(part for each in variants for part in each.cut.parts if part.name == name)
        most = min(MOST, TOGETHER_BYTES // max(_live_bytes(name, variants), 1))
        try:
            batched = in_batches(part, own_inputs(name, variants), most)
            _try(batched, components, part)
        except Exception as error:  # a module may refuse other numbers of rows in any way
            logger.info("%s: one image at a time: %s", name, error)
        else:
            found[name] = batched
    return found


def _repeated(found: Found) -> list[Any]:
    """The uses of parts that run more than once."""
    if found.loop:
        return [found.loop.use, *([found.loop.unguided.use] if found.loop.unguided else [])]
    names = [use.part for use in found.cut.uses]
    return [use for use in found.cut.uses if names.count(use.part) > 1]


def own_inputs(name: str, variants: Sequence[Found]) -> frozenset[int]:
    """The places among a part's inputs of what an image has of its own, in any use: what follows from noise or text."""
    places = set[int]()
    for each in variants:
        own = {source.id for source in each.program.sources if source.kind in ("noise", "prompt")}
        inside = [each.loop.use, *([each.loop.unguided.use] if each.loop.unguided else [])] if each.loop else []
        own |= {each.loop.sample, each.loop.result} if each.loop else set()
        for use in (*each.cut.uses, *inside):
            if own.intersection(use.inputs):
                own.update(use.outputs)
            if use.part == name:
                places.update(place for place, value in enumerate(use.inputs) if value in own)
    return frozenset(places)


def _live_bytes(name: str, variants: Sequence[Found]) -> int:
    """What values of one image take at once while a part's modules run, at the largest size."""
    events = [event for each in variants for part in each.cut.parts if part.name == name for event in part.events]
    modules = {event.module for event in events if isinstance(event, Call)}
    return max((each.program.live.get(module, 0) for each in variants for module in modules), default=0)


def in_batches(part: Part, places: frozenset[int], most: int = MOST) -> Part:
    """The part with a free number of images, of inputs in these `places`. RecipeError where it has no rows."""
    if most < TRIED:
        raise RecipeError("the values of one image take much memory")
    own = {part.inputs[place] for place in places}
    for event in part.events:
        if own.intersection(ref.id for ref in refs((event.args, event.kwargs))):
            own.update(outputs_of(event))
    wide, specs = [value for value in (*part.inputs, *part.outputs) if value in own], dict(part.program.specs)
    for value in wide:
        shape, dtype = specs[value]
        if not shape or isinstance(shape[0], Affine):
            raise RecipeError("what an image has of its own has no rows", expected="[rows, ...]", got=f"{list(shape)}")
        specs[value] = (Affine(IMAGES, shape[0], 0), *shape[1:]), dtype
    if counted := [each.name for each in part.lengths if each.dim is None and each.value in own]:
        raise RecipeError("each image's mask decides sizes", got=", ".join(counted))
    if not set(wide).intersection(part.inputs):
        raise RecipeError("nothing that it reads is an image's own")
    first = next(value for value in part.inputs if value in own)
    images = Length(IMAGES, 1, most, first, 0, scale=_rows(specs[first]))
    sizes = tuple({**each, IMAGES: count} for each in part.sizes for count in (1, most))
    return replace(
        part, program=replace(part.program, specs=specs), lengths=(*part.lengths, images), sizes=sizes, apart=()
    )


class InBatches(Replayed):
    """As Replayed, of a part of in_batches. Values of images are held as [images, *what they are of one]."""

    def __init__(self, part: Part, components: Mapping[str, nn.Module], known: Mapping[int, Spec]) -> None:
        super().__init__(part, components, known)
        # Of a table whose rows are numbers that are the same, such as a timestep for every row of a call.
        self._same = [value for value, rows in part.table if rows.ndim > 1 and bool((rows == rows[:, :1]).all())]

    def forward(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See the class."""
        part, components, specs = self._part, dict(self.components.items()), self._part.program.specs
        values = self._entered(given)
        self._lengths = measure(part.lengths, values)
        own = {value for value in part.inputs if rows_of_images(specs[value])}
        for value in own:
            values[value] = _apart(values[value], self._lengths[IMAGES], _rows(specs[value]))
        self._alike = {
            value: values[value][:1] for value in self._same
        }  # by value that is a row several times, that row
        for event in part.events:
            mine = list(dict.fromkeys(ref.id for ref in refs((event.args, event.kwargs)) if ref.id in own))
            if not mine:
                run(event, values, components, self._lengths)
                self._note(event, values)
            elif isinstance(event, Op):
                self._map(event, values, mine)
            else:
                self._call(event, values, own, components)
            if mine:
                own.update(outputs_of(event))
        outputs = (values[value].flatten(0, 1) if value in own else values[value] for value in part.outputs)
        return tuple(carried(value) for value in outputs)

    def _note(self, event: Op | Call, values: Values) -> None:
        """What one row is, where an operator makes several of it."""
        if isinstance(event, Op) and event.function is torch.ops.aten.expand.default:
            row = values[event.args[0].id]
            if not row.ndim or row.shape[0] == 1:
                self._alike[outputs_of(event)[0]] = row

    def _given(self, each: Any, values: Mapping[int, torch.Tensor]) -> Any:
        if isinstance(each, Affine):
            return each.at(self._lengths)
        return values[each.id] if isinstance(each, Ref) else each

    def _map(self, event: Op, values: Values, own: Sequence[int]) -> None:
        args, kwargs = rebuild((event.args, event.kwargs), lambda each: self._given(each, values))
        ids = {id(values[value]) for value in own}
        out = mapped.apply(event.function, args, kwargs, self._lengths[IMAGES], lambda each: id(each) in ids)
        values.update(zip(outputs_of(event), (tensor for _, tensor in leaves(out)), strict=True))

    def _call(self, event: Call, values: Values, own: set[int], components: Mapping[str, nn.Module]) -> None:
        """A module, once with the rows of all images."""
        if event.written:
            raise RecipeError(f"{event.module} writes to what it is given")
        specs = self._part.program.specs
        numbers = {_rows(specs[ref.id]) for ref in refs((event.args, event.kwargs)) if ref.id in own}
        if len(numbers) > 1 or 0 in numbers:
            raise RecipeError(f"{event.module} is given different numbers of rows", got=str(sorted(numbers)))
        (count,), images = numbers, self._lengths[IMAGES]

        def given(each: Any) -> Any:
            if isinstance(each, Ref) and each.id in own:
                return values[each.id].flatten(0, 1)
            found = self._given(each, values)
            if not isinstance(found, torch.Tensor) or not found.ndim or found.shape[0] != count:
                return found
            row = self._alike.get(each.id) if isinstance(each, Ref) else None
            if row is None and count > 1:
                return found.unsqueeze(0).expand(images, *found.shape).flatten(0, 1)
            row = found if row is None else row.reshape(1, *found.shape[1:]) if not row.ndim else row
            return row.expand(images * count, *found.shape[1:])

        args, kwargs = rebuild((event.args, event.kwargs), given)
        out = dict(leaves(opened(find_module(components, event.module)(*args, **kwargs))))
        for path, value in event.outputs:
            if not (rows := _rows(specs[value])):
                raise RecipeError(f"{event.module} gives no rows", got=str(list(specs[value][0])))
            values[value] = _apart(out[path], images, rows)


def _rows(spec: Spec) -> int:
    """Of an image; 0 where they are not known, or there are none."""
    first = spec[0][0] if spec[0] else 0
    if isinstance(first, Affine):
        return first.scale if first.length == IMAGES else 0
    return first


def rows_of_images(spec: Spec) -> bool:
    """Whether a value has rows of each image."""
    return bool(spec[0]) and isinstance(spec[0][0], Affine) and spec[0][0].length == IMAGES


def _apart(tensor: torch.Tensor, images: int, rows: int) -> torch.Tensor:
    """[images * rows, ...] as [images, rows, ...]."""
    return tensor.reshape(images, rows, *tensor.shape[1:])


def _try(part: Part, components: Mapping[str, nn.Module], single: Part) -> None:
    """RecipeError where several images are not what each is by itself."""
    generator = torch.Generator().manual_seed(0)
    specs = single.program.specs
    usual = {each.name: each.maximum for each in (*single.program.lengths, *single.lengths)}
    own = {value for value in part.inputs if rows_of_images(part.program.specs[value])}

    def example(value: int, images: int) -> torch.Tensor:
        shape, dtype = specs[value]
        sizes = [size.at(usual) if isinstance(size, Affine) else size for size in shape]
        made = torch.randn([images, *sizes], generator=generator)
        if dtype.is_floating_point:
            return made.to(dtype)
        made = torch.ones_like(made, dtype=dtype)  # a mask, perhaps, which is another one for each
        made[1:, ..., made.shape[-1] // 2 :] = 0
        return made

    inputs = {value: example(value, TRIED if value in own else 1) for value in part.inputs}
    rows = [carried(table[0]) for _, table in part.table]
    with torch.no_grad():
        together = [inputs[value].flatten(0, 1) if value in own else inputs[value][0] for value in part.inputs]
        found = InBatches(part, components, part.program.specs).eval()(*map(carried, together), *rows)
        alone = [
            Replayed(single, components, specs).eval()(
                *(carried(inputs[value][image if value in own else 0]) for value in part.inputs), *rows
            )
            for image in range(TRIED)
        ]
    for place, value in enumerate(part.outputs):
        mine = [each[place] for each in alone]
        wanted = torch.cat(mine) if rows_of_images(part.program.specs[value]) else mine[0]
        error = relative_error(found[place], wanted)
        if not error <= LIMIT:
            raise RecipeError(
                "several images at once are not what each is by itself", got=f"a relative error of {error:.2g}"
            )
