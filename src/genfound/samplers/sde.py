"""Samplers of the reverse SDE dx = (velocity - w score) dt + sqrt(2 w) dW, which has the marginals of the ODE.

SiT's transport/integrators.py, and with other options the SDE samplers of NiT and REPA. One network call a drift.
The last step begins at `last_step_size` (0: is as long as the others) and has no noise: `mean` goes along the drift,
`euler` along the ODE, `tweedie` to the predicted data; `none` takes it like the others.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.config.checks import number, one_of
from genfound.objectives.flow import FlowField
from genfound.objectives.interpolants import Coefficients, Interpolant
from genfound.objectives.predictions import Predictions
from genfound.objectives.times import Shift, check_shift, shifted_grid
from genfound.samplers.base import Progress, StepRng, sampler, walk

Coefficient = Callable[[float], float]
Noise = Callable[[], Tensor]

POLE = 1e-3
"""Where the walk begins if the diffusion coefficient is infinite at pure noise."""


def _half_diffusion(path: Interpolant, t: Tensor, norm: float) -> Tensor:
    return norm * path.point(t).spread


DIFFUSIONS: dict[str, Callable[[Interpolant, Tensor, float], Tensor]] = {
    "constant": lambda path, t, norm: torch.full_like(t, norm),
    "sbdm": _half_diffusion,  # that of the forward process (score-based diffusion models)
    "kl": _half_diffusion,  # SiT's name of sbdm with norm 1, which minimises a bound of the divergence
    "sigma": lambda path, t, norm: norm * path.point(t).sigma,
    "linear": lambda path, t, norm: norm * t,  # NiT's and REPA's, on every path
    "decreasing": lambda path, t, norm: 0.25 * (norm * torch.cos(math.pi * (1 - t)) + 1) ** 2,
    "increasing_decreasing": lambda path, t, norm: norm * torch.sin(math.pi * t) ** 2,
}
"""w(t) of a path at times t (any shape) with a norm."""

LAST_STEPS: dict[str, Callable[[Tensor, Predictions, float, float], Tensor]] = {
    "mean": lambda x, views, w, size: x + size * (w * views.score - views.velocity),
    "euler": lambda x, views, w, size: x - size * views.velocity,
    "tweedie": lambda x, views, w, size: views.x0,
}
"""The last step, without noise, from (state, views, w, size)."""


def check(shift: Shift, method: str, diffusion: str, norm: float, last: str, last_step_size: float) -> None:
    """Refuse values that the options cannot have."""
    check_shift("sampler.shift", shift)
    one_of("sampler.method", method, STEPS)
    one_of("sampler.diffusion", diffusion, DIFFUSIONS)
    one_of("sampler.last", last, ("none", *LAST_STEPS))
    number("sampler.norm", norm, 0)
    number("sampler.last_step_size", last_step_size, 0)


@sampler(needs="flow", check=check)
def sde(
    field: FlowField,
    batch: Batch,
    times: Tensor,
    rng: StepRng,
    progress: Progress | None = None,
    *,
    shift: Shift = 1.0,
    method: str = "euler",
    diffusion: str = "sigma",
    norm: float = 1.0,
    last: str = "mean",
    last_step_size: float = 0.04,
) -> Batch:
    """Steps of Euler-Maruyama, or of Heun's, which averages two drifts after the noise was added; then the last one."""
    form = DIFFUSIONS[diffusion]

    def w(t: float) -> float:
        return form(field.path, torch.tensor(t, dtype=torch.float64), norm).item()

    grid = sde_grid(times, 0.0 if last == "none" else last_step_size)
    if not w(grid[0].item()) < POLE**-2:  # infinite, or what rounding leaves of that
        grid[0] -= POLE
    points = shifted_grid(grid, shift, batch).tolist()
    if method == "heun" and last == "none" and Coefficients.at(field.path, points[-1]).sigma == 0:
        raise ValueError(
            "sampler.method=heun needs the score at pure data with sampler.last=none; set sampler.last=mean"
        )

    def move(step: int, state: Batch, ends: tuple[float, float]) -> Tensor:
        t, t_next = ends
        if last == "none" or step < len(points) - 2:
            return STEPS[method](field, state, t, t_next, w, lambda: rng.normal(step))
        return LAST_STEPS[last](state.x, field.views(state, t), w(t), t - t_next)

    return walk(batch, pairwise(points), move, progress)


def sde_grid(times: Tensor, last_step_size: float) -> Tensor:
    """As many times, equidistant from the first one to `last_step_size`, and then 0; 0 leaves them as they are."""
    if not 0 <= last_step_size < times[0]:
        raise ValueError(f"sampler.last_step_size={last_step_size} must be at least 0 and less than {times[0]:g}")
    if last_step_size == 0:
        return times.clone()
    steps = torch.linspace(times[0].item(), last_step_size, len(times) - 1, dtype=torch.float64)
    return torch.cat([steps, steps.new_zeros(1)])


def _euler(field: FlowField, batch: Batch, t: float, t_next: float, w: Coefficient, noise: Noise) -> Tensor:
    moved = batch.x + (t - t_next) * _drift(field, batch, t, w)
    return moved + math.sqrt(2 * w(t) * (t - t_next)) * noise().to(moved)


def _heun(field: FlowField, batch: Batch, t: float, t_next: float, w: Coefficient, noise: Noise) -> Tensor:
    size = t - t_next
    start = replace(batch, x=batch.x + math.sqrt(2 * w(t) * size) * noise().to(batch.x))
    first = _drift(field, start, t, w)
    second = _drift(field, replace(batch, x=start.x + size * first), t_next, w, decide_at=t)
    return start.x + size / 2 * (first + second)


def _drift(field: FlowField, batch: Batch, t: float, w: Coefficient, decide_at: float | None = None) -> Tensor:
    views = field.views(batch, t, decide_at)
    return w(t) * views.score - views.velocity


STEPS = {"euler": _euler, "heun": _heun}
