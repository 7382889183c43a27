"""Noise schedules of discrete diffusion, and the steps that a shorter process keeps; float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Sections = int | str | Sequence[int]
"""How many steps to keep: 250; "10,10,10" or [10, 10, 10], so many of each third; or "ddim50", a whole stride."""


def linear(steps: int) -> Tensor:
    """Ho et al. 2020: from 1e-4 to 0.02 in 1,000 steps, scaled for other numbers of steps."""
    scale = 1000 / steps
    return torch.linspace(1e-4 * scale, 0.02 * scale, steps, dtype=torch.float64)


def cosine(steps: int) -> Tensor:
    """Nichol & Dhariwal 2021, eq. 17: the signal's share of the variance falls like a squared cosine."""

    def share(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - share((i + 1) / steps) / share(i / steps), 0.999) for i in range(steps)]
    return torch.tensor(betas, dtype=torch.float64)


SCHEDULES: dict[str, Callable[[int], Tensor]] = {"linear": linear, "cosine": cosine}


def spaced(sections: Sections, steps: int) -> list[int]:
    """The kept steps in rising order; respace.py:space_timesteps of the official DiT and ADM.

    Several sections divide the process into equal parts, the first ones longer by one where it does not
    divide; each keeps evenly spaced steps, with its first and last one.

    Raises:
        ValueError: more steps than there are, none, or a number that no stride gives.
    """
    if isinstance(sections, str) and sections.startswith("ddim"):
        return _strided(_whole(sections.removeprefix("ddim"), sections), steps)
    pieces = [sections] if isinstance(sections, int) else sections.split(",") if isinstance(sections, str) else sections
    counts = [_whole(piece, sections) for piece in pieces]
    kept: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        length = steps // len(counts) + (i < steps % len(counts))
        if not 0 <= count <= length:
            raise ValueError(f"sampler.steps={sections}: {count} steps cannot be chosen from {length}")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride  # summed and rounded as the official code does
        start += length
    if not kept:
        raise ValueError(f"sampler.steps={sections} must be at least 1")
    return kept


def _strided(count: int, steps: int) -> list[int]:
    for stride in range(1, steps):
        if len(range(0, steps, stride)) == count:
            return list(range(0, steps, stride))
    raise ValueError(f"sampler.steps=ddim{count}: no whole stride gives {count} of {steps} steps")


def _whole(piece: int | str, sections: Sections) -> int:
    try:
        return int(piece)
    except ValueError:
        raise ValueError(
            f"sampler.steps={sections} is unknown; write a number, one per section (10,10,10) or ddim50"
        ) from None
