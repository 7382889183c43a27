"""What a layout is."""

from collections.abc import Sequence
from typing import Protocol

import torch
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


def token_sizes(latents: Sequence[Tensor], patch_size: int) -> Tensor:
    """(B, 2) token rows and columns."""
    for latent in latents:
        size = tuple(latent.shape[1:])
        if any(side % patch_size for side in size):
            raise ValueError(f"a latent of {size} does not divide into patches of model.patch_size={patch_size}")
    return torch.tensor([[side // patch_size for side in z.shape[1:]] for z in latents]).reshape(-1, 2)
