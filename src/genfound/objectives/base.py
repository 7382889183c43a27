"""What an objective offers: a loss to train with, and a field to sample from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from genfound.batch import Batch
from genfound.objectives.predictions import Predictions
from genfound.objectives.times import TimeLaw
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
    """A trained network as a sampler sees it.

    Attributes:
        reach: how far towards data the velocity may be asked for: `before` the last of the sampler's times, up to
            the `end`, or `past` it.
    """

    reach: str

    def velocity(self, batch: Batch, t: float) -> Tensor:
        """dx/dt of the probability-flow ODE at x = batch.x and time t; shaped like `batch.x`."""

    def during(self, t: float) -> Field:
        """The same field in the stages of a step that begins at t, by which time guidance decides."""


class Objective(Protocol):
    """Path, prediction, weighting and law of times of one training problem."""

    name: str
    samplers: tuple[str, ...]
    time_range: tuple[float, float]
    weight: str
    learned_variance: bool
    outputs: Mapping[str, object]
    """What makes two networks' outputs mean the same, by the keys of the configuration."""
    time_law: TimeLaw

    def loss(self, net: Net, batch: Batch, rng: Rng) -> Losses:
        """The loss of each image; all randomness comes from `rng`."""
        part = self.time_law(rng, len(batch.y), batch.x.device)
        return self.loss_at(net, batch, part, rng.normal("noise", batch.x.shape, batch.x.device))

    def loss_at(self, net: Net, batch: Batch, part: Tensor, noise: Tensor) -> Losses:
        """The loss of each image at these times and with this noise.

        Args:
            net: the backbone in training.
            batch: data.
            part: (B,) what `time_law` drew; rows that are not real are at the middle time whatever it says.
            noise: shaped like `batch.x`.
        """

    def views(self, net: Net, batch: Batch, time: Tensor, noise: Tensor) -> Predictions:
        """The network's output on noised data.

        Args:
            net: the backbone.
            batch: data.
            time: (B,) float64 times of the linear path, inside (0, 1): sigma / alpha = time / (1 - time).
            noise: shaped like `batch.x`.
        """

    def velocity_error(self, net: Net, batch: Batch, time: Tensor, noise: Tensor) -> Tensor:
        """(B,) mean squared error of the predicted `noise - data`, the velocity of the linear path; see `views`.

        It is the same number for every objective whose network says the same of states with equal ratios of
        noise to signal, whatever it predicts, on whatever path.
        """
        views = self.views(net, batch, time, noise)
        return batch.per_image((views.noise - views.x0 - (noise - batch.x)) ** 2)

    def field(self, net: GuidedNet) -> Field:
        """The views of the network's output that samplers use."""

    def times(self, sampler: str, steps: int | str) -> Tensor:
        """The times that a sampler walks, from noise to data; float64 on the host."""


def guidance_during(net: GuidedNet, t: float) -> GuidedNet:
    """The net in a step that begins at t, in its own time; itself, unless it has a guidance that can be told."""
    during: Callable[[float], GuidedNet] | None = getattr(net, "during", None)
    return net if during is None else during(t)


def told_steps(net: GuidedNet) -> GuidedNet:
    """The net for an objective whose integer steps have one direction, whatever the network's `time` says."""
    if not hasattr(net, "during"):
        return net
    net = copy.copy(net)
    net.time = "index"  # type: ignore[attr-defined]
    return net
