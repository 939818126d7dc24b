"""What it costs to take features from an earlier step: the error of the latent that the next Euler step arrives at."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from slipcast.bundle.manifest import Sampling
from slipcast.sampling.denoiser import PREDICTIONS
from slipcast.sampling.samplers import sample
from slipcast.sampling.schedules import NoiseProcess
from slipcast_compiler.schedule.reuse import _errors

SHAPE = (1, 2, 4, 4)


class Shallow:
    """An engine that is off by its features."""

    inputs = (SimpleNamespace(name="sample"), SimpleNamespace(name="features"))

    def __call__(self, arrays: dict[str, Any]) -> dict[str, Any]:
        return {"prediction": arrays["sample"] + arrays["features"]}


def _rms(values: Any) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_it_is_the_error_after_the_step(prediction: Any, guidance_scale: float) -> None:
    """Against the sampler, which takes the step with both outputs; the longer the step, the more it costs."""
    sampling = Sampling(
        sampler="euler", schedule="karras", steps=4, guidance_scale=guidance_scale,
        noise=NoiseProcess(prediction=prediction),
    )  # fmt: skip
    caching = SimpleNamespace(features=(SimpleNamespace(name="features"),))
    manifest: Any = SimpleNamespace(sampling=sampling, caching=caching)
    rng, rows = np.random.default_rng(0), 1 if guidance_scale == 1 else 2
    evaluations = []
    for _ in range(4):
        x, features = (rng.standard_normal((rows, *SHAPE[1:])).astype(np.float32) for _ in range(2))
        evaluations.append({"sample": x, "features": features, "prediction": x + features})
    found = _errors(manifest, evaluations, Shallow(), longest=2)  # type: ignore[arg-type]

    def guided(output: Any) -> Any:
        return output if rows == 1 else output[:1] + guidance_scale * (output[1:] - output[:1])

    sigmas = sampling.lay().sigmas
    for i in range(4):
        for j in range(4):
            if not 0 < j - i <= 2:
                assert np.isinf(found[i, j])
                continue
            ends = []
            for given in (evaluations[i]["features"], evaluations[j]["features"]):
                output, start = guided(evaluations[j]["sample"] + given), np.ones(SHAPE)

                def denoise(x: Any, sigma: float, output: Any = output) -> Any:
                    return PREDICTIONS[prediction](x, output, sigma)

                ends.append(next(sample("euler", denoise, start, sigmas[j : j + 2])))
            assert found[i, j] == pytest.approx(_rms(ends[0] - ends[1]), rel=1e-4)


def test_both_branches_cannot_come_from_one() -> None:
    """Where a step begins to guide, an earlier one without guidance has no features for it."""
    sampling = Sampling(
        sampler="euler", schedule="karras", steps=2, guidance_scale=4.0, noise=NoiseProcess(prediction="epsilon")
    )
    caching = SimpleNamespace(features=(SimpleNamespace(name="features"),))
    manifest: Any = SimpleNamespace(sampling=sampling, caching=caching)
    one, two = (
        {name: np.ones((rows, *SHAPE[1:]), np.float32) for name in ("sample", "features", "prediction")}
        for rows in (1, 2)
    )
    assert np.isinf(_errors(manifest, [one, two], Shallow(), 2)).all()  # type: ignore[arg-type]
    assert np.isfinite(_errors(manifest, [two, one], Shallow(), 2)[0, 1])  # type: ignore[arg-type]
