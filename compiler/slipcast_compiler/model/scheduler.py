"""The scheduler's config of a checkpoint: what a bundle takes from it, and what it cannot, by name.

A picture is diffusers' picture only if every key that diffusers reads is read here, or changes nothing. diffusers reads
a config by the class that stands for the sampler (`CLASSES`): keys that it does not take are ignored, and so they are
here.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from slipcast.errors import RecipeError, RequestError
from slipcast.sampling.samplers import base_name, find_sampler, sampler_options
from slipcast.sampling.schedules import SPACINGS, NoiseProcess
from slipcast_compiler.model.library import library_class

FILE = "scheduler_config.json"
Config = Mapping[str, Any]
# sampler -> diffusers' class for it, and the settings that make it this sampler.
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "dpmpp_3m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
    "dpmpp_sde": ("DPMSolverSDEScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 2}),
    "deis": ("DEISMultistepScheduler", {"solver_order": 2}),
    "lcm": ("LCMScheduler", {}),
}
# Classes that a checkpoint may name: those above, and others over the same noise process, which a sampler takes the
# place of.
SOURCES = frozenset({name for name, _ in CLASSES.values()}) | {
    "DDIMParallelScheduler",
    "DDPMParallelScheduler",
    "DPMSolverSinglestepScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    "SASolverScheduler",
    "TCDScheduler",
}

# How each key is read. `process`: a field of NoiseProcess, or what makes one.
PROCESS = frozenset(field.name for field in dataclasses.fields(NoiseProcess)) - {
    "prediction",
    "shift",
    "keeps_noise",
} | {
    "prediction_type",
    "clip_sample_range",
}
# `schedule`: names a schedule, the first that is set.
FLAGS = {
    "use_karras_sigmas": "karras",
    "use_lu_lambdas": "lu",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
}
# `option`: of the sampler's step, where it is not the usual one; refused where our sampler has it not.
OPTIONS = frozenset({"solver_type", "lower_order_final", "euler_at_final", "disable_corrector", "variance_type"})
# `sampler`: the sampler's name says it.
NAMED = frozenset({"algorithm_type"})
# `harmless`: read by diffusers with a switch below that is refused, or not at all where we sample.
HARMLESS = frozenset(
    {
        "dynamic_thresholding_ratio",
        "sample_max_value",
        "flow_shift",
        "time_shift_type",
        "shift_terminal",
        "noise_sampler_seed",
    }
)
# `refused`, but at values that change nothing.
NEUTRAL: dict[str, tuple[Callable[[Any], bool], str]] = {
    "thresholding": (lambda value: not value, "false"),
    "use_flow_sigmas": (lambda value: not value, "false"),
    "use_dynamic_shifting": (lambda value: not value, "false"),
    "predict_x0": (lambda value: value is True, "true"),
    "solver_p": (lambda value: value is None, "null"),
    "skip_prk_steps": (lambda value: value is True, "true"),
    # The boundary scalings that samplers.lcm leaves out are below 1e-5 then.
    "timestep_scaling": (lambda value: isinstance(value, (int, float)) and value >= 10, "10 or more"),
}
# The solver types that a class knows, its usual one first: it takes those of other classes for that one.
_SOLVER_TYPES = {
    "DPMSolverMultistepScheduler": ("midpoint", "heun"),
    "UniPCMultistepScheduler": ("bh2", "bh1"),
    "DEISMultistepScheduler": ("logrho",),
}
_ALL_SOLVER_TYPES = ("midpoint", "heun", "logrho", "bh1", "bh2")
# Of classes that a checkpoint may name, and that no sampler runs.
NOT_RUN = frozenset({"tau_func", "predictor_order", "corrector_order"})
# What diffusers' classes make of a prediction_type or beta_schedule that they do not implement is an error.
_NO_SAMPLE = frozenset({"euler_ancestral", "euler", "dpm2", "pndm", "dpmpp_sde"})


def parameters(class_name: str) -> dict[str, Any]:
    """What a class of diffusers takes, with its defaults."""
    signature = inspect.signature(library_class("diffusers", class_name).__init__).parameters.values()
    return {p.name: p.default for p in signature if p.default is not p.empty}


def refuse(key: str, expected: str, got: Any, sampler: str, why: str = "") -> RecipeError:
    """The error for a key that would change the picture."""
    return RecipeError(
        f"{FILE}: {key}: {why or f'the sampler {sampler} does not have it, and the picture would be another'}",
        expected=expected,
        got=repr(got)[:200],
        hint="choose another sampler for [sampling] and [reference], or change the config if the model allows it",
    )


def read_process(config: Config, sampler: str, prompted: bool) -> NoiseProcess:
    """The noise process as diffusers' class for the sampler reads it from the config; RecipeError where it cannot."""
    class_name, settings = CLASSES[sampler]
    taken = parameters(class_name)
    source = str(config.get("_class_name", ""))
    if source not in SOURCES and "FlowMatch" not in source:
        raise RecipeError(
            f"{FILE}: _class_name: schedulers of this class are not known", expected=", ".join(sorted(SOURCES)),
            got=source[:200], hint="put the scheduler there that the model is run with",
        )  # fmt: skip
    if "FlowMatch" in source:
        return NoiseProcess.from_scheduler_config(config)
    # karras, exponential and beta look for these in whatever config they are given, whether the class takes them or not
    known = {key: value for key, value in config.items() if key in taken or key in ("sigma_min", "sigma_max")}
    _check(known, source, sampler, settings)
    process = NoiseProcess.from_scheduler_config({**known, "_class_name": class_name})
    if process.prediction == "flow" or (process.prediction == "sample" and sampler in _NO_SAMPLE):
        raise refuse("prediction_type", "epsilon or v_prediction", config.get("prediction_type"), sampler)
    if sampler == "pndm" and process.prediction == "v_prediction":
        raise refuse("prediction_type", "epsilon", "v_prediction", sampler, "diffusers' PNDM extrapolates v itself")
    if process.beta_schedule == "sigmoid" and process.trained_betas is None and sampler != "ddpm":
        raise refuse("beta_schedule", "another, or the sampler ddpm", "sigmoid", sampler)
    if prompted:
        # Latents have no bounds, and the pipeline of diffusers says so to its scheduler; as it does with steps_offset.
        offset = 1 if "steps_offset" in config or "steps_offset" in parameters(source) else 0
        return dataclasses.replace(process, clip_sample=None, steps_offset=offset)
    return dataclasses.replace(process, keeps_noise=sampler == "ddim" and process.clip_sample is not None)


