"""Metrics of images as `torchmetrics.Metric`: `update`, `compute`, and state that is shared over ranks."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from genfound.layers.float64 import float64_device
from genfound.metrics.extractor import Extractor

Values = Tensor | np.ndarray | Sequence[np.ndarray]
"""Features (N, D) of any floating dtype, or images (height, width, 3) uint8."""


class MeanStd(NamedTuple):
    """Mean and population standard deviation over parts of a set."""

    mean: float
    std: float

    def named(self, name: str) -> dict[str, float]:
        """As figures."""
        return {name: self.mean, f"{name}_std": self.std}

    def tensors(self) -> tuple[Tensor, ...]:
        """Float64."""
        return torch.tensor(self, dtype=torch.float64).unbind()


class FeatureMetric(Metric):
    """A metric of features, or of uint8 images and the extractor that turns them into features.

    Args:
        extractor: `Inception` or a `Probe`; needed where `update` is given images.
        column: which of its outputs: `pool`, `spatial` or `logits`.
        options: of `torchmetrics.Metric`, such as `sync_on_compute`.
    """

    is_differentiable = False
    full_state_update = False
    reference: Any = None  # of the real images, where it was given

    def __init__(self, extractor: Extractor | None = None, column: str = "pool", **options: Any) -> None:
        super().__init__(**options)
        self.extractor, self.column = extractor, column

    def _apply(self, fn: Callable[..., Any], *options: Any) -> nn.Module:
        """Moved as the module that it belongs to, but to no device without float64."""
        place = fn(torch.zeros(0, device=self.device)).device
        return super()._apply(fn, *options) if float64_device(place) == place else self

    def features(self, values: Values, real: bool = False) -> Tensor:
        """Features, or images -> (N, D) on the device of the metric.

        Raises:
            ValueError: they are real, and there is a reference already.
        """
        if real and self.reference is not None:
            way = "leave reference out to collect real images"
            raise ValueError(f"real=True: this metric was given its reference; {way}")
        if isinstance(values, Tensor):
            if values.is_floating_point():
                return values.to(self.device)
            values = values.cpu().numpy()
        if any(image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 for image in values):
            raise ValueError("images must be uint8 (height, width, 3), and features a tensor of floats (N, D)")
        if self.extractor is None:
            raise ValueError(f"{type(self).__name__}(extractor=...) is needed to update with images, not features")
        return self.extractor(list(values))[self.column].to(self.device)


class PairMetric(FeatureMetric):
    """A metric that needs all features of two sets; those of rank 0 come first.

    Args:
        reference: features (M, D) of the real images; `None`: `update(..., real=True)` collects them.
        options: see `FeatureMetric`.
    """

    real: list[Tensor]
    samples: list[Tensor]

    def __init__(self, reference: Tensor | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.reference = reference
        self.add_state("samples", [], dist_reduce_fx="cat")
        self.add_state("real", [], dist_reduce_fx="cat")

    def update(self, values: Values, real: bool = False) -> None:
        """Add features, or images; `real` ones are the reference, see `features`."""
        (self.real if real else self.samples).append(self.features(values, real))

    def both(self) -> tuple[Tensor, Tensor]:
        """Features of the real images (M, D) and of the samples (N, D)."""
        real = dim_zero_cat(self.real) if self.reference is None else self.reference.to(self.device)
        return real, dim_zero_cat(self.samples)
