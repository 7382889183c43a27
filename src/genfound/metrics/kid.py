"""Kernel distance (KID): squared maximum mean discrepancy under a cubic kernel, as torch-fidelity computes it."""

from typing import Any

import numpy as np
from torch import Tensor

from genfound.layers.float64 import double
from genfound.metrics.feature_metric import MeanStd, PairMetric

SEED = 2020
SUBSETS, SUBSET = 100, 1000


class KernelDistance(PairMetric):
    """KID, as torch-fidelity's; state is the features, those of rank 0 first.

    Args:
        subsets, size: how many random subsets, and of how many images each.
        reference, options: see `PairMetric`.
    """

    higher_is_better = False

    def __init__(
        self, reference: Tensor | None = None, subsets: int = SUBSETS, size: int = SUBSET, **options: Any
    ) -> None:
        super().__init__(reference, **options)
        self.subsets, self.size = subsets, size

    def compute(self) -> tuple[Tensor, ...]:
        """Mean and population standard deviation over subsets, float64."""
        real, samples = self.both()
        return kernel_distance(samples, real, self.subsets, self.size).tensors()


def kernel_distance(samples: Tensor, reference: Tensor, subsets: int = SUBSETS, size: int = SUBSET) -> MeanStd:
    """Kernel (x.y / D + 1)^3 on random subsets of features (N, D); the terms within a set are unbiased."""
    if min(len(samples), len(reference)) < size:
        raise ValueError(f"kid: subsets of {size:,} images need at least as many in each set")
    draw = np.random.RandomState(SEED)
    values = []
    for _ in range(subsets):
        x, y = (double(z[draw.choice(len(z), size, replace=False)]) for z in (samples, reference))
        xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = sum((kernel.sum() - kernel.trace()) / (size * (size - 1)) for kernel in (xx, yy))
        values.append(float(within - 2 * xy.mean()))
    return MeanStd(float(np.mean(values)), float(np.std(values)))
