"""Networks whose samples are known exactly: data N(MEAN, STD^2) in every number, on any path."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.layouts import Dense
from genfound.objectives.flow import Flow, FlowField
from genfound.objectives.interpolants import Coefficients
from genfound.rng import Rng
from tests.helpers import SAMPLERS, linear_flow

MEAN, STD = 0.8, 0.35


class Exact:
    """What a perfect network says, and how often it was asked, when."""

    def __init__(self, flow: Flow, time: str = "data0") -> None:
        self.flow, self.time = flow, time
        self.asked: list[float] = []

    def __call__(self, batch: Batch, times: Tensor) -> Tensor:
        t, reversed_ = times[0].item(), self.time == "data1"
        self.asked.append(t)
        p = Coefficients.at(self.flow.path, self.flow.path.end - t if reversed_ else t)
        variance = p.alpha**2 * STD**2 + p.sigma**2
        centred = batch.x.double() - p.alpha * MEAN
        noise, x0 = p.sigma / variance * centred, MEAN + p.alpha * STD**2 / variance * centred
        velocity = p.d_alpha * x0 + p.d_sigma * noise
        answers = {
            "noise": noise,
            "x0": x0,
            "score": -centred / variance,
            "velocity": -velocity if reversed_ else velocity,
        }
        return answers[self.flow.prediction]


def exact(time: str = "data0", **options: object) -> tuple[Flow, FlowField, Exact]:
    """An objective, its field, and the network behind it."""
    flow = linear_flow(**options)
    net = Exact(flow, time)
    return flow, flow.field(net), net


def moments(flow: Flow, t: float) -> tuple[float, float]:
    """Mean and variance of x_t."""
    p = Coefficients.at(flow.path, t)
    return float(p.alpha * MEAN), float(p.alpha**2 * STD**2 + p.sigma**2)


def solution(flow: Flow, x: Tensor, start: float, end: float) -> Tensor:
    """Where the probability-flow ODE carries x from one time to another."""
    (mean, variance), (end_mean, end_variance) = moments(flow, start), moments(flow, end)
    return end_mean + (end_variance / variance) ** 0.5 * (x.double() - mean)


class SeededNoise:
    """Noise of each step; counts the draws."""

    def __init__(self, batch: Batch, seed: int = 0) -> None:
        self.shape, self.seed = batch.x.shape, seed
        self.drawn: list[int] = []

    def normal(self, step: int) -> Tensor:
        self.drawn.append(step)
        return Rng(self.seed).at(step).normal("noise", self.shape)


class OneHot:
    """Image k + 2 of a batch gets noise 1 in step k; all other noise is 0."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def normal(self, step: int) -> Tensor:
        noise = torch.zeros(self.rows, 1, 1, 1)
        noise[step + 2] = 1
        return noise


def sampled_moments(
    field: FlowField, name: str, times: Tensor, start: tuple[float, float], **options: object
) -> tuple[float, float]:
    """Exact mean and variance of what a sampler makes of N(start), whose networks are affine in the state.

    The end is a + b x + sum of c_k n_k: images 0 and 1 begin at 0 and 1 without noise, image k + 2 has n_k = 1.
    """
    rows = len(times) + 2
    x = torch.zeros(rows, 1, 1, 1)
    x[1] = 1
    batch = Dense(1).to_batch(list(x), torch.zeros(rows, dtype=torch.long))
    out = SAMPLERS[name](field, batch, times, OneHot(rows), **options).x.flatten().double()  # type: ignore[call-arg]
    slope, kicks = out[1] - out[0], out[2:] - out[0]
    mean, variance = start
    return float(out[0] + slope * mean), float(slope**2 * variance + (kicks**2).sum())


def doubled(batch: Batch, null: int) -> Batch:
    """Every image twice, the second time under the null label."""
    return batch.join(replace(batch, y=torch.full_like(batch.y, null)))
