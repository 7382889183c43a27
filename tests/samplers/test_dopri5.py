from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.objectives.gaussian import Gaussian
from genfound.samplers.dopri5 import ADAPTIVE, FIXED
from tests.helpers import SAMPLERS, at_one_time, linear_flow, packed, sampler_of
from tests.samplers import test_ddpm, toys
from tests.samplers.test_ddpm import exact as exact_noise
from tests.samplers.test_ddpm import objective as gaussian
from tests.samplers.test_ddpm import solution as gaussian_solution
from tests.samplers.toys import SeededNoise, exact, solution

SIZES = [(3, 5), (4, 4), (2, 1)]


def solve(batch: Batch | None = None, steps: int = 10, **options: Any) -> tuple[Tensor, list[float]]:
    flow, field, net = exact()
    batch = packed(SIZES) if batch is None else batch
    return SAMPLERS["dopri5"](field, batch, flow.times(steps), SeededNoise(batch), **options).x, net.asked


@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_methods_solve_the_ode(method: str) -> None:
    out, _ = solve(method=method, rtol=1e-5)
    wanted = solution(linear_flow(), packed(SIZES).x, 1, 0)
    torch.testing.assert_close(out, wanted.float(), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("method", "stages"), [("euler", 1), ("midpoint", 2), ("heun2", 2), ("heun3", 3), ("rk4", 4)])
def test_network_calls_of_fixed_methods(method: str, stages: int) -> None:
    assert set(FIXED) == {"euler", "midpoint", "heun2", "heun3", "rk4"}
    assert len(solve(method=method)[1]) == 10 * stages


def test_released_steps_go_past_the_end_and_clipped_ones_do_not() -> None:
    past, asked = solve(rtol=1e-5)
    assert min(asked) < 0
    clipped, asked = solve(rtol=1e-5, clip=True)
    assert min(asked) == pytest.approx(0, abs=1e-7)
    torch.testing.assert_close(past, clipped, atol=1e-3, rtol=0)


def test_the_number_of_steps_is_that_of_states_alone() -> None:
    (few, calls), (many, same) = solve(steps=2), solve(steps=50)
    assert torch.equal(few, many)
    assert calls == same


def test_the_norm_of_the_worst_image_does_not_let_others_hide_it() -> None:
    """One image is hard; among many easy ones the mean error forgives it."""

    def field_error(norm: str) -> float:
        flow = linear_flow()
        batch = packed([(1, 1)] * 64, channels=1)

        def stiff(b: Batch, t: float) -> Tensor:
            hard = (b.y == 0).float() * math.cos(40 * t) * 20
            return b.expand(hard)

        out = SAMPLERS["dopri5"](flow.field(at_one_time(stiff)), batch, flow.times(1), SeededNoise(batch), norm=norm).x
        exact_end = batch.x[0] - 20 * math.sin(40) / 40
        return (out[0] - exact_end).abs().item()

    assert field_error("image") < field_error("batch") / 3


def test_progress_sees_the_states_at_all_times() -> None:
    seen: list[tuple[int, Tensor]] = []
    out, _ = solve(steps=4, rtol=1e-5, progress=lambda i, b: seen.append((i, b.x)))
    assert [i for i, _ in seen] == [0, 1, 2, 3]
    assert torch.equal(seen[-1][1], out)
    for (_, state), t in zip(seen, (0.75, 0.5, 0.25, 0.0), strict=True):
        wanted = solution(linear_flow(), packed(SIZES).x, 1, t)
        torch.testing.assert_close(state, wanted.float(), atol=1e-3, rtol=1e-3)


def test_gaussian_diffusion_is_never_asked_below_its_first_step() -> None:
    objective, asked, batch = gaussian(), list[float](), packed(SIZES)

    def spy(b: Batch, t: Tensor) -> Tensor:
        asked.append(t[0].item())
        return exact_noise(b, t)

    seen: list[int] = []
    times = objective.times(5)
    field = objective.field(spy)
    out = SAMPLERS["dopri5"](field, batch, times, SeededNoise(batch), lambda i, _: seen.append(i), rtol=1e-5).x
    assert min(asked) == pytest.approx(0, abs=1e-3)
    assert seen == list(range(6))
    torch.testing.assert_close(out, gaussian_solution(batch.x).float(), atol=0.01, rtol=0.01)
    assert SAMPLERS["dopri5"].needs in Gaussian.gives


def test_a_field_without_end_is_reported() -> None:
    flow, batch = linear_flow(), packed(SIZES)
    field = flow.field(lambda b, t: b.x / 0.0)
    with pytest.raises(ValueError, match=r"sampler=dopri5 cannot go on .*sampler\.clip=true"):
        SAMPLERS["dopri5"](field, batch, flow.times(2), SeededNoise(batch))


@pytest.mark.parametrize("key", ["method", "norm"])
def test_an_unknown_name_lists_the_choices(key: str) -> None:
    with pytest.raises(ValueError, match=rf"sampler\.{key}=wrong is unknown; choose one of \w+"):
        sampler_of("dopri5", **{key: "wrong"})


@pytest.mark.parametrize(("path", "prediction"), [("vp", "velocity"), ("vp", "score"), ("triangle", "velocity")])
def test_clipped_steps_and_their_trials_stay_within_the_path(
    path: str, prediction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial of the first step is long where the velocity at noise is small, as for data of mean 0."""
    monkeypatch.setattr(toys, "MEAN", 0.0)
    flow, field, net = exact(path=path, prediction=prediction)
    batch = packed(SIZES)
    times = flow.times(4)
    out = SAMPLERS["dopri5"](field, batch, times, SeededNoise(batch), rtol=1e-5, clip=True).x
    assert min(net.asked) > times[-1].item() - 1e-6
    wanted = solution(flow, batch.x, times[0].item(), times[-1].item())
    torch.testing.assert_close(out, wanted.float(), atol=5e-3, rtol=0)


@pytest.mark.parametrize("prediction", ["noise", "x0"])
def test_a_path_that_ends_is_not_left(prediction: str) -> None:
    flow, field, net = exact(path="vp", prediction=prediction)
    batch = packed(SIZES)
    out = SAMPLERS["dopri5"](field, batch, flow.times(4), SeededNoise(batch), rtol=1e-4).x
    assert min(net.asked) >= flow.sample_interval[0] - 1e-6 and out.isfinite().all()


@pytest.mark.parametrize("prediction", ["epsilon", "x0"])
def test_gaussian_diffusion_of_centred_data(prediction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_ddpm, "MEAN", 0.0)
    diffusion, batch = gaussian(prediction=prediction), packed(SIZES)

    def net(b: Batch, t: Tensor) -> Tensor:
        a = test_ddpm.signal(t[0].item())
        noise = exact_noise(b, t).double()
        return (noise if prediction == "epsilon" else (b.x - (1 - a).sqrt() * noise) / a.sqrt()).float()

    times = diffusion.times(5)
    out = SAMPLERS["dopri5"](diffusion.field(net), batch, times, SeededNoise(batch), rtol=1e-5).x
    torch.testing.assert_close(out, gaussian_solution(batch.x).float(), atol=0.01, rtol=0.01)


@pytest.mark.parametrize("options", [{"rtol": -1}, {"atol": float("nan")}, {"rtol": "small"}])
def test_tolerances_are_numbers(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"sampler\.{next(iter(options))}=.* must be a finite number of at least 0"):
        sampler_of("dopri5", **options)
