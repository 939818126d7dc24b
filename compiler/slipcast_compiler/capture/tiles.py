"""Decode in tiles: of a program's last part, what makes a result of a latent, for latents of any height and width.

Nothing says of a pipeline's code that it can be given part of a latent. It is run again with smaller ones, on shapes
alone: where height and width of what it gives then follow those of what it is given, it is called tile by tile. What
lies before its first module and after its last, such as taking a latent out of its patches, or joining frames, may
follow the whole: these stay parts of their own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from slipcast.bundle.tiles import SMALLEST_TILE, TiledAxis, Tiling
from slipcast.errors import RecipeError
from slipcast.run.tiling import count_tiles
from slipcast_compiler.capture.cut import Cut, Part, Use, part_of
from slipcast_compiler.capture.labels import kind_of
from slipcast_compiler.capture.program import (
    Affine,
    Call,
    Length,
    Op,
    Program,
    Ref,
    leaves,
    leaves_at,
    opened,
    outputs_of,
    rebuild,
    refs,
)
from slipcast_compiler.capture.replay import find_module, modules_of
from slipcast_compiler.capture.shapes import META, ShapeRunner

# Operators that take some of a dimension, or join what was taken, and those that change where dimensions are.
TAKEN = ("_to_copy", "alias", "cat", "clone", "select", "slice", "split", "stack")
TAKING = frozenset(f"aten::{name}" for name in TAKEN)
MOVING = TAKING | {f"aten::{name}" for name in ("permute", "squeeze", "t", "transpose", "unbind", "unsqueeze")}
DECODER, NAMES = "decoder", ("height", "width")  # the last two dimensions of a latent
Components = Mapping[str, nn.Module]
Sizes = Mapping[int, int]  # by dimension
Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Decoder:
    """A part in up to three: `tiled` is called in tiles of the value `latent`, along `axes`; what comes before its
    first module, and after its last, is apart where it has to be, for each of its users: of one size."""

    tiled: Part
    latent: int
    axes: tuple[TiledAxis, ...]
    besides: tuple[tuple[Part | None, Part | None], ...]


def in_tiles(programs: Sequence[Program], cuts: Sequence[Cut], pipe: Any, tile: int, overlap: int) -> tuple[Cut, ...]:
    """The cuts, with decoders that are called in tiles of at most `tile` cells, of which neighbours share `overlap`; as
    they are, where no latent is larger. RecipeError where one has no decoder that could be."""
    components = modules_of(pipe)
    made = list(cuts)
    for part in {part.name: part for part in map(_last, programs, cuts)}.values():
        users = [place for place, cut in enumerate(cuts) if cut.uses[-1].part == part.name]
        if found := _divide(part, [programs[place] for place in users], components, tile):
            for place, besides in zip(users, found.besides, strict=True):
                made[place] = _with(programs[place], cuts[place], found, besides, tile, overlap)
    return tuple(made)


def _last(program: Program, cut: Cut) -> Part:
    """The last part; RecipeError where that is no decoder."""
    if not cut.uses:
        raise _refused(program, "a module that makes the result of the last latent", "none after the loop")
    part = next(part for part in cut.parts if part.name == cut.uses[-1].part)
    if kind_of(part.name) != DECODER or not any(isinstance(event, Call) for event in part.events):
        raise _refused(program, "a module that makes the result of the last latent", f"none in {part.name}")
    if part.table or len(part.lengths) > len(part.free) or len(part.outputs) > 1:
        raise _refused(program, "a decoder with one result, that follows neither texts nor what is listed", part.name)
    return part


def _refused(program: Program, expected: str, got: str) -> RecipeError:
    return RecipeError(
        f"[decode] is not for {program.pipeline}: it cannot be decoded in tiles", expected=expected, got=got,
        hint="a recipe without [decode] decodes it whole",
    )  # fmt: skip


def _divide(whole: Part, users: Sequence[Program], components: Components, tile: int) -> _Decoder | None:
    """The part of these programs, in tiles, and as little else as can be; None where no latent is larger."""
    part = whole.apart[0][1] if whole.apart else whole
    own = [next((own for program, own in whole.apart if program is user), part) for user in users]
    begins, ends = _begins(part), _ends(part)
    *places, (begin, end) = dict.fromkeys((begin, end) for end in ends for begin in begins)
    for place in places:
        with contextlib.suppress(RecipeError):
            return _divide_at(*place, part, own, users, components, tile)
    return _divide_at(begin, end, part, own, users, components, tile)


def _begins(part: Part) -> list[int]:
    """Where the tiled part may begin: as early, and as late, as what lies between that and the first module sees no
    cell's neighbours, and one value is read from there on."""
    first = _calls(part)[0]
    found = [
        place
        for place in range(first + 1)
        if all(_sees_one_cell(event, TAKING) for event in part.events[place:first]) and len(_latents(part, place)) == 1
    ]
    if not found:
        raise _refused(part.program, "a decoder of one latent", f"one of {len(_latents(part, first))}")
    return list(dict.fromkeys((found[0], found[-1])))


