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
    """Cosine and sine of every token's angles.

    Args:
        coordinates: (T, 2) integer positions on the first and second axis.
        frequencies: (d / 4,) of one axis, shared by both.

    Returns:
        cos and sin, each (T, 1, d / 2) float32, broadcasting over heads.
    """
    angles = coordinates.float()[:, :, None] * frequencies  # (T, 2, d / 4)
    angles = angles.flatten(1)[:, None]  # (T, 1, d / 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn adjacent pairs of channels of x (T, H, d) in float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (T, H, d / 2)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
