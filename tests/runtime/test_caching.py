"""Feature caching in the pipeline: which engine runs at which step, and whose features it is given."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
from bundles import list_files
from fakes import Fakes, spec, write_fake

import slipcast.run.loop
from slipcast.bundle.manifest import Caching, TensorSpec
from slipcast.cli.inspect import caching_lines
from slipcast.errors import ArtifactError
from slipcast.run.caching import Features
from slipcast.run.pipeline import Pipeline, load

PROMPT, STEPS = "a red circle", 6
MASK = (True, False, False, True, False, False)
FEATURE = spec("deep", "b", *fakes.LATENT)


def _cached(root: Path, mask: Sequence[bool] = MASK, sampling: Mapping[str, Any] | None = None, **caching: Any) -> Path:
    """The fake bundle with its denoiser in two: the feature is what it makes of the latent and the prompt."""
    write_fake(root)
    document = json.loads((root / "manifest.json").read_text())
    document["sampling"] |= sampling or {}
    components = document["components"]
    components["denoiser"]["outputs"].append(FEATURE)
    shallow = [components["denoiser"]["inputs"][0], spec("timestep", 1), FEATURE]
    components["denoiser_shallow"] = {"inputs": shallow, "outputs": components["denoiser"]["outputs"][:1]}
    fakes.write_engines(root, "denoiser_shallow")
    for target in document["targets"]:
        target["components"]["denoiser_shallow"] = fakes.engine_files(target["engine"], "denoiser_shallow")
    asked = {name for name in ("guidance_interval", "guidance_reuse") if document["sampling"].get(name)}
    if threshold := document["sampling"].pop("early_exit", None):
        asked.add("early_exit")
        for target in document["targets"]:
            target["early_exit"] = threshold
    document |= {
        "caching": {"features": [FEATURE], "mask": list(mask), "share": 0.25} | caching,
        "requires": ["caching", *sorted(asked)], "files": list_files(root),
    }  # fmt: skip
    (root / "manifest.json").write_text(json.dumps(document))
    return root


def _deep(arrays: Mapping[str, Any]) -> Any:
    context = arrays["context"].mean((1, 2))[:, None, None, None]
    return np.tanh(arrays["sample"][:, ::-1] + context).astype(np.float32)


def _shallow(arrays: Mapping[str, Any]) -> dict[str, Any]:
    assert set(arrays) == {"sample", "timestep", "deep"}
    x = arrays["sample"]
    return {"prediction": (0.8 * x + 0.3 * arrays["deep"] + arrays["timestep"][0] / 1e4).astype(x.dtype)}


def _full(arrays: Mapping[str, Any]) -> dict[str, Any]:
    known = {"sample": arrays["sample"], "timestep": arrays["timestep"], "deep": _deep(arrays)}
    return _shallow(known) | {"deep": known["deep"]}


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    installed = fakes.install(monkeypatch)
    installed.functions |= {"denoiser": _full, "denoiser_shallow": _shallow}
    return installed


def _draw(pipe: Pipeline, seeds: list[int], **request: Any) -> Any:
    return pipe([PROMPT, "a blue star", "a ring"][: len(seeds)], seed=seeds, output_type="latent", **request).images


def _steps(engines: Fakes) -> str:
    """F for every call of the full denoiser, S for the shallow one's."""
    kinds = {"denoiser": "F", "denoiser_shallow": "S"}
    return "".join(kinds[name] for name, _ in engines.calls if name in kinds)


def test_full_and_shallow_steps_are_the_masks(tmp_path: Path, engines: Fakes) -> None:
    pipe = load(_cached(tmp_path / "b"))
    images = _draw(pipe, [3])
    assert _steps(engines) == "FSSFSS"
    plain = load(_cached(tmp_path / "plain", (True,) * STEPS))
    assert np.abs(images - _draw(plain, [3])).max() > 1e-3  # features of another step are others


def test_full_steps_alone_make_the_plain_bundles_pictures(tmp_path: Path, engines: Fakes) -> None:
    cached, plain = load(_cached(tmp_path / "b", (True,) * STEPS)), load(write_fake(tmp_path / "plain"))
    np.testing.assert_array_equal(_draw(cached, [3, 4]), _draw(plain, [3, 4]))


def test_features_are_those_of_the_last_full_step(tmp_path: Path, engines: Fakes) -> None:
    _draw(load(_cached(tmp_path / "b")), [3, 4])
    last = None
    for name, call in engines.calls:
        if name == "denoiser":
            last = _deep(vars(call))
        elif name == "denoiser_shallow":
            np.testing.assert_array_equal(call.deep, last)


def test_other_steps_are_all_full(tmp_path: Path, engines: Fakes) -> None:
    _draw(load(_cached(tmp_path / "b")), [3], num_inference_steps=7)
    assert _steps(engines) == "F" * 7


