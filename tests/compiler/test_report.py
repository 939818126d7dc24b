"""report.html: self-contained, escaped, and it opens in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import tomli_w

from slipcast.bundle.manifest import ImageGeometry, Metrics, Sampling
from slipcast.sampling.schedules import NoiseProcess
from slipcast_compiler.judge.evaluate import Judged
from slipcast_compiler.judge.gate import GateRow
from slipcast_compiler.judge.originals import Originals, Run
from slipcast_compiler.pages import evidence, report
from slipcast_compiler.plan import make_plan
from slipcast_compiler.recipe.reading import parse_recipe
from slipcast_compiler.recipe.recipe import Recipe

ROOT = Path(__file__).parents[2]
HOSTILE = '<script>document.title="owned"</script><img src=x onerror=alert(1)> & "quotes"'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class _Page(HTMLParser):
    """Tags with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def _dump(page: Path, profile: Path, *options: str) -> str:
    assert CHROMIUM
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}",
    ]  # fmt: skip
    done = subprocess.run(
        [CHROMIUM, *flags, *options, page.resolve().as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout


def _graphs(sampling: Sampling, reference: Sampling, image: ImageGeometry) -> Any:
    """What a report reads of them to resolve a recipe."""
    return SimpleNamespace(sampling=sampling, reference=reference, original=SimpleNamespace(image=image))


def _resolved(sampling: str, **laid: Any) -> dict[str, Any]:
    """The resolved recipe of a plan that has what `sampling` asks for and `laid`."""
    recipe = parse_recipe(
        f'name = "x"\nmodel.path = "m"\nfamily.prompts = ["a \\"b\\"", "c"]\n'
        f'targets = [{{ engine = "onnxruntime" }}]\n[sampling]\n{sampling}',
        "x.toml",
    )
    image = ImageGeometry(width=64, height=32, channels=4, factor=8, tile=48, overlap=8)
    chosen = Sampling(sampler="euler", guidance_scale=4.0, noise=NoiseProcess(), **laid)
    return report.resolve(recipe, _graphs(chosen, chosen, image))


@pytest.mark.parametrize(
    ("asked", "laid"),
    [
        ("", {"schedule": "leading", "steps": 20}),
        ("timesteps = [900, 500.5, 1e-5]", {"timesteps": (900.0, 500.5, 1e-5), "steps": 3}),
        ("sigmas = [14.6, 2, 0]", {"sigmas": (14.6, 2.0, 0.0), "steps": 2}),
    ],
)
def test_the_resolved_recipe_can_be_pasted(asked: str, laid: dict[str, Any]) -> None:
    resolved = _resolved(asked, **laid)
    text = tomli_w.dumps(resolved)
    assert tomllib.loads(text) == resolved
    recipe = Recipe.model_validate(tomllib.loads(text))
    assert (recipe.sampling.width, recipe.sampling.height, recipe.decode.tile) == (64, 32, 48)
    assert (recipe.sampling.sampler, recipe.sampling.schedule) == ("euler", laid.get("schedule"))
    assert recipe.sampling.steps == (20 if "schedule" in laid else None)
    assert "noise" not in resolved["sampling"]


def test_a_list_that_was_found_is_pasted_with_its_reference() -> None:
    """And without the [timesteps] that found it, which contradicts it; the reference stays what it was."""
    text = (
        'name = "x"\nmodel.path = "models/shapes"\nfamily.prompts = ["a", "b"]\n'
        'targets = [{ engine = "onnxruntime" }]\ntimesteps = { method = "dp" }\n'
        "sampling = { steps = 3, guidance_interval = [0.3, 5.0] }\nreference.steps = 12\n"
    )
    before = make_plan(parse_recipe(text, "x.toml"), ROOT / "recipes")
    found = before.sampling.model_copy(update={"schedule": None, "sigmas": (9.0, 2.0, 0.5, 0.0)})
    pasted = tomli_w.dumps(report.resolve(before.recipe, _graphs(found, before.reference, before.original.image)))
    after = make_plan(parse_recipe(pasted, "pasted"), ROOT / "recipes")
    assert after.recipe.timesteps is None
    assert (after.sampling, after.reference) == (found, before.reference)
    assert after.reference.steps == 12


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_toml_of_every_shipped_recipe(recipe: Path) -> None:
    parsed = parse_recipe(recipe.read_text("utf-8"), recipe.name)
    dumped = tomli_w.dumps(parsed.model_dump(mode="json", exclude_none=True))
    assert parse_recipe(dumped, "dumped") == parsed


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("CLIP change, mean", -0.02, "-2.00 %"),
        ("CLIP change, mean", 0.00013518, "+0.01 %"),
        ("CLIP change, mean", -1.2e-7, "0.00 %"),
        ("CLIP change, mean", 1.2e-7, "0.00 %"),
        ("PSNR, worst (dB)", 48.2222, "48.2"),
        ("SSIM, worst image", -1e-9, "0.0000"),
        ("LPIPS, mean", None, "not run"),
        ("Retrieval precision", 0.9375, "93.8 %"),
        ("PSNR, worst (dB)", float("nan"), "not a number"),
    ],
)
def test_numbers_as_shown(metric: str, value: float | None, text: str) -> None:
    assert evidence.shown(value, metric) == text


