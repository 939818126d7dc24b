"""Components of tiny pipelines: tokenizers that are made here, text encoders, autoencoders and U-Nets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CLIP = Path(__file__).parents[3] / "recipes" / "models" / "shapes" / "tokenizer"
WORDS = (
    "a", "an", "the", "of", "on", "large", "small", "red", "blue", "circle", "star", "white", "black", "background",
    "system", "user", "assistant", "image", "describe",
)  # fmt: skip
CHAT = (
    "{% for message in messages %}{{ message['role'] }} {% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %} {% endfor %}"
)
# transformer configs of Qwen's, with the rotary sections that their vision models have
QWEN = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}


def clip_tokenizer(length: int = 32) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(CLIP, model_max_length=length)


def word_tokenizer(length: int = 16, kind: Any = None) -> Any:
    """In place of T5's and others': a word is a token, and a chat is its roles and texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    special["additional_special_tokens"] = ["<|image_pad|>"]
    made = (kind or PreTrainedTokenizerFast)(tokenizer_object=raw, model_max_length=length, **special)
    made.chat_template = CHAT
    return made


def clip_text(width: int = 32, projection: int | None = None, length: int = 32) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=1024, hidden_size=width, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2,
        max_position_embeddings=length, projection_dim=projection or width, eos_token_id=1, bos_token_id=0,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5_text(width: int = 32) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=64, d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4))


def umt5_text() -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(UMT5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4))


def gemma2_text(width: int = 32) -> Any:
    from transformers import Gemma2Config, Gemma2Model

    sizes = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    return Gemma2Model(Gemma2Config(vocab_size=64, **sizes, **HEADS))


def qwen3_text(whole: bool = False) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    return (Qwen3ForCausalLM if whole else Qwen3Model)(Qwen3Config(**QWEN, **HEADS, head_dim=8))


def qwen25_vl_text() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"type": "default", "rope_type": "default", "mrope_section": [2, 2, 4]}
    config = Qwen2_5_VLConfig(text_config={**QWEN, **HEADS, "rope_scaling": rope}, vision_config=VISION)
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl_text(whole: bool = False) -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLModel

    rope = {"rope_type": "default", "mrope_section": [2, 1, 1]}
    config = Qwen3VLConfig(
        text_config={**QWEN, **HEADS, "head_dim": 8, "rope_scaling": rope},
        vision_config={**VISION, "deepstack_visual_indexes": [0]},
    )
    return (Qwen3VLForConditionalGeneration if whole else Qwen3VLModel)(config)


def kl_autoencoder(channels: int = 4, blocks: int = 2, **other: Any) -> Any:
    """Its latent has a side of 1 / 2^(blocks - 1)."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16, 16, 16)[:blocks], latent_channels=channels, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks, **other,
    )  # fmt: skip


def flow_autoencoder(channels: int = 4) -> Any:
    """As flow-matching transformers have it: shifted, without the convolutions around its latent."""
    return kl_autoencoder(channels, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06)


def dc_autoencoder() -> Any:
    from diffusers import AutoencoderDC

    return AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), downsample_block_type="conv",
        upsample_block_type="interpolate", scaling_factor=0.41,
    )  # fmt: skip


def qwen_autoencoder() -> Any:
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.1] * 4, latents_std=[0.9] * 4,
    )  # fmt: skip


def vq_autoencoder() -> Any:
    from diffusers import VQModel

    return VQModel(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), latent_channels=4, norm_num_groups=4,
        norm_type="spatial", num_vq_embeddings=12, vq_embed_dim=4,
    )  # fmt: skip


def unet(**other: Any) -> Any:
    from diffusers import UNet2DConditionModel

    given = {
        "block_out_channels": (8, 16), "layers_per_block": 1, "sample_size": 16, "in_channels": 4, "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 32,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "norm_num_groups": 4, "attention_head_dim": 4,
    }  # fmt: skip
    return UNet2DConditionModel(**given | other)


def flow(**other: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**other)


def ddim() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1, clip_sample=False, set_alpha_to_one=False)
