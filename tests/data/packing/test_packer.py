from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.image_sizes import token_counts
from genfound.data.packing.packer import FixedBatcher, Packer

TOKENS = st.lists(st.integers(1, 40), min_size=1, max_size=50)


def packer(tokens: list[int] | np.ndarray, budget: int, max_images: int = 10_000, lookahead: int = 256) -> Packer:
    """Over an endless repetition of these token counts."""
    return Packer(lambda k: int(tokens[k % len(tokens)]), budget, max_images, lookahead)


@settings(max_examples=60)
@given(TOKENS, st.integers(40, 120), st.integers(1, 12), st.integers(1, 20))
def test_packs_keep_both_budgets_and_waste_nothing(
    tokens: list[int], budget: int, max_images: int, lookahead: int
) -> None:
    source = packer(tokens, budget, max_images, lookahead)
    packs = [source.take() for _ in range(30)]
    for pack in packs:
        assert 1 <= len(pack) <= max_images
        assert sum(tokens[k % len(tokens)] for k in pack) <= budget
    placed = [k for pack in packs for k in pack]
    assert len(placed) == len(set(placed))
    waiting = source.state()["waiting"]
    assert sorted([*placed, *waiting]) == list(range(source.state()["next"]))
    assert len(waiting) <= lookahead


@settings(max_examples=30)
@given(TOKENS, st.integers(40, 120))
def test_a_pack_is_closed_only_when_nothing_waiting_fits(tokens: list[int], budget: int) -> None:
    source = packer(tokens, budget, lookahead=8)
    for _ in range(20):
        gap = budget - sum(tokens[k % len(tokens)] for k in source.take())
        assert all(tokens[k % len(tokens)] > gap for k in source.state()["waiting"])


def test_no_image_waits_for_ever() -> None:
    tokens = [39, *[3] * 30]
    source = packer(tokens, 40, lookahead=16)
    for number in range(200):
        pack = source.take()
        assert max(pack) - min([*pack, *source.state()["waiting"]]) <= 16 * (1 + 40 // 3), number


@pytest.mark.parametrize("view", ["native", "mixed"])
def test_fill_of_imagenets_sizes_at_16384_tokens(view: str) -> None:
    tokens, budget = token_counts(30_000, view), 16_384
    source = packer(np.random.default_rng(0).permutation(tokens).tolist(), budget)
    fills = [sum(source.tokens_at(k) for k in source.take()) / budget for _ in range(250)]
    assert np.mean(fills) >= 0.9999
    assert min(fills) >= 0.999


@settings(max_examples=40)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(1, 60))
def test_a_gap_is_closed_as_far_as_any_images_together_can(waiting: list[int], gap: int) -> None:
    source = packer(waiting, 1000, lookahead=len(waiting))
    source._refill()
    best = max(sum(some) for n in range(len(waiting) + 1) for some in combinations(waiting, n) if sum(some) <= gap)
    chosen = source._closing(gap)
    assert sum(chosen) == best
    assert not Counter(chosen) - Counter(waiting)
    assert chosen == sorted(chosen, reverse=True)


def test_arrival_order_is_kept_where_everything_fits() -> None:
    source = packer([10], 40)
    assert [source.take() for _ in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_the_gap_gets_the_best_fitting_image() -> None:
    source = packer([30, 25, 4, 9, 10, 11], 40, lookahead=6)
    assert source.take() == [0, 4]  # 10 of the remaining 10


def test_several_images_close_a_gap_together() -> None:
    source = packer([30, 25, 3, 9, 7, 8], 40, lookahead=6)
    assert source.take() == [0, 4, 2]  # 7 + 3, where the largest alone would leave one token


@settings(max_examples=30)
@given(TOKENS, st.integers(0, 15))
def test_a_restored_packer_continues_identically(tokens: list[int], before: int) -> None:
    source, fresh = packer(tokens, 60, 5, 12), packer(tokens, 60, 5, 12)
    for _ in range(before):
        source.take()
    state = source.state()
    expected = [source.take() for _ in range(10)]
    fresh.restore(state)
    assert [fresh.take() for _ in range(10)] == expected
    source.restore(state)
    assert [source.take() for _ in range(10)] == expected


def test_chunks_are_consecutive() -> None:
    chunker = FixedBatcher(3)
    assert [chunker.take() for _ in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    state = chunker.state()
    expected = chunker.take()
    chunker.take()
    chunker.restore(state)
    assert chunker.take() == expected == [9, 10, 11]


@pytest.mark.parametrize("source", [packer([7, 9], 40), FixedBatcher(4)], ids=["packer", "chunker"])
def test_states_are_plain_values(source: Packer) -> None:
    source.take()
    for value in source.state().values():
        assert isinstance(value, int) or all(type(v) is int for v in value)