@pytest.mark.parametrize(
    ("natural", "runs", "width"), [(64, 1, 256), (64, 2, 192), (512, 1, 256), (512, 2, 192), (200, 1, 200), (96, 9, 96)]
)
def test_picture_width(natural: int, runs: int, width: int) -> None:
    assert evidence.picture_width(natural, runs) == width


def _record(*rows: GateRow) -> dict[str, Any]:
    """A record with one target, whose gate has these rows."""
    metrics = dict.fromkeys(Metrics.model_fields)
    performance = {
        "latency_full_s": 0.5, "latency_bundle_s": 0.25, "peak_memory_full_mb": 571.2, "peak_memory_bundle_mb": 259.4,
        "load_s": 0.5, "residency": "all", "components_memory_mb": {"denoiser": 81.5},
        "components_s": {"denoiser": 0.2, "vae_decoder": 0.1},
    }  # fmt: skip
    floor = {"precision": metrics | {"psnr_worst": 43.21}, "seed": metrics}
    quality = metrics | {
        "psnr_worst": 48.22, "images": 1, "noise_floor": floor, "original": metrics, "intervals": {},
        "out_of_family": None, "scorer_sha256": None, "lpips_sha256": None, "retrieval_captions": 0,
    }  # fmt: skip
    return {
        "name": "x", "compiled_at": "2026", "base_model": "m", "source_sha256": "0", "pipeline": "P", "family": None,
        "not_compiled": [], "components": {"denoiser": {}, "vae_decoder": {}}, "stages_s": {"originals": 1.0},
        "passes": {},
        "tools": {}, "original": "something <drawn>", "recipe": _resolved("", schedule="leading", steps=20),
        "sampling": {"sampler": "euler", "steps": 20, "guidance_scale": 4.0}, "timesteps": None, "search": None,
        "reference": {"sampler": "heun", "steps": 50, "guidance_scale": 7.0},
        "targets": [{"id": "t-cpu-fp32", "quality": quality, "performance": performance}],
        "gate": {"t-cpu-fp32": [vars(row) for row in rows]}, "passed": evidence.verdict({"t-cpu-fp32": rows}),
        "not_run": {}, "guard": None, "mixed_precision": {}, "early_exit": None, "cut": None, "caching": None,
    }  # fmt: skip


def _evidence(drawn: Any, found: Any, prompt: str | None = None) -> report.Evidence:
    """Of one image; what the page shows of the graphs is in the record, but for a profile."""
    run, nothing = Run(found, (1.0,), 0.1, 1.0, {}), cast(Any, None)
    return report.Evidence(
        recipe=nothing,
        graphs=cast(Any, SimpleNamespace(profile=None)),
        fields={},
        originals=Originals((prompt,), (1,), drawn, drawn, drawn),  # type: ignore[arg-type]
        judged=Judged((), {"t-cpu-fp32": run}, {}, {}),
        casts={},
        searched=None,
        exits=None,
        seconds={},
    )


def _page(folder: Path, record: dict[str, Any], width: int = 8) -> str:
    images = np.random.default_rng(0).random((1, width, width, 3), np.float32)
    report.write(folder, record, _evidence(images, images))
    return (folder / "report.html").read_text("utf-8")


def test_without_limits_nothing_was_checked(tmp_path: Path) -> None:
    record = _record(GateRow("PSNR, worst image (dB)", None, 48.22, 43.21, None))
    text = _page(tmp_path, record)
    assert record["passed"] is None
    assert json.loads((tmp_path / "report.json").read_text("utf-8"))["passed"] is None
    assert '<p class="verdict " id="verdict">No limits were set: nothing was checked.</p>' in text
    assert "The gate" not in text


