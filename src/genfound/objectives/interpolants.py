"""Interpolants x_t = alpha(t) x + sigma(t) noise, from data at t = 0 to noise at the end of time.

Numbers of a point may be tensors shaped like t, or plain numbers where all images are at the same time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from genfound.batch import Batch

VP_SLOWEST, VP_FASTEST = 0.1, 20.0
"""Rates beta of the variance-preserving path at data and at noise (Song et al. 2021)."""


class Coefficients(NamedTuple):
    """Coefficients and their time derivatives."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor
    spread: Tensor
    """sigma sigma' - sigma^2 alpha' / alpha, half the squared diffusion of the forward process; infinite at alpha 0."""

    @property
    def wronskian(self) -> Tensor:
        """alpha sigma' - sigma alpha', positive: how fast signal turns into noise."""
        return self.alpha * self.d_sigma - self.sigma * self.d_alpha

    @property
    def growth(self) -> Tensor:
        """alpha' / alpha, the linear part of the drift; infinite at pure noise."""
        return self.d_alpha / self.alpha

    def state(self, x: Tensor, noise: Tensor) -> Tensor:
        """x_t of data and noise."""
        return self.alpha * x + self.sigma * noise

    def velocity(self, x: Tensor, noise: Tensor) -> Tensor:
        """dx_t/dt of data and noise."""
        return self.d_alpha * x + self.d_sigma * noise

    def of(self, batch: Batch) -> "Coefficients":
        """Coefficients (B,), one per image, as tensors that broadcast against `batch.x`."""
        return Coefficients(*(batch.expand(v.float().to(batch.x.device)) for v in self))

    @classmethod
    def at(cls, path: "Interpolant", t: float) -> "Coefficients":
        """The point of a time that all images share, in plain numbers."""
        point = path.point(torch.tensor(t, dtype=torch.float64))
        return cls(*(v.item() for v in point))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Interpolant:
    """One interpolant, with noise at time `end`."""

    point: Callable[[Tensor], Coefficients]  # of times, of the same shape
    time_of: Callable[[Tensor], Tensor]  # at which noise-to-signal ratios sigma / alpha occur
    end: float = 1.0
    pure: bool = True  # alpha is 0 at its end; the variance-preserving path keeps a trace of signal

    def with_noise(self, scale: float) -> "Interpolant":
        """The same path with so many times the noise."""

        def point(t: Tensor) -> Coefficients:
            alpha, sigma, d_alpha, d_sigma, spread = self.point(t)
            return Coefficients(alpha, scale * sigma, d_alpha, scale * d_sigma, scale**2 * spread)

        return self if scale == 1 else replace(self, point=point, time_of=lambda ratio: self.time_of(ratio / scale))


def linear(t: Tensor) -> Coefficients:
    """x_t = (1 - t) x + t noise (rectified flow; SiT's linear interpolant with time reversed)."""
    one = torch.ones_like(t)
    return Coefficients(1 - t, t, -one, one, t / (1 - t))


def triangle(t: Tensor) -> Coefficients:
    """alpha = cos t, sigma = sin t on [0, pi / 2] (NiT's loss.py)."""
    return _circle(torch.cos(t), torch.sin(t), 1.0)


def cosine(t: Tensor) -> Coefficients:
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2) (NiT, REPA)."""
    return _circle(torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2), math.pi / 2)


def gvp(t: Tensor) -> Coefficients:
    """The same path in SiT's arithmetic: float32 functions of u = 1 - t, coarse near data (path.py:GVPCPlan)."""
    u = (1 - t).float()
    return _circle(torch.sin(u * math.pi / 2), torch.cos(u * math.pi / 2), math.pi / 2)


def _circle(alpha: Tensor, sigma: Tensor, speed: float) -> Coefficients:
    """alpha^2 + sigma^2 = 1, at constant speed; the sum stands for its rounding, which cancels near noise."""
    spread = speed * sigma * (alpha**2 + sigma**2) / alpha
    return Coefficients(alpha, sigma, -speed * sigma, speed * alpha, spread)


def vp(t: Tensor) -> Coefficients:
    """alpha = exp(E), sigma = sqrt(1 - exp(2 E)), E = -t^2 (20 - 0.1) / 4 - 0.1 t / 2 (Song et al. 2021).

    In SiT's float32 arithmetic (path.py:VPCPlan), in which sigma is coarse near data.
    """
    u = (1 - t).float()
    speed = VP_FASTEST - VP_SLOWEST
    exponent = -0.25 * (1 - u) ** 2 * speed - 0.5 * (1 - u) * VP_SLOWEST
    slope = 0.5 * (1 - u) * speed + 0.5 * VP_SLOWEST  # of the exponent over u
    alpha, squared = torch.exp(exponent), torch.exp(2 * exponent)
    sigma = torch.sqrt(1 - squared)
    return Coefficients(alpha, sigma, -alpha * slope, squared * slope / sigma, slope)


def _vp_time(ratio: Tensor) -> Tensor:
    """Solves exp(-2 E) = 1 + ratio^2 for t, at most 1."""
    speed, level = VP_FASTEST - VP_SLOWEST, torch.log1p(ratio**2)
    return ((torch.sqrt(VP_SLOWEST**2 + 2 * speed * level) - VP_SLOWEST) / speed).clamp(max=1)


def _quarter_turn(ratio: Tensor) -> Tensor:
    return torch.atan(ratio) * 2 / math.pi


INTERPOLANTS: dict[str, Interpolant] = {
    "linear": Interpolant(linear, lambda ratio: ratio / (1 + ratio)),
    "gvp": Interpolant(gvp, _quarter_turn),
    "vp": Interpolant(vp, _vp_time, pure=False),
    "cosine": Interpolant(cosine, _quarter_turn),
    "triangle": Interpolant(triangle, torch.atan, end=math.pi / 2),
}
