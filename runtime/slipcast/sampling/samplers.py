"""Samplers: one generator per method over `(denoise, x, sigmas)`, and `SAMPLERS`, the table of all of them.

Everything happens in variance-exploding coordinates, x = x0 + sigma * eps, where the probability-flow ODE is dx/dsigma
= (x - D(x, sigma)) / sigma and `denoise(x, sigma)` is D, the expected x0 (Karras et al., arXiv 2206.00364). A
flow-matching model obeys the same ODE in its own coordinates x_t = (1 - t) * x0 + t * eps with sigma = t, so the
samplers marked `flow` run on it unchanged.

`x` is an array of any shape, batch first, and keeps its dtype; it may be a numpy array or a torch tensor, since only
arithmetic operators touch it. `sigmas` are n + 1 falling numbers, the last usually 0. Every sampler yields x after each
of the n steps; the last one is the clean latent. `noise()` returns standard normal noise shaped like x; the order
of its calls is diffusers' order, so that a seed means the same picture. Nothing is drawn for a step that adds no noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal, TypeAlias

from slipcast.errors import RequestError

Array: TypeAlias = Any  # a numpy array or a torch tensor: no common type exists
Denoise: TypeAlias = Callable[[Array, float], Array]
Noise: TypeAlias = Callable[[], Array]


def _steps(sigmas: Sequence[float]) -> list[tuple[float, float]]:
    """Pairs (sigma, next sigma) of Python floats: numpy scalars would promote float32 latents."""
    return list(pairwise(float(s) for s in sigmas))


def _blend(x: Array, denoised: Array, ratio: float) -> Array:
    """The exact solution from sigma to ratio * sigma for a constant D; one term, so nothing cancels at large sigma."""
    return ratio * x + (1.0 - ratio) * denoised


def _ancestral(s: float, t: float, eta: float = 1.0) -> tuple[float, float]:
    """Split the noise level t, reached from s, into a part to step down to and a part to add as fresh noise."""
    up = eta * min(t, t * math.sqrt(max(s * s - t * t, 0.0)) / s)
    return math.sqrt(max(t * t - up * up, 0.0)), up


def euler(denoise: Denoise, x: Array, sigmas: Sequence[float]) -> Iterator[Array]:
    """Euler's method (Karras et al., arXiv 2206.00364), which in these coordinates is DDIM (arXiv 2010.02502)."""
    for s, t in _steps(sigmas):
        x = _blend(x, denoise(x, s), t / s)
        yield x


def euler_ancestral(
    denoise: Denoise, x: Array, sigmas: Sequence[float], noise: Noise, eta: float = 1.0
) -> Iterator[Array]:
    """Euler steps with fresh noise: k-diffusion's ancestral sampling.

    In these coordinates it is eq. 16 of DDIM (arXiv 2010.02502) for any eta and, at eta = 1, the ancestral sampling of
    DDPM (arXiv 2006.11239, Algorithm 2, with the smaller variance).
    """
    for s, t in _steps(sigmas):
        down, up = _ancestral(s, t, eta)
        x = _blend(x, denoise(x, s), down / s)
        if up > 0:
            x = x + up * noise()
        yield x


def ddpm(
    denoise: Denoise, x: Array, sigmas: Sequence[float], noise: Noise, variance_type: str = "fixed_small"
) -> Iterator[Array]:
    """The ancestral sampling of DDPM (arXiv 2006.11239, Algorithm 2), with the smaller variance or the larger one.

    `fixed_large` adds noise of variance beta after every step but that from the smallest noise level.
    """
    if variance_type == "fixed_small":
        yield from euler_ancestral(denoise, x, sigmas, noise)
        return
    steps = _steps(sigmas)
    for i, (s, t) in enumerate(steps):
        x = _blend(x, denoise(x, s), (t / s) ** 2)
        if i < len(steps) - 1:
            x = x + math.sqrt((s * s - t * t) * (1 + t * t) / (1 + s * s)) * noise()
        yield x


