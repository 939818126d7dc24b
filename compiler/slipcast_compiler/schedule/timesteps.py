"""Noise levels optimised offline, for one solver, number of steps and family, against a fine trajectory.

`dp`: dynamic programming on the local errors of steps between points of the fine trajectory (GITS, Chen et al., arXiv
2405.11326), measured with the sampler itself, its history included; it costs the fine trajectory and little more.
`direct`: from the best list known, each level is moved as long as the end of the sampling comes nearer to the fine
trajectory's end (the objective of LD3, Tong et al., arXiv 2405.15506). LD3 descends a gradient; samplers here take
sigmas as Python floats, and a list has few numbers, so a coordinate search does, and needs no memory for a backward
pass. A change of one level leaves the evaluations before it as they were: they are not made again.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slipcast.bundle.manifest import Sampling
from slipcast.errors import RequestError
from slipcast.progress import Advance
from slipcast.sampling.denoiser import initial_scale
from slipcast.sampling.guidance import Evaluate, Guidance, Guided
from slipcast.sampling.samplers import Array, sample
from slipcast.sampling.schedules import Schedule, from_sigmas, make_schedule
from slipcast_compiler.host.cache import Cache
from slipcast_compiler.host.isolate import run_isolated
from slipcast_compiler.host.quiet import quiet
from slipcast_compiler.model import original
from slipcast_compiler.model.original import Drawing, Prompts
from slipcast_compiler.model.rewrite import Denoiser, Rewrite
from slipcast_compiler.recipe.sampling import TimestepsTable

Sigmas = tuple[float, ...]
EvaluateAt = Callable[[Array, float, float, bool], tuple[Array, Array | None]]
Costs = npt.NDArray[np.float64]

REPORT = "timesteps.json"
NAMED = ("leading", "linspace", "trailing", "karras", "ays_sd15", "flow")  # what the found list is compared with
WEIGHTS = (
    0.0,
    1.0,
    2.0,
)  # powers of 1 / sqrt(1 + sigma^2) that local errors are weighted with: which is right, a run tells
SWEEPS = 6  # of the coordinate search, at the most
FIRST_MOVE, SHRINK, LAST_MOVE = 0.4, 0.5, 0.05  # parts of the gap to the neighbour
TOO_LITTLE = 0.02  # a sweep that gains less is followed by smaller moves
CELLS_AT_ONCE = 4096  # of latents in one evaluation


class Model:
    """A denoiser with prompts and initial noise bound: draws all their latents at once, by any schedule.

    Outputs are remembered from one run to the next, and taken from there as long as x and timestep are the same.
    """

    def __init__(
        self, sampling: Sampling, evaluate: EvaluateAt, start: Callable[[Schedule | float], Array], fixed: bool = False
    ) -> None:
        """`evaluate`: the model, as sampling.guidance.Evaluate, which is told the noise level too. `start`: x at a
        schedule's first level, or at a level, [n, ...], a torch tensor or numpy array. `fixed`: that of the sampling's
        own schedule is the only one that there is."""
        self.sampling, self.fixed = sampling, fixed
        self._evaluate, self._start = evaluate, start
        self._known: list[tuple[Array, float, bool, Any]] = []

    def run(self, schedule: Schedule, guidance: Guidance) -> tuple[list[Array], dict[float, Array]]:
        """x at the start and after each step; and, by sigma, the D(x, sigma) that the sampler was given last."""
        settings, count, level, given = self.sampling, 0, 0.0, dict[float, Array]()

        def remembered(x: Array, timestep: float, both: bool) -> Any:
            nonlocal count
            count += 1
            if count <= len(self._known):
                known = self._known[count - 1]
                if known[1:3] == (timestep, both) and bool((known[0] == x).all()):
                    return known[3]
            outputs = self._evaluate(x, timestep, level, both)
            self._known[count - 1 :] = [(x + 0, timestep, both, outputs)]
            return outputs

        guided = Guided(settings.noise, schedule, remembered, guidance)

        def denoise(x: Array, sigma: float) -> Array:
            nonlocal level
            level = sigma
            given[sigma] = guided(x, sigma)
            return given[sigma]

        x = self._start(schedule)
        states = [x, *(each + 0 for each in sample(settings.sampler, denoise, x, schedule.sigmas))]
        return states, given

    def late_starts(self, states: Sequence[Array], fine: Schedule) -> Costs:
        """Error of starting at each point of a trajectory: at high noise, hardly worse than steps to there."""
        if self.fixed:
            return np.array([0.0, *[np.inf] * (len(states) - 2)])
        pairs = zip(fine.sigmas[:-1], states, strict=False)
        return np.array([distance(self._start(sigma) - x) for sigma, x in pairs])


def from_noise(sampling: Sampling, noise: Array) -> Callable[[Schedule | float], Array]:
    """The start of a model, from unit normal noise [n, ...]."""
    return lambda first: noise * initial_scale(sampling.noise, first, sampling.sampler)


def distance(difference: Array) -> float:
    """RMS over the cells of each image, and its mean over images: one that turned out another does not decide alone."""
    squares = (difference * difference).reshape(len(difference), -1)
    return float((squares.mean(1) ** 0.5).mean())


# --- dynamic programming ---------------------------------------------------------------------------------------------


def local_errors(sampler: str, states: Sequence[Array], denoised: Mapping[float, Array], sigmas: Sigmas) -> Costs:
    """Error of the sampler's step from point i of a trajectory to point j, having come from point k.

    costs[k, i, j] for k < i < j, and costs[i, i, j] for a first step; infinite elsewhere. Nothing is evaluated: D is
    known at all points.
    """
    last = len(sigmas) - 1
    costs = np.full((last, last, last + 1), np.inf)

    def known(_: Array, sigma: float) -> Array:
        return denoised[sigma]

    for i, j in combinations(range(last + 1), 2):
        # Samplers end at a lower order, and this is the end only where j is.
        after = () if j == last else (sigmas[j + 1] if j + 1 <= last else 0.0,)
        for k in range(i + 1):
            path = (sigmas[i], sigmas[j], *after) if k == i else (sigmas[k], sigmas[i], sigmas[j], *after)
            x = states[k] + 0
            steps = sample(sampler, known, x, path)
            x = next(steps)
            if k < i:
                x[...] = states[i]  # the step starts on the trajectory; its history is in the sampler
                x = next(steps)
            costs[k, i, j] = distance(x - states[j])
    return costs


def cheapest_path(begin: Costs, costs: Costs, steps: int) -> list[int]:
    """Points p0 < p1 < ... < p_steps = last with the smallest sum of begin[p0] and the costs of the steps."""
    last, later = len(costs), costs.copy()
    points = np.arange(last)
    best = begin[:, None] + costs[points, points]  # best[i, j]: of a path whose last step is from i to j
    later[points, points] = np.inf
    came: list[npt.NDArray[np.intp]] = []
    for _ in range(steps - 1):
        sums = best[:, :last, None] + later  # [k, i, j]
        came.append(sums.argmin(axis=0))
        best = sums.min(axis=0)
    path = [last, int(best[:, last].argmin())]
    for pointers in reversed(came):
        path.append(int(pointers[path[-1], path[-2]]))
    return path[::-1]


# --- direct search ---------------------------------------------------------------------------------------------------


def descend(
    error: Callable[[Sigmas], float], start: Sigmas, top: float, advance: Advance, kept: int = 0
) -> tuple[float, Sigmas]:
    """Move the levels below `top` and above the terminal one, one at a time, as long as `error` falls; but the first
    `kept`."""
    best, least, move = start, error(start), FIRST_MOVE
    for sweep in range(SWEEPS):
        advance(sweep, SWEEPS)
        before = least
        for i in range(len(best) - 2, kept - 1, -1):  # the last first: little has to be evaluated again
            for part in (move, -move):
                tried = (*best[:i], _moved((top, *best), i + 1, part), *best[i + 1 :])
                if tried != best and (found := error(tried)) < least:
                    best, least = tried, found
                    break
        if least > before * (1 - TOO_LITTLE):
            move *= SHRINK
            if move < LAST_MOVE:
                break
    return least, best


def _moved(sigmas: Sigmas, i: int, part: float) -> float:
    """sigmas[i] moved by a part of the way, in log sigma, up or down to its neighbour; the terminal one may be 0."""
    here = math.log(sigmas[i])
    if part > 0:
        return math.exp(here + part * (math.log(sigmas[i - 1]) - here))
    below = sigmas[i + 1] if sigmas[i + 1] > 0 else sigmas[i] ** 2 / sigmas[i - 1]  # as far as the one above
    return math.exp(here + part * (here - math.log(below)))


# --- the choice -------------------------------------------------------------------------------------------------------


def choose_timesteps(
    drawing: Drawing, table: TimestepsTable, rewrite: Rewrite, cache: Cache, advance: Advance
) -> tuple[Sampling, dict[str, Any]]:
    """The drawing's sampling with noise levels found as [timesteps] asks, and a report of how far each list is off.

    `drawing`: of calibration prompts, as the bundle samples.
    """
    inputs = drawing.inputs | {"rewrite": rewrite.digest, "table": table.model_dump(mode="json")}

    def build(folder: Path) -> None:
        found = run_isolated(_find, drawing, table, rewrite, advance=advance).result
        (folder / REPORT).write_text(json.dumps(found, allow_nan=False))

    report: dict[str, Any] = json.loads((cache.get("timesteps", inputs, build) / REPORT).read_text())
    return drawing.sampling.model_copy(update={"schedule": None, "sigmas": tuple(report["sigmas"])}), report


def _find(drawing: Drawing, table: TimestepsTable, rewrite: Rewrite, advance: Advance) -> dict[str, Any]:
    """Runs in a process of its own: the rewritten denoiser, in torch."""
    import torch

    with quiet(), torch.no_grad():
        sampling, (evaluate, noise) = drawing.sampling, bind(drawing, rewrite)
        model = Model(sampling, lambda x, t, _, both: evaluate(x, t, both), from_noise(sampling, noise))
        return search(model, table.method, table.fine_steps, advance)


def bind(drawing: Drawing, rewrite: Rewrite) -> tuple[Evaluate, Array]:
    """The rewritten denoiser, in torch, with the prompts; and initial noise of their seeds."""
    import torch

    pipe = drawing.open()
    Denoiser.of(drawing.original.checkpoint, rewrite).load(pipe.unet)
    shape = drawing.original.image.latent_shape
    draws = [torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed)) for seed in drawing.seeds]
    at_once = max(1, CELLS_AT_ONCE // (shape[1] * shape[2]))
    return _bind(pipe, drawing.prompts, at_once), torch.cat(draws)


def _bind(pipe: Any, prompts: Prompts, at_once: int) -> Evaluate:
    """The denoiser with the prompts, which sees `at_once` images in a call, for its memory's sake."""
    import torch

    parts = [slice(i, i + at_once) for i in range(0, len(prompts), at_once)]
    texts = [[prompt for prompt in prompts[part] if prompt is not None] or None for part in parts]
    bound = [original.bind(pipe, text) for text in texts]

    def evaluate(x: Array, timestep: float, both: bool) -> tuple[Array, Array]:
        outputs = [one(x[part], timestep, both) for one, part in zip(bound, parts, strict=True)]
        cond, uncond = zip(*outputs, strict=True)
        return torch.cat(cond), torch.cat(uncond) if both else None

    return evaluate


