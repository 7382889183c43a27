"""Text without a network: random, but always the same, values for the bytes of a caption."""

from collections.abc import Sequence

import torch
from torch import Tensor

from genfound.config.checks import integer
from genfound.text.base import TextEncoder


class ByteFeatures(TextEncoder):
    """A token is a byte of UTF-8; its values are the sum of a random vector for each of the last bytes and its place.

    Args:
        width, tokens: E and L, see `TextEncoder`.
        context: bytes of which a token tells.
        weights: none.
    """

    def __init__(self, *, width: int, tokens: int, context: int, weights: None) -> None:
        for key, value in {"width": width, "tokens": tokens, "context": context}.items():
            integer(f"text_encoder.{key}", value, 1)
        if weights is not None:
            raise ValueError(f"text_encoder.weights={weights}: text_encoder=bytes has none; leave it null")
        self.width, self.tokens, self.context = width, tokens, context
        draw = torch.Generator().manual_seed(0)
        self.table = torch.randn(context, 256, width, generator=draw) / context**0.5

    def __call__(self, captions: Sequence[str], device: torch.device) -> list[Tensor]:
        """See `TextEncoder`; float32."""
        return [self._encoded(caption.encode()[: self.tokens]).to(device) for caption in captions]

    def _encoded(self, text: bytes) -> Tensor:
        values, found = torch.tensor(list(text), dtype=torch.long), torch.zeros(len(text), self.width)
        for distance in range(min(self.context, len(text))):
            found[distance:] += self.table[distance, values[: len(text) - distance]]
        return found