def test_one_branch_has_no_use_for_the_others_features(tmp_path: Path, engines: Fakes) -> None:
    """Guidance begins at the third step, where the mask has a shallow one."""
    plain = load(write_fake(tmp_path / "plain"))
    sigmas = plain.manifest.sampling.lay().sigmas
    guided = {"guidance_interval": [sigmas[3], sigmas[2]]}
    pipe = load(_cached(tmp_path / "b", (True, False, False, False, False, False), guided))
    _draw(pipe, [3])
    assert _steps(engines) == "FSFSSS"
    rows = [len(call.sample) for name, call in engines.calls if name.startswith("denoiser")]
    assert rows == [1, 1, 2, 2, 1, 1]
    both, alone = ([call for name, call in engines.calls if name.startswith("denoiser")][i] for i in (3, 4))
    np.testing.assert_array_equal(alone.deep, both.deep[1:])


@pytest.mark.parametrize("at_once", [1, 2, 3])
@pytest.mark.parametrize(
    "sampling",
    [
        {}, {"guidance_interval": [0.5, 8.0]}, {"guidance_reuse": 1}, {"early_exit": 0.5},
        {"sampler": "euler_ancestral", "guidance_interval": [0.5, 8.0], "early_exit": 0.7},
    ],
    ids=str,
)  # fmt: skip
def test_each_image_is_what_it_would_be_alone(
    tmp_path: Path, engines: Fakes, monkeypatch: pytest.MonkeyPatch, sampling: dict[str, Any], at_once: int
) -> None:
    monkeypatch.setattr(slipcast.run.loop, "ATTENTION_BYTES", at_once * 2 * 8 * 4 * fakes.SIZE**4)
    pipe = load(_cached(tmp_path / "b", sampling=sampling))
    together = pipe(prompts := [PROMPT, "a blue star", "a ring"], seed=3, output_type="latent")
    assert ("early_exit" in sampling) == (min(together.steps) < STEPS)
    assert ("sampler" in sampling) == (len(set(together.steps)) > 1)  # one leaves before the others
    for i, prompt in enumerate(prompts):
        alone = pipe(prompt, seed=3 + i, output_type="latent").images
        np.testing.assert_array_equal(alone[0], together.images[i])


def test_features_are_kept_by_image_and_branch() -> None:
    deep = TensorSpec(name="deep", dtype="float32", shape=("b", 2))
    kept = Features(Caching(features=(deep,), mask=(True, False, False), share=0.5), images=3)
    rows = np.arange(12, dtype=np.float32).reshape(6, 2)  # unconditional rows of images 0 to 2, then conditional ones
    assert kept.begin(both=True)
    for images in (np.array([0, 2]), np.array([1])):
        chosen = [*images, *(3 + images)]
        kept.keep(images, {"deep": rows[chosen], "prediction": rows[chosen]})
    assert not kept.begin(both=True)
    np.testing.assert_array_equal(kept.of(np.array([1, 2]), both=True)["deep"], rows[[1, 2, 4, 5]])
    np.testing.assert_array_equal(kept.of(np.array([2, 0]), both=False)["deep"], rows[[5, 3]])
    assert kept.of(np.array([1, 2]), both=True)["deep"] is kept.of(np.array([1, 2]), both=True)["deep"]
    assert not kept.begin(both=False)
    assert kept.begin(both=False)  # beyond the mask


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"requires": []}, "caching has to be named under requires"),
        ({"caching": {"features": [FEATURE], "mask": [False] * STEPS, "share": 0.2}}, "it has to be full"),
        ({"caching": {"features": [FEATURE], "mask": [True] * 5, "share": 0.2}}, "is for 5 steps"),
        ({"caching": None, "requires": []}, "denoiser_shallow belongs to caching"),
        ({"caching": {"features": [spec("high", "b", 1)], "mask": list(MASK), "share": 0.2}}, "denoiser.outputs"),
        ({"caching": {"features": [spec("deep", "b", 1)], "mask": list(MASK), "share": 0.2}}, "denoiser: deep"),
    ],
)
def test_a_manifest_whose_parts_do_not_fit(tmp_path: Path, engines: Fakes, changes: dict[str, Any], says: str) -> None:
    root = _cached(tmp_path / "b")
    document = json.loads((root / "manifest.json").read_text()) | changes
    (root / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=says):
        load(root)


def test_inspect_tells_the_mask(tmp_path: Path, engines: Fakes) -> None:
    manifest = load(_cached(tmp_path / "b")).manifest
    assert manifest.caching and manifest.caching.full_steps == 2
    lines = "\n".join(caching_lines(manifest))
    assert "2 of 6 steps in full: FssFss" in lines and "deep float32[b, 4, 8, 8]" in lines and "25.0%" in lines
    assert caching_lines(load(write_fake(tmp_path / "plain")).manifest) == []
