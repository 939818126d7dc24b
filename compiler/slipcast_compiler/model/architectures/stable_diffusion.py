"""Stable Diffusion 1.x and 2.x: CLIP text encoder, U-Net with cross-attention, KL autoencoder."""

from slipcast_compiler.model.architectures import Architecture, ComponentSource, Input, TextSource

STABLE_DIFFUSION = Architecture(
    components={
        "text_encoder": ComponentSource(
            folder="text_encoder",
            inputs=(Input("input_ids", "int64", ("batch", "text_length")),),
            outputs=("last_hidden_state",),
            call=lambda model, input_ids: model(input_ids)[0],
        ),
        "denoiser": ComponentSource(
            folder="unet",
            inputs=(
                Input("sample", "float32", ("batch", "latent_channels", "latent_height", "latent_width")),
                Input("timestep", "float32", (1,)),
                Input("encoder_hidden_states", "float32", ("batch", "text_length", "text_width")),
            ),
            outputs=("prediction",),
            call=lambda model, sample, timestep, text: model(sample, timestep, text, return_dict=False)[0],
        ),
        "vae_decoder": ComponentSource(
            folder="vae",
            inputs=(Input("latent", "float32", ("batch", "latent_channels", "tile_height", "tile_width")),),
            outputs=("image",),
            call=lambda model, latent: model.decode(latent, return_dict=False)[0],
        ),
    },
    text=(
        TextSource(
            tokenizer="tokenizer",
            component="text_encoder",
            outputs=(("last_hidden_state", "encoder_hidden_states"),),
        ),
    ),
    sizes={
        "latent_channels": ("unet", "in_channels"),
        "text_width": ("unet", "cross_attention_dim"),
        "text_length": ("text_encoder", "max_position_embeddings"),
    },
    not_compiled=("safety_checker", "image_encoder"),
)
