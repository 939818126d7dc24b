"""Unconditional pixel models (google/ddpm-*): a UNet2DModel alone, without text and without autoencoder."""

from slipcast_compiler.model.architectures import Architecture, ComponentSource, Input

UNCONDITIONAL = Architecture(
    components={
        "denoiser": ComponentSource(
            folder="unet",
            inputs=(
                Input("sample", "float32", ("batch", "latent_channels", "latent_height", "latent_width")),
                Input("timestep", "float32", (1,)),
            ),
            outputs=("prediction",),
            call=lambda model, sample, timestep: model(sample, timestep, return_dict=False)[0],
        ),
    },
    text=(),
    sizes={"latent_channels": ("unet", "in_channels")},
)
