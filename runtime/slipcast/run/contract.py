"""What the pipeline feeds its components and reads from them, against what the manifest says they take and give."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from slipcast.bundle.manifest import FALLBACK, SHALLOW, GuardRecord, Manifest, TensorSpec
from slipcast.errors import ArtifactError

Wanted = Mapping[str, tuple[str, tuple[int | None, ...] | None]]
"""dtype and shape by name; None: any dimension, or any shape."""


def check_contract(manifest: Manifest) -> None:
    """ArtifactError where a call could only fail at its first step: a manifest whose parts do not go together."""
    image = manifest.image
    latent = ("float32", (None, image.channels, image.height // image.factor, image.width // image.factor))
    conditioning: Wanted = {name: ("float32", None) for text in manifest.text for name in text.outputs.values()}
    if manifest.prompts:
        rows = _wanted(manifest.prompts.outputs)
        conditioning = {name: (dtype, (None, *shape)) for name, (dtype, shape) in rows.items()}
    fed: Wanted = {"sample": latent, "timestep": ("float32", (1,)), **conditioning}
    fed_denoiser = _fed_when_cut(manifest, fed) if manifest.cut else fed
    features = _wanted(manifest.caching.features) if manifest.caching else {}
    _compare(manifest, "denoiser", fed_denoiser, {"prediction": latent, **features})
    if manifest.caching:
        shallow = manifest.components[SHALLOW]
        taken = {"sample", *features, *(spec.name for spec in shallow.inputs)}
        fed_shallow = {name: wanted for name, wanted in {**fed_denoiser, **features}.items() if name in taken}
        _compare(manifest, SHALLOW, fed_shallow, {"prediction": latent})
    if FALLBACK in manifest.components:
        _compare(manifest, FALLBACK, fed, {"prediction": latent})
    for text in manifest.text:
        inputs: Wanted = {"input_ids": ("int64", (None, text.max_length))}
        _compare(manifest, text.component, inputs, dict.fromkeys(text.outputs, ("float32", None)))
    if manifest.guard:
        _check_guard(manifest, manifest.guard)
    if "vae_decoder" in manifest.components:
        tile = ("float32", (None, image.channels, None, None))
        _compare(manifest, "vae_decoder", {"latent": tile}, {"image": ("float32", (None, None, None, None))})


def _fed_when_cut(manifest: Manifest, fed: Wanted) -> Wanted:
    """What the denoiser takes of what there is: the pipeline's inputs, and what is computed of them beforehand."""
    assert manifest.cut
    ready = {**fed, **_wanted(manifest.cut.rows)}
    if prompt := manifest.components.get("denoiser_prompt"):
        inputs = {spec.name for spec in prompt.inputs}
        _compare(
            manifest, "denoiser_prompt", {k: v for k, v in fed.items() if k in inputs - {"sample", "timestep"}}, {}
        )
        ready |= _wanted(prompt.outputs)
    if "denoiser_step" in manifest.components:
        _compare(manifest, "denoiser_step", {"timestep": fed["timestep"]}, _wanted(manifest.cut.rows))
    taken = {"sample", *(spec.name for spec in manifest.components["denoiser"].inputs)}
    return {name: wanted for name, wanted in ready.items() if name in taken}


def _check_guard(manifest: Manifest, guard: GuardRecord) -> None:
    """Its embeddings are as wide as what the encoders give, joined, and there is one of each token."""
    shapes = [
        spec.shape
        for text in manifest.text
        for spec in manifest.components[text.component].outputs
        if text.outputs.get(spec.name) == guard.input
    ]
    if any(len(shape) != 3 for shape in shapes):
        raise _refuse(f"guard.input: {guard.input}", "an embedding of each token", f"shapes {shapes}")
    width = sum(shape[-1] for shape in shapes if isinstance(shape[-1], int))
    if width and width != guard.shape[1]:
        raise _refuse("guard.shape", f"embeddings {width} wide", str(guard.shape[1]))


def _wanted(specs: Iterable[TensorSpec]) -> dict[str, tuple[str, tuple[int | None, ...]]]:
    return {spec.name: (spec.dtype, tuple(d if isinstance(d, int) else None for d in spec.shape)) for spec in specs}


def _compare(manifest: Manifest, name: str, inputs: Wanted, outputs: Wanted) -> None:
    """Every input has to be fed; an output may go unused."""
    component = {str(key): value for key, value in manifest.components.items()}.get(name)
    if component is None:
        raise _refuse(f"components.{name}", "a component that a text input names", "none")
    if (got := {spec.name for spec in component.inputs}) != set(inputs):
        raise _refuse(f"components.{name}.inputs", _names(inputs), _names(got))
    if not (got := {spec.name for spec in component.outputs}) >= set(outputs):
        raise _refuse(f"components.{name}.outputs", _names(outputs), _names(got))
    for specs, wanted in ((component.inputs, inputs), (component.outputs, outputs)):
        for spec in specs:
            if spec.name in wanted and not _fits(spec, *wanted[spec.name]):
                dtype, shape = wanted[spec.name]
                expected = dtype + ("" if shape is None else f"[{', '.join(str(d or '?') for d in shape)}]")
                got_shape = ", ".join(map(str, spec.shape))
                raise _refuse(f"components.{name}: {spec.name}", expected, f"{spec.dtype}[{got_shape}]")


def _fits(spec: TensorSpec, dtype: str, shape: tuple[int | None, ...] | None) -> bool:
    if spec.dtype != dtype or shape is None:
        return spec.dtype == dtype
    return len(spec.shape) == len(shape) and all(
        want is None or isinstance(have, str) or have == want for have, want in zip(spec.shape, shape, strict=True)
    )


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _refuse(where: str, expected: str, got: str) -> ArtifactError:
    return ArtifactError(
        f"manifest.json: {where} does not fit the rest", expected=expected, got=got, hint="compile the bundle again"
    )
