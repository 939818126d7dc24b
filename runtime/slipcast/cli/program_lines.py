"""What `slipcast inspect` says of a captured program."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from slipcast.bundle.program import IMAGES, Loop, Program, Variant, rows_of_image
from slipcast.bundle.program_manifest import ProgramManifest
from slipcast.bundle.sources import ImageSource, NoiseSource, PromptSource, Source, TableSource

SHOWN = 60  # characters of a template
OUTPUTS = {"image": "pictures", "frames": "videos", "audio": "sounds", "array": "arrays"}


def program_lines(manifest: ProgramManifest) -> list[str]:
    """The program's arguments, what is listed and what is fixed, its sources and its calls, those of its defaults."""
    program, listed = manifest.program, manifest.program.listed
    texts = [_argument(program, name) for name in program.arguments]
    pictures = [f"{name} ({'; '.join(map(_size, sources))})" for name, sources in program.images.items()]
    lengths = [f"{name} {each.minimum} to {each.maximum}" for name, each in program.lengths.items()]
    fixed = [f"{name}={value!r}" for name, value in program.fixed.items() if name not in listed]
    return [
        f"  program      {program.pipeline}: {len(program.every_call)} calls, {program.usual_steps} steps",
        f"  arguments    {', '.join([*texts, *pictures]) or 'none'}",
        *(_sampling(program.loop) if program.loop else ()),
        *(f"  listed       {line}" for line in _choices(program)),
        f"  fixed        {', '.join(fixed) or 'nothing'}",
        f"  gives        {OUTPUTS[program.output]}{_rate(program)}: {', '.join(program.given)}",
        *([f"  tokens       {', '.join(lengths)}"] if lengths else []),
        *([f"  adapters     rank {slots.rank} in {len(slots.layers)} layers"] if (slots := manifest.adapters) else []),
        *(f"  source       {_source(source)}" for source in program.sources),
        *(f"  calls        {line}" for line in _runs(program)),
        *(f"  together     {line}" for line in _together(manifest)),
        *(f"  tiles        {line}" for line in _tiles(program)),
    ]


def _together(manifest: ProgramManifest) -> Iterator[str]:
    names = [
        str(name)
        for name, each in manifest.components.items()
        if any(rows_of_image(spec.shape) for spec in each.inputs)
    ]
    if names:
        yield f"up to {manifest.program.sizes[IMAGES].maximum} images in a call of {', '.join(names)}"


def _sampling(loop: Loop) -> Iterator[str]:
    sampling = loop.sampling
    yield f"  sampling     {sampling.sampler}, {sampling.schedule or 'an explicit list'}, {sampling.steps} steps"
    usual = {loop.steps: sampling.steps, loop.guidance: sampling.guidance_scale}
    if loop.free:
        yield f"  free         {', '.join(f'{name} ({usual[name]:g})' for name in loop.free)}"
    if interval := sampling.guidance_interval:
        named = " ".join(call.component for call in loop.unguided)
        yield f"  guidance     at sigma {interval[0]:g} to {interval[1]:g}; else {named}"
    if shallow := loop.shallow:
        mask = "".join("F" if full else "s" for full in shallow.mask)
        yield f"  caching      {sum(shallow.mask)} of {len(mask)} steps in full: {mask}"
        yield f"               the others by {shallow.call.component}, with {shallow.share:.1%} of the multiply-adds"


def _rate(program: Program) -> str:
    unit = "frames" if program.output == "frames" else "samples"
    sound = f" with sound of {program.sound.rate:g} samples a second" if program.sound else ""
    return (f" of {program.rate:g} {unit} a second" if program.rate else "") + sound


def _argument(program: Program, name: str) -> str:
    argument = program.arguments[name]
    if argument.same_as is not None:
        return f"{name} (as {argument.same_as})"
    return f"{name} (to be given)" if argument.default is None else f"{name} ({argument.default!r})"


def _choices(program: Program) -> Iterator[str]:
    """What a run may choose, each argument by itself; those of which not all combinations are there, together."""
    groups: list[list[str]] = []
    for name in program.listed:
        bound = [group for group in groups if any(_depend(program, name, other) for other in group)]
        groups = [group for group in groups if group not in bound] + [[*chain(*bound), name]]
    for group in groups:
        values = dict.fromkeys(tuple(variant.fixed[name] for name in group) for variant in program.every)
        yield f"{', '.join(group)} = {' or '.join(', '.join(map(repr, each)) for each in values)}"


def _depend(program: Program, one: str, other: str) -> bool:
    """Whether not all combinations of two arguments are there."""
    pairs = {(variant.fixed[one], variant.fixed[other]) for variant in program.every}
    return len(pairs) < len(program.listed[one]) * len(program.listed[other])


def _source(source: Source) -> str:
    kind = f"{source.value} {source.dtype}[{', '.join(map(str, source.shape))}]"
    match source:
        case PromptSource():
            parts = [_quoted(source.prefix), source.argument or "", _quoted(source.suffix)]
            whole = " + ".join(part for part in parts if part) or "''"
            return f"{kind}: {source.field} of {whole} by {source.tokenizer}"
        case NoiseSource():
            return f"{kind}: noise" + (" of torch's own generator" if source.generator == "torch" else "")
        case ImageSource():
            return f"{kind}: {source.name}"
        case TableSource():
            return f"{kind}: of {source.argument or 'every prompt'}, by the table of a closed family"


def _quoted(text: str) -> str:
    """Some of a template, of which there may be pages."""
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "...") if text else ""


def _size(source: ImageSource) -> str:
    if source.size is None:
        return f"an array {list(source.shape)}"
    channels, height, width = source.size
    return f"{width}x{height}, {'grey' if channels == 1 else 'RGB'}"


def _runs(variant: Variant) -> Iterator[str]:
    """Components in the order of their calls; what is called in turns, as a loop does, on one line."""
    if variant.loop:
        before, after = variant.calls[: variant.loop.at], variant.calls[variant.loop.at :]
        yield from _turns([call.component for call in before])
        yield " ".join(call.component for call in variant.loop.calls) + "  at each evaluation"
        if plain := variant.loop.unguided:
            yield " ".join(call.component for call in plain) + "  in its place, without guidance"
        yield from _turns([call.component for call in after])
        return
    yield from _turns([call.component for call in variant.calls])


def _tiles(program: Program) -> Iterator[str]:
    """Of calls that are evaluated in tiles."""
    tiled = {call.component: call.tiles for variant in program.every for call in variant.every_call if call.tiles}
    for name, tiles in tiled.items():
        yield f"{name}, of {tiles.tile} cells a side at most, of which {tiles.overlap} are its neighbour's too"


def _turns(names: list[str]) -> Iterator[str]:
    place = 0
    while place < len(names):
        length, times = _longest_run(names, place)
        yield " ".join(names[place : place + length]) + (f"  {times} times" if times > 1 else "")
        place += length * times


def _longest_run(names: list[str], place: int) -> tuple[int, int]:
    """(length, times) of the names from a place on that are repeated, so that most are covered; (1, 1) without."""
    found = (1, 1)
    for length in range(1, min(8, len(names) - place) + 1):
        part, times = names[place : place + length], 1
        while names[place + length * times : place + length * (times + 1)] == part:
            times += 1
        if times > 1 and length * times > found[0] * found[1]:
            found = (length, times)
    return found
