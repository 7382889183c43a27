"""Stable Diffusion's autoencoder with a Gaussian posterior (LDM, arXiv 2112.10752), and others of its class."""

import torch
from torch import Tensor

from genfound.tokenizers.autoencoder import Autoencoder
from genfound.tokenizers.weights import Architecture


class SDVAE(Autoencoder):
    """Any AutoencoderKL of diffusers; sd-vae-ft-mse and sd-vae-ft-ema are spec (4, 8) and scale 0.18215.

    Args:
        posterior: `sample` (DiT and SiT: mean + std * noise) or `mode` (the mean); how training encodes.
    """

    kind = Architecture(
        "AutoencoderKL",
        official={
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "block_out_channels": [128, 256, 512, 512],
            "layers_per_block": 2,
            "latent_channels": 4,
            "norm_num_groups": 32,
            "sample_size": 256,
            "scaling_factor": 0.18215,
        },
        tiny={"block_out_channels": [16, 32, 32, 32], "layers_per_block": 1, "norm_num_groups": 8},
    )

    def __init__(self, *, weights: str, posterior: str, precision: str, pixels_per_call: int) -> None:
        if posterior not in ("sample", "mode"):
            raise ValueError(f"tokenizer.posterior={posterior} is unknown; choose sample or mode")
        super().__init__(weights=weights, precision=precision, pixels_per_call=pixels_per_call)
        self.stochastic = posterior == "sample"

    def normalise(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, 2 C, h, w) mean and log-variance -> (B, C, h, w), drawn with the noise or the mean."""
        return super().normalise(drawn(moments, noise))

    def _moments(self, images: Tensor) -> Tensor:
        posterior = self.model.encode(images).latent_dist  # clamps the log-variance to [-30, 20]
        return torch.cat([posterior.mean, posterior.logvar], dim=1)


def drawn(moments: Tensor, noise: Tensor | None) -> Tensor:
    """(B, 2 C, h, w) mean and log-variance -> (B, C, h, w) of this posterior: drawn with the noise, or the mean."""
    mean, logvar = moments.chunk(2, dim=1)
    return mean if noise is None else mean + torch.exp(0.5 * logvar) * noise
