"""Flow matching: regress the velocity of a path between data and noise."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.objectives.base import GuidedNet, Losses, Net
from genfound.objectives.paths import PATHS
from genfound.objectives.times import TIME_LAWS, time_grid
from genfound.objectives.weighting import EXPONENTS
from genfound.rng import Rng


class Flow:
    """x_t = alpha x + sigma noise; the network predicts dx_t/dt = alpha' x + sigma' noise.

    Args:
        path: interpolant, a name of `PATHS`.
        prediction: what the network's output is: `velocity`.
        time: law of t, a name of `TIME_LAWS`.
        time_mean, time_std: of the normal law behind `logit_normal`.
        weight: how images count in a global step: `image`, `sqrt` or `token`.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """

    name = "flow"
    samplers = ("euler", "heun")
    time_range = (0.0, 1.0)
    learned_variance = False

    def __init__(
        self, *, path: str, prediction: str, time: str, time_mean: float, time_std: float, weight: str
    ) -> None:
        self.path = PATHS[_known("objective.path", path, PATHS)]
        _known("objective.prediction", prediction, ("velocity",))
        self.time_law = TIME_LAWS[_known("objective.time", time, TIME_LAWS)](time_mean, time_std)
        self.weight = _known("objective.weight", weight, EXPONENTS)

    def loss(self, net: Net, batch: Batch, rng: Rng) -> Losses:
        """Squared error of the velocity, averaged over each image's own elements."""
        device = batch.x.device
        t = self.time_law(rng, len(batch.y), device)  # (B,)
        t = torch.where(batch.real, t, torch.zeros_like(t))
        noise = rng.normal("noise", batch.x.shape, device)
        alpha, sigma, d_alpha, d_sigma = (batch.expand(v) for v in self.path(t))
        x_t = alpha * batch.x + sigma * noise
        target = d_alpha * batch.x + d_sigma * noise
        error = net(replace(batch, x=x_t), t).float() - target
        return Losses(total=batch.per_image(error**2), t=t)

    def times(self, sampler: str, steps: int | str) -> Tensor:
        """steps + 1 equidistant times from 1 to 0.

        Raises:
            ValueError: not a positive number of steps.
        """
        if isinstance(steps, str):
            raise ValueError(f"sampler.steps={steps} must be a whole number for objective=flow")
        return time_grid(steps, 1.0, 0.0)

    def field(self, net: GuidedNet) -> FlowField:
        """The network's velocity."""
        return FlowField(net)


class FlowField:
    """Views of a velocity network."""

    def __init__(self, net: GuidedNet) -> None:
        self.net = net

    def velocity(self, batch: Batch, t: float) -> Tensor:
        """dx/dt at time t, shaped like `batch.x`."""
        return self.net(batch, t)


def _known(key: str, value: str, names: Collection[str]) -> str:
    if value not in names:
        raise ValueError(f"{key}={value} is unknown; choose one of {', '.join(names)}")
    return value