def _check(known: Config, source: str, sampler: str, settings: Config) -> None:
    """RecipeError for the first key that would change the picture and is not read."""
    defaults = parameters(CLASSES[sampler][0])
    for key, value in known.items():
        if key in PROCESS | FLAGS.keys() | OPTIONS | NAMED | HARMLESS:
            continue
        if key == "solver_order":
            if value != settings["solver_order"]:
                raise refuse(key, str(settings["solver_order"]), value, sampler)
        elif key in NEUTRAL:
            fine, expected = NEUTRAL[key]
            if not fine(value):
                raise refuse(key, expected, value, sampler)
        elif value != defaults.get(key, value):
            raise refuse(key, repr(defaults[key]), value, sampler)
    if sampler == "pndm" and source == "PNDMScheduler" and "skip_prk_steps" not in known:
        raise refuse("skip_prk_steps", "true", "absent, which is false", sampler)


def with_options(config: Config, sampler: str) -> str:
    """The sampler's name with the options that the config asks for; RecipeError where it has one of them not."""
    class_name, _ = CLASSES[sampler]
    taken, known = parameters(class_name), find_sampler(sampler).options
    name = sampler
    for key in sorted(OPTIONS & config.keys() & taken.keys()):
        usual, value = _usual(class_name, key, config[key], sampler)
        if value == usual:
            continue
        if key not in known:
            raise refuse(key, _text(usual), value, sampler)
        chosen = f"{name}+{key}={_text(value)}"
        try:
            find_sampler(chosen)
        except RequestError:
            raise refuse(key, _text(usual), value, sampler) from None
        name = chosen
    return name


def _usual(class_name: str, key: str, value: Any, sampler: str) -> tuple[Any, Any]:
    """What the class does without an option, and what it makes of the config's value."""
    if key == "solver_type":
        types = _SOLVER_TYPES[class_name]
        if value not in _ALL_SOLVER_TYPES:
            raise refuse(key, ", ".join(types), value, sampler)
        return types[0], value if value in types else types[0]
    if key == "variance_type":
        if class_name != "DDPMScheduler":  # where only what the model has learned is another
            return None, value if str(value).startswith("learned") else None
        return "fixed_small", "fixed_small" if value in (None, "fixed_small_log") else value
    if key == "disable_corrector":
        return [], value
    return key == "lower_order_final", value


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def usual_schedule(config: Config, sampler: str) -> str:
    """The schedule that diffusers' class for the sampler lays from the config."""
    taken = parameters(CLASSES[sampler][0])
    if sampler == "lcm":
        return "lcm"
    flags = (name for key, name in FLAGS.items() if key in taken and config.get(key))
    return next(flags, config.get("timestep_spacing") or find_sampler(sampler).grid.spacing)


def settings_for(sampler: str, schedule: str | None) -> dict[str, Any]:
    """What makes diffusers' class for the sampler this sampler, on this schedule."""
    _, settings = CLASSES[base_name(sampler)]
    options = {key: list(v) if isinstance(v, tuple) else v for key, v in sampler_options(sampler).items()}
    flags = {key: name == schedule for key, name in FLAGS.items()}
    spacing = {"timestep_spacing": schedule} if schedule in SPACINGS else {}
    return {**settings, **options, **flags, **spacing}
