"""LightningDiT: laws of time and time grids of its transport, which counts from noise to data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genfound.objectives.flow import Flow
from genfound.objectives.times import shifted_grid
from genfound.rng import Rng
from tests.golden.adapters import Results, adapter
from tests.golden.adapters.sit_transport import dense, flow
from tests.golden.fill import inputs, unit
from tests.helpers import linear_flow

Fixture = Mapping[str, Any]


class TransportDraws(Rng):
    """The official draws, whose times run backwards: x0 is noise.0, uniform and normal numbers count for themselves."""

    def __init__(self, decides: bool, attempt: int = 0) -> None:
        super().__init__(0)
        self.decides, self.attempt = decides, attempt

    def at(self, *key: int | str) -> Rng:
        return TransportDraws(self.decides, int(key[-1]))

    def uniform(self, purpose: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        number = int(self.decides and purpose == "time")
        drawn = (torch.from_numpy(unit(f"rand.{number}", shape)) / np.sqrt(3) + 1) / 2
        return drawn if purpose == "time_window" else 1 - drawn.double()

    def normal(self, purpose: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        number = 1 + self.attempt if purpose == "time" else 0
        drawn = torch.from_numpy(unit(f"noise.{number}", shape))
        return -drawn if purpose == "time" else drawn


def transport(case: Mapping[str, Any]) -> tuple[Flow, Rng]:
    """The objective of official arguments, and the draws that it would see."""
    asked = dict(case["transport"])
    log_normal, shifts, cosine = (asked.pop(k, False) for k in ("use_lognorm", "shift_lg", "use_cosine_loss"))
    part, ratio, fixed = asked.pop("partitial_train", None), asked.pop("partial_ratio", 1.0), case["sp_timesteps"]
    options: dict[str, Any] = {"time": "logit_normal" if log_normal else "uniform", "directional": float(cosine)}
    if shifts:
        options["time_mean"] = -case["shifted_mu"]
    if part is not None:
        options |= {"time_window": [1 - part[1], 1 - part[0]], "time_window_share": ratio}
    if fixed is not None:
        options |= {"time": "uniform", "time_window": [1 - fixed[1], 1 - fixed[0]], "time_window_share": 1.0}
    return flow(asked, **options), TransportDraws(decides=part is not None)


@adapter("lightningdit", "t_sampling")
def training_times(fixture: Fixture) -> Results:
    """The times of every rule."""
    batch, results = dense(inputs(fixture)["x"]), {}
    for name, case in fixture["config"]["cases"].items():
        if case["dtype_t"] != "float32":
            raise NotImplementedError(f"times of type {case['dtype_t']}")
        objective, draws = transport(case)
        part = objective.time_law(draws, len(batch.y), batch.x.device)
        results[name] = 1 - objective.training_times(batch, part)
    return results


@adapter("lightningdit", "time_grid")
def time_grids(fixture: Fixture) -> Results:
    """Sampling grids; num_steps counts times, and a shift of 0 is none."""
    batch, results = dense(torch.zeros(1, 4, 2, 2)), {}
    for name, case in fixture["config"]["cases"].items():
        unknown = case.keys() - {"num_steps", "timestep_shift"}
        if unknown:
            raise NotImplementedError(f"unknown arguments {sorted(unknown)}")
        shift = 1 / case["timestep_shift"] if case["timestep_shift"] > 0 else 1.0
        results[name] = 1 - shifted_grid(linear_flow().times(case["num_steps"] - 1), shift, batch)
    return results
