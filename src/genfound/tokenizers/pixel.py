"""The identity: latents are pixels."""

from torch import Tensor

from genfound.tokenizers.base import LatentSpec, Tokenizer


class PixelTokenizer(Tokenizer):
    """Latents are the RGB values in [-1, 1]."""

    spec = published = LatentSpec(channels=3, stride=1)
    online = False
    stochastic = False

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, 3, h, w) unchanged."""
        return images

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 3, h, w) unchanged."""
        return latents
