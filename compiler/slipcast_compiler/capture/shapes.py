"""Run modules for the shapes of their outputs: floating-point tensors on torch's meta device, integers for real.

So no weight is read, and code that branches on integers (lengths, masks, position ids) finds what it would find.
"""

from __future__ import annotations

import contextlib
import mmap
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from slipcast.errors import RecipeError
from slipcast_compiler.capture.changed import States
from slipcast_compiler.capture.deciding import Deciding
from slipcast_compiler.capture.edges import autocast_on_meta
from slipcast_compiler.capture.inside import Inside
from slipcast_compiler.capture.live import LiveBytes
from slipcast_compiler.capture.program import Path, Program, held_by, leaves, opened, rebuild
from slipcast_compiler.capture.where import here

META = torch.device("meta")
MAPPED = 1 << 16  # bytes
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
_INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)
_VALUES_DECIDE = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_BEYOND_RECORDING = (AssertionError, NotImplementedError)  # of operators of higher order, which know few modes
_PLAIN = (torch.Tensor, int, float, str, bool, torch.dtype, torch.device, type(None))


IsKnown = Callable[[torch.Tensor], bool]


def _is_nothing(_: torch.Tensor) -> bool:
    return False


@dataclass(frozen=True)
class Shaped:
    """`out`: what a module returns, with tensors on meta in place of those that need its weights. `written`: by path in
    (args, kwargs), what it put into lists and dicts that it was given. `inside`: what it did, if that can be told."""

    out: Any
    written: dict[Path, Any]
    inside: Program | None


class ShapeRunner:
    """Runs modules, each once for arguments of the same shapes, and of the same values where those decide: a denoiser
    has the same at every step, and a text encoder in every capture of a prompt. `live`: what their values took;
    `states`: of the modules."""

    def __init__(self) -> None:
        # by the shapes of arguments: of those whose values decided, what these were; and what came out
        self._known = defaultdict[Any, list[tuple[dict[int, torch.Tensor], Shaped]]](list)
        self.live, self.states = LiveBytes(), States()

    def run(
        self, module: torch.nn.Module, name: str, args: Any, kwargs: Any, is_known: IsKnown = _is_nothing
    ) -> Shaped:
        """Of a module that is called `name`, with these arguments. `is_known`: whether a tensor's floating-point
        numbers are, and may decide, such as those of a mask."""
        used = rebuild((args, kwargs), lambda leaf: leaf if is_known(leaf) else _to_meta(leaf))
        key, there = (self.states.of(module), _key(module, args, kwargs)), _there(used)
        for values, known in self._known[key]:
            if all(torch.equal(tensor, there[place]) for place, tensor in values.items()):
                return Shaped(rebuild(known.out, torch.empty_like), {}, known.inside)
        self.live.begin(name)
        numbers = [tensor.detach().clone() for tensor in there]  # before the module, which may write to them
        deciding = Deciding(there)
        before, mode = rebuild(used, lambda leaf: leaf), _Shapes(self.live, deciding)
        inside = Inside(module, name, used, deciding.read)
        with _left_as_it_was(module), torch.no_grad(), mode, autocast_on_meta():
            try:
                with inside.recording():
                    out = module(*used[0], **used[1])
            except _BEYOND_RECORDING:
                inside.failed, used = True, rebuild(before, lambda leaf: leaf)  # without what it put into lists
                out = module(*used[0], **used[1])
        written = dict(_written(before, used))
        shaped = Shaped(out, written, inside.program(opened(out), written))
        found = [tensor for _, tensor in leaves(out)]
        if key[1] and found and not written and all(each.device == META for each in found):
            values = {place: numbers[place] for place in deciding.found}
            self._known[key].append((values, replace(shaped, out=rebuild(out, torch.empty_like))))
        return shaped


