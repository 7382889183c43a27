from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.objectives.flow import FlowField
from genfound.objectives.times import time_grid
from tests.helpers import SAMPLERS, at_one_time, linear_flow, packed

MEAN, STD = 0.8, 0.35


def field(velocity: Callable[[Batch, float], Tensor]) -> FlowField:
    return linear_flow().field(at_one_time(velocity))


class NoNoise:
    """These samplers draw none."""

    def normal(self, step: int) -> Tensor:
        raise AssertionError(f"noise was drawn in step {step}")


def gaussian_velocity(batch: Batch, t: float) -> Tensor:
    """E[noise - data | x_t = x] for data N(MEAN, STD^2) on the linear path."""
    x = batch.x.double()
    variance = (1 - t) ** 2 * STD**2 + t**2
    slope = (t - (1 - t) * STD**2) / variance
    return slope * (x - (1 - t) * MEAN) - MEAN


def gaussian_solution(noise: Tensor, t: float) -> Tensor:
    """The flow that carries noise at time 1 to time t."""
    return (1 - t) * MEAN + math.sqrt((1 - t) ** 2 * STD**2 + t**2) * noise


def noise_batch() -> Batch:
    return packed([(3, 5), (4, 4), (2, 1)])


def solve(name: str, steps: int, start: float = 1.0, end: float = 0.0) -> Tensor:
    batch = noise_batch()
    return SAMPLERS[name](field(gaussian_velocity), batch, time_grid(steps, start, end), NoNoise()).x


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(name: str, order: int) -> None:
    """The slope of the error over the step size, both logarithmic, away from rounding."""
    steps = [16, 32, 64, 128]
    exact = gaussian_solution(noise_batch().x.double(), 0.2)
    start = gaussian_solution(noise_batch().x.double(), 1.0)
    torch.testing.assert_close(start, noise_batch().x.double())
    errors = [(solve(name, n, end=0.2).double() - exact).abs().mean().item() for n in steps]
    slopes = [math.log(a / b) / math.log(2) for a, b in pairwise(errors)]
    assert all(abs(slope - order) < 0.35 for slope in slopes), slopes


def test_heun_samples_the_data() -> None:
    torch.testing.assert_close(solve("heun", 100), gaussian_solution(noise_batch().x, 0), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("name", "steps", "calls"), [("euler", 7, 7), ("heun", 7, 13), ("heun", 1, 1)])
def test_number_and_times_of_network_calls(name: str, steps: int, calls: int) -> None:
    seen: list[float] = []

    def count(batch: Batch, t: float) -> Tensor:
        seen.append(t)
        return gaussian_velocity(batch, t)

    SAMPLERS[name](field(count), noise_batch(), time_grid(steps, 1.0, 0.0), NoNoise())
    assert len(seen) == calls
    assert seen[0] == 1.0
    assert min(seen) == pytest.approx(1 / steps)  # never at t = 0, where the velocity may be singular


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_progress_sees_every_step(name: str) -> None:
    seen: list[tuple[int, Tensor]] = []
    batch = noise_batch()
    out = SAMPLERS[name](
        field(gaussian_velocity),
        batch,
        time_grid(5, 1.0, 0.0),
        NoNoise(),
        lambda i, b: seen.append((i, b.x.clone())),
    )
    assert [i for i, _ in seen] == [0, 1, 2, 3, 4]
    assert torch.equal(seen[-1][1], out.x)
    assert len({x.sum().item() for _, x in seen}) == 5


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_the_state_is_kept_in_double_precision(name: str) -> None:
    """A thousand steps of 1e-8 vanish in float32."""
    dtypes: set[torch.dtype] = set()

    def tiny(batch: Batch, t: float) -> Tensor:
        dtypes.add(batch.x.dtype)
        return torch.full_like(batch.x, -1e-5)

    batch = noise_batch()
    batch.x.fill_(1.0)
    out = SAMPLERS[name](field(tiny), batch, time_grid(1000, 1.0, 0.0), NoNoise()).x
    assert dtypes == {torch.float32}
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, torch.full_like(out, 1 + 1e-5), atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_the_input_is_left_alone_and_has_no_gradient(name: str) -> None:
    batch = noise_batch()
    before = batch.x.clone()
    weight = torch.ones((), requires_grad=True)
    out = SAMPLERS[name](field(lambda b, t: b.x * weight), batch, time_grid(3, 1.0, 0.0), NoNoise())
    assert torch.equal(batch.x, before)
    assert not out.x.requires_grad
    assert torch.equal(out.y, batch.y)
