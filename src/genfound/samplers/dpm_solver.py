"""DPM-Solver and DPM-Solver++ (arXiv 2206.00927, 2211.01095): exponential integrators of the probability-flow ODE.

Steps are taken in lambda = log(alpha / sigma), over which the network's part of the ODE alone is approximated. A step
of order k calls the network k times, at its first time and the next k - 1 of the grid, so that a grid of n steps costs
n calls. The state is kept in float64; the network sees float32.

Legend: a and s are signal (alpha) and noise (sigma) of a time, h by how much lambda grows over a step.
"""

import itertools
import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.config.checks import one_of
from genfound.objectives.base import NoiseLevels
from genfound.samplers.base import Progress, StepRng, sampler, walk

LARGEST = 1e3
"""Of sigma / alpha, and of its inverse: pure noise and pure data are as far away as this."""

KARRAS = 7.0
"""The power in which the noise levels of `karras` are evenly spaced (arXiv 2206.00364)."""


class Level(NamedTuple):
    """Signal and noise of a time."""

    t: float
    a: float
    s: float

    @property
    def lam(self) -> float:
        """log(alpha / sigma)."""
        return math.log(self.a / self.s)


def check(order: int, predicts: str, spacing: str) -> None:
    """Refuse values that the options cannot have."""
    if order not in (1, 2, 3):
        raise ValueError(f"sampler.order={order} must be 1, 2 or 3")
    one_of("sampler.predicts", predicts, ("data", "noise"))
    one_of("sampler.spacing", spacing, ("time", "log_snr", "karras"))


@sampler(needs="levels", check=check)
def dpm_solver(
    field: NoiseLevels, batch: Batch, times: Tensor, rng: StepRng, progress: Progress | None = None, *,
    order: int = 3, predicts: str = "data", spacing: str = "time",
) -> Batch:  # fmt: skip
    """Single steps of up to `order`, of which the last ones are lower where the grid does not divide ("fast").

    `predicts` is what is taken to be a polynomial of lambda: data (DPM-Solver++) or noise. Times are evenly spaced in
    `time`, as they are given, or lambda (`log_snr`), or noise levels in Karras's way.
    """
    levels = _levels(field, times, spacing)

    def move(_: int, state: Batch, ends: tuple[int, int]) -> Tensor:
        return _step(field, state, levels[ends[0] : ends[1] + 1], predicts == "data")

    bounds = itertools.accumulate(orders(len(levels) - 1, order), initial=0)
    return walk(batch, itertools.pairwise(bounds), move, progress)


def orders(steps: int, highest: int) -> list[int]:
    """The orders of steps that make so many network calls; the last one is lower than the highest, if that is 3."""
    if highest < 3:
        return [highest] * (steps // highest) + [1] * (steps % highest)
    whole = steps // 3
    tail = {0: [2, 1], 1: [1], 2: [2]}[steps % 3]
    return [3] * (whole - (steps % 3 == 0)) + tail


def _levels(field: NoiseLevels, times: Tensor, spacing: str) -> list[Level]:
    """The grid, between finite ends."""
    given = torch.tensor([field.level(t) for t in times[[0, -1]].tolist()], dtype=torch.float64)  # (2, [a, s])
    noise, data = (given[:, 1] / given[:, 0]).clamp(1 / LARGEST, LARGEST)  # sigma / alpha at both ends
    share = torch.linspace(0, 1, len(times), dtype=torch.float64)
    if spacing == "time":
        first, last = field.time_of(torch.tensor([LARGEST, 1 / LARGEST], dtype=torch.float64)).tolist()
        times = times.clamp(min(first, last), max(first, last))
    elif spacing == "log_snr":
        times = field.time_of(torch.lerp(noise.log(), data.log(), share).exp())
    else:
        power = 1 / KARRAS
        times = field.time_of(torch.lerp(noise**power, data**power, share) ** KARRAS)
    return [Level(t, *field.level(t)) for t in times.tolist()]


def _step(field: NoiseLevels, state: Batch, grid: list[Level], data: bool) -> Tensor:
    """The state at the last time of a grid of as many steps as the order.

    With the noise in place of the data, signal and noise change places and time runs backwards.
    """
    start, end = grid[0], grid[-1]
    h = end.lam - start.lam

    def predicted(x: Tensor, level: Level) -> Tensor:
        both = field.data_and_noise(replace(state, x=x), level.t)
        return both[0 if data else 1].double()

    def solve(level: Level, slope: Tensor | None, weight: float) -> Tensor:
        """From the first time to another, with a slope of the prediction over the share of the step."""
        kept, made = (level.s / start.s, level.a) if data else (level.a / start.a, level.s)
        x = kept * state.x - made * math.expm1(_signed(level.lam - start.lam, data)) * first
        return x if slope is None else x - made * weight * slope

    first = predicted(state.x, start)
    if len(grid) == 2:
        return solve(end, None, 0.0)
    share = (grid[1].lam - start.lam) / h
    change = predicted(solve(grid[1], None, 0.0), grid[1]) - first
    whole = math.expm1(_signed(h, data))
    if len(grid) == 3:
        return solve(end, change / share, whole / 2)
    later = (grid[2].lam - start.lam) / h
    part = _signed(later * h, data)
    x = solve(grid[2], change / share, later * (math.expm1(part) / part - 1))
    change = predicted(x, grid[2]) - first
    return solve(end, change / later, whole / _signed(h, data) - 1)


def _signed(h: float, data: bool) -> float:
    return -h if data else h