def heun(denoise: Denoise, x: Array, sigmas: Sequence[float]) -> Iterator[Array]:
    """Heun's method, Algorithm 1 of Karras et al., arXiv 2206.00364; the last step to sigma = 0 is Euler's."""
    for s, t in _steps(sigmas):
        denoised = denoise(x, s)
        ahead = _blend(x, denoised, t / s)
        if t == 0:
            x = ahead
        else:
            slope = ((x - denoised) / s + (ahead - denoise(ahead, t)) / t) / 2
            x = x + (t - s) * slope
        yield x


def dpm2(denoise: Denoise, x: Array, sigmas: Sequence[float]) -> Iterator[Array]:
    """DPM-Solver-2, arXiv 2206.00927, as k-diffusion's `dpm_2`: the midpoint rule, its middle taken in log sigma."""
    for s, t in _steps(sigmas):
        denoised = denoise(x, s)
        if t == 0:
            x = _blend(x, denoised, 0.0)
        else:
            middle = math.sqrt(s * t)
            half = _blend(x, denoised, middle / s)
            x = x + (t - s) / middle * (half - denoise(half, middle))
        yield x


def pndm(denoise: Denoise, x: Array, sigmas: Sequence[float]) -> Iterator[Array]:
    """PLMS, the linear multistep of PNDM, arXiv 2202.09778, without Runge-Kutta warm-up (`skip_prk_steps`).

    The first step is a pseudo-Heun step whose second slope is not kept; Adams-Bashforth of rising order, up to 4,
    follows.
    The weights assume steps of equal length: they are exact in sigma only on a grid uniform in sigma.
    """
    weights = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
    history: list[Array] = []  # eps, the newest first
    steps = _steps(sigmas)
    for i, (s, t) in enumerate(steps):
        history = [(x - denoise(x, s)) / s, *history[:3]]
        slope = sum(w * eps for w, eps in zip(weights[len(history) - 1], history, strict=True))
        if i == 0 and len(steps) > 1:
            ahead = x + (t - s) * slope
            slope = (slope + (ahead - denoise(ahead, t)) / t) / 2
        x = x + (t - s) * slope
        yield x


COARSE = 15  # steps; diffusers ends schedules of fewer in lower order


def _is_last_and_coarse(i: int, t: float, count: int, coarse: float = COARSE) -> bool:
    """DPM-Solver++ ends with a first-order step where sigma ends at 0, or where there are fewer than `coarse` steps."""
    return i == count - 1 and (t == 0 or count < coarse)


def _second_order(h: float, drift: int, solver_type: str) -> float:
    """Weight of D's slope, times h, over a step of length h in log sigma: the two forms of arXiv 2211.01095.

    `heun` integrates the slope exactly, `midpoint` takes half of it; their difference is of third order.
    """
    if solver_type == "midpoint" or h == 0:
        return 0.5
    whole = -math.expm1(-drift * h)
    return (1 - whole / (drift * h)) / whole


def _multistep_2m(
    denoise: Denoise, x: Array, sigmas: Sequence[float], noise: Noise | None, options: Mapping[str, Any]
) -> Iterator[Array]:
    """Second-order multistep in log sigma: on the ODE, or, where there is noise, on the SDE, whose drift is twofold."""
    coarse: float = COARSE if options.get("lower_order_final", True) else 0
    coarse = math.inf if options.get("euler_at_final", False) else coarse
    solver_type, drift = options.get("solver_type", "midpoint"), 1 if noise is None else 2
    steps, last, h_last = _steps(sigmas), None, 0.0
    for i, (s, t) in enumerate(steps):
        denoised = target = denoise(x, s)
        h = math.log(s / t) if t > 0 else math.inf
        if last is not None and not _is_last_and_coarse(i, t, len(steps), coarse):
            target = denoised + (h / h_last) * _second_order(h, drift, solver_type) * (denoised - last)
        x = _blend(x, target, t / s if noise is None else (t / s) ** 2)
        if noise is not None and t > 0:
            x = x + t * math.sqrt(-math.expm1(-2 * h)) * noise()
        last, h_last = denoised, h
        yield x


