"""The deep compression autoencoder (DC-AE, arXiv 2410.10733), deterministic."""

from typing import Any

from torch import Tensor

from genfound.tokenizers.autoencoder import Autoencoder
from genfound.tokenizers.weights import Architecture


def both(**stages: Any) -> dict[str, Any]:
    """The options of the stages of the encoder, and the same ones of the decoder."""
    return {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in stages.items()}


class DCAE(Autoencoder):
    """Any AutoencoderDC of diffusers; dc-ae-f32c32-sana-1.1, NiT's, is spec (32, 32) and scale 0.41407."""

    kind = Architecture(
        "AutoencoderDC",
        official={
            **both(
                block_types=["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
                block_out_channels=[128, 256, 512, 512, 1024, 1024],
                qkv_multiscales=[[], [], [], [5], [5], [5]],
            ),
            "latent_channels": 32,
            "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
            "decoder_layers_per_block": [3] * 6,
            "downsample_block_type": "conv",
            "upsample_block_type": "interpolate",
            "decoder_norm_types": "rms_norm",
            "decoder_act_fns": "silu",
            "scaling_factor": 0.41407,
        },
        tiny=both(block_out_channels=[8, 16, 16, 32, 32, 32], layers_per_block=[1] * 6),
    )

    def _moments(self, images: Tensor) -> Tensor:
        return self.model.encode(images).latent
