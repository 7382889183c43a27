"""What a tokenizer is."""

from typing import NamedTuple, Protocol

from torch import Tensor


class LatentSpec(NamedTuple):
    """Shape of a latent: an image of (height, width) pixels becomes (channels, height / stride, width / stride)."""

    channels: int
    stride: int


class Tokenizer(Protocol):
    """Images (B, 3, height, width) in [-1, 1] <-> latents (B, C, h, w) of about unit variance."""

    spec: LatentSpec
    online: bool  # encoding is a network's work and belongs on the training device, not into data workers
    stochastic: bool  # training encodes with noise

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images of one size -> latents: drawn with noise of their shape, if `stochastic`, or the most likely ones."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents of one size -> images."""
