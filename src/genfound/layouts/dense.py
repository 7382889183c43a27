"""Dense: images of one size, stacked."""

from collections.abc import Sequence

import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.layouts.base import Layout, token_sizes


class Dense(Layout):
    """x is (B, C, H, W); all images have the same size.

    Args:
        patch_size: side of a patch in latent pixels.
        max_images: B, where filler follows the images, so that the shape is static; `None` takes exactly the images.
        filler_label: the label of rows that are not real.
    """

    name = "dense"

    def __init__(self, patch_size: int, max_images: int | None = None, filler_label: int = 0) -> None:
        self.patch_size = patch_size
        self.max_images = max_images
        self.filler_label = filler_label

    def to_batch(self, latents: Sequence[Tensor], y: Tensor) -> Batch:
        """Stack latents (C, H, W) of one size.

        Raises:
            ValueError: the latents differ in size, or are more than `max_images`.
        """
        shapes = {tuple(z.shape) for z in latents}
        if len(shapes) > 1:
            raise ValueError(
                f"layout=dense needs images of one size, got {sorted(shapes)}; set data.view=square or layout=packed"
            )
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
