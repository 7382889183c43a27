"""Inception Score: exp of the mean divergence of each image's class probabilities from those of all."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ROWS = 512
"""Rows per call of the softmax, as ADM."""

SPLITS, SHUFFLE_SEED = 10, 2020


class Score(NamedTuple):
    """Mean and population standard deviation over splits."""

    mean: float
    std: float


def probabilities(logits: Tensor) -> Tensor:
    """(N, K) bias-free logits -> class probabilities in their dtype."""
    return torch.cat([block.softmax(dim=1) for block in logits.split(ROWS)])


def adm_score(logits: Tensor, split_size: int) -> Score:
    """ADM's score of float32 logits (N, K): consecutive splits of `split_size` images.

    A shorter last split weighs as much as the others. The score depends on the order of the images, which must be
    a random one of their classes.
    """
    return _over_splits(probabilities(logits).split(split_size))


def torch_fidelity_score(logits: Tensor, splits: int = SPLITS, shuffle: bool = True) -> Score:
    """torch-fidelity's score of logits (N, K): float64, rows shuffled by a fixed seed, `splits` splits.

    Raises:
        ValueError: fewer images than splits.
    """
    count = len(logits)
    if count < splits:
        raise ValueError(f"inception_score: {count} images cannot be divided into {splits} splits")
    order = np.random.RandomState(SHUFFLE_SEED).permutation(count) if shuffle else np.arange(count)
    p = logits.double()[torch.from_numpy(order).to(logits.device)].softmax(dim=1)
    bounds = [i * count // splits for i in range(splits + 1)]
    return _over_splits([p[start:stop] for start, stop in pairwise(bounds)])


def _over_splits(parts: tuple[Tensor, ...] | list[Tensor]) -> Score:
    scores = torch.stack([_score(part) for part in parts]).double()
    return Score(float(scores.mean()), float(scores.std(correction=0)))


def _score(p: Tensor) -> Tensor:
    """exp of the mean over rows of sum p (log p - log mean p)."""
    divergence = torch.xlogy(p, p) - torch.xlogy(p, p.mean(dim=0))
    return divergence.sum(dim=1).mean().exp()
