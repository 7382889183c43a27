"""One network, wrapped to predict anything on any path, has one velocity error."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.modules.base import TIMES
from genfound.objectives.base import Net, Objective
from genfound.objectives.gaussian import Gaussian
from genfound.objectives.interpolants import INTERPOLANTS
from genfound.objectives.predictions import PREDICTIONS
from tests.helpers import linear_flow, three_layouts

SIZES = [(3, 5), (4, 4), (1, 7), (2, 3)]
Velocity = Callable[[Tensor, Tensor], Tensor]
"""(state, time) of the linear path -> its velocity; time broadcasts."""

VELOCITIES: dict[str, Velocity] = {
    "zero": lambda z, s: torch.zeros_like(z),
    "any": lambda z, s: torch.tanh(2 * z) * (1 - s) - z * s,
    "perfect": lambda z, s: (z - 0.7) / s,  # where all data are 0.7
}


def on_flow(path: str, prediction: str, velocity: Velocity, scale: float = 1.0) -> tuple[Objective, Net]:
    def net(batch: Batch, t: Tensor) -> Tensor:
        p = INTERPOLANTS[path].with_noise(scale).point(t.double()).of(batch)
        s = p.sigma / (p.alpha + p.sigma)
        z = batch.x / (p.alpha + p.sigma)
        v = velocity(z, s)
        x0, noise = z - s * v, z + (1 - s) * v
        return {"velocity": p.velocity(x0, noise), "noise": noise, "x0": x0, "score": -noise / p.sigma}[prediction]

    return linear_flow(path=path, prediction=prediction, noise_scale=scale), net


def on_gaussian(prediction: str, velocity: Velocity, **options: object) -> tuple[Objective, Net]:
    settings = {"timesteps": 1000, "schedule": "linear", "clip_x0": False, "weight": "image", **options}
    objective = Gaussian(prediction=prediction, variance="learned_range", loss="hybrid", **settings)  # type: ignore

    def net(batch: Batch, t: Tensor) -> Tensor:
        log_signal = torch.tensor([objective.process.log_signal(value)[0] for value in t.tolist()]).double()
        alpha, sigma = (batch.expand(v.sqrt().float()) for v in (log_signal.exp(), -torch.expm1(log_signal)))
        s, z = sigma / (alpha + sigma), batch.x / (alpha + sigma)
        v = velocity(z, s)
        out = z - s * v if prediction == "x0" else z + (1 - s) * v
        return torch.cat([out, torch.full_like(out, 9.0)], dim=1 if batch.layout == "dense" else -1)

    return objective, net


WRAPPED: dict[str, Callable[[Velocity], tuple[Objective, Net]]] = {
    **{
        f"{path} {prediction}": lambda v, a=path, b=prediction: on_flow(a, b, v)  # type: ignore[misc]
        for path in INTERPOLANTS
        for prediction in PREDICTIONS
    },
    **{
        f"{path} {prediction} of more noise": lambda v, a=path, b=prediction: on_flow(a, b, v, 2.0)  # type: ignore[misc]
        for path in ("linear", "gvp")
        for prediction in PREDICTIONS
    },
    "gaussian epsilon": lambda v: on_gaussian("epsilon", v),
    "gaussian x0": lambda v: on_gaussian("x0", v),
    "gaussian cosine": lambda v: on_gaussian("epsilon", v, schedule="cosine", timesteps=4000),
}


@pytest.mark.parametrize("known", VELOCITIES)
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_it_is_one_number_for_every_objective(known: str, wrapped: str) -> None:
    objective, net = WRAPPED[wrapped](VELOCITIES[known])
    for name, batch in three_layouts(SIZES).items():
        if known == "perfect":
            batch.x[:] = 0.7
        noise = torch.randn_like(batch.x, dtype=torch.float32)
        time = torch.linspace(*TIMES, len(batch.y), dtype=torch.float64)
        s = batch.expand(time).float()
        target = noise - batch.x
        expected = batch.per_image((VELOCITIES[known](batch.x + s * target, s) - target) ** 2)
        found = objective.velocity_error(net, batch, time, noise)
        # Between two steps of a discrete process its time is a matter of interpolation.
        rtol = 3e-3 if wrapped.startswith("gaussian") else 1e-3
        torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-4, msg=f"{name}: {found} {expected}")
        assert (found[: len(SIZES)] > 0.1).all() or known == "perfect"


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_network_is_told_the_timestep_of_a_ratio_of_noise_to_signal(schedule: str) -> None:
    process = on_gaussian("x0", VELOCITIES["zero"], schedule=schedule)[0].process  # type: ignore[attr-defined]
    a = process.tables.alphas_cumprod
    steps = torch.tensor([0, 1, 250, 998, 999])
    torch.testing.assert_close(process.timestep_of(((1 - a) / a).sqrt()[steps]), steps.double())
    between = process.timestep_of(torch.tensor([0.3, 2.0], dtype=torch.float64))
    for t, ratio in zip(between.tolist(), (0.3, 2.0), strict=True):
        log_a = process.log_signal(t)[0]
        assert math.sqrt(-math.expm1(log_a) / math.exp(log_a)) == pytest.approx(ratio, rel=1e-4)
    assert process.timestep_of(torch.tensor([1e-9, 1e9], dtype=torch.float64)).tolist() == pytest.approx([0, 999])
