"""What a sampler is, and the grid of times it walks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.objectives.base import Field
from genfound.rng import Rng

Progress = Callable[[int, Batch], None]
"""Called after each step with its number and the state."""


class Sampler(Protocol):
    """Transports noise to data."""

    def __call__(self, field: Field, batch: Batch, times: Tensor, rng: Rng, progress: Progress | None = None) -> Batch:
        """Walk `batch` along `times` (host float64, first is noise) and return it at the last time."""


def time_grid(steps: int, start: float, end: float) -> Tensor:
    """(steps + 1,) float64 equidistant times.

    Raises:
        ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"sampler.steps={steps} must be at least 1")
    return torch.linspace(start, end, steps + 1, dtype=torch.float64)
