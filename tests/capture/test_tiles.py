"""Decoders of captured pipelines in tiles: which are, and that tiles give what the whole does where that can be."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundling import compare, export_here, write
from diffusers import ConfigMixin, DDIMScheduler, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from test_sizes import Mixing
from tiny import call_of, open_pipeline

import slipcast
from slipcast.bundle.tiles import TiledAxis, Tiling
from slipcast.errors import RecipeError
from slipcast.run.tiling import decode_tiled
from slipcast_compiler.capture.call import make_call
from slipcast_compiler.capture.find import Found, Wanted, find_for
from slipcast_compiler.capture.parts import describe_parts, live_bytes
from slipcast_compiler.engines.programs import ProgramGraphs
from slipcast_compiler.host.cache import Cache

PROMPT, TILE = "a large blue star on a black background", Wanted(tile=8, overlap=2)


class Near(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """[1, 2, h, w] to [1, 3, 2 h, 2 w], of which each pixel sees its cell alone: tiles of it are exact."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Conv2d(2, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(torch.nn.functional.interpolate(x, scale_factor=2.0)).sigmoid()


class Upright(Near):
    """Of one height alone, as a table of positions would have it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * torch.arange(2 * 18, dtype=x.dtype)[:, None].to(x.device)


class Fixed(Near):
    """Its result is of one size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(super().forward(x), (36, 24))


