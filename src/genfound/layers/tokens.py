"""Tokens: the order in which a latent becomes them, where those of any memory layout lie, and more of them in an image.

Legend: B images, N tokens of a row, T packed tokens, C channels, p patch side, P = p^2 C, K tokens more; "..." is
B, N or, packed, T.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from genfound.batch import Batch
from genfound.layers.attention import document_mask
from genfound.layers.rope import row_major


def to_tokens(latent: Tensor, patch_size: int) -> Tensor:
    """(..., C, h, w) -> (..., rows * columns, P), row-major tokens, values in the order (C, p, p)."""
    cut = latent.unflatten(-1, (-1, patch_size)).unflatten(-3, (-1, patch_size))  # (..., C, rows, p, columns, p)
    return cut.movedim((-4, -2), (-5, -4)).flatten(-3).flatten(-3, -2)


def from_tokens(tokens: Tensor, rows: int, patch_size: int) -> Tensor:
    """(..., rows * columns, P) -> (..., C, h, w); the inverse of `to_tokens`."""
    cut = tokens.unflatten(-1, (-1, patch_size, patch_size)).unflatten(-4, (rows, -1))  # (..., rows, columns, C, p, p)
    return cut.movedim((-5, -4), (-4, -2)).flatten(-2).flatten(-3, -2)


def tokens_of(batch: Batch, patch_size: int) -> Tensor:
    """The tokens (..., P) of `batch.x`."""
    return to_tokens(batch.x, patch_size) if batch.layout == "dense" else batch.x


def shaped_like(batch: Batch, tokens: Tensor, patch_size: int) -> Tensor:
    """Tokens (..., P), or of more channels, as a tensor in the layout of `batch.x`; padding becomes 0."""
    if batch.mask is not None:
        return tokens.masked_fill(~batch.mask[..., None], 0)
    if batch.layout == "packed":
        return tokens
    return from_tokens(tokens, batch.x.shape[2] // patch_size, patch_size)


def coordinates(batch: Batch, patch_size: int) -> Tensor:
    """Row and column of every token: packed (T, 2), padded (B, N, 2), dense (1, N, 2)."""
    if batch.image_of is not None:
        return row_major(batch.positions, batch.sizes[batch.image_of, 1])
    if batch.mask is not None:
        return row_major(torch.arange(batch.mask.shape[1], device=batch.x.device), batch.sizes[:, 1:])
    rows, columns = (side // patch_size for side in batch.x.shape[2:])
    return row_major(torch.arange(rows * columns, device=batch.x.device), columns)[None]


class Prefix:
    """Room for K tokens before those of each image, of empty and filler rows too, so that shapes stay static.

    `batch` says which tokens are of one image; of its other attributes nothing but `y` still holds.
    """

    def __init__(self, batch: Batch, count: int) -> None:
        self.count = count
        if batch.image_of is None or batch.cu_seqlens is None:
            mask = None if batch.mask is None else pad(batch.mask, (count, 0), value=True)
            self.batch = replace(batch, mask=mask)
            return
        bounds = batch.cu_seqlens + count * torch.arange(len(batch.cu_seqlens), device=batch.x.device)
        rows = torch.arange(len(batch.y), device=batch.x.device)
        own = behind_prefix(batch.image_of, count)
        new = (bounds[:-1, None] + torch.arange(count, device=batch.x.device)).flatten()
        self.places = own
        self.order = torch.cat([own, new]).argsort()
        image_of = torch.cat([batch.image_of, rows.repeat_interleave(count)])[self.order]
        self.batch = replace(
            batch, image_of=image_of, cu_seqlens=bounds.int(), max_seqlen=batch.max_seqlen + count,
            block_mask=None if batch.block_mask is None else document_mask(image_of),
        )  # fmt: skip

    def add(self, tokens: Tensor, prefix: Tensor) -> Tensor:
        """Tokens (..., D) and what comes before them, (B, K, D) -> both."""
        if self.batch.image_of is None:
            return torch.cat([prefix, tokens], dim=1)
        return torch.cat([tokens, prefix.flatten(0, 1)]).index_select(0, self.order)

    def remove(self, tokens: Tensor) -> Tensor:
        """The inverse of `add`, without the prefix."""
        return tokens[:, self.count :] if self.batch.image_of is None else tokens.index_select(0, self.places)


def behind_prefix(image_of: Tensor, count: int) -> Tensor:
    """(T,) where packed tokens are, once each image has so many before them."""
    return torch.arange(len(image_of), device=image_of.device) + count * (image_of + 1)