def dpmpp_2m(denoise: Denoise, x: Array, sigmas: Sequence[float], **options: Any) -> Iterator[Array]:
    """DPM-Solver++(2M), Algorithm 2 of arXiv 2211.01095."""
    return _multistep_2m(denoise, x, sigmas, None, options)


def dpmpp_2m_sde(denoise: Denoise, x: Array, sigmas: Sequence[float], noise: Noise, **options: Any) -> Iterator[Array]:
    """SDE-DPM-Solver++(2M), arXiv 2211.01095 section 5; in midpoint form, unless solver_type is heun."""
    return _multistep_2m(denoise, x, sigmas, noise, options)


def dpmpp_3m_sde(denoise: Denoise, x: Array, sigmas: Sequence[float], noise: Noise) -> Iterator[Array]:
    """SDE-DPM-Solver++(3M): third-order multistep on the SDE of arXiv 2211.01095, as k-diffusion's `dpmpp_3m_sde`.

    diffusers' third-order SDE update has - 1/2 where the expansion gives + 1/2 in the weight of its D2 and so loses
    the order; here the weight is the right one. (Its second-order update, used where history is short, is the same.)
    """
    steps = _steps(sigmas)
    past: list[tuple[Array, float]] = []  # (D, length in log sigma of the step that followed), the newest first
    for i, (s, t) in enumerate(steps):
        denoised = denoise(x, s)
        h = math.log(s / t) if t > 0 else math.inf
        x = _blend(x, denoised, (t / s) ** 2)
        if past and not _is_last_and_coarse(i, t, len(steps)):
            d1 = (h / past[0][1]) * (denoised - past[0][0])
            if len(past) == 1 or (i == len(steps) - 2 and len(steps) < 15):
                x = x - 0.5 * math.expm1(-2 * h) * d1
            else:
                r0, r1 = past[0][1] / h, past[1][1] / h
                d1_old = (past[0][0] - past[1][0]) / r1
                d2 = (d1 - d1_old) / (r0 + r1)
                phi2 = math.expm1(-2 * h) / (2 * h) + 1
                x = x + phi2 * (d1 + r0 * d2) - (phi2 / (2 * h) - 0.5) * d2
        if t > 0:
            x = x + t * math.sqrt(-math.expm1(-2 * h)) * noise()
        past = [(denoised, h), *past[:1]]
        yield x


def dpmpp_sde(denoise: Denoise, x: Array, sigmas: Sequence[float], noise: Noise) -> Iterator[Array]:
    """SDE-DPM-Solver++ in single steps with r = 1/2, on the SDE of arXiv 2211.01095, as k-diffusion's `dpmpp_sde`.

    Both stages start at s, so their noises are increments of one Brownian path (time: sigma) over [s, middle] and [s,
    t]. Two independent draws build them; no Brownian tree is needed, since nothing else looks at the path.
    """
    for s, t in _steps(sigmas):
        denoised = denoise(x, s)
        if t == 0:
            x = _blend(x, denoised, 0.0)
        else:
            middle = math.sqrt(s * t)
            first = noise()
            whole = math.sqrt((s - middle) / (s - t)) * first + math.sqrt((middle - t) / (s - t)) * noise()
            down, up = _ancestral(s, middle)
            half = _blend(x, denoised, down / s) + up * first
            down, up = _ancestral(s, t)
            x = _blend(x, denoise(half, middle), down / s) + up * whole
        yield x


