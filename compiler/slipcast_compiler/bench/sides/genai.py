"""The checkpoint exported by Optimum and run by OpenVINO GenAI's own pipeline, in C++. No slipcast, no torch in use."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

_about: dict[str, Any] = {}

# of diffusers -> of GenAI; what it does not know runs as Euler, at the same number of evaluations
_SCHEDULERS = {
    "DDIMScheduler": "DDIM",
    "EulerDiscreteScheduler": "EULER_DISCRETE",
    "EulerAncestralDiscreteScheduler": "EULER_ANCESTRAL_DISCRETE",
    "FlowMatchEulerDiscreteScheduler": "FLOW_MATCH_EULER_DISCRETE",
    "LCMScheduler": "LCM",
    "PNDMScheduler": "PNDM",
}


def prepare(job: dict[str, Any]) -> None:
    """Export `model` to `prepared`, its tokenizers too."""
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment] # a measurement reports to nobody
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from optimum.exporters.openvino import main_export
    from transformers import AutoTokenizer

    main_export(job["model"], job["prepared"], task="text-to-image", library_name="diffusers")
    for folder in Path(job["prepared"]).glob("tokenizer*"):
        tokenizer = convert_tokenizer(AutoTokenizer.from_pretrained(folder))
        openvino.save_model(tokenizer, folder / "openvino_tokenizer.xml")


def open_side(job: dict[str, Any]) -> Any:
    """job: prepared, static, scheduler (class, settings), sampling, size (width, height), threads."""
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import numpy as np
    import openvino_genai as genai

    (width, height), sampling = job["size"], job["sampling"]
    pipe = genai.Text2ImagePipeline(job["prepared"])
    scheduler = _SCHEDULERS.get(job["scheduler"][0], "EULER_DISCRETE")
    config = f"{job['prepared']}/scheduler/scheduler_config.json"
    pipe.set_scheduler(genai.Scheduler.from_config(config, getattr(genai.Scheduler.Type, scheduler)))
    if job.get("static"):
        pipe.reshape(1, height, width, sampling["guidance_scale"])
    # The precision stays OpenVINO's own choice, which is what its users get.
    pipe.compile("CPU", INFERENCE_NUM_THREADS=job["threads"])
    versions = {name: importlib.metadata.version(name) for name in ("openvino-genai", "openvino")}
    _about.update(versions, scheduler=scheduler, steps=sampling["steps"])

    def draw(prompts: list[str], seeds: list[int]) -> tuple[Any, None]:
        if len(set(prompts)) > 1:
            raise ValueError("draws one prompt at a time")
        images = pipe.generate(
            prompts[0],
            width=width,
            height=height,
            num_inference_steps=sampling["steps"],
            guidance_scale=sampling["guidance_scale"],
            num_images_per_prompt=len(prompts),
            generator=genai.CppStdGenerator(seeds[0]),
        )
        return np.asarray(images.data, np.float32) / 255, None

    return draw


def describe() -> dict[str, Any]:
    """Versions, and the scheduler that ran."""
    return _about
