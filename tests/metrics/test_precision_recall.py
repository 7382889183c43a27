import pytest
import torch
from torch import Tensor

from genfound.metrics.precision_recall import manifold, precision_recall, squared_distances


def points(count: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def by_definition(reference: Tensor, samples: Tensor, k: int) -> tuple[float, float]:
    """Without blocks: sort every row of every distance."""

    def radius(x: Tensor) -> Tensor:
        return torch.cdist(x, x).sort(dim=1).values[:, k]

    across = torch.cdist(reference, samples)
    precision = (across <= radius(reference)[:, None]).any(0).double().mean()
    recall = (across <= radius(samples)[None]).any(1).double().mean()
    return float(precision), float(recall)


@pytest.mark.parametrize("blocks", [(1000, 1000), (7, 1000), (1000, 3), (13, 29)])
def test_blocks_change_nothing(blocks: tuple[int, int]) -> None:
    reference, samples = points(90, 0), points(70, 1, 0.7)
    shares = precision_recall(
        manifold(reference, [3, 5], False, *blocks), manifold(samples, [3, 5], False, *blocks), False, *blocks
    )
    for place, k in enumerate((3, 5)):
        expected = by_definition(reference, samples, k)
        assert (shares.precision[place], shares.recall[place]) == pytest.approx(expected, abs=1e-12)


def test_a_set_covers_itself_and_nothing_far_away() -> None:
    here, there = manifold(points(50, 0), [3]), manifold(points(50, 1, 100.0), [3])
    assert precision_recall(here, here) == ([1.0], [1.0])
    assert precision_recall(here, there) == ([0.0], [0.0])


def test_the_border_is_inside() -> None:
    line = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    reference = manifold(line, [1])  # radius 1 around 0 and around 1
    samples = manifold(torch.tensor([[2.0], [2.5]], dtype=torch.float64), [1])
    assert precision_recall(reference, samples).precision == [0.5]


def test_one_mode_is_precise_and_does_not_recall() -> None:
    modes = torch.cat([points(60, 0), points(60, 1, 20.0)])
    shares = precision_recall(manifold(modes, [3]), manifold(points(60, 2), [3]))
    assert shares.precision[0] > 0.9
    assert shares.recall[0] < 0.55


def test_half_precision_is_near_and_survives_overflow() -> None:
    u, v = points(20, 0).float(), points(30, 1).float()
    assert (squared_distances(u, v, half=True) - squared_distances(u, v)).abs().max() < 0.1
    torch.testing.assert_close(squared_distances(300 * u, 300 * v, half=True), squared_distances(300 * u, 300 * v))


def test_too_few_points_and_numbers_that_are_none() -> None:
    with pytest.raises(ValueError, match="3 images are too few"):
        manifold(points(3, 0), [3])
    with pytest.raises(ValueError, match="not finite"):
        manifold(points(9, 0) / 0, [3])
