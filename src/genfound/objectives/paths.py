"""Interpolants x_t = alpha(t) x + sigma(t) noise, from data at t = 0 to noise at t = 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class PathPoint(NamedTuple):
    """Coefficients and their time derivatives, each shaped like t."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


def linear(t: Tensor) -> PathPoint:
    """x_t = (1 - t) x + t noise (rectified flow; SiT's linear interpolant with time reversed)."""
    one = torch.ones_like(t)
    return PathPoint(1 - t, t, -one, one)


PATHS: dict[str, Callable[[Tensor], PathPoint]] = {"linear": linear}
