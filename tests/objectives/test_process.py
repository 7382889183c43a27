from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from genfound.layouts import Dense
from genfound.objectives.process import SCHEDULES, Process, linear
from tests.helpers import latents


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_posterior_is_what_bayes_says(schedule: str) -> None:
    """q(x_{t-1} | x_t, x_0) from q(x_t | x_{t-1}) and q(x_{t-1} | x_0)."""
    c = Process(SCHEDULES[schedule](100)).tables
    for t in (1, 40, 99):
        likelihood, prior = (1 - c.betas[t]) / c.betas[t], 1 / (1 - c.alphas_cumprod[t - 1])
        variance = 1 / (likelihood + prior)
        torch.testing.assert_close(c.posterior_variance[t], variance)
        torch.testing.assert_close(c.posterior_log_variance_clipped[t], variance.log())
        on_x0 = variance * prior * c.alphas_cumprod[t - 1].sqrt()
        on_xt = variance * (1 - c.betas[t]).sqrt() / c.betas[t]
        torch.testing.assert_close(c.posterior_mean_coef1[t], on_x0)
        torch.testing.assert_close(c.posterior_mean_coef2[t], on_xt)
    assert c.posterior_variance[0] == 0
    assert c.posterior_log_variance_clipped[0] == c.posterior_variance[1].log()
    assert c.fixed_large_variance.tolist() == [c.posterior_variance[1], *c.betas[1:]]


def test_noise_and_data_are_inverse() -> None:
    batch = Dense(1).to_batch(latents([(4, 4)] * 4), torch.arange(4))
    process = Process(linear(1000))
    c = process.on(batch.x.device).at(batch, torch.tensor([0, 10, 400, 700]))
    noise = torch.randn_like(batch.x)
    x_t = c.q_sample(batch.x, noise)
    torch.testing.assert_close(c.x0_from_noise(x_t, noise), batch.x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(c.noise_from_x0(x_t, batch.x), noise, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kept", [[0, 4, 8, 999], [980], list(range(0, 1000, 20))])
def test_a_shorter_process_noises_as_much_at_the_same_timesteps(kept: list[int]) -> None:
    process = Process(linear(1000))
    short = process.respaced(kept)
    torch.testing.assert_close(short.tables.alphas_cumprod, process.tables.alphas_cumprod[kept])
    assert short.tables.timesteps.tolist() == kept
    assert [short.step(t) for t in kept] == list(range(len(kept)))
    again = short.respaced(kept[-1:])
    torch.testing.assert_close(again.tables.alphas_cumprod, process.tables.alphas_cumprod[kept[-1:]])
    assert all(value.isfinite().all() for name, value in vars(short.tables).items() if name != "log_betas")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_signal_between_steps_is_smooth_and_falls(schedule: str) -> None:
    process = Process(SCHEDULES[schedule](100))
    assert process.log_signal(-1) == pytest.approx((0, math.log1p(-float(process.tables.betas[0]))))
    for t in (0, 1, 50, 98, 99):
        assert process.log_signal(t)[0] == pytest.approx(math.log(process.tables.alphas_cumprod[t]))
        assert process.log_signal(t - 1e-9)[1] == pytest.approx(process.log_signal(t + 1e-9)[1], rel=1e-4)
    times = torch.linspace(-1, 99, 1001).tolist()
    values, slopes = zip(*map(process.log_signal, times), strict=True)
    assert max(slopes) < 0
    assert all(b < a for a, b in pairwise(values))
