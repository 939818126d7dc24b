"""Where a pipeline's code leaves what can be recorded: for numpy and Python's lists, and for the network."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

import torch

from slipcast.errors import RecipeError


@contextlib.contextmanager
def leaving_watched(leaves: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Within it, leaves("numpy", tensor) comes before tensor.numpy() and np.asarray(tensor); the same for tolist."""
    with contextlib.ExitStack() as stack:
        for name in ("numpy", "tolist"):
            stack.enter_context(_before(torch.Tensor, name, lambda tensor, name=name: leaves(name, tensor)))
        yield


@contextlib.contextmanager
def offline(where: Callable[[], str]) -> Iterator[None]:
    """Within it, whoever calls the network gets a RecipeError with the line that asked for it."""

    def refuse(*_: Any) -> None:
        raise RecipeError(
            "the pipeline calls the network, which a program cannot follow",
            expected="a call that needs nothing but its arguments and its components",
            got=where(),
            hint="download what it needs beforehand, and give it as a component or as an argument of the call",
        )

    with contextlib.ExitStack() as stack:
        for owner, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo")):
            stack.enter_context(_before(owner, name, refuse))
        yield


@contextlib.contextmanager
def autocast_on_meta() -> Iterator[None]:
    """Within it, torch.autocast takes the device of tensors without numbers for the CPU's: it has no such device."""
    usual = torch.autocast.__init__

    def init(this: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        usual(this, "cpu" if device_type == "meta" else device_type, *args, **kwargs)

    torch.autocast.__init__ = init
    try:
        yield
    finally:
        torch.autocast.__init__ = usual


@contextlib.contextmanager
def _before(owner: Any, name: str, first: Callable[..., None]) -> Iterator[None]:
    """Within it, owner.name(...) calls `first`, with the first argument if there is one, before it does what it did."""
    usual, own = getattr(owner, name), vars(owner).get(name)

    def call(*args: Any, **kwargs: Any) -> Any:
        first(*args[:1])
        return usual(*args, **kwargs)

    setattr(owner, name, call)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)
