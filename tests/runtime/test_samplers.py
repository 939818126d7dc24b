"""Samplers on Gaussian data, where D and the solutions are known exactly; properties of every entry of SAMPLERS."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from slipcast.errors import RequestError
from slipcast.sampling.samplers import SAMPLERS, euler, find_sampler, pndm, sample

MU, C = 0.7, 0.5  # data ~ N(MU, C^2)
DETERMINISTIC = [name for name, s in SAMPLERS.items() if not s.stochastic]
STOCHASTIC = [name for name, s in SAMPLERS.items() if s.stochastic]


def gaussian(x, sigma: float):
    return (C * C * x + sigma * sigma * MU) / (C * C + sigma * sigma)


def exact(x: np.ndarray, s0: float, s: float) -> np.ndarray:
    return MU + (x - MU) * math.sqrt((C * C + s * s) / (C * C + s0 * s0))


def log_grid(n: int, high: float = 10.0, low: float = 0.1) -> list[float]:
    return np.geomspace(high, low, n + 1).tolist()


def even_grid(n: int, high: float = 3.0, low: float = 0.5) -> list[float]:
    return np.linspace(high, low, n + 1).tolist()


def measured_order(run: Callable, grid: Callable[[int], list[float]]) -> float:
    """Slope of log error over log n."""
    x = np.array([1.3, -2.0, 0.4])
    counts, errors = (40, 80, 160, 320), []
    for n in counts:
        sigmas = grid(n)
        *_, last = run(gaussian, x, sigmas)
        errors.append(np.abs(last - exact(x, sigmas[0], sigmas[-1])).max())
    return -float(np.polyfit(np.log(counts), np.log(errors), 1)[0])


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_of_convergence(name: str) -> None:
    """On steps even in log sigma: the variable of the exponential integrators, and a curved one for the others.

    PLMS is no exception: its weights assume even steps in the variable of integration, but it is used on timesteps, of
    which sigma is a curved function, and there it is of order 2, as its paper says.
    """
    order = measured_order(SAMPLERS[name].step if SAMPLERS[name].eta is None else euler, log_grid)
    assert SAMPLERS[name].order - 0.15 <= order <= SAMPLERS[name].order + 0.6


def test_plms_is_of_higher_order_where_its_weights_are_exact() -> None:
    """Even steps in sigma. Its first two steps, of order 2, leave an error of order 3, small beside that of order 4."""
    assert measured_order(pndm, even_grid) >= 2.85


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_ddim_and_all_ode_samplers_find_the_same_solution(name: str) -> None:
    x = np.array([1.3, -2.0, 0.4])
    *_, last = sample(name, gaussian, x, log_grid(400))
    np.testing.assert_allclose(last, exact(x, 10.0, 0.1), atol=0.02)


@pytest.mark.parametrize("name", [n for n in SAMPLERS if SAMPLERS[n].flow])
def test_flow_samplers_solve_the_flow_ode(name: str) -> None:
    """x_t = (1 - t) x0 + t eps with Gaussian data: x_t ~ N((1-t) MU, (1-t)^2 C^2 + t^2), transported monotonically."""

    def law(t: float) -> tuple[float, float]:
        return (1 - t) * MU, math.sqrt((1 - t) ** 2 * C * C + t * t)

    def denoise(x, t: float):
        mean, std = law(t)
        return MU + (1 - t) * C * C / std**2 * (x - mean)

    x = np.array([1.3, -2.0, 0.4])
    errors = []
    for n in (50, 100, 200):
        *_, last = sample(name, denoise, x, np.linspace(1.0, 0.0, n + 1).tolist())
        errors.append(np.abs(last - (MU + C * x)).max())
    assert errors[-1] < 0.02
    assert math.log2(errors[1] / errors[2]) > SAMPLERS[name].order - 0.15


@pytest.mark.parametrize("name", [*(name for name in STOCHASTIC if name != "lcm"), "ddim"])
def test_stochastic_samplers_keep_mean_and_variance(name: str) -> None:
    """100,000 samples: the standard error of the variance is 0.45 %; the rest is the error of 150 steps."""
    generator, count = np.random.default_rng(3), 100_000
    sigmas = log_grid(150, 20.0, 0.02)
    x = MU + math.sqrt(C * C + sigmas[0] ** 2) * generator.standard_normal(count)
    eta = 0.7 if name == "ddim" else None
    *_, last = sample(name, gaussian, x, sigmas, lambda: generator.standard_normal(count), eta)
    assert last.mean() == pytest.approx(MU, abs=0.01)
    assert last.var() == pytest.approx(C * C + sigmas[-1] ** 2, rel=0.06 if SAMPLERS[name].order == 1 else 0.015)


def variance_error(name: str, n: int) -> float:
    """Error of the last x's variance, without sampling: D is linear (MU = 0), so carry the coefficients of all draws.

    The mean would tell nothing: D is a martingale under the SDE, and every sampler has its mean exactly.
    """
    sigmas, draws = log_grid(n), iter(np.eye(1 + SAMPLERS[name].evaluations * n))
    first = math.sqrt(C * C + sigmas[0] ** 2) * next(draws)
    *_, last = sample(name, lambda x, s: C * C / (C * C + s * s) * x, first, sigmas, lambda: next(draws))
    return abs(float(last @ last) - (C * C + sigmas[-1] ** 2))


@pytest.mark.parametrize("name", [name for name in STOCHASTIC if name != "lcm"])
def test_order_of_the_variance_of_stochastic_samplers(name: str) -> None:
    order = math.log2(variance_error(name, 160) / variance_error(name, 320))
    assert SAMPLERS[name].order - 0.15 <= order <= SAMPLERS[name].order + 0.6


def test_lcm_with_a_perfect_consistency_function() -> None:
    """D = the ODE's end: every jump lands on the data's law."""
    generator = np.random.default_rng(3)
    x = MU + math.sqrt(C * C + 100.0) * generator.standard_normal(100_000)
    sigmas = [10.0, 3.0, 1.0, 0.3, 0.0]
    steps = sample("lcm", lambda x, s: exact(x, s, 0.0), x, sigmas, lambda: generator.standard_normal(100_000))
    *_, last = steps
    assert last.mean() == pytest.approx(MU, abs=0.01)
    assert last.var() == pytest.approx(C * C, rel=0.015)


def model(x, sigma: float):
    return gaussian(x, sigma) + 0.1 * math.sin(sigma) * x / (1 + x * x)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("sigmas", [log_grid(7), [*log_grid(6), 0.0], [*log_grid(19), 0.0], [5.0, 0.0], [5.0, 1.0]])
def test_numpy_and_torch_agree_in_every_step(name: str, sigmas: list[float]) -> None:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((2, 3, 4)).astype(np.float32)
    draws = generator.standard_normal((2 * len(sigmas), 2, 3, 4)).astype(np.float32)
    one, two = iter(draws), iter(torch.from_numpy(draws))
    ours = list(sample(name, model, x, sigmas, lambda: next(one)))
    theirs = list(sample(name, model, torch.from_numpy(x), np.array(sigmas), lambda: next(two)))
    assert len(ours) == len(theirs) == len(sigmas) - 1
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == np.float32
        assert b.dtype == torch.float32
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_first_x_is_not_written_to(name: str) -> None:
    x = np.ones((2, 3), np.float32)
    list(sample(name, model, x, [*log_grid(6), 0.0], lambda: np.ones((2, 3), np.float32)))
    assert (x == 1).all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_evaluations_are_as_declared(name: str) -> None:
    calls = []
    list(sample(name, lambda x, s: calls.append(s) or 0 * x, np.ones(3), log_grid(9), lambda: np.zeros(3)))
    assert len(calls) == 9 * SAMPLERS[name].evaluations + (name == "pndm")
    assert all(type(s) is float for s in calls)


def test_dpmpp_sde_draws_from_one_brownian_path() -> None:
    """The noises of the two stages have the covariance of increments that share [s, middle]."""
    generator = np.random.default_rng(1)
    s, t, count = 2.0, 0.5, 100_000
    middle = math.sqrt(s * t)
    inputs = []
    steps = sample(
        "dpmpp_sde", lambda x, sigma: inputs.append(x) or 0 * x, np.zeros(count), [s, t],
        lambda: generator.standard_normal(count),
    )  # fmt: skip
    (last,) = steps
    correlation = np.corrcoef(inputs[1], last)[0, 1]
    assert correlation == pytest.approx(math.sqrt((s - middle) / (s - t)), abs=0.01)
    assert last.std() == pytest.approx(t * math.sqrt(1 - (t / s) ** 2), rel=0.01)


def test_unknown_and_misused_samplers_are_refused() -> None:
    with pytest.raises(RequestError, match="dpmpp_2m"):
        find_sampler("dpm++")
    x = np.ones(3)
    with pytest.raises(RequestError, match="noise"):
        sample("euler_ancestral", model, x, [1.0, 0.0])
    with pytest.raises(RequestError, match="noise"):
        sample("ddim", model, x, [1.0, 0.0], eta=0.5)
    with pytest.raises(RequestError, match="ddim"):
        sample("euler", model, x, [1.0, 0.0], eta=0.5)
    with pytest.raises(RequestError, match="0 to 1"):
        sample("ddim", model, x, [1.0, 0.0], lambda: x, eta=1.5)


def test_ddim_with_full_noise_is_ddpm_and_with_none_is_euler() -> None:
    x, sigmas, draws = np.ones(3), [*log_grid(5), 0.0], list(np.random.default_rng(0).standard_normal((6, 3)))
    one, two = iter(draws), iter(draws)
    ddpm = list(sample("ddpm", model, x, sigmas, lambda: next(one)))
    ddim = list(sample("ddim", model, x, sigmas, lambda: next(two), eta=1.0))
    np.testing.assert_array_equal(ddpm, ddim)
    np.testing.assert_allclose(list(sample("ddim", model, x, sigmas)), list(euler(model, x, sigmas)), rtol=1e-12)