def _ends(part: Part) -> list[int]:
    """Where it may end: likewise, the latest first."""
    last = _calls(part)[-1] + 1
    found = [
        place
        for place in range(last, len(part.events) + 1)
        if all(_sees_one_cell(event, MOVING) for event in part.events[last:place]) and len(_given(part, place)) == 1
    ]
    if not found:
        raise _refused(part.program, "a decoder with one result", f"one with {len(_given(part, last))}")
    return list(dict.fromkeys((found[-1], found[0])))


def _calls(part: Part) -> list[int]:
    return [place for place, event in enumerate(part.events) if isinstance(event, Call)]


def _latents(part: Part, begin: int) -> frozenset[int]:
    """What events from there on read that follows noise, and they do not make."""
    made = {value for event in part.events[begin:] for value in outputs_of(event)}
    read = {ref.id for event in part.events[begin:] for ref in refs((event.args, event.kwargs))} - made
    return frozenset(value for value in read if "noise" in part.program.binding[value])


def _given(part: Part, end: int) -> frozenset[int]:
    """What events before make that is read from there on, or is the result."""
    made = {value for event in part.events[:end] for value in outputs_of(event)}
    later = {ref.id for event in part.events[end:] for ref in refs((event.args, event.kwargs))}
    return frozenset(made.intersection({*later, *part.outputs}))


def _sees_one_cell(event: Op | Call, besides: frozenset[str]) -> bool:
    """Whether an operator does the same to each number, or is one of those `besides`: of others, such as one that turns
    a picture, shapes do not tell that they are for the whole."""
    if isinstance(event, Call):
        return False
    return torch.Tag.pointwise in getattr(event.function, "tags", ()) or event.function._schema.name in besides


def _divide_at(
    begin: int, end: int, part: Part, own: Sequence[Part], users: Sequence[Program], components: Components, tile: int
) -> _Decoder | None:
    """With its events from `begin` to `end` in tiles; RecipeError where those cannot be run for a tile. `own`: the part
    as each of its users has it."""
    program = part.program
    tiled = _between(part.name, part, begin, end)
    assert tiled
    (latent,) = _latents(part, begin) & {*tiled.inputs}
    shapes = [_shape_of(latent, part, each) for each in own]
    if any(len(shape) < 4 for shape in shapes):
        raise _refused(program, "a latent with height and width", f"one of {list(shapes[0])}")
    dims = range(len(shapes[0]) - 2, len(shapes[0]))
    if all(shape[dim] <= tile for shape in shapes for dim in dims):
        return None
    if any(isinstance(event, Call) and event.inside for event in tiled.events):
        raise _refused(program, "modules that do what their own code says", "one that was changed, or follows a text")
    numbers = [_integers(each.events[begin:end]) for each in own]
    if any(each != numbers[0] for each in numbers):
        raise _refused(program, "a decoder that is the same for all that is listed", "numbers that follow its size")
    sizes = {dim: [shape[dim] for shape in shapes] for dim in dims}
    free = {
        dim: [min(size, tile) for size in each] for dim, each in sizes.items() if max(each) > tile or len(set(each)) > 1
    }
    low = {dim: min(SMALLEST_TILE, *each) for dim, each in free.items()}
    high = {dim: max(each) for dim, each in free.items()}
    axes, usual, live_bytes = _follow(tiled, latent, components, low, high)
    for each, shape in zip(own, shapes, strict=True):
        followed = {axis.output: axis.factor * shape[axis.input] for axis in axes}
        wanted = tuple(followed.get(dim, size) for dim, size in enumerate(usual))
        if (found := _shape_of(tiled.outputs[0], part, each)) != wanted:
            raise _refused(program, f"a result of {list(wanted)}, as tiles would make", f"{list(found)}")
    tiles = [{dim: free[dim][at] for dim in free} for at in range(len(users))]
    events = tuple(replace(each, recorded=None) if isinstance(each, Call) else each for each in tiled.events)
    made = replace(tiled, events=events, live_bytes=live_bytes)
    made = _of_any_size(made, latent, axes, low, high, users, tiles)
    besides = dict[int, tuple[Part | None, Part | None]]()
    for each in own:
        number = f"_{len(besides) + 1}" if besides else ""
        before = _between(f"{part.name}_before{number}", each, 0, begin)
        after = _between(f"{part.name}_after{number}", each, end, len(each.events))
        besides.setdefault(id(each), (before, after))
    return _Decoder(made, latent, axes, tuple(besides[id(each)] for each in own))


