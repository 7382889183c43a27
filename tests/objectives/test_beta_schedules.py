from __future__ import annotations

import math

import pytest
import torch

from genfound.objectives.process import cosine, leading_timesteps, linear, scaled_linear, space_timesteps, sqrt


def test_the_linear_schedule() -> None:
    assert linear(1000)[[0, -1]].tolist() == [1e-4, 0.02]
    assert linear(250)[[0, -1]].tolist() == [4e-4, 0.08]


def test_the_cosine_schedule() -> None:
    a = (1 - cosine(1000)).cumprod(0)
    u = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    expected = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(a[[249, 499, 749]], expected)
    assert cosine(1000)[-1] == 0.999


def test_kept_steps() -> None:
    assert space_timesteps(5, 1000) == [0, 250, 500, 749, 999]  # 499.5 is rounded to the even 500
    assert space_timesteps("5", 1000) == space_timesteps([5], 1000) == space_timesteps(5, 1000)
    assert space_timesteps("2,0,1", 10) == [0, 3, 7]
    assert space_timesteps("ddim4", 1000) == [0, 250, 500, 750]
    assert space_timesteps(1000, 1000) == list(range(1000))


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        (0, "must be at least 1"),
        ("0,0", "must be at least 1"),
        (1001, "1001 steps cannot be chosen from 1000"),
        (-3, "-3 steps cannot be chosen"),
        ("400,400,400", "400 steps cannot be chosen from 334"),
        ("ddim300", "no whole stride gives 300 of 1000"),
        ("ddimmer", "is unknown; write a number"),
        ("ten", "is unknown; write a number"),
    ],
)
def test_impossible_steps_are_refused(sections: int | str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"sampler\.steps={sections}.*{reason}"):
        space_timesteps(sections, 1000)


def test_ldms_schedules() -> None:
    """With its own ends, and at other numbers of steps, which scale nothing."""
    for steps in (1000, 250):
        betas = scaled_linear(steps, 0.0015, 0.0195)
        torch.testing.assert_close(betas[[0, -1]].tolist(), [0.0015, 0.0195])
        torch.testing.assert_close(betas.sqrt().diff().std().item(), 0.0, atol=1e-12, rtol=0)
        torch.testing.assert_close(sqrt(steps)[[0, -1]].tolist(), [0.01, 0.02**0.5])
    assert (1 - scaled_linear(1000, 0.0015, 0.0195)).prod().item() == pytest.approx(1.423e-4, rel=1e-3)


def test_leading_steps() -> None:
    assert leading_timesteps(4, 1000) == [1, 251, 501, 751]
    assert len(leading_timesteps(30, 1000)) == 31
    assert leading_timesteps(500, 1000)[-1] == 999
    assert leading_timesteps(3, 1000, quadratic=True) == [1, 201, 801]


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        (
            501,
            "would be 1000, beyond the 999 of objective.timesteps=1000; the nearest number below is 500",
        ),
        (1000, "the nearest number below is 500"),
        (300, "the nearest number below is 250"),
        (0, "must be a number from 1 to 1000"),
        ("ddim50", "must be a number from 1 to 1000"),
    ],
)
def test_leading_steps_that_do_not_exist_are_refused(steps: int | str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"sampler\.steps={steps}\b.*{reason}"):
        leading_timesteps(steps, 1000)
