"""Solvers of the probability-flow ODE dx/dt = velocity(x, t) on a fixed grid.

The state is kept in float64, as the official NiT sampler does; the network sees float32.
"""

from dataclasses import replace
from functools import partial
from itertools import pairwise

from torch import Tensor

from genfound.batch import Batch
from genfound.config.checks import one_of
from genfound.objectives.base import Field
from genfound.objectives.times import Shift, check_shift, shifted_grid
from genfound.samplers.base import Progress, StepRng, sampler, walk

check = partial(check_shift, "sampler.shift")


@sampler(needs="velocity", check=check)
def euler(
    field: Field, batch: Batch, times: Tensor, rng: StepRng, progress: Progress | None = None, *, shift: Shift = 1.0
) -> Batch:
    """First order: one network call a step. `shift` moves the times, see `shifted_grid`."""

    def move(_: int, state: Batch, ends: tuple[float, float]) -> Tensor:
        t, t_next = ends
        return state.x + (t_next - t) * _slope(field, state, t)

    return walk(batch, pairwise(shifted_grid(times, shift, batch).tolist()), move, progress)


def check_heun(shift: Shift, guidance_at: str) -> None:
    """Refuse values that the options of `heun` cannot have."""
    check(shift)
    one_of("sampler.guidance_at", guidance_at, ("step", "slope"))


@sampler(needs="velocity", check=check_heun)
def heun(
    field: Field, batch: Batch, times: Tensor, rng: StepRng, progress: Progress | None = None, *,
    shift: Shift = 1.0, guidance_at: str = "step",
) -> Batch:  # fmt: skip
    """Second order: the mean of the slopes at both ends of a step; the last step is Euler's.

    Whether guidance acts is decided at the beginning of a `step`, for both slopes, or by the time of each `slope`.
    """

    def move(step: int, state: Batch, ends: tuple[float, float]) -> Tensor:
        t, t_next = ends
        slope = _slope(field, state, t)
        if step < len(times) - 2:
            there = replace(state, x=state.x + (t_next - t) * slope)
            slope = (slope + _slope(field, there, t_next, decide_at=t if guidance_at == "step" else None)) / 2
        return state.x + (t_next - t) * slope

    return walk(batch, pairwise(shifted_grid(times, shift, batch).tolist()), move, progress)


def _slope(field: Field, state: Batch, t: float, decide_at: float | None = None) -> Tensor:
    return field.velocity(replace(state, x=state.x.float()), t, decide_at).double()
