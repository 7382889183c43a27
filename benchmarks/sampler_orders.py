"""Orders and errors of every sampler where the answer is known: `python benchmarks/sampler_orders.py`.

Data are N(0.8, 0.35^2) in every number and the network is exact, so that only the sampler errs. Seconds on a CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genfound import build
from genfound.batch import Batch
from genfound.layouts import Dense
from genfound.objectives.flow import FlowField
from genfound.objectives.interpolants import INTERPOLANTS, Coefficients
from genfound.objectives.times import time_grid

MEAN, STD = 0.8, 0.35
END = 0.2
"""Where the walk from noise ends; errors of low order are clean away from the ends."""

ODES: list[tuple[str, dict[str, Any], str]] = [
    ("euler", {}, "1"),
    ("heun", {}, "2"),
    ("dopri5", {"method": "midpoint"}, "2"),
    ("dopri5", {"method": "heun2"}, "2"),
    ("dopri5", {"method": "heun3"}, "3"),
    ("dopri5", {"method": "rk4"}, "4"),
]
SDES: list[tuple[str, dict[str, Any], str]] = [
    ("sde", {"method": method, "diffusion": diffusion, "last": "none"}, "1, weak")
    for method in ("euler", "heun")
    for diffusion in ("sigma", "sbdm", "constant")
]
"""Samplers with fixed steps, and their theoretical orders."""


@dataclass
class Exact:
    """The velocity of the known data on a path; counts its calls."""

    path: str
    calls: int = 0
    copies: int = 1

    def __call__(self, batch: Batch, t: float, decide_at: float | None = None) -> Tensor:
        """E[dx/dt | x_t]."""
        self.calls += 1
        p = Coefficients.at(INTERPOLANTS[self.path], t)
        centred = (batch.x.double() - p.alpha * MEAN) / (p.alpha**2 * STD**2 + p.sigma**2)
        return (p.d_alpha * (MEAN + p.alpha * STD**2 * centred) + p.d_sigma * p.sigma * centred).float()

    def moments(self, t: float) -> tuple[float, float]:
        """Mean and variance of x_t."""
        p = Coefficients.at(INTERPOLANTS[self.path], t)
        return float(p.alpha * MEAN), float(p.alpha**2 * STD**2 + p.sigma**2)


class Impulses:
    """Noise 1 for image k + 2 in step k, so that one call shows what every step's noise becomes."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def normal(self, step: int) -> Tensor:
        """(rows, 1, 1, 1)."""
        noise = torch.zeros(self.rows, 1, 1, 1)
        noise[min(step + 2, self.rows - 1)] = 1
        return noise


def errors(path: str, name: str, steps: int, end: float, options: dict[str, Any]) -> tuple[float, float, int]:
    """Errors of mean and standard deviation of the samples, and network calls.

    The network is affine in the state, so images that begin at 0 and 1 and impulses of noise tell both exactly.
    """
    net, start = Exact(path), 1.0 if name != "sde" else 0.95
    rows = steps + 2
    x = torch.zeros(rows, 1, 1, 1)
    x[1] = 1
    batch = Dense(1).to_batch(list(x), torch.zeros(rows, dtype=torch.long))
    field = FlowField(net, INTERPOLANTS[path], "velocity")
    sampler = build.sampler({"sampler": {"name": name, **options}})
    out = sampler(field, batch, time_grid(steps, start, end), Impulses(rows)).x.flatten().double()
    slope, kicks = out[1] - out[0], out[2:] - out[0]
    mean, variance = net.moments(start)
    found = float(out[0] + slope * mean), float((slope**2 * variance + (kicks**2).sum()).sqrt())
    true_mean, true_variance = net.moments(end)
    return abs(found[0] - true_mean), abs(found[1] - true_variance**0.5), net.calls


def label(name: str, options: dict[str, Any]) -> str:
    """The command line of a sampler."""
    return " ".join([name, *(f"{key}={value}" for key, value in options.items() if key != "last")])


def order_rows(path: str, samplers: list[tuple[str, dict[str, Any], str]], steps: tuple[int, int]) -> list[str]:
    """Measured orders of fixed steps, between two numbers of steps, and the errors of the larger one."""
    rows = []
    for name, options, theory in samplers:
        coarse, fine = (errors(path, name, n, END, options) for n in steps)
        pairs = zip(coarse[:2], fine[:2], strict=True)
        order = [f"{math.log2(a / b):.1f}" if min(a, b) > 2e-7 else "exact" for a, b in pairs]
        cells = [label(name, options), f"{fine[2] / steps[1]:.2g}", theory, *order, f"{fine[0]:.0e}", f"{fine[1]:.0e}"]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def adaptive_rows(path: str) -> list[str]:
    """Calls and errors of adaptive steps, all the way to the data."""
    rows = []
    for rtol in (1e-3, 1e-5):
        for clip in ("false", "true") if path == "linear" else ("true",):  # vp is not defined past its end
            options = {"rtol": rtol, "clip": clip == "true"}
            mean, std, calls = errors(path, "dopri5", 2, 1e-3, options)
            rows.append(f"| dopri5 rtol={rtol:.0e} clip={clip} | {calls} | {mean:.0e} | {std:.0e} |")
    return rows


def main() -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    for path in ("linear", "vp"):
        for samplers, steps in ((ODES, (8, 16)), (SDES, (64, 128))):
            print(f"\nPath `{path}`, {steps[1]} steps to t = {END}:\n")
            print("| sampler | calls a step | order | measured, mean | measured, std | error, mean | error, std |")
            print("|---|---|---|---|---|---|---|")
            print("\n".join(order_rows(path, samplers, steps)))
        print(f"\nPath `{path}`, adaptive, to t = 0.001:\n")
        print("| sampler | calls | error, mean | error, std |\n|---|---|---|---|")
        print("\n".join(adaptive_rows(path)))


if __name__ == "__main__":
    main()
