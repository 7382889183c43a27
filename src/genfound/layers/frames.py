"""Grids of images that are framed by learned tokens, so that a recurrence knows where rows and columns end.

The tokens of an image are K before its grid, and the grid of (H + P, W + P): the image's own, then P columns and P rows
of padding. In a pack the filler has no padding, and takes what is left of a shape that is the same for many packs.

Legend: B images, (H, W) tokens of an image, P columns and rows of padding, D width; N tokens of an image and L with its
frame, in a pack T and S of all images; G those of framed grids; "..." is B, N or L, or T or S alone.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from genfound.batch import Batch
from genfound.layers.scans import ORDERS, Scans, depthwise
from genfound.layers.tokens import Prefix


class Framed:
    """Where the tokens of framed images lie; `batch` says which of all of them are of one image.

    Args:
        batch: dense or packed.
        patch_size: of its tokens.
        count: P.
        before: K.
    """

    def __init__(self, batch: Batch, patch_size: int, count: int, before: int) -> None:
        self.own = own = Scans.of(batch, patch_size)
        rows, columns = own.rows, own.columns
        if isinstance(rows, int) and isinstance(columns, int):
            self.grid = Scans.of_grid(rows + count, columns + count, batch.x.device)
            self.batch, self.prefix, self.positions = batch, Prefix(batch, before), None
            self.places = torch.arange(before, before + len(self.grid.place), device=batch.x.device)
            self.tokens = before + len(self.places)
        else:
            framed = _framed(batch, count)
            assert framed.image_of is not None
            self.grid, self.prefix = Scans.of(framed, patch_size), Prefix(framed, before)
            self.batch, self.places = self.prefix.batch, self.prefix.places  # (G,) of those of grids among all
            self.positions = self.batch.positions  # (S,) of each token in its image
            self.tokens = len(self.positions)  # S
            rows, columns = batch.sizes[framed.image_of].unbind(1)
        self.below = self.grid.place - rows * self.grid.columns  # (G,) from 0 in rows of padding,
        self.right = self.grid.place % self.grid.columns - columns  # and in columns
        self.inside = (self.below < 0) & (self.right < 0)
        image = self.inside.argsort(descending=True, stable=True)[: len(own.place)]
        self.image = self.places[image]  # (N or T,) of the images' tokens among all
        self.known: dict[tuple[str, str], Tensor] = {}

    def padded(self, count: int, cycled: bool) -> Tensor:
        """(G,) the token of the image at each place of a framed grid, or after all of them the number of the padding.

        Below, tokens of padding take turns along the rows (`cycled`), or each row is one.
        """
        below = self.below % count if cycled else self.below // self.grid.columns
        padding = torch.where(self.below < 0, self.right % count, below)
        return torch.where(self.inside, self.inside.cumsum(0) - 1, len(self.own.place) + padding)

    def between(self, before: str, after: str) -> Tensor:
        """(L or S,) where in the order `before` stands what is to come next in the order `after`."""
        if (before, after) not in self.known:
            moved = self.places[self.grid.between(before, after)]
            every = torch.arange(self.tokens, device=moved.device)
            self.known[before, after] = every.index_copy(0, self.places, moved)
        return self.known[before, after]

    def reorder(self, x: Tensor, before: str, after: str) -> Tensor:
        """All tokens (..., D) from one order to another."""
        return x if before == after else x.index_select(-2, self.between(before, after))


def _framed(batch: Batch, count: int) -> Batch:
    """A pack of the framed grids, whose filler is a row of tokens."""
    assert batch.image_of is not None
    room = len(batch.image_of) + count * batch.sides + count**2 * len(batch.y)
    sizes = torch.where(batch.real[:, None], batch.sizes + count, batch.sizes)
    left = room - sizes.prod(dim=1).sum()
    sizes = sizes + pad(left.view(1, 1), (1, 0, len(sizes) - 1, 0))
    lengths = sizes.prod(dim=1)
    image_of = torch.arange(len(sizes), device=sizes.device).repeat_interleave(lengths, output_size=room)
    return replace(batch, sizes=sizes, image_of=image_of, cu_seqlens=pad(lengths.cumsum(0), (1, 0)).int())


class Frame(nn.Module):
    """Convolutions of the grid of an image, and P tokens of padding at its right, below it and before it.

    Args:
        width: D.
        count: P.
        cycled: whether tokens of padding take turns along the rows below; else each row is one of them.
        smooth: whether there are convolutions.
    """

    def __init__(self, width: int, count: int, cycled: bool, smooth: bool) -> None:
        super().__init__()
        self.count, self.cycled = count, cycled
        self.pad_token_dec_split = nn.Parameter(torch.empty(1, count, width)) if count else None
        self.pad_token = nn.Parameter(torch.empty(1, width, count)) if count else None
        self.first_smoother = nn.Conv2d(width, width, 3, padding=1, groups=width) if smooth else None
        self.last_smoother = nn.Conv2d(width, width, 3, padding=1, groups=width) if smooth else None

    @property
    def paddings(self) -> list[nn.Parameter]:
        """Learned tokens."""
        return [p for p in (self.pad_token_dec_split, self.pad_token) if p is not None]

    def forward(self, conditions: Tensor, image: Tensor, framed: Framed) -> Tensor:
        """Conditions (B, K - P, D) and tokens of images (B, N, D) or (T, D) -> all tokens, by rows."""
        if self.first_smoother is not None:
            image = depthwise(self.first_smoother, image, framed.own.grid(ORDERS[0], 3))
        if self.pad_token is None or self.pad_token_dec_split is None:
            return framed.prefix.add(image, conditions)
        pads = self.pad_token.mT.expand(*image.shape[:-2], -1, -1) if image.ndim == 3 else self.pad_token.mT[0]
        grid = torch.cat([image, pads], dim=-2).index_select(-2, framed.padded(self.count, self.cycled))
        split = self.pad_token_dec_split.expand(len(conditions), -1, -1)
        return framed.prefix.add(grid, torch.cat([conditions, split], dim=1))

    def image(self, x: Tensor, framed: Framed) -> Tensor:
        """All tokens (B, L, D) or (S, D), by rows -> those of the images."""
        own = x.index_select(-2, framed.image)
        return own if self.last_smoother is None else depthwise(self.last_smoother, own, framed.own.grid(ORDERS[0], 3))
