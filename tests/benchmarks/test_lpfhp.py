from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.image_sizes import token_counts
from benchmarks.lpfhp import BestFit, assign, costs, fill, lpfhp
from genfound.data.packing.packer import Packer

LENGTHS = st.lists(st.integers(1, 40), max_size=60)


@settings(max_examples=60)
@given(LENGTHS, st.integers(40, 120), st.integers(1, 10))
def test_lpfhp_packs_every_image_once_within_both_limits(lengths: list[int], budget: int, images: int) -> None:
    strategies = lpfhp(lengths, budget, images)
    packed = Counter[int]()
    for pack, count in strategies:
        assert pack == sorted(pack) and sum(pack) <= budget and 1 <= len(pack) <= images and count >= 1
        packed += Counter(pack * count)
    assert packed == Counter(lengths)
    packs = assign(strategies, lengths)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))


@pytest.mark.parametrize("lengths", [[5, 129], [0, 5]])
def test_images_that_do_not_fit_a_pack_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"images of \d+ to \d+ tokens do not fit packs of 128"):
        lpfhp(lengths, 128, 10)


def test_the_last_image_of_a_length_is_taken_first() -> None:
    assert assign([([3, 5], 2)], [5, 3, 5, 3]) == [[3, 2], [1, 0]]


def test_best_fit_takes_the_largest_image_that_fits_again_and_again() -> None:
    tokens = [30, 25, 3, 9, 7, 8]
    packs = [source(lambda k: tokens[k % 6], 40, 99, 6).take() for source in (BestFit, Packer)]
    assert packs == [[0, 3], [0, 4, 2]]


def test_the_packer_fills_better_than_both() -> None:
    tokens, budget = np.random.default_rng(0).permutation(token_counts(40_000)).tolist(), 16_384
    shares = {}
    for source in (BestFit, Packer):
        packs = source(lambda k: tokens[k % len(tokens)], budget, 1000, 256)
        shares[source] = fill([[tokens[k] for k in packs.take()] for _ in range(300)], budget)
    official = [pack for pack, count in lpfhp(tokens, budget, budget) for _ in range(count)]
    assert shares[Packer].mean() > shares[BestFit].mean() > fill(official, budget).mean() - 1e-3
    assert shares[Packer].min() > fill(official, budget).min()


def test_cost_counts_tokens_and_pairs() -> None:
    assert costs([[3, 4], [7]], 2).tolist() == [12 * 4 * 7 + 4 * 25, 12 * 4 * 7 + 4 * 49]
