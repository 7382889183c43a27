from __future__ import annotations

import math

import pytest
import torch

from genfound.objectives.process import cosine, linear, space_timesteps


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