def search(model: Model, method: str, fine_steps: int, advance: Advance) -> dict[str, Any]:
    """Find sigmas for the model's sampling; plain JSON: the list, its error, and those of usual schedules beside it.

    Errors are distances of the latents at the end to those of the fine trajectory, which has guidance throughout.
    """
    settings = model.sampling
    fine, guidance = settings.lay(fine_steps), settings.guidance()
    states, denoised = model.run(fine, Guidance(guidance.scale, guidance.rescale))

    def error(schedule: Schedule) -> float:
        return distance(model.run(schedule, guidance)[0][-1] - states[-1])

    def error_of(sigmas: Sigmas) -> float:
        return error(from_sigmas(settings.noise, _listed(settings, sigmas), settings.sampler))

    compared: dict[str, tuple[float, Sigmas]] = {}
    for name in dict.fromkeys((*NAMED, settings.schedule or NAMED[0])):
        with contextlib.suppress(RequestError):  # not for this process, or not with that many steps
            usual = make_schedule(settings.noise, name, settings.steps, settings.sampler)
            if not model.fixed or usual.sigmas[0] == fine.sigmas[0]:
                compared[name] = error(usual), usual.sigmas
    costs = local_errors(settings.sampler, states, denoised, fine.sigmas)
    levels = np.array(fine.sigmas)
    begin = model.late_starts(states, fine)
    paths = []
    for weight in ((1 + levels**2) ** (-power / 2) for power in WEIGHTS):
        paths.append(cheapest_path(begin * weight[:-1], costs * weight, settings.steps))
    listed = [tuple(fine.sigmas[i] for i in path) for path in paths]
    compared["dp"] = min((error_of(sigmas), sigmas) for sigmas in listed)
    if method == "direct":
        least, sigmas = descend(error_of, min(compared.values())[1], fine.sigmas[0], advance, int(model.fixed))
        compared["direct"] = least, sigmas
    chosen = min(compared, key=lambda name: compared[name])  # dynamic programming may not beat a usual list
    least, sigmas = compared[chosen]
    return {
        "method": method, "chosen": chosen, "fine_steps": fine_steps, "error": least,
        "sigmas": list(_listed(settings, sigmas)),
        "timesteps": list(from_sigmas(settings.noise, _listed(settings, sigmas), settings.sampler).timesteps),
        "compared": {name: {"error": found, "sigmas": list(each)} for name, (found, each) in compared.items()},
    }  # fmt: skip


def _listed(sampling: Sampling, levels: Sigmas) -> Sigmas:
    """As a recipe lists them: times of flow matching, where levels are noise over signal."""
    ratio = sampling.noise.prediction == "flow_ratio"
    return tuple(level / (1 + level) for level in levels) if ratio else levels
