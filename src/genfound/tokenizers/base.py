"""What a tokenizer is."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class Spec(NamedTuple):
    """Shape of a latent: an image of (height, width) pixels becomes (channels, height / stride, width / stride)."""

    channels: int
    stride: int


class Tokenizer(Protocol):
    """Images (B, 3, height, width) in [-1, 1] <-> latents (B, C, h, w) of about unit variance."""

    spec: Spec

    def encode(self, images: Tensor) -> Tensor:
        """Images of one size -> latents."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents of one size -> images."""
