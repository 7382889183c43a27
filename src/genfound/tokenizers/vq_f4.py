"""LDM's autoencoder with a codebook (arXiv 2112.10752): latents before the codebook, which acts when decoding."""

from torch import Tensor

from genfound.tokenizers.autoencoder import Autoencoder
from genfound.tokenizers.weights import Architecture


class VQF4(Autoencoder):
    """Any VQModel of diffusers; that of LDM's ImageNet model is spec (3, 4) and scale 1."""

    kind = Architecture(
        "VQModel",
        official={
            "down_block_types": ["DownEncoderBlock2D"] * 3,
            "up_block_types": ["UpDecoderBlock2D"] * 3,
            "block_out_channels": [128, 256, 512],
            "layers_per_block": 2,
            "latent_channels": 3,
            "vq_embed_dim": 3,
            "num_vq_embeddings": 8192,
            "norm_num_groups": 32,
            "sample_size": 256,
            "scaling_factor": 1.0,
        },
        tiny={"block_out_channels": [16, 32, 32], "layers_per_block": 1, "num_vq_embeddings": 64, "norm_num_groups": 8},
    )

    def _moments(self, images: Tensor) -> Tensor:
        return self.model.encode(images).latents

    def quantise(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) normalised -> the nearest codes, normalised."""
        codes = self._in_groups(
            lambda z: self.model.quantize(z)[0], latents / self.scale + self.shift, self.spec.stride
        )
        return (codes - self.shift) * self.scale
