"""What a layout is, and the one order in which a latent becomes tokens."""

from collections.abc import Sequence
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor

from genfound.batch import Batch


class Layout(Protocol):
    """Turns latents of any sizes into a `Batch` and back."""

    name: str
    patch_size: int

    def to_batch(self, latents: Sequence[Tensor], y: Tensor) -> Batch:
        """Latents, each (C, h, w), and conditions (B,) -> a batch."""

    def to_latents(self, x: Tensor, batch: Batch) -> list[Tensor]:
        """A tensor shaped like `batch.x` -> the latents (C, h, w) of the real rows."""


def to_tokens(latent: Tensor, patch_size: int) -> Tensor:
    """(C, h, w) -> (rows * columns, C * p * p), row-major tokens, values in the order (C, p, p)."""
    return rearrange(latent, "c (h p) (w q) -> (h w) (c p q)", p=patch_size, q=patch_size)


def from_tokens(tokens: Tensor, rows: int, patch_size: int) -> Tensor:
    """(rows * columns, C * p * p) -> (C, h, w); the inverse of `to_tokens`."""
    return rearrange(tokens, "(h w) (c p q) -> c (h p) (w q)", h=rows, p=patch_size, q=patch_size)


def token_sizes(latents: Sequence[Tensor], patch_size: int) -> Tensor:
    """(B, 2) token rows and columns."""
    for latent in latents:
        size = tuple(latent.shape[1:])
        if any(side % patch_size for side in size):
            raise ValueError(f"a latent of {size} does not divide into patches of model.patch_size={patch_size}")
    return torch.tensor([[side // patch_size for side in z.shape[1:]] for z in latents]).reshape(-1, 2)
