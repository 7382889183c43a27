"""Rotary position embedding on a two-dimensional grid.

Each axis owns half of the head: the first half turns with the row, the second with the column.

Legend: T packed tokens, H heads, d head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def axis_frequencies(size: int, theta: float) -> Tensor:
    """(size / 2,) float32, theta^(-2j / size): the angular frequencies of one axis of `size` channels.

    Raises:
        ValueError: the number of channels is odd.
    """
    if size % 2:
        raise ValueError(f"rotary embedding needs an even number of channels per axis, got {size}; change model.heads")
    return theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size).float()


def rotation(coordinates: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine of every token's angles, for `rotate`.

    Args:
        coordinates: (T, 2) integer positions on the first and second axis.
        frequencies: (d / 4,) of one axis, shared by both.

    Returns:
        (T, 1, d) each, float32, broadcasting over heads; the two channels of a pair hold (cos, cos) and (-sin, sin).
    """
    angles = (coordinates.float()[:, :, None] * frequencies).flatten(1)  # (T, d / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([cos, cos], dim=-1).flatten(1)[:, None], torch.stack([-sin, sin], dim=-1).flatten(1)[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn adjacent pairs of channels of x (T, H, d) in float32: (a, b) -> (a cos - b sin, b cos + a sin)."""
    x = x.float()
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # (T, H, d)
    return torch.addcmul(x * cos, swapped, sin)
