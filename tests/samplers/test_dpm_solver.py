"""DPM-Solver: its orders, grids and ends, on flows and on Gaussian diffusion."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.layouts import Dense
from genfound.objectives.gaussian import Gaussian
from genfound.objectives.interpolants import INTERPOLANTS
from genfound.objectives.times import time_grid
from genfound.samplers.dpm_solver import LARGEST, _levels, dpm_solver, orders
from tests.helpers import composed, sampler_of
from tests.samplers.toys import MEAN, STD, SeededNoise, exact, solution

BATCH = Dense(1).to_batch(list(torch.linspace(-2, 2, 9).view(9, 1, 1, 1)), torch.zeros(9))


def error(path: str, steps: int, **options: Any) -> float:
    """From the middle of the noise to almost data."""
    flow, field, _ = exact(path=path)
    start, end = 0.9 * flow.path.end, 0.1 * flow.path.end
    out = dpm_solver(field, BATCH, time_grid(steps, start, end), SeededNoise(BATCH), **options)
    return float((out.x - solution(flow, BATCH.x, start, end)).abs().mean())


@pytest.mark.parametrize("path", ["linear", "cosine", "triangle"])
@pytest.mark.parametrize("predicts", ["data", "noise"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_order(path: str, predicts: str, order: int) -> None:
    counts = (8, 17, 35) if order == 3 else (8, 16, 32)  # so that the last step of the third order is of the second
    errors = [error(path, n, order=order, predicts=predicts, spacing="log_snr") for n in counts]
    slopes = [math.log(a / b, n / m) for (a, b), (m, n) in zip(pairwise(errors), pairwise(counts), strict=True)]
    assert all(slope > order - 0.35 for slope in slopes), (slopes, errors)


def test_orders_make_as_many_calls_as_there_are_steps() -> None:
    assert [orders(n, 3) for n in (1, 2, 3, 4, 5, 6, 50)] == [
        [1], [2], [2, 1], [3, 1], [3, 2], [3, 2, 1], [3] * 16 + [2]
    ]  # fmt: skip
    assert orders(5, 2) == [2, 2, 1] and orders(3, 1) == [1, 1, 1]
    for steps in (1, 4, 9, 20):
        flow, field, net = exact(path="linear")
        dpm_solver(field, BATCH, flow.times(steps), SeededNoise(BATCH))
        assert len(net.asked) == steps


@pytest.mark.parametrize("path", INTERPOLANTS)
@pytest.mark.parametrize("spacing", ["time", "log_snr", "karras"])
@pytest.mark.parametrize("predicts", ["data", "noise"])
def test_it_goes_from_pure_noise_to_data(path: str, spacing: str, predicts: str) -> None:
    flow, field, _ = exact(path=path)
    out = dpm_solver(field, BATCH, flow.times(60), SeededNoise(BATCH), spacing=spacing, predicts=predicts)
    wanted = MEAN + STD * BATCH.x.double()
    assert (out.x - wanted).abs().max() < 0.03


def test_grids() -> None:
    flow, field, _ = exact(path="linear")
    for spacing, of in (("time", lambda r: r / (1 + r)), ("log_snr", torch.log), ("karras", lambda r: r ** (1 / 7))):
        levels = _levels(field, flow.times(10), spacing)
        ratio = torch.tensor([level.s / level.a for level in levels], dtype=torch.float64)
        assert ratio[0] == pytest.approx(LARGEST) and ratio[-1] == pytest.approx(1 / LARGEST)
        inside = of(ratio)[1:-1].diff()  # type: ignore[no-untyped-call]
        torch.testing.assert_close(inside, inside[:1].expand_as(inside), rtol=1e-6, atol=0)


class Trained:
    """The exact network of Gaussian diffusion of N(MEAN, STD^2), at whole steps and between them."""

    def __init__(self, objective: Gaussian) -> None:
        self.objective = objective

    def __call__(self, batch: Batch, t: Tensor) -> Tensor:
        log_a, _ = self.objective.process.log_signal(t[0].item())
        a = math.exp(log_a)
        centred = batch.x - math.sqrt(a) * MEAN
        noise = math.sqrt(1 - a) / (a * STD**2 + 1 - a) * centred
        if self.objective.prediction == "epsilon":
            return noise
        return (batch.x - math.sqrt(1 - a) * noise) / math.sqrt(a)


@pytest.mark.parametrize("name", ["gaussian_dim", "gaussian_x0"])
@pytest.mark.parametrize("spacing", ["time", "log_snr", "karras"])
def test_gaussian_diffusion(name: str, spacing: str) -> None:
    options = {key: value for key, value in composed(f"objective={name}")["objective"].items() if key[0] != "_"}
    objective = Gaussian(**options)
    times = objective.times(150 if spacing == "time" else 30, dpm_solver.needs)
    assert times[[0, -1]].tolist() == [999, 0]
    signal = objective.process.tables.alphas_cumprod
    out = dpm_solver(objective.field(Trained(objective)), BATCH, times, SeededNoise(BATCH), spacing=spacing)
    spread = [float((a * STD**2 + 1 - a).sqrt()) for a in (signal[-1], signal[0])]
    mean = [float(a.sqrt()) * MEAN for a in (signal[-1], signal[0])]
    wanted = mean[1] + spread[1] / spread[0] * (BATCH.x - mean[0])
    assert (out.x - wanted).abs().max() < 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 4}, "sampler.order=4 must be 1, 2 or 3"),
        ({"predicts": "score"}, "sampler.predicts=score is unknown; choose one of data, noise"),
        ({"spacing": "even"}, "sampler.spacing=even is unknown; choose one of time, log_snr, karras"),
    ],
)
def test_what_is_no_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        sampler_of("dpm_solver", **options)
    assert str(error.value) == message
