"""Which engines stay loaded. Residency is a `with` block; the policy only decides which blocks stay entered."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from threading import RLock
from types import MappingProxyType, TracebackType
from typing import Literal, Self, get_args

from slipcast.engines import Engine
from slipcast.errors import RequestError

logger = logging.getLogger("slipcast")

NO_SIZES: Mapping[str, int] = MappingProxyType({})
Policy = Literal["all", "sequential"]
COPIES = 2  # of its files that an engine has in memory, about: as they were read, and as it has laid them out
UNITS = {"MB": 1e6, "GB": 1e9}


def read_budget(policy: str, sizes: Mapping[str, int]) -> float | None:
    """Bytes of engines that may stay open, by a policy such as "4GB"; None by those that have a name.

    RequestError for what is neither, and where the largest engine is larger. `sizes`: of engines' files, by component.
    """
    if policy in get_args(Policy):
        return None
    found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?) ?([MG]B)", policy) if isinstance(policy, str) else None
    if not found:
        raise RequestError(
            f"unknown residency {policy!r}", expected="all or sequential, or what may stay in memory, such as 4GB",
            got=policy,
        )  # fmt: skip
    budget = float(found[1]) * UNITS[found[2]]
    largest = max(sizes, key=lambda name: sizes[name], default="")
    if (needed := COPIES * sizes.get(largest, 0)) > budget:
        raise RequestError(
            f"residency: the largest engine, {largest}, does not fit",
            expected=f"at least {needed / 1e6:.0f}MB",
            got=policy,
            hint="a larger budget, or a bundle in a smaller precision: int4 takes a fourth of what bf16 does",
        )
    return budget


class Residency:
    """Opens engines on demand: `all` keeps every one open, `sequential` those in use: one, or the two denoisers of
    feature caching; by a budget those stay open that fit into it, the largest if they can."""

    def __init__(
        self, openers: Mapping[str, Callable[[], Engine]], policy: str, rare: Collection[str] = (),
        sizes: Mapping[str, int] = NO_SIZES,
    ) -> None:  # fmt: skip
        """`rare`: components that are opened when they are first used, and not before. `sizes`: see read_budget."""
        self._budget, self._sizes = read_budget(policy, sizes), sizes
        self._openers = openers
        self._stacks: dict[str, ExitStack] = {}
        self._to_stay = set(rare) if policy == "all" else set[str]() if policy == "sequential" else set(openers)
        self._open: dict[str, Engine] = {}
        self._lock = RLock()
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
        with self._lock:
            if component in self._to_stay and component not in self._open:
                self._make_room(component)
                self._keep(component, self._openers[component]())
            engine = self._open.get(component)
            self._users[component] += engine is not None
        if engine is None:
            with self._openers[component]() as engine:
                yield engine
            return
        try:
            yield engine
        finally:
            with self._lock:
                self._users[component] -= 1
                if component in self._leaving and not self._users[component]:
                    self.free(component)

    def _make_room(self, component: str) -> None:
        """Free what is not in use, until a component fits besides: the smallest engine that makes enough room, else the
        largest, so that the large ones of a pipeline stay from picture to picture."""
        while self._budget is not None:
            over = COPIES * (self._sizes[component] + sum(self._sizes[name] for name in self._open)) - self._budget
            idle = sorted((name for name in self._open if not self._users[name]), key=lambda name: self._sizes[name])
            if over <= 0:
                return
            if not idle:
                logger.warning(
                    "residency: %s and what is in use with it take %.0f MB more than the budget", component, over / 1e6
                )
                return
            self.free(next((name for name in idle if COPIES * self._sizes[name] >= over), idle[-1]))

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
