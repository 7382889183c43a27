"""Guidance: the network's output, pushed away from that of a worse-informed one.

Acts on the output before the objective interprets it, as every official code of the lineage does. Intervals and
schedules are given in noise levels, 0 at data and 1 at noise.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.config import checks
from genfound.objectives.base import TimeAdapter

ENDS: dict[str, Callable[[float, float, float], bool]] = {
    "inclusive": lambda low, level, high: low <= level <= high,
    "strict": lambda low, level, high: low < level < high,
    "open": lambda low, level, high: (low == 0 or low < level) and (high == 1 or level < high),
}
"""Whether a noise level lies between ends."""


@dataclass
class Guidance(ABC):
    """out = reference + scale (conditional - reference).

    Attributes:
        scale: 1 is no guidance, and costs none.
        interval: [low, high] of noise levels in which guidance acts (Kynkaanniemi et al. 2024); outside it the
            reference is not computed. Inclusive ends at 0 and 1 are no limits.
        channels: `all`, or `first3` as DiT's, SiT's and LightningDiT's released samplers (guided only the first
            three latent channels, by oversight). A predicted variance is never guided.
        time_range: the objective's (data, noise) times.
        ends: `inclusive`; `strict` as in DDT and PixNerd; or `open`, strict but for ends at 0 and 1 (JiT).
        schedule: `constant`; `linear`, 1 + (scale - 1) level; or `power_cosine`, 1 + (scale - 1)
            (1 - cos(pi level^power)) / 2 (FiT's scale_pow): all of the scale at noise and none at data.
        power: of `power_cosine`.

    Raises:
        ValueError: an option that does not exist, or networks that cannot be guided so.
    """

    net: TimeAdapter
    scale: float
    interval: Sequence[float]
    channels: str
    time_range: tuple[float, float] = (0.0, 1.0)
    ends: str = "inclusive"
    schedule: str = "constant"
    power: float = 1.0

    copies = 1

    def __post_init__(self) -> None:
        checks.number("guidance.scale", self.scale)
        checks.interval("guidance.interval", self.interval)
        checks.one_of("guidance.channels", self.channels, ("all", "first3"))
        checks.one_of("guidance.ends", self.ends, ENDS)
        checks.one_of("guidance.schedule", self.schedule, ("constant", "linear", "power_cosine"))
        checks.number("guidance.power", self.power, 0, above=True)

    def __call__(self, batch: Batch, t: float, decide_at: float | None = None) -> Tensor:
        """Guided output at time t, shaped like the network's; whether it is guided is decided at `decide_at`."""
        if not self.acts(t if decide_at is None else decide_at):
            return self.outside(batch, t)
        return self.mix(batch, *self.pair(batch, t), self.scale_at(t))

    def outside(self, batch: Batch, t: float) -> Tensor:
        """The conditional output."""
        return self.net(batch, t)

    @abstractmethod
    def pair(self, batch: Batch, t: float) -> tuple[Tensor, Tensor]:
        """(conditional, reference) outputs at time t."""

    def level(self, t: float) -> float:
        """The noise level of a time, 0 at data and 1 at noise."""
        first, last = self.time_range
        return (t - first) / (last - first)

    def acts(self, t: float) -> bool:
        """Whether a step that begins at time t is guided."""
        (low, high), level = self.interval, min(max(self.level(t), 0.0), 1.0)
        return self.scale != 1 and ENDS[self.ends](low, level, high)

    def scale_at(self, t: float) -> float:
        """The scale of the schedule."""
        level = max(self.level(t), 0.0)
        if self.schedule == "constant":
            return self.scale
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


@dataclass
class ClassifierFreeGuidance(Guidance):
    """Guided by the network's own output for the null label, in one call (Ho & Salimans 2021).

    Attributes:
        doubled: the batch holds every image twice, the second time under the null label: the state of the
            released samplers of DiT, SiT, FiT and LightningDiT. The network sees the first half twice; the second
            half keeps the null output in channels that are not guided, which adaptive steps notice.
    """

    doubled: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale != 1 and self.net.null_label is None:
            raise ValueError("guidance needs a null label: train with model.label_drop > 0 or set guidance=none")
        self.doubled = self.doubled and self.scale != 1
        self.copies = 2 if self.doubled else 1

    def pair(self, batch: Batch, t: float) -> tuple[Tensor, Tensor]:
        """Both outputs from one call on twice the rows."""
        if self.doubled:
            first, _ = batch.x.chunk(2)
            both = replace(batch, x=torch.cat([first, first]))
        else:
            assert self.net.null_label is not None
            both = batch.join(replace(batch, y=torch.full_like(batch.y, self.net.null_label)))
        conditional, null = self.net(both, t).chunk(2)
        return conditional, null

    def mix(self, batch: Batch, conditional: Tensor, reference: Tensor, scale: float) -> Tensor:
        """As `Guidance.mix`; of a doubled batch, both halves."""
        first = super().mix(batch, conditional, reference, scale)
        return torch.cat([first, self.join(batch, first, reference)]) if self.doubled else first

    def outside(self, batch: Batch, t: float) -> Tensor:
        """The conditional output; of a doubled batch, both halves."""
        if not self.doubled:
            return super().outside(batch, t)
        conditional, reference = self.pair(batch, t)
        return torch.cat([conditional, self.join(batch, conditional, reference)])


@dataclass
class AutoGuidance(Guidance):
    """Guided by a weaker network, a smaller or less trained one that predicts the same (Karras et al. 2024)."""

    guide: TimeAdapter = field(kw_only=True)
    labels: str = "same"  # or `null_label`: what the guide is given in EDM2, or in NiT's and REPA's samplers

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.one_of("guidance.labels", self.labels, ("same", "null_label"))
        net, guide = self.net, self.guide
        if guide.token_spec != net.token_spec:
            raise ValueError(f"guidance.weights: its tokens are {guide.token_spec}, not {net.token_spec}")
        classes = guide.null_label, net.null_label
        if self.labels == "same" and None not in classes and classes[0] != classes[1]:
            raise ValueError(f"guidance.weights: it has {classes[0]} classes, and this network {classes[1]}")
        if self.labels == "null_label" and guide.null_label is None:
            needed = "a weaker network with a null label; set guidance.labels=same"
            raise ValueError(f"guidance.labels=null_label needs {needed}")

    def pair(self, batch: Batch, t: float) -> tuple[Tensor, Tensor]:
        """One call of each network."""
        y = batch.y if self.labels == "same" else torch.full_like(batch.y, self.guide.null_label or 0)
        return self.net(batch, t), self.guide(replace(batch, y=y), t)
