"""The values of a program's run: which images share one, when it is made, and when it is no longer needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from slipcast.bundle.program import Variant
from slipcast.bundle.sources import NoiseSource, PromptSource, TableSource
from slipcast.engines import Array
from slipcast.sampling.seeds import TorchGenerator

NOISE = ""  # among arguments, what an image has of its own
Key = tuple[str | int, ...]


def dependence(variant: Variant) -> dict[str, frozenset[str]]:
    """By value, the arguments of text that it depends on, NOISE among them where it depends on noise.

    Pictures are not among them: all images of a call are given the same.
    """
    depends: dict[str, frozenset[str]] = {}
    for source in variant.sources:
        if isinstance(source, PromptSource | TableSource):
            depends[source.value] = frozenset([source.argument] if source.argument else [])
        else:
            depends[source.value] = frozenset([NOISE] if isinstance(source, NoiseSource) else [])
    for call in variant.every_call:
        read = frozenset[str]().union(*(depends[value] for value in call.inputs.values()))
        depends |= {value: read | depends.get(value, frozenset()) for value in call.outputs.values()}
        if variant.loop and variant.loop.output in call.outputs.values():
            depends[variant.loop.result] = read | {NOISE}
    return depends


def droppable(variant: Variant) -> list[tuple[str, ...]]:
    """By call, the values that nothing needs after it."""
    last = dict.fromkeys((source.value for source in variant.sources), 0)
    for place, call in enumerate(variant.calls):
        last |= dict.fromkeys([*call.inputs.values(), *call.outputs.values()], place)
    kept = set(variant.given)
    if loop := variant.loop:
        inside = *loop.calls, *loop.unguided
        read = {loop.sample, *(value for call in inside for value in call.inputs.values())}
        last |= {value: max(last.get(value, 0), loop.at) for value in read}
    return [
        tuple(value for value, at in last.items() if at == place and value not in kept)
        for place in range(len(variant.calls))
    ]


class Noise:
    """The noise of an image's seed, drawn in the order of the sources, each when it is first asked for."""

    def __init__(self, sources: Iterable[NoiseSource], seed: int) -> None:
        self._left = list(sources)
        self._generators = {"call": TorchGenerator(seed), "torch": TorchGenerator(seed)}
        self._drawn: dict[str, Array] = {}

    def __call__(self, value: str) -> Array:
        """To be asked for once: it is not kept here."""
        while value not in self._drawn:
            self._draw(self._left.pop(0))
        return self._drawn.pop(value)

    def more(self, shape: tuple[int, ...]) -> Array:
        """What follows all that the sources draw."""
        for source in self._left:
            self._draw(source)
        self._left.clear()
        return self._generators["call"].randn(shape)

    def _draw(self, source: NoiseSource) -> None:
        self._drawn[source.value] = self._generators[source.generator].randn(source.shape)


class Values:
    """What is known while a program runs for some images at once, which advance call by call.

    A value is made once for all images that it is the same for: those with the same texts, where no noise is in it.
    """

    def __init__(
        self,
        variant: Variant,
        depends: Mapping[str, frozenset[str]],
        texts: Sequence[Mapping[str, str]],
        seeds: Sequence[int],
        *,
        sealed: bool = False,
    ) -> None:
        """`texts` and `seeds`: of each image. `sealed`: what images share is marked as unchanging, for engines that
        send such arrays to a device once."""
        self._depends, self._texts, self._sealed = depends, texts, sealed
        noise = [source for source in variant.sources if isinstance(source, NoiseSource)]
        self._noise = [Noise(noise, seed) for seed in seeds]
        self._from_noise = {source.value for source in noise}
        self._held: dict[str, dict[Key, Array]] = {}

    def images(self, value: str, among: Iterable[int] | None = None) -> list[int]:
        """One image of each group that shares the value, of all images or `among` some."""
        first: dict[Key, int] = {}
        for image in range(len(self._texts)) if among is None else among:
            first.setdefault(self._key(value, image), image)
        return list(first.values())

    def get(self, value: str, image: int) -> Array:
        """The value, as it is for an image."""
        held, key = self._held.setdefault(value, {}), self._key(value, image)
        if key not in held and value in self._from_noise:
            held[key] = self._noise[image](value)
        return held[key]

    def put(self, value: str, image: int, array: Array) -> None:
        """A value that was made for an image, and so for all that share it."""
        if self._sealed and NOISE not in self._depends[value]:
            array.setflags(write=False)
        self._held.setdefault(value, {})[self._key(value, image)] = array

    def more_noise(self, image: int, shape: tuple[int, ...]) -> Array:
        """For an image, after all that the sources draw."""
        return self._noise[image].more(shape)

    def drop(self, values: Iterable[str]) -> None:
        """Forget what is no longer needed."""
        for value in values:
            self._held.pop(value, None)

    def _key(self, value: str, image: int) -> Key:
        depends = self._depends[value]
        if NOISE in depends:
            return (image,)
        return tuple(self._texts[image][argument] for argument in sorted(depends))
