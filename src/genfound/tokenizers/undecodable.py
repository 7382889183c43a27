"""What stands in for a tokenizer whose weights are not to be had: latents can be drawn, but not decoded."""

from torch import Tensor

from genfound.tokenizers.base import LatentSpec


class Undecodable:
    """Of a tokenizer whose weights are not to be had: the shape of its latents, and why they are not decoded."""

    online = True
    stochastic = False

    def __init__(self, spec: LatentSpec, reason: str) -> None:
        self.spec = spec
        self.reason = reason

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Raise a ValueError with the reason."""
        raise ValueError(self.reason)

    def decode(self, latents: Tensor) -> Tensor:
        """Raise a ValueError with the reason."""
        raise ValueError(self.reason)
