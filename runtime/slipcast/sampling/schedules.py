"""Schedules: which noise levels a sampler visits, and which timestep the model is told at each.

`NoiseProcess` is what the model was trained on, read from a diffusers scheduler_config.json. `make_schedule` lays n
steps on it; the conventions in which diffusers' schedulers differ are columns of `samplers.Grid`. Sigmas are noise
over signal, sqrt((1 - abar) / abar), for variance-preserving models, and the time in [0, 1] for flow-matching ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from slipcast.errors import RecipeError, RequestError
from slipcast.sampling.samplers import SAMPLERS, Grid, Rounding, find_sampler

Floats: TypeAlias = NDArray[np.float64]
Floats32: TypeAlias = NDArray[np.float32]
Points: TypeAlias = tuple[Floats, Floats]  # falling sigmas and their timesteps, without the terminal sigma


# --- the training process --------------------------------------------------------------------------------------------


def _cosine_betas(count: int) -> Floats32:
    """Nichol and Dhariwal, arXiv 2102.09672: beta from the ratio of successive squared cosines, at most 0.999."""
    abar = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * math.pi / 2) ** 2
    betas: Floats = np.minimum(1 - abar[1:] / abar[:-1], 0.999)
    return betas.astype(np.float32)


def _sigmoid_betas(start: float, end: float, count: int) -> Floats32:
    """GeoDiff, arXiv 2203.02923."""
    logistic = 1 / (1 + np.exp(-np.linspace(-6, 6, count, dtype=np.float32)))
    return (logistic * np.float32(end - start) + np.float32(start)).astype(np.float32)


BETA_SCHEDULES: dict[str, Callable[[float, float, int], Floats32]] = {
    "linear": lambda start, end, count: np.linspace(start, end, count, dtype=np.float32),
    "scaled_linear": lambda start, end, count: np.linspace(start**0.5, end**0.5, count, dtype=np.float32) ** 2,
    "squaredcos_cap_v2": lambda start, end, count: _cosine_betas(count),
    "sigmoid": _sigmoid_betas,
}
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v_prediction", "sample": "sample", "flow_prediction": "flow"}
_LATENT_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
# What these classes take for a key that the config lacks, where it differs from the defaults of NoiseProcess.
_CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "HeunDiscreteScheduler": _LATENT_BETAS,
    "KDPM2DiscreteScheduler": _LATENT_BETAS,
    "DPMSolverSDEScheduler": _LATENT_BETAS,
    "LCMScheduler": {**_LATENT_BETAS, "beta_schedule": "scaled_linear"},
}
_CLIPPING = ("DDPMScheduler", "DDIMScheduler")  # classes that clip unless they are told not to
MOST_TIMESTEPS = 100_000
SPACINGS = ("leading", "linspace", "trailing")


_WORDS = {
    "timestep_spacing": SPACINGS,
    "final_sigmas_type": ("zero", "sigma_min"),
    "interpolation_type": ("linear", "log_linear"),
    "timestep_type": ("discrete", "continuous"),
}


def _pick(what: str, value: Any, candidates: Sequence[str] | Mapping[str, Any]) -> str:
    if value not in candidates:
        raise RecipeError(f"scheduler_config.json: {what}: not known", expected=", ".join(candidates), got=repr(value))
    return str(value)


_FLAGS = ("rescale_betas_zero_snr", "set_alpha_to_one", "clip_sample", "thresholding")
_WHOLE = ("num_train_timesteps", "steps_offset", "original_inference_steps")
_NUMBERS = ("beta_start", "beta_end", "sigma_min", "sigma_max", "lambda_min_clipped", "clip_sample_range")


def _check_types(config: Mapping[str, Any]) -> None:
    """RecipeError for a value that is of another type than diffusers writes."""
    kinds: tuple[tuple[tuple[str, ...], tuple[type, ...], str], ...] = (
        (_FLAGS, (bool,), "true or false"),
        (_WHOLE, (int,), "a whole number"),
        (_NUMBERS, (int, float), "a number"),
        (("trained_betas",), (list, tuple, np.ndarray), "a list of numbers"),
    )
    for keys, types, expected in kinds:
        for key in keys:
            value = config.get(key)
            if value is not None and (not isinstance(value, types) or (isinstance(value, bool) and bool not in types)):
                raise RecipeError(
                    f"scheduler_config.json: {key}: of a wrong type", expected=expected, got=repr(value)[:200]
                )
    if not 1 <= (count := config.get("num_train_timesteps", 1000)) <= MOST_TIMESTEPS:
        raise RecipeError(
            "scheduler_config.json: num_train_timesteps: out of range", expected=f"1 to {MOST_TIMESTEPS}", got=count
        )


@dataclass(frozen=True)
class NoiseProcess:
    """The noise a model was trained to remove, and how its scheduler lays steps on it.

    `timestep_spacing` and `set_alpha_to_one` are None where the config is silent: then each sampler family has its own
    default, as in diffusers. `shift` belongs to flow matching. All fields but `trained_betas` (a tuple of floats or
    None) are scalars.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid", "strict": True}  # how the manifest reads it

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction: str = "epsilon"  # epsilon, v_prediction, sample, flow, or flow_ratio: flow by noise over signal
    rescale_betas_zero_snr: bool = False
    timestep_spacing: str | None = None
    steps_offset: int = 0
    set_alpha_to_one: bool | None = None
    shift: float = 1.0
    clip_sample: float | None = None  # DDPM on pixels: the expected clean picture is kept within +- this
    keeps_noise: bool = False  # of a clipped picture: DDIM in diffusers goes on with the noise of the unclipped one
    final_sigmas_type: str = "zero"  # after the last step, or sigma_min: the smallest of the training table
    sigma_min: float | None = None  # karras, exponential and beta end there, not at the smallest of the table
    sigma_max: float | None = None  # and begin there
    lambda_min_clipped: float | None = None  # spacings begin where log(signal / noise) is at least this
    interpolation_type: str = "linear"  # or log_linear: sigmas even in their logarithm, whatever the timesteps
    timestep_type: str = "discrete"  # or continuous: with v prediction the model is told log(sigma) / 4
    original_inference_steps: int = 50  # that a latent consistency model was distilled on

    def __post_init__(self) -> None:
        """ValueError for what no schedule can be laid on; pydantic and from_scheduler_config make it their own."""
        low, high = self.sigma_min, self.sigma_max
        if not (0 < (1e-6 if low is None else low) < (1e6 if high is None else high) < math.inf):
            raise ValueError(f"sigma_min and sigma_max rise from above 0, got {low} and {high}")
        if self.original_inference_steps < 1:
            raise ValueError(f"original_inference_steps is at least 1, got {self.original_inference_steps}")
        if not math.isfinite(self.lambda_min_clipped or 0.0):
            raise ValueError(f"lambda_min_clipped is a finite number, got {self.lambda_min_clipped}")
        for key, candidates in _WORDS.items():
            if (word := getattr(self, key)) is not None and word not in candidates:
                raise ValueError(f"{key} is one of {', '.join(candidates)}, got {str(word)[:100]!r}")

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any]) -> NoiseProcess:
        """Read a scheduler_config.json; RecipeError where it asks for what is not known here.

        Not read: the `use_..._sigmas` switches, which name a schedule, not a process. With `use_dynamic_shifting` the
        shift depends on the image size: replace `shift` by exp(mu).
        """
        name = str(config.get("_class_name", ""))
        known = {**_CLASS_DEFAULTS.get(name, {}), **{k: v for k, v in config.items() if v is not None}}
        _check_types(known)
        if known.get("thresholding"):
            raise RecipeError(
                "scheduler_config.json: thresholding: pictures would be others", expected="false", got="true"
            )
        values = {f.name: known[f.name] for f in fields(cls) if f.name in known}
        if "FlowMatch" in name:
            values["prediction"] = "flow"
        else:
            asked = _pick("prediction_type", known.get("prediction_type", "epsilon"), _PREDICTIONS)
            values["prediction"] = _PREDICTIONS[asked]
            values["shift"] = known.get("flow_shift", 1.0)
            count = known.get("num_train_timesteps", 1000)
            if len(known.get("trained_betas", range(count))) != count:
                got = len(known["trained_betas"])
                raise RecipeError(
                    "scheduler_config.json: trained_betas: another length than num_train_timesteps",
                    expected=count,
                    got=got,
                )
            if "trained_betas" not in known:
                _pick("beta_schedule", known.get("beta_schedule", "linear"), BETA_SCHEDULES)
        for key, candidates in _WORDS.items():
            if key in known:
                _pick(key, known[key], candidates)
        if values.get("lambda_min_clipped") == -math.inf:  # as JSON cannot say it, and neither can a manifest
            del values["lambda_min_clipped"]
        if known.get("clip_sample", name in _CLIPPING):
            values["clip_sample"] = float(known.get("clip_sample_range", 1.0))
        else:
            values.pop("clip_sample", None)
        betas = known.get("trained_betas")
        try:
            return cls(**{**values, "trained_betas": None if betas is None else tuple(map(float, betas))})
        except (ValueError, TypeError) as error:
            raise RecipeError(f"scheduler_config.json: {error}") from None

    @cached_property
    def sigmas(self) -> Floats:
        """sigma of every training timestep, rising, length num_train_timesteps.

        Computed in float32 where diffusers does, so that both hold the same table: some of its schedulers cut
        timesteps to whole numbers, where the last bit of a sigma decides. With rescale_betas_zero_snr the last one
        would be infinite; abar is held at 2**-24 there, as diffusers' Euler and DPM-Solver schedulers do.
        """
        if self.is_flow:
            times = np.arange(1, self.num_train_timesteps + 1) / self.num_train_timesteps
            return self.levels(_shifted(times, self.shift))
        if self.trained_betas is not None:
            betas = np.array(self.trained_betas, np.float32)
        else:
            betas = BETA_SCHEDULES[self.beta_schedule](self.beta_start, self.beta_end, self.num_train_timesteps)
        if self.rescale_betas_zero_snr:
            betas = _zero_terminal_snr(betas)
        abar = _cumulative_product(1 - betas)
        if self.rescale_betas_zero_snr:
            abar[-1] = 2.0**-24
        sigmas: Floats32 = np.sqrt((1 - abar) / abar)
        return sigmas.astype(np.float64)

    @property
    def is_flow(self) -> bool:
        """Whether the model was trained on straight paths from data to noise: in either of two coordinates."""
        return self.prediction in ("flow", "flow_ratio")

    def levels(self, times: Floats) -> Floats:
        """Noise levels of times in [0, 1] of flow matching: the times; or noise over signal, t / (1 - t), for samplers
        that know no other, held below infinity and in float32 as diffusers does."""
        if self.prediction == "flow":
            return times
        held = np.minimum(times, 1 - 1e-6).astype(np.float32).astype(np.float64)
        return held / (1 - held)

    @cached_property
    def log_sigmas(self) -> Floats:
        """The logarithms of `sigmas`, rounded to float32 as diffusers has them."""
        return np.log(self.sigmas.astype(np.float32)).astype(np.float64)

    @property
    def clipped_timesteps(self) -> int:
        """How many of the training timesteps a spacing reaches: all, but for those below lambda_min_clipped."""
        total = self.num_train_timesteps
        if self.lambda_min_clipped is None or self.is_flow:
            return total
        return total - int((-self.log_sigmas < self.lambda_min_clipped).sum())

    def sigma_at(self, timesteps: Floats) -> Floats:
        """Sigmas of (possibly fractional) timesteps, linear between those of the table; for flow those of t / T."""
        if self.is_flow:
            return self.levels(timesteps / self.num_train_timesteps)
        return np.interp(timesteps, np.arange(len(self.sigmas)), self.sigmas)

    def timestep_at(self, sigmas: Floats) -> Floats:
        """Fractional timesteps of sigmas, linear in log sigma between those of the table; for flow t = time * T."""
        if self.is_flow:
            times = sigmas if self.prediction == "flow" else sigmas / (1 + sigmas)
            return times * self.num_train_timesteps
        return np.interp(np.log(np.maximum(sigmas, 1e-10)), self.log_sigmas, np.arange(len(self.sigmas)))


