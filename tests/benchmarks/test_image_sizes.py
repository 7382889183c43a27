from __future__ import annotations

import numpy as np
import pytest

from benchmarks.image_sizes import SMALLEST, image_sizes, token_counts


def test_the_law_is_what_it_says() -> None:
    sizes = image_sizes(100_000)
    assert sizes.shape == (100_000, 2) and sizes.dtype == np.int64
    assert sizes.min() == SMALLEST
    for (height, width), share in {(375, 500): 0.37 * 0.78, (500, 375): 0.37 * 0.22, (333, 500): 0.11 * 0.78}.items():
        assert (sizes == [height, width]).all(axis=1).mean() == pytest.approx(share, abs=0.005)
    assert sizes.mean(axis=0) == pytest.approx([345, 396], rel=0.02)


def test_tokens_at_stride_32_are_those_of_imagenet() -> None:
    tokens = token_counts(100_000)
    assert tokens.mean() == pytest.approx(152, rel=0.01)
    assert np.median(tokens) == 150
    assert np.quantile(tokens, 0.25) == 42
    assert np.quantile(tokens, 0.99) == pytest.approx(1100, rel=0.05)
    assert 4000 < tokens.max() <= 4096
    assert tokens.min() == 4


def test_the_sizes_depend_on_the_seed_alone() -> None:
    assert np.array_equal(image_sizes(50, seed=3), image_sizes(50, seed=3))
    assert not np.array_equal(image_sizes(50, seed=3), image_sizes(50, seed=4))


def test_mixed_views_are_three_of_each_image() -> None:
    mixed = token_counts(1000, "mixed")
    assert len(mixed) == 3000
    assert np.array_equal(mixed[::3], token_counts(1000))
    assert (mixed[1::3] == 64).all() and (mixed[2::3] == 256).all()
