"""Guidance: the network's raw output, pushed away from that of a worse-informed one.

Acts on the raw output, before the objective interprets it, as every official code of the lineage does; so it is
told the network's own time. Intervals and schedules are given in noise levels, 0 at data and 1 at noise.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from genfound.backbones.base import Backbone
from genfound.batch import Batch
from genfound.config import checks
from genfound.objectives.base import GuidedNet


class Unguided:
    """The network itself, all images at the same time.

    Attributes:
        time: that of the network.
    """

    def __init__(self, net: Backbone) -> None:
        self.net = net
        self.time: str = getattr(net, "time", "data0")

    def during(self, t: float) -> GuidedNet:
        """Itself, in every step."""
        return self

    def __call__(self, batch: Batch, t: float) -> Tensor:
        """The network's output at its time t."""
        out: Tensor = self.net(batch, _same_time(batch, t))
        return out


def unguided(net: Backbone) -> GuidedNet:
    """The network itself, all images at the same time t."""
    return Unguided(net)


class Guidance(ABC):
    """out = reference + scale (conditional - reference).

    Args:
        net: backbone.
        scale: 1 is no guidance, and costs none.
        interval: [low, high] of noise levels in which guidance acts (Kynkaanniemi et al. 2024); outside it the
            reference is not computed. Inclusive ends at 0 and 1 are no limits.
        channels: `all`, or `first3` as DiT's, SiT's and LightningDiT's released samplers (guided only the first
            three latent channels, by oversight). A predicted variance is never guided.
        time_range: the objective's (data, noise) times.
        ends: `inclusive`, or `strict` as in DDT and PixNerd.
        schedule: `constant`; `linear`, 1 + (scale - 1) level; or `power_cosine`, 1 + (scale - 1)
            (1 - cos(pi level^power)) / 2 (FiT's scale_pow): all of the scale at noise and none at data.
        power: of `power_cosine`.

    Raises:
        ValueError: an unknown option.
    """

    def __init__(
        self,
        net: Backbone,
        scale: float,
        interval: Sequence[float],
        channels: str,
        time_range: tuple[float, float] = (0.0, 1.0),
        ends: str = "inclusive",
        schedule: str = "constant",
        power: float = 1.0,
    ) -> None:
        checks.one_of("guidance.channels", channels, ("all", "first3"))
        checks.one_of("guidance.ends", ends, ("inclusive", "strict"))
        checks.one_of("guidance.schedule", schedule, ("constant", "linear", "power_cosine"))
        self.low, self.high = checks.interval("guidance.interval", interval)
        self.net = net
        self.time: str = getattr(net, "time", "data0")
        self.scale = checks.number("guidance.scale", scale)
        self.channels = channels
        self.time_range = time_range
        self.ends = ends
        self.schedule = schedule
        self.power = checks.number("guidance.power", power, 0, above=True)
        self.decided: bool | None = None

    def __call__(self, batch: Batch, t: float) -> Tensor:
        """Guided output at the network's time t, shaped like the network's."""
        if not self.acts(t):
            return self.outside(batch, t)
        return self.mix(batch, *self.pair(batch, t), self.scale_at(t))

    def outside(self, batch: Batch, t: float) -> Tensor:
        """The conditional output."""
        out: Tensor = self.net(batch, _same_time(batch, t))
        return out

    @abstractmethod
    def pair(self, batch: Batch, t: float) -> tuple[Tensor, Tensor]:
        """(conditional, reference) outputs at the network's time t."""

    def acts(self, t: float) -> bool:
        """Whether a step of the network's time t is guided.

        Both sides are brought to the network's direction of time by the same subtraction, so that a time
        that equals an end of the interval is inside it.
        """
        if self.decided is not None:
            return self.decided
        first, last = self.time_range
        place = min(max((t - first) / (last - first), 0.0), 1.0)
        low, high = (1 - self.high, 1 - self.low) if self.time == "data1" else (self.low, self.high)
        inside = low <= place <= high if self.ends == "inclusive" else low < place < high
        return self.scale != 1 and inside

    def scale_at(self, t: float) -> float:
        """The scale of the schedule."""
        if self.schedule == "constant":
            return self.scale
        first, last = self.time_range
        place = (t - first) / (last - first)
        level = max(1 - place if self.time == "data1" else place, 0.0)
        if self.schedule == "linear":
            return 1 + (self.scale - 1) * level
        return 1 + (self.scale - 1) * (1 - math.cos(math.pi * level**self.power)) / 2

    def mix(self, batch: Batch, conditional: Tensor, reference: Tensor, scale: float) -> Tensor:
        """The formula on the guided channels, and the conditional output on the others."""
        return self.join(batch, reference + scale * (conditional - reference), conditional)

    def join(self, batch: Batch, guided: Tensor, other: Tensor) -> Tensor:
        """The guided channels of one output, and all others of another one."""
        axis = 1 if batch.layout == "dense" else -1
        width = batch.x.shape[axis]
        count = width if self.channels == "all" else 3 * width // self.net.token_spec.channels
        rest = other.shape[axis] - count
        return torch.cat([guided.narrow(axis, 0, count), other.narrow(axis, count, rest)], dim=axis)

    def during(self, t: float) -> GuidedNet:
        """This guidance in a step that begins at the network's time t: it acts in all stages, or in none."""
        step = copy.copy(self)
        step.decided = self.acts(t)
        return step


