"""Export a program: each of its parts to ONNX, with tokenizers, the table, and the record that a runtime reads."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from safetensors.torch import save_file
from torch import nn
from torch.export import Dim

from slipcast.bundle.driving import Column
from slipcast.bundle.manifest import Component
from slipcast.bundle.program import IMAGES, LengthRange, Output, ProgramCall, Soundtrack, Variant
from slipcast.bundle.program import Loop as LoopRecord
from slipcast.bundle.program import Program as Record
from slipcast.bundle.sources import ImageSource, NoiseSource, PromptSource
from slipcast.errors import RecipeError
from slipcast.progress import Advance
from slipcast.run.texts import fields_of
from slipcast_compiler.capture.arguments import fixed_arguments, text_arguments
from slipcast_compiler.capture.cut import Part, Use
from slipcast_compiler.capture.find import Found
from slipcast_compiler.capture.labels import kind_of
from slipcast_compiler.capture.loop import Loop
from slipcast_compiler.capture.parts import describe_parts
from slipcast_compiler.capture.program import Affine, Length, Program, Source, Spec
from slipcast_compiler.capture.record import CALLS, TORCHS
from slipcast_compiler.capture.replay import modules_of
from slipcast_compiler.capture.results import output_of
from slipcast_compiler.capture.splitting import split
from slipcast_compiler.capture.texts import Template
from slipcast_compiler.export.batched import NO_BATCHES, InBatches, rows_of_images
from slipcast_compiler.export.component import OPSET, contract_of, settle
from slipcast_compiler.export.forms import as_known
from slipcast_compiler.export.operators import check_operators
from slipcast_compiler.export.pairs import as_pairs
from slipcast_compiler.export.replayed import Replayed, as_recorded, carried
from slipcast_compiler.export.streamed import NOTHING, Weights, attach
from slipcast_compiler.export.symbols import symbols_kept
from slipcast_compiler.graph.cut import values_of
from slipcast_compiler.graph.weights import share_with
from slipcast_compiler.host.quiet import quiet

logger = logging.getLogger("slipcast")

TABLE, PROGRAM, PARTS = "table.safetensors", "program.json", "parts.json"
FIELDS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


def export_program(
    variants: Sequence[Found], pipe: Any, folder: Path, advance: Advance, weights: Weights = NOTHING,
    batches: Mapping[str, Part] = NO_BATCHES,
) -> Record:  # fmt: skip
    """Write into `folder` NAME.onnx, NAME.onnx.data and NAME.json (the contract) of each part, tokenizers, the table of
    constants, and program.json, the record, which is returned too.

    `variants`: what was found of the pipeline together, of which the first is the default; `weights`: by component and
    name, those that `pipe` has not, which are read one by one as they are written; `batches`: by name, parts as they
    are for several images.
    RecipeError for what no runtime could repeat; ArtifactError where a weight is not there, or no number.
    """
    components = modules_of(pipe)
    variants, parts, free = _export_parts(variants, components, weights, folder, advance, batches)
    tables = {
        _row_name(part, at, True): carried(rows)
        for part in parts.values()
        for at, (_, rows) in enumerate(part.table)
        if not all(
            _law(part.name, at, found.loop) for found in variants if part in found.cut.parts
        )  # then no row is read
    }
    if tables:
        save_file({name: rows.contiguous() for name, rows in tables.items()}, folder / TABLE)
    first, *others = (_variant(found, pipe, folder) for found in variants)
    record = Record(
        **dict(first),
        pipeline=variants[0].program.pipeline,
        arguments={n: each for found in variants for n, each in text_arguments(found.templates, found.call).items()},
        table=TABLE if tables else None,
        output=_output(variants, pipe),
        sizes={each.name: LengthRange(minimum=each.minimum, maximum=each.maximum) for each in free},
        variants=tuple(others),
    )
    (folder / PROGRAM).write_text(record.model_dump_json())
    (folder / PARTS).write_text(json.dumps(describe_parts(variants, pipe)))
    return record


def check_program(variants: Sequence[Found], pipe: Any) -> None:
    """RecipeError for what export_program would refuse after some time: a source that no runtime has, results of
    several kinds, an operator that has no form in ONNX."""
    _output(variants, pipe)
    with tempfile.TemporaryDirectory() as folder:
        for found in variants:
            _variant(found, pipe, Path(folder))
    check_operators(list({part.name: part for found in variants for part in found.cut.parts}.values()))


def _export_parts(
    variants: Sequence[Found], components: Mapping[str, nn.Module], weights: Weights, folder: Path, advance: Advance,
    batches: Mapping[str, Part],
) -> tuple[Sequence[Found], dict[str, Part], list[Length]]:  # fmt: skip
    """All parts by name, exported; what was found, in which parts that cannot be traced with free sizes are others
    for each size; and what their sizes follow."""
    done, free = dict[str, Part](), list[Length]()
    while True:
        parts = {part.name: part for found in variants for part in found.cut.parts}
        part = next((part for part in parts.values() if part.name not in done), None)
        if part is None:
            return variants, parts, free
        advance(len(done), len(parts))
        try:
            free += _export_part(part, components, weights, folder, batches.get(part.name))
        except RecipeError as error:
            if not part.apart:
                raise
            logger.info("%s: an engine for each size: %s", part.name, error.got)
            variants = split(part, variants)
            continue
        _share(part.name, [name for name in done if (folder / f"{name}.onnx.data").is_file()], folder)
        done[part.name] = part


def _output(variants: Sequence[Found], pipe: Any) -> Output:
    """What results are; RecipeError where those of all variants are not of one kind."""
    kinds = dict.fromkeys(output_of(found.program, pipe, {}).kind for found in variants)
    if len(kinds) > 1:
        raise RecipeError(
            "what is listed under [call] makes results of several kinds", expected="one", got=" and ".join(kinds)
        )
    return next(iter(kinds))


def _variant(found: Found, pipe: Any, folder: Path) -> Variant:
    program, fixed = found.program, fixed_arguments(pipe, found.call, found.loop)
    gives = output_of(program, pipe, fixed)
    return Variant(
        fixed=fixed,
        lengths={
            length.name: LengthRange(minimum=length.minimum, maximum=length.maximum)
            for length in program.lengths
        },
        sources=tuple(_source(source, program, pipe, found.templates, folder) for source in _all_sources(found)),
        calls=tuple(_call(use, found.loop) for use in found.cut.uses),
        steps=found.cut.steps,
        loop=_loop(found.loop) if found.loop else None,
        results=tuple(map(_value, gives.values)),
        rate=gives.rate,
        sound=Soundtrack(value=_value(gives.sound[0]), rate=gives.sound[1]) if gives.sound else None,
    )  # fmt: skip


def _call(use: Use, loop: Loop | None) -> ProgramCall:
    return ProgramCall(
        component=use.part,
        inputs={f"in_{at}": _value(value) for at, value in enumerate(use.inputs)},
        outputs={f"out_{at}": _value(value) for at, value in enumerate(use.outputs)},
        row=None if loop and all(loop.columns.get(use.part, (None,))) else use.row,
        tiles=use.tiles,
    )


def _law(part: str, place: int, loop: Loop | None) -> Column | None:
    """What a column of a part's table is in a loop that slipcast's samplers drive, where it is not as in a row."""
    columns = loop.columns.get(part) if loop else None
    return columns[place] if columns else None


def _loop(loop: Loop) -> LoopRecord:
    return LoopRecord(
        at=loop.at,
        calls=(_call(loop.use, loop),),
        unguided=(_call(loop.unguided.use, loop),) if loop.unguided else (),
        sample=_value(loop.sample),
        output=_value(loop.output),
        result=_value(loop.result),
        vp=loop.vp,
        columns={
            f"{part}.row_{place}": column
            for part, each in loop.columns.items()
            for place, column in enumerate(each)
            if column
        },
        sampling=loop.sampling,
        steps=loop.steps,
        guidance=loop.guidance,
    )


def read_record(folder: Path) -> Record:
    """The record that export_program left."""
    return Record.model_validate_json((folder / PROGRAM).read_text())


def contracts(folder: Path, record: Record) -> dict[str, Component]:
    """By component, in the order of their first call, what its engines take and return."""
    names = dict.fromkeys(call.component for variant in record.every for call in variant.every_call)
    return {name: Component.model_validate_json((folder / f"{name}.json").read_text()) for name in names}


def _value(number: int) -> str:
    return f"v{number}"


def _row_name(part: Part, at: int, full: bool = False) -> str:
    return f"{part.name}.row_{at}" if full else f"row_{at}"


def _export_part(
    part: Part, components: Mapping[str, nn.Module], weights: Weights, folder: Path, batched: Part | None = None
) -> tuple[Length, ...]:
    """Writes the part's graph and contract, `batched` if that can be traced; what its sizes follow. Where the code of
    its modules cannot be traced, they are what they did."""
    part, model, module = _trace_one_of([*([batched] if batched else []), part], components)
    own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    attach(model.graph, own, {f"components.{name}": each for name, each in weights.items()})
    settle(model)
    _name_dimensions(model, part)
    ir.save(model, folder / f"{part.name}.onnx", external_data=f"{part.name}.onnx.data")
    (folder / f"{part.name}.json").write_text(contract_of(model).model_dump_json())
    return part.free


def _trace_one_of(parts: Sequence[Part], components: Mapping[str, nn.Module]) -> tuple[Part, ir.Model, nn.Module]:
    """The first that can be traced, with its graph; RecipeError where none can."""
    part, *others = parts
    recorded = part if part.free else as_recorded(part)
    try:
        return part, *_trace(part, components)
    except RecipeError as error:
        if recorded is not part:
            others.insert(0, recorded)
        if not others:
            raise
        logger.info("%s: %s", part.name, error.got)
    return _trace_one_of(others, components)


def _trace(part: Part, components: Mapping[str, nn.Module]) -> tuple[ir.Model, nn.Module]:
    """The part's graph, and the module that has its weights. RecipeError where it has no graph."""
    program = part.program
    kind = InBatches if any(each.name == IMAGES for each in part.free) else Replayed
    module = kind(part, components, program.specs).eval()
    given = [program.specs[value] for value in part.inputs]
    given += [(tuple(rows.shape[1:]), rows.dtype) for _, rows in part.table]
    largest = {name: max(sizes[name] for sizes in part.sizes) for name in part.sizes[0]}
    examples = _examples(given, largest, torch.device("cpu"))
    inputs = [f"in_{at}" for at in range(len(part.inputs))] + [_row_name(part, at) for at in range(len(part.table))]
    outputs = [f"out_{at}" for at in range(len(part.outputs))]
    try:
        with torch.no_grad(), quiet(), symbols_kept(module):
            traced = torch.export.export(module, examples, dynamic_shapes=(_free(part, given),))
            _check_sizes(part, traced, given)
            traced = as_known(as_pairs(traced))
            exported = torch.onnx.export(
                traced, dynamo=True, optimize=False, opset_version=OPSET, verbose=False, input_names=inputs,
                output_names=outputs,
            )  # fmt: skip
    except RecipeError:
        raise
    except Exception as error:  # torch's exporters raise many kinds, all of which mean that a graph cannot be made
        raise RecipeError(
            f"{part.name} cannot be exported",
            expected="a graph of operators that ONNX has",
            got=_first_cause(error),
            hint="`slipcast --debug compile ...` shows where; the pipeline's code or a newer torch may avoid it",
        ) from error
    assert exported is not None
    return exported.model, module