def _cumulative_product(alphas: Floats32) -> Floats32:
    return np.cumprod(alphas.astype(np.float64)).astype(np.float32)  # torch, too, accumulates float32 in double


def _zero_terminal_snr(betas: Floats32) -> Floats32:
    """Betas shifted and scaled so that no signal is left at the end: Algorithm 1 of Lin et al., arXiv 2305.08891."""
    root = np.sqrt(_cumulative_product(1 - betas))
    abar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return np.append(1 - abar[0], 1 - abar[1:] / abar[:-1]).astype(np.float32)


def _shifted(times: Floats, shift: float) -> Floats:
    """Timestep shifting of flow matching for larger images, eq. 23 of Esser et al., arXiv 2403.03206."""
    return shift * times / (1 + (shift - 1) * times)


# --- schedules -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """n steps: `sigmas`, n + 1 falling values, the last the terminal one, and `timesteps`, n, that the model is told.

    `spacing`: leading, linspace or trailing, if the schedule is one of these. `vp`: what the sampler ends with is in
    variance-preserving coordinates in diffusers, which shows where the terminal sigma is not 0.
    """

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    process: NoiseProcess
    spacing: str | None = None
    vp: bool = True

    @cached_property
    def _told(self) -> dict[float, float]:
        return dict(zip(self.sigmas, self.timesteps, strict=False))  # the terminal sigma has no timestep

    @cached_property
    def _after(self) -> dict[float, float]:
        return dict(zip(self.sigmas, self.sigmas[1:], strict=False))

    def after(self, sigma: float) -> float:
        """The sigma that follows this one, which is of the schedule."""
        return self._after[sigma]

    def timestep(self, sigma: float) -> float:
        """The timestep to tell the model at that sigma: `timesteps[i]` at `sigmas[i]`, interpolated between them."""
        told = self._told.get(sigma)
        return float(self.process.timestep_at(np.array([sigma]))[0]) if told is None else told


def _spaced(process: NoiseProcess, steps: int, grid: Grid, spacing: str) -> Points:
    """Timesteps laid evenly, Table 2 of Lin et al., arXiv 2305.08891; flow has one spacing of its own.

    DDIM and PNDM in diffusers step from t to t - T // n, not to the next timestep of the list. That is the same for
    leading, and for trailing where n divides T; elsewhere theirs leave gaps or overlap, and ours do not follow.
    """
    if process.is_flow:
        return _flow(process, steps, grid)
    total = process.clipped_timesteps
    if spacing == "leading":
        laid = steps + grid.extra
        timesteps = np.arange(laid, dtype=np.float64)[::-1][:steps] * (total // laid) + process.steps_offset
    elif spacing == "linspace":
        timesteps = np.linspace(0, total - 1, steps + grid.extra)[::-1][:steps]
        if grid.whole:
            timesteps = np.round(timesteps)
    else:
        stride = process.num_train_timesteps / steps
        timesteps = np.round(np.arange(total, 0, -stride)[:steps]) - 1  # arange may round up to one step more
        if len(timesteps) < steps:
            raise RequestError(
                "lambda_min_clipped leaves too few trailing timesteps", expected=f"{steps} steps", got=len(timesteps),
                hint="choose another schedule",
            )  # fmt: skip
    if process.interpolation_type == "log_linear":
        return _even_in_log(process, steps)[:-1], timesteps
    return _laid(process, timesteps, grid)


def _even_in_log(process: NoiseProcess, steps: int) -> Floats:
    """n + 1 sigmas from end to end of the training table, even in their logarithm; float64 of float32, as in torch."""
    high, low = np.log(process.sigmas[[-1, 0]].astype(np.float32))
    sigmas: Floats = np.exp(np.linspace(high, low, steps + 1, dtype=np.float32)).astype(np.float64)
    return sigmas


def _laid(process: NoiseProcess, timesteps: Floats, grid: Grid) -> Points:
    sigmas = process.sigma_at(timesteps)
    if process.rescale_betas_zero_snr and not grid.clamped:
        sigmas = np.where(timesteps >= len(process.sigmas) - 1, 2.0**30, sigmas)  # as good as infinite in float32
    return sigmas, timesteps


def _flow(process: NoiseProcess, steps: int, grid: Grid) -> Points:
    """Even times between the ends of the shifted training table, shifted once more, as diffusers does."""
    sigmas = _shifted(np.linspace(process.sigmas[-1], process.sigmas[0], steps), process.shift)
    return sigmas, process.timestep_at(sigmas)


def _flow_uniform(process: NoiseProcess, steps: int, grid: Grid) -> Points:
    """Even times from 1 to 1 / n, shifted: what FLUX's pipeline asks for."""
    sigmas = _shifted(np.linspace(1.0, 1.0 / steps, steps), process.shift)
    return sigmas, process.timestep_at(sigmas)