class Packed(DiffusionPipeline):  # type: ignore[misc]
    """Its latent is [1, h w, 2]; what it gives is turned, by numbers of its size."""

    def __init__(self, denoiser: Mixing, decoder: Near, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.register_modules(denoiser=denoiser, decoder=decoder, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self, height: int = 18, width: int = 12, num_inference_steps: int = 3, generator: Any = None
    ) -> dict[str, torch.Tensor]:
        x = torch.randn(1, height * width, 2, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for time in self.scheduler.timesteps:
            denoised = self.denoiser(x.view(1, height, width, 2).permute(0, 3, 1, 2))
            x = self.scheduler.step(denoised.permute(0, 2, 3, 1).reshape(x.shape), time, x).prev_sample
        return {"x": self.finish(self.decoder(x.view(1, height, width, 2).permute(0, 3, 1, 2)))}

    def finish(self, picture: torch.Tensor) -> torch.Tensor:
        *_, height, width = picture.shape
        return picture.view(1, 3, height, width // 2, 2).flip(-1).reshape(1, 3, height, width)


def packed(decoder: Any = Near, kind: Any = Packed) -> Any:
    torch.manual_seed(0)
    pipe = kind(Mixing(), decoder(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def calls(pipe: Any, *sizes: tuple[int, int]) -> list[Any]:
    given = [{"height": height, "width": width} for height, width in sizes]
    return [lambda prompt, each=each: make_call(pipe, each, prompt) for each in given]


def find_tiny(name: str, wanted: Wanted = TILE, **changes: Any) -> Found:
    return find_for(open_pipeline(name), [lambda prompt: call_of(name, prompt, 1) | changes], wanted)[0]


@pytest.mark.slow
def test_what_is_exact_cell_by_cell_is_exact_tile_by_tile(tmp_path: Path) -> None:
    """With glue before and after that is of the whole, for sizes that are listed: of the second, no latent is wider
    than a tile."""
    pipe, sizes, cache = packed(), ((18, 12), (20, 6)), Cache(tmp_path / "cache")
    entry = export_here(pipe, "packed", calls(pipe, *sizes), cache, Wanted(tile=8, overlap=3))
    bundle = write(ProgramGraphs(entry), "packed", tmp_path, cache)
    with slipcast.load(bundle) as loaded:
        manifest = loaded.manifest
        assert manifest.requires == ("program", "tiled_decode")
        (tiled,) = {call.component for call in manifest.program.calls if call.tiles}
        assert manifest.components[tiled].inputs[0].shape == (1, 2, 8, "decoder_width")
        width_range = manifest.program.sizes["decoder_width"]
        assert (width_range.minimum, width_range.maximum) == (6, 8)
        for height, width in sizes:
            found = loaded(height=height, width=width, seed=3).images[0]
            wanted = pipe(height, width, generator=torch.Generator().manual_seed(3))["x"]
            np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5, atol=1e-6)


def test_which_parts_there_are() -> None:
    found = find_for(packed(), calls(packed(), (18, 12)), Wanted(tile=8, overlap=3))[0]
    assert [use.part for use in found.cut.uses][-3:] == ["decoder_before", "decoder", "decoder_after"]
    assert [use.times for use in found.cut.uses][-3:] == [1, 3 * 2, 1]
    turned = find_for(packed(kind=Mirrored), calls(packed(), (18, 12)), TILE)[0]
    assert [use.part for use in turned.cut.uses][-2:] == ["decoder", "decoder_after"]
    plain = find_tiny("stable_diffusion", height=64, width=64)
    assert [part.name for part in plain.cut.parts if part.name.startswith("decoder")] == ["decoder"]
    parts = describe_parts([plain], open_pipeline("stable_diffusion"))
    assert (parts["decoder"]["uses"], parts["decoder"]["tiles"]) == (1, 25)
    assert parts["decoder"]["modules"] == ["vae.post_quant_conv", "vae.decoder"]


def test_what_tiles_save_is_told() -> None:
    whole, tiled = (find_tiny("stable_diffusion", w, height=128, width=128) for w in (Wanted(), TILE))
    in_pipeline, in_parts = live_bytes([whole])
    live = whole.program.live
    assert in_parts == in_pipeline == live_bytes([tiled])[0] == max(live["vae.decoder"], 2 * live["unet"])
    decoder = next(part for part in tiled.cut.parts if part.name == "decoder")
    assert (
        decoder.live_bytes and decoder.live_bytes < whole.program.live["vae.decoder"] / 40
    )  # 64 x 64 cells, and 8 x 8


def test_what_is_no_larger_than_a_tile_stays_whole() -> None:
    found = find_tiny("stable_diffusion", Wanted(tile=64, overlap=16))
    assert not any(use.tiles for use in found.cut.uses)


@pytest.mark.parametrize(("decoder", "got"), [(Upright, "test_tiles.py:"), (Fixed, "[1, 3, 36, 24]")])
def test_what_is_no_decoder_of_part_of_a_latent(decoder: Any, got: str) -> None:
    pipe = packed(decoder)
    with pytest.raises(RecipeError, match=r"\[decode\] is not for Packed: it cannot be decoded in tiles") as caught:
        find_for(pipe, calls(pipe, (18, 12)), TILE)
    assert got in str(caught.value.got)


class Mirrored(Packed):
    """What it does with the picture of the decoder is to be done with the whole."""

    def finish(self, picture: torch.Tensor) -> torch.Tensor:
        return picture.flip(-1)


class Levelled(Packed):
    def finish(self, picture: torch.Tensor) -> torch.Tensor:
        return picture / picture.amax((2, 3), keepdim=True)


class Cropped(Packed):
    def finish(self, picture: torch.Tensor) -> torch.Tensor:
        return picture[..., :33, :]


class CellByCell(Packed):
    """What it does with the picture can be done with tiles."""

    def finish(self, picture: torch.Tensor) -> torch.Tensor:
        return (picture + 1).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)[:, 1:]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "apart"), [(Mirrored, 1), (Levelled, 1), (Cropped, 1), (CellByCell, 0)])
def test_what_is_for_the_whole_is_done_with_it(kind: Any, apart: int, tmp_path: Path) -> None:
    pipe, cache = packed(kind=kind), Cache(tmp_path / "cache")
    bundle = write(ProgramGraphs(export_here(pipe, "whole", calls(pipe, (18, 12)), cache, TILE)), "w", tmp_path, cache)
    with slipcast.load(bundle) as loaded:
        assert ("decoder_after" in loaded.manifest.components) == bool(apart)
        (result,) = loaded.manifest.program.results
        found = loaded(seed=3).images[0]
        assert loaded.manifest.specs(loaded.manifest.program)[result].shape == (1, *found.shape[-3:])
        wanted = pipe(generator=torch.Generator().manual_seed(3))["x"]
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_tiles_beside_steps_without_guidance() -> None:
    """Both make values that the program has not; video is decoded in chunks, each of which is cut."""
    given = {"height": 64, "width": 64, "decode_chunk_size": 1}
    found = find_tiny("animate_diff", Wanted(unguided=True, tile=8, overlap=2), **given)
    assert found.loop and found.loop.unguided
    made = [value for use in found.cut.uses for value in use.outputs]
    assert len(set(made)) == len(made)
    assert next(use for use in found.cut.uses if use.tiles).times == 25


@pytest.mark.parametrize(
    ("name", "expected"), [("ddpm", "a module that makes the result"), ("stable_audio", "a latent with height")]
)
def test_pipelines_without_a_latent_to_cut(name: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        find_tiny(name, Wanted(tile=4))
    assert expected in str(caught.value.expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stable_diffusion", "flux", "qwen_image", "wan", "ltx", "animate_diff", "sana"])
def test_tiles_of_a_bundle_are_those_of_the_pipeline(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the pipeline with torch's decoder in the same tiles, whatever prompt and seed."""
    pipe, big = open_pipeline(name), {"height": 128, "width": 192}
    cache = Cache(tmp_path / "cache")
    entry = export_here(pipe, name, [lambda prompt: call_of(name, prompt, 1) | big], cache, TILE)
    bundle = write(ProgramGraphs(entry), name, tmp_path, cache)
    with slipcast.load(bundle) as loaded:
        (tiling,) = {call.tiles for call in loaded.manifest.program.calls if call.tiles}
        whole = compare(loaded, pipe, name, PROMPT, 7, **big)["psnr"]
        usual, apart = pipe.vae.decode, any("after" in each for each in loaded.manifest.components)

        def decode(latent: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            def one(tile: Any) -> Any:
                found = usual(torch.from_numpy(tile), *args, **kwargs)[0]
                return (found if apart else found.clamp(-1, 1)).numpy()

            norms = Norms(pipe.vae)
            measure = norms.measure(one) if norms.modules else None
            found = torch.from_numpy(decode_tiled(one, latent.numpy(), _of_the_vae(tiling, latent), measure))
            norms.forget()
            return (found,) if kwargs.get("return_dict") is False else DecoderOutput(found)

        monkeypatch.setattr(pipe.vae, "decode", decode)
        assert bool(tiling.statistics) == bool(Norms(pipe.vae).modules)
        assert compare(loaded, pipe, name, PROMPT, 7, **big)["psnr"] >= 60 > whole


class Norms:
    """The group norms of a decoder, in torch, with the statistics of a measured input."""

    def __init__(self, vae: Any) -> None:
        self.modules = [each for each in vae.decoder.modules() if isinstance(each, torch.nn.GroupNorm)]
        self._known: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    def measure(self, decode: Any) -> Any:
        def record(norm: Any, given: Any) -> None:
            groups = given[0].reshape(len(given[0]), norm.num_groups, -1)
            deviation = (groups.var(-1, unbiased=False) + norm.eps).sqrt()
            self._known[norm] = groups.mean(-1)[..., None], deviation[..., None]

        def measure(small: Any) -> None:
            hooks = [norm.register_forward_pre_hook(record) for norm in self.modules]
            decode(small)
            for hook, norm in zip(hooks, self.modules, strict=True):
                hook.remove()
                norm.forward = functools.partial(self._normalise, norm)

        return measure

    def _normalise(self, norm: Any, x: torch.Tensor) -> torch.Tensor:
        mean, deviation = self._known[norm]
        groups = (x.reshape(len(x), norm.num_groups, -1) - mean) / deviation
        shape = [1, -1, *[1] * (x.ndim - 2)]
        return groups.reshape(x.shape) * norm.weight.reshape(shape) + norm.bias.reshape(shape)

    def forget(self) -> None:
        for norm in self.modules:
            vars(norm).pop("forward", None)


def _of_the_vae(tiling: Tiling, latent: torch.Tensor) -> Tiling:
    """The same for the arrays that the VAE itself takes and gives: height and width are last."""
    (factor,) = {axis.factor for axis in tiling.axes}
    axes = tuple(TiledAxis(input=dim, output=dim, factor=factor) for dim in (latent.ndim - 2, latent.ndim - 1))
    return tiling.model_copy(update={"axes": axes})