def run_for_shapes(module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
    """What ShapeRunner's run says that the module returns."""
    return ShapeRunner().run(module, "", args, kwargs).out


@contextlib.contextmanager
def _left_as_it_was(module: torch.nn.Module) -> Iterator[None]:
    """What a module keeps of a call, such as position embeddings on the device of its arguments, is forgotten, in
    objects of its own too; so are hooks that it puts on its parts."""
    inside = [vars(each) for each in module.modules()]
    inside += [vars(value) for each in inside for value in each.values() if held_by(value) is not None]
    inside += [value for each in inside for value in each.values() if type(value) in (dict, OrderedDict)]
    kept = [(each, dict(each)) for each in inside]
    try:
        yield
    finally:
        for now, before in kept:
            now.clear()
            now.update(before)


def _written(before: Any, after: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """By path, what is new in lists, dicts and objects. None becomes shorter: caches grow, or have places to fill."""
    if isinstance(after, dict) and isinstance(before, dict):
        pairs = [(key, before.get(key), inner) for key, inner in after.items()]
    elif isinstance(after, list | tuple) and isinstance(before, list | tuple):
        longer = [*before, *[None] * (len(after) - len(before))]
        pairs = [(place, old, new) for place, (old, new) in enumerate(zip(longer, after, strict=False))]
    elif (held := held_by(after)) is not None and type(before) is type(after):
        pairs = [(name, vars(before).get(name), inner) for name, inner in held.items()]
    else:
        if before is not after:
            yield path, after
        return
    for key, old, new in pairs:
        yield from _written(old, new, (*path, key))


def is_pure(func: Any) -> bool:
    """Whether an operator's results are its own and have shapes that follow from shapes: no views, nothing written."""
    schema = func._schema
    aliases = any(each.alias_info for each in (*schema.arguments, *schema.returns))
    return not aliases and not any(tag in func.tags for tag in _VALUES_DECIDE)


def is_random(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operator draws random numbers; those that could, as attention with dropout, do not when it is off."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    switch = next((name for name in ("dropout_p", "train", "training") if name in names), None)
    return switch is None or bool(given.get(switch))


class _Shapes(TorchDispatchMode):  # type: ignore[misc]
    """Operators whose tensors are all on the CPU run there; where one is on meta, or is a weight, all go there.

    `deciding`: is told what they do there, and which of them read numbers.
    """

    def __init__(self, live: LiveBytes, deciding: Deciding) -> None:
        super().__init__()
        self._live, self._deciding = live, deciding

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_random(func, args, kwargs):
            raise RecipeError(
                "it draws random numbers inside, which come out differently each time",
                expected="draws in the pipeline's own code, with its generator",
                got=f"{func._schema.name} at {here()}",
            )
        if any(tag in func.tags for tag in _VALUES_DECIDE):
            self._deciding.read(*_there((args, kwargs)))
        if not any(map(_is_shape, tree_leaves((args, kwargs)))):
            made = func(*args, **kwargs)
            self._deciding.compute(func, (args, kwargs), made)
            # Integers stay real where a module makes or moves them "where its weights are".
            if kwargs.get("device") == META and not (made.is_floating_point() or made.is_complex()):
                made = func(*args, **kwargs | {"device": torch.device("cpu")})
            return made
        if func in _INDEXING:
            args = (args[0], self._as_places(args[1]), *args[2:])
        if not all(map(_is_there, tree_leaves((args, kwargs)))):
            args, kwargs = tree_map(_all_to_meta, (args, kwargs))
        if "device" in kwargs:
            kwargs["device"] = META
        made = func(*args, **kwargs)
        if not any(each.alias_info for each in func._schema.returns):  # views, of weights among others, take nothing
            self._live.note(made)
        return made

    def _as_places(self, indices: Any) -> list[Any]:
        """Masks as the places where they are true, of which there are as many as the real mask says."""
        found: list[Any] = []
        for index in indices:
            if index is not None and index.dtype == torch.bool and index.device != META:
                self._deciding.read(index)
                found += list(index.nonzero(as_tuple=True))
            else:
                found.append(index)
        return found


def _key(module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
    """What the shapes of the outputs follow from, unless values decide; None where that cannot be said."""
    given, structure = tree_flatten((args, kwargs))
    if not all(isinstance(leaf, _PLAIN) for leaf in given):
        return None
    told = [(leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else (type(leaf), leaf) for leaf in given]
    return id(module), structure, tuple(told)


def _there(used: Any) -> list[torch.Tensor]:
    """The tensors that a module is given as they are."""
    return [leaf for leaf in tree_leaves(used) if isinstance(leaf, torch.Tensor) and not leaf.is_meta]


def run_on_meta(func: Any, args: Any, kwargs: Any) -> Any:
    """An operator's result for the shapes of its arguments alone, as zeros."""
    args, kwargs = tree_map(_all_to_meta, (args, kwargs))
    return tree_map(zeros, func(*args, **kwargs | ({"device": META} if kwargs.get("device") else {})))


def zeros(tensor: Any) -> Any:
    """In place of a tensor on meta: memory that takes no room until it is written to (torch.zeros does)."""
    if not isinstance(tensor, torch.Tensor) or not tensor.is_meta:
        return tensor
    size = max(tensor.untyped_storage().nbytes(), tensor.element_size())
    # What the allocator gives may be used already, and is written to then: a mapping of its own never is.
    room = np.frombuffer(mmap.mmap(-1, size, **_PRIVATE), np.uint8) if size >= MAPPED else np.zeros(size, np.uint8)
    return torch.from_numpy(room).view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _is_shape(value: Any) -> bool:
    if not isinstance(value, torch.Tensor):
        return False
    return value.device == META or (isinstance(value, torch.nn.Parameter) and value.is_floating_point())


def _is_there(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) or value.is_meta


def _to_meta(value: Any) -> Any:
    floating = isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
    return value.to(META) if floating else value


def _all_to_meta(value: Any) -> Any:
    return value.to(META) if isinstance(value, torch.Tensor) else value