def _first_cause(error: BaseException) -> str:
    """What torch's exporter stopped at, below what it says of its own steps."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"


def _share(name: str, exported: Sequence[str], folder: Path) -> None:
    """Weights that a part has in common with one that was exported before, such as of the same model for another size,
    are on the disk once."""
    graph, alike = folder / f"{name}.onnx", [other for other in exported if kind_of(other) == kind_of(name)]
    if graph.with_suffix(".onnx.data").is_file():
        any(share_with(graph, folder / f"{other}.onnx") for other in alike)


def _check_sizes(part: Part, traced: torch.export.ExportedProgram, given: Sequence[Spec]) -> None:
    """AssertionError where what was traced is not for all sizes, and for the shortest and the longest texts: a branch
    that one of them takes is the graph's."""
    lengths = part.program.lengths
    guards = [each for name, each in traced.module().named_children() if name == "_guards_fn"]  # that torch puts there
    for sizes in part.sizes if part.free or lengths else ():
        shortest = {**sizes, **{each.name: each.minimum for each in lengths}}
        longest = {**sizes, **{each.name: each.maximum for each in lengths}}
        for each, ends in product(guards, (shortest, longest)):
            with _small_sizes(part):
                each(*_examples(given, ends, torch.device("meta")))


@contextlib.contextmanager
def _small_sizes(part: Part) -> Iterator[None]:
    """Within it, torch does not assert of sizes that they are neither 0 nor 1, as the tracer asks of every one: what is
    padded to the longest text is, at that one; nor that there is more than one image."""
    usual, specs = torch._assert, part.program.specs
    counts = {f"given_{at}.size()[0]" for at, value in enumerate(part.inputs) if rows_of_images(specs[value])}

    def check(condition: Any, message: str) -> None:
        of_images = message.endswith("!= 1") and counts.issuperset(re.findall(r"given_\d+\.size\(\)\[\d+\]", message))
        if not of_images and not message.endswith(">= 2"):
            usual(condition, message)

    torch._assert = check
    try:
        yield
    finally:
        torch._assert = usual


