"""The pipeline around its engines, which are fakes here: what is asked of them, in which order, and what is refused."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import fakes
import numpy as np
import pytest
from fakes import LATENT, Fakes, write_fake
from PIL import Image

import slipcast.run.loop
from slipcast.bundle.manifest import read_manifest
from slipcast.engines.targets import choose_target
from slipcast.errors import ArtifactError, Cancelled, HostError, NumericalError, RequestError
from slipcast.run import load as any_bundle
from slipcast.run.base import to_pil
from slipcast.run.pipeline import Pipeline, load
from slipcast.run.tokenizer import PromptTokenizer
from slipcast.sampling.denoiser import Denoiser, final_scale, initial_scale
from slipcast.sampling.guidance import guide
from slipcast.sampling.samplers import sample
from slipcast.sampling.seeds import TorchGenerator

PROMPT, STEPS, PIXELS = "a red circle", 6, fakes.SIZE * fakes.FACTOR


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return fakes.install(monkeypatch)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake(tmp_path_factory.mktemp("fake") / "bundle")


@pytest.fixture
def pipe(root: Path, engines: Fakes) -> Pipeline:
    return load(root)


def edit(root: Path, into: Path, **changes: Any) -> Path:
    """A copy of the fake bundle whose `sampling` or `image` is changed by the given keys."""
    manifest = json.loads((root / "manifest.json").read_text())
    for key, values in changes.items():
        manifest[key] = manifest[key] | values if isinstance(values, dict) else values
    return write_fake(into, **{key: manifest[key] for key in changes})


def unconditional(into: Path) -> Path:
    """A bundle of a denoiser alone, in pixels."""
    shape = ("b", *LATENT)
    denoiser = {
        "inputs": [fakes.spec("sample", *shape), fakes.spec("timestep", 1)],
        "outputs": [fakes.spec("prediction", *shape)],
    }
    image = {"width": fakes.SIZE, "height": fakes.SIZE, "channels": 4, "factor": 1, "tile": 8, "overlap": 2}
    files = {"denoiser": {"model": "denoiser.xml", "weights": "denoiser.bin"}}
    target = {"engine": "openvino", "device": "cpu", "precision": "fp32", "components": files}
    return write_fake(into, components={"denoiser": denoiser}, text=[], image=image, targets=[target])


def latents(pipe: Pipeline, **arguments: Any) -> Any:
    return pipe(PROMPT, output_type="latent", **{"seed": 1, **arguments}).images


class TestWhatEnginesAreAsked:
    def test_the_loop_by_hand(self, pipe: Pipeline, engines: Fakes) -> None:
        """Text, noise, scale, guidance, solver, final scale and decoder, put together once more from their parts."""
        out = pipe(PROMPT, negative_prompt="blue", seed=5, guidance_scale=2.5, output_type="np")
        tokens = PromptTokenizer(pipe.bundle.path("tokenizer.json"), fakes.LENGTH, 655)
        context = fakes.encode({"input_ids": tokens(["blue", PROMPT])})["hidden"]
        settings, schedule = pipe.manifest.sampling, pipe.manifest.sampling.lay()

        def predict(x: Any, timestep: float) -> Any:
            rows = {"sample": np.concatenate([x, x]), "timestep": np.array([timestep]), "context": context}
            without, given = np.split(fakes.predict(rows)["prediction"], 2)
            return guide(given, without, 2.5)

        start = TorchGenerator(5).randn(LATENT)[None] * initial_scale(settings.noise, schedule)
        *_, x = sample("dpmpp_2m", Denoiser(settings.noise, schedule, predict), start, schedule.sigmas)
        image = fakes.decode({"latent": x * final_scale(settings.noise, schedule) / 0.5})["image"]
        expected = np.clip(image / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)
        np.testing.assert_allclose(out.images, expected, atol=1e-6)
        assert expected.std() > 0.1  # and it is not all black or all white
        assert (engines.count("text_encoder"), engines.count("denoiser"), engines.count("vae_decoder")) == (1, 6, 1)

    def test_the_decoder_gets_scaled_and_shifted_latents(self, root: Path, tmp_path: Path, engines: Fakes) -> None:
        image = {"scaling_factor": 0.25, "shift_factor": 0.125}
        pipe = load(edit(root, tmp_path / "b", image=image))
        clean = latents(pipe)
        pipe(PROMPT, seed=1)
        np.testing.assert_array_equal(engines.calls[-1][1].latent, clean / np.float32(0.25) + np.float32(0.125))

    def test_dtypes_and_shapes(self, pipe: Pipeline, engines: Fakes) -> None:
        pipe(PROMPT, seed=1, num_images_per_prompt=3, guidance_scale=cast(Any, np.float32(2)))
        for name, given in engines.calls:
            match name:
                case "text_encoder":
                    assert (given.input_ids.dtype, given.input_ids.shape) == (np.int64, (2, fakes.LENGTH))
                case "denoiser":
                    assert (given.sample.dtype, given.sample.shape) == (np.float32, (6, *LATENT))
                    assert (given.timestep.dtype, given.timestep.shape) == (np.float32, (1,))
                    assert (given.context.dtype, given.context.shape[0]) == (np.float32, 6)
                case _:
                    assert (given.latent.dtype, given.latent.shape) == (np.float32, (1, *LATENT))

    @pytest.mark.parametrize("scale", [1, 1.0, 0.5, 0])
    def test_no_guidance_evaluates_one_batch(self, pipe: Pipeline, engines: Fakes, scale: float) -> None:
        plain = latents(pipe, guidance_scale=scale)
        assert all(len(given.sample) == 1 for name, given in engines.calls if name == "denoiser")
        assert engines.calls[0][1].input_ids.shape[0] == 1
        np.testing.assert_array_equal(plain, latents(pipe, guidance_scale=1))
        assert not np.array_equal(plain, latents(pipe, guidance_scale=3))

    def test_each_different_prompt_is_encoded_once(self, pipe: Pipeline, engines: Fakes) -> None:
        pipe(["x", "y", "x"], negative_prompt="y", num_images_per_prompt=2, seed=0)
        assert engines.calls[0][1].input_ids.shape[0] == 2
        context = next(given.context for name, given in engines.calls if name == "denoiser")
        y, x = context[0], context[6]
        expected = [y] * 6 + [x, x, y, y, x, x]
        assert not np.array_equal(x, y)
        np.testing.assert_array_equal(context, np.stack(expected))

    def test_negative_prompts_one_each(self, pipe: Pipeline) -> None:
        both = pipe(["x", "y"], negative_prompt=["p", "q"], num_images_per_prompt=2, seed=3, output_type="latent")
        for i, (prompt, negative) in enumerate([("x", "p"), ("x", "p"), ("y", "q"), ("y", "q")]):
            one = pipe(prompt, negative_prompt=negative, seed=3 + i, output_type="latent")
            np.testing.assert_array_equal(both.images[i], one.images[0])
        other = pipe("x", negative_prompt="other", seed=3, output_type="latent").images
        assert not np.array_equal(both.images[0], other[0])

    def test_negative_prompt_none_is_empty(self, pipe: Pipeline) -> None:
        expected = latents(pipe, negative_prompt="")
        np.testing.assert_array_equal(latents(pipe), expected)
        np.testing.assert_array_equal(latents(pipe, negative_prompt=None), expected)
        assert not np.array_equal(latents(pipe, negative_prompt="blue"), expected)

    def test_guidance_rescale_of_the_bundle(self, root: Path, tmp_path: Path, engines: Fakes) -> None:
        rescaled = load(edit(root, tmp_path / "b", sampling={"guidance_rescale": 0.7}))
        assert not np.array_equal(latents(rescaled), latents(load(root)))

    def test_guidance_in_an_interval_and_gaps_used_again(self, root: Path, tmp_path: Path, engines: Fakes) -> None:
        plain = load(root)
        expected, levels = latents(plain), plain.manifest.sampling.lay().sigmas
        full = {"guidance_interval": [0.0, 1e9], "guidance_reuse": 0}
        np.testing.assert_array_equal(latents(self.leaving_out(root, tmp_path / "full", **full)), expected)
        part = self.leaving_out(root, tmp_path / "part", guidance_interval=[levels[4], levels[1]], guidance_reuse=1)
        engines.calls.clear()
        changed = latents(part, num_images_per_prompt=2)
        given = [given for name, given in engines.calls if name == "denoiser"]
        assert [len(each.sample) for each in given] == [2, 4, 2, 4, 2, 2]
        for each in given:  # without the unconditional branch, the context is the prompt's
            np.testing.assert_array_equal(each.context[-2:], given[1].context[-2:])
        assert not np.array_equal(given[1].context[0], given[1].context[2])
        assert not np.array_equal(changed[0], expected[0])
        np.testing.assert_array_equal(latents(part, guidance_scale=1.0), latents(plain, guidance_scale=1.0))
        for i in range(2):
            np.testing.assert_array_equal(latents(part, seed=1 + i)[0], changed[i])

    @staticmethod
    def leaving_out(root: Path, into: Path, **sampling: Any) -> Pipeline:
        named = [name for name, value in sampling.items() if value]
        return load(edit(root, into, sampling=sampling, requires=named))

    def test_unconditional(self, tmp_path: Path, engines: Fakes) -> None:
        engines.functions["denoiser"] = lambda arrays: {"prediction": 0.5 * arrays["sample"]}
        pipe = load(unconditional(tmp_path / "b"))
        out = pipe(seed=1, num_images_per_prompt=2, output_type="np")
        assert out.images.shape == (2, fakes.SIZE, fakes.SIZE, 4)
        assert set(engines.calls[0][1].__dict__) == {"precision", "sample", "timestep"}
        refused: list[dict[str, Any]] = [{"prompt": "x"}, {"negative_prompt": "x"}, {"prompt": ""}]
        for arguments in refused:
            with pytest.raises(RequestError, match="unconditional"):
                pipe(**arguments)

    def test_steps_and_explicit_schedules(self, root: Path, tmp_path: Path, engines: Fakes) -> None:
        assert len(set(seen := self.timesteps(load(root), engines, num_inference_steps=9))) == 9
        assert seen == sorted(seen, reverse=True)
        listed = load(edit(root, tmp_path / "t", sampling={"schedule": None, "timesteps": [900, 500, 20], "steps": 3}))
        assert self.timesteps(listed, engines) == [900, 500, 20]
        assert self.timesteps(listed, engines, num_inference_steps=3) == [900, 500, 20]
        with pytest.raises(RequestError, match="num_inference_steps is fixed.*\n.*3"):
            listed(PROMPT, num_inference_steps=4)
        levels = load(edit(root, tmp_path / "s", sampling={"schedule": None, "sigmas": [9.0, 2.0, 0.0], "steps": 2}))
        assert len(self.timesteps(levels, engines)) == 2

    @staticmethod
    def timesteps(pipe: Pipeline, engines: Fakes, **arguments: Any) -> list[float]:
        engines.calls.clear()
        pipe(PROMPT, seed=1, **arguments)
        return [float(given.timestep[0]) for name, given in engines.calls if name == "denoiser"]


class TestSeeds:
    def test_the_same_seed_twice_is_bit_equal_and_another_is_not(self, pipe: Pipeline) -> None:
        np.testing.assert_array_equal(latents(pipe, seed=7), latents(pipe, seed=7))
        assert not np.array_equal(latents(pipe, seed=7), latents(pipe, seed=8))

    @pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral", "dpmpp_2m_sde"])
    def test_image_i_of_a_batch_is_its_seed_alone(
        self, root: Path, tmp_path: Path, engines: Fakes, sampler: str
    ) -> None:
        pipe = load(edit(root, tmp_path / "b", sampling={"sampler": sampler}))
        many = pipe(["x", "y"], seed=11, num_images_per_prompt=2, output_type="latent")
        assert many.seeds == (11, 12, 13, 14)
        for i, seed in enumerate(many.seeds):
            alone = pipe("xxyy"[i], seed=seed, output_type="latent")
            np.testing.assert_array_equal(many.images[i], alone.images[0])

    @pytest.mark.parametrize("at_once", [1, 2, 3, 5])
    @pytest.mark.parametrize("guidance_scale", [3.0, 1.0])
    def test_a_large_batch_goes_through_the_denoiser_in_chunks(
        self, pipe: Pipeline, engines: Fakes, monkeypatch: pytest.MonkeyPatch, at_once: int, guidance_scale: float
    ) -> None:
        def draw() -> Any:
            prompts, negative = ["a", "b", "c"], ["x", "y", "z"]
            arguments: Any = {"negative_prompt": negative, "seed": 7, "guidance_scale": guidance_scale}
            return pipe(prompts, output_type="latent", **arguments).images

        whole = draw()
        engines.calls.clear()
        monkeypatch.setattr(slipcast.run.loop, "ATTENTION_BYTES", at_once * 2 * 8 * 4 * fakes.SIZE**4)
        np.testing.assert_array_equal(draw(), whole)
        given = [(len(each.sample), len(each.context)) for name, each in engines.calls if name == "denoiser"]
        rows = 2 if guidance_scale > 1 else 1
        assert all(sample == context <= rows * at_once for sample, context in given)
        assert len(given) == pipe.manifest.sampling.steps * -(-3 // at_once)

    def test_a_device_of_its_own_takes_the_batch_whole(
        self, pipe: Pipeline, engines: Fakes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(slipcast.run.loop, "ATTENTION_BYTES", 1)
        monkeypatch.setattr(pipe, "_target", pipe._target.model_copy(update={"device": "cuda"}))
        latents(pipe, seed=7, num_images_per_prompt=3)
        assert {len(each.sample) for name, each in engines.calls if name == "denoiser"} == {6}

    def test_a_list_of_seeds(self, pipe: Pipeline) -> None:
        out = pipe(PROMPT, seed=[3, 2**64 - 1], num_images_per_prompt=2, output_type="latent")
        assert out.seeds == (3, 2**64 - 1)
        np.testing.assert_array_equal(out.images[:1], latents(pipe, seed=3))

    def test_no_seed_is_random_and_told(self, pipe: Pipeline) -> None:
        first, second = (pipe(PROMPT, output_type="latent") for _ in range(2))
        assert first.seeds != second.seeds
        np.testing.assert_array_equal(first.images, latents(pipe, seed=first.seeds[0]))

    def test_latents_take_the_place_of_the_first_noise(self, pipe: Pipeline) -> None:
        noise = TorchGenerator(1).randn(LATENT)[None]
        kept = noise.copy()
        np.testing.assert_array_equal(latents(pipe, seed=99, latents=noise), latents(pipe, seed=1))
        assert not np.array_equal(latents(pipe, latents=2 * noise), latents(pipe))
        np.testing.assert_array_equal(noise, kept)


class TestOutput:
    def test_types(self, pipe: Pipeline) -> None:
        pil, array, latent = (
            pipe(PROMPT, seed=1, num_images_per_prompt=2, output_type=kind) for kind in ("pil", "np", "latent")
        )
        assert (array.images.dtype, array.images.shape) == (np.float32, (2, PIXELS, PIXELS, 3))
        assert (latent.images.dtype, latent.images.shape) == (np.float32, (2, *LATENT))
        assert array.images.min() >= 0 and array.images.max() <= 1
        assert all(isinstance(image, Image.Image) and image.size == (PIXELS, PIXELS) for image in pil.images)
        for image, values in zip(pil.images, array.images, strict=True):
            np.testing.assert_array_equal(np.asarray(image), (values * 255).round().astype(np.uint8))

    def test_latents_run_no_decoder(self, pipe: Pipeline, engines: Fakes) -> None:
        latents(pipe)
        assert engines.count("vae_decoder") == 0

    def test_to_pil(self) -> None:
        assert to_pil(np.full((2, 3, 1), 0.5, np.float32)).mode == "L"
        assert to_pil(np.full((2, 3, 3), 0.5, np.float32)).getpixel((0, 0)) == (128, 128, 128)

    def test_what_else_is_told(self, pipe: Pipeline) -> None:
        out = pipe(PROMPT, seed=1)
        assert out.target == "openvino-cpu-bf16" == pipe.target
        assert set(out.seconds) == {"text_encoder", "denoiser", "vae_decoder", "total"}
        assert 0 < sum(s for name, s in out.seconds.items() if name != "total") <= out.seconds["total"]


LONG = "one two three four five six seven eight nine ten eleven twelve"
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_inference_steps": 0}, "integer from 1 to 998"),
    ({"num_inference_steps": -1}, "integer from 1 to 998"),
    ({"num_inference_steps": 1001}, "integer from 1 to 998"),
    ({"num_inference_steps": 2.5}, "integer from 1 to 998"),
    ({"num_inference_steps": True}, "integer from 1 to 998"),
    ({"num_inference_steps": "20"}, "integer from 1 to 998"),
    ({"num_inference_steps": 1000}, "integer from 1 to 998"),  # legal for some schedules, not for this one
    ({"seed": -1}, f"integer from 0 to {2**64 - 1}"),
    ({"seed": 2**64}, f"integer from 0 to {2**64 - 1}"),
    ({"seed": 2**64 - 1, "num_images_per_prompt": 2}, f"integer from 0 to {2**64 - 2}"),
    ({"seed": 1.0}, f"integer from 0 to {2**64 - 1}"),
    ({"seed": True}, f"integer from 0 to {2**64 - 1}"),
    ({"seed": "7"}, f"integer from 0 to {2**64 - 1}"),
    ({"seed": [1, 2]}, "1 seeds"),
    ({"seed": []}, "1 seeds"),
    ({"seed": [1, -1], "num_images_per_prompt": 2}, f"integer from 0 to {2**64 - 1}"),
    ({"seed": [1, 1.5], "num_images_per_prompt": 2}, f"integer from 0 to {2**64 - 1}"),
    ({"width": PIXELS + 1}, f"expected: {PIXELS}\n"),
    ({"width": 2 * PIXELS}, f"expected: {PIXELS}\n"),
    ({"height": 0}, f"expected: {PIXELS}\n"),
    ({"height": -PIXELS}, f"expected: {PIXELS}\n"),
    ({"guidance_scale": float("nan")}, "number from 0 to 1000"),
    ({"guidance_scale": float("inf")}, "number from 0 to 1000"),
    ({"guidance_scale": -1}, "number from 0 to 1000"),
    ({"guidance_scale": "4"}, "number from 0 to 1000"),
    ({"guidance_scale": True}, "number from 0 to 1000"),
    ({"num_images_per_prompt": 0}, "integer from 1 to 4096"),
    ({"num_images_per_prompt": -3}, "integer from 1 to 4096"),
    ({"num_images_per_prompt": 1.0}, "integer from 1 to 4096"),
    ({"latents": np.zeros(LATENT, np.float32)}, "float32 [1, 4, 8, 8]"),
    ({"latents": np.zeros((2, *LATENT), np.float32)}, "float32 [1, 4, 8, 8]"),
    ({"latents": np.zeros((1, *LATENT), np.float64)}, "float32 [1, 4, 8, 8]"),
    ({"latents": np.zeros((1, *LATENT), object)}, "float32 [1, 4, 8, 8]"),
    ({"latents": np.full((1, *LATENT), np.nan, np.float32)}, "finite numbers"),
    ({"latents": "noise"}, "float32 [1, 4, 8, 8]"),
    ({"output_type": "png"}, "pil or np or latent"),
    ({"output_type": ["pil"]}, "pil or np or latent"),
    ({"on_long_prompt": "drop"}, "warn or error"),
    ({"prompt": None}, "a string or a non-empty list of strings"),
    ({"prompt": 7}, "a string or a non-empty list of strings"),
    ({"prompt": b"bytes"}, "a string or a non-empty list of strings"),
    ({"prompt": []}, "a string or a non-empty list of strings"),
    ({"prompt": ["x", None]}, "a string"),
    ({"prompt": "\ud800 half"}, "valid Unicode"),
    ({"prompt": ["fine", "half \udfff"]}, "valid Unicode"),
    ({"negative_prompt": 7}, "a string or a non-empty list of strings"),
    ({"negative_prompt": ["a", "b"]}, "one text, or as many as prompts"),
    ({"negative_prompt": "\udc00"}, "valid Unicode"),
    ({"prompt": LONG, "on_long_prompt": "error"}, "dropped: "),
    ({"negative_prompt": LONG, "on_long_prompt": "error"}, "dropped: "),
]


class TestRefusals:
    @pytest.mark.parametrize(("arguments", "legal"), REFUSED, ids=lambda value: ascii(value)[:60])
    def test_before_any_engine_runs(
        self, pipe: Pipeline, engines: Fakes, arguments: dict[str, Any], legal: str
    ) -> None:
        with pytest.raises(ValueError, match=".") as caught:
            pipe(**{"prompt": PROMPT, **arguments})
        assert isinstance(caught.value, RequestError)
        assert legal in str(caught.value)
        assert engines.calls == []
        assert len(pipe(PROMPT, seed=1).images) == 1

    def test_the_size_that_was_built_may_be_named(self, pipe: Pipeline) -> None:
        assert pipe(PROMPT, seed=1, width=PIXELS, height=PIXELS).images[0].size == (PIXELS, PIXELS)

    def test_a_size_error_says_how_to_get_that_size(self, pipe: Pipeline) -> None:
        with pytest.raises(RequestError, match="width is fixed.*\n.*\n.*\n.*--set sampling.width=512"):
            pipe(PROMPT, width=512)

    @pytest.mark.parametrize(
        "prompt", ["", "🟥 ⭕", "e\u0301 \u200d\u202e", [PROMPT], ("a", "b"), "<|endoftext|>", LONG]
    )
    def test_prompts_that_work(self, pipe: Pipeline, prompt: Any) -> None:
        assert len(pipe(prompt, seed=1).images) == (len(prompt) if isinstance(prompt, (list, tuple)) else 1)

    def test_a_long_prompt_is_warned_of_once(self, pipe: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
        pipe(LONG, seed=1, num_images_per_prompt=3)
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warnings) == 1
        assert f"longer than {fakes.LENGTH} tokens" in warnings[0]
        assert "twelve" in warnings[0]


class TestCallbacks:
    def test_once_per_step_with_its_timestep(self, root: Path, tmp_path: Path, engines: Fakes) -> None:
        pipe = load(edit(root, tmp_path / "b", sampling={"sampler": "heun"}))  # two evaluations in a step
        seen: list[Any] = []
        final = latents(pipe, callback_on_step_end=lambda *arguments: seen.append(arguments))
        assert engines.count("denoiser") == 2 * STEPS - 1
        assert [arguments[0] for arguments in seen] == [pipe] * STEPS
        assert [arguments[1] for arguments in seen] == list(range(STEPS))
        assert [arguments[2] for arguments in seen] == list(pipe.manifest.sampling.lay().timesteps)
        assert all(list(arguments[3]) == ["latents"] for arguments in seen)
        np.testing.assert_array_equal(seen[-1][3]["latents"], final)  # the terminal sigma is 0 here
        assert not np.array_equal(seen[0][3]["latents"], seen[1][3]["latents"])

    def test_may_replace_latents(self, pipe: Pipeline, engines: Fakes) -> None:
        wanted = np.full((1, *LATENT), 0.25, np.float32)
        out = latents(pipe, callback_on_step_end=lambda p, step, t, k: {"latents": wanted} if step == 2 else None)
        schedule = pipe.manifest.sampling.lay()
        given = [given for name, given in engines.calls if name == "denoiser"][3].sample[0]
        np.testing.assert_allclose(given, 0.25 / np.sqrt(1 + schedule.sigmas[3] ** 2), rtol=1e-6)
        assert not np.array_equal(out, latents(pipe))
        last = latents(pipe, callback_on_step_end=lambda p, step, t, k: {"latents": wanted} if step == 5 else {})
        np.testing.assert_array_equal(last, wanted)
        np.testing.assert_array_equal(wanted, 0.25)

    @pytest.mark.parametrize("bad", [np.zeros(LATENT, np.float32), np.zeros((1, *LATENT)), 0.0, None])
    def test_replaced_by_something_else(self, pipe: Pipeline, bad: Any) -> None:
        with pytest.raises(RequestError, match=r"callback_on_step_end(.|\n)*float32 \[1, 4, 8, 8\]"):
            latents(pipe, callback_on_step_end=lambda *_: {"latents": bad})

    @pytest.mark.parametrize("residency", ["all", "sequential"])
    @pytest.mark.parametrize("error", [Cancelled("enough"), KeyError("a bug"), KeyboardInterrupt()])
    def test_one_that_raises_leaves_the_pipeline_usable(
        self, root: Path, engines: Fakes, residency: Any, error: BaseException
    ) -> None:
        pipe = load(root, residency=residency)
        before = latents(pipe)

        def stop(p: Pipeline, step: int, timestep: float, kept: Any) -> None:
            if step == 3:
                raise error

        engines.calls.clear()
        with pytest.raises(type(error)) as caught:
            latents(pipe, callback_on_step_end=stop)
        assert caught.value is error
        assert engines.count("denoiser") == 4
        if residency == "sequential":
            assert engines.open_now == []
        np.testing.assert_array_equal(latents(pipe), before)

    def test_may_itself_make_pictures(self, pipe: Pipeline) -> None:
        before, inner = latents(pipe), []
        thread = threading.Thread(
            target=lambda: inner.append(latents(pipe, callback_on_step_end=lambda *_: inner.append(latents(pipe)))),
            daemon=True,
        )
        thread.start()
        thread.join(20)
        assert len(inner) == STEPS + 1
        for each in inner:
            np.testing.assert_array_equal(each, before)


class TestNumbersThatAreNone:
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("output_type", ["pil", "latent"])
    def test_a_denoiser_that_breaks_is_stopped_at_its_step(
        self, pipe: Pipeline, engines: Fakes, value: float, output_type: Any
    ) -> None:
        def broken(arrays: Any) -> Any:
            output = fakes.predict(arrays)["prediction"]
            if engines.count("denoiser") == 3:
                output[-1, 0, 0, 0] = value
            return {"prediction": output}

        engines.functions["denoiser"] = broken
        timestep = pipe.manifest.sampling.lay().timesteps[2]
        with pytest.raises(NumericalError, match=rf"after step 3 of 6 \(timestep {timestep:g}\)"):
            pipe(PROMPT, seed=1, output_type=output_type)
        assert (engines.count("denoiser"), engines.count("vae_decoder")) == (3, 0)

    @pytest.mark.parametrize("in_place", [True, False])
    @pytest.mark.parametrize("at", [1, STEPS - 1])
    def test_a_callback_that_breaks(self, pipe: Pipeline, engines: Fakes, at: int, in_place: bool) -> None:
        def poison(p: Pipeline, step: int, timestep: float, kept: dict[str, Any]) -> Any:
            x = kept["latents"] if in_place else kept["latents"].copy()
            if step == at:
                x[0, 0, 0, 0] = np.nan
            return None if in_place else {"latents": x}

        with pytest.raises(NumericalError, match=f"callback_on_step_end at step {at + 1} of 6"):
            latents(pipe, callback_on_step_end=poison)
        assert engines.count("denoiser") == at + 1

    def test_a_decoder_that_overflows_in_bf16_is_tried_once_more_in_fp32(
        self, pipe: Pipeline, engines: Fakes, caplog: pytest.LogCaptureFixture
    ) -> None:
        expected = pipe(PROMPT, seed=1, output_type="np").images
        engines.functions["vae_decoder"] = self.overflowing(engines, "bf16")
        engines.opened.clear()
        out = pipe(PROMPT, seed=1, output_type="np")
        np.testing.assert_array_equal(out.images, expected)
        assert engines.opened == [("vae_decoder", "fp32")]
        assert engines.closed == ["vae_decoder"]
        assert "decoding again in fp32" in caplog.text

    def test_and_only_once(self, pipe: Pipeline, engines: Fakes) -> None:
        engines.functions["vae_decoder"] = self.overflowing(engines, "bf16", "fp32")
        with pytest.raises(NumericalError, match="picture is not finite"):
            pipe(PROMPT, seed=1)
        assert engines.count("vae_decoder") == 2
        engines.functions["vae_decoder"] = fakes.decode
        assert len(pipe(PROMPT, seed=1).images) == 1

    def test_fp32_is_not_tried_again(self, root: Path, engines: Fakes) -> None:
        engines.functions["vae_decoder"] = self.overflowing(engines, "fp32")
        with pytest.raises(NumericalError):
            load(root, target="onnxruntime")(PROMPT, seed=1)
        assert engines.count("vae_decoder") == 1

    @staticmethod
    def overflowing(engines: Fakes, *precisions: str) -> Any:
        def decode(arrays: Any) -> Any:
            output = fakes.decode(arrays)["image"]
            if engines.calls[-1][1].precision in precisions:
                output[..., -1] = np.inf
            return {"image": output}

        return decode


class TestThreads:
    def test_take_turns(self, pipe: Pipeline, engines: Fakes) -> None:
        expected = {seed: latents(pipe, seed=seed) for seed in range(6)}
        inside, most, found = 0, 0, {}

        def busy(arrays: Any) -> Any:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            result = fakes.predict(arrays)
            threading.Event().wait(0.001)
            inside -= 1
            return result

        engines.functions["denoiser"] = busy
        threads = [
            threading.Thread(target=lambda s=seed: found.update({s: latents(pipe, seed=s)})) for seed in expected
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert most == 1
        assert found.keys() == expected.keys()
        for seed, image in expected.items():
            np.testing.assert_array_equal(found[seed], image)

    def test_closing_waits_for_a_call_in_another_thread(self, pipe: Pipeline) -> None:
        started = threading.Event()

        def close() -> None:
            started.wait(20)
            pipe.close()

        closer = threading.Thread(target=close)
        closer.start()

        def slow(*_: Any) -> None:
            started.set()
            threading.Event().wait(0.02)

        expected = latents(pipe, callback_on_step_end=slow)
        closer.join(20)
        assert not closer.is_alive()
        np.testing.assert_array_equal(latents(pipe), expected)


class TestLoad:
    def test_auto_takes_the_first(self, root: Path, engines: Fakes, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "slipcast")
        assert load(root).target == "openvino-cpu-bf16"
        assert "target openvino-cpu-bf16 (the bundle's first that runs here)" in caplog.text

    @pytest.mark.parametrize("wanted", ["onnxruntime", "onnxruntime-cpu-fp32"])
    def test_by_engine_or_id(self, root: Path, engines: Fakes, wanted: str) -> None:
        assert load(root, target=wanted).target == "onnxruntime-cpu-fp32"
        assert {precision for _, precision in engines.opened} == {"fp32"}

    def test_unknown(self, root: Path, engines: Fakes) -> None:
        with pytest.raises(RequestError, match=r"'tensorrt'\n.*auto, openvino-cpu-bf16, onnxruntime-cpu-fp32"):
            load(root, target="tensorrt")
        assert engines.opened == []

    def test_an_absent_library_is_passed_over_and_said_once(
        self, root: Path, engines: Fakes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr("slipcast.engines.EngineKind.available", lambda kind: kind.library != "openvino")
        assert load(root).target == "onnxruntime-cpu-fp32"
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert warnings == ["target openvino-cpu-bf16: openvino is not installed: pip install 'slipcast[openvino]'"]
        with pytest.raises(
            HostError,
            match=r"target openvino cannot run here\n.*one of onnxruntime-cpu-fp32\n.*pip install 'slipcast\[",
        ):
            load(root, target="openvino")

    def test_none_at_all(self, root: Path, engines: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("slipcast.engines.EngineKind.available", lambda kind: False)
        with pytest.raises(HostError, match="no target of this bundle can run here") as caught:
            load(root)
        assert "openvino-cpu-bf16, onnxruntime-cpu-fp32" in str(caught.value)
        assert "pip install 'slipcast[openvino]'; onnxruntime-cpu-fp32" in str(caught.value)

    def test_an_engine_this_runtime_does_not_know(self, root: Path) -> None:
        document = json.loads((root / "manifest.json").read_text())
        document["targets"][0]["engine"] = "abacus"
        manifest = read_manifest(json.dumps(document).encode())
        assert choose_target(manifest).engine == "onnxruntime"
        with pytest.raises(HostError, match="abacus-cpu-bf16: unknown to this runtime"):
            choose_target(manifest, "abacus")

    @pytest.mark.parametrize("key", ["sampler", "schedule"])
    def test_a_sampler_or_schedule_of_a_newer_runtime(
        self, root: Path, tmp_path: Path, engines: Fakes, key: str
    ) -> None:
        with pytest.raises(HostError, match=f"does not know the {key} 'quantum'"):
            load(edit(root, tmp_path / "b", sampling={key: "quantum"}))
        assert engines.opened == []

    def test_only_what_is_used_is_hashed(self, tmp_path: Path, engines: Fakes) -> None:
        root = write_fake(tmp_path / "b")
        (root / "denoiser.bin").write_text("DENOISER.BIN"[: len("denoiser.bin")])
        with pytest.raises(ArtifactError, match="denoiser.bin: content differs"):
            load(root)
        assert engines.opened == []

    def test_public_names(self) -> None:
        assert slipcast.load is any_bundle.load
        assert issubclass(slipcast.RequestError, ValueError)


def replace(components: Any, component: str, side: str, index: int, **changes: Any) -> None:
    components[component][side][index].update(changes)


CONTRADICTIONS: dict[str, Callable[[Any], None]] = {
    "sample's size": lambda c: replace(c, "denoiser", "inputs", 0, shape=["b", 4, 8, 16]),
    "sample's rank": lambda c: replace(c, "denoiser", "inputs", 0, shape=["b", 4, 64]),
    "sample's dtype": lambda c: replace(c, "denoiser", "inputs", 0, dtype="float16"),
    "timestep's shape": lambda c: replace(c, "denoiser", "inputs", 1, shape=["b"][:0]),
    "an input's name": lambda c: replace(c, "denoiser", "inputs", 2, name="encoder_hidden_states"),
    "an input too many": lambda c: c["denoiser"]["inputs"].append(fakes.spec("time_ids", "b", 6)),
    "prediction's name": lambda c: replace(c, "denoiser", "outputs", 0, name="sample"),
    "prediction's channels": lambda c: replace(c, "denoiser", "outputs", 0, shape=["b", 8, 8, 8]),
    "tokens": lambda c: replace(c, "text_encoder", "inputs", 0, shape=["b", 77]),
    "tokens' dtype": lambda c: replace(c, "text_encoder", "inputs", 0, dtype="int32"),
    "the encoder's output": lambda c: replace(c, "text_encoder", "outputs", 0, name="pooled"),
    "the decoder's channels": lambda c: replace(c, "vae_decoder", "inputs", 0, shape=["b", 16, "h", "w"]),
    "the decoder's output": lambda c: replace(c, "vae_decoder", "outputs", 0, name="sample"),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_a_manifest_whose_parts_do_not_fit_is_refused_at_load(
    root: Path, tmp_path: Path, engines: Fakes, what: str
) -> None:
    components = json.loads((root / "manifest.json").read_text())["components"]
    CONTRADICTIONS[what](components)
    with pytest.raises(ArtifactError, match=r"components\.\w+(.|\n)*does not fit") as caught:
        load(write_fake(tmp_path / "b", components=components))
    assert caught.value.expected and caught.value.got
    assert engines.opened == []


def test_a_text_input_without_its_encoder_is_refused_at_load(root: Path, tmp_path: Path, engines: Fakes) -> None:
    text = json.loads((root / "manifest.json").read_text())["text"]
    text[0]["component"] = "text_encoder_2"
    with pytest.raises(ArtifactError, match="components.text_encoder_2"):
        load(write_fake(tmp_path / "b", text=text))
