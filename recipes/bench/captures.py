"""Capture pipelines at their published sizes from configs alone, and measure what that takes.

    python recipes/bench/captures.py -o recipes/bench/captures/published.json

What `slipcast capture` does is measured, imports and all, on directories that have the configs of the published
checkpoints and no weights; tokenizers are small ones, which decide nothing but ids. Each pipeline is captured in a
process of its own. Numbers of parameters are counted.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from slipcast.progress import Advance
from slipcast_compiler.host.isolate import run_isolated
from slipcast_compiler.host.machine import this_machine

WORDS = ("a", "picture", "of", "small", "thing", "large", "red", "blue", "system", "user", "assistant")


def tokenizer(length: int) -> Any:
    """A word is a token; a chat's messages are joined."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    made = PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=length, **special)
    made.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return made


def clip(width: int, layers: int, heads: int, projection: int | None = None) -> Any:
    """OpenAI's large CLIP text encoder, or OpenCLIP's bigG."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=projection or width,
        eos_token_id=1,
        bos_token_id=0,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5() -> Any:
    """T5's XXL encoder, version 1.1."""
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    return T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu"))


def autoencoder(channels: int, **other: Any) -> Any:
    """Of Stable Diffusion's shape."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        **other,
    )


def sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
    )
    return StableDiffusionXLPipeline(
        vae=autoencoder(4),
        text_encoder=clip(768, 12, 12),
        text_encoder_2=clip(1280, 32, 20, 1280),
        tokenizer=tokenizer(77),
        tokenizer_2=tokenizer(77),
        unet=unet,
        scheduler=EulerDiscreteScheduler(steps_offset=1),
    )


def sd35_large() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=128,
        num_layers=38,
        num_attention_heads=38,
        in_channels=16,
        out_channels=16,
        joint_attention_dim=4096,
        caption_projection_dim=2432,
        pos_embed_max_size=192,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609),
        text_encoder=clip(768, 12, 12, 768),
        text_encoder_2=clip(1280, 32, 20, 1280),
        text_encoder_3=t5(),
        tokenizer=tokenizer(77),
        tokenizer_2=tokenizer(77),
        tokenizer_3=tokenizer(512),
    )


def flux1_dev() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    return FluxPipeline(
        transformer=FluxTransformer2DModel(guidance_embeds=True),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159),
        text_encoder=clip(768, 12, 12),
        tokenizer=tokenizer(77),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(512),
    )


def flux2_klein_4b() -> Any:
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import Qwen3Config, Qwen3ForCausalLM

    transformer = Flux2Transformer2DModel(
        num_layers=5,
        num_single_layers=20,
        num_attention_heads=24,
        joint_attention_dim=7680,
        guidance_embeds=False,
    )
    return Flux2KleinPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=AutoencoderKLFlux2(),
        text_encoder=Qwen3ForCausalLM(qwen3_4b(Qwen3Config)),
        tokenizer=tokenizer(512),
        is_distilled=True,
    )


def qwen3_4b(config: Any) -> Any:
    """The language model that several pipelines read text with."""
    return config(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=True,
    )


def z_image() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    return ZImagePipeline(
        transformer=ZImageTransformer2DModel(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159),
        text_encoder=Qwen3Model(qwen3_4b(Qwen3Config)),
        tokenizer=tokenizer(512),
    )


def qwen_image() -> Any:
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]},
    }
    return QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(guidance_embeds=False),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLQwenImage(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text)),
        tokenizer=tokenizer(1024),
    )


def wan22_a14b() -> Any:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    text = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 256384}
    return WanPipeline(
        transformer=WanTransformer3DModel(),
        transformer_2=WanTransformer3DModel(),
        boundary_ratio=0.875,
        vae=AutoencoderKLWan(),
        text_encoder=UMT5EncoderModel(UMT5Config(**text, feed_forward_proj="gated-gelu")),
        tokenizer=tokenizer(512),
        scheduler=UniPCMultistepScheduler(flow_shift=3.0, prediction_type="flow_prediction", use_flow_sigmas=True),
    )


# name -> the pipeline and its call
PIPELINES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "SDXL": (sdxl, {"height": 1024, "width": 1024}),
    "SD3.5 Large": (sd35_large, {"height": 1024, "width": 1024}),
    "FLUX.1-dev": (flux1_dev, {"height": 1024, "width": 1024}),
    "FLUX.2-klein-4B": (flux2_klein_4b, {"height": 1024, "width": 1024, "num_inference_steps": 4}),
    "Z-Image": (z_image, {"height": 1024, "width": 1024}),
    "Qwen-Image": (qwen_image, {"height": 1024, "width": 1024, "negative_prompt": "", "true_cfg_scale": 4.0}),
    "Wan 2.2 A14B": (wan22_a14b, {"height": 480, "width": 832, "num_frames": 17, "num_inference_steps": 6}),
}


def save_configs(pipe: Any, folder: Path) -> None:
    """The directory of a checkpoint, but for its weights."""
    pipe.save_config(folder)
    for name, part in pipe.components.items():
        if hasattr(part, "save_config"):  # diffusers' modules and schedulers
            part.save_config(folder / name)
        elif part is not None:
            getattr(part, "config", part).save_pretrained(folder / name)


def measure(name: str, folder: Path, _: Advance) -> dict[str, Any]:
    """Runs in a process of its own: what `slipcast capture` finds, and the seconds that it took with its imports."""
    overrides = [f"{key}={json.dumps(value)}" for key, value in PIPELINES[name][1].items()]
    begin = time.perf_counter()
    from slipcast_compiler.capture.run import capture_model

    summary = capture_model(folder, None, overrides, check=False)
    return {"seconds": round(time.perf_counter() - begin, 1), "summary": summary}


def make(name: str, folder: Path, _: Advance) -> int:
    """Writes the configs; the number of parameters."""
    from slipcast_compiler.capture.open import without_weights
    from slipcast_compiler.host.quiet import quiet

    with quiet(), without_weights():
        pipe = PIPELINES[name][0]()
        save_configs(pipe, folder)
    modules = [component for component in pipe.components.values() if hasattr(component, "parameters")]
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(PIPELINES))
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    found = {}
    for name in given.names:
        with TemporaryDirectory() as folder:
            parameters = run_isolated(make, name, Path(folder)).result
            isolated = run_isolated(measure, name, Path(folder))
        peak = round(isolated.peak_memory_mb, 1)
        found[name] = isolated.result | {"parameters": parameters, "peak_memory_mb": peak}
        loop = found[name]["summary"]["loop"]
        phases = [(phase["steps"], phase["calls"], phase["guidance"]) for phase in loop["phases"]] if loop else None
        print(
            f"{name}: {found[name]['parameters'] / 1e9:.1f} G parameters, {found[name]['seconds']} s, "
            f"{found[name]['peak_memory_mb']} MB, {found[name]['summary']['glue']} operators, {phases}, "
            f"refused: {found[name]['summary']['refused']}",
            flush=True,
        )
    if given.output:
        document = {
            "command": f"python recipes/bench/captures.py -o {given.output}",
            "machine": this_machine().model_dump(),
            "pipelines": found,
        }
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(document, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
