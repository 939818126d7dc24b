"""Which engines stay loaded. Residency is a `with` block; the policy only decides which blocks stay entered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Literal, Self, get_args

from slipcast.engines import Engine
from slipcast.errors import RequestError

Policy = Literal["all", "sequential"]


class Residency:
    """Opens engines on demand: `all` keeps every one open, `sequential` those in use: one, or the two denoisers of
    feature caching."""

    def __init__(self, openers: Mapping[str, Callable[[], Engine]], policy: Policy, rare: Collection[str] = ()) -> None:
        """`rare`: components that are opened when they are first used, and not before."""
        if policy not in get_args(Policy):
            raise RequestError(f"unknown residency {policy!r}", expected=" or ".join(get_args(Policy)), got=policy)
        self._openers = openers
        self._stacks: dict[str, ExitStack] = {}
        self._to_stay = set(rare) if policy == "all" else set[str]()
        self._open: dict[str, Engine] = {}
        self._users, self._leaving = Counter[str](), set[str]()
        if policy == "all":
            # Graph compilers leave cores idle while they rewrite: opening side by side halves the load time.
            with ThreadPoolExecutor() as pool:
                futures = {name: pool.submit(opener) for name, opener in openers.items() if name not in rare}
            for name, future in futures.items():
                if not future.exception():
                    self._keep(name, future.result())
            try:
                for future in futures.values():
                    future.result()
            except BaseException:  # one did not open: free those that did
                self.close()
                raise

    @contextmanager
    def use(self, component: str) -> Iterator[Engine]:
        """The component's engine, open within the block."""
        if component in self._to_stay and component not in self._open:
            self._keep(component, self._openers[component]())
        if component in self._open:
            self._users[component] += 1
            try:
                yield self._open[component]
            finally:
                self._users[component] -= 1
                if component in self._leaving and not self._users[component]:
                    self.free(component)
        else:
            with self._openers[component]() as engine:
                yield engine

    def free_others(self, component: str) -> None:
        """Free what stays loaded but for one component; each is opened again when it is next used."""
        for name in [name for name in self._open if name != component]:
            self.free(name)

    def free(self, component: str) -> None:
        """Free one that stays loaded, once nobody has it in use; it is opened again when it is next used."""
        if self._users[component]:
            self._leaving.add(component)
        elif component in self._open:
            self._leaving.discard(component)
            self._to_stay.add(component)
            del self._open[component]
            self._stacks.pop(component).close()

    def close(self) -> None:
        """Free every engine that stays loaded."""
        self._open.clear()
        self._to_stay.clear()
        stacks, self._stacks = self._stacks, {}
        with ExitStack() as every:  # all of them, also where one fails
            for stack in stacks.values():
                every.push(stack)

    def _keep(self, name: str, engine: Engine) -> None:
        self._stacks[name] = stack = ExitStack()
        self._open[name] = stack.enter_context(engine)


class InUse:
    """Engines of a run, each open from when it is first asked for until `done`, or the end of the `with` block."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._stacks: dict[str, ExitStack] = {}
        self._open: dict[str, Engine] = {}

    def __call__(self, component: str) -> Engine:
        """The component's engine, open."""
        if component not in self._open:
            stack = ExitStack()
            self._open[component] = stack.enter_context(self._residency.use(component))
            self._stacks[component] = stack
        return self._open[component]

    def done(self, component: str) -> None:
        """It is asked for no more: the policy decides whether it stays open."""
        self._open.pop(component, None)
        if stack := self._stacks.pop(component, None):
            stack.close()

    def free_others(self, component: str) -> None:
        """Free all engines but for one; each is opened again when it is next used."""
        for name in [name for name in self._open if name != component]:
            self.done(name)
        self._residency.free_others(component)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._open.clear()
        stacks, self._stacks = self._stacks, {}
        with ExitStack() as every:  # all of them, also where one fails
            for stack in stacks.values():
                every.push(stack)
