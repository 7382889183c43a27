"""Frechet distance between Gaussians fitted to two sets of features; all statistics are float64.

ADM's evaluator (guided-diffusion evaluations/evaluator.py) with the matrix square root in its symmetric form,
which is real by construction.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from genfound.layers.float64 import double, float64_device
from genfound.metrics.feature_metric import FeatureMetric, Values

ROWS = 4096
"""Features are summed in blocks of so many rows, always the same ones, so that a sum has one order."""


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and covariance (D, D) of features, float64."""

    mean: Tensor
    covariance: Tensor

    def __post_init__(self) -> None:
        width, shapes = len(self.mean), (tuple(self.mean.shape), tuple(self.covariance.shape))
        if shapes != ((width,), (width, width)):
            text = "they must be a mean (D,) and a covariance (D, D)"
            raise ValueError(f"statistics of shapes {shapes[0]} and {shapes[1]}: {text}")
        if not (self.mean.isfinite().all() and self.covariance.isfinite().all()):
            raise ValueError("the statistics hold numbers that are not finite")


@dataclass(frozen=True)
class Moments:
    """Running sums of features: the number of rows, their sum (D,) and that of their products (D, D), float64."""

    count: Tensor
    total: Tensor
    products: Tensor

    @classmethod
    def zero(cls, width: int, device: torch.device | str = "cpu") -> Self:
        """Those of no features of D numbers, on a device, or on the host if it has no float64."""
        device = float64_device(torch.device(device))
        total, products = (torch.zeros(shape, dtype=torch.float64, device=device) for shape in (width, (width, width)))
        return cls(torch.zeros((), dtype=torch.int64, device=device), total, products)

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """The sums of features (N, D)."""
        moments = cls.zero(features.shape[1], features.device)
        moments.add(features)
        return moments

    def add(self, features: Tensor) -> None:
        """Add rows (N, D), in place."""
        for block in features.split(ROWS):
            rows = double(block, self.total.device)
            self.count.add_(len(rows))
            self.total.add_(rows.sum(dim=0))
            self.products.addmm_(rows.T, rows)

    def gaussian(self) -> Gaussian:
        """Mean, and covariance with the divisor N - 1."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two images, not {int(self.count)}")
        mean = self.total / self.count
        covariance = (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return Gaussian(mean, covariance)


class FrechetDistance(FeatureMetric):
    """FID where the features are Inception's `pool`, sFID where they are its `spatial` ones.

    State is float64 and summed over ranks; images may come in any order.

    Args:
        width: number of features D: 2,048 of `pool`, 2,023 of `spatial`.
        reference: statistics of the real images; `None`: `update(..., real=True)` collects them.
        options: see `FeatureMetric`.
    """

    higher_is_better = False

    def __init__(self, width: int, reference: Gaussian | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.reference = reference
        for kind in ("samples", "real") if reference is None else ("samples",):
            for name, zero in vars(Moments.zero(width)).items():
                self.add_state(f"{kind}_{name}", zero, dist_reduce_fx="sum")

    def update(self, values: Values, real: bool = False) -> None:
        """Add features (N, D), or images; `real` ones are the reference, see `features`."""
        features = self.features(values, real)
        self._moments("real" if real else "samples").add(features)

    def compute(self) -> Tensor:
        """The distance, float64."""
        reference = self._moments("real").gaussian() if self.reference is None else self.reference
        distance = frechet_distance(self._moments("samples").gaussian(), reference)
        return torch.tensor(distance, dtype=torch.float64)

    def _moments(self, kind: str) -> Moments:
        return Moments(*(getattr(self, f"{kind}_{name}") for name in ("count", "total", "products")))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr((A^1/2 B A^1/2)^1/2).

    Singular covariances need no offset: eigenvalues are clipped at 0, and so is what rounding leaves of no distance.
    """
    if len(a.mean) != len(b.mean):
        raise ValueError(f"features of {len(a.mean):,} and of {len(b.mean):,} numbers are of different extractors")
    values, vectors = torch.linalg.eigh((a.covariance + a.covariance.T) / 2)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ b.covariance.to(root.device) @ root
    mixed = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    shift = (a.mean - b.mean.to(a.mean.device)).square().sum()
    distance = shift + a.covariance.trace() + b.covariance.trace().to(shift.device) - 2 * mixed
    return float(distance.clamp(min=0))
