"""LDM's autoencoder with a codebook and stride 8 (arXiv 2112.10752)."""

from genfound.tokenizers.vq_f4 import VQF4
from genfound.tokenizers.weights import Architecture


class VQF8(VQF4):
    """Any VQModel of diffusers; that of LDM-8's ImageNet model is spec (4, 8) and scale 1."""

    kind = Architecture(
        "VQModel",
        official={
            **VQF4.kind.official,
            "down_block_types": ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"],
            "up_block_types": ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 3,
            "block_out_channels": [128, 256, 256, 512],
            "latent_channels": 4,
            "vq_embed_dim": 4,
            "num_vq_embeddings": 16384,
        },
        tiny={**VQF4.kind.tiny, "block_out_channels": [16, 32, 32, 32]},
    )
