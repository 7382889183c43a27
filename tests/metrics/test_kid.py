import numpy as np
import pytest
import torch
from torch import Tensor

from genfound.metrics.kid import kernel_distance


def features(count: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)) + shift


def test_one_subset_of_everything_is_the_unbiased_estimator() -> None:
    x, y = features(30, 0).double().numpy(), features(30, 1, 0.5).double().numpy()

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / 6 + 1) ** 3

    within = sum((kernel(z, z).sum() - np.trace(kernel(z, z))) / (30 * 29) for z in (x, y))
    expected = within - 2 * kernel(x, y).mean()
    distance = kernel_distance(torch.tensor(x), torch.tensor(y), subsets=3, size=30)
    assert distance.mean == pytest.approx(expected, rel=1e-10)
    assert distance.std == pytest.approx(0, abs=1e-10)


def test_it_grows_with_the_distance_and_needs_enough_images() -> None:
    near, far = (kernel_distance(features(200, 0), features(200, 1, s), 20, 50).mean for s in (0.1, 1.0))
    assert abs(near) < far / 5
    with pytest.raises(ValueError, match="subsets of 50 images"):
        kernel_distance(features(40, 0), features(200, 1), 20, 50)
