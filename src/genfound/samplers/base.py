"""What a sampler is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from genfound.batch import Batch
from genfound.objectives.base import Field

Progress = Callable[[int, Batch], None]
"""Called after each step with its number and the state."""


class StepRng(Protocol):
    """The noise of stochastic samplers; every image has its own."""

    def normal(self, step: int) -> Tensor:
        """Standard normal numbers of a step, shaped like `batch.x`."""


class Sampler(Protocol):
    """Transports noise to data."""

    def __call__(
        self, field: Field, batch: Batch, times: Tensor, rng: StepRng, progress: Progress | None = None
    ) -> Batch:
        """Walk `batch` along `times` (host float64, first is noise) and return it at the last time."""
