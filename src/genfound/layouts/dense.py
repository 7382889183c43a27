"""Dense: images of one size, stacked."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.layouts.base import Layout, token_sizes


@dataclass
class Dense(Layout):
    """x is (B, C, H, W); all images have the same size."""

    patch_size: int
    max_images: int | None = None  # B, where filler follows the images; `None` takes exactly the images
    filler_label: int = 0

    name = "dense"

    def to_batch(self, latents: Sequence[Tensor], y: Tensor) -> Batch:
        """Stack latents (C, H, W) of one size."""
        shapes = {tuple(z.shape) for z in latents}
        if len(shapes) > 1:
            ways = "set data.view=square or layout=packed"
            raise ValueError(f"layout=dense needs images of one size, got {sorted(shapes)}; {ways}")
        empty = (self.max_images or len(latents)) - len(latents)
        if empty < 0:
            raise ValueError(f"{len(latents)} images do not fit a batch of data.batch_size={self.max_images}")
        filled = [*latents, *[torch.zeros_like(latents[0])] * empty]
        y = torch.nn.functional.pad(y, (0, empty), value=self.filler_label)
        real = torch.arange(len(filled), device=y.device) < len(latents)
        return Batch(torch.stack(filled), y, token_sizes(filled, self.patch_size).to(y.device), real)

    def to_latents(self, x: Tensor, batch: Batch) -> list[Tensor]:
        """(B, C, H, W) -> the images of the real rows."""
        return list(x[batch.real])
