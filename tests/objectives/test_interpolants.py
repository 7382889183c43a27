from __future__ import annotations

import math

import pytest
import torch

from genfound.objectives.interpolants import INTERPOLANTS, Coefficients


def middle(path: str, n: int = 9) -> torch.Tensor:
    end = INTERPOLANTS[path].end
    return torch.linspace(0.05 * end, 0.95 * end, n, dtype=torch.float64, requires_grad=True)


def test_the_linear_path() -> None:
    point = INTERPOLANTS["linear"].point(torch.tensor([0.0, 0.25, 1.0]))
    assert point.alpha.tolist() == [1, 0.75, 0]
    assert point.sigma.tolist() == [0, 0.25, 1]
    assert point.d_alpha.tolist() == [-1, -1, -1]
    assert point.d_sigma.tolist() == [1, 1, 1]


@pytest.mark.parametrize("path", INTERPOLANTS)
def test_derivatives(path: str) -> None:
    t = middle(path)
    point = INTERPOLANTS[path].point(t)
    for value, derivative in ((point.alpha, point.d_alpha), (point.sigma, point.d_sigma)):
        (slope,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        torch.testing.assert_close(slope.float(), derivative.detach().float(), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("path", INTERPOLANTS)
def test_paths_join_data_and_noise(path: str) -> None:
    own = INTERPOLANTS[path]
    point = own.point(torch.tensor([0.0, own.end], dtype=torch.float64))
    assert point.alpha[0] == pytest.approx(1, abs=1e-6)
    assert point.sigma.tolist() == pytest.approx([0, 1], abs=1e-4)
    trace = math.exp(-(20 - 0.1) / 4 - 0.05)  # of signal, in the variance-preserving path
    assert point.alpha[1] == pytest.approx(0 if own.pure else trace, abs=1e-6)


@pytest.mark.parametrize("path", ["gvp", "vp", "cosine", "triangle"])
def test_these_paths_preserve_variance(path: str) -> None:
    point = INTERPOLANTS[path].point(middle(path))
    torch.testing.assert_close(point.alpha**2 + point.sigma**2, torch.ones_like(point.alpha))


def test_the_cosine_path_in_three_spellings() -> None:
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    cosine, gvp, triangle = (
        INTERPOLANTS[name].point(t * INTERPOLANTS[name].end) for name in ("cosine", "gvp", "triangle")
    )
    for i in range(4):
        scale = 1 if i < 2 else math.pi / 2
        torch.testing.assert_close(cosine[i].float(), gvp[i].float(), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(cosine[i], triangle[i] * scale)


@pytest.mark.parametrize("path", INTERPOLANTS)
def test_the_time_of_a_noise_level(path: str) -> None:
    own, t = INTERPOLANTS[path], middle(path).detach()
    point = own.point(t)
    torch.testing.assert_close(own.time_of((point.sigma / point.alpha).double()), t, atol=1e-4, rtol=1e-4)


def test_derived_numbers() -> None:
    t = torch.tensor([0.25, 0.5])
    point = INTERPOLANTS["linear"].point(t)
    torch.testing.assert_close(point.wronskian, torch.ones(2))
    torch.testing.assert_close(point.growth, -1 / (1 - t))
    torch.testing.assert_close(point.spread, t / (1 - t))
    assert point.spread[0] == pytest.approx(Coefficients.at(INTERPOLANTS["linear"], 0.25).spread)


def test_the_variance_preserving_path_is_that_of_its_rates() -> None:
    """beta(t) = 0.1 + 19.9 t: growth is -beta / 2, half the squared diffusion beta / 2."""
    t = torch.tensor([0.1, 0.4, 0.9])
    point, beta = INTERPOLANTS["vp"].point(t), 0.1 + 19.9 * t
    torch.testing.assert_close(point.growth, -beta / 2)
    torch.testing.assert_close(point.spread, beta / 2)
