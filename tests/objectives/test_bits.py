from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from genfound.objectives.bits import discretised_bits, kl_bits


def test_kl_of_two_normals() -> None:
    def log_density(x: Tensor, mean: float, log_variance: float) -> Tensor:
        return -0.5 * (log_variance + (x - mean) ** 2 / math.exp(log_variance) + math.log(2 * math.pi))

    x = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    p, q = log_density(x, 0.4, 0.2), log_density(x, -0.3, 1.1)
    expected = torch.trapezoid(p.exp() * (p - q), x) / math.log(2)
    ours = kl_bits(*(torch.tensor(v, dtype=torch.float64) for v in (0.4, 0.2, -0.3, 1.1)))
    torch.testing.assert_close(ours, expected)
    assert kl_bits(*(torch.tensor(v) for v in (0.4, 0.2, 0.4, 0.2))) == 0


@pytest.mark.parametrize(("mean", "log_variance"), [(0.1, -3.0), (-0.99, -6.0), (0.4, -9.0)])
def test_the_masses_of_all_8_bit_values_add_up_to_one(mean: float, log_variance: float) -> None:
    values = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    bits = discretised_bits(values, torch.tensor(mean), torch.tensor(log_variance, dtype=torch.float64))
    assert (2**-bits).sum().item() == pytest.approx(1, abs=1e-8)
