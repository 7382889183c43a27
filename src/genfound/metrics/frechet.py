"""Frechet distance between Gaussians fitted to two sets of features; all statistics are float64.

ADM's evaluator (guided-diffusion evaluations/evaluator.py) with the matrix square root in its symmetric form,
which is real by construction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 4096
"""Features are summed in blocks of so many rows, always the same ones, so that a sum has one order."""


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and covariance (D, D) of features, float64.

    Raises:
        ValueError: the shapes do not fit, or a number is not finite.
    """

    mean: Tensor
    covariance: Tensor

    def __post_init__(self) -> None:
        width = len(self.mean)
        if self.mean.shape != (width,) or self.covariance.shape != (width, width):
            raise ValueError(
                f"statistics of shapes {tuple(self.mean.shape)} and {tuple(self.covariance.shape)}: they must be "
                "a mean (D,) and a covariance (D, D)"
            )
        if not (self.mean.isfinite().all() and self.covariance.isfinite().all()):
            raise ValueError("the statistics hold numbers that are not finite")


class Moments:
    """Running sums of features.

    Args:
        width: number of features D.
        device: where to sum.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.total = torch.zeros(width, dtype=torch.float64, device=device)
        self.products = torch.zeros(width, width, dtype=torch.float64, device=device)

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """The sums of features (N, D)."""
        moments = cls(features.shape[1], features.device)
        for block in features.split(ROWS):
            moments.add(block)
        return moments

    def add(self, features: Tensor) -> None:
        """Add rows (N, D)."""
        rows = features.to(self.total.device, torch.float64)
        self.count += len(rows)
        self.total += rows.sum(dim=0)
        self.products.addmm_(rows.T, rows)

    def gaussian(self) -> Gaussian:
        """Mean, and covariance with the divisor N - 1.

        Raises:
            ValueError: fewer than two rows, or a feature that is not finite.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two images, not {self.count}")
        mean = self.total / self.count
        covariance = (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return Gaussian(mean, covariance)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr((A^1/2 B A^1/2)^1/2).

    Singular covariances need no offset: eigenvalues are clipped at 0, and so is what rounding leaves of no distance.

    Raises:
        ValueError: features of different widths.
    """
    if len(a.mean) != len(b.mean):
        raise ValueError(f"features of {len(a.mean):,} and of {len(b.mean):,} numbers are of different extractors")
    root = _root(a.covariance)
    product = root @ b.covariance.to(root.device) @ root
    mixed = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    shift = (a.mean - b.mean.to(a.mean.device)).square().sum()
    distance = shift + a.covariance.trace() + b.covariance.trace().to(shift.device) - 2 * mixed
    return float(distance.clamp(min=0))


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
