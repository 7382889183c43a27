from __future__ import annotations

import pytest
import torch
from torch import Tensor

from genfound.layouts import Dense, Packed
from genfound.objectives.interpolants import INTERPOLANTS
from genfound.objectives.times import (
    TIME_LAWS,
    shift_factor,
    shifted,
    shifted_grid,
    time_grid,
    windowed,
)
from genfound.rng import Rng
from tests.helpers import latents, packed, three_layouts

CPU = torch.device("cpu")


def draw(name: str, mean: float = 0.0, std: float = 1.0, path: str = "linear", n: int = 100_000) -> Tensor:
    return TIME_LAWS[name](mean, std, INTERPOLANTS[path])(Rng(0), n, CPU)


def test_uniform_times() -> None:
    t = draw("uniform", 9.0, 9.0)
    assert t.dtype == torch.float64
    assert 0 <= t.min() < 1e-4
    assert 1 - 1e-4 < t.max() < 1
    assert abs(t.mean() - 1 / 2) < 3e-3
    assert abs(t.var() - 1 / 12) < 1e-3


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 1.0), (-0.4, 1.2)])
def test_logit_normal_times(mean: float, std: float) -> None:
    t = draw("logit_normal", mean, std)
    logits = torch.logit(t)
    assert ((t > 0) & (t < 1)).all()
    assert abs(logits.mean() - mean) < 0.02
    assert abs(logits.std() - std) < 0.02
    assert abs(t.median() - torch.sigmoid(torch.tensor(mean))) < 0.01


@pytest.mark.parametrize("path", INTERPOLANTS)
def test_log_normal_noise_levels_are_those_of_edm_on_any_path(path: str) -> None:
    own = INTERPOLANTS[path]
    t = draw("log_normal", -0.4, 0.7, path) * own.end
    point = own.point(t)
    levels = (point.sigma / point.alpha).log()
    assert abs(levels.mean() + 0.4) < 0.02
    assert abs(levels.std() - 0.7) < 0.02


def test_on_the_linear_path_log_normal_is_logit_normal() -> None:
    torch.testing.assert_close(draw("log_normal", 0.3, 1.1), draw("logit_normal", 0.3, 1.1))


@pytest.mark.parametrize("factor", [0.3, 1.0, 3.0])
def test_a_shift_keeps_the_ends_and_multiplies_the_odds(factor: float) -> None:
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    moved = shifted(t, factor)
    assert moved[[0, -1]].tolist() == [0, 1]
    torch.testing.assert_close(moved[1:-1] / (1 - moved[1:-1]), factor * t[1:-1] / (1 - t[1:-1]))
    torch.testing.assert_close(shifted(moved, 1 / factor), t)


def test_a_shift_by_the_size_of_the_latent() -> None:
    """The square root of its numbers over those of a 32 x 32 x 4 latent, whatever holds it."""
    batch = packed([(32, 32), (16, 16), (64, 64)], channels=4)
    assert shift_factor("sampler.shift", "auto", batch).tolist() == [1.0, 0.5, 2.0]
    for one in three_layouts([(4, 4)] * 3, patch_size=2).values():
        assert one.numbers(one.x)[:3].tolist() == [64] * 3
    assert shift_factor("sampler.shift", 2.5, batch) == 2.5


@pytest.mark.parametrize("setting", ["wide", 0.0, -1.0])
def test_a_bad_shift_is_refused(setting: float | str) -> None:
    with pytest.raises(ValueError, match=rf"sampler\.shift={setting} must be a positive number or auto"):
        shift_factor("sampler.shift", setting, packed([(2, 2)]))


def test_a_shifted_grid() -> None:
    grid, batch = time_grid(4, 1.0, 0.0), packed([(2, 2)])
    assert torch.equal(shifted_grid(grid, 1.0, batch), grid)
    assert shifted_grid(grid, 3.0, batch).tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    steps = shifted_grid(time_grid(4, 999.0, -1.0), 3.0, batch)  # of integer steps
    assert steps.tolist() == pytest.approx([999, 899, 749, 499, -1])


def test_one_grid_needs_images_of_one_size() -> None:
    grid = time_grid(2, 1.0, 0.0)
    one = Packed(1, 40, 4).to_batch(latents([(2, 4)] * 2), torch.zeros(2, dtype=torch.long))
    factor = (2 * 4 * 4 / 4096) ** 0.5
    assert shifted_grid(grid, "auto", one).tolist() == pytest.approx([1, shifted(torch.tensor(0.5), factor).item(), 0])
    with pytest.raises(ValueError, match=r"sampler\.shift=auto needs images of one size"):
        shifted_grid(grid, "auto", packed([(2, 4), (4, 4)]))


@pytest.mark.parametrize("name", TIME_LAWS)
def test_a_window_holds_all_times(name: str) -> None:
    law = TIME_LAWS[name](0.0, 1.0, INTERPOLANTS["linear"])
    t = windowed(name, law, [0.2, 0.4], 1.0)(Rng(0), 20_000, CPU)
    assert t.shape == (20_000,)
    assert 0.2 <= t.min() < 0.201
    assert 0.399 < t.max() <= 0.4


def test_a_window_in_a_share_of_the_micro_batches() -> None:
    law = TIME_LAWS["uniform"](0.0, 1.0, INTERPOLANTS["linear"])
    inside = [
        (windowed("uniform", law, [0.2, 0.4], 0.3)(Rng(0).at(k), 50, CPU) <= 0.4).all().item() for k in range(300)
    ]
    assert 0.2 < sum(inside) / 300 < 0.4


@pytest.mark.parametrize("window", [[0.5], [0.6, 0.4], [-0.1, 0.5], [0.5, 1.1]])
def test_a_window_is_two_ordered_times(window: list[float]) -> None:
    with pytest.raises(ValueError, match=r"objective\.time_window=.* low <=? high"):
        windowed("uniform", TIME_LAWS["uniform"](0, 1, INTERPOLANTS["linear"]), window, 1.0)


def test_a_window_that_is_never_met_is_reported() -> None:
    law = TIME_LAWS["logit_normal"](-30.0, 0.1, INTERPOLANTS["linear"])
    with pytest.raises(ValueError, match=r"hardly ever met by objective\.time=logit_normal"):
        windowed("logit_normal", law, [0.5, 0.9], 1.0)(Rng(0), 4, CPU)


def test_time_grid() -> None:
    grid = time_grid(4, 1.0, 0.0)
    assert grid.dtype == torch.float64
    assert grid.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert time_grid(1, 1.0, 0.0).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("steps", [0, -3])
def test_a_grid_needs_a_step(steps: int) -> None:
    with pytest.raises(ValueError, match=rf"sampler\.steps={steps} must be a whole number of at least 1"):
        time_grid(steps, 1.0, 0.0)


def test_dense_latents_count_all_their_numbers() -> None:
    batch = Dense(2).to_batch(latents([(4, 6)] * 2), torch.zeros(2))
    assert batch.numbers(batch.x).tolist() == [96, 96]
