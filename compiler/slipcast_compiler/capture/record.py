"""Record a pipeline: its own code runs once, with components that give shapes alone.

A dispatch mode sees every ATen operator of what runs between the components. Values enter at sources: a tokenizer's
output, a random draw, an image that the call was given, a weight that the pipeline's code reads by itself. Operators on
constants run and leave their result; those on other values are recorded besides. A component's module that is called
from outside is one opaque call. What the pipeline reads into Python is a guard, and refused where only the weights give
it: whatever it does then, it may do something else with another prompt.

What a dispatch mode does not see: higher-order operators (flex_attention); verify.py finds that out.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MethodType
from typing import Any, cast

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from slipcast.errors import RecipeError, SlipcastError
from slipcast_compiler.capture.blocks import is_of_blocks
from slipcast_compiler.capture.call import missing_pictures
from slipcast_compiler.capture.edges import leaving_watched, offline
from slipcast_compiler.capture.labels import label_events, written_across
from slipcast_compiler.capture.pil import Picture, Seen, followed, in_pil, rewinding
from slipcast_compiler.capture.processing import called_through, is_processor, process
from slipcast_compiler.capture.program import (
    Call,
    Guard,
    Kind,
    Mark,
    Op,
    Path,
    Program,
    Ref,
    Source,
    Spec,
    Tokenized,
    held_by,
    leaves,
    opened,
    rebuild,
)
from slipcast_compiler.capture.shapes import ShapeRunner, is_pure, is_random, run_on_meta, zeros
from slipcast_compiler.capture.where import here, package_of, raised_at
from slipcast_compiler.capture.written import without_writes

_READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero")
_CHOICES = ("aten::multinomial", "aten::bernoulli", "aten::poisson", "aten::binomial")
FEW = 4096  # numbers, of what is a mask rather than an embedding
LARGE = 1 << 20  # numbers, of what is computed for its shape alone
CALLS, TORCHS = "the call's generator", "torch's own generator"  # what a draw is by
_COMPUTED = "computed"  # beside the kinds of sources: of weights, and of what a module makes of them
Bound = frozenset[str]


def capture(pipe: Any, call: Mapping[str, Any], shapes: ShapeRunner | None = None) -> Program:
    """The program of pipe(**call). The pipeline's modules may be on the meta device; images among the arguments are
    given as tensors, and the result's tensors are what the program gives (output_type "pt" or "latent"). `shapes`: what
    has run in other captures of the pipeline.

    The pipeline is given PIL's pictures where it takes such, or tensors where it does with those what is not followed.
    RecipeError for a call that fails, and for a pipeline that a program cannot follow.
    """
    given, rewind, seen, refused = in_pil(pipe, call), rewinding(call), Seen(), None
    try:
        program, seen = _capture(pipe, call, given, shapes)
        if not seen.escaped:
            return replace(program, resized=seen.resized)
    except RecipeError as error:
        refused = error
        if all(given[name] is value for name, value in call.items()):
            raise
    rewind()
    try:
        return _capture(pipe, call, call, shapes)[0]
    except RecipeError as error:
        if seen.escaped:
            raise RecipeError(
                f"{type(pipe).__name__} reads the numbers of a picture where they cannot be followed",
                expected="PIL's resize, crop, convert and paste, and arithmetic of numpy; or tensors",
                got=seen.escaped[0],
            ) from error
        if refused and Picture.__name__ in str(refused.__cause__):
            raise  # it takes tensors alone, and says so
        raise refused or error from error


def _capture(
    pipe: Any, call: Mapping[str, Any], given: Mapping[str, Any], shapes: ShapeRunner | None
) -> tuple[Program, Seen]:
    """The program of pipe(**given), and what became of its pictures. `call`: the same, with tensors."""
    generators = tuple(value for value in call.values() if isinstance(value, torch.Generator))
    recorder = Recorder(pipe, shapes or ShapeRunner(), generators)
    for name, value in call.items():
        for path, tensor in leaves(value):
            recorder.enter(tensor, "image", (name, *path))
    try:
        with recorder.watching(), torch.no_grad(), recorder, followed(given, call) as seen:
            result = pipe(**given)
    except Exception as error:  # the pipeline's own code, which may fail in any way
        raise recorder.refusal(error, missing_pictures(pipe, call)) from error
    program = recorder.program(result)
    if not any(isinstance(found, Ref) for _, found in program.results):
        raise RecipeError(
            f"{program.pipeline} returns nothing that a program gives",
            expected="tensors that follow from its prompt or its noise",
            got=type(result).__name__,
            hint="--set output_type=pt or latent, if the pipeline has that argument",
        )
    across = written_across(program, label_events(program))
    return (without_writes(program) if across else None) or program, seen


class Recorder(TorchDispatchMode):  # type: ignore[misc]
    """See the module's docstring."""

    def __init__(self, pipe: Any, shapes: ShapeRunner, generators: tuple[torch.Generator, ...] = ()) -> None:
        super().__init__()
        self._pipe, self._generators, self._inside = pipe, generators, 0
        self._package, self._shapes = package_of(type(pipe)), shapes
        self._failed: tuple[str, Exception] | None = None  # the module that raised
        self._modules: dict[int, str] = {}
        self._weights: dict[int, tuple[str, torch.Tensor]] = {}
        for name, module in pipe.components.items():
            if isinstance(module, nn.Module):
                self._modules |= {id(each): f"{name}.{path}".rstrip(".") for path, each in module.named_modules()}
                tensors = [*module.named_parameters(), *module.named_buffers()]
                self._weights |= {id(tensor): (f"{name}.{path}", tensor) for path, tensor in tensors}
        self._ids: dict[int, int] = {}
        self._kept: list[Any] = []  # so that no id is used again
        self._count = 0
        self._bound: dict[int, Bound] = {}
        self._memory: dict[int, int] = {}  # value -> the storage that it lies in
        self._specs: dict[int, Spec] = {}
        self._written: dict[int, int] = {}  # storage of a constant that was written into -> the value of its content
        self._constants: dict[tuple[int, int], torch.Tensor] = {}
        self._sources: list[Source] = []
        self._events: list[Op | Call] = []
        self._marks: list[Mark] = []
        self._guards: list[Guard] = []
        self._called_as: list[tuple[int, nn.Module, int]] = []  # the place of each call, and the state of its module

    def program(self, result: Any) -> Program:
        """What was recorded, of a call that returned `result`."""
        self._note_changes()
        results = tuple((path, self._refer(tensor)) for path, tensor in leaves(opened(result)))
        return Program(
            type(self._pipe).__name__,
            tuple(self._sources),
            tuple(self._events),
            tuple(self._marks),
            tuple(self._guards),
            dict(self._memory),
            results,
            dict(self._specs),
            self._sigmas(),
            live=dict(self._shapes.live.peaks),
        )

    def _note_changes(self) -> None:
        """RecipeError where a module was another one for its call, and what it did then cannot be told."""
        now = {module: self._shapes.states.of(module) for module in {module for _, module, _ in self._called_as}}
        for place, module, state in self._called_as:
            call = self._events[place]
            if state == now[module] or not isinstance(call, Call):
                continue
            if call.inside is None:
                raise RecipeError(
                    f"{type(self._pipe).__name__} changes its component {call.module} for the time of a call",
                    expected="operators that can be recorded there",
                    got=f"none, at {call.where}",
                    hint="an argument of the pipeline may turn off what needs it",
                )
            self._events[place] = replace(call, changed=True)

    def _sigmas(self) -> tuple[float, ...]:
        found = getattr(find_scheduler(self._pipe), "sigmas", None)
        if not isinstance(found, torch.Tensor) or found.ndim != 1 or found.is_meta:
            return ()
        return tuple(map(float, found))

    def enter(
        self, tensor: torch.Tensor, kind: Kind, detail: tuple[Any, ...], tokenized: Tokenized | None = None
    ) -> None:
        """A source."""
        value = self._new(tensor, frozenset((kind, _COMPUTED) if kind == "weight" else (kind,)))
        self._sources.append(Source(value, kind, detail, tensor.detach().clone(), tokenized))

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within it, calls of components, tokenizers and the scheduler's steps come here first."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(offline(lambda: here(self._package)))
            stack.enter_context(leaving_watched(self._leaving))
            stack.enter_context(self._on_cpu())
            stack.enter_context(self._modules_opaque())
            watched = set[int]()  # pipelines of several steps share a scheduler, or a tokenizer
            for name, part in self._pipe.components.items():
                if part is None or isinstance(part, nn.Module) or id(part) in watched:
                    continue
                watched.add(id(part))
                if _is_scheduler(part):
                    stack.enter_context(self._steps_marked(part))
                elif callable(getattr(part, "decode", None)) or is_processor(name, part):
                    stack.enter_context(self._texts_watched(name, part))
            yield

    def refusal(self, error: Exception, pictures: Sequence[str] = ()) -> SlipcastError:
        """Of a call that failed with this error, in words of its user; `pictures`: arguments that it was not given."""
        problem, place = f"{type(self._pipe).__name__} cannot be captured", raised_at(error)
        if self._failed and self._failed[1] is error:
            if isinstance(error, RuntimeError) and "meta" in str(error).lower():
                return RecipeError(
                    f"{problem}: its component {self._failed[0]} reads numbers that it computes",
                    expected="arithmetic on tensors, which is the same for every prompt",
                    got=place,
                    hint="what is done there follows from the weights: of this no program can be made",
                )
            problem += f": its component {self._failed[0]} fails"
        if isinstance(error, SlipcastError):
            problem += f": {error.message}"
            return type(error)(problem, expected=error.expected, got=error.got, hint=error.hint)
        parts = self._pipe.components.items() if is_of_blocks(self._pipe) else ()
        missing = [name for name, part in parts if part is None]
        return RecipeError(
            f"{problem} with these arguments",
            expected="a call that runs to its end",
            got=f"{type(error).__name__} at {place}: {error}".splitlines()[0],
            hint="give what it needs under [call], or with --set"
            + (f"; pictures that it was not given: {', '.join(pictures)}" if pictures else "")
            + (f"; components that it has not: {', '.join(missing)}" if missing else "")
            + "; `slipcast --debug capture ...` shows where it failed",
        )

    # --- values ---------------------------------------------------------------------------------------------------

    def _new(self, tensor: torch.Tensor, bound: Bound) -> int:
        value, self._count = self._count, self._count + 1
        self._ids[id(tensor)] = value
        self._kept.append(tensor)
        self._bound[value] = bound
        self._memory[value] = _storage(tensor)
        self._specs[value] = tuple(tensor.shape), tensor.dtype
        return value

    def _same(self, tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The other, which is one value with the tensor from here on."""
        self._ids[id(other)] = self._ids[id(tensor)]
        self._kept.append(other)
        return other

    def _refer(self, tensor: Any) -> Any:
        """As an argument of an event: a value, or a constant as it is now."""
        if isinstance(tensor, Ref):
            return tensor
        if (value := self._ids.get(id(tensor))) is not None:
            return Ref(value)
        if id(tensor) in self._weights:
            return Ref(self._enter_weight(tensor))
        if (content := self._written.get(_storage(tensor))) is not None:
            return Ref(self._view_of(content, tensor))
        key = id(tensor), tensor._version
        if key not in self._constants:
            self._kept.append(tensor)
            with self._unseen():
                self._constants[key] = tensor.detach().clone()
        return self._constants[key]

    def _view_of(self, content: int, tensor: torch.Tensor) -> int:
        """A tensor that lies in memory which is a value: in operators that exporters know, where there are such."""
        offset, shape = tensor.storage_offset(), tuple(tensor.shape)
        if tensor.is_contiguous():
            part = self._new(torch.empty(0), self._bound[content])
            self._memory[part] = self._memory[content]
            self._specs[part] = (tensor.numel(),), tensor.dtype
            cut = (Ref(content), 0, offset, offset + tensor.numel())
            self._events.append(Op(torch.ops.aten.slice.Tensor, cut, {}, (part,)))
            function, args = torch.ops.aten.view.default, tuple[Any, ...]((Ref(part), list(shape)))
        else:
            function, args = torch.ops.aten.as_strided.default, (Ref(content), shape, tensor.stride(), offset)
        value = self._new(tensor, self._bound[content])
        self._events.append(Op(function, args, {}, (value,)))
        return value

    def _enter_weight(self, tensor: torch.Tensor) -> int:
        name, real = self._weights[id(tensor)]
        with self._unseen():
            value = zeros(real.detach())
        self.enter(value, "weight", (name,))
        self._ids[id(tensor)] = self._ids[id(value)]
        self._weights[id(tensor)] = name, value
        return self._ids[id(tensor)]

    def _bound_by(self, structure: Any) -> Bound:
        found = Bound()
        for _, tensor in leaves(structure):
            if isinstance(tensor, Ref):
                found |= self._bound[tensor.id]
            elif (value := self._ids.get(id(tensor))) is not None:
                found |= self._bound[value]
            elif (content := self._written.get(_storage(tensor))) is not None:
                found |= self._bound[content]
        return found

    @contextlib.contextmanager
    def _unseen(self) -> Iterator[None]:
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    # --- operators ------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if self._inside:
            return func(*args, **kwargs)
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
            kwargs["device"] = torch.device("cpu")
        args, kwargs = rebuild((args, kwargs), self._real)
        if is_random(func, args, kwargs):
            return self._draw(func, args, kwargs)
        bound = self._bound_by((args, kwargs))
        if not bound:
            return func(*args, **kwargs)
        if func is torch.ops.aten.alias.default and id(args[0]) in self._ids:  # such as a cut to a length that it has
            return self._same(args[0], func(*args))
        self._read(func, args, bound)
        self._open_written(func, args, kwargs, bound)
        given = rebuild((args, kwargs), self._refer)
        if _COMPUTED in bound and is_pure(func):  # nobody may read its numbers, which are none
            with self._unseen():
                out = run_on_meta(func, args, kwargs)
        else:
            out = func(*args, **kwargs)
        values = tuple(self._new(tensor, bound) for _, tensor in leaves(out))
        self._events.append(Op(func, given[0], given[1], values, here()))
        return out

    def _draw(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func._schema.name in _CHOICES:
            raise RecipeError(
                "it draws from probabilities that it computes",
                expected="draws of noise, which a runtime makes as torch does",
                got=f"{func._schema.name} at {here()}",
                hint="of such a pipeline, as of those that sample tokens, no bundle can be made",
            )
        with self._unseen():
            names = {**dict.fromkeys(self._generators, CALLS), torch.default_generator: TORCHS}
            before = [each.get_state() for each in names]  # Python's objects are made anew on the way here
            out = func(*args, **kwargs)
            states = zip(names.items(), before, strict=True)
            drawn = (name for (each, name), was in states if not torch.equal(each.get_state(), was))
            by = next(drawn, "another generator")
            for _, tensor in leaves(out):
                self.enter(tensor, "noise", (str(func), by))
        return out

    def _real(self, tensor: Any) -> Any:
        """A weight that the pipeline's code reads is a source, with numbers of its own."""
        if id(tensor) in self._weights and not isinstance(tensor, Ref):
            self._refer(tensor)
            return self._weights[id(tensor)][1]
        return tensor

    def _read(self, func: Any, args: Any, bound: Bound) -> None:
        name = str(func._schema.name)
        masked = name == "aten::index" and any(t.dtype == torch.bool for _, t in leaves(args[1:]))
        if masked or name == "aten::masked_select":  # of which the mask alone decides
            bound = self._bound_by(args[1:])
        if (name in _READS or masked) and bound:
            self._guard(name.removeprefix("aten::"), bound)

    def _leaving(self, name: str, tensor: torch.Tensor) -> None:
        """A tensor that becomes an array or a list."""
        if not self._inside and (bound := self._bound_by(tensor)):
            self._guard(name, bound)

    def _guard(self, operator: str, bound: Bound) -> None:
        """A value that is read into Python. RecipeError where it needs the weights: capture has none."""
        if _COMPUTED in bound:
            raise RecipeError(
                "it reads a number into Python that its components compute",
                expected="arithmetic on tensors, which is the same for every prompt",
                got=f"{operator} at {here()}",
                hint="a branch on it may go another way with another prompt: keep to tensors there (torch.where)",
            )
        self._guards.append(Guard(operator, here(), tuple(sorted(bound))))

    def _open_written(self, func: Any, args: Any, kwargs: Any, bound: Bound) -> None:
        """Before an operator writes into a constant: what lies in its memory becomes a value, which views refer to."""
        if not func._schema.is_mutable:
            return
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            tensor = given.get(argument.name)
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if not writes or not isinstance(tensor, torch.Tensor) or id(tensor) in self._ids:
                continue
            storage = _storage(tensor)
            if storage in self._written:
                self._bound[self._written[storage]] |= bound
                continue
            with self._unseen():
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                content = torch.as_strided(tensor.detach(), (size,), (1,), 0)
                before = content.clone()
            self._kept.append(tensor)
            value = self._new(content, bound)
            self._written[storage] = value
            self._events.append(Op(torch.ops.aten.clone.default, (before,), {}, (value,), here()))

    # --- what comes here first -------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _on_cpu(self) -> Iterator[None]:
        """The pipeline takes the CPU for its device, whatever its modules are on."""
        own, cpu = type(self._pipe), torch.device("cpu")
        devices = {name: property(lambda _: cpu) for name in ("device", "_execution_device")}
        self._pipe.__class__ = type(own.__name__, (own,), devices)
        try:
            yield
        finally:
            self._pipe.__class__ = own

    @contextlib.contextmanager
    def _modules_opaque(self) -> Iterator[None]:
        usual = nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self._inside or id(module) not in self._modules:
                return usual(module, *args, **kwargs)
            return self._called(module, args, kwargs)

        nn.Module.__call__ = call
        try:
            yield
        finally:
            nn.Module.__call__ = usual

    def _called(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        bound = self._bound_by((args, kwargs))
        given = rebuild((args, kwargs), self._refer)
        name = self._modules[id(module)]
        self._called_as.append((len(self._events), module, self._shapes.states.of(module)))
        with self._unseen():
            try:
                found = self._shapes.run(module, name, args, kwargs, self._is_known)
            except Exception as error:
                self._failed = self._failed or (name, error)
                raise
            shaped, written = found.out, found.written
            out, put = rebuild((shaped, written), zeros)
        integers = [
            each for _, each in leaves((args, kwargs)) if not (isinstance(each, Ref) or each.is_floating_point())
        ]
        known = bound - {_COMPUTED} | self._bound_by(integers)  # of integers, which are real if those given are

        def values(shapes: Any, made: Any) -> tuple[tuple[Path, int], ...]:
            pairs = zip(leaves(opened(shapes)), leaves(opened(made)), strict=True)
            return tuple(
                (path, self._new(tensor, bound | {_COMPUTED} if shape.is_meta else known))
                for (path, shape), (_, tensor) in pairs
            )

        outputs, places = values(shaped, out), []
        for path, value in put.items():
            _place((args, kwargs), path, value)
            places += [((*path, *inner), number) for inner, number in values(written[path], value)]
        self._events.append(Call(name, given[0], given[1], outputs, here(), tuple(places), found.inside))
        return out

    def _is_known(self, tensor: torch.Tensor) -> bool:
        """Whether a component may read a tensor's numbers: those of a mask, or of a time, follow from prompts alone;
        constants are what they are."""
        bound = self._bound_by(tensor)
        return tensor.numel() <= LARGE if not bound else bound <= {"prompt"} and _is_few(tensor)

    @contextlib.contextmanager
    def _steps_marked(self, scheduler: Any) -> Iterator[None]:
        usual = scheduler.step
        signature = inspect.signature(usual)

        def step(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            output, sample = (rebuild(given.get(name), self._refer) for name in ("model_output", "sample"))
            begin = len(self._events)
            out = usual(*args, **kwargs)
            result = next((self._refer(tensor) for _, tensor in leaves(opened(out))), None)
            self._marks.append(Mark(output, sample, result, begin, len(self._events)))
            return out

        scheduler.step = _Step(scheduler, step)  # not of another class: pipelines ask for it
        try:
            yield
        finally:
            del scheduler.step

    def _texts_watched(self, name: str, tokenizer: Any) -> contextlib.AbstractContextManager[None]:
        def watch(call: Any, this: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            if self._inside:
                return call(*args, **kwargs)
            if is_processor(name, this) and (made := process(call, this, args, kwargs, self._unseen)) is not None:
                return made
            with self._unseen():
                out = call(*args, **kwargs)
                texts = kwargs.get("text", args[0] if args else None)
                first = texts[0] if isinstance(texts, list | tuple) and texts else texts
                kind: Kind = "prompt" if isinstance(first, str | list) else "image"
                given = _tokenized(this, texts, kwargs) if kind == "prompt" else None
                for path, tensor in leaves(opened(out)):
                    self.enter(tensor, kind, (name, *path), given)
            return out

        return called_through(tokenizer, watch)


class _Step:
    """A scheduler's step that is done in another way, and looks as it did: pipelines read from its signature what it
    can be given, such as a generator. A copy of the scheduler, for a second latent, has the usual one."""

    def __init__(self, scheduler: Any, step: Callable[..., Any]) -> None:
        functools.update_wrapper(self, scheduler.step)
        self._scheduler, self._step = scheduler, step

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._step(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return MethodType(type(self._scheduler).step, memo[id(self._scheduler)])


def find_scheduler(pipe: Any) -> Any:
    """The pipeline's scheduler, by what it can do; None where there is none, or more than one."""
    found = [part for part in pipe.components.values() if not isinstance(part, nn.Module) and _is_scheduler(part)]
    return found[0] if len(found) == 1 else None


def _is_scheduler(part: Any) -> bool:
    return callable(getattr(part, "step", None)) and callable(getattr(part, "set_timesteps", None))


def _tokenized(tokenizer: Any, texts: Any, kwargs: Mapping[str, Any]) -> Tokenized | None:
    """What a tokenizer, or a processor that has one, was given; None where that is more than a list of texts."""
    several = [texts] if isinstance(texts, str) else texts
    if not all(isinstance(text, str) for text in several):
        return None
    backend = getattr(getattr(tokenizer, "tokenizer", tokenizer), "backend_tokenizer", None)
    padding, truncation = (backend.padding, backend.truncation) if backend is not None else (None, None)
    return Tokenized(tuple(several), bool(kwargs.get("add_special_tokens", True)), padding, truncation)


def _place(given: Any, path: Path, value: Any) -> None:
    """Put a value where a module put one, into a list, a dict or an object that it was given."""
    for key in path[:-1]:
        given = vars(given)[key] if held_by(given) is not None else given[key]
    if held_by(given) is not None:
        setattr(given, path[-1], value)
    elif isinstance(given, list) and path[-1] == len(given):
        given.append(value)
    else:
        given[path[-1]] = value


def _is_few(tensor: torch.Tensor) -> bool:
    return bool(tensor.ndim <= 2 and tensor.numel() <= FEW)


def _storage(tensor: torch.Tensor) -> int:
    return cast(int, tensor.untyped_storage()._cdata)
