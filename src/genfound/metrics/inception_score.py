"""Inception Score: exp of the mean divergence of each image's class probabilities from those of all."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from genfound.layers.float64 import double
from genfound.metrics.feature_metric import FeatureMetric, MeanStd, Values

SPLITS, SHUFFLE_SEED = 10, 2020


class InceptionScore(FeatureMetric):
    """Inception Score; state is the logits, those of rank 0 first, whose order ADM's score depends on.

    Args:
        split_size: images of a split, as ADM; `None`: torch-fidelity's ten shuffled splits.
        options: see `FeatureMetric`.
    """

    higher_is_better = True
    logits: list[Tensor]

    def __init__(self, split_size: int | None = 5000, **options: Any) -> None:
        super().__init__(column="logits", **options)
        self.split_size = split_size
        self.add_state("logits", [], dist_reduce_fx="cat")

    def update(self, values: Values) -> None:
        """Add bias-free logits (N, K), or images."""
        self.logits.append(self.features(values))

    def compute(self) -> tuple[Tensor, ...]:
        """Mean and population standard deviation over splits, float64."""
        logits = dim_zero_cat(self.logits)
        found = torch_fidelity_score(logits) if self.split_size is None else adm_score(logits, self.split_size)
        return found.tensors()


def probabilities(logits: Tensor) -> Tensor:
    """(N, K) bias-free logits -> class probabilities in their dtype."""
    return logits.softmax(dim=1)


def adm_score(logits: Tensor, split_size: int) -> MeanStd:
    """ADM's score of float32 logits (N, K): consecutive splits of `split_size` images.

    A shorter last split weighs as much as the others. The score depends on the order of the images, which must be
    a random one of their classes.
    """
    return _over_splits(probabilities(logits).split(split_size))


def torch_fidelity_score(logits: Tensor, splits: int = SPLITS, shuffle: bool = True) -> MeanStd:
    """torch-fidelity's score of logits (N, K): float64, rows shuffled by a fixed seed, `splits` splits."""
    count = len(logits)
    if count < splits:
        raise ValueError(f"inception_score: {count} images cannot be divided into {splits} splits")
    order = np.random.RandomState(SHUFFLE_SEED).permutation(count) if shuffle else np.arange(count)
    values = double(logits)
    p = values[torch.from_numpy(order).to(values.device)].softmax(dim=1)
    bounds = [i * count // splits for i in range(splits + 1)]
    return _over_splits([p[start:stop] for start, stop in pairwise(bounds)])


def _over_splits(parts: Sequence[Tensor]) -> MeanStd:
    """Of each part (N, K) of probabilities exp of the mean over rows of sum p (log p - log mean p)."""
    scores = [double((torch.xlogy(p, p) - torch.xlogy(p, p.mean(dim=0))).sum(dim=1).mean().exp()) for p in parts]
    return MeanStd(float(torch.stack(scores).mean()), float(torch.stack(scores).std(correction=0)))