class ClassifierFreeGuidance(Guidance):
    """Guided by the network's own output for the null label, in one call (Ho & Salimans 2021).

    Args:
        net: backbone with a null label.
        doubled: the batch holds every image twice, the second time under the null label: the state of the
            released samplers of DiT, SiT, FiT and LightningDiT. The network sees the first half twice; the second
            half keeps the null output in channels that are not guided, which adaptive steps notice.
        options: those of `Guided`.

    Raises:
        ValueError: the network has no null label.
    """

    def __init__(self, net: Backbone, *args: Any, doubled: bool = False, **options: Any) -> None:
        super().__init__(net, *args, **options)
        if self.scale != 1 and net.null_label is None:
            raise ValueError("guidance needs a null label: train with model.label_drop > 0 or set guidance=none")
        self.doubled = doubled

    def pair(self, batch: Batch, t: float) -> tuple[Tensor, Tensor]:
        """Both outputs from one call on twice the rows."""
        if self.doubled:
            first, _ = batch.x.chunk(2)
            both = replace(batch, x=torch.cat([first, first]))
        else:
            assert self.net.null_label is not None
            both = batch.join(replace(batch, y=torch.full_like(batch.y, self.net.null_label)))
        out: Tensor = self.net(both, _same_time(both, t))
        conditional, null = out.chunk(2)
        return conditional, null

    def mix(self, batch: Batch, conditional: Tensor, reference: Tensor, scale: float) -> Tensor:
        """As `Guided.mix`; of a doubled batch, both halves."""
        first = super().mix(batch, conditional, reference, scale)
        return torch.cat([first, self.join(batch, first, reference)]) if self.doubled else first

    def outside(self, batch: Batch, t: float) -> Tensor:
        """The conditional output; of a doubled batch, both halves."""
        if not self.doubled:
            return super().outside(batch, t)
        conditional, reference = self.pair(batch, t)
        return torch.cat([conditional, self.join(batch, conditional, reference)])


class AutoGuidance(Guidance):
    """Guided by a weaker network (Karras et al. 2024).

    Args:
        net: backbone.
        weak: a smaller or less trained one, with the same outputs and the same time.
        labels: what the weak one is told: `same`, as in EDM2; or `null_label`, as in NiT's and REPA's samplers.
        options: those of `Guided`.

    Raises:
        ValueError: an unknown option, or networks that do not fit together.
    """

    def __init__(self, net: Backbone, weak: Backbone, *args: Any, labels: str = "same", **options: Any) -> None:
        super().__init__(net, *args, **options)
        self.labels = checks.one_of("guidance.labels", labels, ("same", "null_label"))
        self.weak = weak
        if getattr(weak, "time", "data0") != self.time:
            raise ValueError("guidance.weights: the weaker network counts time in the other direction")
        if weak.token_spec != net.token_spec:
            raise ValueError(f"guidance.weights: its tokens are {weak.token_spec}, not {net.token_spec}")
        classes = weak.null_label, net.null_label
        if labels == "same" and None not in classes and classes[0] != classes[1]:
            raise ValueError(f"guidance.weights: it has {classes[0]} classes, and this network {classes[1]}")
        if labels == "null_label" and weak.null_label is None:
            raise ValueError(
                "guidance.labels=null_label needs a weaker network with a null label; set guidance.labels=same"
            )

    def pair(self, batch: Batch, t: float) -> tuple[Tensor, Tensor]:
        """One call of each network."""
        conditional: Tensor = self.net(batch, _same_time(batch, t))
        y = batch.y if self.labels == "same" else torch.full_like(batch.y, self.weak.null_label or 0)
        reference: Tensor = self.weak(replace(batch, y=y), _same_time(batch, t))
        return conditional, reference


def _same_time(batch: Batch, t: float) -> Tensor:
    return torch.full((len(batch.y),), t, dtype=torch.float32, device=batch.x.device)
