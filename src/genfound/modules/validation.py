"""Loss and velocity error on images that are never trained on, at fixed times and noise.

`val/loss` is the objective's own loss; `val/velocity_mse` compares objectives, see `Objective.velocity_error`: the mean
over images at times uniform on `TIMES`, without any weight. Noise and times of an image depend on its place among the
held-out images alone, so both are the same for any packing, layout and number of ranks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from genfound.backbones.base import Backbone
from genfound.batch import Batch
from genfound.data.packing.loader import HeldOut
from genfound.objectives.base import Objective
from genfound.objectives.weighting import image_weight
from genfound.rng import Rng

TIMES = (0.02, 0.98)
"""Ends of the times of the velocity error: every published process has these ratios of noise to signal."""

GOLDEN = (5**0.5 - 1) / 2


def validation_sums(net: Backbone, objective: Objective, item: HeldOut) -> Tensor:
    """(4,) float64 of a micro-batch: weighted losses, weights, velocity errors, images."""
    batch, noise, positions = item.images, item.noise, item.micro.positions
    assert isinstance(batch, Batch) and noise is not None
    part = torch.cat([objective.time_law(Rng(0, "val", k), 1, torch.device("cpu")) for k in positions])
    filler = (0, len(batch.y) - len(positions))
    rows = (torch.nn.functional.pad(v, filler, value=0.5) for v in (part, uniform_times(positions)))
    drawn, times = (v.to(batch.x.device) for v in rows)
    weights = image_weight(batch.tokens, objective.weight) * batch.real
    loss = objective.loss_at(net, batch, drawn, noise).total
    error = objective.velocity_error(net, batch, times, noise)
    sums = (weights * loss, weights, error, batch.real)
    return torch.stack([values.double().sum() for values in sums])


def validation_metrics(sums: Tensor) -> dict[str, float]:
    """The metrics from the sums of all micro-batches of all ranks."""
    loss, error = (sums[::2] / sums[1::2]).tolist()
    return {"val/loss": loss, "val/velocity_mse": error}


def uniform_times(positions: Sequence[int]) -> Tensor:
    """(n,) float64 times, spread evenly over `TIMES` by the multiples of the golden ratio, however many there are."""
    low, high = TIMES
    return low + (high - low) * ((torch.tensor(positions, dtype=torch.float64) + 0.5) * GOLDEN % 1)