def _examples(given: Sequence[Spec], sizes: Mapping[str, int], device: torch.device) -> tuple[torch.Tensor, ...]:
    return tuple(carried(torch.zeros(_sizes(shape, sizes), dtype=dtype, device=device)) for shape, dtype in given)


def _sizes(shape: tuple[int | Affine, ...], lengths: Mapping[str, int]) -> list[int]:
    return [size.at(lengths) if isinstance(size, Affine) else size for size in shape]


def _free(part: Part, given: Sequence[Spec]) -> tuple[dict[int, Any], ...]:
    """By input, its dimensions that follow something. How those of texts hang together the tracer finds, as it meets
    them; of sizes it is told."""
    known = {each.name: Dim(each.name, min=each.minimum, max=each.maximum) for each in part.free}

    def free(size: Affine) -> Any:
        if size.more or size.length not in known:
            return Dim.DYNAMIC
        scaled = known[size.length] * size.scale if size.scale != 1 else known[size.length]
        return scaled + size.offset if size.offset else scaled

    return tuple({dim: free(size) for dim, size in enumerate(shape) if isinstance(size, Affine)} for shape, _ in given)


def _name_dimensions(model: ir.Model, part: Part) -> None:
    """Call free dimensions by what they follow in place of the tracer's symbols (s53)."""
    if images := next((each for each in part.free if each.name == IMAGES), None):
        _name_images(model.graph, str(model.graph.inputs[part.inputs.index(images.value)].shape[0]))
    pairs = [*zip(model.graph.inputs, part.inputs, strict=False), *zip(model.graph.outputs, part.outputs, strict=True)]
    for value, number in pairs:
        shape = part.program.specs[number][0]
        value.shape = ir.Shape([str(size) if isinstance(size, Affine) else size for size in shape])


