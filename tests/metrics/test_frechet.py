import numpy as np
import pytest
import torch

from genfound.metrics.frechet import Gaussian, Moments, frechet_distance


def normal(count: int, width: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * scale + shift


def test_diagonal_covariances_have_a_closed_form() -> None:
    means, a, b = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([1.0, 4.0, 0.0]), torch.tensor([9.0, 1.0, 2.0])
    zero = Gaussian(torch.zeros(3).double(), torch.diag(a).double())
    moved = Gaussian(means, torch.diag(b).double())
    expected = means.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert frechet_distance(zero, moved) == pytest.approx(float(expected), rel=1e-12)


def test_rotated_together_the_distance_stays() -> None:
    a, b = Moments.of(normal(500, 8, 0)).gaussian(), Moments.of(normal(400, 8, 1, 2.0, 0.5)).gaussian()
    turn = torch.linalg.qr(normal(8, 8, 2).double())[0]
    turned = [Gaussian(turn @ g.mean, turn @ g.covariance @ turn.T) for g in (a, b)]
    assert frechet_distance(*turned) == pytest.approx(frechet_distance(a, b), rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-10)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_sums_are_numpys_statistics() -> None:
    rows = normal(9000, 6, 3, 3.0, 5.0)
    gaussian = Moments.of(rows).gaussian()
    np.testing.assert_allclose(gaussian.mean, rows.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(gaussian.covariance, np.cov(rows.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-9)


def test_far_from_zero_the_covariance_keeps_its_digits() -> None:
    rows = normal(5000, 3, 4) + 100
    expected = np.cov(rows.double().numpy(), rowvar=False)
    np.testing.assert_allclose(Moments.of(rows).gaussian().covariance, expected, rtol=1e-8, atol=1e-8)


def test_too_few_rows_and_numbers_that_are_none() -> None:
    with pytest.raises(ValueError, match="at least two images"):
        Moments.of(normal(1, 4, 0)).gaussian()
    rows = normal(10, 4, 0)
    rows[3, 2] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        Moments.of(rows).gaussian()


def test_two_extractors_are_refused() -> None:
    a, b = (Moments.of(normal(20, width, 0)).gaussian() for width in (4, 5))
    with pytest.raises(ValueError, match="features of 4 and of 5 numbers"):
        frechet_distance(a, b)


def test_no_distance_is_never_less_than_none() -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        same = Moments.of(torch.randn(9, 30, generator=draw) * 100).gaussian()
        assert 0 <= frechet_distance(same, same) < 1e-6
