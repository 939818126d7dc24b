"""Steps without guidance, in place of those with it: each is the pipeline's own at a guidance of 1."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundling import compare, export_here, write
from tiny import PIPELINES, call_of, open_pipeline

import slipcast
from slipcast.bundle.program import Loop, Program
from slipcast.bundle.program_manifest import ProgramManifest
from slipcast.bundle.reader import open_any_bundle
from slipcast_compiler.capture.find import Found, Wanted, find_for
from slipcast_compiler.capture.program import Op, Ref, Source
from slipcast_compiler.capture.program import Program as CapturedProgram
from slipcast_compiler.capture.unguided import HALVES, told_by_makers
from slipcast_compiler.capture.verify import compare_given
from slipcast_compiler.engines.programs import ProgramGraphs
from slipcast_compiler.engines.recording import Recording
from slipcast_compiler.export.program import read_record
from slipcast_compiler.host.cache import Cache

BOTH_ROWS = ("stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "pixart_sigma", "aura_flow", "sana",
             "hunyuan_dit", "animate_diff", "stable_diffusion_inpaint", "stable_diffusion_xl_controlnet")  # fmt: skip
FAST = ("stable_diffusion_xl", "sana")
TWO_CALLS = ("wan", "lumina_2")
WHY = {
    "ltx": "a run cannot choose its guidance",
    "flux": "at guidance_scale = 1 its model is evaluated as at any other",
    "perturbed_attention": "without guidance its model is given what guidance does not know",
    "qwen_image": "no number above 1 that a run could change",
}


def found_of(name: str) -> Found:
    return find_for(open_pipeline(name), [lambda prompt: call_of(name, prompt, 1)], Wanted(unguided=True))[0]


def bundle_with(folder: Path, name: str, interval: tuple[float, float] | None) -> Path:
    """The bundle of a tiny pipeline, whose steps have guidance at these noise levels."""
    cache, pipe = Cache(folder / "cache"), open_pipeline(name)
    entry = export_here(pipe, name, [lambda prompt: call_of(name, prompt, 1)], cache, Wanted(unguided=True))
    loop = read_record(entry).loop
    assert loop
    sampling = loop.sampling.model_copy(update={"guidance_interval": interval})
    (place := folder / str(interval and interval[0])).mkdir()
    return write(ProgramGraphs(entry, (sampling,)), name, place, cache)


def loop_of(bundle: Path) -> Loop:
    manifest = open_any_bundle(bundle).manifest
    assert isinstance(manifest, ProgramManifest) and manifest.program.loop
    return manifest.program.loop


def pictures(name: str) -> dict[str, Any]:
    call = call_of(name, "", 7)
    return {key: call[key].numpy() for key in PIPELINES[name].pictures}


@pytest.fixture(scope="module", params=["stable_diffusion_3", "stable_diffusion", "wan", "stable_diffusion_inpaint"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, tmp_path_factory.mktemp(request.param)


@pytest.mark.slow
def test_pictures_are_the_pipelines_own(made: tuple[str, Path]) -> None:
    """With guidance at all noise levels, at none, and at that of the first step."""
    name, folder = made
    pipe, prompt = open_pipeline(name), "a large blue star"
    everywhere, recording = bundle_with(folder, name, (0.0, 1e9)), Recording({"denoiser", "denoiser_2"})
    sigmas = loop_of(everywhere).sampling.lay().sigmas
    given: dict[str, Any] = {"prompt": prompt, "seed": 7, "output_type": "np", **pictures(name)}

    def called() -> list[str]:
        names = [component for component, _ in recording.calls]
        recording.calls.clear()
        return names

    with slipcast.load(everywhere, instrument=recording) as bundle:
        assert compare(bundle, pipe, name, prompt, 7)["psnr"] > 60
        assert set(called()) == {"denoiser"}
        assert compare(bundle, pipe, name, prompt, 7, guidance_scale=1.0)["psnr"] > 60
        assert set(called()) == {"denoiser_2"}
        guided, plain = (bundle(**given, **scale).images for scale in ({}, {"guidance_scale": 1.0}))
        called()
    with slipcast.load(bundle_with(folder, name, (1e8, 1e9)), instrument=recording) as bundle:
        np.testing.assert_array_equal(bundle(**given).images, plain)
        assert set(called()) == {"denoiser_2"}
    with slipcast.load(bundle_with(folder, name, (sigmas[1] * 1.001, 1e9)), instrument=recording) as bundle:
        mixed = bundle(**given).images
        assert called() == ["denoiser", *["denoiser_2"] * (len(sigmas) - 2)]
        assert not np.array_equal(mixed, guided) and not np.array_equal(mixed, plain)


@pytest.mark.slow
def test_what_is_not_asked_for_is_not_there(made: tuple[str, Path]) -> None:
    """Without an interval the program is the one without such evaluations."""
    name, folder = made
    calls = [lambda prompt: call_of(name, prompt, 1)]
    entry = export_here(open_pipeline(name), name, calls, Cache(folder / "cache"), Wanted(unguided=True))
    whole, pruned = read_record(entry), ProgramGraphs(entry).record
    assert pruned.loop and not pruned.loop.unguided
    plain = read_record(export_here(open_pipeline(name), name, calls, Cache(folder / "plain")))
    assert [call.component for call in pruned.every_call] == [call.component for call in plain.every_call]
    Program.model_validate_json(pruned.model_dump_json())
    gone = {call.component for call in whole.every_call} - {call.component for call in pruned.every_call}
    assert ProgramGraphs(entry).left_out == gone
    assert {call.component for call in whole.loop.unguided} <= gone  # type: ignore[union-attr]
    assert all(name.partition(".")[0] not in gone for name in pruned.loop.columns)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in BOTH_ROWS])
def test_halves_of_both_rows(name: str) -> None:
    found = found_of(name)
    assert found.loop and found.loop.unguided, found.loop and found.loop.why_guided
    assert HALVES in {part.name for part in found.cut.parts}
    assert found.loop.use.part != found.loop.unguided.use.part


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO_CALLS)
def test_one_of_two_calls(name: str) -> None:
    found = found_of(name)
    assert found.loop and found.loop.unguided, found.loop and found.loop.why_guided
    assert HALVES not in {part.name for part in found.cut.parts}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ("ltx", "qwen_image") else n for n in WHY]
)
def test_why_there_is_none(name: str) -> None:
    loop = found_of(name).loop
    assert loop and not loop.unguided and WHY[name] in loop.why_guided


ATEN = torch.ops.aten


def program(*events: Op, rows: int = 1) -> CapturedProgram:
    """Of two pictures, 0 and 1; `rows`: that each value has, in memory of its own unless it is written to."""
    value = torch.zeros(rows, 2)
    sources = tuple(Source(place, "image", (f"image_{place}",), value) for place in range(2))
    memory = {place: place for place in range(10)}
    for event in events:
        if event.function._schema.is_mutable or event.function is ATEN.slice.Tensor:
            memory[event.outputs[0]] = memory[event.args[0].id]
    specs = dict.fromkeys(range(10), ((rows, 2), torch.float32))
    return CapturedProgram("A", sources, events, (), (), memory, (((), Ref(2)),), specs)


def test_what_is_written_to_is_another_value() -> None:
    """A value of the same operators is told from one that was changed in place since."""

    def changed(scale: float) -> dict[int, str]:
        first, write = Op(ATEN.relu.default, (Ref(0),), {}, (2,)), Op(ATEN.mul_.Scalar, (Ref(2), scale), {}, (3,))
        return told_by_makers(program(first, write)).whole

    one, other, same = map(changed, (2.0, 3.0, 2.0))
    assert one == same and one[0] == other[0] and one[2] != other[2]


def test_halves_are_of_two_branches_as_they_were_joined() -> None:
    join = Op(ATEN.cat.default, ([Ref(0), Ref(1)],), {}, (2,))
    told = told_by_makers(program(join))
    assert told.halves[2] == (told.whole[0], told.whole[1])
    copied = told_by_makers(program(join, Op(ATEN.clone.default, (Ref(2),), {}, (3,))))
    lone = told_by_makers(program(Op(ATEN.clone.default, (Ref(1),), {}, (3,))))
    assert copied.halves[3][1] == lone.whole[3]
    half = Op(ATEN.slice.Tensor, (Ref(2), 0, 1, 2), {}, (3,))
    assert 2 not in told_by_makers(program(join, half, Op(ATEN.fill_.Scalar, (Ref(3), 5), {}, (4,)))).halves
    written = told_by_makers(program(join, Op(ATEN.mul_.Scalar, (Ref(1), 3), {}, (3,))))
    assert written.halves[2] == told.halves[2] and written.whole[1] != told.whole[1]
    framed = Op(ATEN.view.default, (Ref(2), [4, 1]), {}, (3,))
    alone = Op(ATEN.view.default, (Ref(1), [2, 1]), {}, (3,))
    assert told_by_makers(program(join, framed)).halves[3][1] == told_by_makers(program(alone)).whole[3]
    odd = Op(ATEN.view.default, (Ref(2), [1, 4]), {}, (3,))
    assert 3 not in told_by_makers(program(join, odd)).halves
    for before in (
        Op(ATEN.expand.default, (Ref(2), [6, 2, 2]), {}, (3,)),
        Op(ATEN.repeat.default, (Ref(2), [1, 1, 1]), {}, (3,)),
    ):
        assert 3 not in told_by_makers(program(join, before)).halves  # a dimension before the rows
    three = Op(ATEN.cat.default, ([Ref(0), torch.zeros(2, 2), Ref(1)],), {}, (2,))
    columns = Op(ATEN.cat.default, ([Ref(0), Ref(1)], 1), {}, (2,))
    assert not told_by_makers(program(three)).halves and not told_by_makers(program(columns)).halves


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stable_diffusion_xl", "animate_diff"])
def test_what_the_model_is_given_is_compared(name: str) -> None:
    """Of another prompt, in both programs; where halves are the wrong ones it is seen."""
    pipe, found = open_pipeline(name), found_of(name)
    assert found.loop and found.loop.unguided

    def call(**more: Any) -> dict[str, Any]:
        return call_of(name, "another star", 5) | more

    plain = found.loop.unguided
    both = call(), call(guidance_scale=1.0)
    assert compare_given(found.program, plain, pipe, *both) < 1e-6
    wrong = {value: (of, 1 - last) for value, (of, last) in plain.halves.items()}
    both = call(), call(guidance_scale=1.0)
    assert compare_given(found.program, replace(plain, halves=wrong), pipe, *both) > 0.01
