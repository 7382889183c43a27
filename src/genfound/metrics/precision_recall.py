"""Improved precision and recall (Kynkaanniemi et al. 2019), with the semantics of ADM's evaluator.

Distances are squared. The radius of a point is its distance to its k-th nearest neighbour, itself not counted;
a point at exactly the radius is inside. Sets are compared in blocks, so that memory does not grow with them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genfound.layers.float64 import double
from genfound.metrics.feature_metric import PairMetric

BLOCK = 4096
"""Rows and columns of a block of distances."""

ADM_BLOCK, NEIGHBOURS = 10_000, 3


class Manifold(NamedTuple):
    """Features (N, D) and, for each k, the radius of each: (N, len(k))."""

    features: Tensor
    radii: Tensor


class Shares(NamedTuple):
    """For each k: share of samples inside the reference, and of references inside the samples."""

    precision: list[float]
    recall: list[float]


class PrecisionRecall(PairMetric):
    """Precision and recall; state is the features, and images may come in any order.

    Args:
        k: which nearest neighbour is the radius of a point.
        half: float16 distances, as ADM's evaluator.
        reference, options: see `PairMetric`.
    """

    higher_is_better = True

    def __init__(
        self, reference: Tensor | None = None, k: int = NEIGHBOURS, half: bool = False, **options: Any
    ) -> None:
        super().__init__(reference, **options)
        self.k, self.half_distances = k, half

    def compute(self) -> dict[str, Tensor]:
        """`precision` and `recall`, float64."""
        shares = torch.tensor(shares_of_one_radius(*self.both(), self.k, self.half_distances), dtype=torch.float64)
        return dict(zip(Shares._fields, shares, strict=True))


def shares_of_one_radius(reference: Tensor, samples: Tensor, k: int, half: bool) -> tuple[float, float]:
    """Precision and recall of features (M, D) and (N, D); float16 distances in the blocks of ADM's evaluator."""
    block = ADM_BLOCK if half else BLOCK
    real, drawn = (manifold(points, [k], half, block, block) for points in (reference, samples))
    (precision,), (recall,) = precision_recall(real, drawn, half, block, block)
    return precision, recall


def squared_distances(u: Tensor, v: Tensor, half: bool = False) -> Tensor:
    """|u|^2 - 2 u.v + |v|^2 of rows (N, D) and (M, D) -> (N, M), not below 0.

    `half` is in float16 as ADM, unless a number overflows; otherwise it is in the dtype of the features.
    """
    if half:
        distances = _expanded(u.half(), v.half())
        if distances.isfinite().all():
            return distances.float()
        u, v = u.float(), v.float()
    return _expanded(u, v)


def manifold(
    features: Tensor, k: Sequence[int], half: bool = False, rows: int = BLOCK, columns: int = BLOCK
) -> Manifold:
    """The balls around features (N, D); `rows` and `columns` bound a block."""
    deepest = max(k)
    if len(features) <= deepest:
        raise ValueError(f"{len(features)} images are too few for {deepest} nearest neighbours of each")
    if not features.isfinite().all():
        raise ValueError("a feature is not finite")
    radii = []
    for u in features.split(rows):
        nearest = u.new_full((len(u), 0), 0, dtype=torch.float32 if half else u.dtype)
        for v in features.split(columns):
            candidates = torch.cat([nearest, squared_distances(u, v, half).to(nearest.dtype)], dim=1)
            kept = min(deepest + 1, candidates.shape[1])
            nearest = candidates.topk(kept, largest=False, sorted=True).values
        radii.append(nearest[:, list(k)])
    return Manifold(features, torch.cat(radii))


def precision_recall(
    reference: Manifold, samples: Manifold, half: bool = False, rows: int = BLOCK, columns: int = BLOCK
) -> Shares:
    """How much of each set lies inside the balls of the other."""
    inside = samples.radii.new_zeros(samples.radii.shape, dtype=torch.bool)
    covered = reference.radii.new_zeros(reference.radii.shape, dtype=torch.bool)
    for u, ru, is_covered in _blocks(reference, covered, rows):
        for v, rv, is_inside in _blocks(samples, inside, columns):
            distances = squared_distances(u, v, half)[..., None]
            is_inside.logical_or_((distances <= ru[:, None]).any(dim=0))
            is_covered.logical_or_((distances <= rv).any(dim=1))
    return Shares(*(double(found).mean(dim=0).tolist() for found in (inside, covered)))


def _blocks(balls: Manifold, found: Tensor, size: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Features, radii and views of the results, block by block."""
    return list(zip(*(x.split(size) for x in (balls.features, balls.radii, found)), strict=True))


def _expanded(u: Tensor, v: Tensor) -> Tensor:
    across = u @ v.T
    return (u.square().sum(dim=1)[:, None] - 2 * across + v.square().sum(dim=1)).clamp(min=0)
