"""Every sampler converges to the exact answer at its theoretical order, on every path."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from genfound.layouts import Dense
from genfound.objectives.interpolants import INTERPOLANTS
from genfound.objectives.predictions import PREDICTIONS
from genfound.objectives.times import time_grid
from genfound.samplers.sde import DIFFUSIONS
from tests.helpers import SAMPLERS
from tests.samplers.toys import SeededNoise, exact, moments, sampled_moments, solution

STEPS = [8, 16, 32, 64]
END = 0.2
BATCH = Dense(1).to_batch(list(torch.linspace(-2, 2, 9).view(9, 1, 1, 1)), torch.zeros(9))


def slopes(errors: list[float]) -> list[float]:
    return [math.log2(a / b) for a, b in pairwise(errors)]


@pytest.mark.parametrize("path", INTERPOLANTS)
@pytest.mark.parametrize(
    ("name", "method", "order"),
    [("euler", None, 1), ("heun", None, 2), ("dopri5", "euler", 1), ("dopri5", "midpoint", 2), ("dopri5", "heun2", 2)],
)
def test_order_of_ode_solvers(path: str, name: str, method: str | None, order: int) -> None:
    flow, field, _ = exact(path=path)
    wanted = solution(flow, BATCH.x, flow.path.end, END)
    options = {} if method is None else {"method": method}
    errors = [
        (SAMPLERS[name](field, BATCH, time_grid(n, flow.path.end, END), SeededNoise(BATCH), **options).x - wanted)
        .abs()
        .mean()
        .item()
        for n in STEPS
    ]
    assert all(slope > order - 0.35 for slope in slopes(errors)), errors


@pytest.mark.parametrize(("method", "order"), [("heun3", 3), ("rk4", 4)])
def test_order_of_higher_methods_above_rounding(method: str, order: int) -> None:
    flow, field, _ = exact(path="vp")
    wanted = solution(flow, BATCH.x, 1, END)
    errors = [
        (SAMPLERS["dopri5"](field, BATCH, time_grid(n, 1, END), SeededNoise(BATCH), method=method).x - wanted)
        .abs()
        .mean()
        .item()
        for n in (4, 8, 16)
    ]
    assert all(abs(slope - order) < 0.5 for slope in slopes(errors)), errors


@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
@pytest.mark.parametrize("diffusion", DIFFUSIONS)
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_the_sde_has_weak_order_one(path: str, diffusion: str, method: str) -> None:
    flow, field, _ = exact(path=path)
    start, wanted = 0.95, moments(flow, END)
    errors: dict[int, list[float]] = {0: [], 1: []}
    for n in (32, 64, 128):
        options: dict[str, Any] = {"method": method, "diffusion": diffusion, "last": "none"}
        found = sampled_moments(field, "sde", time_grid(n, start, END), moments(flow, start), **options)
        for i in (0, 1):
            errors[i].append(abs(found[i] - wanted[i]))
    for i, name in ((0, "mean"), (1, "variance")):
        exact_already = max(errors[i]) < 1e-4  # a mean without error has no order
        assert exact_already or all(slope > 0.8 for slope in slopes(errors[i])), (name, errors[i])


@pytest.mark.parametrize("path", ["linear", "gvp", "cosine", "triangle"])
@pytest.mark.parametrize("rtol", [1e-3, 1e-5])
def test_dopri5_keeps_its_tolerance(path: str, rtol: float) -> None:
    flow, field, net = exact(path=path)
    out = SAMPLERS["dopri5"](field, BATCH, flow.times(10), SeededNoise(BATCH), rtol=rtol).x
    assert (out - solution(flow, BATCH.x, flow.path.end, 0)).abs().max() < 10 * rtol
    assert len(net.asked) < 100


@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("time", ["data0", "data1"])
@pytest.mark.parametrize(("name", "options"), [("heun", {}), ("dopri5", {"clip": True}), ("sde", {"last": "none"})])
def test_every_prediction_samples_the_data(
    path: str, prediction: str, time: str, name: str, options: dict[str, Any]
) -> None:
    """From the noise end of the interval to its data end, in whichever direction the network counts."""
    flow, field, _ = exact(time, path=path, prediction=prediction)
    data, noise = flow.sample_interval
    times = flow.times(200)
    assert times[[0, -1]].tolist() == [noise, data]
    found = sampled_moments(field, name, times, moments(flow, noise), **options)
    assert found == pytest.approx(moments(flow, data), abs=0.01)
