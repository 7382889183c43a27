"""Samplers: pure functions (field, batch of noise, times, rng) -> Batch."""

from genfound.samplers.base import Sampler
from genfound.samplers.ode import euler, heun

SAMPLERS: dict[str, Sampler] = {"euler": euler, "heun": heun}

__all__ = ["SAMPLERS", "Sampler"]
