"""Dense: images of one size, stacked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.layouts.base import token_sizes


class Dense:
    """x is (B, C, H, W); all images have the same size."""

    name = "dense"

    def __init__(self, patch_size: int) -> None:
        self.patch_size = patch_size

    def to_batch(self, latents: Sequence[Tensor], y: Tensor) -> Batch:
        """Stack latents (C, H, W) of one size.

        Raises:
            ValueError: the latents differ in size.
        """
        shapes = {tuple(z.shape) for z in latents}
        if len(shapes) > 1:
            raise ValueError(
                f"layout=dense needs images of one size, got {sorted(shapes)}; set data.view=square or layout=packed"
            )
        real = torch.ones(len(latents), dtype=torch.bool, device=y.device)
        sizes = token_sizes(latents, self.patch_size).to(y.device)
        return Batch(torch.stack(list(latents)), y, sizes, real)

    def to_latents(self, x: Tensor, batch: Batch) -> list[Tensor]:
        """(B, C, H, W) -> the images of the real rows."""
        return list(x[batch.real])
