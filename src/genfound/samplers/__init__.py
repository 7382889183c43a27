"""Samplers: pure functions (field, batch of noise, times, rng) -> Batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from genfound.objectives.times import check_shift
from genfound.samplers import ddpm, dopri5, ode
from genfound.samplers import sde as stochastic
from genfound.samplers.base import Sampler

SAMPLERS: dict[str, Sampler] = {
    "ddpm": ddpm.ddpm,
    "ddim": ddpm.ddim,
    "euler": ode.euler,
    "heun": ode.heun,
    "dopri5": dopri5.dopri5,
    "sde": stochastic.sde,
}

CHECKS: dict[str, Callable[..., None]] = {
    "ddim": ddpm.check,
    "dopri5": dopri5.check,
    "sde": stochastic.check,
}


def adapts(options: Mapping[str, Any]) -> bool:
    """Whether a sampler, `{name, steps, ...}`, chooses its own steps by the error that they make."""
    return options["name"] == "dopri5" and options["method"] in dopri5.ADAPTIVE


def check(options: Mapping[str, Any]) -> None:
    """Raise a ValueError for a value that a sampler, `{name, steps, ...}`, does not take."""
    if "shift" in options:
        check_shift("sampler.shift", options["shift"])
    if options["name"] in CHECKS:
        CHECKS[options["name"]](**{key: value for key, value in options.items() if key != "name"})


__all__ = ["SAMPLERS", "Sampler", "adapts", "check"]
