"""Embeddings of patches, and of the conditions: time and class label."""

import math

import torch
from torch import Tensor, nn

from genfound.layers.float64 import double

FREQUENCIES = 256
LONGEST_PERIOD = 10_000


def sinusoid(t: Tensor, size: int = FREQUENCIES, longest_period: float = LONGEST_PERIOD) -> Tensor:
    """(B,) times -> (B, size) float32, [cos | sin] of geometrically spaced frequencies (ADM's form).

    An odd size has one zero column at the end.
    """
    half = size // 2
    exponent = -math.log(longest_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * exponent.exp()  # (B, half)
    return nn.functional.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, size % 2))


def grid_sinusoid(positions: Tensor, width: int) -> Tensor:
    """Rows and columns of tokens (..., 2) -> (..., width) float32, computed in float64; DiT's 2-D sine-cosine table.

    Of the four quarters, two are sine and cosine of the column, two of the row (models.py:get_2d_sincos_pos_embed).
    """
    places = double(positions)
    exponents = torch.arange(width // 4, dtype=torch.float64, device=places.device) / (width / 4)
    angles = places[..., None] * (1 / LONGEST_PERIOD**exponents)  # (..., 2, D / 4)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flip(-2).flatten(-2).float().to(positions.device)


class PatchEmbedder(nn.Module):
    """A linear layer from the numbers of a patch (C, p, p) to its token."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(patch, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C p p) -> (..., D)."""
        return self.proj(x)


class TimestepEmbedder(nn.Module):
    """Sinusoid -> Linear -> SiLU -> Linear. The time is taken in the unit it comes in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B, D)."""
        return self.mlp(sinusoid(t))


class LabelEmbedder(nn.Module):
    """A table of classes; the last row is the null class where one is wanted."""

    def __init__(self, num_classes: int, width: int, null_class: bool) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + null_class, width)

    def forward(self, y: Tensor) -> Tensor:
        """(B,) int -> (B, D)."""
        return self.embedding_table(y)