def unipc(
    denoise: Denoise, x: Array, sigmas: Sequence[float], solver_type: str = "bh2", disable_corrector: Sequence[int] = ()
) -> Iterator[Array]:
    """UniPC of order 2 with data prediction, Algorithms 5 and 6 of arXiv 2302.04867; B(h) = expm1(h), or h for `bh1`.

    What is yielded is the prediction; the next evaluation corrects it, but for steps in `disable_corrector`. The last
    step, of order 1, has no correction.
    """
    steps = _steps(sigmas)
    before: Array = x  # x, D, the step's length and its difference D1, of the step that led here
    past: Array = None
    d1: Array = 0.0
    r, h = 0.0, 0.0
    for i, (s, t) in enumerate(steps):
        denoised = denoise(x, s)
        if i > 0 and i - 1 not in disable_corrector:
            grown = math.expm1(-h)
            b1 = (1 + grown / h) / -grown  # of B(h) = expm1(h); the equations are divided by it
            b2 = 2 * ((1 + grown / h) / h - 0.5) / grown
            w = (b1 - b2) / (1 + r) if i > 1 else 0.0  # of D1; the first step has none
            first = 0.5 * _bh(h, solver_type)
            x = _blend(before, past + w * d1 + ((b1 - w) if i > 1 else first) * (denoised - past), math.exp(-h))
        h_last, h = h, math.log(s / t) if t > 0 else math.inf
        target = denoised
        if 0 < i < len(steps) - 1:
            r = h_last / h
            d1 = (denoised - past) / r
            target = denoised + 0.5 * _bh(h, solver_type) * d1
        before, past = x, denoised
        x = _blend(x, target, t / s)
        yield x


def _bh(h: float, solver_type: str) -> float:
    """B(h) over that of bh2: it matters where diffusers takes 1/2 for a weight that would follow from it."""
    return 1.0 if solver_type == "bh2" else -h / math.expm1(-h)


def deis(denoise: Denoise, x: Array, sigmas: Sequence[float], lower_order_final: bool = True) -> Iterator[Array]:
    """DEIS of order 2, arXiv 2204.13902, log-rho form: eps is extrapolated linearly in log sigma, then integrated."""
    coarse = COARSE if lower_order_final else 0
    steps, last, before = _steps(sigmas), None, 0.0
    for i, (s, t) in enumerate(steps):
        eps = (x - denoise(x, s)) / s
        slope = (t - s) * eps
        if last is not None and not _is_last_and_coarse(i, t, len(steps), coarse):
            integral = t * (math.log(t / s) - 1) + s  # of log(sigma / s), from s to t
            weight = integral / math.log(s / before)
            slope = slope + weight * (eps - last)
        x = x + slope
        last, before = eps, s
        yield x


def lcm(denoise: Denoise, x: Array, sigmas: Sequence[float], noise: Noise) -> Iterator[Array]:
    """Multistep consistency sampling, Algorithm 3 of LCM, arXiv 2310.04378: jump to x0, add noise of the next sigma.

    The boundary scalings c_skip and c_out differ from 0 and 1 by less than 1e-5 on the grid these models are distilled
    on, and are left out.
    """
    for s, t in _steps(sigmas):
        x = denoise(x, s)
        if t > 0:
            x = x + t * noise()
        yield x


Rounding = Literal["exact", "round", "floor"]


