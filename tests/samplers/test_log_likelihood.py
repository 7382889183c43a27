from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.layouts import Dense, Packed, Padded
from genfound.objectives.times import time_grid
from genfound.samplers.log_likelihood import log_likelihood
from tests.helpers import latents, linear_flow
from tests.samplers.toys import MEAN, STD, SeededNoise, exact, solution

SIZES = [(3, 5), (4, 4), (2, 1)]


def data(sizes: list[tuple[int, int]]) -> list[Tensor]:
    return [MEAN + STD * z for z in latents(sizes, channels=2)]


def true_log_density(z: Tensor) -> float:
    normal = torch.distributions.Normal(MEAN, STD)
    return normal.log_prob(z.double()).sum().item()


@pytest.mark.parametrize("path", ["linear", "gvp", "cosine"])
@pytest.mark.parametrize("layout", [Packed(1), Packed(1, 40, 5), Padded(1, 20), Dense(1)], ids=lambda v: v.name)
def test_the_true_log_density(path: str, layout: Packed | Padded | Dense) -> None:
    sizes = [(4, 4)] * 3 if layout.name == "dense" else SIZES
    batch = layout.to_batch(data(sizes), torch.zeros(3, dtype=torch.long))
    flow, field, _ = exact(path=path)
    times = flow.times(1).flip(0)
    found, noise = log_likelihood(field, batch, times, SeededNoise(batch), rtol=1e-5)
    assert found[:3].tolist() == pytest.approx([true_log_density(z) for z in data(sizes)], abs=1e-3)
    assert (found[3:] == 0).all()
    if layout.name == "dense":
        torch.testing.assert_close(noise.x, solution(flow, batch.x, 0, 1).float(), atol=1e-3, rtol=1e-3)


def test_signs_are_new_in_every_evaluation_and_unbiased() -> None:
    """A velocity M x over two channels, whose divergence is the trace of M in every pixel."""
    matrix = torch.tensor([[0.5, 2.0], [-1.0, 0.25]])
    field = linear_flow().field(lambda b, t: torch.einsum("ij,bjhw->bihw", matrix, b.x))
    batch = Dense(1).to_batch([torch.zeros(2, 8, 8)], torch.zeros(1))
    prior = -0.5 * 128 * math.log(2 * math.pi)
    found = []
    for seed in range(40):
        rng = SeededNoise(batch, seed)
        found.append(log_likelihood(field, batch, time_grid(4, 0.0, 1.0), rng, method="euler")[0].item() - prior)
        assert rng.drawn == [0, 1, 2, 3]
    spread = torch.tensor(found)
    assert spread.std() > 1
    assert spread.mean().item() == pytest.approx(64 * 0.75, abs=4 * spread.std().item() / 40**0.5)


def test_the_network_needs_no_gradient_and_keeps_none() -> None:
    weight = torch.ones((), requires_grad=True)
    batch = Dense(1).to_batch([torch.ones(1, 2, 2)], torch.zeros(1))

    def net(b: Batch, t: float) -> Tensor:
        return weight * b.x

    found, noise = log_likelihood(
        linear_flow().field(net), batch, time_grid(3, 0.0, 1.0), SeededNoise(batch), method="euler"
    )
    assert not found.requires_grad
    assert not noise.x.requires_grad
    assert weight.grad is None
