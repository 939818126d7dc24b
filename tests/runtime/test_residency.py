"""Which engines stay open: by hand, and in a pipeline of fakes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
from fakes import COMPONENTS, Fakes, write_fake

from slipcast.bundle.manifest import Component
from slipcast.errors import ArtifactError, RequestError, ResourceError
from slipcast.run.pipeline import load
from slipcast.run.residency import Residency


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return fakes.install(monkeypatch)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake(tmp_path_factory.mktemp("fake") / "bundle")


def openers(engines: Fakes, *broken: str) -> dict[str, Any]:
    def open_one(name: str) -> Any:
        if name in broken:
            raise ArtifactError(f"{name} is broken")
        return engines("fake", Path(name), None, "fp32", Component(inputs=(), outputs=()))

    return {name: partial(open_one, name) for name in COMPONENTS}


def test_all_opens_each_once_and_keeps_it(engines: Fakes) -> None:
    residency = Residency(openers(engines), "all")
    assert sorted(engines.open_now) == sorted(COMPONENTS)
    for name in (*COMPONENTS, *COMPONENTS):
        with residency.use(name) as engine:
            assert engine.name == name  # type: ignore[attr-defined]
    assert len(engines.opened) == 3
    residency.close()
    assert sorted(engines.closed) == sorted(COMPONENTS)
    assert engines.open_now == []


def test_sequential_opens_one_at_a_time(engines: Fakes) -> None:
    residency = Residency(openers(engines), "sequential")
    assert engines.opened == []
    for name in (*COMPONENTS, *COMPONENTS):
        with residency.use(name):
            assert engines.open_now == [name]
        assert engines.open_now == []
    assert [name for name, _ in engines.opened] == [*COMPONENTS, *COMPONENTS]


@pytest.mark.parametrize("policy", ["all", "sequential"])
def test_after_close_each_is_opened_for_its_use(engines: Fakes, policy: Any) -> None:
    residency = Residency(openers(engines), policy)
    residency.close()
    residency.close()
    with residency.use("denoiser") as engine:
        assert engines.open_now == ["denoiser"]
        assert engine.is_open  # type: ignore[attr-defined]
    assert engines.open_now == []


@pytest.mark.parametrize("broken", COMPONENTS)
def test_one_that_does_not_open_frees_the_others(engines: Fakes, broken: str) -> None:
    with pytest.raises(ArtifactError, match=f"{broken} is broken"):
        Residency(openers(engines, broken), "all")
    assert len(engines.opened) == 2
    assert engines.open_now == []


def test_unknown_policy(engines: Fakes) -> None:
    with pytest.raises(RequestError, match="unknown residency 'none'\n.*all or sequential"):
        Residency(openers(engines), "none")


SIZES = dict.fromkeys(COMPONENTS, 0) | {"text_encoder": 100_000_000, "denoiser": 300_000_000, "vae_decoder": 50_000_000}


def test_a_budget_keeps_what_fits(engines: Fakes) -> None:
    """Engines take about twice the size of their files."""
    residency = Residency(openers(engines), "0.75GB", sizes=SIZES)
    assert engines.opened == []
    for name, kept in (
        ("text_encoder", ["text_encoder"]), ("vae_decoder", ["text_encoder", "vae_decoder"]),
        ("text_encoder", ["text_encoder", "vae_decoder"]), ("denoiser", ["denoiser", "vae_decoder"]),
        ("vae_decoder", ["denoiser", "vae_decoder"]), ("denoiser", ["denoiser", "vae_decoder"]),
        ("text_encoder", ["text_encoder", "vae_decoder"]),
    ):  # fmt: skip
        with residency.use(name) as engine:
            assert engine.is_open and engine.name == name  # type: ignore[attr-defined]
        assert sorted(engines.open_now) == kept, name
    residency.close()
    assert engines.open_now == []


def test_the_largest_stays_from_picture_to_picture(engines: Fakes) -> None:
    residency = Residency(openers(engines), "0.85GB", sizes=SIZES)
    for _ in range(3):
        for name in ("text_encoder", "denoiser", "vae_decoder"):
            with residency.use(name):
                pass
    opened = [name for name, _ in engines.opened]
    assert [opened.count(name) for name in ("text_encoder", "denoiser", "vae_decoder")] == [3, 1, 3]


def test_what_is_in_use_stays_whatever_the_budget(engines: Fakes, caplog: pytest.LogCaptureFixture) -> None:
    residency = Residency(openers(engines), "600 MB", sizes=SIZES)
    with residency.use("denoiser") as one, residency.use("vae_decoder") as other:
        assert one.is_open and other.is_open  # type: ignore[attr-defined]
    assert "vae_decoder and what is in use with it take 100 MB more than the budget" in caplog.text
    with residency.use("text_encoder"):
        assert sorted(engines.open_now) == ["text_encoder", "vae_decoder"]


def test_a_budget_that_the_largest_engine_exceeds(engines: Fakes) -> None:
    with pytest.raises(RequestError, match="the largest engine, denoiser, does not fit\n.*at least 600MB"):
        Residency(openers(engines), "599MB", sizes=SIZES)
    assert engines.opened == []
    for wrong in ("4", "4 gigabytes", "-1GB", "1e3GB", "GB", "all engines"):
        with pytest.raises(RequestError, match="such as 4GB"):
            Residency(openers(engines), wrong, sizes=SIZES)


class TestPipeline:
    def test_a_budget_gives_the_same_picture(self, root: Path, engines: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
        with load(root) as pipe:
            expected = pipe("a red circle", seed=1, output_type="np").images
        engines.opened.clear()
        with load(root, residency="1GB") as pipe:
            for _ in range(2):
                np.testing.assert_array_equal(pipe("a red circle", seed=1, output_type="np").images, expected)
            assert sorted(name for name, _ in engines.opened) == sorted(COMPONENTS), "all fit, and are opened once"
            pipe.close()
            np.testing.assert_array_equal(pipe("a red circle", seed=1, output_type="np").images, expected)
            assert engines.open_now == []
        monkeypatch.setattr("slipcast.run.residency.read_budget", lambda *_: 0.0)  # as none fits beside another
        engines.opened.clear()
        engines.most_open = 0
        with load(root, residency="1GB") as pipe:
            for _ in range(2):
                np.testing.assert_array_equal(pipe("a red circle", seed=1, output_type="np").images, expected)
        assert engines.most_open == 1 and len(engines.opened) == 6

    def test_sequential_gives_the_same_picture(self, root: Path, engines: Fakes) -> None:
        expected = load(root)("a red circle", seed=1, output_type="np").images
        engines.opened.clear()
        engines.most_open = 0
        engines.open_now.clear()
        pipe = load(root, residency="sequential")
        assert engines.opened == []
        for _ in range(2):
            np.testing.assert_array_equal(pipe("a red circle", seed=1, output_type="np").images, expected)
        assert [name for name, _ in engines.opened] == [*COMPONENTS, *COMPONENTS]
        assert (engines.most_open, engines.open_now) == (1, [])

    def test_with_block_closes_and_a_later_call_opens_again(self, root: Path, engines: Fakes) -> None:
        with load(root) as pipe:
            expected = pipe("a red circle", seed=1, output_type="np").images
            assert len(engines.open_now) == 3
        assert engines.open_now == []
        np.testing.assert_array_equal(pipe("a red circle", seed=1, output_type="np").images, expected)
        assert engines.open_now == []

    def test_an_engine_that_fails_is_closed_too(self, root: Path, engines: Fakes) -> None:
        def fail(_: Any) -> Any:
            raise MemoryError

        engines.functions["denoiser"] = fail
        pipe = load(root, residency="sequential")
        with pytest.raises(ResourceError):
            pipe("a red circle", seed=1)
        assert engines.open_now == []
        engines.functions["denoiser"] = fakes.predict
        assert len(pipe("a red circle", seed=1).images) == 1
