"""The probability-flow ODE by torchdiffeq, as SiT, FiTv2 and LightningDiT sample.

State and network are float32, steps float64. torchdiffeq rounds the time it hands over to float32, so it is given
1 - t, whose small values, where fields are steep, keep their digits.

As released, steps go past the end, where the network is asked about times below 0, and the result is interpolated;
`clip` ends the last step at the end. A field that is not defined below 0 is always clipped, and if the walk goes on
to where it is not, the last step is one of Euler's. The error of a step is, in the norm `batch`, the root mean square
over all images, so that an image depends a little on the others (the released behaviour); in the norm `image`, the
largest of the images' own.
"""

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
from genfound.objectives.times import Shift, check_shift, shifted_grid
from genfound.samplers.base import Progress, StepRng, sampler, walk

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4")


def check(shift: Shift, method: str, atol: float, rtol: float, norm: str, clip: bool) -> None:
    """Refuse values that the options cannot have."""
    check_shift("sampler.shift", shift)
    one_of("sampler.method", method, ADAPTIVE + FIXED)
    one_of("sampler.norm", norm, ("batch", "image"))
    number("sampler.atol", atol, 0)
    number("sampler.rtol", rtol, 0)


def coupling(method: str, norm: str, **others: object) -> str:
    """Adaptive steps are those of the norm."""
    return norm if method in ADAPTIVE else ""


@sampler(needs="velocity", check=check, coupling=coupling)
def dopri5(
    field: Field,
    batch: Batch,
    times: Tensor,
    rng: StepRng,
    progress: Progress | None = None,
    *,
    shift: Shift = 1.0,
    method: str = "dopri5",
    atol: float = 1e-6,
    rtol: float = 1e-3,
    norm: str = "batch",
    clip: bool = False,
) -> Batch:
    """Dormand & Prince's method of order 5, or another one; `times` are the steps of the fixed ones alone."""
    if ends_early := times[-1].item() < field.lowest:
        times = torch.cat([torch.linspace(times[0], field.lowest, len(times), dtype=torch.float64), times[-1:]])
    times = shifted_grid(times, shift, batch)
    clock = 1 - (times[:-1] if ends_early else times).to(batch.x.device)
    clipped = clip or field.lowest > -math.inf
    last = clock[-1].item() if clipped else math.inf  # the trial of the first step's length goes anywhere

    def slope(u: Tensor, x: Tensor) -> Tensor:
        return -field.velocity(replace(batch, x=x), 1 - min(u.item(), last))

    options: dict[str, Any] = {"step_t": clock[-1:]} if clipped else {}
    if norm == "image":
        options["norm"] = lambda error: batch.per_image(error**2).sqrt().max()
    own = options if method in ADAPTIVE else {}
    solve = functools.partial(integrate, slope, method=method, atol=atol, rtol=rtol, options=own)

    def states() -> Iterator[Tensor]:
        x = batch.x.float()
        for state in _states(solve, x, clock, method in FIXED, every=progress is not None):
            yield (x := state)
        if ends_early:
            before, end = times[-2:].tolist()
            yield x + (end - before) * field.velocity(replace(batch, x=x), before)

    return walk(batch, states(), lambda _, __, x: x, progress, torch.float32)


def _states(
    solve: Callable[[Tensor, Tensor], Tensor], x: Tensor, clock: Tensor, fixed: bool, every: bool
) -> Iterator[Tensor]:
    """The states at all times, or at the last one alone; of fixed steps one after the other: no trajectory is kept."""
    if fixed:
        for ends in pairwise(clock):
            yield (x := solve(x, torch.stack(ends))[-1])
    else:
        yield from solve(x, clock if every else clock[[0, -1]])[1:]


def integrate(slope: Callable[[Tensor, Any], Any], start: Any, clock: Tensor, **options: Any) -> Any:
    """torchdiffeq's odeint: states at all times of dx/du = slope(u, x) from x = start; tensors, or tuples of them."""
    from torchdiffeq import odeint  # type: ignore[import-untyped]

    try:
        return odeint(slope, start, clock, **options)
    except AssertionError as error:
        reason = str(error).partition(":")[0]
        raise ValueError(
            f"sampler=dopri5 cannot go on ({reason}); set sampler.clip=true, a larger sampler.rtol or sampler=heun"
        ) from None