@dataclass(frozen=True)
class Grid:
    """How a family of diffusers schedulers lays its steps; a picture only equals diffusers' if these agree.

    spacing: the timestep spacing where neither the request nor the model's config names one.
    extra: points laid beyond the steps and dropped again (leading and linspace).
    whole: timesteps of linspace are rounded to integers.
    span: karras, exponential and beta run from end to end of the training `table`, or of the `spaced` timesteps.
    karras, karras_cosine, others: what is done to the fractional timesteps of karras sigmas, of karras sigmas on the
    cosine beta schedule, and of exponential and beta sigmas.
    terminal: the sigma after the last step: `zero`, or the `first` of the training table, or either one as the config's
    set_alpha_to_one says (where it is silent: `config_one` zero, `config_first` first) or as its final_sigmas_type does
    (`config_final`; `config_last`: of karras, exponential and beta it is then the last that was laid).
    start: the first x is unit noise in variance-preserving coordinates (`vp`), or depends on the spacing (`spacing`).
    flow_from_last: of the schedule flow_even, whose times then end at 0 and not at the first of training.
    clamped: where training ends with no signal, abar is held at 2**-24 there, for the sigma to be finite.
    """

    spacing: str
    extra: int = 0
    whole: bool = True
    span: Literal["table", "spaced"] = "table"
    karras: Rounding = "round"
    karras_cosine: Rounding = "round"
    others: Rounding = "floor"
    terminal: Literal["zero", "first", "config_one", "config_first", "config_final", "config_last"] = "zero"
    start: Literal["vp", "spacing"] = "vp"
    clamped: bool = True
    flow_from_last: bool = False


# DDPM, DDIM, PNDM, LCM. They know only leading, linspace and trailing in diffusers; elsewhere they round, as is their
# habit.
DISCRETE = Grid(spacing="leading", others="round", clamped=False)
DDIM = Grid(spacing="leading", others="round", terminal="config_one", clamped=False)
PNDM = Grid(spacing="leading", others="round", terminal="config_first")
# Euler, Heun, KDPM2, DPMSolverSDE: fractional timesteps, sigmas interpolated between those of the training table.
CONTINUOUS = Grid(
    spacing="linspace",
    whole=False,
    span="spaced",
    start="spacing",
    karras="exact",
    karras_cosine="exact",
    others="exact",
)
EULER = replace(CONTINUOUS, terminal="config_final")
KDPM2 = Grid(spacing="linspace", whole=False, span="spaced", others="exact", start="spacing")
# DPMSolverMultistep, UniPC, DEIS: cast to integers, which rounds down unless they round first.
DPMPP = Grid(spacing="linspace", extra=1, karras_cosine="floor", terminal="config_final", flow_from_last=True)
UNIPC = Grid(spacing="linspace", extra=1, terminal="config_last")
DEIS = Grid(spacing="linspace", extra=1, terminal="first")


Option: TypeAlias = Callable[[str], Any]


def _one_of(*names: str) -> Option:
    """A reader of one of these words; KeyError for another."""
    return {name: name for name in names}.__getitem__


_FLAG: Option = {"true": True, "false": False}.__getitem__
_NUMBERS: Option = lambda text: tuple(int(part) for part in text.split(","))  # noqa: E731 - a row of a table
_DPMPP_OPTIONS = {"solver_type": _one_of("midpoint", "heun"), "lower_order_final": _FLAG, "euler_at_final": _FLAG}


@dataclass(frozen=True)
class Sampler:
    """A sampling method.

    step: the generator. order: global order of convergence; of a stochastic sampler, in law (the third-order drift of
    `dpmpp_3m_sde` makes its error small, but D still sees no noise within a step). grid: how diffusers lays its steps.
    evaluations: calls of `denoise` per step. stochastic: draws noise. flow: also runs in flow-matching coordinates.
    eta: the default of a sampler that takes one, else None. options: keywords of `step` that a name may set, by the
    keys of diffusers' configs: `dpmpp_2m+solver_type=heun` is dpmpp_2m with that option.
    """

    step: Callable[..., Iterator[Array]]
    order: int
    grid: Grid
    evaluations: int = 1
    stochastic: bool = False
    flow: bool = False
    eta: float | None = None
    options: Mapping[str, Option] = field(default_factory=dict)


SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(
        ddpm, 1, DISCRETE, stochastic=True, options={"variance_type": _one_of("fixed_small", "fixed_large")}
    ),
    "ddim": Sampler(euler_ancestral, 1, DDIM, eta=0.0),
    "pndm": Sampler(pndm, 2, PNDM),
    "euler": Sampler(euler, 1, EULER, flow=True),
    "euler_ancestral": Sampler(euler_ancestral, 1, CONTINUOUS, stochastic=True),
    "heun": Sampler(heun, 2, CONTINUOUS, evaluations=2, flow=True),
    "dpm2": Sampler(dpm2, 2, KDPM2, evaluations=2),
    "dpmpp_2m": Sampler(dpmpp_2m, 2, DPMPP, options=_DPMPP_OPTIONS),
    "dpmpp_2m_sde": Sampler(dpmpp_2m_sde, 2, DPMPP, stochastic=True, options=_DPMPP_OPTIONS),
    "dpmpp_3m_sde": Sampler(dpmpp_3m_sde, 2, DPMPP, stochastic=True),
    "dpmpp_sde": Sampler(dpmpp_sde, 2, CONTINUOUS, evaluations=2, stochastic=True),
    "unipc": Sampler(unipc, 2, UNIPC, options={"solver_type": _one_of("bh1", "bh2"), "disable_corrector": _NUMBERS}),
    "deis": Sampler(deis, 2, DEIS, options={"lower_order_final": _FLAG}),
    "lcm": Sampler(lcm, 1, DISCRETE, stochastic=True),
}


def find_sampler(name: str) -> Sampler:
    """The sampler of that name, with the options that it sets; RequestError with the candidates if there is none."""
    base = base_name(name)
    if base not in SAMPLERS:
        raise RequestError("unknown sampler", expected=", ".join(SAMPLERS), got=repr(name))
    sampler, options = SAMPLERS[base], sampler_options(name)
    return replace(sampler, step=partial(sampler.step, **options)) if options else sampler


def is_known(name: str) -> bool:
    """Whether there is a sampler of that name, options and all."""
    try:
        find_sampler(name)
    except RequestError:
        return False
    return True


def base_name(name: str) -> str:
    """The sampler's name without options."""
    return name.partition("+")[0]


def sampler_options(name: str) -> dict[str, Any]:
    """The options that a sampler's name sets; RequestError where it has not such an option, or not with that value."""
    known, found = SAMPLERS[base_name(name)].options, {}
    for option in name.split("+")[1:]:
        key, _, value = option.partition("=")
        try:
            found[key] = known[key](value)
        except (KeyError, ValueError):
            raise RequestError(
                f"{base_name(name)} has no such option", expected=", ".join(known) or "none", got=repr(option[:100])
            ) from None
    return found


def sample(
    sampler: str | Sampler,
    denoise: Denoise,
    x: Array,
    sigmas: Sequence[float],
    noise: Noise | None = None,
    eta: float | None = None,
) -> Iterator[Array]:
    """Run a sampler by name; yields x after each step.

    `noise` is needed by stochastic samplers and, where eta > 0, by `ddim`; eta is between 0 and 1 and belongs to
    `ddim` alone. Errors are raised here, before any evaluation.
    """
    chosen = find_sampler(sampler) if isinstance(sampler, str) else sampler
    if chosen.eta is None and eta:
        takers = ", ".join(name for name, s in SAMPLERS.items() if s.eta is not None)
        raise RequestError("this sampler takes no eta", expected=f"no eta, or one of the samplers {takers}", got=eta)
    options: dict[str, Any] = {}
    if chosen.eta is not None:
        options["eta"] = chosen.eta if eta is None else float(eta)
        if not 0 <= options["eta"] <= 1:
            raise RequestError("eta out of range", expected="0 to 1", got=eta)
    if noise is None and (chosen.stochastic or options.get("eta", 0.0) > 0):
        raise RequestError("this sampler draws noise", expected="noise: a callable", got="none")
    if chosen.stochastic or chosen.eta is not None:
        options["noise"] = noise
    return chosen.step(denoise, x, sigmas, **options)
