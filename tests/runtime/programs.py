"""A bundle of a captured program whose engines are Python functions: guided, two steps, with a picture if asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from bundles import list_files
from fakes import LENGTH, TOKENIZER, WIDTH, Fakes, engine_files, spec, write_engines
from safetensors.numpy import save_file
from tokenizers import Tokenizer

LATENT = (1, 4, 8, 8)
PICTURE = (1, 3, 16, 16)
COMPONENTS = ("conditioning", "denoiser", "update", "decoder")
TABLE = {"denoiser.timestep": np.array([900, 400], np.float32), "update.sigma": np.array([[0.7], [0.2]], np.float32)}


def components() -> dict[str, Any]:
    """The manifest's record of them."""
    hidden = (1, LENGTH, WIDTH)
    return {
        "conditioning": {
            "inputs": [spec("ids", 1, LENGTH, dtype="int64")], "outputs": [spec("hidden", *hidden)],
        },
        "denoiser": {
            "inputs": [spec("sample", *LATENT), spec("timestep"), spec("context", *hidden), spec("other", *hidden)],
            "outputs": [spec("prediction", *LATENT)],
        },
        "update": {
            "inputs": [spec("sample", *LATENT), spec("prediction", *LATENT), spec("sigma", 1)],
            "outputs": [spec("sample", *LATENT)],
        },
        "decoder": {"inputs": [spec("latent", *LATENT)], "outputs": [spec("image", *PICTURE)]},
    }  # fmt: skip


def prompt_source(value: str, argument: str | None, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "prompt", "value": value, "tokenizer": "tokenizer.json", "field": "input_ids", "argument": argument,
        "shape": [1, LENGTH], **changes,
    }  # fmt: skip


def call(component: str, inputs: dict[str, str], outputs: dict[str, str], row: int | None = None) -> dict[str, Any]:
    return {"component": component, "inputs": inputs, "outputs": outputs, "row": row}


def program(**changes: Any) -> dict[str, Any]:
    """The manifest's `program`; `changes` replace keys of it."""
    calls = [
        call("conditioning", {"ids": "ids"}, {"hidden": "hidden"}),
        call("conditioning", {"ids": "negative"}, {"hidden": "unhidden"}),
    ]
    sample = "noise"
    for row in range(2):
        given = {"sample": sample, "context": "hidden", "other": "unhidden"}
        calls.append(call("denoiser", given, {"prediction": f"eps{row}"}, row))
        given = {"sample": sample, "prediction": f"eps{row}"}
        calls.append(call("update", given, {"sample": (sample := f"x{row}")}, row))
    calls.append(call("decoder", {"latent": sample}, {"image": "image"}))
    return {
        "pipeline": "FakePipeline",
        "arguments": {"prompt": {}, "negative_prompt": {"default": ""}},
        "fixed": {"num_inference_steps": 2, "guidance_scale": 4.5, "height": 16, "tiled": False},
        "sources": [
            prompt_source("ids", "prompt"), prompt_source("negative", "negative_prompt"),
            {"kind": "noise", "value": "noise", "shape": list(LATENT)},
        ],
        "calls": calls, "table": "table.safetensors", "steps": [3, 5], "results": ["image"], "output": "image",
        **changes,
    }  # fmt: skip


def looped(steps: int = 2, **sampling: Any) -> dict[str, Any]:
    """Changes of the manifest with which slipcast's samplers take the steps: components and program."""
    noise = {"prediction": "flow", "num_train_timesteps": 1000}
    settings = {"sampler": "euler", "schedule": "flow", "steps": steps, "guidance_scale": 4.5, "noise": noise}
    given = {"sample": "noise", "context": "hidden", "other": "unhidden"}
    calls, parts = program()["calls"], components()
    del parts["update"]
    loop = {
        "at": 2, "calls": [call("denoiser", given, {"prediction": "eps"})], "sample": "noise", "output": "eps",
        "result": "x", "vp": True, "columns": {"denoiser.timestep": {"of": "timestep", "scale": 1.0, "offset": 0.0}},
        "sampling": settings | sampling, "steps": "num_inference_steps",
    }  # fmt: skip
    changed = program(
        calls=[*calls[:2], call("decoder", {"latent": "x"}, {"image": "image"})],
        loop=loop, steps=[], table=None, fixed={"guidance_scale": 4.5, "height": 16, "tiled": False},
    )  # fmt: skip
    return {"components": parts, "program": changed}


def cached(mask: list[bool], **sampling: Any) -> dict[str, Any]:
    """The same with a feature of the denoiser, which at steps that are not full a shallow one goes on from."""
    changes = looped(len(mask), **sampling)
    parts, loop, feature = changes["components"], changes["program"]["loop"], spec("feature", *LATENT)
    parts["denoiser"]["outputs"].append(feature)
    parts["denoiser_shallow"] = {
        "inputs": [spec("sample", *LATENT), feature], "outputs": [spec("prediction", *LATENT)],
    }  # fmt: skip
    loop["calls"][0]["outputs"]["feature"] = "feature"
    given = {"sample": "noise", "feature": "feature"}
    loop["shallow"] = {
        "call": call("denoiser_shallow", given, {"prediction": "eps"}), "mask": mask, "share": 0.1,
    }  # fmt: skip
    return {**changes, "requires": ["program", "caching"]}


