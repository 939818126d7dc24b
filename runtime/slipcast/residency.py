"""Which engines stay loaded. Residency is a `with` block; the policy only decides which blocks stay entered."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal, get_args

from slipcast.engines import Engine
from slipcast.errors import RequestError

Policy = Literal["all", "sequential"]
AT_ONCE = 512 << 10  # bytes: Linux reads no more than the device takes in one request, however much is asked for


class Residency:
    """Opens engines on demand: `all` keeps every one open, `sequential` those in use: one, or the two denoisers of
    feature caching."""

    def __init__(
        self,
        openers: Mapping[str, Callable[[], Engine]],
        policy: Policy,
        rare: Collection[str] = (),
        files: Mapping[str, Collection[Path]] | None = None,
    ) -> None:
        """`rare`: components that are opened when they are first used, and not before. `files`: what is read to open
        each."""
        if policy not in get_args(Policy):
            raise RequestError(f"unknown residency {policy!r}", expected=" or ".join(get_args(Policy)), got=policy)
        self._openers, self._files = openers, files or {}
        self._stacks: dict[str, ExitStack] = {}
        self._to_stay = set(rare) if policy == "all" else set[str]()
        self._open: dict[str, Engine] = {}
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
            yield self._open[component]
        else:
            with self._openers[component]() as engine:
                yield engine

    def read_ahead(self, *components: str) -> None:
        """Have the system read what will be used next from the disk, while something else runs: it is in memory that is
        free, or gives way. Nothing for what is open, or unknown here."""
        paths = [path for name in components if name not in self._open for path in self._files.get(name, ())]
        if paths and hasattr(os, "posix_fadvise"):
            threading.Thread(target=_read_ahead, args=(paths,), daemon=True).start()

    def free_others(self, component: str) -> None:
        """Free what stays loaded but for one component; each is opened again when it is next used."""
        for name in [name for name in self._open if name != component]:
            self._to_stay.add(name)
            del self._open[name]
            self._stacks.pop(name).close()

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


def _read_ahead(paths: Collection[Path]) -> None:
    for path in paths:
        with suppress(OSError), path.open("rb") as file:  # whoever opens it says what is wrong
            for offset in range(0, os.fstat(file.fileno()).st_size, AT_ONCE):
                os.posix_fadvise(file.fileno(), offset, AT_ONCE, os.POSIX_FADV_WILLNEED)
