"""How far a bundle's pictures are from the original's, beside the noise floors; and the gate."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slipcast.errors import HostError
from slipcast.manifest import Metrics, Performance, Quality, Target
from slipcast.progress import Advance
from slipcast_compiler import bundled, original
from slipcast_compiler.cache import Cache
from slipcast_compiler.isolate import run_isolated
from slipcast_compiler.plan import Plan, Prompts, find_scorer
from slipcast_compiler.quiet import quiet
from slipcast_compiler.recipe import GateTable

Floats = npt.NDArray[np.float32]
MEASURED = 3  # images that time and memory of the original are taken from
MAX_PSNR = 100.0  # of equal pictures, whose PSNR is infinite, which JSON does not have


@dataclass(frozen=True)
class Run:
    """Pictures of one run, with time and memory; images float32 [n, h, w, 3] in [0, 1]."""

    images: Floats
    seconds: tuple[float, ...]
    load_s: float
    peak_memory_mb: float
    components_s: dict[str, float]

    @property
    def latency_s(self) -> float:
        """Median seconds of one image."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Originals:
    """The unchanged model's pictures, float32 [n, h, w, 3]: the reference, and two runs that give the noise floors."""

    prompts: Prompts
    seeds: tuple[int, ...]
    fp32: Floats
    bf16: Floats
    other_seeds: Floats


@dataclass(frozen=True)
class GateRow:
    """One limit: `value` and `floor` are None where the metric was not run, `passed` where nothing was asked."""

    metric: str
    limit: float | None
    value: float | None
    floor: float | None
    passed: bool | None


class Scorer:
    """CLIP score: cosine of a picture's and a text's embeddings (Hessel et al., arXiv 2104.08718)."""

    def __init__(self, path: str, folder: Path) -> None:
        with quiet():
            self._load(path, folder)

    def _load(self, path: str, folder: Path) -> None:
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

        where = find_scorer(path, folder)
        try:
            self._model = CLIPModel.from_pretrained(where).float().eval()
            self._tokenizer = CLIPTokenizer.from_pretrained(where)
            size = self._model.config.vision_config.image_size
            processed = isinstance(where, str) or (where / "preprocessor_config.json").is_file()
            # A scorer without a processor of its own takes pictures in [-1, 1], as it was trained.
            self._processor = CLIPImageProcessor.from_pretrained(where) if processed else CLIPImageProcessor(
                size={"shortest_edge": size}, crop_size={"height": size, "width": size},
                image_mean=[0.5] * 3, image_std=[0.5] * 3,
            )  # fmt: skip
        except OSError as error:
            raise HostError(f"evaluate.scorer: {where} cannot be loaded", got=str(error).splitlines()[0]) from error

    def __call__(self, images: Floats, prompts: Sequence[str | None]) -> Floats:
        """float32 [n], image i against prompt i."""
        import torch
        from PIL import Image

        pictures = [Image.fromarray((image * 255).round().astype(np.uint8)) for image in images]
        pixels = self._processor(pictures, return_tensors="pt").pixel_values
        length = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            [prompt or "" for prompt in prompts], padding="max_length", max_length=length, truncation=True,
            return_tensors="pt",
        )  # fmt: skip
        with torch.no_grad():
            output = self._model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels)
        scores: Floats = (output.image_embeds * output.text_embeds).sum(-1).numpy()
        return scores


def run_originals(plan: Plan, cache: Cache, advance: Advance) -> Originals:
    """Reference pictures and the runs behind the noise floors, from the cache where nothing has changed."""
    first, count = plan.recipe.evaluate.seed, len(plan.prompts)
    seeds = tuple(range(first, first + count))
    others = tuple(range(first + count, first + 2 * count))
    runs = []
    for place, (dtype, chosen) in enumerate((("float32", seeds), ("bfloat16", seeds), ("float32", others))):

        def report(done: int, total: int, place: int = place) -> None:
            advance(place * total + done, 3 * total)

        runs.append(_original(plan, chosen, dtype, cache, report))
    return Originals(plan.prompts, seeds, *runs)


def measure_original(plan: Plan, originals: Originals, advance: Advance) -> Run:
    """Time and memory of the original in fp32, measured now: pictures may come from a cache, figures may not."""
    prompts, seeds = originals.prompts[:MEASURED], originals.seeds[:MEASURED]
    arguments = (plan.checkpoint.root, plan.sampling, plan.size, prompts, seeds, "float32")
    isolated = run_isolated(original.make_images, *arguments, advance=advance)
    return _run(isolated.result, isolated.peak_memory_mb)


def measure_memory(root: Path, target: Target) -> dict[str, float]:
    """Megabytes that each component adds, each in a process of its own: freed memory is used again, and not seen."""
    found = {name: run_isolated(bundled.measure_memory, root, target.id, name).result for name in target.components}
    return {str(name): megabytes for name, megabytes in found.items() if megabytes is not None}


def run_bundle(root: Path, target: Target, originals: Originals, advance: Advance) -> Run:
    """The same prompts and seeds through the runtime, in a process of its own."""
    isolated = run_isolated(bundled.make_images, root, target.id, originals.prompts, originals.seeds, advance=advance)
    return _run(isolated.result, isolated.peak_memory_mb)