def unguided(steps: int, interval: list[float]) -> dict[str, Any]:
    """As looped, with guidance at these noise levels alone, and a denoiser that reads no negative prompt for others."""
    changes = looped(steps, guidance_interval=interval)
    parts, loop = changes["components"], changes["program"]["loop"]
    parts["denoiser_2"] = {
        "inputs": [each for each in parts["denoiser"]["inputs"] if each["name"] != "other"],
        "outputs": parts["denoiser"]["outputs"],
    }  # fmt: skip
    given = {"sample": "noise", "context": "hidden"}
    loop |= {"unguided": [call("denoiser_2", given, {"prediction": "eps"})], "guidance": "guidance_scale"}
    loop["columns"]["denoiser_2.timestep"] = loop["columns"]["denoiser.timestep"]
    del changes["program"]["fixed"]["guidance_scale"]
    return {**changes, "requires": ["program", "guidance_interval"]}


def together(most: int = 8) -> dict[str, Any]:
    """As looped, with a denoiser that takes several images in a call, of which each has two rows of `context`."""
    changes = looped(3)
    parts = changes["components"]
    hidden = spec("hidden", 2, LENGTH, WIDTH)
    parts["conditioning"]["outputs"] = [hidden]
    sample, shape = spec("sample", "images", *LATENT[1:]), (LENGTH, WIDTH)
    context, other = spec("context", "2*images", *shape), spec("other", "2*images", *shape)
    parts["denoiser"] = {
        "inputs": [sample, spec("timestep"), context, other],
        "outputs": [spec("prediction", "images", *LATENT[1:])],
    }  # fmt: skip
    changes["program"]["sizes"] = {"images": {"minimum": 1, "maximum": most}}
    return changes


def document(root: Path, **changes: Any) -> dict[str, Any]:
    """manifest.json; `changes` replace top-level keys."""
    parts = changes.get("components", components())
    return {
        "schema_version": "1.0", "requires": ["program"], "slipcast_version": "0.1.0", "name": "captured",
        "base_model": "tests/captured", "source_sha256": "0" * 64, "family": None, "components": parts,
        "program": program(),
        "targets": [
            {
                "engine": "onnxruntime", "device": "cpu", "precision": "fp32",
                "components": {name: engine_files("onnxruntime", name) for name in parts},
            }
        ],
        "files": list_files(root),
        **changes,
    }  # fmt: skip


def write_tokenizer(path: Path) -> None:
    """With padding and truncation to LENGTH, as a pipeline sets them."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH, pad_id=655, pad_token="<|endoftext|>")
    tokenizer.save(str(path))


def write_program(root: Path, table: Mapping[str, Any] = TABLE, **changes: Any) -> Path:
    """The bundle at `root`; `changes` replace top-level keys of the manifest."""
    root.mkdir(parents=True)
    write_tokenizer(root / "tokenizer.json")
    save_file(dict(table), root / "table.safetensors")
    for name in changes.get("components", COMPONENTS):
        write_engines(root, name)
    (root / "manifest.json").write_text(json.dumps(document(root, **changes)))
    return root


def condition(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {"hidden": np.sin(arrays["ids"][..., None] * np.arange(1, WIDTH + 1)).astype(np.float32)}


def predict(arrays: Mapping[str, Any]) -> dict[str, Any]:
    by_text = arrays["context"].mean() - arrays["other"].mean()
    feature = np.full_like(arrays["sample"], by_text + arrays["timestep"] / 1e4)
    return {"prediction": (0.8 * arrays["sample"] + feature).astype(np.float32), "feature": feature}


def predict_shallow(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {"prediction": (0.8 * arrays["sample"] + arrays["feature"]).astype(np.float32)}


def condition_twice(arrays: Mapping[str, Any]) -> dict[str, Any]:
    hidden = condition(arrays)["hidden"]
    return {"hidden": np.concatenate([hidden, hidden[:, ::-1] ** 2])}


def predict_together(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Of each image by its own rows."""
    images = len(arrays["sample"])
    one, two = (arrays[name].reshape(images, 2, LENGTH, WIDTH) for name in ("context", "other"))
    by_text = (one[:, 0] - 0.5 * one[:, 1] * two[:, 0] + two[:, 1]).mean((1, 2))[:, None, None, None]
    return {"prediction": (0.8 * arrays["sample"] + by_text + arrays["timestep"] / 1e4).astype(np.float32)}


def update(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {"sample": arrays["sample"] - arrays["sigma"] * arrays["prediction"]}


def decode(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {"image": np.repeat(np.repeat(arrays["latent"][:, :3] / 4 + 0.5, 2, 2), 2, 3)}


def use(fakes: Fakes) -> Fakes:
    """Fake engines that know these components."""
    fakes.functions |= {
        "conditioning": condition,
        "denoiser": predict,
        "denoiser_shallow": predict_shallow,
        "denoiser_2": lambda given: predict({**given, "other": given["context"]}),
        "update": update,
        "decoder": decode,
    }
    return fakes


def expected(ids: Any, negative: Any, noise: Any) -> Any:
    """What the program makes of tokens and noise, in the units of `output_type="np"`."""
    hidden, unhidden = condition({"ids": ids})["hidden"], condition({"ids": negative})["hidden"]
    x = noise
    for row in range(2):
        timestep, sigma = TABLE["denoiser.timestep"][row], TABLE["update.sigma"][row]
        given = {"sample": x, "context": hidden, "other": unhidden, "timestep": timestep}
        x = update({"sample": x, "sigma": sigma} | predict(given))["sample"]
    return np.clip(decode({"latent": x})["image"], 0, 1).transpose(0, 2, 3, 1)
