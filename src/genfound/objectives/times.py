"""Times t in [0, 1], where 0 is data and 1 is noise: laws of training, grids of sampling."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from genfound.rng import Rng

TimeLaw = Callable[[Rng, int, torch.device], Tensor]


def uniform(mean: float, std: float) -> TimeLaw:
    """t ~ U[0, 1), which has no parameters."""
    return lambda rng, n, device: rng.uniform("time", (n,), device)


def logit_normal(mean: float, std: float) -> TimeLaw:
    """logit(t) ~ N(mean, std^2); Esser et al. 2024, and NiT's exp(n) / (1 + exp(n))."""
    return lambda rng, n, device: torch.sigmoid(rng.normal("time", (n,), device) * std + mean)


TIME_LAWS: dict[str, Callable[[float, float], TimeLaw]] = {"uniform": uniform, "logit_normal": logit_normal}


def time_grid(steps: int, start: float, end: float) -> Tensor:
    """(steps + 1,) float64 equidistant times.

    Raises:
        ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"sampler.steps={steps} must be at least 1")
    return torch.linspace(start, end, steps + 1, dtype=torch.float64)
