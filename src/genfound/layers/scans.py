"""Orders in which a recurrence visits the tokens of each image, and convolutions of the grids that they see.

An order is a tensor of indices into the tokens of a batch: at each place of the scan, the row-major token that stands
there. Images keep their places in a pack. A scan by columns sees the transposed grid.

Legend: N tokens of an image in a dense batch, T packed tokens; "..." is N or, packed, T.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from genfound.batch import Batch

ORDERS = ("rows", "rows_reversed", "columns", "columns_reversed")


class Scans:
    """The orders of the tokens of images of (rows, columns).

    Args:
        place: (...) number of each token within its own image.
        rows, columns: of its image, numbers or (...).
        start: where its image begins, a number or (...).
    """

    def __init__(self, place: Tensor, rows: Tensor | int, columns: Tensor | int, start: Tensor | int = 0) -> None:
        self.place, self.rows, self.columns, self.start = place, rows, columns, start
        self.known: dict[tuple[str, str], Tensor] = {}
        self.grids: dict[tuple[bool, int], Neighbours] = {}

    @classmethod
    def of_grid(cls, rows: int, columns: int, device: torch.device) -> "Scans":
        """Of every image of a dense batch."""
        return cls(torch.arange(rows * columns, device=device), rows, columns)

    @classmethod
    def of(cls, batch: Batch, patch_size: int) -> "Scans":
        """Of a dense or packed batch; filler is an image like any other."""
        if batch.image_of is None or batch.cu_seqlens is None:
            rows, columns = (side // patch_size for side in batch.x.shape[2:])
            return cls.of_grid(rows, columns, batch.x.device)
        sizes = batch.sizes[batch.image_of]
        return cls(batch.positions, sizes[:, 0], sizes[:, 1], batch.cu_seqlens[batch.image_of])

    def between(self, before: str, after: str) -> Tensor:
        """(...) where in the order `before` stands what is to come next in the order `after`."""
        if (before, after) not in self.known:
            self.known[before, after] = self._places(before)[self._tokens(after)]
        return self.known[before, after]

    def reorder(self, x: Tensor, before: str, after: str) -> Tensor:
        """Tokens (..., D), or dense (B, N, D), from one order to another."""
        return x if before == after else x.index_select(-2, self.between(before, after))

    def _tokens(self, order: str) -> Tensor:
        """(...) the row-major token at each place of an order."""
        place = self._last - self.place if "reversed" in order else self.place
        return self.start + (place if "columns" not in order else _transposed(place, self.rows, self.columns))

    def _places(self, order: str) -> Tensor:
        """(...) the place of each row-major token in an order."""
        own = self.place if "columns" not in order else _transposed(self.place, self.columns, self.rows)
        return self.start + (self._last - own if "reversed" in order else own)

    @property
    def _last(self) -> Tensor | int:
        return self.rows * self.columns - 1

    def grid(self, order: str, size: int) -> "Grid":
        """What a convolution of side `size` has to know of the grid of an order."""
        by_columns = "columns" in order
        rows, columns = (self.columns, self.rows) if by_columns else (self.rows, self.columns)
        if isinstance(rows, int) and isinstance(columns, int):
            return rows, columns
        assert isinstance(rows, Tensor) and isinstance(columns, Tensor)
        if (by_columns, size) not in self.grids:
            self.grids[by_columns, size] = self._neighbours(rows[:, None], columns[:, None], size)
        return self.grids[by_columns, size]

    def _neighbours(self, rows: Tensor, columns: Tensor, size: int) -> "Neighbours":
        step = torch.arange(size, device=self.place.device) - size // 2
        down, right = (v.flatten() for v in torch.meshgrid(step, step, indexing="ij"))  # (size^2,)
        width = columns.clamp(min=1)
        row, column = self.place[:, None] // width + down, self.place[:, None] % width + right
        inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        own = torch.arange(len(self.place), device=self.place.device)[:, None]
        return Neighbours(torch.where(inside, own + down * width + right, own), inside)


class Neighbours(NamedTuple):
    """Of each place of a pack: which places (T, size^2) are around it on its grid, row-major, and which are none."""

    places: Tensor
    inside: Tensor


Grid = tuple[int, int] | Neighbours
"""Of one image of a dense batch, its rows and columns."""


def _transposed(place: Tensor, rows: Tensor | int, columns: Tensor | int) -> Tensor:
    """The row-major number of what stands at a place when a grid of (rows, columns) is read by columns."""
    return place % rows * columns + torch.div(place, rows, rounding_mode="floor")


def depthwise(conv: nn.Conv2d, x: Tensor, grid: Grid) -> Tensor:
    """A depth-wise convolution of an odd side and its padding over the grid of each image; (..., D) in float32."""
    if not isinstance(grid, Neighbours):
        return conv(x.mT.unflatten(2, grid)).flatten(2).mT
    assert conv.bias is not None
    out = conv.bias.expand_as(x)
    for tap, weight in enumerate(conv.weight.flatten(1).unbind(1)):
        out = torch.addcmul(out, x.index_select(0, grid.places[:, tap]), weight * grid.inside[:, tap, None])
    return out
