"""The checkpoint exported by Optimum, on ONNX Runtime or OpenVINO. Nothing of slipcast is importable here."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from typing import Any

_about: dict[str, Any] = {}


def prepare(job: dict[str, Any]) -> None:
    """Export `model` to `prepared`; job: backend (onnxruntime or openvino), pipeline (its class in diffusers)."""
    options = {"compile": False} if job["backend"] == "openvino" else {}
    _pipeline(job).from_pretrained(job["model"], export=True, **options).save_pretrained(job["prepared"])


def open_side(job: dict[str, Any]) -> Any:
    """job: backend, pipeline, prepared, static, scheduler (class, settings), sampling, size (w, h), latent, threads."""
    import torch

    torch.set_num_threads(job["threads"])
    pipe = _open(job)
    pipe.set_progress_bar_config(disable=True)
    name, settings = job["scheduler"]
    scheduler = getattr(importlib.import_module("diffusers"), name)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **settings)
    _about.update(steps=job["sampling"]["steps"])
    sampling, (width, height) = job["sampling"], job["size"]

    def draw(prompts: list[str], seeds: list[int]) -> tuple[Any, None]:
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        latents = torch.cat([torch.randn((1, *job["latent"]), generator=generator) for generator in generators])
        images = pipe(
            prompts, height=height, width=width, num_inference_steps=sampling["steps"], generator=generators,
            latents=latents, guidance_scale=sampling["guidance_scale"], output_type="np",
            guidance_rescale=sampling["guidance_rescale"], eta=sampling["eta"],
        ).images  # fmt: skip
        return images, None

    return draw


def describe() -> dict[str, Any]:
    """Versions, and the precision OpenVINO chose."""
    return _about


def _open(job: dict[str, Any]) -> Any:
    backend, kind = job["backend"], _pipeline(job)
    distributions = ("optimum-onnx", "onnxruntime") if backend == "onnxruntime" else ("optimum-intel", "openvino")
    _about.update({name: importlib.metadata.version(name) for name in (*distributions, "diffusers", "torch")})
    if backend == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = job["threads"]
        return kind.from_pretrained(job["prepared"], export=False, session_options=options)
    # The precision stays OpenVINO's own choice, which is what its users get: bf16 where the processor has it.
    settings = {"INFERENCE_NUM_THREADS": job["threads"]}
    pipe = kind.from_pretrained(job["prepared"], export=False, ov_config=settings, compile=not job.get("static"))
    if job.get("static"):
        width, height = job["size"]
        pipe.reshape(1, height, width, num_images_per_prompt=1)
        pipe.compile()
    _about["precision"] = pipe.unet.request.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    return pipe


def _pipeline(job: dict[str, Any]) -> Any:
    if job["backend"] == "onnxruntime":
        return getattr(importlib.import_module("optimum.onnxruntime"), f"ORT{job['pipeline']}")
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment] # a measurement reports to nobody
    return getattr(importlib.import_module("optimum.intel"), f"OV{job['pipeline']}")
