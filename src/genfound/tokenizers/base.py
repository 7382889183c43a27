"""What a tokenizer is."""

from typing import NamedTuple, Protocol

from torch import Tensor


class LatentSpec(NamedTuple):
    """Shape of a latent: an image of (height, width) pixels becomes (channels, height / stride, width / stride)."""

    channels: int
    stride: int


class Tokenizer(Protocol):
    """Images (B, 3, height, width) in [-1, 1] <-> latents (B, C, h, w) of about unit variance.

    Attributes:
        spec: shape of the latents.
        online: encoding is a network's work and belongs on the training device, not into data workers.
        stochastic: training encodes with noise.
    """

    spec: LatentSpec
    online: bool
    stochastic: bool

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images of one size -> latents.

        Args:
            images: (B, 3, height, width).
            noise: standard normal numbers shaped like the latents, for a tokenizer that is `stochastic`; `None`
                gives the most likely latents.
        """

    def decode(self, latents: Tensor) -> Tensor:
        """Latents of one size -> images."""
