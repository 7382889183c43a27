"""Guidance: the network's raw output, pushed away from that of a worse-informed one.

Acts on the raw output, before the objective interprets it, as every official code of the lineage does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from genfound.backbones.base import Backbone
from genfound.batch import Batch
from genfound.objectives.base import GuidedNet


def unguided(net: Backbone) -> GuidedNet:
    """The network itself, all images at the same time t."""
    return lambda batch, t: net(batch, _same_time(batch, t))


class ClassifierFree:
    """out = null + scale (conditional - null), Ho & Salimans 2021.

    Args:
        net: backbone with a null label.
        scale: 1 is no guidance, and costs none.
        interval: [low, high] of times, both inclusive, in which guidance acts (Kynkaanniemi et al. 2024);
            outside it the null pass is not computed.
        channels: `all`, or `first3` as DiT's and SiT's released samplers (guided only the first three
            latent channels, by oversight). A predicted variance is never guided.
        time_range: the objective's (data, noise) times, of which the interval is a part.

    Raises:
        ValueError: the network has no null label, or an unknown option.
    """

    def __init__(
        self,
        net: Backbone,
        scale: float,
        interval: Sequence[float],
        channels: str,
        time_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        if scale != 1 and net.null_label is None:
            raise ValueError("guidance needs a null label: train with model.label_drop > 0 or set guidance=none")
        if channels not in ("all", "first3"):
            raise ValueError(f"guidance.channels={channels} is unknown; choose all or first3")
        if len(interval) != 2 or interval[0] > interval[1]:
            raise ValueError(f"guidance.interval={list(interval)} must be [low, high] with low <= high")
        self.net = net
        self.scale = scale
        self.low, self.high = interval
        self.channels = channels
        self.time_range = time_range

    def __call__(self, batch: Batch, t: float) -> Tensor:
        """Guided output, shaped like the network's."""
        first, last = self.time_range
        if self.scale == 1 or not self.low <= (t - first) / (last - first) <= self.high:
            out: Tensor = self.net(batch, _same_time(batch, t))
            return out
        assert self.net.null_label is not None
        null = replace(batch, y=torch.full_like(batch.y, self.net.null_label))
        both = batch.join(null)
        pair: Tensor = self.net(both, _same_time(both, t))
        conditional, unconditional = pair.chunk(2)
        guided = unconditional + self.scale * (conditional - unconditional)
        axis = 1 if batch.layout == "dense" else -1
        width = batch.x.shape[axis]
        count = width if self.channels == "all" else 3 * width // self.net.token_spec.channels
        rest = conditional.shape[axis] - count
        return torch.cat([guided.narrow(axis, 0, count), conditional.narrow(axis, count, rest)], dim=axis)


def _same_time(batch: Batch, t: float) -> Tensor:
    return torch.full((len(batch.y),), t, dtype=torch.float32, device=batch.x.device)
