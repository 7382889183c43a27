"""Padded: rows of tokens, filled up to one length."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.layers.tokens import from_tokens, to_tokens
from genfound.layouts.base import Layout, token_sizes


@dataclass
class Padded(Layout):
    """x is (B, N, C * p * p) with a mask."""

    patch_size: int
    max_tokens: int | None = None  # N; `None` takes the longest image of the batch

    name = "padded"

    def to_batch(self, latents: Sequence[Tensor], y: Tensor) -> Batch:
        """Tokens of each latent (C, h, w), then zeros."""
        sizes = token_sizes(latents, self.patch_size)
        longest = int(sizes.prod(dim=1).max())
        length = self.max_tokens or longest
        if longest > length:
            raise ValueError(f"an image has {longest} tokens, more than the layout's {length}; raise data.max_tokens")
        tokens = [to_tokens(z, self.patch_size) for z in latents]
        x = torch.stack([torch.nn.functional.pad(z, (0, 0, 0, length - len(z))) for z in tokens])
        sizes = sizes.to(y.device)
        mask = torch.arange(length, device=y.device) < sizes.prod(dim=1, keepdim=True)
        real = torch.ones(len(tokens), dtype=torch.bool, device=y.device)
        return Batch(x, y, sizes, real, mask=mask)

    def to_latents(self, x: Tensor, batch: Batch) -> list[Tensor]:
        """(B, N, C * p * p) -> latents (C, h, w) of the real rows."""
        rows = zip(x, batch.sizes.tolist(), batch.real.tolist(), strict=True)
        return [from_tokens(z[: h * w], h, self.patch_size) for z, (h, w), real in rows if real]
