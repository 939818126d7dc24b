"""What a dry run promises: that every component of a checkpoint can be exported and fits the others, or else why not.

Configs are looked at for what changes how a model is called; then each model is built and run on torch's meta device,
which computes shapes and reads no weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from slipcast.errors import RecipeError, SlipcastError
from slipcast_compiler.host.quiet import quiet
from slipcast_compiler.model.checkpoint import Checkpoint, empty_module, find_weight
from slipcast_compiler.model.original import Original

# Keys of a denoiser's config that give it more inputs than a sample, a timestep and a prompt; any value but these.
_MORE_INPUTS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "class_embed_type": ("it is conditioned on a class", (None,)),
    "num_class_embeds": ("it is conditioned on a class", (None,)),
    "addition_embed_type": ("it takes an added condition", (None,)),
    "encoder_hid_dim": ("it projects what the text encoder gives", (None,)),
    "encoder_hid_dim_type": ("it projects what the text encoder gives", (None,)),
    "time_cond_proj_dim": ("it takes the guidance scale as an input", (None,)),
}
# Example sizes of dimensions that are free when a bundle runs. Two rows, as guidance has: torch refuses to normalise
# groups of a single value, which a small picture leaves on the last level.
_FREE = {"batch": 2, "tile_height": 16, "tile_width": 16}
_NOT_DECODED = ("encoder.", "quant_conv.")  # of an autoencoder: a picture needs neither


def check_configs(checkpoint: Checkpoint) -> None:
    """RecipeError for a config that says that a component is called otherwise than its architecture has it."""
    components = checkpoint.architecture.components
    folder = components["denoiser"].folder
    denoiser = checkpoint.config(folder)
    for key, (why, fine) in _MORE_INPUTS.items():
        if denoiser.get(key) not in fine:
            raise _unfit(checkpoint, folder, key, why, "null", denoiser[key])
    _check_types(checkpoint, folder, denoiser)
    channels, out = denoiser.get("in_channels"), denoiser.get("out_channels")
    latent = channels
    if "vae_decoder" in components:
        decoder = checkpoint.config("vae")
        levels = decoder.get("block_out_channels")
        if not isinstance(levels, (list, tuple)):
            why = "its pixels per latent cell follow from it"
            raise _unfit(checkpoint, "vae", "block_out_channels", why, "a list of channels", levels)
        latent = decoder.get("latent_channels")
        if not decoder.get("scaling_factor"):
            why = "latents are divided by it"
            raise _unfit(checkpoint, "vae", "scaling_factor", why, "a number that is not 0", decoder["scaling_factor"])
    if channels != latent:
        why = "it takes more than latents, as models for inpainting or depth do"
        raise _unfit(checkpoint, folder, "in_channels", why, latent, channels)
    if out != channels:
        why = "it predicts more than noise, such as a learned variance"
        raise _unfit(checkpoint, folder, "out_channels", why, channels, out)
    width = denoiser.get("cross_attention_dim")
    if checkpoint.architecture.text and not isinstance(width, int):
        raise _unfit(checkpoint, folder, "cross_attention_dim", "its blocks take texts of their own", "a number", width)


def _check_types(checkpoint: Checkpoint, folder: str, denoiser: dict[str, Any]) -> None:
    """RecipeError where a size is of another type than diffusers writes."""
    size, levels = denoiser.get("sample_size"), denoiser.get("block_out_channels")
    sides = size if isinstance(size, (list, tuple)) and len(size) == 2 else [size]
    if size is not None and not all(isinstance(side, int) and side > 0 for side in sides):
        raise _unfit(checkpoint, folder, "sample_size", "it is no size", "a number or two", size)
    if not isinstance(levels, (list, tuple)) or not all(isinstance(level, int) and level > 0 for level in levels):
        raise _unfit(checkpoint, folder, "block_out_channels", "it is no list of channels", "numbers", levels)


def check_tokenizers(original: Original) -> None:
    """RecipeError where a tokenizer gives what its text encoder cannot take."""
    checkpoint, architecture = original.checkpoint, original.checkpoint.architecture
    for text in architecture.text:
        tokenizer = original.tokenizers[text.tokenizer]
        encoder = checkpoint.config(architecture.components[text.component].folder)
        positions, words = int(encoder["max_position_embeddings"]), int(encoder["vocab_size"])
        if tokenizer.length > positions:
            raise RecipeError(
                f"{checkpoint.name}/{text.tokenizer}/tokenizer_config.json: model_max_length: diffusers pads prompts "
                "to it, and the text encoder has fewer positions",
                expected=f"{positions} or less", got=f"{tokenizer.length:g}", hint="write it there",
            )  # fmt: skip
        largest = max(_token_ids(tokenizer.data), default=0)
        if largest >= words:
            raise RecipeError(
                f"{checkpoint.name}/{text.tokenizer}: it gives tokens that the text encoder has no embedding for",
                expected=f"ids below vocab_size = {words}", got=largest,
                hint="the tokenizer is of another model, or its added tokens were not trained",
            )  # fmt: skip


def _token_ids(data: bytes) -> list[int]:
    document = json.loads(data)
    vocabulary = document["model"]["vocab"]
    known = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
    return known + [int(token["id"]) for token in document.get("added_tokens", [])]


def check_components(original: Original) -> None:
    """RecipeError where a component cannot be built and run, ArtifactError where its weights are not those of it."""
    expected: dict[str, Callable[[tuple[int, ...]], bool]] = {
        "text_encoder": lambda shape: (
            shape == (_FREE["batch"], original.sizes["text_length"], original.sizes["text_width"])
        ),
        "denoiser": lambda shape: shape == (_FREE["batch"], *original.image.latent_shape),
        "vae_decoder": lambda shape: (
            shape[1] in (1, 3) and shape[2:] == (16 * original.image.factor, 16 * original.image.factor)
        ),
    }
    for name in original.checkpoint.architecture.components:
        _check_component(original, name, expected[name])


def _check_component(original: Original, name: str, fits: Callable[[tuple[int, ...]], bool]) -> None:
    import torch

    checkpoint, source = original.checkpoint, original.checkpoint.architecture.components[name]
    try:
        with quiet(), torch.no_grad():
            module = empty_module(checkpoint, source.folder)
            parameters = {key: tuple(each.shape) for key, each in module.named_parameters()}
            shapes = [
                tuple(
                    size if isinstance(size, int) else original.sizes.get(size) or _FREE[size] for size in given.shape
                )
                for given in source.inputs
            ]
            examples = [
                torch.zeros(shape, dtype=getattr(torch, given.dtype), device="meta")
                for shape, given in zip(shapes, source.inputs, strict=True)
            ]
            made = tuple(source.call(module.to("meta"), *examples).shape)
    except SlipcastError:
        raise
    except Exception as error:  # whatever a model makes of such inputs
        raise RecipeError(
            f"{checkpoint.name}/{source.folder}: it cannot be compiled as the {name} of this pipeline",
            expected=", ".join(f"{given.name} {given.shape}" for given in source.inputs),
            got=f"{type(error).__name__}: {error}".splitlines()[0][:500],
        ) from error  # fmt: skip
    if not fits(made):
        raise RecipeError(
            f"{checkpoint.name}/{source.folder}: as the {name} of this pipeline it gives another shape",
            expected="one that the other components take", got=list(made),
        )  # fmt: skip
    _check_tensors(checkpoint, source.folder, parameters)


def _check_tensors(checkpoint: Checkpoint, folder: str, parameters: dict[str, tuple[int, ...]]) -> None:
    weights = checkpoint.weights(folder)
    where = f"{checkpoint.name}/{folder}"
    for name, shape in parameters.items():
        weight = find_weight(name, weights)
        if weight is None and folder == "vae" and name.startswith(_NOT_DECODED):
            continue
        got = f"{len(weights)} tensors under other names" if weight is None else list(weight.entry.shape)
        if weight is None or math.prod(weight.entry.shape) != math.prod(shape):
            raise RecipeError(
                f"{where}: {'no' if weight is None else 'another shape of the'} tensor for parameter {name}",
                expected=list(shape), got=got,
                hint=f"config.json and {', '.join(f.name for f in checkpoint.weight_files(folder))} do not go together",
            )  # fmt: skip


def _unfit(checkpoint: Checkpoint, folder: str, key: str, why: str, expected: Any, got: Any) -> RecipeError:
    return RecipeError(
        f"{checkpoint.name}/{folder}/config.json: {key}: {why}, which cannot be compiled yet",
        expected=expected, got=repr(got)[:200],
    )  # fmt: skip
