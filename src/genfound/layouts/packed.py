"""Packed: tokens of all images one after another, no padding between them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.layers.tokens import from_tokens, to_tokens
from genfound.layouts.base import Layout, token_sizes


@dataclass
class Packed(Layout):
    """x is (T, C * p * p).

    With a budget the shape is static, so that a compiled step is compiled once: the real images come first,
    then empty rows, and last a filler row that takes the tail of the budget. Filler has the null label.
    """

    patch_size: int
    max_tokens: int | None = None  # T; `None` takes exactly the tokens of the images (sampling)
    max_images: int | None = None  # real rows of a static batch (B = max_images + 1); needed with `max_tokens`
    filler_label: int = 0

    name = "packed"

    def to_batch(self, latents: Sequence[Tensor], y: Tensor) -> Batch:
        """Concatenate the tokens of latents (C, h, w)."""
        sizes = token_sizes(latents, self.patch_size)
        x = torch.cat([to_tokens(z, self.patch_size) for z in latents])
        real, sides = torch.ones(len(latents), dtype=torch.bool), int(sizes.sum())
        if self.max_tokens is not None:
            x, y, sizes, real = self._fill(x, y, sizes, real)
            sides += -sides % max(self.max_tokens // 32, 1)  # few values, as of max_seqlen
        lengths = sizes.prod(dim=1)
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        return Batch(
            x=x,
            y=y,
            sizes=sizes.to(x.device),
            real=real.to(x.device),
            image_of=torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(x.device),
            cu_seqlens=bounds.to(x.device, torch.int32),
            max_seqlen=1 << max(int(lengths.max()) - 1, 0).bit_length(),  # a power of 2: few recompilations
            sides=sides,
        )

    def _fill(self, x: Tensor, y: Tensor, sizes: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Append empty rows and the filler row."""
        assert self.max_tokens is not None and self.max_images is not None
        tail, empty = self.max_tokens - len(x), self.max_images - len(y)
        if tail < 0 or empty < 0:
            raise ValueError(
                f"{len(y)} images with {len(x)} tokens do not fit a pack of data.max_tokens={self.max_tokens} "
                f"and {self.max_images} images"
            )
        x = torch.nn.functional.pad(x, (0, 0, 0, tail))
        y = torch.nn.functional.pad(y, (0, empty + 1), value=self.filler_label)
        filler = torch.tensor([[0, 0]] * empty + [[1, tail]])
        return x, y, torch.cat([sizes, filler]), torch.nn.functional.pad(real, (0, empty + 1), value=False)

    def to_latents(self, x: Tensor, batch: Batch) -> list[Tensor]:
        """(T, C * p * p) -> latents (C, h, w) of the real rows."""
        pieces = x[: int(batch.tokens.sum())].split(batch.tokens.tolist())
        rows = zip(pieces, batch.sizes.tolist(), batch.real.tolist(), strict=True)
        return [from_tokens(z, h, self.patch_size) for z, (h, _), real in rows if real]