def _name_images(graph: ir.Graph, size: str) -> None:
    """The same of all values, for what leaves the loop is cut by them. `size`: 2*s53, or s53."""
    symbol = re.compile(rf"\b{size.rpartition('*')[2]}\b")
    for value in values_of(graph):
        if value.shape:
            named = [isinstance(each, ir.SymbolicDim) and each.value is not None for each in value.shape]
            pairs = zip(value.shape, named, strict=True)
            value.shape = ir.Shape([symbol.sub(IMAGES, str(each.value)) if known else each for each, known in pairs])


# --- the record ------------------------------------------------------------------------------------------------------


def _all_sources(found: Found) -> list[Source]:
    """Those that are needed, and every draw: the next one depends on it. What the scheduler draws is a sampler's own
    affair, where one has its place."""
    needed = {source.id for source in found.program.needed_sources}
    every = [
        s for s in found.program.sources if (s.id in needed and s.kind != "weight") or {CALLS, TORCHS} & {*s.detail}
    ]
    if not found.loop:
        return every
    inside = [found.loop.use, *([found.loop.unguided.use] if found.loop.unguided else [])]
    read = {value for use in (*found.cut.uses, *inside) for value in use.inputs} | {found.loop.sample}
    last = max((place for place, source in enumerate(every) if source.id in read), default=-1)
    return every[: last + 1]


