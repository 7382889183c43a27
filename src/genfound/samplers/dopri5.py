"""The probability-flow ODE by torchdiffeq, as SiT, FiTv2 and LightningDiT sample.

State and network are float32, steps float64. torchdiffeq rounds the time it hands over to float32, so it is given
1 - t, whose small values, where fields are steep, keep their digits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.config.checks import number, one_of
from genfound.objectives.base import Field
from genfound.objectives.times import shifted_grid
from genfound.samplers.base import Progress, StepRng

Solve = Callable[[Tensor, Tensor], Tensor]
"""(state at the first time, times) -> states at all times."""

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4")


@torch.no_grad()
def dopri5(
    field: Field,
    batch: Batch,
    times: Tensor,
    rng: StepRng,
    progress: Progress | None = None,
    shift: float | str = 1.0,
    method: str = "dopri5",
    atol: float = 1e-6,
    rtol: float = 1e-3,
    norm: str = "batch",
    clip: bool = False,
) -> Batch:
    """Dormand & Prince's method of order 5, or another one of torchdiffeq.

    Args:
        field: the network.
        batch: noise.
        times: of the states that `progress` sees; the steps of a fixed method, not those of an adaptive one.
        rng: not used.
        progress: called with the state at each of `times` but the first.
        shift: of the times, see `shifted_grid`.
        method: a name of `ADAPTIVE` or `FIXED`; `heun2` is Heun's in every step, `rk4` the 3/8 rule.
        atol, rtol: error that a step may make, absolute and relative to the state.
        norm: `batch`, the root mean square over all images, so that an image depends a little on the others
            (the released behaviour); or `image`, the largest of the images' own.
        clip: end the last step at the end. Otherwise, as released, steps go past it, where the network is asked
            about times below 0, and the result is interpolated. A field that is not defined there is always
            clipped, and if it is not at the end either, the last step is one of Euler's.

    Raises:
        ValueError: an unknown method or norm, or a field that the solver cannot follow.
    """
    check(method, atol, rtol, norm)
    times = shifted_grid(times, shift, batch)
    clock = 1 - (times[:-1] if field.reach == "before" else times).to(batch.x.device)
    clipped = clip or field.reach != "past"
    last = clock[-1].item() if clipped else math.inf  # the trial of the first step's length goes anywhere

    def slope(u: Tensor, x: Tensor) -> Tensor:
        return -field.velocity(replace(batch, x=x), 1 - min(u.item(), last))

    options = _options(batch, norm, clock if clipped else None) if method in ADAPTIVE else {}
    solve = functools.partial(integrate, slope, method=method, atol=atol, rtol=rtol, options=options)
    walk = _fixed_steps if method in FIXED else _adaptive_steps
    for step, x in enumerate(walk(solve, batch.x.float(), clock, progress is not None)):
        batch = replace(batch, x=x)
        if progress is not None:
            progress(step, batch)
    if field.reach == "before":
        before, end = times[-2:].tolist()
        batch = replace(batch, x=batch.x + (end - before) * field.velocity(batch, before))
        if progress is not None:
            progress(len(times) - 2, batch)
    return batch


def check(method: str, atol: float, rtol: float, norm: str, **others: object) -> None:
    """Raise a ValueError for an option that `dopri5` does not take."""
    one_of("sampler.method", method, ADAPTIVE + FIXED)
    one_of("sampler.norm", norm, ("batch", "image"))
    number("sampler.atol", atol, 0)
    number("sampler.rtol", rtol, 0)


def _options(batch: Batch, norm: str, clock: Tensor | None) -> dict[str, Any]:
    options: dict[str, Any] = {} if clock is None else {"step_t": clock[-1:]}
    if norm == "image":
        options["norm"] = lambda error: batch.per_image(error**2).sqrt().max()
    return options


def _fixed_steps(solve: Solve, x: Tensor, clock: Tensor, every: bool) -> Iterator[Tensor]:
    """One after the other, so that no trajectory is kept."""
    for u, u_next in pairwise(clock):
        x = solve(x, torch.stack([u, u_next]))[-1]
        yield x


def _adaptive_steps(solve: Solve, x: Tensor, clock: Tensor, every: bool) -> Iterator[Tensor]:
    """The states at all times, or at the last one alone."""
    yield from solve(x, clock if every else clock[[0, -1]])[1:]


def integrate(slope: Callable[[Tensor, Any], Any], start: Any, clock: Tensor, **options: Any) -> Any:
    """torchdiffeq's odeint: states at all times of dx/du = slope(u, x) from x = start; tensors, or tuples of them.

    Raises:
        ValueError: steps become too short, or numbers infinite.
    """
    from torchdiffeq import odeint  # type: ignore[import-untyped]

    try:
        return odeint(slope, start, clock, **options)
    except AssertionError as error:
        reason = str(error).partition(":")[0]
        raise ValueError(
            f"sampler=dopri5 cannot go on ({reason}); set sampler.clip=true, a larger sampler.rtol or sampler=heun"
        ) from None
