"""What an objective is to the rest of the house."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from genfound.batch import Batch
from genfound.rng import Rng

Net = Callable[[Batch, Tensor], Tensor]
"""A backbone: (batch, t (B,)) -> a tensor shaped like `batch.x`."""

GuidedNet = Callable[[Batch, float], Tensor]
"""A backbone during sampling, where all images are at the same time."""


@dataclass(frozen=True)
class Losses:
    """The loss of every image of a batch.

    Attributes:
        total: (B,) what is minimised; 0 on rows that are not real.
        t: (B,) the times that were drawn, in the objective's own unit.
        terms: named parts of `total`, each (B,).
    """

    total: Tensor
    t: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)


class Field(Protocol):
    """A trained network as a sampler sees it."""

    def velocity(self, batch: Batch, t: float) -> Tensor:
        """dx/dt of the probability-flow ODE at x = batch.x and time t; shaped like `batch.x`."""


class Objective(Protocol):
    """Path, prediction, weighting and law of times of one training problem."""

    name: str
    samplers: tuple[str, ...]
    time_range: tuple[float, float]
    weight: str
    learned_variance: bool

    def loss(self, net: Net, batch: Batch, rng: Rng) -> Losses:
        """The loss of each image; all randomness comes from `rng`."""

    def field(self, net: GuidedNet) -> Field:
        """The views of the network's output that samplers use."""

    def times(self, sampler: str, steps: int | str) -> Tensor:
        """The times that a sampler walks, from noise to data; float64 on the host."""
