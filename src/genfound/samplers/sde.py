"""Samplers of the reverse SDE dx = (velocity - w score) dt + sqrt(2 w) dW, which has the marginals of the ODE.

SiT's transport/integrators.py, and with other options the SDE samplers of NiT and REPA. One network call a drift.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.config.checks import number, one_of
from genfound.objectives.base import Field
from genfound.objectives.flow import FlowField
from genfound.objectives.interpolants import Coefficients, Interpolant
from genfound.objectives.predictions import Predictions
from genfound.objectives.times import shifted_grid
from genfound.samplers.base import Progress, StepRng

Diffusion = Callable[[Interpolant, Tensor, float], Tensor]

Coefficient = Callable[[float], float]

POLE = 1e-3
"""Where the walk begins if the diffusion coefficient is infinite at pure noise."""


def _half_diffusion(path: Interpolant, t: Tensor, norm: float) -> Tensor:
    return norm * path.point(t).spread


DIFFUSIONS: dict[str, Diffusion] = {
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


@torch.no_grad()
def sde(
    field: Field,
    batch: Batch,
    times: Tensor,
    rng: StepRng,
    progress: Progress | None = None,
    shift: float | str = 1.0,
    method: str = "euler",
    diffusion: str = "sigma",
    norm: float = 1.0,
    last: str = "mean",
    last_step_size: float = 0.04,
) -> Batch:
    """Euler-Maruyama or Heun steps, then a last step of another kind. The state is float64.

    Args:
        field: of a flow.
        batch: noise.
        times: from noise to data.
        rng: noise of the steps.
        progress: called after each step.
        shift: of the times, see `shifted_grid`.
        method: `euler`, or `heun`, which averages two drifts after the noise was added.
        diffusion: w, a name of `DIFFUSIONS`.
        norm: factor of w.
        last: `mean`, a step along the drift; `euler`, one of the ODE; `tweedie`, the predicted data; all without
            noise. `none` takes every step with noise.
        last_step_size: where the last step begins; 0 makes it as long as the others.

    Raises:
        ValueError: an unknown name, a last step longer than the walk, or the score asked for where there is none.
    """
    assert isinstance(field, FlowField)
    check(method, diffusion, norm, last, last_step_size)
    form = DIFFUSIONS[diffusion]

    def w(t: float) -> float:
        return form(field.path, torch.tensor(t, dtype=torch.float64), norm).item()

    grid = sde_grid(times, 0.0 if last == "none" else last_step_size)
    if not w(grid[0].item()) < POLE**-2:  # infinite, or what rounding leaves of that
        grid[0] -= POLE
    walk = shifted_grid(grid, shift, batch).tolist()
    if method == "heun" and last == "none" and Coefficients.at(field.path, walk[-1]).sigma == 0:
        raise ValueError(
            "sampler.method=heun needs the score at pure data with sampler.last=none; set sampler.last=mean"
        )
    state, noisy = replace(batch, x=batch.x.double()), len(walk) - 1 if last == "none" else len(walk) - 2
    for step, (t, t_next) in enumerate(pairwise(walk)):
        if step < noisy:
            x = STEPS[method](field.during(t), state, t, t_next, w, functools.partial(rng.normal, step))
        else:
            x = LAST_STEPS[last](state.x, field.views(state, t), w(t), t - t_next)
        state = replace(state, x=x)
        if progress is not None:
            progress(step, replace(batch, x=x.float()))
    return replace(batch, x=state.x.float())


def check(method: str, diffusion: str, norm: float, last: str, last_step_size: float, **others: object) -> None:
    """Raise a ValueError for an option that `sde` does not take."""
    one_of("sampler.method", method, STEPS)
    one_of("sampler.diffusion", diffusion, DIFFUSIONS)
    one_of("sampler.last", last, ("none", *LAST_STEPS))
    number("sampler.norm", norm, 0)
    number("sampler.last_step_size", last_step_size, 0)


def sde_grid(times: Tensor, last_step_size: float) -> Tensor:
    """As many times, equidistant from the first one to `last_step_size`, and then 0; 0 leaves them as they are.

    Raises:
        ValueError: the last step is longer than the walk.
    """
    if not 0 <= last_step_size < times[0]:
        raise ValueError(f"sampler.last_step_size={last_step_size} must be at least 0 and less than {times[0]:g}")
    if last_step_size == 0:
        return times.clone()
    steps = torch.linspace(times[0].item(), last_step_size, len(times) - 1, dtype=torch.float64)
    return torch.cat([steps, steps.new_zeros(1)])


def _euler(
    field: FlowField, batch: Batch, t: float, t_next: float, w: Coefficient, noise: Callable[[], Tensor]
) -> Tensor:
    moved = batch.x + (t - t_next) * _drift(field, batch, t, w)
    return moved + math.sqrt(2 * w(t) * (t - t_next)) * noise().to(moved)


def _heun(
    field: FlowField, batch: Batch, t: float, t_next: float, w: Coefficient, noise: Callable[[], Tensor]
) -> Tensor:
    size = t - t_next
    start = replace(batch, x=batch.x + math.sqrt(2 * w(t) * size) * noise().to(batch.x))
    first = _drift(field, start, t, w)
    second = _drift(field, replace(batch, x=start.x + size * first), t_next, w)
    return start.x + size / 2 * (first + second)


def _drift(field: FlowField, batch: Batch, t: float, w: Coefficient) -> Tensor:
    """Towards data; one call of the network."""
    views = field.views(batch, t)
    return w(t) * views.score - views.velocity


STEPS = {"euler": _euler, "heun": _heun}
