from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genfound.layers.rope import RULES, Rope, apply_rope, row_major

HEAD = 16
PLAIN = Rope(HEAD, 10_000, "normal", 16, None, decouple=True, exact=True)


def turned(x: torch.Tensor, coordinates: torch.Tensor, rope: Rope = PLAIN) -> torch.Tensor:
    return apply_rope(x, rope(coordinates, torch.ones(1, 2), lambda v: v))


def xl(rule: str, target: Sequence[int] | None, **options: Any) -> Rope:
    """The positions of FiT-XL and NiT-XL."""
    return Rope(
        **{"head": 72, "theta": 10_000, "trained": 16, "decouple": True, "exact": True, **options},
        rule=rule,
        target=target,
    )


def stretch(rope: Rope, sizes: Sequence[Sequence[int]] = ((16, 16),)) -> torch.Tensor:
    """Frequencies (R, 2, F) over those of training."""
    grid = torch.tensor(sizes)
    return rope.frequencies(grid) / replace(rope, rule="normal").frequencies(grid)


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
    rows, columns = replace(PLAIN, theta=100).frequencies(torch.ones(3, 2))[0]
    torch.testing.assert_close(rows, torch.tensor([1, 100**-0.25, 100**-0.5, 100**-0.75]))
    assert torch.equal(rows, columns)
    assert rows.dtype == torch.float32


def test_ntk_keeps_the_highest_frequency_and_divides_the_lowest_by_the_stretch() -> None:
    rows, columns = stretch(xl("ntk-aware", (20, 40)))[0]
    torch.testing.assert_close(rows[[0, -1]], torch.tensor([1, 16 / 20]))
    torch.testing.assert_close(columns[[0, -1]], torch.tensor([1, 16 / 40]))
    assert (rows.diff() < 0).all()
    assert (columns.diff() < 0).all()


def test_coupled_axes_follow_the_longer_side() -> None:
    assert torch.allclose(stretch(xl("linear", (20, 40), decouple=False)), torch.tensor(16 / 40))
    rows, columns = stretch(xl("linear", (20, 40)))[0]
    assert torch.allclose(rows, torch.tensor(16 / 20))
    assert torch.allclose(columns, torch.tensor(16 / 40))


def test_the_ramp_of_yarn_as_released_and_as_printed() -> None:
    released, printed = (stretch(xl(rule, (20, 20)))[0, 0, :3] for rule in ("yarn", "yarn-paper"))
    torch.testing.assert_close(released, torch.tensor([1.0, 0.9, 0.8]))
    torch.testing.assert_close(printed, torch.tensor([0.81, 0.803, 0.80]), atol=5e-4, rtol=0)
    released, printed = (stretch(xl(rule, (40, 40), trained=32))[0, 0, :5] for rule in ("yarn", "yarn-paper"))
    torch.testing.assert_close(released, torch.tensor([1.0, 0.95, 0.9, 0.85, 0.8]))
    torch.testing.assert_close(printed, torch.tensor([0.826, 0.813, 0.805, 0.801, 0.80]), atol=6e-4, rtol=0)


@pytest.mark.parametrize(
    ("rule", "logits"),
    [("normal", 1), ("ntk-aware", 1), ("ntk-aware-pro2", 1.2055), ("ntk-aware-pro2-paper", 1.0805),
     ("scale1", 1.3305), ("scale2", 1.2055), ("yarn", 1.0451), ("yarn-paper", 1.0451)],
)  # fmt: skip
def test_what_logits_are_multiplied_by_at_320_pixels(rule: str, logits: float) -> None:
    """Training at 16 x 16 tokens, sampling at 20 x 20."""
    assert xl(rule, (20, 20)).factor(torch.ones(1, 2)).item() ** 2 == pytest.approx(logits, abs=1e-4)


def test_printed_attention_scale_leaves_the_training_sizes_alone() -> None:
    sizes = torch.tensor([[16, 16], [8, 24], [20, 20]])
    assert (xl("ntk-aware-pro2", None).factor(sizes) > 1).all()
    assert xl("ntk-aware-pro2-paper", None).factor(sizes).tolist()[:2] == [1, 1]