def _integers(events: Sequence[Op | Call]) -> list[int]:
    """Among their arguments."""
    leaves_of = [leaf for event in events for leaf in tree_leaves((event.args, dict(event.kwargs)))]
    return [leaf for leaf in leaves_of if isinstance(leaf, int)]


def _between(name: str, part: Part, begin: int, end: int) -> Part | None:
    """A part of these events of another; None without any."""
    later = (ref.id for event in part.events[end:] for ref in refs((event.args, event.kwargs)))
    read = frozenset([*later, *part.outputs])
    return part_of(name, part.program, part.events[begin:end], read)[0] if begin < end else None


def _shape_of(latent: int, part: Part, own: Part) -> Shape:
    """In one of its users, of a value that the part reads or makes."""
    shape = own.program.specs[dict(zip(_values(part), _values(own), strict=True))[latent]][0]
    return tuple(size for size in shape if isinstance(size, int))


def _values(part: Part) -> list[int]:
    """That it reads and makes, in an order that is the same in all its users."""
    return [*part.inputs, *(value for event in part.events for value in outputs_of(event))]


def _follow(
    part: Part, latent: int, components: Components, low: Sizes, high: Sizes
) -> tuple[tuple[TiledAxis, ...], Shape, int]:
    """How its output follows the latent, between these sizes of it; and for the larger its shape, and how many bytes
    its values take at once. RecipeError where it does not."""
    usual, live_bytes = _run(part, latent, components, high)
    axes = []
    for dim, size in high.items():
        other = low[dim] if low[dim] < size else 2 * size
        shape, _ = _run(part, latent, components, {**high, dim: other})
        differing = [at for at, (one, two) in enumerate(zip(shape, usual, strict=False)) if one != two]
        if len(shape) != len(usual) or len(differing) != 1:
            raise _refused(part.program, "a result whose height and width follow the latent's", f"{list(shape)}")
        factor, rest = divmod(usual[differing[0]], size)
        if rest or shape[differing[0]] != factor * other:
            raise _refused(part.program, "a whole number of pixels for each cell of the latent", f"{list(shape)}")
        axes.append(TiledAxis(input=dim, output=differing[0], factor=factor))
    return tuple(axes), usual, live_bytes


def _run(part: Part, latent: int, components: Components, sizes: Sizes) -> tuple[Shape, int]:
    """The shape of its output for these sizes of the latent, and how many bytes its values take at once."""
    specs, runner = part.program.specs, ShapeRunner()
    values = {value: specs[value] for value in (*part.inputs, *(value for value, _ in part.weights))}
    known = {value: torch.empty(shape, dtype=dtype, device=META) for value, (shape, dtype) in values.items()}
    own = [sizes.get(dim, size) for dim, size in enumerate(known[latent].shape)]
    known[latent] = known[latent].new_empty(own)

    def given(each: Any) -> Any:
        return known[each.id] if isinstance(each, Ref) else each

    for event in part.events:
        args, kwargs = rebuild((event.args, event.kwargs), given)
        try:
            found = _run_event(event, args, kwargs, runner, components)
            known.update(zip(outputs_of(event), found, strict=True))
        except Exception as error:  # of the pipeline's code, or of torch
            got = f"at {event.where}: {error}".splitlines()[0]
            raise _refused(part.program, "a decoder that can be given part of a latent", got) from error
    return tuple(known[part.outputs[0]].shape), runner.live.peak


