"""Samplers: pure functions (field, batch of noise, times, rng) -> Batch."""

from genfound.samplers.base import Sampler
from genfound.samplers.gaussian import ddim, ddpm
from genfound.samplers.ode import euler, heun

SAMPLERS: dict[str, Sampler] = {"ddpm": ddpm, "ddim": ddim, "euler": euler, "heun": heun}

__all__ = ["SAMPLERS", "Sampler"]