def test_a_target_that_could_not_be_run_is_said(tmp_path: Path) -> None:
    record = _record(GateRow("PSNR, worst image (dB)", 40.0, 48.22, 43.21, True))
    record["targets"].insert(0, {"id": "gpu-cuda-fp16", "quality": None, "performance": None})
    record["not_run"] = {"gpu-cuda-fp16": "no GPU <here>"}
    text = re.sub(r"<[^>]*>|\s+", " ", _page(tmp_path, record))
    assert "The gate holds on every target that was run." in text
    assert re.search(r"gpu-cuda-fp16: +not run here, not judged : no GPU &lt;here&gt;", text)
    assert re.search(r"targets +gpu-cuda-fp16, t-cpu-fp32", text)


def test_what_it_was_judged_against_and_which_steps_were_found(tmp_path: Path) -> None:
    record = _record()
    page = _page(tmp_path, record)
    assert "heun, 50 steps, schedule as listed, guidance 7.0: something &lt;drawn&gt;, in fp32" in page
    assert "<h2>Timesteps</h2>" not in page
    assert "guidance 4.0</td>" in page
    record["timesteps"] = {
        "method": "dp", "fine_steps": 60, "compared": {"karras": {"error": 0.25, "sigmas": [14.6, 0.0]}},
    }  # fmt: skip
    record["sampling"] |= {"guidance_interval": [0.3, 5.0], "guidance_reuse": 2}
    text = re.sub(r"<[^>]*>|\s+", " ", _page(tmp_path, record))
    assert "Found by dp on calibration prompts" in text and "the end of 60 steps" in text
    assert "karras 0.2500 14.600 0.000" in re.sub(r"\s+", " ", text)
    assert "guidance 4.0 for sigma in 0.3 to 5.0, its gap reused 2 times" in text


def test_a_missed_gate_shows_by_how_much(tmp_path: Path) -> None:
    clip = GateRow("CLIP drop, mean", 0.02, 0.0301, -0.0001, False)
    psnr = GateRow("PSNR, worst image (dB)", 48.25, 48.2222, 43.21, False)
    record = _record(clip, psnr)
    text = re.sub(r"<[^>]*>|\s+", " ", _page(tmp_path, record))
    assert record["passed"] is False
    assert "The gate was missed" in text
    assert re.search(r"CLIP change, mean +-3\.01 % +-2\.00 % +\+0\.01 % +missed", text)
    assert re.search(r"48\.2 +48\.2 +43\.2 +missed", text) is None
    assert re.search(r"48\.22220 +48\.25000 ", text)


def test_what_was_measured_is_there_and_nothing_else(tmp_path: Path) -> None:
    row = GateRow("PSNR, worst image (dB)", 40.0, 48.22, 43.21, True)
    record = _record(row)
    text = _page(tmp_path, record)
    plain = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", text))
    assert (
        "t-cpu-fp32: 0.250 s per image (original 0.500 s, 2.0x), 259 MB (original 571 MB), worst PSNR 48.2 dB "
        "(bf16 noise floor 43.2 dB)"
    ) in plain
    assert "The original: something &lt;drawn&gt;, in fp32, same seed." in plain
    assert "64 x 32 pixels" in plain
    assert "81.5 MB" in plain and plain.count("not measured") == 1  # the decoder's memory
    record["targets"][0]["performance"]["components_memory_mb"] = {}
    plain = _page(tmp_path, record)
    assert "memory it adds" not in plain and "not measured" not in plain


def test_intervals_and_what_judged(tmp_path: Path) -> None:
    record = _record()
    quality = record["targets"][0]["quality"]
    own = {"clip_delta_mean": -0.01, "retrieval_precision": 0.875, "flip_mean": 0.0123}
    ends = {"intervals": {"clip_delta_mean": [-0.03, 0.002]}, "images": 16}
    quality.update(own, **ends, scorer_sha256="ab" * 32, retrieval_captions=64)
    quality["original"] = quality["original"] | {"retrieval_precision": 0.9375}
    quality["out_of_family"] = {**dict.fromkeys(Metrics.model_fields), **own, **ends, "original": quality["original"]}
    quality["out_of_family"] |= {"images": 8, "clip_delta_mean": -0.25}
    plain = re.sub(r"<[^>]*>|\s+", " ", _page(tmp_path, record))
    for text in (
        r"CLIP change, mean +-1\.00 % +-3\.00 % to \+0\.20 %", r"Retrieval precision +87\.5 % +93\.8 %",
        r"FLIP, mean +0\.0123", r"LPIPS, mean +not run", "16 images; below a mean", "(ab){32}", "64 of the family",
        r"8 images +of prompts that this bundle was not made for", r"CLIP change, mean +-25\.00 %",
    ):  # fmt: skip
        assert re.search(text, plain), text