def _flow_even(process: NoiseProcess, steps: int, grid: Grid) -> Points:
    """Even times, shifted, without the last, in whole timesteps: as diffusers has them for noise over signal."""
    total = process.num_train_timesteps
    times = np.linspace(1, 1 / total, steps + 1)[:-1]
    if grid.flow_from_last:
        times = np.flip(1.0 - np.linspace(1, 1 / total, steps + 1))[:-1]
    times = _shifted(times, process.shift)
    times = np.where(np.abs(times - 1) < 1e-6, times - 1e-6, times)
    return times, np.floor(times * total)


def _lcm(process: NoiseProcess, steps: int, grid: Grid) -> Points:
    """The 50 timesteps latent consistency models (arXiv 2310.04378) are distilled on, thinned as by LCMScheduler."""
    origin = min(process.original_inference_steps, process.num_train_timesteps)
    if steps > origin:
        raise RequestError("too many steps for the lcm schedule", expected=f"1 to {origin}", got=steps)
    trained = np.arange(origin, 0, -1) * (process.num_train_timesteps // origin) - 1.0
    timesteps = trained[np.floor(np.linspace(0, origin, steps, endpoint=False)).astype(int)]
    return process.sigma_at(timesteps), timesteps


def _round(process: NoiseProcess, sigmas: Floats, how: Rounding) -> Points:
    """Give sigmas their timesteps, in whole numbers where the sampler's family has them so."""
    timesteps = process.timestep_at(sigmas)
    if process.is_flow or how == "exact":
        return sigmas, timesteps
    return sigmas, np.round(timesteps) if how == "round" else np.floor(timesteps)


def _span(process: NoiseProcess, steps: int, grid: Grid) -> tuple[float, float]:
    """The largest and the smallest sigma that karras, exponential and beta run between."""
    if not process.is_flow and (grid.span == "table" or process.interpolation_type == "log_linear"):
        high, low = float(process.sigmas[-1]), float(process.sigmas[0])
    else:
        sigmas, _ = _spaced(process, steps, grid, process.timestep_spacing or grid.spacing)
        high, low = float(sigmas[0]), float(sigmas[-1])
    high = high if process.sigma_max is None else process.sigma_max
    return high, low if process.sigma_min is None else process.sigma_min


def _karras(process: NoiseProcess, steps: int, grid: Grid, rho: float = 7.0) -> Points:
    """Even in sigma^(1/rho): eq. 5 of Karras et al., arXiv 2206.00364."""
    high, low = _span(process, steps, grid)
    sigmas = (high ** (1 / rho) + np.linspace(0, 1, steps) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    cosine = process.beta_schedule == "squaredcos_cap_v2"
    return _round(process, np.clip(sigmas, low, high), grid.karras_cosine if cosine else grid.karras)


def _exponential(process: NoiseProcess, steps: int, grid: Grid) -> Points:
    """Even in log sigma, as k-diffusion's `get_sigmas_exponential`."""
    high, low = _span(process, steps, grid)
    sigmas = np.exp(np.linspace(math.log(high), math.log(low), steps))
    return _round(process, np.clip(sigmas, low, high), grid.others)


def _lu(process: NoiseProcess, steps: int, grid: Grid) -> Points:
    """Even in log sigma over the training table, Lu et al., arXiv 2206.00927: `exponential` but for its timesteps."""
    logs = np.linspace(process.log_sigmas[-1], process.log_sigmas[0], steps)
    timesteps = np.interp(logs, process.log_sigmas, np.arange(len(process.sigmas)))
    how = grid.karras_cosine if process.beta_schedule == "squaredcos_cap_v2" else grid.karras
    sigmas = np.clip(np.exp(logs), process.sigmas[0], process.sigmas[-1])
    return sigmas, np.round(timesteps) if how == "round" else np.floor(timesteps) if how == "floor" else timesteps


def _beta(process: NoiseProcess, steps: int, grid: Grid) -> Points:
    """Sigmas at even quantiles of Beta(0.6, 0.6): "Beta Sampling is All You Need", arXiv 2407.12173."""
    high, low = _span(process, steps, grid)
    sigmas = low + (high - low) * beta_quantile(1 - np.linspace(0, 1, steps), 0.6, 0.6)
    return _round(process, sigmas, grid.others)


def _align_your_steps(levels: tuple[float, ...]) -> Callable[[NoiseProcess, int, Grid], Points]:
    """Optimised noise levels for 10 steps, Sabour et al., arXiv 2404.14507; log-linear interpolation for other n."""

    def schedule(process: NoiseProcess, steps: int, grid: Grid) -> Points:
        places = np.linspace(0, 1, steps + 1)[:-1]  # the last level gives way to the terminal sigma
        sigmas = np.exp(np.interp(places, np.linspace(0, 1, len(levels)), np.log(levels)))
        return _round(process, sigmas, grid.karras)

    return schedule


SCHEDULES: dict[str, Callable[[NoiseProcess, int, Grid], Points]] = {
    "leading": lambda process, steps, grid: _spaced(process, steps, grid, "leading"),
    "linspace": lambda process, steps, grid: _spaced(process, steps, grid, "linspace"),
    "trailing": lambda process, steps, grid: _spaced(process, steps, grid, "trailing"),
    "karras": _karras,
    "exponential": _exponential,
    "beta": _beta,
    "lu": _lu,
    "ays_sd15": _align_your_steps((14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)),
    "ays_sdxl": _align_your_steps((14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)),
    "lcm": _lcm,
    "flow": _flow,
    "flow_uniform": _flow_uniform,
    "flow_even": _flow_even,
}
_FOR_FLOW = frozenset({"flow", "flow_uniform", "flow_even", "karras", "exponential", "beta"})
_FOR_VP = frozenset(SCHEDULES) - {"flow", "flow_uniform", "flow_even"}


def make_schedule(process: NoiseProcess, name: str, steps: int, sampler: str = "dpmpp_2m") -> Schedule:
    """n = `steps` steps of the schedule `name`, laid as diffusers lays them for that sampler.

    RequestError: unknown name (lists the candidates), steps outside 1..num_train_timesteps, or a schedule that cannot
    have that many steps.
    """
    if name not in SCHEDULES:
        raise RequestError("unknown schedule", expected=", ".join(SCHEDULES), got=repr(name))
    total = process.num_train_timesteps
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or not 1 <= steps <= total:
        raise RequestError("steps out of range", expected=f"an integer from 1 to {total}", got=repr(steps))
    legal = _FOR_FLOW if process.is_flow else _FOR_VP
    if name not in legal:
        candidates = ", ".join(n for n in SCHEDULES if n in legal)
        raise RequestError(f"not a schedule for {process.prediction} prediction", expected=candidates, got=repr(name))
    # Schedules of flow matching lay times; what they are as noise over signal follows.
    laid_on = replace(process, prediction="flow") if process.is_flow else process
    sigmas, timesteps = SCHEDULES[name](laid_on, steps, find_sampler(sampler).grid)
    if process.prediction == "flow_ratio":
        sigmas = process.levels(sigmas)
    return _finish(process, sigmas, timesteps, sampler, name if name in SPACINGS else None)


def _finish(
    process: NoiseProcess, sigmas: Floats, timesteps: Floats, sampler: str, spacing: str | None = None
) -> Schedule:
    """Append the sampler's terminal sigma and check that noise falls."""
    _check_sampler(process, sampler)
    last = _last(process, sigmas, find_sampler(sampler).grid, spacing)
    if process.timestep_type == "continuous" and process.prediction == "v_prediction":
        timesteps = 0.25 * np.log(sigmas)
    if not (np.diff(sigmas) < 0).all() or not sigmas[-1] >= last or sigmas[-1] <= 0:
        raise RequestError(
            "two steps of the schedule fall on the same noise level",
            expected="falling sigmas and timesteps",
            got=f"{len(sigmas)} steps",
            hint="ask for fewer steps",
        )
    vp = find_sampler(sampler).grid.start == "vp"
    return Schedule((*sigmas.tolist(), last), tuple(timesteps.tolist()), process, spacing, vp)


def _last(process: NoiseProcess, sigmas: Floats, grid: Grid, spacing: str | None) -> float:
    """The terminal sigma."""
    if process.is_flow and process.final_sigmas_type == "zero":
        return 0.0
    smallest = float(process.sigmas[0])
    if spacing and process.interpolation_type == "log_linear":
        return smallest  # the last of its n + 1 sigmas
    match grid.terminal:
        case "config_one" | "config_first" as silent:
            one = process.set_alpha_to_one
            return 0.0 if (silent == "config_one" if one is None else one) else smallest
        case "config_final" | "config_last" as which if process.final_sigmas_type == "sigma_min":
            return smallest if which == "config_final" or spacing else float(sigmas[-1])
        case "first":
            return smallest if spacing or process.sigma_min is None else float(sigmas[-1])
    return 0.0


def from_timesteps(process: NoiseProcess, timesteps: Sequence[float], sampler: str = "dpmpp_2m") -> Schedule:
    """A schedule from falling timesteps, one per step; at most num_train_timesteps - 1 (flow: num_train_timesteps)."""
    given = np.array(timesteps, np.float64)
    high = process.num_train_timesteps - (not process.is_flow)
    if given.ndim != 1 or not given.size or given.min() < 0 or given.max() > high:
        raise RequestError("timesteps out of range", expected=f"falling numbers from {high} to 0", got=timesteps)
    return _finish(process, *_laid(process, given, find_sampler(sampler).grid), sampler)


def from_sigmas(process: NoiseProcess, sigmas: Sequence[float], sampler: str = "dpmpp_2m") -> Schedule:
    """A schedule from n + 1 falling sigmas, times of flow matching, the last the terminal one (usually 0); timesteps
    are interpolated."""
    given = np.array(sigmas, np.float64)
    if given.ndim != 1 or given.size < 2 or not (np.diff(given) < 0).all() or given[-1] < 0:
        raise RequestError("not a list of sigmas", expected="2 or more falling numbers, the last 0 or more", got=sigmas)
    _check_sampler(process, sampler)
    given = process.levels(given) if process.is_flow else given
    vp = find_sampler(sampler).grid.start == "vp"
    return Schedule(tuple(given.tolist()), tuple(process.timestep_at(given[:-1]).tolist()), process, vp=vp)


def _check_sampler(process: NoiseProcess, sampler: str) -> None:
    if process.prediction == "flow" and not find_sampler(sampler).flow:
        candidates = ", ".join(name for name, s in SAMPLERS.items() if s.flow)
        raise RequestError("this sampler cannot run a flow-matching model", expected=candidates, got=repr(sampler))


def beta_quantile(probability: Floats, a: float, b: float) -> Floats:
    """Quantile function of the Beta(a, b) distribution, by bisection; absolute error below 1e-12.

    The distribution function up to 1/2 is the hypergeometric series of the incomplete beta function (DLMF 8.17.7),
    whose terms fall at least as 2^-n there; above 1/2 the distribution is mirrored.
    """
    orders = np.arange(60)
    beta = math.gamma(a) * math.gamma(b) / math.gamma(a + b)

    def mass(x: Floats, a: float, b: float) -> Floats:  # of [0, x], for x up to 1/2
        terms = np.cumprod(np.append(1.0, (orders[1:] - b) / orders[1:])) / (a + orders)
        return np.asarray(x**a * (x[:, None] ** orders @ terms) / beta)

    def solve(p: Floats, a: float, b: float) -> Floats:
        low, high = np.zeros_like(p), np.full_like(p, 0.5)
        for _ in range(50):
            middle = (low + high) / 2
            under = mass(middle, a, b) < p
            low, high = np.where(under, middle, low), np.where(under, high, middle)
        return np.asarray((low + high) / 2)

    lower = probability <= mass(np.array([0.5]), a, b)
    solved = np.where(lower, solve(probability, a, b), 1 - solve(1 - probability, b, a))
    return np.where(probability <= 0, 0.0, np.where(probability >= 1, 1.0, solved))
