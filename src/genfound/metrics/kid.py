"""Kernel distance (KID): squared maximum mean discrepancy under a cubic kernel, as torch-fidelity computes it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from genfound.metrics.feature_metric import PairMetric

SEED = 2020
SUBSETS, SUBSET = 100, 1000


class KID(NamedTuple):
    """Mean and population standard deviation over subsets."""

    mean: float
    std: float


class KernelDistance(PairMetric):
    """KID, as torch-fidelity's; state is the features, those of rank 0 first.

    Args:
        reference: features (M, D) of the real images; `None`: `update(..., real=True)` collects them.
        subsets, size: how many random subsets, and of how many images each.
        options: see `PairMetric`.
    """

    higher_is_better = False

    def __init__(
        self, reference: Tensor | None = None, subsets: int = SUBSETS, size: int = SUBSET, **options: Any
    ) -> None:
        super().__init__(reference, **options)
        self.subsets, self.size = subsets, size

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean and population standard deviation over subsets, float64.

        Raises:
            ValueError: a set is smaller than a subset.
        """
        real, samples = self.both()
        found = kernel_distance(samples, real, self.subsets, self.size)
        return torch.tensor(found.mean, dtype=torch.float64), torch.tensor(found.std, dtype=torch.float64)


def kernel_distance(samples: Tensor, reference: Tensor, subsets: int = SUBSETS, size: int = SUBSET) -> KID:
    """Kernel (x.y / D + 1)^3 on random subsets of features (N, D); the terms within a set are unbiased.

    Raises:
        ValueError: a set is smaller than a subset.
    """
    if min(len(samples), len(reference)) < size:
        raise ValueError(f"kid: subsets of {size:,} images need at least as many in each set")
    draw = np.random.RandomState(SEED)
    values = []
    for _ in range(subsets):
        x, y = (_subset(features, size, draw) for features in (samples, reference))
        values.append(_discrepancy(x, y))
    return KID(float(np.mean(values)), float(np.std(values)))


def _subset(features: Tensor, size: int, draw: np.random.RandomState) -> Tensor:
    chosen = torch.from_numpy(draw.choice(len(features), size, replace=False)).to(features.device)
    return features[chosen].double()


def _discrepancy(x: Tensor, y: Tensor) -> float:
    count, width = x.shape
    within = sum((k.sum() - k.trace()) / (count * (count - 1)) for k in (_kernel(x, x, width), _kernel(y, y, width)))
    return float(within - 2 * _kernel(x, y, width).mean())


def _kernel(x: Tensor, y: Tensor, width: int) -> Tensor:
    return (x @ y.T / width + 1) ** 3