def test_a_picture_that_is_not_finite(tmp_path: Path) -> None:
    record = _record(GateRow("PSNR, worst image (dB)", None, float("nan"), 43.21, False))
    record["targets"][0]["quality"]["psnr_worst"] = float("nan")
    images = np.full((1, 8, 8, 3), np.nan, np.float32)
    report.write(tmp_path, record, _evidence(np.zeros_like(images), images))
    assert json.loads((tmp_path / "report.json").read_text("utf-8"))["gate"]["t-cpu-fp32"][0]["value"] == "NaN"
    plain = re.sub(r"<[^>]*>|\s+", " ", (tmp_path / "report.html").read_text("utf-8"))
    assert "The gate was missed" in plain
    assert re.search(r"not a number +none +43\.2 +missed", plain)


def test_what_left_the_loop_and_what_is_cached(tmp_path: Path) -> None:
    figures = {"nodes": 697, "parameters": 10_338_408, "multiply_adds": 500_498_432}
    shallow = {"nodes": 123, "parameters": 301_001, "multiply_adds": 92_000_000}
    cut = {
        "original": {"nodes": 795, "parameters": 11_159_688},
        "parts": {"step": {"nodes": 36, "parameters": 477_216}, "denoise": figures},
        "crossings": [{"name": "a", "bytes": 1_200_000}, {"name": "b", "bytes": 300_000}],
    }
    caching = {
        "feature": "add_7", "after": "up_blocks.1.conv", "share": 0.184, "full_steps": 2, "mask": [True, False, True],
        "error": 0.0123, "images": 8, "engines": {"denoiser": figures, "denoiser_shallow": shallow},
    }  # fmt: skip
    text = _page(tmp_path, _record() | {"cut": cut, "caching": caching})
    plain = re.sub(r"<[^>]*>|\s+", " ", text)
    for found in (
        "as exported +795 +11,159,688", "step +36 +477,216", "2 tensors cross, 1.5 MB",
        r"2 of 3 steps evaluate the whole denoiser", "add_7 , after +up_blocks.1.conv", "18.4 % of its multiply-adds",
        "F s F", "denoiser_shallow +123 +301,001 +92,000,000", "0.0123 of the latents",
    ):  # fmt: skip
        assert re.search(found, plain), (found, plain)
    assert "Feature caching" not in _page(tmp_path, _record())


def test_big_pictures_are_reduced(tmp_path: Path) -> None:
    text = _page(tmp_path, _record(), 1024)
    assert len(text) < 3 * 256 * 256 * 3 * 1.4 + 30_000  # noise, which nothing compresses
    assert "Shown reduced from 1024 to 256 pixels." in text
    assert 'class="enlarged"' not in text
    assert 'class="enlarged"' in _page(tmp_path, _record(), 64)


def test_no_network_and_no_script(shapes_bundle: Path) -> None:
    text = (shapes_bundle / "report.html").read_text("utf-8")
    tags = _Page(text).tags
    assert not {tag for tag, _ in tags} & {"script", "link", "iframe", "object"}
    sources = [attributes["src"] or "" for tag, attributes in tags if tag == "img"]
    assert len(sources) == (5 + 2) * (1 + 2 * 2)  # original, and for two targets picture and difference
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://", text)


def test_prompts_are_escaped(shapes_bundle: Path, tmp_path: Path) -> None:
    record = json.loads((shapes_bundle / "report.json").read_text("utf-8"))
    record["name"] = record["family"]["held_out_prompts"][0] = record["recipe"]["name"] = HOSTILE
    images = np.zeros((1, 8, 8, 3), np.float32)
    report.write(tmp_path, record, _evidence(images, images, HOSTILE))
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "<script>" not in text
    assert "&lt;script&gt;document.title" in text
    tags = _Page(text).tags
    assert not any(name.startswith("on") for _, attributes in tags for name in attributes)


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_it_opens_in_a_browser(shapes_bundle: Path, tmp_path: Path) -> None:
    page = shapes_bundle / "report.html"
    dom = _dump(page, tmp_path / "profile", "--dump-dom")
    assert "The gate holds on every target." in dom
    assert "<title>shapes-circles" in dom
    picture = tmp_path / "page.png"
    _dump(page, tmp_path / "profile2", "--window-size=1000,1400", f"--screenshot={picture}")
    from PIL import Image

    pixels = np.asarray(Image.open(picture).convert("RGB"))
    assert pixels.shape == (1400, 1000, 3)
    yellow = (pixels[..., 0] > 200) & (pixels[..., 1] > 150) & (pixels[..., 2] < 90)
    assert yellow.sum() > 1000  # the first pictures are of yellow circles: they were decoded and laid out
