"""From the hidden tokens of a backbone to the channels of a teacher."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from genfound.batch import Batch
from genfound.config.checks import integer, one_of
from genfound.layers.rope import row_major

PROJECTORS = ("mlp", "linear", "conv")


def make_projector(kind: str, width: int, hidden: int, out: int, kernel: int) -> "MlpProjector | ConvProjector":
    """A projector (D) -> (Z) of each token, or of its neighbourhood in the image (`conv`)."""
    one_of("alignment.projector", kind, PROJECTORS)
    integer("alignment.hidden", hidden, 1)
    integer("alignment.kernel", kernel, 1)
    if kind == "conv":
        return ConvProjector(width, out, kernel)
    return MlpProjector([width, out] if kind == "linear" else [width, hidden, hidden, out])


class MlpProjector(nn.Sequential):
    """Linear layers with SiLU between them (REPA's models/sit.py:build_mlp); a single one is iREPA's `linear`."""

    def __init__(self, sizes: list[int]) -> None:
        layers: list[nn.Module] = [nn.Linear(sizes[0], sizes[1])]
        for before, after in pairwise(sizes[1:]):
            layers += [nn.SiLU(), nn.Linear(before, after)]
        super().__init__(*layers)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # type: ignore[override]
        """Tokens (..., D) -> (..., Z)."""
        for layer in self:
            x = layer(x)
        return x


class ConvProjector(nn.Module):
    """One convolution over the grid of each image, which zeros surround (iREPA), in any layout.

    Every token is multiplied with the weights of all places of the kernel, and each gathers from its neighbours what
    concerns it.
    """

    def __init__(self, width: int, out: int, kernel: int) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"alignment.kernel={kernel} must be odd")
        self.kernel = kernel
        self.weight = nn.Parameter(torch.empty(out, width, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(out))

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """Packed tokens (T, D) -> (T, Z), others (B, N, D) -> (B, N, Z)."""
        if batch.image_of is None:
            sizes, place = batch.sizes[:, None], torch.arange(x.shape[-2], device=x.device)
        else:
            sizes, place = batch.sizes[batch.image_of], batch.positions
        rows, columns = sizes.unbind(-1)  # of each token's image
        row, column = row_major(place, columns).unbind(-1)
        out, half = self.bias.expand(*x.shape[:-1], -1).float(), self.kernel // 2
        for i in range(self.kernel):
            for j in range(self.kernel):
                to_row, to_column = row + i - half, column + j - half
                inside = (to_row >= 0) & (to_row < rows) & (to_column >= 0) & (to_column < columns)
                step = (i - half) * columns + j - half
                there = torch.arange(x.shape[-2], device=x.device) + torch.where(inside, step, 0)
                product = nn.functional.linear(x, self.weight[:, :, i, j]).float()
                moved = product.gather(-2, there[..., None].expand_as(product))
                out = out + moved * inside[..., None]
        return out
