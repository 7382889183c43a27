from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genfound.layers.rope import axis_frequencies, rotate, rotation

HEAD = 16


def turned(x: torch.Tensor, coordinates: torch.Tensor, theta: float = 10_000) -> torch.Tensor:
    return rotate(x, *rotation(coordinates, axis_frequencies(HEAD // 2, theta)))


@settings(max_examples=30)
@given(st.tuples(st.integers(0, 60), st.integers(0, 60)), st.tuples(st.integers(0, 60), st.integers(0, 60)))
def test_scores_depend_on_differences_of_coordinates_only(shift: tuple[int, int], at: tuple[int, int]) -> None:
    q, k = torch.randn(2, 5, 1, HEAD, generator=torch.Generator().manual_seed(1)).double()
    ours = torch.randint(0, 9, (5, 2), generator=torch.Generator().manual_seed(2)) + torch.tensor(at)
    scores = []
    for offset in (torch.tensor([0, 0]), torch.tensor(shift)):
        a, b = (turned(x, c).squeeze(1) for x, c in ((q, ours + offset), (k, ours.flip(0) + offset)))
        scores.append(a @ b.T)
    torch.testing.assert_close(scores[0], scores[1], atol=1e-3, rtol=1e-4)


def test_scores_do_depend_on_the_differences() -> None:
    q, k = torch.randn(2, 1, 1, HEAD)
    score = [(turned(q, torch.tensor([[0, 0]])) * turned(k, torch.tensor([c]))).sum() for c in ([0, 0], [1, 0], [0, 1])]
    assert min(abs(a - b) for i, a in enumerate(score) for b in score[:i]) > 1e-3


def test_the_first_half_turns_with_the_row_and_the_second_with_the_column() -> None:
    x = torch.randn(1, 3, HEAD)
    by_row, by_column = turned(x, torch.tensor([[5, 0]])), turned(x, torch.tensor([[0, 5]]))
    assert torch.equal(by_row[..., HEAD // 2 :], x[..., HEAD // 2 :])
    assert torch.equal(by_column[..., : HEAD // 2], x[..., : HEAD // 2])
    swapped = turned(x.roll(HEAD // 2, -1), torch.tensor([[0, 5]])).roll(-HEAD // 2, -1)
    torch.testing.assert_close(by_row, swapped)


def test_rotation_equals_multiplication_by_unit_complex_numbers() -> None:
    x = torch.randn(7, 2, HEAD)
    coordinates = torch.randint(0, 100, (7, 2))
    frequencies = 10_000 ** (-torch.arange(HEAD // 4).double() / (HEAD // 4))
    angles = (coordinates[:, :, None] * frequencies).flatten(1)[:, None]
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    torch.testing.assert_close(turned(x, coordinates), expected.float(), atol=1e-5, rtol=1e-5)


def test_lengths_are_kept() -> None:
    x = torch.randn(9, 2, HEAD)
    out = turned(x, torch.randint(0, 1000, (9, 2)))
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))


def test_half_precision_is_rotated_in_float32() -> None:
    x, coordinates = torch.randn(4, 2, HEAD).bfloat16(), torch.randint(0, 50, (4, 2))
    out = turned(x, coordinates)
    assert out.dtype == torch.float32
    assert torch.equal(out, turned(x.float(), coordinates))


def test_frequencies_fall_geometrically_from_one() -> None:
    f = axis_frequencies(8, theta=100)
    torch.testing.assert_close(f, torch.tensor([1, 100**-0.25, 100**-0.5, 100**-0.75]))
    assert f.dtype == torch.float32


def test_an_odd_number_of_channels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"even number.*got 9.*model\.heads"):
        axis_frequencies(9, 10_000)
