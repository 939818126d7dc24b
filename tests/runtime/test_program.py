"""Captured programs: how values flow through the calls, what is asked of a run, and manifests that do not hold."""

from __future__ import annotations

import copy
import gc
import json
import logging
import sys
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import programs
import pytest
from fakes import LENGTH, Fakes
from PIL import Image
from programs import LATENT, PICTURE, call, prompt_source, write_program
from tokenizers import Tokenizer

import slipcast
from slipcast.bundle.manifest import read_any_manifest, read_manifest
from slipcast.bundle.reader import open_bundle
from slipcast.errors import ArtifactError, Cancelled, NumericalError, RequestError, ResourceError
from slipcast.run.program import ProgramPipeline
from slipcast.sampling.seeds import TorchGenerator


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return programs.use(fakes.install(monkeypatch))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_program(tmp_path / "bundle")


def load(path: Path, **options: Any) -> ProgramPipeline:
    pipe = slipcast.load(path, **options)
    assert isinstance(pipe, ProgramPipeline)
    return pipe


def tokens(bundle: Path, text: str) -> Any:
    return np.array([Tokenizer.from_file(str(bundle / "tokenizer.json")).encode(text).ids], np.int64)


def write_unpadded(root: Path, **changes: Any) -> Path:
    """write_program, with a tokenizer in unpadded.json that does not pad."""
    write_program(root)
    tokenizer = Tokenizer.from_file(str(root / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.save(str(root / "unpadded.json"))
    (root / "manifest.json").write_text(json.dumps(programs.document(root, **changes)))
    return root


def drawn(bundle: Path, prompt: str, negative: str, seed: int) -> Any:
    return programs.expected(tokens(bundle, prompt), tokens(bundle, negative), TorchGenerator(seed).randn(LATENT))


class TestValues:
    def test_flow_from_sources_to_results(self, engines: Fakes, bundle: Path) -> None:
        output = load(bundle)("a red circle", negative_prompt="blue", seed=7, output_type="np")
        np.testing.assert_allclose(output.images, drawn(bundle, "a red circle", "blue", 7), atol=1e-6)
        assert (output.seeds, output.target, output.steps) == ((7,), "onnxruntime-cpu-fp32", (2,))
        assert set(output.seconds) == {*programs.COMPONENTS, "total"}
        (picture,) = load(bundle)("a red circle", negative_prompt="blue", seed=7).images
        np.testing.assert_array_equal(np.asarray(picture), (output.images[0] * 255).round().astype(np.uint8))

    def test_each_image_is_a_run_of_its_own_seed(self, engines: Fakes, bundle: Path) -> None:
        output = load(bundle)(["a red circle", "a star"], seed=3, num_images_per_prompt=2, output_type="np")
        assert output.seeds == (3, 4, 5, 6)
        for image, prompt, seed in zip(output.images, ["a red circle"] * 2 + ["a star"] * 2, output.seeds, strict=True):
            np.testing.assert_allclose(image, drawn(bundle, prompt, "", seed)[0], atol=1e-6)
            np.testing.assert_array_equal(image, load(bundle)(prompt, seed=seed, output_type="np").images[0])

    def test_noise_is_drawn_in_the_order_of_the_sources(self, engines: Fakes, tmp_path: Path) -> None:
        """Not in that in which it is read, and with what nothing reads."""
        noises = [{"kind": "noise", "value": name, "shape": [1, 4, 8, 8]} for name in ("late", "unread", "early")]
        changed = programs.program(
            arguments={}, sources=noises, table=None, steps=[], output="array", results=["x", "y", "late"],
            calls=[call("scale", {"in": "early"}, {"out": "x"}), call("scale", {"in": "late"}, {"out": "y"})],
        )  # fmt: skip
        parts = {"scale": {"inputs": [fakes.spec("in", *LATENT)], "outputs": [fakes.spec("out", *LATENT)]}}
        engines.functions["scale"] = lambda arrays: {"out": arrays["in"] * 2}
        x, y, late = load(write_program(tmp_path / "b", program=changed, components=parts))(seed=5).images
        generator = TorchGenerator(5)
        wanted = [generator.randn(LATENT) for _ in noises]
        for found, noise in ((x, wanted[2] * 2), (y, wanted[0] * 2), (late, wanted[0])):
            np.testing.assert_array_equal(found, noise)

    def test_what_a_prompt_alone_decides_is_computed_once(self, engines: Fakes, bundle: Path) -> None:
        load(bundle)(["a red circle", "a star", "a star"], seed=3, num_images_per_prompt=2)
        assert engines.count("conditioning") == 3  # two prompts, and one negative
        assert engines.count("denoiser") == 2 * 6

    def test_values_are_freed_after_their_last_use(self, engines: Fakes, bundle: Path) -> None:
        made: dict[str, list[weakref.ref[Any]]] = {}
        alive: list[str] = []
        names = iter(["hidden", "unhidden", "eps0", "x0", "eps1", "x1", "image"])

        def watched(function: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
            def run(arrays: Any) -> dict[str, Any]:
                gc.collect()
                alive.append(" ".join(name for name, refs in made.items() if refs[0]() is not None))
                outputs = function(arrays)
                made[next(names)] = [weakref.ref(array) for array in outputs.values()]
                return outputs

            return run

        engines.functions |= {name: watched(engines.functions[name]) for name in programs.COMPONENTS}
        load(bundle)("a red circle", seed=3)
        both = "hidden unhidden"
        assert alive == ["", "hidden", both, f"{both} eps0", f"{both} x0", "x0 eps1", "x1"]

    def test_sequential_residency_opens_each_component_once(self, engines: Fakes, bundle: Path) -> None:
        with load(bundle, residency="sequential") as pipe:
            assert engines.opened == []
            pipe("a red circle", seed=3, num_images_per_prompt=3)
            assert [name for name, _ in engines.opened] == list(programs.COMPONENTS)
            assert engines.closed == list(programs.COMPONENTS)
            assert engines.most_open == 2  # the loop calls two in turns

    def test_memory_that_runs_out(self, engines: Fakes, bundle: Path) -> None:
        """Once is met by freeing the others; what goes on is an error of its kind."""
        decode, failures = engines.functions["decoder"], iter([1, 0, 1, 1])

        def fails(arrays: Any) -> Any:
            if next(failures):
                raise MemoryError
            return decode(arrays)

        engines.functions["decoder"] = fails
        pipe = load(bundle)
        pipe("a red circle", seed=3)
        assert set(engines.closed) == {"conditioning", "denoiser", "update"}
        with pytest.raises(ResourceError):
            pipe("a red circle", seed=3)
        pipe.close()
        assert engines.open_now == []

    @pytest.mark.parametrize(("most", "calls"), [(8, 1), (4, 2), (1, 6)])
    def test_images_go_together(self, engines: Fakes, tmp_path: Path, most: int, calls: int) -> None:
        engines.functions |= {"conditioning": programs.condition_twice, "denoiser": programs.predict_together}
        pipe = load(write_program(tmp_path / "b", **programs.together(most)))
        texts = ["a red circle", "a star", "a blue star"]
        output = pipe(texts, negative_prompt="green", seed=3, num_images_per_prompt=2, output_type="np")
        assert engines.count("denoiser") == 3 * calls
        for image, text, seed in zip(output.images, [t for t in texts for _ in range(2)], output.seeds, strict=True):
            (alone,) = pipe(text, negative_prompt="green", seed=seed, output_type="np").images
            np.testing.assert_array_equal(image, alone)

    def test_what_stays_is_given_as_the_same_array(self, engines: Fakes, tmp_path: Path) -> None:
        """So that engines know it again."""
        given: list[Any] = []

        def predict(arrays: Any) -> Any:
            given.append(arrays)
            return programs.predict_together(arrays)

        engines.functions |= {"conditioning": programs.condition_twice, "denoiser": predict}
        load(write_program(tmp_path / "b", **programs.together()))(["a red circle", "a star"], seed=3)
        assert len({id(arrays["context"]) for arrays in given}) == 1 < len(given)
        assert len({id(arrays["sample"]) for arrays in given}) == len(given)

    def test_memory_for_several_images_runs_out(
        self, engines: Fakes, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fails(arrays: Any) -> Any:
            if len(arrays["sample"]) > 1:
                raise MemoryError
            return programs.predict_together(arrays)

        engines.functions |= {"conditioning": programs.condition_twice, "denoiser": programs.predict_together}
        pipe = load(write_program(tmp_path / "b", **programs.together(2)))
        wanted = pipe(["a red circle", "a star"], seed=3, num_images_per_prompt=2, output_type="np").images
        engines.functions["denoiser"] = fails
        found = pipe(["a red circle", "a star"], seed=3, num_images_per_prompt=2, output_type="np").images
        np.testing.assert_array_equal(found, wanted)
        # Once a run, though the second two were to go together too.
        assert caplog.text.count("memory ran out in denoiser for 2 images: one at a time") == 1

    def test_other_rows_than_the_manifest_says(self, engines: Fakes, tmp_path: Path) -> None:
        engines.functions |= {
            "conditioning": programs.condition_twice, "denoiser": lambda arrays: {"prediction": arrays["sample"][:1]},
        }  # fmt: skip
        with pytest.raises(ArtifactError, match="denoiser: prediction is not what the manifest says") as refused:
            load(write_program(tmp_path / "b", **programs.together()))(["a red circle", "a star"], seed=3)
        assert (refused.value.expected, refused.value.got) == ("2 rows, of 2 images", "1")

    def test_a_large_model_takes_one_image_on_a_cpu(
        self, engines: Fakes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("slipcast.run.program.LARGE", 1)
        engines.functions |= {"conditioning": programs.condition_twice, "denoiser": programs.predict_together}
        load(write_program(tmp_path / "b", **programs.together()))(["a red circle", "a star"], seed=3)
        assert engines.count("denoiser") == 3 * 2

    def test_numbers_that_are_none_are_named(self, engines: Fakes, bundle: Path) -> None:
        engines.functions["update"] = lambda arrays: {"sample": arrays["sample"] * np.float32("nan")}
        with pytest.raises(NumericalError, match="update: sample is not finite in call 4 of 7"):
            load(bundle)("a red circle")

    def test_masks_of_attention_hold_infinities(self, engines: Fakes, bundle: Path) -> None:
        engines.functions["conditioning"] = lambda arrays: {"hidden": np.full((1, LENGTH, 5), -np.inf, np.float32)}
        engines.functions["denoiser"] = lambda arrays: {"prediction": arrays["sample"]}
        load(bundle)("a red circle")
        engines.functions["conditioning"] = lambda arrays: {"hidden": np.full((1, LENGTH, 5), np.inf, np.float32)}
        with pytest.raises(NumericalError, match="conditioning: hidden"):
            load(bundle)("a red circle")

    def test_frames(self, engines: Fakes, tmp_path: Path) -> None:
        parts = programs.components()
        parts["decoder"]["outputs"] = [fakes.spec("image", 1, 5, *PICTURE[1:])]
        decode = engines.functions["decoder"]
        engines.functions["decoder"] = lambda arrays: {"image": np.stack([decode(arrays)["image"]] * 5, 1)}
        root = write_program(tmp_path / "b", components=parts, program=programs.program(output="frames"))
        assert load(root)("a star", output_type="np", seed=1).images.shape == (1, 5, 16, 16, 3)
        ((first, *others),) = load(root)("a star", seed=1).images
        assert first.size == (16, 16)
        assert len(others) == 4


class TestRequests:
    def test_progress(self, engines: Fakes, bundle: Path) -> None:
        seen: list[tuple[int, int]] = []
        pipe = load(bundle)
        pipe("a star", num_images_per_prompt=2, callback_on_step_end=lambda _, *step: seen.append(step))
        assert seen == [(0, 2), (1, 2)]

        def stop(*_: Any) -> None:
            pipe.close()
            raise Cancelled("enough")

        with pytest.raises(Cancelled):
            pipe("a star", callback_on_step_end=stop)
        assert engines.open_now == []
        assert pipe("a star", seed=1).seeds == (1,)

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            ({}, ["prompt is missing"]),
            ({"prompt": 3}, ["prompt is not usable"]),
            ({"prompt": ["a", "b"], "negative_prompt": ["c"] * 3}, ["does not go with", "one text, or 3"]),
            ({"prompt": "a", "strength": 0.5}, ["no argument 'strength'", "prompt, negative_prompt", "height", "seed"]),
            ({"prompt": "a", "num_inference_steps": 3}, ["num_inference_steps is fixed", "expected: 2", "got:      3"]),
            ({"prompt": "a", "guidance_scale": np.ones(2)}, ["guidance_scale is fixed", "4.5"]),
            ({"prompt": "a", "tiled": 0}, ["tiled is fixed", "False"]),
            ({"prompt": "a", "output_type": "latent"}, ["output_type", "pil or np"]),
            ({"prompt": "a", "on_long_prompt": "cut"}, ["on_long_prompt", "warn or error"]),
            ({"prompt": "a", "seed": -1}, ["seed"]),
            ({"prompt": "a", "num_images_per_prompt": 0}, ["num_images_per_prompt"]),
        ],
    )
    def test_refused_before_any_engine_runs(
        self, engines: Fakes, bundle: Path, arguments: dict[str, Any], says: list[str]
    ) -> None:
        with pytest.raises(RequestError) as caught:
            load(bundle)(**arguments)
        assert all(part in str(caught.value) for part in says), caught.value
        assert engines.calls == []

    def test_what_is_fixed_may_be_asked_for(self, engines: Fakes, bundle: Path) -> None:
        load(bundle)("a", num_inference_steps=2, guidance_scale=4.5, height=16, tiled=False, width=None)

    def test_text_templates(self, engines: Fakes, tmp_path: Path) -> None:
        sources = programs.program()["sources"]
        sources[0] |= {"prefix": "a ", "suffix": " on white", "lower": True, "strip": True}
        sources[1] = prompt_source("negative", None, prefix="A Red ", suffix="square", special_tokens=False)
        changed = programs.program(sources=sources, arguments={"prompt": {}})
        root = write_program(tmp_path / "b", program=changed)
        load(root)("  RED Circle\n")
        given, constant = (arrays.ids for name, arrays in engines.calls if name == "conditioning")
        np.testing.assert_array_equal(given, tokens(root, "a red circle on white"))
        wanted = Tokenizer.from_file(str(root / "tokenizer.json")).encode("A Red square", add_special_tokens=False)
        np.testing.assert_array_equal(constant[0], wanted.ids)

    def test_an_argument_that_is_as_another(self, engines: Fakes, tmp_path: Path) -> None:
        texts = {"prompt_2": {"same_as": "prompt"}, "prompt": {}}
        sources = programs.program()["sources"]
        sources[1]["argument"] = "prompt_2"
        pipe = load(root := write_program(tmp_path / "b", program=programs.program(sources=sources, arguments=texts)))
        for arguments, second in (({}, "a star"), ({"prompt_2": "a square"}, "a square")):
            found = pipe("a star", seed=1, output_type="np", **arguments).images
            np.testing.assert_allclose(found, drawn(root, "a star", second, 1), atol=1e-6)

    def test_masks(self, engines: Fakes, tmp_path: Path) -> None:
        sources = programs.program()["sources"]
        sources[1] |= {"field": "attention_mask", "argument": "prompt"}
        load(write_program(tmp_path / "b", program=programs.program(sources=sources)))("a star")
        _, mask = (arrays.ids for name, arrays in engines.calls if name == "conditioning")
        assert 0 < mask.sum() < LENGTH

    def test_a_text_of_another_length(self, engines: Fakes, tmp_path: Path) -> None:
        sources = programs.program()["sources"]
        sources[0]["tokenizer"] = "unpadded.json"
        root = write_unpadded(tmp_path / "b", program=programs.program(sources=sources))
        with pytest.raises(RequestError, match="prompt has another length") as caught:
            load(root)("a star")
        assert f"expected: {LENGTH} tokens" in str(caught.value)
        assert engines.calls == []

    def test_texts_of_any_length_in_a_range(self, engines: Fakes, tmp_path: Path) -> None:
        sources, parts = programs.program()["sources"], programs.components()
        sources[0] |= {"tokenizer": "unpadded.json", "shape": [1, "length"]}
        for spec in (parts["conditioning"]["inputs"][0], parts["conditioning"]["outputs"][0]):
            spec["shape"][1] = "tokens"
        for spec in parts["denoiser"]["inputs"][2:]:
            spec["shape"][1] = "tokens"
        changed = programs.program(sources=sources, lengths={"length": {"minimum": 4, "maximum": 6}})
        pipe = load(write_unpadded(tmp_path / "b", program=changed, components=parts))
        for text, count in (("a star", 4), ("a red circle on white", 7), ("a", 3)):
            engines.calls.clear()
            if 4 <= count <= 6:
                pipe(text)
                assert next(arrays.ids for name, arrays in engines.calls if name == "conditioning").shape == (1, count)
                continue
            with pytest.raises(RequestError, match="prompt has another length") as caught:
                pipe(text)
            assert (caught.value.expected, caught.value.got) == ("4 to 6 tokens", str(count)) and not engines.calls

    def test_a_padded_text_has_a_range_too(self, engines: Fakes, tmp_path: Path) -> None:
        sources = programs.program()["sources"]
        sources[0] |= {"field": "attention_mask", "length": "length"}
        changed = programs.program(sources=sources, lengths={"length": {"minimum": 4, "maximum": 6}})
        pipe = load(write_program(tmp_path / "b", program=changed))
        pipe("a star")
        with pytest.raises(RequestError, match="prompt has another length") as caught:
            pipe("a")
        assert (caught.value.expected, caught.value.got) == ("4 to 6 tokens", "3")

    @pytest.mark.parametrize(
        ("shape", "lengths", "says"),
        [
            ([1, "length"], {}, "'length' tokens, which is not listed under lengths"),
            ([1, LENGTH], {"length": {"minimum": 7, "maximum": 6}}, "minimum is above maximum"),
        ],
    )
    def test_lengths_that_say_nothing(self, tmp_path: Path, shape: Any, lengths: Any, says: str) -> None:
        sources = programs.program()["sources"]
        sources[0]["shape"] = shape
        with pytest.raises(ArtifactError) as caught:
            load(write_program(tmp_path / "b", program=programs.program(sources=sources, lengths=lengths)))
        assert says in str(caught.value)

    @pytest.mark.parametrize("text", ["a 'red' star", 'a "red" star', "\u201cred\u201d star", "\u2018red\u2019"])
    def test_quoted_words(self, engines: Fakes, tmp_path: Path, text: str) -> None:
        sources = programs.program()["sources"]
        sources[0] |= {"unquoted": True}
        pipe = load(write_program(tmp_path / "b", program=programs.program(sources=sources)))
        pipe("the artist's star")
        engines.calls.clear()
        with pytest.raises(RequestError, match="prompt has quoted words") as caught:
            pipe(text)
        assert "red" in str(caught.value.got) and not engines.calls

    def test_positions_of_tokens(self, engines: Fakes, tmp_path: Path) -> None:
        sources = programs.program()["sources"]
        sources[0] |= {"field": "position_ids"}
        load(write_program(tmp_path / "b", program=programs.program(sources=sources)))("a star")
        given = next(arrays.ids for name, arrays in engines.calls if name == "conditioning")
        assert given[0, :4].tolist() == [0, 1, 2, 3]

    def test_cleaned_texts(self, engines: Fakes, tmp_path: Path) -> None:
        sources = programs.program()["sources"]
        sources[0] |= {"clean": True, "lower": True}
        root = write_program(tmp_path / "b", program=programs.program(sources=sources))
        load(root)("  A &amp;lt;RED&gt;\t \n circle ")
        given = next(arrays.ids for name, arrays in engines.calls if name == "conditioning")
        np.testing.assert_array_equal(given, tokens(root, "a <red> circle"))

    def test_mended_texts(self, engines: Fakes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sources = programs.program()["sources"]
        sources[0] |= {"mend": True}
        root = write_program(tmp_path / "b", program=programs.program(sources=sources))
        monkeypatch.setitem(sys.modules, "ftfy", None)
        load(root)("a plain circle")
        for text in ("a cat\u2019s circle", "this &amp; that", "two\r\nlines"):
            with pytest.raises(RequestError, match="mends with ftfy, which is not installed") as refused:
                load(root)(text)
            assert refused.value.hint == "pip install ftfy"
        ftfy: Any = types.ModuleType("ftfy")
        ftfy.fix_text = lambda text: text.replace("\u2019", "'")
        monkeypatch.setitem(sys.modules, "ftfy", ftfy)
        engines.calls.clear()
        load(root)("a cat\u2019s circle")
        given = next(arrays.ids for name, arrays in engines.calls if name == "conditioning")
        np.testing.assert_array_equal(given, tokens(root, "a cat's circle"))

    def test_long_texts(self, engines: Fakes, bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
        text = "a red circle and a blue square and a green star and a circle"
        with caplog.at_level(logging.WARNING, "slipcast"):
            load(bundle)(text)
        assert f"prompt is longer than {LENGTH} tokens; dropped: ' " in caplog.text
        with pytest.raises(RequestError, match="longer than"):
            load(bundle)(text, on_long_prompt="error")


class TestPictures:
    @pytest.fixture
    def pipe(self, engines: Fakes, tmp_path: Path) -> ProgramPipeline:
        return load(write_program(tmp_path / "b", **with_picture()))

    def test_forms_that_are_the_same(self, pipe: ProgramPipeline, engines: Fakes) -> None:
        levels = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
        floats = levels.astype(np.float32) / np.float32(255)
        for form in (levels, floats, floats.transpose(2, 0, 1)[None], Image.fromarray(levels)):
            engines.calls.clear()
            pipe(image=form, num_images_per_prompt=2)
            (given,) = (arrays.picture for name, arrays in engines.calls if name == "encoder")  # once for both
            np.testing.assert_array_equal(given, floats.transpose(2, 0, 1)[None])
            assert given.dtype == np.float32

    def test_pil_images_are_converted_and_resized(self, pipe: ProgramPipeline, engines: Fakes) -> None:
        picture = Image.radial_gradient("L").resize((33, 20))
        pipe(image=picture)
        (given,) = (arrays.picture for name, arrays in engines.calls if name == "encoder")
        wanted = np.asarray(picture.convert("RGB").resize((16, 16), Image.Resampling.LANCZOS))
        np.testing.assert_array_equal(given[0].transpose(1, 2, 0), wanted.astype(np.float32) / np.float32(255))

    @pytest.mark.parametrize(
        "picture",
        [
            None, "a.png", np.zeros((16, 8, 3), np.float32), np.zeros((16, 16), np.float32),
            np.full((16, 16, 3), 1.5, np.float32), np.full((16, 16, 3), np.nan), np.zeros((16, 16, 3), np.int64),
        ],
        ids=str,
    )  # fmt: skip
    def test_what_is_no_picture(self, pipe: ProgramPipeline, engines: Fakes, picture: Any) -> None:
        with pytest.raises(RequestError, match="image is "):
            pipe(image=picture)
        assert engines.calls == []


def with_picture() -> dict[str, Any]:
    """The manifest's keys of a program that draws on a picture, and takes no text."""
    parts = programs.components()
    parts = {"update": parts["update"], "decoder": parts["decoder"]}
    parts["encoder"] = {"inputs": [fakes.spec("picture", *PICTURE)], "outputs": [fakes.spec("latent", *LATENT)]}
    calls = [
        call("encoder", {"picture": "image"}, {"latent": "drawn"}),
        call("update", {"sample": "noise", "prediction": "drawn"}, {"sample": "x"}, 1),
        call("decoder", {"latent": "x"}, {"image": "result"}),
    ]
    sources = [
        {"kind": "image", "value": "image", "argument": "image", "shape": list(PICTURE)},
        {"kind": "noise", "value": "noise", "shape": list(LATENT)},
    ]
    return {
        "components": parts,
        "program": programs.program(sources=sources, calls=calls, arguments={}, results=["result"], steps=[1]),
    }


@pytest.fixture(autouse=True)
def encoder(engines: Fakes) -> None:
    engines.functions["encoder"] = lambda arrays: {"latent": np.repeat(arrays["picture"][:, :1, ::2, ::2], 4, 1)}


HOSTILE: dict[str, tuple[Callable[[Any], None], str]] = {
    "read before it is made": (lambda m: m["program"]["calls"].reverse(), "nothing before it makes"),
    "made twice": (lambda m: m["program"]["calls"][1]["outputs"].update(hidden="hidden"), "'hidden' is made twice"),
    "a source made twice": (lambda m: m["program"]["sources"][1].update(value="ids"), "'ids' is made twice"),
    "no such component": (lambda m: m["program"]["calls"][0].update(component="unet"), "no component 'unet'"),
    "no such input": (lambda m: m["program"]["calls"][0]["inputs"].update(x="ids"), "has no 'x'"),
    "no such output": (lambda m: m["program"]["calls"][0].update(outputs={"y": "hidden"}), "has no 'y'"),
    "a row without a table": (lambda m: m["program"].update(table=None), "reads row 0 of a table"),
    "an input without a row": (lambda m: m["program"]["calls"][2].update(row=None), "needs 'timestep'"),
    "a row for nothing": (lambda m: m["program"]["calls"][0].update(row=0), "needs no row"),
    "another shape": (lambda m: m["program"]["sources"][2].update(shape=[1, 4, 4, 4]), "and is given float32"),
    "another type": (lambda m: m["program"]["sources"][0].update(dtype="int32"), "is given int32"),
    "an unused component": (
        lambda m: (
            m["components"].update(more=m["components"]["decoder"]),
            m["targets"][0]["components"].update(more=m["targets"][0]["components"]["decoder"]),
        ),
        "components.more: no call",
    ),
    "a component's name": (lambda m: m["components"].update({"../x": m["components"]["decoder"]}), "components"),
    "a result that nothing makes": (lambda m: m["program"].update(results=["y"]), "nothing makes 'y'"),
    "a result that is no picture": (lambda m: m["program"].update(results=["hidden"]), "is no image"),
    "a step that is no call": (lambda m: m["program"].update(steps=[3, 7]), "steps are indices"),
    "steps that fall": (lambda m: m["program"].update(steps=[5, 3]), "steps are indices"),
    "no such argument": (lambda m: m["program"].update(arguments={"prompt": {}}), "'negative_prompt', which is not"),
    "an argument of every run": (lambda m: m["program"]["fixed"].update(seed=1), "'seed' means two things"),
    "an argument that is fixed too": (lambda m: m["program"]["fixed"].update(prompt="x"), "'prompt' means two things"),
    "an argument as itself": (
        lambda m: m["program"]["arguments"].update(negative_prompt={"same_as": "negative_prompt"}),
        "no argument with a text of its own",
    ),
    "a tokenizer outside": (lambda m: m["program"]["sources"][0].update(tokenizer="../x.json"), "path"),
    "a tokenizer that is not listed": (lambda m: m["program"]["sources"][0].update(tokenizer="x.json"), "not listed"),
    "a table that is not listed": (lambda m: m["program"].update(table="x.safetensors"), "not listed"),
    "a kind of source": (lambda m: m["program"]["sources"][0].update(kind="pickle"), "pickle"),
    "a key": (lambda m: m["program"].update(code="import os"), "unknown key 'code'"),
    "not required": (lambda m: m.update(requires=[]), "requires has to name program"),
    "no calls": (lambda m: m["program"].update(calls=[]), "program.calls"),
}  # fmt: skip


def in_a_call(manifest: Any, sizes: Any, name: str, shape: list[Any]) -> None:
    manifest["program"]["sizes"] = sizes
    next(each for each in manifest["components"]["denoiser"]["inputs"] if each["name"] == name)["shape"] = shape


IMAGES = {"images": {"minimum": 1, "maximum": 8}}
HOSTILE |= {
    "images that nobody counts": (
        lambda m: in_a_call(m, {}, "sample", ["images", *LATENT[1:]]), "sample has images that nobody could count",
    ),
    "images elsewhere": (
        lambda m: in_a_call(m, IMAGES, "sample", [1, 4, "images", 8]), "sample has images that nobody could count",
    ),
    "two images at least": (
        lambda m: in_a_call(m, {"images": {"minimum": 2, "maximum": 8}}, "sample", ["images", *LATENT[1:]]),
        "there may be one",
    ),
    "rows that an image has not": (
        lambda m: in_a_call(m, IMAGES, "context", ["3*images", LENGTH, fakes.WIDTH]), "and is given float32",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = write_program(tmp_path_factory.mktemp("valid") / "b")
    return json.loads((root / "manifest.json").read_text())


class TestManifests:
    def test_round_trip(self, valid: Any) -> None:
        manifest = read_any_manifest(json.dumps(valid).encode())
        assert read_any_manifest(manifest.to_json()) == manifest

    @pytest.mark.parametrize("case", HOSTILE)
    def test_what_does_not_hold_is_refused(self, valid: Any, case: str) -> None:
        change, says = HOSTILE[case]
        change(changed := copy.deepcopy(valid))
        with pytest.raises(ArtifactError) as caught:
            read_any_manifest(json.dumps(changed).encode())
        assert says in str(caught.value)

    @pytest.mark.filterwarnings("ignore:manifest.json has schema")
    def test_keys_of_a_newer_version(self, valid: Any) -> None:
        changed = copy.deepcopy(valid)
        changed["program"]["sources"][0]["novelty"] = 1
        with pytest.raises(ArtifactError, match="unknown key 'novelty'"):
            read_any_manifest(json.dumps(changed).encode())
        changed["schema_version"] = "1.7"
        assert read_any_manifest(json.dumps(changed).encode()).name == "captured"

    def test_other_commands_are_told_what_to_do(self, valid: Any, bundle: Path) -> None:
        for read in (lambda: read_manifest(json.dumps(valid).encode()), lambda: open_bundle(bundle)):
            with pytest.raises(RequestError, match="a captured program of FakePipeline") as caught:
                read()
            assert "slipcast.load" in str(caught.value)

    @pytest.mark.parametrize(
        ("changes", "got"),
        [
            ({"update.sigma": np.ones((1, 1), np.float32)}, "float32 ['2 rows or more', 1]"),
            ({"update.sigma": np.ones((2, 2), np.float32)}, "F32 [2, 2]"),
            ({"update.sigma": np.ones((2, 1), np.float64)}, "F64 [2, 1]"),
            ({"denoiser.timestep": np.array(3, np.float32)}, "F32 []"),
            ({"update.sigma": None}, "no such tensor"),
        ],
        ids=str,
    )
    def test_a_table_that_is_another(self, engines: Fakes, tmp_path: Path, changes: dict[str, Any], got: str) -> None:
        table = {name: array for name, array in (programs.TABLE | changes).items() if array is not None}
        with pytest.raises(ArtifactError, match="table.safetensors: not the table of the manifest") as caught:
            load(write_program(tmp_path / "b", table))
        assert got in str(caught.value)
        assert engines.opened == []

    def test_a_tokenizer_that_pads_without_end(self, engines: Fakes, tmp_path: Path) -> None:
        write_program(root := tmp_path / "b")
        tokenizer = Tokenizer.from_file(str(root / "tokenizer.json"))
        tokenizer.enable_padding(length=10**12)
        tokenizer.save(str(root / "tokenizer.json"))
        (root / "manifest.json").write_text(json.dumps(programs.document(root)))
        with pytest.raises(ArtifactError, match="pads to another length"):
            load(root)
