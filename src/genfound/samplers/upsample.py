"""Upsample guidance (arXiv 2404.01709): images larger than those of training, without training.

Early on, the noise that the network predicts for the large image is made to agree, in the mean over each square of
m x m latent pixels, with what it predicts for the image that is m times smaller.
"""

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from genfound.batch import Batch
from genfound.config import checks
from genfound.samplers.guidance import ClassifierFreeGuidance


@dataclass
class UpsampleGuidance(ClassifierFreeGuidance):
    """Classifier-free guidance of both images, and of the large one by the small one.

    A mean of m^2 numbers has less noise, so the small image is that of an earlier step: the one of the process with the
    nearest ratio of signal to noise, whose number is stretched by T / (T - 1), as released.

    Attributes:
        factor: m, how many times each side is longer than in training.
        strength: 1 takes over the mean of the small image.
        share: of the way from noise to data, on which it acts.
    """

    layout: ClassVar = "dense"  # of what is sampled, whatever that of the training was

    factor: int = field(kw_only=True)
    strength: float = field(kw_only=True)
    share: float = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.integer("guidance.factor", self.factor, 2)
        checks.number("guidance.strength", self.strength)
        checks.number("guidance.share", self.share, 0, 1)
        if self.net.process is None or self.doubled:
            needs = "objective=gaussian with objective.prediction=epsilon, and guidance.doubled=false"
            raise ValueError(f"guidance=upsample needs {needs}")
        if self.layout not in self.net.layouts:
            raise ValueError(f"guidance=upsample needs a model of layout={self.layout}; choose guidance=cfg")

    def __call__(self, batch: Batch, t: float, decide_at: float | None = None) -> Tensor:
        """The guided output at timestep t, (B, C, h, w) and more channels where a variance is learned."""
        out, m = super().__call__(batch, t, decide_at), self.factor
        assert self.net.process is not None
        if (t + 1) / len(self.net.process) < 1 - self.share:
            return out
        signal = self.signal(t)
        small = avg_pool2d(batch.x, m) / math.sqrt(signal + (1 - signal) / m**2)
        below = super().__call__(replace(batch, x=small, sizes=batch.sizes // m), self.earlier(t), decide_at)
        channels = batch.x.shape[1]
        change = below[:, :channels] / m - avg_pool2d(out[:, :channels], m)
        guided = out[:, :channels] + self.strength * interpolate(change, scale_factor=m, mode="nearest")
        return torch.cat([guided, out[:, channels:]], dim=1)

    def earlier(self, t: float) -> float:
        """The timestep of the small image, at most that of the large one."""
        assert self.net.process is not None
        signal = self.net.process.tables.alphas_cumprod[:-1].float()  # of all steps but that of the most noise
        ratio = signal / (1 - signal)
        here = self.signal(t)
        step = int((self.factor**2 * here / (1 - here) - ratio).abs().argmin()) + 1
        count = len(self.net.process)
        return min(step * count / (count - 1) - 1, t)

    def signal(self, t: float) -> float:
        """The share of the signal in the variance at the step before t, or at t."""
        assert self.net.process is not None
        return float(self.net.process.tables.alphas_cumprod[math.floor(t + 1e-6)])