def _run_event(
    event: Op | Call, args: Any, kwargs: Any, runner: ShapeRunner, components: Components
) -> list[torch.Tensor]:
    """What it gives, on shapes alone."""
    if isinstance(event, Call):
        found = runner.run(find_module(components, event.module), event.module, args, kwargs)
        out, put = dict(leaves(opened(found.out))), dict(leaves_at(found.written))
        return [*(out[path] for path, _ in event.outputs), *(put[path] for path, _ in event.written)]
    args, kwargs = rebuild((args, kwargs), lambda leaf: leaf.to(META))
    with torch.no_grad():
        made = event.function(*args, **kwargs | ({"device": META} if kwargs.get("device") else {}))
    return [tensor for _, tensor in leaves(made)]


def _of_any_size(
    part: Part, latent: int, axes: Sequence[TiledAxis], low: Sizes, high: Sizes, users: Sequence[Program],
    tiles: Sequence[Sizes],
) -> Part:  # fmt: skip
    """The part for tiles of all sizes in between; or `apart`, for the `tiles` of each of its users."""
    last, made = len(part.program.specs[latent][0]), dict[tuple[int, ...], Part]()
    for sizes in tiles:
        fixed = {axis: (sizes[axis.input], sizes[axis.input] * axis.factor) for axis in axes}
        made.setdefault(tuple(sizes.values()), replace(part, program=_sized(part, latent, fixed)))
    first = made[tuple(tiles[0].values())]
    names = {dim: f"{part.name}_{NAMES[dim - last]}" for dim in low if low[dim] < high[dim]}
    free = [axis for axis in axes if axis.input in names]
    laws = {axis: (Affine(names[axis.input], 1, 0), Affine(names[axis.input], axis.factor, 0)) for axis in free}
    if not free:
        return first
    return replace(
        first,
        program=_sized(first, latent, laws),
        lengths=tuple(Length(name, low[dim], high[dim], latent, dim) for dim, name in names.items()),
        sizes=tuple({name: each[dim] for dim, name in names.items()} for each in (high, low)),
        apart=tuple((user, made[tuple(sizes.values())]) for user, sizes in zip(users, tiles, strict=True)),
    )


def _sized(part: Part, latent: int, sizes: Mapping[TiledAxis, tuple[Any, Any]]) -> Program:
    """The part's program with these sizes of the latent, and of the output."""
    taken, given = (list(part.program.specs[value][0]) for value in (latent, part.outputs[0]))
    for axis, (of_latent, of_output) in sizes.items():
        taken[axis.input], given[axis.output] = of_latent, of_output
    shapes = {latent: tuple(taken), part.outputs[0]: tuple(given)}
    specs = part.program.specs
    return replace(
        part.program, specs={**specs, **{value: (shape, specs[value][1]) for value, shape in shapes.items()}}
    )


def _with(
    program: Program, cut: Cut, decoder: _Decoder, besides: tuple[Part | None, Part | None], tile: int, overlap: int
) -> Cut:
    """The cut with the decoder in tiles; what its parts hand on are values that the program has not."""
    whole, use = next(part for part in cut.parts if part.name == cut.uses[-1].part), cut.uses[-1]
    part = whole.apart[0][1] if whole.apart else whole
    own = next((own for user, own in whole.apart if user is program), part)
    tiled, (before, after) = decoder.tiled, besides
    smallest = tile if len(tiled.lengths) < len(decoder.axes) else max(each.minimum for each in tiled.lengths)
    given = f"in_{tiled.inputs.index(decoder.latent)}"
    tiling = Tiling(input=given, axes=decoder.axes, tile=tile, overlap=overlap, smallest=smallest)
    times = count_tiles(tiling, _shape_of(decoder.latent, part, own))
    known = dict(zip(own.inputs, use.inputs, strict=False)) | dict(zip(own.outputs, use.outputs, strict=True))
    numbers = dict(zip(_values(part), _values(own), strict=True))  # of the tiled part's values, those of its own
    taken_values = (*program.specs, *program.memory, *(value for each in cut.uses for value in each.outputs))
    new, parts, uses = count(max(taken_values) + 1), list[Part](), list[Use]()
    for each in (before, tiled, after):
        if each:
            inputs, outputs = each.inputs, each.outputs
            if each is tiled:
                inputs, outputs = (tuple(numbers[value] for value in values) for values in (inputs, outputs))
            known |= {value: next(new) for value in outputs if value not in known}
            taken, made = (tuple(known[value] for value in values) for values in (inputs, outputs))
            parts.append(each)
            uses.append(Use(each.name, taken, made, None, *((tiling, times) if each is tiled else (None, 1))))
    others = [each for each in cut.parts if each is not whole]
    return replace(cut, parts=(*others, *parts), uses=(*cut.uses[:-1], *uses))