def judge(originals: Originals, run: Run, scorer: Scorer | None) -> Quality:
    """All metrics of a run against the original, with the noise floors."""
    prompts = originals.prompts
    reference = originals.fp32
    reference_scores = scorer(reference, prompts) if scorer else None

    def against(found: Floats) -> Metrics:
        return compare(reference, found, reference_scores, scorer(found, prompts) if scorer else None)

    other = against(originals.other_seeds)
    clip_only = {name: value for name, value in other.model_dump().items() if name.startswith("clip")}
    return Quality(
        **against(run.images).model_dump(), images=len(prompts),
        noise_floor={"precision": against(originals.bf16), "seed": Metrics(**clip_only)},
    )  # fmt: skip


def compare(reference: Floats, found: Floats, reference_scores: Floats | None, scores: Floats | None) -> Metrics:
    """Pixel metrics of paired pictures, [n, h, w, 3] in [0, 1]; and of their CLIP scores, where there are any."""
    psnrs = [psnr(a, b) for a, b in zip(reference, found, strict=True)]
    ssims = [ssim(a, b) for a, b in zip(reference, found, strict=True)]
    clip: dict[str, float] = {}
    if scores is not None and reference_scores is not None:
        change = (scores - reference_scores) / np.abs(reference_scores)
        clip = {
            "clip_score_mean": float(scores.mean()),
            # of the means, not the mean of ratios, which a single score near zero would rule
            "clip_delta_mean": float(scores.mean() / reference_scores.mean() - 1),
            "clip_delta_worst": float(change.min()),
        }
    return Metrics(
        psnr_mean=float(np.mean(psnrs)),
        psnr_worst=min(psnrs),
        ssim_mean=float(np.mean(ssims)),
        ssim_worst=min(ssims),
        **clip,
    )


def performance(original_run: Run, run: Run, memory: dict[str, float]) -> Performance:
    """Time and memory of a run beside the original's; `memory` by component."""
    return Performance(
        peak_memory_full_mb=round(original_run.peak_memory_mb, 1),
        peak_memory_bundle_mb=round(run.peak_memory_mb, 1),
        components_memory_mb=memory,
        latency_full_s=round(original_run.latency_s, 4),
        latency_bundle_s=round(run.latency_s, 4),
        components_s={name: round(s, 5) for name, s in run.components_s.items()},
        load_s=round(run.load_s, 4),
    )


def apply_gate(gate: GateTable, quality: Quality) -> tuple[GateRow, ...]:
    """Every metric with its limit. A limit on a metric that was not run does not pass."""
    floor = quality.noise_floor["precision"]
    rows = []
    for metric, limit, value, noise, at_most in (
        ("CLIP drop, mean", gate.clip_drop, _negative(quality.clip_delta_mean), _negative(floor.clip_delta_mean), True),
        ("PSNR, worst image (dB)", gate.psnr, quality.psnr_worst, floor.psnr_worst, False),
        ("SSIM, worst image", gate.ssim, quality.ssim_worst, floor.ssim_worst, False),
    ):
        passed = None
        if limit is not None:
            passed = value is not None and (value <= limit if at_most else value >= limit)
        rows.append(GateRow(metric, limit, value, noise, passed))
    return (*rows, GateRow("LPIPS, mean", None, quality.lpips_mean, floor.lpips_mean, None))


def missed(gates: dict[str, tuple[GateRow, ...]]) -> list[str]:
    """One line for every limit that does not hold."""
    return [
        f"{target}: {row.metric} is {'not run' if row.value is None else f'{row.value:.4f}'}, limit {row.limit}"
        for target, rows in gates.items() for row in rows if row.passed is False
    ]  # fmt: skip


def _original(plan: Plan, seeds: tuple[int, ...], dtype: str, cache: Cache, advance: Advance) -> Floats:
    inputs: dict[str, Any] = {
        "checkpoint": plan.checkpoint.sha256, "sampling": plan.sampling.model_dump(mode="json"), "size": plan.size,
        "prompts": plan.prompts, "seeds": seeds, "dtype": dtype,
    }  # fmt: skip

    def build(folder: Path) -> None:
        arguments = (plan.checkpoint.root, plan.sampling, plan.size, plan.prompts, seeds, dtype)
        made = run_isolated(original.make_images, *arguments, advance=advance)
        np.save(folder / "images.npy", made.result["images"])

    images: Floats = np.load(cache.get("original", inputs, build) / "images.npy")
    return images


def _run(made: dict[str, Any], peak_memory_mb: float) -> Run:
    return Run(
        made["images"],
        tuple(map(float, made["seconds"])),
        float(made["load_s"]),
        peak_memory_mb,
        made.get("components_s", {}),
    )


def psnr(a: Floats, b: Floats) -> float:
    """In dB, of two pictures in [0, 1]; at most MAX_PSNR."""
    error = float(np.mean((a.astype(np.float64) - b) ** 2))
    return min(MAX_PSNR, -10 * np.log10(error)) if error > 0 else MAX_PSNR


def ssim(a: Floats, b: Floats) -> float:
    """Structural similarity with the Gaussian window of Wang et al., 2004, as most papers give it."""
    from skimage.metrics import structural_similarity

    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(structural_similarity(a, b, channel_axis=-1, data_range=1.0, **window))  # type: ignore[no-untyped-call]


def _negative(value: float | None) -> float | None:
    return None if value is None else 0.0 - value  # not -0.0
