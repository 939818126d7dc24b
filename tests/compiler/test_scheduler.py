"""Every key of a scheduler's config is read as diffusers reads it, changes nothing, or is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from slipcast.bundle.manifest import Sampling
from slipcast.errors import RecipeError
from slipcast.sampling.samplers import SAMPLERS
from slipcast_compiler.model import scheduler
from slipcast_compiler.model.agreement import check_agreement, difference
from slipcast_compiler.model.scheduler import CLASSES, parameters, read_process, usual_schedule, with_options

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
PIXELS = {"_class_name": "DDPMScheduler", "steps_offset": 0, "clip_sample": True}
TRAILING_V = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
ENDS = {"sigma_min": 0.1, "sigma_max": 6.0}
CONTINUOUS = {"timestep_type": "continuous", "prediction_type": "v_prediction"}


def sampled(sampler: str, config: dict[str, Any], prompted: bool = True, steps: int = 4) -> Sampling:
    """As the plan makes it of a config."""
    return Sampling(
        sampler=with_options(config, sampler),
        schedule=usual_schedule(config, sampler),
        steps=steps,
        guidance_scale=1.0,
        noise=read_process(config, sampler, prompted),
    )


def config_of(sampler: str, **keys: Any) -> dict[str, Any]:
    return {"_class_name": CLASSES[sampler][0], "skip_prk_steps": True, **LATENT, **keys}


EQUAL: list[tuple[str, dict[str, Any]]] = [
    ("dpmpp_2m", {"use_lu_lambdas": True}),
    ("dpmpp_2m", {"use_lu_lambdas": True, "beta_schedule": "squaredcos_cap_v2"}),
    ("dpmpp_2m", {"lambda_min_clipped": float("-inf")}),
    ("dpmpp_2m", {"lambda_min_clipped": -1.5}),
    ("dpmpp_2m", {"lambda_min_clipped": -1.5, "timestep_spacing": "leading"}),
    ("dpmpp_2m", {"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"}),
    ("dpmpp_2m", {"solver_type": "heun"}),
    ("dpmpp_2m", {"solver_type": "logrho"}),
    ("dpmpp_2m_sde", {"solver_type": "heun"}),
    ("dpmpp_2m", SIGMA_MIN),
    ("dpmpp_2m", {**SIGMA_MIN, "use_karras_sigmas": True}),
    ("dpmpp_2m", {**SIGMA_MIN, "lower_order_final": False}),
    ("dpmpp_2m", {**SIGMA_MIN, "euler_at_final": True, "solver_type": "heun"}),
    ("unipc", SIGMA_MIN),
    ("unipc", {**SIGMA_MIN, **ENDS, "use_karras_sigmas": True}),
    ("unipc", {**SIGMA_MIN, "solver_type": "bh1"}),
    ("unipc", {"disable_corrector": [0, 1]}),
    ("unipc", {"solver_type": "heun"}),
    ("deis", {"lower_order_final": False}),
    ("deis", {"solver_type": "heun"}),
    ("euler", SIGMA_MIN),
    ("euler", {"interpolation_type": "log_linear"}),
    ("euler", {"interpolation_type": "log_linear", "timestep_spacing": "leading", "use_exponential_sigmas": True}),
    ("euler", CONTINUOUS),
    ("euler", {**CONTINUOUS, "use_karras_sigmas": True}),
    ("lcm", {"original_inference_steps": 100}),
    ("ddim", TRAILING_V),
    *((name, TRAILING_V) for name in ("heun", "dpm2", "deis")),  # where diffusers ignores rescale_betas_zero_snr
    *(
        (name, {**ENDS, f"use_{kind}_sigmas": True})
        for name in ("euler", "heun", "dpm2", "dpmpp_2m", "unipc", "deis")
        for kind in ("karras", "exponential", "beta")
    ),
    *((name, {"steps_offset": 0, "timestep_spacing": "leading"}) for name in CLASSES if "sde" not in name),
    *((name, {"timestep_spacing": "leading"}) for name in CLASSES if "sde" not in name),
    *((name, {"use_karras_sigmas": True}) for name in ("ddim", "ddpm", "euler_ancestral")),  # which do not take it
]


@pytest.mark.parametrize(("sampler", "keys"), EQUAL, ids=str)
def test_keys_that_are_read_as_diffusers_reads_them(sampler: str, keys: dict[str, Any]) -> None:
    config = config_of(sampler, **keys)
    for steps in (4, 20):
        apart = difference(sampled(sampler, config, steps=steps), config)
        assert apart is not None
        assert apart < 1e-4


@pytest.mark.parametrize(
    ("sampler", "keys"),
    [
        ("ddpm", {}),
        ("ddpm", {"variance_type": "fixed_small_log"}),
        ("ddpm", {"variance_type": "fixed_large"}),
        ("ddpm", {"variance_type": "fixed_large", "timestep_spacing": "linspace"}),
        ("ddim", {}),
        ("ddim", {"clip_sample_range": 0.5}),
        ("ddim", {"prediction_type": "v_prediction"}),
        ("dpmpp_2m", {"variance_type": "fixed_large"}),  # neither clips nor knows it
    ],
    ids=str,
)
def test_models_of_pixels(sampler: str, keys: dict[str, Any]) -> None:
    config = {**PIXELS, **keys}
    for steps in (4, 10):
        apart = difference(sampled(sampler, config, False, steps), config)
        assert apart is not None
        assert apart < 1e-4


@pytest.mark.parametrize(
    ("sampler", "keys", "says"),
    [
        ("dpmpp_2m", {"solver_order": 3}, "solver_order"),
        ("dpmpp_2m", {"thresholding": True}, "thresholding"),
        ("dpmpp_2m", {"use_flow_sigmas": True}, "use_flow_sigmas"),
        ("dpmpp_2m", {"variance_type": "learned_range"}, "variance_type"),
        ("dpmpp_3m_sde", {"solver_order": 3, "solver_type": "heun"}, "solver_type"),
        ("unipc", {"lower_order_final": False}, "lower_order_final"),
        ("unipc", {"disable_corrector": "all"}, "disable_corrector"),
        ("unipc", {"predict_x0": False}, "predict_x0"),
        ("pndm", {"skip_prk_steps": False}, "skip_prk_steps"),
        ("pndm", {"prediction_type": "v_prediction"}, "prediction_type"),
        ("ddpm", {"variance_type": "learned"}, "variance_type"),
        ("euler", {"prediction_type": "sample"}, "prediction_type"),
        ("euler", {"beta_schedule": "sigmoid"}, "beta_schedule"),
        ("lcm", {"timestep_scaling": 1.0}, "timestep_scaling"),
        ("ddim", {"_class_name": "EDMEulerScheduler"}, "_class_name"),
        ("euler", {"sigma_min": -1.0}, "sigma_min"),
    ],
    ids=str,
)
def test_keys_that_are_refused_by_name(sampler: str, keys: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        sampled(sampler, config_of(sampler, **keys))


def test_what_was_read_wrongly_is_found() -> None:
    config = config_of("dpmpp_2m")
    sampling = sampled("dpmpp_2m", config)
    check_agreement(sampling, config)
    with pytest.raises(RecipeError, match="other pictures"):
        check_agreement(sampling, {**config, "beta_end": 0.02})
    config = config_of("unipc", solver_type="bh1")  # with a terminal sigma of 0, diffusers divides infinity by itself
    with pytest.raises(RecipeError, match="not finite"):
        check_agreement(sampled("unipc", config), config)


@pytest.mark.parametrize("class_name", sorted(scheduler.SOURCES))
def test_the_table_has_every_key_of_diffusers(class_name: str) -> None:
    """A new key in a new version of diffusers fails here: say in model/scheduler.py how it is read."""
    assert set(parameters(class_name)) <= _table()


def test_the_table_has_no_key_that_diffusers_lacks() -> None:
    assert set(CLASSES) == set(SAMPLERS)
    of_flow = {"flow_shift"}
    taken = set().union(*(parameters(name) for name in scheduler.SOURCES)) | of_flow
    assert _table() <= taken


def _table() -> set[str]:
    table = scheduler
    named = table.PROCESS | table.OPTIONS | table.NAMED | table.HARMLESS | table.NOT_RUN
    return {*named, *table.FLAGS, *table.NEUTRAL, "solver_order"}
