"""Samplers: pure functions (field, batch of noise, times, rng) -> Batch."""

from genfound.samplers.adaptive import dopri5
from genfound.samplers.base import Sampler
from genfound.samplers.gaussian import ddim, ddpm
from genfound.samplers.ode import euler, heun
from genfound.samplers.sde import sde

SAMPLERS: dict[str, Sampler] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "heun": heun,
    "dopri5": dopri5,
    "sde": sde,
}

__all__ = ["SAMPLERS", "Sampler"]