def _source(
    source: Source, program: Program, pipe: Any, templates: Mapping[int, Template], folder: Path
) -> PromptSource | NoiseSource | ImageSource:
    name, shape, dtype = _value(source.id), tuple(source.value.shape), source.value.dtype
    what = ".".join(map(str, source.detail))
    if source.kind == "noise":
        if "randn" not in what or not {CALLS, TORCHS} & {*source.detail} or dtype != torch.float32:
            raise _unknown("a draw", f"torch.randn in float32 by {CALLS}, or {TORCHS}", f"{what} in {dtype}")
        return NoiseSource(value=name, shape=shape, generator="torch" if TORCHS in source.detail else "call")
    if source.kind == "image":
        argument, *places = source.detail
        listed = len(places) == 1 and isinstance(places[0], int)
        if (places and not listed) or dtype != torch.float32:
            raise _unknown(
                f"the array {what}", "an argument of the call, in float32", f"{dtype} {list(shape)}",
                hint="of processors, those that resize, crop, rescale and normalise are for bundles: give what comes "
                "of the picture, if the pipeline takes it (image_embeds, depth_map)",
            )  # fmt: skip
        return ImageSource(value=name, argument=argument, place=places[0] if places else None, shape=shape)
    tokenizer, field = source.detail[0], source.detail[-1]
    if field not in FIELDS or len(shape) != 2 or shape[0] != 1:
        raise _unknown(f"what {what} gives", f"{', '.join(FIELDS)} of one text", f"{what} {list(shape)}")
    template, given = templates[source.id], source.tokenized
    assert given is not None
    return PromptSource(
        value=name,
        tokenizer=_write_tokenizer(source, pipe.components[tokenizer], folder),
        field=field,
        argument=template.argument,
        prefix=template.prefix,
        suffix=template.suffix,
        lower=template.lower,
        strip=template.strip,
        clean=template.clean,
        mend=template.mend,
        unquoted=template.unquoted,
        special_tokens=given.special_tokens,
        shape=(1, str(size) if isinstance(size := program.specs[source.id][0][1], Affine) else size),
        length=next((each.name for each in program.lengths if each.dim is None and each.value == source.id), None),
    )


def _write_tokenizer(source: Source, tokenizer: Any, folder: Path) -> str:
    """tokenizer.json with the settings that the pipeline's call made; RecipeError where it gives other tokens."""
    from tokenizers import Tokenizer

    given = source.tokenized
    backend = getattr(getattr(tokenizer, "tokenizer", tokenizer), "backend_tokenizer", None)
    if backend is None or given is None:
        raise _unknown(
            f"the tokenizer {source.detail[0]}", "one that the tokenizers library runs", type(tokenizer).__name__
        )
    made = Tokenizer.from_str(backend.to_str())
    padding = _padding(source)
    made.no_padding() if padding is None else made.enable_padding(**padding)
    made.no_truncation() if given.truncation is None else made.enable_truncation(**given.truncation)
    encoded = made.encode(given.texts[0], add_special_tokens=given.special_tokens)
    if fields_of(encoded)[source.detail[-1]] != source.value[0].tolist():
        raise _unknown(f"what {source.detail[0]} gives", "the tokens of its tokenizer.json", "others")
    settings = json.dumps([padding, given.truncation], sort_keys=True).encode()
    name = f"{source.detail[0]}-{hashlib.sha256(settings).hexdigest()[:8]}.json"
    (folder / name).write_text(made.to_str())
    return name


def _padding(source: Source) -> dict[str, Any] | None:
    """As the tokenizers library takes it: the tokenizer's own, and that of the pipeline's code."""
    own = source.tokenized.padding if source.tokenized else None
    if source.padding is None:
        return dict(own) if own is not None else None
    padding = source.padding
    return {
        **(own or {}), "length": None, "pad_to_multiple_of": padding.multiple, "pad_id": padding.fill,
        "direction": "left" if padding.left else "right",
    }  # fmt: skip


def _unknown(what: str, expected: str, got: str, hint: str | None = None) -> RecipeError:
    return RecipeError(f"{what} cannot be had in a runtime", expected=expected, got=got, hint=hint)
