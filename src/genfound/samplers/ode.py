"""Solvers of the probability-flow ODE dx/dt = velocity(x, t) on a fixed grid.

The state is kept in float64, as the official NiT sampler does; the network sees float32.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.objectives.base import Field
from genfound.objectives.times import shifted_grid
from genfound.samplers.base import Progress, StepRng


def euler(
    field: Field,
    batch: Batch,
    times: Tensor,
    rng: StepRng,
    progress: Progress | None = None,
    shift: float | str = 1.0,
) -> Batch:
    """First order: one network call a step. `shift` moves the times, see `shifted_grid`."""
    x = batch.x.double()
    for step, (t, t_next) in enumerate(pairwise(shifted_grid(times, shift, batch).tolist())):
        x = x + (t_next - t) * _slope(field, batch, x, t)
        if progress is not None:
            progress(step, replace(batch, x=x.float()))
    return replace(batch, x=x.float())


def heun(
    field: Field,
    batch: Batch,
    times: Tensor,
    rng: StepRng,
    progress: Progress | None = None,
    shift: float | str = 1.0,
) -> Batch:
    """Second order: the mean of the slopes at both ends of a step; the last step is Euler's.

    Whether guidance acts is decided at the beginning of a step, for both slopes.
    """
    x = batch.x.double()
    last = len(times) - 2
    for step, (t, t_next) in enumerate(pairwise(shifted_grid(times, shift, batch).tolist())):
        during = field.during(t)
        slope = _slope(during, batch, x, t)
        if step < last:
            slope = (slope + _slope(during, batch, x + (t_next - t) * slope, t_next)) / 2
        x = x + (t_next - t) * slope
        if progress is not None:
            progress(step, replace(batch, x=x.float()))
    return replace(batch, x=x.float())


def _slope(field: Field, batch: Batch, x: Tensor, t: float) -> Tensor:
    with torch.no_grad():
        return field.velocity(replace(batch, x=x.float()), t).double()