@pytest.mark.parametrize("rule", RULES)
def test_images_of_one_size_are_as_a_fixed_target(rule: str) -> None:
    sizes = torch.tensor([[10, 20], [24, 8], [5, 5]])
    own = xl(rule, None)
    for i, size in enumerate(sizes.tolist()):
        fixed = xl(rule, size)
        torch.testing.assert_close(own.frequencies(sizes).expand(3, 2, -1)[i], fixed.frequencies(sizes)[0])
        torch.testing.assert_close(own.factor(sizes).expand(3)[i], fixed.factor(sizes)[0])


@pytest.mark.parametrize("rule", RULES)
def test_no_rule_changes_frequencies_within_the_trained_size(rule: str) -> None:
    assert torch.allclose(stretch(xl(rule, None), [[16, 16], [3, 16], [1, 1], [0, 0]]), torch.tensor(1.0))
    assert xl(rule, None).factor(torch.tensor([[0, 0]])).isfinite().all()


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_every_token_gets_the_rotation_of_its_image(layout: str) -> None:
    sizes = torch.tensor([[2, 30], [5, 5]])
    rope = xl("ntk-aware-pro2", None)
    alone = [rope(row_major(torch.arange(h * w), w), torch.tensor([[h, w]]), lambda v: v) for h, w in sizes.tolist()]
    if layout == "packed":
        owner = torch.arange(2).repeat_interleave(sizes.prod(dim=1))
        n = torch.cat([torch.arange(60), torch.arange(25)])
        both = rope(row_major(n, sizes[owner, 1]), sizes, lambda v: v[owner])
        parts = both.split([60, 25])
    else:
        both = rope(row_major(torch.arange(60), sizes[:, 1:]), sizes, lambda v: v[:, None])
        parts = (both[0], both[1, :25])
    for part, expected in zip(parts, alone, strict=True):
        torch.testing.assert_close(part, expected)


def test_positions_have_no_limit_and_large_ones_are_exact() -> None:
    cos, sin = PLAIN(torch.tensor([[4000, 70_000]]), torch.ones(1, 2), lambda v: v).unbind(-1)
    assert cos[0, 0, 0].item() == pytest.approx(torch.tensor(4000.0, dtype=torch.float64).cos().item(), abs=1e-5)
    assert sin[0, 0, HEAD // 4].item() == pytest.approx(torch.tensor(70_000.0).double().sin().item(), abs=1e-5)


def test_inexact_rounds_angles_as_bfloat16_does() -> None:
    places = row_major(torch.arange(32 * 32), 32)
    exact, rounded = (
        xl("normal", None, exact=exact)(places, torch.ones(1, 2), lambda v: v)[..., 0] for exact in (True, False)
    )
    assert 0.025 < (exact - rounded).abs().max() < 0.035
    assert torch.equal(rounded, rounded.bfloat16().float())


def test_tokens_are_numbered_row_by_row() -> None:
    assert row_major(torch.arange(5), 3).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1]]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"rule": "ntk"}, r"model\.rope_scaling\.rule=ntk is unknown; choose one of normal, linear, ntk-aware"),
        ({"head": 18}, r"multiple of 4 channels.*not 18; change model\.heads"),
        ({"rule": "yarn", "head": 4}, r"and 8 with.*not 4"),
        ({"trained": 1}, r"model\.rope_scaling\.trained=1 must be at least 2"),
        ({"target": [16]}, r"model\.rope_scaling\.target=\[16\] must be null or \[rows,columns\]"),
        ({"target": [16, 0]}, r"model\.rope_scaling\.target=\[16, 0\] must be null"),
    ],
)
def test_what_cannot_be_is_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(PLAIN, **changed)


def test_missing_and_unknown_keys_are_refused() -> None:
    whole = {"rule": "normal", "trained": 16, "target": None, "decouple": True, "exact": True}
    assert Rope.of(HEAD, 10_000, whole) == PLAIN
    wrongs: list[Any] = [{"rule": "normal"}, {**whole, "factor": 2}, "ntk-aware"]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=r"model\.rope_scaling=.* must have the keys decouple, exact"):
            Rope.of(HEAD, 10_000, wrong)
