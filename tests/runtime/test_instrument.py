"""The door for instruments: a pipeline opens every engine through it, and does not tell what comes back apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
from fakes import Fakes, write_fake

from slipcast import load
from slipcast.engines import Array, Engine, EngineWrapper
from slipcast.run.residency import Policy
from slipcast.timing.clock import Clock

PROMPT = "a small red circle"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_fake(tmp_path / "bundle")


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return fakes.install(monkeypatch)


class Seen:
    """An instrument that passes on, in a wrapper, whatever it is asked for; `asked` says what that was."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, component: str, open: Callable[..., Engine]) -> Engine:
        self.asked.append(component)
        return EngineWrapper(open())


@pytest.mark.parametrize("residency", ["all", "sequential"])
def test_it_sees_every_component(root: Path, engines: Fakes, residency: Policy) -> None:
    seen = Seen()
    with load(root, residency=residency, instrument=seen) as pipe:
        assert sorted(seen.asked) == (sorted(fakes.COMPONENTS) if residency == "all" else [])
        pipe(PROMPT, seed=1)
        with pipe.residency.use("denoiser"):
            pass
    again = [] if residency == "all" else ["denoiser"]
    assert sorted(seen.asked) == sorted([*fakes.COMPONENTS, *again]) == sorted(engines.closed)


def test_the_default_and_a_pass_through_give_the_same_bits(root: Path, engines: Fakes) -> None:
    arguments: dict[str, Any] = {"prompt": [PROMPT, "a ring"], "seed": 3, "output_type": "np"}
    instruments: list[dict[str, Any]] = [
        {},
        {"instrument": lambda component, open: open()},
        {"instrument": Seen()},
    ]
    pictures = []
    for instrument in instruments:
        with load(root, **instrument) as pipe:
            pictures.append(pipe(**arguments).images)
    np.testing.assert_array_equal(pictures[1], pictures[0])
    np.testing.assert_array_equal(pictures[2], pictures[0])


def test_what_it_gives_is_what_draws(root: Path, engines: Fakes) -> None:
    class Blank(EngineWrapper):
        def __call__(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
            return {name: np.zeros_like(array) for name, array in super().__call__(arrays).items()}

    def blank(component: str, open: Callable[..., Engine]) -> Engine:
        return Blank(open()) if component == "vae_decoder" else open()

    with load(root, instrument=blank) as pipe:
        assert (pipe(PROMPT, output_type="np").images == 0.5).all()


def test_a_second_opening_is_seen_too(root: Path, engines: Fakes) -> None:
    """Of a decoder that overflowed in half precision."""

    def overflow(arrays: Mapping[str, Any]) -> dict[str, Any]:
        picture = fakes.decode(arrays)["image"]
        return {"image": picture if engines.calls[-1][1].precision == "fp32" else picture * np.inf}

    engines.functions["vae_decoder"], seen = overflow, Seen()
    with np.errstate(invalid="ignore"), load(root, instrument=seen) as pipe:
        pipe(PROMPT)
    assert seen.asked.count("vae_decoder") == 2


def test_engines_with_their_own_profilers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, asked = fakes.install(monkeypatch), list[bool]()

    def open_fake(*arguments: Any, profile: bool = False) -> Any:
        asked.append(profile)
        return found(*arguments)

    monkeypatch.setattr("slipcast.run.base.open_engine", open_fake)
    for profile in (False, True):
        load(root, instrument=Clock(profile)).close()
    assert asked == [False] * 3 + [True] * 3


def test_where_it_fails_what_was_opened_is_closed(root: Path, engines: Fakes) -> None:
    def fail(component: str, open: Callable[..., Engine]) -> Engine:
        if component == "denoiser":
            raise RuntimeError("not this one")
        return open()

    with pytest.raises(RuntimeError, match="not this one"):
        load(root, instrument=fail)
    assert sorted(engines.closed) == ["text_encoder", "vae_decoder"]


def test_a_clock_counts_every_call(root: Path, engines: Fakes) -> None:
    clock = Clock()
    with load(root, instrument=clock) as pipe:
        run = clock.run(pipe, {"prompt": PROMPT, "seed": 0})
    assert [name for name, *_ in run.calls] == [name for name, _ in engines.calls]
    assert all(0 <= begin <= end <= run.total for _, begin, end in run.calls)
    assert len(run.steps) == engines.count("denoiser") == 6
    assert set(clock.inputs) == set(fakes.COMPONENTS)
